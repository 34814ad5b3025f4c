//! What is no request at all is refused in the same form as what is one.

use std::io::Write as _;

use latchgate_tests::agent::{Key, lease};
use latchgate_tests::gate::Setup;
use latchgate_tests::http::{Connection, Target};
use serde_json::json;

#[test]
fn what_cannot_be_parsed_has_a_json_body_and_a_decision_id() {
    let gate = Setup::new("malformed").start();
    let target = gate.agent();
    let many_headers: String = (0..200).map(|number| format!("x-{number}: 1\r\n")).collect();
    for (name, bytes, status) in [
        ("no request line", "hello\r\n\r\n".to_owned(), 400),
        ("another version", "GET /healthz HTTP/3.7\r\n\r\n".to_owned(), 400),
        (
            "two lengths",
            "POST /v1/leases HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n{}".to_owned(),
            400,
        ),
        ("a long target", format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", "a".repeat(70_000)), 414),
        ("many headers", format!("GET /healthz HTTP/1.1\r\nhost: x\r\n{many_headers}\r\n"), 431),
    ] {
        let mut connection = Connection::open(&target).unwrap();
        connection.send(bytes.as_bytes()).unwrap();
        let answer = connection.response().unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(answer.status, status, "{name}");
        let body = answer.json();
        assert!(body["error"].is_string(), "{name}: {body}");
        assert_eq!(answer.header("latchgate-decision-id"), body["decision_id"].as_str(), "{name}");
    }
    // The same connection, after a request that is good.
    let mut connection = Connection::open(&target).unwrap();
    assert_eq!(connection.request("GET", "/healthz", &[], None).unwrap().status, 200);
    connection.send(b"nonsense\r\n\r\n").unwrap();
    assert_eq!(connection.response().unwrap().code(), "400 bad_request");
}

#[test]
fn an_ambiguous_lease_request_is_a_schema_violation() {
    let gate = Setup::new("ambiguous").start();
    let key = Key::generate();
    assert_eq!(lease(&gate.agent(), &json!({"scopes": ["tools:call"], "dpop_jwk": key.jwk()})).status, 200);
    let twice = format!(r#"{{"scopes": ["tools:call"], "scopes": ["tools:call"], "dpop_jwk": {}}}"#, key.jwk());
    let mut connection = Connection::open(&gate.agent()).unwrap();
    let headers = [("content-type", "application/json")];
    let answer = connection.request("POST", "/v1/leases", &headers, Some(twice.as_bytes())).unwrap();
    assert_eq!(answer.code(), "422 schema_violation");
    assert!(answer.json()["reason"].as_str().unwrap().contains("/scopes"), "{}", answer.json());
}

/// A client that sends its head and never ends it does not hold a place for ever.
#[test]
fn a_head_that_never_ends_is_given_up() {
    let gate = Setup::new("slow-head").config("[limits]\nheader_timeout_seconds = 1\n").start();
    let Target::Unix(path) = gate.agent() else { panic!("a Unix listener") };
    let mut stream = std::os::unix::net::UnixStream::connect(path).unwrap();
    stream.write_all(b"GET /healthz HTTP/1.1\r\n").unwrap();
    stream.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
    let mut rest = Vec::new();
    std::io::Read::read_to_end(&mut stream, &mut rest).unwrap();
}
