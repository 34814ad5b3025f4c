//! Shared harness of the black-box suites: the real binary, real sockets, real keys, and clients that can be as wrong
//! as an attacker likes.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::missing_panics_doc)]

pub mod agent;
pub mod bundle;
pub mod gate;
pub mod http;
pub mod inside;
pub mod operator;
pub mod origin;
pub mod session;
pub mod storm;

use base64::Engine as _;

/// base64url without padding (RFC 7515 §2).
pub fn base64url(bytes: impl AsRef<[u8]>) -> String {
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes)
}

/// SHA-256.
pub fn sha256(bytes: impl AsRef<[u8]>) -> [u8; 32] {
    use sha2::Digest as _;
    sha2::Sha256::digest(bytes.as_ref()).into()
}

/// Lower-case hex.
pub fn hex(bytes: impl AsRef<[u8]>) -> String {
    bytes.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Seconds since the epoch.
pub fn now() -> i64 {
    i64::try_from(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()).unwrap()
}

/// Says why a test does not run here. In CI that is a failure: what CI skips, nobody runs.
pub fn skip(reason: &str) {
    assert!(std::env::var_os("CI").is_none(), "skipped in CI: {reason}");
    eprintln!("SKIPPED: {reason}");
}
