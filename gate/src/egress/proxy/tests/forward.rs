use super::*;

fn head(method: &str, port: u16, fields: &str) -> String {
    format!("{method} http://origin.test:{port}/ HTTP/1.1\r\nHost: origin.test:{port}\r\n{fields}\r\n")
}

#[tokio::test]
async fn a_request_is_rewritten_for_its_origin() {
    let bench = Bench::plain().await;
    let origin = Origin::answering(
        "HTTP/1.1 200 Fine\r\nContent-Length: 2\r\nConnection: X-Hop\r\nX-Hop: 1\r\nKeep-Alive: 5\r\n\
         Proxy-Authenticate: Basic\r\nLatchgate-Decision-Id: forged\r\nX-Kept: 2\r\nSet-Cookie: a\r\nSet-Cookie: b\r\n\r\nok",
    )
    .await;
    let session = bench.open(&[("origin.test", origin.port)]);
    let answer = bench
        .ask(format!(
            "GET http://ORIGIN.test:{0}/a%2fb/../c?d=e HTTP/1.1\r\nHost: Origin.Test:{0}\r\nAccept: */*\r\n\
             Proxy-Authorization: Basic c2VjcmV0\r\nProxy-Connection: keep-alive\r\nConnection: keep-alive, X-Drop\r\n\
             X-Drop: 1\r\nKeep-Alive: 1\r\nTE: trailers\r\nUpgrade: websocket\r\nAuthorization: Bearer t\r\n\r\n",
            origin.port
        ))
        .await;
    assert_eq!(
        origin.seen(),
        [format!(
            "GET /c?d=e HTTP/1.1\r\nHost: origin.test:{}\r\nAccept: */*\r\nAuthorization: Bearer t\r\nVia: 1.1 latchgate\r\n\
             Connection: close\r\n\r\n",
            origin.port
        )]
    );
    assert_eq!(
        answer.head,
        "HTTP/1.1 200 Fine\r\nX-Kept: 2\r\nSet-Cookie: a\r\nSet-Cookie: b\r\nContent-Length: 2\r\nVia: 1.1 latchgate\r\n\
         Connection: close\r\n\r\n"
    );
    assert_eq!(answer.text(), "ok");
    let flow = &session.close().await[0];
    assert_eq!((flow.protocol, flow.end), (Some(Protocol::Http), End::Closed));
    assert_eq!(flow.bytes_to_upstream, origin.seen()[0].len() as u64);
    assert_eq!(flow.bytes_to_sandbox, (answer.head.len() + answer.body.len()) as u64);
}

