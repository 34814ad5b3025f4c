//! Executions that the proxy serves at present, their connections and their records.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, broadcast, watch};
use tokio::time::Instant;

use super::Limits;
use super::count::{Budget, Counts};
use super::leg::Duplex;
use super::request::Target;
use crate::egress::LeafId;
use crate::egress::flow::{DecidedBy, End, FlowRecord, NameVerified, Protocol, Verdict};
use crate::egress::names::Bucket;
use crate::egress::profile::{DenyReason, Profile};
use crate::ids;
use crate::time::Timestamp;

/// What the stand-in addresses of one execution stand for.
pub trait Names: Send + Sync {
    /// The name that the execution was given this address for.
    fn name_of(&self, address: Ipv4Addr) -> Option<String>;
}

/// The resolver of one execution, for queries that come in a stream.
pub trait DnsOverTcp: Send + Sync {
    /// Answers until the client has no more to ask.
    fn serve<'a>(
        &'a self,
        stream: &'a mut dyn Duplex,
        client: SocketAddr,
    ) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>>;
}

/// Whose connections these are, and what they may reach.
#[derive(Clone)]
pub struct Session {
    pub execution_id: String,
    pub action_id: String,
    pub principal: String,
    pub workspace: String,
    pub profile: Arc<Profile>,
    /// Without it no connection to a stand-in address is served.
    pub names: Option<Arc<dyn Names>>,
    /// Without it no stream to port 53 is served.
    pub dns: Option<Arc<dyn DnsOverTcp>>,
    /// It has no end that is known before: its bytes are not bounded, and past the bound of connections that are recorded
    /// one by one the others are served and one record counts them.
    pub lasts: bool,
}

/// One execution that is served.
pub struct State {
    pub session: Session,
    pub budget: Arc<Budget>,
    limits: Limits,
    closed: watch::Sender<bool>,
    books: Mutex<Books>,
    settled: Notify,
    flows: broadcast::Sender<Arc<FlowRecord>>,
    /// The decision id of the next connection, where it is given.
    first_decision: Mutex<Option<String>>,
}

struct Books {
    live: usize,
    records: Vec<FlowRecord>,
    begun: Bucket,
    /// Stands for all connections after the records are full.
    overflow: Option<FlowRecord>,
    /// Stands for all connections past the rate.
    over_rate: Option<FlowRecord>,
}

/// Why a connection of a known execution is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// As many are open as may be.
    Connections,
    /// As many were made as are recorded one by one.
    Records,
    /// More were begun, in this time, than may be.
    Rate,
}

impl Full {
    /// As records and answers name it.
    pub const fn rule(self) -> &'static str {
        match self {
            Self::Connections => "connection_limit",
            Self::Records => "connections_per_execution",
            Self::Rate => "connection_rate",
        }
    }
}

impl Books {
    fn new(limits: &Limits) -> Self {
        let begun = Bucket::new(limits.connections_burst, limits.connections_per_second);
        Self { live: 0, records: Vec::new(), begun, overflow: None, over_rate: None }
    }
}

