//! Leases: short-lived ES256 JWTs (RFC 7519) that bind a principal, a gate and a listener to a client's key.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::jwt::Compact;
use crate::ids;
use crate::time::Timestamp;

mod keys;
mod request;
#[cfg(test)]
mod tests;

pub use keys::{KeyError, LeaseKeys};
pub use request::{LeaseRequest, LeaseRequestError};

/// How long a lease is good for unless configured otherwise, in seconds.
pub const DEFAULT_TTL_SECONDS: u32 = 300;
/// The longest that it may be configured, in seconds.
pub const MAX_TTL_SECONDS: u32 = 3600;
/// The longest lease that is read.
pub const MAX_LEASE_BYTES: usize = 16 * 1024;

/// The limits that a client sets its own lease. Absent means none of that kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Budgets {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_calls: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_cost_usd_cents: Option<u64>,
}

/// Confirmation claim (RFC 7800, RFC 9449 §6).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confirmation {
    /// Thumbprint of the key that the lease is bound to.
    pub jkt: String,
}

/// The claims of a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseClaims {
    pub iss: String,
    /// The gate that takes this lease.
    pub aud: String,
    #[serde(rename = "sub")]
    pub principal: String,
    /// The listener that takes this lease.
    pub listener: String,
    /// Seconds since the epoch, as `nbf` and `iat`.
    pub exp: i64,
    pub nbf: i64,
    pub iat: i64,
    #[serde(rename = "jti")]
    pub lease_jti: String,
    pub session_id: String,
    pub scope: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budgets: Option<Budgets>,
    pub cnf: Confirmation,
    /// Which run of a gate issued it: see [`LeaseKeys::run`].
    pub run: String,
}

impl LeaseClaims {
    pub fn issued_at(&self) -> Timestamp {
        Timestamp::from_secs(self.iat)
    }

    pub fn expires_at(&self) -> Timestamp {
        Timestamp::from_secs(self.exp)
    }

    pub fn jkt(&self) -> &str {
        &self.cnf.jkt
    }
}

/// Why a lease is not one of ours, or not for here and now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LeaseError {
    #[error("the lease is not a well-formed JWT")]
    Malformed,
    #[error("the lease's header is not one that this gate writes")]
    Header,
    #[error("the lease is signed with a key that this gate does not know")]
    UnknownKey,
    #[error("the lease's signature does not verify")]
    Signature,
    #[error("the lease's claims are not complete")]
    Claims,
    #[error("the lease is of another issuer")]
    Issuer,
    #[error("the lease is for another gate")]
    Audience,
    #[error("the lease is for another listener")]
    Listener,
    #[error("the lease is not valid yet")]
    NotYet,
    #[error("the lease lives longer than this gate allows")]
    TooLong,
    #[error("the lease has expired")]
    Expired,
}

/// What a lease is issued for.
#[derive(Clone, Debug)]
pub struct NewLease {
    pub principal: String,
    pub listener: String,
    /// Kept over a renewal; a new one when absent.
    pub session_id: Option<String>,
    /// Thumbprint of the client's key.
    pub jkt: String,
    pub scopes: Vec<String>,
    pub budgets: Option<Budgets>,
}

/// The answer to `POST /v1/leases`.
#[derive(Clone, Debug, Serialize)]
pub struct IssuedLease {
    pub lease_jwt: String,
    pub session_id: String,
    pub lease_jti: String,
    /// `YYYY-MM-DDTHH:MM:SSZ`.
    pub expires_at: String,
}

/// Why a lease was not issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    #[error("a lease's time to live is 1 to {MAX_TTL_SECONDS} seconds, not {0}")]
    Ttl(u32),
    #[error("the clock stands before 1970")]
    Clock,
    #[error("the lease could not be signed")]
    Sign,
    #[error("the lease would be longer than {MAX_LEASE_BYTES} bytes")]
    TooLong,
}

/// Issues leases of one gate, and reads its own back.
#[derive(Debug)]
pub struct Issuer {
    keys: Arc<LeaseKeys>,
    issuer: String,
    gate: String,
    ttl_seconds: u32,
}

