//! Real sockets on loopback; answers are read with an independent reader of DNS.

use std::collections::HashMap;
use std::net::Ipv6Addr;

use hickory_proto::op::{Message, OpCode, ResponseCode};
use hickory_proto::rr::rdata::opt::EdnsOption;
use hickory_proto::rr::{RData, RecordType};
use tokio::net::{TcpListener, TcpStream};

use super::message::MAX_QUERY_BYTES;
use super::*;
use crate::egress::flow::{DecidedBy, Protocol, Verdict};
use crate::egress::profile::{DomainEntry, Entry};
use crate::egress::{Asker, DatagramKey};

mod hostile;
mod serving;
mod wire;

/// A query as a client builds it.
#[derive(Clone, Debug)]
struct Ask {
    id: u16,
    flags: u16,
    name: Vec<Vec<u8>>,
    kind: u16,
    class: u16,
    /// The size that the client takes, and whether it asks for DNSSEC.
    edns: Option<(u16, bool)>,
}

fn ask(name: &str, kind: RecordType) -> Ask {
    let name = name.split('.').filter(|label| !label.is_empty()).map(|label| label.as_bytes().to_vec()).collect();
    Ask { id: 0x1234, flags: 0x0100, name, kind: kind.into(), class: 1, edns: Some((1232, false)) }
}

impl Ask {
    fn question(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for label in &self.name {
            out.push(u8::try_from(label.len()).unwrap());
            out.extend(label);
        }
        out.push(0);
        out.extend(self.kind.to_be_bytes());
        out.extend(self.class.to_be_bytes());
        out
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for number in [self.id, self.flags, 1, 0, 0, u16::from(self.edns.is_some())] {
            out.extend(number.to_be_bytes());
        }
        out.extend(self.question());
        if let Some((size, dnssec)) = self.edns {
            out.extend([0, 0, 41]);
            out.extend(size.to_be_bytes());
            out.extend([0, 0, if dnssec { 0x80 } else { 0 }, 0, 0, 0]);
        }
        out
    }

    fn without_edns(mut self) -> Self {
        self.edns = None;
        self
    }
}

/// What the kernel was told.
#[derive(Default)]
struct Told {
    calls: Mutex<Vec<(LeafId, Ipv4Addr, Vec<u16>)>>,
    broken: std::sync::atomic::AtomicBool,
}

impl Reach for Told {
    fn reach(&self, leaf: LeafId, address: Ipv4Addr, ports: &[u16]) -> Result<(), ReachError> {
        if self.broken.load(std::sync::atomic::Ordering::Relaxed) {
            return Err(ReachError("the map is full".to_owned()));
        }
        lock(&self.calls).push((leaf, address, ports.to_vec()));
        Ok(())
    }
}

fn entry(value: serde_json::Value) -> Entry {
    serde_json::from_value::<DomainEntry>(value).unwrap().compile().unwrap().0
}

fn profile(domains: &[&str]) -> Arc<Profile> {
    Arc::new(Profile::allowlist(domains.iter().map(|domain| entry((*domain).into()))))
}

fn execution(id: &str, profile: Arc<Profile>) -> Execution {
    Execution {
        execution_id: id.to_owned(),
        action_id: "action".to_owned(),
        principal: "agent".to_owned(),
        workspace: "default".to_owned(),
        profile,
    }
}

const CLIENT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 40000);
const LEAF: LeafId = LeafId(7);

/// One execution without sockets.
struct One {
    told: Arc<Told>,
    server: DnsServer,
    names: OpenNames,
}

fn one_with(limits: Limits, profile: Arc<Profile>) -> One {
    let told = Arc::new(Told::default());
    let server = DnsServer::new(limits, told.clone());
    let names = server.open(LEAF, execution("e1", profile));
    One { told, server, names }
}

fn one(domains: &[&str]) -> One {
    one_with(Limits::default(), profile(domains))
}

impl One {
    fn ask(&self, ask: &Ask) -> Message {
        read(&self.names.answer(&ask.bytes(), Transport::Udp, CLIENT).unwrap(), ask)
    }
}

