//! The gate as a whole when somebody hangs up, floods it, takes its footing away or stops it: it refuses, it does not
//! forget, and it leaves nothing behind.

#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used)]

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use latchgate_tests::agent::Agent;
use latchgate_tests::gate::{Gate, Setup};
use latchgate_tests::http::{Response, once};
use serde_json::{Value, json};

const NONE: &str = "{profile: none}";

fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(began.elapsed() < Duration::from_secs(30), "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn receipts(gate: &Gate) -> Vec<Value> {
    let ledger = gate.ledger();
    let (code, out, said) =
        gate.cli(&["receipts", "list", "--json", "--limit", "1000", "--ledger", ledger.to_str().unwrap()]);
    assert_eq!(code, 0, "{said}");
    out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn socket(gate: &Gate) -> PathBuf {
    gate.directory().join("agent/gate.sock")
}

/// Sends a call on a connection of its own, for whoever holds it to hang up.
fn send(gate: &Gate, agent: &Agent, action: &str, params: &Value) -> UnixStream {
    let (path, body) = (format!("/v1/actions/{action}/execute"), params.to_string());
    let mut stream = UnixStream::connect(socket(gate)).unwrap();
    write!(
        stream,
        "POST {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: {}\r\ndpop: {}\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        agent.authorization(),
        agent.proof("POST", &path),
        body.len()
    )
    .unwrap();
    stream
}

fn get(gate: &Gate, path: &str) -> Response {
    once(&gate.agent(), "GET", path, &[], None)
}

/// The cgroup directory of this gate's executions.
fn actions(gate: &Gate) -> PathBuf {
    let text = std::fs::read_to_string(format!("/proc/{}/cgroup", gate.pid())).unwrap();
    let own = text.lines().find_map(|line| line.strip_prefix("0::/")).unwrap().to_owned();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let root = mounts.lines().find(|line| line.contains(" - cgroup2 ")).unwrap().split(' ').nth(4).unwrap();
    PathBuf::from(root).join(own).parent().unwrap().join("actions")
}

fn leaves(gate: &Gate) -> usize {
    std::fs::read_dir(actions(gate)).unwrap().filter(|entry| entry.as_ref().unwrap().path().is_dir()).count()
}

fn is_running(gate: &Gate) -> bool {
    leaves(gate) > 0
}

#[test]
fn a_drain_ends_what_nobody_waits_for_and_keeps_its_receipt() {
    let setup = Setup::new("attack-drain").config("[limits]\ndrain_seconds = 1\n");
    let mut gate = setup.command("long", "sleep 19; echo '{}'", NONE).start();
    let agent = Agent::connect(&gate.agent());
    let stream = send(&gate, &agent, "long", &json!({}));
    wait_for("it runs", || is_running(&gate).then_some(()));
    drop(stream);
    assert_eq!(gate.stop(), 0);
    let receipts = receipts(&gate);
    assert_eq!(receipts.len(), 1);
    assert_eq!(receipts[0]["normalized_result"]["kind"], "cancelled", "{}", receipts[0]);
    assert_eq!(gate.verify().0, 0);
}

#[test]
fn a_drain_waits_for_what_nobody_waits_for() {
    let setup = Setup::new("attack-patience").config("[limits]\ndrain_seconds = 60\n");
    let mut gate = setup.command("long", "sleep 12; echo '{}'", NONE).start();
    let agent = Agent::connect(&gate.agent());
    let stream = send(&gate, &agent, "long", &json!({}));
    wait_for("it runs", || is_running(&gate).then_some(()));
    drop(stream);
    assert_eq!(gate.stop(), 0);
    let receipts = receipts(&gate);
    assert_eq!(receipts.len(), 1);
    assert_eq!(receipts[0]["normalized_result"]["kind"], "success", "{}", receipts[0]);
}

#[test]
fn an_agent_that_waits_through_a_drain_hears_how_it_ended() {
    let setup = Setup::new("attack-answer").config("[limits]\ndrain_seconds = 1\n");
    let mut gate = setup.command("long", "sleep 19; echo '{}'", NONE).start();
    let agent = Agent::connect(&gate.agent());
    let waiting = std::thread::spawn(move || agent.execute("long", &json!({})));
    wait_for("it runs", || is_running(&gate).then_some(()));
    assert_eq!(gate.stop(), 0);
    let answer = waiting.join().unwrap();
    assert_eq!(answer.code(), "502 action_execution_failed");
    let receipts = receipts(&gate);
    assert_eq!(answer.json()["receipt_id"], receipts[0]["receipt_id"]);
    assert_eq!(receipts[0]["normalized_result"]["kind"], "cancelled");
}

#[test]
fn whoever_hangs_up_and_calls_again_is_told_to_wait() {
    let setup = Setup::new("attack-flood").config("[sandbox]\nmax_concurrent = 1\nmax_waiting = 3\n");
    let gate = setup.command("long", "sleep 3; echo '{}'", NONE).start();
    let agent = Agent::connect(&gate.agent());
    // Each one is let in before the next: the gate counts it when its intent is written.
    let running = || {
        let log = std::fs::read(gate.ledger().join("ledger.db-wal")).unwrap_or_default();
        let needle = b"execution.intent";
        log.windows(needle.len()).filter(|window| window == needle).count()
    };
    let mut before = running();
    for _ in 0..4 {
        let stream = send(&gate, &agent, "long", &json!({}));
        wait_for("its intent", || (running() > before).then_some(()));
        before = running();
        drop(stream);
    }
    let answer = agent.execute("long", &json!({}));
    assert_eq!(answer.code(), "429 rate_limited");
    assert_eq!(answer.header("retry-after"), Some("1"));
    // Its time comes again, nothing was lost of those that hung up, and the refused one was not paid for or begun.
    let answer = wait_for("a place", || Some(agent.execute("long", &json!({}))).filter(|answer| answer.status != 429));
    assert_eq!(answer.status, 200, "{}", answer.code());
    wait_for("all receipts", || (receipts(&gate).len() == 5).then_some(()));
    assert!(receipts(&gate).iter().all(|receipt| receipt["normalized_result"]["kind"] == "success"));
}

/// Detaches every link of a run by the kernel's own call: what a process with CAP_NET_ADMIN can do at any time.
const DETACH: &str = r#"
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def bpf(command, attributes):
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result = libc.syscall(321, command, buffer, len(attributes))
    if result < 0: raise OSError(ctypes.get_errno(), "bpf")
    return result
for directory, _, names in os.walk(sys.argv[1]):
    for name in names:
        path = ctypes.create_string_buffer(os.path.join(directory, name).encode())
        try:
            link = bpf(7, struct.pack("=QIIII", ctypes.addressof(path), 0, 0, 0, 0))
            bpf(34, struct.pack("=I", link))
            print("detached", name)
        except OSError:
            pass
"#;

#[cfg(target_arch = "x86_64")]
#[test]
fn without_the_kernel_program_nothing_runs() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let script = format!(
        "exec python3 -c 'import socket, json; s = socket.socket(); s.settimeout(5)\n\
         print(json.dumps({{\"connect\": s.connect_ex((\"127.0.0.1\", {port}))}}))'"
    );
    let connect = format!(
        "action_id: connect\nversion: \"1\"\nprovider_module_digest: builtin:command\n\
         command: {{argv: [/bin/sh, -c, {}]}}\nio: {{request_schema: {{type: object}}}}\n\
         egress: {{profile: none}}\nrisk_level: low\nverifier_kind: none\n",
        Value::from(script)
    );
    let gate = Setup::new("attack-detach").manifest("connect", &connect).start();
    let agent = Agent::connect(&gate.agent());
    let held = agent.execute("connect", &json!({})).json();
    assert_eq!(held["output"], json!({"connect": libc::EPERM}), "{held}");
    assert_eq!(get(&gate, "/readyz").status, 200);

    let pins = format!("/sys/fs/bpf/latchgate/{}", gate.name());
    let output = std::process::Command::new("python3").args(["-c", DETACH, &pins]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.lines().count() >= 8, "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(get(&gate, "/readyz").code(), "503 not_ready");

    let open = agent.execute("connect", &json!({}));
    assert_eq!(open.code(), "502 action_execution_failed", "{}", open.json());
    let last = receipts(&gate).remove(0);
    assert_eq!(last["receipt_id"], open.json()["receipt_id"]);
    assert_eq!(last["failure_class"], "not_started", "{last}");
    assert_eq!(leaves(&gate), 0);
}

#[test]
fn a_ledger_that_stopped_is_not_ready() {
    let gate = Setup::new("attack-ledger").command("echo", "cat", NONE).start();
    let agent = Agent::connect(&gate.agent());
    assert_eq!(agent.execute("echo", &json!({})).status, 200);
    assert_eq!(get(&gate, "/readyz").status, 200);
    // Somebody writes past the lock.
    let change =
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('UPDATE head SET hash = 0'); c.commit()";
    let database = gate.ledger().join("ledger.db");
    assert!(std::process::Command::new("python3").arg("-c").arg(change).arg(&database).status().unwrap().success());
    assert_eq!(agent.execute("echo", &json!({})).code(), "500 evidence_persistence_failed");
    assert_eq!(get(&gate, "/readyz").code(), "503 not_ready");
    assert_eq!(get(&gate, "/healthz").status, 200);
    assert_eq!(leaves(&gate), 0);
}

#[test]
fn a_slow_policy_holds_up_nobody_else() {
    let setup = Setup::new("attack-policy")
        .config("[definitions]\nmanifests = \"{dir}/manifests\"\npolicy = \"{dir}/policy\"\n")
        .command("echo", "cat", NONE);
    let policy = setup.directory.join("policy");
    std::fs::create_dir(&policy).unwrap();
    let slow = "package latchgate\nimport rego.v1\n\
        default decision := {\"allow\": false}\n\
        decision := {\"allow\": true} if {\n  not input.params.slow\n}\n\
        else := {\"allow\": false, \"deny_reason\": \"counted\"} if {\n  input.params.slow == true\n\
          count([1 | some a in numbers.range(1, 3000); some b in numbers.range(1, 3000); a * b == 7]) > 0\n}\n";
    std::fs::write(policy.join("slow.rego"), slow).unwrap();
    let gate = setup.start();
    let agent = Agent::connect(&gate.agent());
    assert_eq!(agent.execute("echo", &json!({})).status, 200);
    // One decision is timed out after a second; more of them at once than the gate has threads for its sockets.
    let many = 4 * std::thread::available_parallelism().unwrap().get();
    let began = Instant::now();
    let slow: Vec<_> = (0..many).map(|_| send(&gate, &agent, "echo", &json!({"slow": true}))).collect();
    std::thread::sleep(Duration::from_millis(200));
    let asked = Instant::now();
    assert_eq!(get(&gate, "/healthz").status, 200);
    let (waited, so_far) = (asked.elapsed(), began.elapsed());
    for mut stream in slow {
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut head = [0; 12];
        std::io::Read::read_exact(&mut stream, &mut head).unwrap();
        assert_eq!(&head, b"HTTP/1.1 503");
    }
    // Not one of them had its answer yet.
    assert!(so_far < Duration::from_secs(1), "{waited:?} for /healthz");
}

#[test]
fn no_way_of_failing_leaves_anything_behind() {
    let long = "{profile: proxy_allowlist, allowed_domains: [origin.test]}";
    let setup = Setup::new("attack-remains")
        .command("echo", "cat", NONE)
        .command("failing", "exit 9", long)
        .command("chatty", "head -c 3000000 /dev/zero", NONE)
        .command("forking", "for i in 1 2 3; do (setsid sleep 30 &) ; done; echo '{}'", NONE)
        .command("killed", "kill -9 $$", NONE)
        .command("long", "sleep 3; echo '{}'", long)
        .manifest(
            "missing",
            "action_id: missing\nversion: \"1\"\nprovider_module_digest: builtin:command\n\
             command: {argv: [/no/such/program]}\nio: {request_schema: {type: object}}\n\
             egress: {profile: none}\nrisk_level: low\nverifier_kind: none\n",
        )
        .manifest(
            "hasty",
            "action_id: hasty\nversion: \"1\"\nprovider_module_digest: builtin:command\n\
             command: {argv: [/bin/sleep, \"30\"]}\nio: {request_schema: {type: object}}\n\
             resource_limits: {timeout_seconds: 1}\negress: {profile: none}\nrisk_level: low\nverifier_kind: none\n",
        );
    let mut gate = setup.start();
    let agent = Agent::connect(&gate.agent());
    let descriptors = |gate: &Gate| std::fs::read_dir(format!("/proc/{}/fd", gate.pid())).unwrap().count();
    let entries = || {
        let maps = aya::maps::loaded_maps().flatten().filter(|map| map.name_as_str() == Some("LEAVES"));
        let held = maps.filter_map(|map| aya::maps::MapData::from_id(map.id()).ok());
        let held =
            held.filter_map(|map| aya::maps::HashMap::<_, u64, [u64; 4]>::try_from(aya::maps::Map::HashMap(map)).ok());
        held.flat_map(|map| map.keys().flatten().collect::<Vec<u64>>()).collect::<std::collections::BTreeSet<u64>>()
    };
    let inode = |path: PathBuf| std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path).unwrap());
    let round = |expected: &[(&str, u16)]| {
        for (action, status) in expected {
            assert_eq!(agent.execute(action, &json!({})).status, *status, "{action}");
        }
    };
    let all: [(&str, u16); 7] = [
        ("echo", 200),
        ("failing", 502),
        ("chatty", 502),
        ("forking", 200),
        ("killed", 502),
        ("missing", 502),
        ("hasty", 502),
    ];
    round(&all);
    let before = descriptors(&gate);
    // One that runs has an entry: the check below can see.
    let stream = send(&gate, &agent, "long", &json!({}));
    let leaf = wait_for("it runs", || {
        let mut found = std::fs::read_dir(actions(&gate)).unwrap().flatten().filter(|entry| entry.path().is_dir());
        found.next().map(|entry| inode(entry.path()))
    });
    wait_for("its entry", || entries().contains(&leaf).then_some(()));
    drop(stream);
    round(&all);
    round(&all);
    wait_for("no leaf", || (leaves(&gate) == 0).then_some(()));
    assert!(!entries().contains(&leaf));
    wait_for("no more descriptors than before", || (descriptors(&gate) <= before).then_some(()));
    assert_eq!(gate.stop(), 0);
    assert_eq!(receipts(&gate).len(), 22);
    assert_eq!(gate.verify().0, 0);
}

