//! What was spent, by principal and window and by lease.

use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};

use super::{Store, to_sql};
use crate::store::database::{Durability, set_durability};
use crate::store::{BudgetStore, DebitOutcome, DebitRequest, Period, Remaining, StoreError, Ticket};
use crate::time::Timestamp;

/// How long a debit can be given back, and how long spending is kept after its window, so that a clock which is set
/// back a little does not find it gone.
const KEEP_MS: i64 = 24 * 3_600_000;
const PRUNE_ROWS: u32 = 8;

/// One budget of a request: where its spending is counted and what it allows.
struct Line {
    scope: String,
    name: String,
    max_calls: Option<u64>,
    max_cost: Option<u64>,
    keep_until: Timestamp,
}

impl BudgetStore for Store {
    fn remaining(&self, request: &DebitRequest) -> Result<Remaining, StoreError> {
        let connection = self.state.lock().map_err(|_| StoreError::Poisoned)?;
        let mut tightest = Remaining::default();
        for line in lines(request)? {
            tightest.tighten(line.left(spent(&connection, &line.scope)?));
        }
        Ok(tightest)
    }

    fn debit(&self, request: &DebitRequest) -> Result<DebitOutcome, StoreError> {
        let lines = lines(request)?;
        let cost = request.cost_usd_cents;
        let mut connection = self.state.lock().map_err(|_| StoreError::Poisoned)?;
        // Only the operator's budget protects; a lease's own need not outlive a power cut, since its leases do not pay.
        let durability = if request.operator.is_empty() { Durability::Process } else { Durability::Power };
        set_durability(&connection, durability)?;
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let mut remaining = Remaining::default();
        for line in &lines {
            let (calls, spent_cost) = spent(&transaction, &line.scope)?;
            let left = line.left((calls, spent_cost));
            if left.is_exhausted() || left.cost_remaining_usd_cents.is_some_and(|left| left < cost) {
                return Ok(DebitOutcome::Exhausted { which: line.name.clone() });
            }
            let after = (calls.saturating_add(1), spent_cost.saturating_add(cost));
            transaction.execute(
                "INSERT INTO usage VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO UPDATE
                    SET calls = excluded.calls, cost = excluded.cost",
                params![line.scope, to_sql(after.0)?, to_sql(after.1)?, line.keep_until.millis()],
            )?;
            remaining.tighten(line.left(after));
        }
        let ticket = Ticket(crate::ids::mint());
        let scopes: Vec<&str> = lines.iter().map(|line| line.scope.as_str()).collect();
        transaction.execute(
            "INSERT INTO debits VALUES (?1, ?2, ?3, ?4)",
            params![
                ticket.0,
                serde_json::Value::from(scopes).to_string(),
                to_sql(cost)?,
                request.now.plus_millis(KEEP_MS).millis()
            ],
        )?;
        prune(&transaction, request.now)?;
        transaction.commit()?;
        Ok(DebitOutcome::Debited { ticket, remaining })
    }

    fn refund(&self, ticket: &Ticket) -> Result<bool, StoreError> {
        let mut connection = self.state.lock().map_err(|_| StoreError::Poisoned)?;
        // Not waiting for the disk errs to the safe side: a power cut takes the refund, not the debit.
        set_durability(&connection, Durability::Process)?;
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let debit: Option<(String, i64)> = transaction
            .query_row("DELETE FROM debits WHERE ticket = ?1 RETURNING scopes, cost", [&ticket.0], |row| {
                Ok((row.get(0)?, row.get(1)?))
            })
            .optional()?;
        let Some((scopes, cost)) = debit else { return Ok(false) };
        let scopes: Vec<String> = serde_json::from_str(&scopes)
            .map_err(|error| StoreError::Invalid(format!("a debit's scopes cannot be read: {error}")))?;
        for scope in scopes {
            transaction.execute(
                "UPDATE usage SET calls = MAX(calls - 1, 0), cost = MAX(cost - ?2, 0) WHERE scope = ?1",
                params![scope, cost],
            )?;
        }
        transaction.commit()?;
        Ok(true)
    }
}

impl Line {
    fn left(&self, (calls, cost): (u64, u64)) -> Remaining {
        Remaining {
            calls_remaining: self.max_calls.map(|max| max.saturating_sub(calls)),
            cost_remaining_usd_cents: self.max_cost.map(|max| max.saturating_sub(cost)),
        }
    }
}

fn lines(request: &DebitRequest) -> Result<Vec<Line>, StoreError> {
    let mut lines: Vec<Line> = Vec::with_capacity(request.operator.len() + 1);
    for window in &request.operator {
        let (start, length_ms) = window_start(window.period, request.now)?;
        // A JSON array, so that no name can be made to look like two.
        let scope = serde_json::json!(["window", request.principal, window.name, start]).to_string();
        if lines.iter().any(|line| line.scope == scope) {
            return Err(StoreError::Invalid(format!("two budgets are called {}", window.name)));
        }
        lines.push(Line {
            scope,
            name: window.name.clone(),
            max_calls: window.max_calls,
            max_cost: window.max_cost_usd_cents,
            keep_until: request.now.plus_millis(length_ms.saturating_add(KEEP_MS)),
        });
    }
    if let Some(lease) = &request.lease {
        lines.push(Line {
            scope: serde_json::json!(["lease", lease.lease_jti]).to_string(),
            name: "lease".to_owned(),
            max_calls: lease.max_calls,
            max_cost: lease.max_cost_usd_cents,
            keep_until: lease.expires.plus_millis(KEEP_MS),
        });
    }
    Ok(lines)
}

/// Names the window that `now` lies in; the number is its length at most, in milliseconds.
fn window_start(period: Period, now: Timestamp) -> Result<(String, i64), StoreError> {
    let seconds = match period {
        Period::Hour => 3_600,
        Period::Day => 86_400,
        Period::Month => {
            let day = now.to_seconds_string();
            let month = day.rsplit_once('-').map_or(day.as_str(), |(month, _)| month);
            return Ok((format!("month {month}"), 31 * 86_400_000));
        }
        Period::Seconds(seconds) => i64::try_from(seconds).unwrap_or(0),
    };
    if seconds <= 0 {
        return Err(StoreError::Invalid("a window of no length".into()));
    }
    Ok((format!("{seconds}s {}", now.secs().div_euclid(seconds)), seconds.saturating_mul(1000)))
}

fn spent(connection: &Connection, scope: &str) -> Result<(u64, u64), StoreError> {
    let row: Option<(i64, i64)> = connection
        .query_row("SELECT calls, cost FROM usage WHERE scope = ?1", [scope], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    let (calls, cost) = row.unwrap_or((0, 0));
    // The table's CHECKs keep both at zero or above; a negative one would be damage, and counts as everything spent.
    Ok((u64::try_from(calls).unwrap_or(u64::MAX), u64::try_from(cost).unwrap_or(u64::MAX)))
}

fn prune(connection: &Connection, now: Timestamp) -> Result<(), StoreError> {
    for (table, key) in [("usage", "scope"), ("debits", "ticket")] {
        connection.execute(
            &format!(
                "DELETE FROM {table} WHERE {key} IN (SELECT {key} FROM {table}
                    WHERE keep_until_ms < ?1 ORDER BY keep_until_ms LIMIT {PRUNE_ROWS})"
            ),
            [now.millis()],
        )?;
    }
    Ok(())
}
