//! Compact JWTs (RFC 7515 §3.1), read strictly: a token that two readers could take for two is none.

use serde_json::{Map, Value};

use super::jwk::from_base64url;
use crate::action::canonical::{StrictError, parse_strict};

/// Why a token could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JwtError {
    #[error("longer than {0} bytes")]
    TooLong(usize),
    #[error("not three segments of base64url without padding")]
    Segments,
    #[error("a segment is not plain JSON: {0}")]
    Json(#[from] StrictError),
}

/// A token in its parts. Nothing is verified yet.
pub struct Compact<'a> {
    pub header: Map<String, Value>,
    pub payload: Map<String, Value>,
    pub signature: Vec<u8>,
    /// What the signature covers: the first two segments and the dot between them (RFC 7515 §5.2).
    pub signed: &'a [u8],
}

impl<'a> Compact<'a> {
    /// Splits and decodes `token`.
    ///
    /// # Errors
    /// For other than three segments of canonical base64url, or a header or payload with duplicate names.
    pub fn decode(token: &'a [u8], max_bytes: usize) -> Result<Self, JwtError> {
        if token.len() > max_bytes {
            return Err(JwtError::TooLong(max_bytes));
        }
        let mut segments = token.split(|&byte| byte == b'.');
        let (Some(header), Some(payload), Some(signature), None) =
            (segments.next(), segments.next(), segments.next(), segments.next())
        else {
            return Err(JwtError::Segments);
        };
        let decode = |segment: &[u8]| from_base64url(segment).ok_or(JwtError::Segments);
        Ok(Self {
            header: parse_strict(&decode(header)?)?,
            payload: parse_strict(&decode(payload)?)?,
            signature: decode(signature)?,
            signed: token.get(..header.len() + 1 + payload.len()).ok_or(JwtError::Segments)?,
        })
    }

    /// Whether the header has exactly these members, so that nothing in it (`crit`, `b64`, `zip`) asks for a reading
    /// that is not made.
    pub fn header_names(&self, names: &[&str]) -> bool {
        self.header.len() == names.len() && names.iter().all(|name| self.header.contains_key(*name))
    }
}
