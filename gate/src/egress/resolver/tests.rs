use std::sync::{Arc, Mutex};

use hickory_proto::rr::Record;
use hickory_proto::rr::rdata::{A, AAAA, CNAME};
use tokio::net::TcpListener;

use super::*;

/// What a [`DnsServer`] does with one question.
pub(crate) enum Reply {
    Records(Vec<Record>),
    Code(ResponseCode),
    /// Truncated over UDP, these over TCP.
    Truncated(Vec<Record>),
    Silence,
    /// These bytes made of the honest answer, each a datagram, before the honest answer.
    Forged(Vec<fn(&mut Message)>, Vec<Record>),
}

/// A DNS server of the test's own on loopback, UDP and TCP, that counts what it is asked.
pub(crate) struct DnsServer {
    pub address: SocketAddr,
    pub asked: Arc<Mutex<Vec<(String, RecordType)>>>,
}

impl DnsServer {
    pub(crate) async fn start(reply: impl Fn(&str, RecordType, usize) -> Reply + Send + Sync + 'static) -> Self {
        let (udp, tcp) = loop {
            let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            if let Ok(tcp) = TcpListener::bind(udp.local_addr().unwrap()).await {
                break (udp, tcp);
            }
        };
        let address = udp.local_addr().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let reply = Arc::new(reply);
        let honest = |query: &Message, records: Vec<Record>| {
            let mut answer = Message::response(query.metadata.id, OpCode::Query);
            answer.add_queries(query.queries.clone());
            answer.add_answers(records);
            answer
        };
        let decide = {
            let asked = Arc::clone(&asked);
            move |query: &Message, count: bool| {
                let question = &query.queries[0];
                let name = question.name.to_ascii().trim_end_matches('.').to_owned();
                let mut asked = asked.lock().unwrap();
                let before = asked.iter().filter(|(n, k)| *n == name && *k == question.query_type).count();
                if count {
                    asked.push((name.clone(), question.query_type));
                }
                reply(&name, question.query_type, before)
            }
        };
        let decide = Arc::new(decide);
        let over_tcp = Arc::clone(&decide);
        tokio::spawn(async move {
            let mut buffer = vec![0; 4096];
            loop {
                let (length, peer) = udp.recv_from(&mut buffer).await.unwrap();
                let query = Message::from_vec(&buffer[..length]).unwrap();
                let answers = match decide(&query, true) {
                    Reply::Records(records) => vec![honest(&query, records)],
                    Reply::Code(code) => {
                        let mut answer = honest(&query, vec![]);
                        answer.metadata.response_code = code;
                        vec![answer]
                    }
                    Reply::Truncated(_) => {
                        let mut answer = honest(&query, vec![]);
                        answer.metadata.truncation = true;
                        vec![answer]
                    }
                    Reply::Silence => vec![],
                    Reply::Forged(changes, records) => {
                        let mut all = Vec::new();
                        for change in changes {
                            let mut forged = honest(&query, vec![a("forged.test", "9.9.9.9")]);
                            change(&mut forged);
                            all.push(forged);
                        }
                        all.push(honest(&query, records));
                        all
                    }
                };
                for answer in answers {
                    udp.send_to(&answer.to_vec().unwrap(), peer).await.unwrap();
                }
            }
        });
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = tcp.accept().await.unwrap();
                let length = stream.read_u16().await.unwrap();
                let mut bytes = vec![0; usize::from(length)];
                stream.read_exact(&mut bytes).await.unwrap();
                let query = Message::from_vec(&bytes).unwrap();
                if let Reply::Truncated(records) = over_tcp(&query, false) {
                    let bytes = honest(&query, records).to_vec().unwrap();
                    stream.write_u16(u16::try_from(bytes.len()).unwrap()).await.unwrap();
                    stream.write_all(&bytes).await.unwrap();
                }
            }
        });
        Self { address, asked }
    }

    fn resolver(&self) -> Resolver {
        Resolver::new(ResolverConfig {
            servers: vec![self.address],
            timeout: Duration::from_millis(300),
            ..ResolverConfig::default()
        })
    }
}

fn name(text: &str) -> Name {
    Name::from_ascii(format!("{text}.")).unwrap()
}

pub(crate) fn a(owner: &str, address: &str) -> Record {
    Record::from_rdata(name(owner), 0, RData::A(A(address.parse().unwrap())))
}

pub(crate) fn aaaa(owner: &str, address: &str) -> Record {
    Record::from_rdata(name(owner), 0, RData::AAAA(AAAA(address.parse().unwrap())))
}

fn cname(owner: &str, target: &str) -> Record {
    Record::from_rdata(name(owner), 0, RData::CNAME(CNAME(name(target))))
}

