//! Sockets of other kinds, most of which no hook of a cgroup sees.
#![allow(unsafe_code)] // socket addresses of families that the standard library does not know.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;

use super::sys::{self, Address, reached, refused, tried};
use super::{Order, Saw, tcp};

const AF_VSOCK: i32 = 40;
const AF_XDP: i32 = 44;
const IPPROTO_UDPLITE: i32 = 136;
const IPPROTO_SCTP: i32 = 132;

/// An echo request to loopback.
pub fn icmp(order: &Order, _: &str) -> Saw {
    tried(|| {
        let socket = sys::socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP, order.patience())?;
        // Type 8, code 0, checksum over these eight bytes (RFC 792).
        let request = [8, 0, 0xf7, 0xff, 0, 0, 0, 0];
        let to = Address::of(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0));
        sys::send(&socket, &request, Some(&to), 0)?;
        Ok(reached("sent"))
    })
}

/// A UDP datagram with an IP header of one's own.
pub fn header(order: &Order, name: &str) -> Saw {
    tried(|| {
        let target = order.target(name)?;
        let socket = sys::socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_RAW, order.patience())?;
        let datagram = datagram(target.port(), order.token.as_bytes());
        sys::send(&socket, &datagram, Some(&Address::of(target)), 0)?;
        Ok(reached("sent"))
    })
}

/// IPv4 (RFC 791; the kernel fills in length, id and checksum, raw(7)) and UDP without a checksum (RFC 768).
fn datagram(port: u16, payload: &[u8]) -> Vec<u8> {
    let udp_length = u16::try_from(8 + payload.len()).unwrap_or(u16::MAX);
    let loopback = Ipv4Addr::LOCALHOST.octets();
    let mut bytes = vec![0x45, 0];
    bytes.extend_from_slice(&(20 + udp_length).to_be_bytes());
    bytes.extend_from_slice(&[0, 0, 0, 0, 64, 17, 0, 0]);
    bytes.extend_from_slice(&loopback);
    bytes.extend_from_slice(&loopback);
    bytes.extend_from_slice(&port.to_be_bytes());
    bytes.extend_from_slice(&port.to_be_bytes());
    bytes.extend_from_slice(&udp_length.to_be_bytes());
    bytes.extend_from_slice(&[0, 0]);
    bytes.extend_from_slice(payload);
    bytes
}

pub fn udp_lite(order: &Order, name: &str) -> Saw {
    tried(|| {
        let target = order.target(name)?;
        let socket = sys::socket(libc::AF_INET, libc::SOCK_DGRAM, IPPROTO_UDPLITE, order.patience())?;
        sys::send(&socket, order.token.as_bytes(), Some(&Address::of(target)), 0)?;
        Ok(reached("sent"))
    })
}

pub fn sctp(order: &Order, _: &str) -> Saw {
    made(order, libc::AF_INET, libc::SOCK_STREAM, IPPROTO_SCTP)
}

pub fn packet(order: &Order, _: &str) -> Saw {
    made(order, libc::AF_PACKET, libc::SOCK_DGRAM, 0)
}

pub fn netlink(order: &Order, _: &str) -> Saw {
    made(order, libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE)
}

pub fn vsock(order: &Order, _: &str) -> Saw {
    made(order, AF_VSOCK, libc::SOCK_STREAM, 0)
}

pub fn xdp(order: &Order, _: &str) -> Saw {
    made(order, AF_XDP, libc::SOCK_RAW, 0)
}

/// The kernel's ciphers, by a socket (AF_ALG).
pub fn alg(order: &Order, _: &str) -> Saw {
    made(order, libc::AF_ALG, libc::SOCK_SEQPACKET, 0)
}

/// The socket alone is the way out: what it could do is not done.
fn made(order: &Order, family: i32, kind: i32, protocol: i32) -> Saw {
    tried(|| sys::socket(family, kind, protocol, order.patience()).map(|_| reached("the socket was made")))
}

pub fn unix_path(order: &Order, _: &str) -> Saw {
    unix(order, order.unix_path.as_os_str().as_bytes())
}

pub fn unix_abstract(order: &Order, _: &str) -> Saw {
    unix(order, &[b"\0", order.unix_abstract.as_bytes()].concat())
}

fn unix(order: &Order, name: &[u8]) -> Saw {
    tried(|| {
        let address = Address::unix(name).ok_or_else(|| Saw::Hindered { why: "its path is too long".to_owned() })?;
        let socket = sys::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0, order.patience())?;
        sys::connect(&socket, &address)?;
        tcp::tell(order, &socket)
    })
}

/// Whether a descriptor can be listened on; for [`super::inbound`].
pub fn listen(socket: &impl AsRawFd) -> Result<(), Saw> {
    // SAFETY: integers only.
    if unsafe { libc::listen(socket.as_raw_fd(), 4) } < 0 { Err(refused("listen")) } else { Ok(()) }
}
