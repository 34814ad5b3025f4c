//! The authority that the gate makes at each start, and the certificates that it gives to itself in the place of origins
//! whose entries say `tls: terminate`.
//!
//! Its key is made in memory, is written nowhere and dies with the gate. Sandboxes trust it, nothing else does; and what
//! it vouches for is only what the gate has reached and verified as ever.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};
use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::time::Instant;

use super::address::Host;

/// Certificates that are kept; one more throws all away.
const MAX_KEPT: usize = 1024;
/// How long one is given out again before a new one is made.
const KEPT_TIME: Duration = Duration::from_secs(24 * 3600);
/// Clocks inside and outside of a sandbox are one; this is for clients that ask for a past.
const BACKDATED: Duration = Duration::from_secs(24 * 3600);
const CERTIFICATE_TIME: Duration = Duration::from_secs(7 * 24 * 3600);
const AUTHORITY_TIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Why there is no authority, or no certificate.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("a certificate could not be made: {0}")]
    Certificate(#[from] rcgen::Error),
    #[error("TLS could not be set up: {0}")]
    Tls(#[from] rustls::Error),
}

/// The authority, and what it has given out.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    pem: String,
    /// One key for all certificates: it never leaves this process either.
    key: KeyPair,
    kept: Mutex<HashMap<Host, (Instant, Arc<ServerConfig>)>>,
}

impl Authority {
    /// # Errors
    /// [`AuthorityError`] when no key or certificate can be made.
    pub fn new() -> Result<Self, AuthorityError> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "LatchGate, this start's own authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        valid_for(&mut params, AUTHORITY_TIME);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?)?;
        let pem = issuer.pem();
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        Ok(Self { issuer, pem, key, kept: Mutex::default() })
    }

    /// The authority's certificate, for the trust bundle of a sandbox.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// What a server for this host is set up with.
    ///
    /// # Errors
    /// [`AuthorityError`] for a name that no certificate can have.
    pub fn config(&self, host: &Host) -> Result<Arc<ServerConfig>, AuthorityError> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((made, config)) = kept.get(host)
            && made.elapsed() < KEPT_TIME
        {
            return Ok(Arc::clone(config));
        }
        let config = Arc::new(self.make(host)?);
        if kept.len() >= MAX_KEPT {
            kept.clear();
        }
        kept.insert(host.clone(), (Instant::now(), Arc::clone(&config)));
        Ok(config)
    }

    fn make(&self, host: &Host) -> Result<ServerConfig, AuthorityError> {
        let mut params = CertificateParams::new(vec![host.to_string()])?;
        params.distinguished_name = DistinguishedName::new();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        valid_for(&mut params, CERTIFICATE_TIME);
        let certificate = params.signed_by(&self.key, &self.issuer)?;
        let chain = vec![CertificateDer::from(certificate), self.issuer.der().clone()];
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialize_der()));
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        // A ticket would let one execution be told from another, and nothing is gained by it here.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        Ok(config)
    }
}

fn valid_for(params: &mut CertificateParams, time: Duration) {
    let now = SystemTime::now();
    params.not_before = (now - BACKDATED).into();
    params.not_after = (now + time).into();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_are_kept_and_their_number_is_bounded() {
        let authority = Authority::new().unwrap();
        let name = |n: usize| Host::Name(format!("n{n}.test"));
        let first = authority.config(&name(0)).unwrap();
        assert!(Arc::ptr_eq(&first, &authority.config(&name(0)).unwrap()));
        for n in 0..=MAX_KEPT {
            authority.config(&name(n)).unwrap();
        }
        assert!(authority.kept.lock().unwrap().len() <= MAX_KEPT);
        assert!(!Arc::ptr_eq(&first, &authority.config(&name(0)).unwrap()));
        authority.config(&Host::Address("2001:db8::1".parse().unwrap())).unwrap();
    }

    #[test]
    fn each_start_has_its_own() {
        let (one, two) = (Authority::new().unwrap(), Authority::new().unwrap());
        assert!(one.pem().starts_with("-----BEGIN CERTIFICATE-----"));
        assert_ne!(one.pem(), two.pem());
    }
}
