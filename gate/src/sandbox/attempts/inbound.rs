//! Being called instead of calling: a listener whose answers would carry data out.
#![allow(unsafe_code)] // accept with a time limit.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use super::sys::{self, Address, reached, refused, tried};
use super::{Order, Saw, families};

/// Listens where the gate connects to, and answers with the token.
pub fn answer(order: &Order, _: &str) -> Saw {
    tried(|| {
        let patience = if order.outside { order.patience() } else { Duration::from_millis(order.inbound_ms) };
        let socket = sys::socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_TCP, patience)?;
        sys::set(&socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, &1_i32);
        sys::bind(&socket, &Address::of(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), order.inbound_port)))?;
        families::listen(&socket)?;
        // SAFETY: no address is asked for; a descriptor that comes back is new.
        let accepted = unsafe {
            match libc::accept4(socket.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC) {
                -1 => return Err(refused("accept")),
                descriptor => OwnedFd::from_raw_fd(descriptor),
            }
        };
        sys::wait_at_most(&accepted, patience);
        sys::send(&accepted, order.token.as_bytes(), None, 0)?;
        // The caller closes when it has the answer.
        let _ = sys::receive(&accepted);
        Ok(reached("was called and answered"))
    })
}
