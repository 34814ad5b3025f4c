//! HTTP that does not know of the proxy, in tunnels and carried.

use super::*;

/// Answers requests on one connection for as long as they come, with the path that each asked for.
async fn patient() -> Origin {
    Origin::doing(|mut stream, seen| async move {
        loop {
            let head = read_head(&mut stream).await;
            if head.is_empty() {
                return;
            }
            let text = String::from_utf8(head).unwrap();
            let path = text.split(' ').nth(1).unwrap().to_owned();
            let length: usize =
                text.lines().find_map(|l| l.strip_prefix("Content-Length: ")).map_or(0, |n| n.parse().unwrap());
            let mut body = vec![0; length];
            stream.read_exact(&mut body).await.unwrap();
            seen.lock().unwrap().push(text + std::str::from_utf8(&body).unwrap());
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{path}", path.len());
            stream.write_all(answer.as_bytes()).await.unwrap();
            if path == "/close" {
                return;
            }
        }
    })
    .await
}

async fn answer(stream: &mut TcpStream) -> Answer {
    let mut answer = Answer::parse(&read_head(stream).await);
    let length = answer.field("Content-Length").map_or(0, |n| n.parse().unwrap());
    answer.body = exactly(stream, length).await;
    answer
}

#[tokio::test]
async fn every_request_of_a_connection_is_carried_one_after_the_other() {
    let bench = Bench::plain().await;
    let origin = patient().await;
    let session = bench.open(&[("origin.test", origin.port)]);
    let authority = format!("origin.test:{}", origin.port);
    let (tunnel, _) = bench.connect(&authority).await;
    let carried = bench.dial_carried(&format!("198.18.0.1:{}", origin.port)).await;
    for mut stream in [tunnel, carried] {
        // All at once: what waits is read when its turn has come.
        let requests = format!(
            "GET /a/../b?x=%2e HTTP/1.1\r\nHost: {authority}\r\nConnection: X-Drop\r\nX-Drop: 1\r\n\r\n\
             POST /c HTTP/1.1\r\nHost: ORIGIN.test\r\nContent-Length: 5\r\n\r\nhello\
             GET http://{authority}/d HTTP/1.1\r\nHost: {authority}\r\n\r\n\
             GET /close HTTP/1.1\r\nHost: {authority}\r\n\r\n"
        );
        stream.write_all(requests.as_bytes()).await.unwrap();
        for path in ["/a/../b?x=%2e", "/c", "/d", "/close"] {
            assert_eq!(answer(&mut stream).await.text(), path);
        }
        // The origin has closed, and so does the proxy.
        assert!(timeout(Duration::from_secs(5), stream.read_u8()).await.unwrap().is_err());
    }
    assert_eq!(origin.connections(), 2);
    let seen = origin.seen();
    assert_eq!(seen[0], format!("GET /a/../b?x=%2e HTTP/1.1\r\nHost: {authority}\r\nVia: 1.1 latchgate\r\n\r\n"));
    assert!(seen[1].starts_with("POST /c HTTP/1.1\r\nHost: origin.test\r\n") && seen[1].ends_with("\r\n\r\nhello"));
    assert!(seen[2].starts_with("GET /d HTTP/1.1\r\n"));
    for (flow, carried) in session.close().await.iter().zip([false, true]) {
        assert_eq!((flow.verdict, flow.protocol, flow.end), (Verdict::Allow, Some(Protocol::Http), End::Closed));
        assert_eq!((flow.name_verified, flow.opaque, flow.carried), (Some(NameVerified::Host), false, carried));
    }
}

#[tokio::test]
async fn fronting_by_host_is_refused_in_the_first_request_and_in_the_last() {
    let bench = Bench::plain().await;
    let origin = patient().await;
    let session = bench.open(&[("origin.test", origin.port)]);
    let good = format!("GET /good HTTP/1.1\r\nHost: origin.test:{}\r\n\r\n", origin.port);
    let bad = [
        "GET / HTTP/1.1\r\nHost: other.test\r\n\r\n".to_owned(),
        "GET / HTTP/1.1\r\nHost: sub.origin.test\r\n\r\n".to_owned(),
        "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".to_owned(),
        "GET / HTTP/1.1\r\nHost: origin.test:1\r\n\r\n".to_owned(),
        "GET http://other.test/ HTTP/1.1\r\nHost: origin.test\r\n\r\n".to_owned(),
    ];
    for bad in &bad {
        for before in [0, 2] {
            let mut stream = bench.dial_carried(&format!("198.18.0.1:{}", origin.port)).await;
            stream.write_all((good.repeat(before) + bad + &good).as_bytes()).await.unwrap();
            for _ in 0..before {
                assert_eq!(answer(&mut stream).await.text(), "/good");
            }
            assert_eq!(Answer::read(&mut stream).await.denied(), "host_mismatch", "{bad}");
        }
    }
    assert!(origin.seen().iter().all(|request| request.starts_with("GET /good ")));
    let records = session.close().await;
    assert_eq!(records.len(), bad.len() * 2);
    assert!(records.iter().all(|flow| flow.verdict == Verdict::Deny && flow.rule == "host_mismatch"));
}

