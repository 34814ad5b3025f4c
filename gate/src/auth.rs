//! Who is calling: the lease, and the proof that the caller holds the key that the lease is bound to.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::hash;
use crate::store::{Freshness, ReplayStore, RevocationStore, StoreError};
use crate::time::Timestamp;

pub mod dpop;
mod htu;
pub mod jwk;
mod jwt;
pub mod lease;
pub mod operator;
pub mod operator_key;
pub mod peer;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use dpop::{Expected, MAX_SKEW_SECONDS, Proof, ProofError};
use lease::{Issuer, LeaseClaims, LeaseError};

/// How many verified leases are kept. Past it the cache begins anew: it saves time, and nothing depends on it.
const CACHED_LEASES: usize = 4096;

/// Why a caller is not who it should be.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    #[error("there is no Authorization header")]
    MissingHeader,
    #[error("there is more than one Authorization header")]
    SeveralHeaders,
    #[error("the Authorization header is not `DPoP` and one token")]
    Scheme,
    #[error(transparent)]
    InvalidLease(LeaseError),
    #[error("the lease has expired")]
    LeaseExpired,
    #[error("the lease was revoked")]
    LeaseRevoked,
    #[error(transparent)]
    InvalidDpop(#[from] ProofError),
    #[error("the proof was used before")]
    Replay,
    #[error("the proof could not be noted")]
    ReplayCache(#[source] StoreError),
    #[error("the revocations could not be read")]
    Store(#[source] StoreError),
    #[error("the clock was set back")]
    Clock,
    #[error("the listener gives its clients no identity")]
    IdentityUnauthenticated,
    #[error("the API key is not an operator's")]
    UnknownOperator,
    #[error("the peer's uid is not one that the listener serves")]
    IdentityForbidden,
}

impl AuthError {
    /// The error code of the contract.
    pub fn code(&self) -> &'static str {
        match self {
            Self::MissingHeader => "missing_auth_header",
            Self::SeveralHeaders | Self::Scheme | Self::InvalidLease(_) => "invalid_lease",
            Self::LeaseExpired => "lease_expired",
            Self::LeaseRevoked => "lease_revoked",
            Self::InvalidDpop(_) => "invalid_dpop",
            Self::Replay => "replay_detected",
            Self::ReplayCache(_) => "replay_cache_unavailable",
            Self::Store(_) => "store_unavailable",
            Self::Clock => "clock_error",
            Self::IdentityUnauthenticated | Self::UnknownOperator => "identity_unauthenticated",
            Self::IdentityForbidden => "identity_forbidden",
        }
    }

    /// What is wrong, in words that an agent may read: the rule, and no value of the gate's.
    pub fn deny_reason(&self) -> String {
        self.to_string()
    }
}

impl From<LeaseError> for AuthError {
    fn from(error: LeaseError) -> Self {
        match error {
            LeaseError::Expired => Self::LeaseExpired,
            other => Self::InvalidLease(other),
        }
    }
}

/// What a request says about its sender, as it came in.
#[derive(Clone, Copy, Debug)]
pub struct Presented<'a> {
    /// Every value of the header; two are one too many.
    pub authorization: &'a [&'a [u8]],
    pub dpop: &'a [&'a [u8]],
    pub method: &'a str,
    /// The request target's path.
    pub path: &'a str,
    /// The base URLs that this listener answers to.
    pub bases: &'a [String],
    pub listener: &'a str,
    pub require_body_binding: bool,
    pub now: Timestamp,
}

/// A caller whose lease and proof held. Only [`Authenticator::authenticate`] makes one.
#[derive(Clone, Debug)]
pub struct Authenticated {
    pub lease: Arc<LeaseClaims>,
    pub jkt: String,
    /// The proof's `request_hash`.
    pub body_claim: Option<String>,
    body_binding_required: bool,
}

impl Authenticated {
    /// Compares the proof's `request_hash` with that of the body. For execute only: no other route hashes its body.
    ///
    /// # Errors
    /// `invalid_dpop` when it is another, or absent where the listener asks for it.
    pub fn bind_body(&self, request_hash: &str) -> Result<(), AuthError> {
        match &self.body_claim {
            Some(claimed) if claimed == request_hash => Ok(()),
            Some(_) => Err(ProofError::BodyClaim.into()),
            None if self.body_binding_required => Err(ProofError::NoBodyClaim.into()),
            None => Ok(()),
        }
    }
}

/// Checks leases and proofs of agents.
pub struct Authenticator {
    issuer: Arc<Issuer>,
    replay: Arc<dyn ReplayStore>,
    revocations: Arc<dyn RevocationStore>,
    /// Leases whose signature was verified, by the SHA-256 of the token. Spares that one step; every other check of a
    /// lease, and every rule of a proof, is made again.
    verified: Mutex<HashMap<[u8; 32], Arc<LeaseClaims>>>,
    clock: Clock,
}