/// The executions by leaf.
#[derive(Default)]
pub struct Registry(Mutex<HashMap<LeafId, Arc<State>>>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Registry {
    /// Serves an execution from now on. One that had the same leaf is over: its connections are cut.
    pub fn insert(
        &self,
        leaf: LeafId,
        session: Session,
        limits: &Limits,
        flows: &broadcast::Sender<Arc<FlowRecord>>,
    ) -> Arc<State> {
        let bytes = if session.lasts { u64::MAX } else { limits.bytes_per_execution };
        let state = Arc::new(State {
            session,
            budget: Arc::new(Budget::new(bytes)),
            limits: limits.clone(),
            closed: watch::Sender::new(false),
            books: Mutex::new(Books::new(limits)),
            settled: Notify::new(),
            flows: flows.clone(),
            first_decision: Mutex::default(),
        });
        if let Some(before) = lock(&self.0).insert(leaf, Arc::clone(&state)) {
            before.closed.send_replace(true);
        }
        state
    }

    /// Ends the service for an execution; what is accepted from now on is nobody's.
    pub fn remove(&self, leaf: LeafId, state: &Arc<State>) {
        let mut served = lock(&self.0);
        if served.get(&leaf).is_some_and(|there| Arc::ptr_eq(there, state)) {
            served.remove(&leaf);
        }
        state.closed.send_replace(true);
    }

    /// Takes a connection in for the execution of this leaf. Under the lock that `remove` takes, so that every
    /// connection is either counted before the execution ends or not taken. `number` is the kernel's for it.
    pub fn admit(
        &self,
        leaf: LeafId,
        client: SocketAddr,
        number: Option<u64>,
    ) -> Option<Result<Connection, (Arc<State>, Full)>> {
        let served = lock(&self.0);
        let state = served.get(&leaf)?;
        Some(match state.enter() {
            Ok(()) => Ok(Connection::new(Arc::clone(state), client, number)),
            Err(full) => Err((Arc::clone(state), full)),
        })
    }
}

#[cfg(feature = "test-guards")]
impl Registry {
    /// Some execution that runs, for whom a stranger is taken when the guard is off.
    pub fn anybody(&self) -> Option<crate::egress::Caller> {
        let off = !crate::guards::on(crate::guards::Guard::Attribution);
        let leaf = off.then(|| lock(&self.0).keys().next().copied()).flatten()?;
        Some(crate::egress::Caller { leaf, original: None })
    }
}

impl State {
    fn enter(&self) -> Result<(), Full> {
        let mut books = lock(&self.books);
        // First: to be refused for another reason is not free either.
        if !books.begun.take(Instant::now()) {
            return Err(Full::Rate);
        }
        let recorded = books.live + books.records.len();
        if recorded >= self.limits.connections_per_execution && !self.session.lasts {
            return Err(Full::Records);
        }
        if books.live >= self.limits.concurrent_connections_per_execution {
            return Err(Full::Connections);
        }
        books.live += 1;
        Ok(())
    }

    pub fn decide_first_as(&self, decision_id: &str) {
        *lock(&self.first_decision) = Some(decision_id.to_owned());
    }

    /// Returns once the execution is over.
    pub async fn over(&self) {
        // The sender lives in `self`, so that the only end is the one that is waited for.
        let _ = self.closed.subscribe().wait_for(|closed| *closed).await;
    }

    /// Waits until every connection is noted and gives the records, oldest end first.
    pub async fn settle(&self) -> Vec<FlowRecord> {
        loop {
            let settled = self.settled.notified();
            {
                let mut books = lock(&self.books);
                if books.live == 0 {
                    let mut records = std::mem::take(&mut books.records);
                    let (overflow, over_rate) = (books.overflow.take(), books.over_rate.take());
                    // Where they were served, each was sent when it ended.
                    for record in overflow.iter().filter(|_| !self.session.lasts).chain(&over_rate) {
                        let _ = self.flows.send(Arc::new(record.clone()));
                    }
                    records.extend(overflow.into_iter().chain(over_rate));
                    return records;
                }
            }
            settled.await;
        }
    }

    /// Notes a connection that was refused without being served, and gives its decision id.
    pub fn note_full(&self, full: Full, client: SocketAddr, number: Option<u64>) -> String {
        let mut record = blank(client);
        self.name(&mut record);
        let decision_id = record.decision_id.clone();
        record.end = End::Answered;
        record.uncounted = true;
        record.rule = full.rule().to_owned();
        if full == Full::Connections {
            record.connection = number;
            self.keep(record);
            return decision_id;
        }
        let mut books = lock(&self.books);
        let one_for_all = if full == Full::Rate { &mut books.over_rate } else { &mut books.overflow };
        match one_for_all {
            Some(all) => {
                all.connections = all.connections.saturating_add(1);
                return all.decision_id.clone();
            }
            none => *none = Some(record),
        }
        decision_id
    }

    fn name(&self, record: &mut FlowRecord) {
        let Session { execution_id, action_id, principal, workspace, .. } = self.session.clone();
        record.execution_id = Some(execution_id);
        record.action_id = Some(action_id);
        record.principal = Some(principal);
        record.workspace = Some(workspace);
    }

    fn keep(&self, record: FlowRecord) {
        let _ = self.flows.send(Arc::new(record.clone()));
        let mut books = lock(&self.books);
        if books.records.len() < self.limits.connections_per_execution {
            books.records.push(record);
            return;
        }
        match &mut books.overflow {
            Some(overflow) => overflow.fold(&record),
            none => *none = Some(FlowRecord { rule: "connections_per_execution".to_owned(), ..record }),
        }
    }
}

/// A record that says nothing yet but that someone connected and was not served.
pub fn blank(client: SocketAddr) -> FlowRecord {
    FlowRecord {
        time: Timestamp::now(),
        execution_id: None,
        action_id: None,
        principal: None,
        workspace: None,
        name: None,
        address: None,
        port: None,
        protocol: None,
        sni: None,
        name_verified: None,
        carried: false,
        opaque: false,
        verdict: Verdict::Deny,
        decided_by: DecidedBy::Proxy,
        rule: String::new(),
        end: End::OpenAtClose,
        error: None,
        bytes_from_sandbox: 0,
        bytes_to_sandbox: 0,
        bytes_to_upstream: 0,
        bytes_from_upstream: 0,
        duration_ms: 0,
        decision_id: ids::mint(),
        client: Some(client),
        connections: 1,
        connection: None,
        uncounted: false,
        kernel: None,
        agreement: None,
    }
}

/// One connection that is served. It is noted when this is dropped, whatever the reason.
pub struct Connection {
    state: Arc<State>,
    pub counts: Arc<Counts>,
    record: Mutex<FlowRecord>,
    /// The rule that would have refused it, where its action is in audit.
    would_deny: Mutex<Option<DenyReason>>,
}

impl Connection {
    fn new(state: Arc<State>, client: SocketAddr, number: Option<u64>) -> Self {
        let mut record = blank(client);
        state.name(&mut record);
        record.rule = "no_request".to_owned();
        record.connection = number;
        if let Some(decision_id) = lock(&state.first_decision).take() {
            record.decision_id = decision_id;
        }
        Self { state, counts: Arc::new(Counts::new()), record: Mutex::new(record), would_deny: Mutex::default() }
    }

    pub fn state(&self) -> &Arc<State> {
        &self.state
    }

    pub fn decision_id(&self) -> String {
        lock(&self.record).decision_id.clone()
    }

    pub fn asked(&self, target: &Target) {
        let mut record = lock(&self.record);
        record.name = Some(target.host.to_string());
        record.port = Some(target.port);
        record.protocol = Some(target.protocol);
    }

    /// Notes that the kernel brought it, and where it was to go.
    pub fn carried(&self, original: SocketAddr) {
        let mut record = lock(&self.record);
        record.carried = true;
        record.name = Some(original.ip().to_canonical().to_string());
        record.port = Some(original.port());
        record.protocol = Some(Protocol::Tcp);
    }

    pub fn client(&self) -> Option<SocketAddr> {
        lock(&self.record).client
    }

    /// Notes what it turned out to speak.
    pub fn spoken(&self, protocol: Protocol) {
        lock(&self.record).protocol = Some(protocol);
    }

    pub fn named(&self, sni: Option<&str>) {
        lock(&self.record).sni = sni.map(str::to_owned);
    }

    /// Notes what was let through, and by what its name was held to.
    pub fn verified(&self, by: Option<NameVerified>, opaque: bool) {
        let mut record = lock(&self.record);
        record.name_verified = by;
        record.opaque = opaque;
    }

    pub fn allowed(&self) {
        let (verdict, rule) = match *lock(&self.would_deny) {
            None => (Verdict::Allow, "profile"),
            Some(reason) => (Verdict::WouldDeny, reason.as_str()),
        };
        let mut record = lock(&self.record);
        record.verdict = verdict;
        record.rule = rule.to_owned();
    }

    /// Notes that no entry permits it: what is let through from here on would be refused.
    pub fn audited(&self, reason: DenyReason) {
        *lock(&self.would_deny) = Some(reason);
    }

    pub fn refused(&self, rule: &str) {
        let mut record = lock(&self.record);
        record.verdict = Verdict::Deny;
        record.rule = rule.to_owned();
    }

    pub fn failed(&self, error: &str) {
        lock(&self.record).error = Some(error.to_owned());
    }

    pub fn dialled(&self, address: IpAddr) {
        lock(&self.record).address = Some(address);
    }

    pub fn ended(&self, end: End) {
        lock(&self.record).end = end;
    }

    /// Whether its end is known already; a record starts as open.
    pub fn has_ended(&self) -> bool {
        lock(&self.record).end != End::OpenAtClose
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let mut record = lock(&self.record).clone();
        let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        record.bytes_from_sandbox = read(&self.counts.from_sandbox);
        record.bytes_to_sandbox = read(&self.counts.to_sandbox);
        record.bytes_from_upstream = read(&self.counts.from_upstream);
        record.bytes_to_upstream = read(&self.counts.to_upstream);
        record.duration_ms = self.counts.elapsed_ms();
        self.state.keep(record);
        let mut books = lock(&self.state.books);
        books.live -= 1;
        if books.live == 0 {
            self.state.settled.notify_waiters();
        }
    }
}
