//! One execution takes all that it can of one thing; another one, and whoever calls, notices nothing.
//!
//! Needs root, a v2 hierarchy and `/usr/bin/python3`.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used)]

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use latchgate_tests::agent::Agent;
use latchgate_tests::gate::{Gate, Setup};
use latchgate_tests::http::{Connection, Target, once};
use latchgate_tests::inside::{inside, missing, python, receipt, send, try_execute, with_code};
use latchgate_tests::skip;
use serde_json::{Value, json};

fn cannot() -> bool {
    if !rustix::process::geteuid().is_root() {
        skip("a real gate needs root");
        return true;
    }
    missing(&["/usr/bin/python3"])
}

/// An origin that echoes a byte for each connection and closes it; those that send `k` it keeps for as long as they do.
fn origin(address: &str) -> u16 {
    let listener = TcpListener::bind(format!("{address}:0")).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let mut byte = [0];
            if stream.set_read_timeout(Some(Duration::from_secs(5))).is_ok() && stream.read_exact(&mut byte).is_ok() {
                let _ = stream.write_all(&byte);
            }
            if &byte == b"k" {
                std::thread::spawn(move || {
                    let _ = stream.set_read_timeout(Some(Duration::from_secs(30)));
                    let _ = stream.read_to_end(&mut Vec::new());
                });
            }
        }
    });
    port
}

/// A gate with an attacker and another one, each in the profile of `*.origin.test` at the port.
fn gate(name: &str, network: &str, address: &str, port: u16, more: &str) -> Gate {
    let reach = format!(
        "{{profile: proxy_allowlist, allowed_domains: [{{domain: origin.test, ports: [{port}], exact: true, protocol: tcp}}, \
         {{domain: \"*.wide.example.org\", ports: [{port}]}}]}}"
    );
    Setup::new(name)
        .config(&format!("[sandbox]\nnetwork = \"{network}\"\nscratch_bytes = 4194304\n"))
        .config(&format!(
            "[egress]\nallow_addresses = [\"{address}/32\"]\n{more}[egress.hosts]\n\"origin.test\" = [\"{address}\"]\n"
        ))
        .command("attacker", &python(), &reach)
        .command("other", &python(), &reach)
        .start()
}

/// What the other one does, again and again, for as long as it is told to: work that needs the network, names and scratch.
const WORK: &str = r#"
import os, socket, time
done, slowest, end = 0, 0, time.monotonic() + p["seconds"]
while time.monotonic() < end:
    began = time.monotonic()
    with socket.create_connection(("origin.test", p["port"]), timeout=15) as s:
        s.sendall(b"x")
        assert s.recv(1) == b"x", done
    with open("/tmp/work", "wb") as f:
        f.write(b"w" * 100_000)
    os.unlink("/tmp/work")
    if os.fork() == 0:
        os._exit(0)
    os.wait()
    slowest = max(slowest, time.monotonic() - began)
    done += 1
    time.sleep(0.05)
refused = socket.socket().connect_ex(("192.0.2.1", 80))
print(json.dumps({"done": done, "slowest": slowest, "refused": refused}))
"#;

/// Runs `attack` while the other one works: the answer to the attack and its receipt. What the other one did must be whole.
fn while_another_works(gate: &Gate, attack: &str, port: u16) -> (Value, Value) {
    let (agent, other) = (Agent::connect(&gate.agent()), Agent::connect(&gate.agent()));
    std::thread::scope(|scope| {
        let params = json!({"port": port, "seconds": 6});
        let working = scope.spawn(move || inside(&other, "other", WORK, &params));
        std::thread::sleep(Duration::from_millis(500));
        let attacked = try_execute(&agent, "attacker", &with_code(attack, &json!({"port": port}))).unwrap();
        let answer = attacked.json();
        let (done, whole) = working.join().unwrap();
        assert!(done["done"].as_u64().unwrap() >= 10, "{done}");
        assert_eq!(done["refused"], 1, "{done}");
        let evidence = whole["egress_evidence"].as_array().unwrap();
        assert_eq!(evidence[0]["incomplete"], false, "nothing of its evidence was pushed out: {}", evidence[0]);
        assert_eq!(evidence[0]["proxy"]["connections"], done["done"], "{}", evidence[0]);
        assert!(evidence.iter().any(|item| item["decided_by"] == "hook" && item["address"] == "192.0.2.1"), "{whole}");
        (answer.clone(), receipt(&agent, &answer))
    })
}

fn rules(receipt: &Value, rule: &str) -> (usize, u64) {
    let items = receipt["egress_evidence"].as_array().unwrap();
    let of = || items.iter().filter(|item| item["rule"] == rule);
    (of().count(), of().map(|item| item["connections"].as_u64().unwrap_or(1)).sum())
}

