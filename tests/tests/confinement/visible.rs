//! What an action sees of the gate, of the host and of the executions beside it.

use std::process::{Command, Stdio};
use std::time::Duration;

use latchgate_tests::agent::Agent;
use latchgate_tests::gate::Setup;
use latchgate_tests::inside::{inside, leaves, missing, outside, processes, python, uid_of, wait};
use serde_json::{Value, json};

use crate::origin::Origin;
use crate::{NOTHING, asking, reaching};

/// Which of `paths` there are, which of `names` are found below `roots`, and what is mounted from where.
const LOOK: &str = "
import json, os
there = [path for path in p['paths'] if os.path.lexists(path)]
found = []
for root in p['roots']:
    for directory, inner, files in os.walk(root):
        if directory == '/':
            inner[:] = [name for name in inner if name not in ('usr', 'proc')]
        found += [os.path.join(directory, name) for name in inner + files if name in p['names']]
for pid in filter(str.isdigit, os.listdir('/proc')):
    for way in ('root/tmp', 'cwd'):
        try:
            found += [name for name in os.listdir(f'/proc/{pid}/{way}') if name in p['names']]
        except OSError:
            pass
mounts = [line.split(' ')[3:5] for line in open('/proc/self/mountinfo')]
print(json.dumps({'environment': sorted(os.environ), 'there': there, 'found': found, 'mounts': mounts, 'pids': sum(map(str.isdigit, os.listdir('/proc')))}))
";

#[test]
fn nothing_of_the_gate_is_visible() {
    if missing(&["/usr/bin/python3"]) {
        return;
    }
    let gate = Setup::new("visible").command("none", &python(), NOTHING).start();
    let agent = Agent::connect(&gate.agent());
    let directory = gate.directory().to_owned();
    let mut paths: Vec<_> = ["", "state", "state/ledger", "state/store", "state/lease-keys", "agent/gate.sock"]
        .map(|path| directory.join(path))
        .into();
    paths.push(directory.join("operator/operator.sock"));
    paths.extend(["/sys/fs/bpf", "/sys/fs/cgroup", "/root", "/etc/shadow", "/proc/1/fd/3"].map(Into::into));
    let names = ["gate.sock", "operator.sock", "ledger.db", "receipt-keys.json", "latchgate.toml", "lease-keys"];
    let mut params = json!({"paths": paths, "names": names, "roots": ["/"]});
    let (seen, _) = inside(&agent, "none", LOOK, &params);
    assert_eq!((&seen["there"], &seen["found"]), (&json!([]), &json!([])), "{seen}");
    for mount in seen["mounts"].as_array().unwrap() {
        let (root, place) = (mount[0].as_str().unwrap(), mount[1].as_str().unwrap());
        assert!(!root.contains(gate.name()) && !place.contains(gate.name()), "{mount}");
        assert!(!place.starts_with("/sys") && !place.starts_with("/run") && !place.starts_with("/old"), "{mount}");
    }
    assert_eq!(seen["pids"], 2, "the reaper and itself");
    // Python sets LC_CTYPE, the shell PWD and its like, by themselves; the gate's own environment has more than its log level.
    let known = [
        "ALL_PROXY",
        "HOME",
        "HTTPS_PROXY",
        "HTTP_PROXY",
        "LANG",
        "LC_CTYPE",
        "OLDPWD",
        "PATH",
        "PWD",
        "SHLVL",
        "TMPDIR",
        "_",
        "all_proxy",
        "http_proxy",
        "https_proxy",
    ];
    for name in seen["environment"].as_array().unwrap() {
        assert!(known.contains(&name.as_str().unwrap()), "{name}");
    }
    let own = std::fs::read_to_string(format!("/proc/{}/environ", gate.pid())).unwrap();
    assert!(own.contains("LATCHGATE_LOG="));
    // The same look from outside sees them all.
    params["roots"] = json!([directory]);
    let seen = outside(LOOK, &params);
    let found = seen["found"].to_string();
    assert!(names.iter().all(|name| found.contains(name)), "{found}");
    let there = seen["there"].to_string();
    for path in paths.iter().filter(|path| !path.starts_with("/proc")) {
        assert!(there.contains(path.to_str().unwrap().trim_end_matches('/')), "{path:?}: {there}");
    }
}

