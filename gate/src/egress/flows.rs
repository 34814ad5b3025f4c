//! The journal of flows: what the proxy carried or refused, what the kernel refused and what the gate refused before
//! anything ran, in one numbering, so that an operator can look and follow.
//!
//! It is bounded and in memory; receipts keep the flows of their executions for good. What is nobody's (a process that is
//! no action's tried the proxy) has a ring of its own, so that it cannot push the actions' flows out.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::{broadcast, watch};

use super::flow::{DecidedBy, FlowRecord, Verdict};
use super::kernel::KernelEvent;
use crate::ids;
use crate::time::Timestamp;

#[cfg(test)]
mod tests;

/// Flows of actions that are kept; the oldest go first.
pub const KEPT: usize = 10_000;
/// Flows of nobody that are kept.
pub const KEPT_UNATTRIBUTED: usize = 1_000;
/// Flows of one answer when no limit is asked for.
pub const DEFAULT_LIMIT: usize = 100;

/// Whose a flow is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Owner {
    /// The grant's id.
    pub execution_id: String,
    pub action_id: String,
    pub principal: String,
    pub workspace: String,
}

/// A refusal of the kernel program, with the id by which it can be asked about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KernelRefusal {
    #[serde(flatten)]
    pub event: KernelEvent,
    #[serde(flatten)]
    pub owner: Option<Owner>,
    pub decision_id: String,
}

impl KernelRefusal {
    pub fn new(event: KernelEvent, owner: Option<Owner>) -> Self {
        Self { event, owner, decision_id: ids::mint() }
    }

    /// As receipts and the journal show it.
    pub fn view(&self) -> Value {
        let mut view = serde_json::to_value(self).unwrap_or_else(|_| json!({}));
        view["verdict"] = json!(Verdict::Deny);
        view["decided_by"] = json!("hook");
        view["rule"] = json!(self.event.reason);
        view
    }
}

/// A call that names what its action's profile does not permit: refused before anything ran.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RefusedCall {
    pub time: Timestamp,
    pub action_id: String,
    pub principal: String,
    pub workspace: String,
    #[serde(flatten)]
    pub asked: Asked,
    /// The reason of the refusal.
    pub rule: String,
    pub decision_id: String,
}

/// What a call would have contacted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Asked {
    /// The host as the URL parser has it: a name, or an address.
    pub name: Option<String>,
    pub port: Option<u16>,
    /// `http` or `https`.
    pub protocol: Option<String>,
    /// The HTTP method.
    pub method: Option<String>,
}

impl RefusedCall {
    /// As the ledger's event and the journal show it.
    pub fn view(&self) -> Value {
        let mut view = serde_json::to_value(self).unwrap_or_else(|_| json!({}));
        view["verdict"] = json!(Verdict::Deny);
        view["decided_by"] = json!("gate");
        view
    }
}

/// One attempt, allowed or not.
#[derive(Clone, Debug)]
pub enum Noted {
    Connection(Arc<FlowRecord>),
    Kernel(Arc<KernelRefusal>),
    Call(Arc<RefusedCall>),
}

impl Noted {
    fn view(&self) -> Value {
        match self {
            Self::Connection(record) => {
                let mut view = serde_json::to_value(record.as_ref()).unwrap_or_else(|_| json!({}));
                if view.get("decided_by").is_none_or(Value::is_null) {
                    view["decided_by"] = json!("proxy");
                }
                view
            }
            Self::Kernel(refusal) => refusal.view(),
            Self::Call(call) => call.view(),
        }
    }

    fn time(&self) -> Timestamp {
        match self {
            Self::Connection(record) => record.time,
            Self::Kernel(refusal) => refusal.event.time,
            Self::Call(call) => call.time,
        }
    }

    fn decision_id(&self) -> &str {
        match self {
            Self::Connection(record) => &record.decision_id,
            Self::Kernel(refusal) => &refusal.decision_id,
            Self::Call(call) => &call.decision_id,
        }
    }

    fn execution_id(&self) -> Option<&str> {
        match self {
            Self::Connection(record) => record.execution_id.as_deref(),
            Self::Kernel(refusal) => refusal.owner.as_ref().map(|owner| owner.execution_id.as_str()),
            Self::Call(_) => None,
        }
    }

    fn action_id(&self) -> Option<&str> {
        match self {
            Self::Connection(record) => record.action_id.as_deref(),
            Self::Kernel(refusal) => refusal.owner.as_ref().map(|owner| owner.action_id.as_str()),
            Self::Call(call) => Some(&call.action_id),
        }
    }