/// Reads an answer and holds it to what every answer is.
fn read(bytes: &[u8], ask: &Ask) -> Message {
    let message = Message::from_vec(bytes).unwrap();
    assert_eq!(message.metadata.id, ask.id);
    assert_eq!(message.metadata.op_code, OpCode::Query);
    assert!(message.metadata.recursion_available);
    assert!(!message.metadata.authoritative && !message.metadata.authentic_data);
    // The question is the one that was sent, byte for byte, the case of its letters included.
    let question = ask.question();
    assert_eq!(bytes.get(12..12 + question.len()), Some(question.as_slice()));
    assert_eq!(message.edns.is_some(), ask.edns.is_some());
    message
}

fn addresses(message: &Message) -> Vec<Ipv4Addr> {
    message
        .answers
        .iter()
        .map(|record| match &record.data {
            RData::A(address) => address.0,
            other => panic!("{other:?}"),
        })
        .collect()
}

/// Code and text of the extended error.
fn extended(message: &Message) -> Option<(u16, String)> {
    message.edns.as_ref()?.options().as_ref().iter().find_map(|(_, option)| match option {
        EdnsOption::Unknown(15, data) => {
            Some((u16::from_be_bytes([data[0], data[1]]), String::from_utf8(data[2..].to_vec()).unwrap()))
        }
        _ => None,
    })
}

fn assert_refused(message: &Message, rule: &str) -> String {
    assert_eq!(message.metadata.response_code, ResponseCode::Refused);
    assert!(message.answers.is_empty() && message.authorities.is_empty());
    let (code, text) = extended(message).expect("an extended error");
    assert_eq!(code, 15);
    let id = text.strip_prefix(&format!("refused by LatchGate: {rule}; decision ")).unwrap_or_else(|| panic!("{text}"));
    assert!(uuid::Uuid::parse_str(id).is_ok(), "{text}");
    id.to_owned()
}

fn assert_no_data(message: &Message) {
    assert_eq!(message.metadata.response_code, ResponseCode::NoError);
    assert!(message.answers.is_empty());
    assert_eq!(message.authorities.iter().map(|record| record.record_type()).collect::<Vec<_>>(), [RecordType::SOA]);
    assert_eq!(extended(message), None);
}

#[tokio::test]
async fn an_allowed_name_has_one_address_and_nothing_else() {
    let one = one(&["example.com"]);
    let answer = one.ask(&ask("api.example.com", RecordType::A));
    assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
    assert_eq!(addresses(&answer), [Ipv4Addr::new(198, 18, 0, 1)]);
    assert_eq!(answer.answers[0].name.to_ascii(), "api.example.com.");
    assert_eq!(answer.answers[0].ttl, 60);
    assert_eq!(addresses(&one.ask(&ask("api.example.com", RecordType::ANY))), [Ipv4Addr::new(198, 18, 0, 1)]);
    for kind in [RecordType::AAAA, RecordType::HTTPS, RecordType::SVCB] {
        assert_no_data(&one.ask(&ask("api.example.com", kind)));
        assert_no_data(&one.ask(&ask("never-asked.example.com", kind)));
    }
    // The kernel was told once, of every port that the name has, before the answer.
    assert_eq!(*lock(&one.told.calls), [(LEAF, Ipv4Addr::new(198, 18, 0, 1), vec![80, 443])]);
    let table = one.names.table();
    assert_eq!(table.name_of(Ipv4Addr::new(198, 18, 0, 1)).unwrap().as_str(), "api.example.com");
    let closed = one.names.close().await;
    assert!(closed.flows.is_empty());
    assert_eq!((closed.counts.queries, closed.counts.answered), (8, 8));
}

