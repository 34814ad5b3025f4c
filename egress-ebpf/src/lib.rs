//! What the kernel program and the gate both read and write: map values, numbers of hooks and reasons.
//!
//! Every struct is `repr(C)` without padding, so that its bytes are the map's bytes on either side.
#![no_std]
#![forbid(unsafe_code)]

pub mod guard;

/// A heartbeat older than this, on CLOCK_BOOTTIME, closes every leaf.
pub const HEARTBEAT_LIMIT_NS: u64 = 2_000_000_000;
/// How far ahead of the reading CPU's clock a heartbeat may seem to be before it is taken for a wrong one.
pub const HEARTBEAT_SKEW_NS: u64 = 1_000_000_000;
/// Leaves that can be admitted at one time. When the map is full the next execution is refused.
pub const MAX_LEAVES: usize = 16_384;
/// Connections whose first packet has left and that the gate has not accepted yet.
pub const MAX_FLOWS: usize = 65_536;
/// Connections of one leaf that have not ended; the next connect is refused, so that a leaf cannot fill the map of
/// flows for the others.
pub const MAX_FLOWS_PER_LEAF: u64 = 2_048;
/// Connections of one leaf that are recorded one by one, as many as the proxy records; what comes after is only counted.
pub const MAX_CONNECTIONS_PER_LEAF: u64 = 4_096;
/// Records of connections of all leaves together, until their leaves are retired.
pub const MAX_CONNECTIONS: usize = 262_144;
/// Bytes of the ring buffer of events.
pub const EVENT_BYTES: usize = 1 << 19;
/// Events that one leaf can put in the ring buffer; what comes after is only counted, so that a noisy leaf cannot hide
/// another's.
pub const EVENTS_PER_LEAF: u64 = 1_024;
/// Addresses and networks that all leaves together may reach, each counted once a port.
pub const MAX_REACH: usize = 131_072;
/// Of them, those of one leaf.
pub const MAX_REACH_PER_LEAF: usize = 4_096;
/// Ports that all leaves together answer at.
pub const MAX_INBOUND: usize = 16_384;
/// Of them, those of one leaf.
pub const MAX_INBOUND_PER_LEAF: usize = 64;
/// DNS queries that have left a leaf and that the resolver has not taken yet.
pub const MAX_QUERIES: usize = 65_536;
/// Of them, those of one leaf; the next is refused, so that a leaf cannot fill the map for the others.
pub const MAX_QUERIES_PER_LEAF: u64 = 256;
/// DNS queries that a leaf can send at once, repeated ones included, and each second for as long as it goes on; the next
/// is refused, so that a leaf cannot fill the resolver's buffers for the others. A long query counts for several.
pub const QUERIES_BURST: u64 = 512;
pub const QUERIES_PER_SECOND: u64 = 512;
/// Bytes of an IP packet that count as one query more.
pub const QUERY_BYTES: u32 = 1_024;
/// DNS servers that one socket can ask: one port of the resolver stands for each.
pub const MAX_SLOTS: usize = 8;
/// Where every DNS server listens (RFC 1035 §4.2).
pub const DNS_PORT: u16 = 53;
/// Levels of cgroup ancestors that the probe looks at.
pub const MAX_LEVEL: u32 = 32;

/// `LeafEntry::kind`: nothing leaves, loopback included.
pub const KIND_NONE: u32 = 1;
/// `LeafEntry::kind`: TCP to the gate's proxy and nothing else.
pub const KIND_PROXY_ONLY: u32 = 2;
/// `LeafEntry::kind`: TCP to what the map of reach has for the leaf, carried to the proxy; DNS, to the resolver.
pub const KIND_ALLOWLIST: u32 = 3;

/// Where a refusal was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Hook {
    Connect4 = 0,
    Connect6 = 1,
    Sendmsg4 = 2,
    Sendmsg6 = 3,
    SockCreate = 4,
    Egress = 5,
    Ingress = 6,
    SockOps = 7,
}

/// Number of hooks, the length of `Counts::denied`.
pub const HOOKS: usize = 8;

impl Hook {
    pub const ALL: [Self; HOOKS] = [
        Self::Connect4,
        Self::Connect6,
        Self::Sendmsg4,
        Self::Sendmsg6,
        Self::SockCreate,
        Self::Egress,
        Self::Ingress,
        Self::SockOps,
    ];
}

