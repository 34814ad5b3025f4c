//! The proxy: the only way out of a sandbox.
//!
//! A connection belongs to the execution whose leaf the kernel recorded on the accepted socket; without that record it
//! gets no service, whatever it says. What it asks for is parsed once; name and port are checked against the profile of
//! that execution; the name is resolved by the gate; every address of the answer is checked; and one of those is dialled.
//! Each connection carries one tunnel or one request and leaves one [`FlowRecord`].

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, broadcast, mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use self::connection::Means;
use self::dial::Dialer;
use self::reply::Reply;
use self::session::{Registry, State};
use super::address::{AllowAddresses, Host};
use super::flow::{End, FlowRecord};
use super::resolver::{Resolver, ResolverConfig, servers_of};
use super::terminate::Authority;
use super::{Attribution, LeafId};

pub use self::leg::Duplex;
pub use self::session::{DnsOverTcp, Names, Session};

mod carried;
pub mod chunked;
mod client;
mod connection;
mod count;
mod dial;
mod forward;
pub mod head;
mod inside;
mod leg;
mod passthrough;
mod reply;
pub mod request;
mod session;
mod source;
mod tunnel;

pub use self::reply::DECISION_ID;
#[cfg(test)]
pub use self::session::blank as blank_for_tests;

/// Connections of nobody that are told so at one time; more are closed without a word.
const MAX_STRANGERS: usize = 32;
/// How long one of them may take to hear it.
const STRANGER_TIME: Duration = Duration::from_secs(1);
/// How long the end of an execution waits for the listeners to take what the kernel has already accepted.
const SWEEP_TIME: Duration = Duration::from_secs(1);

/// What the proxy may use.
#[derive(Clone, Debug, Default)]
pub struct ProxyConfig {
    /// Roots for `https` origins, PEM; the system's when there is none.
    pub ca_file: Option<PathBuf>,
    /// Names that are never asked of DNS.
    pub hosts: BTreeMap<String, Vec<IpAddr>>,
    /// Non-public networks that may be dialled.
    pub allow_addresses: AllowAddresses,
    /// DNS servers; those of `/etc/resolv.conf` when there is none.
    pub dns_servers: Option<Vec<SocketAddr>>,
    pub limits: Limits,
}

/// What one execution, and one connection, may take.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Open at one time for one execution; one more gets a refusal.
    pub concurrent_connections_per_execution: usize,
    /// Served and recorded one by one for one execution; the rest are refused, and one record counts them.
    pub connections_per_execution: usize,
    /// Begun at once by one execution; one more is refused.
    pub connections_burst: u32,
    /// Begun each second by one execution for as long as it goes on; one more is refused.
    pub connections_per_second: u32,
    /// Payload on the sandbox leg, both ways, of all connections of one execution; then they are reset.
    pub bytes_per_execution: u64,
    /// For the whole head of a request; then 408.
    pub head_time: Duration,
    /// For one address to accept and for one TLS handshake; then 504.
    pub connect_time: Duration,
    /// For one query to one DNS server.
    pub dns_time: Duration,
    /// Without a byte either way on either leg; then the connection is reset.
    pub idle_time: Duration,
    /// For one connection; then it is reset.
    pub connection_time: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            concurrent_connections_per_execution: 64,
            connections_per_execution: 4096,
            connections_burst: 1024,
            connections_per_second: 256,
            bytes_per_execution: 4 * 1024 * 1024 * 1024,
            head_time: Duration::from_secs(10),
            connect_time: Duration::from_secs(10),
            dns_time: Duration::from_secs(2),
            idle_time: Duration::from_secs(300),
            connection_time: Duration::from_secs(3600),
        }
    }
}

/// Why the proxy does not start.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    #[error("no loopback port for the proxy: {0}")]
    Bind(io::Error),
    #[error("egress.ca_file {path}: {why}")]
    CaFile { path: PathBuf, why: String },
    #[error("TLS could not be set up: {0}")]
    Tls(String),
    #[error("egress.hosts: `{0}` is not a DNS name")]
    HostsName(String),
    #[error("egress.hosts: `{0}` is there twice")]
    HostsTwice(String),
}

/// Where the proxy listens; one port for both families.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProxyAddresses {
    pub v4: SocketAddrV4,
    /// `None` on a machine without IPv6.
    pub v6: Option<SocketAddrV6>,
}

struct Shared {
    attribution: Arc<dyn Attribution>,
    registry: Registry,
    means: Means,
    strangers: Semaphore,
    flows: broadcast::Sender<Arc<FlowRecord>>,
    sweeps: Vec<mpsc::Sender<oneshot::Sender<()>>>,
}

/// A running proxy. Dropped, it accepts nothing more.
pub struct Proxy {
    shared: Arc<Shared>,
    addresses: ProxyAddresses,
    listeners: Vec<AbortHandle>,
}

