//! The self-test: the gate attacks itself, in real leaves, before it serves anybody.
//!
//! Every technique of [`attempts`](crate::sandbox::attempts) is tried in a leaf whose profile is none and in one whose
//! profile has a single name, held by the same runner, kernel program, proxy and resolver as an execution; and at the same
//! time in a helper outside, where it must reach the target. The result is signed into the ledger. While a technique gets
//! out, or nobody can say whether it did, the gate is not ready and runs nothing.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use crate::config::{Config, SelftestMode};
use crate::egress::profile::{DomainEntry, Profile};
use crate::gate::{Gate, Readiness};
use crate::ledger::{EventDraft, LedgerError};
use crate::pipeline::dispatch;
use crate::sandbox::attempts::{self, ControlError, Order, Saw, TECHNIQUES, Where};
use crate::time::Timestamp;
use crate::{hash, ids};

mod judge;
mod report;
mod targets;

pub use report::{Finding, Outcome, Report};

use judge::{Inside, judge};
use targets::Targets;

/// The ledger's event that holds a result.
pub const EVENT: &str = "egress.selftest";

/// The one name that the profile of a self-test has, and one beside it. No server is ever asked for either (RFC 6761 §6.4).
const NAME: &str = "allowed.selftest.invalid";
const OTHER_NAME: &str = "refused.selftest.invalid";

