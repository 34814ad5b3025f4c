//! What an agent's listener answers (API.md §2).

use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::{HeaderMap, Method, Request, StatusCode, header};
use serde_json::{Value, json};
use tokio::task::block_in_place;

use super::listen::{ListenerIdentity, Peer};
use super::{Answer, body, error};
use crate::auth::lease::{LeaseRequest, LeaseRequestError, NewLease};
use crate::gate::{Gate, Readiness};
use crate::pipeline::{self, Executed, Ids, Refusal, Refused, authenticate};
use crate::time::Timestamp;

/// A resource of the agent's listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route<'a> {
    Leases,
    Execute(&'a str),
    Receipt(&'a str),
    ApprovalPoll(&'a str),
    Actions,
    Action(&'a str),
    ActionSchema(&'a str),
    Jwks,
    Healthz,
    Readyz,
}

impl<'a> Route<'a> {
    /// Ids are what we mint and manifests may have: nothing in them is ever percent-encoded, so nothing is decoded.
    fn of(path: &'a str) -> Option<Self> {
        let segments: Vec<&str> = path.strip_prefix('/')?.split('/').collect();
        Some(match segments.as_slice() {
            ["v1", "leases"] => Self::Leases,
            ["v1", "actions"] => Self::Actions,
            ["v1", "actions", id] if is_id(id) => Self::Action(id),
            ["v1", "actions", id, "execute"] if is_id(id) => Self::Execute(id),
            ["v1", "actions", id, "schema", "request"] if is_id(id) => Self::ActionSchema(id),
            ["v1", "receipts", id] if is_id(id) => Self::Receipt(id),
            ["v1", "approvals", id, "poll"] if is_id(id) => Self::ApprovalPoll(id),
            [".well-known", "jwks.json"] => Self::Jwks,
            ["healthz"] => Self::Healthz,
            ["readyz"] => Self::Readyz,
            _ => return None,
        })
    }

    const fn allow(self) -> &'static str {
        match self {
            Self::Leases | Self::Execute(_) => "POST",
            _ => "GET",
        }
    }
}

/// API.md §1.8.
fn is_id(id: &str) -> bool {
    id.len() <= 256
        && id.starts_with(|c: char| c.is_ascii_alphanumeric())
        && id.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
}

/// Answers one request of an agent.
pub async fn handle(
    gate: Arc<Gate>,
    listener: Arc<ListenerIdentity>,
    peer: Peer,
    request: Request<Incoming>,
) -> Answer {
    let ids = Ids::mint();
    match route(&gate, listener, peer, request, &ids).await {
        Ok(answer) => answer,
        Err(refused) => {
            gate.metrics.refused(&refused.cause);
            error::answer(&refused)
        }
    }
}

async fn route(
    gate: &Arc<Gate>,
    listener: Arc<ListenerIdentity>,
    peer: Peer,
    request: Request<Incoming>,
    ids: &Ids,
) -> Result<Answer, Refused> {
    let refuse = |cause: Refusal| Refused::new(ids, cause);
    let (parts, incoming) = request.into_parts();
    let path = parts.uri.path().to_owned();
    let route = Route::of(&path);
    if gate.is_draining() && !matches!(route, Some(Route::Healthz | Route::Readyz)) {
        return Err(refuse(Refusal::Draining));
    }
    let route = route.ok_or_else(|| refuse(Refusal::NotFound))?;
    let allow = route.allow();
    if parts.method.as_str() != allow {
        return Err(refuse(Refusal::MethodNotAllowed { allow }));
    }
    let limit = match route {
        Route::Execute(id) => gate.registry.action(id).map_or(gate.config.limits.max_request_bytes, |action| {
            usize::try_from(action.max_request_bytes).unwrap_or(usize::MAX).min(gate.config.limits.max_request_bytes)
        }),
        _ => gate.config.limits.max_request_bytes,
    };
    let body = if parts.method == Method::POST {
        let patience = Duration::from_secs(gate.config.limits.body_timeout_seconds);
        let read = body::read_within(&parts.headers, incoming, limit, patience, &listener.room);
        read.await.map_err(|cause| refuse(cause.into()))?
    } else {
        body::Held::default()
    };
    let presented = || pipeline::Request {
        ids: ids.clone(),
        listener: Arc::clone(&listener),
        peer,
        authorization: values(&parts.headers, header::AUTHORIZATION.as_str()),
        dpop: values(&parts.headers, "dpop"),
        method: parts.method.as_str().to_owned(),
        path: path.clone(),
        received_at: Timestamp::now(),
    };
    match route {
        Route::Healthz => Ok(super::json(StatusCode::OK, &json!({"status": "ok"}))),
        Route::Readyz => Ok(readyz(&gate.readiness())),
        Route::Jwks => Ok(super::json(StatusCode::OK, &gate.lease_jwks())),
        Route::Actions => Ok(super::json(StatusCode::OK, &gate.registry.list())),
        Route::Action(id) => {
            let action = gate
                .registry
                .action(id)
                .ok_or_else(|| refuse(pipeline::resolve::ResolveError::ActionNotFound.into()))?;
            Ok(super::json(StatusCode::OK, &action.detail()))
        }
        Route::ActionSchema(id) => {
            let action = gate
                .registry
                .action(id)
                .ok_or_else(|| refuse(pipeline::resolve::ResolveError::ActionNotFound.into()))?;
            Ok(super::json(StatusCode::OK, &action.request_schema_view()))
        }
        Route::Leases => lease(gate, &listener, peer, &body.bytes).map_err(refuse),
        Route::Execute(id) => {
            let executed = pipeline::execute(gate, presented(), id, body.bytes.clone()).await?;
            Ok(super::json(StatusCode::OK, &result(&executed, id)))
        }
        Route::Receipt(id) => {
            block_in_place(|| receipt(gate, &authenticate::authenticate(gate, &presented())?, id)).map_err(refuse)
        }
        Route::ApprovalPoll(_) => {
            block_in_place(|| authenticate::authenticate(gate, &presented())).map_err(refuse)?;
            // Nothing is ever held yet, so no approval has any id.
            Err(refuse(Refusal::NotFound))
        }
    }
}

fn values(headers: &HeaderMap, name: &str) -> Vec<Vec<u8>> {
    headers.get_all(name).iter().map(|value| value.as_bytes().to_vec()).collect()
}

fn readyz(readiness: &Readiness) -> Answer {
    let (status, word) = match readiness {
        Readiness::Ready => (StatusCode::OK, "ready"),
        Readiness::Degraded(_) => (StatusCode::OK, "degraded"),
        Readiness::NotReady(_) => (StatusCode::SERVICE_UNAVAILABLE, "not_ready"),
    };
    let mut answer = json!({"status": word});
    if let Readiness::Degraded(reason) | Readiness::NotReady(reason) = readiness {
        answer["reason"] = json!(reason);
        if status != StatusCode::OK {
            answer["error"] = json!("not_ready");
        }
    }
    super::json(status, &answer)
}

/// A lease needs no token: who calls is the listener, narrowed by the peer.
fn lease(gate: &Gate, listener: &ListenerIdentity, peer: Peer, body: &[u8]) -> Result<Answer, Refusal> {
    let principal = listener.principal_of(peer)?;
    let request = LeaseRequest::parse(body).map_err(|error| match error {
        LeaseRequestError::Json(ambiguous) => Refusal::Validate(ambiguous.into()),
        other => Refusal::InvalidRequest { message: other.to_string() },
    })?;
    if let Some(missing) = request.scopes.iter().find(|scope| !listener.scopes.contains(scope)) {
        return Err(pipeline::resolve::ResolveError::ScopeNotPermitted { missing: missing.clone() }.into());
    }
    let jkt = request.dpop_jwk.thumbprint();
    let issued = gate
        .issuer
        .issue(
            &NewLease {
                principal: principal.to_owned(),
                listener: listener.name.clone(),
                session_id: None,
                jkt,
                scopes: request.scopes,
                budgets: request.budgets,
            },
            Timestamp::now(),
        )
        .map_err(|error| Refusal::Internal { message: error.to_string() })?;
    Ok(super::json(
        StatusCode::OK,
        &json!({
            "lease_jwt": issued.lease_jwt,
            "session_id": issued.session_id,
            "lease_jti": issued.lease_jti,
            "expires_at": issued.expires_at,
        }),
    ))
}

/// Another principal's receipt is as absent as one that never was.
fn receipt(gate: &Gate, caller: &authenticate::Caller, id: &str) -> Result<Answer, Refusal> {
    let found = gate.ledger.receipt_by_id(id).map_err(|error| Refusal::Store { message: error.to_string() })?;
    let receipt = found.filter(|receipt| receipt.principal() == caller.principal()).ok_or(Refusal::NotFound)?;
    let status = receipt.signature_status(gate.ledger.keys().public());
    let mut body = serde_json::to_value(&receipt).map_err(|error| Refusal::Internal { message: error.to_string() })?;
    body["signature_status"] = json!(status);
    Ok(super::json(StatusCode::OK, &body))
}

fn result(executed: &Executed, action_id: &str) -> Value {
    let mut body = json!({
        "decision": "executed",
        "trace_id": executed.trace_id,
        "action_id": action_id,
        "grant_id": executed.receipt.grant_id(),
        "receipt_id": executed.receipt.receipt_id(),
        "output": executed.output,
        "verification_outcome": executed.receipt.fields().get("verification_outcome"),
        "verification": executed.outcome.verification(),
        "runtime": executed.outcome.runtime(),
        "egress": executed.outcome.egress(),
    });
    if let Some(budget) = &executed.budget {
        body["budget"] = budget.clone();
    }
    body
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_matched_whole_and_never_decoded() {
        for (path, expected) in [
            ("/v1/leases", Some(Route::Leases)),
            ("/v1/actions/http_fetch/execute", Some(Route::Execute("http_fetch"))),
            ("/v1/actions/a/schema/request", Some(Route::ActionSchema("a"))),
            ("/v1/approvals/x/poll", Some(Route::ApprovalPoll("x"))),
            ("/v1/actions/", None),
            ("/v1/actions//execute", None),
            ("/v1/actions/../execute", None),
            ("/v1/actions/a%2fb/execute", None),
            ("/v1/leases/", None),
            ("//v1/leases", None),
            ("", None),
            ("*", None),
        ] {
            assert_eq!(Route::of(path), expected, "{path}");
        }
    }
}