impl Authenticator {
    pub fn new(issuer: Arc<Issuer>, replay: Arc<dyn ReplayStore>, revocations: Arc<dyn RevocationStore>) -> Self {
        Self { issuer, replay, revocations, verified: Mutex::default(), clock: Clock::default() }
    }

    /// Who sent this request. Reads and writes the stores, which may wait for a disk.
    ///
    /// The `jti` is noted after every other rule of the proof held and before the body claim is compared, so that a
    /// proof that was seen once is spent.
    ///
    /// # Errors
    /// The first check that fails: header, lease, revocation, proof, `jti`.
    pub fn authenticate(&self, request: &Presented<'_>) -> Result<Authenticated, AuthError> {
        self.clock.check(request.now)?;
        let token = dpop_token(request.authorization)?.ok_or(AuthError::Scheme)?;
        let lease = self.verified_lease(token, request.now)?;
        self.issuer.check(&lease, request.listener, request.now)?;
        let revoked = self.revocations.is_revoked(&lease.lease_jti, &lease.principal, lease.issued_at());
        if revoked.map_err(AuthError::Store)? {
            return Err(AuthError::LeaseRevoked);
        }
        // Proofs of a lease that this run issued cannot be older than this run's memory of them.
        let in_this_run = self.issuer.issued_in_this_run(&lease);
        let proof = Proof::verify(
            request.dpop,
            &Expected {
                method: request.method,
                path: request.path,
                bases: request.bases,
                token,
                jkt: lease.jkt(),
                now: request.now,
                not_before: if in_this_run { None } else { self.replay.not_before() },
            },
        )?;
        remember(self.replay.as_ref(), lease.jkt(), &proof, request.now)?;
        Ok(Authenticated {
            jkt: lease.jkt().to_owned(),
            body_claim: proof.body_claim().map(str::to_owned),
            body_binding_required: request.require_body_binding,
            lease,
        })
    }

    fn verified_lease(&self, token: &[u8], now: Timestamp) -> Result<Arc<LeaseClaims>, AuthError> {
        let digest = hash::sha256(token);
        if let Some(lease) = self.verified.lock().unwrap_or_else(PoisonError::into_inner).get(&digest) {
            return Ok(Arc::clone(lease));
        }
        let lease = Arc::new(self.issuer.verify_signature(token, now)?);
        let mut verified = self.verified.lock().unwrap_or_else(PoisonError::into_inner);
        if verified.len() >= CACHED_LEASES {
            verified.clear();
        }
        verified.insert(digest, Arc::clone(&lease));
        Ok(lease)
    }
}

/// Notices a clock that was set back: proofs that were forgotten, and leases that ran out, would be good again.
#[derive(Debug)]
struct Clock {
    latest_ms: AtomicI64,
}

impl Default for Clock {
    fn default() -> Self {
        Self { latest_ms: AtomicI64::new(0) }
    }
}

impl Clock {
    fn check(&self, now: Timestamp) -> Result<(), AuthError> {
        let latest = self.latest_ms.fetch_max(now.millis(), Ordering::Relaxed);
        if now.millis() <= 0 || now.millis() < latest.saturating_sub(MAX_SKEW_SECONDS * 1000) {
            return Err(AuthError::Clock);
        }
        Ok(())
    }
}

/// The token of the one `Authorization: DPoP <token>` header; `None` for another scheme or shape.
fn dpop_token<'a>(headers: &[&'a [u8]]) -> Result<Option<&'a [u8]>, AuthError> {
    let header = match headers {
        [] => return Err(AuthError::MissingHeader),
        [one] => *one,
        _ => return Err(AuthError::SeveralHeaders),
    };
    let Some((scheme, token)) = header.split_at_checked(4) else { return Ok(None) };
    let spaces = token.iter().take_while(|&&byte| byte == b' ').count();
    let token = token.get(spaces..).unwrap_or_default();
    // RFC 9110 §11.2: token68 behind one or more spaces; the scheme's case does not matter.
    let shaped = spaces > 0 && !token.is_empty() && token.iter().all(|byte| byte.is_ascii_graphic() && *byte != b',');
    Ok((scheme.eq_ignore_ascii_case(b"DPoP") && shaped).then_some(token))
}

fn remember(replay: &dyn ReplayStore, jkt: &str, proof: &Proof, now: Timestamp) -> Result<(), AuthError> {
    match replay.remember(jkt, proof.jti(), proof.remember_until(), now) {
        Ok(Freshness::Fresh) => Ok(()),
        Ok(Freshness::Seen) => Err(AuthError::Replay),
        Err(error) => Err(AuthError::ReplayCache(error)),
    }
}
