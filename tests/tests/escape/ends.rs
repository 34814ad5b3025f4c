//! Guards of an execution as a whole: whose it is, how long it lasts, and what is left of it.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use latchgate_tests::agent::Agent;
use latchgate_tests::gate::{Gate, Setup};
use latchgate_tests::http::Connection;
use latchgate_tests::inside::{cgroup, inside, leaves, outside, processes, python, receipts, send, wait, with_code};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::technique::{self, NAMES};
use crate::world::{PORTS, Target, token};

const PRELUDE: &str = include_str!("../../escape/prelude.py");
const SOON: Duration = Duration::from_secs(20);

pub fn code(text: &str) -> String {
    format!("{PRELUDE}\n{text}")
}

/// Starts a call that nobody waits for; its connection must be kept.
fn begin(gate: &Gate, agent: &Agent, action: &str, text: &str, params: &Value) -> Connection {
    let mut connection = Connection::open(&gate.agent()).unwrap();
    send(&mut connection, agent, action, &with_code(text, params)).unwrap();
    connection
}

/// What runs in the leaves of a gate, the first processes included.
fn running(gate: &Gate) -> Vec<u32> {
    leaves(gate).iter().flat_map(|leaf| processes(leaf)).collect()
}

/// The port of the proxy, as an action is told.
fn proxy_port(agent: &Agent, target: &Target) -> u64 {
    let text = code("print(json.dumps(proxy()[1]))");
    inside(agent, "names", &text, &target.params("")).0.as_u64().unwrap()
}

#[test]
fn a_descriptor_of_whoever_started_the_gate_does_not_come_along() {
    for (off, expected) in [(vec![], "EBADF"), (vec!["close_descriptors"], "the secret")] {
        let setup = Setup::new("escape-fd").unguarded(&off).command("nothing", &python(), "{profile: none}");
        let secret = setup.directory.join("secret");
        std::fs::write(&secret, "the secret").unwrap();
        let gate = setup.started_by(&format!("exec 9<{}", secret.display())).start();
        let agent = Agent::connect(&gate.agent());
        let text = "def attempt():\n    return os.read(9, 100).decode()\nreport(attempt)";
        let params = json!({"token": "", "v4": "", "v6": "", "port": 0});
        let (said, _) = inside(&agent, "nothing", &code(text), &params);
        assert_eq!(said, expected, "without {off:?}");
    }
}

#[test]
fn what_runs_dies_with_the_gate() {
    for (off, dies) in [(vec![], true), (vec!["die_with_gate"], false)] {
        let setup = Setup::new("escape-die").unguarded(&off).command("nothing", &python(), "{profile: none}");
        let mut gate = setup.start();
        let agent = Agent::connect(&gate.agent());
        let _call = begin(&gate, &agent, "nothing", "import time; time.sleep(15)", &json!({}));
        wait("it runs", SOON, || (running(&gate).len() >= 2).then_some(()));
        gate.kill();
        if dies {
            wait("its end", Duration::from_secs(5), || running(&gate).is_empty().then_some(()));
        } else {
            std::thread::sleep(Duration::from_secs(2));
            assert!(running(&gate).len() >= 2);
        }
    }
}

const LEAVES_A_DAEMON: &str = "
import json, os, time
if os.fork() == 0:
    os.setsid()
    for descriptor in (0, 1, 2):
        os.close(descriptor)
    time.sleep(15)
    os._exit(0)
print(json.dumps('left'))
";

#[test]
fn nothing_stays_after_the_answer() {
    for (off, stays) in [
        (vec![], false),
        (vec!["pid_namespace"], false),
        (vec!["cgroup_kill"], false),
        (vec!["pid_namespace", "cgroup_kill"], true),
    ] {
        let setup = Setup::new("escape-stay").unguarded(&off).command("nothing", &python(), "{profile: none}");
        let gate = setup.start();
        let agent = Agent::connect(&gate.agent());
        let (said, _) = inside(&agent, "nothing", LEAVES_A_DAEMON, &json!({}));
        assert_eq!(said, "left");
        assert_eq!(!running(&gate).is_empty(), stays, "without {off:?}");
    }
}

