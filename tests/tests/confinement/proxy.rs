//! What the proxy gives, to whom, and what the receipt says of it.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

use latchgate_tests::agent::Agent;
use latchgate_tests::gate::Setup;
use latchgate_tests::inside::{Counting, cgroup, inside, missing, outside, python, receipt, wait, with_code};
use serde_json::{Value, json};

use crate::origin::Origin;
use crate::{NOTHING, asking, reaching};

fn flows(receipt: &Value) -> &[Value] {
    &receipt["egress_evidence"].as_array().unwrap()[1..]
}

#[test]
fn two_calls_at_once_cannot_use_each_others_names() {
    if missing(&["/usr/bin/python3"]) {
        return;
    }
    const ROUNDS: u64 = 100;
    const CALLS: usize = 3;
    let script = "
import time
get(p['own'], '/held')
began = time.time()
wrong, decisions = [], []
for i in range(p['rounds']):
    mine = get(p['own'], '/', 'X-From: %s\\r\\n' % p['own']) if i % 2 else connect(p['own'])
    if mine['status'] != 200 or (i % 2 and mine['body'] != p['name']):
        wrong.append(mine)
    other = connect(p['other']) if i % 2 else get(p['other'], '/stolen')
    if other['status'] != 403 or other['body']['deny_reason'] != 'name_not_allowed':
        wrong.append(other)
    decisions.append(other['decision'])
print(json.dumps({'wrong': wrong, 'decisions': decisions, 'began': began, 'ended': time.time()}))
";
    let (one, two) = (Origin::start("127.71.1.1:0", "one"), Origin::start("127.71.1.2:0", "two"));
    let gate = Setup::new("names")
        .config(
            "[egress]\nallow_addresses = [\"127.71.1.0/24\"]\n[egress.hosts]\n\
             \"one.test\" = [\"127.71.1.1\"]\n\"two.test\" = [\"127.71.1.2\"]\n",
        )
        .command("one", &python(), &reaching(&["one.test"], one.port()))
        .command("two", &python(), &reaching(&["two.test"], two.port()))
        .start();
    let agent = Agent::connect(&gate.agent());
    let (one_at, two_at) = (format!("one.test:{}", one.port()), format!("two.test:{}", two.port()));
    let code = asking(script);
    let call = |name: &'static str, own: &str, other: &str| {
        let params = json!({"own": own, "other": other, "name": name, "rounds": ROUNDS});
        (name, inside(&agent, name, &code, &params))
    };
    let results: Vec<_> = std::thread::scope(|scope| {
        let calls: Vec<_> = (0..CALLS)
            .flat_map(|_| {
                [scope.spawn(|| call("one", &one_at, &two_at)), scope.spawn(|| call("two", &two_at, &one_at))]
            })
            .collect();
        // All of them are inside before any goes on.
        wait("the calls", Duration::from_secs(30), || (one.held() + two.held() == 2 * CALLS).then_some(()));
        one.release();
        two.release();
        calls.into_iter().map(|call| call.join().unwrap()).collect()
    });

    let time = |output: &Value, name: &str| output[name].as_f64().unwrap();
    let last_start = results.iter().map(|(_, (output, _))| time(output, "began")).fold(0.0, f64::max);
    let first_end = results.iter().map(|(_, (output, _))| time(output, "ended")).fold(f64::MAX, f64::min);
    assert!(last_start < first_end, "they did not run at the same time: {last_start} {first_end}");
    for (name, (output, receipt)) in &results {
        assert_eq!(output["wrong"], json!([]), "{name}");
        let own = format!("{name}.test");
        let (mut refused, mut allowed) = (BTreeSet::new(), 0);
        for flow in flows(receipt) {
            assert_eq!((&flow["action_id"], &flow["execution_id"]), (&json!(name), &receipt["grant_id"]), "{flow}");
            assert_eq!(flow["verdict"] == "allow", flow["name"] == *own, "{flow}");
            if flow["verdict"] == "allow" {
                allowed += 1;
            } else {
                refused.insert(flow["decision_id"].clone().as_str().unwrap().to_owned());
            }
        }
        let told: BTreeSet<String> = serde_json::from_value(output["decisions"].clone()).unwrap();
        assert_eq!((allowed, refused.len()), (ROUNDS + 1, ROUNDS as usize));
        assert_eq!(refused, told, "each refusal is in the receipt of the call that got it");
        assert_eq!(receipt["egress_evidence"][0]["proxy"]["denied"], ROUNDS);
    }
    for (origin, own) in [(&one, &one_at), (&two, &two_at)] {
        let heads = origin.requests();
        let mine = heads.iter().filter(|head| head.contains(&format!("X-From: {own}\r\n"))).count();
        assert_eq!(mine, CALLS * ROUNDS as usize / 2);
        assert_eq!(heads.len(), mine + CALLS, "nothing but those and what was held: {heads:?}");
    }
}

