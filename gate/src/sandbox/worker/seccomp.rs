//! The system calls that a program inside does not have.
//!
//! The cgroup programs of the kernel see IPv4 and IPv6 sockets that were made inside the leaf, and nothing else. So
//! whatever makes another kind of socket, brings in a descriptor from outside, makes a namespace, or hands work to the
//! kernel past the system calls (io_uring) is refused here, and what is not needed and has a history is refused with it.
//! Every refusal is EPERM, but for two that must look like an older kernel, so that callers take their other way
//! (ENOSYS): `clone3`, whose flags a filter cannot read, and any call that is newer than this list.
//!
//! Calls are compared by number, and a number means what it means only under the native ABI: the 32-bit one
//! (`int 0x80`) kills, and x32 numbers do not exist.
#![allow(unsafe_code)] // the seccomp system call itself.

use std::io;

use libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter,
};

use crate::guards::{self, Guard};

#[cfg(target_arch = "x86_64")]
const NATIVE: u32 = 0xc000_003e; // AUDIT_ARCH_X86_64
#[cfg(target_arch = "aarch64")]
const NATIVE: u32 = 0xc000_00b7; // AUDIT_ARCH_AARCH64
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("the list of refused system calls has not been reviewed for this architecture");

/// file_setattr, of Linux 6.17; from 424 on the numbers are the same on every architecture. Later calls do not exist.
const LAST_REVIEWED: u32 = 469;

/// Offsets in `struct seccomp_data` (linux/seccomp.h), and of the low half of the first argument.
const NUMBER_AT: u32 = 0;
const ARCH_AT: u32 = 4;
const ARGUMENTS_AT: u32 = if cfg!(target_endian = "little") { 16 } else { 20 };

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;
const REFUSE: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
const ABSENT: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

/// Numbers that the libc crate does not have on every target.
const SYS_OPEN_TREE_ATTR: libc::c_long = 467;

/// Calls that do not exist inside, by what they are refused for.
const REFUSED: &[(Guard, &[libc::c_long])] = &[
    // Work that the kernel does without a system call that a filter could see.
    (Guard::IoUring, &[libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register]),
    // Other processes' memory and descriptors.
    (
        Guard::Processes,
        &[
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_pidfd_getfd,
            libc::SYS_kcmp,
            libc::SYS_process_madvise,
        ],
    ),
    // The kernel's programs, counters and faults.
    (
        Guard::Programs,
        &[
            libc::SYS_bpf,
            libc::SYS_perf_event_open,
            libc::SYS_userfaultfd,
            libc::SYS_fanotify_init,
            libc::SYS_fanotify_mark,
        ],
    ),
    // Mounts, old and new.
    (
        Guard::Mounts,
        &[
            libc::SYS_mount,
            libc::SYS_umount2,
            libc::SYS_open_tree,
            SYS_OPEN_TREE_ATTR,
            libc::SYS_move_mount,
            libc::SYS_fsopen,
            libc::SYS_fsconfig,
            libc::SYS_fsmount,
            libc::SYS_fspick,
            libc::SYS_mount_setattr,
            libc::SYS_pivot_root,
            libc::SYS_chroot,
            libc::SYS_quotactl,
            libc::SYS_quotactl_fd,
        ],
    ),
    // Files by handle, past the names that the root shows.
    (Guard::Handles, &[libc::SYS_open_by_handle_at, libc::SYS_name_to_handle_at]),
    // Namespaces.
    (Guard::Namespaces, &[libc::SYS_unshare, libc::SYS_setns]),
    // Keys have no namespace.
    (Guard::Keys, &[libc::SYS_add_key, libc::SYS_request_key, libc::SYS_keyctl]),
    // The machine.
    (
        Guard::Machine,
        &[
            libc::SYS_kexec_load,
            libc::SYS_init_module,
            libc::SYS_finit_module,
            libc::SYS_delete_module,
            libc::SYS_swapon,
            libc::SYS_swapoff,
            libc::SYS_reboot,
            libc::SYS_acct,
            libc::SYS_syslog,
            libc::SYS_vhangup,
            libc::SYS_sethostname,
            libc::SYS_setdomainname,
            libc::SYS_settimeofday,
            libc::SYS_clock_settime,
            libc::SYS_clock_adjtime,
            libc::SYS_adjtimex,
            libc::SYS_lookup_dcookie,
            libc::SYS_nfsservctl,
            libc::SYS_move_pages,
            libc::SYS_migrate_pages,
            libc::SYS_kexec_file_load,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_iopl,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_ioperm,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_modify_ldt,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_uselib,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_ustat,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_sysfs,
            #[cfg(target_arch = "x86_64")]
            libc::SYS__sysctl,
        ],
    ),
];

