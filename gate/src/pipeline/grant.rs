//! Debit, grant, intent: what must be durable before anything runs.

use std::time::Duration;

use tokio::task::block_in_place;

use crate::action::canonical;
use crate::executions::{Execution, Phase};
use crate::gate::Gate;
use crate::ledger::{self, IntentRecord, LedgerError, Plan};
use crate::pipeline::authenticate::Caller;
use crate::pipeline::authorise::Decision;
use crate::pipeline::budget::Debit;
use crate::pipeline::{Ids, Refusal};
use crate::time::Timestamp;

/// A grant whose intent is in the ledger. It stands for exactly one execution, and [`crate::pipeline::dispatch`] takes
/// it by value.
#[derive(Debug)]
pub struct Grant {
    decision: Decision,
    debit: Debit,
    grant_id: String,
    principal: String,
    listener: String,
    lease_jti: String,
    session_id: String,
    deadline: Duration,
    started_at: Timestamp,
}

impl Grant {
    pub const fn decision(&self) -> &Decision {
        &self.decision
    }

    pub const fn debit(&self) -> &Debit {
        &self.debit
    }

    pub fn grant_id(&self) -> &str {
        &self.grant_id
    }

    pub fn principal(&self) -> &str {
        &self.principal
    }

    /// What the action may take on the wall clock.
    pub const fn deadline(&self) -> Duration {
        self.deadline
    }

    pub const fn started_at(&self) -> Timestamp {
        self.started_at
    }

    /// Its execution as operators see it, before it has a place.
    pub(super) fn execution(&self, ids: &Ids) -> Execution {
        Execution {
            id: self.grant_id.clone(),
            action_id: self.decision.call().manifest().action_id.clone(),
            principal: self.principal.clone(),
            listener: self.listener.clone(),
            lease_jti: self.lease_jti.clone(),
            session_id: self.session_id.clone(),
            decision_id: ids.decision_id.clone(),
            trace_id: ids.trace_id.clone(),
            started_at: self.started_at,
            phase: Phase::Waiting,
            leaf: None,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum GrantError {
    #[error("budget exhausted: {which}")]
    BudgetExhausted { which: String },
    #[error("budget store: {message}")]
    BudgetStore { message: String },
    #[error("the grant was used already")]
    Consumed,
    #[error("the intent could not be made durable: {message}")]
    Evidence { message: String },
    #[error("{message}")]
    Internal { message: String },
}

/// Debits the budgets, mints the grant and makes its intent durable; gives the budgets back when that fails.
///
/// # Errors
/// With the action's id, for the record of the refusal.
pub async fn issue(gate: &Gate, caller: &Caller, decision: Decision, ids: &Ids) -> Result<Grant, (String, Refusal)> {
    let action_id = decision.call().manifest().action_id.clone();
    let now = Timestamp::now();
    let debit = match block_in_place(|| gate.budgets.debit(caller, decision.call().manifest().cost_usd_cents, now)) {
        Ok(debit) => debit,
        Err(error) => return Err((action_id, error.into())),
    };
    match intend(gate, caller, decision, ids, now).await {
        Ok((decision, grant_id, deadline)) => Ok(Grant {
            decision,
            debit,
            grant_id,
            principal: caller.principal().to_owned(),
            listener: caller.listener().name.clone(),
            lease_jti: caller.lease_jti().to_owned(),
            session_id: caller.session_id().to_owned(),
            deadline,
            started_at: now,
        }),
        Err(error) => {
            block_in_place(|| gate.budgets.refund(&debit));
            Err((action_id, error.into()))
        }
    }
}

async fn intend(
    gate: &Gate,
    caller: &Caller,
    decision: Decision,
    ids: &Ids,
    now: Timestamp,
) -> Result<(Decision, String, Duration), GrantError> {
    let internal = |message: String| GrantError::Internal { message };
    let call = decision.call();
    let manifest = call.manifest();
    let deadline = Duration::from_secs(manifest.limits.timeout_seconds);
    // Time to wait for a place and to start a sandbox is not the action's; beyond it the grant is void.
    let not_after = now.plus_millis(i64::try_from(deadline.as_millis()).unwrap_or(i64::MAX)).plus_millis(60_000);
    let plan = Plan {
        action_id: manifest.action_id.clone(),
        action_version: manifest.version.clone(),
        action_digest: manifest.digest().to_owned(),
        request_hash: call.request_hash().to_owned(),
        profile_hash: decision.profile().hash(),
        secret_names: Vec::new(),
        policy_version: decision.policy_version().to_owned(),
        principal: caller.principal().to_owned(),
        listener: caller.listener().name.clone(),
        workspace: gate.config.workspace.clone(),
        not_after,
    };
    let grant =
        ledger::Grant::mint(&plan, caller.lease_jti(), caller.jkt()).map_err(|error| internal(error.to_string()))?;
    let intent = IntentRecord {
        trace_id: ids.trace_id.clone(),
        decision_id: ids.decision_id.clone(),
        session_id: caller.session_id().to_owned(),
        plan,
        provider_module_digest: gate.module_digest(manifest),
        params: canonical::jcs(call.params()).map_err(|error| internal(error.to_string()))?,
        approval: None,
        at: now,
    };
    let grant_id = grant.grant_id.clone();
    gate.ledger.intent(&grant, intent).await.map_err(|error| match error {
        LedgerError::GrantConsumed => GrantError::Consumed,
        other => GrantError::Evidence { message: other.to_string() },
    })?;
    Ok((decision, grant_id, deadline))
}