#[tokio::test]
async fn no_other_type_is_answered() {
    let one = one(&["example.com"]);
    let named = [RecordType::A, RecordType::AAAA, RecordType::HTTPS, RecordType::SVCB, RecordType::ANY];
    let allowed: Vec<u16> = named.into_iter().map(u16::from).collect();
    for kind in (0..=300).chain([32768, 32769, 65280, 65535]).filter(|kind| !allowed.contains(kind)) {
        let query = Ask { kind, ..ask("example.com", RecordType::A) };
        // As bytes: the reader does not read answers to every type.
        let answer = one_unlimited(&one, &query);
        assert_eq!(answer[3] & 0xf, 5, "{kind}");
        assert_eq!(&answer[6..10], [0, 0, 0, 0], "{kind}");
        assert!(String::from_utf8_lossy(&answer).contains("dns_type_not_allowed; decision "), "{kind}");
    }
    let closed = one.names.close().await;
    assert_eq!(closed.flows.len(), 1);
    assert_eq!(closed.flows[0].rule, "dns_type_not_allowed");
}

/// Asks without being held to the rate.
fn one_unlimited(one: &One, query: &Ask) -> Vec<u8> {
    one.names.answer(&query.bytes(), Transport::Tcp, CLIENT).unwrap()
}

#[tokio::test]
async fn what_the_profile_has_not_is_refused_with_the_id_of_the_record() {
    let one = one(&["example.com", "*.below.test"]);
    let mut flows = one.server.flows();
    for (name, rule) in [
        ("evil.test", "name_not_allowed"),
        ("notexample.com", "name_not_allowed"),
        ("example.com.evil.test", "name_not_allowed"),
        ("com", "name_not_allowed"),
        ("below.test", "name_not_allowed"),
        ("localhost", "name_not_allowed"),
        ("1.0.18.198.in-addr.arpa", "name_not_allowed"),
        ("198.18.0.1", "address_literal"),
        ("127.1", "address_literal"),
        ("0x7f000001", "address_literal"),
        ("1.2.3.999", "invalid_name"),
        ("xn--a.example.com", "invalid_name"),
        // An A-label of plain letters is no other spelling of them.
        ("example.xn--com-", "invalid_name"),
        ("exa mple.com", "invalid_name"),
        ("a%2e.example.com", "invalid_name"),
        ("\u{fc}.example.com", "invalid_name"),
        ("", "invalid_name"),
    ] {
        let id = assert_refused(&one.ask(&ask(name, RecordType::A)), rule);
        let flow = flows.try_recv().unwrap();
        assert_eq!((flow.decision_id.as_str(), flow.rule.as_str()), (id.as_str(), rule));
        assert_eq!(
            (flow.protocol, flow.verdict, flow.decided_by),
            (Some(Protocol::Dns), Verdict::Deny, DecidedBy::Resolver)
        );
        assert_eq!(flow.execution_id.as_deref(), Some("e1"));
        assert_eq!(flow.client, Some(CLIENT));
        assert_eq!((flow.port, flow.address), (Some(53), None));
        if name.is_ascii() && !name.contains(' ') && !name.is_empty() {
            assert_eq!(flow.name.as_deref(), Some(name));
        }
        // The other types, and asking again, are the same decision.
        assert_eq!(assert_refused(&one.ask(&ask(name, RecordType::AAAA)), rule), id);
        assert!(flows.try_recv().is_err());
    }
    assert!(lock(&one.told.calls).is_empty());
    let closed = one.names.close().await;
    assert_eq!(closed.flows.len(), 17);
    assert!(closed.flows.iter().all(|flow| flow.connections == 2));
    assert_eq!(closed.counts.refused, 34);
}

#[tokio::test]
async fn a_dot_inside_a_label_is_no_label_boundary() {
    // "evil.example" + "com" as two labels is printed as evil.example.com by careless code.
    let one = one(&["example.com"]);
    let mut query = ask("x.com", RecordType::A);
    for label in [&b"example.com"[..], b"a.example.com", b"example", b"example\0", b"example.com\0.evil"] {
        query.name = vec![label.to_vec(), b"com".to_vec()];
        if label == b"example" {
            assert_eq!(addresses(&one.ask(&query)).len(), 1);
        } else {
            assert_refused(&one.ask(&query), "invalid_name");
        }
    }
    query.name = vec![b"a.example.com".to_vec()];
    assert_refused(&one.ask(&query), "invalid_name");
    let flows = one.names.close().await.flows;
    assert_eq!(flows[0].name.as_deref(), Some("example\\.com.com"));
    assert_eq!(flows[2].name.as_deref(), Some("example\\000.com"));
}

