//! Every way out that we know, from a process that forks, makes itself a daemon, and runs other programs.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use latchgate_tests::agent::Agent;
use latchgate_tests::gate::Setup;
use latchgate_tests::inside::{Counting, inside, leaves, missing, outside, python, wait};
use serde_json::{Value, json};

use crate::{NOTHING, asking, reaching};

const ATTEMPTS: &str = include_str!("attempts.py");

/// Where a name server listens, of this process's own.
fn dns_address() -> String {
    let [_, _, c, d] = std::process::id().to_be_bytes();
    format!("127.53.{c}.{}:53", d.clamp(1, 254))
}

#[test]
fn nothing_leaves_but_to_the_proxy() {
    if missing(&["/usr/bin/python3", "/usr/bin/curl", "/usr/bin/perl"]) {
        return;
    }
    let setup = Setup::new("ways");
    let (agents, operators) = (setup.directory.join("agent/gate.sock"), setup.directory.join("operator/operator.sock"));
    let scratch = setup.directory.join("outside");
    std::fs::create_dir(&scratch).unwrap();
    let gate = setup
        .command("none", &python(), NOTHING)
        .command("allowlist", &python(), &reaching(&["allowed.test"], 443))
        .start();
    let agent = Agent::connect(&gate.agent());

    let (tcp4, tcp6) = (Counting::tcp("127.0.0.1:0"), Counting::tcp("[::1]:0"));
    let (udp4, udp6) = (Counting::udp("127.0.0.1:0"), Counting::udp("[::1]:0"));
    let (dns_udp, dns_tcp) = (Counting::udp(&dns_address()), Counting::tcp(&dns_address()));
    let listeners = [&tcp4, &tcp6, &udp4, &udp6, &dns_udp, &dns_tcp];
    // An action that may use the proxy is told where it is; that is no secret to the others.
    let (port, _) = inside(&agent, "allowlist", &asking("print(PROXY)"), &json!({}));
    assert_ne!(port, 0);
    let mut params = json!({
        "tcp4": tcp4.target(), "tcp6": tcp6.target(), "udp4": udp4.target(), "udp6": udp6.target(),
        "dns": dns_udp.target(), "proxy": port, "unix": [agents, operators], "scratch": "/tmp", "daemon": false,
    });
    let said = |value: Value| -> BTreeMap<String, String> { serde_json::from_value(value).unwrap() };

    for action in ["none", "allowlist"] {
        for daemon in [false, true] {
            params["daemon"] = json!(daemon);
            let (tried, receipt) = inside(&agent, action, ATTEMPTS, &params);
            for (way, came_to) in said(tried) {
                let expected = match way.as_str() {
                    "proxy v4" | "proxy v6" | "proxy v4-mapped" if action == "allowlist" => "ok",
                    // The gate's resolver takes it, whatever server was meant: that one hears nothing, as is seen below.
                    // A datagram that is too short for a query goes nowhere.
                    "dns over tcp" if action == "allowlist" => "ok",
                    // Its flags cannot be read by a filter: callers must take the older call.
                    "clone3" => "ENOSYS",
                    _ => "EPERM",
                };
                assert_eq!(came_to, expected, "{way} in {action}, daemon: {daemon}");
            }
            let evidence = receipt["egress_evidence"].as_array().unwrap();
            let denied = &evidence[0]["kernel"]["denied"];
            // curl, perl, python and the shell's curl, beside the attempts of the program itself.
            assert!(denied["connect4"].as_u64() >= Some(8), "{denied}");
            for hook in ["connect6", "sendmsg4", "sendmsg6"] {
                assert!(denied[hook].as_u64() >= Some(1), "{hook}: {denied}");
            }
            assert_eq!(evidence[0]["incomplete"], false, "{}", evidence[0]);
            let asked_for_names = if action == "allowlist" { None } else { Some(&dns_udp) };
            for listener in [&tcp4, &tcp6, &udp4, &udp6].into_iter().chain(asked_for_names) {
                let named = |flow: &&Value| {
                    flow["address"] == json!(listener.address.ip()) && flow["port"] == json!(listener.address.port())
                };
                let flow = evidence[1..].iter().find(named).unwrap_or_else(|| panic!("{}", listener.address));
                assert_eq!((&flow["verdict"], &flow["decided_by"]), (&json!("deny"), &json!("hook")));
            }
        }
    }
    for listener in listeners {
        assert_eq!(listener.reached(), 0, "{}", listener.address);
    }

    params["scratch"] = json!(scratch);
    for daemon in [false, true] {
        params["daemon"] = json!(daemon);
        for (way, came_to) in said(outside(ATTEMPTS, &params)) {
            assert_eq!(came_to, "ok", "{way} outside");
        }
    }
    for listener in listeners {
        assert!(listener.reached() >= 2, "{}", listener.address);
    }
}

/// Starts a daemon that tries to connect until it succeeds, and ends.
const LEAVES_A_DAEMON: &str = "
import json, os, socket, time
reader, writer = os.pipe()
starter = os.getpid()
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    for descriptor in p['closes']:
        os.close(descriptor)
    os.write(writer, b'up')
    until = time.time() + 30
    # Not before the program that started it has ended.
    while os.path.exists('/proc/%d' % starter):
        time.sleep(0.01)
    while time.time() < until:
        try:
            socket.create_connection(tuple(p['target']), 2).close()
            break
        except OSError:
            time.sleep(0.01)
    os._exit(0)
os.read(reader, 2)
print(json.dumps('left'))
";

#[test]
fn a_daemon_does_not_outlive_its_action() {
    if missing(&["/usr/bin/python3", "/usr/bin/curl", "/usr/bin/perl"]) {
        return;
    }
    let listener = Counting::tcp("127.0.0.1:0");
    let gate = Setup::new("daemon").command("none", &python(), NOTHING).start();
    let agent = Agent::connect(&gate.agent());
    let params = json!({"target": listener.target(), "closes": [0, 1, 2]});
    // With its pipes in hand it does not hold the answer back either.
    for params in [&params, &json!({"target": listener.target(), "closes": []})] {
        let began = Instant::now();
        let (said, _) = inside(&agent, "none", LEAVES_A_DAEMON, params);
        assert_eq!(said, "left");
        assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
        // Its answer comes when nothing of it runs any more.
        assert_eq!(leaves(&gate), Vec::<std::path::PathBuf>::new());
    }
    assert_eq!(outside(LEAVES_A_DAEMON, &params), "left");
    wait("the daemon outside", Duration::from_secs(20), || (listener.reached() > 0).then_some(()));
    assert_eq!(listener.reached(), 1, "it was the one outside");
}
