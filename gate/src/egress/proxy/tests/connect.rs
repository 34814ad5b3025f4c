use super::*;

#[tokio::test]
async fn an_allowed_name_is_reached_and_what_passed_is_counted() {
    let bench = Bench::plain().await;
    let origin = Origin::echoing().await;
    let session = bench.open_bytes(&[("origin.test", origin.port)]);
    let authority = format!("origin.test:{}", origin.port);
    let (mut stream, answer) = bench.connect(&authority).await;
    assert_eq!(answer.status, 200);
    stream.write_all(b"hello").await.unwrap();
    assert_eq!(exactly(&mut stream, 5).await, b"hello");
    stream.shutdown().await.unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.unwrap();
    assert!(rest.is_empty());

    let records = session.close().await;
    let [flow] = records.as_slice() else { panic!("{records:?}") };
    assert_eq!(flow.execution_id.as_deref(), Some("execution-7"));
    assert_eq!((flow.action_id.as_deref(), flow.principal.as_deref()), (Some("fetch"), Some("agent")));
    assert_eq!((flow.name.as_deref(), flow.port), (Some("origin.test"), Some(origin.port)));
    assert_eq!(flow.address, Some("127.0.0.1".parse().unwrap()));
    assert_eq!((flow.protocol, flow.verdict, flow.end), (Some(Protocol::Tcp), Verdict::Allow, End::Closed));
    assert_eq!((flow.rule.as_str(), flow.error.as_deref()), ("profile", None));
    assert_eq!(flow.client, Some(stream.local_addr().unwrap()));
    let request = format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n");
    assert_eq!(flow.bytes_from_sandbox, request.len() as u64 + 5);
    assert_eq!(flow.bytes_to_sandbox, answer.head.len() as u64 + 5);
    assert_eq!((flow.bytes_to_upstream, flow.bytes_from_upstream), (5, 5));
    let json = serde_json::to_value(flow).unwrap();
    assert_eq!((&json["verdict"], &json["protocol"], &json["end"]), (&"allow".into(), &"tcp".into(), &"closed".into()));
}

#[tokio::test]
async fn only_the_names_and_ports_of_the_profile_are_reached() {
    let bench = Bench::plain().await;
    let origin = Origin::echoing().await;
    let port = origin.port;
    let session = bench.open(&[("origin.test", port)]);
    for name in ["origin.test", "ORIGIN.test", "origin.test.", "sub.origin.test", "or%69gin.test"] {
        assert_eq!(bench.connect(&format!("{name}:{port}")).await.1.status, 200, "{name}");
    }
    let reached = origin.connections();
    for (name, port) in [
        ("other.test", port),
        ("evilorigin.test", port),
        ("origin.test.other.test", port),
        ("test", port),
        ("origin.test", port ^ 1),
        ("origin.test", 443),
    ] {
        let (_, answer) = bench.connect(&format!("{name}:{port}")).await;
        let reason = answer.denied();
        assert!(["name_not_allowed", "port_not_allowed"].contains(&reason.as_str()), "{name}:{port} {reason}");
    }
    assert_eq!(origin.connections(), reached);
    let records = session.close().await;
    let denied: Vec<_> = records.iter().filter(|flow| flow.verdict == Verdict::Deny).collect();
    assert_eq!(denied.len(), 6);
    assert!(
        denied.iter().all(|flow| flow.end == End::Answered && flow.address.is_none() && flow.bytes_to_upstream == 0)
    );
}

/// Only spellings of this machine's own loopback: a build without the check would reach nothing else.
#[tokio::test]
async fn an_address_is_refused_in_every_spelling() {
    let bench = Bench::plain().await;
    let origin = Origin::echoing().await;
    let session = bench.open(&[("origin.test", origin.port)]);
    let spellings = [
        "127.0.0.1",
        "127.0.0.1.",
        "127.1",
        "127.0.1",
        "2130706433",
        "0x7f000001",
        "0X7F.1",
        "017700000001",
        "0177.1",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::1]",
        "[0:0:0:0:0:0:0:1]",
        "%31%32%37.0.0.1",
        "0",
        "0.0.0.0",
        "[::]",
    ];
    for host in spellings {
        let (_, answer) = bench.connect(&format!("{host}:{}", origin.port)).await;
        assert_eq!(answer.status, 403, "{host}");
        let url = format!("GET http://{host}:{0}/ HTTP/1.1\r\nHost: {host}:{0}\r\n\r\n", origin.port);
        assert_eq!(bench.ask(url).await.status, 403, "{host}");
    }
    assert_eq!(origin.connections(), 0);
    let records = session.close().await;
    assert_eq!(records.len(), spellings.len() * 2);
    assert!(records.iter().all(|flow| flow.verdict == Verdict::Deny));
}

