//! DNS as a way out, and the address of a permitted name at a port that is not.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;

use super::sys::{self, Address, reached, tried};
use super::{Answerer, Order, Saw, tcp};

const REFUSED: u8 = 5;
const QUERY_ID: u16 = 0x1a7c;

/// Asks for a name that is in no profile.
pub fn udp(order: &Order, _: &str) -> Saw {
    tried(|| judged(&over_udp(order, &order.other_name)?))
}

pub fn tcp(order: &Order, _: &str) -> Saw {
    tried(|| {
        let [_, server] = order.dns;
        let socket = sys::socket(sys::family(server), libc::SOCK_STREAM, libc::IPPROTO_TCP, order.patience())?;
        sys::connect(&socket, &Address::of(server))?;
        let query = query(&order.other_name);
        // RFC 1035 §4.2.2: two bytes of length before each message.
        let length = u16::try_from(query.len()).unwrap_or(0).to_be_bytes();
        sys::send(&socket, &[&length[..], &query].concat(), None, 0)?;
        let answer = framed(&socket)?;
        judged(&answer)
    })
}

/// Whatever pieces the stream comes in.
fn framed(socket: &OwnedFd) -> Result<Vec<u8>, Saw> {
    let mut bytes = Vec::new();
    loop {
        if let Some((length, message)) = bytes.split_first_chunk::<2>()
            && message.len() >= usize::from(u16::from_be_bytes(*length))
        {
            return Ok(message.to_vec());
        }
        let piece = sys::receive(socket)?;
        if piece.is_empty() {
            return Err(Saw::Refused { at: "receive".to_owned(), errno: libc::ECONNRESET });
        }
        bytes.extend(piece);
    }
}

/// The stand-in of the profile's name, at a port that the entry does not have. Outside, the listener itself.
pub fn other_port(order: &Order, name: &str) -> Saw {
    tried(|| {
        let target = order.target(name)?;
        let at = match &order.name {
            Some(asked) if !order.outside => SocketAddr::new(stand_in(order, asked)?.into(), target.port()),
            _ => target,
        };
        tcp::connected_to(order, at, libc::IPPROTO_TCP)
    })
}

/// The address that the resolver gives for a name of the profile.
fn stand_in(order: &Order, name: &str) -> Result<Ipv4Addr, Saw> {
    let hindered = |why: &str| Saw::Hindered { why: format!("the profile's own name: {why}") };
    let answer = over_udp(order, name).map_err(|saw| hindered(&format!("{saw:?}")))?;
    // One answer of type A: its data is the last four bytes before the OPT record, of which there is none here.
    let (count, address) = (answer.get(6..8), answer.last_chunk::<4>());
    match (code(&answer), count, address) {
        (Some(0), Some([0, 1]), Some(octets)) => Ok(Ipv4Addr::from(*octets)),
        _ => Err(hindered("it has no address")),
    }
}

fn over_udp(order: &Order, name: &str) -> Result<Vec<u8>, Saw> {
    let [server, _] = order.dns;
    let socket = sys::socket(sys::family(server), libc::SOCK_DGRAM, libc::IPPROTO_UDP, order.patience())?;
    sys::send(&socket, &query(name), Some(&Address::of(server)), 0)?;
    sys::receive(&socket)
}

fn judged(answer: &[u8]) -> Result<Saw, Saw> {
    match code(answer) {
        Some(REFUSED) => Ok(Saw::Answered { by: Answerer::Resolver, what: "REFUSED".to_owned() }),
        Some(0) => Ok(reached("the query was answered")),
        Some(code) => Err(Saw::Hindered { why: format!("the answer has code {code}") }),
        None => Err(Saw::Hindered { why: "what came is no answer".to_owned() }),
    }
}

/// The response code of an answer to our query (RFC 1035 §4.1.1).
fn code(answer: &[u8]) -> Option<u8> {
    let [high, low, flags, code, ..] = answer else { return None };
    (u16::from_be_bytes([*high, *low]) == QUERY_ID && flags & 0x80 != 0).then_some(code & 0x0f)
}

/// One question of type A, class IN.
fn query(name: &str) -> Vec<u8> {
    let mut message = QUERY_ID.to_be_bytes().to_vec();
    message.extend_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.') {
        message.push(u8::try_from(label.len()).unwrap_or(0));
        message.extend_from_slice(label.as_bytes());
    }
    message.extend_from_slice(&[0, 0, 1, 0, 1]);
    message
}
