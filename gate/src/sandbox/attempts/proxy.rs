//! The one way that is open, asked for more than it should give.

use std::net::SocketAddr;

use super::sys::{self, Address, reached, tried};
use super::{Answerer, Order, Saw, tcp};

/// A tunnel to the profile's name at another port.
pub fn other_port(order: &Order, name: &str) -> Saw {
    let host = order.name.clone().unwrap_or_default();
    tried(|| tunnel(order, order.target(name)?, &host))
}

/// A tunnel to an address that no entry names.
pub fn address(order: &Order, name: &str) -> Saw {
    tried(|| {
        let target = order.target(name)?;
        tunnel(order, target, &target.ip().to_string())
    })
}

fn tunnel(order: &Order, target: SocketAddr, host: &str) -> Result<Saw, Saw> {
    if order.outside {
        return tcp::connected_to(order, target, libc::IPPROTO_TCP);
    }
    let socket = sys::socket(sys::family(order.proxy), libc::SOCK_STREAM, libc::IPPROTO_TCP, order.patience())?;
    sys::connect(&socket, &Address::of(order.proxy)).map_err(|saw| hindered(&saw))?;
    let authority = format!("{host}:{}", target.port());
    let request = format!("CONNECT {authority} HTTP/1.1\r\nhost: {authority}\r\n\r\n");
    sys::send(&socket, request.as_bytes(), None, 0).map_err(|saw| hindered(&saw))?;
    let answer = sys::receive(&socket).map_err(|saw| hindered(&saw))?;
    let answer = String::from_utf8_lossy(&answer);
    match answer.split(' ').nth(1) {
        Some("403") => Ok(Saw::Answered { by: Answerer::Proxy, what: "403".to_owned() }),
        Some(status) if status.starts_with('2') => Ok(reached("the proxy made a tunnel")),
        _ => Err(Saw::Hindered { why: "the proxy's answer is neither a refusal nor a tunnel".to_owned() }),
    }
}

/// A leaf with a profile reaches the proxy, or the attempt was not made.
fn hindered(saw: &Saw) -> Saw {
    Saw::Hindered { why: format!("the proxy could not be asked: {saw:?}") }
}
