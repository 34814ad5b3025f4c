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
    let plain = Origin::answering(OK).await;
    let session = bench.open(&[("origin.test", plain.port)]);
    let answer = bench.ask(get("origin.test", plain.port)).await;
    assert_eq!((answer.status, answer.json()["reason"].as_str()), (502, Some("tls_failed")));
    assert!(!plain.seen().iter().any(|seen| seen.contains("X-Secret")));
    assert_eq!(session.close().await[0].end, End::Answered);
}

#[tokio::test]
async fn an_end_without_close_notify_is_not_taken_for_the_end_of_a_body() {
    let bench = Bench::plain().await;
    // A body that ends with the connection, cut by somebody on the way: TCP ends, TLS does not.
    let inner = Origin::tls("origin.test", &bench.ca, "HTTP/1.1 200 OK\r\n\r\nworld").await;
    let relay_port = inner.port;
    let cut = Origin::doing(move |mut near, _| async move {
        let mut far = TcpStream::connect(("127.0.0.1", relay_port)).await.unwrap();
        let (mut near_read, mut near_write) = near.split();
        let (mut far_read, mut far_write) = far.split();
        let out = async {
            let _ = tokio::io::copy(&mut near_read, &mut far_write).await;
        };
        let back = async {
            let mut held = Vec::new();
            let mut piece = vec![0; 4096];
            while let Ok(read) = far_read.read(&mut piece).await {
                if read == 0 {
                    break;
                }
                held.extend_from_slice(&piece[..read]);
                // The alert is the last 24 bytes of TLS 1.3; they stay here.
                if held.len() > 24 {
                    let pass = held.len() - 24;
                    near_write.write_all(&held[..pass]).await.unwrap();
                    held.drain(..pass);
                }
            }
            near_write.shutdown().await.unwrap();
        };
        tokio::select! { () = out => {}, () = back => {} }
    })
    .await;
    let session = bench.open(&[("origin.test", inner.port), ("origin.test", cut.port)]);
    let whole = bench.ask(get("origin.test", inner.port)).await;
    assert_eq!(whole.text(), "5\r\nworld\r\n0\r\n\r\n");
    let part = bench.ask(get("origin.test", cut.port)).await;
    assert!(!part.body.ends_with(b"0\r\n\r\n"), "{part:?}");
    let ends: Vec<_> = session.close().await.iter().map(|flow| flow.end).collect();
    assert_eq!(ends[0], End::Closed);
    assert_ne!(ends[1], End::Closed);
}
