//! JSON that two parties hash to the same value: the strict reading and the JCS form (RFC 8785).

use serde::Serialize;

/// The JCS form (RFC 8785) of a value of ours.
///
/// # Errors
/// When the value cannot be JSON (a map with keys that are not strings, a number that is not finite).
pub fn jcs<T: Serialize>(value: &T) -> Result<Vec<u8>, serde_json::Error> {
    serde_jcs::to_vec(value)
}
