//! Each connection of a receipt has the payload as the kernel counted it and as the proxy did, and says whether that is
//! the same.

#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used)]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use latchgate_tests::agent::Agent;
use latchgate_tests::gate::{Gate, Setup};
use latchgate_tests::operator::{heard, lines, with_operator};
use serde_json::{Value, json};

const NAME: &str = "origin.agreement.test";

/// Runs the program in `source`, with the origin's port as `PORT`.
const RUN: &str = r#"exec /usr/bin/python3 -c '
import json, socket, struct, sys, threading, time
asked = json.load(sys.stdin)
exec(asked["source"], {**globals(), "PORT": asked["port"], "OWN": asked["own"], "NAME": "origin.agreement.test"})
'"#;

/// Many at once, of different sizes, some of them one after the other from one port.
const EQUAL: &str = r"
said, lock = [], threading.Lock()
def exchange(own, send, want):
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if own: s.bind(('127.0.0.1', own))
    s.connect((NAME, PORT))
    s.sendall(struct.pack('>II', send, want) + b'x' * send)
    got = 0
    while got < want: got += len(s.recv(65536))
    name = s.getsockname()[1]
    # The port is free again at once: all has been read on both sides.
    if own: s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    s.close()
    with lock: said.append([name, send + 8, got])
many = [threading.Thread(target=exchange, args=(0, 1000 * n + n, 3000 * n + 1)) for n in range(24)]
[t.start() for t in many]
for n in range(12): exchange(OWN, 100 + n, 200 + n)
[t.join() for t in many]
print(json.dumps(said))
";

/// Takes what fits into a small window, reads none of it, and hangs up.
const HANGS_UP: &str = r"
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
s.connect((NAME, PORT))
s.sendall(struct.pack('>II', 0, 8000000))
time.sleep(1)
s.close()
time.sleep(0.5)
print(1)
";

/// Is killed while it waits.
const WAITS: &str = r"
s = socket.socket()
s.connect((NAME, PORT))
s.sendall(struct.pack('>II', 500, 8) + b'x' * 10)
done = socket.socket()
done.connect((NAME, PORT))
done.sendall(struct.pack('>II', 5, 8) + b'x' * 5)
got = 0
while got < 8: got += len(done.recv(8))
done.close()
time.sleep(600)
";

/// Reads two lengths, then as much as the first says, and answers with as much as the second says.
fn origin() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let serve = |mut stream: TcpStream| -> std::io::Result<()> {
        let mut header = [0; 8];
        stream.read_exact(&mut header)?;
        let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
        std::io::copy(&mut (&stream).take(word(0).into()), &mut std::io::sink())?;
        stream.write_all(&vec![7; usize::try_from(word(4)).unwrap()])?;
        stream.read(&mut [0; 1]).map(|_| ())
    };
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || serve(stream));
        }
    });
    port
}

struct World {
    gate: Gate,
    agent: Agent,
    port: u16,
    /// What a client may bind to.
    own: u16,
}

impl World {
    fn new(network: &str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            latchgate_tests::skip("a real gate needs root");
            return None;
        }
        let port = origin();
        let egress = format!(
            "{{profile: proxy_allowlist, allowed_domains: [{{domain: {NAME}, ports: [{port}], protocol: tcp, exact: true}}]}}"
        );
        let gate = with_operator(Setup::new(&format!("agreement-{network}")))
            .roomy_command("run", RUN, &egress, 4_096)
            .bounded_command("short", RUN, &egress, 512, 4)
            .config(&format!(
                "[sandbox]\nnetwork = \"{network}\"\n\n[egress]\nallow_addresses = [\"127.0.0.0/8\"]\n\n\
                 [egress.hosts]\n\"{NAME}\" = [\"127.0.0.1\"]\n"
            ))
            .start();
        let agent = Agent::connect(&gate.agent());
        // Below the range that the kernel gives ports from, so that nobody gets it meanwhile.
        let first = 12_000 + u16::try_from(std::process::id() % 10_000).unwrap();
        let own = (first..).find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).unwrap();
        Some(Self { gate, agent, port, own })
    }

    /// What the program printed, and the evidence of its receipt.
    fn run(&self, action: &str, source: &str) -> (Value, Vec<Value>) {
        let answer = self.agent.execute(action, &json!({"source": source, "port": self.port, "own": self.own})).json();
        let id = answer["receipt_id"].as_str().unwrap_or_else(|| panic!("{answer}\n{}", self.gate.log_text()));
        let receipt = self.agent.receipt(id).json();
        (answer["output"].clone(), receipt["egress_evidence"].as_array().unwrap().clone())
    }

    /// The flows of the journal, once an operator is listened to.
    fn journal(&self) -> Vec<Value> {
        heard(&self.gate);
        lines(&self.gate, &["egress", "flows", "--limit", "1000"])
    }
}

