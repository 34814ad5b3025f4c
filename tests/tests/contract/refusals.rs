//! Rows of the table of statuses and codes, over both transports, each beside a call that passes.

use std::fs;
use std::net::IpAddr;

use latchgate_tests::agent::{Agent, lease};
use latchgate_tests::gate::Setup;
use latchgate_tests::http::{Connection, once};
use latchgate_tests::origin::Origin;
use serde_json::json;

use crate::answers::{NONE, Reachable, echo, passed, refused, refused_with, tcp, with_echo};

const JSON: (&str, &str) = ("content-type", "application/json");

#[test]
fn each_row_over_both_transports() {
    let reachable = Reachable::start();
    // Nothing may ever arrive here: the name is in the profile, the address is not one that the proxy may dial.
    let inner = Origin::clear(IpAddr::from([127, 0, 0, 2]), "never");
    let inner_port = inner.address.port();
    let gate = with_echo("rows")
        .manifest("medium", &echo("medium", "medium", ""))
        .manifest("high", &echo("high", "high", ""))
        .manifest("scoped", &echo("scoped", "low", "required_scopes: [files:read]"))
        .manifest("pinned", &echo("pinned", "low", ""))
        .command("failing", "echo no >&2; exit 3", NONE)
        .command("talking", "echo this is not JSON", NONE)
        .fetch("fetch", &reachable.egress)
        .fetch(
            "inner",
            &format!(
                "{{profile: proxy_allowlist, allowed_domains: [{{domain: inner.test, ports: [{inner_port}]}}]}}"
            ),
        )
        .config(&reachable.config)
        .config("\"inner.test\" = [\"127.0.0.2\"]\n[definitions.pins]\npinned = \"sha256:0000000000000000000000000000000000000000000000000000000000000000\"")
        .config("[[listeners]]\nname = \"tcp\"\naddress = \"127.0.0.1:0\"\n[identity.tcp]\nprincipal = \"over-tcp\"\n")
        .start();
    for (target, principal) in [(gate.agent(), "tester"), (tcp(&gate, "tcp"), "over-tcp")] {
        let agent = Agent::connect(&target);
        let authorization = agent.authorization();
        let proper = || passed(&agent.execute("echo", &json!({"text": "x"})));
        proper();

        // 400
        let body = refused_with(&agent.execute_raw("echo", b"{\"text\":"), "400 invalid_request", &["message"]);
        assert!(body["trace_id"].is_string());
        refused_with(&agent.execute_raw("echo", b"[]"), "400 invalid_request", &["message"]);
        refused_with(&agent.execute_raw("echo", b"\"text\""), "400 invalid_request", &["message"]);
        refused_with(&lease(&target, &json!({"scopes": ["tools:call"]})), "400 invalid_request", &["message"]);

        // 401
        let path = "/v1/actions/echo/execute";
        let without = once(&target, "POST", path, &[("dpop", &agent.proof("POST", path)), JSON], Some(b"{}"));
        refused(&without, "401 missing_auth_header");
        assert_eq!(without.header("www-authenticate"), Some("DPoP algs=\"ES256\""));
        let proof = agent.proof("POST", path);
        let headers = [("authorization", "DPoP nonsense"), ("dpop", proof.as_str()), JSON];
        refused(&once(&target, "POST", path, &headers, Some(b"{}")), "401 invalid_lease");
        let headers = [("authorization", authorization.as_str()), JSON];
        refused_with(&once(&target, "POST", path, &headers, Some(b"{}")), "401 invalid_dpop", &["deny_reason"]);
        let proof = agent.proof("POST", path);
        passed(&agent.execute_with(path, &proof, b"{}"));
        refused(&agent.execute_with(path, &proof, b"{}"), "401 replay_detected");

        // 403
        let policy = ["deny_reason", "principal", "action_id", "remediation"];
        for action in ["medium", "high"] {
            let body = refused_with(&agent.execute(action, &json!({})), "403 policy_denied", &policy);
            assert_eq!((body["principal"].as_str(), body["action_id"].as_str()), (Some(principal), Some(action)));
        }
        let outside = agent.execute("fetch", &json!({"url": "http://outside.test/"}));
        let body = refused_with(&outside, "403 egress_denied", &["deny_reason"]);
        assert!(body["receipt_id"].is_null(), "refused before anything ran: {body}");
        let output = passed(&agent.execute("fetch", &json!({"url": reachable.url})))["output"].clone();
        assert_eq!(output["data"]["body"], "hello");
        assert_eq!(output["data"]["status_code"], 200);
        assert_eq!(output["ok"], true);
        assert_eq!(output["data"]["url"], reachable.url);
        assert!(output["data"]["headers"].is_object());
        let rebound = agent.execute("inner", &json!({"url": format!("http://inner.test:{inner_port}/")}));
        let body = refused_with(&rebound, "403 egress_denied", &["deny_reason", "receipt_id"]);
        let receipt = passed(&agent.receipt(body["receipt_id"].as_str().unwrap()));
        assert_eq!(receipt["normalized_result"]["kind"], "provider_failure");
        assert_eq!(receipt["decision_id"], body["decision_id"]);
        refused(&agent.execute("pinned", &json!({})), "403 action_digest_mismatch");
        refused_with(&agent.execute("scoped", &json!({})), "403 scope_not_permitted", &["deny_reason"]);
        let unscoped = Agent::connect_with(&target, json!({"scopes": []}));
        refused_with(&unscoped.execute("echo", &json!({})), "403 scope_not_permitted", &["deny_reason"]);
        let spent = Agent::connect_with(&target, json!({"scopes": ["tools:call"], "budgets": {"max_calls": 0}}));
        refused(&spent.execute("echo", &json!({})), "403 budget_exhausted");

        // 404
        refused(&agent.execute("absent", &json!({})), "404 action_not_found");
        refused(&once(&target, "GET", "/v1/actions/absent", &[], None), "404 action_not_found");
        refused(&once(&target, "GET", "/v1/actions/absent/schema/request", &[], None), "404 action_not_found");
        refused(&agent.receipt("0198f3a0-0000-7000-8000-000000000000"), "404 not_found");
        refused(&agent.get("/v1/approvals/0198f3a0-0000-7000-8000-000000000000/poll"), "404 not_found");
        for path in ["/", "/v1", "/v2/leases", "/v1/leases/", "/metrics", "/v1/admin/status", "/v1/actions/%2e/execute"]
        {
            refused(&once(&target, "GET", path, &[], None), "404 not_found");
        }

        // 405
        for (method, path, allow) in [
            ("GET", "/v1/leases", "POST"),
            ("GET", "/v1/actions/echo/execute", "POST"),
            ("POST", "/v1/actions", "GET"),
            ("DELETE", "/v1/actions/echo", "GET"),
            ("PUT", "/v1/receipts/x", "GET"),
            ("POST", "/healthz", "GET"),
            ("OPTIONS", "/readyz", "GET"),
            ("PATCH", "/.well-known/jwks.json", "GET"),
        ] {
            let response = once(&target, method, path, &[], None);
            refused(&response, "405 method_not_allowed");
            assert_eq!(response.header("allow"), Some(allow), "{method} {path}");
        }

        // 413: by its length before a byte of it is read, and by what arrives where no length is given.
        let large = vec![b' '; 4097];
        refused(&agent.execute_raw("echo", &large), "413 payload_too_large");
        let mut fits = b"{}".to_vec();
        fits.resize(4096, b' ');
        passed(&agent.execute_raw("echo", &fits));
        let mut connection = Connection::open(&target).unwrap();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: {authorization}\r\ndpop: {}\r\ncontent-type: application/json\r\n\
             transfer-encoding: chunked\r\n\r\n",
            agent.proof("POST", path)
        );
        connection.send(head.as_bytes()).unwrap();
        connection.send(format!("{:x}\r\n{}\r\n0\r\n\r\n", large.len(), " ".repeat(large.len())).as_bytes()).unwrap();
        refused(&connection.response().unwrap(), "413 payload_too_large");

        // 415
        for kind in [
            None,
            Some("text/plain"),
            Some("application/json; charset=utf-16"),
            Some("application/x-www-form-urlencoded"),
        ] {
            let proof = agent.proof("POST", path);
            let mut headers = vec![("authorization", authorization.as_str()), ("dpop", proof.as_str())];
            headers.extend(kind.map(|kind| ("content-type", kind)));
            refused(&once(&target, "POST", path, &headers, Some(b"{}")), "415 unsupported_media_type");
            let leases = kind.map(|kind| ("content-type", kind));
            let response = once(&target, "POST", "/v1/leases", leases.as_slice(), Some(b"{}"));
            refused(&response, "415 unsupported_media_type");
        }
        // An empty body is `{}`, and needs no media type.
        let proof = agent.proof("POST", path);
        let headers = [("authorization", authorization.as_str()), ("dpop", proof.as_str())];
        passed(&once(&target, "POST", path, &headers, None));

        // 422: the pointer and what is wrong.
        let body = refused_with(&agent.execute("echo", &json!({"text": 5})), "422 schema_violation", &["reason"]);
        assert!(body["reason"].as_str().unwrap().starts_with("/text"), "{body}");
        refused_with(&agent.execute("echo", &json!({"other": "x"})), "422 schema_violation", &["reason"]);
        for ambiguous in [
            &br#"{"text":"a","text":"b"}"#[..],
            br#"{"text":"\ud800"}"#,
            b"{\"text\":\"\xff\"}",
            br#"{"number":9007199254740993}"#,
            br#"{"number":1e999}"#,
        ] {
            refused_with(&agent.execute_raw("echo", ambiguous), "422 schema_violation", &["reason"]);
        }

        // 502: what ran and failed has a receipt too.
        for (action, exit_code) in [("failing", 3), ("talking", 0)] {
            let response = agent.execute(action, &json!({}));
            let body = refused_with(&response, "502 action_execution_failed", &["reason", "receipt_id"]);
            let receipt = passed(&agent.receipt(body["receipt_id"].as_str().unwrap()));
            assert_eq!(receipt["normalized_result"]["kind"], "provider_failure", "{action}");
            assert_eq!(receipt["verification_outcome"]["status"], "provider_failed_before_verification");
            assert_eq!(receipt["provider_receipt"]["exit_code"], exit_code);
            assert_eq!(receipt["signature_status"], "valid");
            assert!(receipt["failure_class"].is_string());
        }
        proper();
    }
    assert!(inner.requests().is_empty(), "the proxy dialled an address that it may not: {:?}", inner.requests());
    assert_eq!(reachable.origin.requests().len(), 2);
    assert_eq!(gate.verify().0, 0);
}

