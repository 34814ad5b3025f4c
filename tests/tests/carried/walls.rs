//! Two walls, each with the other one taken away.

use std::process::Command;
use std::time::Duration;

use latchgate_tests::agent::Agent;
use latchgate_tests::gate::Setup;
use latchgate_tests::http::{Connection, once};
use latchgate_tests::inside::{Counting, leaves, outside, pins, send, wait};
use serde_json::{Value, json};

use super::world::{NETWORKS, Plan};

/// Tries to reach each of `p["targets"]` (`[kind, address, port]`) and says what came of it: `reached`, or the errno.
const REACH: &str = r#"
import errno, json, socket
def reach(kind, address, port):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        s = socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
        s.settimeout(2)
        if kind == "tcp": s.connect((address, port)); s.sendall(b"GET / HTTP/1.0\r\n\r\n")
        else: s.sendto(b"hello", (address, port))
        return "reached" if s.recv(64) else "closed"
    except OSError as error: return errno.errorcode.get(error.errno, "timeout")
"#;

struct Targets {
    counting: Vec<Counting>,
    all: Value,
}

impl Targets {
    /// Services of the machine's own, on loopback.
    fn listen() -> Self {
        let counting = vec![
            Counting::tcp("127.0.0.1:0"),
            Counting::tcp("127.77.0.1:0"),
            Counting::tcp("[::1]:0"),
            Counting::udp("127.0.0.1:0"),
            Counting::udp("[::1]:0"),
        ];
        let kinds = ["tcp", "tcp", "tcp", "udp", "udp"];
        let mut all: Vec<Value> = kinds
            .iter()
            .zip(&counting)
            .map(|(kind, there)| json!([kind, there.address.ip().to_string(), there.address.port()]))
            .collect();
        all.push(json!(["tcp", "::ffff:127.0.0.1", counting[0].address.port()]));
        Self { counting, all: json!(all) }
    }

    fn reached(&self) -> Vec<usize> {
        self.counting.iter().map(Counting::reached).collect()
    }
}

/// Without a namespace the machine's own services are there to be reached, and the program on the cgroup is what does not
/// let them be.
#[test]
fn the_kernel_program_holds_without_a_namespace() {
    let targets = Targets::listen();
    let say = format!("{REACH}\nprint(json.dumps([reach(*t) for t in p[\"targets\"]]))");
    let control = outside(&say, &json!({ "targets": targets.all }));
    assert!(control.as_array().unwrap().iter().all(|one| one == "reached"), "the control: {control}");
    let before = targets.reached();
    let world = Plan::default()
        .action("alone", "{profile: none}")
        .reaching("run", &["{domain: walls.test, ports: [443]}".to_owned()])
        .start("one-wall", "shared");
    let code = format!("{REACH}\nprint(json.dumps([reach(*t) for t in {}]))", targets.all);
    for action in ["alone", "run"] {
        let ran = world.python(action, &code);
        let said: Vec<String> = serde_json::from_str(&ran.out).unwrap_or_else(|_| panic!("{ran}"));
        assert!(said.iter().all(|one| one == "EPERM"), "{action}: {said:?}");
    }
    assert_eq!(targets.reached(), before);
}

/// Detaches every link below a directory of pins, and says how many.
const DETACH: &str = r#"
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def bpf(command, attributes):
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result = libc.syscall({"x86_64": 321, "aarch64": 280}[os.uname().machine], command, buffer, len(attributes))
    if result < 0: raise OSError(ctypes.get_errno(), "bpf")
    return result
detached = 0
for name in os.listdir(sys.argv[1]):
    path = ctypes.create_string_buffer(os.path.join(sys.argv[1], name).encode())
    try:
        bpf(34, struct.pack("=I", bpf(7, struct.pack("=QIIII", ctypes.addressof(path), 0, 0, 0, 0))))
        detached += 1
    except OSError: pass
print(detached)
"#;

