//! The gate's own authority: real clients believe it without an option, beside the ones that they believed before.

use std::sync::Arc;

use latchgate::sandbox::TRUST_BUNDLE;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

struct Authority {
    pem: String,
    acceptor: tokio_rustls::TlsAcceptor,
}

/// An authority and a server for `localhost` that it vouches for.
fn authority() -> Authority {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    // OpenSSL takes a certificate whose issuer has its own name for one that signed itself.
    params.distinguished_name.push(rcgen::DnType::CommonName, "LatchGate test authority");
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    let certificate = params.self_signed(&key).unwrap();
    let pem = certificate.pem();
    let issuer = rcgen::Issuer::new(params, key);
    let leaf_key = rcgen::KeyPair::generate().unwrap();
    let mut leaf = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    leaf.use_authority_key_identifier_extension = true;
    let leaf = leaf.signed_by(&leaf_key, &issuer).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![CertificateDer::from(leaf)],
            PrivateKeyDer::from_pem_slice(leaf_key.serialize_pem().as_bytes()).unwrap(),
        )
        .unwrap();
    Authority { pem, acceptor: Arc::new(config).into() }
}

/// Serves `fine` over TLS to whoever connects.
fn serve(acceptor: tokio_rustls::TlsAcceptor) -> impl FnOnce(NamespaceListeners) {
    move |listeners| {
        for listener in listeners.tcp {
            let (listener, acceptor) = (tokio::net::TcpListener::from_std(listener).unwrap(), acceptor.clone());
            tokio::spawn(async move {
                while let Ok((connection, _)) = listener.accept().await {
                    let acceptor = acceptor.clone();
                    tokio::spawn(async move {
                        let Ok(mut connection) = acceptor.accept(connection).await else { return };
                        let _ = connection.read(&mut [0; 4096]).await;
                        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\nfine";
                        let _ = connection.write_all(answer).await;
                        let _ = connection.shutdown().await;
                    });
                }
            });
        }
    }
}

#[tokio::test]
async fn clients_believe_it_with_no_setting() {
    let Authority { pem, acceptor } = authority();
    let url = format!("https://localhost:{TCP_PORT}/");
    let python =
        format!("import urllib.request; print(urllib.request.urlopen('{url}', timeout=10).read().decode(), end='')");
    let requests = format!("import requests; print(requests.get('{url}', timeout=10).text, end='')");
    let node = format!(
        "fetch('{url}').then(r => r.text()).then(t => process.stdout.write(t)).catch(e => {{ console.error(e.cause); process.exit(60) }})"
    );
    let openssl = format!(
        "openssl s_client -connect localhost:{TCP_PORT} -verify_return_error -brief </dev/null >&2 && printf fine"
    );
    // git reads the answer as a repository, which it is not: that comes after the certificate.
    let git =
        format!("git ls-remote {url} 2>&1 | grep -q 'certificate' && exit 60; git ls-remote {url} >&2; printf fine");
    let mut clients = vec![("curl", command(&["/usr/bin/curl", "-sS", "--max-time", "10", &url]))];
    for (path, job) in [
        ("/usr/bin/openssl", shell(&openssl)),
        ("/usr/bin/git", shell(&git)),
        ("/usr/bin/python3", command(&["/usr/bin/python3", "-c", &python])),
        ("/usr/lib/python3/dist-packages/requests", command(&["/usr/bin/python3", "-c", &requests])),
        ("/usr/bin/node", command(&["/usr/bin/node", "-e", &node])),
    ] {
        if Path::new(path).exists() {
            clients.push((path, job));
        } else {
            // Debian's own package of requests is more than these suites install.
            assert!(std::env::var_os("CI").is_none() || path.ends_with("/requests"), "skipped in CI: no {path}");
            eprintln!("SKIPPED: no {path}");
        }
    }
    for (client, mut job) in clients {
        job.limits.memory_bytes = 64 << 30; // Node reserves address space, which is what is counted without a controller.
        let without = run_isolated(job.clone(), serve(acceptor.clone())).await;
        assert!(without.exit != Exit::Code(0) && without.stdout != b"fine", "{client}: {without:?}");
        job.trust_pem = Some(pem.clone().into_bytes());
        let with = run_isolated(job, serve(acceptor.clone())).await;
        assert_eq!(
            (with.exit, text(&with.stdout).as_str()),
            (Exit::Code(0), "fine"),
            "{client}: {}",
            text(&with.stderr)
        );
        println!("{client} believes it");
    }
}

