//! The way out: what an execution may reach, the kernel program that holds it to that, and the proxy that carries it.

use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

pub mod address;
pub mod flow;
pub mod kernel;
pub mod names;
pub mod profile;
pub mod proxy;
pub mod refusals;
pub mod resolver;

/// The kernel's id of a leaf cgroup: its inode in the v2 tree. Never reused while the gate that saw it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeafId(pub u64);

/// Who made a connection that the proxy accepted, as the kernel recorded it on the accepted socket.
pub trait Attribution: Send + Sync {
    /// The leaf that the connecting socket was created in; `None` when the kernel has no record, and then it gets no
    /// service.
    fn leaf_of(&self, accepted: BorrowedFd<'_>) -> Option<LeafId>;
}

/// A datagram that the resolver received: what the kernel's record of who sent it is found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DatagramKey {
    /// The cookie of the network namespace that it came from; `None` for the gate's own.
    pub netns: Option<u64>,
    pub source: SocketAddr,
    /// The port of the resolver that it came to.
    pub slot_port: u16,
    /// The transaction id of the DNS message.
    pub id: u16,
}

/// Who sent a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asker {
    pub leaf: LeafId,
    /// The server that it was sent to, which the answer will appear to come from.
    pub server: SocketAddr,
}

/// Who sent a datagram, as the kernel recorded it when it was sent.
pub trait DatagramAttribution: Send + Sync {
    /// Takes the record of this datagram; `None` when there is none, and then the datagram is nobody's.
    fn asker(&self, query: &DatagramKey) -> Option<Asker>;
}
