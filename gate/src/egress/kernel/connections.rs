//! What each connection of a leaf carried, one record a connection, in the order in which they began.

use std::net::SocketAddr;
use std::sync::Mutex;

use aya::maps::{HashMap, MapData, MapError};
use latchgate_egress_types as types;

use super::{KernelError, address, locked, pod};
use crate::egress::LeafId;

/// One TCP connection as the kernel had it at the client's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelConnection {
    /// Of the leaf's connections, from 0; what the proxy reads of the one that it accepted
    /// ([`Attribution::connection_of`](crate::egress::Attribution::connection_of)).
    pub number: u64,
    pub client: SocketAddr,
    /// `None` when it was meant for the proxy.
    pub original: Option<SocketAddr>,
    /// CLOCK_BOOTTIME.
    pub begun_ns: u64,
    /// CLOCK_BOOTTIME, when the client's end stopped sending, by a close, a reset or its death.
    pub ended_ns: Option<u64>,
    /// TCP payload that the peer acknowledged; a lower bound as long as it is not `closed`.
    pub bytes_sent: u64,
    /// TCP payload that arrived; a lower bound as long as it is not `closed`.
    pub bytes_received: u64,
    /// Whether it reached TCP_CLOSE, so that the figures are final.
    pub closed: bool,
    /// Whether the handshake was completed, as far as is known.
    pub established: bool,
}

/// All of a leaf's connections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelConnections {
    pub records: Vec<KernelConnection>,
    /// Connections without a record, and records that could not be written to their end.
    pub lost: u64,
}

pub type Map = HashMap<MapData, pod::ConnectionKey, pod::Connection>;

fn known(number: u64, raw: &types::Connection) -> Option<KernelConnection> {
    let client = address::of_mapped(raw.client_ip);
    Some(KernelConnection {
        number,
        client: SocketAddr::new(client, u16::try_from(raw.client_port).ok()?),
        original: address::destination(&raw.original),
        begun_ns: raw.begun_ns,
        ended_ns: (raw.ended_ns != 0).then_some(raw.ended_ns),
        bytes_sent: raw.bytes_sent,
        bytes_received: raw.bytes_received,
        closed: matches!(raw.state, types::CONNECTION_CLOSED | types::CONNECTION_FAILED),
        established: raw.state != types::CONNECTION_FAILED,
    })
}

/// The records of a leaf whose `counts` these are; they are taken away when `take` says so. The lock is held for one
/// record at a time, so that a leaf with many does not keep the others waiting.
pub fn of_leaf(
    map: &Mutex<Map>,
    leaf: LeafId,
    counts: &types::Counts,
    take: bool,
) -> Result<KernelConnections, KernelError> {
    let mut found = KernelConnections { records: Vec::new(), lost: counts.connections_lost };
    for number in 0..counts.flows_begun.min(types::MAX_CONNECTIONS_PER_LEAF) {
        let key = pod::ConnectionKey(types::ConnectionKey { leaf: leaf.0, number });
        let mut map = locked(map);
        match map.get(&key, 0) {
            Ok(record) => {
                found.records.extend(known(number, &record.0));
                if take {
                    let _ = map.remove(&key);
                }
            }
            // The kernel could not make it, and counted that.
            Err(MapError::KeyNotFound) => {}
            Err(source) => return Err(KernelError::Map { map: "CONNECTIONS", source }),
        }
    }
    Ok(found)
}
