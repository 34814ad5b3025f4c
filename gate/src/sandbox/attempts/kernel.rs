//! System calls that would undo the confinement from within.
#![allow(unsafe_code)] // raw system calls are what is tried.

use std::mem::zeroed;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::sys::{errno, reached, refused, refused_with, tried};
use super::{Order, Saw};

const PTRACE_SEIZE: libc::c_long = 0x4206;
const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_TYPE_ARRAY: u32 = 2;

/// A raw call that should be refused.
fn call(at: &str, returned: libc::c_long) -> Result<libc::c_long, Saw> {
    if returned < 0 { Err(refused(at)) } else { Ok(returned) }
}

pub fn io_uring(_: &Order, _: &str) -> Saw {
    tried(|| {
        // `struct io_uring_params` is 120 bytes; zeroes ask for nothing special.
        let mut parameters = [0_u64; 15];
        // SAFETY: the kernel writes into a buffer of the structure's size.
        let made = unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, parameters.as_mut_ptr()) };
        call("io_uring_setup", made).map(|_| reached("a ring was made"))
    })
}

pub fn bpf(_: &Order, _: &str) -> Saw {
    tried(|| {
        // Type, size of a key, size of a value, entries: the start of `union bpf_attr` for a map (bpf(2)).
        let attributes: [u32; 32] = std::array::from_fn(|at| match at {
            0 => BPF_MAP_TYPE_ARRAY,
            1 => 4,
            2 => 8,
            3 => 1,
            _ => 0,
        });
        // SAFETY: the attributes are of the length that is given.
        let made = unsafe {
            libc::syscall(libc::SYS_bpf, BPF_MAP_CREATE, attributes.as_ptr(), std::mem::size_of_val(&attributes))
        };
        call("bpf", made).map(|_| reached("a map was made"))
    })
}

/// Outside, in a mount namespace of the attempt's own: the machine sees nothing of it.
fn apart(order: &Order, flags: i32) -> Result<(), Saw> {
    if !order.outside {
        return Ok(());
    }
    // SAFETY: this process is the attempt's alone and has one thread.
    let left = unsafe { libc::unshare(flags) };
    if left < 0 { Err(refused_with("unshare", errno())) } else { Ok(()) }
}

pub fn mount(order: &Order, _: &str) -> Saw {
    tried(|| {
        apart(order, libc::CLONE_NEWNS)?;
        let none = std::ptr::null();
        // SAFETY: strings that end with NUL. Outside, only this process's own namespace is changed, after it was cut off.
        unsafe {
            if order.outside {
                call(
                    "mount",
                    libc::mount(c"none".as_ptr(), c"/".as_ptr(), none, libc::MS_REC | libc::MS_PRIVATE, none.cast())
                        .into(),
                )?;
            }
            let made = libc::mount(c"selftest".as_ptr(), c"/tmp".as_ptr(), c"tmpfs".as_ptr(), 0, none.cast());
            call("mount", made.into()).map(|_| reached("a file system was mounted"))
        }
    })
}

pub fn unshare(_: &Order, _: &str) -> Saw {
    tried(|| {
        // SAFETY: integers only, in a process of the attempt's own.
        call("unshare", unsafe { libc::unshare(libc::CLONE_NEWUTS) }.into()).map(|_| reached("a namespace was made"))
    })
}

pub fn user_namespace(_: &Order, _: &str) -> Saw {
    tried(|| {
        // SAFETY: as above.
        call("unshare", unsafe { libc::unshare(libc::CLONE_NEWUSER) }.into())
            .map(|_| reached("a user namespace was made"))
    })
}

/// Its own namespace again: who may join one may join others.
pub fn setns(_: &Order, _: &str) -> Saw {
    tried(|| {
        // SAFETY: a string that ends with NUL; the descriptor that comes back is new.
        let namespace = unsafe {
            match libc::open(c"/proc/self/ns/uts".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) {
                -1 => return Err(refused("open")),
                descriptor => OwnedFd::from_raw_fd(descriptor),
            }
        };
        // SAFETY: integers only.
        call("setns", unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWUTS) }.into())
            .map(|_| reached("a namespace was joined"))
    })
}

/// Attaches without stopping; it is let go when the attempt's process ends (ptrace(2)).
pub fn ptrace(order: &Order, _: &str) -> Saw {
    tried(|| {
        // SAFETY: integers only.
        let seized = unsafe { libc::syscall(libc::SYS_ptrace, PTRACE_SEIZE, order.victim, 0, 0) };
        call("ptrace", seized).map(|_| reached("a process outside was traced"))
    })
}

pub fn pidfd_getfd(order: &Order, _: &str) -> Saw {
    tried(|| {
        // SAFETY: integers only; the descriptor that comes back is new.
        let process = unsafe {
            let opened = call("pidfd_open", libc::syscall(libc::SYS_pidfd_open, order.victim, 0))?;
            OwnedFd::from_raw_fd(i32::try_from(opened).unwrap_or(-1))
        };
        // SAFETY: integers only.
        let taken = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), 0, 0) };
        call("pidfd_getfd", taken).map(|_| reached("a descriptor of a process outside was taken"))
    })
}

/// A signal that is ignored where it is not waited for: inside, the number may be another process's.
pub fn signal(order: &Order, _: &str) -> Saw {
    tried(|| {
        // SAFETY: plain data, for which all zeroes is a value.
        let mut value: libc::sigval = unsafe { zeroed() };
        value.sival_ptr = order.number as usize as *mut libc::c_void;
        // SAFETY: integers only.
        call("sigqueue", unsafe { libc::sigqueue(order.victim, libc::SIGURG, value) }.into())
            .map(|_| reached("a process outside was signalled"))
    })
}
