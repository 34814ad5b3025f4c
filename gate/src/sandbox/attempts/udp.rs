//! Datagrams: to an address, over a socket that is connected elsewhere, and over one that was connected twice.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use super::sys::{self, Address, reached, tried};
use super::{Order, Saw};

pub fn sendto(order: &Order, name: &str) -> Saw {
    tried(|| unconnected(order, order.target(name)?))
}

pub fn sendto_mapped(order: &Order, name: &str) -> Saw {
    tried(|| unconnected(order, sys::mapped(order.target(name)?)))
}

pub fn connected(order: &Order, name: &str) -> Saw {
    tried(|| connected_elsewhere(order, order.target(name)?))
}

pub fn connected_mapped(order: &Order, name: &str) -> Saw {
    tried(|| connected_elsewhere(order, sys::mapped(order.target(name)?)))
}

pub fn rebound(order: &Order, name: &str) -> Saw {
    tried(|| connected_twice(order, order.target(name)?))
}

pub fn rebound_mapped(order: &Order, name: &str) -> Saw {
    tried(|| connected_twice(order, sys::mapped(order.target(name)?)))
}

fn unconnected(order: &Order, target: SocketAddr) -> Result<Saw, Saw> {
    let socket = socket(order, target)?;
    sys::send(&socket, order.token.as_bytes(), Some(&Address::of(target)), 0)?;
    answered(&socket)
}

/// Connected to a peer that may be asked, and sent to another.
fn connected_elsewhere(order: &Order, target: SocketAddr) -> Result<Saw, Saw> {
    let socket = socket(order, target)?;
    let _ = sys::connect(&socket, &Address::of(permitted(order, target)));
    sys::send(&socket, order.token.as_bytes(), Some(&Address::of(target)), 0)?;
    // An answer from elsewhere than the peer is not heard by a connected socket.
    sys::connect(&socket, &Address::unspecified())?;
    Ok(reached("sent"))
}

fn connected_twice(order: &Order, target: SocketAddr) -> Result<Saw, Saw> {
    let socket = socket(order, target)?;
    let _ = sys::connect(&socket, &Address::of(permitted(order, target)));
    let _ = sys::connect(&socket, &Address::unspecified());
    sys::connect(&socket, &Address::of(target))?;
    sys::send(&socket, order.token.as_bytes(), None, 0)?;
    answered(&socket)
}

fn socket(order: &Order, target: SocketAddr) -> Result<OwnedFd, Saw> {
    sys::socket(sys::family(target), libc::SOCK_DGRAM, libc::IPPROTO_UDP, order.patience())
}

/// The DNS port of loopback: where a leaf that has names may send.
fn permitted(order: &Order, target: SocketAddr) -> SocketAddr {
    if order.outside {
        return target;
    }
    let ip: IpAddr = match target.ip() {
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => Ipv4Addr::LOCALHOST.to_ipv6_mapped().into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    SocketAddr::new(ip, 53)
}

fn answered(socket: &OwnedFd) -> Result<Saw, Saw> {
    sys::receive(socket).map(|_| reached("sent and answered"))
}
