//! The gate's test of itself, seen from outside: that it runs before anybody is served, that it says the truth when a
//! guard is missing, that nothing runs then, and that its result is signed.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used)]

use std::process::{Command, Stdio};

use latchgate_tests::agent::Agent;
use latchgate_tests::gate::{Gate, Setup};
use latchgate_tests::inside::{leaves, verified};
use latchgate_tests::operator::{heard, operate, with_operator};
use latchgate_tests::{http, skip};
use serde_json::{Value, json};

const REACH: &str = "{profile: none}";

fn setup(name: &str) -> Option<Setup> {
    if !rustix::process::geteuid().is_root() {
        skip("a real gate needs root");
        return None;
    }
    Some(with_operator(Setup::new(name)).command("hello", "echo '{}'", REACH))
}

fn result(gate: &Gate, arguments: &[&str]) -> (i32, Value) {
    let (code, out, err) = operate(gate, &[&["egress", "selftest"], arguments].concat());
    let parsed = serde_json::from_str(&out);
    (code, parsed.unwrap_or_else(|error| panic!("{error}: {out}{err}")))
}

fn findings<'a>(result: &'a Value, technique: &str) -> Vec<&'a Value> {
    let found = result["findings"].as_array().unwrap().iter();
    let found: Vec<_> = found.filter(|finding| finding["technique"] == technique).collect();
    assert!(!found.is_empty(), "{technique} was not tried: {result}");
    found
}

fn readyz(gate: &Gate) -> (u16, Value) {
    let answer = http::once(&gate.agent(), "GET", "/readyz", &[], None);
    (answer.status, answer.json())
}

/// The results that the ledger has, the newest first; each is a signed record, of which [`verified`] sees to it.
fn recorded(gate: &Gate) -> Vec<Value> {
    verified(gate);
    let found = latchgate::ledger::archive::mentions(&gate.ledger(), "egress.selftest").unwrap();
    found.into_iter().filter(|record| record["event_type"] == "egress.selftest").collect()
}

#[test]
fn a_gate_has_tried_itself_before_it_serves() {
    for (network, inbound) in [("isolated", "namespace"), ("shared", "hook")] {
        let Some(setup) = setup("selftest") else { return };
        let gate = setup.config(&format!("[sandbox]\nnetwork = \"{network}\"\n")).start();
        assert_eq!(readyz(&gate), (200, json!({"status": "ready"})), "{}", gate.log_text());
        heard(&gate);

        let (code, result) = result(&gate, &["--last"]);
        assert_eq!((code, &result["outcome"]), (0, &json!("passed")), "{result}");
        assert_eq!((&result["asked_by"], &result["conditions"]["network"]), (&json!("start"), &json!(network)));
        for (technique, by) in [
            ("tcp_v4", "hook"),
            ("tcp_v6", "hook"),
            ("tcp_mapped", "hook"),
            ("tcp_reconnect", "hook"),
            ("udp_sendto_v4", "hook"),
            ("udp_connected_mapped", "hook"),
            ("udp_rebound_v6", "hook"),
            ("netlink_socket", "seccomp"),
            ("unix_path", "seccomp"),
            ("unix_abstract", "seccomp"),
            ("bpf", "seccomp"),
            ("mount", "seccomp"),
            ("ptrace", "seccomp"),
            ("signal", "namespace"),
            ("proc_outside", "namespace"),
            ("state_directory", "namespace"),
            ("cgroup_move", "namespace"),
            ("inbound", inbound),
        ] {
            for finding in findings(&result, technique) {
                assert_eq!((&finding["outcome"], &finding["by"]), (&json!("refused"), &json!(by)), "{finding}");
                assert_eq!(by == "hook", finding["record"] != "not_seen", "{finding}");
            }
        }
        let with_a_name = |technique: &str| findings(&result, technique).pop().unwrap().clone();
        for (technique, by, error) in [
            ("dns_udp", "resolver", "REFUSED"),
            ("dns_tcp", "resolver", "REFUSED"),
            ("proxy_address", "proxy", "403"),
            ("proxy_other_port", "proxy", "403"),
            ("name_other_port", "hook", "EPERM"),
        ] {
            let finding = with_a_name(technique);
            assert_eq!((&finding["by"], &finding["error"]), (&json!(by), &json!(error)), "{finding}");
            assert_ne!(finding["record"], "not_seen", "{finding}");
        }

        // Nothing is left of it, and it is in nobody's way.
        assert!(leaves(&gate).is_empty());
        assert!(!gate.directory().join("state/selftest.sock").exists());
        assert_eq!(operate(&gate, &["egress", "flows"]).1, "");
        assert_eq!(recorded(&gate).len(), 1);
        assert_eq!(Agent::connect(&gate.agent()).execute("hello", &json!({})).status, 200);
    }
}

