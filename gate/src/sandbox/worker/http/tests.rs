use std::net::TcpListener;
use std::sync::mpsc;
use std::thread;

use super::*;

/// A proxy of the test's own that gives one answer, and what it was asked.
struct StandIn {
    address: SocketAddr,
    asked: mpsc::Receiver<String>,
}

impl StandIn {
    fn answering(answer: impl Into<Vec<u8>>) -> Self {
        let answer = answer.into();
        Self::doing(move |mut stream| {
            let _ = stream.write_all(&answer);
        })
    }

    fn doing(then: impl FnOnce(TcpStream) + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (tell, asked) = mpsc::channel();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            let mut byte = [0];
            while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap() == 1 {
                request.push(byte[0]);
            }
            let head = String::from_utf8(request).unwrap();
            let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: ")).unwrap_or("0");
            let mut body = vec![0; length.parse().unwrap()];
            stream.read_exact(&mut body).unwrap();
            tell.send(head + &String::from_utf8(body).unwrap()).unwrap();
            then(stream);
        });
        Self { address, asked }
    }

    fn job(&self) -> Value {
        json!({"proxy": self.address.to_string(), "method": "GET", "url": "https://a.test/x", "max_response_bytes": 1000,
            "timeout_ms": 5000})
    }

    fn ask(&self, change: impl FnOnce(&mut Value)) -> Value {
        let mut job = self.job();
        change(&mut job);
        answer(job.to_string().as_bytes()).0
    }
}

fn get(response: impl Into<Vec<u8>>) -> Value {
    StandIn::answering(response).ask(|_| {})
}

#[test]
fn a_request_is_absolute_and_framed_by_us() {
    let proxy = StandIn::answering("HTTP/1.1 201 Created\r\nContent-Length: 2\r\n\r\nhi");
    let answer = proxy.ask(|job| {
        job["method"] = json!("POST");
        job["url"] = json!("http://A.test:8080/x?y=%20z#fragment");
        job["headers"] = json!({"content-type": "text/plain", "X-B": " padded "});
        job["body"] = json!("héllo");
    });
    assert_eq!(
        proxy.asked.recv().unwrap(),
        format!(
            "POST http://a.test:8080/x?y=%20z HTTP/1.1\r\nHost: a.test:8080\r\nX-B: padded\r\ncontent-type: text/plain\r\n\
             User-Agent: latchgate/{}\r\nAccept: */*\r\nContent-Length: 6\r\nConnection: close\r\n\r\nhéllo",
            env!("CARGO_PKG_VERSION")
        )
    );
    assert_eq!(
        answer,
        json!({"ok": true, "data": {"status_code": 201, "headers": {"content-length": "2"}, "body": "hi",
            "url": "http://a.test:8080/x?y=%20z"}})
    );
}

#[test]
fn every_status_is_an_answer_and_redirects_are_not_followed() {
    for status in [200, 204, 301, 302, 307, 404, 418, 500, 503] {
        let answer =
            get(format!("HTTP/1.1 {status} X\r\nLocation: https://elsewhere.test/\r\nContent-Length: 0\r\n\r\n"));
        assert_eq!(answer["ok"], json!(true));
        assert_eq!(answer["data"]["status_code"], json!(status));
        assert_eq!(answer["data"]["headers"]["location"], json!("https://elsewhere.test/"));
        assert_eq!(answer["data"]["body"], json!(""));
    }
}

#[test]
fn repeated_fields_are_joined() {
    let headers = get(
        "HTTP/1.1 200 OK\r\nVary: a\r\nVARY: b\r\nSet-Cookie: a=1; Expires=Thu, 01 Jan 1970\r\nset-cookie: b=2\r\n\
         Content-Length: 0\r\nConnection: close\r\n\r\n",
    )["data"]["headers"]
        .clone();
    assert_eq!(
        headers,
        json!({"vary": "a, b", "set-cookie": "a=1; Expires=Thu, 01 Jan 1970\nb=2", "content-length": "0"})
    );
}

#[test]
fn a_body_may_come_in_any_framing() {
    for response in [
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nwor\r\n2\r\nld\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nworld",
        "HTTP/1.1 200 OK\r\n\r\nworld",
    ] {
        assert_eq!(get(response)["data"]["body"], json!("world"), "{response:?}");
    }
    let head = StandIn::answering("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n");
    assert_eq!(head.ask(|job| job["method"] = json!("HEAD"))["data"]["body"], json!(""));
}

