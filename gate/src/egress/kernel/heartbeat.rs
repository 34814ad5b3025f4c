//! Tells the kernel program every half second that the gate is alive. Four missed ones close every leaf.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use aya::maps::{Array, MapData};

use super::{KernelError, pod, sys};

/// How often the heartbeat is written.
pub const PERIOD: Duration = Duration::from_millis(500);
/// When [`Heartbeat::health`] complains: before the kernel does.
const LATE: Duration = Duration::from_millis(1_500);

struct Shared {
    last_ns: AtomicU64,
    stop: Mutex<bool>,
    stopped: Condvar,
}

pub struct Heartbeat {
    shared: Arc<Shared>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Heartbeat {
    pub fn start(mut map: Array<MapData, u64>, mut control: Array<MapData, pod::Control>) -> Result<Self, KernelError> {
        let shared = Arc::new(Shared {
            last_ns: AtomicU64::new(sys::boottime_ns()),
            stop: Mutex::new(false),
            stopped: Condvar::new(),
        });
        write(&mut map)?;
        let thread = thread::Builder::new()
            .name("kernel-heartbeat".into())
            .spawn({
                let shared = Arc::clone(&shared);
                move || {
                    beat(&shared, &mut map);
                    // Closes every leaf now, not two seconds from now.
                    let _ = control.set(0, pod::Control::default(), 0);
                }
            })
            .map_err(KernelError::io("starting the heartbeat"))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    pub fn health(&self) -> Result<(), KernelError> {
        let age = sys::boottime_ns().saturating_sub(self.shared.last_ns.load(Ordering::Relaxed));
        let age = Duration::from_nanos(age);
        if age > LATE { Err(KernelError::HeartbeatLate(age)) } else { Ok(()) }
    }
}

fn beat(shared: &Shared, map: &mut Array<MapData, u64>) {
    let mut stop = shared.stop.lock().unwrap_or_else(PoisonError::into_inner);
    while !*stop {
        match write(map) {
            Ok(now) => shared.last_ns.store(now, Ordering::Relaxed),
            Err(error) => tracing::error!(%error, "the kernel program's heartbeat was not written"),
        }
        stop = shared.stopped.wait_timeout(stop, PERIOD).unwrap_or_else(PoisonError::into_inner).0;
    }
}

fn write(map: &mut Array<MapData, u64>) -> Result<u64, KernelError> {
    let now = sys::boottime_ns();
    map.set(0, now, 0).map_err(|source| KernelError::Map { map: "HEARTBEAT", source })?;
    Ok(now)
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        *self.shared.stop.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.shared.stopped.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
