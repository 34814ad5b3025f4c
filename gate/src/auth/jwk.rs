//! Public P-256 keys as JSON Web Keys (RFC 7517), and ES256 (RFC 7518 §3.4) under them.

use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Map, Value, json};

use crate::hash;

/// Base64url without padding (RFC 7515 §2).
pub fn base64url(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Reads base64url back; `None` for padding, another alphabet, or unused bits that are not zero (RFC 4648 §3.5): one
/// text for one value.
pub fn from_base64url(text: impl AsRef<[u8]>) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(text).ok()
}

/// Why a JWK was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JwkError {
    #[error("the jwk is not an object")]
    NotAnObject,
    #[error("the jwk holds private key material")]
    Private,
    #[error("the jwk is not a P-256 key")]
    NotP256,
    #[error("the jwk is not meant for ES256 signatures")]
    OtherUse,
    #[error("a coordinate of the jwk is not 32 bytes in base64url")]
    Coordinate,
    #[error("the jwk's point is not on the curve")]
    OffCurve,
}

/// A public P-256 key whose point is on the curve.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct PublicJwk {
    /// SEC 1 §2.3.3, uncompressed: 0x04, x, y.
    point: [u8; 65],
}

impl PublicJwk {
    /// Checks a JWK that a client sent.
    ///
    /// # Errors
    /// For a key that is not a public P-256 key with a point on the curve. Members that say nothing about the key
    /// (`kid`, `ext`) are ignored.
    pub fn parse(value: &Value) -> Result<Self, JwkError> {
        let members = value.as_object().ok_or(JwkError::NotAnObject)?;
        // Members of private and symmetric keys: RFC 7518 §6.2.2, §6.3.2, §6.4.1.
        if ["d", "p", "q", "dp", "dq", "qi", "oth", "k"].iter().any(|name| members.contains_key(*name)) {
            return Err(JwkError::Private);
        }
        let text = |name: &str| members.get(name).and_then(Value::as_str);
        if text("kty") != Some("EC") || text("crv") != Some("P-256") {
            return Err(JwkError::NotP256);
        }
        if !suits_es256(members) {
            return Err(JwkError::OtherUse);
        }
        let coordinate = |name: &str| {
            text(name).and_then(from_base64url).filter(|bytes| bytes.len() == 32).ok_or(JwkError::Coordinate)
        };
        let mut point = vec![4];
        point.extend(coordinate("x")?);
        point.extend(coordinate("y")?);
        Self::from_sec1(&point).ok_or(JwkError::OffCurve)
    }

    /// A key from its uncompressed SEC 1 point; `None` if it is not one on the curve.
    pub fn from_sec1(bytes: &[u8]) -> Option<Self> {
        p256::PublicKey::from_sec1_bytes(bytes).ok()?;
        Some(Self { point: bytes.try_into().ok()? })
    }

    /// The members that RFC 7638 §3.2 counts for an EC key, and no others.
    pub fn to_value(&self) -> Value {
        json!({"kty": "EC", "crv": "P-256", "x": self.x(), "y": self.y()})
    }

    /// The SHA-256 JWK thumbprint (RFC 7638), base64url.
    pub fn thumbprint(&self) -> String {
        let canonical = format!(r#"{{"crv":"P-256","kty":"EC","x":"{}","y":"{}"}}"#, self.x(), self.y());
        base64url(&hash::sha256(canonical.as_bytes()))
    }

    /// Whether `signature` (r‖s, 64 bytes) is this key's ES256 signature over `message`.
    #[must_use]
    pub fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &self.point).verify(message, signature).is_ok()
    }

    fn x(&self) -> String {
        base64url(self.point.get(1..33).unwrap_or_default())
    }

    fn y(&self) -> String {
        base64url(self.point.get(33..).unwrap_or_default())
    }
}

impl std::fmt::Debug for PublicJwk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PublicJwk({})", self.thumbprint())
    }
}

/// `use`, `key_ops` and `alg` are optional; a key that names another purpose is not to be used for this one.
fn suits_es256(members: &Map<String, Value>) -> bool {
    let absent_or = |name: &str, wanted: &str| members.get(name).is_none_or(|value| value == wanted);
    let operations = members
        .get("key_ops")
        .is_none_or(|value| value.as_array().is_some_and(|operations| operations.iter().any(|one| one == "verify")));
    absent_or("use", "sig") && absent_or("alg", "ES256") && operations
}

#[cfg(test)]
mod tests;