/// Why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Reason {
    /// The leaf has no entry, or the gate has not said yet which generation is the valid one.
    NoEntry = 1,
    /// The entry's deadline is past.
    Expired = 2,
    /// The entry was written by another run of the gate.
    ForeignGeneration = 3,
    /// The gate has not written its heartbeat for longer than [`HEARTBEAT_LIMIT_NS`].
    HeartbeatStopped = 4,
    /// The leaf's profile is `none`.
    ProfileNone = 5,
    /// The address or port is not the gate's proxy.
    NotTheProxy = 6,
    /// A datagram that is no DNS query, or a profile under which none may leave.
    Datagram = 7,
    /// Not a TCP or UDP socket of the IPv4 or IPv6 family.
    SocketKind = 8,
    /// The socket was not made in this leaf.
    ForeignSocket = 9,
    /// A packet whose headers could not be read.
    Malformed = 10,
    /// A map refused a write that the connection needs.
    MapFull = 11,
    /// The leaf has [`MAX_FLOWS_PER_LEAF`] connections.
    TooManyFlows = 12,
    /// The leaf's profile has nothing at that address and port.
    NotInProfile = 13,
    /// The socket has asked [`MAX_SLOTS`] DNS servers; this would be one more.
    TooManyServers = 14,
    /// The leaf has [`MAX_QUERIES_PER_LEAF`] DNS queries that the resolver has not taken.
    TooManyQueries = 15,
    /// Another leaf or socket has a DNS query under way that the resolver could not tell from this one.
    QueryInFlight = 16,
    /// The leaf sends DNS queries faster than [`QUERIES_PER_SECOND`].
    QueryRate = 17,
}

impl Reason {
    pub const ALL: [Self; 17] = [
        Self::NoEntry,
        Self::Expired,
        Self::ForeignGeneration,
        Self::HeartbeatStopped,
        Self::ProfileNone,
        Self::NotTheProxy,
        Self::Datagram,
        Self::SocketKind,
        Self::ForeignSocket,
        Self::Malformed,
        Self::MapFull,
        Self::TooManyFlows,
        Self::NotInProfile,
        Self::TooManyServers,
        Self::TooManyQueries,
        Self::QueryInFlight,
        Self::QueryRate,
    ];
}

/// What a leaf may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct LeafEntry {
    /// The key again: an element that was freed and reused while it was being read does not match.
    pub leaf: u64,
    pub generation: u64,
    /// On CLOCK_BOOTTIME.
    pub deadline_ns: u64,
    pub kind: u32,
    pub reserved: u32,
}

/// What holds for every leaf. Written once, before the programs are attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Control {
    /// Zero: closed.
    pub generation: u64,
    /// Of a leaf in the cgroup tree, as the probe found it.
    pub level: u32,
    /// Network byte order.
    pub proxy_ip4: u32,
    /// Network byte order.
    pub proxy_ip6: [u32; 4],
    /// Network byte order in the low 16 bits, as `bpf_sock_addr.user_port` has it. Zero: no proxy there.
    pub proxy_port4: u32,
    pub proxy_port6: u32,
    /// Network byte order.
    pub resolver_ip4: u32,
    /// Network byte order.
    pub resolver_ip6: [u32; 4],
    /// Of the first slot, host byte order. Zero: no resolver there.
    pub resolver_port4: u32,
    pub resolver_port6: u32,
    /// Ports of the resolver from the first on, at most [`MAX_SLOTS`]. Zero: DNS is refused.
    pub resolver_slots: u32,
}

/// What a leaf did. Key 0 holds what had no leaf with an entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Counts {
    pub denied: [u64; HOOKS],
    /// TCP handshakes that were completed.
    pub connections: u64,
    /// TCP connects whose first packet was about to leave.
    pub flows_begun: u64,
    /// Those of them that reached TCP_CLOSE.
    pub flows_closed: u64,
    /// Payload of closed flows that the peer acknowledged.
    pub bytes_sent: u64,
    /// Payload of closed flows that arrived in order.
    pub bytes_received: u64,
    /// With headers and repeats.
    pub wire_bytes_out: u64,
    pub wire_bytes_in: u64,
    pub events: u64,
    pub events_lost: u64,
    /// DNS queries of which a record was made for the resolver.
    pub queries: u64,
    /// Connections that have no record, or whose record does not say how they ended.
    pub connections_lost: u64,
    /// Connections that were made to the leaf and that it answered.
    pub inbound: u64,
}

/// One refusal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Event {
    /// On CLOCK_BOOTTIME.
    pub at_ns: u64,
    pub leaf: u64,
    pub hook: u32,
    pub reason: u32,
    /// Address family of the socket or packet (AF_INET 2, AF_INET6 10).
    pub family: u32,
    /// IP protocol number.
    pub protocol: u32,
    /// Network byte order; an IPv4 address is in the first word with `address_family` 2.
    pub address: [u32; 4],
    /// 0: no address.
    pub address_family: u32,
    /// Host byte order.
    pub port: u32,
}

/// A TCP connection as its client has it. Addresses in network byte order, IPv4 as `::ffff:a.b.c.d`; ports in host
/// order. The network namespace and all four are needed: Linux gives one source port to several connections at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct FlowKey {
    pub netns_cookie: u64,
    pub client_ip: [u32; 4],
    pub server_ip: [u32; 4],
    pub client_port: u32,
    pub server_port: u32,
}

