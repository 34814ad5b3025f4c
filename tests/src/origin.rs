//! An origin over TLS or in the clear, on loopback, that keeps what it was sent.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// A certificate authority of a test's own.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub pem: String,
}

impl Default for Authority {
    fn default() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, "LatchGate test CA");
        let certificate = params.self_signed(&key).unwrap();
        Self { pem: certificate.pem(), issuer: Issuer::new(params, key) }
    }
}

impl Authority {
    fn server(&self, names: &[&str]) -> ServerConfig {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
            )
            .unwrap()
    }
}

/// What an origin sends for a request whose head is given, whole: status line, fields and body.
pub type Answers = Arc<dyn Fn(&str) -> Vec<u8> + Send + Sync>;

/// The same for a head and a body.
pub type WholeAnswers = Arc<dyn Fn(&str, &[u8]) -> Vec<u8> + Send + Sync>;

/// `200` with a body of text.
pub fn ok(body: &str) -> Vec<u8> {
    format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// A running origin. Each request's head is kept before it is answered.
pub struct Origin {
    pub address: SocketAddr,
    requests: Arc<Mutex<Vec<String>>>,
    _runtime: tokio::runtime::Runtime,
}

impl Origin {
    /// TLS for `names`, on a port of the system's choice.
    pub fn tls(authority: &Authority, names: &[&str], address: IpAddr, response: &str) -> Self {
        let response = ok(response);
        Self::start(Some(authority.server(names)), SocketAddr::new(address, 0), Arc::new(move |_| response.clone()))
    }

    /// The same at this very address and port.
    pub fn tls_at(authority: &Authority, names: &[&str], address: SocketAddr, response: &str) -> Self {
        let response = ok(response);
        Self::start(Some(authority.server(names)), address, Arc::new(move |_| response.clone()))
    }

    /// In the clear, at this very address and port.
    pub fn clear_at(address: SocketAddr, response: &str) -> Self {
        let response = ok(response);
        Self::start(None, address, Arc::new(move |_| response.clone()))
    }

    /// TLS for `names`, with an answer of its own for each request. An empty answer is none: the connection stays open
    /// until the client gives up.
    pub fn answering(authority: &Authority, names: &[&str], address: IpAddr, answers: Answers) -> Self {
        Self::start(Some(authority.server(names)), SocketAddr::new(address, 0), answers)
    }

    pub fn clear(address: IpAddr, response: &str) -> Self {
        Self::clear_at(SocketAddr::new(address, 0), response)
    }

    /// In the clear, with an answer of its own for each request.
    pub fn clear_answering(address: IpAddr, answers: Answers) -> Self {
        Self::start(None, SocketAddr::new(address, 0), answers)
    }

    /// TLS that offers these protocols (RFC 7301). What is then spoken is still HTTP/1.1: it is for handshakes.
    pub fn offering(authority: &Authority, names: &[&str], address: IpAddr, protocols: &[&str]) -> Self {
        let mut config = authority.server(names);
        config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
        Self::start(Some(config), SocketAddr::new(address, 0), Arc::new(|_| ok("")))
    }

    /// TLS, with answers that need the body too: read as long as `content-length` says. The answer may take its time.
    pub fn with_bodies(authority: &Authority, names: &[&str], address: IpAddr, answers: WholeAnswers) -> Self {
        Self::listen(Some(authority.server(names)), SocketAddr::new(address, 0), true, answers)
    }

    fn start(tls: Option<ServerConfig>, address: SocketAddr, answers: Answers) -> Self {
        Self::listen(tls, address, false, Arc::new(move |head, _| answers(head)))
    }

    fn listen(tls: Option<ServerConfig>, address: SocketAddr, bodies: bool, answers: WholeAnswers) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(TcpListener::bind(address)).unwrap();
        let address = listener.local_addr().unwrap();
        let requests: Arc<Mutex<Vec<String>>> = Arc::default();
        let kept = Arc::clone(&requests);
        let acceptor = tls.map(|config| TlsAcceptor::from(Arc::new(config)));
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, kept, answers) = (acceptor.clone(), Arc::clone(&kept), Arc::clone(&answers));
                tokio::spawn(async move {
                    match acceptor {
                        None => answer(stream, &kept, bodies, &answers).await,
                        Some(acceptor) => {
                            if let Ok(stream) = acceptor.accept(stream).await {
                                answer(stream, &kept, bodies, &answers).await;
                            }
                        }
                    }
                });
            }
        });
        Self { address, requests, _runtime: runtime }
    }

    /// The heads of the requests that arrived, in order.
    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

async fn answer(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    kept: &Mutex<Vec<String>>,
    bodies: bool,
    answers: &WholeAnswers,
) {
    let mut bytes = Vec::new();
    let mut chunk = [0_u8; 4096];
    let end = |bytes: &[u8]| bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4);
    while end(&bytes).is_none() {
        match stream.read(&mut chunk).await {
            Ok(read) if read > 0 => bytes.extend_from_slice(&chunk[..read]),
            _ => break,
        }
    }
    let head_length = end(&bytes).unwrap_or(bytes.len());
    let rest = if bodies { bytes.split_off(head_length) } else { Vec::new() };
    let head = String::from_utf8_lossy(&bytes).into_owned();
    kept.lock().unwrap().push(head.clone());
    let mut body = rest;
    while bodies && body.len() < content_length(&head) {
        match stream.read(&mut chunk).await {
            Ok(read) if read > 0 => body.extend_from_slice(&chunk[..read]),
            _ => break,
        }
    }
    let answer = if bodies { tokio::task::block_in_place(|| answers(&head, &body)) } else { answers(&head, &body) };
    if answer.is_empty() {
        let _ = tokio::time::timeout(Duration::from_secs(60), stream.read(&mut chunk)).await;
        return;
    }
    let _ = stream.write_all(&answer).await;
    let _ = stream.shutdown().await;
}

/// A field of a request's head.
pub fn field<'h>(head: &'h str, name: &str) -> Option<&'h str> {
    let mut fields = head.lines().filter_map(|line| line.split_once(':'));
    fields.find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
}

fn content_length(head: &str) -> usize {
    field(head, "content-length").and_then(|value| value.parse().ok()).unwrap_or(0)
}
