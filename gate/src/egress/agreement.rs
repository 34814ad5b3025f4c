//! One connection, two witnesses: the payload on the sandbox's leg as the kernel counted it at the client's socket, and
//! as the proxy counted it at its own. They are found by one another by the number that the kernel gave the connection,
//! so that neither a port that is used again nor what a client says takes part.

use std::collections::HashMap;

use super::flow::{Agreement, DecidedBy, End, FlowRecord, KernelFigures, Protocol, Verdict};
use super::flows::Owner;
use super::kernel::{KernelConnection, KernelConnections};
use crate::ids;
use crate::time::Timestamp;

#[cfg(test)]
mod tests;

/// A moment on both clocks, for records that have only one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    pub time: Timestamp,
    /// CLOCK_BOOTTIME.
    pub boot_ns: u64,
}

impl Moment {
    pub fn now() -> Self {
        Self { time: Timestamp::now(), boot_ns: super::kernel::boottime_ns() }
    }

    fn of(self, boot_ns: u64) -> Timestamp {
        let ago_ms = i64::try_from(self.boot_ns.saturating_sub(boot_ns) / 1_000_000).unwrap_or(0);
        self.time.plus_millis(-ago_ms)
    }
}

/// Gives each flow the kernel's figures and says whether they are the proxy's; a connection that the proxy has no record
/// of gets one. `killed_ns` is when the execution began to be killed, on CLOCK_BOOTTIME. `None` in place of what the
/// kernel saw: nothing is known.
pub fn join(
    flows: &mut Vec<FlowRecord>,
    seen: Option<&KernelConnections>,
    owner: &Owner,
    killed_ns: u64,
    now: Moment,
) -> Agreement {
    let mut unmatched: HashMap<u64, &KernelConnection> =
        seen.into_iter().flat_map(|seen| &seen.records).map(|record| (record.number, record)).collect();
    for flow in flows.iter_mut().filter(|flow| flow.is_connection()) {
        let kernel = flow.connection.and_then(|number| unmatched.remove(&number));
        flow.kernel = kernel.map(figures);
        flow.agreement = Some(kernel.map_or(Agreement::Unknown, |kernel| agreement(flow, kernel, killed_ns)));
    }
    // Past its limit the proxy refuses and has one record for all: of those connections it counted nothing.
    let uncounted = flows.iter().any(|flow| flow.is_connection() && flow.connection.is_none());
    let mut left: Vec<&KernelConnection> = unmatched.into_values().collect();
    left.sort_unstable_by_key(|kernel| kernel.number);
    flows.extend(left.into_iter().map(|kernel| alone(kernel, owner, uncounted, killed_ns, now)));
    let lost = seen.is_none_or(|seen| seen.lost > 0);
    let worst = flows.iter().filter_map(|flow| flow.agreement).max().unwrap_or(Agreement::Equal);
    if lost { worst.max(Agreement::Unknown) } else { worst }
}

fn figures(kernel: &KernelConnection) -> KernelFigures {
    KernelFigures { bytes_sent: kernel.bytes_sent, bytes_received: kernel.bytes_received, closed: kernel.closed }
}

fn agreement(flow: &FlowRecord, kernel: &KernelConnection, killed_ns: u64) -> Agreement {
    if flow.uncounted {
        return Agreement::Unknown;
    }
    if is_open(kernel, killed_ns) {
        return Agreement::OpenAtKill;
    }
    if (kernel.bytes_sent, kernel.bytes_received) == (flow.bytes_from_sandbox, flow.bytes_to_sandbox) {
        return Agreement::Equal;
    }
    // The client was done, and the proxy was not when it was told to be.
    if flow.end == End::OpenAtClose { Agreement::OpenAtKill } else { Agreement::Disagree }
}

/// Whether the client had not ended it by itself when the execution was killed.
fn is_open(kernel: &KernelConnection, killed_ns: u64) -> bool {
    !kernel.closed || kernel.ended_ns.is_none_or(|ended| ended >= killed_ns)
}

/// The record of a connection that the kernel let go and that the proxy never took.
fn alone(kernel: &KernelConnection, owner: &Owner, uncounted: bool, killed_ns: u64, now: Moment) -> FlowRecord {
    let carried_nothing = kernel.bytes_sent == 0 && kernel.bytes_received == 0;
    let agreement = match (uncounted, is_open(kernel, killed_ns), carried_nothing) {
        (true, ..) => Agreement::Unknown,
        (_, true, _) => Agreement::OpenAtKill,
        (_, _, true) => Agreement::Equal,
        _ => Agreement::Disagree,
    };
    let open = is_open(kernel, killed_ns);
    let until = kernel.ended_ns.unwrap_or(now.boot_ns);
    FlowRecord {
        time: now.of(kernel.begun_ns),
        execution_id: Some(owner.execution_id.clone()),
        action_id: Some(owner.action_id.clone()),
        principal: Some(owner.principal.clone()),
        workspace: Some(owner.workspace.clone()),
        name: kernel.original.map(|original| original.ip().to_canonical().to_string()),
        address: None,
        port: kernel.original.map(|original| original.port()),
        protocol: Some(Protocol::Tcp),
        sni: None,
        name_verified: None,
        carried: kernel.original.is_some(),
        opaque: true,
        verdict: Verdict::Allow,
        decided_by: DecidedBy::Hook,
        rule: "profile".to_owned(),
        end: if open { End::OpenAtClose } else { End::Closed },
        error: Some(if kernel.established { "not_accepted" } else { "not_established" }.to_owned()),
        bytes_from_sandbox: 0,
        bytes_to_sandbox: 0,
        bytes_to_upstream: 0,
        bytes_from_upstream: 0,
        duration_ms: until.saturating_sub(kernel.begun_ns) / 1_000_000,
        decision_id: ids::mint(),
        client: Some(kernel.client),
        connections: 1,
        connection: Some(kernel.number),
        uncounted,
        kernel: Some(figures(kernel)),
        agreement: Some(agreement),
    }
}