#[tokio::test]
async fn profiles_that_reach_nothing_name_nothing() {
    let none = one_with(Limits::default(), Arc::new(Profile::None));
    assert_refused(&none.ask(&ask("example.com", RecordType::A)), "no_egress");
    let empty = one(&[]);
    assert_refused(&empty.ask(&ask("example.com", RecordType::A)), "name_not_allowed");
}

#[tokio::test]
async fn case_is_echoed_and_means_nothing() {
    let one = one(&["example.com"]);
    let first = one.ask(&ask("API.eXaMpLe.CoM", RecordType::A));
    assert_eq!(first.queries[0].name.to_ascii(), "API.eXaMpLe.CoM.");
    assert_eq!(first.answers[0].name.to_ascii(), "API.eXaMpLe.CoM.");
    assert_eq!(addresses(&one.ask(&ask("api.EXAMPLE.com", RecordType::A))), addresses(&first));
    let id = assert_refused(&one.ask(&ask("EVIL.test", RecordType::A)), "name_not_allowed");
    assert_eq!(assert_refused(&one.ask(&ask("evil.TEST", RecordType::A)), "name_not_allowed"), id);
    assert_eq!(one.names.close().await.flows[0].name.as_deref(), Some("evil.test"));
}

#[tokio::test]
async fn names_are_bounded() {
    let one = one_with(Limits { names_per_execution: 3, ..Limits::default() }, profile(&["example.com"]));
    for number in 1..=3 {
        let answer = one.ask(&ask(&format!("n{number}.example.com"), RecordType::A));
        assert_eq!(addresses(&answer), [Ipv4Addr::new(198, 18, 0, number)]);
    }
    assert_refused(&one.ask(&ask("n4.example.com", RecordType::A)), "dns_names_per_execution");
    // Those that are there still are, and what takes no address is still answered.
    assert_eq!(addresses(&one.ask(&ask("n2.example.com", RecordType::A))), [Ipv4Addr::new(198, 18, 0, 2)]);
    assert_no_data(&one.ask(&ask("n5.example.com", RecordType::AAAA)));
}

#[tokio::test]
async fn queries_are_bounded_in_rate_and_the_rest_is_one_record() {
    let limits = Limits { queries_burst: 10, queries_per_second: 1, ..Limits::default() };
    let one = one_with(limits, profile(&["example.com"]));
    let mut ids = std::collections::BTreeSet::new();
    let mut answered = 0;
    for number in 0..500 {
        let answer = one.ask(&ask(&format!("data{number}.example.com"), RecordType::A));
        if answer.answers.is_empty() {
            ids.insert(assert_refused(&answer, "dns_rate"));
        } else {
            answered += 1;
        }
    }
    assert_eq!(ids.len(), 1);
    // As many more as there were seconds: the machine may be busy.
    assert!((10..=20).contains(&answered), "{answered}");
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(addresses(&one.ask(&ask("example.com", RecordType::A))).len(), 1);
    assert_eq!(one.names.table().len(), answered + 1);
    let closed = one.names.close().await;
    let refused = 500 - u64::try_from(answered).unwrap();
    assert_eq!(closed.flows.len(), 1);
    assert_eq!((closed.flows[0].rule.as_str(), closed.flows[0].connections), ("dns_rate", refused));
    assert_eq!((closed.counts.over_rate, closed.counts.queries), (refused, 501));
}

#[tokio::test]
async fn records_are_bounded_and_none_is_lost_from_the_count() {
    let limits = Limits { records_per_execution: 5, queries_burst: 1000, ..Limits::default() };
    let one = one_with(limits, profile(&["example.com"]));
    let mut last = String::new();
    for number in 0..200 {
        last = assert_refused(&one.ask(&ask(&format!("{number}.tunnel.test"), RecordType::TXT)), "name_not_allowed");
    }
    let flows = one.names.close().await.flows;
    assert_eq!(flows.len(), 6);
    assert_eq!((flows[5].rule.as_str(), flows[5].name.as_deref()), ("dns_records_per_execution", None));
    assert_eq!(flows[5].decision_id, last);
    assert_eq!(flows.iter().map(|flow| flow.connections).sum::<u64>(), 200);
}

