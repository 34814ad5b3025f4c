//! Checks a ledger with nothing but the public keys: the file of a gate, running or dead, or an exported copy.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OpenFlags};
use serde::Serialize;
use serde_json::{Map, Value};
use thiserror::Error;

use super::event::{self, INTENT};
use super::grant::Grant;
use super::journal::read_head;
use super::keys::PublicKeys;
use super::record::{self, Head, Kind, MAX_RECORD_BYTES};
use super::{FILE, SignatureStatus};
use crate::action::canonical::jcs;
use crate::hash;

/// Problems that a report lists; all are counted.
const MAX_PROBLEMS: usize = 100;

/// A record that is known from elsewhere to be in the log: a receipt that a client kept, a count noted down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Anchor {
    pub sequence: u64,
    /// Its hash in bare hex, where it is known.
    pub hash: Option<String>,
}

/// How sure it is that nothing is missing at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Tail {
    /// Every record up to an anchor that the caller named is there.
    Anchored,
    /// The last record is the one that the file's own head names: no accident, but whoever can write the file could
    /// have changed both.
    Head,
    /// Nothing says where the log should end.
    Unknown,
}

#[derive(Clone, Debug, Serialize)]
pub struct Problem {
    /// The record at fault, by its place in the log.
    pub sequence: u64,
    pub what: String,
}

#[derive(Clone, Debug, Serialize)]
pub struct VerifyReport {
    /// Nothing at all was found wrong.
    pub intact: bool,
    /// Records, receipts among them.
    pub total_events: u64,
    /// Records whose link to the one before (or, for the first, to none) is right.
    pub verified_links: u64,
    /// The first place at which something is wrong.
    pub broken_at: Option<u64>,
    pub log_id: Option<String>,
    pub receipts: u64,
    /// Receipts by what their evidence says of kernel and proxy (`agreement`); one without evidence is in none.
    pub agreement: BTreeMap<String, u64>,
    pub intents: u64,
    /// Intents without a receipt: what runs now, or what a dead gate left and its next start will close.
    pub open_intents: u64,
    /// How many params and outputs were there beside the records; `None` for an export, which has none.
    pub contents: Option<u64>,
    pub last: Option<Anchor>,
    pub tail: Tail,
    pub problem_count: u64,
    pub problems: Vec<Problem>,
}

#[derive(Debug, Error)]
pub enum VerifyError {
    #[error("{path}: {source}")]
    File { path: PathBuf, source: io::Error },
    #[error("{path}: {source}")]
    Database { path: PathBuf, source: rusqlite::Error },
    #[error("the export could not be written: {0}")]
    Write(io::Error),
}

/// Verifies the ledger directory, ledger file or JSONL export at `path`, reading only.
///
/// # Errors
/// Only when `path` cannot be read at all; whatever is wrong with what was read is in the report.
pub fn verify(path: &Path, keys: &PublicKeys, anchor: Option<&Anchor>) -> Result<VerifyReport, VerifyError> {
    let path = if path.is_dir() { path.join(FILE) } else { path.to_owned() };
    let mut check = Check::new(keys, anchor);
    if is_database(&path)? {
        let database = |source| VerifyError::Database { path: path.clone(), source };
        let connection = open_read_only(&path).map_err(database)?;
        let head = from_database(&connection, &mut check).map_err(database)?;
        Ok(check.finish(Some(head)))
    } else {
        let file = |source| VerifyError::File { path: path.clone(), source };
        from_lines(BufReader::new(File::open(&path).map_err(file)?), &mut check).map_err(file)?;
        Ok(check.finish(None))
    }
}

/// Writes every record of the ledger at `path` as a line of `out`, byte for byte as it was signed. Gives their number.
pub fn export(path: &Path, out: &mut dyn Write) -> Result<u64, VerifyError> {
    let path = if path.is_dir() { path.join(FILE) } else { path.to_owned() };
    let database = |source| VerifyError::Database { path: path.clone(), source };
    let connection = open_read_only(&path).map_err(database)?;
    let mut statement = connection.prepare("SELECT body FROM records ORDER BY sequence").map_err(database)?;
    let mut rows = statement.query([]).map_err(database)?;
    let mut written = 0;
    while let Some(row) = rows.next().map_err(database)? {
        let body = row.get_ref(0).map_err(database)?.as_bytes_or_null().unwrap_or_default().unwrap_or_default();
        out.write_all(body).and_then(|()| out.write_all(b"\n")).map_err(VerifyError::Write)?;
        written += 1;
    }
    out.flush().map_err(VerifyError::Write)?;
    Ok(written)
}

