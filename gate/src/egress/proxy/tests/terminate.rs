//! TLS that ends at the proxy.

use rustls::pki_types::ServerName;
use rustls::pki_types::pem::PemObject;
use tokio_rustls::TlsConnector;

use super::tls::{hello_for, rest, run};
use super::*;
use crate::egress::proxy::client::ACCESS_DENIED;

const TERMINATE: EntryProtocol = EntryProtocol::Tls { terminate: true };

/// A client that trusts what a sandbox trusts.
fn inside(bench: &Bench) -> rustls::ClientConfig {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(bench.proxy.ca_pem().as_bytes()).unwrap()).unwrap();
    rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth()
}

async fn ask(bench: &Bench, port: u16, request: &str) -> Answer {
    let stream = bench.dial_carried(&format!("198.18.0.1:{port}")).await;
    let name = ServerName::try_from("origin.test").unwrap();
    let mut tls = TlsConnector::from(Arc::new(inside(bench))).connect(name, stream).await.unwrap();
    tls.write_all(request.as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    let _ = tls.read_to_end(&mut bytes).await;
    Answer::parse(&bytes)
}

#[tokio::test]
async fn requests_inside_are_seen_and_held_to_host_and_method() {
    let bench = Bench::plain().await;
    let origin = Origin::tls("origin.test", &bench.ca, OK).await;
    let port = origin.port;
    let entry = Entry::new(Pattern::parse("origin.test").unwrap(), [port]).speaking(TERMINATE, ["GET".to_owned()]);
    let open = bench.proxy.open(LEAF, session(LEAF, Profile::allowlist([entry])));
    let good = format!("GET /path HTTP/1.1\r\nHost: origin.test:{port}\r\nConnection: close\r\n\r\n");
    assert_eq!(ask(&bench, port, &good).await.text(), "ok");
    let front = good.replace("Host: origin.test", "Host: other.test");
    assert_eq!(ask(&bench, port, &front).await.denied(), "host_mismatch");
    assert_eq!(ask(&bench, port, &good.replace("GET", "PUT")).await.denied(), "method_not_allowed");
    assert_eq!(ask(&bench, port, "PRI * HTTP/2.0\r\n\r\n").await.status, 400);
    assert_eq!(origin.seen().len(), 1);
    assert!(origin.seen()[0].starts_with(&format!("GET /path HTTP/1.1\r\nHost: origin.test:{port}\r\n")));

    let mut stream = bench.dial_carried(&format!("198.18.0.1:{port}")).await;
    stream.write_all(&hello_for(&bench, "other.test")).await.unwrap();
    assert_eq!(rest(&mut stream).await, ACCESS_DENIED);

    let records = open.close().await;
    let rules: Vec<_> = records.iter().map(|flow| flow.rule.as_str()).collect();
    assert_eq!(rules, ["profile", "host_mismatch", "method_not_allowed", "malformed", "sni_mismatch"]);
    let flow = &records[0];
    assert_eq!((flow.protocol, flow.sni.as_deref()), (Some(Protocol::Https), Some("origin.test")));
    assert_eq!((flow.name_verified, flow.opaque, flow.carried), (Some(NameVerified::Host), false, true));
}

#[tokio::test]
async fn the_origin_is_verified_as_ever() {
    let bench = Bench::plain().await;
    let origin = Origin::tls("other.test", &bench.ca, OK).await;
    let session = bench.open_speaking(&[("origin.test", origin.port)], TERMINATE);
    let request = format!("GET / HTTP/1.1\r\nHost: origin.test:{}\r\n\r\n", origin.port);
    let answer = ask(&bench, origin.port, &request).await;
    assert_eq!((answer.status, answer.json()["reason"].as_str()), (502, Some("tls_certificate")));
    assert!(origin.seen().is_empty());
    assert_eq!(session.close().await[0].error.as_deref(), Some("tls_certificate"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn programs_that_trust_the_bundle_are_served() {
    let bench = Bench::plain().await;
    let origin = Origin::tls("origin.test", &bench.ca, OK).await;
    let session = bench.open_speaking(&[("origin.test", origin.port)], TERMINATE);
    let bundle = bench.dir.path().join("bundle.pem");
    std::fs::write(&bundle, bench.proxy.ca_pem()).unwrap();
    let (proxy, bundle) = (format!("http://{}", bench.proxy.addresses().v4), bundle.to_str().unwrap());
    let url = format!("https://origin.test:{}/", origin.port);
    let ca = bench.ca_file();
    let mut expected = Vec::new();
    if let Some(ran) = run("curl", &["-sS", "--proxy", &proxy, "--cacert", bundle, &url]).await {
        assert_eq!((ran.code, ran.out.as_str()), (Some(0), "ok"), "{}", ran.err);
        // The origin's own authority is not who vouches here.
        let ran = run("curl", &["-sS", "--proxy", &proxy, "--cacert", &ca, &url]).await.unwrap();
        assert_eq!(ran.code, Some(60), "{}", ran.err);
        expected.extend([None, Some("client_tls")]);
    }
    let script = format!(
        "import ssl, urllib.request as u\n\
         c = ssl.create_default_context(cafile={bundle:?})\n\
         c.verify_flags |= ssl.VERIFY_X509_STRICT\n\
         o = u.build_opener(u.ProxyHandler({{'https': {proxy:?}}}), u.HTTPSHandler(context=c))\n\
         print(o.open({url:?}).read().decode(), end='')"
    );
    if let Some(ran) = run("python3", &["-c", &script]).await {
        assert_eq!((ran.code, ran.out.as_str()), (Some(0), "ok"), "{}", ran.err);
        expected.push(None);
    }
    let errors: Vec<_> = session.close().await.into_iter().map(|flow| flow.error).collect();
    assert_eq!(errors.iter().map(Option::as_deref).collect::<Vec<_>>(), expected);
}