/// The program is taken away while an execution runs. In a namespace of its own there is still nothing to reach; in the
/// machine's, where the program was the only wall, everything is: that is what shows that it was taken away.
#[test]
fn the_namespace_holds_without_the_kernel_program() {
    for network in NETWORKS {
        let targets = Targets::listen();
        let before = targets.reached();
        let world = Plan::default().action("alone", "{profile: none}").start("no-program", network);
        // Goes on until what it comes to has changed for every target, or the time is over.
        let code = format!(
            "{REACH}\nimport sys, time\ntargets = {}\nfirst = [reach(*t) for t in targets]\nlast = list(first)\n\
             open('/tmp/ready', 'w').close(); began = time.monotonic()\n\
             while time.monotonic() - began < 20 and any(one == 'EPERM' for one in last):\n\
             \x20   last = [reach(*t) for t in targets]; time.sleep(0.05)\n\
             print(json.dumps([first, last]))",
            targets.all
        );
        let params = json!({"argv": ["/usr/bin/python3", "-c", code]});
        let mut call = Connection::open(&world.agent.target).unwrap();
        send(&mut call, &world.agent, "alone", &params).unwrap();
        wait("its leaf", Duration::from_secs(20), || (!leaves(&world.gate).is_empty()).then_some(()));
        // It has tried everything once: a datagram's refusal takes no time, so a second is many rounds.
        std::thread::sleep(Duration::from_secs(3));
        assert_eq!(targets.reached(), before, "with both walls, in {network}");
        let runs = pins(world.gate.name());
        assert_eq!(runs.len(), 1, "{runs:?}");
        let done = Command::new("/usr/bin/python3").args(["-c", DETACH]).arg(&runs[0]).output().unwrap();
        let detached: u32 = String::from_utf8_lossy(&done.stdout).trim().parse().unwrap();
        assert!(detached >= 8, "{done:?}");

        let answer = call.response().unwrap();
        let body = answer.json();
        assert_eq!(answer.status, 200, "{body}\n{}", world.gate.log_text());
        let output = &body["output"];
        let said: Vec<Vec<String>> =
            serde_json::from_str(output["out"].as_str().unwrap()).unwrap_or_else(|_| panic!("in {network}: {output}"));
        assert!(said[0].iter().all(|one| one == "EPERM"), "with both walls, in {network}: {:?}", said[0]);
        let (last, reached) = (&said[1], targets.reached());
        assert!(!last.iter().any(|one| one == "EPERM"), "the program still refuses, in {network}: {last:?}");
        if network == "isolated" {
            assert_eq!(reached, before, "out of its namespace: {last:?}");
            // Nobody is there: a connection is refused, and a datagram that was sent is not answered.
            for (target, one) in targets.all.as_array().unwrap().iter().zip(last) {
                assert_eq!(one, if target[0] == "tcp" { "ECONNREFUSED" } else { "timeout" }, "{target}: {last:?}");
            }
        } else {
            assert!(last.iter().all(|one| one == "reached"), "the control: {last:?}");
            assert!(reached.iter().zip(&before).all(|(now, then)| now > then), "the control: {reached:?} {before:?}");
        }
    }
}

/// Executes what follows its arguments, with setns(2) refused: a container whose filter has no namespaces.
const NO_NAMESPACES: &str = r#"
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
setns = {"x86_64": 308, "aarch64": 268}[os.uname().machine]
code = b"".join(struct.pack("=HBBI", *one) for one in [(0x20, 0, 0, 0), (0x15, 0, 1, setns), (6, 0, 0, 0x50001), (6, 0, 0, 0x7fff0000)])
buffer = ctypes.create_string_buffer(code, len(code))
program = ctypes.create_string_buffer(struct.pack("=H6xQ", 4, ctypes.addressof(buffer)), 16)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0): raise OSError(ctypes.get_errno(), "prctl")
os.execv(sys.argv[1], sys.argv[1:])
"#;

/// The second wall is left out only where nobody asked for it, and never in silence.
#[test]
fn a_gate_that_can_have_one_wall_only_says_so() {
    let confined = ["/usr/bin/python3", "-c", NO_NAMESPACES];
    let targets = Targets::listen();
    let code = format!("{REACH}\nprint(json.dumps([reach(*t) for t in {}]))", targets.all);
    let script = format!("exec /usr/bin/python3 -c '{}'", code.trim());
    let setup = |name: &str| Setup::new(name).command("reach", &script, "{profile: none}");
    let gate = setup("wall-unset").through(&confined).start();
    let readyz = once(&gate.agent(), "GET", "/readyz", &[], None);
    let said = readyz.json();
    assert_eq!((readyz.status, &said["status"]), (200, &json!("degraded")), "{said}");
    assert!(said["reason"].as_str().unwrap().contains("sandbox.network"), "{said}");
    let done = Agent::connect(&gate.agent()).execute("reach", &json!({})).json();
    let outcomes = done["output"].as_array().unwrap_or_else(|| panic!("{done}"));
    assert!(outcomes.iter().all(|one| one == "EPERM"), "{done}");
    drop(gate);

    // Whoever asked for one wall has it, and whoever asked for two has no gate.
    let gate = setup("wall-shared").config("[sandbox]\nnetwork = \"shared\"\n").through(&confined).start();
    assert_eq!(once(&gate.agent(), "GET", "/readyz", &[], None).json()["status"], "ready");
    drop(gate);
    let both = setup("wall-both").config("[sandbox]\nnetwork = \"isolated\"\n").through(&confined);
    let (code, said) = both.refuse();
    assert!(code != 0 && said.contains("sandbox.network = isolated"), "{code}: {said}");
    // The machine can have both, and the gate then has them unasked.
    let gate = setup("wall-free").start();
    assert_eq!(once(&gate.agent(), "GET", "/readyz", &[], None).json()["status"], "ready");
}
