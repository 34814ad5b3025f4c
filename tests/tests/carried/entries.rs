//! What an entry says is what is carried: exactly that name, exactly that network, that port.

use latchgate_tests::origin::{Authority, Origin};
use serde_json::json;

use super::world::{LOOPBACK, NETWORKS, Plan};

const NAME: &str = "exact.test";
const BELOW: &str = "sub.exact.test";

#[test]
fn an_exact_name_is_not_those_below_it_and_a_plain_one_is() {
    let authority = Authority::default();
    let origin = Origin::tls(&authority, &[NAME, BELOW], LOOPBACK, "reached");
    let port = origin.address.port();
    for network in NETWORKS {
        let world = Plan::default()
            .host(NAME)
            .host(BELOW)
            .reaching("exact", &[format!("{{domain: {NAME}, ports: [{port}], exact: true}}")])
            .reaching("plain", &[format!("{{domain: {NAME}, ports: [{port}]}}")])
            .reaching("below", &[format!("{{domain: \"*.{NAME}\", ports: [{port}]}}")])
            .start("exact", network);
        for (action, name, reached) in [
            ("exact", NAME, true),
            ("exact", BELOW, false),
            ("plain", NAME, true),
            ("plain", BELOW, true),
            ("below", NAME, false),
            ("below", BELOW, true),
        ] {
            let before = origin.requests().len();
            let ran = world.run(action, &["curl", "-sSk", "-m", "20", &format!("https://{name}:{port}/")]);
            if reached {
                ran.succeeded("reached");
                ran.one("allow", &json!({"name": name, "sni": name}));
            } else {
                assert_eq!(ran.code, 6, "{action} {name} in {network}: {ran}");
                ran.nothing_allowed();
                ran.any("deny", &json!({"name": name, "rule": "name_not_allowed"}));
            }
            assert_eq!(origin.requests().len() - before, usize::from(reached), "{action} {name} in {network}");
        }
    }
}

#[test]
fn a_network_is_carried_by_its_addresses_and_its_neighbours_are_not() {
    let inside = Origin::clear("127.9.8.7".parse().unwrap(), "inside");
    let (port, neighbour) = (inside.address.port(), "127.9.8.8");
    // The neighbour listens at the same port: only the rule keeps it from being reached.
    let outside = Origin::clear_at(format!("{neighbour}:{port}").parse().unwrap(), "outside");
    for network in NETWORKS {
        let world = Plan::default()
            .reaching("http", &[format!("{{cidr: 127.9.8.7/32, ports: [{port}], protocol: http}}")])
            .reaching("tcp", &[format!("{{cidr: 127.9.8.6/31, ports: [{port}], protocol: tcp}}")])
            .reaching("tls", &[format!("{{cidr: 127.9.8.7/32, ports: [{port}], protocol: tls}}")])
            .start("cidr", network);
        for action in ["http", "tcp"] {
            let ran = world.run(action, &["curl", "-sS", "-m", "20", &format!("http://127.9.8.7:{port}/")]);
            ran.succeeded("inside");
            let flow = ran.one("allow", &json!({"name": "127.9.8.7", "address": "127.9.8.7", "port": port}));
            assert_eq!((&flow["carried"], &flow["sni"]), (&json!(true), &json!(null)), "{ran}");
            // The same address by its other spelling, which is one address to the kernel.
            let mapped = format!(
                "import socket; s = socket.socket(socket.AF_INET6); s.connect(('::ffff:127.9.8.7', {port})); \
                 s.sendall(b'GET / HTTP/1.1\\r\\nhost: 127.9.8.7:{port}\\r\\nconnection: close\\r\\n\\r\\n'); print(s.recv(4096).decode())"
            );
            world.python(action, &mapped).succeeded("200 OK");
            for there in [format!("{neighbour}:{port}"), format!("127.9.8.7:{}", port ^ 1)] {
                let ran = world.run(action, &["curl", "-sSv", "-m", "20", &format!("http://{there}/")]);
                assert_eq!((ran.code, ran.err.contains("Operation not permitted")), (7, true), "{there}: {ran}");
                ran.nothing_allowed();
                ran.any("deny", &json!({"decided_by": "hook"}));
            }
        }
        // TLS was what the entry allowed, and this is not TLS.
        let ran = world.run("tls", &["curl", "-sS", "-m", "20", &format!("http://127.9.8.7:{port}/")]);
        ran.nothing_allowed();
        ran.any("deny", &json!({"decided_by": "proxy", "rule": "not_tls"}));
    }
    assert!(outside.requests().is_empty(), "{:?}", outside.requests());
    assert_eq!(inside.requests().len(), 2 * 2 * 2);
}
