//! The file, and the one thread that writes it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rusqlite::{
    Connection, ErrorCode, OpenFlags, OptionalExtension, Statement, Transaction, TransactionBehavior, params,
};
use serde_json::{Map, Value};
use tokio::sync::{mpsc, oneshot};

use super::event::EventFilter;
use super::keys::ReceiptKeys;
use super::record::{self, Head, Kind, Sealed};
use super::{Content, FILE, LedgerError, SignatureStatus};
use crate::store::database::{self, Durability};

/// The record is its text; every other column is read out of it by SQLite and cannot say otherwise.
///
/// `intents` is what makes a grant good for one use, `receipts_of_grants` what makes it good for one receipt.
/// `open_intents` saves a start from reading the whole log.
const LEDGER: database::Kind = database::Kind {
    application_id: 0x4c47_4c31,
    version: 1,
    schema: "
        CREATE TABLE records(
            sequence INTEGER PRIMARY KEY, body TEXT NOT NULL,
            receipt_id TEXT AS (body ->> '$.receipt_id'), event_id TEXT AS (body ->> '$.event_id'),
            event_type TEXT AS (body ->> '$.event_type'), grant_id TEXT AS (body ->> '$.grant_id'),
            trace_id TEXT AS (body ->> '$.trace_id'), action_id TEXT AS (body ->> '$.action_id'),
            principal TEXT AS (body ->> '$.principal'), session_id TEXT AS (body ->> '$.session_id'),
            decision TEXT AS (body ->> '$.decision'), at TEXT AS (body ->> '$.at')) STRICT;
        CREATE UNIQUE INDEX receipts ON records(receipt_id) WHERE receipt_id IS NOT NULL;
        CREATE UNIQUE INDEX intents ON records(grant_id) WHERE event_type = 'execution.intent';
        CREATE UNIQUE INDEX receipts_of_grants ON records(grant_id) WHERE receipt_id IS NOT NULL;
        CREATE INDEX traces ON records(trace_id);
        CREATE TABLE open_intents(grant_id TEXT PRIMARY KEY, sequence INTEGER NOT NULL) STRICT, WITHOUT ROWID;
        CREATE TABLE contents(
            record_id TEXT NOT NULL, name TEXT NOT NULL, bytes BLOB NOT NULL, PRIMARY KEY (record_id, name)) STRICT;
        CREATE TABLE head(
            only INTEGER PRIMARY KEY CHECK (only = 1), log_id TEXT NOT NULL, sequence INTEGER NOT NULL, hash TEXT)
            STRICT;",
    check_pages: false,
};

/// Calls that one commit may serve; more wait for the next.
const MAX_BATCH: usize = 256;
/// Calls that may wait for the thread; more wait to be let in.
const QUEUE: usize = 1024;

/// What must hold in the transaction that appends a record.
pub enum Guard {
    None,
    /// This grant has no intent yet.
    Opens(String),
    /// This grant has an intent and no receipt.
    Closes(String),
    /// The bytes beside this record go.
    Erases(String),
}

impl Guard {
    pub fn closing(record: &Map<String, Value>) -> Self {
        Self::Closes(record.get("grant_id").and_then(Value::as_str).unwrap_or_default().to_owned())
    }
}

pub struct Append {
    pub record: Map<String, Value>,
    pub guard: Guard,
    pub contents: Vec<Content>,
}

type Reply = Result<Sealed, LedgerError>;

/// The open file and the head of its chain.
pub struct Journal {
    connection: Connection,
    directory: std::fs::File,
    keys: Arc<ReceiptKeys>,
    head: Head,
    reserve_bytes: u64,
    stopped: Arc<AtomicBool>,
}

impl Journal {
    pub fn open(directory: &Path, keys: Arc<ReceiptKeys>, reserve_bytes: u64) -> Result<Self, LedgerError> {
        let (connection, _) = database::open(&directory.join(FILE), &LEDGER, Durability::Power)?;
        let directory = std::fs::File::open(directory).map_err(|error| LedgerError::Storage(error.to_string()))?;
        let head = match read_head(&connection)? {
            Some(head) => head,
            None => {
                let head = Head { log_id: crate::ids::mint(), sequence: 0, hash: None };
                connection.execute("INSERT INTO head VALUES (1, ?1, 0, NULL)", [&head.log_id])?;
                head
            }
        };
        Ok(Self { connection, directory, keys, head, reserve_bytes, stopped: Arc::default() })
    }