impl Proxy {
    /// Binds 127.0.0.1 and, where there is one, ::1 on one port of the kernel's choice, and serves.
    ///
    /// # Errors
    /// [`ProxyError`]; nothing listens then.
    pub async fn start(config: ProxyConfig, attribution: Arc<dyn Attribution>) -> Result<Self, ProxyError> {
        let limits = config.limits;
        let servers = match config.dns_servers {
            Some(servers) => servers,
            None => servers_of(Path::new("/etc/resolv.conf")).unwrap_or_else(|error| {
                tracing::warn!(%error, "no /etc/resolv.conf: only names of egress.hosts resolve");
                Vec::new()
            }),
        };
        let resolver = Resolver::new(ResolverConfig { hosts: hosts(config.hosts)?, servers, timeout: limits.dns_time });
        let dialer = Dialer::new(resolver, config.allow_addresses, config.ca_file.as_deref(), limits.connect_time)?;
        let authority = Authority::new().map_err(|error| ProxyError::Tls(error.to_string()))?;
        let (v4, v6) = bind().await.map_err(ProxyError::Bind)?;
        let port = v4.local_addr().map_err(ProxyError::Bind)?.port();
        let addresses = ProxyAddresses {
            v4: SocketAddrV4::new(Ipv4Addr::LOCALHOST, port),
            v6: v6.is_some().then(|| SocketAddrV6::new(Ipv6Addr::LOCALHOST, port, 0, 0)),
        };
        let bound: Vec<TcpListener> = [Some(v4), v6].into_iter().flatten().collect();
        let (senders, receivers): (Vec<_>, Vec<_>) = bound.iter().map(|_| mpsc::channel(64)).unzip();
        let shared = Arc::new(Shared {
            attribution,
            registry: Registry::default(),
            means: Means { dialer, authority, limits },
            strangers: Semaphore::new(MAX_STRANGERS),
            flows: broadcast::Sender::new(1024),
            sweeps: senders,
        });
        let listeners = bound
            .into_iter()
            .zip(receivers)
            .map(|(listener, sweeps)| tokio::spawn(accept(Arc::clone(&shared), listener, None, sweeps)).abort_handle())
            .collect();
        Ok(Self { shared, addresses, listeners })
    }

    pub fn addresses(&self) -> ProxyAddresses {
        self.addresses
    }

    /// Serves the execution in this leaf until the session is closed or dropped.
    pub fn open(&self, leaf: LeafId, session: Session) -> OpenSession {
        let state = self.shared.registry.insert(leaf, session, &self.shared.means.limits, &self.shared.flows);
        OpenSession { leaf, state, shared: Arc::clone(&self.shared), sweeps: Vec::new(), listeners: Vec::new() }
    }

    /// The same, for an execution in a network namespace of its own, which these listeners are in. Whoever connects to
    /// them must be recorded by the kernel as that execution too.
    ///
    /// # Errors
    /// When a listener cannot be used; the execution is not served then.
    pub fn open_with_listeners(
        &self,
        leaf: LeafId,
        session: Session,
        listeners: Vec<std::net::TcpListener>,
    ) -> io::Result<OpenSession> {
        let usable = |listener: std::net::TcpListener| {
            listener.set_nonblocking(true)?;
            TcpListener::from_std(listener)
        };
        let listeners: Vec<_> = listeners.into_iter().map(usable).collect::<io::Result<_>>()?;
        let mut open = self.open(leaf, session);
        for listener in listeners {
            let (sweep, sweeps) = mpsc::channel(1);
            open.sweeps.push(sweep);
            let task = tokio::spawn(accept(Arc::clone(&self.shared), listener, Some(leaf), sweeps));
            open.listeners.push(task.abort_handle());
        }
        Ok(open)
    }

    /// The certificate of the authority that this start has made, for the trust bundle of a sandbox.
    pub fn ca_pem(&self) -> &str {
        self.shared.means.authority.pem()
    }

    /// Every record from now on as it is made, those of connections that are nobody's included. A receiver that falls
    /// more than 1024 behind loses the oldest and is told how many.
    pub fn flows(&self) -> broadcast::Receiver<Arc<FlowRecord>> {
        self.shared.flows.subscribe()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.listeners.iter().for_each(AbortHandle::abort);
    }
}

/// An execution that the proxy serves. Dropped without [`OpenSession::close`], its connections are cut all the same.
pub struct OpenSession {
    leaf: LeafId,
    state: Arc<State>,
    shared: Arc<Shared>,
    /// Of the listeners in the execution's own namespace.
    sweeps: Vec<mpsc::Sender<oneshot::Sender<()>>>,
    listeners: Vec<AbortHandle>,
}

impl OpenSession {
    /// Gives the execution's first connection this decision id, and with it the proxy's answer and the record of it: where
    /// an execution makes one connection, the call and the connection are one decision.
    pub fn decide_first_as(&self, decision_id: &str) {
        self.state.decide_first_as(decision_id);
    }

