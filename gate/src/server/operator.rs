//! What an operator's socket answers (API.md §5): its own directory, its own keys, none of the agents' routes.

mod confine;
mod egress;
mod executions;

use std::sync::Arc;

use hyper::body::Incoming;
use hyper::http::request::Parts;
use hyper::upgrade::OnUpgrade;
use hyper::{Request, StatusCode, header};
use serde_json::json;

use super::listen::Peer;
use super::{Answer, error};
use crate::auth::operator::AuthenticatedOperator;
use crate::gate::{Gate, Readiness};
use crate::ledger::EventDraft;
use crate::pipeline::{Ids, Refusal, Refused};
use crate::time::Timestamp;
use crate::{guards, selftest};

/// Bases that an operator's proof may name.
const BASES: [&str; 2] = ["http://localhost", "http://latchgate-operator"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route<'a> {
    Status,
    ReceiptKeys,
    AuditVerify,
    Profiles,
    Flows,
    Explain(&'a str),
    Selftest,
    Suggest(&'a str),
    Executions,
    Confine,
    Kill(&'a str),
    Metrics,
    Drain,
}

impl<'a> Route<'a> {
    fn of(path: &'a str) -> Option<Self> {
        Some(match path {
            "/v1/admin/status" => Self::Status,
            "/v1/receipt-keys" => Self::ReceiptKeys,
            "/v1/audit/verify" => Self::AuditVerify,
            "/v1/egress/profiles" => Self::Profiles,
            "/v1/egress/flows" => Self::Flows,
            "/v1/egress/selftest" => Self::Selftest,
            "/metrics" => Self::Metrics,
            "/v1/admin/drain" => Self::Drain,
            "/v1/executions" => Self::Executions,
            "/v1/confine" => Self::Confine,
            other => Self::of_an_id(other).or_else(|| Self::of_an_action(other))?,
        })
    }

    /// Those with an id in their path.
    fn of_an_id(path: &'a str) -> Option<Self> {
        let (id, route): (_, fn(&'a str) -> Self) = match path.strip_prefix("/v1/executions/") {
            Some(rest) => (rest.strip_suffix("/kill")?, Self::Kill),
            None => (path.strip_prefix("/v1/egress/explain/")?, Self::Explain),
        };
        egress::is_id(id).then(|| route(id))
    }

    fn of_an_action(path: &'a str) -> Option<Self> {
        path.strip_prefix("/v1/egress/suggest/").filter(|id| !id.is_empty() && !id.contains('/')).map(Self::Suggest)
    }

    const fn allow(self) -> &'static str {
        match self {
            Self::Drain | Self::Kill(_) | Self::Confine => "POST",
            Self::Selftest => "GET, POST",
            _ => "GET",
        }
    }
}

/// What a route may need of the call itself.
struct Call<'a> {
    ids: &'a Ids,
    operator: &'a AuthenticatedOperator,
    peer: Peer,
    parts: &'a Parts,
}

/// Answers one request of an operator. Each one, refused or not, is an event.
pub async fn handle(gate: Arc<Gate>, peer: Peer, request: Request<Incoming>) -> Answer {
    let ids = Ids::mint();
    let (mut parts, incoming) = request.into_parts();
    let upgrade = parts.extensions.remove::<OnUpgrade>();
    let operator = tokio::task::block_in_place(|| authenticate(&gate, &parts));
    let name = operator.as_ref().map(|operator| operator.name().to_owned()).ok();
    let answered = match operator {
        Err(cause) => Err(cause),
        Ok(operator) => {
            let call = Call { ids: &ids, operator: &operator, peer, parts: &parts };
            route(&gate, &call, incoming, upgrade).await
        }
    };
    let event = EventDraft {
        event_type: "operator_call".to_owned(),
        trace_id: ids.trace_id.clone(),
        decision_id: ids.decision_id.clone(),
        action_id: String::new(),
        principal: String::new(),
        session_id: String::new(),
        decision: if answered.is_ok() { "allow" } else { "deny" }.to_owned(),
        details: json!({"operator": name, "method": parts.method.as_str(), "path": parts.uri.path()}),
        at: Timestamp::now(),
    };
    // Only a known operator's calls are kept: whoever can merely reach the socket must not fill the ledger.
    if name.is_some()
        && let Err(error) = gate.ledger.event(event).await
    {
        tracing::error!(%error, "an operator's call is not in the ledger");
        return error::answer(&Refused::new(&ids, Refusal::Evidence { message: error.to_string() }));
    }
    answered.unwrap_or_else(|cause| {
        gate.metrics.refused(&cause);
        error::answer(&Refused::new(&ids, cause))
    })
}

fn authenticate(gate: &Gate, parts: &Parts) -> Result<AuthenticatedOperator, Refusal> {
    let values =
        |name: &str| -> Vec<&[u8]> { parts.headers.get_all(name).iter().map(|value| value.as_bytes()).collect() };
    let (authorization, dpop) = (values(header::AUTHORIZATION.as_str()), values("dpop"));
    let bases: Vec<String> = BASES.iter().map(|base| (*base).to_owned()).collect();
    Ok(gate.operators.authenticate(&crate::auth::Presented {
        authorization: &authorization,
        dpop: &dpop,
        method: parts.method.as_str(),
        path: parts.uri.path(),
        bases: &bases,
        listener: "operator",
        require_body_binding: false,
        now: Timestamp::now(),
    })?)
}

async fn route(
    gate: &Arc<Gate>,
    call: &Call<'_>,
    incoming: Incoming,
    upgrade: Option<OnUpgrade>,
) -> Result<Answer, Refusal> {
    let route = Route::of(call.parts.uri.path()).ok_or(Refusal::NotFound)?;
    if !route.allow().split(", ").any(|allowed| allowed == call.parts.method.as_str()) {
        return Err(Refusal::MethodNotAllowed { allow: route.allow() });
    }
    let body = match route {
        Route::Status => status(gate),
        Route::ReceiptKeys => gate.ledger.keys().jwks(),
        Route::AuditVerify => {
            let gate = Arc::clone(gate);
            let report = tokio::task::spawn_blocking(move || gate.verify_ledger())
                .await
                .map_err(|error| Refusal::Internal { message: error.to_string() })?
                .map_err(|error| Refusal::Store { message: error.to_string() })?;
            serde_json::to_value(report).map_err(|error| Refusal::Internal { message: error.to_string() })?
        }
        Route::Profiles => egress::profiles(gate),
        Route::Flows => egress::flows(gate, call.parts.uri.query().unwrap_or_default()).await?,
        Route::Explain(id) => egress::explain(gate, id).await?,
        Route::Selftest => {
            if call.parts.method.as_str() == "POST" {
                // In a task of its own: an operator who hangs up does not leave it half-way.
                let (gate, by) = (Arc::clone(gate), call.operator.to_owned());
                tokio::spawn(async move { selftest::run(&gate, by.name()).await })
                    .await
                    .map_err(|error| Refusal::Internal { message: error.to_string() })?;
            }
            gate.selftest.view()
        }
        Route::Suggest(action) => egress::suggest(gate, action, call.parts.uri.query().unwrap_or_default()).await?,
        Route::Executions => executions::list(gate),
        Route::Kill(id) => executions::kill(gate, call, id, incoming).await?,
        Route::Confine => return confine::begin(gate, call, incoming, upgrade).await,
        Route::Metrics => return Ok(gate.metrics.exposition()),
        Route::Drain => {
            gate.drain();
            json!({"status": "draining"})
        }
    };
    Ok(super::json(StatusCode::OK, &body))
}

fn status(gate: &Gate) -> serde_json::Value {
    let (status, reason) = match gate.readiness() {
        Readiness::Ready => ("ready", None),
        Readiness::Degraded(reason) => ("degraded", Some(reason)),
        Readiness::NotReady(reason) => ("not_ready", Some(reason)),
    };
    json!({
        "status": status,
        "reason": reason,
        "version": env!("CARGO_PKG_VERSION"),
        "instance": gate.config.instance,
        "workspace": gate.config.workspace,
        "log_id": gate.ledger.log_id(),
        "policy_version": gate.policy.policy_version(),
        "program_hash": gate.enforcer.program_hash(),
        // `pinned` or `multi`: whether a next gate finds this one's attachments, or has cgroups of its own.
        "attach": gate.enforcer.attach_mode().name(),
        "actions": gate.registry.actions().count(),
        "running": gate.running(),
        "selftest": gate.selftest.line(),
        // Of a build for tests, those that are off; nothing in any other.
        "guards": guards::warning(),
        "unsafe_audit": gate.registry.in_audit().collect::<Vec<_>>(),
        // Where no namespace could be had, the start went on with one wall: here it shows.
        "network": if gate.network == crate::sandbox::Network::Shared { "shared" } else { "isolated" },
    })
}
