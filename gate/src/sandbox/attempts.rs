//! What a program inside might try, tried: the techniques of the self-test.
//!
//! Each technique is a small function that makes an attempt and says what came of it. The same functions run twice: in
//! a leaf, confined as a command is, where they should be refused; and in a helper child of the gate, which nothing
//! holds, where they must reach their target. Only together do the two mean something: an attempt that fails where it is
//! free shows nothing when it fails where it is held.
//!
//! The targets are the gate's own: sockets that it opened on loopback for this one run, a process that it started to be
//! signalled and traced, its own directory. Nothing else is ever addressed. Each attempt runs in a process of its own, so
//! that what it does to itself ends with it.
#![allow(unsafe_code)] // fork, wait and the system calls that are tried.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

mod control;
mod dns;
mod families;
mod files;
mod inbound;
mod kernel;
mod process;
mod proxy;
mod sys;
mod tcp;
mod udp;

pub(super) use control::{CONTROL_NAME, VICTIM_NAME, control_main, victim_main};
pub use control::{ControlError, Victim, outside, victim};

/// What is to be tried, and at what.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    /// Whether nothing holds this run.
    pub outside: bool,
    /// The names of the techniques.
    pub techniques: Vec<String>,
    /// What listeners are told, by which they know the run.
    pub token: String,
    /// The same as a number, for the process that is signalled.
    pub number: i32,
    /// The socket of each technique that has one.
    pub targets: BTreeMap<String, SocketAddr>,
    /// Where the gate connects to while this runs.
    pub inbound_port: u16,
    /// How long an attempt waits for a connection that should not come, in milliseconds.
    pub inbound_ms: u64,
    /// How long any other waits for what should come at once, in milliseconds.
    pub patience_ms: u64,
    /// The gate's proxy. Outside, it is not asked.
    pub proxy: SocketAddr,
    /// The DNS servers that are asked, over UDP and over TCP.
    pub dns: [SocketAddr; 2],
    /// The one name of the profile; none where it has none.
    pub name: Option<String>,
    /// A name that is in no profile.
    pub other_name: String,
    /// `cgroup.procs` of the gate's own cgroup.
    pub cgroup_procs: PathBuf,
    /// The state directory, with its device and inode: a path inside may lead elsewhere.
    pub state_dir: (PathBuf, u64, u64),
    pub unix_path: PathBuf,
    pub unix_abstract: String,
    /// A process outside that the gate started for this.
    pub victim: i32,
    /// In the arguments of that process, and of no other.
    pub victim_token: String,
}

/// What came of one attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Saw {
    /// It did what it should not be able to do.
    Reached { how: String },
    /// A system call said no.
    Refused { at: String, errno: i32 },
    /// The proxy or the resolver said no.
    Answered { by: Answerer, what: String },
    /// Nothing came of it in its time.
    Silent { at: String },
    /// A step that should have worked did not, so that the attempt was not made.
    Hindered { why: String },
    /// The process of the attempt was ended by a signal.
    Died { signal: i32 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answerer {
    Proxy,
    Resolver,
}

/// The guard that is there to stop a technique.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Guard {
    /// The kernel program.
    Hook,
    Seccomp,
    /// A namespace, and what is (not) in it.
    Namespace,
    Landlock,
    Proxy,
    Resolver,
    /// The kernel's own rules, for a process with no privilege.
    Kernel,
}

/// What must be true outside for a refusal inside to count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// The same attempt reaches its target.
    Reaches,
    /// The same, unless the kernel has no such thing or the gate itself may not do it either.
    ReachesIfThere,
    /// Nothing: the attempt looks at what its own process has.
    None,
}

/// The socket that an attempt is made at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    Tcp4,
    Tcp6,
    Udp4,
    Udp6,
}

/// Where a technique is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Where {
    Everywhere,
    /// In the leaf whose profile has a name.
    WithProfile,
}

/// One way out.
#[derive(Clone, Copy, Debug)]
pub struct Technique {
    pub name: &'static str,
    pub guard: Guard,
    pub control: Control,
    pub target: Option<Target>,
    pub tried: Where,
    /// The target's word is the only one that counts: inside, the attempt cannot know whom it hit.
    pub witness: bool,
    run: fn(&Order, &str) -> Saw,
}

const fn technique(name: &'static str, guard: Guard, control: Control, run: fn(&Order, &str) -> Saw) -> Technique {
    Technique { name, guard, control, target: None, tried: Where::Everywhere, witness: false, run }
}

impl Technique {
    const fn at(self, target: Target) -> Self {
        Self { target: Some(target), ..self }
    }

