//! A connection lives as long as its execution: longer than the answer that named it may be kept, and not a moment after.

use std::io::Read as _;
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use latchgate_tests::http::Connection;
use latchgate_tests::inside::{leaves, receipts, send, wait};
use serde_json::json;

use super::world::{NETWORKS, Plan};

const NAME: &str = "long.test";
/// The TTL of the resolver's answers.
const TTL: Duration = Duration::from_secs(60);

/// Hands out the connections that are made to it.
fn listen() -> (u16, Receiver<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (taken, streams) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            if taken.send(stream).is_err() {
                return;
            }
        }
    });
    (port, streams)
}

fn plan(port: u16) -> Plan {
    Plan::default()
        .host(NAME)
        .reaching("run", &[format!("{{domain: {NAME}, ports: [{port}], exact: true, protocol: tcp}}")])
}

/// In both networks at once: it waits for a TTL.
#[test]
fn a_connection_outlives_the_answer_that_named_it() {
    std::thread::scope(|scope| {
        for network in NETWORKS {
            scope.spawn(move || {
                let (port, streams) = listen();
                let world = plan(port).seconds(120).start("ttl", network);
                let echo = std::thread::spawn(move || {
                    let mut stream = streams.recv().unwrap();
                    let mut back = stream.try_clone().unwrap();
                    std::io::copy(&mut stream, &mut back).unwrap()
                });
                let code = format!(
                    "import socket, time; s = socket.create_connection(('{NAME}', {port}), 20)\n\
                     began, rounds = time.monotonic(), 0\n\
                     while time.monotonic() - began < {}:\n\
                     \x20   s.sendall(b'beat'); assert s.recv(64) == b'beat'; rounds += 1; time.sleep(1)\n\
                     # The address that the answer gave, long after it should have been forgotten, and the name anew.\n\
                     for there in (s.getpeername()[0], '{NAME}'): socket.create_connection((there, {port}), 20).close()\n\
                     print('lived', rounds)",
                    TTL.as_secs() + 3
                );
                let ran = world.python("run", &code);
                ran.succeeded("lived");
                assert_eq!(ran.flows("allow").len(), 3, "{ran}");
                assert_eq!(echo.join().unwrap(), ran.out.rsplit(' ').next().unwrap().trim().parse::<u64>().unwrap() * 4);
            });
        }
    });
}

/// However it ends: of itself with a child left behind, by its time, or by the gate's own end.
#[test]
fn a_connection_ends_with_its_execution() {
    for network in NETWORKS {
        let (port, streams) = listen();
        let hold = format!(
            "import socket, time; s = socket.create_connection(('{NAME}', {port}), 20); s.sendall(b'here'); time.sleep(100)"
        );
        let mut world = plan(port).seconds(4).start("end", network);
        let opened = || {
            let mut stream = streams.recv_timeout(Duration::from_secs(20)).unwrap();
            stream.read_exact(&mut [0; 4]).unwrap();
            stream
        };
        // A child that stays: the program is over, so the execution is.
        let left = format!("setsid python3 -c \"{hold}\" >/dev/null 2>&1 </dev/null & sleep 2; echo gone");
        let ran = world.shell("run", &left);
        ran.succeeded("gone");
        ended(opened(), "its program's end");
        assert_eq!(ran.one("allow", &json!({"name": NAME}))["end"], "open_at_close", "{ran}");

        // Its time is up.
        let mut call = Connection::open(&world.agent.target).unwrap();
        let params = json!({"argv": ["/usr/bin/python3", "-c", hold]});
        send(&mut call, &world.agent, "run", &params).unwrap();
        let stream = opened();
        let answer = call.response().unwrap();
        assert_eq!(answer.code(), "502 action_execution_failed");
        ended(stream, "its time");
        assert_eq!(receipts(&world.gate)[0]["egress_evidence"][1]["end"], "open_at_close");

        // The gate is killed: nobody is left to hold it.
        let mut call = Connection::open(&world.agent.target).unwrap();
        send(&mut call, &world.agent, "run", &params).unwrap();
        let stream = opened();
        wait("its leaf", Duration::from_secs(5), || (!leaves(&world.gate).is_empty()).then_some(()));
        world.gate.kill();
        ended(stream, "the gate's end");
        world.gate.start();
    }
}

/// The origin sees the end at once, and nothing more of the client.
fn ended(mut stream: TcpStream, by: &str) {
    let began = Instant::now();
    stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "after {by}"),
    }
    assert!(rest.is_empty() && began.elapsed() < Duration::from_secs(2), "{by}: {rest:?} {:?}", began.elapsed());
}
