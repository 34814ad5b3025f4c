//! What a gate must remember between calls so that nobody gets more than was decided: proofs already used, leases
//! revoked, budgets spent.
//!
//! One trait a need, so that a shared store can stand in for one without touching the others. Every method fails
//! closed: an error is a refusal at the caller, never "not found". Times come from the caller.

use serde::Serialize;
use thiserror::Error;

use crate::time::Timestamp;

pub mod database;
pub mod lock;
pub mod sqlite;

/// Proofs of possession that were already used (RFC 9449 §11.1).
pub trait ReplayStore: Send + Sync {
    /// Remembers `jti` for the key with thumbprint `jkt` until `expires`, and says whether it was new. When this
    /// returns [`Freshness::Fresh`], the jti is kept across the death of this process.
    ///
    /// # Errors
    /// [`StoreError::Full`] when this key has its share of live proofs; [`StoreError::Clock`] when `now` lies before a
    /// time that was seen earlier; anything else when the store cannot answer. All of them mean: refuse.
    fn remember(&self, jkt: &str, jti: &str, expires: Timestamp, now: Timestamp) -> Result<Freshness, StoreError>;

    /// Set when proofs may have been used that this store does not know of (a fresh file, a machine that went down
    /// without writing back): a proof whose `iat` is not later than this plus the tolerated skew must be refused.
    fn not_before(&self) -> Option<Timestamp>;
}

/// Whether a proof was seen before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    Fresh,
    Seen,
}

/// Leases that are no longer good, though their signature and their time are.
pub trait RevocationStore: Send + Sync {
    /// Whether a lease with this id, of this principal, issued at `iat`, has been revoked: by itself, with all leases
    /// of the principal up to a time, or with all leases up to a time.
    fn is_revoked(&self, lease_jti: &str, principal: &str, iat: Timestamp) -> Result<bool, StoreError>;

    /// Revokes one lease. The entry is kept until `keep_until`, which must not lie before the lease's end; who does not
    /// know that end gives `now` plus the ceiling of a lease's life.
    fn revoke_lease(&self, lease_jti: &str, keep_until: Timestamp, now: Timestamp) -> Result<(), StoreError>;

    /// Revokes every lease of `principal` that was issued up to the second of `now`. What is issued later is good.
    fn revoke_principal(&self, principal: &str, now: Timestamp) -> Result<(), StoreError>;

    /// Revokes every lease that was issued up to the second of `now`, and begins the next epoch.
    fn revoke_all(&self, now: Timestamp) -> Result<Epoch, StoreError>;

    fn epoch(&self) -> Result<Epoch, StoreError>;
}

/// How often everything has been revoked, and when last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Epoch {
    pub number: u64,
    /// Leases issued up to the second of this time are void. `None` before the first `revoke_all`.
    pub revoked_at: Option<Timestamp>,
}

/// What principals and leases have spent.
pub trait BudgetStore: Send + Sync {
    /// What is left, the tightest of all budgets of `request`; its cost plays no part.
    fn remaining(&self, request: &DebitRequest) -> Result<Remaining, StoreError>;

    /// Takes one call and its cost from every budget of `request`, or from none.
    fn debit(&self, request: &DebitRequest) -> Result<DebitOutcome, StoreError>;

    /// Gives back what `ticket` took, once. False when it was given back before or is older than a day.
    fn refund(&self, ticket: &Ticket) -> Result<bool, StoreError>;
}

/// The span that an operator's budget is counted in: fixed windows in UTC, so that every replica agrees on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Period {
    Hour,
    Day,
    /// A calendar month.
    Month,
    /// Windows of so many seconds, counted from the Unix epoch. Zero is refused.
    Seconds(u64),
}

/// One of the operator's budgets for a principal. Nothing that a client sends refills it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// What the operator calls it; it names the budget that ran out.
    pub name: String,
    pub period: Period,
    pub max_calls: Option<u64>,
    pub max_cost_usd_cents: Option<u64>,
}

/// The limit that a lease set itself; gone with the lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseBudget {
    pub lease_jti: String,
    pub max_calls: Option<u64>,
    pub max_cost_usd_cents: Option<u64>,
    /// When the lease ends; what it spent is forgotten some time later.
    pub expires: Timestamp,
}

/// One call that wants to be paid for.
#[derive(Clone, Debug)]
pub struct DebitRequest {
    pub principal: String,
    pub operator: Vec<Window>,
    pub lease: Option<LeaseBudget>,
    pub cost_usd_cents: u64,
    pub now: Timestamp,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DebitOutcome {
    Debited {
        ticket: Ticket,
        /// What is left after this call.
        remaining: Remaining,
    },
    Exhausted {
        /// The window's name, or `lease`.
        which: String,
    },
}

/// What is left, in the words of a result's `budget`. A field is absent when nothing limits it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Remaining {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calls_remaining: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost_remaining_usd_cents: Option<u64>,
}

impl Remaining {
    /// A budget at zero refuses every call, the ones that cost nothing included.
    pub fn is_exhausted(&self) -> bool {
        self.calls_remaining == Some(0) || self.cost_remaining_usd_cents == Some(0)
    }

    fn tighten(&mut self, other: Self) {
        let tighter = |a: Option<u64>, b: Option<u64>| a.into_iter().chain(b).min();
        self.calls_remaining = tighter(self.calls_remaining, other.calls_remaining);
        self.cost_remaining_usd_cents = tighter(self.cost_remaining_usd_cents, other.cost_remaining_usd_cents);
    }
}

/// Proof of one debit, good for one refund.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ticket(String);

#[derive(Debug, Error)]
pub enum StoreError {
    #[error("this key has as many live proofs as one key may have")]
    Full,
    #[error("the clock went back: {now} is before {seen}, which this store has seen")]
    Clock { now: Timestamp, seen: Timestamp },
    #[error("not a budget: {0}")]
    Invalid(String),
    #[error("a thread died while it held the store")]
    Poisoned,
    #[error(transparent)]
    Open(#[from] database::OpenError),
    #[error("the store failed: {0}")]
    Database(#[from] rusqlite::Error),
}