#[test]
fn connections_of_one_execution() {
    if cannot() {
        return;
    }
    // Holds as many as it gets, then begins and ends more as fast as it can.
    let attack = r#"
import socket, time
# Once: the resolver has a bound of its own.
to = socket.gethostbyname("origin.test")
held, turned_away = [], 0
for _ in range(200):
    s = socket.create_connection((to, p["port"]), timeout=15)
    s.sendall(b"k")
    try:
        kept = s.recv(1) == b"k"
    except OSError:
        kept = False
    if kept:
        held.append(s)
    else:
        turned_away += 1
most = len(held)
for s in held:
    s.close()
late = tried = 0
end = time.monotonic() + 6
while time.monotonic() < end:
    tried += 1
    try:
        s = socket.create_connection((to, p["port"]), timeout=15)
        s.sendall(b"x")
        late += s.recv(1) == b"x"
        s.close()
    except OSError:
        pass
print(json.dumps({"most": most, "turned_away": turned_away, "late": late, "tried": tried}))
"#;
    for (network, address) in [("isolated", "127.79.1.1"), ("shared", "127.79.1.2")] {
        let port = origin(address);
        let gate =
            gate("bound-flows", network, address, port, "connections_burst = 250\nconnections_per_second = 10\n");
        let (answer, receipt) = while_another_works(&gate, attack, port);
        let said = &answer["output"];
        assert_eq!(said["most"], 64, "{network}: {answer}");
        assert_eq!(said["turned_away"], 136, "{network}: {said}");
        assert!(rules(&receipt, "connection_limit").0 >= 136, "{network}");
        let (records, connections) = rules(&receipt, "connection_rate");
        assert_eq!(records, 1, "one record stands for all past the rate");
        let (late, tried) = (said["late"].as_u64().unwrap(), said["tried"].as_u64().unwrap());
        // Fifty are left of the burst, and it lasts less than twenty seconds.
        assert!(late <= 250 && tried > late + 50, "{network}: {late} of {tried} passed");
        assert!(connections + 250 >= tried - late, "{network}: {connections} past the rate of {tried}, {late} passed");
    }
}

#[test]
fn a_receipt_says_what_it_has_no_room_for() {
    const MADE: u64 = 4_150;
    if cannot() {
        return;
    }
    // A long name in each of more connections than are recorded one by one.
    let (address, label) = ("127.79.1.9", "a-long-label-of-a-name".repeat(2));
    let name = format!("{label}.{label}.{label}.{label}.test");
    let port = origin(address);
    let reach = format!(
        "{{profile: proxy_allowlist, allowed_domains: [{{domain: {name}, ports: [{port}], exact: true, protocol: tcp}}]}}"
    );
    let gate = Setup::new("bound-receipt")
        .config("[sandbox]\nnetwork = \"shared\"\n")
        .config(&format!(
            "[egress]\nallow_addresses = [\"{address}/32\"]\nconnections_burst = 10000\nconnections_per_second = 10000\n\
             [egress.hosts]\n\"{name}\" = [\"{address}\"]\n"
        ))
        .bounded_command("crowd", &python(), &reach, 256, 120)
        .start();
    let connect = r#"
import socket
to, answered = socket.gethostbyname(p["name"]), 0
for _ in range(p["made"]):
    with socket.create_connection((to, p["port"]), timeout=15) as s:
        s.sendall(b"x")
        try:
            answered += s.recv(1) == b"x"
        except OSError:
            pass
print(json.dumps({"answered": answered}))
"#;
    let agent = Agent::connect(&gate.agent());
    let params = json!({"name": name, "port": port, "made": MADE});
    let (said, receipt) = inside(&agent, "crowd", connect, &params);
    assert_eq!(said["answered"], 4_096, "the others are past the bound");
    let evidence = receipt["egress_evidence"].as_array().unwrap();
    let summary = &evidence[0];
    assert_eq!(summary["incomplete"], true, "{summary}");
    assert_eq!(summary["proxy"]["connections"], 4_096, "all are in the sums: {summary}");
    let (kept, left_out) = (evidence.len() as u64 - 1, summary["left_out"].as_u64().unwrap());
    // One record stands for those past the bound.
    assert_eq!(kept + left_out, 4_096 + 1, "{summary}");
    assert!(kept > 1_000 && left_out > 100, "{kept} kept, {left_out} left out");
    assert!(evidence[1..].iter().all(|flow| flow["name"] == name.as_str() && flow["agreement"] == "equal"));
    assert!(receipt.to_string().len() < 4 << 20);
    latchgate_tests::inside::verified(&gate);
}

