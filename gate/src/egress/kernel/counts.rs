//! What the kernel counted for a leaf.

use latchgate_egress_types as types;
use serde::Serialize;

/// Refusals by hook.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Denied {
    pub connect4: u64,
    pub connect6: u64,
    pub sendmsg4: u64,
    pub sendmsg6: u64,
    pub sock_create: u64,
    /// Packets, not attempts: a dropped one is sent again by the kernel.
    pub egress: u64,
    /// Packets that arrived from anything but the proxy.
    pub ingress: u64,
    /// Connections that got no record, and so no service from the proxy.
    pub sock_ops: u64,
}

impl Denied {
    pub const fn total(&self) -> u64 {
        self.connect4
            + self.connect6
            + self.sendmsg4
            + self.sendmsg6
            + self.sock_create
            + self.egress
            + self.ingress
            + self.sock_ops
    }
}

/// What a leaf did, as the kernel saw it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct KernelCounts {
    /// TCP connections whose handshake was completed.
    pub connections: u64,
    pub denied: Denied,
    /// TCP payload of closed flows that the peer acknowledged.
    pub bytes_sent: u64,
    /// TCP payload of closed flows that arrived.
    pub bytes_received: u64,
    /// Flows that were begun and had not reached TCP_CLOSE when this was read: their payload is not counted.
    pub open_flows: u64,
    /// TCP connections that were made to the leaf and that it answered.
    pub inbound: u64,
    /// With IP and TCP headers and repeats.
    pub wire_bytes_out: u64,
    pub wire_bytes_in: u64,
    /// Refusals that are counted in `denied` and of which no event came.
    pub events_lost: u64,
    /// Connections of which there is no record, or none to the end: their figures are in the sums alone.
    pub connections_lost: u64,
}

impl From<types::Counts> for KernelCounts {
    fn from(counts: types::Counts) -> Self {
        let [connect4, connect6, sendmsg4, sendmsg6, sock_create, egress, ingress, sock_ops] = counts.denied;
        Self {
            connections: counts.connections,
            denied: Denied { connect4, connect6, sendmsg4, sendmsg6, sock_create, egress, ingress, sock_ops },
            bytes_sent: counts.bytes_sent,
            bytes_received: counts.bytes_received,
            open_flows: counts.flows_begun.saturating_sub(counts.flows_closed),
            inbound: counts.inbound,
            wire_bytes_out: counts.wire_bytes_out,
            wire_bytes_in: counts.wire_bytes_in,
            events_lost: counts.events_lost,
            connections_lost: counts.connections_lost,
        }
    }
}
