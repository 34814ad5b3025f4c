//! Leases that were revoked: on the disk, and mirrored in memory because every request asks.

use std::collections::{HashMap, HashSet};

use rusqlite::{Connection, params};

use super::{Store, to_sql};
use crate::store::{Epoch, RevocationStore, StoreError};
use crate::time::Timestamp;

/// What `state.db` says; changed only after the disk has the change.
pub struct Revoked {
    leases: HashSet<String>,
    principals: HashMap<String, Timestamp>,
    epoch: Epoch,
}

impl Revoked {
    pub fn load(connection: &Connection) -> Result<Self, StoreError> {
        let leases = connection
            .prepare("SELECT lease_jti FROM revoked_leases")?
            .query_map([], |row| row.get(0))?
            .collect::<Result<_, _>>()?;
        let principals = connection
            .prepare("SELECT principal, revoked_at_ms FROM revoked_principals")?
            .query_map([], |row| Ok((row.get(0)?, Timestamp::from_millis(row.get(1)?))))?
            .collect::<Result<_, _>>()?;
        let epoch = connection.query_row("SELECT number, revoked_at_ms FROM epoch", [], |row| {
            let number: i64 = row.get(0)?;
            Ok(Epoch {
                number: u64::try_from(number).map_err(|_| rusqlite::Error::IntegralValueOutOfRange(0, number))?,
                revoked_at: row.get::<_, Option<i64>>(1)?.map(Timestamp::from_millis),
            })
        })?;
        Ok(Self { leases, principals, epoch })
    }
}

impl RevocationStore for Store {
    fn is_revoked(&self, lease_jti: &str, principal: &str, iat: Timestamp) -> Result<bool, StoreError> {
        let revoked = self.revoked.read().map_err(|_| StoreError::Poisoned)?;
        // A lease knows the second of its issue only, so the whole second of a revocation is revoked.
        let covered = |at: Timestamp| iat.secs() <= at.secs();
        Ok(revoked.leases.contains(lease_jti)
            || revoked.principals.get(principal).copied().is_some_and(covered)
            || revoked.epoch.revoked_at.is_some_and(covered))
    }

    fn revoke_lease(&self, lease_jti: &str, keep_until: Timestamp, now: Timestamp) -> Result<(), StoreError> {
        let mut connection = self.state.lock().map_err(|_| StoreError::Poisoned)?;
        let transaction = durable(&mut connection)?;
        let gone: Vec<String> = transaction
            .prepare("DELETE FROM revoked_leases WHERE keep_until_ms < ?1 RETURNING lease_jti")?
            .query_map([now.plus_millis(-60_000).millis()], |row| row.get(0))?
            .collect::<Result<_, _>>()?;
        transaction.execute(
            "INSERT INTO revoked_leases VALUES (?1, ?2) ON CONFLICT DO UPDATE
                SET keep_until_ms = MAX(keep_until_ms, excluded.keep_until_ms)",
            params![lease_jti, keep_until.millis()],
        )?;
        transaction.commit()?;
        let mut revoked = self.revoked.write().map_err(|_| StoreError::Poisoned)?;
        for lease in gone {
            revoked.leases.remove(&lease);
        }
        revoked.leases.insert(lease_jti.to_owned());
        Ok(())
    }

    fn revoke_principal(&self, principal: &str, now: Timestamp) -> Result<(), StoreError> {
        let mut connection = self.state.lock().map_err(|_| StoreError::Poisoned)?;
        let mut revoked = self.revoked.write().map_err(|_| StoreError::Poisoned)?;
        // A clock that went back must not shorten what was revoked before.
        let at = revoked.principals.get(principal).map_or(now, |before| now.max(*before));
        let transaction = durable(&mut connection)?;
        transaction
            .execute("INSERT OR REPLACE INTO revoked_principals VALUES (?1, ?2)", params![principal, at.millis()])?;
        transaction.commit()?;
        revoked.principals.insert(principal.to_owned(), at);
        Ok(())
    }

    fn revoke_all(&self, now: Timestamp) -> Result<Epoch, StoreError> {
        let mut connection = self.state.lock().map_err(|_| StoreError::Poisoned)?;
        let mut revoked = self.revoked.write().map_err(|_| StoreError::Poisoned)?;
        let at = revoked.epoch.revoked_at.map_or(now, |before| now.max(before));
        let epoch = Epoch { number: revoked.epoch.number.saturating_add(1), revoked_at: Some(at) };
        let transaction = durable(&mut connection)?;
        transaction
            .execute("UPDATE epoch SET number = ?1, revoked_at_ms = ?2", params![to_sql(epoch.number)?, at.millis()])?;
        transaction.commit()?;
        revoked.epoch = epoch;
        Ok(epoch)
    }

    fn epoch(&self) -> Result<Epoch, StoreError> {
        Ok(self.revoked.read().map_err(|_| StoreError::Poisoned)?.epoch)
    }
}

fn durable(connection: &mut Connection) -> Result<rusqlite::Transaction<'_>, StoreError> {
    crate::store::database::set_durability(connection, crate::store::database::Durability::Power)?;
    Ok(connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?)
}