#[test]
fn refusals_of_the_kernel_of_one_execution() {
    if cannot() {
        return;
    }
    let attack = r#"
import socket, time
tried, end = 0, time.monotonic() + 4
while time.monotonic() < end:
    s = socket.socket()
    assert s.connect_ex(("192.0.2.77", 80)) == 1
    s.close()
    tried += 1
print(json.dumps({"tried": tried}))
"#;
    let (network, address) = ("shared", "127.79.2.1");
    let port = origin(address);
    let gate = gate("bound-events", network, address, port, "");
    let (answer, receipt) = while_another_works(&gate, attack, port);
    let tried = answer["output"]["tried"].as_u64().unwrap_or_else(|| panic!("{answer}"));
    assert!(tried > 2_000, "{tried}");
    let evidence = receipt["egress_evidence"].as_array().unwrap();
    assert_eq!(evidence.iter().filter(|item| item["decided_by"] == "hook").count(), 256);
    assert_eq!(total(&evidence[0]), tried);
    assert_eq!(evidence[0]["incomplete"], true, "it says that not all are there: {}", evidence[0]);
    // The log is not theirs to fill.
    assert!(gate.log_text().lines().count() < 60, "{}", gate.log_text());
}

/// The sum of what the kernel denied, by whatever it is listed.
fn total(summary: &Value) -> u64 {
    fn sum(value: &Value) -> u64 {
        match value {
            Value::Number(number) => number.as_u64().unwrap_or(0),
            Value::Object(members) => members.values().map(sum).sum(),
            Value::Array(items) => items.iter().map(sum).sum(),
            _ => 0,
        }
    }
    sum(&summary["kernel"]["denied"])
}