#[test]
fn an_origin_that_is_not_there_is_a_failed_action() {
    let mut reachable = Reachable::start();
    let closed = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    reachable.egress = reachable.egress.replace("ports: [", &format!("ports: [{closed}, "));
    let gate = Setup::new("gone").fetch("fetch", &reachable.egress).config(&reachable.config).start();
    let agent = Agent::connect(&gate.agent());
    let absent = agent.execute("fetch", &json!({"url": format!("http://origin.test:{closed}/")}));
    let body = refused_with(&absent, "502 action_execution_failed", &["reason", "receipt_id"]);
    assert!(!body["reason"].as_str().unwrap().contains("127.0.0.1"), "an agent learns no address: {body}");
    passed(&agent.execute("fetch", &json!({"url": reachable.url})));
}

#[test]
fn a_body_that_does_not_arrive_in_time() {
    let gate = with_echo("slow").config("[limits]\nbody_timeout_seconds = 1").start();
    let agent = Agent::connect(&gate.agent());
    let path = "/v1/actions/echo/execute";
    let head = |proof: &str| {
        format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: {}\r\ndpop: {proof}\r\ncontent-type: application/json\r\n\
             content-length: 2\r\n\r\n{{",
            agent.authorization()
        )
    };
    let mut connection = Connection::open(&gate.agent()).unwrap();
    connection.send(head(&agent.proof("POST", path)).as_bytes()).unwrap();
    refused_with(&connection.response().unwrap(), "400 bad_request", &["message"]);
    let mut connection = Connection::open(&gate.agent()).unwrap();
    connection.send(head(&agent.proof("POST", path)).as_bytes()).unwrap();
    connection.send(b"}").unwrap();
    passed(&connection.response().unwrap());
}

/// A policy of the test's own: what it answers depends on the action.
#[test]
fn a_policy_engine_that_fails_is_no_permission() {
    let setup = Setup::new("policy");
    let policy = setup.directory.join("policy");
    fs::create_dir(&policy).unwrap();
    fs::write(
        policy.join("latchgate.rego"),
        r#"package latchgate
import rego.v1

decision := {"allow": true} if input.action_id == "echo"
decision := "yes" if input.action_id == "shapeless"
decision := {"allow": "true"} if input.action_id == "stringy"
decision := {"allow": true} if {
	input.action_id == "endless"
	count([1 | numbers.range(1, 3000)[_]; numbers.range(1, 3000)[_]; numbers.range(1, 3000)[_]]) > 0
}
"#,
    )
    .unwrap();
    let gate = setup
        .config("[definitions]\nmanifests = \"{dir}/manifests\"\npolicy = \"{dir}/policy\"\n")
        .manifest("echo", &echo("echo", "critical", ""))
        .manifest("shapeless", &echo("shapeless", "low", ""))
        .manifest("stringy", &echo("stringy", "low", ""))
        .manifest("endless", &echo("endless", "low", ""))
        .manifest("silent", &echo("silent", "low", ""))
        .start();
    let agent = Agent::connect(&gate.agent());
    for (action, expected) in [
        ("shapeless", "503 policy_engine_unavailable"),
        ("stringy", "503 policy_engine_unavailable"),
        ("silent", "403 policy_denied"),
        ("endless", "503 policy_engine_timeout"),
    ] {
        refused(&agent.execute(action, &json!({})), expected);
        passed(&agent.execute("echo", &json!({})));
    }
}
