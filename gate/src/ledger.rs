//! The evidence: a numbered, linked and signed log of what was decided, done and seen.
//!
//! A call leaves two records. The *intent* is on the disk before anything is dispatched, and writing it is what uses
//! the grant up: one transaction, so that no grant is ever carried out twice and nothing runs unrecorded. The
//! *receipt* is on the disk before the agent has its answer. If the gate dies in between, the next start closes the
//! intent with a receipt that says the outcome is unknown. Other audit events share the numbering and the chain.
//!
//! Records hold hashes; what they are hashes of (params, output) lies in a table beside them and can be erased, after
//! which the chain still verifies. One thread writes. Callers that wait at the same time share one commit and so one
//! fsync. An error is never swallowed: whoever gets one must refuse the call.
//!
//! What a verifier with the public keys detects by itself: any changed byte, a record missing from the middle, another
//! order or numbering, another's signature, a grant used twice. What it cannot: that the *tail* was cut, by someone who
//! also sets the head (a row beside the records, which catches accidents) back. For that it needs to be told a record
//! that must be there: any receipt that someone keeps is such an [`Anchor`].

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rusqlite::{Connection, OptionalExtension};
use serde_json::{Map, Value, json};
use thiserror::Error;

use crate::hash;
use crate::store::database::OpenError;
use crate::store::lock::DirectoryLock;
use crate::time::Timestamp;

pub mod archive;
pub mod event;
pub mod grant;
mod journal;
pub mod keys;
pub mod receipt;
mod record;
#[cfg(test)]
mod tests;
pub mod verify;

pub use event::{EventDraft, EventFilter, IntentRecord};
pub use grant::{Grant, Plan};
pub use keys::{PublicKeys, ReceiptKeys};
pub use receipt::{NormalizedResult, Receipt, ReceiptDraft, SignatureStatus, VerificationOutcome};
pub use verify::{Anchor, VerifyReport, verify};

use journal::{Append, Guard, Writer};

/// The name of the log's file in the ledger's directory.
pub const FILE: &str = "ledger.db";

#[derive(Clone, Debug, Error)]
pub enum LedgerError {
    #[error("this grant was used already")]
    GrantConsumed,
    #[error("this grant's time is over")]
    GrantExpired,
    #[error("there is no open intent for this grant")]
    NoIntent,
    /// The caller's fault: a record that cannot be written as it is.
    #[error("refused: {0}")]
    Refused(String),
    #[error("there is no room for another record")]
    NoSpace,
    #[error("the ledger cannot be written: {0}")]
    Storage(String),
    /// After an error that leaves it open what the disk has, nothing is written until the ledger is opened anew.
    #[error("the ledger has stopped")]
    Stopped,
    #[error("the ledger is broken: {0}")]
    Broken(String),
    #[error(transparent)]
    Open(Arc<OpenError>),
}

impl From<OpenError> for LedgerError {
    fn from(error: OpenError) -> Self {
        Self::Open(Arc::new(error))
    }
}

impl From<rusqlite::Error> for LedgerError {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DiskFull) => Self::NoSpace,
            _ => Self::Storage(error.to_string()),
        }
    }
}

/// Bytes that a record names by hash and that lie beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    pub name: String,
    pub bytes: Vec<u8>,
}

/// `{<name>: {sha256, bytes}}`, as records have it.
fn content_index(contents: &[Content]) -> Result<Value, LedgerError> {
    let mut index = Map::new();
    for content in contents {
        let entry = json!({"sha256": hash::sha256_tagged(&content.bytes), "bytes": content.bytes.len()});
        if index.insert(content.name.clone(), entry).is_some() {
            return Err(LedgerError::Refused(format!("two contents called {}", content.name)));
        }
    }
    Ok(Value::Object(index))
}

/// How a ledger is opened.
#[derive(Clone, Debug)]
pub struct LedgerConfig {
    pub workspace: String,
    /// Space that intents and events leave free on the file system, so that the receipts of what is already running
    /// still fit.
    pub reserve_bytes: u64,
}

impl Default for LedgerConfig {
    fn default() -> Self {
        Self { workspace: "default".into(), reserve_bytes: 4 << 20 }
    }
}

