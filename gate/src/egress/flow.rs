//! What went out and what was refused: one record a connection.

use std::net::{IpAddr, SocketAddr};

use serde::Serialize;

use crate::time::Timestamp;

/// One connection to the proxy, from accept to close.
///
/// Bytes are TCP payload as the proxy read it from and wrote it to its two sockets. The sandbox leg holds the proxy
/// request and answer as well as what was carried; the upstream leg, under TLS that the proxy made itself, holds the
/// TLS records. A connection that is refused without being served (nobody's, or over a limit of connections) is not
/// counted: its bytes are 0.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FlowRecord {
    /// When the connection was accepted.
    pub time: Timestamp,
    /// Whose it was; absent when the kernel had no record of who connected.
    pub execution_id: Option<String>,
    pub action_id: Option<String>,
    pub principal: Option<String>,
    pub workspace: Option<String>,
    /// The host that was asked for, parsed: a name in lower-case ASCII, or an address.
    pub name: Option<String>,
    /// The address that was dialled, the last one when several were tried.
    pub address: Option<IpAddr>,
    pub port: Option<u16>,
    pub protocol: Option<Protocol>,
    /// The server name of the ClientHello that was read, as it was sent.
    pub sni: Option<String>,
    /// How the name was held to what is inside; absent as long as nothing was let through.
    pub name_verified: Option<NameVerified>,
    /// Whether the client connected to the name's own address, and the kernel brought it to the proxy.
    pub carried: bool,
    /// Whether what was carried was not looked into.
    pub opaque: bool,
    pub verdict: Verdict,
    pub decided_by: DecidedBy,
    /// `profile` when the profile allowed it, otherwise the reason of the refusal.
    pub rule: String,
    /// How the connection ended; a verdict `allow` says nothing about whether the origin could be reached.
    pub end: End,
    /// What failed on the way to the origin or with it: `name_not_found`, `connect_refused`, `tls_certificate`, …
    pub error: Option<String>,
    pub bytes_from_sandbox: u64,
    pub bytes_to_sandbox: u64,
    pub bytes_to_upstream: u64,
    pub bytes_from_upstream: u64,
    pub duration_ms: u64,
    pub decision_id: String,
    /// The client's end of the sandbox leg, by which the kernel's records of the same connection are found.
    pub client: Option<SocketAddr>,
    /// How many connections this record stands for: 1, or more for the one that stands for all past the limit of
    /// records an execution has.
    pub connections: u64,
    /// The kernel's number for the connection among its leaf's; absent where this is no one connection, or the kernel has
    /// no record of it.
    #[serde(skip)]
    pub connection: Option<u64>,
    /// Whether the bytes are 0 because nobody counted.
    #[serde(skip)]
    pub uncounted: bool,
    /// The sandbox leg as the kernel counted it at the client's socket. Absent until the execution is over, and where the
    /// kernel has no record.
    pub kernel: Option<KernelFigures>,
    /// Whether that is what the proxy counted. Absent until the execution is over, and of what is no connection.
    pub agreement: Option<Agreement>,
}

impl FlowRecord {
    /// Whether this is of connections, and not of a query to the resolver.
    pub fn is_connection(&self) -> bool {
        self.decided_by != DecidedBy::Resolver
    }
}

/// TCP payload of one connection as the kernel counted it at the client's socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct KernelFigures {
    /// From the sandbox, as far as the proxy's end acknowledged it.
    pub bytes_sent: u64,
    /// To the sandbox, as far as it arrived.
    pub bytes_received: u64,
    /// Whether the connection reached TCP_CLOSE; otherwise the figures are a lower bound.
    pub closed: bool,
}

/// Whether kernel and proxy counted the same payload on the sandbox leg, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Agreement {
    /// To the byte, both ways.
    Equal,
    /// The connection was open when the execution was killed; the kernel's figures are a lower bound.
    OpenAtKill,
    /// One of the two has no figures.
    Unknown,
    /// They differ, as when a client hangs up before it has read what was sent.
    Disagree,
}

impl FlowRecord {
    /// Makes this record stand for another connection too. What is not the same of both is no longer in it.
    pub fn fold(&mut self, other: &Self) {
        self.name = None;
        self.address = None;
        self.port = None;
        self.sni = None;
        self.client = None;
        self.error = None;
        self.connections = self.connections.saturating_add(other.connections);
        for (sum, more) in [
            (&mut self.bytes_from_sandbox, other.bytes_from_sandbox),
            (&mut self.bytes_to_sandbox, other.bytes_to_sandbox),
            (&mut self.bytes_to_upstream, other.bytes_to_upstream),
            (&mut self.bytes_from_upstream, other.bytes_from_upstream),
        ] {
            *sum = sum.saturating_add(more);
        }
    }
}

/// What was asked of the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// A CONNECT tunnel of which no more is known.
    Connect,
    /// Requests to an `http://` origin.
    Http,
    /// Requests to an `https://` origin over TLS that the proxy made and verified.
    Https,
    /// TLS between the client and the origin.
    Tls,
    /// Bytes of a protocol that the proxy does not know.
    Tcp,
    /// A query to the resolver. Its bytes are not counted here: over UDP they are no connection's, and over TCP they
    /// are those of the connection that carried them.
    Dns,
}

/// What decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DecidedBy {
    /// The kernel program.
    Hook,
    /// The resolver that sandboxes see.
    Resolver,
    Proxy,
}

/// What shows that a connection is for the name that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NameVerified {
    /// The server name in the ClientHello.
    Sni,
    /// The Host of every request.
    Host,
    /// Only that the gate looked the name up and dialled what it found.
    Dns,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Allow,
    Deny,
    /// Let through by `egress.mode: unsafe_audit`; the rule is the reason for which it would have been refused.
    WouldDeny,
}

/// Why a connection is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// Both sides finished.
    Closed,
    /// The proxy answered it with a refusal or an error of its own.
    Answered,
    /// It was open when the execution ended.
    OpenAtClose,
    /// The execution reached its limit of bytes.
    ByteLimit,
    /// The connection reached its limit of time.
    TimeLimit,
    /// Nothing was sent for too long.
    Idle,
    /// The client's side broke, or sent something that cannot be forwarded.
    ClientFailed,
    /// The origin's side broke, or sent something that cannot be forwarded.
    UpstreamFailed,
}
