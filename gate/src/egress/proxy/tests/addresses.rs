use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;

use super::*;
use crate::egress::proxy::request::Target;
use crate::egress::resolver::tests::{DnsServer, Reply, a, aaaa};

/// Asks for the decision alone: nothing here is dialled, whether or not the check holds.
#[tokio::test]
async fn a_name_with_an_address_that_is_not_public_is_refused_whatever_else_it_has() {
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
    let public = ("public.test", vec!["8.8.8.8", "2606:4700::1111", "::ffff:8.8.4.4", "127.0.0.1"]);
    let parse = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpAddr>>();
    let mut hosts: BTreeMap<_, _> = names.iter().map(|(name, ips, _)| ((*name).to_owned(), parse(ips))).collect();
    hosts.insert(public.0.to_owned(), parse(&public.1));
    let resolver = Resolver::new(ResolverConfig { hosts: hosts.clone(), ..ResolverConfig::default() });
    let allow = AllowAddresses::parse(&["127.0.0.1"]).unwrap();
    let dialer = Dialer::new(resolver, allow, None, Duration::from_secs(1)).unwrap();
    let entries = hosts.keys().map(|name| Entry::new(Pattern::parse(name).unwrap(), [443]));
    let profile = Profile::allowlist(entries);
    let target = |name: &str| Target { host: Host::parse(name).unwrap(), port: 443, protocol: Protocol::Https };
    for (name, _, class) in names {
        let Err(reply::Reply::Denied { reason, detail, message }) = dialer.authorise(&profile, &target(name)).await
        else {
            panic!("{name} would be dialled");
        };
        assert_eq!((reason.as_str(), detail), ("address_not_public", Some(class)), "{name}");
        assert!(message.contains(class));
    }
    let addresses = dialer.authorise(&profile, &target(public.0)).await.unwrap();
    let expected = ["8.8.8.8:443", "[2606:4700::1111]:443", "8.8.4.4:443", "127.0.0.1:443"];
    assert_eq!(addresses.addresses, expected.map(|address| address.parse().unwrap()));
    for literal in
        ["[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[::127.0.0.1]", "10.0.0.1", "0xa9fea9fe", "[fd00:ec2::254]"]
    {
        assert!(
            matches!(dialer.authorise(&profile, &target(literal)).await, Err(reply::Reply::Denied { .. })),
            "{literal}"
        );
    }
}

#[tokio::test]
async fn an_address_that_is_not_public_is_not_dialled() {
    let origin = Origin::echoing().await;
    let port = origin.port;
    let bench = Bench::new(|config| {
        let two = vec!["127.0.0.1".parse().unwrap(), "127.0.0.2".parse().unwrap()];
        config.hosts = [("two.test".to_owned(), two)].into();
    })
    .await;
    let session = bench.open(&[("two.test", port)]);
    assert_eq!(bench.connect(&format!("two.test:{port}")).await.1.denied(), "address_not_public");
    let url = format!("GET https://two.test:{port}/ HTTP/1.1\r\nHost: two.test:{port}\r\n\r\n");
    assert_eq!(bench.ask(url).await.denied(), "address_not_public");
    assert_eq!(origin.connections(), 0);
    for flow in session.close().await {
        assert_eq!((flow.verdict, flow.rule.as_str()), (Verdict::Deny, "address_not_public:loopback"));
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
        (RecordType::A, _) => Reply::Records(vec![a(name, "127.0.0.2")]),
        _ => Reply::Records(vec![]),
    })
    .await;
    let bench = Bench::new(|config| config.dns_servers = Some(vec![dns.address])).await;
    let session = bench.open_bytes(&[("rebind.test", origin.port)]);
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
            Reply::Records(vec![a(name, "127.0.0.1"), a(name, "127.0.0.1"), a(name, "127.0.0.2")])
        }
        ("mixed6.test", RecordType::A) => Reply::Records(vec![a(name, "127.0.0.1")]),
        ("mixed6.test", RecordType::AAAA) => Reply::Records(vec![aaaa(name, "::1")]),
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
