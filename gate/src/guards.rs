//! The checks that a test can take away one by one, to show what each of them is for.
//!
//! In every build but one they are all made, and [`on`] folds to `true`: no switch, no name of one and no variable that
//! is read is in the program. The one is the feature `test-guards`, of which `latchgate-unguarded` is built for the
//! suite of escapes. A check that no test can take away is a check that no test has shown to be needed.

#[cfg(feature = "test-guards")]
mod switches;

#[cfg(feature = "test-guards")]
pub use switches::{bits, kernel_bits, set, take_from_environment, warning};

/// A check of the sandbox, the proxy or the resolver. Those of the kernel program are
/// [`latchgate_egress_types::guard::Guard`].
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Guard {
    /// The whole filter of system calls; the groups of it follow.
    Seccomp = 0,
    /// io_uring.
    IoUring,
    /// Other processes' memory and descriptors.
    Processes,
    /// The kernel's programs, counters and faults.
    Programs,
    Mounts,
    Handles,
    /// unshare, setns, and the flags of clone.
    Namespaces,
    Keys,
    Machine,
    /// That sockets are TCP or UDP, and pairs cannot be connected again.
    SocketFamilies,
    Terminal,
    Landlock,
    Capabilities,
    NoNewPrivileges,
    /// A user namespace and an uid of the execution's own; off, it is the gate's user.
    UserNamespace,
    /// A root of the execution's own; off, it sees the host's.
    MountNamespace,
    PidNamespace,
    /// That no descriptor but its pipes comes along.
    CloseDescriptors,
    ResourceLimits,
    ScratchLimit,
    /// That the first process cannot be looked into.
    Hide,
    /// That the first process dies with the gate.
    DieWithGate,
    /// That the end of an execution kills its cgroup.
    CgroupKill,
    /// The server name of a ClientHello.
    Sni,
    /// The Host of a request.
    Host,
    /// That addresses which the proxy dials are public.
    AddressClass,
    /// The names of the profile, at the proxy.
    ProxyNames,
    /// The names of the profile, at the resolver.
    ResolverNames,
    /// That a connection to the proxy is known to be an execution's; off, a stranger is served as one that runs.
    Attribution,
}

/// Whether the check is made.
#[cfg(not(feature = "test-guards"))]
#[inline(always)]
pub const fn on(_guard: Guard) -> bool {
    true
}

/// Whether the check is made.
#[cfg(feature = "test-guards")]
pub fn on(guard: Guard) -> bool {
    switches::is_on(guard)
}

/// What a gate with a check off says of itself.
#[cfg(not(feature = "test-guards"))]
#[inline(always)]
pub const fn warning() -> Option<String> {
    None
}
