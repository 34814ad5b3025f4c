//! The proxy against real sockets: origins, TLS and DNS servers of the test's own, all on loopback. Only who is calling
//! is played: the kernel that really says it has suites of its own.

use std::collections::HashMap;
use std::future::Future;
use std::os::fd::BorrowedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::TcpSocket;
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::egress::Caller;
use crate::egress::flow::{NameVerified, Protocol, Verdict};
use crate::egress::profile::{Entry, EntryProtocol, NetworkEntry, Pattern, Profile};

mod addresses;
mod carried;
mod connect;
mod forward;
mod https;
mod inside;
mod limits;
mod terminate;
mod tls;
mod whose;
mod worker;

const LEAF: LeafId = LeafId(7);

/// Says who is calling by the port that the caller bound, or the same for everyone.
struct Who {
    everyone: Option<LeafId>,
    by_port: Mutex<HashMap<u16, Option<LeafId>>>,
    /// Where connections were to go, by the port that the caller bound.
    originals: Mutex<HashMap<u16, SocketAddr>>,
}

impl Who {
    fn nobody() -> Self {
        Self { everyone: None, by_port: Mutex::default(), originals: Mutex::default() }
    }
}

impl Attribution for Who {
    fn caller(&self, accepted: BorrowedFd<'_>) -> Option<Caller> {
        let port = SocketAddr::try_from(rustix::net::getpeername(accepted).unwrap().unwrap()).unwrap().port();
        let leaf = self.by_port.lock().unwrap().get(&port).copied().unwrap_or(self.everyone)?;
        Some(Caller { leaf, original: self.originals.lock().unwrap().get(&port).copied() })
    }

    fn connection_of(&self, _: BorrowedFd<'_>) -> Option<u64> {
        None
    }
}

/// What stand-ins stand for.
struct Table(HashMap<Ipv4Addr, &'static str>);

impl Names for Table {
    fn name_of(&self, address: Ipv4Addr) -> Option<String> {
        self.0.get(&address).map(|name| (*name).to_owned())
    }
}

/// Answers every query with itself.
struct EchoDns;

impl DnsOverTcp for EchoDns {
    fn serve<'a>(
        &'a self,
        stream: &'a mut dyn Duplex,
        _: SocketAddr,
    ) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send + 'a>> {
        Box::pin(async move {
            let (mut read, mut write) = tokio::io::split(stream);
            let _ = tokio::io::copy(&mut read, &mut write).await;
        })
    }
}

struct Bench {
    proxy: Proxy,
    who: Arc<Who>,
    ca: CertifiedIssuer<'static, KeyPair>,
    dir: TempDir,
}

impl Bench {
    async fn new(change: impl FnOnce(&mut ProxyConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ca = authority();
        let ca_file = dir.path().join("ca.pem");
        std::fs::write(&ca_file, ca.pem()).unwrap();
        let loopback = vec!["127.0.0.1".parse().unwrap()];
        let names = ["origin.test", "sub.origin.test", "eviloriginal.test", "other.test", "evilorigin.test"];
        let mut config = ProxyConfig {
            ca_file: Some(ca_file),
            hosts: names.iter().map(|name| ((*name).to_owned(), loopback.clone())).collect(),
            allow_addresses: AllowAddresses::parse(&["127.0.0.1"]).unwrap(),
            dns_servers: Some(Vec::new()),
            ..ProxyConfig::default()
        };
        change(&mut config);
        let who = Arc::new(Who { everyone: Some(LEAF), ..Who::nobody() });
        let proxy = Proxy::start(config, who.clone()).await.unwrap();
        Self { proxy, who, ca, dir }
    }

    fn ca_file(&self) -> String {
        self.dir.path().join("ca.pem").to_str().unwrap().to_owned()
    }

    async fn plain() -> Self {
        Self::new(|_| {}).await
    }

    fn open(&self, names: &[(&str, u16)]) -> OpenSession {
        self.open_leaf(LEAF, names)
    }

    fn open_leaf(&self, leaf: LeafId, names: &[(&str, u16)]) -> OpenSession {
        self.proxy.open(leaf, session(leaf, entries(names, EntryProtocol::Auto)))
    }

    /// The same names, for protocols that are not looked into.
    fn open_bytes(&self, names: &[(&str, u16)]) -> OpenSession {
        self.open_speaking(names, EntryProtocol::Tcp)
    }

    fn open_speaking(&self, names: &[(&str, u16)], protocol: EntryProtocol) -> OpenSession {
        self.proxy.open(LEAF, session(LEAF, entries(names, protocol)))
    }

    /// A connection that the kernel brought here on its way to another address.
    async fn dial_carried(&self, original: &str) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let port = socket.local_addr().unwrap().port();
        self.who.originals.lock().unwrap().insert(port, original.parse().unwrap());
        socket.connect(self.proxy.addresses().v4.into()).await.unwrap()
    }

