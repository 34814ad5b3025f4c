use std::net::Ipv4Addr;
use std::time::Duration;

use super::*;
use crate::egress::LeafId;
use crate::egress::flow::{DecidedBy, End, Protocol};

fn record(action: Option<&str>, name: &str, verdict: Verdict) -> Arc<FlowRecord> {
    Arc::new(FlowRecord {
        time: Timestamp::now(),
        execution_id: action.map(|action| format!("execution-of-{action}")),
        action_id: action.map(str::to_owned),
        principal: action.map(|_| "tester".to_owned()),
        workspace: action.map(|_| "default".to_owned()),
        name: Some(name.to_owned()),
        address: None,
        port: Some(443),
        protocol: Some(Protocol::Connect),
        sni: None,
        name_verified: None,
        carried: false,
        opaque: false,
        verdict,
        decided_by: DecidedBy::Proxy,
        rule: "profile".to_owned(),
        end: End::Closed,
        error: None,
        bytes_from_sandbox: 1,
        bytes_to_sandbox: 2,
        bytes_to_upstream: 3,
        bytes_from_upstream: 4,
        duration_ms: 5,
        decision_id: ids::mint(),
        client: None,
        connections: 1,
        connection: None,
        uncounted: false,
        kernel: None,
        agreement: None,
    })
}

fn connection(action: &str, name: &str, verdict: Verdict) -> Noted {
    Noted::Connection(record(Some(action), name, verdict))
}

fn event() -> KernelEvent {
    KernelEvent {
        at_ns: 1,
        time: Timestamp::now(),
        leaf: LeafId(7),
        hook: "connect4",
        family: "inet",
        protocol: "tcp".to_owned(),
        address: Some(Ipv4Addr::new(192, 0, 2, 1).into()),
        port: 80,
        reason: "not_the_proxy",
    }
}

fn names(page: &Page) -> Vec<&str> {
    page.flows.iter().map(|flow| flow["name"].as_str().unwrap_or("-")).collect()
}

#[test]
fn what_is_noted_is_read_back_and_narrowed() {
    let flows = Flows::default();
    flows.note(connection("a", "one", Verdict::Allow));
    flows.note(connection("b", "two", Verdict::Deny));
    flows.note(Noted::Connection(record(None, "three", Verdict::Deny)));
    let page = |filter: Filter| flows.page(&filter);
    assert_eq!(names(&page(Filter::default())), ["one", "two", "three"]);
    let deny = || Some("deny".to_owned());
    assert_eq!(names(&page(Filter { verdict: deny(), ..Filter::default() })), ["two", "three"]);
    assert_eq!(names(&page(Filter { action: Some("a".to_owned()), ..Filter::default() })), ["one"]);
    let tester = || Some("tester".to_owned());
    assert_eq!(names(&page(Filter { principal: tester(), verdict: deny(), ..Filter::default() })), ["two"]);
    assert!(page(Filter { principal: Some("other".to_owned()), ..Filter::default() }).flows.is_empty());
    let later = Some(Timestamp::now().plus_millis(60_000));
    assert!(page(Filter { since: later, ..Filter::default() }).flows.is_empty());
    // The newest are what a limit leaves; after a number, the ones that come next.
    assert_eq!(names(&page(Filter { limit: Some(2), ..Filter::default() })), ["two", "three"]);
    let start = page(Filter::default()).flows[0]["sequence"].as_u64().unwrap();
    let first = page(Filter { after: Some(start), limit: Some(1), ..Filter::default() });
    assert_eq!((names(&first).as_slice(), first.next), (["two"].as_slice(), start + 1));
    let rest = page(Filter { after: Some(first.next), ..Filter::default() });
    assert_eq!((names(&rest).as_slice(), rest.next), (["three"].as_slice(), start + 2));
    assert!(page(Filter { after: Some(rest.next), ..Filter::default() }).flows.is_empty());
}

