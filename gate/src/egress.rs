//! The way out: what an execution may reach, the kernel program that holds it to that, and the proxy that carries it.

use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

pub mod address;
pub mod agreement;
pub mod client_hello;
pub mod explain;
pub mod flow;
pub mod flows;
pub mod kernel;
pub mod names;
pub mod profile;
pub mod proxy;
pub mod refusals;
pub mod resolver;
pub mod suggest;
pub mod terminate;

/// The kernel's id of a leaf cgroup: its inode in the v2 tree. Never reused while the gate that saw it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeafId(pub u64);

/// Who made a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The leaf that the connecting socket was created in.
    pub leaf: LeafId,
    /// Where a client that knows nothing of the proxy meant to connect to; `None` when it meant the proxy.
    pub original: Option<SocketAddr>,
}

/// Who made a connection that the proxy accepted, as the kernel recorded it on the accepted socket.
pub trait Attribution: Send + Sync {
    /// `None` when the kernel has no record, and then it gets no service.
    fn caller(&self, accepted: BorrowedFd<'_>) -> Option<Caller>;

    /// Which of its leaf's connections it is, by which the kernel's figures of it are found; `None` when the kernel keeps
    /// none of it.
    fn connection_of(&self, accepted: BorrowedFd<'_>) -> Option<u64>;

    /// The caller's leaf alone.
    fn leaf_of(&self, accepted: BorrowedFd<'_>) -> Option<LeafId> {
        Some(self.caller(accepted)?.leaf)
    }
}

/// A DNS query as the resolver received it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DatagramKey {
    /// The cookie of the network namespace that the resolver's socket is in (SO_NETNS_COOKIE); `None`: the gate's own.
    pub netns: Option<u64>,
    pub source: SocketAddr,
    /// The port of the resolver that it arrived at.
    pub slot_port: u16,
    /// The message's id (RFC 1035 §4.1.1).
    pub id: u16,
}

/// Who sent a DNS query, and to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asker {
    pub leaf: LeafId,
    /// The server that the client asked, and that the answer will seem to come from.
    pub server: SocketAddr,
}

/// Who sent a datagram that the resolver received, as the kernel recorded it when it left the leaf.
pub trait DatagramAttribution: Send + Sync {
    /// Takes the record: to be called once for each query, also where the socket already says whose it can only be,
    /// because a leaf's records are bounded. `None` when the kernel has none, and then there is no answer.
    fn asker(&self, query: &DatagramKey) -> Option<Asker>;
}