    pub fn log_id(&self) -> &str {
        &self.head.log_id
    }

    /// Nothing is ever appended to a tail that is not the one that was written last.
    pub fn check_tail(&self) -> Result<(), LedgerError> {
        let broken = |what: &str| Err(LedgerError::Broken(what.to_owned()));
        let last: Option<(i64, String)> = self
            .connection
            .query_row("SELECT sequence, body FROM records ORDER BY sequence DESC LIMIT 1", [], |row| {
                Ok((row.get(0)?, row.get(1)?))
            })
            .optional()?;
        let Some((sequence, body)) = last else {
            return if self.head.sequence == 0 { Ok(()) } else { broken("its records are gone") };
        };
        if u64::try_from(sequence) != Ok(self.head.sequence) {
            return broken("its last record is not the last that was written");
        }
        let Ok(record) = serde_json::from_str::<Map<String, Value>>(&body) else {
            return broken("its last record cannot be read");
        };
        let Some(kind) = Kind::of(&record) else { return broken("its last record is of no kind") };
        let hash = record.get(kind.hash_field()).and_then(Value::as_str).and_then(|spelled| kind.bare(spelled));
        if hash != self.head.hash.as_deref() {
            return broken("its last record is not the one that was written");
        }
        match record::signature_status(&record, kind, self.keys.public()) {
            SignatureStatus::Valid => Ok(()),
            status => Err(LedgerError::Broken(format!("the signature of its last record: {status:?}"))),
        }
    }

    pub fn open_intents(&self) -> Result<Vec<Map<String, Value>>, LedgerError> {
        let mut statement =
            self.connection.prepare("SELECT body FROM open_intents JOIN records USING (sequence) ORDER BY sequence")?;
        let bodies = statement.query_map([], |row| row.get::<_, String>(0))?;
        bodies
            .map(|body| serde_json::from_str(&body?).map_err(|error| LedgerError::Broken(error.to_string())))
            .collect()
    }

    /// Appends one record outside the writer's thread, before it starts.
    pub fn append_now(
        &mut self,
        record: Map<String, Value>,
        guard: impl FnOnce(&Map<String, Value>) -> Guard,
        contents: Vec<Content>,
    ) -> Result<Sealed, LedgerError> {
        let guard = guard(&record);
        let mut replies = self.commit(vec![Append { record, guard, contents }]);
        replies.pop().unwrap_or(Err(LedgerError::Stopped))
    }

    /// Appends a batch in one transaction: each gets its own answer, and either all that were accepted are on the disk
    /// or none is.
    fn commit(&mut self, batch: Vec<Append>) -> Vec<Reply> {
        let size = batch.len();
        let fail_all = |error: LedgerError| (0..size).map(|_| Err(error.clone())).collect();
        if self.stopped.load(Ordering::Acquire) {
            return fail_all(LedgerError::Stopped);
        }
        let spacious = self.has_reserve();
        match self.try_commit(batch, spacious) {
            Ok((head, replies)) => {
                self.head = head;
                replies
            }
            Err(error) => {
                if leaves_doubt(&error) {
                    self.stopped.store(true, Ordering::Release);
                    tracing::error!(%error, "the ledger stops: it is not known what the disk has");
                }
                fail_all(error.into())
            }
        }
    }

    fn try_commit(&mut self, batch: Vec<Append>, spacious: bool) -> rusqlite::Result<(Head, Vec<Reply>)> {
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let mut head = self.head.clone();
        let mut replies = Vec::with_capacity(batch.len());
        let mut insert = transaction.prepare("INSERT INTO records(sequence, body) VALUES (?1, ?2)")?;
        for append in batch {
            let reply = if !spacious && matches!(append.guard, Guard::Opens(_) | Guard::None) {
                Err(LedgerError::NoSpace)
            } else {
                append_one(&transaction, &mut insert, append, &head, &self.keys)?
            };
            if let Ok(sealed) = &reply {
                head = sealed.head.clone();
            }
            replies.push(reply);
        }
        drop(insert);
        let moved = transaction.execute(
            "UPDATE head SET sequence = ?1, hash = ?2 WHERE log_id = ?3 AND sequence = ?4 AND hash IS ?5",
            params![signed(head.sequence)?, head.hash, head.log_id, signed(self.head.sequence)?, self.head.hash],
        )?;
        if moved != 1 {
            // Someone else wrote, past the lock.
            return Err(rusqlite::Error::StatementChangedRows(moved));
        }
        transaction.commit()?;
        Ok((head, replies))
    }