#[tokio::test]
async fn what_could_be_read_in_two_ways_reaches_nobody() {
    let bench = Bench::plain().await;
    let origin = Origin::answering(OK).await;
    let port = origin.port;
    let session = bench.open(&[("origin.test", port), ("other.test", port)]);
    let inner = "GET / HTTP/1.1\r\nHost: other.test\r\n\r\n";
    let requests = [
        head("POST", port, "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n") + "0\r\n\r\n" + inner,
        head("POST", port, "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n") + "0\r\n\r\n" + inner,
        head("POST", port, "Content-Length: 0\r\nContent-Length: 44\r\n") + inner,
        head("POST", port, "Content-Length: 0, 44\r\n") + inner,
        head("POST", port, "Transfer-Encoding: xchunked\r\n") + "0\r\n\r\n" + inner,
        head("POST", port, "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n") + "0\r\n\r\n" + inner,
        head("POST", port, "Transfer-Encoding : chunked\r\n") + "0\r\n\r\n" + inner,
        head("POST", port, "Transfer-Encoding:\r\n chunked\r\n") + "0\r\n\r\n" + inner,
        head("POST", port, "X: a\r\n\tTransfer-Encoding: chunked\r\n") + "0\r\n\r\n" + inner,
        head("GET", port, "X: a\nHost: other.test\r\n"),
        head("GET", port, "X: a\rHost: other.test\r\n"),
        head("GET", port, "").replace("\r\n", "\n"),
        head("GET", port, "Host: other.test\r\n"),
        head("GET", port, "X\0: a\r\n"),
        format!("GET http://origin.test:{port}/ HTTP/1.1\r\nHost: other.test:{port}\r\n\r\n"),
        format!("GET http://origin.test:{port}/ HTTP/1.1\r\nHost: origin.test\r\n\r\n"),
        format!("GET http://origin.test:{port}\\@other.test/ HTTP/1.1\r\nHost: origin.test:{port}\r\n\r\n"),
        format!("GET http://other.test@origin.test:{port}/ HTTP/1.1\r\nHost: origin.test:{port}\r\n\r\n"),
        format!("GET / HTTP/1.1\r\nHost: origin.test:{port}\r\n\r\n"),
        format!("\r\n{}", head("GET", port, "")),
        format!("GET http://origin.test:{port}/ HTTP/1.1\r\n\r\n"),
    ];
    for request in &requests {
        let answer = bench.ask(request).await;
        assert_eq!((answer.status, answer.json()["error"].as_str()), (400, Some("invalid_request")), "{request:?}");
    }
    assert_eq!(origin.connections(), 0);
    let records = session.close().await;
    assert_eq!(records.len(), requests.len());
    assert!(records.iter().all(|flow| flow.verdict == Verdict::Deny && flow.rule == "malformed"));
}

#[tokio::test]
async fn bytes_after_a_request_are_nothing() {
    let bench = Bench::plain().await;
    let origin = Origin::answering(OK).await;
    let session = bench.open(&[("origin.test", origin.port)]);
    let request = head("GET", origin.port, "");
    let answer = bench.ask(format!("{request}{request}")).await;
    assert_eq!(answer.text(), "ok");
    let post = head("POST", origin.port, "Content-Length: 3\r\n");
    assert_eq!(bench.ask(format!("{post}abc{request}")).await.text(), "ok");
    assert_eq!(origin.connections(), 2);
    assert!(origin.seen()[1].ends_with("\r\n\r\nabc"));
    assert_eq!(session.close().await.len(), 2);
}

