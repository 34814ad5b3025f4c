//! The kernel's refusals: each noted in the journal as it happens, and kept by leaf until the receipt of its execution
//! takes them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, broadcast};

use super::LeafId;
use super::flows::{Flows, KernelRefusal, Noted, Owner};
use super::kernel::KernelEvent;

/// Refusals of one leaf that are listed one by one; the kernel's counts stand for the rest.
const KEPT_PER_LEAF: usize = 256;
/// Refusals of one leaf that are lines of the log; the others are there at `debug` only.
const LOGGED_PER_LEAF: u64 = 16;
/// How long a receipt waits for refusals that the kernel counted and the reader has not handed over yet.
const PATIENCE: Duration = Duration::from_millis(500);

struct OfLeaf {
    owner: Owner,
    refusals: Vec<Arc<KernelRefusal>>,
    seen: u64,
}

#[derive(Default)]
struct Shared {
    leaves: Mutex<HashMap<LeafId, OfLeaf>>,
    arrived: Notify,
    flows: Flows,
}

/// Collects events for the leaves that were announced; others stand in the journal as nobody's.
#[derive(Clone, Default)]
pub struct Refusals(Arc<Shared>);

/// What one leaf was refused.
#[derive(Debug, Default)]
pub struct Collected {
    pub refusals: Vec<Arc<KernelRefusal>>,
    /// Whether as many were seen as the kernel counted.
    pub complete: bool,
}

impl Refusals {
    /// Notes what it collects in `flows` too.
    pub fn new(flows: Flows) -> Self {
        Self(Arc::new(Shared { flows, ..Shared::default() }))
    }

    /// Collects from `events` until the sender is gone.
    pub async fn collect(self, mut events: broadcast::Receiver<KernelEvent>) {
        loop {
            match events.recv().await {
                Ok(event) => self.note(event),
                // The receipts of this time find fewer than the kernel counted, and say so.
                Err(broadcast::error::RecvError::Lagged(lost)) => tracing::warn!(lost, "kernel events were lost"),
                Err(broadcast::error::RecvError::Closed) => return,
            }
        }
    }

    /// Announces a leaf and whose it is; to be called before it is admitted.
    pub fn expect(&self, leaf: LeafId, owner: Owner) {
        self.leaves().insert(leaf, OfLeaf { owner, refusals: Vec::new(), seen: 0 });
    }

    /// Takes what was collected for a leaf, once all have arrived that the kernel could hand over, or the wait is over.
    /// `lost` of those that it `counted` it could not.
    pub async fn take(&self, leaf: LeafId, counted: u64, lost: u64) -> Collected {
        let coming = counted.saturating_sub(lost);
        let all_here = async {
            loop {
                let arrived = self.0.arrived.notified();
                if self.leaves().get(&leaf).is_none_or(|of_leaf| of_leaf.seen >= coming) {
                    return;
                }
                arrived.await;
            }
        };
        let _ = tokio::time::timeout(PATIENCE, all_here).await;
        match self.leaves().remove(&leaf) {
            Some(of_leaf) => Collected { complete: of_leaf.seen >= counted, refusals: of_leaf.refusals },
            None => Collected { complete: counted == 0, refusals: Vec::new() },
        }
    }

    /// Drops what was collected for a leaf.
    pub fn forget(&self, leaf: LeafId) {
        self.leaves().remove(&leaf);
    }

    fn note(&self, event: KernelEvent) {
        let refusal = match self.leaves().get_mut(&event.leaf) {
            None => {
                log(&event, false);
                Some(Arc::new(KernelRefusal::new(event, None)))
            }
            Some(of_leaf) => {
                of_leaf.seen += 1;
                log(&event, of_leaf.seen <= LOGGED_PER_LEAF);
                (of_leaf.refusals.len() < KEPT_PER_LEAF).then(|| {
                    let refusal = Arc::new(KernelRefusal::new(event, Some(of_leaf.owner.clone())));
                    of_leaf.refusals.push(Arc::clone(&refusal));
                    refusal
                })
            }
        };
        if let Some(refusal) = refusal {
            self.0.flows.note(Noted::Kernel(refusal));
        }
        self.0.arrived.notify_waiters();
    }

    fn leaves(&self) -> MutexGuard<'_, HashMap<LeafId, OfLeaf>> {
        self.0.leaves.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn log(event: &KernelEvent, loud: bool) {
    let KernelEvent { leaf, hook, reason, protocol, address, port, .. } = event;
    let leaf = leaf.0;
    if loud {
        tracing::info!(leaf, hook, reason, protocol, ?address, port, "refused by the kernel");
    } else {
        tracing::debug!(leaf, hook, reason, protocol, ?address, port, "refused by the kernel");
    }
}
