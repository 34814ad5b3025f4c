//! What an agent gets from a gate in a container, and what an action there can do.

use std::path::PathBuf;
use std::time::Duration;

use latchgate_tests::agent::Agent;
use latchgate_tests::bundle::{Container, missing};
use latchgate_tests::inside::{inside, receipt, root, verified, wait};
use serde_json::{Value, json};

use super::{NAME, scene};

const CONNECT: &str = r#"
import errno, socket
try:
    socket.create_connection((p["host"], p["port"]), 5).close()
    print(json.dumps({"errno": None}))
except OSError as error:
    print(json.dumps({"errno": errno.errorcode.get(error.errno, str(error.errno))}))
"#;

const FETCH: &str = r#"
import ssl, urllib.request
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
answer = urllib.request.urlopen(p["url"], timeout=10, context=context)
print(json.dumps({"status": answer.status, "body": answer.read().decode()}))
"#;

const LOOK: &str = r#"
import os
status = {}
for line in (open("/proc/self/status") if os.path.exists("/proc/self/status") else []):
    name, _, value = line.partition(":")
    status[name] = value.strip()
print(json.dumps({
    "proc": sorted(os.listdir("/proc")),
    "sys": os.path.exists("/sys"),
    "status": status,
    "uid": os.getuid(),
    "root": sorted(os.listdir("/")),
}))
"#;

#[test]
fn an_allowed_call_reaches_its_origin_and_another_is_refused_in_the_kernel_with_its_record() {
    if missing() {
        return;
    }
    let scene = scene("pod-holds");
    let agent = Agent::connect(&scene.gate.agent());
    let port = scene.origin.address.port();
    let url = format!("https://{NAME}:{port}/");

    // Over HTTP, and by a program that knows nothing of proxies.
    let response = agent.execute("fetch", &json!({"url": url}));
    assert_eq!(response.status, 200, "{}", String::from_utf8_lossy(&response.body));
    let (got, evidence) = inside(&agent, "allowed", FETCH, &json!({"url": url}));
    assert_eq!(got, json!({"status": 200, "body": "hello"}));
    assert_eq!(scene.origin.requests().len(), 2);
    let evidence = &evidence["egress_evidence"];
    assert_eq!((&evidence[0]["agreement"], &evidence[1]["name"]), (&json!("equal"), &json!(NAME)), "{evidence}");

    // From outside a leaf, on the pod's network, the same address is reached: the refusal is the gate's.
    let reached = scene.pod.inside(|| std::net::TcpStream::connect(scene.origin.address).is_ok());
    assert!(reached);
    for action in ["python", "allowed"] {
        let (got, evidence) = inside(&agent, action, CONNECT, &json!({"host": "127.0.0.1", "port": port}));
        assert_eq!(got, json!({"errno": "EPERM"}), "{action}");
        let denied = &evidence["egress_evidence"][0]["kernel"]["denied"];
        assert_eq!(denied["connect4"], 1, "{evidence}");
    }
    assert_eq!(scene.origin.requests().len(), 2);
    verified(&scene.gate);
}

#[test]
fn an_action_there_sees_neither_the_container_nor_its_rights() {
    if missing() {
        return;
    }
    let scene = scene("pod-sees");
    let agent = Agent::connect(&scene.gate.agent());
    let (seen, _) = inside(&agent, "python", LOOK, &json!({}));
    // A fresh one is refused below a container's masked one; then there is none, and never the container's.
    assert_eq!(seen["proc"], json!([]), "{seen}");
    assert_eq!((seen["sys"].as_bool(), seen["uid"].as_u64()), (Some(false), Some(65534)), "{seen}");
    for hidden in ["sys", "run", "state"] {
        assert!(!seen["root"].as_array().unwrap().contains(&json!(hidden)), "{seen}");
    }
    // As the gate's own container sees it, and as this machine does.
    let mut slow = latchgate_tests::http::Connection::open(&scene.gate.agent()).unwrap();
    latchgate_tests::inside::send(&mut slow, &agent, "slow", &json!({})).unwrap();
    let leaves = scene.pod.cgroup("gate").join("latchgate").join(scene.gate.name()).join("actions");
    let found = wait("the action's processes", Duration::from_secs(10), || {
        let leaf = latchgate_tests::inside::directories(&leaves).into_iter().next()?;
        let pids = latchgate_tests::inside::processes(&leaf);
        (pids.len() >= 3).then_some(pids)
    });
    for pid in found {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
            assert_eq!(field(set), "0000000000000000", "{set} {status}");
        }
        assert_eq!(field("NoNewPrivs:"), "1");
        assert_ne!(field("Uid:").split('\t').next().unwrap(), "0");
    }
    assert!(root().join("cgroup.controllers").exists());
}

#[test]
fn an_agent_in_its_own_container_uses_the_published_client() {
    let python = std::env::var_os("LATCHGATE_TEST_PYTHON").map(PathBuf::from).filter(|python| python.exists());
    let Some(python) = python else {
        return latchgate_tests::skip("no Python with the published client: make setup-test");
    };
    if missing() {
        return;
    }
    let scene = scene("pod-agent");
    let sockets = scene.gate.directory().join("agent");
    let venv = python.parent().unwrap().parent().unwrap();
    // A virtual environment is links to the interpreter that it was made of.
    let base = std::process::Command::new(&python).args(["-c", "import sys; print(sys.base_prefix, end='')"]).output();
    let base = PathBuf::from(String::from_utf8(base.unwrap().stdout).unwrap());
    let container = Container::agent(&sockets).showing(venv);
    let container = if base.starts_with("/usr") { container } else { container.showing(&base) };
    let script = format!(
        r#"
import asyncio, os
from latchgate import LatchGateClient
async def main():
    async with LatchGateClient(socket="{socket}", public_base_url="http://localhost:3000", agent_id="tester") as client:
        answer = await client.execute("fetch", {{"url": "{url}"}})
        assert answer.output["data"]["body"] == "hello", answer.output
        print("answered", answer.receipt_id)
    try:
        os.unlink("{socket}")
    except OSError as error:
        print("unlink", error.errno)
    try:
        open("{directory}/other", "w")
    except OSError as error:
        print("create", error.errno)
asyncio.run(main())
"#,
        socket = sockets.join("gate.sock").display(),
        directory = sockets.display(),
        url = format_args!("https://{NAME}:{}/", scene.origin.address.port()),
    );
    let output = scene.pod.run("agent", &container, &[python.to_str().unwrap(), "-c", &script]);
    let (said, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}{error}");
    let lines: Vec<&str> = said.lines().collect();
    let id = lines[0].strip_prefix("answered ").unwrap();
    // EROFS or EACCES: what the mount says, or what the directory says to this uid.
    for (line, what) in lines[1..].iter().zip(["unlink", "create"]) {
        let errno = line.strip_prefix(what).unwrap().trim();
        assert!(["30", "13"].contains(&errno), "{line}");
    }
    assert_eq!(lines.len(), 3, "{said}");
    let agent = Agent::connect(&scene.gate.agent());
    let found: Value = receipt(&agent, &json!({"receipt_id": id}));
    assert_eq!(found["receipt_id"], id, "{found}");
}