/// Ends, and leaves somebody with its output who has more to say.
const SPEAKS_LATE: &str = "
import json, os, sys, time
if os.fork() == 0:
    os.setsid()
    time.sleep(1)
    os.write(1, b'late')
    os._exit(0)
print(json.dumps('in time'), end='', flush=True)
";

#[test]
fn nothing_is_added_to_the_answer_after_the_end() {
    let here = Command::new("/usr/bin/python3").args(["-c", SPEAKS_LATE]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&here.stdout), "\"in time\"late");
    for (off, late) in [(vec![], false), (vec!["pid_namespace"], true)] {
        let setup = Setup::new("escape-late-word").unguarded(&off).command("nothing", &python(), "{profile: none}");
        let gate = setup.start();
        let agent = Agent::connect(&gate.agent());
        let answer = agent.execute("nothing", &with_code(SPEAKS_LATE, &json!({}))).json();
        assert_eq!(answer["output"] == "in time", !late, "without {off:?}: {answer}");
        // Both words together are no JSON.
        assert_eq!(answer["reason"] == "the command's standard output is not JSON", late, "without {off:?}: {answer}");
    }
}

/// Takes, and writes to, twice the memory that the action has.
const TAKES_MEMORY: &str = "
import json
try:
    taken = bytearray(b'x' * (1 << 20)) * 800
    print(json.dumps(len(taken)))
except MemoryError:
    print(json.dumps('no memory'))
";

#[test]
fn no_more_memory_than_it_has() {
    let all = json!(800 << 20);
    assert_eq!(outside(TAKES_MEMORY, &json!({})), all);
    for (off, gets_it) in [(vec![], false), (vec!["resource_limits"], true)] {
        let setup = Setup::new("escape-memory").unguarded(&off);
        let gate = setup.roomy_command("nothing", &python(), "{profile: none}", 400).start();
        let agent = Agent::connect(&gate.agent());
        let answer = agent.execute("nothing", &with_code(TAKES_MEMORY, &json!({}))).json();
        assert_eq!(answer["output"] == all, gets_it, "without {off:?}: {answer}");
        // By its address space it is told; by its cgroup it is killed.
        let told = answer["output"] == "no memory" || answer["reason"] == "out_of_memory";
        assert_eq!(told, !gets_it, "without {off:?}: {answer}");
    }
}

#[test]
fn a_connection_of_whoever_started_the_gate_does_not_come_along() {
    let target = Target::start();
    for (off, gets_out) in [(vec![], false), (vec!["close_descriptors"], true)] {
        let connects = format!("exec 9<>/dev/tcp/{}/{}", target.v4, PORTS[0]);
        let setup = Setup::new("escape-before").unguarded(&off).command("nothing", &python(), "{profile: none}");
        let gate = setup.started_by(&connects).start();
        let agent = Agent::connect(&gate.agent());
        let params = target.params(&token());
        let text = "
def attempt():
    with socket.socket(fileno=9) as s:
        converse(s)
report(attempt)";
        let (said, receipt) = inside(&agent, "nothing", &code(text), &params);
        let heard = target.heard(params["token"].as_str().unwrap(), Duration::from_secs(1));
        assert_eq!((said == "ok", heard), (gets_out, gets_out), "without {off:?}: {said} {receipt:#}");
        assert_eq!(said == "EBADF", !gets_out, "without {off:?}: {said}");
    }
}

/// Connects to the proxy for some seconds and says what it came to, each outcome once.
const CONNECTS: &str = "
said = set()
until = time.time() + p['seconds']
while time.time() < until:
    time.sleep(0.1)
    try:
        s = socket.socket()
    except PermissionError:
        said.add('EPERM')
        continue
    s.settimeout(0.5)
    said.add(errno.errorcode.get(s.connect_ex(proxy()), 'ok'))
    s.close()
