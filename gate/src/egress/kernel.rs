//! The wall: a kernel program on the cgroup that every action is born in.
//!
//! The problem. An action is a program of somebody else's. Whatever it does in user space, what leaves its cgroup must
//! be what was decided and nothing more, also when this gate is slow, wrong, being upgraded or dead.
//!
//! The rule. The program is attached once, to `actions`, by links that are pinned in bpffs and so outlive this process.
//! It looks up the leaf of whoever makes a socket, connects or sends, in a map that only this process writes. No entry,
//! an entry past its deadline, an entry of another generation, a heartbeat older than two seconds, a packet it cannot
//! read: dropped, with EPERM where the hook can say so, and with an event. There is no state of the gate in which the
//! program lets through more than the entries say; when the gate dies, the heartbeat stops and all leaves close.
//!
//! Who is calling. The program keeps the leaf on the socket when it is made (`sock_create`), writes it to a map under
//! the network namespace and the whole 4-tuple when the source port is known (`sock_ops` on `actions`), and moves it
//! onto the socket that the gate accepts (`sock_ops` on the gate's own cgroup). [`Attribution::caller`] reads it from
//! there. Nothing that the client says takes part.
//!
//! How much. A connection has a number among its leaf's, given when it begins, and a record under it, into which the
//! program writes what the client's end carried when it closes. The accepted socket has the number too, so that the
//! proxy's figures and the kernel's of one connection are found by one another ([`Attribution::connection_of`]).
//!
//! Carrying. A client that ignores proxies connects to an address. If the leaf reaches it ([`Enforcer::reach`]), the
//! connect is sent to the proxy, the socket keeps where it was meant to go and `getpeername` says so, and the record
//! tells the proxy. DNS over UDP goes to the resolver, one port ("slot") for each server that a socket asks, so that an
//! answer can be shown to come from the server asked; who asked is written down when the query leaves the leaf, under
//! what the resolver sees of it ([`DatagramAttribution::asker`]). A profile's addresses are the only ones: what is in
//! no map is refused.
//!
//! Being called. Nothing answers a connection that somebody else makes to a leaf, but at the ports that
//! [`Enforcer::answer_at`] was told: then a listener's SYN-ACK passes, and what the socket sends that it leads to.
//!
//! Loading needs CAP_BPF and CAP_NET_ADMIN, before Linux 6.8 CAP_PERFMON too, and is always done by a thread that has given
//! up everything else.

// The kernel's interface: bpf(2), clone3(2), poll(2), and the promise that map values are plain bytes.
#![allow(unsafe_code)]

use std::io;
use std::net::{IpAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aya::maps::{HashMap, MapData, MapError, SkStorage};
use latchgate_egress_types as types;
use tokio::sync::broadcast;

use super::{Asker, Attribution, Caller, DatagramAttribution, DatagramKey, LeafId};

mod address;
mod attached;
mod connections;
mod counts;
mod events;
mod heartbeat;
mod inbound;
mod load;
mod pins;
mod pod;
mod probe;
mod queries;
mod reach;
mod sys;
#[cfg(test)]
mod tests;

pub use attached::AttachMode;
pub use connections::{KernelConnection, KernelConnections};
pub use counts::{Denied, KernelCounts};
pub use events::KernelEvent;
pub use sys::boottime_ns;

use attached::Attached;
use heartbeat::Heartbeat;
use inbound::Inbound;
use queries::Queries;
use reach::Reach;

/// The kernel program, as `cargo xtask ebpf` built it.
#[cfg(not(feature = "test-guards"))]
static OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/egress/kernel/latchgate.bpf.o"));
/// The one whose checks can be taken away.
#[cfg(feature = "test-guards")]
static OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/egress/kernel/latchgate-guards.bpf.o"));

/// Where the proxy listens. All that a leaf does over TCP goes there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProxyAddresses {
    pub v4: SocketAddrV4,
    pub v6: Option<SocketAddrV6>,
}

/// Where the resolver for leaves listens: `slots` ports from the base on, in each family. Never with SO_REUSEADDR, or
/// another process can bind the same address and get the queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResolverAddresses {
    pub v4_base: SocketAddrV4,
    /// `None`: IPv6 servers cannot be asked.
    pub v6_base: Option<SocketAddrV6>,
    /// Servers that one socket can ask, 1 to [`ResolverAddresses::SLOTS`]; a query to one more is refused.
    pub slots: u16,
}

impl ResolverAddresses {
    /// The most, and the usual number.
    pub const SLOTS: u16 = 8;

