//! A leaf from its first entry to the last: what it may reach and who serves it, and at its end what was seen of it.

use std::sync::Arc;
use std::time::Duration;

use super::services::{self, Services};
use crate::egress::LeafId;
use crate::egress::flow::FlowRecord;
use crate::egress::flows::{KernelRefusal, Owner};
use crate::egress::kernel::{KernelCounts, KernelError};
use crate::egress::profile::Profile;
use crate::gate::Gate;
use crate::sandbox::{Leaf, Network};

/// What the kernel and the proxy saw of one execution.
#[derive(Debug, Default)]
pub struct EgressEvidence {
    pub counts: Option<KernelCounts>,
    pub flows: Vec<FlowRecord>,
    /// What the kernel refused, one by one.
    pub refusals: Vec<Arc<KernelRefusal>>,
    /// Set when a part of the evidence could not be had.
    pub incomplete: bool,
}

/// Who is held, and to what.
pub struct Hold<'a> {
    pub owner: Owner,
    pub profile: &'a Profile,
    /// TCP ports at which it answers others.
    pub inbound_ports: &'a [u16],
    /// From now; then the kernel lets nothing of it through.
    pub deadline: Duration,
    pub network: Network,
    /// The decision id that the first connection is decided under.
    pub first_decision: Option<String>,
    /// It has no end that is known before, so that neither its bytes nor its connections are counted down.
    pub lasts: bool,
}

/// A leaf that is held. Dropped before its end, it is closed and forgotten.
pub struct Held<'a> {
    services: Services<'a>,
    traces: Traces<'a>,
    leaf: &'a Leaf,
}

/// What an execution has in the kernel's map and among the refusals; given back also when nobody comes to the end.
struct Traces<'a> {
    gate: &'a Gate,
    leaf: LeafId,
}

impl Drop for Traces<'_> {
    fn drop(&mut self) {
        let _ = self.gate.enforcer.retire(self.leaf);
        self.gate.refusals.forget(self.leaf);
    }
}

impl<'a> Held<'a> {
    /// Opens the services and admits the leaf. Where that fails nothing may run; the end must come all the same.
    pub fn begin(gate: &'a Gate, leaf: &'a Leaf, hold: Hold<'_>) -> (Self, Result<(), KernelError>) {
        let traces = Traces { gate, leaf: leaf.id() };
        gate.refusals.expect(leaf.id(), hold.owner.clone());
        let (profile, ports, deadline) = (hold.profile, hold.inbound_ports, hold.deadline);
        // A program that was detached since the start would hold nothing: then nothing runs.
        let admitted = gate.enforcer.health();
        let services = Services::open(gate, leaf.id(), hold);
        let admitted = admitted
            .and_then(|()| services::admit(gate, leaf.id(), profile, deadline))
            .and_then(|()| gate.enforcer.answer_at(leaf.id(), ports));
        (Self { services, traces, leaf }, admitted)
    }

    /// What serves it.
    pub fn services(&mut self) -> &mut Services<'a> {
        &mut self.services
    }

    /// Ends whatever runs, and gives what was seen: kill → the proxy notes → the entry goes → counters → the leaf goes.
    pub async fn end(self, decision_id: &str) -> EgressEvidence {
        let Self { services, traces, leaf } = self;
        let (gate, id) = (traces.gate, traces.leaf);
        let mut egress = EgressEvidence { incomplete: gate.enforcer.health().is_err(), ..EgressEvidence::default() };
        let doomed = leaf.clone();
        let killed = tokio::task::spawn_blocking(move || doomed.kill()).await;
        egress.flows = services.close().await;
        match gate.enforcer.retire(id) {
            Ok(counts) => egress.counts = Some(counts),
            Err(error) => {
                tracing::error!(%error, decision_id, "the kernel's counts are lost");
                egress.incomplete = true;
            }
        }
        let (counted, lost) =
            egress.counts.as_ref().map_or((0, 0), |counts| (counts.denied.total(), counts.events_lost));
        let collected = gate.refusals.take(id, counted, lost).await;
        std::mem::forget(traces);
        egress.incomplete |= !collected.complete;
        egress.refusals = collected.refusals;
        let doomed = leaf.clone();
        let removed = match killed {
            Ok(Ok(())) => tokio::task::spawn_blocking(move || doomed.remove()).await.unwrap_or(Ok(())),
            Ok(Err(error)) => Err(error),
            Err(_) => Ok(()),
        };
        if let Err(error) = removed {
            // No entry: what is left in it reaches nothing. The next start sweeps it.
            tracing::error!(%error, decision_id, "a leaf is left behind");
        }
        egress
    }
}
