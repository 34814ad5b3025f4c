//! What runs is listed, and an operator can end it: its processes and connections at once, and the record says who did.
//!
//! Needs root, a v2 hierarchy and `/usr/bin/python3`.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used)]

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use latchgate::ledger::archive;
use latchgate_tests::agent::Agent;
use latchgate_tests::gate::{Gate, Setup};
use latchgate_tests::http::once;
use latchgate_tests::inside::{
    inside, leaves, missing, processes, python, receipt, refused, try_execute, uid_of, verified, wait, with_code,
};
use latchgate_tests::operator::{heard, lines, operate, with_operator};
use latchgate_tests::skip;
use serde_json::{Value, json};

const NONE: &str = "{profile: none}";
const PATIENCE: Duration = Duration::from_secs(20);

/// Whether a real gate can run here; says so if not.
fn cannot() -> bool {
    if !rustix::process::geteuid().is_root() {
        skip("a real gate needs root");
        return true;
    }
    missing(&["/usr/bin/python3"])
}

fn list(gate: &Gate) -> Vec<Value> {
    lines(gate, &["executions", "list"])
}

/// Waits until so many run.
fn running(gate: &Gate, phase: &str, count: usize) -> Vec<Value> {
    wait(&format!("{count} {phase}"), PATIENCE, || {
        let mut all = list(gate);
        all.retain(|one| one["phase"] == phase);
        (all.len() == count).then_some(all)
    })
}

/// An origin that takes a connection, sends a byte, and says when it has ended.
fn holding(address: &str) -> (u16, mpsc::Receiver<&'static str>) {
    let listener = TcpListener::bind(address).unwrap();
    let port = listener.local_addr().unwrap().port();
    let (say, said) = mpsc::channel();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"x").unwrap();
        say.send("open").unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut rest = Vec::new();
        let timed_out =
            stream.read_to_end(&mut rest).is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock);
        let _ = say.send(if timed_out { "still open" } else { "ended" });
    });
    (port, said)
}

/// Has a connection and a child, and waits.
const HOLD: &str = r#"
import os, signal, socket, time
for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(one, signal.SIG_IGN)
if p.get("port"):
    s = socket.create_connection(("origin.test", p["port"]))
    assert s.recv(1) == b"x"
if os.fork() == 0:
    os.setsid()
    time.sleep(60)
time.sleep(60)
print("{}")
"#;

#[test]
fn a_killed_execution_ends_at_once_and_the_receipt_says_who_ended_it() {
    if cannot() {
        return;
    }
    for (network, address) in [("isolated", "127.78.1.1"), ("shared", "127.78.1.2")] {
        let (port, connection) = holding(&format!("{address}:0"));
        let reach = format!(
            "{{profile: proxy_allowlist, allowed_domains: [{{domain: origin.test, ports: [{port}], exact: true, protocol: tcp}}]}}"
        );
        let setup = Setup::new("kill")
            .config(&format!("[sandbox]\nnetwork = \"{network}\"\n"))
            .config(&format!(
                "[egress]\nallow_addresses = [\"{address}/32\"]\n[egress.hosts]\n\"origin.test\" = [\"{address}\"]\n"
            ))
            .command("holds", &python(), &reach)
            .command("other", "cat >/dev/null; sleep 2; echo '{}'", NONE);
        let mut gate = with_operator(setup).start();
        heard(&gate);
        let agent = Agent::connect(&gate.agent());
        std::thread::scope(|scope| {
            let call = scope.spawn(|| try_execute(&agent, "holds", &with_code(HOLD, &json!({"port": port}))).unwrap());
            assert_eq!(connection.recv_timeout(PATIENCE), Ok("open"), "{network}");
            let one = running(&gate, "running", 1).remove(0);
            for (key, value) in [
                ("action_id", "holds"),
                ("principal", "tester"),
                ("listener", "agent"),
                ("lease_jti", &agent.lease_jti),
                ("session_id", &agent.session_id),
            ] {
                assert_eq!(one[key], value, "{one}");
            }
            let id = one["id"].as_str().unwrap();
            let leaf = leaves(&gate).remove(0);
            let held = wait("its processes", PATIENCE, || Some(processes(&leaf)).filter(|found| found.len() >= 3));
            let other = scope.spawn(|| try_execute(&agent, "other", &json!({})).unwrap());
            running(&gate, "running", 2);

            let began = Instant::now();
            let (code, out, err) = operate(&gate, &["executions", "kill", id, "--reason", "runs wild"]);
            assert_eq!(code, 0, "{err}");
            assert!(out.contains(id) && out.contains("holds"), "{out}");
            // Nothing is left of it by the time that the operator hears so.
            assert!(held.iter().all(|pid| uid_of(*pid).is_none()), "{held:?}");
            assert_eq!(leaves(&gate).len(), 1, "the other one's");
            assert_eq!(connection.recv_timeout(Duration::from_secs(2)), Ok("ended"), "{network}");
            assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());

            let answer = call.join().unwrap();
            let said = refused(&answer, "502 action_execution_failed");
            assert_eq!(said["reason"], "killed");
            assert!(!answer.body.windows(6).any(|word| word == b"tester"), "the agent is not told who");
            let receipt = receipt(&agent, &said);
            assert_eq!(receipt["grant_id"], id);
            assert_eq!(
                receipt["normalized_result"],
                json!({"kind": "cancelled", "reason": "killed by tester: runs wild"})
            );
            assert_eq!(receipt["failure_class"], "killed");
            let killed = &receipt["provider_receipt"]["killed"];
            assert_eq!((&killed["by"], &killed["why"]), (&json!("tester"), &json!("runs wild")), "{receipt}");
            assert_eq!(receipt["egress_evidence"][0]["proxy"]["connections"], 1, "{receipt}");

            let other = other.join().unwrap();
            assert_eq!(other.status, 200, "another one is not touched: {}", other.json());
            let noted: Vec<Value> = archive::mentions(&gate.ledger(), id)
                .unwrap()
                .into_iter()
                .filter(|record| record["event_type"] == "execution.killed")
                .collect();
            assert_eq!(noted.len(), 1);
            assert_eq!(noted[0]["details"]["operator"], "tester");
            assert_eq!(noted[0]["details"]["reason"], "runs wild");
            let (code, _, err) = operate(&gate, &["executions", "kill", id]);
            assert_eq!(code, 1);
            assert!(err.contains("404"), "{err}");
            assert!(list(&gate).is_empty());
        });
        assert_eq!(gate.stop(), 0);
        assert_eq!(verified(&gate)["open_intents"], 0);
    }
}

