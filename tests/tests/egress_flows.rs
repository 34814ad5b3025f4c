//! Flows as an operator sees them: every refusal has one decision id on all its faces, and `explain` knows it, after a
//! restart too.
#![allow(clippy::disallowed_methods)]

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use latchgate_tests::agent::Agent;
use latchgate_tests::gate::{Gate, Setup, binary};
use latchgate_tests::operator::{heard, operate, with_operator};
use latchgate_tests::skip;
use serde_json::{Value, json};

/// A command that goes past the proxy, and says what came of it.
const AROUND: &str = r#"/usr/bin/python3 -c '
import socket, json
s = socket.socket()
print(json.dumps({"errno": s.connect_ex(("192.0.2.1", 80))}))
'"#;

fn gate(name: &str) -> Option<Gate> {
    if !rustix::process::geteuid().is_root() {
        skip("a real gate needs root");
        return None;
    }
    let setup = with_operator(Setup::new(name)).config("[egress.hosts]\n\"inside.test\" = [\"127.0.0.1\"]\n");
    let reach = "{profile: proxy_allowlist, allowed_domains: [inside.test, {domain: ported.test, ports: [8443]}]}";
    let gate = setup.fetch("fetch", reach).command("around", AROUND, reach).start();
    heard(&gate);
    Some(gate)
}

fn egress(gate: &Gate, arguments: &[&str]) -> (i32, String, String) {
    operate(gate, &[&["egress"], arguments].concat())
}

fn flows(gate: &Gate, arguments: &[&str]) -> Vec<Value> {
    let (code, out, err) = egress(gate, &[&["flows"], arguments].concat());
    assert_eq!(code, 0, "{err}");
    out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn explain(gate: &Gate, id: &str) -> String {
    let (code, out, err) = egress(gate, &["explain", id]);
    assert_eq!(code, 0, "{err}");
    out
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or_else(|| panic!("no {name} in {value}"))
}

#[test]
fn one_decision_id_is_on_every_face_of_a_refusal() {
    let Some(mut gate) = gate("flows") else { return };
    let agent = Agent::connect(&gate.agent());

    // Refused by the gate, before anything ran.
    let refused = agent.execute("fetch", &json!({"url": "https://elsewhere.test/"}));
    assert_eq!(refused.code(), "403 egress_denied");
    let by_gate = text(&refused.json(), "decision_id").to_owned();
    assert_eq!(refused.header("latchgate-decision-id"), Some(by_gate.as_str()));

    // Refused by the proxy: the name is of the profile, its address is not public.
    let refused = agent.execute("fetch", &json!({"url": "http://inside.test/"}));
    assert_eq!(refused.code(), "403 egress_denied");
    let by_proxy = text(&refused.json(), "decision_id").to_owned();
    let receipt = agent.receipt(text(&refused.json(), "receipt_id")).json();
    assert_eq!(text(&receipt, "decision_id"), by_proxy);
    assert_eq!(text(&receipt["egress_evidence"][1], "decision_id"), by_proxy);

    // Refused by the kernel program: EPERM has no room for an id, the receipt has.
    let done = agent.execute("around", &json!({})).json();
    assert_eq!(done["output"]["errno"], json!(1), "{done}");
    let receipt_id = text(&done, "receipt_id").to_owned();
    let receipt = agent.receipt(&receipt_id).json();
    let by_kernel = text(&receipt["egress_evidence"][1], "decision_id").to_owned();

    let all = flows(&gate, &["--verdict", "deny"]);
    let seen: Vec<(&str, &str, &str)> =
        all.iter().map(|flow| (text(flow, "decided_by"), text(flow, "rule"), text(flow, "decision_id"))).collect();
    assert_eq!(
        seen,
        [
            ("gate", "name_not_allowed", by_gate.as_str()),
            ("proxy", "address_not_public:loopback", &by_proxy),
            ("hook", "not_in_profile", &by_kernel)
        ]
    );
    for flow in &all {
        assert_eq!((text(flow, "principal"), text(flow, "workspace")), ("tester", "default"), "{flow}");
    }
    assert_eq!(flows(&gate, &["--action", "around"]).len(), 1);
    assert_eq!(flows(&gate, &["--since", "1h", "--limit", "2"]).len(), 2);
    assert!(flows(&gate, &["--principal", "nobody"]).is_empty());
    assert!(flows(&gate, &["--since", "2100-01-01T00:00:00Z"]).is_empty());

    for restarted in [false, true] {
        if restarted {
            // The journal is gone; the ledger is not.
            assert_eq!(gate.stop(), 0);
            gate.start();
            assert!(flows(&gate, &[]).is_empty());
        }
        for (id, says) in [
            (&by_gate, ["GET over https of elsewhere.test:443", "{domain: elsewhere.test, ports: [443], exact: true}"]),
            (&by_proxy, ["http to inside.test:80", "allow_addresses"]),
            (&by_kernel, ["tcp (connect4) to 192.0.2.1:80", "the profile of around has nothing at 192.0.2.1:80"]),
            (&receipt_id, ["tcp (connect4) to 192.0.2.1:80", &by_kernel]),
        ] {
            let told = explain(&gate, id);
            for part in says {
                assert!(told.contains(part), "restarted: {restarted}; {part:?} is not in\n{told}");
            }
        }
    }
    let (code, _, err) = egress(&gate, &["explain", "0199a1b2-0000-7000-8000-000000000000"]);
    assert!(code == 1 && err.contains("not_found"), "{err}");
    assert_eq!(gate.verify().0, 0);
}

#[test]
fn the_proposed_change_makes_the_call_pass_the_profile() {
    let Some(gate) = gate("change") else { return };
    let agent = Agent::connect(&gate.agent());
    let refused = agent.execute("fetch", &json!({"url": "https://ported.test/"}));
    assert_eq!(text(&refused.json(), "deny_reason"), "port_not_allowed");
    let (code, out, err) = egress(&gate, &["explain", text(&refused.json(), "decision_id"), "--json"]);
    assert_eq!(code, 0, "{err}");
    let told: Value = serde_json::from_str(&out).unwrap();
    let change = text(&told["explained"][0]["explanation"]["change"], "configuration");
    // `[definitions]` is there already, so the table is appended as it is.
    let file = gate.directory().join("latchgate.toml");
    let config = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("{config}\n{change}\n")).unwrap();
    let mut gate = gate;
    gate.stop();
    gate.start();
    let agent = Agent::connect(&gate.agent());
    let passed = agent.execute("fetch", &json!({"url": "https://ported.test/"}));
    // No such host: allowed, and not there.
    assert_eq!(passed.status, 502, "{}", String::from_utf8_lossy(&passed.body));
}

