//! Names to addresses, by the gate itself: a static table first, then DNS over UDP and TCP.
//!
//! There is no cache: the addresses that one look-up gave are the ones that are checked and dialled, and the next
//! connection asks again. Names are absolute; the search list of `resolv.conf` is not used.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RData, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{Instant, timeout_at};

/// Aliases that are followed for one name, within one answer and across answers.
const MAX_ALIASES: usize = 8;
/// Rounds over all servers before a query is given up.
const ROUNDS: u32 = 2;
/// Addresses of one name that are taken; a longer answer is refused, since all of it must be checked.
const MAX_ADDRESSES: usize = 64;
/// Without EDNS an answer over UDP has at most 512 bytes (RFC 1035 §4.2.1); some servers send more all the same.
const UDP_BUFFER_BYTES: usize = 4096;

/// Where names come from.
#[derive(Clone, Debug)]
pub struct ResolverConfig {
    /// Names that are never asked of DNS, lower-case and without a trailing dot. Their addresses are checked as others.
    pub hosts: BTreeMap<String, Vec<IpAddr>>,
    /// DNS servers, tried in this order.
    pub servers: Vec<SocketAddr>,
    /// How long one server may take for one query.
    pub timeout: Duration,
}

impl Default for ResolverConfig {
    fn default() -> Self {
        Self { hosts: BTreeMap::new(), servers: Vec::new(), timeout: Duration::from_secs(2) }
    }
}

/// Why a name has no addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    #[error("the name does not exist or has no address")]
    NotFound,
    #[error("no DNS server is configured")]
    NoServer,
    #[error("no DNS server answered in time")]
    Timeout,
    #[error("the DNS servers could not answer")]
    Failed,
    #[error("the name is an alias of too many others or has too many addresses")]
    TooLong,
}

impl ResolveError {
    /// The word for flow records and error bodies.
    pub const fn code(self) -> &'static str {
        match self {
            Self::NotFound => "name_not_found",
            Self::NoServer => "dns_not_configured",
            Self::Timeout => "dns_timeout",
            Self::Failed => "dns_failed",
            Self::TooLong => "dns_answer_too_long",
        }
    }
}

/// Resolves names for the proxy; nothing else of the gate does.
#[derive(Clone, Debug)]
pub struct Resolver {
    config: ResolverConfig,
}

impl Resolver {
    pub fn new(config: ResolverConfig) -> Self {
        Self { config }
    }

    /// All addresses of a name, v4 before v6, by exactly one look-up of each family.
    ///
    /// A family that fails while the other answers is left out: what is not returned is not dialled.
    ///
    /// # Errors
    /// [`ResolveError`] when there is no address.
    pub async fn resolve(&self, name: &str) -> Result<Vec<IpAddr>, ResolveError> {
        if let Some(addresses) = self.config.hosts.get(name) {
            return if addresses.is_empty() { Err(ResolveError::NotFound) } else { Ok(addresses.clone()) };
        }
        // RFC 6761 §6.3 and §6.4, RFC 7686: these never go to DNS.
        let top = name.rsplit('.').next().unwrap_or(name);
        if matches!(top, "localhost" | "invalid" | "onion") {
            return Err(ResolveError::NotFound);
        }
        let name = Name::from_ascii(format!("{name}.")).map_err(|_| ResolveError::NotFound)?;
        let (v4, v6) = tokio::join!(self.look_up(name.clone(), RecordType::A), self.look_up(name, RecordType::AAAA));
        let addresses = match (v4, v6) {
            (Ok(mut v4), Ok(v6)) => {
                v4.extend(v6);
                v4
            }
            (Err(ResolveError::TooLong), _) | (_, Err(ResolveError::TooLong)) => return Err(ResolveError::TooLong),
            (Ok(found), Err(error)) | (Err(error), Ok(found)) if found.is_empty() => return Err(error),
            (Ok(found), Err(_)) | (Err(_), Ok(found)) => found,
            (Err(error), Err(_)) => return Err(error),
        };
        match addresses.len() {
            0 => Err(ResolveError::NotFound),
            1..=MAX_ADDRESSES => Ok(addresses),
            _ => Err(ResolveError::TooLong),
        }
    }

    async fn look_up(&self, name: Name, kind: RecordType) -> Result<Vec<IpAddr>, ResolveError> {
        let mut at = name;
        let mut aliases = 0;
        loop {
            let answer = self.query(&at, kind).await?;
            let asked = at.clone();
            // The chain is followed by owner name, in whatever order the records stand; records of other owners say
            // nothing about the name that was asked.
            while let Some(target) = answer.answers.iter().find_map(|record| match &record.data {
                RData::CNAME(target) if record.name.eq_ignore_root(&at) => Some(target.0.clone()),
                _ => None,
            }) {
                aliases += 1;
                if aliases > MAX_ALIASES {
                    return Err(ResolveError::TooLong);
                }
                at = target;
            }
            let addresses: Vec<IpAddr> = answer
                .answers
                .iter()
                .filter(|record| record.dns_class == DNSClass::IN && record.name.eq_ignore_root(&at))
                .filter_map(|record| match (&record.data, kind) {
                    (RData::A(a), RecordType::A) => Some(IpAddr::V4(a.0)),
                    (RData::AAAA(aaaa), RecordType::AAAA) => Some(IpAddr::V6(aaaa.0)),
                    _ => None,
                })
                .collect();
            // An alias whose target the server did not look up itself is asked for next.
            if addresses.is_empty() && !at.eq_ignore_root(&asked) {
                continue;
            }
            return Ok(addresses);
        }
    }