    fn has_reserve(&self) -> bool {
        rustix::fs::fstatvfs(&self.directory)
            .is_ok_and(|found| found.f_bavail.saturating_mul(found.f_frsize) >= self.reserve_bytes)
    }
}

/// The outer error fails the whole batch; the inner one is this record's own, and nothing of it was written.
fn append_one(
    transaction: &Transaction<'_>,
    insert: &mut Statement<'_>,
    append: Append,
    head: &Head,
    keys: &ReceiptKeys,
) -> rusqlite::Result<Reply> {
    let has = |query: &str, id: &str| transaction.prepare(query)?.exists([id]);
    match &append.guard {
        Guard::Opens(grant_id)
            if has("SELECT 1 FROM records WHERE grant_id = ?1 AND event_type = 'execution.intent'", grant_id)? =>
        {
            return Ok(Err(LedgerError::GrantConsumed));
        }
        Guard::Closes(grant_id) => {
            let Some(intended) = intended(transaction, grant_id)? else { return Ok(Err(LedgerError::NoIntent)) };
            // A verifier would find the log broken, and for good.
            let told = ["action_id", "principal", "request_hash"].map(|field| append.record.get(field));
            if told.map(|value| value.and_then(Value::as_str)) != intended.each_ref().map(Option::as_deref) {
                return Ok(Err(LedgerError::Refused("the receipt says otherwise than its intent".into())));
            }
        }
        _ => {}
    }
    let sealed = match record::seal(append.record, head, keys) {
        Ok(sealed) => sealed,
        Err(error) => return Ok(Err(error)),
    };
    let sequence = signed(sealed.head.sequence)?;
    insert.execute(params![sequence, sealed.text])?;
    match &append.guard {
        Guard::None => {}
        Guard::Opens(grant_id) => {
            transaction.execute("INSERT INTO open_intents VALUES (?1, ?2)", params![grant_id, sequence])?;
        }
        Guard::Closes(grant_id) => {
            transaction.execute("DELETE FROM open_intents WHERE grant_id = ?1", [grant_id])?;
        }
        Guard::Erases(record_id) => {
            transaction.execute("DELETE FROM contents WHERE record_id = ?1", [record_id])?;
        }
    }
    let kind = Kind::of(&sealed.record).unwrap_or(Kind::Event);
    let id = sealed.record.get(kind.id_field()).and_then(Value::as_str).unwrap_or_default();
    for content in &append.contents {
        transaction.execute("INSERT INTO contents VALUES (?1, ?2, ?3)", params![id, content.name, content.bytes])?;
    }
    Ok(Ok(sealed))
}

/// Action, principal and request hash of a grant's open intent.
fn intended(transaction: &Transaction<'_>, grant_id: &str) -> rusqlite::Result<Option<[Option<String>; 3]>> {
    transaction
        .query_row(
            "SELECT action_id, principal, body ->> '$.details.plan.request_hash'
                FROM open_intents JOIN records USING (sequence) WHERE open_intents.grant_id = ?1",
            [grant_id],
            |row| Ok([row.get(0)?, row.get(1)?, row.get(2)?]),
        )
        .optional()
}

/// After a failed write that was rolled back the file is as it was. After an I/O error nobody knows: an fsync that
/// failed once may succeed the next time without having written.
fn leaves_doubt(error: &rusqlite::Error) -> bool {
    use ErrorCode::{ConstraintViolation, DatabaseBusy, DiskFull, TooBig};
    !matches!(error.sqlite_error_code(), Some(DiskFull | DatabaseBusy | TooBig | ConstraintViolation))
}

fn signed(sequence: u64) -> rusqlite::Result<i64> {
    i64::try_from(sequence).map_err(|_| rusqlite::Error::IntegralValueOutOfRange(0, i64::MAX))
}