#[test]
fn who_is_in_no_leaf_gets_no_service() {
    if missing(&["/usr/bin/python3"]) {
        return;
    }
    let ask = asking(
        "print(json.dumps([raw(request, getattr(socket, family), address, p['proxy'])\n\
         for request in p['requests'] for family, address in (('AF_INET', '127.0.0.1'), ('AF_INET6', '::1'))]))",
    );
    let origin = Origin::start("127.71.2.1:0", "origin");
    let gate = Setup::new("stranger")
        .config("[egress]\nallow_addresses = [\"127.71.2.1/32\"]\n[egress.hosts]\n\"origin.test\" = [\"127.71.2.1\"]\n")
        .command("fetch", &python(), &reaching(&["origin.test"], origin.port()))
        .start();
    let agent = Agent::connect(&gate.agent());
    let at = format!("origin.test:{}", origin.port());
    let requests = [
        format!("GET http://{at}/ HTTP/1.1\r\nHost: {at}\r\n\r\n"),
        format!("CONNECT {at} HTTP/1.1\r\nHost: {at}\r\n\r\n"),
    ];
    let (port, _) = inside(&agent, "fetch", &asking("print(PROXY)"), &json!({}));
    let params = json!({"proxy": port, "requests": requests, "at": at});

    // While an execution that may is being served.
    let (code, held) = (asking("get(p['at'], '/held'); print(json.dumps(get(p['at'], '/')))"), params.clone());
    let served = std::thread::scope(|scope| {
        let call = scope.spawn(|| inside(&agent, "fetch", &code, &held).0);
        wait("the call", Duration::from_secs(20), || (origin.held() == 1).then_some(()));
        let beside = cgroup(gate.name()).join("beside");
        fs::create_dir(&beside).unwrap();
        for place in [None, Some(beside.clone()), Some(cgroup(gate.name()).join("gate"))] {
            let said = match &place {
                None => outside(&ask, &params),
                Some(place) => outside_in(place, &ask, &params),
            };
            for answer in said.as_array().unwrap() {
                assert_eq!(answer["status"], 403, "{place:?}: {answer}");
                assert_eq!(answer["body"]["error"], "egress_denied");
                assert_eq!(answer["body"]["deny_reason"], "unattributed");
                assert_eq!(answer["body"]["decision_id"], answer["decision"]);
            }
        }
        fs::remove_dir(beside).unwrap();
        assert_eq!(origin.requests().len(), 1, "only what is held");
        origin.release();
        call.join().unwrap()
    });
    assert_eq!((&served["status"], &served["body"]), (&json!(200), &json!("origin")));
    // The very same requests, from an execution.
    let (answers, _) = inside(&agent, "fetch", &ask, &params);
    assert!(answers.as_array().unwrap().iter().all(|answer| answer["status"] == 200), "{answers}");
}

