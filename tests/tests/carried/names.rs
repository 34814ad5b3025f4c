//! DNS as programs ask it: through the C library, in Python and Node, and by hand as Go does; and as a way out.

use latchgate_tests::skip;
use serde_json::{Value, json};

use super::world::{Archive, NETWORKS, Plan, Ran, World, has_node};

const NAME: &str = "named.test";
const OTHER: &str = "unnamed.test";

/// Asks servers by hand: a list of `[transport, server, name, type]`. Says of each answer where it came from, the code,
/// the addresses, and the code and text of the extended error.
const ASK: &str = r#"
import json, socket, struct, sys
def question(name, kind):
    labels = b"".join(bytes([len(l)]) + l.encode() for l in name.split(".")) + b"\0"
    opt = b"\0" + struct.pack(">HHIH", 41, 1232, 0, 0)
    return struct.pack(">HHHHHH", 0x1234, 0x100, 1, 0, 0, 1) + labels + struct.pack(">HH", kind, 1) + opt, len(labels)
def read(answer, length):
    identity, flags, _, answers, authority, additional = struct.unpack(">HHHHHH", answer[:12])
    assert identity == 0x1234 and flags & 0x8000
    at, addresses, error = 12 + length + 4, [], None
    for _ in range(answers + authority + additional):
        while answer[at] and answer[at] < 192: at += answer[at] + 1
        at += 2 if answer[at] else 1
        kind, _, _, size = struct.unpack(">HHIH", answer[at:at + 10])
        data = answer[at + 10:at + 10 + size]
        at += 10 + size
        if kind == 1: addresses.append(socket.inet_ntoa(data))
        if kind == 41:
            while data:
                code, size = struct.unpack(">HH", data[:4])
                if code == 15: error = [struct.unpack(">H", data[4:6])[0], data[6:4 + size].decode()]
                data = data[4 + size:]
    return {"code": flags & 15, "addresses": addresses, "error": error}
said = []
for transport, server, name, kind in json.loads(sys.argv[1]):
    message, length = question(name, kind)
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    try:
        if transport == "tcp":
            s = socket.socket(family, socket.SOCK_STREAM); s.settimeout(10); s.connect((server, 53))
            s.sendall(struct.pack(">H", len(message)) + message)
            stream = s.makefile("rb")
            answer = stream.read(struct.unpack(">H", stream.read(2))[0])
            source = s.getpeername()
        else:
            s = socket.socket(family, socket.SOCK_DGRAM); s.settimeout(10)
            if transport == "connected": s.connect((server, 53)); s.send(message)
            else: s.sendto(message, (server, 53))
            answer, source = s.recvfrom(4096)
        said.append({"from": list(source[:2]), **read(answer, length)})
    except OSError as error:
        said.append({"errno": error.errno, "what": str(error)})
print(json.dumps(said))
"#;

/// The command that looks a name up.
type Argv = Box<dyn Fn(&str) -> Vec<String>>;

fn ask(world: &World, action: &str, queries: &Value) -> (Vec<Value>, Ran) {
    let ran = world.run(action, &["/usr/bin/python3", "-c", ASK, &queries.to_string()]);
    assert_eq!(ran.code, 0, "{ran}");
    (serde_json::from_str(&ran.out).unwrap(), ran)
}

fn world(network: &str) -> World {
    Plan::default()
        .host(NAME)
        .host(OTHER)
        .action("alone", "{profile: none}")
        .reaching("run", &[format!("{{domain: {NAME}, ports: [4433]}}")])
        .start("names", network)
}

#[test]
fn the_c_library_python_and_node_find_names_of_the_profile_and_no_others() {
    for network in NETWORKS {
        let world = world(network);
        let look = |hints: &str, name: &str| {
            format!("import socket; print(socket.getaddrinfo('{name}', 4433, type=socket.SOCK_STREAM, {hints}))")
        };
        let mut asking: Vec<(&str, Argv)> = vec![
            ("getent ahostsv4", Box::new(|name| vec!["getent".into(), "ahostsv4".into(), name.into()])),
            ("getent ahosts", Box::new(|name| vec!["getent".into(), "ahosts".into(), name.into()])),
            ("getent hosts", Box::new(|name| vec!["getent".into(), "hosts".into(), name.into()])),
        ];
        // AI_ADDRCONFIG asks for addresses of families that the machine has: inside, it has nothing but lo.
        for (label, hints) in [
            ("Python", ""),
            ("Python, AI_ADDRCONFIG", "flags=socket.AI_ADDRCONFIG"),
            ("Python, AF_INET, AI_ADDRCONFIG", "family=socket.AF_INET, flags=socket.AI_ADDRCONFIG"),
        ] {
            asking.push((label, Box::new(move |name| vec!["/usr/bin/python3".into(), "-c".into(), look(hints, name)])));
        }
        if has_node() {
            for (label, call) in [
                ("Node lookup", "lookup(NAME, {hints: 0}"),
                ("Node lookup, ADDRCONFIG", "lookup(NAME, {hints: require('dns').ADDRCONFIG}"),
                ("Node resolve4", "resolve4(NAME"),
            ] {
                let done = "(e, a) => { if (e) { console.error(e); process.exit(1) } console.log(a) }";
                let node = move |name: &str| {
                    let call = call.replace("NAME", &format!("'{name}'"));
                    vec!["/usr/bin/node".into(), "-e".into(), format!("require('dns').{call}, {done})")]
                };
                asking.push((label, Box::new(node)));
            }
        }
        for (label, argv) in asking {
            let run = |name: &str| {
                let argv = argv(name);
                world.run("run", &argv.iter().map(String::as_str).collect::<Vec<_>>())
            };
            let ran = run(NAME);
            assert_eq!((ran.code, ran.out.contains("198.18.")), (0, true), "{label} in {network}: {ran}");
            let ran = run(OTHER);
            assert_eq!((ran.code != 0, ran.out.contains("198.18.")), (true, false), "{label} in {network}: {ran}");
            ran.any("deny", &json!({"name": OTHER, "protocol": "dns", "decided_by": "resolver"}));
        }
    }
}