#[test]
fn whoever_follows_sees_what_comes_and_ends_with_the_gate() {
    let Some(mut gate) = gate("follow") else { return };
    let agent = Agent::connect(&gate.agent());
    agent.execute("fetch", &json!({"url": "https://before.test/"}));
    let mut follower = Command::new(binary())
        .args(["egress", "flows", "--follow", "--verdict", "deny", "--socket"])
        .arg(gate.directory().join("operator/operator.sock"))
        .arg("--key")
        .arg(gate.directory().join("operator.json"))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(follower.stdout.take().unwrap()).lines();
    let mut next = || -> Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
    assert_eq!(text(&next(), "name"), "before.test");
    for name in ["one.test", "two.test"] {
        agent.execute("fetch", &json!({"url": format!("https://{name}/")}));
        assert_eq!(text(&next(), "name"), name);
    }
    // A reader that waits holds no drain up.
    let began = Instant::now();
    assert_eq!(gate.stop(), 0);
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert!(!follower.wait().unwrap().success());
}

#[test]
fn profiles_are_shown_as_they_are_in_force() {
    let Some(gate) = gate("profiles") else { return };
    let (code, out, err) = egress(&gate, &["profiles"]);
    assert_eq!(code, 0, "{err}");
    let profiles: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(profiles.len(), 2);
    for profile in profiles {
        assert_eq!(profile["entries"], json!(["inside.test:80,443", "ported.test:8443"]), "{profile}");
        assert!(text(&profile, "profile_hash").starts_with("sha256:"));
    }
}

#[test]
fn a_terminal_gets_a_table() {
    let script = "/usr/bin/script";
    if !std::path::Path::new(script).exists() {
        return skip("no /usr/bin/script to make a terminal");
    }
    let Some(gate) = gate("table") else { return };
    Agent::connect(&gate.agent()).execute("fetch", &json!({"url": "https://elsewhere.test/"}));
    let place = gate.directory().display().to_string();
    for (what, head, row) in [
        ("flows", "TIME ", "elsewhere.test:443"),
        ("profiles", "ACTION ", "inside.test:80,443  ported.test:8443"),
        ("flows --json", "{", "\"name\":\"elsewhere.test\""),
    ] {
        let line = format!(
            "{} egress {what} --socket {place}/operator/operator.sock --key {place}/operator.json",
            binary().display()
        );
        let output = Command::new(script).args(["-qec", &line, "/dev/null"]).stdin(Stdio::null()).output().unwrap();
        let shown = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(shown.starts_with(head) && shown.contains(row), "{what}:\n{shown}");
    }
}
