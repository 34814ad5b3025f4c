//! Clients that know of no proxy.

use super::tls::{client_config, cut, dribble, hello_for, rest, run};
use super::*;
use crate::egress::proxy::client::ACCESS_DENIED;

#[tokio::test]
async fn a_name_is_reached_by_the_address_that_stands_for_it() {
    let bench = Bench::plain().await;
    let origin = Origin::tls("origin.test", &bench.ca, OK).await;
    let session = bench.open(&[("origin.test", origin.port)]);
    let stream = bench.dial_carried(&format!("[::ffff:198.18.0.1]:{}", origin.port)).await;
    let name = rustls::pki_types::ServerName::try_from("origin.test").unwrap();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(client_config(&bench)));
    let mut tls = connector.connect(name, stream).await.unwrap();
    tls.write_all(b"GET / HTTP/1.1\r\nHost: origin.test\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    tls.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, OK.as_bytes());
    let flow = &session.close().await[0];
    assert_eq!((flow.name.as_deref(), flow.port), (Some("origin.test"), Some(origin.port)));
    assert_eq!((flow.address, flow.verdict), (Some("127.0.0.1".parse().unwrap()), Verdict::Allow));
    assert_eq!((flow.carried, flow.opaque, flow.sni.as_deref()), (true, true, Some("origin.test")));
}

#[tokio::test]
async fn what_is_refused_is_told_so_in_the_clients_own_protocol() {
    let bench = Bench::plain().await;
    let origin = Origin::echoing().await;
    let session = bench.open(&[("origin.test", origin.port)]);
    let port = origin.port;
    let hello = hello_for(&bench, "other.test");
    let mut rules = Vec::new();
    for (original, rule) in [
        (format!("198.18.0.2:{port}"), "name_not_allowed"),
        ("198.18.0.1:1".to_owned(), "port_not_allowed"),
        (format!("198.18.9.9:{port}"), "unknown_stand_in"),
        (format!("198.19.255.255:{port}"), "unknown_stand_in"),
        (format!("127.0.0.1:{port}"), "address_literal"),
        (format!("[::1]:{port}"), "address_literal"),
    ] {
        let mut stream = bench.dial_carried(&original).await;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: other.test\r\n\r\n").await.unwrap();
        assert_eq!(Answer::read(&mut stream).await.denied(), rule, "{original}");
        let mut stream = bench.dial_carried(&original).await;
        stream.write_all(&hello).await.unwrap();
        assert_eq!(rest(&mut stream).await, ACCESS_DENIED, "{original}");
        // One that waits for the server, as SSH and SMTP do, and one that speaks something else.
        let mut stream = bench.dial_carried(&original).await;
        assert!(timeout(Duration::from_secs(5), stream.read_u8()).await.unwrap().is_err());
        let mut stream = bench.dial_carried(&original).await;
        stream.write_all(&[0, 0, 0, 8, 4, 0xd2, 22, 47]).await.unwrap();
        assert!(timeout(Duration::from_secs(5), stream.read_u8()).await.unwrap().is_err());
        rules.extend([rule; 4]);
    }
    assert_eq!(origin.connections(), 0);
    let records = session.close().await;
    assert_eq!(records.iter().map(|flow| flow.rule.as_str()).collect::<Vec<_>>(), rules);
    assert!(records.iter().all(|flow| flow.carried && flow.verdict == Verdict::Deny && flow.port.is_some()));
    assert!(records.iter().all(|flow| flow.end == End::Answered), "{records:?}");
}

#[tokio::test]
async fn fronting_by_sni_is_refused_before_anything_is_dialled() {
    let bench = Bench::plain().await;
    let origin = Origin::echoing().await;
    let session = bench.open(&[("origin.test", origin.port), ("other.test", origin.port)]);
    // Both names may be reached, but not the one by the address of the other.
    for hello in [hello_for(&bench, "other.test"), cut(&hello_for(&bench, "other.test"))] {
        let mut stream = bench.dial_carried(&format!("198.18.0.1:{}", origin.port)).await;
        dribble(&mut stream, &hello).await;
        assert_eq!(rest(&mut stream).await, ACCESS_DENIED);
    }
    assert_eq!(origin.connections(), 0);
    for flow in session.close().await {
        assert_eq!((flow.rule.as_str(), flow.sni.as_deref()), ("sni_mismatch", Some("other.test")));
        assert_eq!((flow.name_verified, flow.opaque), (None, false));
    }
}

#[tokio::test]
async fn an_entry_for_tls_carries_nothing_else() {
    let bench = Bench::plain().await;
    let origin = Origin::echoing().await;
    let session = bench.open_speaking(&[("origin.test", origin.port)], EntryProtocol::Tls { terminate: false });
    let original = format!("198.18.0.1:{}", origin.port);
    let mut stream = bench.dial_carried(&original).await;
    let request = format!("GET / HTTP/1.1\r\nHost: origin.test:{}\r\n\r\n", origin.port);
    stream.write_all(request.as_bytes()).await.unwrap();
    assert_eq!(Answer::read(&mut stream).await.denied(), "not_tls");
    for bytes in [&b"\x80\x2e\x01\x03\x01"[..], b"\x16\x03\x01\x00\x05\x02"] {
        let mut stream = bench.dial_carried(&original).await;
        stream.write_all(bytes).await.unwrap();
        let _ = rest(&mut stream).await;
    }
    let absolute = format!("GET http://origin.test:{0}/ HTTP/1.1\r\nHost: origin.test:{0}\r\n\r\n", origin.port);
    assert_eq!(bench.ask(absolute).await.denied(), "protocol_not_allowed");
    assert_eq!(origin.connections(), 0);
    let mut rules: Vec<_> = session.close().await.iter().map(|flow| flow.rule.clone()).collect();
    rules.sort();
    assert_eq!(rules, ["not_tls", "not_tls", "not_tls", "protocol_not_allowed"]);
}

