//! What the proxy itself answers: refusals that say that they are refusals, and failures that say that they are not.

use serde_json::json;

/// The field that marks an answer as the proxy's own; origins' fields of this name are not passed on.
pub const DECISION_ID: &str = "Latchgate-Decision-Id";

/// An answer of the proxy's own.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reply {
    /// 403: the profile, or the rules about addresses, do not let this connection be made.
    #[error("{message}")]
    Denied {
        /// The code that the client reads.
        reason: String,
        /// What the flow record says beside it.
        detail: Option<&'static str>,
        message: String,
    },
    /// 400: the request is not one, or could be read in two ways.
    #[error("{message}")]
    Invalid { message: String },
    /// 408: the request did not come in time.
    #[error("the request did not come in time")]
    Slow,
    /// 502 or 504: it was allowed, and the other side could not be reached or did not speak as it should.
    #[error("{message}")]
    Failed { reason: &'static str, message: String },
}

impl Reply {
    pub fn denied(reason: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Denied { reason: reason.into(), detail: None, message: message.into() }
    }

    pub fn failed(reason: &'static str, message: impl Into<String>) -> Self {
        Self::Failed { reason, message: message.into() }
    }

    /// The whole answer; a HEAD request gets the head alone.
    pub fn to_bytes(&self, decision_id: &str, head_only: bool) -> Vec<u8> {
        let (status, body) = match self {
            Self::Denied { reason, message, .. } => (
                "403 Forbidden",
                json!({"error": "egress_denied", "deny_reason": reason, "message": message, "decision_id": decision_id}),
            ),
            Self::Invalid { message } => {
                ("400 Bad Request", json!({"error": "invalid_request", "message": message, "decision_id": decision_id}))
            }
            Self::Slow => (
                "408 Request Timeout",
                json!({"error": "invalid_request", "message": self.to_string(), "decision_id": decision_id}),
            ),
            Self::Failed { reason, message } => (
                if reason.ends_with("timeout") { "504 Gateway Timeout" } else { "502 Bad Gateway" },
                json!({"error": "upstream_failed", "reason": reason, "message": message, "decision_id": decision_id}),
            ),
        };
        let body = body.to_string();
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n{DECISION_ID}: {decision_id}\r\n\
             Cache-Control: no-store\r\nConnection: close\r\n\r\n",
            body.len()
        );
        if head_only { head.into_bytes() } else { (head + &body).into_bytes() }
    }
}
