use super::*;

async fn tunnel_with(change: impl FnOnce(&mut Limits)) -> (Bench, OpenSession, TcpStream) {
    let bench = Bench::new(|config| change(&mut config.limits)).await;
    let origin = Origin::echoing().await;
    let session = bench.open_bytes(&[("origin.test", origin.port)]);
    let (stream, answer) = bench.connect(&format!("origin.test:{}", origin.port)).await;
    assert_eq!(answer.status, 200);
    (bench, session, stream)
}

#[tokio::test]
async fn an_execution_carries_so_many_bytes_and_not_one_more() {
    const LIMIT: u64 = 100_000;
    let (bench, session, mut stream) = tunnel_with(|limits| limits.bytes_per_execution = LIMIT).await;
    let chatter = vec![0; 1000];
    while stream.write_all(&chatter).await.is_ok() {
        let mut back = vec![0; 1000];
        if stream.read_exact(&mut back).await.is_err() {
            break;
        }
    }
    // A limit of the execution, not of the connection: another one is no way round it.
    let mut second = bench.dial().await;
    let _ = second.write_all(b"CONNECT origin.test:1 HTTP/1.1\r\n\r\n").await;
    assert!(second.read_u8().await.is_err());
    let records = session.close().await;
    assert_eq!(records.len(), 2);
    let carried: u64 = records.iter().map(|flow| flow.bytes_from_sandbox + flow.bytes_to_sandbox).sum();
    assert_eq!(carried, LIMIT);
    assert!(records.iter().all(|flow| flow.end == End::ByteLimit), "{records:?}");
}

#[tokio::test]
async fn a_connection_has_its_time_however_busy_it_is() {
    let (_bench, session, mut stream) = tunnel_with(|limits| limits.connection_time = Duration::from_millis(300)).await;
    let busy = async {
        while stream.write_all(b"x").await.is_ok() && stream.read_u8().await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_secs(3), busy).await.unwrap();
    let flow = &session.close().await[0];
    assert_eq!(flow.end, End::TimeLimit);
    assert!((300..2000).contains(&flow.duration_ms));
}

#[tokio::test]
async fn a_connection_that_says_nothing_ends_and_one_that_speaks_does_not() {
    let (_bench, session, mut stream) = tunnel_with(|limits| limits.idle_time = Duration::from_millis(300)).await;
    for _ in 0..6 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        stream.write_all(b"x").await.unwrap();
        stream.read_u8().await.unwrap();
    }
    assert!(timeout(Duration::from_secs(3), stream.read_u8()).await.unwrap().is_err());
    assert_eq!(session.close().await[0].end, End::Idle);
}