    const fn with_profile(self) -> Self {
        Self { tried: Where::WithProfile, ..self }
    }

    const fn witnessed(self) -> Self {
        Self { witness: true, ..self }
    }
}

/// All of them.
pub const TECHNIQUES: &[Technique] = &[
    technique("tcp_v4", Guard::Hook, Control::Reaches, tcp::plain).at(Target::Tcp4),
    technique("tcp_v6", Guard::Hook, Control::Reaches, tcp::plain).at(Target::Tcp6),
    technique("tcp_mapped", Guard::Hook, Control::Reaches, tcp::mapped).at(Target::Tcp4),
    technique("tcp_reconnect", Guard::Hook, Control::Reaches, tcp::reconnect).at(Target::Tcp4),
    technique("tcp_fast_open", Guard::Hook, Control::ReachesIfThere, tcp::fast_open).at(Target::Tcp4),
    technique("mptcp", Guard::Seccomp, Control::ReachesIfThere, tcp::multipath).at(Target::Tcp4),
    technique("udp_sendto_v4", Guard::Hook, Control::Reaches, udp::sendto).at(Target::Udp4),
    technique("udp_sendto_v6", Guard::Hook, Control::Reaches, udp::sendto).at(Target::Udp6),
    technique("udp_sendto_mapped", Guard::Hook, Control::Reaches, udp::sendto_mapped).at(Target::Udp4),
    technique("udp_connected_v4", Guard::Hook, Control::Reaches, udp::connected).at(Target::Udp4),
    technique("udp_connected_v6", Guard::Hook, Control::Reaches, udp::connected).at(Target::Udp6),
    technique("udp_connected_mapped", Guard::Hook, Control::Reaches, udp::connected_mapped).at(Target::Udp4),
    technique("udp_rebound_v4", Guard::Hook, Control::Reaches, udp::rebound).at(Target::Udp4),
    technique("udp_rebound_v6", Guard::Hook, Control::Reaches, udp::rebound).at(Target::Udp6),
    technique("udp_rebound_mapped", Guard::Hook, Control::Reaches, udp::rebound_mapped).at(Target::Udp4),
    technique("raw_icmp", Guard::Seccomp, Control::ReachesIfThere, families::icmp),
    technique("raw_header", Guard::Seccomp, Control::ReachesIfThere, families::header).at(Target::Udp4),
    technique("udp_lite", Guard::Seccomp, Control::ReachesIfThere, families::udp_lite).at(Target::Udp4),
    technique("sctp", Guard::Seccomp, Control::ReachesIfThere, families::sctp),
    technique("packet_socket", Guard::Seccomp, Control::ReachesIfThere, families::packet),
    technique("netlink_socket", Guard::Seccomp, Control::ReachesIfThere, families::netlink),
    technique("vsock_socket", Guard::Seccomp, Control::ReachesIfThere, families::vsock),
    technique("xdp_socket", Guard::Seccomp, Control::ReachesIfThere, families::xdp),
    technique("alg_socket", Guard::Seccomp, Control::ReachesIfThere, families::alg),
    technique("unix_path", Guard::Seccomp, Control::Reaches, families::unix_path),
    technique("unix_abstract", Guard::Seccomp, Control::Reaches, families::unix_abstract),
    technique("inbound", Guard::Hook, Control::Reaches, inbound::answer),
    technique("dns_udp", Guard::Hook, Control::Reaches, dns::udp),
    technique("dns_tcp", Guard::Hook, Control::Reaches, dns::tcp),
    technique("name_other_port", Guard::Hook, Control::Reaches, dns::other_port).at(Target::Tcp4).with_profile(),
    technique("proxy_other_port", Guard::Proxy, Control::Reaches, proxy::other_port).at(Target::Tcp4).with_profile(),
    technique("proxy_address", Guard::Proxy, Control::Reaches, proxy::address).at(Target::Tcp4).with_profile(),
    technique("io_uring", Guard::Seccomp, Control::ReachesIfThere, kernel::io_uring),
    technique("bpf", Guard::Seccomp, Control::ReachesIfThere, kernel::bpf),
    technique("mount", Guard::Seccomp, Control::ReachesIfThere, kernel::mount),
    technique("unshare", Guard::Seccomp, Control::ReachesIfThere, kernel::unshare),
    technique("setns", Guard::Seccomp, Control::ReachesIfThere, kernel::setns),
    technique("user_namespace", Guard::Seccomp, Control::ReachesIfThere, kernel::user_namespace),
    technique("ptrace", Guard::Seccomp, Control::ReachesIfThere, kernel::ptrace),
    technique("pidfd_getfd", Guard::Namespace, Control::ReachesIfThere, kernel::pidfd_getfd),
    technique("signal", Guard::Namespace, Control::Reaches, kernel::signal).witnessed(),
    technique("cgroup_move", Guard::Namespace, Control::ReachesIfThere, files::cgroup_move),
    technique("proc_outside", Guard::Namespace, Control::Reaches, files::proc_outside),
    technique("state_directory", Guard::Namespace, Control::Reaches, files::state_directory),
    technique("root_write", Guard::Landlock, Control::None, files::root_write),
    technique("core_dump", Guard::Kernel, Control::None, process::core_dump),
    technique("descriptors", Guard::Kernel, Control::None, process::descriptors),
    technique("capabilities", Guard::Kernel, Control::None, process::capabilities),
    technique("no_new_privs", Guard::Kernel, Control::None, process::no_new_privs),
    technique("seccomp_filter", Guard::Seccomp, Control::None, process::seccomp_filter),
    technique("identity", Guard::Namespace, Control::None, process::identity),
];

