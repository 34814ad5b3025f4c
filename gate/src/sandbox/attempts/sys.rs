//! The system calls of the attempts, with their errors as numbers.
#![allow(unsafe_code)] // raw system calls are what is tried.

use std::mem::{size_of, zeroed};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use super::Saw;

/// The error of the last call.
pub fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// A refusal at this step, or, when the time was over, silence.
pub fn refused(at: &str) -> Saw {
    refused_with(at, errno())
}

pub fn refused_with(at: &str, errno: i32) -> Saw {
    match errno {
        libc::EINPROGRESS | libc::EAGAIN | libc::ETIMEDOUT => Saw::Silent { at: at.to_owned() },
        errno => Saw::Refused { at: at.to_owned(), errno },
    }
}

pub fn reached(how: &str) -> Saw {
    Saw::Reached { how: how.to_owned() }
}

/// An address as the kernel takes it.
pub struct Address {
    storage: libc::sockaddr_storage,
    length: libc::socklen_t,
}

impl Address {
    pub fn of(address: SocketAddr) -> Self {
        // SAFETY: plain data, for which all zeroes is a value.
        let mut storage: libc::sockaddr_storage = unsafe { zeroed() };
        let length = match address {
            SocketAddr::V4(v4) => {
                let inner = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: v4.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) },
                    sin_zero: [0; 8],
                };
                // SAFETY: the storage is larger than, and aligned for, every address.
                unsafe { (&raw mut storage).cast::<libc::sockaddr_in>().write(inner) };
                size_of::<libc::sockaddr_in>()
            }
            SocketAddr::V6(v6) => {
                let inner = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: v6.port().to_be(),
                    sin6_flowinfo: 0,
                    sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                    sin6_scope_id: 0,
                };
                // SAFETY: as above.
                unsafe { (&raw mut storage).cast::<libc::sockaddr_in6>().write(inner) };
                size_of::<libc::sockaddr_in6>()
            }
        };
        Self { storage, length: length as libc::socklen_t }
    }

    /// No address: dissolves an association (connect(2)).
    pub fn unspecified() -> Self {
        // SAFETY: as in `of`; family 0 is AF_UNSPEC.
        let storage: libc::sockaddr_storage = unsafe { zeroed() };
        Self { storage, length: size_of::<libc::sockaddr_in6>() as libc::socklen_t }
    }

    /// A Unix address: a path, or with a NUL in front the abstract name. `None` when it is too long.
    pub fn unix(path: &[u8]) -> Option<Self> {
        // SAFETY: as in `of`.
        let mut inner: libc::sockaddr_un = unsafe { zeroed() };
        if path.len() >= inner.sun_path.len() {
            return None;
        }
        inner.sun_family = libc::AF_UNIX as libc::sa_family_t;
        for (to, from) in inner.sun_path.iter_mut().zip(path) {
            *to = *from as libc::c_char;
        }
        // SAFETY: as in `of`.
        let mut storage: libc::sockaddr_storage = unsafe { zeroed() };
        // SAFETY: as in `of`.
        unsafe { (&raw mut storage).cast::<libc::sockaddr_un>().write(inner) };
        let length = size_of::<libc::sa_family_t>() + path.len() + usize::from(path.first() != Some(&0));
        Some(Self { storage, length: length as libc::socklen_t })
    }
}

pub const fn family(address: SocketAddr) -> i32 {
    if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }
}

/// `::ffff:a.b.c.d`.
pub fn mapped(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(v4) => SocketAddr::new(v4.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    }
}

/// A socket whose calls give up after the patience.
pub fn socket(family: i32, kind: i32, protocol: i32, patience: Duration) -> Result<OwnedFd, Saw> {
    // SAFETY: integers only; a descriptor that comes back is new.
    let socket = unsafe {
        match libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) {
            -1 => return Err(refused("socket")),
            descriptor => OwnedFd::from_raw_fd(descriptor),
        }
    };
    wait_at_most(&socket, patience);
    Ok(socket)
}

pub fn wait_at_most(socket: &OwnedFd, patience: Duration) {
    let time = libc::timeval {
        tv_sec: patience.as_secs() as libc::time_t,
        tv_usec: patience.subsec_micros() as libc::suseconds_t,
    };
    for option in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
        set(socket, libc::SOL_SOCKET, option, &time);
    }
}

/// Sets an option; an attempt that needs it fails by itself without.
pub fn set<T>(socket: &OwnedFd, level: i32, option: i32, value: &T) {
    // SAFETY: the kernel reads as many bytes as the value has.
    unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        );
    }
}

pub fn connect(socket: &OwnedFd, address: &Address) -> Result<(), Saw> {
    // SAFETY: the address is of the length that is given.
    match unsafe { libc::connect(socket.as_raw_fd(), (&raw const address.storage).cast(), address.length) } {
        0 => Ok(()),
        _ => Err(refused("connect")),
    }
}

pub fn bind(socket: &OwnedFd, address: &Address) -> Result<(), Saw> {
    // SAFETY: the address is of the length that is given.
    match unsafe { libc::bind(socket.as_raw_fd(), (&raw const address.storage).cast(), address.length) } {
        0 => Ok(()),
        _ => Err(refused("bind")),
    }
}

/// Sends to an address with these flags, or to the peer.
pub fn send(socket: &OwnedFd, bytes: &[u8], to: Option<&Address>, flags: i32) -> Result<(), Saw> {
    let (address, length) =
        to.map_or((std::ptr::null(), 0), |to| ((&raw const to.storage).cast::<libc::sockaddr>(), to.length));
    // SAFETY: bytes and address are of the lengths that are given.
    let sent = unsafe {
        let flags = flags | libc::MSG_NOSIGNAL;
        libc::sendto(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags, address, length)
    };
    if sent < 0 { Err(refused("send")) } else { Ok(()) }
}

pub fn receive(socket: &OwnedFd) -> Result<Vec<u8>, Saw> {
    let mut bytes = vec![0_u8; 2048];
    // SAFETY: the buffer is of the length that is given.
    let got = unsafe { libc::recv(socket.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    let got = usize::try_from(got).map_err(|_| refused("receive"))?;
    bytes.truncate(got);
    Ok(bytes)
}

/// Reads until the other end is closed; `None` when that takes longer.
pub fn read_within(from: &OwnedFd, patience: Duration) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut chunk = [0_u8; 1024];
    loop {
        let mut ready = libc::pollfd { fd: from.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let milliseconds = i32::try_from(patience.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: one descriptor that is open, and a buffer of the length that is given.
        unsafe {
            if libc::poll(&raw mut ready, 1, milliseconds) <= 0 {
                return None;
            }
            match usize::try_from(libc::read(from.as_raw_fd(), chunk.as_mut_ptr().cast(), chunk.len())) {
                Ok(0) => return Some(bytes),
                Ok(got) => bytes.extend_from_slice(chunk.get(..got).unwrap_or_default()),
                Err(_) => return None,
            }
        }
    }
}

/// Waits for a child; its status.
pub fn wait(pid: libc::pid_t) -> i32 {
    let mut status = 0;
    // SAFETY: the status is written before it is read.
    while unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) } < 0 && errno() == libc::EINTR {}
    status
}

/// The attempt as a result: a step that failed is what was seen.
pub fn tried(attempt: impl FnOnce() -> Result<Saw, Saw>) -> Saw {
    attempt().unwrap_or_else(|saw| saw)
}
