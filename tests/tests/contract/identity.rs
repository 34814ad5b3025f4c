//! Who a caller is: the listener's principal, narrowed by the peer.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use latchgate_tests::agent::{Agent, Key, lease};
use latchgate_tests::gate::Gate;
use latchgate_tests::http::{Response, Target, once};
use latchgate_tests::skip;
use serde_json::{Value, json};

use crate::answers::{echo, passed, refused, tcp, with_echo};
use crate::leases::decoded;

const MAPPED: u32 = 54_322;
const UNMAPPED: u32 = 54_323;

/// Sends what is on its standard input to the socket, and prints what comes back.
const RELAY: &str = "import socket,sys\n\
    s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.sendall(sys.stdin.buffer.read())\n\
    while True:\n    b=s.recv(65536)\n    if not b: break\n    sys.stdout.buffer.write(b)\n";

/// One request as `uid`.
fn as_uid(uid: u32, socket: &std::path::Path, path: &str, headers: &[(&str, &str)], body: &Value) -> Response {
    let body = body.to_string();
    let mut head =
        format!("POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n", body.len());
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    let mut relay = Command::new("python3")
        .args(["-c", RELAY])
        .arg(socket)
        .uid(uid)
        .gid(uid)
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    relay.stdin.take().unwrap().write_all(format!("{head}\r\n{body}").as_bytes()).unwrap();
    let output = relay.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
    let mut lines = head.lines();
    Response {
        status: lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap(),
        headers: lines
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect(),
        body: body.as_bytes().to_vec(),
    }
}

fn with_table() -> Gate {
    let setup = with_echo("peers");
    let narrow = setup.directory.join("narrow");
    fs::create_dir(&narrow).unwrap();
    fs::set_permissions(&narrow, fs::Permissions::from_mode(0o755)).unwrap();
    setup
        .config(&format!(
            "[[listeners]]\nname = \"narrow\"\npath = \"{{dir}}/narrow/gate.sock\"\nprincipal = \"everyone\"\nmode = \"0666\"\n\
             peers = {{ \"0\" = \"root-agent\", \"{MAPPED}\" = \"mapped-agent\" }}"
        ))
        .start()
}

#[test]
fn a_peer_that_is_not_in_the_table_is_forbidden() {
    if Command::new("python3").arg("--version").output().is_err() {
        return skip("python3 is not here, and something has to connect as another user");
    }
    let gate = with_table();
    let socket = gate.directory().join("narrow/gate.sock");
    let json_header = ("content-type", "application/json");
    let key = Key::generate();
    let request = json!({"scopes": ["tools:call"], "dpop_jwk": key.jwk()});

    refused(&as_uid(UNMAPPED, &socket, "/v1/leases", &[json_header], &request), "403 identity_forbidden");
    let granted = passed(&as_uid(MAPPED, &socket, "/v1/leases", &[json_header], &request));
    assert_eq!(decoded(granted["lease_jwt"].as_str().unwrap(), 1)["sub"], "mapped-agent");
    let own = Agent::connect(&Target::Unix(socket.clone()));
    assert_eq!(decoded(&own.lease, 1)["sub"], "root-agent");
    passed(&own.execute("echo", &json!({})));

    // Another user's lease and key are of no use: the peer is asked on every request.
    let text = |name: &str| granted[name].as_str().unwrap().to_owned();
    let stolen = Agent {
        target: own.target.clone(),
        base: own.base.clone(),
        key,
        lease: text("lease_jwt"),
        session_id: text("session_id"),
        lease_jti: text("lease_jti"),
        granted: granted.clone(),
    };
    refused(&stolen.execute("echo", &json!({})), "403 identity_forbidden");
    let path = "/v1/actions/echo/execute";
    for (uid, expected) in [(MAPPED, None), (UNMAPPED, Some("403 identity_forbidden"))] {
        let (authorization, proof) = (stolen.authorization(), stolen.proof("POST", path));
        let headers = [("authorization", authorization.as_str()), ("dpop", proof.as_str()), json_header];
        let response = as_uid(uid, &socket, path, &headers, &json!({}));
        match expected {
            None => drop(passed(&response)),
            Some(expected) => drop(refused(&response, expected)),
        }
    }
}

#[test]
fn tcp_without_an_identity_issues_no_leases() {
    let gate = with_echo("nobody").config("[[listeners]]\nname = \"tcp\"\naddress = \"127.0.0.1:0\"").start();
    let target = tcp(&gate, "tcp");
    let request = json!({"scopes": ["tools:call"], "dpop_jwk": Key::generate().jwk()});
    refused(&lease(&target, &request), "401 identity_unauthenticated");
    passed(&lease(&gate.agent(), &request));
    for path in ["/v1/actions", "/healthz", "/readyz", "/.well-known/jwks.json"] {
        passed(&once(&target, "GET", path, &[], None));
    }
}

#[test]
fn the_receipt_of_another_principal_is_as_absent_as_none() {
    let gate = with_echo("others")
        .manifest("medium", &echo("medium", "medium", ""))
        .config("[[listeners]]\nname = \"second\"\npath = \"{dir}/second/gate.sock\"\nprincipal = \"other\"")
        .start();
    let other = Target::Unix(gate.directory().join("second/gate.sock"));
    let (mine, again, theirs) = (Agent::connect(&gate.agent()), Agent::connect(&gate.agent()), Agent::connect(&other));
    let id = |agent: &Agent| passed(&agent.execute("echo", &json!({})))["receipt_id"].as_str().unwrap().to_owned();
    let (my_receipt, their_receipt) = (id(&mine), id(&theirs));
    // Whoever holds a lease of the principal may read, whichever lease it was.
    assert_eq!(passed(&mine.receipt(&my_receipt))["principal"], "tester");
    assert_eq!(passed(&again.receipt(&my_receipt))["receipt_id"], my_receipt);
    assert_eq!(passed(&theirs.receipt(&their_receipt))["principal"], "other");
    let mut absent = refused(&theirs.receipt("0198f3a0-0000-7000-8000-000000000000"), "404 not_found");
    for (agent, receipt) in [(&theirs, &my_receipt), (&mine, &their_receipt)] {
        let mut body = refused(&agent.receipt(receipt), "404 not_found");
        for field in ["decision_id", "trace_id"] {
            body[field] = json!(null);
            absent[field] = json!(null);
        }
        assert_eq!(body, absent, "the two answers tell the receipts apart");
    }
}
