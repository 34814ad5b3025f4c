//! Programs that know nothing of proxies: carried where the profile names the host, refused at once where it does not,
//! in a network namespace of their own and in the gate's.

#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used)]

use std::net::{IpAddr, Ipv4Addr};

use latchgate_tests::agent::Agent;
use latchgate_tests::gate::{Gate, Setup};
use latchgate_tests::origin::{Authority, Origin};
use serde_json::{Value, json};

const NAME: &str = "origin.carried.test";
const OTHER: &str = "other.carried.test";

/// Runs the program in `argv`, with no proxy in its environment, and says its exit code and what it wrote.
const RUN: &str = r#"exec /usr/bin/python3 -c '
import json, os, subprocess, sys
argv = json.load(sys.stdin)["argv"]
env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
done = subprocess.run(argv, env=env, capture_output=True, timeout=18)
said = lambda b: b.decode(errors="replace")[-2000:]
print(json.dumps({"code": done.returncode, "out": said(done.stdout), "err": said(done.stderr)}))
'"#;

struct World {
    gate: Gate,
    agent: Agent,
    origin: Origin,
    other: Origin,
}

impl World {
    fn new(network: &str) -> Self {
        let authority = Authority::default();
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let origin = Origin::tls(&authority, &[NAME], loopback, "carried");
        let other = Origin::tls(&authority, &[OTHER], loopback, "never");
        let entry = format!("{{domain: {NAME}, ports: [{}]}}", origin.address.port());
        let gate = Setup::new(&format!("carried-{network}"))
            .roomy_command("run", RUN, &format!("{{profile: proxy_allowlist, allowed_domains: [{entry}]}}"), 65_536)
            .command("alone", RUN, "{profile: none}")
            .config(&format!(
                "[sandbox]\nnetwork = \"{network}\"\n\n[egress]\nallow_addresses = [\"127.0.0.0/8\"]\n\n\
                 [egress.hosts]\n\"{NAME}\" = [\"127.0.0.1\"]\n\"{OTHER}\" = [\"127.0.0.1\"]\n"
            ))
            .start();
        let agent = Agent::connect(&gate.agent());
        Self { gate, agent, origin, other }
    }

    /// What the program came to, and the evidence of its receipt.
    fn run(&self, action: &str, argv: &[&str]) -> (i64, String, Vec<Value>) {
        let answer = self.agent.execute(action, &json!({ "argv": argv }));
        let body = answer.json();
        assert_eq!(answer.status, 200, "{argv:?}: {body}\n{}", self.gate.log_text());
        let output = &body["output"];
        let receipt = self.agent.receipt(body["receipt_id"].as_str().unwrap()).json();
        let evidence = receipt["egress_evidence"].as_array().unwrap().clone();
        (
            output["code"].as_i64().unwrap(),
            format!("{}{}", output["out"].as_str().unwrap(), output["err"].as_str().unwrap()),
            evidence,
        )
    }
}

fn flows<'a>(evidence: &'a [Value], verdict: &str) -> Vec<&'a Value> {
    evidence.iter().skip(1).filter(|flow| flow["verdict"] == verdict).collect()
}

fn clients(url: &str) -> Vec<(&'static str, Vec<String>)> {
    let owned = |argv: &[&str]| argv.iter().map(|one| (*one).to_owned()).collect::<Vec<_>>();
    let python = format!(
        "import ssl, urllib.request as u; print(u.urlopen('{url}', context=ssl._create_unverified_context(), timeout=10).read().decode())"
    );
    let mut clients = vec![
        ("curl", owned(&["curl", "-sS", "-k", "-m", "10", url])),
        ("curl over tls 1.2", owned(&["curl", "-sS", "-k", "-m", "10", "--tls-max", "1.2", url])),
        ("python urllib", owned(&["/usr/bin/python3", "-c", &python])),
    ];
    if std::path::Path::new("/usr/bin/node").exists() {
        let node = format!(
            "process.env.NODE_TLS_REJECT_UNAUTHORIZED = '0'; fetch('{url}').then(r => r.text()).then(t => console.log(t), e => {{ console.error(e.cause || e); process.exit(1); }})"
        );
        clients.push(("node fetch", owned(&["/usr/bin/node", "-e", &node])));
    } else {
        latchgate_tests::skip("/usr/bin/node is not installed");
    }
    clients
}

