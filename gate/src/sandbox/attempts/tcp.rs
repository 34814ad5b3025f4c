//! TCP, and what goes by the same families.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use super::sys::{self, Address, reached, tried};
use super::{Order, Saw};

const IPPROTO_MPTCP: i32 = 262;

pub fn plain(order: &Order, name: &str) -> Saw {
    tried(|| connected_to(order, order.target(name)?, libc::IPPROTO_TCP))
}

pub fn mapped(order: &Order, name: &str) -> Saw {
    tried(|| connected_to(order, sys::mapped(order.target(name)?), libc::IPPROTO_TCP))
}

pub fn multipath(order: &Order, name: &str) -> Saw {
    tried(|| connected_to(order, order.target(name)?, IPPROTO_MPTCP))
}

/// Connects to what is permitted, lets go, and connects again elsewhere with the same socket.
pub fn reconnect(order: &Order, name: &str) -> Saw {
    tried(|| {
        let target = order.target(name)?;
        let first = if order.outside { target } else { order.proxy };
        let socket = sys::socket(sys::family(target), libc::SOCK_STREAM, libc::IPPROTO_TCP, order.patience())?;
        // Where the profile is none, this one is refused too; the next is the attempt.
        let _ = sys::connect(&socket, &Address::of(first));
        let _ = sys::connect(&socket, &Address::unspecified());
        sys::connect(&socket, &Address::of(target))?;
        tell(order, &socket)
    })
}

/// Data with the SYN, without a connect (tcp(7), RFC 7413).
pub fn fast_open(order: &Order, name: &str) -> Saw {
    tried(|| {
        let target = order.target(name)?;
        let socket = sys::socket(sys::family(target), libc::SOCK_STREAM, libc::IPPROTO_TCP, order.patience())?;
        sys::send(&socket, order.token.as_bytes(), Some(&Address::of(target)), libc::MSG_FASTOPEN)?;
        heard(&socket)
    })
}

pub fn connected_to(order: &Order, target: SocketAddr, protocol: i32) -> Result<Saw, Saw> {
    let socket = sys::socket(sys::family(target), libc::SOCK_STREAM, protocol, order.patience())?;
    sys::connect(&socket, &Address::of(target))?;
    tell(order, &socket)
}

/// A connection is enough to be out; what the listener hears says whose it was.
pub fn tell(order: &Order, socket: &OwnedFd) -> Result<Saw, Saw> {
    let _ = sys::send(socket, order.token.as_bytes(), None, 0);
    heard(socket)
}

fn heard(socket: &OwnedFd) -> Result<Saw, Saw> {
    Ok(match sys::receive(socket) {
        Ok(answer) if !answer.is_empty() => reached("connected and answered"),
        _ => reached("connected"),
    })
}