#[tokio::test]
async fn a_server_that_speaks_first_needs_an_entry_for_bytes() {
    let bench = Bench::plain().await;
    let origin = Origin::doing(|mut stream, _| async move {
        stream.write_all(b"220 ready\r\n").await.unwrap();
        let _ = stream.read_to_end(&mut Vec::new()).await;
    })
    .await;
    let session = bench.open_bytes(&[("origin.test", origin.port)]);
    let mut stream = bench.dial_carried(&format!("198.18.0.1:{}", origin.port)).await;
    assert_eq!(exactly(&mut stream, 11).await, b"220 ready\r\n");
    let flow = &session.close().await[0];
    assert_eq!((flow.protocol, flow.name_verified, flow.opaque), (Some(Protocol::Tcp), Some(NameVerified::Dns), true));
}

#[tokio::test]
async fn an_address_is_reached_only_by_an_entry_that_names_its_network() {
    let bench = Bench::new(|config| config.allow_addresses = AllowAddresses::default()).await;
    let origin = Origin::echoing().await;
    let original = format!("127.0.0.1:{}", origin.port);
    let network =
        |network: &str, prefix| NetworkEntry::new(network.parse().unwrap(), prefix, [origin.port], EntryProtocol::Tcp);
    let open =
        |network| bench.proxy.open(LEAF, session(LEAF, entries(&[], EntryProtocol::Auto).with_networks([network])));

    let session = open(network("127.0.0.0", 8));
    let mut stream = bench.dial_carried(&original).await;
    stream.write_all(b"ping").await.unwrap();
    assert_eq!(exactly(&mut stream, 4).await, b"ping");
    // And by a client that asks the proxy for it.
    let (mut stream, answer) = bench.connect(&original).await;
    assert_eq!(answer.status, 200);
    stream.write_all(b"ping").await.unwrap();
    assert_eq!(exactly(&mut stream, 4).await, b"ping");
    let reached = origin.connections();
    assert_eq!(bench.connect("127.0.0.1:1").await.1.denied(), "port_not_allowed");
    assert_eq!(bench.connect(&format!("128.0.0.1:{}", origin.port)).await.1.denied(), "address_not_allowed");
    let records = session.close().await;
    let flow = records.iter().find(|flow| flow.carried).unwrap();
    assert_eq!((flow.name.as_deref(), flow.name_verified, flow.opaque), (Some("127.0.0.1"), None, true));

    // A network of everything does not mean this machine.
    let session = open(network("0.0.0.0", 0));
    assert_eq!(bench.connect(&original).await.1.denied(), "address_not_public");
    assert_eq!(session.close().await[0].rule, "address_not_public:loopback");
    assert_eq!(origin.connections(), reached);
}

#[tokio::test]
async fn streams_of_queries_go_to_the_resolver_of_the_execution() {
    let bench = Bench::plain().await;
    let session = bench.open(&[]);
    for server in ["8.8.8.8:53", "[2001:4860:4860::8888]:53", "198.18.0.1:53"] {
        let mut stream = bench.dial_carried(server).await;
        stream.write_all(b"\0\x05query").await.unwrap();
        assert_eq!(exactly(&mut stream, 7).await, b"\0\x05query");
    }
    let records = session.close().await;
    assert!(records.iter().all(|flow| flow.protocol == Some(Protocol::Dns) && flow.port == Some(53)));

    let mut without = super::session(LEAF, entries(&[], EntryProtocol::Auto));
    without.dns = None;
    let session = bench.proxy.open(LEAF, without);
    let mut stream = bench.dial_carried("8.8.8.8:53").await;
    stream.write_all(b"\0\x05query").await.unwrap();
    assert!(timeout(Duration::from_secs(5), stream.read_u8()).await.unwrap().is_err());
    assert_eq!(session.close().await[0].rule, "no_resolver");
}

/// DNS over HTTPS is a request to a host like any other: one that no entry names is not reached, whether it is asked
/// for by its name, by the address of a name that is, or inside of a connection to one.
#[tokio::test]
async fn dns_over_https_to_a_forbidden_host_is_refused() {
    let bench = Bench::plain().await;
    let origin = Origin::tls("origin.test", &bench.ca, OK).await;
    let session = bench.open(&[("origin.test", origin.port)]);
    let port = origin.port;
    assert_eq!(bench.connect(&format!("other.test:{port}")).await.1.denied(), "name_not_allowed");
    let url = format!("GET https://other.test:{port}/dns-query?dns=AAAB HTTP/1.1\r\nHost: other.test:{port}\r\n\r\n");
    assert_eq!(bench.ask(url).await.denied(), "name_not_allowed");
    let mut stream = bench.dial_carried(&format!("198.18.0.1:{port}")).await;
    stream.write_all(&hello_for(&bench, "other.test")).await.unwrap();
    assert_eq!(rest(&mut stream).await, ACCESS_DENIED);
    let (proxy, ca) = (format!("http://{}", bench.proxy.addresses().v4), bench.ca_file());
    let doh = format!("https://other.test:{port}/dns-query");
    if let Some(ran) = run("curl", &["-sS", "--proxy", &proxy, "--cacert", &ca, &doh]).await {
        assert_eq!(ran.code, Some(56), "{}", ran.err);
        assert!(ran.err.contains("403"), "{}", ran.err);
    }
    assert_eq!(origin.connections(), 0);
    assert!(session.close().await.iter().all(|flow| flow.verdict == Verdict::Deny));
}