#[test]
fn whatever_server_is_asked_answers_from_its_own_address() {
    let servers = ["192.0.2.53", "1.1.1.1", "127.0.0.53", "2001:db8::53", "::ffff:198.51.100.53", "198.51.100.1"];
    let transports = ["udp", "connected", "tcp"];
    for network in NETWORKS {
        let world = world(network);
        let mut queries = Vec::new();
        for server in servers {
            for transport in transports {
                queries.push(json!([transport, server, NAME, 1]));
                queries.push(json!([transport, server, OTHER, 1]));
            }
        }
        let (said, ran) = ask(&world, "run", &json!(queries));
        let denied = ran.one("deny", &json!({"name": OTHER, "protocol": "dns"}));
        for (query, answer) in queries.iter().zip(&said) {
            assert_eq!(answer["from"], json!([query[1], 53]), "{query} in {network}: {answer}");
            if query[2] == NAME {
                assert_eq!((&answer["code"], &answer["error"]), (&json!(0), &json!(null)), "{query}: {answer}");
                let address = answer["addresses"][0].as_str().unwrap();
                assert!(address.starts_with("198.18."), "{query}: {answer}");
                assert_eq!(answer["addresses"], said[0]["addresses"], "one name is one address: {answer}");
            } else {
                // REFUSED, and why: Blocked (RFC 8914 §4.16), with the id that the record has.
                assert_eq!((&answer["code"], &answer["error"][0]), (&json!(5), &json!(15)), "{query}: {answer}");
                let (text, id) = (answer["error"][1].as_str().unwrap(), denied["decision_id"].as_str().unwrap());
                assert!(text.contains("name_not_allowed") && text.contains(id), "{query}: {answer} {denied}");
            }
        }
    }
}

#[test]
fn other_types_have_no_data_or_are_refused() {
    for network in NETWORKS {
        let world = world(network);
        let (aaaa, https, svcb, mx, txt, null) = (28, 65, 64, 15, 16, 10);
        let kinds = [aaaa, https, svcb, mx, txt, null];
        let queries: Vec<Value> = kinds.iter().map(|kind| json!(["udp", "192.0.2.53", NAME, kind])).collect();
        let (said, ran) = ask(&world, "run", &json!(queries));
        for (kind, answer) in kinds.iter().zip(&said) {
            let expected = if [aaaa, https, svcb].contains(kind) { 0 } else { 5 };
            assert_eq!((&answer["code"], &answer["addresses"]), (&json!(expected), &json!([])), "{kind}: {answer}");
        }
        ran.any("deny", &json!({"name": NAME, "rule": "dns_type_not_allowed"}));
    }
}

#[test]
fn a_tunnel_is_refused_label_by_label_and_recorded() {
    for network in NETWORKS {
        let world = world(network);
        // What a tunnel does: data in names below a zone of its own, in many types, over every transport; and the same
        // below a name that is allowed, whose zone nobody asks.
        let data = |n: usize| format!("{}.{n}", "6f7574".repeat(10));
        let mut queries = Vec::new();
        for (n, transport) in ["udp", "connected", "tcp"].iter().cycle().take(60).enumerate() {
            let kind = [1, 16, 10, 28, 255][n % 5];
            queries.push(json!([transport, "192.0.2.53", format!("{}.{OTHER}", data(n)), kind]));
        }
        let (said, ran) = ask(&world, "run", &json!(queries));
        for (query, answer) in queries.iter().zip(&said) {
            assert_eq!((&answer["code"], &answer["addresses"]), (&json!(5), &json!([])), "{query}: {answer}");
        }
        // Each name is in the receipt, as it was asked.
        for query in &queries {
            ran.one("deny", &json!({"name": query[2], "protocol": "dns", "decided_by": "resolver"}));
        }
        let (said, ran) = ask(&world, "alone", &json!([["udp", "192.0.2.53", NAME, 1], ["tcp", "1.1.1.1", NAME, 1]]));
        assert!(said.iter().all(|answer| answer["addresses"].as_array().is_none_or(Vec::is_empty)), "{said:?}");
        ran.nothing_allowed();
    }
}

