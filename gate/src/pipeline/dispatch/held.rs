//! A leaf from its first entry to the last: what it may reach and who serves it, and at its end what was seen of it.

use std::sync::Arc;
use std::time::Duration;

use super::services::{self, Services};
use crate::egress::LeafId;
use crate::egress::agreement::{self, Moment};
use crate::egress::flow::{Agreement, DecidedBy, FlowRecord, Verdict};
use crate::egress::flows::{KernelRefusal, Owner};
use crate::egress::kernel::{KernelCounts, KernelError, boottime_ns};
use crate::egress::profile::Profile;
use crate::gate::Gate;
use crate::sandbox::{Leaf, Network};

/// What the kernel and the proxy saw of one execution.
#[derive(Debug, Default)]
pub struct EgressEvidence {
    pub counts: Option<KernelCounts>,
    /// Each connection with what kernel and proxy counted of it, and each name that was refused.
    pub flows: Vec<FlowRecord>,
    /// The worst of the flows' agreements; `None` when nothing was compared.
    pub agreement: Option<Agreement>,
    /// What the kernel refused, one by one.
    pub refusals: Vec<Arc<KernelRefusal>>,
    /// Set when a part of the evidence could not be had.
    pub incomplete: bool,
}

impl EgressEvidence {
    /// Connections that were let through. A query to the resolver is none.
    pub fn connections(&self) -> u64 {
        let let_through = |flow: &&FlowRecord| flow.verdict != Verdict::Deny && flow.decided_by == DecidedBy::Proxy;
        self.flows.iter().filter(let_through).count() as u64
    }

    /// Of every attempt, the kernel's refusals included.
    pub fn verdicts(&self) -> impl Iterator<Item = Verdict> {
        self.flows.iter().map(|flow| flow.verdict).chain(self.refusals.iter().map(|_| Verdict::Deny))
    }
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
    owner: Owner,
    /// The journal's newest flow when it began.
    before: u64,
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
        let (owner, before) = (hold.owner.clone(), gate.flows.newest());
        let (profile, ports, deadline) = (hold.profile, hold.inbound_ports, hold.deadline);
        // A program that was detached since the start would hold nothing: then nothing runs.
        let admitted = gate.enforcer.health();
        let services = Services::open(gate, leaf.id(), hold);
        let admitted = admitted
            .and_then(|()| services::admit(gate, leaf.id(), profile, deadline))
            .and_then(|()| gate.enforcer.answer_at(leaf.id(), ports));
        (Self { services, traces, leaf, owner, before }, admitted)
    }

    /// What serves it.
    pub fn services(&mut self) -> &mut Services<'a> {
        &mut self.services
    }

    /// Ends whatever runs, and gives what was seen: kill → the proxy notes → the entry goes → counters → the leaf goes.
    /// `killed_ns`: when it began to be killed, on CLOCK_BOOTTIME, if that was before.
    pub async fn end(self, decision_id: &str, killed_ns: Option<u64>) -> EgressEvidence {
        let Self { services, traces, leaf, owner, before } = self;
        let (gate, id) = (traces.gate, traces.leaf);
        let mut egress = EgressEvidence { incomplete: gate.enforcer.health().is_err(), ..EgressEvidence::default() };
        let killed_ns = killed_ns.unwrap_or_else(boottime_ns);
        let doomed = leaf.clone();
        let killed = tokio::task::spawn_blocking(move || doomed.kill()).await;
        egress.flows = services.close().await;
        let connections = match gate.enforcer.retire_with_connections(id) {
            Ok((counts, connections)) => {
                egress.counts = Some(counts);
                egress.incomplete |= connections.lost > 0;
                Some(connections)
            }
            Err(error) => {
                tracing::error!(%error, decision_id, "the kernel's counts are lost");
                egress.incomplete = true;
                None
            }
        };
        let worst = agreement::join(&mut egress.flows, connections.as_ref(), &owner, killed_ns, Moment::now());
        egress.agreement = Some(worst);
        gate.flows.compared(&egress.flows, before);
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