fn certificates(pem: &[u8]) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(pem).map(Result::unwrap).collect()
}

#[tokio::test]
async fn the_bundle_is_the_host_s_and_ours_and_nothing_else_changes() {
    let pem = authority().pem;
    let trusting = |mut job: Job| {
        job.trust_pem = Some(pem.clone().into_bytes());
        job.limits.stdout_bytes = 8 << 20;
        job
    };
    let bundle = certificates(output(trusting(command(&["cat", TRUST_BUNDLE]))).await.as_bytes());
    let mut expected = Vec::new();
    if let Ok(host) = std::fs::read("/etc/ssl/certs/ca-certificates.crt") {
        expected = certificates(&host);
    }
    expected.extend(certificates(pem.as_bytes()));
    assert_eq!(bundle, expected);

    let writes = format!(
        "(echo x >> {TRUST_BUNDLE}) 2>/dev/null && echo WROTE; rm -f {TRUST_BUNDLE} 2>/dev/null && echo REMOVED; \
         (echo x > /etc/ssl/latchgate/other) 2>/dev/null && echo BESIDE; (echo x > /etc/ssl/x) 2>/dev/null && echo ABOVE; \
         env | grep -c '={TRUST_BUNDLE}$'; ls -A /etc/ssl/latchgate"
    );
    assert_eq!(output(trusting(shell(&writes))).await, "5\nca-bundle.pem\n");
    // The rest of the host's directory is as it is without.
    let listing = || {
        shell(
            "ls -AR /etc/ssl 2>/dev/null | grep -v -e latchgate -e ca-bundle.pem | grep . ; ls -l /etc/ssl/openssl.cnf",
        )
    };
    assert_eq!(output(trusting(listing())).await, output(listing()).await);
    // What the command says itself counts.
    let mut job = trusting(shell("echo $CURL_CA_BUNDLE $SSL_CERT_FILE"));
    if let Program::Command { env, .. } = &mut job.program {
        env.push(("CURL_CA_BUNDLE".into(), "/mine".into()));
    }
    assert_eq!(output(job).await, format!("/mine {TRUST_BUNDLE}\n"));
    // No part of what ran.
    let digest = run(shell("true")).await.module_digest;
    assert_eq!(run(trusting(shell("true"))).await.module_digest, digest);
    let leaf = tree().leaf().unwrap();
    let mut job = shell("true");
    job.trust_pem = Some(b"no certificate".to_vec());
    let refused = runner().run(&leaf, job, pending()).await;
    assert!(matches!(refused, Err(SandboxError::Config(_))), "{refused:?}");
    leaf.remove().unwrap();
}

/// The other kinds of root have it at the same place, a directory beside what it shows.
#[cfg(target_arch = "x86_64")]
#[tokio::test]
async fn every_root_has_it() {
    let pem = authority().pem;
    let own = authority().pem;
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    std::fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let certs = directory.path().join("etc/ssl/certs");
    std::fs::create_dir_all(&certs).unwrap();
    std::fs::create_dir_all(directory.path().join("etc/ssl/latchgate")).unwrap();
    std::fs::write(certs.join("ca-certificates.crt"), &own).unwrap();
    std::fs::write(directory.path().join("etc/ssl/latchgate/ca-bundle.pem"), "another's").unwrap();
    std::fs::write(directory.path().join("etc/motd"), "shown").unwrap();
    // A link in the directory means what it means inside, whatever the host has there.
    std::os::unix::fs::symlink("/etc/motd", directory.path().join("etc/link")).unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let cat = async |path: &str, root: Root| {
        let mut job = sealed_job(elsewhere.path(), "cat", &cat_elf(path), root);
        job.trust_pem = Some(pem.clone().into_bytes());
        let done = run(job).await;
        assert_eq!(done.exit, Exit::Code(0), "{path}");
        done.stdout
    };
    let root = || Root::Directory(directory.path().to_owned());
    assert_eq!(certificates(&cat(TRUST_BUNDLE, root()).await), certificates(format!("{own}{pem}").as_bytes()));
    assert_eq!(cat("/etc/ssl/certs/ca-certificates.crt", root()).await, own.as_bytes());
    assert_eq!(cat("/etc/link", root()).await, b"shown");
    assert!(certificates(&cat(TRUST_BUNDLE, Root::Empty).await).contains(&certificates(pem.as_bytes())[0]));
}
