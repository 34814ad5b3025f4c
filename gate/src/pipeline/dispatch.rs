//! The one place that starts a sandbox: a leaf, a kernel entry, a proxy session, a process; and their end, in the order
//! that leaves no moment open (kill → the proxy notes → the entry goes → counters → the leaf goes).

pub mod attempts;
mod held;
mod interpret;
mod services;

use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::time::Duration;

use serde_json::{Value, json};

use crate::action::manifest::{Command, Prepared, RootFilesystem};
use crate::egress::flow::Verdict;
use crate::egress::flows::Owner;
use crate::egress::profile::EntryProtocol;
use crate::executions::{Killed, Registered};
use crate::gate::Gate;
use crate::ledger::{NormalizedResult, VerificationOutcome};
use crate::pipeline::Ids;
use crate::pipeline::grant::Grant;
use crate::sandbox::{Completed, Exit, Job, Leaf, Limits, Program, Root, SandboxError, SealedFile};
use crate::time::Timestamp;

pub use held::EgressEvidence;
pub(crate) use held::{Held, Hold};

/// What a kernel entry lives beyond its action's own time: starting the sandbox, and ending it.
const ENTRY_GRACE: Duration = Duration::from_secs(10);

/// Where programs look for a proxy; both spellings are in use.
pub(crate) const PROXY_VARIABLES: [&str; 6] =
    ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"];

#[derive(Debug, thiserror::Error)]
pub enum DispatchError {
    #[error("egress denied: {deny_reason}")]
    EgressDenied { deny_reason: String },
    #[error("{reason}")]
    ActionFailed { reason: String },
    #[error("{message}")]
    Sandbox { message: String },
}

/// An execution that is over, however it went.
#[derive(Debug)]
pub struct Outcome {
    pub(super) grant: Grant,
    pub(super) interpreted: interpret::Interpreted,
    pub(super) completed: Option<Completed>,
    /// Set when an operator ended it.
    pub(super) killed: Option<Killed>,
    pub(super) egress: EgressEvidence,
    pub(super) finished_at: Timestamp,
}

/// Why there is no completed run.
#[derive(Debug)]
enum NotCompleted {
    /// Nothing of the action ran.
    NotStarted(String),
    /// It may have run: nobody gets anything back for it.
    Unknown(String),
}

impl From<SandboxError> for NotCompleted {
    fn from(error: SandboxError) -> Self {
        if error.nothing_ran() { Self::NotStarted(error.to_string()) } else { Self::Unknown(error.to_string()) }
    }
}

/// The parts of an answer that are about the run itself.
#[derive(Debug)]
pub struct Summary {
    pub(super) verification: VerificationOutcome,
    pub(super) success: bool,
    pub(super) duration_ms: u64,
    pub(super) exit_code: i32,
    pub(super) egress: Value,
}

impl Summary {
    pub fn verification(&self) -> Value {
        let verified = matches!(
            self.verification,
            VerificationOutcome::Verified { .. } | VerificationOutcome::UnverifiableDeclared { .. }
        );
        let outcome = serde_json::to_value(&self.verification)
            .ok()
            .and_then(|mut outcome| outcome.get_mut("status").map(Value::take));
        json!({"outcome": outcome, "is_fully_successful": self.success && verified})
    }

    pub fn runtime(&self) -> Value {
        // No fuel is metered: an action is a process, held by time, memory and process limits.
        json!({"duration_ms": self.duration_ms, "exit_code": self.exit_code, "fuel_consumed": 0})
    }

    pub const fn egress(&self) -> &Value {
        &self.egress
    }
}

