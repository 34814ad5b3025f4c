//! The one table from a refusal to its status, its code, what else the body says, and how loud the log is (API.md §3).
//!
//! What an agent reads never carries paths, rule names of ours or digests; the log line beside it does.

use hyper::{StatusCode, header};
use serde_json::{Map, Value, json};

use super::{Answer, body::BodyError};
use crate::auth::AuthError;
use crate::pipeline::authorise::AuthoriseError;
use crate::pipeline::dispatch::DispatchError;
use crate::pipeline::grant::GrantError;
use crate::pipeline::resolve::ResolveError;
use crate::pipeline::validate::ValidateError;
use crate::pipeline::{Refusal, Refused};

/// The header that carries a refusal's decision id.
pub const DECISION_ID: &str = "latchgate-decision-id";

/// How a refusal is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    /// The client's doing, and common.
    Debug,
    /// Worth a look: somebody asked for what they may not have.
    Warn,
    /// The gate's own trouble.
    Error,
}

struct Row {
    status: StatusCode,
    code: &'static str,
    level: Level,
    fields: Map<String, Value>,
}

fn row(status: u16, code: &'static str, level: Level) -> Row {
    Row {
        status: StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
        code,
        level,
        fields: Map::new(),
    }
}

impl Row {
    fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.fields.insert(name.to_owned(), value.into());
        self
    }
}

/// The answer to a refused request; logs it.
pub fn answer(refused: &Refused) -> Answer {
    let mut row = table(&refused.cause);
    log(refused, &row);
    let mut body = Map::new();
    body.insert("error".to_owned(), json!(row.code));
    body.insert("decision_id".to_owned(), json!(refused.decision_id));
    body.insert("trace_id".to_owned(), json!(refused.trace_id));
    if let Some(receipt_id) = &refused.receipt_id {
        body.insert("receipt_id".to_owned(), json!(receipt_id));
    }
    body.append(&mut row.fields);
    let mut answer = super::json(row.status, &Value::Object(body));
    let headers = answer.headers_mut();
    if let Ok(value) = header::HeaderValue::from_str(&refused.decision_id) {
        headers.insert(DECISION_ID, value);
    }
    if row.status == StatusCode::UNAUTHORIZED {
        // RFC 9449 §7.1
        headers.insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("DPoP algs=\"ES256\""));
    }
    if row.status == StatusCode::TOO_MANY_REQUESTS {
        headers.insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
    }
    if let Refusal::MethodNotAllowed { allow } = *refused.cause {
        headers.insert(header::ALLOW, header::HeaderValue::from_static(allow));
    }
    answer
}

/// The code alone, for the counters.
pub fn code(cause: &Refusal) -> &'static str {
    table(cause).code
}

fn log(refused: &Refused, row: &Row) {
    let (decision_id, code, cause) = (&refused.decision_id, row.code, &refused.cause);
    match row.level {
        Level::Debug => tracing::debug!(%decision_id, code, %cause, "refused"),
        Level::Warn => tracing::warn!(%decision_id, code, %cause, "refused"),
        Level::Error => tracing::error!(%decision_id, code, %cause, "refused"),
    }
}

fn authentication(error: &AuthError) -> Row {
    let (status, level) = match error {
        AuthError::IdentityForbidden => (403, Level::Warn),
        AuthError::ReplayCache(_) | AuthError::Store(_) | AuthError::Clock => (503, Level::Error),
        _ => (401, Level::Warn),
    };
    row(status, error.code(), level).with("deny_reason", error.deny_reason())
}