print(json.dumps(sorted(said)))
";

fn signal(gate: &Gate, signal: Signal) {
    kill_process(Pid::from_raw(i32::try_from(gate.pid()).unwrap()).unwrap(), signal).unwrap();
}

#[test]
fn a_gate_that_has_stopped_closes_what_runs() {
    let target = Target::start();
    for (off, closes) in [(vec![], true), (vec!["heartbeat"], false)] {
        let (gate, agent) = technique::gate(&target, "shared", &off);
        let mut params = target.params("");
        params["seconds"] = json!(7);
        let call = std::thread::scope(|scope| {
            let call = scope.spawn(|| inside(&agent, "names", &code(CONNECTS), &params));
            wait("it runs", SOON, || (running(&gate).len() >= 2).then_some(()));
            std::thread::sleep(Duration::from_secs(1));
            signal(&gate, Signal::STOP);
            std::thread::sleep(Duration::from_secs(4));
            signal(&gate, Signal::CONT);
            call.join().unwrap()
        });
        let said = call.0.as_array().unwrap();
        assert!(said.contains(&json!("ok")), "{said:?}");
        assert_eq!(said.contains(&json!("EPERM")), closes, "without {off:?}: {said:?}");
    }
}

/// Only a gate that does not end it lets an execution live to its deadline, so the heartbeat is off in both.
#[test]
fn an_execution_is_closed_when_its_time_is_over() {
    let target = Target::start();
    std::thread::scope(|scope| {
        for (off, closes) in [(vec!["heartbeat"], true), (vec!["heartbeat", "deadline"], false)] {
            let target = &target;
            scope.spawn(move || {
                let yaml = format!(
                    "action_id: names\nversion: \"1\"\nprovider_module_digest: builtin:command\n\
                     command: {{argv: [/bin/sh, -c, {}]}}\nio: {{request_schema: {{type: object}}}}\n\
                     resource_limits: {{timeout_seconds: 2}}\n\
                     egress: {{profile: proxy_allowlist, allowed_domains: [{{domain: {}, ports: [4000]}}]}}\n\
                     risk_level: low\nverifier_kind: none\n",
                    Value::from(python()),
                    NAMES[0],
                );
                let setup = Setup::new("escape-late").unguarded(&off).manifest("names", &yaml);
                let gate = setup.config("[sandbox]\nnetwork = \"shared\"\n").start();
                let agent = Agent::connect(&gate.agent());
                let mut params = target.params("");
                params["seconds"] = json!(30);
                let _call = begin(&gate, &agent, "names", &code(CONNECTS), &params);
                wait("it runs", SOON, || (running(&gate).len() >= 2).then_some(()));
                signal(&gate, Signal::STOP);
                // The action's two seconds, and the ten that its entry lives longer.
                std::thread::sleep(Duration::from_secs(16));
                signal(&gate, Signal::CONT);
                let receipt = wait("its receipt", SOON, || receipts(&gate).pop());
                let denied = receipt["egress_evidence"][0]["kernel"]["denied"]["sock_create"].as_u64().unwrap();
                assert_eq!(denied > 0, closes, "without {off:?}: {receipt:#}");
            });
        }
    });
}

/// A process in a leaf that the gate knows nothing of.
#[test]
fn what_was_not_admitted_reaches_nothing() {
    let target = Target::start();
    let all = vec!["entry", "flow_limit", "egress", "ingress"];
    for (off, said) in [
        (vec![], "EPERM"),
        (vec!["flow_limit", "egress", "ingress"], "EPERM"),
        (vec!["entry", "egress", "ingress"], "EPERM"),
        (vec!["entry", "flow_limit", "ingress"], "timeout"),
        (all, "ok"),
    ] {
        let (gate, agent) = technique::gate(&target, "shared", &off);
        let mut params = target.params("");
        params["proxy"] = json!(proxy_port(&agent, &target));
        let leaf: PathBuf = cgroup(gate.name()).join("actions/of-nobody");
        std::fs::create_dir(&leaf).unwrap();
        params["leaf"] = json!(leaf);
        let text = "
def attempt():
    with open(p['leaf'] + '/cgroup.procs', 'w') as file:
        file.write('0')
    with socket.socket() as s:
        s.settimeout(PATIENCE)
        s.connect(('127.0.0.1', p['proxy']))
report(attempt)";
        assert_eq!(outside(&code(text), &params), said, "without {off:?}");
        wait("its end", SOON, || std::fs::remove_dir(&leaf).ok());
    }
}

