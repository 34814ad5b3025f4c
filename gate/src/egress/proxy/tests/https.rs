use super::*;

fn get(name: &str, port: u16) -> String {
    format!("GET https://{name}:{port}/path HTTP/1.1\r\nHost: {name}:{port}\r\nX-Secret: 1\r\n\r\n")
}

#[tokio::test]
async fn an_https_origin_is_verified_and_asked() {
    let bench = Bench::plain().await;
    let origin = Origin::tls("origin.test", &bench.ca, OK).await;
    let session = bench.open(&[("origin.test", origin.port)]);
    let answer = bench.ask(get("origin.test", origin.port)).await;
    assert_eq!((answer.status, answer.text()), (200, "ok"));
    assert!(answer.field(DECISION_ID).is_none());
    assert!(origin.seen()[0].starts_with(&format!("GET /path HTTP/1.1\r\nHost: origin.test:{}\r\n", origin.port)));
    let flow = &session.close().await[0];
    assert_eq!((flow.protocol, flow.verdict, flow.end), (Some(Protocol::Https), Verdict::Allow, End::Closed));
    // Records and handshake are on this leg too.
    assert!(flow.bytes_to_upstream > 200 && flow.bytes_from_upstream > 500);
}

#[tokio::test]
async fn a_body_goes_to_an_https_origin_whole() {
    let bench = Bench::plain().await;
    let origin = Origin::tls("origin.test", &bench.ca, OK).await;
    let session = bench.open(&[("origin.test", origin.port)]);
    let body = "b".repeat(300_000);
    let answer = bench
        .ask(format!(
            "PUT https://origin.test:{0}/ HTTP/1.1\r\nHost: origin.test:{0}\r\nContent-Length: {1}\r\n\r\n{body}",
            origin.port,
            body.len()
        ))
        .await;
    assert_eq!(answer.status, 200);
    assert!(origin.seen()[0].ends_with(&body));
    assert_eq!(session.close().await[0].end, End::Closed);
}

#[tokio::test]
async fn an_origin_that_is_not_who_was_asked_for_gets_no_request() {
    let bench = Bench::plain().await;
    let stranger = authority();
    let mut expired = CertificateParams::new(vec!["origin.test".to_owned()]).unwrap();
    expired.not_after = rcgen::date_time_ymd(2001, 1, 1);
    let mut early = CertificateParams::new(vec!["origin.test".to_owned()]).unwrap();
    early.not_before = rcgen::date_time_ymd(2090, 1, 1);
    let origins = [
        Origin::tls("other.test", &bench.ca, OK).await,
        Origin::tls("*.origin.test", &bench.ca, OK).await,
        Origin::tls("127.0.0.1", &bench.ca, OK).await,
        Origin::tls("origin.test", &stranger, OK).await,
        Origin::tls_with(expired, &bench.ca, OK).await,
        Origin::tls_with(early, &bench.ca, OK).await,
    ];
    for origin in &origins {
        let session = bench.open(&[("origin.test", origin.port)]);
        let answer = bench.ask(get("origin.test", origin.port)).await;
        assert_eq!((answer.status, answer.json()["reason"].as_str()), (502, Some("tls_certificate")), "{answer:?}");
        assert!(origin.seen().is_empty());
        assert_eq!(session.close().await[0].error.as_deref(), Some("tls_certificate"));
    }
    let plain = Origin::doing(|mut stream, seen| async move {
        let _ = stream.write_all(OK.as_bytes()).await;
        let mut request = vec![0; 4096];
        let read = stream.read(&mut request).await.unwrap_or(0);
        seen.lock().unwrap().push(String::from_utf8_lossy(&request[..read]).into_owned());
    })
    .await;
    let session = bench.open(&[("origin.test", plain.port)]);
    let answer = bench.ask(get("origin.test", plain.port)).await;
    assert_eq!((answer.status, answer.json()["reason"].as_str()), (502, Some("tls_failed")));
    assert!(!plain.seen().iter().any(|seen| seen.contains("X-Secret")));
    assert_eq!(session.close().await[0].end, End::Answered);
}

#[tokio::test]
async fn an_end_without_close_notify_is_not_taken_for_the_end_of_a_body() {
    let bench = Bench::plain().await;
    // Bodies that end with the connection: of the second TLS is not ended, as when somebody on the way ended TCP.
    let params = CertificateParams::new(vec!["origin.test".to_owned()]).unwrap();
    let acceptor = acceptor(params, &bench.ca);
    let cut = Origin::doing(move |stream, _| {
        let acceptor = acceptor.clone();
        async move {
            let mut stream = acceptor.accept(stream).await.unwrap();
            read_head(&mut stream).await;
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\nworld").await.unwrap();
            stream.flush().await.unwrap();
            stream.into_inner().0.shutdown().await.unwrap();
        }
    })
    .await;
    let whole = Origin::tls("origin.test", &bench.ca, "HTTP/1.1 200 OK\r\n\r\nworld").await;
    let session = bench.open(&[("origin.test", whole.port), ("origin.test", cut.port)]);
    assert_eq!(bench.ask(get("origin.test", whole.port)).await.text(), "5\r\nworld\r\n0\r\n\r\n");
    let mut stream = bench.dial().await;
    stream.write_all(get("origin.test", cut.port).as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    assert!(stream.read_to_end(&mut bytes).await.is_err());
    assert!(!bytes.ends_with(b"0\r\n\r\n"));
    let ends: Vec<_> = session.close().await.iter().map(|flow| flow.end).collect();
    assert_eq!(ends, [End::Closed, End::UpstreamFailed]);
}
