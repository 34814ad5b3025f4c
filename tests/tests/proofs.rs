//! Every way that a lease or a proof can be wrong (RFC 9449 §4.3 and more), sent to a real gate, each beside the proper
//! one that passes; and replays, across the death of the gate too.

#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used)]

#[path = "proofs/leases.rs"]
mod leases;
#[path = "proofs/replay.rs"]
mod replay;
#[path = "proofs/rules.rs"]
mod rules;

use latchgate_tests::agent::Agent;
use latchgate_tests::gate::{Gate, Setup};
use latchgate_tests::http::{Response, Target, once};
use serde_json::Value;

/// A gate with an action that answers with its params, on a Unix and a TCP listener.
fn gate(name: &str) -> Setup {
    Setup::new(name)
        .command("echo", "exec cat", "{profile: none}")
        .config("[[listeners]]\nname = \"tcp\"\naddress = \"127.0.0.1:0\"\n[identity.tcp]\nprincipal = \"tester\"\n")
}

fn tcp(gate: &Gate) -> Target {
    let log = gate.log_text();
    let line = log.lines().find(|line| line.contains("listener=\"tcp\"")).expect("the TCP listener");
    Target::Tcp(line.split_once("at=").unwrap().1.split_whitespace().next().unwrap().parse().unwrap())
}

/// A request without a body, with these headers and no others.
fn get(agent: &Agent, path: &str, headers: &[(String, String)]) -> Response {
    let headers: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    once(&agent.target, "GET", path, &headers, None)
}

/// The headers of an agent's request with this proof.
fn with(agent: &Agent, proof: impl Into<String>) -> Vec<(String, String)> {
    vec![("authorization".to_owned(), agent.authorization()), ("dpop".to_owned(), proof.into())]
}

/// A proof with the agent's own header and these claims.
fn proof_of(agent: &Agent, claims: &Value) -> String {
    agent.key.jwt(&agent.header().to_string(), &claims.to_string())
}

/// A receipt that the agent may read, so that there is something to ask for that answers 200.
fn readable(agent: &Agent) -> String {
    let executed = agent.execute("echo", &serde_json::json!({}));
    assert_eq!(executed.status, 200, "{}", String::from_utf8_lossy(&executed.body));
    format!("/v1/receipts/{}", executed.json()["receipt_id"].as_str().unwrap())
}

/// Refused with this code, for a reason that has these words, and with one decision id.
#[track_caller]
fn refused(what: &str, response: &Response, code: &str, reason: &str) {
    assert_eq!(response.code(), code, "{what}: {}", String::from_utf8_lossy(&response.body));
    let body = response.json();
    let said = body["deny_reason"].as_str().unwrap_or_default();
    assert!(said.contains(reason), "{what}: `{reason}` is not what it was refused for: {said}");
    assert!(body["decision_id"].is_string(), "{what}");
    assert_eq!(response.header("latchgate-decision-id"), body["decision_id"].as_str(), "{what}");
}