#[test]
fn one_that_waits_is_killed_before_it_begins_and_costs_nothing() {
    if cannot() {
        return;
    }
    let setup = Setup::new("kill-waiting")
        .config("[sandbox]\nmax_concurrent = 1\n[[budgets]]\nprincipal = \"*\"\nwindow = \"day\"\nmax_calls = 2\n")
        .command("holds", &python(), NONE);
    let gate = with_operator(setup).start();
    heard(&gate);
    let agent = Agent::connect(&gate.agent());
    std::thread::scope(|scope| {
        let first = scope.spawn(|| {
            try_execute(&agent, "holds", &with_code("import time; time.sleep(6); print('{}')", &json!({}))).unwrap()
        });
        running(&gate, "running", 1);
        let second = scope.spawn(|| try_execute(&agent, "holds", &with_code("print('{}')", &json!({}))).unwrap());
        let id = running(&gate, "waiting", 1)[0]["id"].as_str().unwrap().to_owned();
        assert_eq!(operate(&gate, &["executions", "kill", &id]).0, 0);
        let said = refused(&second.join().unwrap(), "502 action_execution_failed");
        assert_eq!(said["reason"], "killed");
        assert!(!first.is_finished(), "the one that runs goes on");
        let receipt = receipt(&agent, &said);
        assert_eq!(receipt["normalized_result"]["reason"], "killed by tester");
        assert_eq!(first.join().unwrap().status, 200);
        // What never began was not paid for.
        inside(&agent, "holds", "print('{}')", &json!({}));
        refused(&agent.execute("holds", &with_code("print('{}')", &json!({}))), "403 budget_exhausted");
    });
}

#[test]
fn only_an_operator_lists_and_kills() {
    if cannot() {
        return;
    }
    let setup = Setup::new("kill-who").command("holds", &python(), NONE);
    let gate = with_operator(setup).start();
    heard(&gate);
    let agent = Agent::connect(&gate.agent());
    std::thread::scope(|scope| {
        let call = scope.spawn(|| try_execute(&agent, "holds", &with_code(HOLD, &json!({}))).unwrap());
        let id = running(&gate, "running", 1)[0]["id"].as_str().unwrap().to_owned();
        let path = format!("/v1/executions/{id}/kill");
        let operators = latchgate_tests::http::Target::Unix(gate.directory().join("operator/operator.sock"));
        let (authorization, proof) = (agent.authorization(), agent.proof("POST", &path));
        let headers = [("authorization", authorization.as_str()), ("dpop", proof.as_str())];
        refused(&once(&gate.agent(), "POST", &path, &headers, None), "404 not_found");
        refused(&once(&operators, "POST", &path, &headers, None), "401 identity_unauthenticated");
        refused(&once(&operators, "POST", &path, &[], None), "401 missing_auth_header");
        refused(&once(&operators, "GET", "/v1/executions", &[], None), "401 missing_auth_header");
        assert!(!call.is_finished());
        assert_eq!(running(&gate, "running", 1)[0]["id"], id.as_str(), "nobody ended it");
        let too_long = "x".repeat(257);
        for (id, reason, says) in [
            ("0199a1b2-0000-7000-8000-000000000000", "r", "404"),
            (&id, "", "1 to 256"),
            (&id, "two\nlines", "one line"),
            (&id, &too_long, "1 to 256"),
        ] {
            let (code, _, err) = operate(&gate, &["executions", "kill", id, "--reason", reason]);
            assert_eq!(code, 1, "{reason}");
            assert!(err.contains(says), "{err}");
        }
        assert!(!call.is_finished());
        assert_eq!(operate(&gate, &["executions", "kill", &id]).0, 0);
        refused(&call.join().unwrap(), "502 action_execution_failed");
    });
}