#[test]
fn executions_do_not_see_each_other() {
    if missing(&["/usr/bin/python3"]) {
        return;
    }
    let origin = Origin::start("127.71.5.1:0", "origin");
    let gate = Setup::new("beside")
        .config("[egress]\nallow_addresses = [\"127.71.5.1/32\"]\n[egress.hosts]\n\"origin.test\" = [\"127.71.5.1\"]\n")
        .command("keeps", &python(), &reaching(&["origin.test"], origin.port()))
        .command("looks", &python(), NOTHING)
        .start();
    let agent = Agent::connect(&gate.agent());
    let mut params = json!({"paths": ["/tmp/marker-of-one"], "names": ["marker-of-one"], "roots": ["/", "/tmp"],
        "at": format!("origin.test:{}", origin.port())});
    // Holds its file while the other one looks, then looks for itself.
    let keeps = asking(&format!("open('/tmp/marker-of-one', 'w').close()\nget(p['at'], '/held')\n{LOOK}"));
    let (own, other) = std::thread::scope(|scope| {
        let keeping = scope.spawn(|| inside(&agent, "keeps", &keeps, &params).0);
        wait("the first", Duration::from_secs(20), || (origin.held() == 1).then_some(()));
        let other = inside(&agent, "looks", LOOK, &params).0;
        origin.release();
        (keeping.join().unwrap(), other)
    });
    assert_eq!(own["there"], json!(["/tmp/marker-of-one"]));
    assert_eq!((&other["there"], &other["found"], &other["pids"]), (&json!([]), &json!([]), &json!(2)));
    // What an execution wrote is gone with it.
    params["paths"] = json!(["/tmp"]);
    let (after, _) = inside(&agent, "keeps", LOOK, &params);
    assert_eq!((&after["there"], &after["found"]), (&json!(["/tmp"]), &json!([])));
}

const WHO: &str = "
import json, os
def is_open(descriptor):
    try:
        os.fstat(descriptor)
        return True
    except OSError:
        return False
descriptors = [descriptor for descriptor in range(4096) if is_open(descriptor)]
status = dict(line.rstrip('\\n').split(':\\t', 1) for line in open('/proc/self/status') if ':\\t' in line)
";

#[test]
fn an_execution_is_nobody_with_three_pipes() {
    if missing(&["/usr/bin/python3"]) {
        return;
    }
    let origin = Origin::start("127.71.6.1:0", "origin");
    let gate = Setup::new("who")
        .config("[egress]\nallow_addresses = [\"127.71.6.1/32\"]\n[egress.hosts]\n\"origin.test\" = [\"127.71.6.1\"]\n")
        .command("who", &python(), &reaching(&["origin.test"], origin.port()))
        .start();
    let agent = Agent::connect(&gate.agent());
    let params = json!({"at": format!("origin.test:{}", origin.port())});
    let code = asking(&format!(
        "{WHO}get(p['at'], '/held')\nprint(json.dumps({{'descriptors': descriptors, 'status': status, 'ids': [os.getuid(), \
         os.geteuid(), os.getgid(), os.getegid()]}}))"
    ));
    let (said, uids) = std::thread::scope(|scope| {
        let calls = [(); 2].map(|()| scope.spawn(|| inside(&agent, "who", &code, &params).0));
        wait("the calls", Duration::from_secs(20), || (origin.held() == 2).then_some(()));
        let uids: Vec<Vec<u32>> =
            leaves(&gate).iter().map(|leaf| processes(leaf).into_iter().filter_map(uid_of).collect()).collect();
        origin.release();
        (calls.map(|call| call.join().unwrap()), uids)
    });
    assert_eq!(uids.len(), 2, "{uids:?}");
    for uids in &uids {
        assert!(uids.len() >= 2 && uids.iter().all(|uid| *uid == uids[0] && *uid >= 0x4c47_0000), "{uids:?}");
    }
    assert_ne!(uids[0][0], uids[1][0]);
    for said in &said {
        assert_eq!(said["descriptors"], json!([0, 1, 2]));
        assert_eq!(said["ids"], json!([65_534, 65_534, 65_534, 65_534]));
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(said["status"][set], "0000000000000000", "{set}");
        }
        assert_eq!((&said["status"]["NoNewPrivs"], &said["status"]["Seccomp"]), (&json!("1"), &json!("2")));
    }
    // The same questions where a descriptor was left open, and by root.
    let output = Command::new("/bin/sh")
        .args(["-c", "exec 7</dev/null; exec /usr/bin/python3 -c \"$0\""])
        .arg(format!("{WHO}print(json.dumps([descriptors, status['CapEff'], status['NoNewPrivs'], os.getuid()]))"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(said[0].as_array().unwrap().contains(&json!(7)), "{said}");
    assert!(said[1] != "0000000000000000" && said[3] == 0, "{said}");
}