    /// One question, asked of each server in turn until one answers it. NXDOMAIN and NODATA come back as an empty answer.
    async fn query(&self, name: &Name, kind: RecordType) -> Result<Message, ResolveError> {
        let mut outcome = ResolveError::NoServer;
        for _ in 0..ROUNDS {
            for &server in &self.config.servers {
                match self.exchange(server, name, kind).await {
                    Ok(message) => return Ok(message),
                    Err(error) => outcome = error,
                }
            }
        }
        Err(outcome)
    }

    async fn exchange(&self, server: SocketAddr, name: &Name, kind: RecordType) -> Result<Message, ResolveError> {
        let deadline = Instant::now() + self.config.timeout;
        let question = Query::query(name.clone(), kind);
        // A random identifier, and below a socket of its own for each question: its port is the kernel's random choice.
        let mut message = Message::query();
        message.metadata.recursion_desired = true;
        message.add_query(question.clone());
        let bytes = message.to_vec().map_err(|_| ResolveError::NotFound)?;
        let id = message.metadata.id;

        let by_udp = timeout_at(deadline, ask_udp(server, &bytes, id, &question));
        let mut answer = by_udp.await.map_err(|_| ResolveError::Timeout)?.map_err(|_| ResolveError::Failed)?;
        if answer.metadata.truncation {
            let by_tcp = timeout_at(deadline, ask_tcp(server, &bytes, id, &question));
            answer = by_tcp.await.map_err(|_| ResolveError::Timeout)?.map_err(|_| ResolveError::Failed)?;
        }
        match answer.metadata.response_code {
            ResponseCode::NoError => Ok(answer),
            ResponseCode::NXDomain => {
                // The aliases before a name that does not exist may be there; none of them has an address.
                answer.answers.clear();
                Ok(answer)
            }
            _ => Err(ResolveError::Failed),
        }
    }
}

/// The answer to this question, and not merely something that arrived: RFC 5452 §3 and §9.1.
fn accept(bytes: &[u8], id: u16, question: &Query) -> Option<Message> {
    let message = Message::from_vec(bytes).ok()?;
    let metadata = &message.metadata;
    let ours = metadata.id == id
        && metadata.message_type == MessageType::Response
        && metadata.op_code == OpCode::Query
        && matches!(message.queries.as_slice(), [asked] if asked.name.eq_ignore_root(&question.name)
            && asked.query_type == question.query_type
            && asked.query_class == question.query_class);
    ours.then_some(message)
}

async fn ask_udp(server: SocketAddr, bytes: &[u8], id: u16, question: &Query) -> io::Result<Message> {
    let local: SocketAddr = match server {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(local).await?;
    // Connected: the kernel drops datagrams of any other sender.
    socket.connect(server).await?;
    socket.send(bytes).await?;
    let mut buffer = vec![0; UDP_BUFFER_BYTES];
    loop {
        let length = socket.recv(&mut buffer).await?;
        // What is not the answer is passed over, so that a forged datagram cannot end the wait.
        if let Some(message) = buffer.get(..length).and_then(|received| accept(received, id, question)) {
            return Ok(message);
        }
    }
}

async fn ask_tcp(server: SocketAddr, bytes: &[u8], id: u16, question: &Query) -> io::Result<Message> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidData);
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(bytes.len()).map_err(|_| invalid())?;
    stream.write_all(&[&length.to_be_bytes(), bytes].concat()).await?;
    let length = stream.read_u16().await?;
    let mut answer = vec![0; usize::from(length)];
    stream.read_exact(&mut answer).await?;
    accept(&answer, id, question).filter(|message| !message.metadata.truncation).ok_or_else(invalid)
}

/// The servers of a `resolv.conf` (resolv.conf(5)), in order, port 53. Scoped addresses are left out.
///
/// # Errors
/// When the file cannot be read.
pub fn servers_of(resolv_conf: &Path) -> io::Result<Vec<SocketAddr>> {
    Ok(parse_servers(&std::fs::read_to_string(resolv_conf)?))
}

fn parse_servers(text: &str) -> Vec<SocketAddr> {
    let server = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let address: IpAddr = (words.next()? == "nameserver").then(|| words.next())??.parse().ok()?;
        Some(SocketAddr::new(address, 53))
    };
    text.lines().filter_map(server).collect()
}

#[cfg(test)]
pub(crate) mod tests;