/// An address and port. An IPv4-mapped IPv6 address is held as the IPv4 address that it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Destination {
    /// Network byte order; an IPv4 address is in the first word.
    pub address: [u32; 4],
    /// AF_INET, AF_INET6, or 0: none.
    pub family: u32,
    /// Network byte order in the low 16 bits.
    pub port: u32,
}

/// A connection that has begun and that the gate has not accepted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct FlowRecord {
    /// The key again, first: an element that was freed and reused while it was being read does not match afterwards.
    pub key: FlowKey,
    pub leaf: u64,
    /// Of its [`Connection`].
    pub number: u64,
    pub original: Destination,
}

/// `ClientSocket::number`, `AcceptedSocket::number`: the connection has no record.
pub const NO_NUMBER: u64 = u64::MAX;

/// Which connection of which leaf. A leaf's connections are numbered from 0 in the order in which they began, so that a
/// port or a socket that is used again is another connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ConnectionKey {
    pub leaf: u64,
    pub number: u64,
}

/// `Connection::state`: begun, and not ended by its client.
pub const CONNECTION_OPEN: u32 = 0;
/// `Connection::state`: its client sends no more; the figures are those of that moment.
pub const CONNECTION_ENDING: u32 = 1;
/// `Connection::state`: reached TCP_CLOSE; the figures are final.
pub const CONNECTION_CLOSED: u32 = 2;
/// `Connection::state`: reached TCP_CLOSE without ever having been established.
pub const CONNECTION_FAILED: u32 = 3;

/// What one connection of a leaf carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Connection {
    /// The client's socket, never used again while the machine runs (SO_COOKIE): an element that was freed and reused
    /// while it was being read, or that is an earlier admission's of the same leaf, does not match.
    pub socket: u64,
    pub netns_cookie: u64,
    /// On CLOCK_BOOTTIME.
    pub begun_ns: u64,
    /// When the client's end stopped sending, by a close, a reset or its death; 0 in [`CONNECTION_OPEN`].
    pub ended_ns: u64,
    /// Payload that the peer acknowledged.
    pub bytes_sent: u64,
    /// Payload that arrived in order.
    pub bytes_received: u64,
    /// As in [`FlowKey`].
    pub client_ip: [u32; 4],
    pub client_port: u32,
    pub state: u32,
    pub original: Destination,
}

/// What is kept on a socket that was made in a leaf.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ClientSocket {
    pub leaf: u64,
    pub netns_cookie: u64,
    /// Sequence number after the peer's FIN, when `fin_seen` is not zero.
    pub fin_end: u32,
    pub fin_seen: u32,
    /// Of the [`Connection`] that it is or last was.
    pub number: u64,
    /// Where a carried connection was meant to go; no family when it was meant for the proxy.
    pub original: Destination,
    /// Not zero on a socket that somebody else connected to; a connect of its own ends that.
    pub accepted: u32,
    pub reserved: u32,
}

/// The DNS servers that a UDP socket has asked, by slot. They stay as long as the socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct AskedServers {
    pub address: [[u32; 4]; MAX_SLOTS],
    /// 0 in a slot that is not used.
    pub family: [u32; MAX_SLOTS],
    pub used: u32,
}

/// What is kept on a socket that the gate accepted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct AcceptedSocket {
    pub leaf: u64,
    /// Of the [`Connection`] that the client's end has.
    pub number: u64,
    /// Where the client meant to go; no family when it meant the proxy.
    pub original: Destination,
}

/// A DNS query on its way to the resolver, as the resolver will see it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct QueryKey {
    pub netns_cookie: u64,
    /// Network byte order, IPv4 as `::ffff:a.b.c.d`.
    pub source_ip: [u32; 4],
    /// Host byte order, both.
    pub source_port: u16,
    pub slot_port: u16,
    /// The first two octets of the message as a big-endian number (RFC 1035 §4.1.1).
    pub id: u16,
    pub reserved: u16,
}

/// Who asks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct QueryRecord {
    pub leaf: u64,
    /// On CLOCK_BOOTTIME.
    pub at_ns: u64,
    /// The server that was asked; its port is [`DNS_PORT`].
    pub server: Destination,
}

/// A port that a leaf answers at, in host byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct InboundKey {
    pub leaf: u64,
    pub port: u32,
    pub reserved: u32,
}

/// What a leaf may reach, in a trie of longest prefixes: both halves of the leaf's id, the family, a port in host byte
/// order or 0 for all of them, and the address. An entry's value is its leaf.
pub type ReachKey = [u32; 8];
/// Bits of a [`ReachKey`] before the address.
pub const REACH_BITS_BEFORE_ADDRESS: u32 = 128;

/// Builds a key of the map of reach. `address` in network byte order, an IPv4 one in the first word.
pub const fn reach_key(leaf: u64, family: u32, port: u16, address: [u32; 4]) -> ReachKey {
    let [a, b, c, d] = address;
    [leaf as u32, (leaf >> 32) as u32, family, port as u32, a, b, c, d]
}

/// `::ffff:0:0/96` as words of an address in network byte order.
pub const MAPPED_WORD: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);
