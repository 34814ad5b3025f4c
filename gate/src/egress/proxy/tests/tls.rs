//! TLS in tunnels, with clients of other people's making.

use std::process::Stdio;

use rustls::pki_types::ServerName;
use tokio_rustls::TlsConnector;

use super::*;
use crate::egress::proxy::client::ACCESS_DENIED;

pub fn client_config(bench: &Bench) -> rustls::ClientConfig {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(bench.ca.der().clone()).unwrap();
    rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth()
}

/// The bytes that a client sends first.
pub fn hello_for(bench: &Bench, name: &str) -> Vec<u8> {
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut client = rustls::ClientConnection::new(Arc::new(client_config(bench)), name).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

/// The same bytes in records and segments of one byte.
pub fn cut(hello: &[u8]) -> Vec<u8> {
    hello[5..].iter().flat_map(|byte| [22, 3, 1, 0, 1, *byte]).collect()
}

pub async fn dribble(stream: &mut TcpStream, bytes: &[u8]) {
    stream.set_nodelay(true).unwrap();
    for byte in bytes {
        if stream.write_all(&[*byte]).await.is_err() {
            break;
        }
        tokio::task::yield_now().await;
    }
}

pub async fn rest(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = timeout(Duration::from_secs(10), stream.read_to_end(&mut bytes)).await.unwrap();
    bytes
}

#[tokio::test]
async fn a_tunnel_to_the_name_that_was_asked_for_is_carried_unseen() {
    let bench = Bench::plain().await;
    let origin = Origin::tls("origin.test", &bench.ca, OK).await;
    let session = bench.open(&[("origin.test", origin.port)]);
    let (stream, _) = bench.connect(&format!("Origin.TEST:{}", origin.port)).await;
    let name = ServerName::try_from("origin.test").unwrap();
    let mut tls = TlsConnector::from(Arc::new(client_config(&bench))).connect(name, stream).await.unwrap();
    tls.write_all(b"GET / HTTP/1.1\r\nHost: hidden.test\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    tls.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, OK.as_bytes());
    let flow = &session.close().await[0];
    assert_eq!((flow.verdict, flow.rule.as_str()), (Verdict::Allow, "profile"));
    assert_eq!((flow.protocol, flow.sni.as_deref()), (Some(Protocol::Tls), Some("origin.test")));
    assert_eq!((flow.name_verified, flow.opaque, flow.carried), (Some(NameVerified::Sni), true, false));
}

#[tokio::test]
async fn another_name_inside_is_refused_and_nothing_of_it_leaves() {
    let bench = Bench::plain().await;
    let origin = Origin::tls("origin.test", &bench.ca, OK).await;
    let session = bench.open(&[("origin.test", origin.port)]);
    let mut hellos = vec![
        (hello_for(&bench, "other.test"), "sni_mismatch"),
        (hello_for(&bench, "sub.origin.test"), "sni_mismatch"),
        (hello_for(&bench, "127.0.0.1"), "sni_missing"),
        (cut(&hello_for(&bench, "other.test")), "sni_mismatch"),
        (vec![22, 3, 1, 0, 1, 2], "not_tls"),
    ];
    // The extension of the right length, and then of the kind that hides a hello.
    let mut hidden = hello_for(&bench, "origin.test");
    let at = hidden.windows(4).position(|w| w == [0, 23, 0, 0]).expect("extended_master_secret");
    hidden[at..at + 2].copy_from_slice(&[0xfe, 0x0d]);
    hellos.push((hidden, "ech"));
    for (hello, rule) in &hellos {
        let (mut stream, answer) = bench.connect(&format!("origin.test:{}", origin.port)).await;
        assert_eq!(answer.status, 200);
        dribble(&mut stream, hello).await;
        assert_eq!(rest(&mut stream).await, ACCESS_DENIED, "{rule}");
    }
    let records = session.close().await;
    // One after the other they were made; which is recorded first is not said.
    let (mut rules, mut expected): (Vec<_>, Vec<_>) =
        (records.iter().map(|flow| flow.rule.as_str()).collect(), hellos.iter().map(|(_, rule)| *rule).collect());
    rules.sort_unstable();
    expected.sort_unstable();
    assert_eq!(rules, expected);
    assert!(records.iter().all(|flow| flow.verdict == Verdict::Deny && flow.bytes_to_upstream == 0));
    assert!(origin.seen().is_empty());
}

#[tokio::test]
async fn a_hello_in_pieces_of_one_byte_is_carried_too() {
    let bench = Bench::plain().await;
    let origin = Origin::echoing().await;
    let session = bench.open(&[("origin.test", origin.port)]);
    let hello = cut(&hello_for(&bench, "origin.test"));
    let (mut stream, _) = bench.connect(&format!("origin.test:{}", origin.port)).await;
    dribble(&mut stream, &hello).await;
    assert_eq!(exactly(&mut stream, hello.len()).await, hello);
    drop(stream);
    assert_eq!(session.close().await[0].bytes_to_upstream, hello.len() as u64);
}

/// Answers a first hello with a HelloRetryRequest, and keeps whatever comes then.
async fn retrying() -> Origin {
    Origin::doing(|mut stream, seen| async move {
        let mut first = vec![0; 5];
        stream.read_exact(&mut first).await.unwrap();
        let mut body = vec![0; usize::from(first[3]) << 8 | usize::from(first[4])];
        stream.read_exact(&mut body).await.unwrap();
        let mut message = vec![2, 0, 0, 40, 3, 3];
        message.extend(crate::egress::proxy::passthrough::RETRY);
        message.extend([0, 0x13, 1, 0, 0, 0]);
        // One byte a record: the proxy must not miss it.
        for byte in message {
            stream.write_all(&[22, 3, 3, 0, 1, byte]).await.unwrap();
        }
        let mut got = Vec::new();
        let _ = stream.read_to_end(&mut got).await;
        seen.lock().unwrap().push(got.len().to_string());
    })
    .await
}

#[tokio::test]
async fn a_second_hello_is_judged_like_the_first() {
    let bench = Bench::plain().await;
    let origin = retrying().await;
    let session = bench.open(&[("origin.test", origin.port)]);
    let first = hello_for(&bench, "origin.test");
    let change = [20, 3, 3, 0, 1, 1];
    let early = [23, 3, 3, 0, 2, 1, 2];
    let other = hello_for(&bench, "other.test");
    for (waits, before) in
        [(true, vec![]), (false, vec![]), (true, change.to_vec()), (false, [&change[..], &early].concat())]
    {
        let (mut stream, _) = bench.connect(&format!("origin.test:{}", origin.port)).await;
        stream.write_all(&first).await.unwrap();
        if waits {
            exactly(&mut stream, 44 * 6).await;
        }
        stream.write_all(&[&before[..], &other].concat()).await.unwrap();
        assert!(rest(&mut stream).await.ends_with(&ACCESS_DENIED));
    }
    let (mut stream, _) = bench.connect(&format!("origin.test:{}", origin.port)).await;
    let second = [&change[..], &first, &early].concat();
    stream.write_all(&[&first[..], &second].concat()).await.unwrap();
    stream.shutdown().await.unwrap();
    rest(&mut stream).await;
    let records = session.close().await;
    let denied: Vec<_> =
        records.iter().filter(|flow| flow.rule == "sni_mismatch").map(|f| f.bytes_to_upstream).collect();
    let length = first.len() as u64;
    assert_eq!(denied, [length, length, length + 6, length + 13]);
    assert_eq!((records[4].verdict, records[4].end), (Verdict::Allow, End::Closed));
    assert_eq!(origin.seen().last(), Some(&second.len().to_string()));
}

pub struct Ran {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

/// `None` when there is no such program: in CI that is a failure, since what CI skips nobody runs.
pub async fn run(program: &str, arguments: &[&str]) -> Option<Ran> {
    let spawned = tokio::process::Command::new(program)
        .args(arguments)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn();
    let child = match spawned {
        Ok(child) => child,
        Err(error) => {
            assert!(std::env::var_os("CI").is_none(), "skipped in CI: {program}: {error}");
            eprintln!("SKIPPED: {program}: {error}");
            return None;
        }
    };
    let done = timeout(Duration::from_secs(60), child.wait_with_output()).await.unwrap().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Some(Ran { code: done.status.code(), out: text(done.stdout), err: text(done.stderr) })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn curl_is_carried_and_its_fronting_is_refused() {
    let bench = Bench::plain().await;
    let origin = Origin::tls("origin.test", &bench.ca, OK).await;
    let session = bench.open(&[("origin.test", origin.port)]);
    let (proxy, ca) = (format!("http://{}", bench.proxy.addresses().v4), bench.ca_file());
    let arguments = ["-sS", "--proxy", &proxy, "--cacert", &ca];
    let url = |name: &str| format!("https://{name}:{}/", origin.port);
    for version in [&["--tls-max", "1.2"][..], &["--tlsv1.3"]] {
        let Some(ran) = run("curl", &[&arguments[..], version, &[&url("origin.test")]].concat()).await else { return };
        assert_eq!((ran.code, ran.out.as_str()), (Some(0), "ok"), "{version:?} {}", ran.err);
    }
    let front = format!("other.test:{0}:origin.test:{0}", origin.port);
    let ran = run("curl", &[&arguments[..], &["--connect-to", &front, &url("other.test")]].concat()).await.unwrap();
    assert_eq!(ran.code, Some(35), "{}", ran.err);
    assert!(ran.err.contains("access denied"), "{}", ran.err);
    let rules: Vec<_> = session.close().await.iter().map(|flow| flow.rule.clone()).collect();
    assert_eq!(rules, ["profile", "profile", "sni_mismatch"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn openssl_and_its_second_hello_are_carried() {
    let bench = Bench::plain().await;
    let origin = Origin::tls("origin.test", &bench.ca, OK).await;
    let session = bench.open(&[("origin.test", origin.port)]);
    let (proxy, ca) = (bench.proxy.addresses().v4.to_string(), bench.ca_file());
    let target = format!("origin.test:{}", origin.port);
    let arguments = ["s_client", "-proxy", &proxy, "-connect", &target, "-CAfile", &ca, "-verify_return_error"];
    // The server has no X448: it asks for another hello.
    for more in [&["-servername", "origin.test"][..], &["-servername", "origin.test", "-groups", "X448:P-256", "-msg"]]
    {
        let Some(ran) = run("openssl", &[&arguments[..], more].concat()).await else { return };
        assert!(ran.out.contains("Verify return code: 0 (ok)"), "{} {}", ran.out, ran.err);
        assert!(more.len() == 2 || ran.out.matches("ClientHello").count() == 2, "{}", ran.out);
    }
    let ran = run("openssl", &[&arguments[..], &["-noservername"]].concat()).await.unwrap();
    assert!(ran.err.contains("access denied"), "{}", ran.err);
    let rules: Vec<_> = session.close().await.iter().map(|flow| flow.rule.clone()).collect();
    assert_eq!(rules, ["profile", "profile", "sni_missing"]);
}
