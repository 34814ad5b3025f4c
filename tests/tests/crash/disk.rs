//! A ledger that cannot be written.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use latchgate_tests::agent::Agent;
use latchgate_tests::gate::{Gate, Setup};
use latchgate_tests::inside::{
    inside, leaves, missing, python, receipts, refused, try_execute, verified, wait, with_code,
};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::json;

use crate::origin::Origin;
use crate::{asking, origin_at, reaching};

/// The state directory as a file system of its own. To be made before the gate, so that it goes after it.
struct Disk(PathBuf);

impl Disk {
    fn new(setup: &Setup) -> Self {
        let place = setup.directory.join("state");
        fs::create_dir(&place).unwrap();
        mount("tmpfs", &place, "tmpfs", MountFlags::NODEV, Some(c"size=24m,mode=0700")).unwrap();
        Self(place)
    }

    fn free(&self) -> u64 {
        let found = rustix::fs::statvfs(&self.0).unwrap();
        found.f_bavail * found.f_frsize
    }

    fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }

    /// Fills it until no more than `left` bytes are free.
    fn fill(&self, left: u64) {
        let mut filler = fs::OpenOptions::new().create(true).append(true).open(self.filler()).unwrap();
        while self.free() > left {
            let piece = usize::try_from((self.free() - left).clamp(1, 1 << 20)).unwrap();
            if filler.write_all(&vec![0; piece]).is_err() {
                break;
            }
        }
    }

    fn empty(&self) {
        fs::remove_file(self.filler()).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
        let _ = self.0.parent().map(fs::remove_dir_all::<&Path>);
    }
}

fn gate(name: &str, origin: &Origin) -> (Disk, Gate) {
    let setup = Setup::new(name);
    let disk = Disk::new(&setup);
    let gate = setup
        .config(&origin_at(&origin.address.ip().to_string()))
        .command("asks", &python(), &reaching("origin.test", origin.port()))
        .start();
    (disk, gate)
}

#[test]
fn nothing_runs_that_could_not_be_recorded() {
    if missing(&["/usr/bin/python3"]) {
        return;
    }
    let origin = Origin::start("127.73.1.1:0", "origin");
    let (disk, gate) = gate("full", &origin);
    let agent = Agent::connect(&gate.agent());
    let params = json!({"at": format!("origin.test:{}", origin.port())});
    let code = asking("print(json.dumps(get(p['at'], '/')['body']))");
    assert_eq!(inside(&agent, "asks", &code, &params).0, "origin");
    assert_eq!((origin.requests().len(), receipts(&gate).len()), (1, 1));

    // Room for the receipts of what runs, none for new intents; then none at all.
    disk.fill(2 << 20);
    for _ in 0..3 {
        let answer = refused(&agent.execute("asks", &with_code(&code, &params)), "500 evidence_persistence_failed");
        assert!(answer["receipt_id"].is_null() && answer["output"].is_null(), "{answer}");
    }
    disk.fill(0);
    for _ in 0..3 {
        // Which of the stores says so first is not the point.
        let answer = agent.execute("asks", &with_code(&code, &params));
        assert!([500, 503].contains(&answer.status), "{}", String::from_utf8_lossy(&answer.body));
        assert!(answer.json()["output"].is_null());
    }
    assert_eq!((origin.requests().len(), receipts(&gate).len()), (1, 1), "nothing ran");
    assert_eq!(leaves(&gate), Vec::<PathBuf>::new());

    disk.empty();
    assert_eq!(inside(&agent, "asks", &code, &params).0, "origin");
    assert_eq!((origin.requests().len(), receipts(&gate).len()), (2, 2));
    assert_eq!(verified(&gate)["open_intents"], 0);
}

#[test]
fn what_ran_is_not_answered_before_it_is_recorded() {
    if missing(&["/usr/bin/python3"]) {
        return;
    }
    let origin = Origin::start("127.73.2.1:0", "origin");
    let (disk, mut gate) = gate("filled", &origin);
    let agent = Agent::connect(&gate.agent());
    let params = json!({"at": format!("origin.test:{}", origin.port())});
    // An output that is no small change to a full disk.
    let held = asking("get(p['at'], '/held'); print(json.dumps('x' * 500_000))");
    let answer = std::thread::scope(|scope| {
        let call = scope.spawn(|| try_execute(&agent, "asks", &with_code(&held, &params)).unwrap());
        wait("the call", Duration::from_secs(20), || (origin.held() == 1).then_some(()));
        disk.fill(0);
        origin.release();
        call.join().unwrap()
    });
    let said = refused(&answer, "500 evidence_persistence_failed");
    assert!(said["output"].is_null());
    assert_eq!(receipts(&gate).len(), 0);
    disk.empty();
    gate.stop();
    // Its intent was there all the time; the next start closes it.
    assert_eq!(verified(&gate)["open_intents"], 1);
    gate.start();
    let report = verified(&gate);
    assert_eq!((&report["receipts"], &report["open_intents"]), (&json!(1), &json!(0)));
    assert_eq!(receipts(&gate)[0]["normalized_result"]["kind"], "internal_error");
    // With room for it, the same is answered.
    let agent = Agent::connect(&gate.agent());
    assert_eq!(inside(&agent, "asks", &held, &params).0.as_str().map(str::len), Some(500_000));
}
