//! What happened to one grant, for the agent, the operator and the auditor.

use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value, json};

use super::event::{self, INTENT, IntentRecord};
use super::keys::PublicKeys;
use super::record::{self, Kind};
use super::{Content, LedgerError, content_index};
use crate::ids;
use crate::time::Timestamp;

/// How an execution ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum NormalizedResult {
    Success { summary: String },
    ProviderFailure { reason: String },
    Timeout { reason: String },
    Cancelled { reason: String },
    InternalError { reason: String },
}

/// What the verifier of the manifest found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum VerificationOutcome {
    Verified { evidence: Value },
    VerificationFailed { reason: String },
    UnverifiableDeclared { reason: String },
    ProviderFailedBeforeVerification { reason: String },
    Skipped { reason: String },
}

/// A receipt before it is numbered, linked and signed.
///
/// What the action was given and what it answered are not in the receipt: the params are in it by `request_hash`, and
/// each of `contents` (by convention `output`, and `stderr` where it was kept) by an entry
/// `contents: {<name>: {sha256, bytes}}`. The bytes lie in a table beside the log and can be erased; the chain does not
/// change. `provider_receipt` is what the provider says of itself (status code, exit code): small, and no payload.
#[derive(Clone, Debug)]
pub struct ReceiptDraft {
    pub grant_id: String,
    pub trace_id: String,
    pub decision_id: String,
    pub principal: String,
    pub session_id: String,
    pub action_id: String,
    pub action_version: String,
    pub request_hash: String,
    pub policy_version: String,
    /// The digest of what really ran.
    pub provider_module_digest: String,
    pub provider_receipt: Value,
    pub normalized_result: NormalizedResult,
    pub verification_outcome: VerificationOutcome,
    pub effect_evidence: Vec<Value>,
    /// `[0]` is the summary, the others are flows.
    pub egress_evidence: Vec<Value>,
    pub failure_class: Option<String>,
    pub approval: Option<Value>,
    pub started_at: Timestamp,
    pub finished_at: Timestamp,
    pub contents: Vec<Content>,
}

impl ReceiptDraft {
    pub(super) fn into_record(self, workspace: &str) -> Result<(Map<String, Value>, Vec<Content>), LedgerError> {
        let mut record = json!({
            "receipt_id": ids::mint(),
            "grant_id": self.grant_id,
            "trace_id": self.trace_id,
            "decision_id": self.decision_id,
            "principal": self.principal,
            "session_id": self.session_id,
            "workspace": workspace,
            "action_id": self.action_id,
            "action_version": self.action_version,
            "request_hash": self.request_hash,
            "policy_version": self.policy_version,
            "provider_module_digest": self.provider_module_digest,
            "provider_receipt": self.provider_receipt,
            "normalized_result": self.normalized_result,
            "verification_outcome": self.verification_outcome,
            "effect_evidence": self.effect_evidence,
            "egress_evidence": self.egress_evidence,
            "failure_class": self.failure_class,
            "started_at": self.started_at,
            "finished_at": self.finished_at,
            "contents": content_index(&self.contents)?,
        });
        if let (Some(approval), Some(members)) = (self.approval, record.as_object_mut()) {
            members.insert("approval".into(), approval);
        }
        record::check_representable(&record)?;
        match record {
            Value::Object(members) => Ok((members, self.contents)),
            _ => Err(LedgerError::Refused("a receipt that is no object".into())),
        }
    }
}

/// A receipt as the ledger has it. Everything that the stored record says is in it, so that what is shown is what was
/// signed.
#[derive(Clone, Debug, PartialEq)]
pub struct Receipt(Map<String, Value>);

impl Receipt {
    pub(super) fn from_record(record: Map<String, Value>) -> Self {
        Self(record)
    }

    pub fn receipt_id(&self) -> &str {
        self.text("receipt_id")
    }

    pub fn grant_id(&self) -> &str {
        self.text("grant_id")
    }

    pub fn principal(&self) -> &str {
        self.text("principal")
    }

    pub fn action_id(&self) -> &str {
        self.text("action_id")
    }

    /// Lower-case hex; the hash that the next record links to.
    pub fn result_hash(&self) -> &str {
        self.text("result_hash")
    }

    /// Counts from 1 within the ledger.
    pub fn sequence(&self) -> u64 {
        self.0.get("sequence").and_then(Value::as_u64).unwrap_or(0)
    }

    pub fn fields(&self) -> &Map<String, Value> {
        &self.0
    }

    /// Valid only if the hash, computed again from the content, is the one that was signed by a key of `keys`.
    pub fn signature_status(&self, keys: &PublicKeys) -> SignatureStatus {
        record::signature_status(&self.0, Kind::Receipt, keys)
    }

    fn text(&self, field: &str) -> &str {
        self.0.get(field).and_then(Value::as_str).unwrap_or_default()
    }
}

impl Serialize for Receipt {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

/// What can be said of a stored signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SignatureStatus {
    Valid,
    Invalid,
    MissingSignature,
    MissingKeyId,
    UnknownKeyId,
    MalformedSignature,
}

/// The receipt that closes an intent whose gate died: nobody knows what happened, and it says so.
pub(super) fn of_orphan(intent: &Map<String, Value>, now: Timestamp) -> Result<ReceiptDraft, LedgerError> {
    let unreadable = || LedgerError::Broken("an intent that cannot be read".into());
    let text = |field: &str| intent.get(field).and_then(Value::as_str).map(str::to_owned).ok_or_else(unreadable);
    if text("event_type")? != INTENT {
        return Err(unreadable());
    }
    let details = intent.get("details").ok_or_else(unreadable)?;
    let plan = event::plan_of(details).ok_or_else(unreadable)?;
    let started_at = Timestamp::parse(&text("at")?).ok_or_else(unreadable)?;
    let reason = "the gate stopped while the action ran; the outcome is unknown".to_owned();
    Ok(ReceiptDraft {
        grant_id: text("grant_id")?,
        trace_id: text("trace_id")?,
        decision_id: text("decision_id")?,
        principal: plan.principal,
        session_id: text("session_id")?,
        action_id: plan.action_id,
        action_version: plan.action_version,
        request_hash: plan.request_hash,
        policy_version: plan.policy_version,
        provider_module_digest: IntentRecord::module_of(details).ok_or_else(unreadable)?,
        provider_receipt: Value::Null,
        normalized_result: NormalizedResult::InternalError { reason: reason.clone() },
        verification_outcome: VerificationOutcome::Skipped { reason },
        effect_evidence: Vec::new(),
        egress_evidence: vec![json!({
            "kernel": null, "proxy": null, "profile_hash": plan.profile_hash, "program_hash": null,
            "not_seen": ["kernel", "proxy", "seccomp", "outcome"], "incomplete": true,
        })],
        failure_class: Some("outcome_unknown".into()),
        approval: details.get("approval").filter(|approval| !approval.is_null()).cloned(),
        started_at,
        finished_at: now.max(started_at),
        contents: Vec::new(),
    })
}