/// An intent that the gate before this one left open, and the receipt that closes it now.
#[derive(Clone, Debug)]
pub struct ClosedOrphan {
    pub receipt: Receipt,
}

/// Where a record stands, once it is on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recorded {
    sequence: u64,
    hash: String,
}

impl Recorded {
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Lower-case hex.
    pub fn hash(&self) -> &str {
        &self.hash
    }
}

/// The ledger of one gate. Dropping it writes what was handed in and closes it.
pub struct Ledger {
    writer: Writer,
    reader: Mutex<Connection>,
    keys: Arc<ReceiptKeys>,
    workspace: String,
    log_id: String,
    directory: PathBuf,
    // After the writer, so that the thread has ended before another process may begin.
    _lock: DirectoryLock,
}

impl Ledger {
    /// Opens the ledger in `directory`, or begins one there, and closes the intents that were left open.
    ///
    /// # Errors
    /// When another process has it, when its last record is not what the head says or is not signed by one of `keys`,
    /// when it cannot be written.
    pub fn open(
        directory: &Path,
        keys: Arc<ReceiptKeys>,
        config: &LedgerConfig,
        now: Timestamp,
    ) -> Result<(Self, Vec<ClosedOrphan>), LedgerError> {
        let lock = crate::store::database::claim(directory)?;
        let mut journal = journal::Journal::open(directory, keys.clone(), config.reserve_bytes)?;
        journal.check_tail()?;
        let mut closed = Vec::new();
        for intent in journal.open_intents()? {
            let (record, contents) = receipt::of_orphan(&intent, now)?.into_record(&config.workspace)?;
            let sealed = journal.append_now(record, Guard::closing, contents)?;
            closed.push(ClosedOrphan { receipt: Receipt::from_record(sealed.record) });
        }
        let log_id = journal.log_id().to_owned();
        let reader = Mutex::new(journal::reader(directory)?);
        let writer = Writer::start(journal).map_err(|error| LedgerError::Storage(error.to_string()))?;
        let workspace = config.workspace.clone();
        let directory = directory.to_owned();
        Ok((Self { writer, reader, keys, workspace, log_id, directory, _lock: lock }, closed))
    }

    /// The UUID of this log, in every record.
    pub fn log_id(&self) -> &str {
        &self.log_id
    }

    pub fn keys(&self) -> &ReceiptKeys {
        &self.keys
    }

    /// Uses `grant` up and records what is about to be done, in one transaction. When this returns, both are on the
    /// disk and the action may be dispatched; on any error it must not be.
    ///
    /// A caller that stops waiting does not take the record back: run this where a client that hangs up cannot cancel
    /// it.
    ///
    /// # Errors
    /// [`LedgerError::GrantConsumed`] the second time, [`LedgerError::GrantExpired`] when `at` is past its time.
    pub async fn intent(&self, grant: &Grant, intent: IntentRecord) -> Result<Recorded, LedgerError> {
        let (record, contents) = intent.into_record(grant, &self.workspace)?;
        let guard = Guard::Opens(grant.grant_id.clone());
        self.append(record, guard, contents).await.map(|(recorded, _)| recorded)
    }

    /// Closes the intent of the draft's grant. When this returns, the receipt is on the disk.
    ///
    /// # Errors
    /// [`LedgerError::NoIntent`] when the grant has none or it is closed already.
    pub async fn receipt(&self, draft: ReceiptDraft) -> Result<Receipt, LedgerError> {
        let guard = Guard::Closes(draft.grant_id.clone());
        let (record, contents) = draft.into_record(&self.workspace)?;
        let (_, record) = self.append(record, guard, contents).await?;
        Ok(Receipt::from_record(record))
    }

    /// Records an audit event.
    pub async fn event(&self, draft: EventDraft) -> Result<Recorded, LedgerError> {
        let record = draft.into_record(&self.workspace)?;
        self.append(record, Guard::None, Vec::new()).await.map(|(recorded, _)| recorded)
    }

