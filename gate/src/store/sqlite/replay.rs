//! The set of proofs that were used.

use std::collections::HashMap;
use std::path::Path;

use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};

use super::Options;
use crate::hash::sha256;
use crate::store::database::{self, Durability, Kind};
use crate::store::{Freshness, StoreError};
use crate::time::Timestamp;

const REPLAY: Kind = Kind {
    application_id: 0x4c47_5231,
    version: 1,
    schema: "
        CREATE TABLE proofs(
            digest BLOB PRIMARY KEY, jkt TEXT NOT NULL, keep_until_ms INTEGER NOT NULL, seen_ms INTEGER NOT NULL)
            STRICT, WITHOUT ROWID;
        CREATE INDEX proofs_by_end ON proofs(keep_until_ms);
        CREATE TABLE trust(
            only INTEGER PRIMARY KEY CHECK (only = 1), boot_id TEXT NOT NULL, not_before_ms INTEGER NOT NULL) STRICT;",
    check_pages: true,
};

/// How far the clock may step back without a refusal (clients' clocks are tolerated by as much).
const SKEW_MS: i64 = 5_000;
/// A proof is forgotten only so long after its end that no clock which still passes [`SKEW_MS`] can revive it.
const KEEP_MS: i64 = 2 * SKEW_MS;
/// Ended proofs that one call removes: more than the one that it adds, so the table shrinks to what lives.
const PRUNE_ROWS: u32 = 16;

pub struct ProofTable {
    connection: Connection,
    live: HashMap<String, u32>,
    latest: Timestamp,
    not_before: Option<Timestamp>,
    per_key: u32,
}

impl ProofTable {
    pub fn open(directory: &Path, now: Timestamp, options: &Options) -> Result<Self, StoreError> {
        let (connection, _) = database::open(&directory.join("replay.db"), &REPLAY, Durability::Process)?;
        let trusted: Option<(String, i64)> = connection
            .query_row("SELECT boot_id, not_before_ms FROM trust", [], |row| Ok((row.get(0)?, row.get(1)?)))
            .optional()?;
        // The time is kept as well as returned: a gate that dies and starts again within the window must not forget it.
        let not_before = match trusted {
            Some((boot_id, not_before_ms)) if boot_id == options.boot_id => not_before_ms,
            _ => {
                connection.execute(
                    "INSERT OR REPLACE INTO trust VALUES (1, ?1, ?2)",
                    params![options.boot_id, now.millis()],
                )?;
                now.millis()
            }
        };
        let mut live = HashMap::new();
        {
            let mut statement = connection.prepare("SELECT jkt, COUNT(*) FROM proofs GROUP BY jkt")?;
            let mut rows = statement.query([])?;
            while let Some(row) = rows.next()? {
                live.insert(row.get(0)?, row.get(1)?);
            }
        }
        let latest: Option<i64> = connection.query_row("SELECT MAX(seen_ms) FROM proofs", [], |row| row.get(0))?;
        Ok(Self {
            connection,
            live,
            latest: Timestamp::from_millis(latest.unwrap_or(i64::MIN)),
            not_before: Some(Timestamp::from_millis(not_before)),
            per_key: options.proofs_per_key,
        })
    }

    pub fn not_before(&self) -> Option<Timestamp> {
        self.not_before
    }

    pub fn remember(
        &mut self,
        jkt: &str,
        jti: &str,
        expires: Timestamp,
        now: Timestamp,
    ) -> Result<Freshness, StoreError> {
        // Ended proofs are gone from the table; under a clock that goes back they would be good again.
        if now.plus_millis(SKEW_MS) < self.latest {
            return Err(StoreError::Clock { now, seen: self.latest });
        }
        let latest = self.latest.max(now);
        let digest = digest(jkt, jti);
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        if transaction.prepare("SELECT 1 FROM proofs WHERE digest = ?1")?.exists([digest])? {
            return Ok(Freshness::Seen);
        }
        let mut removed: Vec<String> = transaction
            .prepare(
                "DELETE FROM proofs WHERE digest IN
                    (SELECT digest FROM proofs WHERE keep_until_ms < ?1 ORDER BY keep_until_ms LIMIT ?2) RETURNING jkt",
            )?
            .query_map(params![latest.millis(), PRUNE_ROWS], |row| row.get(0))?
            .collect::<Result<_, _>>()?;
        let live = self.live.get(jkt).copied().unwrap_or(0);
        let freed = removed.iter().filter(|of| *of == jkt).count();
        if live.saturating_sub(u32::try_from(freed).unwrap_or(u32::MAX)) >= self.per_key {
            let more = transaction
                .execute("DELETE FROM proofs WHERE jkt = ?1 AND keep_until_ms < ?2", params![jkt, latest.millis()])?;
            if more == 0 {
                return Err(StoreError::Full);
            }
            removed.extend(std::iter::repeat_n(jkt.to_owned(), more));
        }
        transaction.execute(
            "INSERT INTO proofs VALUES (?1, ?2, ?3, ?4)",
            params![digest, jkt, expires.plus_millis(KEEP_MS).millis(), latest.millis()],
        )?;
        transaction.commit()?;
        self.latest = latest;
        *self.live.entry(jkt.to_owned()).or_insert(0) += 1;
        for of in removed {
            if let Some(count) = self.live.get_mut(&of) {
                *count = count.saturating_sub(1);
                if *count == 0 {
                    self.live.remove(&of);
                }
            }
        }
        Ok(Freshness::Fresh)
    }
}

/// One size for every proof, whatever a client sends as its jti; the length keeps `(ab, c)` apart from `(a, bc)`.
fn digest(jkt: &str, jti: &str) -> [u8; 32] {
    let mut bytes = Vec::with_capacity(8 + jkt.len() + jti.len());
    bytes.extend_from_slice(&(jkt.len() as u64).to_be_bytes());
    bytes.extend_from_slice(jkt.as_bytes());
    bytes.extend_from_slice(jti.as_bytes());
    sha256(&bytes)
}
