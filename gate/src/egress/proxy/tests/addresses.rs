use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;

use super::*;
use crate::egress::resolver::tests::{DnsServer, Reply, a, aaaa};

#[tokio::test]
async fn a_name_with_an_address_that_is_not_public_is_refused_whatever_else_it_has() {
    // The public ones are documentation-like stand-ins that are never dialled: each name has a bad one beside.
    let names = [
        ("private.test", vec!["10.1.2.3"], "private"),
        ("metadata.test", vec!["169.254.169.254"], "link_local"),
        ("azure.test", vec!["168.63.129.16"], "cloud_platform"),
        ("first.test", vec!["192.168.0.1", "8.8.8.8"], "private"),
        ("last.test", vec!["8.8.8.8", "8.8.4.4", "100.64.0.1"], "shared"),
        ("six.test", vec!["8.8.8.8", "fd00::1"], "unique_local"),
        ("mapped.test", vec!["8.8.8.8", "::ffff:10.0.0.1"], "private"),
        ("nat64.test", vec!["64:ff9b::a00:1"], "private"),
        ("sixtofour.test", vec!["2002:a00:1::"], "private"),
        ("neighbour.test", vec!["127.0.0.1", "127.0.0.2"], "loopback"),
        ("sixloop.test", vec!["127.0.0.1", "::1"], "loopback"),
        ("zero.test", vec!["0.0.0.0"], "this_network"),
        ("multicast.test", vec!["224.0.0.1"], "multicast"),
    ];
    let table = names.clone();
    let bench = Bench::new(move |config| {
        config.hosts = table
            .into_iter()
            .map(|(name, addresses, _)| (name.to_owned(), addresses.iter().map(|a| a.parse().unwrap()).collect()))
            .collect();
    })
    .await;
    let profile: Vec<_> = names.iter().map(|(name, ..)| (*name, 443)).collect();
    let session = bench.open(&profile);
    for (name, _, class) in &names {
        let (_, answer) = bench.connect(&format!("{name}:443")).await;
        assert_eq!(answer.denied(), "address_not_public", "{name}");
        assert!(answer.json()["message"].as_str().unwrap().contains(class), "{name}");
        let answer = bench.ask(format!("GET https://{name}/ HTTP/1.1\r\nHost: {name}\r\n\r\n")).await;
        assert_eq!(answer.denied(), "address_not_public", "{name}");
    }
    let records = session.close().await;
    assert_eq!(records.len(), names.len() * 2);
    for flow in records {
        let class = names.iter().find(|(name, ..)| flow.name.as_deref() == Some(*name)).unwrap().2;
        assert_eq!((flow.verdict, flow.rule), (Verdict::Deny, format!("address_not_public:{class}")));
        assert_eq!((flow.address, flow.bytes_to_upstream), (None, 0));
    }
}

#[tokio::test]
async fn only_the_configuration_lets_an_address_that_is_not_public_be_dialled() {
    let origin = Origin::echoing().await;
    for (allow, status) in [(vec![], 403), (vec!["127.0.0.0/8"], 200), (vec!["127.0.0.2"], 403)] {
        let bench = Bench::new(|config| config.allow_addresses = AllowAddresses::parse(&allow).unwrap()).await;
        let _session = bench.open(&[("origin.test", origin.port)]);
        assert_eq!(bench.connect(&format!("origin.test:{}", origin.port)).await.1.status, status, "{allow:?}");
    }
    assert_eq!(origin.connections(), 1);
}

