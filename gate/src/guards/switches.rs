//! The switches. Only in a build for tests.

use std::sync::atomic::{AtomicU64, Ordering};

use latchgate_egress_types::guard::Guard as Kernel;

use super::Guard;

const VARIABLE: &str = "LATCHGATE_TEST_GUARDS_OFF";

#[derive(Clone, Copy)]
enum Switch {
    Kernel(Kernel),
    Gate(Guard),
}

const SWITCHES: [(&str, Switch); 43] = [
    ("connect4", Switch::Kernel(Kernel::Connect4)),
    ("connect6", Switch::Kernel(Kernel::Connect6)),
    ("sendmsg4", Switch::Kernel(Kernel::Sendmsg4)),
    ("sendmsg6", Switch::Kernel(Kernel::Sendmsg6)),
    ("socket_kind", Switch::Kernel(Kernel::SocketKind)),
    ("egress", Switch::Kernel(Kernel::Egress)),
    ("ingress", Switch::Kernel(Kernel::Ingress)),
    ("dns", Switch::Kernel(Kernel::Dns)),
    ("entry", Switch::Kernel(Kernel::Entry)),
    ("heartbeat", Switch::Kernel(Kernel::Heartbeat)),
    ("deadline", Switch::Kernel(Kernel::Deadline)),
    ("reach", Switch::Kernel(Kernel::Reach)),
    ("foreign_socket", Switch::Kernel(Kernel::ForeignSocket)),
    ("flow_limit", Switch::Kernel(Kernel::FlowLimit)),
    ("seccomp", Switch::Gate(Guard::Seccomp)),
    ("seccomp:io_uring", Switch::Gate(Guard::IoUring)),
    ("seccomp:processes", Switch::Gate(Guard::Processes)),
    ("seccomp:programs", Switch::Gate(Guard::Programs)),
    ("seccomp:mounts", Switch::Gate(Guard::Mounts)),
    ("seccomp:handles", Switch::Gate(Guard::Handles)),
    ("seccomp:namespaces", Switch::Gate(Guard::Namespaces)),
    ("seccomp:keys", Switch::Gate(Guard::Keys)),
    ("seccomp:machine", Switch::Gate(Guard::Machine)),
    ("seccomp:socket_families", Switch::Gate(Guard::SocketFamilies)),
    ("seccomp:terminal", Switch::Gate(Guard::Terminal)),
    ("landlock", Switch::Gate(Guard::Landlock)),
    ("capabilities", Switch::Gate(Guard::Capabilities)),
    ("no_new_privs", Switch::Gate(Guard::NoNewPrivileges)),
    ("user_namespace", Switch::Gate(Guard::UserNamespace)),
    ("mount_namespace", Switch::Gate(Guard::MountNamespace)),
    ("pid_namespace", Switch::Gate(Guard::PidNamespace)),
    ("close_descriptors", Switch::Gate(Guard::CloseDescriptors)),
    ("resource_limits", Switch::Gate(Guard::ResourceLimits)),
    ("scratch_limit", Switch::Gate(Guard::ScratchLimit)),
    ("hide", Switch::Gate(Guard::Hide)),
    ("die_with_gate", Switch::Gate(Guard::DieWithGate)),
    ("cgroup_kill", Switch::Gate(Guard::CgroupKill)),
    ("sni", Switch::Gate(Guard::Sni)),
    ("host", Switch::Gate(Guard::Host)),
    ("address_class", Switch::Gate(Guard::AddressClass)),
    ("proxy_names", Switch::Gate(Guard::ProxyNames)),
    ("resolver_names", Switch::Gate(Guard::ResolverNames)),
    ("attribution", Switch::Gate(Guard::Attribution)),
];

static GATE_OFF: AtomicU64 = AtomicU64::new(0);
static KERNEL_OFF: AtomicU64 = AtomicU64::new(0);

pub fn is_on(guard: Guard) -> bool {
    GATE_OFF.load(Ordering::Relaxed) & (1 << guard as u32) == 0
}

/// The checks of this process that are off, for the first process of a sandbox.
pub fn bits() -> u64 {
    GATE_OFF.load(Ordering::Relaxed)
}

/// Takes over what another process of the gate has as [`bits`].
pub fn set(bits: u64) {
    GATE_OFF.store(bits, Ordering::Relaxed);
}

/// The word of the kernel program.
pub fn kernel_bits() -> u64 {
    KERNEL_OFF.load(Ordering::Relaxed)
}

/// Takes the checks away that the environment names, separated by commas.
///
/// # Errors
/// A name that is none, or no names at all: a test that misspells one must not pass for another reason.
pub fn take_from_environment() -> Result<(), String> {
    let named = std::env::var(VARIABLE).map_err(|error| format!("{VARIABLE}: {error}"))?;
    for name in named.split(',') {
        let found = SWITCHES.iter().find(|(known, _)| *known == name);
        match found.ok_or_else(|| format!("{VARIABLE}: {name:?} is no guard; there are {}", names(|_| true)))?.1 {
            Switch::Kernel(guard) => KERNEL_OFF.fetch_or(guard.bit(), Ordering::Relaxed),
            Switch::Gate(guard) => GATE_OFF.fetch_or(1 << guard as u32, Ordering::Relaxed),
        };
    }
    Ok(())
}

/// What a gate with a check off says of itself.
pub fn warning() -> Option<String> {
    let off = names(|switch| match switch {
        Switch::Kernel(guard) => kernel_bits() & guard.bit() != 0,
        Switch::Gate(guard) => !is_on(guard),
    });
    (!off.is_empty()).then(|| format!("a build for tests, with guards off: {off}"))
}

fn names(wanted: impl Fn(Switch) -> bool) -> String {
    let named: Vec<&str> = SWITCHES.iter().filter(|(_, switch)| wanted(*switch)).map(|(name, _)| *name).collect();
    named.join(", ")
}
