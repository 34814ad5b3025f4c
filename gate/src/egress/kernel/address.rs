//! Addresses as the kernel program has them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use latchgate_egress_types as types;

pub const AF_INET: u32 = libc::AF_INET.unsigned_abs();
pub const AF_INET6: u32 = libc::AF_INET6.unsigned_abs();

/// Words in network byte order.
pub fn words(ip: Ipv6Addr) -> [u32; 4] {
    let octets = ip.octets();
    let (chunks, _) = octets.as_chunks::<4>();
    let mut words = [0; 4];
    for (to, from) in words.iter_mut().zip(chunks) {
        *to = u32::from_ne_bytes(*from);
    }
    words
}

pub fn word(ip: Ipv4Addr) -> u32 {
    u32::from_ne_bytes(ip.octets())
}

fn ip_of(words: [u32; 4]) -> Ipv6Addr {
    let mut octets = [0; 16];
    for (to, from) in octets.chunks_exact_mut(4).zip(words) {
        to.copy_from_slice(&from.to_ne_bytes());
    }
    Ipv6Addr::from(octets)
}

/// Family and words; an IPv4-mapped address is the IPv4 one that it is.
pub fn family_and_words(ip: IpAddr) -> (u32, [u32; 4]) {
    match ip.to_canonical() {
        IpAddr::V4(v4) => (AF_INET, [word(v4), 0, 0, 0]),
        IpAddr::V6(v6) => (AF_INET6, words(v6)),
    }
}

/// With an IPv4 address as `::ffff:a.b.c.d`.
pub fn mapped_words(ip: IpAddr) -> [u32; 4] {
    match ip {
        IpAddr::V4(v4) => words(v4.to_ipv6_mapped()),
        IpAddr::V6(v6) => words(v6),
    }
}

/// What [`mapped_words`] made.
pub fn of_mapped(words: [u32; 4]) -> IpAddr {
    IpAddr::V6(ip_of(words)).to_canonical()
}

/// `None` when nothing was kept.
pub fn destination(from: &types::Destination) -> Option<SocketAddr> {
    let port = u16::from_be(u16::try_from(from.port).ok()?);
    let [first, ..] = from.address;
    match from.family {
        AF_INET => Some((Ipv4Addr::from(first.to_ne_bytes()), port).into()),
        AF_INET6 => Some((ip_of(from.address), port).into()),
        _ => None,
    }
}