    /// Ends the service: every connection is cut, waited for and noted. Call it when nothing runs in the leaf any
    /// more; what the kernel accepted before that is noted too.
    pub async fn close(self) -> Vec<FlowRecord> {
        for sweep in self.shared.sweeps.iter().chain(&self.sweeps) {
            let (done, swept) = oneshot::channel();
            if sweep.send(done).await.is_ok() {
                let _ = timeout(SWEEP_TIME, swept).await;
            }
        }
        self.shared.registry.remove(self.leaf, &self.state);
        self.state.settle().await
    }
}

impl Drop for OpenSession {
    fn drop(&mut self) {
        self.listeners.iter().for_each(AbortHandle::abort);
        self.shared.registry.remove(self.leaf, &self.state);
    }
}

/// The table with its names in the spelling in which they are looked up.
fn hosts(table: BTreeMap<String, Vec<IpAddr>>) -> Result<BTreeMap<String, Vec<IpAddr>>, ProxyError> {
    let mut parsed = BTreeMap::new();
    for (name, addresses) in table {
        let Ok(Host::Name(host)) = Host::parse(&name) else {
            return Err(ProxyError::HostsName(name));
        };
        if parsed.insert(host, addresses).is_some() {
            return Err(ProxyError::HostsTwice(name));
        }
    }
    Ok(parsed)
}

async fn bind() -> io::Result<(TcpListener, Option<TcpListener>)> {
    let mut tries = 0;
    loop {
        let v4 = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        match TcpListener::bind((Ipv6Addr::LOCALHOST, v4.local_addr()?.port())).await {
            Ok(v6) => return Ok((v4, Some(v6))),
            // Somebody has the port on ::1; with another one it may be free.
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && tries < 16 => tries += 1,
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => return Err(error),
            Err(_) => return Ok((v4, None)),
        }
    }
}

/// Takes what comes to a listener; `whose` it is, where only one execution can reach it.
async fn accept(
    shared: Arc<Shared>,
    listener: TcpListener,
    whose: Option<LeafId>,
    mut sweeps: mpsc::Receiver<oneshot::Sender<()>>,
) {
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, client)) => take(&shared, stream, client, whose),
                // Out of descriptors or memory: the backlog waits.
                Err(error) => {
                    tracing::warn!(%error, "the proxy could not accept a connection");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            },
            Some(done) = sweeps.recv() => {
                sweep(&shared, &listener, whose);
                let _ = done.send(());
            }
        }
    }
}

/// Takes all that the kernel has accepted so far, whether or not the runtime has heard of it.
fn sweep(shared: &Arc<Shared>, listener: &TcpListener, whose: Option<LeafId>) {
    let flags = rustix::net::SocketFlags::NONBLOCK | rustix::net::SocketFlags::CLOEXEC;
    while let Ok(accepted) = rustix::net::accept_with(listener, flags) {
        let stream = std::net::TcpStream::from(accepted);
        let Ok(client) = stream.peer_addr() else { continue };
        if let Ok(stream) = TcpStream::from_std(stream) {
            take(shared, stream, client, whose);
        }
    }
}

fn take(shared: &Arc<Shared>, stream: TcpStream, client: SocketAddr, whose: Option<LeafId>) {
    let number = shared.attribution.connection_of(stream.as_fd());
    let caller = shared.attribution.caller(stream.as_fd());
    #[cfg(feature = "test-guards")]
    let caller = caller.or_else(|| shared.registry.anybody());
    let admitted = caller
        .ok_or("unattributed")
        .and_then(|caller| match whose {
            Some(leaf) if leaf != caller.leaf => Err("listener_mismatch"),
            _ => Ok(caller),
        })
        .and_then(|caller| {
            Ok((shared.registry.admit(caller.leaf, client, number).ok_or("no_session")?, caller.original))
        });
    match admitted {
        Ok((Ok(connection), original)) => {
            let shared = Arc::clone(shared);
            tokio::spawn(async move { connection::serve(connection, stream, original, &shared.means).await });
        }
        Ok((Err((state, full)), _)) => {
            let decision_id = state.note_full(full, client, number);
            let reply = Reply::denied(full.rule(), "this execution has made as many connections as it may");
            dismiss(shared, stream, reply.to_bytes(&decision_id, false));
        }
        Err(rule) => {
            let mut record = session::blank(client);
            record.rule = rule.to_owned();
            record.end = End::Answered;
            let reply = Reply::denied(rule, "the kernel has no record of a running action that made this connection");
            let bytes = reply.to_bytes(&record.decision_id, false);
            tracing::debug!(%client, rule, decision_id = record.decision_id, "a connection that is nobody's was refused");
            let _ = shared.flows.send(Arc::new(record));
            dismiss(shared, stream, bytes);
        }
    }
}

/// Answers and closes without reading what was asked; when many are at it, closes at once.
fn dismiss(shared: &Arc<Shared>, mut stream: TcpStream, bytes: Vec<u8>) {
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        let Ok(_permit) = shared.strangers.try_acquire() else { return };
        let _ = timeout(STRANGER_TIME, async {
            stream.write_all(&bytes).await?;
            stream.shutdown().await?;
            tokio::io::copy(&mut stream, &mut tokio::io::sink()).await
        })
        .await;
    });
}

#[cfg(test)]
mod tests;
