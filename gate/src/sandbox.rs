//! Where an action runs: a cgroup leaf and a process that is confined before it does anything.
//!
//! The gate never starts a program itself. A thread that does nothing else clones a child straight into the execution's
//! leaf, with a user, mount, PID, IPC and UTS namespace of its own, so that nothing here needs `CAP_SYS_ADMIN` of the
//! host. The child takes an uid that no other running execution has, becomes a second image of this binary (`worker`),
//! builds a root that shows what the action may see, gives up every capability, and only then, on the gate's word,
//! forks the program. It stays behind as PID 1: when it goes, the kernel takes all that the program left running.
//!
//! Three ends are tied to the same knot. The gate dies: the parent-death signal takes PID 1. The program ends: PID 1
//! leaves and takes the rest. Time, output or the caller end first: `cgroup.kill`. In each case [`Runner::run`] comes
//! back only when the leaf is empty; removing the leaf is the caller's, after the counters are read.
//!
//! The network is the gate's own namespace, or one that the execution has to itself ([`Network::Isolated`]): then there
//! is nothing in it but lo and the gate's listeners, which [`Runner::run_with`] hands over before anything runs. That is
//! a second wall. The kernel program holds the leaf in either.
//!
//! What no cgroup hook of the kernel program can see is closed here (`worker::seccomp` has the list): other socket
//! families, descriptors from outside, namespaces of the program's own making.

use std::path::PathBuf;
use std::time::Duration;

pub mod attempts;
pub mod cgroup;
mod namespace;
pub mod probe;
mod protocol;
mod runner;
mod sealed;
pub mod session;
mod spawner;
mod trust;
pub mod worker;

pub use cgroup::{CgroupError, CgroupTree, Leaf};
pub use namespace::NamespaceListeners;
pub use protocol::{Root, Stage, TRUST_BUNDLE};
pub use runner::{Runner, RunnerConfig};
pub use session::{SessionJob, SessionSocket, Terminal};

/// One execution.
#[derive(Clone, Debug)]
pub struct Job {
    pub program: Program,
    /// Written to the program's standard input, which is then closed.
    pub stdin: Vec<u8>,
    pub limits: Limits,
    pub network: Network,
    /// Certificates (PEM) that a command shall trust beside those of the host. Given, the root has a bundle of both
    /// ([`TRUST_BUNDLE`]), and the variables that clients read name it, where `env` does not name another.
    pub trust_pem: Option<Vec<u8>>,
}

/// The network that the program is in. What it may reach in it is the kernel program's business in either case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Network {
    /// The gate's own network namespace.
    #[default]
    Shared,
    /// A network namespace of its own with nothing but lo, in which the gate listens: who reaches those sockets *is*
    /// this execution.
    Isolated {
        /// Of 127.0.0.1 and ::1; the proxy's own number, so that what the kernel program rewrites to is right in both.
        tcp_port: u16,
        /// First of the UDP ports; none when absent.
        udp_base: Option<u16>,
        /// How many of them, at most 32.
        udp_slots: u16,
    },
}

/// What runs.
#[derive(Clone, Debug)]
pub enum Program {
    /// The gate's own HTTP worker, in a root with nothing in it.
    HttpWorker,
    /// A program of the operator's. `argv[0]` is a path, or a name that is looked up in `PATH` of `env`.
    Command {
        argv: Vec<String>,
        /// The whole environment, but for `PATH`, `HOME`, `TMPDIR` and `LANG`, which have defaults.
        env: Vec<(String, String)>,
        /// Each is read once, hashed, and seen inside at its path as a copy that nothing can write.
        files: Vec<SealedFile>,
        root: Root,
    },
    /// The self-test's attempts ([`attempts`]), of the gate's own binary, confined as a command is. Standard input has
    /// the [`attempts::Order`].
    Attempts,
}

/// A file that must have exactly these contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealedFile {
    /// Absolute; where it is read, and where the program sees it.
    pub path: PathBuf,
    /// `sha256:<hex>` or bare hex.
    pub sha256: String,
}

/// Bounds of one execution.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Of the whole leaf where the v2 memory controller is there; else of each process (`RLIMIT_AS`).
    pub memory_bytes: u64,
    /// Wall clock, from the call of [`Runner::run`].
    pub timeout: Duration,
    /// One byte more ends the execution.
    pub stdout_bytes: u64,
    /// What comes after is read and dropped.
    pub stderr_bytes: u64,
    /// Processes and threads of the program at one time; the reaper is not counted.
    pub processes: u32,
    /// Size of `/tmp`, in memory.
    pub scratch_bytes: u64,
}

/// An execution that was started and is over; nothing of it runs.
#[derive(Clone, Debug)]
pub struct Completed {
    pub exit: Exit,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub stderr_truncated: bool,
    pub duration: Duration,
    /// CLOCK_BOOTTIME, when the gate began to kill it; `None` when it ended by itself.
    pub killed_ns: Option<u64>,
    /// SHA-256 of what ran: the gate's own executable for the HTTP worker, the JCS form of the list of sealed copies
    /// (`[{path, sha256}]`) for a command.
    pub module_digest: String,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Code(i32),
    Signal(i32),
    TimedOut,
    OutputTooLarge,
    Cancelled,
}

/// Why an execution did not start, or could not be brought to a known end.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("configuration: {0}")]
    Config(String),
    #[error("{} would be visible inside: it is below {}", protected.display(), bound.display())]
    Exposed { protected: PathBuf, bound: PathBuf },
    #[error("every uid of the range is in use")]
    NoUid,
    #[error("{}: {source}", path.display())]
    SealedUnreadable { path: PathBuf, source: std::io::Error },
    #[error("{} has other contents than its digest says", path.display())]
    SealedDigest { path: PathBuf },
    #[error("{}: {why}", path.display())]
    SealedInvalid { path: PathBuf, why: &'static str },
    #[error("the sandbox could not be made: {stage:?}: {detail}: {source}")]
    Setup { stage: Stage, detail: String, source: std::io::Error },
    #[error("the program could not be started: {source}")]
    Exec { source: std::io::Error },
    /// Nobody serves the sockets of an isolated execution, so nothing of it was started.
    #[error("the listeners of the execution were not taken: {0}")]
    NotTaken(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the spawner is gone")]
    SpawnerGone,
    #[error("{0}: {1}")]
    Io(&'static str, #[source] std::io::Error),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

impl SandboxError {
    /// Whether it is certain that the program never began. A failure of the gate's own system calls, or a leaf that
    /// would not empty, says nothing of that.
    pub const fn nothing_ran(&self) -> bool {
        match self {
            Self::Config(_)
            | Self::Exposed { .. }
            | Self::NoUid
            | Self::SealedUnreadable { .. }
            | Self::SealedDigest { .. }
            | Self::SealedInvalid { .. }
            | Self::Setup { .. }
            | Self::Exec { .. }
            | Self::NotTaken(_)
            | Self::SpawnerGone => true,
            Self::Io(..) | Self::Cgroup(_) => false,
        }
    }
}