fn figures(flow: &Value) -> [u64; 4] {
    let number = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("{flow}"));
    [
        number(&flow["kernel"]["bytes_sent"]),
        number(&flow["bytes_from_sandbox"]),
        number(&flow["kernel"]["bytes_received"]),
        number(&flow["bytes_to_sandbox"]),
    ]
}

fn connections(evidence: &[Value]) -> Vec<&Value> {
    evidence.iter().skip(1).filter(|flow| flow["protocol"] != "dns").collect()
}

fn witnesses(network: &str) {
    let Some(world) = World::new(network) else { return };

    // Each connection by itself, though many share a port, and all say what their client says.
    let (said, evidence) = world.run("run", EQUAL);
    let mut said: Vec<[u64; 3]> = serde_json::from_value(said)
        .unwrap_or_else(|error| panic!("{error}: {evidence:#?}\n{}", world.gate.log_text()));
    let flows = connections(&evidence);
    assert_eq!((flows.len(), said.len()), (36, 36), "{evidence:#?}");
    for flow in &flows {
        assert_eq!((&flow["agreement"], &flow["kernel"]["closed"]), (&json!("equal"), &json!(true)), "{flow:#}");
        let [sent, proxy_sent, received, proxy_received] = figures(flow);
        assert_eq!((sent, received), (proxy_sent, proxy_received), "{flow:#}");
        let port = flow["client"].as_str().unwrap().rsplit(':').next().unwrap().parse().unwrap();
        let at = said.iter().position(|one| *one == [port, sent, received]);
        said.remove(at.unwrap_or_else(|| panic!("no client says so: {flow:#}\n{said:?}")));
    }
    assert!(said.is_empty(), "{said:?}");
    assert_eq!((&evidence[0]["agreement"], &evidence[0]["incomplete"]), (&json!("equal"), &json!(false)));
    // The journal has the same, in the place of what it had when they ended.
    let journal = world.journal();
    let journal: Vec<&Value> = journal.iter().filter(|flow| flow["port"] == world.port).collect();
    assert_eq!(journal.len(), 36);
    assert!(
        journal.iter().all(|flow| flow["agreement"] == "equal" && flow["kernel"]["closed"] == true),
        "{journal:#?}"
    );

    let (_, evidence) = world.run("run", HANGS_UP);
    let flows = connections(&evidence);
    assert_eq!((flows.len(), &flows[0]["agreement"]), (1, &json!("disagree")), "{evidence:#?}");
    let [sent, proxy_sent, received, proxy_received] = figures(flows[0]);
    assert_eq!((sent, proxy_sent), (8, 8), "{evidence:#?}");
    assert!(received < proxy_received, "{evidence:#?}");
    assert_eq!(evidence[0]["agreement"], "disagree");

    let (_, evidence) = world.run("short", WAITS);
    let flows = connections(&evidence);
    let of = |wanted: &str| flows.iter().find(|flow| flow["agreement"] == wanted).copied();
    let open = of("open_at_kill").unwrap_or_else(|| panic!("{evidence:#?}"));
    assert!(figures(open)[0] == 18 && figures(open)[1] == 18, "{evidence:#?}");
    // What was over before the kill is judged like any other.
    assert_eq!(figures(of("equal").unwrap_or_else(|| panic!("{evidence:#?}"))), [13, 13, 8, 8]);
    assert_eq!((flows.len(), &evidence[0]["agreement"]), (2, &json!("open_at_kill")), "{evidence:#?}");
}

#[test]
fn kernel_and_proxy_are_compared_for_each_connection_in_a_namespace_of_its_own() {
    witnesses("isolated");
}

#[test]
fn kernel_and_proxy_are_compared_for_each_connection_in_the_gates_namespace() {
    witnesses("shared");
}