#[test]
fn an_operator_can_have_it_tried_again() {
    let Some(setup) = setup("selftest-again") else { return };
    let gate = setup.start();
    heard(&gate);
    let (code, result) = result(&gate, &[]);
    assert_eq!((code, &result["asked_by"]), (0, &json!("tester")), "{result}");
    let recorded = recorded(&gate);
    assert_eq!(recorded.len(), 2);
    assert_eq!(recorded[0]["details"], result);
    let (_, status, _) = operate(&gate, &["status"]);
    assert!(status.lines().any(|line| line.starts_with("selftest") && line.contains("passed at")), "{status}");
    // On a terminal it is a table.
    let socket = gate.directory().join("operator/operator.sock");
    let key = gate.directory().join("operator.json");
    let command = format!(
        "{} egress selftest --last --socket {} --key {}",
        latchgate_tests::gate::binary().display(),
        socket.display(),
        key.display()
    );
    let terminal = Command::new("script").args(["-qec", &command, "/dev/null"]).stdin(Stdio::null()).output();
    match terminal {
        Err(error) => skip(&format!("script(1): {error}")),
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success(), "{text}");
            assert!(text.contains("TECHNIQUE") && text.contains("tcp_v4") && text.contains("not applicable"), "{text}");
        }
    }
}

#[test]
fn a_gate_that_something_gets_out_of_is_not_ready_and_runs_nothing() {
    // Each wall alone; in the gate's own network, where nothing else stands behind the kernel program.
    let missing: [(&[&str], &str); 6] = [
        (&["connect4", "egress", "ingress"], "tcp_v4"),
        (&["seccomp:socket_families"], "netlink_socket"),
        (&["seccomp:namespaces"], "user_namespace"),
        (&["resolver_names"], "dns_udp"),
        // Landlock and the filter each need it, and Landlock sets it by itself.
        (&["no_new_privs", "landlock", "seccomp"], "no_new_privs"),
        (&["resource_limits"], "core_dump"),
    ];
    for (guards, technique) in missing {
        let Some(setup) = setup("selftest-open") else { return };
        let network = "[sandbox]\nnetwork = \"shared\"\n";
        let gate = setup.config(network).unguarded(guards).with_selftest().start();
        let (status, said) = readyz(&gate);
        assert_eq!((status, &said["status"]), (503, &json!("not_ready")), "{guards:?}: {said}");
        let reason = said["reason"].as_str().unwrap_or_default();
        assert!(reason.starts_with("self-test: gets out: "), "{guards:?}: {said}");
        let refused = Agent::connect(&gate.agent()).execute("hello", &json!({}));
        assert_eq!(refused.code(), "502 action_execution_failed");
        let records = recorded(&gate);
        assert_eq!(records.len(), 1);
        let escaped: Vec<_> = findings(&records[0]["details"], technique);
        assert!(escaped.iter().any(|finding| finding["outcome"] == "escaped"), "{guards:?}: {escaped:?}");
    }
}

