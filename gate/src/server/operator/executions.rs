//! `/v1/executions`: what runs, and ending it.

use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Call;
use crate::executions::{Execution, MAX_REASON_CHARS, NotKilled};
use crate::gate::Gate;
use crate::ledger::EventDraft;
use crate::pipeline::{Ids, Refusal};
use crate::server::body;
use crate::time::Timestamp;

/// What a kill's body may be, in bytes.
const MAX_BODY_BYTES: usize = 4096;
/// How long an answer waits until nothing is left of what was killed.
const PATIENCE: Duration = Duration::from_secs(10);

/// All that run, the oldest first.
pub fn list(gate: &Gate) -> Value {
    let executions: Vec<Value> = gate.executions.list().iter().map(view).collect();
    json!({"executions": executions, "count": executions.len()})
}

fn view(execution: &Execution) -> Value {
    let mut view = json!(execution);
    view["running_ms"] = json!(Timestamp::now().millis().saturating_sub(execution.started_at.millis()).max(0));
    view
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Asked {
    reason: Option<String>,
}

fn asked(body: &[u8]) -> Result<Asked, String> {
    if body.is_empty() {
        return Ok(Asked::default());
    }
    // A list would be taken for the members in their order.
    if body.trim_ascii_start().first() != Some(&b'{') {
        return Err("the body must be a JSON object".to_owned());
    }
    let asked: Asked = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    match &asked.reason {
        Some(reason) if reason.is_empty() || reason.chars().count() > MAX_REASON_CHARS => {
            Err(format!("reason must have 1 to {MAX_REASON_CHARS} characters"))
        }
        Some(reason) if reason.chars().any(char::is_control) => Err("reason is one line of text".to_owned()),
        _ => Ok(asked),
    }
}

/// Ends one, and says so in the ledger. It is ended even if the operator hangs up, and even if the ledger takes no more.
pub async fn kill(gate: &Arc<Gate>, call: &Call<'_>, id: &str, incoming: Incoming) -> Result<Value, Refusal> {
    let patience = Duration::from_secs(gate.config.limits.body_timeout_seconds);
    let body = body::read(&call.parts.headers, incoming, MAX_BODY_BYTES, patience).await?;
    let asked = asked(&body).map_err(|message| Refusal::InvalidRequest { message })?;
    let (gate, ids) = (Arc::clone(gate), call.ids.clone());
    let (id, operator) = (id.to_owned(), call.operator.name().to_owned());
    let killing = tokio::spawn(async move { end(&gate, &ids, &id, &operator, asked).await });
    killing.await.map_err(|error| Refusal::Internal { message: error.to_string() })?
}

async fn end(gate: &Gate, ids: &Ids, id: &str, operator: &str, asked: Asked) -> Result<Value, Refusal> {
    let killing = gate.executions.kill(id, operator, asked.reason.as_deref()).map_err(|error| match error {
        NotKilled::NotRunning => Refusal::NotFound,
        NotKilled::Ending => Refusal::Conflict { message: error.to_string() },
    })?;
    let execution = killing.execution().clone();
    let mut answer = view(&execution);
    tracing::warn!(execution = id, operator, reason = asked.reason, "an execution was killed");
    let event = EventDraft {
        event_type: "execution.killed".to_owned(),
        trace_id: ids.trace_id.clone(),
        decision_id: ids.decision_id.clone(),
        action_id: execution.action_id,
        principal: execution.principal,
        session_id: execution.session_id,
        decision: String::new(),
        details: json!({
            "execution_id": execution.id,
            "operator": operator,
            "reason": asked.reason,
            "phase": execution.phase,
            "lease_jti": execution.lease_jti,
        }),
        at: Timestamp::now(),
    };
    let noted = gate.ledger.event(event).await;
    let gone = tokio::time::timeout(PATIENCE, killing.gone()).await.is_ok();
    noted.map_err(|error| Refusal::Evidence { message: error.to_string() })?;
    answer["gone"] = json!(gone);
    Ok(json!({"killed": answer}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_short_and_one_line() {
        assert_eq!(asked(b"").map(|asked| asked.reason), Ok(None));
        assert_eq!(asked(br#"{"reason": "runs wild"}"#).map(|asked| asked.reason), Ok(Some("runs wild".to_owned())));
        let long = json!({"reason": "x".repeat(MAX_REASON_CHARS + 1)}).to_string();
        for wrong in [r#"{"reason": ""}"#, r#"{"reason": "a\nb"}"#, r#"{"why": "x"}"#, "[]", "x", long.as_str()] {
            assert!(asked(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }
}
