//! The published Python client, unchanged, against the real gate: over Unix sockets and TCP, through everything that it
//! can do and every exception that this gate can make it raise.

#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used)]

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use latchgate_tests::gate::{Gate, Setup};
use latchgate_tests::origin::{Authority, Origin, ok};
use latchgate_tests::skip;
use serde_json::{Value, json};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// The interpreter that has the published client.
fn python() -> Option<PathBuf> {
    let named = std::env::var_os("LATCHGATE_TEST_PYTHON").map(PathBuf::from);
    let usual = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/latchgate/venv/bin/python"));
    let python = named.or_else(usual).filter(|python| python.exists());
    if python.is_none() {
        skip("no Python with the published client: make setup-test");
    }
    python
}

struct Scenario {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl Scenario {
    fn start(python: &PathBuf, name: &str, arguments: &Value) -> Self {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/python/published_client.py");
        let mut child = Command::new(python)
            .args([script, name, &arguments.to_string()])
            .env_remove("LATCHGATE_URL")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { child, output }
    }

    /// The next word that it says; `done` at the end.
    fn word(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    fn go_on(&mut self) {
        self.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    }

    fn done(mut self) {
        assert_eq!(self.word(), "done");
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Scenario {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a gate of these tests can do besides fetching: each without a way out.
fn actions(setup: Setup) -> Setup {
    let none = "{profile: none}";
    setup
        .command("echo", "exec cat", none)
        .command("failing", "echo '{}'; exit 3", none)
        .command("slow", "sleep 5; echo '{}'", none)
        .manifest(
            "missing",
            "action_id: missing\nversion: \"1\"\nprovider_module_digest: builtin:command\n\
             command: {argv: [/usr/bin/there-is-no-such-program]}\nio: {request_schema: {type: object}}\n\
             egress: {profile: none}\nrisk_level: low\nverifier_kind: none\n",
        )
        .manifest(
            "risky",
            "action_id: risky\nversion: \"1\"\nprovider_module_digest: builtin:command\n\
             command: {argv: [/bin/cat]}\nio: {request_schema: {type: object}}\n\
             egress: {profile: none}\nrisk_level: high\nverifier_kind: none\n",
        )
        .manifest(
            "scoped",
            "action_id: scoped\nversion: \"1\"\nprovider_module_digest: builtin:command\n\
             command: {argv: [/bin/cat]}\nio: {request_schema: {type: object}}\n\
             egress: {profile: none}\nrisk_level: low\nverifier_kind: none\nrequired_scopes: [\"tools:call\", \"files:write\"]\n",
        )
}

/// An HTTP action that may reach the domains given (YAML).
fn fetch(setup: Setup, id: &str, domains: &str, seconds: u32) -> Setup {
    let yaml = format!(
        "action_id: {id}\nversion: \"1.0.0\"\nprovider_module_digest: builtin:http_api\n\
         template: {{method: GET, url_template: \"{{{{url}}}}\"}}\n\
         io:\n  request_schema: {{type: object, properties: {{url: {{type: string}}}}, required: [url], additionalProperties: false}}\n\
         \x20 max_request_bytes: 65536\n  max_response_bytes: 65536\n\
         resource_limits: {{memory_mb: 256, timeout_seconds: {seconds}}}\n\
         egress: {{profile: proxy_allowlist, allowed_domains: [{domains}]}}\nrisk_level: low\nverifier_kind: http_status\n"
    );
    setup.manifest(id, &yaml)
}

fn trusting(setup: Setup, authority: &Authority, hosts: &[&str]) -> Setup {
    std::fs::write(setup.directory.join("ca.pem"), &authority.pem).unwrap();
    let hosts: String = hosts.iter().map(|host| format!("\"{host}\" = [\"127.0.0.1\"]\n")).collect();
    setup.config(&format!(
        "[egress]\nca_file = \"{{dir}}/ca.pem\"\nallow_addresses = [\"127.0.0.1/32\"]\n[egress.hosts]\n{hosts}"
    ))
}

fn tcp_listener(setup: Setup) -> Setup {
    setup.config("[[listeners]]\nname = \"tcp\"\naddress = \"127.0.0.1:0\"\n")
}

/// The address that the TCP listener was given, as the gate's log has it.
fn tcp_base(gate: &Gate) -> String {
    let log = gate.log_text();
    let line = log.lines().find(|line| line.contains("listening") && line.contains("listener=\"tcp\"")).unwrap();
    let at = line.split(' ').find_map(|field| field.strip_prefix("at=")).unwrap();
    format!("http://{at}")
}

fn socket(gate: &Gate) -> PathBuf {
    gate.directory().join("agent/gate.sock")
}

/// The receipts of a gate, oldest first.
fn receipts(gate: &Gate) -> Vec<Value> {
    let ledger = gate.ledger();
    let (code, out, said) =
        gate.cli(&["receipts", "list", "--json", "--limit", "1000", "--ledger", ledger.to_str().unwrap()]);
    assert_eq!(code, 0, "{said}");
    let mut receipts: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    receipts.sort_by_key(|receipt| receipt["sequence"].as_u64().unwrap());
    receipts
}

fn assert_intact(gate: &Gate) {
    let (code, out, said) = gate.verify();
    assert_eq!(code, 0, "{out}{said}");
}

#[test]
fn over_every_transport() {
    let Some(python) = python() else { return };
    let authority = Authority::default();
    let origin = Origin::tls(&authority, &["origin.test"], LOOPBACK, "hello");
    let port = origin.address.port();
    let setup = Setup::new("client-transports").config(
        "[identity.tcp]\nprincipal = \"over-tcp\"\n[[listeners]]\nname = \"default\"\n\
         path = \"{dir}/run/latchgate/gate.sock\"\nprincipal = \"default\"\n",
    );
    let setup = tcp_listener(setup);
    let setup = actions(fetch(setup, "fetch", &format!("{{domain: origin.test, ports: [{port}], exact: true}}"), 20));
    let setup = trusting(setup, &authority, &["origin.test"]);
    let config = "public_base_urls = [\"https://gate.example\"]\n";
    let gate = setup.first(config).start();
    let arguments = json!({
        "url": format!("https://origin.test:{port}/"),
        "runtime": gate.directory().join("run"),
        "socket": socket(&gate),
        "tcp": tcp_base(&gate),
    });
    Scenario::start(&python, "transports", &arguments).done();
    let principals: Vec<Value> = receipts(&gate).iter().map(|receipt| receipt["principal"].clone()).collect();
    let of = |name: &str| principals.iter().filter(|principal| *principal == name).count();
    assert_eq!((of("default"), of("tester"), of("over-tcp")), (2, 7, 4), "{principals:?}");
    assert_eq!(origin.requests().len(), 12);
    assert!(origin.requests().iter().all(|head| head.starts_with("GET / HTTP/1.1\r\n")), "{:?}", origin.requests());
    assert_intact(&gate);
}

#[test]
fn every_exception() {
    let Some(python) = python() else { return };
    let setup = tcp_listener(Setup::new("client-exceptions").config("[identity.tcp]\nprincipal = \"over-tcp\"\n"));
    let gate = actions(fetch(setup, "fetch", "origin.test", 20)).start();
    Scenario::start(&python, "exceptions", &json!({"socket": socket(&gate), "tcp": tcp_base(&gate)})).done();
    // The client that gave up after a second did not stop the action, nor lose its receipt.
    let began = Instant::now();
    let slow = loop {
        let found = receipts(&gate).into_iter().find(|receipt| receipt["action_id"] == "slow");
        if let Some(slow) = found {
            break slow;
        }
        assert!(began.elapsed() < Duration::from_secs(30), "no receipt");
        std::thread::sleep(Duration::from_millis(50));
    };
    assert_eq!(slow["normalized_result"]["kind"], "success");
    assert_intact(&gate);
}

#[test]
fn a_tcp_listener_without_an_identity_serves_nobody() {
    let Some(python) = python() else { return };
    let gate = actions(tcp_listener(Setup::new("client-nobody"))).start();
    Scenario::start(&python, "nobody", &json!({"socket": socket(&gate), "tcp": tcp_base(&gate)})).done();
}

#[test]
fn a_lease_that_ran_out() {
    let Some(python) = python() else { return };
    let gate = actions(Setup::new("client-expiry").config("[auth]\nlease_ttl_seconds = 4\n")).start();
    Scenario::start(&python, "expiry", &json!({"socket": socket(&gate)})).done();
}

#[test]
fn renewal_keeps_working_and_refills_nothing() {
    let Some(python) = python() else { return };
    let setup = Setup::new("client-renewal").config(
        "[auth]\nlease_ttl_seconds = 61\n[[budgets]]\nprincipal = \"tester\"\nwindow = \"month\"\nmax_calls = 3\n",
    );
    let gate = actions(setup).start();
    Scenario::start(&python, "renewal", &json!({"socket": socket(&gate)})).done();
    assert_eq!(receipts(&gate).len(), 3);
}

#[test]
fn a_hundred_calls_at_once() {
    let Some(python) = python() else { return };
    let gate = actions(Setup::new("client-concurrent")).start();
    Scenario::start(&python, "concurrent", &json!({"socket": socket(&gate)})).done();
    let receipts = receipts(&gate);
    assert_eq!(receipts.len(), 100);
    // They share one lease, because the client waits for one connection to be made.
    assert!(receipts.iter().all(|receipt| receipt["session_id"] == receipts[0]["session_id"]));
    assert_intact(&gate);
}

#[test]
fn a_lease_outlives_the_gate_that_gave_it() {
    let Some(python) = python() else { return };
    let began = Instant::now();
    let mut gate = actions(Setup::new("client-restart")).start();
    let mut scenario = Scenario::start(&python, "restart", &json!({"socket": socket(&gate)}));
    for way in ["stop", "kill"] {
        assert_eq!(scenario.word(), way);
        if way == "stop" {
            // A proof that is no younger than the replay set itself, with the skew that is granted to clients, is
            // refused after a restart: nobody knows what was used before there was one.
            std::thread::sleep(Duration::from_secs(7).saturating_sub(began.elapsed()));
            assert_eq!(gate.stop(), 0);
        } else {
            gate.kill();
        }
        scenario.go_on();
        assert_eq!(scenario.word(), "start");
        gate.start();
        scenario.go_on();
    }
    scenario.done();
    assert_eq!(receipts(&gate).len(), 3);
    assert_intact(&gate);
}

#[test]
fn origins_of_every_kind() {
    let Some(python) = python() else { return };
    let authority = Authority::default();
    let other = Origin::tls(&authority, &["origin.test"], LOOPBACK, "the other");
    let elsewhere = format!("https://origin.test:{}", other.address.port());
    let redirect = format!("HTTP/1.1 302 Found\r\nlocation: {elsewhere}/\r\ncontent-length: 0\r\n\r\n");
    let answers = move |head: &str| -> Vec<u8> {
        match head.split(' ').nth(1).unwrap_or_default() {
            "/headers" => b"HTTP/1.1 200 OK\r\nX-One: 1\r\nX-Many: a\r\nX-Many: b\r\nSet-Cookie: k=v; Path=/\r\n\
                Set-Cookie: l=w, x\r\nX-Latin: caf\xe9\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n"
                .to_vec(),
            "/bytes" => b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n\xff\x00\xfe\x80".to_vec(),
            "/redirect" => redirect.clone().into_bytes(),
            "/teapot" => b"HTTP/1.1 418 I'm a teapot\r\ncontent-length: 0\r\n\r\n".to_vec(),
            "/forged" => b"HTTP/1.1 403 Forbidden\r\nLatchgate-Decision-Id: forged\r\ncontent-length: 25\r\n\r\n\
                {\"error\":\"egress_denied\"}"
                .to_vec(),
            "/large/65536" => ok(&"x".repeat(65_536)),
            "/large/65537" => ok(&"x".repeat(65_537)),
            "/endless" => [&b"HTTP/1.1 200 OK\r\n\r\n"[..], &vec![b'x'; 1 << 20]].concat(),
            "/never" => Vec::new(),
            _ => ok("hello"),
        }
    };
    let origin = Origin::answering(&authority, &["origin.test"], LOOPBACK, Arc::new(answers));
    // A certificate of an authority that the gate does not know.
    let stranger = Origin::tls(&Authority::default(), &["origin.test"], LOOPBACK, "trust me");
    let ports = format!("[{}, {}, {}]", origin.address.port(), other.address.port(), stranger.address.port());
    let domains = format!(
        "{{domain: origin.test, ports: {ports}, exact: true}}, {{domain: wrong.test, ports: {ports}, exact: true}}"
    );
    let setup = fetch(Setup::new("client-origins"), "fetch", &domains, 30);
    let setup = fetch(setup, "hasty", &domains, 2);
    let gate = trusting(setup, &authority, &["origin.test", "wrong.test"]).start();
    let arguments = json!({
        "socket": socket(&gate),
        "base": format!("https://origin.test:{}", origin.address.port()),
        "other": elsewhere,
        "wrong_name": format!("https://wrong.test:{}", origin.address.port()),
        "stranger": format!("https://origin.test:{}", stranger.address.port()),
    });
    Scenario::start(&python, "origins", &arguments).done();
    assert_eq!(other.requests(), Vec::<String>::new(), "a redirect was followed");
    assert_eq!(stranger.requests(), Vec::<String>::new(), "a stranger was spoken to");
    assert!(origin.requests().iter().all(|head| !head.contains("wrong.test")), "{:?}", origin.requests());

    // What failed has a receipt that says how.
    let outcomes: Vec<String> = receipts(&gate)
        .iter()
        .map(|receipt| {
            let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
            let flow = &receipt["egress_evidence"][1];
            let result = &receipt["normalized_result"];
            format!(
                "{} {} {}",
                text(&result["kind"]),
                text(&receipt["verification_outcome"]["status"]),
                text(&flow["error"])
            )
        })
        .collect();
    let failed = "provider_failure provider_failed_before_verification";
    let expected = [
        "success verified -".to_owned(),
        "success verified -".to_owned(),
        "success verification_failed -".to_owned(),
        "success verification_failed -".to_owned(),
        "success verification_failed -".to_owned(),
        "success verified -".to_owned(),
        format!("{failed} -"),
        format!("{failed} -"),
        "success verified -".to_owned(),
        format!("{failed} tls_certificate"),
        format!("{failed} tls_certificate"),
        "success verified -".to_owned(),
        "timeout provider_failed_before_verification -".to_owned(),
    ];
    assert_eq!(outcomes, expected);
    assert_intact(&gate);
}