impl Issuer {
    /// `issuer` is the `iss` of every lease, `gate` its `aud`.
    ///
    /// # Errors
    /// For a time to live of 0 or above the ceiling.
    pub fn new(keys: Arc<LeaseKeys>, issuer: &str, gate: &str, ttl_seconds: u32) -> Result<Self, IssueError> {
        if ttl_seconds == 0 || ttl_seconds > MAX_TTL_SECONDS {
            return Err(IssueError::Ttl(ttl_seconds));
        }
        Ok(Self { keys, issuer: issuer.to_owned(), gate: gate.to_owned(), ttl_seconds })
    }

    /// Signs a lease that is good from `now` on.
    ///
    /// # Errors
    /// When the clock or the signer fails, or the lease would be too long to be sent back in a header.
    pub fn issue(&self, new: &NewLease, now: Timestamp) -> Result<IssuedLease, IssueError> {
        let iat = now.secs();
        if iat <= 0 {
            return Err(IssueError::Clock);
        }
        let claims = LeaseClaims {
            iss: self.issuer.clone(),
            aud: self.gate.clone(),
            principal: new.principal.clone(),
            listener: new.listener.clone(),
            exp: iat.saturating_add(i64::from(self.ttl_seconds)),
            nbf: iat,
            iat,
            lease_jti: ids::mint(),
            session_id: new.session_id.clone().unwrap_or_else(ids::mint),
            scope: new.scopes.clone(),
            budgets: new.budgets.clone(),
            cnf: Confirmation { jkt: new.jkt.clone() },
            run: self.keys.run().to_owned(),
        };
        let header = json!({"typ": "JWT", "alg": "ES256", "kid": self.keys.kid()});
        let payload = serde_json::to_value(&claims).map_err(|_| IssueError::Sign)?;
        let lease_jwt = self.keys.sign(&header, &payload).ok_or(IssueError::Sign)?;
        if lease_jwt.len() > MAX_LEASE_BYTES {
            return Err(IssueError::TooLong);
        }
        Ok(IssuedLease {
            lease_jwt,
            expires_at: claims.expires_at().to_seconds_string(),
            session_id: claims.session_id,
            lease_jti: claims.lease_jti,
        })
    }

    /// The claims of a lease that this gate, or one with the same key, signed. Whether it is for here and now is
    /// [`Issuer::check`]'s to say.
    ///
    /// # Errors
    /// For whatever does not read or verify.
    pub fn verify_signature(&self, token: &[u8], now: Timestamp) -> Result<LeaseClaims, LeaseError> {
        let jwt = Compact::decode(token, MAX_LEASE_BYTES).map_err(|_| LeaseError::Malformed)?;
        let text = |name: &str| jwt.header.get(name).and_then(Value::as_str);
        if text("typ") != Some("JWT") || text("alg") != Some("ES256") || !jwt.header_names(&["typ", "alg", "kid"]) {
            return Err(LeaseError::Header);
        }
        let key = text("kid").and_then(|kid| self.keys.public(kid, now)).ok_or(LeaseError::UnknownKey)?;
        if !key.verifies(jwt.signed, &jwt.signature) {
            return Err(LeaseError::Signature);
        }
        serde_json::from_value(Value::Object(jwt.payload)).map_err(|_| LeaseError::Claims)
    }

    /// Whether a lease is of this issuer, for this gate and this listener, and good at `now`: no leeway, since the
    /// clock that set the times is the one that checks them.
    ///
    /// # Errors
    /// The first thing that is wrong; that it has expired comes last.
    pub fn check(&self, claims: &LeaseClaims, listener: &str, now: Timestamp) -> Result<(), LeaseError> {
        if claims.iss != self.issuer {
            return Err(LeaseError::Issuer);
        }
        if claims.aud != self.gate {
            return Err(LeaseError::Audience);
        }
        if claims.listener != listener {
            return Err(LeaseError::Listener);
        }
        if claims.exp.saturating_sub(claims.iat) > i64::from(MAX_TTL_SECONDS) {
            return Err(LeaseError::TooLong);
        }
        if Timestamp::from_secs(claims.nbf) > now || claims.issued_at() > now {
            return Err(LeaseError::NotYet);
        }
        if claims.expires_at() <= now {
            return Err(LeaseError::Expired);
        }
        Ok(())
    }

    /// Whether this very process issued the lease.
    pub fn issued_in_this_run(&self, claims: &LeaseClaims) -> bool {
        claims.run == self.keys.run()
    }
}
