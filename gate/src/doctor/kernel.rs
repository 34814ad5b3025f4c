//! The kernel: its version, how it was built, and what it lets this process do.

use std::fs;
use std::path::Path;

use super::{Check, cgroup_mounts, inflate};
use crate::privileges;
use crate::sandbox::probe;

/// cgroup.kill and SO_NETNS_COOKIE (5.14).
const OLDEST: (u32, u32) = (5, 14);
/// The oldest that the tests run on.
const TESTED: (u32, u32) = (6, 1);

/// What the program, the sandbox and the second walls are made of. The last says whether the gate can be without.
const OPTIONS: [(&str, &str, bool); 16] = [
    ("CONFIG_BPF_SYSCALL", "the kernel program", true),
    ("CONFIG_CGROUP_BPF", "the kernel program", true),
    ("CONFIG_CGROUPS", "leaves", true),
    ("CONFIG_NET_NS", "network namespaces", false),
    ("CONFIG_INET", "TCP", true),
    ("CONFIG_USER_NS", "sandboxes", true),
    ("CONFIG_PID_NS", "sandboxes", true),
    ("CONFIG_IPC_NS", "sandboxes", true),
    ("CONFIG_UTS_NS", "sandboxes", true),
    ("CONFIG_SECCOMP_FILTER", "the filter of system calls", true),
    ("CONFIG_TMPFS", "the sandbox's root", true),
    ("CONFIG_PROC_FS", "the uid maps", true),
    ("CONFIG_SECURITY_LANDLOCK", "a second wall around files", false),
    ("CONFIG_MEMCG", "a memory limit of the whole execution", false),
    ("CONFIG_CGROUP_PIDS", "a process limit of the whole execution", false),
    ("CONFIG_BPF_JIT", "a kernel program at full speed", false),
];

pub fn checks() -> Vec<Check> {
    let mut checks = vec![version(), configuration(), btf()];
    checks.extend(cgroups());
    checks.extend(capabilities());
    checks.extend([landlock(), seccomp(), user_namespaces(), clock()]);
    checks
}

fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

fn version() -> Check {
    let release = release();
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) < OLDEST => Check::fault(
            "kernel",
            release,
            "run Linux 5.14 or later: cgroup.kill and the cookies of network namespaces are missing",
        ),
        (Some(major), Some(minor)) if (major, minor) < TESTED => {
            Check::warning("kernel", release, "Linux 6.1 is the oldest that is tested")
        }
        (Some(_), Some(_)) => Check::ok("kernel", release),
        _ => Check::unknown("kernel", release),
    }
}

/// The text of the running kernel's configuration, and where it was read.
fn kernel_configuration() -> Option<(String, String)> {
    let release = release();
    let plain = [format!("/boot/config-{release}"), format!("/lib/modules/{release}/config")];
    let read = plain.iter().find_map(|path| Some((fs::read_to_string(path).ok()?, path.clone())));
    read.or_else(|| {
        let path = "/proc/config.gz";
        let text = inflate::gunzip(&fs::read(path).ok()?)?;
        Some((String::from_utf8_lossy(&text).into_owned(), path.to_owned()))
    })
}

fn configuration() -> Check {
    let Some((text, path)) = kernel_configuration() else {
        return Check::unknown("kernel configuration", "this kernel does not show it; each thing is looked at below");
    };
    judged(&text, &path)
}

fn judged(text: &str, path: &str) -> Check {
    let set = |option: &str| {
        text.lines().any(|line| line.strip_prefix(option).is_some_and(|value| value == "=y" || value == "=m"))
    };
    let missing: Vec<_> = OPTIONS.iter().filter(|(option, ..)| !set(option)).collect();
    let named = |wanted: bool| -> Vec<String> {
        let these = missing.iter().filter(|(.., needed)| *needed == wanted);
        these.map(|(option, what, _)| format!("{option} ({what})")).collect()
    };
    let (needed, useful) = (named(true), named(false));
    if !needed.is_empty() {
        let found = format!("{path}: not set: {}", needed.join(", "));
        return Check::fault("kernel configuration", found, "use a kernel that is built with these options");
    }
    if !useful.is_empty() {
        let found = format!("{path}: not set: {}", useful.join(", "));
        return Check::warning("kernel configuration", found, "the gate works without; a kernel with these holds more");
    }
    Check::ok("kernel configuration", format!("{path}: all {} options", OPTIONS.len()))
}

fn btf() -> Check {
    match fs::metadata("/sys/kernel/btf/vmlinux") {
        Ok(found) => Check::ok("BTF", format!("/sys/kernel/btf/vmlinux, {} bytes", found.len())),
        Err(error) => Check::warning(
            "BTF",
            format!("/sys/kernel/btf/vmlinux: {error}"),
            "nothing is relocated against it, but the socket storage of the kernel program needs CONFIG_DEBUG_INFO_BTF \
             on some kernels: see `attach` below",
        ),
    }
}