/// Datagrams that are no DNS: QUIC, and the port of DNS used for something else.
#[test]
fn datagrams_go_nowhere_else() {
    for network in NETWORKS {
        let world = world(network);
        let quic = "import socket; s = socket.socket(2, 2); s.sendto(b'x', ('127.0.0.1', 443))";
        let ran = world.python("run", quic);
        assert_eq!((ran.code, ran.err.contains("PermissionError")), (1, true), "QUIC in {network}: {ran}");
        ran.any("deny", &json!({"decided_by": "hook", "port": 443}));
        let junk = "import socket; s = socket.socket(2, 2); s.settimeout(2); s.sendto(b'out' * 40, ('192.0.2.53', 53))\n\
                    try: print(s.recv(4096)[3] & 15)\n\
                    except TimeoutError: print('silence')";
        let ran = world.python("run", junk);
        assert_eq!(ran.code, 0, "{ran}");
        ran.any("deny", &json!({"decided_by": "resolver", "rule": "dns_malformed"}));
    }
}

/// Alpine's programs, and every Node there, ask with AI_ADDRCONFIG; musl finds out by the connect of a datagram socket.
#[test]
fn musl_finds_names_and_the_connect_by_which_it_asks_carries_nothing() {
    let program = Archive(std::env::temp_dir().join(format!("lgtest-musl-{}", uuid::Uuid::new_v4())));
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/carried/musl.c");
    let built = std::process::Command::new("musl-gcc").args(["-static", "-o"]).arg(&program.0).arg(source).output();
    match built {
        Err(_) => return skip("no musl-gcc: make setup-test"),
        Ok(built) => assert!(built.status.success(), "{built:?}"),
    }
    let heard = ["127.0.0.1:65535", "[::1]:65535"].map(|address| {
        let socket = std::net::UdpSocket::bind(address).unwrap();
        socket.set_read_timeout(Some(std::time::Duration::from_millis(200))).unwrap();
        socket
    });
    for network in NETWORKS {
        let world = Plan::default()
            .host(NAME)
            .host(OTHER)
            .reaching("run", &[format!("{{domain: {NAME}, ports: [4433]}}")])
            .file(program.0.clone())
            .start("musl", network);
        let look = |name| world.run("run", &[program.0.to_str().unwrap(), name, "4433"]);
        let ran = look(NAME);
        assert_eq!((ran.code, ran.out.matches("198.18.").count()), (0, 2), "{network}: {ran}");
        let ran = look(OTHER);
        assert_eq!((ran.code, ran.out.as_str()), (1, ""), "{network}: {ran}");
        ran.any("deny", &json!({"name": OTHER, "decided_by": "resolver"}));

        // That connect is allowed, and nothing else at that place is: no datagram, no other protocol, no neighbour.
        let code = "import errno, json, socket\n\
            def attempt(family, address, port, kind, how):\n\
            \x20   s = socket.socket(family, kind)\n\
            \x20   try:\n\
            \x20       if how != 'sendto': s.connect((address, port))\n\
            \x20       if how == 'send': s.send(b'out')\n\
            \x20       if how == 'sendto': s.sendto(b'out', (address, port))\n\
            \x20       if how == 'sendmsg': s.sendmsg([b'out'], [], 0, (address, port))\n\
            \x20       return 'done'\n\
            \x20   except OSError as error: return errno.errorcode[error.errno]\n\
            four, six, d, t = socket.AF_INET, socket.AF_INET6, socket.SOCK_DGRAM, socket.SOCK_STREAM\n\
            said = {}\n\
            for family, address in ((four, '127.0.0.1'), (six, '::1'), (six, '::ffff:127.0.0.1')):\n\
            \x20   for how in ('connect', 'send', 'sendto', 'sendmsg'): said[f'{address} {how}'] = attempt(family, address, 65535, d, how)\n\
            \x20   said[f'{address} tcp'] = attempt(family, address, 65535, t, 'connect')\n\
            \x20   said[f'{address} neighbour'] = attempt(family, address, 65534, d, 'connect')\n\
            said['127.0.0.2 connect'] = attempt(four, '127.0.0.2', 65535, d, 'connect')\n\
            print(json.dumps(said))";
        let ran = world.python("run", code);
        let said: std::collections::BTreeMap<String, String> =
            serde_json::from_str(&ran.out).unwrap_or_else(|_| panic!("{ran}"));
        assert_eq!(said.len(), 19);
        for (attempt, outcome) in &said {
            let expected =
                if attempt.ends_with(" connect") && !attempt.starts_with("127.0.0.2") { "done" } else { "EPERM" };
            assert_eq!(outcome, expected, "{attempt} in {network}");
        }
    }
    for socket in &heard {
        assert!(socket.recv_from(&mut [0; 64]).is_err(), "something was heard");
    }
}