/// Memory that no rlimit of a process counts: refused where no memory controller holds the leaf.
const UNCOUNTED_MEMORY: &[libc::c_long] = &[libc::SYS_memfd_create, libc::SYS_memfd_secret, libc::SYS_shmget];

const NEW_PROCESSES: &[libc::c_long] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_clone,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_fork,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_vfork,
];

const NAMESPACES: libc::c_int = libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET;

/// Faking input to a terminal, and the console's own like of it.
const TERMINAL_INPUT: [u32; 2] = [0x5412, 0x541c]; // TIOCSTI, TIOCLINUX

type Filter = Vec<sock_filter>;

/// What every program inside runs under.
pub fn program(memory_uncounted: bool, unix_streams: bool) -> Filter {
    let mut filter = prologue();
    let refused = REFUSED.iter().filter(|(guard, _)| guards::on(*guard)).flat_map(|(_, numbers)| *numbers);
    for number in refused {
        filter.extend(on(*number, vec![give(REFUSE)]));
    }
    if memory_uncounted {
        for number in UNCOUNTED_MEMORY {
            filter.extend(on(*number, vec![give(REFUSE)]));
        }
    }
    if guards::on(Guard::Namespaces) {
        filter.extend(on(libc::SYS_clone3, vec![give(ABSENT)]));
        filter.extend(on(libc::SYS_clone, refuse_any_bit(argument(0), NAMESPACES as u32)));
    }
    if guards::on(Guard::Terminal) {
        filter.extend(on(libc::SYS_ioctl, refuse_any_of(argument(1), &TERMINAL_INPUT)));
    }
    if guards::on(Guard::SocketFamilies) {
        filter.extend(on(libc::SYS_socket, sockets(unix_streams)));
        filter.extend(on(libc::SYS_socketpair, socket_pairs()));
    }
    filter.push(give(ALLOW));
    filter
}

/// What the HTTP worker has on top: it executes nothing and makes no process or thread.
pub fn no_new_processes() -> Filter {
    let mut filter = prologue();
    for number in NEW_PROCESSES {
        filter.extend(on(*number, vec![give(REFUSE)]));
    }
    filter.push(give(ALLOW));
    filter
}