/// How long an attempt waits for an answer. What is refused is refused at once, so that only a busy machine gets here.
const PATIENCE_MS: u64 = 2_000;
/// How long the listener inside waits to be called.
const INBOUND_MS: u64 = 250;
/// A run in which something could not be told is made again so many times: a busy machine can be late.
const AGAIN: usize = 2;

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum SelftestError {
    #[error("{0}: {1}")]
    Io(&'static str, #[source] std::io::Error),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error("the profile of the self-test: {0}")]
    Profile(String),
    #[error("in the leaf of profile {0}: {1}")]
    Leaf(&'static str, String),
    #[error("the result is not in the ledger: {0}")]
    Ledger(#[from] LedgerError),
    #[error("{0}")]
    Task(#[from] tokio::task::JoinError),
}

/// What is known of the gate at present.
#[derive(Clone, Debug)]
pub enum Standing {
    NotRun,
    /// Somebody chose to do without.
    Skipped,
    Ran(Arc<Report>),
    CouldNotRun(String),
}

/// What came of the last run, and the one at a time that there can be.
pub struct Selftest {
    standing: Mutex<Standing>,
    one_at_a_time: tokio::sync::Mutex<()>,
}

impl Selftest {
    pub fn new(config: &Config) -> Self {
        let standing = if config.egress.unsafe_skip_selftest { Standing::Skipped } else { Standing::NotRun };
        Self { standing: Mutex::new(standing), one_at_a_time: tokio::sync::Mutex::default() }
    }

    pub fn standing(&self) -> Standing {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, standing: Standing) {
        *self.standing.lock().unwrap_or_else(PoisonError::into_inner) = standing;
    }

    pub fn readiness(&self) -> Readiness {
        match self.standing() {
            Standing::NotRun => Readiness::NotReady("the self-test has not run yet".to_owned()),
            Standing::Skipped => {
                Readiness::Degraded("the self-test is switched off (egress.unsafe_skip_selftest)".to_owned())
            }
            Standing::Ran(report) if report.passed() => Readiness::Ready,
            Standing::Ran(report) => Readiness::NotReady(report.reason()),
            Standing::CouldNotRun(_) => Readiness::NotReady("the self-test could not run".to_owned()),
        }
    }

    /// Whether nothing may run: it is not known that what runs would be held.
    pub fn holds_back(&self) -> bool {
        matches!(self.readiness(), Readiness::NotReady(_))
    }

    /// One line for `status`.
    pub fn line(&self) -> String {
        match self.standing() {
            Standing::NotRun => "not run".to_owned(),
            Standing::Skipped => "SWITCHED OFF by egress.unsafe_skip_selftest".to_owned(),
            Standing::Ran(report) => report.line(),
            Standing::CouldNotRun(why) => format!("could not run: {why}"),
        }
    }

    /// As an operator reads it.
    pub fn view(&self) -> Value {
        match self.standing() {
            Standing::NotRun => json!({"outcome": "not_run"}),
            Standing::Skipped => json!({"outcome": "skipped"}),
            Standing::Ran(report) => report.view(),
            Standing::CouldNotRun(why) => json!({"outcome": "could_not_run", "reason": why}),
        }
    }
}

/// What a result is good for: the same boot of the same kernel, the same programs, the same configuration.
fn conditions(gate: &Gate) -> BTreeMap<&'static str, String> {
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let kernel = rustix::system::uname();
    let network = if gate.network == crate::sandbox::Network::Shared { "shared" } else { "isolated" };
    BTreeMap::from([
        ("boot_id", boot_id.trim().to_owned()),
        ("kernel", kernel.release().to_string_lossy().into_owned()),
        ("kernel_build", kernel.version().to_string_lossy().into_owned()),
        ("program_hash", gate.enforcer.program_hash().to_owned()),
        ("executable", gate.runner.executable_digest().to_owned()),
        // Only ever compared with what this same executable made of another start's.
        ("configuration", hash::sha256_tagged(format!("{:?}", gate.config).as_bytes())),
        ("network", network.to_owned()),
    ])
}

/// Tries the gate before it serves, or finds a result that still holds.
pub async fn at_start(gate: &Gate) {
    if gate.config.egress.unsafe_skip_selftest {
        tracing::warn!("the self-test is switched off: nobody knows whether this gate holds what runs in it");
        return;
    }
    if gate.config.egress.selftest == SelftestMode::Cached
        && let Some(report) = kept(gate)
    {
        tracing::info!(at = %report.at, "the self-test of this boot, kernel, program and configuration stands");
        gate.selftest.set(Standing::Ran(Arc::new(report)));
        return;
    }
    run(gate, "start").await;
}

/// A signed result of the same conditions that passed.
fn kept(gate: &Gate) -> Option<Report> {
    let event = match gate.ledger.signed_event(EVENT) {
        Ok(event) => event?,
        Err(error) => {
            tracing::warn!(%error, "the last self-test cannot be read; it is made again");
            return None;
        }
    };
    let report = Report::from_view(event.get("details")?)?;
    let same = conditions(gate).iter().all(|(name, value)| report.conditions.get(*name) == Some(value));
    (same && report.passed()).then_some(report)
}

/// Tries the gate now, and lets the result stand. `by` is who asked.
pub async fn run(gate: &Gate, by: &str) -> Standing {
    let _alone = gate.selftest.one_at_a_time.lock().await;
    let standing = match tried(gate, by).await {
        Ok(report) => Standing::Ran(Arc::new(report)),
        Err(error) => {
            tracing::error!(%error, "the self-test could not run");
            Standing::CouldNotRun(error.to_string())
        }
    };
    if let Standing::Ran(report) = &standing {
        if report.passed() {
            tracing::info!(took_ms = report.took_ms, "self-test: {}", report.line());
        } else {
            tracing::error!(took_ms = report.took_ms, "{}", report.reason());
        }
    }
    gate.selftest.set(standing.clone());
    standing
}

async fn tried(gate: &Gate, by: &str) -> Result<Report, SelftestError> {
    let began = Instant::now();
    let at = Timestamp::now();
    let mut findings = once(gate).await?;
    for _ in 0..AGAIN {
        let told = |finding: &Finding| finding.outcome != Outcome::Inconclusive;
        let escaped = |finding: &Finding| finding.outcome == Outcome::Escaped;
        if findings.iter().all(told) || findings.iter().any(escaped) {
            break;
        }
        tracing::warn!(inconclusive = ?names(&findings), "the self-test is made again");
        findings = once(gate).await?;
    }
    let conditions = conditions(gate).into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    let report = Report { at, took_ms, asked_by: by.to_owned(), conditions, findings };
    gate.ledger
        .event(EventDraft {
            event_type: EVENT.to_owned(),
            trace_id: ids::mint(),
            decision_id: String::new(),
            action_id: String::new(),
            principal: String::new(),
            session_id: String::new(),
            decision: String::new(),
            details: report.view(),
            at: Timestamp::now(),
        })
        .await?;
    Ok(report)
}

fn names(findings: &[Finding]) -> Vec<&str> {
    let inconclusive = findings.iter().filter(|finding| finding.outcome == Outcome::Inconclusive);
    inconclusive.map(|finding| finding.technique.as_str()).collect()
}

/// A path as another process finds it: where a descriptor of the gate's is the only way to its cgroups, `self` is in it.
fn of_the_gate(path: &Path) -> PathBuf {
    match path.strip_prefix("/proc/self") {
        Ok(rest) => Path::new("/proc").join(std::process::id().to_string()).join(rest),
        Err(_) => path.to_owned(),
    }
}

/// The three runs, at the same time: outside, and in a leaf of each profile.
async fn once(gate: &Gate) -> Result<Vec<Finding>, SelftestError> {
    let allowlist = DomainEntry::Plain(NAME.to_owned())
        .compile()
        .map(|(entry, _)| Profile::allowlist([entry]))
        .map_err(|error| SelftestError::Profile(error.to_string()))?;
    let victim_token = ids::mint();
    let victim = {
        let token = victim_token.clone();
        tokio::task::spawn_blocking(move || attempts::victim(&token))
            .await?
            .map_err(|error| SelftestError::Io("the process that is attacked", error))?
    };
    let targets = Targets::open(&gate.config.state_dir)
        .await
        .map_err(|error| SelftestError::Io("the listeners that are attacked", error))?;
    let state = std::fs::metadata(&gate.config.state_dir).map_err(|error| SelftestError::Io("state_dir", error))?;
    let order = |number: usize, techniques: Vec<String>, name: Option<&str>| Order {
        outside: number == 0,
        techniques,
        token: targets.token(number).to_owned(),
        number: i32::try_from(number).unwrap_or(0) + 1,
        targets: targets.addresses().clone(),
        inbound_port: targets.inbound_port(number),
        inbound_ms: INBOUND_MS,
        patience_ms: PATIENCE_MS,
        proxy: gate.proxy.addresses().v4.into(),
        dns: if number == 0 { targets.dns() } else { [([127, 0, 0, 1], 53).into(); 2] },
        name: name.map(str::to_owned),
        other_name: OTHER_NAME.to_owned(),
        cgroup_procs: of_the_gate(gate.cgroups.gate()).join("cgroup.procs"),
        state_dir: (gate.config.state_dir.clone(), state.dev(), state.ino()),
        unix_path: targets.unix_path().to_owned(),
        unix_abstract: targets.unix_abstract().to_owned(),
        victim: victim.pid(),
        victim_token: victim_token.clone(),
    };
    let there = |technique: &attempts::Technique| technique.target.is_none_or(|_| targets.has(technique.name));
    let of = |wanted: &dyn Fn(&attempts::Technique) -> bool| -> Vec<String> {
        let these = TECHNIQUES.iter().filter(|technique| there(technique) && wanted(technique));
        these.map(|technique| technique.name.to_owned()).collect()
    };
    let control = order(0, of(&|technique| technique.control != attempts::Control::None), None);
    let none = order(1, of(&|technique| technique.tried == Where::Everywhere), None);
    let named = order(2, of(&|_| true), Some(NAME));

    let outside = async {
        let free = tokio::task::spawn_blocking(move || attempts::outside(&control)).await?;
        free.map_err(SelftestError::from)
    };
    let (outside, in_none, in_named) = tokio::join!(
        outside,
        dispatch::attempts::run(gate, &Profile::None, &none),
        dispatch::attempts::run(gate, &allowlist, &named),
    );
    let signals = tokio::task::spawn_blocking(move || victim.end()).await?;
    let mut heard = targets.heard();
    // The process that is attacked knows the runs by their numbers.
    let signalled = signals.into_iter().map(|number| ("signal".to_owned(), usize::try_from(number - 1).unwrap_or(0)));
    heard.extend(signalled);

    let outside = outside?;
    let isolated = gate.network != crate::sandbox::Network::Shared;
    let mut findings = Vec::new();
    for (number, profile, order, ran) in [(1, "none", &none, in_none), (2, "proxy_allowlist", &named, in_named)] {
        let (said, evidence) = ran.map_err(|why| SelftestError::Leaf(profile, why))?;
        let seen: BTreeMap<String, Saw> =
            serde_json::from_slice(&said).map_err(|error| SelftestError::Leaf(profile, error.to_string()))?;
        for technique in TECHNIQUES.iter().filter(|technique| number == 2 || technique.tried == Where::Everywhere) {
            let inside = Inside {
                profile,
                saw: seen.get(technique.name),
                heard: heard.contains(&(technique.name.to_owned(), number)),
                port: order.targets.get(technique.name).map(std::net::SocketAddr::port),
                refusals: &evidence.refusals,
                flows: &evidence.flows,
                isolated,
            };
            findings.push(judge(technique, there(technique), outside.get(technique.name), &inside));
        }
    }
    Ok(findings)
}

/// How long a start may wait for the sockets that are attacked.
const TARGET_TIME: Duration = Duration::from_secs(2);
