//! The embedded store: two SQLite files in a directory that one gate owns.
//!
//! `replay.db` is written on every request and never waits for the disk: it survives the death of the gate, and what
//! a power cut may take is covered by [`ReplayStore::not_before`](super::ReplayStore::not_before). `state.db` holds
//! revocations and budgets; revocations and debits of an operator's budget are on the disk before they are answered.

use std::path::Path;
use std::sync::{Mutex, RwLock};

use rusqlite::Connection;

use super::database::{self, Durability, Kind};
use super::lock::DirectoryLock;
use super::{Freshness, ReplayStore, StoreError};
use crate::time::Timestamp;

mod budget;
mod replay;
mod revocation;
#[cfg(test)]
mod tests;

const STATE: Kind = Kind {
    application_id: 0x4c47_5331,
    version: 1,
    schema: "
        CREATE TABLE revoked_leases(lease_jti TEXT PRIMARY KEY, keep_until_ms INTEGER NOT NULL) STRICT, WITHOUT ROWID;
        CREATE TABLE revoked_principals(principal TEXT PRIMARY KEY, revoked_at_ms INTEGER NOT NULL)
            STRICT, WITHOUT ROWID;
        CREATE TABLE epoch(only INTEGER PRIMARY KEY CHECK (only = 1), number INTEGER NOT NULL, revoked_at_ms INTEGER)
            STRICT;
        INSERT INTO epoch VALUES (1, 0, NULL);
        CREATE TABLE usage(
            scope TEXT PRIMARY KEY, calls INTEGER NOT NULL CHECK (calls >= 0), cost INTEGER NOT NULL CHECK (cost >= 0),
            keep_until_ms INTEGER NOT NULL) STRICT, WITHOUT ROWID;
        CREATE INDEX usage_by_end ON usage(keep_until_ms);
        CREATE TABLE debits(
            ticket TEXT PRIMARY KEY, scopes TEXT NOT NULL, cost INTEGER NOT NULL, keep_until_ms INTEGER NOT NULL)
            STRICT, WITHOUT ROWID;
        CREATE INDEX debits_by_end ON debits(keep_until_ms);",
    check_pages: true,
};

/// How a store is opened, with what tests set otherwise.
pub struct Options {
    /// Live proofs that one key may have. At the default, a key may make 2,000 calls a second.
    pub proofs_per_key: u32,
    /// Says whether the machine has been down since the file was written; the kernel's by default.
    pub boot_id: String,
}

impl Default for Options {
    fn default() -> Self {
        // Without a boot id nothing says that the machine stayed up, and a fresh name says so.
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_else(|_| crate::ids::mint());
        Self { proofs_per_key: 131_072, boot_id: boot_id.trim().to_owned() }
    }
}

/// Replay set, revocations and budgets of one gate. One process at a time can have it open.
pub struct Store {
    replay: Mutex<replay::ProofTable>,
    not_before: Option<Timestamp>,
    state: Mutex<Connection>,
    revoked: RwLock<revocation::Revoked>,
    _lock: DirectoryLock,
}

impl Store {
    /// Opens the store in `directory`, or makes it there.
    ///
    /// # Errors
    /// When another process has it, when a file is damaged or of another kind, when the directory is open to others.
    pub fn open(directory: &Path, now: Timestamp) -> Result<Self, StoreError> {
        Self::open_with(directory, now, &Options::default())
    }

    pub fn open_with(directory: &Path, now: Timestamp, options: &Options) -> Result<Self, StoreError> {
        let lock = database::claim(directory)?;
        let proofs = replay::ProofTable::open(directory, now, options)?;
        let (state, _) = database::open(&directory.join("state.db"), &STATE, Durability::Power)?;
        let revoked = revocation::Revoked::load(&state)?;
        Ok(Self {
            not_before: proofs.not_before(),
            replay: Mutex::new(proofs),
            state: Mutex::new(state),
            revoked: RwLock::new(revoked),
            _lock: lock,
        })
    }
}

impl ReplayStore for Store {
    fn remember(&self, jkt: &str, jti: &str, expires: Timestamp, now: Timestamp) -> Result<Freshness, StoreError> {
        self.replay.lock().map_err(|_| StoreError::Poisoned)?.remember(jkt, jti, expires, now)
    }

    fn not_before(&self) -> Option<Timestamp> {
        self.not_before
    }
}

/// SQLite's integers are signed; a limit beyond them is no limit that we can keep.
fn to_sql(value: u64) -> Result<i64, StoreError> {
    i64::try_from(value).map_err(|_| StoreError::Invalid(format!("{value} is too large")))
}
