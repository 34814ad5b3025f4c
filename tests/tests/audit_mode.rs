//! `egress.mode: unsafe_audit`: public names at two ports pass and are recorded; everything else is refused as ever; and
//! what was seen becomes a profile under which the same action runs.
//!
//! The gate and its origins are in a network namespace of the test's own, on whose loopback a public address is.
//! Needs root, a v2 hierarchy, `/usr/bin/python3`, `unshare` and `ip`.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used)]

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use latchgate_tests::agent::Agent;
use latchgate_tests::gate::{Gate, Setup};
use latchgate_tests::http::once;
use latchgate_tests::inside::{Counting, inside, missing, outside, python, wait};
use latchgate_tests::operator::{heard, lines, operate, with_operator};
use latchgate_tests::origin::{Authority, Origin};
use latchgate_tests::skip;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::{Value, json};

const PUBLIC: &str = "1.2.3.4";
/// Not public, and opened by the configuration.
const OPENED: &str = "10.9.8.7";

/// A network namespace that lives as long as this; the calling thread is in it.
struct Namespace(Child);

impl Namespace {
    fn enter() -> Self {
        let script = format!(
            "ip link set lo up && ip addr add {PUBLIC}/32 dev lo && ip addr add {OPENED}/32 dev lo && echo ready && exec sleep 600"
        );
        let mut child =
            Command::new("unshare").args(["--net", "sh", "-c", &script]).stdout(Stdio::piped()).spawn().unwrap();
        let mut ready = [0; 6];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
        let namespace = std::fs::File::open(format!("/proc/{}/ns/net", child.id())).unwrap();
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        Self(child)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn cannot() -> bool {
    if !rustix::process::geteuid().is_root() {
        skip("a real gate needs root");
        return true;
    }
    missing(&["/usr/bin/python3", "/usr/bin/unshare", "/usr/sbin/ip"])
}

/// What is tried, each by itself: what came of it.
const TRY: &str = r#"
import socket, ssl
def tried(work):
    try:
        return work()
    except ssl.SSLError as error:
        return "tls: " + (error.reason or "ended")
    except socket.gaierror as error:
        return "name: " + str(error.errno)
    except OSError as error:
        return "errno: " + str(error.errno)

def http(host, port=80, name=None):
    with socket.create_connection((host, port), timeout=15) as s:
        s.sendall(f"GET / HTTP/1.1\r\nHost: {name or host}\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while chunk := s.recv(4096):
            answer += chunk
    return answer.decode().split("\r\n", 1)[0].split(" ")[1] + " " + answer.decode().rsplit("\r\n\r\n", 1)[-1][:6]

def https(host, name=None):
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with socket.create_connection((host, 443), timeout=15) as s, context.wrap_socket(s, server_hostname=name or host) as t:
        t.sendall(f"GET / HTTP/1.1\r\nHost: {name or host}\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while chunk := t.recv(4096):
            answer += chunk
    return answer.decode().rsplit("\r\n\r\n", 1)[-1]

def udp():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(5)
        s.sendto(b"hello", tuple(p["udp"]))
        return s.recv(16).decode()

print(json.dumps({name: tried(lambda: eval(work)) for name, work in p["tries"].items()}))
"#;

fn tries(udp: &Counting) -> Value {
    json!({"udp": udp.target(), "tries": {
        "kept": "http('kept.example.org')",
        "seen": "http('seen.example.org')",
        "seen over tls": "https('seen.example.org')",
        "fronted by sni": "https('seen.example.org', 'kept.example.org')",
        "fronted by host": "http('seen.example.org', name='kept.example.org')",
        "another port": "http('seen.example.org', 8080)",
        "the address": format!("http('{PUBLIC}')"),
        "an opened address": format!("http('{OPENED}')"),
        "a name of it": "http('inside.example.org')",
        "a name of both": "http('mixed.example.org')",
        "a name of no public suffix": "http('metadata.google.internal')",
        "udp": "udp()",
    }})
}

fn configured(name: &str, authority: &Authority, permitted: &str) -> Setup {
    let setup = Setup::new(name);
    std::fs::write(setup.directory.join("ca.pem"), &authority.pem).unwrap();
    with_operator(setup.config(&format!(
        "[egress]\nca_file = \"{{dir}}/ca.pem\"\nallow_addresses = [\"{OPENED}/32\"]\ndns_servers = [\"127.0.0.1:9\"]\n\
         permit_unsafe_audit = {permitted}\n[egress.hosts]\n\"kept.example.org\" = [\"{PUBLIC}\"]\n\
         \"seen.example.org\" = [\"{PUBLIC}\"]\n\"inside.example.org\" = [\"{OPENED}\"]\n\
         \"mixed.example.org\" = [\"{PUBLIC}\", \"{OPENED}\"]\n\"metadata.google.internal\" = [\"{PUBLIC}\"]\n"
    )))
}

const KEPT: &str = "allowed_domains: [{domain: kept.example.org, ports: [80], exact: true}]";

fn enforced() -> String {
    format!("{{profile: proxy_allowlist, {KEPT}}}")
}

fn audited() -> String {
    format!("{{profile: proxy_allowlist, mode: unsafe_audit, {KEPT}}}")
}

fn ready(gate: &Gate) -> Value {
    once(&gate.agent(), "GET", "/readyz", &[], None).json()
}

#[test]
fn what_is_not_permitted_does_not_load() {
    if cannot() {
        return;
    }
    let authority = Authority::default();
    let (code, said) = configured("audit-refused", &authority, "[]").command("audited", "cat", &audited()).refuse();
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("action audited: egress.mode: unsafe_audit"), "{said}");
    assert!(said.contains("egress.permit_unsafe_audit"), "{said}");
    let setup = configured("audit-misspelt", &authority, "[\"audted\"]").command("audited", "cat", &enforced());
    let (code, said) = setup.refuse();
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("there is no action \"audted\""), "{said}");
}

#[test]
fn public_names_pass_and_are_recorded_and_nothing_else_does() {
    if cannot() {
        return;
    }
    let _namespace = Namespace::enter();
    let authority = Authority::default();
    let at = |address: &str, port: u16| SocketAddr::new(address.parse().unwrap(), port);
    let names = ["seen.example.org", "kept.example.org"];
    let _origins = (
        Origin::clear_at(at(PUBLIC, 80), "origin"),
        Origin::tls_at(&authority, &names, at(PUBLIC, 443), "secure"),
        Origin::clear_at(at(PUBLIC, 8080), "origin"),
        Origin::clear_at(at(OPENED, 80), "opened"),
    );
    let udp = Counting::udp(&format!("{PUBLIC}:443"));
    for network in ["isolated", "shared"] {
        let setup = configured("audit", &authority, "[\"audited\", \"fetched\"]")
            .config(&format!("[sandbox]\nnetwork = \"{network}\"\n[metrics]\nlisten = \"127.0.0.1:9464\"\n"))
            .command("audited", &python(), &audited())
            .command("enforced", &python(), &enforced())
            .fetch("fetched", &audited())
            .fetch("fetched_enforced", &enforced());
        let mut gate = with_gate(setup);
        let agent = Agent::connect(&gate.agent());

        // The control: what is refused inside works outside.
        let mut free = tries(&udp);
        free["tries"] = json!({"the address": format!("http('{PUBLIC}')"), "other": format!("http('{PUBLIC}', 8080)"),
            "opened": format!("http('{OPENED}')"), "udp": "udp()"});
        let outside = outside(TRY, &free);
        assert_eq!(
            outside,
            json!({"the address": "200 origin", "other": "200 origin", "opened": "200 opened", "udp": "hello"})
        );

        let (said, receipt) = inside(&agent, "audited", TRY, &tries(&udp));
        let passed = [("kept", "200 origin"), ("seen", "200 origin"), ("seen over tls", "secure")];
        for (what, wanted) in passed {
            assert_eq!(said[what], wanted, "{network}: {said:#}");
        }
        for (what, came) in said.as_object().unwrap() {
            let came = came.as_str().unwrap();
            let through =
                came.contains("origin") || came.contains("opened") || came.contains("secure") || came == "hello";
            assert_eq!(through, passed.iter().any(|(passed, _)| passed == what), "{network}: {what}: {came}");
        }
        for what in ["the address", "an opened address", "another port", "udp"] {
            assert_eq!(said[what], "errno: 1", "{network}: {what} is the kernel's to refuse: {said:#}");
        }
        let summary = &receipt["egress_evidence"][0];
        assert_eq!(summary["mode"], "unsafe_audit", "{summary}");
        assert!(summary["proxy"]["would_deny"].as_u64().unwrap() >= 2, "{summary}");

        let (said, receipt) = inside(&agent, "enforced", TRY, &tries(&udp));
        for (what, came) in said.as_object().unwrap() {
            let came = came.as_str().unwrap();
            assert_eq!(came == "200 origin", what == "kept", "{network}: {what}: {came}");
        }
        assert_eq!(receipt["egress_evidence"][0].get("mode"), None);

        // The gate's own check of a call lets it through too, and only here.
        let url = json!({"url": "http://seen.example.org/"});
        assert_eq!(agent.execute("fetched", &url).status, 200);
        assert_eq!(agent.execute("fetched_enforced", &url).code(), "403 egress_denied");
        assert_eq!(agent.execute("fetched", &json!({"url": format!("http://{PUBLIC}/")})).code(), "403 egress_denied");
        assert_eq!(agent.execute("fetched", &json!({"url": "http://inside.example.org/"})).code(), "403 egress_denied");

        recorded(&gate);
        suggested(&gate, &authority, &udp, network);
        assert_eq!(gate.stop(), 0);
        assert_eq!(gate.verify().0, 0);
    }
}

fn with_gate(setup: Setup) -> Gate {
    let gate = setup.start();
    heard(&gate);
    gate
}

/// It is loud wherever somebody looks.
fn recorded(gate: &Gate) {
    let flows = lines(gate, &["egress", "flows", "--verdict", "would_deny", "--action", "audited"]);
    // A question is let through before it is known which addresses the name has; a connection is not.
    let (asked, made): (Vec<&Value>, Vec<&Value>) = flows.iter().partition(|flow| flow["decided_by"] == "resolver");
    assert!(asked.iter().any(|flow| flow["name"] == "inside.example.org"), "{flows:#?}");
    assert!(made.iter().all(|flow| flow["name"] == "seen.example.org"), "{flows:#?}");
    let ports: Vec<_> = made.iter().map(|flow| &flow["port"]).collect();
    assert!(ports.contains(&&json!(80)) && ports.contains(&&json!(443)), "{flows:#?}");
    assert!(flows.iter().all(|flow| flow["rule"] == "name_not_allowed"), "{flows:#?}");
    let id = flows.iter().find(|flow| flow["port"] == 80).unwrap()["decision_id"].as_str().unwrap().to_owned();
    let (code, told, err) = operate(gate, &["egress", "explain", &id]);
    assert_eq!(code, 0, "{err}");
    assert!(told.contains("let through, and would be refused") && told.contains("seen.example.org"), "{told}");
    let ready = ready(gate);
    assert_eq!(ready["status"], "degraded", "{ready}");
    assert!(ready["reason"].as_str().unwrap().contains("audited"), "{ready}");
    let status = lines(gate, &["status", "--json"]).remove(0);
    assert_eq!(status["unsafe_audit"], json!(["audited", "fetched"]), "{status}");
    assert!(gate.logged(|line| line.contains("unsafe_audit") && line.contains("audited")));
    let metrics = latchgate_tests::http::Target::Tcp("127.0.0.1:9464".parse().unwrap());
    let text = String::from_utf8(once(&metrics, "GET", "/metrics", &[], None).body).unwrap();
    assert!(text.contains("latchgate_flows_total{verdict=\"would_deny\"}"), "{text}");
}

/// Under the profile that was suggested the same works without the mode, and no more.
fn suggested(gate: &Gate, authority: &Authority, udp: &Counting, network: &str) {
    let told = wait("a suggestion", Duration::from_secs(10), || {
        let (code, told, err) = operate(gate, &["egress", "suggest", "audited"]);
        assert_eq!(code, 0, "{err}");
        told.contains("seen.example.org").then_some(told)
    });
    assert!(told.contains("{domain: seen.example.org, exact: true, ports: [443], protocol: tls}  # new"), "{told}");
    assert!(told.contains("{domain: kept.example.org, exact: true, ports: [80], protocol: http}\n"), "{told}");
    for not in ["mixed", "inside", "internal", PUBLIC, "8080"] {
        assert!(!told.contains(not), "{not}: {told}");
    }
    let section: String = told.lines().filter(|line| !line.starts_with('#')).map(|line| format!("{line}\n")).collect();
    let section = section.strip_prefix("egress:").unwrap().trim_end();
    let setup = configured("suggested", authority, "[]")
        .config(&format!("[sandbox]\nnetwork = \"{network}\"\n"))
        .command("audited", &python(), section);
    let gate = with_gate(setup);
    assert_eq!(ready(&gate)["status"], "ready");
    let (said, receipt) = inside(&Agent::connect(&gate.agent()), "audited", TRY, &tries(udp));
    for (what, came) in said.as_object().unwrap() {
        let through = ["200 origin", "secure"].contains(&came.as_str().unwrap());
        assert_eq!(through, ["kept", "seen", "seen over tls"].contains(&what.as_str()), "{what}: {came}");
    }
    assert_eq!(receipt["egress_evidence"][0].get("mode"), None);
}
