//! Where a connect goes, and what a packet says about its peer.

use core::mem::MaybeUninit;
use core::ptr::write_volatile;

use aya_ebpf::helpers::generated::bpf_skb_load_bytes;
use aya_ebpf::programs::{SkBuffContext, SockAddrContext};

use egress_ebpf::{DNS_PORT, Destination};

use crate::{AF_INET, AF_INET6, Control, Hook, IPPROTO_TCP, IPPROTO_UDP, MAPPED_WORD, word};

const FAMILY_PROBE_PORT: u16 = 65_535;

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
    pub const fn host_port(&self) -> u16 {
        u16::from_be(self.port as u16)
    }

    #[inline(always)]
    pub const fn is_dns(&self) -> bool {
        self.host_port() == DNS_PORT
    }

    /// Loopback at the port by which musl's `AI_ADDRCONFIG` asks whether the machine has the family at all.
    #[inline(always)]
    pub const fn is_family_probe(&self) -> bool {
        let [a, b, c, d] = self.address;
        let loopback = match self.family {
            AF_INET => a == u32::from_ne_bytes([127, 0, 0, 1]),
            _ => a == 0 && b == 0 && c == 0 && d == 1_u32.to_be(),
        };
        loopback && self.host_port() == FAMILY_PROBE_PORT
    }

    /// As the kernel keeps it on a socket.
    #[inline(always)]
    pub const fn as_destination(&self) -> Destination {
        Destination { address: self.address, family: self.family, port: self.port }
    }

    /// With an IPv4 address as `::ffff:a.b.c.d`.
    #[inline(always)]
    pub const fn mapped(&self) -> [u32; 4] {
        if self.family == AF_INET { [0, 0, MAPPED_WORD, self.address[0]] } else { self.address }
    }

    /// The proxy, for a connection that was meant for an address of this one's family.
    #[inline(always)]
    pub const fn proxy(&self, control: &Control) -> Option<Self> {
        let proxy = if self.family == AF_INET {
            Self::v4(control.proxy_ip4, control.proxy_port4)
        } else {
            Self { family: AF_INET6, address: control.proxy_ip6, port: control.proxy_port6 }
        };
        if proxy.port == 0 { None } else { Some(proxy) }
    }

    /// The resolver's port of a slot, for a query that was meant for an address of this one's family.
    #[inline(always)]
    pub const fn resolver(&self, control: &Control, slot: u32) -> Option<Self> {
        let (mut to, base) = if self.family == AF_INET {
            (Self::v4(control.resolver_ip4, 0), control.resolver_port4)
        } else {
            (Self { family: AF_INET6, address: control.resolver_ip6, port: 0 }, control.resolver_port6)
        };
        if base == 0 || slot >= control.resolver_slots {
            return None;
        }
        to.port = ((base + slot) as u16).to_be() as u32;
        Some(to)
    }

    /// The slot whose port of the resolver this is.
    #[inline(always)]
    pub fn slot(&self, control: &Control) -> Option<u32> {
        let (matches, base) = if self.family == AF_INET {
            (self.address[0] == control.resolver_ip4, control.resolver_port4)
        } else {
            let ip6 = control.resolver_ip6;
            let same = self.address[0] == ip6[0]
                && self.address[1] == ip6[1]
                && self.address[2] == ip6[2]
                && self.address[3] == ip6[3];
            (self.family == AF_INET6 && same, control.resolver_port6)
        };
        let port = u32::from(self.host_port());
        if !matches || base == 0 || port < base || port - base >= control.resolver_slots {
            return None;
        }
        Some(port - base)
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

/// Sends the context's call to another address. An IPv4 one is written as the socket wants it: mapped for IPv6.
#[inline(always)]
pub fn write(ctx: &SockAddrContext, is_v6: bool, to: &Endpoint) {
    // Volatile: LLVM otherwise merges stores to adjacent words, which the verifier refuses.
    // SAFETY: fields of the context that programs of these types may write.
    unsafe {
        if is_v6 {
            let address = to.mapped();
            write_volatile(&raw mut (*ctx.sock_addr).user_ip6[0], address[0]);
            write_volatile(&raw mut (*ctx.sock_addr).user_ip6[1], address[1]);
            write_volatile(&raw mut (*ctx.sock_addr).user_ip6[2], address[2]);
            write_volatile(&raw mut (*ctx.sock_addr).user_ip6[3], address[3]);
        } else {
            write_volatile(&raw mut (*ctx.sock_addr).user_ip4, to.address[0]);
        }
        write_volatile(&raw mut (*ctx.sock_addr).user_port, to.port);
    }
}

/// What the gate needs of a packet's headers.
pub struct Header {
    pub readable: bool,
    pub family: u32,
    pub protocol: u32,
    /// The destination of a packet that leaves, the source of one that arrives.
    pub peer: Endpoint,
    /// The other end, which is the leaf's.
    pub own: Endpoint,
    /// Where the header of the transport protocol starts.
    pub transport: u32,
}

/// The first two octets of a DNS message; none when the datagram is too short for one (RFC 1035 §4.1.1).
#[inline(always)]
pub fn dns_id(ctx: &SkBuffContext, transport: u32) -> Option<u16> {
    let header = load::<12>(ctx, transport + 8)?;
    Some(u16::from_be_bytes([header[0], header[1]]))
}

/// The flags of a TCP header (RFC 9293 §3.1); none where there is no such header.
#[inline(always)]
pub fn tcp_flags(ctx: &SkBuffContext, transport: u32) -> u8 {
    load::<14>(ctx, transport).map_or(0, |header| header[13])
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
    const UNREADABLE: Header =
        Header { readable: false, family: 0, protocol: 0, peer: Endpoint::NONE, own: Endpoint::NONE, transport: 0 };
    let out = matches!(hook, Hook::Egress);
    let Some([first]) = load::<1>(ctx, 0) else { return UNREADABLE };
    match first >> 4 {
        4 => {
            let Some(ip) = load::<20>(ctx, 0) else { return UNREADABLE };
            let protocol = u32::from(ip[9]);
            let fragment_offset = u16::from_be_bytes([ip[6], ip[7]]) & 0x1fff;
            let transport = u32::from(first & 15) * 4;
            let ports = ports(ctx, protocol, transport);
            let (source, destination) = ports.unwrap_or((0, 0));
            let (source, destination) = (Endpoint::v4(ne(&ip, 12), source), Endpoint::v4(ne(&ip, 16), destination));
            let (own, peer) = if out { (source, destination) } else { (destination, source) };
            // The rest of a fragmented datagram has no ports to check.
            let readable = fragment_offset == 0 && transport >= 20 && ports.is_some();
            Header { readable, family: AF_INET, protocol, peer, own, transport }
        }
        6 => {
            let Some(ip) = load::<40>(ctx, 0) else { return UNREADABLE };
            // BIG TCP puts one hop-by-hop header with the jumbo option before the TCP header (RFC 2675).
            let (protocol, transport) = match (ip[6], load::<8>(ctx, 40)) {
                (0, Some(options)) if options[1] == 0 && options[2] == 0xc2 => (u32::from(options[0]), 48),
                (next, _) => (u32::from(next), 40),
            };
            let ports = ports(ctx, protocol, transport);
            let (source, destination) = ports.unwrap_or((0, 0));
            let source = Endpoint::v6(ne(&ip, 8), ne(&ip, 12), ne(&ip, 16), ne(&ip, 20), source);
            let destination = Endpoint::v6(ne(&ip, 24), ne(&ip, 28), ne(&ip, 32), ne(&ip, 36), destination);
            let (own, peer) = if out { (source, destination) } else { (destination, source) };
            Header { readable: ports.is_some(), family: AF_INET6, protocol, peer, own, transport }
        }
        _ => UNREADABLE,
    }
}

/// Source and destination port in network byte order; 0 for a protocol that has none.
#[inline(always)]
fn ports(ctx: &SkBuffContext, protocol: u32, offset: u32) -> Option<(u32, u32)> {
    if protocol != IPPROTO_TCP && protocol != IPPROTO_UDP {
        return Some((0, 0));
    }
    let bytes = load::<4>(ctx, offset)?;
    let port = |at: usize| u32::from(u16::from_ne_bytes([bytes[at], bytes[at + 1]]));
    Some((port(0), port(2)))
}