fn table(cause: &Refusal) -> Row {
    use Level::{Debug, Error, Warn};
    match cause {
        Refusal::Draining => row(503, "draining", Debug),
        Refusal::Busy => row(429, "rate_limited", Warn),
        Refusal::NotFound => row(404, "not_found", Debug),
        Refusal::MethodNotAllowed { .. } => row(405, "method_not_allowed", Debug),
        Refusal::InvalidRequest { message } => row(400, "invalid_request", Debug).with("message", message.as_str()),
        Refusal::Conflict { message } => row(409, "conflict", Debug).with("message", message.as_str()),
        Refusal::Body(error) => match error {
            BodyError::MediaType => row(415, "unsupported_media_type", Debug).with("message", error.to_string()),
            BodyError::TooLarge { limit } => row(413, "payload_too_large", Debug).with("limit_bytes", *limit),
            BodyError::NoRoom => row(429, "rate_limited", Warn),
            BodyError::Slow | BodyError::Broken => row(400, "bad_request", Debug).with("message", error.to_string()),
        },
        Refusal::Authenticate(error) => authentication(error),
        Refusal::Resolve(error) => match error {
            ResolveError::ActionNotFound => row(404, "action_not_found", Debug),
            ResolveError::DigestMismatch => row(403, "action_digest_mismatch", Error),
            ResolveError::ScopeNotPermitted { missing } => {
                row(403, "scope_not_permitted", Warn).with("deny_reason", format!("missing scope: {missing}"))
            }
        },
        Refusal::Validate(error) => match error {
            ValidateError::InvalidRequest { message } => {
                row(400, "invalid_request", Debug).with("message", message.as_str())
            }
            ValidateError::BodyClaim(error) => authentication(error),
            ValidateError::Schema { pointer, what } => row(422, "schema_violation", Debug)
                .with("reason", format!("{}: {what}", if pointer.is_empty() { "/" } else { pointer }))
                .with("pointer", pointer.as_str()),
            ValidateError::Internal { .. } => row(500, "internal_error", Error),
        },
        Refusal::Authorise(error) => match error {
            AuthoriseError::EgressDenied { deny_reason, .. } => {
                row(403, "egress_denied", Warn).with("deny_reason", deny_reason.as_str())
            }
            AuthoriseError::BudgetExhausted { which } => {
                row(403, "budget_exhausted", Warn).with("deny_reason", which.as_str())
            }
            AuthoriseError::BudgetStore { .. } => row(503, "budget_store_unavailable", Error),
            AuthoriseError::PolicyDenied { deny_reason, principal, action_id, remediation } => {
                row(403, "policy_denied", Warn)
                    .with("deny_reason", deny_reason.as_str())
                    .with("principal", principal.as_str())
                    .with("action_id", action_id.as_str())
                    .with("remediation", remediation.as_str())
            }
            AuthoriseError::PolicyUnavailable { .. } => row(503, "policy_engine_unavailable", Error),
            AuthoriseError::PolicyTimeout => row(503, "policy_engine_timeout", Error),
        },
        Refusal::Grant(error) => match error {
            GrantError::BudgetExhausted { which } => {
                row(403, "budget_exhausted", Warn).with("deny_reason", which.as_str())
            }
            GrantError::BudgetStore { .. } => row(503, "budget_store_unavailable", Error),
            GrantError::Consumed => row(409, "grant_consumed", Warn),
            GrantError::Evidence { .. } => row(500, "evidence_persistence_failed", Error),
            GrantError::Internal { .. } => row(500, "internal_error", Error),
        },
        Refusal::Dispatch(error) => match error {
            DispatchError::EgressDenied { deny_reason } => {
                row(403, "egress_denied", Warn).with("deny_reason", deny_reason.as_str())
            }
            DispatchError::ActionFailed { reason } => {
                row(502, "action_execution_failed", Debug).with("reason", reason.as_str())
            }
            DispatchError::Sandbox { .. } => {
                row(502, "action_execution_failed", Error).with("reason", "the sandbox could not be made")
            }
        },
        Refusal::Evidence { .. } => row(500, "evidence_persistence_failed", Error),
        Refusal::Store { .. } => row(503, "store_unavailable", Error),
        Refusal::Internal { .. } => row(500, "internal_error", Error),
    }
}
