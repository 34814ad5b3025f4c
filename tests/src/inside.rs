//! What the suites about sandboxes share: the same program run inside and outside, listeners that count who reached
//! them, and what a gate keeps in the kernel.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::agent::Agent;
use crate::gate::Gate;
use crate::http::{Connection, Response};

/// Runs the Python text in `code`; the parameters are in `p`.
const PYTHON: &str = r#"import json, sys; p = json.load(sys.stdin); exec(p["code"], globals())"#;

/// Whether one of the programs that every sandbox sees at its path is not here; says so.
pub fn missing(programs: &[&str]) -> bool {
    let missing = programs.iter().find(|program| !Path::new(program).exists());
    if let Some(program) = missing {
        crate::skip(&format!("{program} is not installed"));
    }
    missing.is_some()
}

/// The script of a command action that runs the Python text in its parameter `code`, with all parameters in `p`.
pub fn python() -> String {
    format!("exec /usr/bin/python3 -c '{PYTHON}'")
}

/// Runs `code` as an action; its answer must be a success, and its receipt is returned with it.
pub fn inside(agent: &Agent, action: &str, code: &str, params: &Value) -> (Value, Value) {
    let response = agent.execute(action, &with_code(code, params));
    assert_eq!(response.status, 200, "{}", String::from_utf8_lossy(&response.body));
    let answer = response.json();
    (answer["output"].clone(), receipt(agent, &answer))
}

