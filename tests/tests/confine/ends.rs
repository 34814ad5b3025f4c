//! How a session ends when it is not by itself: its client goes, an operator ends it, the gate stops or is killed.

use std::fs;
use std::time::Duration;

use latchgate_tests::inside::{leaves, processes, receipts, wait};
use latchgate_tests::operator::{lines, operate};
use latchgate_tests::session::Session;

use super::gate;

/// A command that says when it is there, and why it goes.
const LASTING: &str = "trap 'echo hung > hung; exit 1' HUP; echo r''eady; while :; do sleep 0.1; done";

#[test]
fn when_the_client_goes_the_command_is_hung_up_on() {
    let (gate, work) = gate("hangup", "");
    let mut session = Session::start(&gate, "none", &work, &["/bin/sh", "-c", LASTING]);
    session.see("ready");
    session.client.kill().unwrap();
    let receipt = wait("the receipt", Duration::from_secs(10), || receipts(&gate).into_iter().next());
    assert_eq!(fs::read_to_string(work.join("hung")).unwrap(), "hung\n");
    assert_eq!(receipt["failure_class"], "hung_up", "{receipt}");
    assert!(leaves(&gate).is_empty());
    // One that does not listen is ended all the same.
    let mut session = Session::start(
        &gate,
        "none",
        &work,
        &["/bin/sh", "-c", "trap '' HUP; echo r''eady; while :; do sleep 0.1; done"],
    );
    session.see("ready");
    session.client.kill().unwrap();
    wait("the second receipt", Duration::from_secs(15), || (receipts(&gate).len() == 2).then_some(()));
    assert!(leaves(&gate).is_empty());
}

#[test]
fn an_operator_lists_and_kills_it() {
    let (gate, work) = gate("killed", "");
    let mut session = Session::start(&gate, "none", &work, &["/bin/sh", "-c", LASTING]);
    session.see("ready");
    let running = lines(&gate, &["executions", "list", "--json"]);
    assert_eq!(running[0]["action_id"], "confine:none", "{running:?}");
    assert_eq!((&running[0]["principal"], &running[0]["phase"]), (&"tester".into(), &"running".into()));
    let (code, _, error) =
        operate(&gate, &["executions", "kill", running[0]["id"].as_str().unwrap(), "--reason", "enough"]);
    assert_eq!(code, 0, "{error}");
    assert_eq!(session.end().code(), Some(255));
    assert!(session.shown().contains("killed by tester"), "{}", session.shown());
    let receipt = &receipts(&gate)[0];
    assert_eq!(receipt["failure_class"], "killed");
    assert_eq!(receipt["provider_receipt"]["killed"]["why"], "enough", "{receipt}");
    assert!(!work.join("hung").exists(), "killed at once");
}

#[test]
fn when_the_gate_is_killed_all_of_it_dies() {
    let (mut gate, work) = gate("gatekilled", "");
    // In the background and in a session of its own too.
    let mut session =
        Session::start(&gate, "none", &work, &["/bin/sh", "-c", "setsid sleep 300 & echo r''eady; sleep 300"]);
    session.see("ready");
    let leaf = leaves(&gate).remove(0);
    assert!(processes(&leaf).len() >= 3);
    gate.kill();
    wait("an empty leaf", Duration::from_secs(5), || processes(&leaf).is_empty().then_some(()));
    assert_eq!(session.end().code(), Some(255));
    assert!(session.shown().contains("the gate went away"), "{}", session.shown());
    gate.start();
    let receipt = &receipts(&gate)[0];
    assert_eq!((&receipt["action_id"], &receipt["failure_class"]), (&"confine:none".into(), &"outcome_unknown".into()));
}

#[test]
fn a_gate_that_stops_hangs_up_first() {
    let (mut gate, work) = gate("drained", "");
    let mut session = Session::start(&gate, "none", &work, &["/bin/sh", "-c", LASTING]);
    session.see("ready");
    assert_eq!(gate.stop(), 0);
    assert_eq!(session.end().code(), Some(255));
    assert!(session.shown().contains("the gate was stopped"), "{}", session.shown());
    assert!(work.join("hung").exists());
    assert_eq!(receipts(&gate)[0]["failure_class"], "drained");
}