/// Python in another cgroup than this process's.
fn outside_in(cgroup: &std::path::Path, code: &str, params: &Value) -> Value {
    let mut child = Command::new("/bin/sh")
        .args(["-c", "echo $$ > \"$0/cgroup.procs\" && exec /usr/bin/python3 -c \"$1\""])
        .arg(cgroup)
        .arg("import json, sys; p = json.load(sys.stdin); exec(p['code'], globals())")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(with_code(code, params).to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn what_the_profile_does_not_name_is_refused_and_recorded() {
    if missing(&["/usr/bin/python3"]) {
        return;
    }
    let script = "
answers = []
for kind, authority in p['ask']:
    answers.append(connect(authority) if kind == 'CONNECT' else get(authority, '/'))
print(json.dumps(answers))
";
    let origin = Origin::start("127.71.3.1:0", "origin");
    let port = origin.port();
    // Another port of the allowed name, and an address that is not among those that may be dialled.
    let (other_port, private) = (Counting::tcp("127.71.3.1:0"), Counting::tcp(&format!("127.71.3.9:{port}")));
    let gate = Setup::new("refusals")
        .config(
            "[egress]\nallow_addresses = [\"127.71.3.1/32\"]\n[egress.hosts]\n\
             \"allowed.test\" = [\"127.71.3.1\"]\n\"other.test\" = [\"127.71.3.1\"]\n\
             \"sub.allowed.test\" = [\"127.71.3.1\"]\n\"private.test\" = [\"127.71.3.9\"]\n\
             \"mixed.test\" = [\"127.71.3.1\", \"127.71.3.9\"]\n\"mapped.test\" = [\"::ffff:127.71.3.9\"]\n",
        )
        .command("narrow", &python(), &reaching(&["allowed.test", "private.test", "mixed.test", "mapped.test"], port))
        .command("wide", &python(), &reaching(&["other.test", "sub.allowed.test"], port))
        .command("port", &python(), &reaching(&["allowed.test"], other_port.address.port()))
        .command("none", &python(), NOTHING)
        .start();
    let agent = Agent::connect(&gate.agent());
    let mut cases: Vec<(String, &str)> = [
        ("other.test", "name_not_allowed"),
        ("sub.allowed.test", "name_not_allowed"),
        ("OTHER.test.", "name_not_allowed"),
        ("private.test", "address_not_public"),
        ("mixed.test", "address_not_public"),
        ("mapped.test", "address_not_public"),
    ]
    .map(|(name, reason)| (format!("{name}:{port}"), reason))
    .into();
    cases.push((format!("allowed.test:{}", other_port.address.port()), "port_not_allowed"));
    // 127.71.3.1, as clients and their libraries spell it.
    let spellings = [
        "127.71.3.1",
        "127.71.3.1.",
        "2135360257",
        "0x7f470301",
        "0177.0107.3.1",
        "127.71.769",
        "[::ffff:127.71.3.1]",
        "[::ffff:7f47:301]",
        "[0:0:0:0:0:FFFF:7F47:0301]",
    ];
    cases.extend(spellings.map(|literal| (format!("{literal}:{port}"), "address_literal")));
    let ask: Vec<(&str, &str)> =
        cases.iter().flat_map(|(authority, _)| [("CONNECT", authority.as_str()), ("GET", authority)]).collect();
    let code = asking(script);
    let (answers, receipt) = inside(&agent, "narrow", &code, &json!({"ask": ask}));
    let expected = cases.iter().flat_map(|(_, reason)| [reason, reason]);
    for ((answer, (kind, authority)), reason) in answers.as_array().unwrap().iter().zip(&ask).zip(expected) {
        assert_eq!(answer["status"], 403, "{kind} {authority}: {answer}");
        let body = &answer["body"];
        assert_eq!((&body["error"], &body["deny_reason"]), (&json!("egress_denied"), &json!(reason)), "{authority}");
        assert_eq!(body["decision_id"], answer["decision"], "{kind} {authority}");
        let flow = flows(&receipt)
            .iter()
            .find(|flow| flow["decision_id"] == answer["decision"])
            .unwrap_or_else(|| panic!("{kind} {authority} is not in the receipt"));
        assert_eq!(flow["verdict"], "deny");
        assert!(flow["rule"].as_str().unwrap().starts_with(reason), "{flow}");
        assert_eq!(flow["connections"], 1);
    }
    assert_eq!(flows(&receipt).len(), ask.len());
    assert_eq!(receipt["egress_evidence"][0]["proxy"]["denied"], ask.len());
    assert_eq!((origin.requests().len(), other_port.reached(), private.reached()), (0, 0, 0));

    // Each of them where it is allowed: by another profile, or with no proxy in the way.
    let status = |action: &str, authority: &str| {
        let ask = json!({"ask": [("CONNECT", authority), ("GET", authority)]});
        let (answers, _) = inside(&agent, action, &code, &ask);
        answers.as_array().unwrap().iter().map(|answer| answer["status"].as_u64().unwrap()).collect::<Vec<_>>()
    };
    for (action, authority) in [
        ("narrow", format!("allowed.test:{port}")),
        ("narrow", format!("ALLOWED.test.:{port}")),
        ("wide", format!("other.test:{port}")),
        ("wide", format!("sub.allowed.test:{port}")),
        ("port", format!("allowed.test:{}", other_port.address.port())),
    ] {
        assert_eq!(status(action, &authority), [200, 200], "{action} {authority}");
    }
    let direct = "
import json, socket
said = []
for host in p['hosts']:
    socket.create_connection((host.strip('[]').rstrip('.'), p['port']), 5).close()
    said.append('ok')
print(json.dumps(said))
";
    let hosts: Vec<&str> = spellings.into_iter().chain(["127.71.3.9"]).collect();
    let said = outside(direct, &json!({"hosts": hosts, "port": port}));
    assert_eq!(said, json!(vec!["ok"; hosts.len()]));
    assert_eq!(private.reached(), 1);
}

#[test]
fn the_kernel_and_the_proxy_count_a_clean_flow_alike() {
    if missing(&["/usr/bin/python3"]) {
        return;
    }
    let script = "
body = 'y' * 50001
answer = raw(f\"POST http://{p['at']}/bytes/100003 HTTP/1.1\\r\\nHost: {p['at']}\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n{body}\")
tunnel = socket.create_connection(('127.0.0.1', PROXY), 20)
tunnel.sendall(f\"CONNECT {p['at']} HTTP/1.1\\r\\nHost: {p['at']}\\r\\n\\r\\n\".encode())
established = tunnel.recv(1000)
tunnel.sendall(b'GET /bytes/77 HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n')
inner = b''
while piece := tunnel.recv(1000):
    inner += piece
tunnel.close()
print(json.dumps([answer['status'], len(answer['body']), len(established), len(inner)]))
";
    let origin = Origin::start("127.71.4.1:0", "origin");
    let gate = Setup::new("counts")
        .config("[egress]\nallow_addresses = [\"127.71.4.1/32\"]\n[egress.hosts]\n\"origin.test\" = [\"127.71.4.1\"]\n")
        .command("fetch", &python(), &reaching(&["origin.test"], origin.port()))
        .fetch("worker", &reaching(&["origin.test"], origin.port()))
        .start();
    let agent = Agent::connect(&gate.agent());
    let at = format!("origin.test:{}", origin.port());
    let (said, by_command) = inside(&agent, "fetch", &asking(script), &json!({"at": at}));
    assert_eq!((&said[0], &said[1]), (&json!(200), &json!(100_003)));
    let answer = agent.execute("worker", &json!({"url": format!("http://{at}/bytes/5000")}));
    assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
    let by_worker = receipt(&agent, &answer.json());
    for (receipt, connections, least_sent, least_received) in
        [(by_command, 2, 50_001, 100_003 + 77), (by_worker, 1, 1, 5_000)]
    {
        let summary = &receipt["egress_evidence"][0];
        let (kernel, proxy) = (&summary["kernel"], &summary["proxy"]);
        assert_eq!(
            (&kernel["connections"], &proxy["connections"]),
            (&json!(connections), &json!(connections)),
            "{summary}"
        );
        assert_eq!((&kernel["open_flows"], &kernel["events_lost"]), (&json!(0), &json!(0)), "{summary}");
        assert_eq!(kernel["bytes_sent"], proxy["bytes_sent"], "{summary}");
        assert_eq!(kernel["bytes_received"], proxy["bytes_received"], "{summary}");
        assert_eq!(summary["incomplete"], false);
        assert!(
            kernel["bytes_sent"].as_u64() > Some(least_sent)
                && kernel["bytes_received"].as_u64() > Some(least_received)
        );
        // What is on the wire is more than what was carried.
        assert!(kernel["wire_bytes_out"].as_u64() > kernel["bytes_sent"].as_u64());
    }
}