    async fn dial(&self) -> TcpStream {
        TcpStream::connect(self.proxy.addresses().v4).await.unwrap()
    }

    /// A connection that the kernel would attribute to this leaf, or to nobody.
    async fn dial_as(&self, leaf: Option<LeafId>) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        self.who.by_port.lock().unwrap().insert(socket.local_addr().unwrap().port(), leaf);
        socket.connect(self.proxy.addresses().v4.into()).await.unwrap()
    }

    /// All that comes back for these bytes.
    async fn ask(&self, request: impl AsRef<[u8]>) -> Answer {
        let mut stream = self.dial().await;
        stream.write_all(request.as_ref()).await.unwrap();
        Answer::read(&mut stream).await
    }

    async fn connect(&self, authority: &str) -> (TcpStream, Answer) {
        let mut stream = self.dial().await;
        stream
            .write_all(format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n").as_bytes())
            .await
            .unwrap();
        let head = read_head(&mut stream).await;
        let mut answer = Answer::parse(&head);
        if answer.status != 200 {
            stream.read_to_end(&mut answer.body).await.unwrap();
        }
        (stream, answer)
    }
}

fn entries(names: &[(&str, u16)], protocol: EntryProtocol) -> Profile {
    let entry = |(name, port): &(&str, u16)| Entry::new(Pattern::parse(name).unwrap(), [*port]).speaking(protocol, []);
    Profile::allowlist(names.iter().map(entry))
}

fn session(leaf: LeafId, profile: Profile) -> Session {
    let table = [("198.18.0.1", "origin.test"), ("198.18.0.2", "other.test"), ("198.18.0.3", "sub.origin.test")];
    Session {
        execution_id: format!("execution-{}", leaf.0),
        action_id: "fetch".to_owned(),
        principal: "agent".to_owned(),
        workspace: "default".to_owned(),
        profile: Arc::new(profile),
        names: Some(Arc::new(Table(table.map(|(address, name)| (address.parse().unwrap(), name)).into()))),
        dns: Some(Arc::new(EchoDns)),
        lasts: false,
    }
}

fn authority() -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    // Otherwise issuer and subject of a leaf are one name, and OpenSSL takes it for self-signed.
    params.distinguished_name.push(rcgen::DnType::CommonName, "authority of the test");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// An answer as the client got it, byte for byte.
#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn parse(bytes: &[u8]) -> Self {
        let end = bytes.windows(4).position(|w| w == b"\r\n\r\n").map_or(bytes.len(), |at| at + 4);
        let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
        let status = head.get(9..12).and_then(|digits| digits.parse().ok()).unwrap_or(0);
        Self { status, head, body: bytes[end..].to_vec() }
    }

    async fn read(stream: &mut TcpStream) -> Self {
        let mut bytes = Vec::new();
        let _ = timeout(Duration::from_secs(20), stream.read_to_end(&mut bytes)).await.unwrap();
        Self::parse(&bytes)
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    fn field(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (n, value) = line.split_once(": ")?;
            n.eq_ignore_ascii_case(name).then_some(value)
        })
    }

    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    /// That this is a refusal with all that a refusal carries; gives the reason.
    fn denied(&self) -> String {
        assert_eq!(self.status, 403, "{self:?}");
        let body = self.json();
        assert_eq!(body["error"], "egress_denied");
        assert_eq!(self.field("Latchgate-Decision-Id"), body["decision_id"].as_str());
        assert_eq!(self.field("Content-Type"), Some("application/json"));
        body["deny_reason"].as_str().unwrap().to_owned()
    }
}

async fn read_head(stream: &mut (impl AsyncRead + Unpin)) -> Vec<u8> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => break,
        }
    }
    head
}

/// A server on loopback and how many have connected to it.
struct Origin {
    port: u16,
    connections: Arc<AtomicUsize>,
    /// What each connection sent, once it has been answered.
    seen: Arc<Mutex<Vec<String>>>,
}

