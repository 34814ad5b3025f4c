//! The resolver that sandboxes see.
//!
//! Whatever server a sandbox asks, the kernel brings the query here. It is answered out of the profile of the execution
//! that asks and nothing else: a name that the profile has gets an address of 198.18.0.0/15 that stands for it in that
//! execution, and every other query is refused, with the id of the decision in the answer, and recorded. No query is ever
//! passed on, so that there is nothing that DNS could carry out: this module knows no other server. What a name means is
//! looked up by the proxy, when the stand-in is connected to.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout};

use self::answer::Asking;
use self::server::{Slot, Sweep, Whose};
use super::flow::FlowRecord;
use super::profile::Profile;
use super::{DatagramAttribution, LeafId};

mod answer;
mod books;
pub mod message;
mod rate;
mod server;
mod sockets;
mod table;

pub use self::books::Counts;
pub use self::message::Transport;
pub use self::rate::Bucket;
pub use self::sockets::{SLOTS, Slots};
pub use self::table::{Full, NameTable, Unnamed};

/// Queries of nobody that are answered at once, and each second after that; more are dropped.
const STRANGERS: u32 = 64;
/// How long the end of an execution waits for the sockets to take what has arrived.
const SWEEP_TIME: Duration = Duration::from_secs(1);

/// What one execution may take.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Names that get an address; one more is refused.
    pub names_per_execution: usize,
    /// Queries at once; one more is refused.
    pub queries_burst: u32,
    /// Queries each second for as long as it goes on; one more is refused.
    pub queries_per_second: u32,
    /// Refusals that are recorded one by one; one record stands for the rest.
    pub records_per_execution: usize,
    /// For a client over a stream to send its next query, to send the rest of one, and to take an answer; then the
    /// stream is closed.
    pub stream_time: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            names_per_execution: 1024,
            queries_burst: 512,
            queries_per_second: 128,
            records_per_execution: 256,
            stream_time: Duration::from_secs(10),
        }
    }
}

/// Whose queries these are, and which names they may be for.
#[derive(Clone, Debug)]
pub struct Execution {
    pub execution_id: String,
    pub action_id: String,
    pub principal: String,
    pub workspace: String,
    pub profile: Arc<Profile>,
}

/// Lets a leaf connect to the addresses that stand for its names.
pub trait Reach: Send + Sync {
    /// From now on `leaf` may connect to `address` at `ports`, of which there is one or more. Called once for each
    /// address of an execution, before anybody can learn of the address.
    ///
    /// # Errors
    /// [`ReachError`]; the name then has no address.
    fn reach(&self, leaf: LeafId, address: Ipv4Addr, ports: &[u16]) -> Result<(), ReachError>;
}

/// Why the kernel does not let an address be reached.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ReachError(pub String);

/// How a namespace's own sockets are held to the kernel's record. The listener is the execution; where the kernel
/// records who asks, its record must say the same.
#[derive(Clone)]
pub struct Isolated {
    pub attribution: Option<Arc<dyn DatagramAttribution>>,
    /// The cookie of the namespace, by which its records are found.
    pub netns: Option<u64>,
}

/// What all executions share.
pub struct Shared {
    registry: Mutex<HashMap<LeafId, Arc<Asking>>>,
    reach: Arc<dyn Reach>,
    limits: Limits,
    strangers: Mutex<Bucket>,
    flows: broadcast::Sender<Arc<FlowRecord>>,
    sweeps: Mutex<Vec<mpsc::Sender<Sweep>>>,
}

/// The resolver. Dropped, it answers nothing more on its own sockets.
pub struct DnsServer {
    shared: Arc<Shared>,
    tasks: Mutex<Vec<AbortHandle>>,
}

/// An execution that is answered. Dropped without [`OpenNames::close`], it is not answered any more all the same.
pub struct OpenNames {
    asking: Arc<Asking>,
    sweeps: Vec<mpsc::Sender<Sweep>>,
    tasks: Vec<AbortHandle>,
}

/// What is kept of an execution's queries.
#[derive(Clone, Debug, PartialEq)]
pub struct Closed {
    /// One record for each name that was refused and the rule that refused it, oldest first.
    pub flows: Vec<FlowRecord>,
    pub counts: Counts,
}

