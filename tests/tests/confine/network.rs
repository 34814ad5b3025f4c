//! The network of a session: its profile's names, the ports that it answers at, nothing else; and the receipt of it.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use latchgate_tests::inside::{Counting, missing, receipts, verified, wait};
use latchgate_tests::session::Session;

use super::gate;

const NAMES: &str = "allow_addresses = [\"127.0.71.80/32\"]\n[egress.hosts]\n\"model.test\" = [\"127.0.71.80\"]\n";

#[test]
fn a_session_reaches_its_profiles_names_and_is_recorded() {
    if missing(&["/usr/bin/curl"]) {
        return;
    }
    let origin = Counting::tcp("127.0.71.80:0");
    let elsewhere = Counting::tcp("127.0.71.81:0");
    let port = origin.address.port();
    for (network, attach) in [("shared", "pinned"), ("isolated", "pinned"), ("isolated", "multi")] {
        let (gate, work) = gate(
            "model",
            &format!(
                "[sandbox]\nnetwork = \"{network}\"\n[egress]\nattach = \"{attach}\"\n{NAMES}[profiles.model]\nallowed_domains = [{{domain = \"model.test\", ports = [{port}], protocol = \"http\", exact = true}}]\n"
            ),
        );
        let before = (origin.reached(), elsewhere.reached());
        let curl = "curl -sS --noproxy '*' -m 5";
        let script = format!(
            "{curl} http://model.test:{port}/; echo code $?; {curl} http://{}/; echo code $?; {curl} http://127.0.71.80:{port}/; echo code $?; {curl} http://other.test:{port}/; echo code $?",
            elsewhere.address
        );
        let mut session = Session::start(&gate, "model", &work, &["/bin/sh", "-c", &script]);
        assert_eq!(session.end().code(), Some(0), "{}", session.shown());
        let shown = session.shown();
        assert!(shown.contains("hicode 0"), "{shown}");
        assert_eq!(shown.matches("code 7").count(), 2, "{shown}");
        assert!(shown.contains("code 6"), "{shown}");
        assert_eq!((origin.reached(), elsewhere.reached()), (before.0 + 1, before.1));

        let receipt =
            receipts(&gate).into_iter().find(|one| one["receipt_id"] == session.receipt_id().as_str()).unwrap();
        assert_eq!(receipt["action_id"], "confine:model");
        assert_eq!(receipt["principal"], "tester");
        assert_eq!(receipt["normalized_result"]["kind"], "success");
        let evidence = receipt["egress_evidence"].as_array().unwrap();
        assert_eq!(evidence[0]["agreement"], "equal", "{receipt}");
        assert!(evidence[0]["kernel"]["denied"]["connect4"].as_u64().unwrap() >= 2, "{receipt}");
        assert!(evidence.iter().any(|flow| flow["name"] == "model.test" && flow["verdict"] == "allow"), "{receipt}");
        assert!(evidence.iter().any(|flow| flow["name"] == "other.test" && flow["verdict"] == "deny"), "{receipt}");
        verified(&gate);
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn listed_ports_are_answered_and_others_are_not() {
    if missing(&["/usr/bin/python3"]) {
        return;
    }
    let (listed, other) = (free_port(), free_port());
    let (gate, work) = gate("inbound", &format!("[profiles.server]\ninbound_ports = [{listed}]\n"));
    let serve = "import socket, sys, threading\n\
                 def serve(port):\n    s = socket.create_server(('127.0.0.1', port))\n    print('serving', port, flush=True)\n    \
                 while True:\n        c, _ = s.accept()\n        c.recv(9)\n        c.sendall(b'hello'); c.close()\n\
                 for port in sys.argv[1:]: threading.Thread(target=serve, args=(int(port),)).start()\n";
    let (a, b) = (listed.to_string(), other.to_string());
    let mut session = Session::start(&gate, "server", &work, &["/usr/bin/python3", "-c", serve, &a, &b]);
    session.see(&format!("serving {listed}"));
    session.see(&format!("serving {other}"));
    for _ in 0..3 {
        let mut stream = TcpStream::connect(("127.0.0.1", listed)).unwrap();
        stream.write_all(b"x").unwrap();
        let mut heard = String::new();
        stream.read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "hello");
    }
    let refused = TcpStream::connect_timeout(&([127, 0, 0, 1], other).into(), Duration::from_millis(1500));
    assert_eq!(refused.unwrap_err().kind(), std::io::ErrorKind::TimedOut);
    session.signal(rustix::process::Signal::TERM);
    assert_eq!(session.end().code(), Some(128 + 15), "{}", session.shown());
    let receipt = wait("the receipt", Duration::from_secs(5), || receipts(&gate).into_iter().next());
    let counts = &receipt["egress_evidence"][0]["kernel"];
    assert_eq!(counts["inbound"], 3, "{receipt}");
    assert!(counts["denied"]["ingress"].as_u64().unwrap() > 0, "{receipt}");
}

#[test]
fn the_agent_calls_through_the_gate_and_not_around_it() {
    let Some(python) = std::env::var_os("LATCHGATE_TEST_PYTHON") else {
        return latchgate_tests::skip("LATCHGATE_TEST_PYTHON is not set");
    };
    // The packages of the client, where every uid may read them.
    let packages = std::process::Command::new(&python)
        .args(["-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
        .output()
        .unwrap();
    let packages = String::from_utf8(packages.stdout).unwrap().trim().to_owned();
    let shown = std::env::temp_dir().join(format!("lgtest-packages-{}", std::process::id()));
    let copied = std::process::Command::new("cp").args(["-r", &packages]).arg(&shown).status().unwrap();
    assert!(copied.success());
    let around = Counting::tcp("127.0.71.82:0");
    let agent = format!(
        r#"
import asyncio, json, socket, sys
from latchgate import LatchGateClient
async def main():
    async with LatchGateClient(agent_id="confined", socket=sys.argv[1]) as client:
        done = await client.execute("hello", {{}})
        print("through", json.dumps(done.output))
        try:
            socket.create_connection(("{}", {}), timeout=3)
            print("around")
        except PermissionError as refused:
            print("refused", refused.strerror)
asyncio.run(main())
"#,
        around.address.ip(),
        around.address.port()
    );
    let setup = latchgate_tests::gate::Setup::new("agent")
        .command("hello", "echo '\"held\"'", "{profile: none}")
        .config(&format!("[profiles.agent]\nread_only = [{shown:?}]\n"));
    let gate = latchgate_tests::operator::with_operator(setup).start();
    latchgate_tests::operator::heard(&gate);
    let work = gate.directory().join("work");
    std::fs::create_dir(&work).unwrap();
    std::fs::write(work.join("agent.py"), agent).unwrap();
    use std::os::unix::fs::PermissionsExt;
    for (path, mode) in [(gate.directory(), 0o755), (work.as_path(), 0o755)] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    let socket = gate.directory().join("agent/gate.sock").display().to_string();
    let path = format!("PYTHONPATH={}", shown.display());
    let command = ["/usr/bin/env", &path, "/usr/bin/python3", "agent.py", &socket];
    let mut session = Session::start(&gate, "agent", &work, &command);
    let code = session.end().code();
    let said = session.shown();
    let _ = std::fs::remove_dir_all(&shown);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("through \"held\"") && said.contains("refused Operation not permitted"), "{said}");
    assert_eq!(around.reached(), 0);
    let all = receipts(&gate);
    assert_eq!(all.len(), 2);
    assert!(all.iter().all(|one| one["principal"] == "tester"), "{all:?}");
}