#[test]
fn bytes_that_are_no_text_are_base64() {
    let answer =
        get([b"HTTP/1.1 200 OK\r\nX-Latin: caf\xe9\r\nContent-Length: 3\r\n\r\n".as_slice(), b"\xff\x00a"].concat());
    assert_eq!(answer["data"]["body"], json!("/wBh"));
    assert_eq!(answer["data"]["body_encoding"], json!("base64"));
    assert_eq!(answer["data"]["headers"]["x-latin"], json!("café"));
}

#[test]
fn a_body_over_the_limit_is_an_error_in_every_framing() {
    let body = "x".repeat(1001);
    for response in [
        format!("HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n{body}"),
        "HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n".to_owned(),
        format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e9\r\n{body}\r\n0\r\n\r\n"),
        format!("HTTP/1.1 200 OK\r\n\r\n{body}"),
    ] {
        assert_eq!(get(response)["error"]["kind"], json!("response_too_large"));
    }
    let fits = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\n{}\r\n0\r\n\r\n", &body[..1000]);
    assert_eq!(get(fits)["data"]["body"].as_str().unwrap().len(), 1000);
}

#[test]
fn a_part_is_never_taken_for_the_whole() {
    for response in [
        "",
        "HTTP/1.1 200 OK\r\nContent-Le",
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwor",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nworld\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\nworld\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nworld\r\n0\r\n\r\n",
        "hello",
    ] {
        let answer = get(response);
        assert_eq!(answer["error"]["kind"], json!("bad_response"), "{response:?}: {answer}");
    }
}

#[test]
fn time_runs_for_the_whole_exchange() {
    let slow = StandIn::doing(|mut stream| {
        for _ in 0..100 {
            if stream.write_all(b"H").is_err() {
                return;
            }
            thread::sleep(Duration::from_millis(50));
        }
    });
    let answer = slow.ask(|job| job["timeout_ms"] = json!(300));
    assert_eq!(answer["error"]["kind"], json!("timeout"));
}

#[test]
fn what_the_proxy_says_is_told_from_what_an_origin_says() {
    let proxy = |status: &str, body: Value| {
        let body = body.to_string();
        get(format!(
            "HTTP/1.1 {status}\r\nLatchgate-Decision-Id: 0190-d\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ))
    };
    assert_eq!(
        proxy("403 Forbidden", json!({"error": "egress_denied", "deny_reason": "no", "decision_id": "0190-d"})),
        json!({"ok": false, "error": {"kind": "egress_denied", "reason": "no", "decision_id": "0190-d"}})
    );
    assert_eq!(
        proxy(
            "502 Bad Gateway",
            json!({"error": "upstream_failed", "reason": "tls_certificate", "message": "expired"})
        ),
        json!({"ok": false, "error": {"kind": "upstream_failed", "reason": "tls_certificate", "message": "expired",
            "decision_id": "0190-d"}})
    );
    assert_eq!(proxy("400 Bad Request", json!(7))["error"]["kind"], json!("proxy_refused"));
    let origin = get("HTTP/1.1 403 Forbidden\r\nContent-Length: 25\r\n\r\n{\"error\":\"egress_denied\"}\n");
    assert_eq!(origin["data"]["status_code"], json!(403));
}

#[test]
fn a_job_that_would_break_out_of_its_head_is_refused() {
    let proxy = StandIn::answering("");
    let changes: Vec<fn(&mut Value)> = vec![
        |job| job["headers"] = json!({"X": "a\r\nY: b"}),
        |job| job["headers"] = json!({"X: a\r\nY": "b"}),
        |job| job["headers"] = json!({"Host": "b.test"}),
        |job| job["headers"] = json!({"transfer-Encoding": "chunked"}),
        |job| job["headers"] = json!({"Proxy-Authorization": "x"}),
        |job| job["method"] = json!("GET http://b.test/ HTTP/1.1\r\nX:"),
        |job| job["method"] = json!("CONNECT"),
        |job| job["url"] = json!("ftp://a.test/"),
        |job| job["url"] = json!("/x"),
        |job| job["url"] = json!("https://u:p@a.test/"),
        |job| job["proxy"] = json!("a.test:80"),
        |job| job["more"] = json!(1),
    ];
    for change in changes {
        let mut job = proxy.job();
        change(&mut job);
        let (answer, code) = answer(job.to_string().as_bytes());
        assert_eq!((&answer["error"]["kind"], code), (&json!("invalid_job"), 2), "{job}");
    }
    assert_eq!(answer(b"{").1, 2);
    assert!(proxy.asked.try_recv().is_err());
}

#[test]
fn a_proxy_that_is_not_there_is_said_to_be_so() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let job = json!({"proxy": address.to_string(), "method": "GET", "url": "http://a.test/", "max_response_bytes": 1, "timeout_ms": 1000});
    assert_eq!(answer(job.to_string().as_bytes()).0["error"]["kind"], json!("proxy_unreachable"));
}
