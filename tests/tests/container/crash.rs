//! The gate's container is killed, and another takes its place.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use latchgate_tests::agent::Agent;
use latchgate_tests::bundle::{Pod, missing};
use latchgate_tests::http::Connection;
use latchgate_tests::inside::{directories, inside, processes, send, uid_of, verified, wait};
use latchgate_tests::origin::{Authority, Origin};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use super::{LOOPBACK, NAME, Scene, scene, scene_with, setup};

/// An execution that runs for long: its processes, and the cgroup directory of its gate's executions.
fn begin(scene: &Scene, connection: &mut Connection) -> (Vec<u32>, PathBuf) {
    let agent = Agent::connect(&scene.gate.agent());
    send(connection, &agent, "slow", &json!({})).unwrap();
    let actions = scene.pod.cgroup("gate").join("latchgate").join(scene.gate.name()).join("actions");
    let running = wait("the action", Duration::from_secs(10), || {
        let pids = processes(&directories(&actions).into_iter().next()?);
        (pids.len() >= 3).then_some(pids)
    });
    (running, actions)
}

fn inode(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().ino()
}

fn kill(pid: u32) {
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), Signal::KILL).unwrap();
}

fn all_end(running: &[u32]) {
    for pid in running {
        wait("the execution's end", Duration::from_secs(5), || uid_of(*pid).is_none().then_some(()));
    }
}

/// A new execution is held as one of the first gate was, and the ledger is whole.
fn holds(scene: &Scene) {
    let agent = Agent::connect(&scene.gate.agent());
    let code = "import socket\ntry:\n    socket.create_connection(('127.0.0.1', p['port']), 5)\n    print('1')\nexcept PermissionError:\n    print('0')";
    let (reached, _) = inside(&agent, "python", code, &json!({"port": scene.origin.address.port()}));
    assert_eq!(reached, 0);
    verified(&scene.gate);
}

#[test]
fn a_killed_gate_takes_its_executions_with_it_and_the_next_adopts_nothing() {
    if missing() {
        return;
    }
    let mut scene = scene("pod-crash");
    let mut connection = Connection::open(&scene.gate.agent()).unwrap();
    let (running, actions) = begin(&scene, &mut connection);
    let before = inode(&actions);
    kill(scene.pod.pid("gate"));
    // runc goes when its container has.
    scene.gate.ended();
    all_end(&running);
    assert!(!scene.pod.cgroup("gate").exists(), "the container's cgroup is left");

    scene.gate.start();
    assert_ne!(before, inode(&actions));
    holds(&scene);
}

#[test]
fn a_gate_that_is_started_again_in_the_same_container_has_cgroups_of_its_own() {
    if missing() {
        return;
    }
    let scene = scene_with("pod-again", Pod::contain_restarting);
    let mut connection = Connection::open(&scene.gate.agent()).unwrap();
    let (running, actions) = begin(&scene, &mut connection);
    let before = (inode(&actions), inode(&actions.parent().unwrap().join("gate")));
    let pids = processes(&actions.parent().unwrap().join("gate"));
    assert_eq!(pids.len(), 1, "{pids:?}");
    kill(pids[0]);
    all_end(&running);
    wait("the second start", Duration::from_secs(20), || {
        (scene.gate.log_text().lines().filter(|line| line.contains(" ready")).count() == 2).then_some(())
    });
    let after = (inode(&actions), inode(&actions.parent().unwrap().join("gate")));
    assert!(before.0 != after.0 && before.1 != after.1, "{before:?} {after:?}");
    holds(&scene);
}

/// Not in a container: both ways of attaching are there to be had.
#[test]
fn a_gate_that_pins_is_not_held_by_one_that_did_not_nor_the_other_way_round() {
    let authority = Authority::default();
    let origin = Origin::tls(&authority, &[NAME], LOOPBACK, "hello");
    let mut gate = setup("attach", Some((&origin, &authority))).start();
    let file = gate.directory().join("latchgate.toml");
    let written = std::fs::read_to_string(&file).unwrap();
    for attach in ["multi", "multi", "pinned", "pinned", "multi"] {
        gate.kill();
        let config = written.replace("[egress]\n", &format!("[egress]\nattach = \"{attach}\"\n"));
        std::fs::write(&file, config).unwrap();
        gate.start();
        let agent = Agent::connect(&gate.agent());
        let url = format!("https://{NAME}:{}/", origin.address.port());
        let response = agent.execute("fetch", &json!({"url": url}));
        assert_eq!(response.status, 200, "{attach}: {}", String::from_utf8_lossy(&response.body));
    }
    assert_eq!(origin.requests().len(), 5);
}