/// Runs what was granted. Always comes back with an outcome: what failed has a receipt too.
pub async fn run(gate: &Gate, grant: Grant, ids: &Ids) -> Outcome {
    let execution = gate.executions.register(grant.execution(ids));
    let (completed, egress) = match unless_it_panics(execute(gate, &grant, ids, &execution)).await {
        Some(ran) => ran,
        None => (
            Err(NotCompleted::Unknown("the gate panicked".to_owned())),
            EgressEvidence { incomplete: true, ..EgressEvidence::default() },
        ),
    };
    let killed = execution.ending();
    drop(execution);
    let interpreted = match (&completed, &killed) {
        // Also where it had come to its end by itself in the same moment: the operator was told that nobody gets it.
        (Ok(_), Some(killed)) => interpret::Interpreted::killed(killed, true),
        (Err(NotCompleted::NotStarted(_)), Some(killed)) => interpret::Interpreted::killed(killed, false),
        (Ok(completed), None) => interpret::interpret(grant.decision().call().manifest(), completed, &egress.flows),
        (Err(NotCompleted::NotStarted(message)), None) => interpret::Interpreted::not_started(message),
        (Err(NotCompleted::Unknown(message)), _) => interpret::Interpreted::unknown(message),
    };
    Outcome { grant, interpreted, completed: completed.ok(), killed, egress, finished_at: Timestamp::now() }
}

/// A panic must not cost the receipt. What the future held has been dropped then, the leaf included.
pub(crate) async fn unless_it_panics<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    poll_fn(|context| match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(context))) {
        Ok(polled) => polled.map(Some),
        Err(_) => std::task::Poll::Ready(None),
    })
    .await
}

type Ran = (Result<Completed, NotCompleted>, EgressEvidence);

async fn execute(gate: &Gate, grant: &Grant, ids: &Ids, execution: &Registered) -> Ran {
    let not_started = |message: String| (Err(NotCompleted::NotStarted(message)), EgressEvidence::default());
    if gate.selftest.holds_back() {
        return not_started("the gate's self-test has not passed".to_owned());
    }
    // Waiting for a place is bounded by the grant: a call that is too late is not started.
    let place = tokio::select! {
        place = tokio::time::timeout(grant.deadline(), gate.places.acquire()) => place,
        () = execution.killed() => return not_started("killed while it waited".to_owned()),
    };
    let Ok(Ok(place)) = place else { return not_started("no place for another execution".to_owned()) };
    let leaf = match gate.cgroups.leaf() {
        Ok(leaf) => leaf,
        Err(error) => return not_started(error.to_string()),
    };
    execution.running(leaf.id().0);
    let ran = confined(gate, grant, ids, &leaf, execution).await;
    // One that would not die is tried once more, and that waits.
    let _ = tokio::task::spawn_blocking(move || drop(leaf)).await;
    drop(place);
    ran
}

/// From here on every exit goes through the end of the leaf.
async fn confined(gate: &Gate, grant: &Grant, ids: &Ids, leaf: &Leaf, execution: &Registered) -> Ran {
    let decision = grant.decision();
    let manifest = decision.call().manifest();
    let owner = Owner {
        execution_id: grant.grant_id().to_owned(),
        action_id: manifest.action_id.clone(),
        principal: grant.principal().to_owned(),
        workspace: gate.config.workspace.clone(),
    };
    // The worker makes one connection: what the proxy decides about it is decided about the call.
    let is_http = matches!(decision.call().prepared(), Prepared::Http(_));
    let hold = Hold {
        owner,
        profile: decision.profile(),
        inbound_ports: &[],
        deadline: grant.deadline() + ENTRY_GRACE,
        network: gate.network,
        first_decision: is_http.then(|| ids.decision_id.clone()),
        lasts: false,
    };
    let (mut held, admitted) = Held::begin(gate, leaf, hold);
    let completed = match admitted {
        Err(error) => Err(NotCompleted::NotStarted(error.to_string())),
        Ok(()) => match job(gate, grant) {
            Err(message) => Err(NotCompleted::NotStarted(message)),
            Ok(job) => {
                let take = async |listeners| held.services().listen(listeners);
                let cancelled = async {
                    tokio::select! {
                        () = gate.cancelled() => {}
                        () = execution.killed() => {}
                    }
                };
                gate.runner.run_with(leaf, job, take, cancelled).await.map_err(NotCompleted::from)
            }
        },
    };
    // How it ended is settled: a kill that comes now comes too late.
    execution.ending();
    let killed_ns = completed.as_ref().ok().and_then(|completed| completed.killed_ns);
    let egress = held.end(&ids.decision_id, killed_ns).await;
    (completed, egress)
}