fn is_database(path: &Path) -> Result<bool, VerifyError> {
    let file = |source| VerifyError::File { path: path.to_owned(), source };
    let mut start = Vec::new();
    File::open(path).map_err(file)?.take(16).read_to_end(&mut start).map_err(file)?;
    // A damaged first page must not pass for an export of no lines.
    let named = path.extension().is_some_and(|extension| extension == "db");
    Ok(named || start == b"SQLite format 3\0")
}

/// A gate that runs, or that was killed, has a write-ahead log beside the file, and SQLite reads both. On a read-only
/// copy without one there is nothing to coordinate with, which SQLite has to be told.
pub(super) fn open_read_only(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(std::time::Duration::from_secs(5))?;
    let readable = connection.query_row("SELECT COUNT(*) FROM sqlite_schema", [], |row| row.get::<_, i64>(0));
    let mut wal = path.as_os_str().to_owned();
    wal.push("-wal");
    if readable.is_err() && !Path::new(&wal).exists() {
        let mut uri = "file:".to_owned();
        for &byte in path.as_os_str().as_encoded_bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'-' | b'_' => uri.push(char::from(byte)),
                other => uri.push_str(&format!("%{other:02X}")),
            }
        }
        uri.push_str("?immutable=1");
        return Connection::open_with_flags(uri, flags | OpenFlags::SQLITE_OPEN_URI);
    }
    readable?;
    Ok(connection)
}

fn from_database(connection: &Connection, check: &mut Check<'_>) -> rusqlite::Result<Option<Head>> {
    connection.execute_batch("PRAGMA trusted_schema=OFF; PRAGMA query_only=ON; BEGIN")?;
    let head = match read_head(connection) {
        Ok(head) => head,
        Err(error) => {
            check.problem(0, format!("the head cannot be read: {error}"));
            None
        }
    };
    if let Err(error) = read_records(connection, check) {
        check.problem(check.place + 1, format!("the file cannot be read on: {error}"));
    }
    Ok(head)
}

fn read_records(connection: &Connection, check: &mut Check<'_>) -> rusqlite::Result<()> {
    let mut named = 0;
    let mut beside = connection.prepare("SELECT name, bytes FROM contents WHERE record_id = ?1")?;
    // NOT INDEXED: a damaged index must not hide a record.
    let mut statement = connection.prepare("SELECT sequence, body FROM records NOT INDEXED ORDER BY sequence")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let place: i64 = row.get(0)?;
        let body = match row.get_ref(1)? {
            ValueRef::Text(bytes) => bytes,
            _ => b"",
        };
        let Some(record) = check.record(body, Some(place)) else { continue };
        named += check_contents(&record, &mut beside, check)?;
    }
    let all: i64 = connection.query_row("SELECT COUNT(*) FROM contents", [], |row| row.get(0))?;
    if all != named {
        check.problem(check.place + 1, "bytes lie beside the log that no record names".into());
    }
    check.contents = u64::try_from(named).ok();
    Ok(())
}

/// Counts the bytes beside a record, whether they match or not.
fn check_contents(
    record: &Map<String, Value>,
    beside: &mut rusqlite::Statement<'_>,
    check: &mut Check<'_>,
) -> rusqlite::Result<i64> {
    let Some(id) = Kind::of(record).and_then(|kind| record.get(kind.id_field())).and_then(Value::as_str) else {
        return Ok(0);
    };
    let mut found = 0;
    let mut rows = beside.query([id])?;
    while let Some(row) = rows.next()? {
        let name: String = row.get(0)?;
        let bytes: Vec<u8> = row.get(1)?;
        let said = record.get("contents").and_then(|index| index.get(&name)).and_then(|entry| entry.get("sha256"));
        found += 1;
        if said.and_then(Value::as_str) != Some(&hash::sha256_tagged(&bytes)) {
            check.problem(check.place, format!("the bytes called {name:?} beside it are not the ones that it names"));
        }
    }
    Ok(found)
}

