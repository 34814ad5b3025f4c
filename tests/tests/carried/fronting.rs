//! The allowed name outside, another one inside; names in pieces; names over HTTPS.

use latchgate_tests::origin::{Authority, Origin};
use serde_json::json;

use super::world::{LOOPBACK, NETWORKS, Plan, World};

const NAME: &str = "front.test";
const OTHER: &str = "behind.test";

struct Stage {
    world: World,
    tls: Origin,
    clear: Origin,
}

fn stage(network: &str) -> Stage {
    let authority = Authority::default();
    // One origin for both names: it is the rule alone that keeps the other one from being served.
    let tls = Origin::tls(&authority, &[NAME, OTHER], LOOPBACK, "served");
    let clear = Origin::clear(LOOPBACK, "served");
    let (tls_port, clear_port) = (tls.address.port(), clear.address.port());
    let world = Plan::default()
        .host(NAME)
        .host(OTHER)
        .ca(&authority.pem)
        .reaching(
            "run",
            &[
                format!("{{domain: {NAME}, ports: [{tls_port}]}}"),
                format!("{{domain: {NAME}, ports: [{clear_port}], protocol: http}}"),
            ],
        )
        .reaching("ended", &[format!("{{domain: {NAME}, ports: [{tls_port}], tls: terminate}}")])
        .start("front", network);
    Stage { world, tls, clear }
}

/// Opens TLS to the allowed name with the server name that is given, and asks for the host that is given.
fn fronting(port: u16, sni: &str, host: &str) -> String {
    format!(
        "import socket, ssl\n\
         c = ssl.create_default_context(); c.check_hostname = False; c.verify_mode = ssl.CERT_NONE\n\
         s = c.wrap_socket(socket.create_connection(('{NAME}', {port}), 20), server_hostname={sni})\n\
         s.sendall(b'GET / HTTP/1.1\\r\\nhost: {host}:{port}\\r\\nconnection: close\\r\\n\\r\\n')\n\
         print(s.makefile('rb').read().decode())"
    )
}

#[test]
fn fronting_by_server_name_is_refused() {
    for network in NETWORKS {
        let Stage { world, tls, .. } = stage(network);
        let port = tls.address.port();
        let quoted = |name: &str| format!("'{name}'");
        for action in ["run", "ended"] {
            world.python(action, &fronting(port, &quoted(NAME), NAME)).succeeded("served");
            let before = tls.requests().len();
            for (sni, rule) in [(quoted(OTHER), "sni_mismatch"), ("None".to_owned(), "sni_missing")] {
                let ran = world.python(action, &fronting(port, &sni, NAME));
                ran.failed();
                ran.nothing_allowed();
                ran.one("deny", &json!({"name": NAME, "decided_by": "proxy", "rule": rule}));
            }
            assert_eq!(tls.requests().len(), before);
        }
    }
}

#[test]
fn fronting_by_host_is_refused_wherever_it_can_be_seen() {
    for network in NETWORKS {
        let Stage { world, tls, clear } = stage(network);
        let (port, clear_port) = (tls.address.port(), clear.address.port());
        let ran = world.python("ended", &fronting(port, &format!("'{NAME}'"), OTHER));
        ran.succeeded("403 Forbidden");
        ran.any("deny", &json!({"name": NAME, "rule": "host_mismatch"}));
        let header = format!("Host: {OTHER}:{clear_port}");
        let url = format!("http://{NAME}:{clear_port}/");
        let ran = world.run("run", &["curl", "-sS", "-m", "20", "-w", " %{http_code}", "-H", &header, &url]);
        ran.succeeded(" 403");
        ran.any("deny", &json!({"name": NAME, "rule": "host_mismatch"}));
        // The second request of a connection whose first one was good.
        let second = format!(
            "import socket; s = socket.create_connection(('{NAME}', {clear_port}), 20)\n\
             for host in ('{NAME}', '{OTHER}'): s.sendall(f'GET /{{host}} HTTP/1.1\\r\\nhost: {{host}}:{clear_port}\\r\\n\\r\\n'.encode())\n\
             print(s.makefile('rb').read().decode())"
        );
        world.python("run", &second).succeeded("served");
        let heard: Vec<String> = tls.requests().into_iter().chain(clear.requests()).collect();
        assert!(!heard.iter().any(|head| head.contains(OTHER)), "{heard:?}");
    }
}

#[test]
fn a_hello_in_single_bytes_is_judged_all_the_same() {
    for network in NETWORKS {
        let Stage { world, tls, .. } = stage(network);
        let port = tls.address.port();
        // The client's TLS in memory: sent a byte at a time, each in a segment of its own, or in TLS records of a byte.
        let slow = |sni: &str, records: bool| {
            format!(
                "import socket, ssl\n\
                 c = ssl.create_default_context(); c.check_hostname = False; c.verify_mode = ssl.CERT_NONE\n\
                 i, o = ssl.MemoryBIO(), ssl.MemoryBIO(); t = c.wrap_bio(i, o, server_hostname='{sni}')\n\
                 try: t.do_handshake()\n\
                 except ssl.SSLWantReadError: pass\n\
                 hello = o.read()\n\
                 if {records}: hello = b''.join(hello[:3] + b'\\0\\1' + hello[n:n + 1] for n in range(5, len(hello)))\n\
                 s = socket.create_connection(('{NAME}', {port}), 20); s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)\n\
                 if {records}: s.sendall(hello)\n\
                 else: [s.sendall(hello[n:n + 1]) for n in range(len(hello))]\n\
                 while True:\n\
                 \x20   got = s.recv(65536)\n\
                 \x20   if not got: raise SystemExit('closed')\n\
                 \x20   i.write(got)\n\
                 \x20   try: t.do_handshake(); break\n\
                 \x20   except ssl.SSLWantReadError: pass\n\
                 print('shaken')",
                records = if records { "True" } else { "False" },
            )
        };
        for records in [false, true] {
            let ran = world.python("run", &slow(NAME, records));
            // Not every server takes records of one byte; whichever answers, the name was judged first.
            ran.any("allow", &json!({"name": NAME, "sni": NAME, "name_verified": "sni"}));
            assert!(records || ran.out.contains("shaken"), "{ran}");
            let ran = world.python("run", &slow(OTHER, records));
            ran.failed();
            ran.nothing_allowed();
            ran.one("deny", &json!({"name": NAME, "sni": OTHER, "rule": "sni_mismatch"}));
        }
    }
}

#[test]
fn a_resolver_over_https_is_a_name_like_any_other() {
    for network in NETWORKS {
        let Stage { world, tls, .. } = stage(network);
        let port = tls.address.port();
        // By its name, by the address that the name has in truth, and as curl does it for a name that is allowed.
        for server in [format!("https://{OTHER}:{port}/dns-query"), format!("https://127.0.0.1:{port}/dns-query")] {
            let url = format!("https://{NAME}:{port}/");
            let ran = world.run("run", &["curl", "-sSk", "--doh-insecure", "-m", "20", "--doh-url", &server, &url]);
            ran.failed();
            ran.nothing_allowed();
        }
        assert!(tls.requests().is_empty(), "{:?}", tls.requests());
    }
}
