//! From a parsed target to a connected socket: the profile, one look-up, every address checked, and then a dial to an
//! address that was checked.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::ProxyError;
use super::count::Counted;
use super::reply::Reply;
use super::request::Target;
use super::session::Connection;
use crate::egress::address::{AllowAddresses, Host, Refused, class_of, classify};
use crate::egress::profile::{Denied, DenyReason, EntryProtocol, Profile};
use crate::egress::resolver::Resolver;

/// Addresses of one name that are tried, in the order of the answer.
const MAX_TRIES: usize = 4;

/// Where a target may be dialled, and what may be said there.
#[derive(Clone, Debug)]
pub struct Permit {
    pub addresses: Vec<SocketAddr>,
    pub protocol: EntryProtocol,
    /// Empty: all.
    pub methods: Vec<String>,
    /// Set when no entry permits it, and it is let through and recorded.
    pub would_deny: Option<DenyReason>,
}

impl Permit {
    /// Notes on whose word it is let through.
    pub fn note(&self, connection: &Connection) {
        if let Some(reason) = self.would_deny {
            connection.audited(reason);
        }
    }

    /// # Errors
    /// The answer that the client gets.
    pub fn allows_method(&self, method: &str) -> Result<(), Reply> {
        if self.methods.is_empty() || self.methods.iter().any(|allowed| allowed == method) {
            return Ok(());
        }
        let message = format!("the profile of this action does not permit {method} for this name");
        Err(Reply::denied(DenyReason::MethodNotAllowed.as_str(), message))
    }
}

/// What connects for the proxy; nothing else of the gate connects for a sandbox.
pub struct Dialer {
    resolver: Resolver,
    allow: AllowAddresses,
    tls: TlsConnector,
    /// For one address, and for a TLS handshake.
    timeout: Duration,
}

impl Dialer {
    pub fn new(
        resolver: Resolver,
        allow: AllowAddresses,
        ca_file: Option<&Path>,
        timeout: Duration,
    ) -> Result<Self, ProxyError> {
        Ok(Self { resolver, allow, tls: connector(ca_file)?, timeout })
    }

    /// Decides where the target may be dialled: name and port by the profile, then every address of the name.
    ///
    /// # Errors
    /// The answer that the client gets.
    pub async fn authorise(&self, profile: &Profile, target: &Target) -> Result<Permit, Reply> {
        let Target { host, port, .. } = target;
        let denied = |denied: Denied| {
            Reply::denied(
                denied.reason.to_string(),
                format!("the profile of this action does not permit {}:{port}", host.to_authority()),
            )
        };
        let not_public = |refused: Refused| Reply::Denied {
            reason: "address_not_public".to_owned(),
            detail: Some(refused.class),
            message: format!("{} has an address that is not public ({})", host.to_authority(), refused.class),
        };
        match host {
            Host::Address(address) => {
                let entry = profile.permits_address(*address, *port).map_err(denied)?;
                let (network, prefix) = entry.network();
                self.allow
                    .check(*address)
                    .or_else(
                        |refused| {
                            if class_of(network, prefix) == Some(refused.class) { Ok(()) } else { Err(refused) }
                        },
                    )
                    .map_err(not_public)?;
                let addresses = vec![SocketAddr::new(address.to_canonical(), *port)];
                Ok(Permit { addresses, protocol: entry.protocol(), methods: Vec::new(), would_deny: None })
            }
            Host::Name(name) => {
                let (protocol, methods, would_deny) = match profile.permits(name, *port) {
                    Ok(entry) => (entry.protocol(), entry.methods().to_vec(), None),
                    Err(_) => {
                        let reason = profile.audits(name, *port).map_err(denied)?;
                        (EntryProtocol::Auto, Vec::new(), Some(reason))
                    }
                };
                let found = self.resolver.resolve(name).await;
                let addresses = found.map_err(|error| Reply::failed(error.code(), error.to_string()))?;
                for &address in &addresses {
                    // What the configuration opens besides is opened for entries that somebody wrote.
                    let checked = if would_deny.is_some() { classify(address) } else { self.allow.check(address) };
                    checked.map_err(not_public)?;
                }
                Ok(Permit {
                    // A mapped address is dialled as what it was checked as.
                    addresses: addresses
                        .into_iter()
                        .map(|address| SocketAddr::new(address.to_canonical(), *port))
                        .collect(),
                    protocol,
                    methods,
                    would_deny,
                })
            }
        }
    }

