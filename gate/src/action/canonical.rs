//! JSON that two parties hash to the same value: the strict reading and the JCS form (RFC 8785).

use serde::Serialize;

use crate::hash;

mod strict;
#[cfg(test)]
mod tests;

pub use strict::{MAX_DEPTH, StrictError, parse_strict};

/// The JCS form (RFC 8785) of a value of ours.
///
/// # Errors
/// When the value cannot be JSON (a map with keys that are not strings, a number that is not finite).
pub fn jcs<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, serde_json::Error> {
    serde_jcs::to_vec(value)
}

/// `sha256:<hex>` over the JCS form of a call's params: the pipeline's request hash, and what a proof's body claim names.
///
/// The params are to come from [`parse_strict`]: only then do two different bodies have two different hashes.
///
/// # Errors
/// As [`jcs`]; never for what [`parse_strict`] returned.
pub fn request_hash<T: Serialize + ?Sized>(params: &T) -> Result<String, serde_json::Error> {
    Ok(hash::sha256_tagged(&jcs(params)?))
}