#[test]
fn names_and_queries_of_one_execution() {
    if cannot() {
        return;
    }
    // Names of the profile, each another one; the resolver hears of each twice as fast as it may.
    let attack = r#"
import socket, struct, time
def ask(s, number, name):
    labels = b"".join(bytes([len(l)]) + l.encode() for l in name.split("."))
    s.send(struct.pack(">HHHHHH", number, 0x100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", 1, 1))
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(2)
s.connect(("192.0.2.53", 53))
answered = refused = lost = 0
for i in range(1600):
    if i >= 500:
        time.sleep(0.009)
    ask(s, i, f"n{i}.wide.example.org")
    try:
        code = s.recv(512)[3] & 15
        answered += code == 0
        refused += code == 5
    except OSError:
        lost += 1
ask(s, 7, "n0.wide.example.org")
time.sleep(0.5)
again = s.recv(512)[3] & 15
for i in range(4000):
    try:
        ask(s, i, f"flood{i}.evil.example.org")
    except OSError:
        lost += 1
print(json.dumps({"answered": answered, "refused": refused, "lost": lost, "again": again}))
"#;
    for (network, address) in [("isolated", "127.79.3.1"), ("shared", "127.79.3.2")] {
        let port = origin(address);
        let gate = gate("bound-names", network, address, port, "");
        let (answer, receipt) = while_another_works(&gate, attack, port);
        let said = &answer["output"];
        let answered = said["answered"].as_u64().unwrap_or_else(|| panic!("{network}: {answer}"));
        assert!((900..=1024).contains(&answered), "{network}: {said}");
        assert!(said["refused"].as_u64().unwrap() >= 500, "{network}: {said}");
        assert_eq!(said["again"], 0, "a name that has an address keeps it: {said}");
        // Each is a record until there are enough; then one stands for the rest, the flood of other names included.
        let past = rules(&receipt, "dns_names_per_execution").1 + rules(&receipt, "dns_records_per_execution").1;
        assert!(rules(&receipt, "dns_names_per_execution").0 >= 200 && past >= 500, "{network}: {past}");
        let of_dns =
            receipt["egress_evidence"].as_array().unwrap().iter().filter(|item| item["protocol"] == "dns").count();
        assert!(of_dns <= 257, "{network}: {of_dns}");
    }
}

#[test]
fn scratch_and_processes_of_one_execution() {
    if cannot() {
        return;
    }
    let attack = r#"
import os, errno, time
def until(work):
    count = 0
    try:
        while True:
            work(count)
            count += 1
    except OSError as error:
        return [count, errno.errorcode[error.errno]]
big = open("/tmp/big", "wb", buffering=0)
written = until(lambda i: big.write(b"x" * 65536))
big.truncate(0)
made = until(lambda i: os.close(os.open(f"/tmp/{i}", os.O_CREAT | os.O_WRONLY)))
children = []
def bomb(i):
    child = os.fork()
    if child == 0:
        while True:
            time.sleep(60)
    children.append(child)
forked = until(bomb)
for child in children:
    os.kill(child, 9)
    os.waitpid(child, 0)
print(json.dumps({"written": written, "made": made, "forked": forked}))
"#;
    let address = "127.79.4.1";
    let port = origin(address);
    let gate = gate("bound-scratch", "isolated", address, port, "");
    let (answer, _) = while_another_works(&gate, attack, port);
    let said = &answer["output"];
    let count = |name: &str| said[name][0].as_u64().unwrap_or_else(|| panic!("{answer}"));
    assert!(count("written") <= 64 && said["written"][1] == "ENOSPC", "{said}");
    assert!((500..=1024).contains(&count("made")) && said["made"][1] == "ENOSPC", "{said}");
    assert!((30..=64).contains(&count("forked")) && said["forked"][1] == "EAGAIN", "{said}");
}

#[test]
fn a_client_that_does_not_read_its_answer_is_left() {
    if cannot() {
        return;
    }
    let setup = Setup::new("bound-reader").config("[limits]\nwrite_timeout_seconds = 2\n");
    let yaml = "action_id: large\nversion: \"1\"\nprovider_module_digest: builtin:command\n\
        command: {argv: [/bin/sh, -c, \"printf '\\\"'; head -c 6000000 /dev/zero | tr '\\\\0' x; printf '\\\"'\"], stdin: none}\n\
        io: {request_schema: {type: object}, max_response_bytes: 8000000}\n\
        egress: {profile: none}\nrisk_level: low\nverifier_kind: none\n";
    let gate = setup.manifest("large", yaml).start();
    let agent = Agent::connect(&gate.agent());
    assert_eq!(
        agent.execute("large", &json!({})).json()["output"].as_str().unwrap().len(),
        6_000_000,
        "one that reads"
    );
    let sockets = || {
        let all = std::fs::read_dir(format!("/proc/{}/fd", gate.pid())).unwrap().flatten();
        all.filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:")))
            .count()
    };
    std::thread::sleep(Duration::from_millis(500));
    let before = sockets();
    let mut connection = Connection::open(&gate.agent()).unwrap();
    send(&mut connection, &agent, "large", &json!({})).unwrap();
    let began = Instant::now();
    // It is there, then it is gone although this end has closed nothing.
    while sockets() <= before {
        assert!(began.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(10));
    }
    while sockets() > before {
        assert!(began.elapsed() < Duration::from_secs(25), "it is still held");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(began.elapsed() > Duration::from_secs(2), "{:?}", began.elapsed());
    assert!(connection.response().is_err(), "the answer was broken off");
    assert_eq!(agent.execute("large", &json!({})).status, 200);
}

#[test]
fn bodies_of_strangers_take_no_more_than_their_listener_has() {
    if cannot() {
        return;
    }
    let gate = Setup::new("bound-bodies")
        .config(
            "[[listeners]]\nname = \"second\"\npath = \"{dir}/second/gate.sock\"\nprincipal = \"neighbour\"\n\
             [limits]\nmax_request_bytes = 262144\nmax_body_bytes_in_flight = 1048576\nbody_timeout_seconds = 6\n",
        )
        .command("echo", "cat", "{profile: none}")
        .start();
    let agent = Agent::connect(&gate.agent());
    let second = Agent::connect(&Target::Unix(gate.directory().join("second/gate.sock")));
    assert_eq!(agent.execute("echo", &json!({"a": 1})).status, 200);
    // Nobody in particular: each sends all of a large body but its end.
    let path = gate.directory().join("agent/gate.sock");
    let mut strangers = Vec::new();
    for _ in 0..6 {
        let mut stream = UnixStream::connect(&path).unwrap();
        let head = "POST /v1/leases HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 262144\r\n\r\n";
        stream.write_all(head.as_bytes()).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
        let _ = stream.write_all(&vec![b' '; 262_000]);
        strangers.push(stream);
    }
    std::thread::sleep(Duration::from_millis(300));
    // Four of them fill the room; the rest, and whoever comes, is told to come again.
    let refused = agent.execute("echo", &json!({"filler": "x".repeat(4000)}));
    assert_eq!(refused.code(), "429 rate_limited");
    assert_eq!(refused.header("retry-after"), Some("1"));
    // What has no body, and another listener, is served as ever.
    assert_eq!(once(&gate.agent(), "GET", "/healthz", &[], None).status, 200);
    assert_eq!(second.execute("echo", &json!({"filler": "x".repeat(4000)})).status, 200);
    let began = Instant::now();
    while agent.execute("echo", &json!({"filler": "x".repeat(4000)})).status != 200 {
        assert!(began.elapsed() < Duration::from_secs(15), "the room comes back with the time limit of bodies");
        std::thread::sleep(Duration::from_millis(200));
    }
    drop(strangers);
}
