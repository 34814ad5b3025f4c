//! The gate's sockets in an execution's own network namespace.
//!
//! A fresh namespace has a loopback interface that is down, and nothing else. What answers there must not belong to the
//! sandbox: a socket has the cgroup of the task that made it, and the kernel program drops what a leaf's socket sends,
//! so that listeners of the sandbox's own first process could not even answer a SYN. Therefore a child of the gate, in
//! the gate's cgroup, joins the sandbox's user and network namespaces, brings lo up, makes the sockets, sends them back
//! and is gone. The gate made the user namespace and so has every capability in it (user_namespaces(7)); of the host's
//! it needs none. All this happens while the sandbox's first process still waits for its uid.
#![allow(unsafe_code)] // the child of a threaded process, setns(2), and an ioctl and a socket option that rustix lacks.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socket_with, socketpair, sockopt,
};

use super::protocol::Stage;
use super::spawner::{self, Child};
use super::{Network, SandboxError};

/// Ports of UDP that one namespace can have.
pub const MAX_UDP_SLOTS: u16 = 32;
/// One of TCP and each of UDP, on 127.0.0.1 and on ::1.
const MAX_SOCKETS: usize = 2 * (1 + MAX_UDP_SLOTS as usize);
/// Connections that wait to be accepted. More than an execution may have open; the kernel bounds it too (`somaxconn`).
const BACKLOG: i32 = 1024;

/// The gate's sockets in the namespace of one execution: who reaches them *is* that execution. All are non-blocking. The
/// namespace lives as long as one of them does, or a connection that was accepted there.
#[derive(Debug)]
pub struct NamespaceListeners {
    /// 127.0.0.1 first, then ::1 where the kernel has IPv6.
    pub tcp: Vec<TcpListener>,
    /// The slots on 127.0.0.1 in the order of their ports, then those on ::1.
    pub udp: Vec<UdpSocket>,
    /// `SO_NETNS_COOKIE`, as the kernel program has it in its keys.
    pub netns_cookie: u64,
}

/// Ports that can be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    tcp: u16,
    udp_base: u16,
    udp_slots: u16,
}

impl Ports {
    /// `None`: no namespace of its own.
    pub fn of(network: Network) -> Result<Option<Self>, SandboxError> {
        let Network::Isolated { tcp_port: tcp, udp_base, udp_slots } = network else {
            return Ok(None);
        };
        let (udp_base, udp_slots) = udp_base.map_or((1, 0), |base| (base, udp_slots));
        // Port 0 would be any port, and not the one that the kernel program rewrites to.
        if tcp == 0 || udp_base == 0 || udp_slots > MAX_UDP_SLOTS || udp_base.checked_add(udp_slots).is_none() {
            return Err(SandboxError::Config(format!(
                "TCP {tcp} and UDP {udp_base}+{udp_slots} cannot be listened on"
            )));
        }
        Ok(Some(Self { tcp, udp_base, udp_slots }))
    }
}

/// What the helper was at when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Step {
    Join = 1,
    Loopback = 2,
    Tcp = 3,
    Udp = 4,
    Send = 5,
}

impl Step {
    const ALL: [Self; 5] = [Self::Join, Self::Loopback, Self::Tcp, Self::Udp, Self::Send];

    const fn text(self) -> &'static str {
        match self {
            Self::Join => "joining the namespaces (is the gate dumpable?)",
            Self::Loopback => "bringing lo up",
            Self::Tcp => "listening",
            Self::Udp => "datagram sockets",
            Self::Send => "sending the sockets",
        }
    }
}

/// Step or 0, TCP sockets, UDP sockets, 0, errno.
const MESSAGE_BYTES: usize = 8;

fn message(outcome: Result<(u8, u8), (Step, Errno)>) -> [u8; MESSAGE_BYTES] {
    let (step, tcp, udp, errno) = match outcome {
        Ok((tcp, udp)) => (0, tcp, udp, 0),
        Err((step, errno)) => (step as u8, 0, 0, errno.raw_os_error()),
    };
    let [a, b, c, d] = errno.to_le_bytes();
    [step, tcp, udp, 0, a, b, c, d]
}

fn failed(detail: &str, source: impl Into<io::Error>) -> SandboxError {
    SandboxError::Setup { stage: Stage::Network, detail: detail.to_owned(), source: source.into() }
}

