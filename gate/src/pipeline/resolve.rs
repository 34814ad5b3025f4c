//! Which action is asked for, whether it is still the one that was loaded, and whether the lease covers it.

use std::sync::Arc;

use crate::action::manifest::Manifest;
use crate::action::registry::TrustVerdict;
use crate::gate::Gate;
use crate::pipeline::authenticate::Caller;

/// The scope that every execution needs.
const EXECUTE: &str = "tools:call";

/// An action that exists and that the caller's lease covers.
#[derive(Debug)]
pub struct ResolvedAction {
    action: Arc<Manifest>,
    verdict: TrustVerdict,
}

impl ResolvedAction {
    pub fn manifest(&self) -> &Manifest {
        &self.action
    }

    pub const fn verdict(&self) -> TrustVerdict {
        self.verdict
    }
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ResolveError {
    #[error("no such action")]
    ActionNotFound,
    #[error("the action is not the one that its digest was pinned for")]
    DigestMismatch,
    #[error("the lease lacks the scope {missing}")]
    ScopeNotPermitted { missing: String },
}

pub fn resolve(gate: &Gate, caller: &Caller, action_id: &str) -> Result<ResolvedAction, ResolveError> {
    let action = gate.registry.action(action_id).ok_or(ResolveError::ActionNotFound)?;
    let verdict = gate.registry.verdict(action_id);
    if verdict != TrustVerdict::DigestOk {
        return Err(ResolveError::DigestMismatch);
    }
    let required = std::iter::once(EXECUTE).chain(action.required_scopes.iter().map(String::as_str));
    for scope in required {
        if !caller.scopes().iter().any(|held| held == scope) {
            return Err(ResolveError::ScopeNotPermitted { missing: scope.to_owned() });
        }
    }
    Ok(ResolvedAction { action: Arc::clone(action), verdict })
}
