//! The system calls that no crate of ours has.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::time::{ClockId, clock_gettime};

use super::KernelError;

/// CLOCK_BOOTTIME, the clock of `bpf_ktime_get_boot_ns`: it goes on while the machine is suspended, so a deadline does
/// not wait for it to wake.
pub fn boottime_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}

/// That the clock above is the kernel program's own: a time namespace gives its processes another (time_namespaces(7)).
pub fn check_clock() -> Result<(), KernelError> {
    // Not there: the kernel has no time namespaces.
    let Ok(offsets) = std::fs::read_to_string("/proc/self/timens_offsets") else { return Ok(()) };
    let boottime = offsets.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        (words.next()? == "boottime").then_some(())?;
        Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
    });
    match boottime {
        Some((0_i64, 0_u32)) | None => Ok(()),
        Some((seconds, _)) => Err(KernelError::TimeNamespace(seconds)),
    }
}

const BPF_OBJ_GET: libc::c_long = 7;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_DETACH: libc::c_long = 9;
const BPF_PROG_QUERY: libc::c_long = 16;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;

#[repr(C)]
#[derive(Default)]
struct ObjectAttributes {
    path: u64,
    descriptor: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct InfoAttributes {
    descriptor: u32,
    length: u32,
    info: u64,
}

/// The start of `struct bpf_link_info` for a link of a cgroup.
#[repr(C)]
#[derive(Default)]
struct CgroupLinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    padding: u32,
    cgroup: u64,
    attach_type: u32,
    reserved: u32,
}

#[repr(C)]
#[derive(Default)]
struct AttachAttributes {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
    replaced: u32,
}

#[repr(C)]
#[derive(Default)]
struct QueryAttributes {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    programs: u64,
    count: u32,
    padding: u32,
}

/// The start of `struct bpf_prog_info`.
#[repr(C)]
#[derive(Default)]
struct ProgramInfo {
    kind: u32,
    id: u32,
}

/// `BPF_CGROUP_MAX_PROGS` of the kernel: what one attachment point of one cgroup can have.
const MOST_PROGRAMS: usize = 64;

fn number(descriptor: &OwnedFd) -> io::Result<u32> {
    u32::try_from(descriptor.as_raw_fd()).map_err(io::Error::other)
}

/// Attaches `program` beside whatever is there (bpf(2), BPF_PROG_ATTACH with BPF_F_ALLOW_MULTI).
pub fn attach_multi(cgroup: &OwnedFd, program: &OwnedFd, attach_type: u32) -> io::Result<()> {
    const BPF_F_ALLOW_MULTI: u32 = 2;
    let (target, program) = (number(cgroup)?, number(program)?);
    let mut attributes =
        AttachAttributes { target, program, attach_type, flags: BPF_F_ALLOW_MULTI, ..AttachAttributes::default() };
    bpf(BPF_PROG_ATTACH, &mut attributes).map(drop)
}

pub fn detach(cgroup: &OwnedFd, program: &OwnedFd, attach_type: u32) -> io::Result<()> {
    let (target, program) = (number(cgroup)?, number(program)?);
    let mut attributes = AttachAttributes { target, program, attach_type, ..AttachAttributes::default() };
    bpf(BPF_PROG_DETACH, &mut attributes).map(drop)
}

/// The numbers of the programs that are attached to this very cgroup, at this point.
pub fn attached_programs(cgroup: &OwnedFd, attach_type: u32) -> io::Result<Vec<u32>> {
    let mut programs = [0_u32; MOST_PROGRAMS];
    let mut attributes = QueryAttributes {
        target: number(cgroup)?,
        attach_type,
        programs: programs.as_mut_ptr() as u64,
        count: u32::try_from(MOST_PROGRAMS).map_err(io::Error::other)?,
        ..QueryAttributes::default()
    };
    bpf(BPF_PROG_QUERY, &mut attributes)?;
    let count = usize::try_from(attributes.count).map_err(io::Error::other)?;
    Ok(programs.get(..count).unwrap_or_default().to_vec())
}