fn job(gate: &Gate, grant: &Grant) -> Result<Job, String> {
    let call = grant.decision().call();
    let manifest = call.manifest();
    let response_bytes = manifest.max_response_bytes;
    let (program, stdin, stdout_bytes) = match call.prepared() {
        Prepared::Http(http) => {
            let job = json!({
                "proxy": gate.proxy.addresses().v4.to_string(),
                "method": http.method,
                "url": http.url,
                "headers": http.headers,
                "body": http.body,
                "max_response_bytes": response_bytes.min(manifest.limits.max_host_response_bytes),
                "timeout_ms": u64::try_from(grant.deadline().as_millis()).unwrap_or(u64::MAX),
            });
            // A body that is not text travels in base64, and everything in JSON.
            let room = response_bytes.saturating_mul(6).saturating_add(256 << 10);
            (Program::HttpWorker, job.to_string().into_bytes(), room)
        }
        Prepared::Command { command, stdin } => {
            let reaches = !grant.decision().profile().is_none();
            (program(gate, command, reaches), stdin.clone(), response_bytes)
        }
    };
    // Only what the proxy looks into needs its certificates.
    let ends_tls = grant
        .decision()
        .profile()
        .entries()
        .iter()
        .any(|entry| entry.protocol() == EntryProtocol::Tls { terminate: true });
    Ok(Job {
        program,
        stdin,
        limits: Limits {
            memory_bytes: manifest.limits.memory_mb.saturating_mul(1 << 20),
            timeout: grant.deadline(),
            stdout_bytes,
            stderr_bytes: gate.config.sandbox.stderr_bytes,
            processes: gate.config.sandbox.max_processes,
            scratch_bytes: gate.config.sandbox.scratch_bytes,
        },
        network: gate.network,
        trust_pem: ends_tls.then(|| gate.proxy.ca_pem().as_bytes().to_vec()),
    })
}

/// The command as the sandbox takes it. A program that knows proxies finds the gate's in its environment; one that
/// does not, or will not, is the kernel's to stop.
fn program(gate: &Gate, command: &Command, reaches: bool) -> Program {
    let mut env: Vec<(String, String)> = Vec::new();
    if reaches {
        let proxy = format!("http://{}", gate.proxy.addresses().v4);
        env.extend(PROXY_VARIABLES.iter().map(|name| ((*name).to_owned(), proxy.clone())));
    }
    env.extend(command.env.iter().map(|(name, value)| (name.clone(), value.clone())));
    Program::Command {
        argv: command.argv.clone(),
        env,
        files: command
            .files
            .iter()
            .map(|file| SealedFile { path: file.path.clone(), sha256: file.sha256.clone() })
            .collect(),
        root: match &command.root {
            RootFilesystem::Host => Root::Host,
            RootFilesystem::Empty => Root::Empty,
            RootFilesystem::Directory(path) => Root::Directory(path.clone()),
        },
    }
}

impl Outcome {
    /// The run in numbers.
    pub(super) fn summary(&self) -> Summary {
        let (sent, received) = self.egress.flows.iter().fold((0_u64, 0_u64), |(sent, received), flow| {
            (sent.saturating_add(flow.bytes_from_sandbox), received.saturating_add(flow.bytes_to_sandbox))
        });
        let denied_by_proxy = self.egress.flows.iter().filter(|flow| flow.verdict == Verdict::Deny).count() as u64;
        let denied_by_kernel = self.egress.counts.as_ref().map_or(0, |counts| counts.denied.total());
        Summary {
            verification: self.interpreted.verification.clone(),
            success: matches!(self.interpreted.result, NormalizedResult::Success { .. }),
            duration_ms: self.completed.as_ref().map_or(0, |done| done.duration.as_millis() as u64),
            exit_code: self.completed.as_ref().map_or(-1, |done| match done.exit {
                Exit::Code(code) => code,
                Exit::Signal(signal) => 128 + signal,
                Exit::TimedOut | Exit::OutputTooLarge | Exit::Cancelled => -1,
            }),
            egress: json!({
                "connections": self.egress.connections(),
                "denied": denied_by_proxy.saturating_add(denied_by_kernel),
                "bytes_sent": sent,
                "bytes_received": received,
            }),
        }
    }
}