fn ips(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

#[tokio::test]
async fn both_families_are_asked_once_and_returned_whole() {
    let server = DnsServer::start(|name, kind, _| {
        Reply::Records(match kind {
            RecordType::A => vec![a(name, "8.8.8.8"), a(name, "8.8.4.4")],
            _ => vec![aaaa(name, "2001:4860::8888")],
        })
    })
    .await;
    let resolver = server.resolver();
    assert_eq!(resolver.resolve("dns.test").await, Ok(ips(&["8.8.8.8", "8.8.4.4", "2001:4860::8888"])));
    let mut asked = server.asked.lock().unwrap().clone();
    asked.sort_by_key(|(_, kind)| u16::from(*kind));
    assert_eq!(asked, vec![("dns.test".into(), RecordType::A), ("dns.test".into(), RecordType::AAAA)]);
}

#[tokio::test]
async fn aliases_are_followed_within_and_across_answers_and_bounded() {
    let server = DnsServer::start(|name, kind, _| {
        let records = match (name, kind) {
            // In one answer, not in order, with a stranger's record between.
            ("one.test", RecordType::A) => vec![
                a("three.test", "8.8.8.8"),
                cname("two.test", "three.test"),
                a("stranger.test", "6.6.6.6"),
                cname("one.test", "two.test"),
            ],
            ("far.test", RecordType::A) => vec![cname("far.test", "target.test")],
            ("target.test", RecordType::A) => vec![a("target.test", "8.8.4.4")],
            ("loop.test", _) => vec![cname("loop.test", "pool.test"), cname("pool.test", "loop.test")],
            ("self.test", _) => vec![cname("self.test", "self.test")],
            (name, _) if name.starts_with("n") => {
                let n: u32 = name.trim_start_matches('n').trim_end_matches(".test").parse().unwrap();
                vec![cname(name, &format!("n{}.test", n + 1))]
            }
            _ => vec![],
        };
        Reply::Records(records)
    })
    .await;
    let resolver = server.resolver();
    assert_eq!(resolver.resolve("one.test").await, Ok(ips(&["8.8.8.8"])));
    assert_eq!(resolver.resolve("far.test").await, Ok(ips(&["8.8.4.4"])));
    for endless in ["loop.test", "self.test", "n0.test"] {
        assert_eq!(resolver.resolve(endless).await, Err(ResolveError::TooLong), "{endless}");
    }
    assert!(server.asked.lock().unwrap().len() < 40);
}

#[tokio::test]
async fn a_truncated_answer_is_asked_for_over_tcp() {
    let server = DnsServer::start(|name, kind, _| match kind {
        RecordType::A => Reply::Truncated((1..=40).map(|n| a(name, &format!("8.8.8.{n}"))).collect()),
        _ => Reply::Records(vec![]),
    })
    .await;
    assert_eq!(server.resolver().resolve("big.test").await.unwrap().len(), 40);
}

#[tokio::test]
async fn forged_answers_are_passed_over() {
    let server = DnsServer::start(|name, kind, _| {
        let changes: Vec<fn(&mut Message)> = vec![
            |m| m.metadata.id = m.metadata.id.wrapping_add(1),
            |m| m.metadata.message_type = MessageType::Query,
            |m| m.metadata.op_code = OpCode::Notify,
            |m| m.queries.clear(),
            |m| m.queries[0].name = Name::from_ascii("other.test.").unwrap(),
            |m| m.queries[0].query_type = RecordType::TXT,
            |m| m.queries.push(m.queries[0].clone()),
        ];
        Reply::Forged(changes, if kind == RecordType::A { vec![a(name, "8.8.8.8")] } else { vec![] })
    })
    .await;
    assert_eq!(server.resolver().resolve("forged.test").await, Ok(ips(&["8.8.8.8"])));
}

#[tokio::test]
async fn failures_have_their_own_names() {
    let server = DnsServer::start(|name, kind, before| match (name, kind) {
        ("gone.test", _) => Reply::Code(ResponseCode::NXDomain),
        ("empty.test", _) => Reply::Records(vec![]),
        ("broken.test", _) => Reply::Code(ResponseCode::ServFail),
        ("silent.test", _) => Reply::Silence,
        ("half.test", RecordType::A) => Reply::Records(vec![a(name, "8.8.8.8")]),
        ("half.test", _) => Reply::Code(ResponseCode::ServFail),
        ("second.test", RecordType::A) if before == 0 => Reply::Silence,
        ("second.test", RecordType::A) => Reply::Records(vec![a(name, "8.8.8.8")]),
        ("crowd.test", RecordType::A) => Reply::Truncated((1..=200).map(|n| a(name, &format!("8.8.8.{n}"))).collect()),
        _ => Reply::Records(vec![]),
    })
    .await;
    let resolver = server.resolver();
    for (name, outcome) in [
        ("gone.test", Err(ResolveError::NotFound)),
        ("empty.test", Err(ResolveError::NotFound)),
        ("broken.test", Err(ResolveError::Failed)),
        ("silent.test", Err(ResolveError::Timeout)),
        ("half.test", Ok(ips(&["8.8.8.8"]))),
        ("second.test", Ok(ips(&["8.8.8.8"]))),
        ("crowd.test", Err(ResolveError::TooLong)),
    ] {
        assert_eq!(resolver.resolve(name).await, outcome, "{name}");
    }
    assert_eq!(Resolver::new(ResolverConfig::default()).resolve("a.test").await, Err(ResolveError::NoServer));
}

#[tokio::test]
async fn the_table_comes_first_and_special_names_never_reach_dns() {
    let server = DnsServer::start(|name, _, _| Reply::Records(vec![a(name, "8.8.8.8")])).await;
    let mut resolver = server.resolver();
    resolver.config.hosts.insert("origin.test".into(), ips(&["127.0.0.1", "::1"]));
    resolver.config.hosts.insert("none.test".into(), vec![]);
    assert_eq!(resolver.resolve("origin.test").await, Ok(ips(&["127.0.0.1", "::1"])));
    for name in ["none.test", "localhost", "a.localhost", "x.invalid", "y.onion"] {
        assert_eq!(resolver.resolve(name).await, Err(ResolveError::NotFound), "{name}");
    }
    assert!(server.asked.lock().unwrap().is_empty());
    assert_eq!(resolver.resolve("sub.origin.test").await, Ok(ips(&["8.8.8.8"])));
}

#[test]
fn servers_come_from_resolv_conf() {
    let text = "# nameserver 1.1.1.1\n; x\nsearch a b\nnameserver 10.0.0.10\n nameserver\t2001:db8::1 # x\nnameserver fe80::1%eth0\nnameserver x\nnameserver\n";
    let servers = parse_servers(text);
    assert_eq!(servers, ["10.0.0.10:53".parse().unwrap(), "[2001:db8::1]:53".parse().unwrap()]);
}