fn cgroups() -> Vec<Check> {
    let mounts = cgroup_mounts();
    let Some((point, writable)) = mounts.iter().max_by_key(|(_, writable)| *writable) else {
        return vec![Check::fault(
            "cgroup tree",
            "no cgroup v2 hierarchy is mounted",
            "mount -t cgroup2 cgroup2 /sys/fs/cgroup",
        )];
    };
    let at = point.display();
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/").to_owned();
    let tree = if *writable {
        Check::ok("cgroup tree", format!("v2 at {at}, this process in {own}"))
    } else {
        Check::warning(
            "cgroup tree",
            format!("v2 at {at} is mounted read-only"),
            "on a host, remount it read-write; in a container the gate needs a way to its own leaves",
        )
    };
    let there = fs::read_to_string(point.join("cgroup.controllers")).unwrap_or_default();
    let missing: Vec<&str> =
        ["memory", "pids"].into_iter().filter(|name| !there.split_whitespace().any(|has| has == *name)).collect();
    let controllers = if missing.is_empty() {
        Check::ok("cgroup controllers", "memory and pids")
    } else {
        Check::warning(
            "cgroup controllers",
            format!("without {} in the v2 tree", missing.join(" and ")),
            "limits hold each process instead of the whole execution; boot with cgroup_no_v1=all for the whole",
        )
    };
    vec![tree, controllers]
}

fn capabilities() -> Vec<Check> {
    let missing = privileges::missing();
    let needed = privileges::CAPABILITIES.iter().map(|&(_, what, why)| {
        if missing.iter().any(|one| one.what == what) {
            Check::fault(what, "not held", format!("start the gate with it: it {why}"))
        } else {
            Check::ok(what, "held")
        }
    });
    needed.collect()
}

fn landlock() -> Check {
    match probe::landlock_version() {
        Ok(version) if version >= 6 => Check::ok("Landlock", format!("ABI {version}")),
        Ok(version) => Check::warning(
            "Landlock",
            format!("ABI {version}"),
            "abstract Unix sockets and signals are scoped from ABI 6 (Linux 6.12); seccomp and namespaces hold without",
        ),
        Err(error) => Check::warning(
            "Landlock",
            format!("not there: {error}"),
            "add landlock to the lsm= of the kernel's command line; mounts, namespaces and seccomp hold without",
        ),
    }
}

fn seccomp() -> Check {
    match probe::seccomp_refuses() {
        Ok(()) => Check::ok("seccomp", "filters can refuse"),
        Err(error) => Check::fault("seccomp", error.to_string(), "use a kernel with CONFIG_SECCOMP_FILTER"),
    }
}

fn user_namespaces() -> Check {
    let number = |path: &str| fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok());
    match number("/proc/sys/user/max_user_namespaces") {
        Some(0) => Check::fault(
            "user namespaces",
            "user.max_user_namespaces is 0",
            "sysctl -w user.max_user_namespaces=15000: each execution has one of its own",
        ),
        Some(most) => Check::ok("user namespaces", format!("up to {most}")),
        None if Path::new("/proc/self/ns/user").exists() => Check::ok("user namespaces", "there"),
        None => Check::fault("user namespaces", "not there", "use a kernel with CONFIG_USER_NS"),
    }
}

fn clock() -> Check {
    let now = crate::time::Timestamp::now();
    // Nothing of this program is older.
    if now.secs() < 1_735_689_600 {
        return Check::fault("clock", format!("{now}"), "set the clock: leases and proofs are judged by it");
    }
    if probe::clock_is_synchronised() {
        Check::ok("clock", format!("{now}, synchronised"))
    } else {
        let found = format!("{now}; the kernel does not know that anything sets it");
        Check::warning(
            "clock",
            found,
            "run a time service where agents' clocks are not this one: proofs are judged by it",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn a_configuration_says_what_it_lacks_and_whether_that_matters() {
        let all: String = OPTIONS.iter().map(|(option, ..)| format!("{option}=y\n")).collect();
        assert_eq!(judged(&all, "p").state, State::Ok);
        let without = |option: &str| judged(&all.replace(&format!("{option}=y\n"), ""), "p");
        assert_eq!(without("CONFIG_MEMCG").state, State::Warning);
        let fault = without("CONFIG_CGROUP_BPF");
        assert_eq!(fault.state, State::Fault);
        assert!(fault.found.contains("CONFIG_CGROUP_BPF (the kernel program)"), "{}", fault.found);
        // Another option that begins so is another option.
        assert_eq!(judged(&all.replace("CONFIG_BPF_SYSCALL=y", "CONFIG_BPF_SYSCALL_X=y"), "p").state, State::Fault);
    }
}
