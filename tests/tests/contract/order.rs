//! The promised order of the checks: requests that are wrong in two ways are refused for the first of them.

use std::cell::RefCell;
use std::collections::HashMap;

use latchgate_tests::agent::Agent;
use latchgate_tests::gate::Gate;
use latchgate_tests::http::{Response, once};
use serde_json::json;

use crate::answers::{Reachable, passed, refused};
use crate::operations::{Operator, drain};

/// Ways of being wrong, in the order in which they are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Flaw {
    Method,
    MediaType,
    Size,
    NoLease,
    Proof,
    Replayed,
    NoAction,
    Digest,
    Scope,
    Json,
    BodyClaim,
    Schema,
    Profile,
    Budget,
    Policy,
}

use Flaw::{
    BodyClaim, Budget, Digest, Json, MediaType, Method, NoAction, NoLease, Policy, Profile, Proof, Replayed, Schema,
    Scope, Size,
};

const LADDER: [(Flaw, &str); 15] = [
    (Method, "405 method_not_allowed"),
    (MediaType, "415 unsupported_media_type"),
    (Size, "413 payload_too_large"),
    (NoLease, "401 missing_auth_header"),
    (Proof, "401 invalid_dpop"),
    (Replayed, "401 replay_detected"),
    (NoAction, "404 action_not_found"),
    (Digest, "403 action_digest_mismatch"),
    (Scope, "403 scope_not_permitted"),
    (Json, "400 invalid_request"),
    (BodyClaim, "401 invalid_dpop"),
    (Schema, "422 schema_violation"),
    (Profile, "403 egress_denied"),
    (Budget, "403 budget_exhausted"),
    (Policy, "403 policy_denied"),
];

struct Caller {
    gate: Gate,
    /// Agents by whether they lack the scope and whether their budget is at zero.
    agents: RefCell<HashMap<(bool, bool), Agent>>,
    url: String,
}

impl Caller {
    fn call(&self, flaws: &[Flaw]) -> Response {
        let has = |flaw: Flaw| flaws.contains(&flaw);
        let mut agents = self.agents.borrow_mut();
        let agent = agents.entry((has(Scope), has(Budget))).or_insert_with(|| {
            let scopes = if has(Scope) { json!([]) } else { json!(["tools:call"]) };
            let budgets = if has(Budget) { json!({"max_calls": 0}) } else { json!({}) };
            Agent::connect_with(&self.gate.agent(), json!({"scopes": scopes, "budgets": budgets}))
        });
        let action = match (has(NoAction), has(Digest), has(Policy)) {
            (true, ..) => "absent",
            (_, true, true) => "pinned-medium",
            (_, true, false) => "pinned-low",
            (_, false, true) => "medium",
            (_, false, false) => "low",
        };
        let path = format!("/v1/actions/{action}/execute");

        let url = if has(Profile) { "http://outside.test/" } else { &self.url };
        let mut params = json!({"url": url});
        if has(Schema) {
            params["more"] = json!(true);
        }
        let mut body = params.to_string().into_bytes();
        if has(Json) {
            body.pop();
        }
        if has(Size) {
            body.resize(65_537, b' ');
        }

        let mut claims = agent.claims("POST", &path);
        if has(Replayed) {
            let spending = agent.claims("GET", "/v1/receipts/none");
            claims["jti"] = spending["jti"].clone();
            let (authorization, spent) =
                (agent.authorization(), agent.key.jwt(&agent.header().to_string(), &spending.to_string()));
            let headers = [("authorization", authorization.as_str()), ("dpop", spent.as_str())];
            let code = once(&agent.target, "GET", "/v1/receipts/none", &headers, None).code();
            assert!(["404 not_found", "503 draining"].contains(&code.as_str()), "{code}");
        }
        if has(Proof) {
            claims["htm"] = json!("DELETE");
        }
        if has(BodyClaim) {
            claims["request_hash"] = json!(format!("sha256:{}", "0".repeat(64)));
        }
        let proof = agent.key.jwt(&agent.header().to_string(), &claims.to_string());
        let authorization = agent.authorization();
        let mut headers = vec![("dpop", proof.as_str())];
        if !has(NoLease) {
            headers.push(("authorization", &authorization));
        }
        headers.push(("content-type", if has(MediaType) { "text/plain" } else { "application/json" }));
        once(&agent.target, if has(Method) { "PUT" } else { "POST" }, &path, &headers, Some(&body))
    }
}

#[test]
fn what_is_wrong_in_two_ways_is_refused_for_the_first() {
    let reachable = Reachable::start();
    let operator = Operator::new();
    let manifest = |id: &str, risk: &str| {
        format!(
            "action_id: {id}\nversion: \"1.0.0\"\nprovider_module_digest: builtin:http_api\n\
             template: {{method: GET, url_template: \"{{{{url}}}}\"}}\n\
             io:\n  request_schema: {{type: object, properties: {{url: {{type: string}}}}, required: [url], additionalProperties: false}}\n  \
             max_request_bytes: 65536\n  max_response_bytes: 65536\n\
             resource_limits: {{memory_mb: 128, timeout_seconds: 20}}\negress: {}\nrisk_level: {risk}\nverifier_kind: http_status\n",
            reachable.egress
        )
    };
    let zeros = "0".repeat(64);
    let gate = latchgate_tests::gate::Setup::new("order")
        .manifest("low", &manifest("low", "low"))
        .manifest("medium", &manifest("medium", "medium"))
        .manifest("pinned-low", &manifest("pinned-low", "low"))
        .manifest("pinned-medium", &manifest("pinned-medium", "medium"))
        .config(&reachable.config)
        .config(&format!(
            "[definitions.pins]\npinned-low = \"sha256:{zeros}\"\npinned-medium = \"sha256:{zeros}\"\n\
             [limits]\nmax_request_bytes = 65536\n"
        ))
        .config(&operator.config())
        .start();
    let caller = Caller { gate, agents: RefCell::default(), url: reachable.url.clone() };
    passed(&caller.call(&[]));
    for (index, (first, code)) in LADDER.iter().enumerate() {
        refused(&caller.call(&[*first]), code);
        for (second, _) in &LADDER[index + 1..] {
            let response = caller.call(&[*first, *second]);
            assert_eq!(response.code(), *code, "{first:?} and {second:?}");
        }
    }
    passed(&caller.call(&[]));

    // Drain comes before everything, the route included.
    drain(&caller.gate, &operator);
    for (flaw, _) in LADDER {
        refused(&caller.call(&[flaw]), "503 draining");
    }
    refused(&once(&caller.gate.agent(), "GET", "/nowhere", &[], None), "503 draining");
}
