//! Where attackers may not get: a target in a network namespace of the test's own, and what reaches it.

use std::io::{BufRead, BufReader};
use std::net::UdpSocket;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};

use latchgate_tests::inside::wait;

/// Where the target serves: what is allowed by name, and three more.
pub const PORTS: [u16; 4] = [4000, 4001, 4002, 4003];

static COUNTER: AtomicU32 = AtomicU32::new(0);
static TOKENS: AtomicU32 = AtomicU32::new(0);

/// A token that is in nothing else that a target is sent.
pub fn token() -> String {
    format!("escaped-{}-{}-end", std::process::id(), TOKENS.fetch_add(1, Ordering::Relaxed))
}

/// A namespace with a listener on everything, one cable away from the gate's.
pub struct Target {
    /// Ends what listens on this side.
    over: Arc<AtomicBool>,
    namespace: String,
    process: Child,
    arrived: Arc<Mutex<Vec<String>>>,
    pub interface: String,
    /// This end of the cable.
    pub here: String,
    pub v4: String,
    /// Another address of the target, which no configuration allows.
    pub other_v4: String,
    pub v6: String,
    mac: String,
}

impl Target {
    pub fn start() -> Self {
        let (pid, number) = (std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        // As many processes as this run their suites here at one time; the last four bits are this one's own.
        let subnet = format!("10.{}.{}", 64 + (pid >> 8 & 63), pid & 255);
        let at = |host: u32| format!("{subnet}.{}", number * 8 + host);
        let v6 = |host: u32| format!("fd4c:4741:{:x}:{number:x}::{host}", pid & 0xffff);
        let namespace = format!("lgesc-{pid}-{number}");
        let interface = format!("lg{pid:x}n{number}");
        ip(&["netns", "add", &namespace]);
        ip(&["link", "add", &interface, "type", "veth", "peer", "name", "cable", "netns", &namespace]);
        ip(&["addr", "add", &format!("{}/29", at(1)), "dev", &interface]);
        ip(&["-6", "addr", "add", &format!("{}/64", v6(1)), "dev", &interface, "nodad"]);
        ip(&["link", "set", &interface, "up"]);
        for (family, address) in [("-4", format!("{}/29", at(2))), ("-4", format!("{}/29", at(3)))] {
            ip(&[family, "-n", &namespace, "addr", "add", &address, "dev", "cable"]);
        }
        ip(&["-6", "-n", &namespace, "addr", "add", &format!("{}/64", v6(2)), "dev", "cable", "nodad"]);
        for link in ["lo", "cable"] {
            ip(&["-n", &namespace, "link", "set", link, "up"]);
        }
        let mac = ip(&["-n", &namespace, "-j", "link", "show", "cable"]);
        let mac: Value = serde_json::from_str(&mac).unwrap();
        let mut process = Command::new("ip")
            .args(["netns", "exec", &namespace, "/usr/bin/python3", "-c", include_str!("../../escape/target.py")])
            .args([&json!(PORTS).to_string(), &at(1)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = process.stdout.take().unwrap();
        let arrived: Arc<Mutex<Vec<String>>> = Arc::default();
        let kept = Arc::clone(&arrived);
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                kept.lock().unwrap().push(line);
            }
        });
        let beside = UdpSocket::bind((at(1).as_str(), PORTS[0])).unwrap();
        beside.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let (kept, over) = (Arc::clone(&arrived), Arc::new(AtomicBool::new(false)));
        let ending = Arc::clone(&over);
        std::thread::spawn(move || {
            let mut datagram = [0; 2048];
            while !ending.load(Ordering::Relaxed) {
                if let Ok(length) = beside.recv(&mut datagram) {
                    kept.lock().unwrap().push(String::from_utf8_lossy(&datagram[..length]).into_owned());
                }
            }
        });
        let target = Self {
            over,
            namespace,
            process,
            arrived,
            interface,
            here: at(1),
            v4: at(2),
            other_v4: at(3),
            v6: v6(2),
            mac: mac[0]["address"].as_str().unwrap().to_owned(),
        };
        wait("the target", Duration::from_secs(20), || target.has("ready").then_some(()));
        target
    }

    fn has(&self, needle: &str) -> bool {
        self.arrived.lock().unwrap().iter().any(|line| line.contains(needle))
    }

    /// All that has come.
    pub fn lines(&self) -> Vec<String> {
        self.arrived.lock().unwrap().clone()
    }

    /// Whether the token has come, or comes soon.
    pub fn heard(&self, token: &str, patience: Duration) -> bool {
        let began = std::time::Instant::now();
        loop {
            if self.has(token) {
                return true;
            }
            if began.elapsed() > patience {
                return false;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// What an attacker is told.
    pub fn params(&self, token: &str) -> Value {
        json!({
            "token": token, "v4": self.v4, "v6": self.v6, "other_v4": self.other_v4, "port": PORTS[0], "here": self.here,
            "interface": self.interface, "mac": self.mac,
        })
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = Command::new("ip").args(["link", "del", &self.interface]).status();
        let _ = Command::new("ip").args(["netns", "del", &self.namespace]).status();
    }
}

/// Runs ip(8).
fn ip(arguments: &[&str]) -> String {
    let output = Command::new("ip").args(arguments).output().unwrap();
    assert!(output.status.success(), "ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