/// Makes the gate's sockets in the network namespace of a child that waits for its uid.
pub fn listen(child: &Child, ports: Ports) -> Result<NamespaceListeners, SandboxError> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(|e| failed("channel", e))?;
    let in_child = || {
        // SAFETY: this is the fresh child, and both descriptors are open in its copy of the table.
        unsafe { help(child.pidfd.as_fd(), theirs.as_fd(), ports) }
    };
    // SAFETY: `help` makes system calls only, allocates nothing and never returns.
    let (_, pidfd) = unsafe { spawner::clone_with(0, None, in_child) }.map_err(|e| failed("clone3", e))?;
    let helper = Child { pidfd, listeners: None };
    drop(theirs);
    let received = receive(&ours);
    helper.kill();
    spawner::collect(&helper);
    received
}

fn receive(channel: &OwnedFd) -> Result<NamespaceListeners, SandboxError> {
    let mut message = [0; MESSAGE_BYTES];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_SOCKETS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = loop {
        match recvmsg(channel, &mut [IoSliceMut::new(&mut message)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            other => break other.map_err(|e| failed("channel", e))?,
        }
    };
    let mut sockets: Vec<OwnedFd> = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            sockets.extend(rights);
        }
    }
    let [step, tcp, udp, _, a, b, c, d] = message;
    if got.bytes == MESSAGE_BYTES
        && let Some(step) = Step::ALL.into_iter().find(|known| *known as u8 == step)
    {
        return Err(failed(step.text(), io::Error::from_raw_os_error(i32::from_le_bytes([a, b, c, d]))));
    }
    if got.bytes != MESSAGE_BYTES || tcp == 0 || sockets.len() != usize::from(tcp) + usize::from(udp) {
        return Err(failed("the helper ended early", io::ErrorKind::UnexpectedEof));
    }
    let udp = sockets.split_off(usize::from(tcp)).into_iter().map(UdpSocket::from).collect();
    let tcp: Vec<TcpListener> = sockets.into_iter().map(TcpListener::from).collect();
    let first = tcp.first().ok_or_else(|| failed("listening", io::ErrorKind::UnexpectedEof))?;
    let netns_cookie = cookie(first.as_fd()).map_err(|e| failed("SO_NETNS_COOKIE", e))?;
    Ok(NamespaceListeners { tcp, udp, netns_cookie })
}

/// The network namespace's number, never used again while the machine runs (Linux 5.14).
fn cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, which is the value's size.
    let returned = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            ptr::from_mut(&mut cookie).cast(),
            &raw mut length,
        )
    };
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}

/// The helper's whole life. rustix's calls on Linux are bare system calls with their arguments on the stack.
///
/// # Safety
/// In the fresh child of [`listen`], once.
unsafe fn help(sandbox: BorrowedFd<'_>, channel: BorrowedFd<'_>, ports: Ports) -> ! {
    let (low, high) = (sandbox.as_raw_fd().min(channel.as_raw_fd()), sandbox.as_raw_fd().max(channel.as_raw_fd()));
    // SAFETY: system calls with integers; nothing in this process uses any other descriptor again. A copy of another
    // child's control pipe, held here, would hide the gate's death from that child.
    unsafe {
        libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
        for (first, last) in [(0, low - 1), (low + 1, high - 1), (high + 1, i32::MAX)] {
            if first <= last {
                libc::syscall(libc::SYS_close_range, first, last, 0);
            }
        }
    }
    let mut sockets = [const { None }; MAX_SOCKETS];
    let made = join(sandbox).and_then(|()| loopback_up()).and_then(|()| open_all(ports, &mut sockets));
    let sent = match made {
        Ok(_) => send(channel, &message(made), &sockets),
        Err(_) => send(channel, &message(made), &[]),
    };
    if let Err(errno) = sent {
        let _ = send(channel, &message(Err((Step::Send, errno))), &[]);
    }
    // SAFETY: an integer only. Nothing of the gate's state, of which this is a copy, is to be dropped.
    unsafe {
        libc::syscall(libc::SYS_exit_group, 0);
        libc::_exit(0)
    }
}

/// Both at once by the pidfd (setns(2), Linux 5.8). The kernel wants to know that this process may look into that one
/// (`PTRACE_MODE_READ`): same uid, and a memory that was not made undumpable.
fn join(sandbox: BorrowedFd<'_>) -> Result<(), (Step, Errno)> {
    // SAFETY: integers only; this process has one thread.
    let returned =
        unsafe { libc::syscall(libc::SYS_setns, sandbox.as_raw_fd(), libc::CLONE_NEWUSER | libc::CLONE_NEWNET) };
    if returned < 0 { Err((Step::Join, last_errno())) } else { Ok(()) }
}

