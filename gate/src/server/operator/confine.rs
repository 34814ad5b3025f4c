//! `POST /v1/confine`: begins a session and gives its connection over to it (`latchgate confine`).

use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper::{StatusCode, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;

use super::Call;
use crate::confine::{self, Asked, MAX_REQUEST_BYTES, frame};
use crate::gate::Gate;
use crate::pipeline::Refusal;
use crate::server::patient::Patience;
use crate::server::{Answer, body};

/// Judges the request and switches protocols; the session runs from there on, in a task of its own.
pub async fn begin(
    gate: &Arc<Gate>,
    call: &Call<'_>,
    incoming: Incoming,
    upgrade: Option<OnUpgrade>,
) -> Result<Answer, Refusal> {
    let invalid = |message: String| Refusal::InvalidRequest { message };
    let asked_for = call.parts.headers.get(header::UPGRADE).and_then(|value| value.to_str().ok());
    let (Some(upgrade), Some(frame::PROTOCOL)) = (upgrade, asked_for) else {
        return Err(invalid(format!("a session needs `upgrade: {}`", frame::PROTOCOL)));
    };
    let patience = Duration::from_secs(gate.config.limits.body_timeout_seconds);
    let body = body::read(&call.parts.headers, incoming, MAX_REQUEST_BYTES, patience).await?;
    let asked: Asked = serde_json::from_slice(&body).map_err(|error| invalid(error.to_string()))?;
    let jkt = call.operator.key().thumbprint();
    let ready = confine::begin(gate, asked, (call.operator.name(), &jkt), call.peer)?;
    let ids = call.ids.clone();
    let patience = call.parts.extensions.get::<Patience>().cloned();
    tokio::spawn(async move {
        match upgrade.await {
            Ok(client) => {
                // Whoever sits before a terminal may pause it.
                patience.inspect(Patience::without_end);
                ready.run(ids, TokioIo::new(client)).await;
            }
            // Nothing was begun.
            Err(error) => tracing::debug!(%error, "a session's client went away"),
        }
    });
    let mut answer = crate::server::json(StatusCode::SWITCHING_PROTOCOLS, &Value::Null);
    *answer.body_mut() = http_body_util::Full::default();
    let headers = answer.headers_mut();
    headers.remove(header::CONTENT_TYPE);
    headers.insert(header::CONNECTION, header::HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, header::HeaderValue::from_static(frame::PROTOCOL));
    Ok(answer)
}
