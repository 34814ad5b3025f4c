//! A session in the ledger: an intent before anything runs, a signed receipt at its end.

use serde_json::json;

use super::session::Planned;
use crate::action::canonical::jcs;
use crate::executions::{Execution, Killed, Phase};
use crate::gate::Gate;
use crate::hash;
use crate::ledger::{
    Grant, IntentRecord, LedgerError, NormalizedResult, Plan, Receipt, ReceiptDraft, VerificationOutcome,
};
use crate::pipeline::Ids;
use crate::pipeline::dispatch::EgressEvidence;
use crate::pipeline::record::evidence;
use crate::sandbox::Exit;
use crate::time::Timestamp;

/// What a plan of a session has as its version: its digest says what the profile said.
const VERSION: &str = "1";
/// How long after its intent a session may begin.
const BEGINS_WITHIN_MS: i64 = 60_000;

/// How a session came to its end.
#[derive(Clone, Debug)]
pub enum Ended {
    Exit(Exit),
    /// The client went away.
    HungUp,
    /// The gate is stopping.
    Drained,
    Killed(Killed),
    /// It is not known whether anything ran.
    Unknown(String),
    NotStarted(String),
}

/// A session whose intent is durable.
pub struct Intended {
    pub grant_id: String,
    pub action_id: String,
    pub session_id: String,
    request_hash: String,
    started_at: Timestamp,
}

fn module() -> String {
    // No file of it is sealed: the digest is that of an empty list, as of a command without files.
    hash::sha256_tagged(b"[]")
}

/// Makes the intent durable.
///
/// # Errors
/// Those of the ledger: nothing may run then.
pub async fn intend(gate: &Gate, planned: &Planned, ids: &Ids) -> Result<Intended, LedgerError> {
    let unwritable = |error: serde_json::Error| LedgerError::Refused(error.to_string());
    let now = Timestamp::now();
    // Not the environment: it holds secrets.
    let params = jcs(&json!({
        "argv": planned.argv,
        "directory": planned.directory,
        "profile": planned.profile_name,
        "operator": planned.operator,
    }))
    .map_err(unwritable)?;
    let action_id = format!("{}{}", super::ACTION_PREFIX, planned.profile_name);
    let plan = Plan {
        action_id: action_id.clone(),
        action_version: VERSION.to_owned(),
        action_digest: planned.profile.digest.clone(),
        request_hash: hash::sha256_tagged(&params),
        profile_hash: planned.profile.egress.hash(),
        secret_names: Vec::new(),
        policy_version: gate.policy.policy_version().to_owned(),
        principal: planned.principal.clone(),
        listener: planned.listener.name.clone(),
        workspace: gate.config.workspace.clone(),
        not_after: now.plus_millis(BEGINS_WITHIN_MS),
    };
    let grant = Grant::mint(&plan, &planned.lease_jti(), &planned.operator_jkt).map_err(unwritable)?;
    let request_hash = plan.request_hash.clone();
    let session_id = crate::ids::mint();
    let intent = IntentRecord {
        trace_id: ids.trace_id.clone(),
        decision_id: ids.decision_id.clone(),
        session_id: session_id.clone(),
        plan,
        provider_module_digest: module(),
        params,
        approval: None,
        at: now,
    };
    gate.ledger.intent(&grant, intent).await?;
    Ok(Intended { grant_id: grant.grant_id, action_id, session_id, request_hash, started_at: now })
}

impl Intended {
    /// As operators see it.
    pub fn execution(&self, planned: &Planned, ids: &Ids) -> Execution {
        Execution {
            id: self.grant_id.clone(),
            action_id: self.action_id.clone(),
            principal: planned.principal.clone(),
            listener: planned.listener.name.clone(),
            lease_jti: planned.lease_jti(),
            session_id: self.session_id.clone(),
            decision_id: ids.decision_id.clone(),
            trace_id: ids.trace_id.clone(),
            started_at: self.started_at,
            phase: Phase::Waiting,
            leaf: None,
        }
    }
}

/// The code that a shell would give.
pub const fn code_of(ended: &Ended) -> i32 {
    match ended {
        Ended::Exit(Exit::Code(code)) => *code,
        Ended::Exit(Exit::Signal(signal)) => 128 + *signal,
        _ => 255,
    }
}

fn result_of(ended: &Ended) -> (NormalizedResult, Option<&'static str>) {
    let cancelled = |reason: &str| NormalizedResult::Cancelled { reason: reason.to_owned() };
    match ended {
        Ended::Exit(Exit::Code(0)) => (NormalizedResult::Success { summary: "it ended by itself".to_owned() }, None),
        Ended::Exit(Exit::Code(code)) => {
            let reason = format!("the command ended with exit code {code}");
            (NormalizedResult::ProviderFailure { reason }, Some("exit_code"))
        }
        Ended::Exit(Exit::Signal(signal)) => {
            let reason = format!("the command was ended by signal {signal}");
            (NormalizedResult::ProviderFailure { reason }, Some("signal"))
        }
        Ended::Exit(_) => (cancelled("ended by the gate"), Some("cancelled")),
        Ended::HungUp => (cancelled("the client went away"), Some("hung_up")),
        Ended::Drained => (cancelled("the gate was stopped"), Some("drained")),
        Ended::Killed(killed) => {
            let why = killed.why.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
            (cancelled(&format!("killed by {}{why}", killed.by)), Some("killed"))
        }
        Ended::NotStarted(reason) => (NormalizedResult::InternalError { reason: reason.clone() }, Some("not_started")),
        Ended::Unknown(reason) => (NormalizedResult::InternalError { reason: reason.clone() }, Some("outcome_unknown")),
    }
}

/// Makes the receipt durable.
///
/// # Errors
/// Those of the ledger; the next start closes the intent then.
pub async fn receipt(
    gate: &Gate,
    planned: &Planned,
    intended: Intended,
    ids: &Ids,
    ended: &Ended,
    egress: &EgressEvidence,
) -> Result<Receipt, LedgerError> {
    let (normalized_result, failure_class) = result_of(ended);
    let finished_at = Timestamp::now();
    let mut provider_receipt = json!({
        "exit_code": code_of(ended),
        "duration_ms": finished_at.millis().saturating_sub(intended.started_at.millis()).max(0),
        "inbound_ports": planned.profile.config.inbound_ports,
    });
    if let Ended::Killed(killed) = ended {
        provider_receipt["killed"] = json!(killed);
    }
    let draft = ReceiptDraft {
        grant_id: intended.grant_id,
        trace_id: ids.trace_id.clone(),
        decision_id: ids.decision_id.clone(),
        principal: planned.principal.clone(),
        session_id: intended.session_id,
        action_id: intended.action_id,
        action_version: VERSION.to_owned(),
        request_hash: intended.request_hash,
        policy_version: gate.policy.policy_version().to_owned(),
        provider_module_digest: module(),
        provider_receipt,
        normalized_result,
        verification_outcome: VerificationOutcome::UnverifiableDeclared {
            reason: "what a session does beside its connections is not judged".to_owned(),
        },
        effect_evidence: Vec::new(),
        egress_evidence: evidence(gate, &planned.profile.egress, egress),
        failure_class: failure_class.map(str::to_owned),
        approval: None,
        started_at: intended.started_at,
        finished_at,
        contents: Vec::new(),
    };
    let receipt = gate.ledger.receipt(draft).await?;
    gate.metrics.executed(&result_of(ended).0);
    egress.verdicts().for_each(|verdict| gate.metrics.flow(verdict));
    Ok(receipt)
}