    /// Connects to the first of the checked addresses that answers; `trying` hears of each before it is tried.
    ///
    /// # Errors
    /// The answer that the client gets, for the last address that was tried.
    pub async fn connect(&self, addresses: &[SocketAddr], trying: impl Fn(IpAddr)) -> Result<TcpStream, Reply> {
        let mut outcome = Reply::failed("connect_failed", "the name has no address");
        for &address in addresses.iter().take(MAX_TRIES) {
            trying(address.ip());
            match timeout(self.timeout, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) => outcome = Reply::failed(connect_reason(&error), "the connection was not accepted"),
                Err(_) => outcome = Reply::failed("connect_timeout", "the connection was not answered in time"),
            }
        }
        Err(outcome)
    }

    /// Makes TLS to the origin and verifies that it is the host that was asked for (RFC 9525).
    ///
    /// # Errors
    /// The answer that the client gets.
    pub async fn secure(&self, stream: Counted, host: &Host) -> Result<TlsStream<Counted>, Reply> {
        let name = match host {
            Host::Name(name) => ServerName::try_from(name.clone())
                .map_err(|_| Reply::failed("tls_name", "no certificate can be for this name"))?,
            Host::Address(address) => ServerName::from(*address),
        };
        match timeout(self.timeout, self.tls.connect(name, stream)).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => Err(tls_failure(&error)),
            Err(_) => Err(Reply::failed("tls_timeout", "the TLS handshake was not finished in time")),
        }
    }
}

fn connect_reason(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connect_refused",
        io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable => "connect_unreachable",
        io::ErrorKind::TimedOut => "connect_timeout",
        _ => "connect_failed",
    }
}

fn tls_failure(error: &io::Error) -> Reply {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match inner {
        Some(rustls::Error::InvalidCertificate(why)) => {
            Reply::failed("tls_certificate", format!("the certificate was refused: {why}"))
        }
        Some(rustls::Error::NoCertificatesPresented) => {
            Reply::failed("tls_certificate", "the origin presented no certificate")
        }
        _ => Reply::failed("tls_failed", "the TLS handshake failed"),
    }
}

/// Roots are those of the file if there is one, and otherwise those of the system.
fn connector(ca_file: Option<&Path>) -> Result<TlsConnector, ProxyError> {
    let mut roots = rustls::RootCertStore::empty();
    match ca_file {
        Some(path) => {
            let unusable = |why: String| ProxyError::CaFile { path: path.to_owned(), why };
            let certificates: Vec<_> = CertificateDer::pem_file_iter(path)
                .and_then(Iterator::collect)
                .map_err(|error: rustls::pki_types::pem::Error| unusable(error.to_string()))?;
            if certificates.is_empty() {
                return Err(unusable("there is no certificate in it".to_owned()));
            }
            for certificate in certificates {
                roots.add(certificate).map_err(|error| unusable(error.to_string()))?;
            }
        }
        None => {
            let found = rustls_native_certs::load_native_certs();
            let (added, _) = roots.add_parsable_certificates(found.certs);
            if added == 0 {
                tracing::warn!("no system root certificates: every https origin will be refused");
            }
        }
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| ProxyError::Tls(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    // Tickets would tie one execution to another at the origin.
    config.resumption = rustls::client::Resumption::disabled();
    Ok(TlsConnector::from(Arc::new(config)))
}
