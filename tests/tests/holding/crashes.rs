//! SIGKILL, a hundred times, of a gate that works and of one that is about to: nobody in a leaf finds the moment between.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use latchgate_tests::agent::Agent;
use latchgate_tests::gate::Setup;
use latchgate_tests::http::Connection;
use latchgate_tests::inside::{cgroup, leaves, missing, pins, processes, python, send, wait, with_code};
use latchgate_tests::storm::{Storm, Tally, Targets};
use serde_json::json;

/// Keeps an attacker in a leaf of its own making below `actions`: a gate that starts kills it, and then the next goes in.
struct Siege {
    over: Arc<AtomicBool>,
    thread: JoinHandle<(Vec<Tally>, Arc<Targets>)>,
}

const LEAF: &str = "siege";

impl Siege {
    fn lay(actions: PathBuf, targets: Arc<Targets>) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let over = Arc::clone(&over);
            move || {
                let mut tallies = Vec::new();
                let mut spare = Storm::start("storm_process", &targets);
                for round in 0_u64.. {
                    let leaf = actions.join(format!("{LEAF}{round}"));
                    let mut storm = spare;
                    let entered = std::fs::create_dir(&leaf).and_then(|()| storm.enter(&leaf)).is_ok() && storm.go();
                    spare = Storm::start("storm_process", &targets);
                    while entered && storm.is_alive() && !over.load(Ordering::SeqCst) {
                        std::thread::sleep(Duration::from_millis(2));
                    }
                    tallies.push(if over.load(Ordering::SeqCst) { storm.stop() } else { storm.tally() });
                    if over.load(Ordering::SeqCst) {
                        break;
                    }
                }
                (tallies, targets)
            }
        });
        Self { over, thread }
    }

    fn lift(self) -> (Vec<Tally>, Arc<Targets>) {
        self.over.store(true, Ordering::SeqCst);
        self.thread.join().unwrap()
    }
}

/// Tries to reach the three targets for as long as it lives, from inside an action.
const HAMMER: &str = "
import socket, sys
while True:
    for family, kind, to in ((2, 1, p['v4']), (10, 1, p['v6']), (2, 2, p['udp'])):
        try:
            with socket.socket(family, kind) as s:
                s.settimeout(1)
                s.connect(tuple(to))
                s.send(b'out')
        except OSError:
            pass
";

fn is_of_siege(leaf: &Path) -> bool {
    leaf.file_name().unwrap().to_string_lossy().starts_with(LEAF)
}

#[test]
fn no_crash_leaves_a_moment_open() {
    const CRASHES: u32 = 100;
    if missing(&["/usr/bin/python3"]) {
        return;
    }
    let targets = Arc::new(Targets::default());
    let mut gate = Setup::new("crashes")
        // The start is what is struck; the self-test of the first one stands for the others.
        .config("[sandbox]\nnetwork = \"shared\"\n\n[egress]\nselftest = \"cached\"\n")
        .command("hammers", &python(), "{profile: proxy_allowlist, allowed_domains: [allowed.test]}")
        .start();
    let actions = cgroup(gate.name()).join("actions");
    let params =
        with_code(HAMMER, &json!({"v4": targets.v4.target(), "v6": targets.v6.target(), "udp": targets.udp.target()}));
    gate.kill();
    let siege = Siege::lay(actions.clone(), Arc::clone(&targets));
    let before = targets.reached();
    let refused = format!("port={}", targets.v4.address.port());
    let mut longest = Duration::ZERO;
    for crash in 0..CRASHES / 2 {
        // One that is starting, at another moment of it each time.
        gate.start_and_kill(longest.max(Duration::from_millis(300)) * crash / (CRASHES / 2));
        // One that works, with an action that tries the same.
        let began = Instant::now();
        gate.start();
        longest = longest.max(began.elapsed());
        let agent = Agent::connect(&gate.agent());
        let mut connection = Connection::open(&agent.target).unwrap();
        send(&mut connection, &agent, "hammers", &params).unwrap();
        let leaf = wait("the action", Duration::from_secs(20), || {
            leaves(&gate).into_iter().find(|leaf| !is_of_siege(leaf) && processes(leaf).len() >= 2)
        });
        // All of the siege's attempts are reported too, and the gate reads them one by one.
        wait("an attempt", Duration::from_secs(60), || {
            gate.logged(|line| line.contains("refused by the kernel") && line.contains(&refused)).then_some(())
        });
        std::thread::sleep(Duration::from_millis(u64::from(crash % 7) * 5));
        gate.kill();
        wait("the action's end", Duration::from_secs(10), || processes(&leaf).is_empty().then_some(()));
    }
    let (tallies, _) = siege.lift();
    for tally in &tallies {
        assert_eq!(tally.escapes(), 0, "{tally:?}");
    }
    assert_eq!(targets.reached(), before);
    let attempts: u64 = tallies.iter().map(Tally::total).sum();
    eprintln!("{attempts} attempts of {} attackers in {CRASHES} crashes; none got out", tallies.len());
    assert!(attempts > 1_000_000, "{attempts}: too few to have met every moment");
    assert!(tallies.len() >= 50, "a gate that starts ends what it finds");

    // Without what is pinned, the same attacker in the same place gets out by every way.
    for run in pins(gate.name()) {
        for link in std::fs::read_dir(run).unwrap().flatten() {
            std::fs::remove_file(link.path()).unwrap();
        }
    }
    let leaf = actions.join("unheld");
    std::fs::create_dir(&leaf).unwrap();
    let mut storm = Storm::start("storm_process", &targets);
    storm.enter(&leaf).unwrap();
    assert!(storm.make() && storm.go());
    std::thread::sleep(Duration::from_millis(200));
    let tally = storm.stop();
    assert_eq!(tally.through, tally.attempts);
    assert!(targets.reached() > before);
    wait("the leaf's end", Duration::from_secs(5), || std::fs::remove_dir(&leaf).ok());
    gate.start();
}