/// The kernel's number for a loaded program.
pub fn program_id(program: &OwnedFd) -> io::Result<u32> {
    let mut info = ProgramInfo::default();
    let mut attributes = InfoAttributes {
        descriptor: number(program)?,
        length: u32::try_from(size_of::<ProgramInfo>()).map_err(io::Error::other)?,
        info: std::ptr::from_mut(&mut info) as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attributes)?;
    Ok(info.id)
}

fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: the attributes are a `repr(C)` prefix of `union bpf_attr` of the length that is given.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// The cgroup that the link pinned at `path` is attached to; 0 when it was detached, and for what is no link (bpf(2),
/// BPF_OBJ_GET_INFO_BY_FD).
pub fn cgroup_of_link(path: &Path) -> io::Result<u64> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut object = ObjectAttributes { path: path.as_ptr() as u64, ..ObjectAttributes::default() };
    let descriptor = bpf(BPF_OBJ_GET, &mut object)?;
    let descriptor = i32::try_from(descriptor).map_err(io::Error::other)?;
    // SAFETY: the call above made this descriptor, and nothing else owns it.
    let link = unsafe { OwnedFd::from_raw_fd(descriptor) };
    // What the kernel says of a map or a program has the same length and means something else.
    if !std::fs::read_to_string(format!("/proc/self/fdinfo/{descriptor}"))?.contains("link_type:") {
        return Ok(0);
    }
    let mut info = CgroupLinkInfo::default();
    let mut attributes = InfoAttributes {
        descriptor: u32::try_from(link.as_raw_fd()).map_err(io::Error::other)?,
        length: u32::try_from(size_of::<CgroupLinkInfo>()).map_err(io::Error::other)?,
        info: std::ptr::from_mut(&mut info) as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attributes)?;
    Ok(info.cgroup)
}

/// The kernel's name for the network namespace of this process, never used again (socket(7), SO_NETNS_COOKIE).
pub fn own_netns_cookie() -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::LOCALHOST, 0))?;
    let (mut cookie, mut length) = (0_u64, libc::socklen_t::try_from(size_of::<u64>()).map_err(io::Error::other)?);
    // SAFETY: a buffer of the length that is given.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}

/// Waits until `descriptor` is readable or the time is over.
pub fn wait_readable(descriptor: i32, timeout_ms: i32) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd: descriptor, events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd.
    let ready = unsafe { libc::poll(&raw mut poll, 1, timeout_ms) };
    if ready < 0 { Err(io::Error::last_os_error()) } else { Ok(ready > 0) }
}

/// Starts a process in the cgroup of `directory` that tries to make one TCP socket and ends, and waits for it
/// (clone3(2), CLONE_INTO_CGROUP).
pub fn socket_in_cgroup(directory: &OwnedFd) -> io::Result<()> {
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let cgroup = u64::try_from(directory.as_raw_fd()).map_err(io::Error::other)?;
    // No exit signal: this is nobody's SIGCHLD.
    let mut arguments: [u64; 11] = [CLONE_INTO_CGROUP, 0, 0, 0, 0, 0, 0, 0, 0, 0, cgroup];
    // SAFETY: `struct clone_args` is eleven 64-bit words. The child shares no memory with this process, allocates
    // nothing, takes no lock and makes only system calls until it ends.
    unsafe {
        let pid = libc::syscall(libc::SYS_clone3, arguments.as_mut_ptr(), size_of_val(&arguments));
        if pid < 0 {
            return Err(io::Error::last_os_error());
        }
        if pid == 0 {
            libc::syscall(libc::SYS_socket, libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
            libc::syscall(libc::SYS_exit_group, 0);
        }
        let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
        loop {
            if libc::waitpid(pid, std::ptr::null_mut(), libc::__WALL) == pid {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}