#[test]
fn a_stranger_is_not_served_as_an_execution_that_runs() {
    let target = Target::start();
    for (off, gets_out) in [(vec![], false), (vec!["attribution"], true)] {
        let (gate, agent) = technique::gate(&target, "shared", &off);
        let mut params = target.params(&token());
        params["proxy"] = json!(proxy_port(&agent, &target));
        params["name"] = json!(NAMES[0]);
        params["stranger"] = json!(true);
        let _call = begin(&gate, &agent, "names", "import time; time.sleep(12); print(1)", &json!({}));
        wait("it runs", SOON, || (running(&gate).len() >= 2).then_some(()));
        let text = "
os.environ['HTTP_PROXY'] = 'http://127.0.0.1:%d' % p['proxy']
";
        let text = format!("{text}{}\nreport(attempt)", include_str!("../../escape/by_proxy.py"));
        let said = outside(&code(&text), &params);
        let heard = target.heard(params["token"].as_str().unwrap(), Duration::from_secs(1));
        assert_eq!((said == "ok", heard), (gets_out, gets_out), "without {off:?}: {said}");
    }
}

/// An execution that may use the proxy hands a socket of its own to one that may not.
#[test]
fn a_socket_of_another_execution_is_of_no_use() {
    let target = Target::start();
    let gives = "
listener = socket.socket(socket.AF_UNIX)
listener.bind('\\0' + p['token'])
listener.listen()
listener.settimeout(10)
stream, _ = listener.accept()
with socket.socket() as s:
    socket.send_fds(stream, [json.dumps(proxy()).encode()], [s.fileno()])
stream.settimeout(10)
stream.recv(1)
print(json.dumps('gave'))
";
    let takes = "
def attempt():
    until = time.time() + 8
    while True:
        stream = socket.socket(socket.AF_UNIX)
        try:
            stream.connect('\\0' + p['token'])
            break
        except ConnectionRefusedError:
            if time.time() > until:
                raise
            time.sleep(0.05)
    said, descriptors, _, _ = socket.recv_fds(stream, 100, 1)
    with socket.socket(fileno=descriptors[0]) as s:
        s.settimeout(PATIENCE)
        s.connect(tuple(json.loads(said)))
        s.sendall(('CONNECT %s:%d HTTP/1.1\\r\\nhost: %s\\r\\n\\r\\n' % (p['name'], PORT, p['name'])).encode())
        s.recv(4096)
        converse(s)
report(attempt)";
    for (off, gets_out) in [
        (vec!["seccomp:socket_families", "landlock"], false),
        (vec!["seccomp:socket_families", "landlock", "foreign_socket"], true),
    ] {
        let (gate, agent) = technique::gate(&target, "shared", &off);
        let mut params = target.params(&token());
        params["name"] = json!(NAMES[0]);
        let _call = begin(&gate, &agent, "names", &code(gives), &params);
        let (said, receipt) = inside(&agent, "nothing", &code(takes), &params);
        let heard = target.heard(params["token"].as_str().unwrap(), Duration::from_secs(1));
        assert_eq!((said == "ok", heard), (gets_out, gets_out), "without {off:?}: {said} {receipt:#}");
        if !gets_out {
            assert_eq!(said, "EPERM");
            let flows = receipt["egress_evidence"].as_array().unwrap();
            assert!(flows.iter().any(|flow| flow["rule"] == "foreign_socket"), "{receipt:#}");
        }
    }
}