#[test]
fn every_kind_says_who_decided_and_under_which_id() {
    let flows = Flows::default();
    let owner = Owner {
        execution_id: "e".to_owned(),
        action_id: "a".to_owned(),
        principal: "tester".to_owned(),
        workspace: "w".to_owned(),
    };
    let refusal = KernelRefusal::new(event(), Some(owner));
    let asked = Asked { name: Some("evil.test".to_owned()), port: Some(443), ..Asked::default() };
    let call = RefusedCall {
        time: Timestamp::now(),
        action_id: "a".to_owned(),
        principal: "tester".to_owned(),
        workspace: "w".to_owned(),
        asked,
        rule: "name_not_allowed".to_owned(),
        decision_id: "decision-of-the-call".to_owned(),
    };
    let by_kernel = refusal.decision_id.clone();
    flows.note(Noted::Kernel(Arc::new(refusal)));
    flows.note(Noted::Call(Arc::new(call)));
    flows.note(connection("a", "one", Verdict::Allow));
    let page = flows.page(&Filter { action: Some("a".to_owned()), ..Filter::default() });
    let by: Vec<&str> = page.flows.iter().map(|flow| flow["decided_by"].as_str().unwrap()).collect();
    assert_eq!(by, ["hook", "gate", "proxy"]);
    let kernel = flows.of(&by_kernel);
    assert_eq!(kernel.len(), 1);
    for (field, value) in [
        ("verdict", json!("deny")),
        ("rule", json!("not_the_proxy")),
        ("address", json!("192.0.2.1")),
        ("execution_id", json!("e")),
        ("principal", json!("tester")),
        ("decision_id", json!(by_kernel)),
    ] {
        assert_eq!(kernel[0][field], value, "{field}");
    }
    assert_eq!(flows.of("decision-of-the-call")[0]["name"], "evil.test");
    // An execution's id gives its refusals; without one, all that it did.
    assert_eq!(flows.of("e").len(), 1);
    assert_eq!(flows.of("execution-of-a")[0]["verdict"], "allow");
    assert!(flows.of("nothing").is_empty());
}

#[test]
fn both_rings_are_bounded_and_nobody_pushes_actions_out() {
    let flows = Flows::default();
    flows.note(connection("a", "kept", Verdict::Allow));
    let stranger = record(None, "stranger", Verdict::Deny);
    for _ in 0..KEPT_UNATTRIBUTED + 50 {
        flows.note(Noted::Connection(Arc::clone(&stranger)));
    }
    let all = flows.page(&Filter { limit: Some(usize::MAX), ..Filter::default() });
    assert_eq!(all.flows.len(), KEPT_UNATTRIBUTED + 1);
    assert_eq!(names(&all)[0], "kept");
    let many = record(Some("b"), "many", Verdict::Allow);
    for _ in 0..KEPT + 50 {
        flows.note(Noted::Connection(Arc::clone(&many)));
    }
    let books = flows.books();
    assert_eq!((books.attributed.len(), books.unattributed.len()), (KEPT, KEPT_UNATTRIBUTED));
}

#[tokio::test]
async fn a_reader_waits_for_what_its_filter_lets_through() {
    let flows = Flows::default();
    let filter = Filter { action: Some("a".to_owned()), after: Some(0), ..Filter::default() };
    let waiting = tokio::spawn({
        let (flows, filter) = (flows.clone(), filter.clone());
        async move { flows.next_page(&filter, tokio::time::sleep(Duration::from_secs(20))).await }
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    flows.note(connection("b", "other", Verdict::Allow));
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(!waiting.is_finished());
    flows.note(connection("a", "wanted", Verdict::Allow));
    assert_eq!(names(&waiting.await.unwrap()), ["wanted"]);
    let nothing = Filter { action: Some("c".to_owned()), ..filter.clone() };
    assert!(flows.next_page(&nothing, tokio::time::sleep(Duration::from_millis(20))).await.flows.is_empty());
    // A gate that drains keeps nobody.
    flows.close();
    assert!(flows.next_page(&nothing, std::future::pending()).await.flows.is_empty());
}

#[tokio::test]
async fn what_the_proxy_sends_too_fast_is_counted_as_lost() {
    let flows = Flows::default();
    let (sender, receiver) = broadcast::channel(4);
    for _ in 0..10 {
        sender.send(record(Some("a"), "one", Verdict::Allow)).unwrap();
    }
    drop(sender);
    flows.clone().collect(receiver).await;
    let page = flows.page(&Filter::default());
    assert_eq!((page.flows.len(), page.lost), (4, 6));
}

#[test]
fn numbers_stay_whole_in_json_and_grow_over_restarts() {
    let number = first_number();
    assert!(number > 0 && number < 1 << 53);
    assert!(first_number() >= number);
}
