//! The way out: what an execution may reach, the kernel program that holds it to that, and the proxy that carries it.

use std::os::fd::BorrowedFd;

pub mod address;
pub mod explain;
pub mod flow;
pub mod flows;
pub mod kernel;
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