#[test]
fn what_gets_out_is_the_exit_code_and_the_status() {
    let Some(setup) = setup("selftest-code") else { return };
    let gate = setup.unguarded(&["seccomp:socket_families"]).with_selftest().start();
    heard(&gate);
    let (code, result) = result(&gate, &[]);
    assert_eq!((code, &result["outcome"]), (1, &json!("failed")), "{result}");
    let (_, status, _) = operate(&gate, &["status"]);
    assert!(status.contains("not_ready") && status.contains("FAILED at"), "{status}");
    assert!(status.contains("with guards off: seccomp:socket_families"), "{status}");
    // A session is held back as an action is.
    let mut session = latchgate_tests::session::arguments(&gate, "none");
    session.extend(["--", "/bin/sh", "-c", "echo r''an"].map(str::to_owned));
    let (code, said, error) = gate.cli(&session.iter().map(String::as_str).collect::<Vec<_>>());
    assert_ne!(code, 0);
    assert!(error.contains("the gate is not ready: self-test: gets out: ") && !said.contains("ran"), "{said}{error}");
}

/// Ends a gate and starts it again; what the log of the new one says of the self-test.
fn again(gate: &mut Gate) -> bool {
    gate.stop();
    gate.start();
    gate.logged(|line| line.contains("the self-test of this boot, kernel, program and configuration stands"))
}

#[test]
fn a_signed_result_stands_for_the_same_conditions_only() {
    let Some(setup) = setup("selftest-kept") else { return };
    let mut gate = setup.config("[egress]\nselftest = \"cached\"\n").start();
    assert_eq!(recorded(&gate).len(), 1);
    assert!(again(&mut gate), "{}", gate.log_text());
    assert_eq!((recorded(&gate).len(), readyz(&gate).0), (1, 200));

    // Another configuration is another gate.
    let file = gate.directory().join("latchgate.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("{text}\n[sandbox]\nmax_processes = 65\n")).unwrap();
    assert!(!again(&mut gate));
    assert_eq!(recorded(&gate).len(), 2);
    assert!(again(&mut gate));

    // What somebody else wrote into the ledger is not believed. A call comes after it, so that it is not the tail, which
    // is looked at when the ledger is opened.
    assert_eq!(Agent::connect(&gate.agent()).execute("hello", &json!({})).status, 200);
    gate.stop();
    let forge = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); \
                 n = c.execute(\"update records set body = replace(body, 'asked_by\\\":\\\"start', 'asked_by\\\":\\\"stark') \
                 where body like '%egress.selftest%'\").rowcount; c.commit(); print(n)";
    let database = gate.ledger().join("ledger.db");
    let forged = Command::new("/usr/bin/python3").arg("-c").arg(forge).arg(&database).output().unwrap();
    assert!(forged.status.success(), "{}", String::from_utf8_lossy(&forged.stderr));
    assert_eq!(String::from_utf8_lossy(&forged.stdout).trim(), "2");
    gate.start();
    assert!(!gate.logged(|line| line.contains("configuration stands")), "{}", gate.log_text());
    assert_eq!(readyz(&gate).0, 200);
}

#[test]
fn without_a_self_test_a_gate_is_degraded_and_says_so() {
    let Some(setup) = setup("selftest-skipped") else { return };
    let gate = setup.config("[egress]\nunsafe_skip_selftest = true\n").start();
    let (status, said) = readyz(&gate);
    assert_eq!((status, &said["status"]), (200, &json!("degraded")), "{said}");
    assert!(said["reason"].as_str().unwrap().contains("unsafe_skip_selftest"), "{said}");
    assert!(gate.logged(|line| line.contains("WARN") && line.contains("self-test is switched off")));
    assert!(recorded(&gate).is_empty());
    heard(&gate);
    assert!(operate(&gate, &["status"]).1.contains("SWITCHED OFF"));
    // It can be tried all the same, and then it is known.
    assert_eq!(result(&gate, &[]).0, 0);
    assert_eq!(readyz(&gate).1["status"], "ready");
}