    fn principal(&self) -> Option<&str> {
        match self {
            Self::Connection(record) => record.principal.as_deref(),
            Self::Kernel(refusal) => refusal.owner.as_ref().map(|owner| owner.principal.as_str()),
            Self::Call(call) => Some(&call.principal),
        }
    }

    /// The word of its verdict.
    fn verdict(&self) -> String {
        match self {
            Self::Connection(record) => word(record.verdict),
            Self::Kernel(_) | Self::Call(_) => word(Verdict::Deny),
        }
    }
}

fn word(verdict: Verdict) -> String {
    json!(verdict).as_str().unwrap_or_default().to_owned()
}

/// Which flows to read; what is `None` does not narrow.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    pub action: Option<String>,
    pub principal: Option<String>,
    /// `allow`, `deny` or `would_deny`.
    pub verdict: Option<String>,
    /// Only flows that began at this time or later.
    pub since: Option<Timestamp>,
    /// Only flows that were noted after the one with this number.
    pub after: Option<u64>,
    pub limit: Option<usize>,
}

impl Filter {
    fn lets(&self, noted: &Noted) -> bool {
        let same = |wanted: &Option<String>, there: Option<&str>| match wanted {
            None => true,
            Some(wanted) => there == Some(wanted),
        };
        same(&self.action, noted.action_id())
            && same(&self.principal, noted.principal())
            && self.verdict.as_ref().is_none_or(|wanted| *wanted == noted.verdict())
            && self.since.is_none_or(|since| noted.time() >= since)
    }
}

/// Some flows, in the order in which they were noted.
#[derive(Debug)]
pub struct Page {
    /// Each with its `sequence`.
    pub flows: Vec<Value>,
    /// What `after` of the next page is.
    pub next: u64,
    /// Flows since the start that went by unseen, because the journal was too slow.
    pub lost: u64,
}

type Ring = VecDeque<(u64, Noted)>;

#[derive(Debug)]
struct Books {
    attributed: Ring,
    unattributed: Ring,
    newest: u64,
    /// Flows that were compared with the kernel before they came here, by decision id.
    compared: HashMap<String, Arc<FlowRecord>>,
}

#[derive(Debug)]
struct Shared {
    books: Mutex<Books>,
    newest: watch::Sender<u64>,
    closed: watch::Sender<bool>,
    lost: AtomicU64,
}

/// The journal.
#[derive(Clone, Debug)]
pub struct Flows(Arc<Shared>);

impl Default for Flows {
    fn default() -> Self {
        Self::starting_after(first_number())
    }
}

/// Numbers of a later start are greater than those of an earlier one, so that whoever follows across a restart misses
/// nothing; and they are whole in a JSON number.
fn first_number() -> u64 {
    u64::try_from(Timestamp::now().millis()).unwrap_or(0).saturating_mul(1024)
}

impl Flows {
    fn starting_after(number: u64) -> Self {
        let books =
            Books { attributed: Ring::new(), unattributed: Ring::new(), newest: number, compared: HashMap::new() };
        Self(Arc::new(Shared {
            books: Mutex::new(books),
            newest: watch::Sender::new(number),
            closed: watch::Sender::new(false),
            lost: AtomicU64::new(0),
        }))
    }

    pub fn note(&self, noted: Noted) {
        // What the gate tries at itself is in the ledger, as one result.
        if noted.action_id() == Some(crate::pipeline::dispatch::attempts::ACTION_ID) {
            return;
        }
        let number = {
            let mut books = self.books();
            let noted = match books.compared.remove(noted.decision_id()) {
                Some(record) => Noted::Connection(record),
                None => noted,
            };
            books.newest = books.newest.saturating_add(1);
            let number = books.newest;
            let (ring, most) = match noted.action_id() {
                Some(_) => (&mut books.attributed, KEPT),
                None => (&mut books.unattributed, KEPT_UNATTRIBUTED),
            };
            if ring.len() >= most {
                ring.pop_front();
            }
            ring.push_back((number, noted));
            number
        };
        // Two notes may come here in the other order.
        self.0.newest.send_if_modified(|newest| {
            let later = number > *newest;
            *newest = number.max(*newest);
            later
        });
    }

    /// The number of the newest flow.
    pub fn newest(&self) -> u64 {
        self.books().newest
    }

