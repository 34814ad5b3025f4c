//! Records that are not receipts: the intent before a dispatch, and whatever else an auditor asks about.

use serde_json::{Map, Value, json};

use super::grant::{Grant, Plan};
use super::{Content, LedgerError, content_index, record};
use crate::time::Timestamp;
use crate::{hash, ids};

/// The event that uses a grant up. Only [`Ledger::intent`](super::Ledger::intent) writes it.
pub const INTENT: &str = "execution.intent";
/// The event that says whose contents were erased. Only [`Ledger::erase_contents`](super::Ledger::erase_contents)
/// writes it.
pub const CONTENTS_ERASED: &str = "ledger.contents_erased";

/// What is about to be done under a grant.
#[derive(Clone, Debug)]
pub struct IntentRecord {
    pub trace_id: String,
    pub decision_id: String,
    pub session_id: String,
    /// Its hash must be the grant's.
    pub plan: Plan,
    /// What is to run, as far as it is known before it runs; goes into the receipt when nobody comes back to tell.
    pub provider_module_digest: String,
    /// The JCS form of the params; its hash must be the plan's `request_hash`. Kept beside the log as `params`.
    pub params: Vec<u8>,
    pub approval: Option<Value>,
    pub at: Timestamp,
}

impl IntentRecord {
    pub(super) fn into_record(
        self,
        grant: &Grant,
        workspace: &str,
    ) -> Result<(Map<String, Value>, Vec<Content>), LedgerError> {
        let refuse = |what: &str| Err(LedgerError::Refused(what.to_owned()));
        if self.plan.hash().map_err(|error| LedgerError::Refused(error.to_string()))? != grant.plan_hash {
            return refuse("the grant is for another plan");
        }
        if self.plan.not_after != grant.not_after || self.plan.listener != grant.listener {
            return refuse("the grant says otherwise than its plan");
        }
        if self.plan.workspace != workspace {
            return refuse("the plan is another workspace's");
        }
        if hash::sha256_tagged(&self.params) != self.plan.request_hash {
            return refuse("the params are not the ones that were decided");
        }
        if self.at > grant.not_after {
            return Err(LedgerError::GrantExpired);
        }
        let contents = vec![Content { name: "params".into(), bytes: self.params }];
        let mut details = json!({
            "grant": grant,
            "plan": self.plan,
            "provider_module_digest": self.provider_module_digest,
        });
        if let (Some(approval), Some(members)) = (self.approval, details.as_object_mut()) {
            members.insert("approval".into(), approval);
        }
        let draft = EventDraft {
            event_type: INTENT.into(),
            trace_id: self.trace_id,
            decision_id: self.decision_id,
            action_id: self.plan.action_id,
            principal: self.plan.principal,
            session_id: self.session_id,
            decision: "allow".into(),
            details,
            at: self.at,
        };
        let mut record = draft.into_fields(workspace)?;
        record.insert("grant_id".into(), grant.grant_id.clone().into());
        record.insert("contents".into(), content_index(&contents)?);
        Ok((record, contents))
    }

    pub(super) fn module_of(details: &Value) -> Option<String> {
        details.get("provider_module_digest")?.as_str().map(str::to_owned)
    }
}

pub(super) fn plan_of(details: &Value) -> Option<Plan> {
    serde_json::from_value(details.get("plan")?.clone()).ok()
}

/// An audit event before it is numbered, linked and signed. What is not known is empty.
#[derive(Clone, Debug)]
pub struct EventDraft {
    pub event_type: String,
    pub trace_id: String,
    pub decision_id: String,
    pub action_id: String,
    pub principal: String,
    pub session_id: String,
    /// `allow`, `deny`, `pending_approval`, or empty for what decides nothing.
    pub decision: String,
    pub details: Value,
    pub at: Timestamp,
}

impl EventDraft {
    pub(super) fn into_record(self, workspace: &str) -> Result<Map<String, Value>, LedgerError> {
        if [INTENT, CONTENTS_ERASED].contains(&self.event_type.as_str()) {
            return Err(LedgerError::Refused(format!("{} is written by the ledger alone", self.event_type)));
        }
        self.into_fields(workspace)
    }

    pub(super) fn into_fields(self, workspace: &str) -> Result<Map<String, Value>, LedgerError> {
        record::check_representable(&self.details)?;
        let record = json!({
            "event_id": ids::mint(),
            "event_type": self.event_type,
            "trace_id": self.trace_id,
            "decision_id": self.decision_id,
            "action_id": self.action_id,
            "principal": self.principal,
            "session_id": self.session_id,
            "workspace": workspace,
            "decision": self.decision,
            "details": self.details,
            "at": self.at,
        });
        match record {
            Value::Object(members) => Ok(members),
            _ => Err(LedgerError::Refused("an event that is no object".into())),
        }
    }
}

/// Which events to read; what is `None` does not narrow.
#[derive(Clone, Debug, Default)]
pub struct EventFilter {
    pub trace_id: Option<String>,
    pub event_type: Option<String>,
    pub action_id: Option<String>,
    pub principal: Option<String>,
    pub session_id: Option<String>,
    pub decision: Option<String>,
    /// Only events later than this.
    pub after: Option<Timestamp>,
    /// Only events earlier than this.
    pub before: Option<Timestamp>,
    /// At most so many, the newest first; the ceiling is 1,000.
    pub limit: Option<u32>,
}