/// `SIOCSIFFLAGS` (netdevice(7)). The kernel gives lo its addresses, 127.0.0.1/8 and ::1, with that.
fn loopback_up() -> Result<(), (Step, Errno)> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        .map_err(|errno| (Step::Loopback, errno))?;
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: libc::IFF_UP as libc::c_short },
    };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    // SAFETY: the request is the kernel's structure and is on the stack.
    let returned =
        unsafe { libc::syscall(libc::SYS_ioctl, socket.as_raw_fd(), libc::SIOCSIFFLAGS, ptr::from_mut(&mut request)) };
    if returned < 0 { Err((Step::Loopback, last_errno())) } else { Ok(()) }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Fills `sockets` from the front, TCP before UDP, and says how many there are of each.
fn open_all(ports: Ports, sockets: &mut [Option<OwnedFd>; MAX_SOCKETS]) -> Result<(u8, u8), (Step, Errno)> {
    let mut free = sockets.iter_mut();
    let mut open = |step: Step, address: SocketAddr| match open(step, address) {
        Ok(socket) => {
            let place = free.next().ok_or((step, Errno::MFILE))?;
            *place = Some(socket);
            Ok(1)
        }
        // A kernel without IPv6, or with none on lo: nobody inside can ask for it either.
        Err(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) if address.is_ipv6() => Ok(0),
        Err(errno) => Err((step, errno)),
    };
    let (mut tcp, mut udp) = (0, 0);
    for address in [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()] {
        tcp += open(Step::Tcp, SocketAddr::new(address, ports.tcp))?;
    }
    for address in [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()] {
        for slot in 0..ports.udp_slots {
            udp += open(Step::Udp, SocketAddr::new(address, ports.udp_base + slot))?;
        }
    }
    Ok((tcp, udp))
}

/// Without SO_REUSEADDR: with it, another socket could be bound to the same port and be asked in this one's place.
fn open(step: Step, address: SocketAddr) -> Result<OwnedFd, Errno> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let kind = if step == Step::Tcp { SocketType::STREAM } else { SocketType::DGRAM };
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    rustix::net::bind(&socket, &address)?;
    if step == Step::Tcp {
        rustix::net::listen(&socket, BACKLOG)?;
    }
    Ok(socket)
}

fn send(channel: BorrowedFd<'_>, message: &[u8], sockets: &[Option<OwnedFd>]) -> Result<(), Errno> {
    let mut borrowed = [channel; MAX_SOCKETS];
    let mut count = 0;
    for (to, socket) in borrowed.iter_mut().zip(sockets.iter().flatten()) {
        *to = socket.as_fd();
        count += 1;
    }
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_SOCKETS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let rights = borrowed.get(..count).unwrap_or_default();
    if !rights.is_empty() && !control.push(SendAncillaryMessage::ScmRights(rights)) {
        return Err(Errno::NOBUFS);
    }
    sendmsg(channel, &[IoSlice::new(message)], &mut control, SendFlags::NOSIGNAL).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_that_would_be_others_are_refused() {
        let of = |tcp_port, udp_base, udp_slots| Ports::of(Network::Isolated { tcp_port, udp_base, udp_slots });
        assert_eq!(Ports::of(Network::Shared).unwrap(), None);
        for (tcp, base, slots) in [
            (0, None, 0),
            (1, Some(0), 8),
            (1, Some(u16::MAX), 8),
            (1, Some(u16::MAX), 1),
            (1, Some(1), MAX_UDP_SLOTS + 1),
        ] {
            assert!(matches!(of(tcp, base, slots), Err(SandboxError::Config(_))), "{tcp} {base:?}+{slots}");
        }
        assert_eq!(of(8, Some(9), 4).unwrap(), Some(Ports { tcp: 8, udp_base: 9, udp_slots: 4 }));
        // No base: no datagram sockets, whatever the number says.
        assert_eq!(of(8, None, 4).unwrap().map(|ports| ports.udp_slots), Some(0));
    }

    #[test]
    fn a_helper_s_failure_has_its_name_and_its_silence_is_one() {
        let pair = || socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        for step in Step::ALL {
            let (ours, theirs) = pair();
            send(theirs.as_fd(), &message(Err((step, Errno::PERM))), &[]).unwrap();
            match receive(&ours) {
                Err(SandboxError::Setup { stage: Stage::Network, detail, source }) => {
                    assert_eq!((detail.as_str(), source.raw_os_error()), (step.text(), Some(libc::EPERM)));
                }
                other => panic!("{other:?}"),
            }
        }
        let (ours, theirs) = pair();
        drop(theirs);
        assert!(receive(&ours).is_err());
        // Fewer descriptors than were announced.
        let (ours, theirs) = pair();
        send(theirs.as_fd(), &message(Ok((2, 0))), &[Some(theirs.try_clone().unwrap())]).unwrap();
        assert!(receive(&ours).is_err());
    }
}
