//! What policy is asked, and what it may answer (API §7).
//!
//! An engine answers with a [`PolicyDecision`] or an error, and nobody makes an error an allow: the terms of an allow
//! have no constructor outside this module.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::action::manifest::{Manifest, RiskLevel};
use crate::action::registry::TrustVerdict;
use crate::egress::profile::{Narrowing, Profile};

mod data;
pub mod embedded;
#[cfg(test)]
mod tests;

/// Something that decides.
pub trait Engine: Send + Sync {
    /// Decides one call.
    ///
    /// # Errors
    /// [`PolicyError`]; each of them refuses the call.
    fn evaluate(&self, input: &PolicyInput<'_>) -> Result<PolicyDecision, PolicyError>;

    /// `sha256:<hex>` of policy and data as loaded.
    fn policy_version(&self) -> &str;
}

/// The input document. What is not known is absent, never guessed.
#[derive(Clone, Debug, Serialize)]
pub struct PolicyInput<'a> {
    pub principal: &'a str,
    pub session_id: &'a str,
    pub scopes: &'a [String],
    pub required_scopes: &'a [String],
    pub action_id: &'a str,
    pub action_version: &'a str,
    pub action_risk_level: RiskLevel,
    pub action_trust_verdict: TrustVerdict,
    pub request_hash: &'a str,
    /// The manifest's `declared_side_effects`.
    pub requested_sinks: &'a [String],
    pub requested_secrets: Vec<String>,
    /// As [`Profile::to_public`] prints it.
    pub egress_profile: Value,
    pub budgets_before: BudgetsBefore,
    /// Left out when empty, as the published gate does.
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    pub unresolved_domains: &'a [String],
    pub params: &'a Map<String, Value>,
    pub peer: Peer<'a>,
}

/// What is left before this call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BudgetsBefore {
    /// Absent when unlimited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calls_remaining: Option<u64>,
}

/// Who is at the other end, as far as the gate knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Peer<'a> {
    pub listener: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service_account: Option<&'a str>,
}

/// The caller's side of a policy input.
#[derive(Clone, Debug)]
pub struct Asking<'a> {
    pub principal: &'a str,
    pub session_id: &'a str,
    pub scopes: &'a [String],
    pub peer: Peer<'a>,
}

impl<'a> PolicyInput<'a> {
    /// The input for one call of one action.
    pub fn new(
        asking: Asking<'a>,
        manifest: &'a Manifest,
        verdict: TrustVerdict,
        request_hash: &'a str,
        params: &'a Map<String, Value>,
        budgets_before: BudgetsBefore,
    ) -> Self {
        Self {
            principal: asking.principal,
            session_id: asking.session_id,
            scopes: asking.scopes,
            required_scopes: &manifest.required_scopes,
            action_id: &manifest.action_id,
            action_version: &manifest.version,
            action_risk_level: manifest.risk_level,
            action_trust_verdict: verdict,
            request_hash,
            requested_sinks: &manifest.declared_side_effects,
            requested_secrets: manifest.secret_names(),
            egress_profile: manifest.profile.to_public(),
            budgets_before,
            unresolved_domains: &[],
            params,
            peer: asking.peer,
        }
    }
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PolicyDecision {
    Allow(Terms),
    /// Allowed once enough people have approved it.
    Hold {
        terms: Terms,
        /// At least 1.
        approvers_required: u32,
        /// Whoever asked may not be among those who approve.
        not_the_requester: bool,
    },
    Deny {
        /// Printable and at most [`MAX_REASON_BYTES`] long.
        reason: String,
    },
}

/// What an allow is limited to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Terms {
    allowed_sinks: Option<Vec<String>>,
    approved_secrets: Option<Vec<String>>,
    approved_egress: Option<Narrowing>,
    label: Option<String>,
}

/// The longest `deny_reason` that is passed on, in bytes.
pub const MAX_REASON_BYTES: usize = 500;