/// Puts a filter on this thread and its children, for good.
pub fn install(filter: &[sock_filter]) -> io::Result<()> {
    let length = u16::try_from(filter.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog { len: length, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the kernel reads `len` instructions and keeps a copy of its own.
    let returned = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Leaves the call's number in the accumulator, when the number can be believed.
fn prologue() -> Filter {
    vec![
        load(ARCH_AT),
        jump(BPF_JEQ, NATIVE, 1, 0),
        give(KILL),
        load(NUMBER_AT),
        // x32 numbers have bit 30 set, so this is their refusal too.
        jump(BPF_JGE, LAST_REVIEWED + 1, 0, 1),
        give(ABSENT),
    ]
}

/// TCP and UDP over IPv4 and IPv6, by their own names or the protocol 0 that means them: not MPTCP, SMC, SCTP, UDP-Lite,
/// ICMP, which the same families and types would give.
///
/// With `unix_streams` also stream sockets of the Unix family: the mounts and Landlock's scope say whom they reach.
fn sockets(unix_streams: bool) -> Filter {
    let mut filter = argument(0);
    if unix_streams {
        filter.extend(when(libc::AF_UNIX, |filter| {
            filter.extend(socket_type());
            filter.extend(require(Vec::new(), &[libc::SOCK_STREAM]));
            filter.push(give(ALLOW));
        }));
    }
    filter.extend(require(Vec::new(), &[libc::AF_INET, libc::AF_INET6]));
    filter.extend(socket_type());
    filter.extend(when(libc::SOCK_STREAM, |filter| {
        filter.extend(require(argument(2), &[0, libc::IPPROTO_TCP]));
        filter.push(give(ALLOW));
    }));
    filter.extend(when(libc::SOCK_DGRAM, |filter| {
        filter.extend(require(argument(2), &[0, libc::IPPROTO_UDP]));
        filter.push(give(ALLOW));
    }));
    filter.push(give(REFUSE));
    filter
}

/// Connected pairs. Not datagram ones: such a socket can be connected again, to any name of an abstract socket in the
/// network namespace, while a stream or a sequenced-packet one stays with its peer (unix(7)).
fn socket_pairs() -> Filter {
    let mut filter = require(argument(0), &[libc::AF_UNIX]);
    filter.extend(socket_type());
    filter.extend(require(Vec::new(), &[libc::SOCK_STREAM, libc::SOCK_SEQPACKET]));
    filter.push(give(ALLOW));
    filter
}

/// The type, without the flags that share its argument.
fn socket_type() -> Filter {
    let mut filter = argument(1);
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    filter.push(instruction(BPF_ALU | BPF_AND | BPF_K, 0, 0, !(flags as u32)));
    filter
}

/// `body` for this call; it must end in a verdict. Everything else passes by with the number still loaded.
fn on(number: libc::c_long, body: Filter) -> Filter {
    let number = u32::try_from(number).unwrap_or(u32::MAX);
    let mut filter = vec![jump(BPF_JEQ, number, 0, distance(&body))];
    filter.extend(body);
    filter
}

/// `body` when the accumulator has this value.
fn when(value: libc::c_int, body: impl FnOnce(&mut Filter)) -> Filter {
    let mut inner = Vec::new();
    body(&mut inner);
    let mut filter = vec![jump(BPF_JEQ, value as u32, 0, distance(&inner))];
    filter.extend(inner);
    filter
}

/// Goes on if the loaded value is one of these, else refuses.
fn require(mut load: Filter, values: &[libc::c_int]) -> Filter {
    for (passed, value) in values.iter().enumerate() {
        // Over the comparisons that are left and the refusal.
        let rest = u8::try_from(values.len() - passed).unwrap_or(u8::MAX);
        load.push(jump(BPF_JEQ, *value as u32, rest, 0));
    }
    load.push(give(REFUSE));
    load
}

fn refuse_any_of(mut load: Filter, values: &[u32]) -> Filter {
    for value in values {
        load.push(jump(BPF_JEQ, *value, 0, 1));
        load.push(give(REFUSE));
    }
    load.push(give(ALLOW));
    load
}

fn refuse_any_bit(mut load: Filter, bits: u32) -> Filter {
    load.push(jump(BPF_JSET, bits, 0, 1));
    load.push(give(REFUSE));
    load.push(give(ALLOW));
    load
}

/// The low half of an argument. All that are looked at here are C ints to the kernel, which drops the high half too.
fn argument(index: u32) -> Filter {
    vec![load(ARGUMENTS_AT + 8 * index)]
}

fn load(offset: u32) -> sock_filter {
    instruction(BPF_LD | BPF_W | BPF_ABS, 0, 0, offset)
}

fn give(verdict: u32) -> sock_filter {
    instruction(BPF_RET | BPF_K, 0, 0, verdict)
}

fn jump(comparison: u32, value: u32, if_so: u8, if_not: u8) -> sock_filter {
    instruction(BPF_JMP | comparison | BPF_K, if_so, if_not, value)
}

fn instruction(code: u32, if_so: u8, if_not: u8, value: u32) -> sock_filter {
    sock_filter { code: code as u16, jt: if_so, jf: if_not, k: value }
}

fn distance(body: &[sock_filter]) -> u8 {
    debug_assert!(body.len() <= usize::from(u8::MAX));
    body.len() as u8
}

#[cfg(test)]
mod tests;