impl Origin {
    async fn doing<F: Future<Output = ()> + Send + 'static>(
        then: impl Fn(TcpStream, Arc<Mutex<Vec<String>>>) -> F + Send + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let connections = Arc::new(AtomicUsize::new(0));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (count, notes) = (Arc::clone(&connections), Arc::clone(&seen));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(then(stream, Arc::clone(&notes)));
            }
        });
        Self { port, connections, seen }
    }

    /// Reads one request, gives this answer, and closes.
    async fn answering(answer: impl Into<Vec<u8>>) -> Self {
        let answer: Vec<u8> = answer.into();
        Self::doing(move |mut stream, seen| {
            let answer = answer.clone();
            async move { answer_one(&mut stream, &seen, &answer).await }
        })
        .await
    }

    /// Sends back what it gets, and an end for an end.
    async fn echoing() -> Self {
        Self::doing(|mut stream, _| async move {
            let (mut read, mut write) = stream.split();
            let _ = tokio::io::copy(&mut read, &mut write).await;
        })
        .await
    }

    async fn tls(name: &str, issuer: &CertifiedIssuer<'static, KeyPair>, answer: &str) -> Self {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.not_after = rcgen::date_time_ymd(2090, 1, 1);
        Self::tls_with(params, issuer, answer).await
    }

    async fn tls_with(params: CertificateParams, issuer: &CertifiedIssuer<'static, KeyPair>, answer: &str) -> Self {
        let acceptor = acceptor(params, issuer);
        let answer = answer.as_bytes().to_vec();
        Self::doing(move |stream, seen| {
            let (acceptor, answer) = (acceptor.clone(), answer.clone());
            async move {
                if let Ok(mut stream) = acceptor.accept(stream).await {
                    answer_one(&mut stream, &seen, &answer).await;
                }
            }
        })
        .await
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }
}

fn acceptor(params: CertificateParams, issuer: &CertifiedIssuer<'static, KeyPair>) -> TlsAcceptor {
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, issuer).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![CertificateDer::from(certificate)],
            PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
        )
        .unwrap();
    TlsAcceptor::from(Arc::new(config))
}

async fn answer_one(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), seen: &Mutex<Vec<String>>, answer: &[u8]) {
    let mut request = read_head(stream).await;
    let head = String::from_utf8_lossy(&request).to_lowercase();
    let length =
        head.lines().find_map(|line| line.strip_prefix("content-length: ")).map(|n| n.parse::<usize>().unwrap());
    if let Some(length) = length {
        let mut body = vec![0; length];
        let _ = stream.read_exact(&mut body).await;
        request.extend(body);
    } else if head.contains("transfer-encoding: chunked") {
        while !request.ends_with(b"\r\n0\r\n\r\n") {
            let Ok(byte) = stream.read_u8().await else { break };
            request.push(byte);
        }
    }
    seen.lock().unwrap().push(String::from_utf8_lossy(&request).into_owned());
    let _ = stream.write_all(answer).await;
    let _ = stream.shutdown().await;
}

async fn exactly(stream: &mut TcpStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    timeout(Duration::from_secs(10), stream.read_exact(&mut bytes)).await.unwrap().unwrap();
    bytes
}

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

#[tokio::test]
async fn what_cannot_be_used_does_not_start() {
    let nobody = || Arc::new(Who::nobody());
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().join("empty.pem");
    std::fs::write(&empty, "no certificate").unwrap();
    for path in [empty, dir.path().join("missing.pem")] {
        let config = ProxyConfig { ca_file: Some(path), ..ProxyConfig::default() };
        assert!(matches!(Proxy::start(config, nobody()).await, Err(ProxyError::CaFile { .. })));
    }
    for name in ["127.0.0.1", "a b", "", "0x7f.1"] {
        let config = ProxyConfig {
            hosts: [(name.to_owned(), Vec::new())].into(),
            dns_servers: Some(vec![]),
            ..ProxyConfig::default()
        };
        assert!(matches!(Proxy::start(config, nobody()).await, Err(ProxyError::HostsName(_))), "{name}");
    }
    let twice = [("A.test".to_owned(), Vec::new()), ("a.test".to_owned(), Vec::new())].into();
    let config = ProxyConfig { hosts: twice, dns_servers: Some(vec![]), ..ProxyConfig::default() };
    assert!(matches!(Proxy::start(config, nobody()).await, Err(ProxyError::HostsTwice(_))));
}