#[tokio::test]
async fn a_client_that_dawdles_over_its_head_is_told_so() {
    let bench = Bench::new(|config| config.limits.head_time = Duration::from_millis(200)).await;
    let session = bench.open(&[("origin.test", 443)]);
    let mut slow = bench.dial().await;
    for byte in b"CONNECT origin.test:443 HTTP/1.1\r\nX: " {
        let _ = slow.write_all(&[*byte]).await;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let answer = Answer::read(&mut slow).await;
    assert_eq!((answer.status, answer.json()["error"].as_str()), (408, Some("invalid_request")));
    // In one byte at a time, but in time, it is served like any other.
    let bench = Bench::plain().await;
    let origin = Origin::echoing().await;
    let other = bench.open(&[("origin.test", origin.port)]);
    let mut slow = bench.dial().await;
    for byte in format!("CONNECT origin.test:{} HTTP/1.1\r\n\r\n", origin.port).bytes() {
        slow.write_all(&[byte]).await.unwrap();
        tokio::task::yield_now().await;
    }
    assert!(read_head(&mut slow).await.starts_with(b"HTTP/1.1 200"));
    assert_eq!((session.close().await.len(), other.close().await.len()), (1, 1));
}

#[tokio::test]
async fn a_head_has_its_length() {
    let bench = Bench::plain().await;
    let session = bench.open(&[("origin.test", 443)]);
    let long = format!("GET http://origin.test/ HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(head::MAX_HEAD_BYTES));
    let many =
        format!("GET http://origin.test/ HTTP/1.1\r\nHost: origin.test\r\n{}\r\n", "X: y\r\n".repeat(head::MAX_FIELDS));
    for request in [long, many] {
        assert_eq!(bench.ask(request).await.status, 400);
    }
    assert_eq!(session.close().await.len(), 2);
}

#[tokio::test]
async fn so_many_connections_at_once_and_not_one_more() {
    let bench = Bench::new(|config| config.limits.concurrent_connections_per_execution = 4).await;
    let origin = Origin::echoing().await;
    let session = bench.open(&[("origin.test", origin.port)]);
    let neighbour = bench.open_leaf(LeafId(8), &[("origin.test", origin.port)]);
    let authority = format!("origin.test:{}", origin.port);
    let mut open = Vec::new();
    for _ in 0..4 {
        open.push(bench.connect(&authority).await);
    }
    assert!(open.iter().all(|(_, answer)| answer.status == 200));
    assert_eq!(bench.connect(&authority).await.1.denied(), "connection_limit");
    let mut other = bench.dial_as(Some(LeafId(8))).await;
    other.write_all(format!("CONNECT {authority} HTTP/1.1\r\n\r\n").as_bytes()).await.unwrap();
    assert!(read_head(&mut other).await.starts_with(b"HTTP/1.1 200"));
    // One that ends makes room.
    drop(open.pop());
    while bench.connect(&authority).await.1.status != 200 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let records = session.close().await;
    assert!(records.iter().any(|flow| flow.rule == "connection_limit" && flow.verdict == Verdict::Deny));
    assert_eq!(neighbour.close().await.len(), 1);
}

#[tokio::test]
async fn connections_are_begun_at_a_rate_and_another_execution_has_its_own() {
    let bench = Bench::new(|config| {
        (config.limits.connections_burst, config.limits.connections_per_second) = (5, 1);
    })
    .await;
    let session = bench.open(&[]);
    let neighbour = bench.open_leaf(LeafId(8), &[]);
    let mut reasons = Vec::new();
    for _ in 0..12 {
        reasons.push(bench.connect("origin.test:443").await.1.denied());
    }
    assert!(reasons[..5].iter().all(|reason| reason == "name_not_allowed"), "{reasons:?}");
    let over = reasons.iter().filter(|reason| *reason == "connection_rate").count();
    // One or two may have come to be in the meantime.
    assert!(over >= 5, "{reasons:?}");
    let mut other = bench.dial_as(Some(LeafId(8))).await;
    other.write_all(b"CONNECT origin.test:443 HTTP/1.1\r\n\r\n").await.unwrap();
    assert!(read_head(&mut other).await.starts_with(b"HTTP/1.1 403"));
    assert_eq!(neighbour.close().await[0].rule, "name_not_allowed");
    let records = session.close().await;
    let last = records.last().unwrap();
    assert_eq!((last.rule.as_str(), last.connections), ("connection_rate", over as u64));
    assert_eq!(records.len(), 12 - over + 1);
}

#[tokio::test]
async fn the_record_of_an_execution_is_bounded_and_says_what_it_leaves_out() {
    let bench = Bench::new(|config| config.limits.connections_per_execution = 10).await;
    let session = bench.open(&[]);
    for round in 0..25 {
        let reason = bench.connect("origin.test:443").await.1.denied();
        assert_eq!(reason, if round < 10 { "name_not_allowed" } else { "connections_per_execution" });
    }
    let records = session.close().await;
    assert_eq!(records.len(), 11);
    assert_eq!((records[10].rule.as_str(), records[10].connections), ("connections_per_execution", 15));
}