fn clients_are_carried(network: &str) {
    let world = World::new(network);
    let (port, other_port) = (world.origin.address.port(), world.other.address.port());
    for (name, argv) in clients(&format!("https://{NAME}:{port}/")) {
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        let (code, said, evidence) = world.run("run", &argv);
        assert_eq!((code, said.contains("carried")), (0, true), "{name} in {network}: {said}\n{evidence:#?}");
        let allowed = flows(&evidence, "allow");
        assert_eq!(allowed.len(), 1, "{name}: {evidence:#?}");
        assert_eq!(
            (&allowed[0]["name"], &allowed[0]["sni"], &allowed[0]["carried"]),
            (&json!(NAME), &json!(NAME), &json!(true))
        );
        assert_eq!(allowed[0]["opaque"], true, "{name}: what is inside was not seen");
        assert_eq!(evidence[0]["incomplete"], false, "{name}: {:#?}", evidence[0]);
        // A client may hang up before it has read the origin's last record; the receipt then says that they differ.
        let (kernel, proxy) = (&evidence[0]["kernel"], &evidence[0]["proxy"]);
        let figures = |side: &Value| (side["bytes_sent"].clone(), side["bytes_received"].clone());
        let expected = if figures(kernel) == figures(proxy) { "equal" } else { "disagree" };
        assert_eq!(evidence[0]["agreement"], expected, "{name}: {kernel} {proxy}");
        assert_eq!(kernel["bytes_sent"], proxy["bytes_sent"], "{name}: {kernel} {proxy}");
    }
    // Another name, at a port where somebody listens: refused by the resolver, and nobody hears of it.
    for (name, argv) in clients(&format!("https://{OTHER}:{other_port}/")) {
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        let (code, said, evidence) = world.run("run", &argv);
        assert_ne!(code, 0, "{name} in {network}: {said}");
        let denied = flows(&evidence, "deny");
        assert!(
            denied.iter().any(|flow| flow["name"] == OTHER
                && flow["decided_by"] == "resolver"
                && flow["rule"] == "name_not_allowed"),
            "{name}: {evidence:#?}"
        );
    }
    // The address itself, the allowed name at another port, and the allowed name's stand-in at another port.
    let address = format!("https://127.0.0.1:{port}/");
    let elsewhere = format!("https://{NAME}:{other_port}/");
    for url in [&address, &elsewhere] {
        let (code, said, evidence) = world.run("run", &["curl", "-sS", "-k", "-v", "-m", "10", url]);
        assert_eq!(code, 7, "{url}: {said}");
        assert!(said.contains("Operation not permitted"), "{url}: {said}");
        assert!(flows(&evidence, "deny").iter().any(|flow| flow["decided_by"] == "hook"), "{url}: {evidence:#?}");
    }
    // Fronting: the allowed name by address and connection, another one in the ClientHello.
    let resolve = format!("{OTHER}:{port}:198.18.0.1");
    let fronted = format!("https://{OTHER}:{port}/");
    let script =
        format!("curl -sS -k -m 10 https://{NAME}:{port}/ && exec curl -sS -k -m 10 --resolve {resolve} {fronted}");
    let (code, said, evidence) = world.run("run", &["sh", "-c", &script]);
    assert_ne!(code, 0, "{said}");
    assert!(flows(&evidence, "deny").iter().any(|flow| flow["rule"] == "sni_mismatch"), "{evidence:#?}");
    // A profile of none: not even a name.
    let (code, _, evidence) =
        world.run("alone", &["curl", "-sS", "-k", "-m", "10", &format!("https://{NAME}:{port}/")]);
    assert_ne!(code, 0);
    assert!(flows(&evidence, "allow").is_empty());
    assert!(world.other.requests().is_empty(), "{:?}", world.other.requests());
}

#[test]
fn clients_are_carried_in_a_namespace_of_their_own() {
    clients_are_carried("isolated");
}

#[test]
fn clients_are_carried_in_the_gates_namespace() {
    clients_are_carried("shared");
}

#[test]
fn names_are_answered_out_of_the_profile_and_never_asked_upstream() {
    for network in ["isolated", "shared"] {
        let world = World::new(network);
        let (code, said, _) = world.run("run", &["getent", "ahostsv4", NAME]);
        assert_eq!((code, said.contains("198.18.")), (0, true), "{network}: {said}");
        for (what, name) in [("another name", OTHER.to_owned()), ("a tunnel", format!("{}.{OTHER}", "a".repeat(60)))] {
            let (code, said, evidence) = world.run("run", &["getent", "ahostsv4", &name]);
            assert_eq!(code, 2, "{what} in {network}: {said}");
            let denied = flows(&evidence, "deny");
            assert!(
                denied.iter().any(|flow| flow["name"] == name.as_str() && flow["protocol"] == "dns"),
                "{evidence:#?}"
            );
        }
        let udp = "import socket; s = socket.socket(2, 2); s.sendto(b'x', ('127.0.0.1', 443))";
        let (code, said, _) = world.run("run", &["/usr/bin/python3", "-c", udp]);
        assert_eq!((code, said.contains("PermissionError")), (1, true), "QUIC in {network}: {said}");
    }
}

#[test]
fn an_isolated_execution_sees_no_network_but_its_own() {
    let list = ["cat", "/proc/net/dev"];
    let lines = |world: &World| world.run("alone", &list).1.lines().filter(|line| line.contains(':')).count();
    assert_eq!(lines(&World::new("isolated")), 1);
    assert!(lines(&World::new("shared")) > 1, "the gate's namespace has more than lo, or this shows nothing");
}
