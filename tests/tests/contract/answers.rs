//! What every suite here asks of an answer, and the gate that most of them start.

use std::net::IpAddr;

use latchgate_tests::gate::{Gate, Setup};
use latchgate_tests::http::{Response, Target};
use latchgate_tests::origin::Origin;
use serde_json::Value;

/// A profile that reaches nothing.
pub const NONE: &str = "{profile: none}";

/// A manifest of a command that answers with its own params, with these lines added or changed.
pub fn echo(id: &str, risk: &str, more: &str) -> String {
    format!(
        "action_id: {id}\nversion: \"1.2.3\"\nprovider_module_digest: builtin:command\ncommand: {{argv: [/bin/cat]}}\n\
         io:\n  request_schema: {{type: object, properties: {{text: {{type: string}}}}, additionalProperties: false}}\n  \
         max_request_bytes: 4096\n  max_response_bytes: 65536\n\
         resource_limits: {{memory_mb: 128, timeout_seconds: 20}}\negress: {NONE}\nrisk_level: {risk}\n\
         verifier_kind: none\n{more}\n"
    )
}

/// A gate with the low-risk action `echo`.
pub fn with_echo(name: &str) -> Setup {
    Setup::new(name).manifest("echo", &echo("echo", "low", ""))
}

/// An origin on loopback, the line of a profile that names it, and the configuration that lets the proxy dial it.
pub struct Reachable {
    pub origin: Origin,
    pub url: String,
    pub egress: String,
    pub config: String,
}

impl Reachable {
    pub fn start() -> Self {
        let origin = Origin::clear(IpAddr::from([127, 0, 0, 1]), "hello");
        let port = origin.address.port();
        Self {
            url: format!("http://origin.test:{port}/path"),
            egress: format!(
                "{{profile: proxy_allowlist, allowed_domains: [{{domain: origin.test, ports: [{port}]}}]}}"
            ),
            config:
                "[egress]\nallow_addresses = [\"127.0.0.1/32\"]\n\n[egress.hosts]\n\"origin.test\" = [\"127.0.0.1\"]\n"
                    .to_owned(),
            origin,
        }
    }
}

/// The address that a TCP listener was given, from the line that the gate logs.
pub fn tcp(gate: &Gate, listener: &str) -> Target {
    let log = gate.log_text();
    let line = log.lines().find(|line| line.contains(&format!("listener=\"{listener}\""))).expect("a TCP listener");
    Target::Tcp(logged_address(line))
}

/// The `at=` of a line of the log.
pub fn logged_address(line: &str) -> std::net::SocketAddr {
    let after = line.split_once("at=").expect("an address").1;
    after.split_whitespace().next().unwrap().parse().unwrap()
}

/// API.md §1.8: a UUIDv7 in lower case.
pub fn assert_minted(id: &Value) {
    let text = id.as_str().unwrap_or_else(|| panic!("no id: {id}"));
    let parsed = uuid::Uuid::parse_str(text).unwrap();
    assert_eq!((parsed.get_version_num(), parsed.to_string().as_str()), (7, text));
}

/// Status and code, a JSON object, and one decision id in body and header. Returns the body.
#[track_caller]
pub fn refused(response: &Response, expected: &str) -> Value {
    assert_eq!(response.header("content-type"), Some("application/json"), "{expected}: {response:?}");
    assert_eq!(response.code(), expected, "{}", String::from_utf8_lossy(&response.body));
    let body = response.json();
    assert!(body.is_object());
    assert_minted(&body["decision_id"]);
    assert_eq!(response.header("latchgate-decision-id"), body["decision_id"].as_str(), "{expected}");
    body
}

/// The same, and these fields are there as non-empty text.
#[track_caller]
pub fn refused_with(response: &Response, expected: &str, fields: &[&str]) -> Value {
    let body = refused(response, expected);
    for field in fields {
        assert!(body[*field].as_str().is_some_and(|text| !text.is_empty()), "{expected}: no {field} in {body}");
    }
    body
}

/// A 200 with a JSON object.
#[track_caller]
pub fn passed(response: &Response) -> Value {
    assert_eq!(response.status, 200, "{}", String::from_utf8_lossy(&response.body));
    assert_eq!(response.header("content-type"), Some("application/json"));
    let body = response.json();
    assert!(body.is_object());
    body
}