#[tokio::test]
async fn a_chunked_body_is_decoded_and_coded_anew() {
    let bench = Bench::plain().await;
    let origin = Origin::answering(OK).await;
    let session = bench.open(&[("origin.test", origin.port)]);
    let post = head("POST", origin.port, "Transfer-Encoding: Chunked\r\nTrailer: X-T\r\n");
    let answer = bench.ask(format!("{post}5;ext=1\r\nhello\r\n0\r\nX-T: secret\r\n\r\n")).await;
    assert_eq!(answer.text(), "ok");
    let seen = origin.seen().remove(0);
    assert!(
        seen.contains("Transfer-Encoding: chunked\r\n") && seen.ends_with("\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
        "{seen:?}"
    );
    // A body that is none is cut off; the origin never sees an end of it.
    for body in ["5\nhello\r\n0\r\n\r\n", "z\r\n", "5\r\nhelloX\r\n0\r\n\r\n", "-1\r\n"] {
        let answer = bench.ask(format!("{post}{body}")).await;
        assert_eq!((answer.status, answer.json()["error"].as_str()), (400, Some("invalid_request")), "{body:?}");
    }
    drop(session);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(origin.seen().iter().skip(1).all(|seen| !seen.ends_with("0\r\n\r\n")));
}

#[tokio::test]
async fn answers_keep_their_meaning_in_every_framing() {
    let bench = Bench::plain().await;
    for (answer, method, status, framing, body) in [
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1;x\r\nc\r\n0\r\nT: x\r\n\r\n",
            "GET",
            200,
            ("Transfer-Encoding", "chunked"),
            "2\r\nab\r\n1\r\nc\r\n0\r\n\r\n",
        ),
        ("HTTP/1.1 200 OK\r\n\r\nabc", "GET", 200, ("Transfer-Encoding", "chunked"), "3\r\nabc\r\n0\r\n\r\n"),
        ("HTTP/1.0 200 OK\r\n\r\nabc", "GET", 200, ("Transfer-Encoding", "chunked"), "3\r\nabc\r\n0\r\n\r\n"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcdef", "GET", 200, ("Content-Length", "3"), "abc"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", "HEAD", 200, ("Content-Length", "3"), ""),
        ("HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\n\r\n", "GET", 304, ("Content-Length", "3"), ""),
        ("HTTP/1.1 204 No Content\r\n\r\n", "GET", 204, ("Connection", "close"), ""),
        (
            "HTTP/1.1 302 Found\r\nLocation: http://other.test/\r\nContent-Length: 0\r\n\r\n",
            "GET",
            302,
            ("Location", "http://other.test/"),
            "",
        ),
        (
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na",
            "GET",
            200,
            ("Content-Length", "1"),
            "a",
        ),
        ("HTTP/1.1 403 Forbidden\r\nContent-Length: 1\r\n\r\na", "GET", 403, ("Content-Length", "1"), "a"),
    ] {
        let origin = Origin::answering(answer).await;
        let session = bench.open(&[("origin.test", origin.port)]);
        let got = bench.ask(head(method, origin.port, "")).await;
        assert_eq!((got.status, got.text(), got.field(framing.0)), (status, body, Some(framing.1)), "{answer:?}");
        assert!(got.field(DECISION_ID).is_none());
        assert_eq!(origin.connections(), 1);
        assert_eq!(session.close().await[0].end, End::Closed);
    }
    let origin = Origin::answering("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n").await;
    let _session = bench.open(&[("origin.test", origin.port)]);
    let old = bench.ask(format!("GET http://origin.test:{}/ HTTP/1.0\r\n\r\n", origin.port)).await;
    assert_eq!((old.text(), old.field("Transfer-Encoding")), ("abc", None));
}

#[tokio::test]
async fn an_answer_that_could_be_read_in_two_ways_is_a_502() {
    let bench = Bench::plain().await;
    for answer in [
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\nContent-Length: 1\n\na",
        "HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 1\r\n\r\na",
        "HTTP/1.1 200 OK\r\nX : a\r\n\r\n",
        "HTTP/2 200 OK\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n",
        "<html>not http</html>\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX: cut",
        "",
    ] {
        let origin = Origin::answering(answer).await;
        let session = bench.open(&[("origin.test", origin.port)]);
        let got = bench.ask(head("GET", origin.port, "")).await;
        assert_eq!((got.status, got.json()["reason"].as_str()), (502, Some("bad_response")), "{answer:?}");
        let flow = &session.close().await[0];
        assert_eq!((flow.verdict, flow.error.as_deref()), (Verdict::Allow, Some("bad_response")));
    }
    let endless = Origin::answering("HTTP/1.1 100 Continue\r\n\r\n".repeat(50)).await;
    let _session = bench.open(&[("origin.test", endless.port)]);
    assert_eq!(bench.ask(head("GET", endless.port, "")).await.status, 502);
}

#[tokio::test]
async fn a_part_of_an_answer_never_looks_whole() {
    let bench = Bench::plain().await;
    for answer in [
        "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nZ\r\n",
    ] {
        let origin = Origin::answering(answer).await;
        let session = bench.open(&[("origin.test", origin.port)]);
        let mut stream = bench.dial().await;
        stream.write_all(head("GET", origin.port, "").as_bytes()).await.unwrap();
        let mut bytes = Vec::new();
        assert!(stream.read_to_end(&mut bytes).await.is_err(), "a reset, not an end");
        assert!(!bytes.ends_with(b"0\r\n\r\n"));
        assert_eq!(session.close().await[0].end, End::UpstreamFailed);
    }
}