#[tokio::test]
async fn what_is_not_a_connect_line_is_a_400_and_not_an_outage() {
    let bench = Bench::plain().await;
    let session = bench.open(&[("origin.test", 443)]);
    for target in [
        "origin.test",
        "origin.test:",
        "origin.test:0",
        "origin.test:99999",
        ":443",
        "::1:443",
        "[::1%25lo]:443",
        "a..b:443",
    ] {
        let answer = bench.ask(format!("CONNECT {target} HTTP/1.1\r\n\r\n")).await;
        assert_eq!((answer.status, answer.json()["error"].as_str()), (400, Some("invalid_request")), "{target}");
        assert!(answer.field("Latchgate-Decision-Id").is_some());
    }
    assert!(session.close().await.iter().all(|flow| flow.verdict == Verdict::Deny && flow.rule == "malformed"));
}

#[tokio::test]
async fn data_sent_with_the_connect_line_goes_into_the_tunnel() {
    let bench = Bench::plain().await;
    let origin = Origin::echoing().await;
    let session = bench.open_bytes(&[("origin.test", origin.port)]);
    let mut stream = bench.dial().await;
    let early = "x".repeat(40_000);
    stream.write_all(format!("CONNECT origin.test:{} HTTP/1.1\r\n\r\n{early}", origin.port).as_bytes()).await.unwrap();
    assert!(read_head(&mut stream).await.starts_with(b"HTTP/1.1 200"));
    assert_eq!(exactly(&mut stream, early.len()).await, early.as_bytes());
    drop(stream);
    let records = session.close().await;
    assert_eq!((records[0].bytes_to_upstream, records[0].bytes_from_upstream), (40_000, 40_000));
}

#[tokio::test]
async fn an_end_of_one_direction_leaves_the_other_open() {
    let bench = Bench::plain().await;
    // Ends its own direction first, and then says how much it got.
    let origin = Origin::doing(|mut stream, seen| async move {
        stream.write_all(b"first").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.unwrap();
        seen.lock().unwrap().push(format!("{}", all.len()));
    })
    .await;
    let late = Origin::doing(|mut stream, _| async move {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.unwrap();
        stream.write_all(format!("got {}", all.len()).as_bytes()).await.unwrap();
    })
    .await;
    let session = bench.open_bytes(&[("origin.test", origin.port), ("origin.test", late.port)]);

    let (mut stream, _) = bench.connect(&format!("origin.test:{}", origin.port)).await;
    let mut first = Vec::new();
    stream.read_to_end(&mut first).await.unwrap();
    assert_eq!(first, b"first");
    stream.write_all(&vec![b'y'; 300_000]).await.unwrap();
    drop(stream);

    let (mut stream, _) = bench.connect(&format!("origin.test:{}", late.port)).await;
    stream.write_all(&vec![b'z'; 200_000]).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert_eq!(answer, "got 200000");

    while origin.seen().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(origin.seen(), ["300000"]);
    let mut records = session.close().await;
    records.sort_by_key(|flow| flow.bytes_to_upstream);
    let counts: Vec<_> = records.iter().map(|flow| (flow.bytes_to_upstream, flow.bytes_from_upstream)).collect();
    assert_eq!(counts, [(200_000, 10), (300_000, 5)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counts_equal_what_the_peers_counted_both_ways_at_once() {
    let bench = Bench::plain().await;
    const EACH: usize = 3_000_000;
    let origin = Origin::doing(|stream, seen| async move {
        let (mut read, mut write) = stream.into_split();
        let send = tokio::spawn(async move {
            write.write_all(&vec![1; EACH]).await.unwrap();
            write.shutdown().await.unwrap();
        });
        let got = tokio::io::copy(&mut read, &mut tokio::io::sink()).await.unwrap();
        send.await.unwrap();
        seen.lock().unwrap().push(got.to_string());
    })
    .await;
    let session = bench.open_bytes(&[("origin.test", origin.port)]);
    let (stream, _) = bench.connect(&format!("origin.test:{}", origin.port)).await;
    let (mut read, mut write) = stream.into_split();
    let send = tokio::spawn(async move {
        write.write_all(&vec![2; EACH + 1]).await.unwrap();
        write.shutdown().await.unwrap();
        write
    });
    let got = tokio::io::copy(&mut read, &mut tokio::io::sink()).await.unwrap();
    let _write = send.await.unwrap();
    assert_eq!(got, EACH as u64);
    while origin.seen().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let flow = &session.close().await[0];
    assert_eq!(origin.seen(), [(EACH + 1).to_string()]);
    assert_eq!((flow.bytes_to_upstream, flow.bytes_from_upstream), (EACH as u64 + 1, EACH as u64));
}

#[tokio::test]
async fn a_broken_side_breaks_the_other() {
    let bench = Bench::plain().await;
    let origin = Origin::doing(|mut stream, _| async move {
        let _ = stream.read_u8().await;
        stream.set_zero_linger().unwrap();
    })
    .await;
    let session = bench.open_bytes(&[("origin.test", origin.port)]);
    let (mut stream, _) = bench.connect(&format!("origin.test:{}", origin.port)).await;
    stream.write_all(b"x").await.unwrap();
    // A reset, not an end: the client must not take what it has for all there was.
    assert!(stream.read_u8().await.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionReset));
    assert_eq!(session.close().await[0].end, End::UpstreamFailed);
}