#[tokio::test]
async fn a_name_that_the_kernel_does_not_take_has_no_address() {
    let one = one(&["example.com"]);
    one.told.broken.store(true, std::sync::atomic::Ordering::Relaxed);
    let answer = one.ask(&ask("example.com", RecordType::A));
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    assert!(answer.answers.is_empty());
    let (code, text) = extended(&answer).unwrap();
    assert_eq!(code, 0);
    assert!(one.names.table().is_empty());
    one.told.broken.store(false, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(addresses(&one.ask(&ask("example.com", RecordType::A))), [Ipv4Addr::new(198, 18, 0, 1)]);
    let closed = one.names.close().await;
    assert_eq!(closed.counts.failed, 1);
    assert!(text.ends_with(&closed.flows[0].decision_id));
}

#[tokio::test]
async fn ports_of_every_entry_that_names_it_are_reached() {
    let profile = Profile::allowlist([
        entry(serde_json::json!({"domain": "example.com", "ports": [8443, 443]})),
        entry(serde_json::json!({"domain": "db.example.com", "ports": [5432], "exact": true})),
        entry(serde_json::json!({"domain": "other.test", "ports": [1]})),
    ]);
    let one = one_with(Limits::default(), Arc::new(profile));
    one.ask(&ask("db.example.com", RecordType::A));
    one.ask(&ask("www.example.com", RecordType::A));
    let ports: Vec<Vec<u16>> = lock(&one.told.calls).iter().map(|call| call.2.clone()).collect();
    assert_eq!(ports, [vec![443, 5432, 8443], vec![443, 8443]]);
}

#[tokio::test]
async fn executions_share_addresses_and_not_their_meaning() {
    let told = Arc::new(Told::default());
    let server = DnsServer::new(Limits::default(), told.clone());
    let first = server.open(LeafId(1), execution("e1", profile(&["one.test"])));
    let second = server.open(LeafId(2), execution("e2", profile(&["two.test"])));
    let stand_in = Ipv4Addr::new(198, 18, 0, 1);
    for (names, mine, theirs) in [(&first, "one.test", "two.test"), (&second, "two.test", "one.test")] {
        let query = ask(mine, RecordType::A);
        assert_eq!(
            addresses(&read(&names.answer(&query.bytes(), Transport::Udp, CLIENT).unwrap(), &query)),
            [stand_in]
        );
        let query = ask(theirs, RecordType::A);
        let answer = names.answer(&query.bytes(), Transport::Udp, CLIENT).unwrap();
        assert_refused(&read(&answer, &query), "name_not_allowed");
    }
    assert_eq!(first.table().name_of(stand_in).unwrap().as_str(), "one.test");
    assert_eq!(second.table().name_of(stand_in).unwrap().as_str(), "two.test");
    assert_eq!(lock(&told.calls).iter().map(|call| call.0).collect::<Vec<_>>(), [LeafId(1), LeafId(2)]);
}

#[tokio::test]
async fn what_is_over_is_not_answered_and_keeps_its_records() {
    let told = Arc::new(Told::default());
    let server = DnsServer::new(Limits::default(), told);
    let first = server.open(LEAF, execution("e1", profile(&["one.test"])));
    let query = ask("evil.test", RecordType::A).bytes();
    assert!(first.answer(&query, Transport::Udp, CLIENT).is_some());
    let second = server.open(LEAF, execution("e2", profile(&["one.test"])));
    assert_eq!(first.answer(&query, Transport::Udp, CLIENT), None);
    let closed = first.close().await;
    assert_eq!(closed.flows.len(), 1);
    // The end of the first is not the end of the second.
    assert!(server.shared.asking(LEAF).is_some());
    drop(second);
    assert!(server.shared.asking(LEAF).is_none());
}
