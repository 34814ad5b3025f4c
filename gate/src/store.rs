//! What the gate remembers, one trait a need.

use crate::time::Timestamp;

/// Why the store gave no answer. Callers deny.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A bound was reached.
    #[error("full")]
    Full,
    /// The store could not be read or written.
    #[error("unavailable: {0}")]
    Unavailable(String),
}

/// Whether a `jti` was new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    Fresh,
    Seen,
}

/// The proofs that were used.
pub trait ReplayStore: Send + Sync {
    /// Notes `jti` under the key with thumbprint `jkt` until `expires`, and says whether it was there.
    ///
    /// # Errors
    /// When it could not be noted; the proof is then not to be accepted.
    fn remember(&self, jkt: &str, jti: &str, expires: Timestamp, now: Timestamp) -> Result<Freshness, StoreError>;

    /// When this set began, where older proofs may have been used without a record.
    fn not_before(&self) -> Option<Timestamp>;
}

/// The leases that were taken back.
pub trait RevocationStore: Send + Sync {
    /// Whether this lease, its principal, or every lease of its time was revoked.
    ///
    /// # Errors
    /// When it could not be read; the lease is then not to be accepted.
    fn is_revoked(&self, lease_jti: &str, principal: &str, iat: Timestamp) -> Result<bool, StoreError>;
}