    /// Puts the flows of an execution that is over, as they were compared with the kernel's figures, in the place of what
    /// was noted of them as they ended, with the same numbers. `before` is the newest when the execution began. A
    /// connection that only the kernel saw is noted now.
    pub fn compared(&self, flows: &[FlowRecord], before: u64) {
        let mut alone = Vec::new();
        let mut compared = HashMap::new();
        for flow in flows.iter().filter(|flow| flow.agreement.is_some()) {
            if flow.decided_by == DecidedBy::Hook {
                alone.push(Noted::Connection(Arc::new(flow.clone())));
            } else {
                compared.insert(flow.decision_id.clone(), Arc::new(flow.clone()));
            }
        }
        if !compared.is_empty() {
            let mut books = self.books();
            let from = books.attributed.partition_point(|(number, _)| *number <= before);
            for (_, noted) in books.attributed.range_mut(from..) {
                if let Some(record) = compared.remove(noted.decision_id()) {
                    *noted = Noted::Connection(record);
                }
            }
            // The rest is on its way here, or was lost on it: what is lost must not pile up.
            if books.compared.len() + compared.len() > KEPT {
                books.compared.clear();
            }
            books.compared.extend(compared);
        }
        alone.into_iter().for_each(|noted| self.note(noted));
    }

    /// Notes what the proxy records, until the proxy is gone.
    pub async fn collect(self, mut records: broadcast::Receiver<Arc<FlowRecord>>) {
        loop {
            match records.recv().await {
                Ok(record) => self.note(Noted::Connection(record)),
                Err(broadcast::error::RecvError::Lagged(lost)) => {
                    self.0.lost.fetch_add(lost, Ordering::Relaxed);
                    tracing::warn!(lost, "flows are missing in the journal; the receipts have them");
                }
                Err(broadcast::error::RecvError::Closed) => return,
            }
        }
    }

    /// The newest flows that the filter lets through; with `after`, the first ones after it.
    pub fn page(&self, filter: &Filter) -> Page {
        let limit = filter.limit.unwrap_or(DEFAULT_LIMIT).min(KEPT + KEPT_UNATTRIBUTED);
        let books = self.books();
        let newest = books.newest;
        let after = filter.after.unwrap_or(0);
        let mut found: Vec<(u64, Noted)> = [&books.attributed, &books.unattributed]
            .into_iter()
            .flat_map(|ring| ring.range(ring.partition_point(|(number, _)| *number <= after)..))
            .filter(|(_, noted)| filter.lets(noted))
            .cloned()
            .collect();
        drop(books);
        found.sort_unstable_by_key(|(number, _)| *number);
        let over = found.len().saturating_sub(limit);
        let mut next = newest;
        if filter.after.is_some() {
            found.truncate(limit);
            if let (true, Some((last, _))) = (over > 0, found.last()) {
                next = *last;
            }
        } else {
            found.drain(..over);
        }
        Page { flows: views(found), next, lost: self.0.lost.load(Ordering::Relaxed) }
    }

    /// The same once there is something, or an empty page when `end` comes first or the journal is closed.
    pub async fn next_page(&self, filter: &Filter, end: impl Future<Output = ()>) -> Page {
        let (mut newest, mut closed) = (self.0.newest.subscribe(), self.0.closed.subscribe());
        let mut end = std::pin::pin!(end);
        loop {
            newest.mark_unchanged();
            let page = self.page(filter);
            if !page.flows.is_empty() {
                return page;
            }
            tokio::select! {
                _ = newest.changed() => {}
                _ = closed.wait_for(|closed| *closed) => return page,
                () = &mut end => return page,
            }
        }
    }

    /// The flows that `id` stands for: of that decision, or of that execution (its refusals only, if it has any).
    pub fn of(&self, id: &str) -> Vec<Value> {
        let mut found: Vec<(u64, Noted)> = {
            let books = self.books();
            let all = books.attributed.iter().chain(&books.unattributed);
            all.filter(|(_, noted)| noted.decision_id() == id || noted.execution_id() == Some(id)).cloned().collect()
        };
        let denied = word(Verdict::Deny);
        if found.iter().any(|(_, noted)| noted.verdict() == denied) {
            found.retain(|(_, noted)| noted.verdict() == denied);
        }
        found.sort_unstable_by_key(|(number, _)| *number);
        views(found)
    }

    /// Lets everybody who waits go: the gate drains.
    pub fn close(&self) {
        self.0.closed.send_replace(true);
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.0.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn views(found: Vec<(u64, Noted)>) -> Vec<Value> {
    found
        .into_iter()
        .map(|(number, noted)| {
            let mut view = noted.view();
            view["sequence"] = json!(number);
            view
        })
        .collect()
}
