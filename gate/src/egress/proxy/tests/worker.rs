//! The worker of HTTP actions and the proxy, as they speak to each other.

use serde_json::json;

use super::*;
use crate::sandbox::worker::http;

async fn work(bench: &Bench, method: &str, url: String, body: Option<&str>) -> Value {
    let job = json!({
        "proxy": bench.proxy.addresses().v4.to_string(), "method": method, "url": url, "headers": {"X-A": "b"},
        "body": body, "max_response_bytes": 1_000_000, "timeout_ms": 5000,
    });
    tokio::task::spawn_blocking(move || http::answer(job.to_string().as_bytes()).0).await.unwrap()
}

#[tokio::test]
async fn an_allowed_origin_answers_the_worker() {
    let bench = Bench::plain().await;
    let chunked =
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/plain\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
    let origin = Origin::tls("origin.test", &bench.ca, chunked).await;
    let plain = Origin::answering("HTTP/1.1 301 Moved\r\nLocation: http://other.test/\r\n\r\n").await;
    let session = bench.open(&[("origin.test", origin.port), ("origin.test", plain.port)]);
    let answer = work(&bench, "POST", format!("https://origin.test:{}/x?y", origin.port), Some("{\"a\":1}")).await;
    assert_eq!(answer["ok"], true, "{answer}");
    let data = &answer["data"];
    assert_eq!((&data["status_code"], &data["body"]), (&json!(200), &json!("hello")));
    assert_eq!(data["headers"]["content-type"], "text/plain");
    let seen = origin.seen().remove(0);
    assert!(
        seen.starts_with("POST /x?y HTTP/1.1\r\n") && seen.contains("X-A: b\r\n") && seen.ends_with("{\"a\":1}"),
        "{seen}"
    );

    let moved = work(&bench, "GET", format!("http://origin.test:{}/", plain.port), None).await;
    assert_eq!((&moved["data"]["status_code"], &moved["data"]["body"]), (&json!(301), &json!("")));
    let records = session.close().await;
    assert_eq!(records.len(), 2);
    assert!(records.iter().all(|flow| flow.end == End::Closed && flow.verdict == Verdict::Allow));
}

#[tokio::test]
async fn a_refusal_reaches_the_worker_with_its_decision_id() {
    let bench = Bench::plain().await;
    let stranger = authority();
    let origin = Origin::tls("origin.test", &stranger, OK).await;
    let session = bench.open(&[("origin.test", origin.port)]);
    let denied = work(&bench, "GET", "https://other.test/".to_owned(), None).await;
    assert_eq!(denied["error"]["kind"], "egress_denied");
    assert_eq!(denied["error"]["reason"], "name_not_allowed");
    let failed = work(&bench, "GET", format!("https://origin.test:{}/", origin.port), None).await;
    assert_eq!(
        (&failed["error"]["kind"], &failed["error"]["reason"]),
        (&json!("upstream_failed"), &json!("tls_certificate"))
    );
    let records = session.close().await;
    for (answer, flow) in [denied, failed].iter().zip(&records) {
        assert_eq!(answer["error"]["decision_id"], flow.decision_id);
    }
}