fn from_lines(mut lines: impl BufRead, check: &mut Check<'_>) -> io::Result<()> {
    let mut line = Vec::new();
    loop {
        line.clear();
        let limit = u64::try_from(MAX_RECORD_BYTES + 2).unwrap_or(u64::MAX);
        if lines.by_ref().take(limit).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        if line.pop() != Some(b'\n') {
            check.problem(check.place + 1, "a line without its end".into());
            return Ok(());
        }
        check.record(&line, None);
    }
}

/// One pass over the records in their order.
struct Check<'a> {
    keys: &'a PublicKeys,
    anchor: Option<&'a Anchor>,
    anchored: bool,
    /// Of the record read last, counted by us.
    place: u64,
    previous: Option<String>,
    log_id: Option<String>,
    ids: HashSet<String>,
    open: HashMap<String, OpenIntent>,
    used: HashSet<[u8; 32]>,
    receipts: u64,
    agreement: BTreeMap<String, u64>,
    intents: u64,
    verified_links: u64,
    contents: Option<u64>,
    broken_at: Option<u64>,
    problem_count: u64,
    problems: Vec<Problem>,
}

/// What a receipt must agree with.
struct OpenIntent {
    action_id: String,
    principal: String,
    request_hash: String,
}

impl<'a> Check<'a> {
    fn new(keys: &'a PublicKeys, anchor: Option<&'a Anchor>) -> Self {
        Self {
            keys,
            anchor,
            anchored: false,
            place: 0,
            previous: None,
            log_id: None,
            ids: HashSet::new(),
            open: HashMap::new(),
            used: HashSet::new(),
            receipts: 0,
            agreement: BTreeMap::new(),
            intents: 0,
            verified_links: 0,
            contents: None,
            broken_at: None,
            problem_count: 0,
            problems: Vec::new(),
        }
    }