/// Why there is no decision. The text is for the operator, not for an agent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// 503 `policy_engine_unavailable`.
    #[error("the policy engine is unavailable: {0}")]
    Unavailable(String),
    /// 503 `policy_engine_timeout`.
    #[error("the policy did not decide in time")]
    Timeout,
    /// 503 `policy_engine_unavailable`: it answered, with what is no decision.
    #[error("the policy's answer is no decision: {0}")]
    Invalid(String),
}

impl PolicyError {
    /// The `error` code of API §3.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Unavailable(_) | Self::Invalid(_) => "policy_engine_unavailable",
            Self::Timeout => "policy_engine_timeout",
        }
    }
}

impl Terms {
    /// The manifest's profile, narrowed to what policy approved; unchanged when policy says nothing of it.
    pub fn profile(&self, manifest: &Profile) -> Profile {
        match &self.approved_egress {
            None => manifest.clone(),
            Some(narrowing) => manifest.narrowed(narrowing),
        }
    }

    /// Those of `requested` that policy approved.
    pub fn secrets(&self, requested: &[String]) -> Vec<String> {
        kept(requested, self.approved_secrets.as_deref())
    }

    /// Those of `requested` that policy allows.
    pub fn sinks(&self, requested: &[String]) -> Vec<String> {
        kept(requested, self.allowed_sinks.as_deref())
    }

    /// What the policy calls itself. Receipts carry [`Engine::policy_version`], which nobody can forget to change.
    pub fn label(&self) -> Option<&str> {
        self.label.as_deref()
    }
}

fn kept(requested: &[String], allowed: Option<&[String]>) -> Vec<String> {
    requested.iter().filter(|one| allowed.is_none_or(|list| list.contains(one))).cloned().collect()
}

/// The output document. Members that are not named here (`budgets_after` of published policies) decide nothing.
#[derive(Deserialize)]
struct Output {
    allow: bool,
    deny_reason: Option<String>,
    requires_approval: Option<bool>,
    approvers_required: Option<u32>,
    not_the_requester: Option<bool>,
    allowed_sinks: Option<Vec<String>>,
    approved_secrets: Option<Vec<String>>,
    approved_egress: Option<Value>,
    policy_version: Option<String>,
}

impl PolicyDecision {
    /// Reads an output document, the embedded engine's or a server's.
    ///
    /// # Errors
    /// [`PolicyError::Invalid`] for any member of a wrong type, in a refusal too.
    fn from_output(output: &str) -> Result<Self, PolicyError> {
        let output: Output = serde_json::from_str(output).map_err(|error| PolicyError::Invalid(error.to_string()))?;
        let approved_egress =
            output.approved_egress.as_ref().map(Narrowing::parse).transpose().map_err(PolicyError::Invalid)?;
        if !output.allow {
            return Ok(Self::deny(output.deny_reason.as_deref().unwrap_or("denied by policy, which gave no reason")));
        }
        let terms = Terms {
            allowed_sinks: output.allowed_sinks,
            approved_secrets: output.approved_secrets,
            approved_egress,
            label: output.policy_version,
        };
        if !output.requires_approval.unwrap_or(false) {
            return Ok(Self::Allow(terms));
        }
        let approvers_required = output.approvers_required.unwrap_or(1);
        if approvers_required == 0 {
            return Err(PolicyError::Invalid("requires_approval with approvers_required 0".to_owned()));
        }
        let not_the_requester = output.not_the_requester.unwrap_or(false);
        Ok(Self::Hold { terms, approvers_required, not_the_requester })
    }

    /// Reasons may repeat what a caller wrote, so they are made printable and short.
    fn deny(reason: &str) -> Self {
        let mut clean: String = reason.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        if clean.len() > MAX_REASON_BYTES {
            clean.truncate(clean.floor_char_boundary(MAX_REASON_BYTES));
        }
        Self::Deny { reason: clean }
    }
}
