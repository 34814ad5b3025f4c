//! SIGKILL, and what the next gate of the same name finds.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use latchgate_tests::agent::Agent;
use latchgate_tests::gate::{Gate, Setup};
use latchgate_tests::inside::{
    Counting, cgroup, inside, leaves, missing, pins, processes, python, receipts, try_execute, uid_of, verified, wait,
    with_code,
};
use serde_json::json;

use crate::{asking, reaching};

const UIDS: u32 = 64;

/// Uids that no other gate on this machine uses.
fn uid_base(which: u32) -> u32 {
    0x5000_0000 + (std::process::id() % 0x10_0000) * 0x100 + which * UIDS
}

fn with_uids(setup: Setup, base: u32) -> Setup {
    setup.config(&format!("[sandbox]\nuid_base = {base}\nuid_count = {UIDS}\nmax_concurrent = {UIDS}\n"))
}

/// Every process on this machine with an uid of the range.
fn running(base: u32) -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| uid_of(*pid).is_some_and(|uid| (base..base + UIDS).contains(&uid)))
        .collect()
}

/// A process of the test's, to be put where an action was.
struct Actor {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Actor {
    fn start() -> Self {
        let script = "
import errno, socket, sys
print('ready', flush=True)
for line in sys.stdin:
    host, port = line.split()
    try:
        socket.create_connection((host, int(port)), 5).close()
        print('ok', flush=True)
    except OSError as error:
        print(errno.errorcode.get(error.errno, error), flush=True)
";
        let mut child = Command::new("/usr/bin/python3")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (stdin, stdout) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut actor = Self { child, stdin, stdout };
        assert_eq!(actor.line(), "ready");
        actor
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn connect(&mut self, to: SocketAddr) -> String {
        writeln!(self.stdin, "{} {}", to.ip(), to.port()).unwrap();
        self.line()
    }

    fn enter(&self, cgroup: &Path) {
        std::fs::write(cgroup.join("cgroup.procs"), self.child.id().to_string()).unwrap();
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Connects to a listener and to the proxy for as long as it lives, from two processes, one of them nobody's child.
const HAMMERS: &str = "
import time
def hammer():
    while True:
        for address in (tuple(p['target']), ('127.0.0.1', PROXY)):
            try:
                socket.create_connection(address, 1).close()
            except OSError:
                pass
        time.sleep(0.005)

if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        hammer()
    os._exit(0)
hammer()
";

#[test]
fn what_runs_when_the_gate_is_killed_stays_confined_and_ends() {
    if missing(&["/usr/bin/python3"]) {
        return;
    }
    let listener = Counting::tcp("127.0.0.1:0");
    let base = uid_base(0);
    let mut gate = with_uids(Setup::new("killed"), base)
        .command("hammers", &python(), &reaching("allowed.test", 443))
        .command("says", "echo '{\"said\": 1}'", "{profile: none}")
        .start();
    let agent = Agent::connect(&gate.agent());
    let (proxy, _) = inside(&agent, "hammers", &asking("print(PROXY)"), &json!({}));
    let proxy = SocketAddr::from(([127, 0, 0, 1], u16::try_from(proxy.as_u64().unwrap()).unwrap()));
    let (mut within, mut without) = (Actor::start(), Actor::start());
    assert_eq!((within.connect(listener.address), without.connect(listener.address)), ("ok".into(), "ok".into()));

    let params = with_code(&asking(HAMMERS), &json!({"target": listener.target()}));
    let leaf = std::thread::scope(|scope| {
        let call = scope.spawn(|| try_execute(&agent, "hammers", &params));
        let leaf = wait("the action", Duration::from_secs(20), || {
            leaves(&gate).into_iter().find(|leaf| processes(leaf).len() >= 3)
        });
        let refused = format!("port={}", listener.address.port());
        wait("an attempt", Duration::from_secs(20), || {
            gate.logged(|line| line.contains("refused by the kernel") && line.contains(&refused)).then_some(())
        });
        assert!(running(base).len() >= 3, "{:?}", running(base));
        gate.kill();
        assert!(call.join().unwrap().is_err(), "nobody can have answered");
        leaf
    });
    let killed = Instant::now();

    // At once, with nobody there: whoever is in the leaf is held, and the program that holds it is pinned.
    within.enter(&leaf);
    assert_eq!(within.connect(listener.address), "EPERM");
    let generation = pins(gate.name());
    assert_eq!(generation.len(), 1, "{generation:?}");
    assert!(std::fs::read_dir(&generation[0]).unwrap().count() >= 8);
    // Somebody else takes the proxy's port. Once the heartbeat has stopped for two seconds, that too is out of reach.
    let impostor = Counting::tcp(&proxy.to_string());
    assert_eq!(without.connect(proxy), "ok");
    wait("the heartbeat's end", Duration::from_secs(5), || (within.connect(proxy) == "EPERM").then_some(()));
    assert!(killed.elapsed() > Duration::from_millis(500), "it was closed by something else");
    let before = impostor.reached();
    assert_eq!((within.connect(proxy), without.connect(proxy)), ("EPERM".into(), "ok".into()));
    assert_eq!(impostor.reached(), before + 1);

    wait("the end of the action", Duration::from_secs(10), || running(base).is_empty().then_some(()));
    assert_eq!(processes(&leaf), [within.child.id()]);
    let report = verified(&gate);
    assert_eq!((&report["intents"], &report["receipts"], &report["open_intents"]), (&json!(2), &json!(1), &json!(1)));
    assert_eq!(without.connect(listener.address), "ok");
    assert_eq!(listener.reached(), 3, "the test's own three");

    // The next gate ends what is left in the leaf, closes the intent, and works.
    gate.start();
    assert_eq!(within.child.wait().unwrap().signal(), Some(9));
    assert!(!leaf.exists());
    let now = pins(gate.name());
    assert!(now.len() == 1 && now != generation, "{now:?} after {generation:?}");
    assert!(gate.logged(|line| line.contains("closed an execution that a dead gate left open")));
    let agent = Agent::connect(&gate.agent());
    let newest = receipts(&gate).remove(0);
    let closing = agent.receipt(newest["receipt_id"].as_str().unwrap()).json();
    assert_eq!(closing["signature_status"], "valid");
    assert_eq!(
        (&closing["normalized_result"]["kind"], &closing["action_id"]),
        (&json!("internal_error"), &json!("hammers"))
    );
    assert_eq!((&closing["principal"], &closing["session_id"]), (&json!("tester"), &newest["session_id"]));
    let answer = agent.execute("says", &json!({}));
    assert_eq!((answer.status, &answer.json()["output"]), (200, &json!({"said": 1})));
    let report = verified(&gate);
    assert_eq!((&report["intents"], &report["receipts"], &report["open_intents"]), (&json!(3), &json!(3), &json!(0)));
    assert_eq!(listener.reached(), 3);
}

#[test]
fn ten_restarts_leave_nothing_behind() {
    if missing(&["/usr/bin/python3"]) {
        return;
    }
    let base = uid_base(1);
    let mut gate = with_uids(Setup::new("restarts"), base)
        .command("sleeps", "sleep 60; echo '{}'", "{profile: none}")
        .command("says", "echo '{}'", "{profile: none}")
        .start();
    let clean = |gate: &Gate| {
        assert_eq!(leaves(gate), Vec::<std::path::PathBuf>::new());
        assert_eq!(running(base), Vec::<u32>::new());
        assert_eq!(pins(gate.name()).len(), 1);
        assert_eq!(processes(&cgroup(gate.name()).join("gate")), [gate.pid()]);
        assert_eq!(processes(&cgroup(gate.name()).join("actions")), Vec::<u32>::new());
    };
    clean(&gate);
    for round in 0..10 {
        let agent = Agent::connect(&gate.agent());
        assert_eq!(agent.execute("says", &json!({})).status, 200);
        if round % 2 == 0 {
            std::thread::scope(|scope| {
                let call = scope.spawn(|| try_execute(&agent, "sleeps", &json!({})));
                wait("the action", Duration::from_secs(20), || (running(base).len() >= 2).then_some(()));
                assert!(!leaves(&gate).is_empty());
                gate.kill();
                assert!(call.join().unwrap().is_err());
            });
        } else {
            assert_eq!(gate.stop(), 0);
            assert_eq!(running(base), Vec::<u32>::new());
        }
        gate.start();
        clean(&gate);
    }
    let report = verified(&gate);
    assert_eq!((&report["receipts"], &report["open_intents"]), (&json!(15), &json!(0)));
    let kinds: Vec<String> = receipts(&gate)
        .iter()
        .map(|receipt| receipt["normalized_result"]["kind"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(kinds.iter().filter(|kind| *kind == "success").count(), 10);
    assert_eq!(kinds.iter().filter(|kind| *kind == "internal_error").count(), 5);
}
