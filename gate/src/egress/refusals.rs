//! The kernel's refusals, kept by leaf until the receipt of its execution takes them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, broadcast};

use super::LeafId;
use super::kernel::KernelEvent;

/// Refusals that a receipt lists one by one; the kernel's counts stand for the rest.
const KEPT_PER_LEAF: usize = 256;
/// How long a receipt waits for refusals that the kernel counted and the reader has not handed over yet.
const PATIENCE: Duration = Duration::from_millis(500);

#[derive(Default)]
struct OfLeaf {
    events: Vec<KernelEvent>,
    seen: u64,
}

#[derive(Default)]
struct Shared {
    leaves: Mutex<HashMap<LeafId, OfLeaf>>,
    arrived: Notify,
}

/// Collects events for the leaves that were announced; others are logged and dropped.
#[derive(Clone, Default)]
pub struct Refusals(Arc<Shared>);

/// What one leaf was refused.
#[derive(Debug)]
pub struct Collected {
    pub events: Vec<KernelEvent>,
    /// Whether as many were seen as the kernel counted.
    pub complete: bool,
}

impl Refusals {
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

    /// Announces a leaf; to be called before it is admitted.
    pub fn expect(&self, leaf: LeafId) {
        self.leaves().insert(leaf, OfLeaf::default());
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
        let taken = self.leaves().remove(&leaf).unwrap_or_default();
        Collected { complete: taken.seen >= counted, events: taken.events }
    }

    /// Drops what was collected for a leaf.
    pub fn forget(&self, leaf: LeafId) {
        self.leaves().remove(&leaf);
    }

    fn note(&self, event: KernelEvent) {
        if let Some(of_leaf) = self.leaves().get_mut(&event.leaf) {
            of_leaf.seen += 1;
            if of_leaf.events.len() < KEPT_PER_LEAF {
                of_leaf.events.push(event);
            }
        }
        self.0.arrived.notify_waiters();
    }

    fn leaves(&self) -> MutexGuard<'_, HashMap<LeafId, OfLeaf>> {
        self.0.leaves.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
