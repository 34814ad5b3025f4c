//! The switches themselves: only one binary has them, and it says so.

use latchgate_tests::agent::Agent;
use latchgate_tests::gate::{Setup, binary, unguarded_binary};
use latchgate_tests::http::once;
use latchgate_tests::inside::{inside, outside, python};
use serde_json::json;

use crate::technique;
use crate::world::Target;

const KERNEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../gate/src/egress/kernel");

/// Which of the texts, and which of the two kernel objects, are in a file.
const SCAN: &str = "
with open(p['file'], 'rb') as file:
    data = file.read()
needles = [text.encode() for text in p['texts']]
for name in p['objects']:
    with open(name, 'rb') as file:
        needles.append(file.read())
print(json.dumps([needle in data for needle in needles]))
";

#[test]
fn only_one_binary_has_switches() {
    let objects = [format!("{KERNEL}/latchgate.bpf.o"), format!("{KERNEL}/latchgate-guards.bpf.o")];
    let texts = ["LATCHGATE_TEST_GUARDS_OFF", "GUARDS_OFF", "seccomp:socket_families", "foreign_socket,", "guards off"];
    let scan = |file: std::path::PathBuf| {
        let found = outside(SCAN, &json!({"file": file, "texts": texts, "objects": objects}));
        found.as_array().unwrap().iter().map(|found| found.as_bool().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(scan(binary()), [false, false, false, false, false, true, false]);
    let unguarded = scan(unguarded_binary());
    assert_eq!(unguarded, [true, true, true, false, true, false, true]);
}

#[test]
fn the_variable_means_nothing_to_the_gate() {
    let target = Target::start();
    let setup = Setup::new("escape-variable").command("nothing", &python(), "{profile: none}");
    let gate = setup.started_by("export LATCHGATE_TEST_GUARDS_OFF=connect4,egress,ingress").start();
    let agent = Agent::connect(&gate.agent());
    let text = format!(
        "{}\n{}\nreport(attempt)",
        include_str!("../../escape/prelude.py"),
        include_str!("../../escape/tcp_v4.py")
    );
    assert_eq!(inside(&agent, "nothing", &text, &target.params("")).0, "EPERM");
    assert_eq!(once(&gate.agent(), "GET", "/readyz", &[], None).json()["status"], "ready");
}

#[test]
fn a_gate_without_a_guard_says_so() {
    let target = Target::start();
    let (gate, _) = technique::gate(&target, "shared", &["egress", "sni"]);
    assert!(
        gate.logged(|line| line.contains("ERROR") && line.contains("guards off: egress, sni")),
        "{}",
        gate.log_text()
    );
    let readiness = once(&gate.agent(), "GET", "/readyz", &[], None).json();
    assert_eq!(readiness["status"], "degraded", "{readiness}");
    let key = gate.directory().join("state/operator.json");
    assert!(!key.exists(), "no operator here; the reason in `status` is the one of /readyz");
}

#[test]
fn a_misspelt_guard_is_no_guard() {
    let (code, said) = Setup::new("escape-misspelt").unguarded(&["connect4", "egres"]).refuse();
    assert_eq!((code, said.contains("\"egres\" is no guard")), (1, true), "{said}");
}