    fn check(&self) -> Result<(), KernelError> {
        if !(1..=Self::SLOTS).contains(&self.slots) {
            return Err(KernelError::Resolver("has no or too many slots"));
        }
        let bases = [Some(self.v4_base.port()), self.v6_base.map(|v6| v6.port())];
        for base in bases.into_iter().flatten() {
            // Port 53 is what is carried; the resolver's own must not look like it.
            let Some(last) = base.checked_add(self.slots - 1) else {
                return Err(KernelError::Resolver("has ports beyond 65535"));
            };
            if base == 0 || (base..=last).contains(&types::DNS_PORT) {
                return Err(KernelError::Resolver("cannot have port 0 or 53"));
            }
        }
        Ok(())
    }
}

/// What the program is attached to.
#[derive(Clone, Debug)]
pub struct KernelConfig {
    /// Names the pins; letters, digits, `-`, `_` and `.`.
    pub instance: String,
    /// The cgroup v2 directory whose children are the leaves.
    pub actions: PathBuf,
    /// The cgroup v2 directory that this process is in; the proxy's listeners must be made while it is.
    pub gate: PathBuf,
    /// A bpffs, or a directory where one can be mounted.
    pub bpffs: PathBuf,
    pub proxy: ProxyAddresses,
    /// `None`: DNS is refused like every other datagram.
    pub resolver: Option<ResolverAddresses>,
}

/// What the kernel lets a leaf do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelProfile {
    /// Nothing, loopback included.
    None,
    /// TCP to the gate's proxy and nothing else.
    ProxyOnly,
    /// TCP to the gate's proxy; TCP to what [`Enforcer::reach`] was told, carried to the proxy; DNS to the resolver,
    /// over TCP by way of the proxy.
    Allowlist,
}

impl KernelProfile {
    const fn kind(self) -> u32 {
        match self {
            Self::None => types::KIND_NONE,
            Self::ProxyOnly => types::KIND_PROXY_ONLY,
            Self::Allowlist => types::KIND_ALLOWLIST,
        }
    }
}

