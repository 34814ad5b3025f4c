//! One fault at a time: it does not start, or it drops, and says why.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use latchgate_tests::agent::Agent;
use latchgate_tests::gate::{Gate, Setup};
use latchgate_tests::http::{Response, once};
use latchgate_tests::inside::{cgroup, missing, pins, python, receipts, wait, with_code};
use latchgate_tests::storm::{Storm, Targets};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const NONE: &str = "{profile: none}";

fn get(gate: &Gate, path: &str) -> Response {
    once(&gate.agent(), "GET", path, &[], None)
}

/// Runs what follows with one command of bpf(2), or all of a list, refused by the kernel.
const WITHOUT: &str = r#"
import ctypes, os, struct, sys
commands, argv = [int(c) for c in sys.argv[1].split(",")], sys.argv[2:]
load, equal, give = 0x20, 0x15, 0x06
code = [(load, 0, 0, 0), (equal, 0, len(commands) + 1, 321), (load, 0, 0, 16)]
code += [(equal, len(commands) - at, 0, command) for at, command in enumerate(commands)]
code += [(give, 0, 0, 0x7fff0000), (give, 0, 0, 0x00050001)]
text = b"".join(struct.pack("=HBBI", *one) for one in code)
text = ctypes.create_string_buffer(text, len(text))
program = struct.pack("=HxxxxxxQ", len(code), ctypes.addressof(text))
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(22, 2, ctypes.create_string_buffer(program, len(program)), 0, 0):
    raise OSError(ctypes.get_errno(), "seccomp")
os.execv(argv[0], argv)
"#;

