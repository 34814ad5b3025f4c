//! Fifty executions at once, four hundred connections each, all to one address of the machine. The kernel's record says whose
//! each one is; a wrong one would be let through by another execution's name, and stand in another one's receipt.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use latchgate_tests::origin::{Origin, field, ok};
use serde_json::json;

use super::world::{LOOPBACK, Plan};

const EXECUTIONS: usize = 50;
const CONNECTIONS: usize = 400;
/// One crowd at a time: together they are only slower.
static ONE: Mutex<()> = Mutex::new(());

fn name(number: usize) -> String {
    format!("e{number}.crowd.test")
}

/// Of each execution's requests all are of one length, and no other execution's are.
fn request(number: usize, port: u16) -> String {
    let name = name(number);
    let pad = "p".repeat(3 * number + (3 - number.to_string().len()) * 3);
    format!(
        "GET /%03d/{number:02} HTTP/1.1\\r\\nhost: {name}:{port}\\r\\nx-pad: {pad}\\r\\nconnection: close\\r\\n\\r\\n"
    )
}

fn length(number: usize, port: u16) -> usize {
    request(number, port).replace("\\r\\n", "\r\n").replace("%03d", "000").len()
}

/// Connects again and again, to the address that its own name has; what it gets back must be what it asked for.
fn code(number: usize, port: u16, start: f64) -> String {
    format!(
        "import socket, time\n\
         while True:\n\
         \x20   try: there = socket.getaddrinfo('{name}', {port}, type=socket.SOCK_STREAM)[0][4]; break\n\
         \x20   except socket.gaierror as error:\n\
         \x20       if error.errno != socket.EAI_AGAIN: raise\n\
         time.sleep(max(0, {start} - time.time()))\n\
         began = time.time()\n\
         for n in range({CONNECTIONS}):\n\
         \x20   s = socket.create_connection(there, 30)\n\
         \x20   s.sendall(('{request}' % n).encode())\n\
         \x20   answer = s.makefile('rb').read()\n\
         \x20   assert answer.endswith(('/%03d/{number:02} {name}:{port}' % n).encode()), (n, answer)\n\
         \x20   s.close()\n\
         print('times', began, time.time())",
        name = name(number),
        request = request(number, port),
    )
}

fn crowd(network: &str) {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let answers = |head: &str| {
        let path = head.split(' ').nth(1).unwrap_or_default();
        ok(&format!("{path} {}", field(head, "host").unwrap_or_default()))
    };
    let origin = Origin::clear_answering(LOOPBACK, Arc::new(answers));
    let port = origin.address.port();
    let lengths: BTreeMap<usize, usize> = (0..EXECUTIONS).map(|number| (length(number, port), number)).collect();
    assert_eq!(lengths.len(), EXECUTIONS, "lengths tell executions apart");
    let plan = (0..EXECUTIONS).fold(Plan::default().seconds(580), |plan, number| plan.host(&name(number)));
    let entry = format!("{{domain: crowd.test, ports: [{port}], protocol: http}}");
    let world = &plan.reaching("run", &[entry]).start("crowd", network);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    // All have started by then, and have their names.
    let start = (now + Duration::from_secs(10)).as_secs_f64();
    let began = Instant::now();
    let ran: Vec<_> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..EXECUTIONS)
            .map(|number| scope.spawn(move || world.python("run", &code(number, port, start))))
            .collect();
        running.into_iter().map(|one| one.join().unwrap()).collect()
    });
    let took = began.elapsed();

    let mut spans: Vec<(f64, f64)> = Vec::new();
    for (number, ran) in ran.iter().enumerate() {
        ran.succeeded("times");
        let times: Vec<f64> = ran.out.split_whitespace().skip(1).map(|time| time.parse().unwrap()).collect();
        spans.push((times[0], times[1]));
        let connections: Vec<_> = ran.evidence.iter().skip(1).filter(|flow| flow["protocol"] != "dns").collect();
        assert_eq!(connections.len(), CONNECTIONS, "e{number} in {network}");
        for flow in connections {
            assert_eq!(
                (&flow["name"], &flow["verdict"], &flow["port"], &flow["connections"], &flow["bytes_from_sandbox"]),
                (&json!(name(number)), &json!("allow"), &json!(port), &json!(1), &json!(length(number, port))),
                "e{number} in {network}: {flow}"
            );
        }
        let summary = &ran.evidence[0];
        let sent = CONNECTIONS * length(number, port);
        assert_eq!(
            (&summary["kernel"]["connections"], &summary["kernel"]["bytes_sent"], &summary["agreement"]),
            (&json!(CONNECTIONS), &json!(sent), &json!("equal")),
            "e{number} in {network}: {summary}"
        );
    }
    // They did run at the same time.
    let last_began = spans.iter().fold(f64::MIN, |last, (began, _)| last.max(*began));
    let first_ended = spans.iter().fold(f64::MAX, |first, (_, ended)| first.min(*ended));
    assert!(last_began < first_ended, "{spans:?}");

    // The origin heard of each exactly what it sent.
    let mut heard: BTreeMap<(usize, usize), usize> = BTreeMap::new();
    for head in origin.requests() {
        let path = head.split(' ').nth(1).unwrap();
        let (n, number) = path.trim_start_matches('/').split_once('/').unwrap();
        let number: usize = number.parse().unwrap();
        assert_eq!(field(&head, "host"), Some(format!("{}:{port}", name(number)).as_str()), "{head}");
        *heard.entry((number, n.parse().unwrap())).or_default() += 1;
    }
    assert_eq!(heard.len(), EXECUTIONS * CONNECTIONS);
    assert!(heard.values().all(|times| *times == 1));
    eprintln!("{} connections in {network}: {took:?}", heard.len());
}

#[test]
fn no_connection_of_a_crowd_is_taken_for_another_s_in_namespaces_of_their_own() {
    crowd("isolated");
}

#[test]
fn no_connection_of_a_crowd_is_taken_for_another_s_in_one_namespace() {
    crowd("shared");
}