/// Answers one execution's queries over streams that somebody else has accepted and attributed.
#[derive(Clone)]
pub struct OverTcp(Arc<Asking>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl DnsServer {
    pub fn new(limits: Limits, reach: Arc<dyn Reach>) -> Self {
        let shared = Shared {
            registry: Mutex::default(),
            reach,
            limits,
            strangers: Mutex::new(Bucket::new(STRANGERS, STRANGERS)),
            flows: broadcast::Sender::new(1024),
            sweeps: Mutex::default(),
        };
        Self { shared: Arc::new(shared), tasks: Mutex::default() }
    }

    /// Answers on sockets that every leaf of the gate's own network namespace can send to. A datagram that
    /// `attribution` does not know is refused. Call it within a tokio runtime.
    ///
    /// # Errors
    /// When a socket cannot be used; none of them is served then.
    pub fn serve(&self, sockets: Vec<UdpSocket>, attribution: Arc<dyn DatagramAttribution>) -> io::Result<()> {
        let whose = || Whose::Shared { shared: Arc::clone(&self.shared), attribution: Arc::clone(&attribution) };
        let slots = sockets.into_iter().map(|socket| Slot::new(socket, whose())).collect::<io::Result<_>>()?;
        let (sweeps, tasks) = spawn(slots);
        lock(&self.shared.sweeps).extend(sweeps);
        lock(&self.tasks).extend(tasks);
        Ok(())
    }

    /// Answers the execution in this leaf until it is closed or dropped. One that had the same leaf is over.
    pub fn open(&self, leaf: LeafId, execution: Execution) -> OpenNames {
        let asking = Arc::new(Asking::new(leaf, execution, Arc::clone(&self.shared)));
        if let Some(before) = lock(&self.shared.registry).insert(leaf, Arc::clone(&asking)) {
            before.end();
        }
        OpenNames { asking, sweeps: Vec::new(), tasks: Vec::new() }
    }

    /// The first record of each name and rule from now on, as it is made, those of queries that are nobody's included.
    /// A receiver that falls more than 1024 behind loses the oldest and is told how many.
    pub fn flows(&self) -> broadcast::Receiver<Arc<FlowRecord>> {
        self.shared.flows.subscribe()
    }
}

impl Drop for DnsServer {
    fn drop(&mut self) {
        lock(&self.tasks).iter().for_each(AbortHandle::abort);
    }
}

impl OpenNames {
    /// Answers on the sockets of a network namespace that only this execution is in. Call it within a tokio runtime.
    ///
    /// # Errors
    /// When a socket cannot be used; none of them is served then.
    pub fn serve_isolated(&mut self, sockets: Vec<UdpSocket>, isolated: &Isolated) -> io::Result<()> {
        let whose = || Whose::Isolated { asking: Arc::clone(&self.asking), isolated: isolated.clone() };
        let slots = sockets.into_iter().map(|socket| Slot::new(socket, whose())).collect::<io::Result<_>>()?;
        let (sweeps, tasks) = spawn(slots);
        self.sweeps.extend(sweeps);
        self.tasks.extend(tasks);
        Ok(())
    }

    /// What the stand-ins of this execution stand for.
    pub fn table(&self) -> Arc<NameTable> {
        Arc::clone(self.asking.table())
    }

    /// For the streams to port 53 that the proxy accepts for this execution.
    pub fn over_tcp(&self) -> OverTcp {
        OverTcp(Arc::clone(&self.asking))
    }

    /// Answers one message that arrived by other ways than the sockets here; `None` where nothing may be sent back.
    pub fn answer(&self, message: &[u8], transport: Transport, client: SocketAddr) -> Option<Vec<u8>> {
        self.asking.answer(message, transport, client)
    }

    /// Ends the service. Call it when nothing runs in the leaf any more; what was sent before that is noted too.
    pub async fn close(self) -> Closed {
        let sweeps = [lock(&self.asking.shared().sweeps).as_slice(), &self.sweeps].concat();
        let mut waiting = Vec::with_capacity(sweeps.len());
        for sweep in sweeps {
            let (done, swept) = oneshot::channel();
            if sweep.send(done).await.is_ok() {
                waiting.push(swept);
            }
        }
        let all_swept = async {
            for swept in waiting {
                let _ = swept.await;
            }
        };
        if timeout(SWEEP_TIME, all_swept).await.is_err() {
            tracing::warn!("the resolver's sockets took too long to be emptied");
        }
        let (flows, counts) = self.asking.close();
        Closed { flows, counts }
    }
}

impl Drop for OpenNames {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
        self.asking.shared().forget(&self.asking);
        self.asking.end();
    }
}

impl OverTcp {
    /// Answers until the client has no more to ask or the execution is over.
    pub async fn serve<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: S, client: SocketAddr) {
        server::over_stream(&self.0, stream, client).await;
    }
}

impl Shared {
    fn asking(&self, leaf: LeafId) -> Option<Arc<Asking>> {
        lock(&self.registry).get(&leaf).cloned()
    }

    fn forget(&self, asking: &Arc<Asking>) {
        let mut registry = lock(&self.registry);
        if registry.get(&asking.leaf()).is_some_and(|there| Arc::ptr_eq(there, asking)) {
            registry.remove(&asking.leaf());
        }
    }

    /// Whether one more query of nobody is answered.
    fn stranger_may_hear(&self) -> bool {
        lock(&self.strangers).take(Instant::now())
    }

    fn publish(&self, record: FlowRecord) {
        let _ = self.flows.send(Arc::new(record));
    }
}

fn spawn(slots: Vec<Slot>) -> (Vec<mpsc::Sender<Sweep>>, Vec<AbortHandle>) {
    slots
        .into_iter()
        .map(|slot| {
            let (sweep, sweeps) = mpsc::channel(64);
            (sweep, tokio::spawn(slot.serve(sweeps)).abort_handle())
        })
        .unzip()
}

#[cfg(test)]
mod tests;
