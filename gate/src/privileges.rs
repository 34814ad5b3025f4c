//! What the gate needs of the machine, checked before anything is built.

/// A privilege that is not there, and what it is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    pub what: &'static str,
    pub why: &'static str,
}

/// Capability numbers of `linux/capability.h`, and what the gate does with each.
pub const CAPABILITIES: [(u32, &str, &str); 4] = [
    (6, "CAP_SETGID", "gives each execution a group of its own"),
    (7, "CAP_SETUID", "gives each execution a uid of its own"),
    (12, "CAP_NET_ADMIN", "attaches the program that holds executions to their profile"),
    (39, "CAP_BPF", "loads the program that holds executions to their profile"),
];

/// Everything that is missing, so that one attempt names it all.
pub fn missing() -> Vec<Missing> {
    let effective = effective_capabilities().unwrap_or(0);
    CAPABILITIES
        .iter()
        .filter(|(bit, ..)| effective & (1_u64 << bit) == 0)
        .map(|&(_, what, why)| Missing { what, why })
        .collect()
}

/// `CapEff` of proc_pid_status(5). `None` when there is no /proc: then nothing can be shown to be there.
fn effective_capabilities() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}