#[tokio::test]
async fn a_client_that_waits_for_100_continue_gets_it_after_the_decision() {
    let bench = Bench::plain().await;
    let origin = Origin::answering(OK).await;
    let session = bench.open(&[("origin.test", origin.port)]);
    let mut stream = bench.dial().await;
    let fields = "Expect: 100-continue\r\nContent-Length: 3\r\n";
    stream.write_all(head("POST", origin.port, fields).as_bytes()).await.unwrap();
    assert_eq!(read_head(&mut stream).await, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"abc").await.unwrap();
    assert_eq!(Answer::read(&mut stream).await.text(), "ok");
    assert!(!origin.seen()[0].contains("Expect"));
    let refused = head("POST", origin.port ^ 1, fields);
    assert_eq!(bench.ask(refused).await.denied(), "port_not_allowed");
    assert_eq!(session.close().await.len(), 2);
}

#[tokio::test]
async fn a_refusal_is_read_even_by_a_client_that_goes_on_sending() {
    let bench = Bench::plain().await;
    let _session = bench.open(&[("origin.test", 1)]);
    let answer = bench.ask(head("POST", 2, "Content-Length: 400000\r\n") + &"x".repeat(400_000)).await;
    assert_eq!(answer.denied(), "port_not_allowed");
    let head_only = bench.ask(head("HEAD", 2, "")).await;
    assert_eq!((head_only.status, head_only.body.len()), (403, 0));
}

#[tokio::test]
async fn an_answer_that_comes_before_the_whole_request_is_passed_on() {
    let bench = Bench::plain().await;
    let origin = Origin::doing(|mut stream, _| async move {
        read_head(&mut stream).await;
        stream.write_all(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno").await.unwrap();
        tokio::time::sleep(Duration::from_secs(5)).await;
    })
    .await;
    let session = bench.open(&[("origin.test", origin.port)]);
    let mut stream = bench.dial().await;
    stream.write_all(head("POST", origin.port, "Content-Length: 50000000\r\n").as_bytes()).await.unwrap();
    stream.write_all(&[0; 1000]).await.unwrap();
    let answer = Answer::read(&mut stream).await;
    assert_eq!((answer.status, answer.text()), (413, "no"));
    session.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_answer_is_streamed_and_not_gathered() {
    const TOTAL: usize = 256 * 1024 * 1024;
    let bench = Bench::plain().await;
    let written = Arc::new(AtomicUsize::new(0));
    let progress = Arc::clone(&written);
    let origin = Origin::doing(move |mut stream, _| {
        let progress = Arc::clone(&progress);
        async move {
            read_head(&mut stream).await;
            let _ = stream.write_all(format!("HTTP/1.1 200 OK\r\nContent-Length: {TOTAL}\r\n\r\n").as_bytes()).await;
            let piece = vec![b'x'; 64 * 1024];
            while progress.load(Ordering::SeqCst) < TOTAL {
                if stream.write_all(&piece).await.is_err() {
                    return;
                }
                progress.fetch_add(piece.len(), Ordering::SeqCst);
            }
        }
    })
    .await;
    let session = bench.open(&[("origin.test", origin.port)]);
    let mut stream = bench.dial().await;
    stream.write_all(head("GET", origin.port, "").as_bytes()).await.unwrap();
    read_head(&mut stream).await;
    // While the client does not read, the origin can fill two pairs of socket buffers and the proxy's, and no more.
    let mut before = usize::MAX;
    while written.load(Ordering::SeqCst) != before {
        before = written.load(Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(before < TOTAL / 4, "{before} bytes were taken from the origin for a client that reads none");
    let got = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await.unwrap();
    assert_eq!(got, TOTAL as u64);
    let flow = &session.close().await[0];
    assert_eq!(flow.end, End::Closed);
    assert!(flow.bytes_to_sandbox > TOTAL as u64 && flow.bytes_from_upstream > TOTAL as u64);
}
