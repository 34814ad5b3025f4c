//! What runs at this moment, and the one way to end it from outside.
//!
//! Whoever starts an execution registers it and goes on only while the guard lives. [`Executions::kill`] marks it and wakes
//! whoever waits in [`Registered::killed`]; the mark is settled once, when the execution begins to end
//! ([`Registered::ending`]), so that a kill that was acknowledged is in the receipt, and one that came too late is told so.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use tokio::sync::watch;

use crate::time::Timestamp;

/// The longest reason that a kill may give, in characters.
pub const MAX_REASON_CHARS: usize = 256;

/// How far an execution is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// For a place ([`crate::config::Sandbox::max_concurrent`]); nothing of it has run.
    Waiting,
    Running,
    /// Its end has begun: nothing can change what it was any more.
    Ending,
}

/// One execution, as operators see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Execution {
    /// The id of its grant.
    pub id: String,
    pub action_id: String,
    pub principal: String,
    pub listener: String,
    /// The lease that it was called with.
    pub lease_jti: String,
    pub session_id: String,
    pub decision_id: String,
    pub trace_id: String,
    pub started_at: Timestamp,
    pub phase: Phase,
    /// The cgroup id of its leaf, once it has one.
    pub leaf: Option<u64>,
}

/// Who ended an execution, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Killed {
    /// The operator's name.
    pub by: String,
    pub why: Option<String>,
    pub at: Timestamp,
}

/// Why an execution was not killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotKilled {
    #[error("nothing runs under this id")]
    NotRunning,
    #[error("it is ending already, and its receipt says how")]
    Ending,
}

struct Entry {
    execution: Execution,
    killed: watch::Sender<Option<Killed>>,
}

type Entries = BTreeMap<String, Entry>;

/// The executions that run.
#[derive(Clone, Default)]
pub struct Executions(Arc<Mutex<Entries>>);

impl Executions {
    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts one in, until the guard goes. Ids are those of grants, of which no two are alike.
    pub fn register(&self, execution: Execution) -> Registered {
        let killed = watch::Sender::new(None);
        let registered = Registered { executions: self.clone(), id: execution.id.clone(), killed: killed.subscribe() };
        self.entries().insert(execution.id.clone(), Entry { execution, killed });
        registered
    }

    /// All of them, the oldest first.
    pub fn list(&self) -> Vec<Execution> {
        let mut all: Vec<Execution> = self.entries().values().map(|entry| entry.execution.clone()).collect();
        all.sort_by_key(|execution| execution.started_at.millis());
        all
    }

    /// Ends one. Its processes and connections end at once, and its caller gets no answer of it; [`Killing::gone`] waits
    /// until nothing of it is left. A second kill changes nothing: who was first stands in the receipt.
    ///
    /// # Errors
    /// [`NotKilled`]: there is none, or it ends already.
    pub fn kill(&self, id: &str, by: &str, why: Option<&str>) -> Result<Killing, NotKilled> {
        let entries = self.entries();
        let entry = entries.get(id).ok_or(NotKilled::NotRunning)?;
        if entry.execution.phase == Phase::Ending {
            return Err(NotKilled::Ending);
        }
        Ok(entry.kill(by, why))
    }

    /// Ends all that `chosen` says yes to, as for a lease or a principal that is revoked. What is ending already is left.
    pub fn kill_where(&self, by: &str, why: Option<&str>, chosen: impl Fn(&Execution) -> bool) -> Vec<Killing> {
        let entries = self.entries();
        let running = entries.values().filter(|entry| entry.execution.phase != Phase::Ending);
        running.filter(|entry| chosen(&entry.execution)).map(|entry| entry.kill(by, why)).collect()
    }
}

impl Entry {
    fn kill(&self, by: &str, why: Option<&str>) -> Killing {
        let now = Timestamp::now();
        self.killed.send_if_modified(|killed| {
            let first = killed.is_none();
            if first {
                *killed = Some(Killed { by: by.to_owned(), why: why.map(str::to_owned), at: now });
            }
            first
        });
        Killing { execution: self.execution.clone(), entry: self.killed.subscribe() }
    }
}

/// A registered execution; taken out when this goes.
pub struct Registered {
    executions: Executions,
    id: String,
    killed: watch::Receiver<Option<Killed>>,
}

impl Registered {
    fn change(&self, change: impl FnOnce(&mut Execution)) {
        if let Some(entry) = self.executions.entries().get_mut(&self.id) {
            change(&mut entry.execution);
        }
    }

    /// It has its place and its leaf.
    pub fn running(&self, leaf: u64) {
        self.change(|execution| (execution.phase, execution.leaf) = (Phase::Running, Some(leaf)));
    }

    /// Ready once it was killed; never otherwise.
    pub async fn killed(&self) {
        let mut killed = self.killed.clone();
        // The sender goes with this guard.
        if killed.wait_for(Option::is_some).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Says that its end has begun, and whether somebody brought it about. From here on a kill is refused.
    pub fn ending(&self) -> Option<Killed> {
        self.change(|execution| execution.phase = Phase::Ending);
        self.killed.borrow().clone()
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.executions.entries().remove(&self.id);
    }
}

/// An execution that is being ended.
#[derive(Debug)]
pub struct Killing {
    execution: Execution,
    entry: watch::Receiver<Option<Killed>>,
}

impl Killing {
    /// It, as it was when it was killed.
    pub const fn execution(&self) -> &Execution {
        &self.execution
    }

    /// Ready when nothing of it is left: no process, no connection, no entry in the kernel's map.
    pub async fn gone(mut self) {
        // The sender is in the registry for as long as the execution is.
        while self.entry.changed().await.is_ok() {}
    }
}

#[cfg(test)]
mod tests;
