//! The gate's container is killed, and another takes its place.

use std::time::Duration;

use latchgate_tests::agent::Agent;
use latchgate_tests::bundle::missing;
use latchgate_tests::http::Connection;
use latchgate_tests::inside::{directories, inside, processes, send, uid_of, verified, wait};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use super::scene;

#[test]
fn a_killed_gate_takes_its_executions_with_it_and_the_next_adopts_nothing() {
    if missing() {
        return;
    }
    let mut scene = scene("pod-crash");
    let agent = Agent::connect(&scene.gate.agent());
    let mut connection = Connection::open(&scene.gate.agent()).unwrap();
    send(&mut connection, &agent, "slow", &json!({})).unwrap();
    let cgroup = scene.pod.cgroup("gate");
    let actions = cgroup.join("latchgate").join(scene.gate.name()).join("actions");
    let running = wait("the action", Duration::from_secs(10), || {
        let pids = processes(&directories(&actions).into_iter().next()?);
        (pids.len() >= 3).then_some(pids)
    });
    let before = std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(&actions).unwrap());

    let pid = Pid::from_raw(i32::try_from(scene.pod.pid("gate")).unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    // runc goes when its container has.
    scene.gate.ended();
    for pid in running {
        wait("the execution's end", Duration::from_secs(5), || uid_of(pid).is_none().then_some(()));
    }
    assert!(!cgroup.exists(), "the container's cgroup is left");

    scene.gate.start();
    let after = std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(&actions).unwrap());
    assert_ne!(before, after);
    let agent = Agent::connect(&scene.gate.agent());
    let code = "import socket\ntry:\n    socket.create_connection(('127.0.0.1', p['port']), 5)\n    print('1')\nexcept PermissionError:\n    print('0')";
    let (reached, _) = inside(&agent, "python", code, &json!({"port": scene.origin.address.port()}));
    assert_eq!(reached, 0);
    // What the killed one had begun is closed with a receipt that says that its outcome is not known.
    let report = verified(&scene.gate);
    assert_eq!(report["intact"], true);
}