/// The technique of this name.
pub fn named(name: &str) -> Option<&'static Technique> {
    TECHNIQUES.iter().find(|technique| technique.name == name)
}

/// Reads the order from standard input, makes each attempt in a process of its own, and writes what came of them.
pub(super) fn main() -> ExitCode {
    let mut text = Vec::new();
    if std::io::stdin().read_to_end(&mut text).is_err() {
        return ExitCode::FAILURE;
    }
    let Ok(order) = serde_json::from_slice::<Order>(&text) else {
        return ExitCode::FAILURE;
    };
    let seen = try_all(&order);
    let written = serde_json::to_vec(&seen).is_ok_and(|json| std::io::stdout().write_all(&json).is_ok());
    if written { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// An attempt that is being made.
struct Running {
    name: String,
    pid: libc::pid_t,
    said: OwnedFd,
}

fn try_all(order: &Order) -> BTreeMap<String, Saw> {
    let asked = || order.techniques.iter().filter_map(|name| named(name));
    // What looks at this very process, before there is a pipe in it.
    let looks = asked().filter(|technique| technique.control == Control::None);
    let mut seen: BTreeMap<String, Saw> =
        looks.map(|technique| (technique.name.to_owned(), (technique.run)(order, technique.name))).collect();
    let mut running = Vec::new();
    for technique in asked().filter(|technique| technique.control != Control::None) {
        match begin(order, technique) {
            Ok(attempt) => running.push(attempt),
            Err(error) => {
                let why = format!("no process for it: {error}");
                seen.insert(technique.name.to_owned(), Saw::Hindered { why });
            }
        }
    }
    // Longer than a socket waits, so that it is the attempt that says what it was at.
    let until = Instant::now() + 2 * order.patience();
    for attempt in running {
        let Running { name, pid, said } = attempt;
        let saw = sys::read_within(&said, until.saturating_duration_since(Instant::now()));
        let saw = saw.and_then(|json| serde_json::from_slice(&json).ok());
        // SAFETY: a child of this process that was not waited for.
        unsafe { libc::kill(pid, libc::SIGKILL) };
        let ended = sys::wait(pid);
        seen.insert(name, saw.unwrap_or_else(|| unheard(ended)));
    }
    seen
}

fn unheard(status: i32) -> Saw {
    match libc::WIFSIGNALED(status) {
        true => Saw::Died { signal: libc::WTERMSIG(status) },
        false => Saw::Hindered { why: "it ended without a word".to_owned() },
    }
}

fn begin(order: &Order, technique: &Technique) -> std::io::Result<Running> {
    let (said, say) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    // SAFETY: this process has one thread, so the child may do anything.
    match unsafe { libc::fork() } {
        -1 => Err(std::io::Error::last_os_error()),
        0 => {
            drop(said);
            let saw = (technique.run)(order, technique.name);
            let json = serde_json::to_vec(&saw).unwrap_or_default();
            // SAFETY: bytes of this process, to a pipe of this process; then it ends with nothing to tidy.
            unsafe {
                libc::write(say.as_raw_fd(), json.as_ptr().cast(), json.len());
                libc::_exit(0)
            }
        }
        pid => Ok(Running { name: technique.name.to_owned(), pid, said }),
    }
}

impl Order {
    fn target(&self, name: &str) -> Result<SocketAddr, Saw> {
        self.targets.get(name).copied().ok_or_else(|| Saw::Hindered { why: "there is no listener for it".to_owned() })
    }

    fn patience(&self) -> Duration {
        Duration::from_millis(self.patience_ms)
    }
}

#[cfg(test)]
mod tests;