    fn problem(&mut self, sequence: u64, what: String) {
        self.problem_count += 1;
        self.broken_at = Some(self.broken_at.map_or(sequence, |first| first.min(sequence)));
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(Problem { sequence, what });
        }
    }

    /// Checks the next record; gives it back when it could be read.
    fn record(&mut self, body: &[u8], row: Option<i64>) -> Option<Map<String, Value>> {
        self.place += 1;
        let place = self.place;
        let previous = self.previous.take();
        let Ok(record) = serde_json::from_slice::<Map<String, Value>>(body) else {
            self.problem(place, "it is not a JSON object".into());
            return None;
        };
        // The text itself was signed only by way of its canonical form, so no other text may stand for it.
        if jcs(&record).ok().as_deref() != Some(body) {
            self.problem(place, "it is not in the canonical form".into());
        }
        let Some(kind) = Kind::of(&record) else {
            self.problem(place, "it is neither a receipt nor an event".into());
            return None;
        };
        // From the content and not from what it says, so that the next link shows what was changed here.
        self.previous = record::content_hash(&record, kind).ok();
        match record::signature_status_of(&record, kind, self.keys, self.previous.as_deref()) {
            SignatureStatus::Valid => {}
            status => self.problem(place, format!("its signature: {status:?}")),
        }
        self.place_in_chain(&record, kind, row, previous.as_deref());
        self.place_in_call(&record, kind);
        if let Some(anchor) = self.anchor.filter(|anchor| anchor.sequence == place) {
            self.anchored = anchor.hash.is_none() || anchor.hash == self.previous;
            if !self.anchored {
                self.problem(place, "it is not the record that was known to be here".into());
            }
        }
        Some(record)
    }

    fn place_in_chain(&mut self, record: &Map<String, Value>, kind: Kind, row: Option<i64>, previous: Option<&str>) {
        let place = self.place;
        if record.get("sequence").and_then(Value::as_u64) != Some(place)
            || row.is_some_and(|row| u64::try_from(row) != Ok(place))
        {
            self.problem(place, "its number is not its place".into());
        }
        let link = match record.get(kind.previous_field()) {
            Some(Value::Null) => Some(None),
            Some(Value::String(spelled)) => kind.bare(spelled).map(Some),
            _ => None,
        };
        // A record after one that could not be read links to nothing that is known.
        if link == Some(previous) && (place == 1) == previous.is_none() {
            self.verified_links += 1;
        } else {
            self.problem(place, "it does not link to the record before it".into());
        }
        let log_id = record.get("log_id").and_then(Value::as_str);
        match (&self.log_id, log_id) {
            (None, Some(log_id)) => self.log_id = Some(log_id.to_owned()),
            (Some(first), Some(log_id)) if first == log_id => {}
            _ => self.problem(place, "it is of another log".into()),
        }
        match record.get(kind.id_field()).and_then(Value::as_str) {
            Some(id) if self.ids.insert(id.to_owned()) => {}
            _ => self.problem(place, "its id is missing or was used before".into()),
        }
    }

    /// Intents use each grant once, and receipts close what is open and say the same of it.
    fn place_in_call(&mut self, record: &Map<String, Value>, kind: Kind) {
        let place = self.place;
        let text = |field: &str| record.get(field).and_then(Value::as_str).unwrap_or_default();
        let grant_id = text("grant_id").to_owned();
        match kind {
            Kind::Receipt => {
                self.receipts += 1;
                let evidence = record.get("egress_evidence").and_then(|evidence| evidence.get(0));
                if let Some(word) = evidence.and_then(|summary| summary.get("agreement")).and_then(Value::as_str) {
                    *self.agreement.entry(word.to_owned()).or_default() += 1;
                }
                match self.open.remove(&grant_id) {
                    None => self.problem(place, "it closes no open intent".into()),
                    Some(intent)
                        if intent.action_id != text("action_id")
                            || intent.principal != text("principal")
                            || intent.request_hash != text("request_hash") =>
                    {
                        self.problem(place, "it says otherwise than its intent".into());
                    }
                    Some(_) => {}
                }
            }
            Kind::Event if text("event_type") == INTENT => {
                self.intents += 1;
                let details = record.get("details").unwrap_or(&Value::Null);
                let plan = event::plan_of(details);
                let grant: Option<Grant> =
                    details.get("grant").and_then(|grant| serde_json::from_value(grant.clone()).ok());
                let (Some(plan), Some(grant)) = (plan, grant) else {
                    return self.problem(place, "its grant or plan cannot be read".into());
                };
                if grant.grant_id != grant_id || plan.hash().ok().as_deref() != Some(&grant.plan_hash) {
                    self.problem(place, "its grant is not for its plan".into());
                }
                if self.used.insert(hash::sha256(grant_id.as_bytes())) {
                    let intent = OpenIntent {
                        action_id: plan.action_id,
                        principal: plan.principal,
                        request_hash: plan.request_hash,
                    };
                    self.open.insert(grant_id, intent);
                } else {
                    self.problem(place, "it uses a grant that was used before".into());
                }
            }
            Kind::Event => {}
        }
    }

    fn finish(mut self, head: Option<Option<Head>>) -> VerifyReport {
        let end = self.place + 1;
        let mut tail = Tail::Unknown;
        if let Some(head) = head {
            match head {
                None => self.problem(end, "the file has no head".into()),
                Some(head) => {
                    if head.sequence != self.place || head.hash != self.previous {
                        let what = format!("the head names record {} as the last", head.sequence);
                        self.problem(end.min(head.sequence.saturating_add(1)), what);
                    } else {
                        tail = Tail::Head;
                    }
                    if self.log_id.as_ref().is_some_and(|log_id| *log_id != head.log_id) {
                        self.problem(1, "the head is of another log".into());
                    }
                    self.log_id.get_or_insert(head.log_id);
                }
            }
        }
        if let Some(anchor) = self.anchor {
            if self.anchored || anchor.sequence == 0 {
                tail = Tail::Anchored;
            } else if anchor.sequence > self.place {
                self.problem(end, format!("it ends here, and record {} is known to have been", anchor.sequence));
            }
        }
        let last = (self.place > 0).then(|| Anchor { sequence: self.place, hash: self.previous.clone() });
        VerifyReport {
            intact: self.problem_count == 0,
            total_events: self.place,
            verified_links: self.verified_links,
            broken_at: self.broken_at,
            log_id: self.log_id,
            receipts: self.receipts,
            agreement: self.agreement,
            intents: self.intents,
            open_intents: u64::try_from(self.open.len()).unwrap_or(u64::MAX),
            contents: self.contents,
            last,
            tail,
            problem_count: self.problem_count,
            problems: self.problems,
        }
    }
}
