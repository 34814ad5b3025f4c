//! DPoP proofs (RFC 9449): every rule of §4.3, on every request.

use serde_json::Value;
use subtle::ConstantTimeEq as _;

use super::htu;
use super::jwk::{JwkError, PublicJwk, base64url};
use super::jwt::{Compact, JwtError};
use crate::hash;
use crate::time::Timestamp;

/// The longest proof that is read. One of the published client has about 700 bytes.
pub const MAX_PROOF_BYTES: usize = 4096;
/// How old a proof may be.
pub const MAX_AGE_SECONDS: i64 = 60;
/// How far a client's clock may be ahead.
pub const MAX_SKEW_SECONDS: i64 = 5;
/// The longest `jti`, in characters.
pub const MAX_JTI_CHARS: usize = 256;

/// Which rule a proof broke. What it prints is for the client: it names the rule and no value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProofError {
    #[error("there is no DPoP header")]
    Missing,
    #[error("there is more than one DPoP header")]
    Several,
    #[error("the proof is not a well-formed JWT: {0}")]
    Malformed(#[from] JwtError),
    #[error("the proof's typ is not dpop+jwt")]
    Typ,
    #[error("the proof's alg is not ES256")]
    Alg,
    #[error("the proof's header has members other than typ, alg and jwk")]
    Header,
    #[error("{0}")]
    Jwk(#[from] JwkError),
    #[error("the proof's signature does not verify")]
    Signature,
    #[error("the claim {0} is missing or has another type")]
    Claim(&'static str),
    #[error("the proof's key is not the one that the lease is bound to")]
    Key,
    #[error("htm is not the request's method")]
    Htm,
    #[error("htu is not the request's URI")]
    Htu,
    #[error("iat is too old")]
    Stale,
    #[error("iat is in the future")]
    Future,
    #[error("iat is before the gate began to remember proofs: try again in a few seconds")]
    BeforeStart,
    #[error("ath is not the hash of the access token")]
    Ath,
    #[error("jti is empty or longer than 256 characters")]
    Jti,
    #[error("request_hash is not the hash of the request's body")]
    BodyClaim,
    #[error("this gate asks for a request_hash claim")]
    NoBodyClaim,
}

/// What the proof of one request has to say.
#[derive(Clone, Copy, Debug)]
pub struct Expected<'a> {
    pub method: &'a str,
    /// The request target; query and fragment do not count.
    pub path: &'a str,
    /// The base URLs that the listener answers to. The Host header takes no part.
    pub bases: &'a [String],
    /// The access token, as it was sent.
    pub token: &'a [u8],
    /// The thumbprint that the token is bound to.
    pub jkt: &'a str,
    pub now: Timestamp,
    /// Set where proofs made before this time may have been used without a record.
    pub not_before: Option<Timestamp>,
}

/// A proof that kept every rule but freshness of its `jti`, which only the store can tell.
#[derive(Clone, Debug)]
pub struct Proof {
    key: PublicJwk,
    jti: String,
    iat: Timestamp,
    body_claim: Option<String>,
}

impl Proof {
    /// Checks the values of a request's `DPoP` headers.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn verify(headers: &[&[u8]], expected: &Expected<'_>) -> Result<Self, ProofError> {
        //= RFC 9449 §4.3 (1) not more than one DPoP header field
        let proof = match headers {
            [] => return Err(ProofError::Missing),
            [one] => one,
            _ => return Err(ProofError::Several),
        };
        //= RFC 9449 §4.3 (2) a single well-formed JWT
        let jwt = Compact::decode(proof, MAX_PROOF_BYTES)?;
        //= RFC 9449 §4.3 (4) the typ
        if jwt.header.get("typ").and_then(Value::as_str) != Some("dpop+jwt") {
            return Err(ProofError::Typ);
        }
        //= RFC 9449 §4.3 (5) an asymmetric algorithm that is supported
        if jwt.header.get("alg").and_then(Value::as_str) != Some("ES256") {
            return Err(ProofError::Alg);
        }
        //= RFC 9449 §4.3 (7) no private key in the jwk
        let key = PublicJwk::parse(jwt.header.get("jwk").unwrap_or(&Value::Null))?;
        if !jwt.header_names(&["typ", "alg", "jwk"]) {
            return Err(ProofError::Header);
        }
        //= RFC 9449 §4.3 (6) the signature verifies with the jwk
        if !key.verifies(jwt.signed, &jwt.signature) {
            return Err(ProofError::Signature);
        }
        //= RFC 9449 §4.3 (12) the key that the token is bound to
        if !bool::from(key.thumbprint().as_bytes().ct_eq(expected.jkt.as_bytes())) {
            return Err(ProofError::Key);
        }
        //= RFC 9449 §4.3 (3) all required claims
        let text = |name: &'static str| jwt.payload.get(name).and_then(Value::as_str).ok_or(ProofError::Claim(name));
        let (jti, htm, htu, ath) = (text("jti")?, text("htm")?, text("htu")?, text("ath")?);
        let iat = jwt.payload.get("iat").and_then(Value::as_i64).ok_or(ProofError::Claim("iat"))?;
        let body_claim = match jwt.payload.get("request_hash") {
            None => None,
            Some(Value::String(hash)) => Some(hash.clone()),
            Some(_) => return Err(ProofError::Claim("request_hash")),
        };
        //= RFC 9449 §4.3 (8) htm
        if htm != expected.method {
            return Err(ProofError::Htm);
        }
        //= RFC 9449 §4.3 (9) htu, query and fragment ignored
        if !names_this_request(htu, expected) {
            return Err(ProofError::Htu);
        }
        //= RFC 9449 §4.3 (11) iat within an acceptable window
        check_time(iat, expected)?;
        //= RFC 9449 §4.3 (12) ath
        let hashed = base64url(&hash::sha256(expected.token));
        if !bool::from(hashed.as_bytes().ct_eq(ath.as_bytes())) {
            return Err(ProofError::Ath);
        }
        //= RFC 9449 §11.1 a bound on what is stored
        if jti.is_empty() || jti.chars().nth(MAX_JTI_CHARS).is_some() {
            return Err(ProofError::Jti);
        }
        Ok(Self { jti: jti.to_owned(), iat: Timestamp::from_secs(iat), body_claim, key })
    }

    /// The key that signed.
    pub fn key(&self) -> &PublicJwk {
        &self.key
    }

    pub fn jti(&self) -> &str {
        &self.jti
    }

    /// The `request_hash` claim, still to be compared with the body.
    pub fn body_claim(&self) -> Option<&str> {
        self.body_claim.as_deref()
    }

    /// From when on this proof would be refused for its age, with a margin for a clock that is set back a little: its
    /// `jti` has to be remembered until then.
    pub fn remember_until(&self) -> Timestamp {
        self.iat.plus_millis((MAX_AGE_SECONDS + 2 * MAX_SKEW_SECONDS + 1) * 1000)
    }
}

fn names_this_request(htu: &str, expected: &Expected<'_>) -> bool {
    let Some(claimed) = htu::normalise(htu) else { return false };
    expected.path.starts_with('/')
        && expected.bases.iter().any(|base| {
            let base = base.strip_suffix('/').unwrap_or(base);
            htu::normalise(&format!("{base}{}", expected.path)).is_some_and(|own| own == claimed)
        })
}

/// In whole seconds, as `iat` is.
fn check_time(iat: i64, expected: &Expected<'_>) -> Result<(), ProofError> {
    let now = expected.now.secs();
    if iat < now.saturating_sub(MAX_AGE_SECONDS) {
        return Err(ProofError::Stale);
    }
    if iat > now.saturating_add(MAX_SKEW_SECONDS) {
        return Err(ProofError::Future);
    }
    match expected.not_before {
        // A client whose clock is ahead may have used this proof before the gate began to remember.
        Some(start) if Timestamp::from_secs(iat) <= start.plus_millis(MAX_SKEW_SECONDS * 1000) => {
            Err(ProofError::BeforeStart)
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
