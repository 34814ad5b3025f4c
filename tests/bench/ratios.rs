//! What holding costs, as ratios of one run: each figure beside the same work without it, taken in turns, so that a machine
//! that is busy or slow is so for both. `make bench`.

#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used)]

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use latchgate_tests::agent::Agent;
use latchgate_tests::gate::{Gate, Setup};
use serde_json::json;

const ROUNDS: usize = 60;
const CONNECTIONS: usize = 400;
const MEGABYTES: usize = 256;
const NAME: &str = "bench.test";
/// What a call runs, and what it is compared with.
const SCRIPT: &str = "echo '{}'";

fn main() {
    if std::env::args().any(|argument| argument == "--list") {
        return;
    }
    let origin = serve();
    let (isolated, shared) = (world("isolated", origin), world("shared", origin));
    println!("| What | With | Without | Ratio |\n|---|---|---|---|");
    calls(&isolated, &shared);
    for (network, world) in [("isolated", &isolated), ("shared", &shared)] {
        connections(network, world, origin);
        throughput(network, world, origin);
    }
}

struct World {
    _gate: Gate,
    agent: Agent,
}

fn world(network: &str, port: u16) -> World {
    let entry = format!("{{domain: {NAME}, ports: [{port}], exact: true, protocol: tcp}}");
    let gate = Setup::new(&format!("bench-{network}"))
        .command("echo", SCRIPT, "{profile: none}")
        .roomy_command(
            "carried",
            "exec /usr/bin/python3 -c 'import sys, json; exec(json.load(sys.stdin)[\"code\"])'",
            &format!("{{profile: proxy_allowlist, allowed_domains: [{entry}]}}"),
            4096,
        )
        .config(&format!(
            "[sandbox]\nnetwork = \"{network}\"\n\n[egress]\nallow_addresses = [\"127.0.0.0/8\"]\n\n\
             [egress.hosts]\n\"{NAME}\" = [\"127.0.0.1\"]\n"
        ))
        .start();
    let agent = Agent::connect(&gate.agent());
    World { _gate: gate, agent }
}

/// Sends as many bytes as the first line of a connection says, and closes it.
fn serve() -> u16 {
    let listener = TcpListener::bind((IpAddr::V4(Ipv4Addr::LOCALHOST), 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || send(stream));
        }
    });
    port
}

fn send(mut stream: TcpStream) {
    let (mut asked, mut byte) = (String::new(), [0]);
    while stream.read(&mut byte).is_ok_and(|read| read == 1) && byte[0] != b'\n' {
        asked.push(char::from(byte[0]));
    }
    let (mut left, chunk) = (asked.parse().unwrap_or(0_usize), [0; 65_536]);
    while left > 0 {
        let length = left.min(chunk.len());
        if stream.write_all(&chunk[..length]).is_err() {
            return;
        }
        left -= length;
    }
}

/// The median: one round that was disturbed says nothing.
fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1000.0
}

fn row(what: &str, unit: &str, with: f64, without: f64) {
    println!("| {what} | {with:.2} {unit} | {without:.2} {unit} | {:.2} |", with / without);
}

fn timed(work: impl FnOnce()) -> Duration {
    let began = Instant::now();
    work();
    began.elapsed()
}

fn calls(isolated: &World, shared: &World) {
    let call = |world: &World| {
        let answer = world.agent.execute("echo", &json!({}));
        assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
    };
    let bare = || {
        let status = Command::new("/bin/sh").args(["-c", SCRIPT]).stdin(Stdio::null()).stdout(Stdio::null()).status();
        assert!(status.unwrap().success());
    };
    let (mut in_own, mut in_shared, mut without) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        in_own.push(timed(|| call(isolated)));
        in_shared.push(timed(|| call(shared)));
        without.push(timed(bare));
    }
    let (in_own, in_shared, without) = (median(in_own), median(in_shared), median(without));
    row("a call with its signed receipt, and a bare process (isolated)", "ms", in_own, without);
    row("a call with its signed receipt, and a bare process (shared)", "ms", in_shared, without);
    row("a call in a namespace of its own, and in the gate's", "ms", in_own, in_shared);
}

/// The seconds that the same Python takes, inside and outside: what starts it is not counted.
fn python(world: Option<&World>, code: &str) -> f64 {
    match world {
        Some(world) => {
            let answer = world.agent.execute("carried", &json!({ "code": code }));
            assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
            answer.json()["output"]["seconds"].as_f64().unwrap()
        }
        None => {
            let output = Command::new("/usr/bin/python3").args(["-c", code]).output().unwrap();
            assert!(output.status.success(), "{output:?}");
            serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()["seconds"].as_f64().unwrap()
        }
    }
}

fn client(host: &str, port: u16, connections: usize, bytes: usize) -> String {
    format!(
        "import json, socket, time\n\
         there = socket.getaddrinfo('{host}', {port}, type=socket.SOCK_STREAM)[0][4]\n\
         room = bytearray(1 << 20)\n\
         began = time.perf_counter()\n\
         for _ in range({connections}):\n\
         \x20   s = socket.create_connection(there); s.sendall(b'{bytes}\\n'); got = 0\n\
         \x20   while True:\n\
         \x20       read = s.recv_into(room)\n\
         \x20       if not read: break\n\
         \x20       got += read\n\
         \x20   assert got == {bytes}; s.close()\n\
         print(json.dumps({{'seconds': time.perf_counter() - began}}))"
    )
}

/// Three times each, in turns, and the quickest: what is compared is the work, not the neighbours.
fn quickest(world: &World, inside: &str, outside: &str) -> (f64, f64) {
    let (mut with, mut without) = (f64::MAX, f64::MAX);
    for _ in 0..3 {
        with = with.min(python(Some(world), inside));
        without = without.min(python(None, outside));
    }
    (with, without)
}

fn connections(network: &str, world: &World, port: u16) {
    let code = |host| client(host, port, CONNECTIONS, 100);
    let (with, without) = quickest(world, &code(NAME), &code("127.0.0.1"));
    let each = |seconds: f64| seconds * 1000.0 / CONNECTIONS as f64;
    row(&format!("a connection that is carried, and a direct one ({network})"), "ms", each(with), each(without));
}

fn throughput(network: &str, world: &World, port: u16) {
    let code = |host| client(host, port, 1, MEGABYTES << 20);
    let (with, without) = quickest(world, &code(NAME), &code("127.0.0.1"));
    let rate = |seconds: f64| MEGABYTES as f64 / seconds;
    row(&format!("bytes through the proxy, and direct ({network})"), "MiB/s", rate(with), rate(without));
}
