//! What one execution has and another would like to use: its stand-in address, its scratch directory.

use std::time::Duration;

use latchgate_tests::http::Connection;
use latchgate_tests::inside::{inside, outside, send, wait, with_code};
use serde_json::{Value, json};

use crate::ends::code;
use crate::technique::{self, NAMES};
use crate::world::{Target, token};

/// Something that one execution makes and holds, what another does with it, and what keeps it from that.
struct Shared {
    name: &'static str,
    /// Sets `found`, which the other one is told of by the target; it has no other way.
    holds: &'static str,
    takes: &'static str,
    action: &'static str,
    said: &'static str,
    /// The reason of the hook of `connect`.
    hook: Option<&'static str>,
    guards: &'static [&'static str],
    /// Whether it gets out without them.
    out: bool,
}

const TABLE: &[Shared] = &[
    Shared {
        name: "an address that stands for a name",
        // The first address of an execution; the other one never asks for the name.
        holds: "
found = socket.getaddrinfo(p['name'], PORT, socket.AF_INET)[0][4][0] if INSIDE else V4
",
        takes: "
def attempt():
    said = tcp(socket.AF_INET, p['found'])
    return 'ok' if b'reached' in said else 'refused'
",
        action: "names",
        said: "EPERM",
        hook: Some("not_in_profile"),
        // It is a number in a table of one execution: without both the proxy still knows no name by it.
        guards: &["reach", "proxy_names"],
        out: false,
    },
    Shared {
        name: "the scratch directory",
        holds: "
found = '/tmp/of-another-' + p['token']
with open(found, 'w') as file:
    file.write('of another')
os.chmod(found, 0o644)
",
        takes: "
def attempt():
    with open(p['found']) as file:
        return 'ok' if file.read() == 'of another' else 'refused'
",
        action: "nothing",
        said: "ENOENT",
        hook: None,
        guards: &["mount_namespace", "landlock"],
        out: true,
    },
];

const HOLD: &str = "
if INSIDE:
    told = socket.create_connection((p['name'], PORT), 10)
else:
    told = socket.create_connection((V4, PORT), 10)
told.sendall(json.dumps({'of': p['token'], 'found': found}).encode())
time.sleep(p['hold'])
print(1)
";

/// What the target was told by the one that holds something, under this token.
fn found(target: &Target, token: &str) -> Value {
    let of = |line: String| serde_json::from_str::<Value>(&line).ok()?["data"].as_str().map(str::to_owned);
    let told = wait("what the other one holds", Duration::from_secs(20), || {
        target.lines().into_iter().filter_map(of).find(|said| said.contains(token))
    });
    serde_json::from_str::<Value>(&told).unwrap()["found"].clone()
}

#[test]
fn what_is_another_execution_s_stays_its_own() {
    let target = Target::start();
    for shared in TABLE {
        let (hold, take) =
            (code(&format!("{}{HOLD}", shared.holds)), code(&format!("{}\nreport(attempt)", shared.takes)));
        let mut params = target.params(&token());
        params["name"] = json!(NAMES[0]);
        params["hold"] = json!(3);
        let said = std::thread::scope(|scope| {
            scope.spawn(|| outside(&hold, &params));
            let mut told = params.clone();
            told["found"] = found(&target, params["token"].as_str().unwrap());
            outside(&take, &told)
        });
        assert_eq!(said, "ok", "{}: inconclusive", shared.name);

        for (network, off) in [("isolated", vec![]), ("shared", vec![]), ("shared", shared.guards.to_vec())] {
            let (gate, agent) = technique::gate(&target, network, &off);
            let mut params = params.clone();
            (params["token"], params["hold"], params["patience"]) = (json!(token()), json!(15), json!(2));
            let mut connection = Connection::open(&gate.agent()).unwrap();
            send(&mut connection, &agent, "names", &with_code(&hold, &params)).unwrap();
            params["found"] = found(&target, params["token"].as_str().unwrap());
            let (said, receipt) = inside(&agent, shared.action, &take, &params);
            let name = format!("{} ({network}, without {off:?})", shared.name);
            eprintln!("{name}: {said}");
            assert_eq!(said == "ok", shared.out && !off.is_empty(), "{name}: {said} {receipt:#}");
            if !off.is_empty() {
                continue;
            }
            assert_eq!(said, shared.said, "{name}");
            let flows = receipt["egress_evidence"].as_array().unwrap();
            let recorded = |rule| flows.iter().any(|flow| flow["decided_by"] == "hook" && flow["rule"] == rule);
            match shared.hook {
                Some(rule) => assert!(recorded(rule), "{name}: {receipt:#}"),
                None => {
                    let denied = flows[0]["kernel"]["denied"].as_object().unwrap();
                    assert!(denied.values().all(|count| count == 0), "{name}: {denied:?}");
                }
            }
        }
    }
}
