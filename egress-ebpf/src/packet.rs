//! Where a connect goes, and what a packet says about its peer.

use core::mem::MaybeUninit;

use aya_ebpf::helpers::generated::bpf_skb_load_bytes;
use aya_ebpf::programs::{SkBuffContext, SockAddrContext};

use crate::{AF_INET, AF_INET6, Control, Hook, IPPROTO_TCP, IPPROTO_UDP, MAPPED_WORD, word};

/// An address and port in network byte order. An IPv4-mapped IPv6 address is held as the IPv4 address that it is.
#[derive(Clone, Copy)]
pub struct Endpoint {
    /// AF_INET, AF_INET6 or 0.
    pub family: u32,
    pub address: [u32; 4],
    pub port: u32,
}

impl Endpoint {
    pub const NONE: Self = Self { family: 0, address: [0; 4], port: 0 };

    #[inline(always)]
    pub const fn v4(address: u32, port: u32) -> Self {
        Self { family: AF_INET, address: [address, 0, 0, 0], port }
    }

    #[inline(always)]
    pub const fn v6(a: u32, b: u32, c: u32, d: u32, port: u32) -> Self {
        if a == 0 && b == 0 && c == MAPPED_WORD {
            return Self::v4(d, port);
        }
        Self { family: AF_INET6, address: [a, b, c, d], port }
    }

    #[inline(always)]
    pub fn is_proxy(&self, control: &Control) -> bool {
        if self.port == 0 {
            return false;
        }
        if self.family == AF_INET {
            return self.address[0] == control.proxy_ip4 && self.port == control.proxy_port4;
        }
        self.family == AF_INET6
            && self.address[0] == control.proxy_ip6[0]
            && self.address[1] == control.proxy_ip6[1]
            && self.address[2] == control.proxy_ip6[2]
            && self.address[3] == control.proxy_ip6[3]
            && self.port == control.proxy_port6
    }
}

#[inline(always)]
pub fn destination4(ctx: &SockAddrContext) -> Endpoint {
    Endpoint::v4(word!(ctx.sock_addr, user_ip4), word!(ctx.sock_addr, user_port))
}

#[inline(always)]
pub fn destination6(ctx: &SockAddrContext) -> Endpoint {
    let a = word!(ctx.sock_addr, user_ip6[0]);
    let b = word!(ctx.sock_addr, user_ip6[1]);
    let c = word!(ctx.sock_addr, user_ip6[2]);
    let d = word!(ctx.sock_addr, user_ip6[3]);
    Endpoint::v6(a, b, c, d, word!(ctx.sock_addr, user_port))
}

/// What the gate needs of a packet's headers.
pub struct Header {
    pub readable: bool,
    pub family: u32,
    pub protocol: u32,
    /// The destination of a packet that leaves, the source of one that arrives.
    pub peer: Endpoint,
}

#[inline(always)]
fn load<const N: usize>(ctx: &SkBuffContext, offset: u32) -> Option<[u8; N]> {
    let mut bytes = MaybeUninit::<[u8; N]>::uninit();
    // SAFETY: the helper writes all N bytes or fails.
    unsafe {
        if bpf_skb_load_bytes(ctx.skb.skb.cast(), offset, bytes.as_mut_ptr().cast(), N as u32) != 0 {
            return None;
        }
        Some(bytes.assume_init())
    }
}

#[inline(always)]
fn ne(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Reads the headers that will be on the wire, not the socket's idea of them: an IP option or a header of the sender's
/// own making can name another destination.
#[inline(always)]
pub fn parse(ctx: &SkBuffContext, hook: Hook) -> Header {
    const UNREADABLE: Header = Header { readable: false, family: 0, protocol: 0, peer: Endpoint::NONE };
    let out = matches!(hook, Hook::Egress);
    let Some([first]) = load::<1>(ctx, 0) else { return UNREADABLE };
    match first >> 4 {
        4 => {
            let Some(ip) = load::<20>(ctx, 0) else { return UNREADABLE };
            let protocol = u32::from(ip[9]);
            let address = if out { ne(&ip, 16) } else { ne(&ip, 12) };
            let fragment_offset = u16::from_be_bytes([ip[6], ip[7]]) & 0x1fff;
            let length = u32::from(first & 15) * 4;
            let port = ports(ctx, protocol, length, out);
            // The rest of a fragmented datagram has no ports to check.
            let readable = fragment_offset == 0 && length >= 20 && port.is_some();
            Header { readable, family: AF_INET, protocol, peer: Endpoint::v4(address, port.unwrap_or(0)) }
        }
        6 => {
            let Some(ip) = load::<40>(ctx, 0) else { return UNREADABLE };
            let (a, b, c, d) = if out {
                (ne(&ip, 24), ne(&ip, 28), ne(&ip, 32), ne(&ip, 36))
            } else {
                (ne(&ip, 8), ne(&ip, 12), ne(&ip, 16), ne(&ip, 20))
            };
            // BIG TCP puts one hop-by-hop header with the jumbo option before the TCP header (RFC 2675).
            let (protocol, offset) = match (ip[6], load::<8>(ctx, 40)) {
                (0, Some(options)) if options[1] == 0 && options[2] == 0xc2 => (u32::from(options[0]), 48),
                (next, _) => (u32::from(next), 40),
            };
            let port = ports(ctx, protocol, offset, out);
            Header {
                readable: port.is_some(),
                family: AF_INET6,
                protocol,
                peer: Endpoint::v6(a, b, c, d, port.unwrap_or(0)),
            }
        }
        _ => UNREADABLE,
    }
}

/// The peer's port in network byte order; 0 for a protocol that has none.
#[inline(always)]
fn ports(ctx: &SkBuffContext, protocol: u32, offset: u32, out: bool) -> Option<u32> {
    if protocol != IPPROTO_TCP && protocol != IPPROTO_UDP {
        return Some(0);
    }
    let bytes = load::<4>(ctx, offset)?;
    let port = if out { [bytes[2], bytes[3]] } else { [bytes[0], bytes[1]] };
    Some(u32::from(u16::from_ne_bytes(port)))
}
