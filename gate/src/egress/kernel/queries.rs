//! Who asks: records of DNS queries that have left a leaf, taken one by one as the resolver reads them.
//!
//! The program counts the records that it makes, this side counts those that it takes away, and the difference is what
//! a leaf has under way. A query that the resolver's full socket buffer dropped leaves its record behind; those are
//! swept.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use aya::maps::{HashMap, MapData, MapError};
use latchgate_egress_types as types;

use super::{KernelError, address, locked, pod, sys};
use crate::egress::{Asker, DatagramKey, LeafId};

/// Longer than a client waits before it asks again, and than the resolver can have a query lying in its buffer.
const LIFE: Duration = Duration::from_secs(15);
const SWEEP_PERIOD: Duration = Duration::from_secs(5);

const EXIST: u64 = 2;

pub struct Maps {
    pub queries: HashMap<MapData, pod::QueryKey, pod::QueryRecord>,
    pub taken: HashMap<MapData, u64, u64>,
    /// How many a leaf may send; the kernel program's to write.
    pub pace: HashMap<MapData, u64, u64>,
}

struct Shared {
    maps: Mutex<Maps>,
    stop: Mutex<bool>,
    stopped: Condvar,
}

pub struct Queries {
    shared: Arc<Shared>,
    /// Of the namespace that this process started in.
    own_netns: u64,
    sweeper: Option<thread::JoinHandle<()>>,
}

impl Queries {
    pub fn start(maps: Maps) -> Result<Self, KernelError> {
        let own_netns = sys::own_netns_cookie().map_err(KernelError::io("SO_NETNS_COOKIE"))?;
        let shared = Arc::new(Shared { maps: Mutex::new(maps), stop: Mutex::new(false), stopped: Condvar::new() });
        let sweeper = thread::Builder::new()
            .name("kernel-queries".into())
            .spawn({
                let shared = Arc::clone(&shared);
                move || sweep(&shared)
            })
            .map_err(KernelError::io("starting the sweeper of queries"))?;
        Ok(Self { shared, own_netns, sweeper: Some(sweeper) })
    }

    pub fn admit(&self, leaf: LeafId) -> Result<(), MapError> {
        let mut maps = locked(&self.shared.maps);
        maps.pace.insert(leaf.0, 0, 0)?;
        maps.taken.insert(leaf.0, 0, 0)
    }

    /// Its records are swept; until then they say nothing of anybody.
    pub fn retire(&self, leaf: LeafId) {
        let mut maps = locked(&self.shared.maps);
        let _ = maps.taken.remove(&leaf.0);
        let _ = maps.pace.remove(&leaf.0);
    }

    pub fn take(&self, query: &DatagramKey) -> Option<Asker> {
        let key = pod::QueryKey(types::QueryKey {
            netns_cookie: query.netns.unwrap_or(self.own_netns),
            source_ip: address::mapped_words(query.source.ip()),
            source_port: query.source.port(),
            slot_port: query.slot_port,
            id: query.id,
            reserved: 0,
        });
        let mut maps = locked(&self.shared.maps);
        let record = maps.queries.get(&key, 0).ok()?.0;
        let is_admitted = maps.remove(&key, record.leaf);
        let server = address::destination(&record.server)?;
        is_admitted.then_some(Asker { leaf: LeafId(record.leaf), server })
    }
}

impl Maps {
    /// Whether the record was there and its leaf is admitted.
    fn remove(&mut self, key: &pod::QueryKey, leaf: u64) -> bool {
        if self.queries.remove(key).is_err() {
            return false;
        }
        let Ok(taken) = self.taken.get(&leaf, 0) else { return false };
        self.taken.insert(leaf, taken.saturating_add(1), EXIST).is_ok()
    }

    fn remove_older_than(&mut self, life: Duration) {
        let now = sys::boottime_ns();
        let life = u64::try_from(life.as_nanos()).unwrap_or(u64::MAX);
        let old: Vec<_> = self
            .queries
            .iter()
            .flatten()
            .filter(|(_, record)| {
                now.saturating_sub(record.0.at_ns) > life || self.taken.get(&record.0.leaf, 0).is_err()
            })
            .collect();
        for (key, record) in old {
            self.remove(&key, record.0.leaf);
        }
    }
}

fn sweep(shared: &Shared) {
    let mut stop = shared.stop.lock().unwrap_or_else(PoisonError::into_inner);
    while !*stop {
        stop = shared.stopped.wait_timeout(stop, SWEEP_PERIOD).unwrap_or_else(PoisonError::into_inner).0;
        locked(&shared.maps).remove_older_than(LIFE);
    }
}

impl Drop for Queries {
    fn drop(&mut self) {
        *self.shared.stop.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.shared.stopped.notify_all();
        if let Some(sweeper) = self.sweeper.take() {
            let _ = sweeper.join();
        }
    }
}
