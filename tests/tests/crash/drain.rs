//! SIGTERM while a call runs, and a client that does not wait for its answer.

use std::time::{Duration, Instant};

use latchgate_tests::agent::Agent;
use latchgate_tests::gate::{Gate, Setup};
use latchgate_tests::http::{Connection, once};
use latchgate_tests::inside::{
    inside, leaves, missing, python, receipt, receipts, refused, send, try_execute, verified, wait, with_code,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::origin::Origin;
use crate::{asking, origin_at, reaching};

/// A gate with an action `asks` that reaches `origin.test`.
fn gate(name: &str, origin: &Origin, more: &str) -> Gate {
    Setup::new(name)
        .config(&origin_at(&origin.address.ip().to_string()))
        .config(more)
        .command("asks", &python(), &reaching("origin.test", origin.port()))
        .start()
}

fn terminate(gate: &Gate) {
    kill_process(Pid::from_raw(i32::try_from(gate.pid()).unwrap()).unwrap(), Signal::TERM).unwrap();
}

#[test]
fn what_runs_is_finished_and_what_comes_is_told_so() {
    if missing(&["/usr/bin/python3"]) {
        return;
    }
    let origin = Origin::start("127.72.1.1:0", "origin");
    let mut gate = gate("drain", &origin, "");
    let agent = Agent::connect(&gate.agent());
    let params = json!({"at": format!("origin.test:{}", origin.port())});
    let at_once = asking("print(json.dumps(get(p['at'], '/')['body']))");
    let held = with_code(&asking("print(json.dumps(get(p['at'], '/held')['body']))"), &params);
    assert_eq!(inside(&agent, "asks", &at_once, &params).0, "origin");
    let mut kept = Connection::open(&gate.agent()).unwrap();
    assert_eq!(kept.request("GET", "/readyz", &[], None).unwrap().status, 200);

    std::thread::scope(|scope| {
        let call = scope.spawn(|| try_execute(&agent, "asks", &held).unwrap());
        wait("the call", Duration::from_secs(20), || (origin.held() == 1).then_some(()));
        terminate(&gate);
        wait("the drain", Duration::from_secs(5), || gate.logged(|line| line.contains("draining")).then_some(()));
        // On a connection that was there and on new ones.
        let answer = kept.request("GET", "/v1/actions", &[], None).unwrap();
        assert!(refused(&answer, "503 draining")["decision_id"].is_string());
        refused(&agent.execute("asks", &with_code(&at_once, &params)), "503 draining");
        let lease = json!({"scopes": ["tools:call"], "dpop_jwk": agent.key.jwk()});
        refused(&latchgate_tests::agent::lease(&gate.agent(), &lease), "503 draining");
        assert_eq!(once(&gate.agent(), "GET", "/healthz", &[], None).status, 200);
        assert_eq!(once(&gate.agent(), "GET", "/readyz", &[], None).status, 503);
        assert!(!call.is_finished());
        origin.release();
        let answer = call.join().unwrap();
        assert_eq!((answer.status, &answer.json()["output"]), (200, &json!("origin")));
    });
    assert_eq!(gate.stop(), 0);
    assert_eq!(origin.requests().len(), 2, "what was told to go has not run");
    let report = verified(&gate);
    assert_eq!((&report["receipts"], &report["open_intents"]), (&json!(2), &json!(0)));
    gate.start();
    let agent = Agent::connect(&gate.agent());
    assert_eq!(inside(&agent, "asks", &at_once, &params).0, "origin");
}

#[test]
fn what_takes_too_long_for_the_drain_is_ended_with_a_receipt() {
    if missing(&["/usr/bin/python3"]) {
        return;
    }
    let origin = Origin::start("127.72.2.1:0", "origin");
    let mut gate = gate("impatient", &origin, "[limits]\ndrain_seconds = 1\n");
    let agent = Agent::connect(&gate.agent());
    let params = json!({"at": format!("origin.test:{}", origin.port())});
    let held = with_code(&asking("print(json.dumps(get(p['at'], '/held')['body']))"), &params);
    std::thread::scope(|scope| {
        scope.spawn(|| try_execute(&agent, "asks", &held));
        wait("the call", Duration::from_secs(20), || (origin.held() == 1).then_some(()));
        let began = Instant::now();
        assert_eq!(gate.stop(), 0);
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    });
    assert_eq!(leaves(&gate), Vec::<std::path::PathBuf>::new());
    let receipts = receipts(&gate);
    assert_eq!(receipts.len(), 1);
    assert_eq!(receipts[0]["normalized_result"]["kind"], "cancelled");
    assert_eq!(verified(&gate)["open_intents"], 0);
}

#[test]
fn a_client_that_hangs_up_leaves_a_receipt() {
    if missing(&["/usr/bin/python3"]) {
        return;
    }
    let origin = Origin::start("127.72.3.1:0", "origin");
    let gate = gate("hangs-up", &origin, "");
    let agent = Agent::connect(&gate.agent());
    let at = format!("origin.test:{}", origin.port());
    let held = asking("get(p['at'], '/held'); print(json.dumps(get(p['at'], '/after')['body']))");
    let mut connection = Connection::open(&gate.agent()).unwrap();
    send(&mut connection, &agent, "asks", &with_code(&held, &json!({"at": at}))).unwrap();
    wait("the call", Duration::from_secs(20), || (origin.held() == 1).then_some(()));
    drop(connection);
    assert_eq!(receipts(&gate), Vec::<serde_json::Value>::new());
    // The gate goes on with others, and with the one that nobody waits for.
    assert_eq!(once(&gate.agent(), "GET", "/healthz", &[], None).status, 200);
    origin.release();
    let left = wait("the receipt", Duration::from_secs(20), || receipts(&gate).into_iter().next());
    let receipt = receipt(&agent, &left);
    assert_eq!(receipt["normalized_result"]["kind"], "success");
    assert_eq!(receipt["egress_evidence"][0]["proxy"]["connections"], 2, "it ran to its end");
    assert!(origin.requests().iter().any(|head| head.starts_with("GET /after")));
    assert_eq!(verified(&gate)["open_intents"], 0);
}
