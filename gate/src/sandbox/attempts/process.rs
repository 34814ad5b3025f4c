//! What a process inside has, or should not have. Nothing is tried but to get it back.

use std::fs;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::sys::reached;
use super::{Order, Saw};

/// It holds, and this is what was looked at.
fn held(at: &str) -> Saw {
    Saw::Refused { at: at.to_owned(), errno: 0 }
}

fn status(field: &str) -> Option<String> {
    let text = fs::read_to_string("/proc/self/status").ok()?;
    text.lines().find_map(|line| line.strip_prefix(field)).map(|value| value.trim().to_owned())
}

/// No core of any use, and the limit cannot be raised.
pub fn core_dump(_: &Order, _: &str) -> Saw {
    let limit = getrlimit(Resource::Core);
    if limit.maximum.is_none_or(|bytes| bytes > 1) {
        return reached("a core could be written");
    }
    match setrlimit(Resource::Core, Rlimit { current: Some(1 << 20), maximum: Some(1 << 20) }) {
        Ok(()) => reached("the limit of cores could be raised"),
        Err(error) => Saw::Refused { at: "setrlimit".to_owned(), errno: error.raw_os_error() },
    }
}

/// Standard input, output and error, and nothing that came along.
pub fn descriptors(_: &Order, _: &str) -> Saw {
    // Without /proc every number that there can be is asked.
    let most = getrlimit(Resource::Nofile).current.unwrap_or(1024).min(1 << 16);
    let open = (3..i32::try_from(most).unwrap_or(1024)).find(|&number| is_open(number));
    match open {
        Some(number) => reached(&format!("descriptor {number} is open")),
        None => held("descriptors"),
    }
}

#[allow(unsafe_code)] // a descriptor by its number, which may not be one.
fn is_open(number: i32) -> bool {
    // SAFETY: asks for flags and changes nothing.
    unsafe { libc::fcntl(number, libc::F_GETFD) >= 0 }
}

pub fn capabilities(_: &Order, _: &str) -> Saw {
    match rustix::thread::capabilities(None) {
        Err(error) => Saw::Hindered { why: format!("capget: {error}") },
        Ok(sets) if !(sets.effective | sets.permitted | sets.inheritable).is_empty() => reached("a capability is left"),
        // The bounding and the ambient set are in /proc alone, where there is one.
        Ok(_) => match ["CapBnd:", "CapAmb:"].into_iter().find(|set| status(set).is_some_and(|bits| !zero(&bits))) {
            Some(set) => reached(&format!("{set} is not empty")),
            None => held("capabilities"),
        },
    }
}

fn zero(bits: &str) -> bool {
    bits.chars().all(|digit| digit == '0')
}

pub fn no_new_privs(_: &Order, _: &str) -> Saw {
    match rustix::thread::no_new_privs() {
        Ok(true) => held("prctl"),
        Ok(false) => reached("no_new_privs is not set"),
        Err(error) => Saw::Hindered { why: format!("prctl: {error}") },
    }
}

#[allow(unsafe_code)] // prctl with a number.
pub fn seccomp_filter(_: &Order, _: &str) -> Saw {
    // SAFETY: integers only.
    match unsafe { libc::prctl(libc::PR_GET_SECCOMP) } {
        2 => held("prctl"),
        _ => reached("no filter of system calls is on"),
    }
}

/// Nobody, outside and inside, and not to become anybody else.
pub fn identity(_: &Order, _: &str) -> Saw {
    if rustix::process::geteuid().is_root() || rustix::process::getuid().is_root() {
        return reached("it is root");
    }
    match become_root() {
        Ok(()) => reached("it became root"),
        Err(errno) => Saw::Refused { at: "setresuid".to_owned(), errno },
    }
}

#[allow(unsafe_code)] // a change of identity that must fail.
fn become_root() -> Result<(), i32> {
    // SAFETY: integers only.
    let became = unsafe { libc::syscall(libc::SYS_setresuid, 0, 0, 0) };
    if became < 0 { Err(super::sys::errno()) } else { Ok(()) }
}
