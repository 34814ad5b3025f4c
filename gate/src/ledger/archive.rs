//! Reads receipts from a ledger file without opening it for writing: of a gate that runs, or that is long gone.

use std::path::Path;

use rusqlite::OptionalExtension as _;
use serde_json::Value;

use super::receipt::Receipt;
use super::verify::open_read_only;
use super::{FILE, LedgerError};

fn connect(path: &Path) -> Result<rusqlite::Connection, LedgerError> {
    let file = if path.is_dir() { path.join(FILE) } else { path.to_owned() };
    Ok(open_read_only(&file)?)
}

fn read(body: &str) -> Result<Receipt, LedgerError> {
    let record = serde_json::from_str(body).map_err(|error| LedgerError::Broken(error.to_string()))?;
    Ok(Receipt::from_record(record))
}

/// The receipt with this id, in the ledger directory or file at `path`.
pub fn receipt(path: &Path, receipt_id: &str) -> Result<Option<Receipt>, LedgerError> {
    let connection = connect(path)?;
    let body: Option<String> = connection
        .prepare("SELECT body FROM records WHERE receipt_id = ?1")?
        .query_row([receipt_id], |row| row.get(0))
        .optional()?;
    body.as_deref().map(read).transpose()
}

/// Records that hold this text somewhere, the newest first, at most 16; operators' own calls, whose paths hold what they
/// looked for, are not among them. Reads back from the end, and so all of a ledger when there is none.
pub fn mentions(path: &Path, text: &str) -> Result<Vec<Value>, LedgerError> {
    let connection = connect(path)?;
    let mut statement = connection.prepare(
        "SELECT body FROM records WHERE instr(body, ?1) > 0 AND event_type IS NOT 'operator_call'
         ORDER BY sequence DESC LIMIT 16",
    )?;
    let bodies = statement.query_map([text], |row| row.get::<_, String>(0))?;
    bodies.map(|body| serde_json::from_str(&body?).map_err(|error| LedgerError::Broken(error.to_string()))).collect()
}

/// The newest `limit` receipts and refusals of this action, the newest first. Reads back from the end, and so all of a
/// ledger when there are fewer.
pub fn of_action(path: &Path, action_id: &str, limit: u32) -> Result<Vec<Value>, LedgerError> {
    let connection = connect(path)?;
    let mut statement = connection.prepare(
        "SELECT body FROM records WHERE action_id = ?1 AND (receipt_id IS NOT NULL OR event_type = 'refused')
         ORDER BY sequence DESC LIMIT ?2",
    )?;
    let bodies = statement.query_map((action_id, limit), |row| row.get::<_, String>(0))?;
    bodies.map(|body| serde_json::from_str(&body?).map_err(|error| LedgerError::Broken(error.to_string()))).collect()
}

/// The newest `limit` receipts, the newest first.
pub fn receipts(path: &Path, limit: u32) -> Result<Vec<Receipt>, LedgerError> {
    let connection = connect(path)?;
    let mut statement =
        connection.prepare("SELECT body FROM records WHERE receipt_id IS NOT NULL ORDER BY sequence DESC LIMIT ?1")?;
    let bodies = statement.query_map([limit], |row| row.get::<_, String>(0))?;
    bodies.map(|body| read(&body?)).collect()
}