/// Runs `code` here, where nothing holds it.
pub fn outside(code: &str, params: &Value) -> Value {
    let mut child = Command::new("/usr/bin/python3")
        .args(["-c", PYTHON])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(with_code(code, params).to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

pub fn with_code(code: &str, params: &Value) -> Value {
    let mut params = params.clone();
    params["code"] = json!(code);
    params
}

/// The receipt that an answer or a refusal names; its signature must be good.
pub fn receipt(agent: &Agent, answer: &Value) -> Value {
    let id = answer["receipt_id"].as_str().unwrap_or_else(|| panic!("no receipt_id in {answer}"));
    let response = agent.receipt(id);
    assert_eq!(response.status, 200, "{}", String::from_utf8_lossy(&response.body));
    let receipt = response.json();
    assert_eq!(receipt["signature_status"], "valid", "{receipt}");
    receipt
}

/// The same as [`Agent::execute`], for a gate that may not answer.
pub fn try_execute(agent: &Agent, action: &str, params: &Value) -> std::io::Result<Response> {
    let mut connection = Connection::open(&agent.target)?;
    send(&mut connection, agent, action, params)?;
    connection.response()
}

/// Sends a call and does not wait for its answer.
pub fn send(connection: &mut Connection, agent: &Agent, action: &str, params: &Value) -> std::io::Result<()> {
    let path = format!("/v1/actions/{action}/execute");
    let (authorization, proof, body) = (agent.authorization(), agent.proof("POST", &path), params.to_string());
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: {authorization}\r\ndpop: {proof}\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    connection.send(head.as_bytes())
}

/// The receipts in a gate's ledger, the newest first, read from the file.
pub fn receipts(gate: &Gate) -> Vec<Value> {
    let ledger = gate.ledger();
    let (code, said, error) =
        gate.cli(&["receipts", "list", "--json", "--limit", "1000", "--ledger", ledger.to_str().unwrap()]);
    assert_eq!(code, 0, "{error}");
    said.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Verifies a gate's ledger: the report, which must say that it is whole.
pub fn verified(gate: &Gate) -> Value {
    let (ledger, keys) = (gate.ledger(), gate.ledger().join("receipt-keys.json"));
    let (ledger, keys) = (ledger.to_str().unwrap(), keys.to_str().unwrap());
    let (code, said, error) = gate.cli(&["receipts", "verify", "--json", "--ledger", ledger, "--keys", keys]);
    assert_eq!(code, 0, "{said}{error}");
    let report: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(report["intact"], true, "{report}");
    report
}

/// Whether a refusal is this row of the contract's table.
pub fn refused(response: &Response, code: &str) -> Value {
    assert_eq!(response.code(), code, "{}", String::from_utf8_lossy(&response.body));
    response.json()
}

/// Polls until `found` gives something.
pub fn wait<T>(what: &str, patience: Duration, mut found: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(began.elapsed() < patience, "waited {patience:?} for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A listener that counts what reaches it, and answers.
pub struct Counting {
    pub address: SocketAddr,
    kind: Kind,
    count: Arc<AtomicUsize>,
    knocks: AtomicUsize,
}

enum Kind {
    Tcp,
    Udp,
}

impl Counting {
    /// Answers each connection as HTTP.
    pub fn tcp(address: &str) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        let (address, count) = (listener.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
        let counter = Arc::clone(&count);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                counter.fetch_add(1, Ordering::SeqCst);
                std::thread::spawn(move || {
                    let _ = stream.set_read_timeout(Some(Duration::from_secs(2)));
                    let _ = stream.read(&mut [0; 4096]);
                    let _ = stream.write_all(b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nhi");
                });
            }
        });
        Self { address, kind: Kind::Tcp, count, knocks: AtomicUsize::new(0) }
    }

    /// Sends each datagram back.
    pub fn udp(address: &str) -> Self {
        let socket = UdpSocket::bind(address).unwrap();
        let (address, count) = (socket.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
        let counter = Arc::clone(&count);
        std::thread::spawn(move || {
            let mut datagram = [0; 2048];
            while let Ok((length, from)) = socket.recv_from(&mut datagram) {
                counter.fetch_add(1, Ordering::SeqCst);
                let _ = socket.send_to(&datagram[..length], from);
            }
        });
        Self { address, kind: Kind::Udp, count, knocks: AtomicUsize::new(0) }
    }

    /// How many have reached it. It knocks by itself first: who came before that has been counted then.
    pub fn reached(&self) -> usize {
        match self.kind {
            Kind::Tcp => {
                let mut stream = TcpStream::connect(self.address).unwrap();
                stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
                let _ = stream.read_to_end(&mut Vec::new());
            }
            Kind::Udp => {
                let socket = UdpSocket::bind(SocketAddr::new(self.address.ip(), 0)).unwrap();
                socket.send_to(b"knock", self.address).unwrap();
                socket.recv_from(&mut [0; 8]).unwrap();
            }
        }
        let knocks = self.knocks.fetch_add(1, Ordering::SeqCst) + 1;
        self.count.load(Ordering::SeqCst) - knocks
    }

    /// As Python takes an address.
    pub fn target(&self) -> Value {
        json!([self.address.ip().to_string(), self.address.port()])
    }
}

/// The cgroup of a gate of this name: `gate` and `actions` are in it.
pub fn cgroup(name: &str) -> PathBuf {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap();
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap().to_owned();
    root().join(own).join("latchgate").join(name)
}

/// Where cgroup v2 is mounted.
pub fn root() -> PathBuf {
    ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
        .into_iter()
        .map(PathBuf::from)
        .find(|path| path.join("cgroup.controllers").exists())
        .expect("a cgroup v2 tree")
}

/// The leaves that there are.
pub fn leaves(gate: &Gate) -> Vec<PathBuf> {
    directories(&cgroup(gate.name()).join("actions"))
}

/// Its pins: a directory for each run that is there.
pub fn pins(name: &str) -> Vec<PathBuf> {
    directories(&Path::new("/sys/fs/bpf/latchgate").join(name))
}

pub fn directories(parent: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

pub fn processes(cgroup: &Path) -> Vec<u32> {
    let text = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|pid| pid.parse().ok()).collect()
}

/// Real uid of a process; `None` when it has ended, whether or not anybody has asked how.
pub fn uid_of(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
    if field("State:\t")?.starts_with(['Z', 'X']) {
        return None;
    }
    field("Uid:\t")?.split('\t').next()?.parse().ok()
}

/// Takes away what a gate that has ended keeps in the kernel on purpose: its program stays attached for the next one.
pub(crate) fn clear(name: &str) {
    for run in pins(name) {
        for link in fs::read_dir(&run).into_iter().flatten().flatten() {
            let _ = fs::remove_file(link.path());
        }
        let _ = fs::remove_dir(run);
    }
    let _ = fs::remove_dir(Path::new("/sys/fs/bpf/latchgate").join(name));
    let tree = cgroup(name);
    let _ = fs::write(tree.join("actions/cgroup.kill"), "1");
    for leaf in directories(&tree.join("actions")) {
        let _ = fs::remove_dir(leaf);
    }
    for part in ["actions", "gate", "unpinned", ""] {
        let _ = fs::remove_dir(tree.join(part));
    }
}