#[test]
fn a_call_whose_body_comes_after_the_drain_began_is_not_begun() {
    let mut gate = Setup::new("attack-late").command("echo", "cat", NONE).start();
    let agent = Agent::connect(&gate.agent());
    assert_eq!(agent.execute("echo", &json!({"a": 1})).status, 200);
    let path = "/v1/actions/echo/execute";
    let mut stream = UnixStream::connect(socket(&gate)).unwrap();
    write!(
        stream,
        "POST {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: {}\r\ndpop: {}\r\n\
         content-type: application/json\r\ncontent-length: 8\r\nexpect: 100-continue\r\n\r\n",
        agent.authorization(),
        agent.proof("POST", path)
    )
    .unwrap();
    // The gate asks for the body: it has let the request in.
    let mut asked = [0; 25];
    std::io::Read::read_exact(&mut stream, &mut asked).unwrap();
    assert!(asked.starts_with(b"HTTP/1.1 100"), "{}", String::from_utf8_lossy(&asked));
    let pid = rustix::process::Pid::from_raw(i32::try_from(gate.pid()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    wait_for("the drain", || gate.logged(|line| line.contains("draining")).then_some(()));
    stream.write_all(b"{\"a\": 2}").unwrap();
    let mut answer = String::new();
    std::io::Read::read_to_string(&mut stream, &mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("\"draining\""), "{answer}");
    assert_eq!(gate.stop(), 0);
    assert_eq!(receipts(&gate).len(), 1);
}
