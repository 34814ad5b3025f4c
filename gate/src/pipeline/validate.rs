//! What is asked: strict JSON that the proof was made for, of the shape that the action declares.

use serde_json::{Map, Value};

use crate::action::canonical::{self, StrictError};
use crate::action::manifest::{Manifest, Prepared};
use crate::action::registry::TrustVerdict;
use crate::auth::AuthError;
use crate::pipeline::authenticate::Caller;
use crate::pipeline::resolve::ResolvedAction;

/// A call whose parameters are what the caller's key signed for and what the action's schema wants.
#[derive(Debug)]
pub struct ValidCall {
    action: ResolvedAction,
    params: Map<String, Value>,
    request_hash: String,
    prepared: Prepared,
}

impl ValidCall {
    pub fn manifest(&self) -> &Manifest {
        self.action.manifest()
    }

    pub const fn verdict(&self) -> TrustVerdict {
        self.action.verdict()
    }

    pub const fn params(&self) -> &Map<String, Value> {
        &self.params
    }

    /// `sha256:<hex>` over the JCS form of the parameters.
    pub fn request_hash(&self) -> &str {
        &self.request_hash
    }

    /// What the action is to do. What was checked here is what is carried out.
    pub const fn prepared(&self) -> &Prepared {
        &self.prepared
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ValidateError {
    #[error("{message}")]
    InvalidRequest { message: String },
    #[error(transparent)]
    BodyClaim(AuthError),
    #[error("{pointer}: {what}")]
    Schema { pointer: String, what: String },
    #[error("{message}")]
    Internal { message: String },
}

impl From<StrictError> for ValidateError {
    fn from(error: StrictError) -> Self {
        match error {
            StrictError::Ambiguous { pointer, what } => Self::Schema { pointer, what: what.to_string() },
            other => Self::InvalidRequest { message: other.to_string() },
        }
    }
}

pub fn validate(caller: &Caller, action: ResolvedAction, body: &[u8]) -> Result<ValidCall, ValidateError> {
    let params = canonical::parse_strict(body)?;
    let request_hash =
        canonical::request_hash(&params).map_err(|error| ValidateError::Internal { message: error.to_string() })?;
    caller.proven().bind_body(&request_hash).map_err(ValidateError::BodyClaim)?;
    let value = Value::Object(params);
    action
        .manifest()
        .validate(&value)
        .map_err(|violation| ValidateError::Schema { pointer: violation.pointer, what: violation.what })?;
    let Value::Object(params) = value else {
        return Err(ValidateError::Internal { message: "params are an object".to_owned() });
    };
    let prepared = action.manifest().prepare(&params).map_err(|error| {
        let text = error.to_string();
        let (pointer, what) = text.split_once(": ").unwrap_or(("", &text));
        ValidateError::Schema { pointer: pointer.to_owned(), what: what.to_owned() }
    })?;
    Ok(ValidCall { action, params, request_hash, prepared })
}