/// Why the kernel program is not there, or not to be relied on. Each one means: run nothing.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("{0} is missing: the kernel program needs CAP_BPF and CAP_NET_ADMIN")]
    Privilege(&'static str),
    #[error("{0:?} is no name for an instance")]
    Instance(String),
    #[error("{0} is not a cgroup v2 directory")]
    NotCgroup2(PathBuf),
    #[error("{path} is not a bpffs and cannot be made one ({source}): mount -t bpf bpf {path}")]
    NoBpffs { path: PathBuf, source: io::Error },
    #[error("another gate holds {0}")]
    InUse(PathBuf),
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("loading the kernel program: {0}")]
    Load(#[from] aya::EbpfError),
    #[error("{program}: {source}")]
    Program { program: &'static str, source: aya::programs::ProgramError },
    #[error(
        "the verifier of Linux {release} refuses {program} without CAP_PERFMON: give the gate CAP_PERFMON, or run it \
         on Linux 6.8 or later ({source})"
    )]
    OldVerifier { release: String, program: &'static str, source: aya::programs::ProgramError },
    #[error("pinning {name}: {source}")]
    Pin { name: String, source: aya::pin::PinError },
    #[error("map {map}: {source}")]
    Map { map: &'static str, source: MapError },
    #[error("the embedded object has no {0}")]
    Missing(&'static str),
    #[error("the level of a leaf in the cgroup tree was not found")]
    NoLevel,
    #[error("leaf {} is admitted already", .0.0)]
    AlreadyAdmitted(LeafId),
    #[error("leaf {} is not admitted", .0.0)]
    NotAdmitted(LeafId),
    #[error("too many leaves are admitted")]
    Full,
    #[error("the profile of leaf {} has no addresses", .0.0)]
    NotAllowlist(LeafId),
    #[error("leaf {} cannot reach more addresses", .0.0)]
    ReachFull(LeafId),
    #[error("leaf {} cannot answer at more ports", .0.0)]
    InboundFull(LeafId),
    #[error("{0}/{1} is no network")]
    Network(IpAddr, u8),
    #[error("0 is no port")]
    PortZero,
    #[error("the resolver {0}")]
    Resolver(&'static str),
    #[error("{0} is no longer attached")]
    Detached(String),
    #[error("the heartbeat was last written {0:?} ago")]
    HeartbeatLate(Duration),
    #[error(
        "this process is in a time namespace whose CLOCK_BOOTTIME is {0} s off, and the kernel program has no other \
         clock: every leaf would stay closed; start the gate without a time namespace of its own"
    )]
    TimeNamespace(i64),
}

impl KernelError {
    fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// The attached program. Dropping it closes every leaf at once and leaves the program attached: the next gate takes over.
pub struct Enforcer {
    leaves: Mutex<HashMap<MapData, u64, pod::LeafEntry>>,
    counts: Mutex<HashMap<MapData, u64, pod::Counts>>,
    accepted: SkStorage<MapData, pod::AcceptedSocket>,
    connections: Mutex<connections::Map>,
    reach: Mutex<Reach>,
    inbound: Mutex<Inbound>,
    queries: Queries,
    generation: u64,
    program_hash: String,
    attached: Attached,
    // Dropped in this order: first the leaves are closed, then the reader of events ends, then another gate may start.
    heartbeat: Heartbeat,
    events: events::Reader,
    _lock: OwnedFd,
}

impl Enforcer {
    /// Loads, attaches and pins the program, starts the heartbeat, and only then takes away what a dead predecessor of
    /// the same instance left: at no moment is `actions` without a program.
    pub fn start(config: KernelConfig) -> Result<Self, KernelError> {
        Self::start_as(config, None)
    }

    /// The same, attached in the way that is given. `None`: by pinned links where there is a bpffs or one can be mounted,
    /// else without pins.
    ///
    /// # Errors
    /// [`KernelError::NoBpffs`] only where [`AttachMode::Pinned`] is asked for.
    pub fn start_as(config: KernelConfig, attach: Option<AttachMode>) -> Result<Self, KernelError> {
        if let Some(resolver) = &config.resolver {
            resolver.check()?;
        }
        sys::check_clock()?;
        let lock = pins::lock(&config)?;
        let mode = AttachMode::choose(&config.bpffs, attach)?;
        let (loaded, generation) = load::with_least_capabilities(&config, mode)?;
        let heartbeat = Heartbeat::start(loaded.heartbeat, loaded.control)?;
        let events = events::Reader::start(loaded.events)?;
        let queries = Queries::start(loaded.queries)?;
        loaded.attached.sweep_predecessors()?;
        Ok(Self {
            leaves: Mutex::new(loaded.leaves),
            counts: Mutex::new(loaded.counts),
            accepted: loaded.accepted,
            connections: Mutex::new(loaded.connections),
            reach: Mutex::new(loaded.reach),
            inbound: Mutex::new(loaded.inbound),
            queries,
            generation,
            program_hash: crate::hash::sha256_tagged(OBJECT),
            attached: loaded.attached,
            heartbeat,
            events,
            _lock: lock,
        })
    }

    /// Lets `leaf` do what `profile` says until `deadline` from now. To be called before the leaf's first process starts.
    pub fn admit(&self, leaf: LeafId, profile: KernelProfile, deadline: Duration) -> Result<(), KernelError> {
        const NOEXIST: u64 = 1;
        if leaf.0 == 0 {
            return Err(KernelError::NotAdmitted(leaf));
        }
        let deadline_ns = sys::boottime_ns().saturating_add(u64::try_from(deadline.as_nanos()).unwrap_or(u64::MAX));
        let entry = types::LeafEntry {
            leaf: leaf.0,
            generation: self.generation,
            deadline_ns,
            kind: profile.kind(),
            reserved: 0,
        };
        locked(&self.counts)
            .insert(leaf.0, pod::Counts::default(), NOEXIST)
            .map_err(|source| refused(leaf, "COUNTS", source))?;
        // The leaf's own entry is the last: until it is there, nothing else means anything.
        let admitted = self.queries.admit(leaf).map_err(|source| refused(leaf, "TAKEN", source)).and_then(|()| {
            let inserted = locked(&self.leaves).insert(leaf.0, pod::LeafEntry(entry), NOEXIST);
            inserted.map_err(|source| refused(leaf, "LEAVES", source))
        });
        match &admitted {
            Ok(()) => {
                locked(&self.reach).admit(leaf, profile);
                locked(&self.inbound).admit(leaf);
            }
            Err(_) => {
                self.queries.retire(leaf);
                let _ = locked(&self.counts).remove(&leaf.0);
            }
        }
        admitted
    }

    /// Lets an admitted leaf of profile [`KernelProfile::Allowlist`] connect to every address of `network`, an address
    /// and the length of its prefix in bits, at `ports` (none: at all of them); it is carried to the proxy. Overlapping
    /// networks add up. Gone when the leaf is retired.
    ///
    /// # Errors
    /// Nothing is changed then: [`KernelError::ReachFull`] when the leaf or all leaves together have as many as fit.
    pub fn reach(&self, leaf: LeafId, network: (IpAddr, u8), ports: &[u16]) -> Result<(), KernelError> {
        locked(&self.reach).insert(leaf, network, ports)
    }

    /// Lets an admitted leaf of any profile answer TCP connections that others make to it at `ports`. Gone when the leaf
    /// is retired.
    ///
    /// # Errors
    /// Nothing is changed then: [`KernelError::InboundFull`] when the leaf or all leaves together have as many as fit.
    pub fn answer_at(&self, leaf: LeafId, ports: &[u16]) -> Result<(), KernelError> {
        locked(&self.inbound).insert(leaf, ports)
    }

    /// Takes the entry away, so that the leaf is closed, and then reads and deletes what was counted. To be called after
    /// the leaf's processes were killed and the proxy has closed and noted its connections.
    pub fn retire(&self, leaf: LeafId) -> Result<KernelCounts, KernelError> {
        self.retire_with_connections(leaf).map(|(counts, _)| counts)
    }

    /// The same, and what each of the leaf's connections carried.
    pub fn retire_with_connections(&self, leaf: LeafId) -> Result<(KernelCounts, KernelConnections), KernelError> {
        let removed = locked(&self.leaves).remove(&leaf.0);
        locked(&self.reach).retire(leaf);
        locked(&self.inbound).retire(leaf);
        self.queries.retire(leaf);
        let counted = {
            let mut counts = locked(&self.counts);
            let counted = counts.get(&leaf.0, 0);
            let _ = counts.remove(&leaf.0);
            counted
        };
        let connections = match &counted {
            Ok(counted) => connections::of_leaf(&self.connections, leaf, &counted.0, true),
            Err(_) => Ok(KernelConnections::default()),
        };
        removed.map_err(|_| KernelError::NotAdmitted(leaf))?;
        let counted = counted.map_err(|source| KernelError::Map { map: "COUNTS", source })?;
        Ok((counted.0.into(), connections?))
    }

    /// What each connection of an admitted leaf has carried so far; of those that go on, nothing is counted yet.
    pub fn connections(&self, leaf: LeafId) -> Result<KernelConnections, KernelError> {
        let counted = locked(&self.counts).get(&leaf.0, 0);
        match counted {
            Ok(counted) => connections::of_leaf(&self.connections, leaf, &counted.0, false),
            Err(MapError::KeyNotFound) => Err(KernelError::NotAdmitted(leaf)),
            Err(source) => Err(KernelError::Map { map: "COUNTS", source }),
        }
    }

    /// What has been counted for an admitted leaf so far.
    pub fn counts(&self, leaf: LeafId) -> Result<KernelCounts, KernelError> {
        match locked(&self.counts).get(&leaf.0, 0) {
            Ok(counts) => Ok(counts.0.into()),
            Err(MapError::KeyNotFound) => Err(KernelError::NotAdmitted(leaf)),
            Err(source) => Err(KernelError::Map { map: "COUNTS", source }),
        }
    }

    /// What was counted of sockets below `actions` whose leaf had no entry.
    pub fn counts_without_leaf(&self) -> Result<KernelCounts, KernelError> {
        let counts = locked(&self.counts).get(&0, 0).map_err(|source| KernelError::Map { map: "COUNTS", source })?;
        Ok(counts.0.into())
    }

    /// `sha256:<hex>` of the object that was loaded.
    pub fn program_hash(&self) -> &str {
        &self.program_hash
    }

    /// How the programs are attached.
    pub fn attach_mode(&self) -> AttachMode {
        self.attached.mode()
    }

    /// Asks the kernel whether each program is attached still, and whether the heartbeat is alive.
    pub fn health(&self) -> Result<(), KernelError> {
        self.heartbeat.health()?;
        self.attached.check()
    }

    /// Refusals from now on. A receiver that falls behind is told how many it lost; what the kernel itself could not
    /// hand over is `events_lost` of the leaf's counts.
    pub fn events(&self) -> broadcast::Receiver<KernelEvent> {
        self.events.subscribe()
    }

    /// Detaches the program and removes the pins. Only for a tree that nothing runs in any more.
    pub fn detach(self) -> Result<(), KernelError> {
        self.attached.remove()
    }
}

impl Attribution for Enforcer {
    fn caller(&self, accepted: BorrowedFd<'_>) -> Option<Caller> {
        let record = self.accepted.get(&accepted.as_raw_fd(), 0).ok()?.0;
        let original = address::destination(&record.original);
        (record.leaf != 0).then_some(Caller { leaf: LeafId(record.leaf), original })
    }

    fn connection_of(&self, accepted: BorrowedFd<'_>) -> Option<u64> {
        let record = self.accepted.get(&accepted.as_raw_fd(), 0).ok()?.0;
        (record.leaf != 0 && record.number != types::NO_NUMBER).then_some(record.number)
    }
}

impl DatagramAttribution for Enforcer {
    fn asker(&self, query: &DatagramKey) -> Option<Asker> {
        self.queries.take(query)
    }
}

/// The maps have no state in this process that a panic could leave half-written.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn errno_of(error: &MapError) -> Option<i32> {
    match error {
        MapError::SyscallError(error) => error.io_error.raw_os_error(),
        _ => None,
    }
}

fn refused(leaf: LeafId, map: &'static str, source: MapError) -> KernelError {
    match errno_of(&source) {
        Some(libc::EEXIST) => KernelError::AlreadyAdmitted(leaf),
        Some(libc::E2BIG) => KernelError::Full,
        _ => KernelError::Map { map, source },
    }
}