/// An attacker in a leaf of its own below `actions` is held.
fn assert_held(gate: &Gate, targets: &Targets, when: &str) {
    let leaf = cgroup(gate.name()).join("actions/outsider");
    std::fs::create_dir(&leaf).unwrap();
    let mut storm = Storm::start("storm_process", targets);
    storm.enter(&leaf).unwrap();
    assert!(storm.make() && storm.go());
    wait("attempts", Duration::from_secs(10), || (storm.tally().total() > 1_000).then_some(()));
    let tally = storm.stop();
    assert_eq!(tally.escapes(), 0, "{when}: {tally:?}");
    wait("the leaf's end", Duration::from_secs(5), || std::fs::remove_dir(&leaf).ok());
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_kernel_that_refuses_a_step_lets_nothing_start_and_the_last_program_holds() {
    if missing(&["/usr/bin/python3"]) {
        return;
    }
    let targets = Targets::default();
    let mut gate = Setup::new("refused").command("says", "echo '{}'", NONE).start();
    gate.kill();
    let before = pins(gate.name());
    assert_eq!(before.len(), 1);
    for (command, number) in [
        ("BPF_MAP_CREATE", "0"),
        ("BPF_MAP_UPDATE_ELEM", "2"),
        ("BPF_PROG_LOAD", "5"),
        ("BPF_OBJ_PIN", "6"),
        ("BPF_LINK_CREATE", "28"),
    ] {
        let (code, said) = gate.refuses_under(&["/usr/bin/python3", "-c", WITHOUT, number]);
        assert_eq!(code, 1, "{command}: {said}");
        assert!(said.contains("kernel program"), "{command}: {said}");
        assert!(pins(gate.name()).contains(&before[0]), "{command}: what holds was removed");
        assert_held(&gate, &targets, command);
    }
    // What was begun and came to nothing is swept by the next that starts.
    gate.start();
    let now = pins(gate.name());
    assert!(now.len() == 1 && now != before, "{now:?} after {before:?}");
    assert_eq!(Agent::connect(&gate.agent()).execute("says", &json!({})).status, 200);
}

#[test]
fn without_a_capability_it_does_not_start_and_names_it() {
    let mut gate = Setup::new("incapable").command("says", "echo '{}'", NONE).start();
    gate.kill();
    for (flag, name) in
        [("bpf", "CAP_BPF"), ("net_admin", "CAP_NET_ADMIN"), ("setuid", "CAP_SETUID"), ("setgid", "CAP_SETGID")]
    {
        let (inheritable, bounding) = (format!("--inh-caps=-{flag}"), format!("--bounding-set=-{flag}"));
        let (code, said) = gate.refuses_under(&["setpriv", &inheritable, &bounding]);
        assert_ne!(code, 0, "{name}");
        assert!(said.contains(name), "{name}: {said}");
    }
    gate.start();
}

/// Its clock would be another than the kernel program's: a heartbeat that is always too old, or never.
#[test]
fn with_another_boot_clock_it_does_not_start_and_says_so() {
    let mut gate = Setup::new("clock").command("says", "echo '{}'", NONE).start();
    gate.kill();
    for offset in ["86400", "-60"] {
        let boottime = format!("--boottime={offset}");
        let (code, said) = gate.refuses_under(&["unshare", "--time", "--fork", "--kill-child", &boottime]);
        if said.contains("unshare failed") || said.contains("failed to write") {
            latchgate_tests::skip(&format!("no time namespaces here: {said}"));
            return;
        }
        assert_ne!(code, 0, "{offset}");
        assert!(said.contains("time namespace"), "{offset}: {said}");
    }
    gate.start();
}

/// Detaches a pinned link by the kernel's own call, as whoever has CAP_NET_ADMIN can do.
const DETACH: &str = r#"
import ctypes, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def bpf(command, attributes):
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result = libc.syscall(321, command, buffer, len(attributes))
    if result < 0: raise OSError(ctypes.get_errno(), "bpf")
    return result
path = ctypes.create_string_buffer(sys.argv[1].encode())
bpf(34, struct.pack("=I", bpf(7, struct.pack("=QIIII", ctypes.addressof(path), 0, 0, 0, 0))))
"#;

fn assert_nothing_runs(gate: &Gate, agent: &Agent, when: &str) {
    assert_eq!(get(gate, "/readyz").code(), "503 not_ready", "{when}");
    assert_eq!(get(gate, "/healthz").status, 200, "{when}");
    let answer = agent.execute("says", &json!({}));
    assert_eq!(answer.code(), "502 action_execution_failed", "{when}: {}", answer.json());
    let last = receipts(gate).remove(0);
    assert_eq!(last["failure_class"], "not_started", "{when}: {last}");
}

#[cfg(target_arch = "x86_64")]
#[test]
fn each_hook_is_missed_when_it_is_gone() {
    if missing(&["/usr/bin/python3"]) {
        return;
    }
    let mut gate = Setup::new("unhooked").command("says", "echo '{}'", NONE).start();
    let links: Vec<String> = std::fs::read_dir(&pins(gate.name())[0])
        .unwrap()
        .map(|link| link.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    assert!(links.len() >= 13, "{links:?}");
    for link in links {
        let agent = Agent::connect(&gate.agent());
        assert_eq!(agent.execute("says", &json!({})).status, 200, "{link}");
        let pin = pins(gate.name())[0].join(&link);
        let detached = Command::new("/usr/bin/python3").args(["-c", DETACH]).arg(&pin).output().unwrap();
        assert!(detached.status.success(), "{link}: {}", String::from_utf8_lossy(&detached.stderr));
        assert_nothing_runs(&gate, &agent, &link);
        assert!(gate.logged(|line| line.contains("does not hold") && line.contains(&link)), "{link}");
        gate.kill();
        gate.start();
    }
}

#[test]
fn a_lost_pin_is_missed_and_what_it_pinned_holds_for_as_long_as_the_gate_lives() {
    let targets = Targets::default();
    let gate = Setup::new("pins").command("says", "echo '{}'", NONE).start();
    let agent = Agent::connect(&gate.agent());
    std::fs::remove_file(pins(gate.name())[0].join("connect4")).unwrap();
    assert_nothing_runs(&gate, &agent, "one pin");
    assert_held(&gate, &targets, "one pin");
    for pin in std::fs::read_dir(&pins(gate.name())[0]).unwrap().flatten() {
        std::fs::remove_file(pin.path()).unwrap();
    }
    assert_nothing_runs(&gate, &agent, "all pins");
    assert_held(&gate, &targets, "all pins");
}

#[test]
fn an_unmounted_bpffs_is_missed_and_what_was_pinned_holds_for_as_long_as_the_gate_lives() {
    let targets = Targets::default();
    let setup = Setup::new("unmounted").config("[egress]\nbpffs = \"{dir}/bpf\"\n").command("says", "echo '{}'", NONE);
    let bpffs = setup.directory.join("bpf");
    std::fs::create_dir(&bpffs).unwrap();
    let mut gate = setup.start();
    let agent = Agent::connect(&gate.agent());
    assert_eq!(agent.execute("says", &json!({})).status, 200);
    unmount(&bpffs);
    assert_nothing_runs(&gate, &agent, "unmounted");
    assert_held(&gate, &targets, "unmounted");
    // The next one mounts another.
    assert_eq!(gate.stop(), 0);
    gate.start();
    assert_eq!(Agent::connect(&gate.agent()).execute("says", &json!({})).status, 200);
    assert_eq!(gate.stop(), 0);
    unmount(&bpffs);
}

fn unmount(path: &Path) {
    rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH).unwrap();
}

/// Whether a connect to the gate's own proxy is allowed, every 50 ms, with the time: the listener's queue answers for a
/// gate that sleeps, so that only the kernel program can refuse.
const WATCH: &str = "
import errno, os, socket, time
proxy = ('127.0.0.1', int(os.environ['http_proxy'].rsplit(':', 1)[1]))
seen, end = [], time.monotonic() + p['seconds']
while time.monotonic() < end:
    at = time.clock_gettime(time.CLOCK_MONOTONIC)
    try:
        socket.create_connection(proxy, 1).close()
        seen.append([at, 'ok'])
    except OSError as error:
        seen.append([at, errno.errorcode.get(error.errno, str(error))])
    time.sleep(0.05)
print(json.dumps(seen))
";

#[test]
fn a_stopped_gate_closes_every_leaf_in_two_seconds_and_opens_them_when_it_goes_on() {
    if missing(&["/usr/bin/python3"]) {
        return;
    }
    let gate = Setup::new("asleep")
        .config("[sandbox]\nnetwork = \"shared\"\n\n[egress]\nmax_connections_per_execution = 1024\n")
        .command("watch", &python(), "{profile: proxy_allowlist, allowed_domains: [allowed.test]}")
        .start();
    let agent = Agent::connect(&gate.agent());
    let pid = Pid::from_raw(i32::try_from(gate.pid()).unwrap()).unwrap();
    let monotonic = || {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap()).as_secs_f64()
    };
    let params = with_code(WATCH, &json!({"seconds": 9}));
    let (stopped, went_on, answer) = std::thread::scope(|scope| {
        let call = scope.spawn(|| agent.execute("watch", &params));
        wait("the action", Duration::from_secs(20), || {
            let leaves = latchgate_tests::inside::leaves(&gate);
            leaves.iter().any(|leaf| latchgate_tests::inside::processes(leaf).len() >= 2).then_some(())
        });
        std::thread::sleep(Duration::from_millis(1_500));
        kill_process(pid, Signal::STOP).unwrap();
        let stopped = monotonic();
        std::thread::sleep(Duration::from_millis(4_000));
        let went_on = monotonic();
        kill_process(pid, Signal::CONT).unwrap();
        let until = Instant::now() + Duration::from_millis(500);
        while get(&gate, "/readyz").status != 200 {
            assert!(Instant::now() < until + Duration::from_secs(5), "it did not recover");
        }
        (stopped, went_on, call.join().unwrap())
    });
    assert_eq!(answer.status, 200, "{}\n{}", answer.code(), gate.log_text());
    let answer = answer.json();
    let seen: Vec<(f64, &str)> = answer["output"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one: &Value| (one[0].as_f64().unwrap(), one[1].as_str().unwrap()))
        .collect();
    let between = |from: f64, to: f64| -> Vec<&str> {
        seen.iter().filter(|(at, _)| *at > from && *at < to).map(|(_, what)| *what).collect()
    };
    // The last heartbeat was at most half a second old when the gate stopped.
    let (open, closed) = (between(0.0, stopped + 1.4), between(stopped + 2.1, went_on));
    let again = between(went_on + 1.0, f64::MAX);
    assert!(open.len() > 5 && open.iter().all(|what| *what == "ok"), "{seen:?}");
    assert!(closed.len() > 5 && closed.iter().all(|what| *what == "EPERM"), "{stopped} {went_on}: {seen:?}");
    assert!(again.len() > 5 && again.iter().all(|what| *what == "ok"), "{went_on}: {seen:?}");
    wait("the event", Duration::from_secs(5), || {
        gate.logged(|line| line.contains("refused by the kernel") && line.contains("heartbeat_stopped")).then_some(())
    });
}