#[tokio::test]
async fn the_address_that_was_checked_is_the_one_that_is_dialled() {
    let origin = Origin::echoing().await;
    // Rebinding: an address that may be dialled for the first question, one that may not for every later one.
    let dns = DnsServer::start(|name, kind, before| match (kind, before) {
        (RecordType::A, 0) => Reply::Records(vec![a(name, "127.0.0.1")]),
        (RecordType::A, _) => Reply::Records(vec![a(name, "169.254.169.254")]),
        _ => Reply::Records(vec![]),
    })
    .await;
    let bench = Bench::new(|config| config.dns_servers = Some(vec![dns.address])).await;
    let session = bench.open(&[("rebind.test", origin.port)]);
    let authority = format!("rebind.test:{}", origin.port);
    let (mut stream, answer) = bench.connect(&authority).await;
    assert_eq!(answer.status, 200);
    stream.write_all(b"x").await.unwrap();
    exactly(&mut stream, 1).await;
    assert_eq!(dns.asked.lock().unwrap().len(), 2, "one question of each family");
    assert_eq!(bench.connect(&authority).await.1.denied(), "address_not_public");
    drop(stream);
    let records = session.close().await;
    let dialled: Vec<_> = records.iter().filter_map(|flow| flow.address).collect();
    assert_eq!(dialled, ["127.0.0.1".parse::<IpAddr>().unwrap()]);
    assert_eq!(origin.connections(), 1);
}

#[tokio::test]
async fn a_name_outside_the_profile_is_never_asked_of_dns() {
    let dns = DnsServer::start(|_, _, _| Reply::Records(vec![])).await;
    let bench = Bench::new(|config| config.dns_servers = Some(vec![dns.address])).await;
    let _session = bench.open(&[("named.test", 443)]);
    for target in ["c2VjcmV0.attacker.test:443", "named.test:80", "secret.named.test.attacker.test:443"] {
        bench.connect(target).await.1.denied();
    }
    assert!(dns.asked.lock().unwrap().is_empty());
}

#[tokio::test]
async fn one_bad_answer_of_dns_refuses_all_and_a_failure_is_not_a_refusal() {
    let dns = DnsServer::start(|name, kind, _| match (name, kind) {
        ("mixed.test", RecordType::A) => {
            Reply::Records(vec![a(name, "127.0.0.1"), a(name, "8.8.8.8"), a(name, "10.0.0.1")])
        }
        ("mixed6.test", RecordType::A) => Reply::Records(vec![a(name, "127.0.0.1")]),
        ("mixed6.test", RecordType::AAAA) => Reply::Records(vec![aaaa(name, "fe80::1")]),
        ("gone.test", _) => Reply::Code(ResponseCode::NXDomain),
        ("broken.test", _) => Reply::Code(ResponseCode::ServFail),
        _ => Reply::Records(vec![]),
    })
    .await;
    let bench = Bench::new(|config| config.dns_servers = Some(vec![dns.address])).await;
    let session = bench.open(&[("mixed.test", 443), ("mixed6.test", 443), ("gone.test", 443), ("broken.test", 443)]);
    for name in ["mixed.test", "mixed6.test"] {
        assert_eq!(bench.connect(&format!("{name}:443")).await.1.denied(), "address_not_public", "{name}");
    }
    for (name, reason) in [("gone.test", "name_not_found"), ("broken.test", "dns_failed")] {
        let (_, answer) = bench.connect(&format!("{name}:443")).await;
        assert_eq!((answer.status, answer.json()["reason"].as_str()), (502, Some(reason)));
        assert_eq!(answer.field(DECISION_ID), answer.json()["decision_id"].as_str());
    }
    let records = session.close().await;
    assert_eq!(records.iter().filter(|flow| flow.verdict == Verdict::Allow).count(), 2);
    assert_eq!(records.last().unwrap().error.as_deref(), Some("dns_failed"));
}

#[tokio::test]
async fn an_origin_that_is_not_there_is_a_502() {
    let bench = Bench::plain().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let session = bench.open(&[("origin.test", port)]);
    let (_, answer) = bench.connect(&format!("origin.test:{port}")).await;
    assert_eq!((answer.status, answer.json()["reason"].as_str()), (502, Some("connect_refused")));
    let flow = &session.close().await[0];
    assert_eq!(
        (flow.verdict, flow.error.as_deref(), flow.end),
        (Verdict::Allow, Some("connect_refused"), End::Answered)
    );
    assert_eq!(flow.address, Some("127.0.0.1".parse().unwrap()));
}