#[tokio::test]
async fn what_could_be_read_in_two_ways_goes_no_further() {
    let bench = Bench::plain().await;
    let origin = patient().await;
    let session = bench.open(&[("origin.test", origin.port)]);
    let host = format!("Host: origin.test:{}", origin.port);
    let bad = [
        "GET / HTTP/1.1\r\n\r\n".to_owned(),
        format!("GET / HTTP/1.1\r\n{host}\r\n{host}\r\n\r\n"),
        format!("GET /\\x HTTP/1.1\r\n{host}\r\n\r\n"),
        format!("GET /#x HTTP/1.1\r\n{host}\r\n\r\n"),
        format!("GET x HTTP/1.1\r\n{host}\r\n\r\n"),
        format!("GET * HTTP/1.1\r\n{host}\r\n\r\n"),
        format!("GET https://origin.test/ HTTP/1.1\r\n{host}\r\n\r\n"),
        format!("CONNECT origin.test:443 HTTP/1.1\r\n{host}\r\n\r\n"),
        format!("TRACE / HTTP/1.1\r\n{host}\r\n\r\n"),
        format!("POST / HTTP/1.1\r\n{host}\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        format!("POST / HTTP/1.1\r\n{host}\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
        format!("GET / HTTP/1.1\r\n{host} \r\n x: folded\r\n\r\n"),
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(),
    ];
    for bad in &bad {
        let mut stream = bench.dial_carried(&format!("198.18.0.1:{}", origin.port)).await;
        stream.write_all(bad.as_bytes()).await.unwrap();
        assert_eq!(Answer::read(&mut stream).await.status, 400, "{bad}");
    }
    assert!(origin.seen().is_empty());
    assert!(session.close().await.iter().all(|flow| flow.rule == "malformed"));
}

#[tokio::test]
async fn only_the_methods_of_the_entry_are_used() {
    let bench = Bench::plain().await;
    let origin = patient().await;
    let entry = Entry::new(Pattern::parse("origin.test").unwrap(), [origin.port])
        .speaking(EntryProtocol::Http, ["GET".to_owned()]);
    let open = bench.proxy.open(LEAF, session(LEAF, Profile::allowlist([entry])));
    let authority = format!("origin.test:{}", origin.port);
    let request = |method: &str, target: &str| format!("{method} {target} HTTP/1.1\r\nHost: {authority}\r\n\r\n");
    for method in ["DELETE", "get", "POST"] {
        let (mut stream, _) = bench.connect(&authority).await;
        stream.write_all((request("GET", "/a") + &request(method, "/b")).as_bytes()).await.unwrap();
        assert_eq!(answer(&mut stream).await.text(), "/a");
        assert_eq!(Answer::read(&mut stream).await.denied(), "method_not_allowed");
        let absolute = request(method, &format!("http://{authority}/b"));
        assert_eq!(bench.ask(absolute).await.denied(), "method_not_allowed");
        let other = request("GET", &format!("https://{authority}/b"));
        assert_eq!(bench.ask(other).await.denied(), "protocol_not_allowed");
    }
    assert!(origin.seen().iter().all(|request| request.starts_with("GET /a ")));
    open.close().await;
}

#[tokio::test]
async fn what_an_origin_says_unasked_is_nobodys_answer() {
    let bench = Bench::plain().await;
    let origin = Origin::doing(|mut stream, _| async move {
        read_head(&mut stream).await;
        let twice = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok".repeat(2);
        stream.write_all(twice.as_bytes()).await.unwrap();
        let _ = stream.read_to_end(&mut Vec::new()).await;
    })
    .await;
    let session = bench.open(&[("origin.test", origin.port)]);
    let mut stream = bench.dial_carried(&format!("198.18.0.1:{}", origin.port)).await;
    let request = format!("GET / HTTP/1.1\r\nHost: origin.test:{}\r\n\r\n", origin.port);
    stream.write_all(request.as_bytes()).await.unwrap();
    assert_eq!(answer(&mut stream).await.text(), "ok");
    assert!(timeout(Duration::from_secs(5), stream.read_u8()).await.unwrap().is_err());
    session.close().await;
}

/// The rest of a body that the origin did not want must not become the client's next request.
#[tokio::test]
async fn an_origin_that_answers_early_ends_the_connection() {
    let bench = Bench::plain().await;
    let origin = Origin::doing(|mut stream, seen| async move {
        let head = read_head(&mut stream).await;
        seen.lock().unwrap().push(String::from_utf8(head).unwrap());
        stream.write_all(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno").await.unwrap();
        stream.set_zero_linger().unwrap();
    })
    .await;
    let session = bench.open(&[("origin.test", origin.port)]);
    let host = format!("Host: origin.test:{}\r\n", origin.port);
    let hidden = format!("GET /hidden HTTP/1.1\r\n{host}\r\n");
    for _ in 0..10 {
        let mut stream = bench.dial_carried(&format!("198.18.0.1:{}", origin.port)).await;
        let body = hidden.repeat(20_000);
        let request = format!("POST / HTTP/1.1\r\n{host}Content-Length: {}\r\n\r\n{body}", body.len());
        let _ = stream.write_all(request.as_bytes()).await;
        let _ = stream.shutdown().await;
        let _ = timeout(Duration::from_secs(10), stream.read_to_end(&mut Vec::new())).await.unwrap();
    }
    assert!(origin.seen().iter().all(|request| request.starts_with("POST / ")));
    session.close().await;
}
