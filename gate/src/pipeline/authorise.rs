//! Whether this caller may make this call: the action's own profile, what is left of the budgets, and policy.

use crate::action::manifest::Prepared;
use crate::egress::flows::Asked;
use crate::egress::profile::{Denied, Profile};
use crate::gate::Gate;
use crate::pipeline::Request;
use crate::pipeline::authenticate::Caller;
use crate::pipeline::validate::ValidCall;
use crate::policy::{self, Asking, BudgetsBefore, PolicyDecision, PolicyError, PolicyInput};
use crate::store::StoreError;

/// A call that policy allows, with the profile that it may use.
#[derive(Debug)]
pub struct Decision {
    call: ValidCall,
    profile: Profile,
    policy_version: String,
}

impl Decision {
    pub const fn call(&self) -> &ValidCall {
        &self.call
    }

    /// The manifest's profile, or what policy left of it.
    pub const fn profile(&self) -> &Profile {
        &self.profile
    }

    pub fn policy_version(&self) -> &str {
        &self.policy_version
    }
}

#[derive(Debug, thiserror::Error)]
pub enum AuthoriseError {
    #[error("egress denied: {deny_reason}")]
    EgressDenied { deny_reason: String, asked: Box<Asked> },
    #[error("budget exhausted: {which}")]
    BudgetExhausted { which: String },
    #[error("budget store: {source}")]
    BudgetStore { source: StoreError },
    #[error("policy denied: {deny_reason}")]
    PolicyDenied { deny_reason: String, principal: String, action_id: String, remediation: String },
    #[error("policy engine: {message}")]
    PolicyUnavailable { message: String },
    #[error("the policy engine did not answer in time")]
    PolicyTimeout,
}

pub fn authorise(gate: &Gate, caller: &Caller, request: &Request, call: ValidCall) -> Result<Decision, AuthoriseError> {
    let manifest = call.manifest();
    let outside = |error: Denied| AuthoriseError::EgressDenied {
        deny_reason: error.to_string(),
        asked: Box::new(asked(call.prepared())),
    };
    // A call that names a host outside the profile is refused before anybody is asked.
    manifest.permits(call.prepared()).map_err(outside)?;
    let remaining =
        gate.budgets.remaining(caller, request.received_at).map_err(|source| AuthoriseError::BudgetStore { source })?;
    if remaining.is_exhausted() {
        let which = if remaining.calls_remaining == Some(0) { "calls" } else { "cost" };
        return Err(AuthoriseError::BudgetExhausted { which: which.to_owned() });
    }
    let denied = |deny_reason: String, remediation: &str| AuthoriseError::PolicyDenied {
        deny_reason,
        principal: caller.principal().to_owned(),
        action_id: manifest.action_id.clone(),
        remediation: remediation.to_owned(),
    };
    let asking = Asking {
        principal: caller.principal(),
        session_id: caller.session_id(),
        scopes: caller.scopes(),
        peer: policy::Peer { listener: &caller.listener().name, uid: caller.peer().uid, ..policy::Peer::default() },
    };
    let before = BudgetsBefore { calls_remaining: remaining.calls_remaining };
    let input = PolicyInput::new(asking, manifest, call.verdict(), call.request_hash(), call.params(), before);
    let decided = gate.policy.evaluate(&input).map_err(|error| match error {
        PolicyError::Timeout => AuthoriseError::PolicyTimeout,
        other => AuthoriseError::PolicyUnavailable { message: other.to_string() },
    })?;
    let profile = match decided {
        PolicyDecision::Allow(terms) => terms.profile(&manifest.profile),
        PolicyDecision::Hold { .. } => {
            return Err(denied(
                "requires_approval: policy wants a person to approve this call, and this gate holds no calls"
                    .to_owned(),
                "use an action of a lower risk, or ask the operator to allow this one in the policy data",
            ));
        }
        PolicyDecision::Deny { reason } => {
            return Err(denied(reason, "ask the operator to allow this action for this principal"));
        }
    };
    // A narrowed profile may leave out what this very call asks for.
    call.prepared().within(&profile).map_err(outside)?;
    Ok(Decision { call, profile, policy_version: gate.policy.policy_version().to_owned() })
}

/// What the call would contact, for the record of its refusal.
fn asked(prepared: &Prepared) -> Asked {
    let Prepared::Http(http) = prepared else {
        return Asked::default();
    };
    Asked {
        name: Some(http.host.clone()),
        port: Some(http.port),
        protocol: http.url.split_once(':').map(|(scheme, _)| scheme.to_owned()),
        method: Some(http.method.clone()),
    }
}