    /// Erases the bytes beside the record `id` (a receipt's or an intent event's) and records that they were erased.
    /// The record itself, with their hashes, stays.
    pub async fn erase_contents(&self, id: &str, by: &str, at: Timestamp) -> Result<Recorded, LedgerError> {
        let record = EventDraft {
            event_type: event::CONTENTS_ERASED.into(),
            trace_id: String::new(),
            decision_id: String::new(),
            action_id: String::new(),
            principal: by.to_owned(),
            session_id: String::new(),
            decision: String::new(),
            details: json!({"record_id": id}),
            at,
        }
        .into_fields(&self.workspace)?;
        self.append(record, Guard::Erases(id.to_owned()), Vec::new()).await.map(|(recorded, _)| recorded)
    }

    pub fn receipt_by_id(&self, receipt_id: &str) -> Result<Option<Receipt>, LedgerError> {
        self.one("SELECT body FROM records WHERE receipt_id = ?1", receipt_id)
    }

    /// The receipt that closed a grant, where there is one yet.
    pub fn receipt_by_grant(&self, grant_id: &str) -> Result<Option<Receipt>, LedgerError> {
        self.one("SELECT body FROM records WHERE grant_id = ?1 AND receipt_id IS NOT NULL", grant_id)
    }

    /// The bytes called `name` beside the record `id`; `None` when there are none, or none any more.
    pub fn content(&self, id: &str, name: &str) -> Result<Option<Vec<u8>>, LedgerError> {
        let reader = self.reader.lock().map_err(|_| LedgerError::Stopped)?;
        let mut statement = reader.prepare("SELECT bytes FROM contents WHERE record_id = ?1 AND name = ?2")?;
        Ok(statement.query_row([id, name], |row| row.get(0)).optional()?)
    }

    /// Events, the newest first. Receipts are not among them.
    pub fn events(&self, filter: &EventFilter) -> Result<Vec<Value>, LedgerError> {
        let reader = self.reader.lock().map_err(|_| LedgerError::Stopped)?;
        journal::events(&reader, filter)
    }

    /// The newest event of a type, if its signature is good: what it says was said by a gate that has this one's keys.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub fn signed_event(&self, event_type: &str) -> Result<Option<Value>, LedgerError> {
        let filter = EventFilter { event_type: Some(event_type.to_owned()), limit: Some(1), ..EventFilter::default() };
        let newest = self.events(&filter)?.into_iter().next();
        Ok(newest.filter(|event| {
            event.as_object().is_some_and(|record| {
                let status = record::signature_status(record, record::Kind::Event, self.keys.public());
                status == SignatureStatus::Valid
            })
        }))
    }

    /// Records that hold this text, the newest first; from another connection, so that nobody waits for a long look.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub fn mentions(&self, text: &str) -> Result<Vec<Value>, LedgerError> {
        archive::mentions(&self.directory, text)
    }

    /// Receipts and refusals of an action, the newest first; from another connection, as [`Self::mentions`].
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub fn of_action(&self, action_id: &str, limit: u32) -> Result<Vec<Value>, LedgerError> {
        archive::of_action(&self.directory, action_id, limit)
    }

    /// Verifies the whole log as it is now, from another connection; reads all of it, so not on an async thread.
    pub fn verify(&self, anchor: Option<&Anchor>) -> Result<VerifyReport, verify::VerifyError> {
        verify::verify(&self.directory, self.keys.public(), anchor)
    }

    /// False once the ledger has stopped: no call can be recorded, and so none can be served, until it is opened anew.
    pub fn is_running(&self) -> bool {
        self.writer.is_running()
    }

    fn one(&self, query: &str, id: &str) -> Result<Option<Receipt>, LedgerError> {
        let reader = self.reader.lock().map_err(|_| LedgerError::Stopped)?;
        let body: Option<String> = reader.prepare(query)?.query_row([id], |row| row.get(0)).optional()?;
        let Some(body) = body else { return Ok(None) };
        let record = serde_json::from_str(&body).map_err(|error| LedgerError::Broken(error.to_string()))?;
        Ok(Some(Receipt::from_record(record)))
    }

    async fn append(
        &self,
        record: Map<String, Value>,
        guard: Guard,
        contents: Vec<Content>,
    ) -> Result<(Recorded, Map<String, Value>), LedgerError> {
        let sealed = self.writer.submit(Append { record, guard, contents }).await?;
        let hash = sealed.head.hash.ok_or(LedgerError::Stopped)?;
        Ok((Recorded { sequence: sealed.head.sequence, hash }, sealed.record))
    }
}
