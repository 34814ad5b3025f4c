//! Stores that say no, are full, or were cut off: each is a refusal with its own code, never a permission.

use std::fs;

use latchgate::store::RevocationStore as _;
use latchgate::store::sqlite::Store;
use latchgate::time::Timestamp;
use latchgate_tests::agent::Agent;
use latchgate_tests::skip;
use serde_json::json;

use crate::answers::{passed, refused, with_echo};

#[test]
fn a_revoked_lease_is_refused_and_another_is_not() {
    let mut gate = with_echo("revoked").start();
    let (revoked, kept) = (Agent::connect(&gate.agent()), Agent::connect(&gate.agent()));
    passed(&revoked.execute("echo", &json!({})));
    gate.stop();
    {
        let now = Timestamp::now();
        let store = Store::open(&gate.directory().join("state/store"), now).unwrap();
        store.revoke_lease(&revoked.lease_jti, now.plus_millis(3_600_000), now).unwrap();
    }
    gate.start();
    // Revocation comes before the proof, so it is what both hear from the first request on.
    refused(&revoked.execute("echo", &json!({})), "401 lease_revoked");
    let began = latchgate_tests::now();
    loop {
        // Leases of an earlier run are good; their proofs have to be newer than the gate's memory of proofs.
        let response = kept.execute("echo", &json!({}));
        if response.status == 200 {
            break;
        }
        refused(&response, "401 invalid_dpop");
        assert!(latchgate_tests::now() - began < 20);
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    refused(&revoked.execute("echo", &json!({})), "401 lease_revoked");
    passed(&Agent::connect(&gate.agent()).execute("echo", &json!({})));
}

#[test]
fn a_key_that_fills_its_share_of_the_replay_store_fills_nobody_elses() {
    let gate = with_echo("full").config("[auth]\nmax_live_proofs_per_key = 3").start();
    let (busy, other) = (Agent::connect(&gate.agent()), Agent::connect(&gate.agent()));
    for _ in 0..3 {
        refused(&busy.receipt("none"), "404 not_found");
    }
    refused(&busy.receipt("none"), "503 replay_cache_unavailable");
    refused(&busy.execute("echo", &json!({})), "503 replay_cache_unavailable");
    passed(&other.execute("echo", &json!({})));
    passed(&Agent::connect(&gate.agent()).execute("echo", &json!({})));
}

/// The ledger keeps space back for the receipts of what it began; past that, nothing new begins.
#[test]
fn a_full_disk_begins_nothing() {
    let setup = with_echo("disk");
    let state = setup.directory.join("state");
    fs::create_dir(&state).unwrap();
    let mounted =
        rustix::mount::mount("tmpfs", &state, "tmpfs", rustix::mount::MountFlags::empty(), c"size=24m,mode=700");
    if mounted.is_err() {
        fs::remove_dir_all(&setup.directory).unwrap();
        return skip("no file system of a size of its own can be mounted here");
    }
    let mut gate = setup.start();
    let agent = Agent::connect(&gate.agent());
    let filler = state.join("filler");
    passed(&agent.execute("echo", &json!({})));
    // All but about a megabyte: within what the ledger keeps back.
    let free = rustix::fs::statvfs(&state).unwrap();
    let bytes = usize::try_from(free.f_bavail * free.f_frsize).unwrap().saturating_sub(1 << 20);
    fs::write(&filler, vec![1; bytes]).unwrap();
    let body = refused(&agent.execute("echo", &json!({})), "500 evidence_persistence_failed");
    assert!(body["receipt_id"].is_null(), "it did not run: {body}");
    fs::remove_file(&filler).unwrap();
    passed(&agent.execute("echo", &json!({})));
    assert_eq!(gate.verify().0, 0);
    gate.stop();
    rustix::mount::unmount(&state, rustix::mount::UnmountFlags::DETACH).unwrap();
}

/// Another process that holds the write lock of a SQLite file until it is dropped.
struct Holder(std::process::Child);

impl Holder {
    fn of(path: &std::path::Path) -> Option<Self> {
        let script = "import sqlite3,sys\n\
            c=sqlite3.connect(sys.argv[1],isolation_level=None); c.execute('BEGIN IMMEDIATE')\n\
            print('held',flush=True); sys.stdin.read()\n";
        let mut child = std::process::Command::new("python3")
            .args(["-c", script])
            .arg(path)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .ok()?;
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take()?), &mut line).ok()?;
        let holder = Self(child);
        (line.trim() == "held").then_some(holder)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

#[test]
fn a_store_that_does_not_answer_is_no_permission() {
    let gate = with_echo("held").start();
    let state = gate.directory().join("state");
    let calls = json!({"scopes": ["tools:call"], "budgets": {"max_calls": 100}});
    let agent = Agent::connect_with(&gate.agent(), calls);
    let left = || passed(&agent.execute("echo", &json!({})))["budget"]["calls_remaining"].as_u64().unwrap();
    let before = left();
    for (held, expected) in [
        ("store/replay.db", "503 replay_cache_unavailable"),
        ("store/state.db", "503 budget_store_unavailable"),
        ("ledger/ledger.db", "500 evidence_persistence_failed"),
    ] {
        let Some(holder) = Holder::of(&state.join(held)) else {
            return skip("python3 with sqlite3 is not here, and something has to hold a store");
        };
        refused(&agent.execute("echo", &json!({})), expected);
        drop(holder);
    }
    assert_eq!(left(), before - 1, "what was refused cost nothing");
    assert_eq!(gate.verify().0, 0);
}