pub fn read_head(connection: &Connection) -> rusqlite::Result<Option<Head>> {
    connection
        .query_row("SELECT log_id, sequence, hash FROM head", [], |row| {
            let sequence: i64 = row.get(1)?;
            let sequence =
                u64::try_from(sequence).map_err(|_| rusqlite::Error::IntegralValueOutOfRange(1, sequence))?;
            Ok(Head { log_id: row.get(0)?, sequence, hash: row.get(2)? })
        })
        .optional()
}

/// A second connection that cannot write.
pub fn reader(directory: &Path) -> Result<Connection, LedgerError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(directory.join(FILE), flags)?;
    connection.busy_timeout(Duration::from_secs(5))?;
    connection.execute_batch("PRAGMA trusted_schema=OFF; PRAGMA query_only=ON;")?;
    Ok(connection)
}

pub fn events(connection: &Connection, filter: &EventFilter) -> Result<Vec<Value>, LedgerError> {
    let after = filter.after.map(|at| at.to_string());
    let before = filter.before.map(|at| at.to_string());
    // Times of one printed form sort as text.
    let conditions = [
        ("trace_id =", &filter.trace_id),
        ("event_type =", &filter.event_type),
        ("action_id =", &filter.action_id),
        ("principal =", &filter.principal),
        ("session_id =", &filter.session_id),
        ("decision =", &filter.decision),
        ("at >", &after),
        ("at <", &before),
    ];
    let mut query = "SELECT body FROM records WHERE event_id IS NOT NULL".to_owned();
    let mut values: Vec<&str> = Vec::new();
    for (condition, value) in &conditions {
        if let Some(value) = value {
            query.push_str(&format!(" AND {condition} ?"));
            values.push(value);
        }
    }
    let limit = filter.limit.unwrap_or(100).min(1000);
    query.push_str(&format!(" ORDER BY sequence DESC LIMIT {limit}"));
    let mut statement = connection.prepare(&query)?;
    let bodies = statement.query_map(rusqlite::params_from_iter(values), |row| row.get::<_, String>(0))?;
    bodies.map(|body| serde_json::from_str(&body?).map_err(|error| LedgerError::Broken(error.to_string()))).collect()
}

/// The thread that owns the journal. Dropping it lets the thread finish what it was given.
pub struct Writer {
    queue: Option<mpsc::Sender<(Append, oneshot::Sender<Reply>)>>,
    thread: Option<JoinHandle<()>>,
    stopped: Arc<AtomicBool>,
}

impl Writer {
    pub fn start(mut journal: Journal) -> std::io::Result<Self> {
        let stopped = journal.stopped.clone();
        let (queue, mut waiting) = mpsc::channel::<(Append, oneshot::Sender<Reply>)>(QUEUE);
        let thread = std::thread::Builder::new().name("ledger".into()).spawn(move || {
            while let Some(first) = waiting.blocking_recv() {
                let (mut batch, mut replies) = (vec![first.0], vec![first.1]);
                while batch.len() < MAX_BATCH
                    && let Ok((append, reply)) = waiting.try_recv()
                {
                    batch.push(append);
                    replies.push(reply);
                }
                let erased = batch.iter().any(|append| matches!(append.guard, Guard::Erases(_)));
                for (reply, result) in replies.into_iter().zip(journal.commit(batch)) {
                    // Whoever no longer waits has its record all the same.
                    let _ = reply.send(result);
                }
                if erased {
                    journal.forget_old_pages();
                }
            }
        })?;
        Ok(Self { queue: Some(queue), thread: Some(thread), stopped })
    }

    pub fn is_running(&self) -> bool {
        let alive = self.thread.as_ref().is_some_and(|thread| !thread.is_finished());
        alive && !self.stopped.load(Ordering::Acquire)
    }

    pub async fn submit(&self, append: Append) -> Reply {
        let queue = self.queue.as_ref().ok_or(LedgerError::Stopped)?;
        let (reply, answer) = oneshot::channel();
        queue.send((append, reply)).await.map_err(|_| LedgerError::Stopped)?;
        answer.await.map_err(|_| LedgerError::Stopped)?
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Journal {
    /// What was erased is still in the write-ahead log until it is emptied.
    fn forget_old_pages(&self) {
        let busy: rusqlite::Result<i64> =
            self.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0));
        if !matches!(busy, Ok(0)) {
            tracing::warn!("erased contents stay in the write-ahead log until its next checkpoint");
        }
    }
}
