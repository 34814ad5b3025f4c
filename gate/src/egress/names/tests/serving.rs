//! The resolver on real sockets. The kernel's records are put in by hand: what the kernel writes is tested with it.

use std::collections::BTreeMap;
use std::net::SocketAddrV4;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UdpSocket as Socket;

use super::*;
use crate::egress::resolver::{Resolver, ResolverConfig};

/// The kernel's records.
#[derive(Default)]
struct Records(Mutex<HashMap<DatagramKey, Asker>>);

impl DatagramAttribution for Records {
    fn asker(&self, query: &DatagramKey) -> Option<Asker> {
        lock(&self.0).remove(query)
    }
}

impl Records {
    fn put(&self, netns: Option<u64>, source: SocketAddr, slot_port: u16, id: u16, leaf: LeafId) {
        let server = "192.0.2.53:53".parse().unwrap();
        lock(&self.0).insert(DatagramKey { netns, source, slot_port, id }, Asker { leaf, server });
    }
}

struct Served {
    records: Arc<Records>,
    server: DnsServer,
    slots: Vec<SocketAddr>,
}

fn serve(limits: Limits) -> Served {
    let records = Arc::new(Records::default());
    let server = DnsServer::new(limits, Arc::new(Told::default()));
    let sockets = Slots::bind().unwrap().into_sockets();
    let slots = sockets.iter().map(|socket| socket.local_addr().unwrap()).collect();
    server.serve(sockets, records.clone()).unwrap();
    Served { records, server, slots }
}

/// A socket connected to a slot, so that only an answer from that very address is received.
async fn client(slot: SocketAddr) -> Socket {
    let any = SocketAddr::new(if slot.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() }, 0);
    let socket = Socket::bind(any).await.unwrap();
    socket.connect(slot).await.unwrap();
    socket
}

async fn hear(socket: &Socket) -> Option<Vec<u8>> {
    let mut buffer = vec![0; 4096];
    let length = timeout(Duration::from_secs(10), socket.recv(&mut buffer)).await.ok()?.unwrap();
    buffer.truncate(length);
    Some(buffer)
}

impl Served {
    /// Sends a query as the leaf's, and gives the answer.
    async fn ask_as(&self, leaf: LeafId, socket: &Socket, query: &Ask) -> Message {
        let slot = socket.peer_addr().unwrap();
        self.records.put(None, socket.local_addr().unwrap(), slot.port(), query.id, leaf);
        socket.send(&query.bytes()).await.unwrap();
        read(&hear(socket).await.expect("an answer"), query)
    }
}

#[tokio::test]
async fn every_slot_of_both_families_answers_from_where_it_was_asked() {
    let served = serve(Limits::default());
    let _names = served.server.open(LEAF, execution("e1", profile(&["example.com"])));
    assert_eq!(served.slots.len(), 16, "this machine has IPv6 on loopback");
    for &slot in &served.slots {
        let socket = client(slot).await;
        let answer = served.ask_as(LEAF, &socket, &ask("example.com", RecordType::A)).await;
        assert_eq!(addresses(&answer), [Ipv4Addr::new(198, 18, 0, 1)]);
        let answer = served.ask_as(LEAF, &socket, &ask("evil.test", RecordType::A)).await;
        assert_refused(&answer, "name_not_allowed");
    }
}

#[tokio::test]
async fn what_the_kernel_does_not_know_is_nobodys() {
    let served = serve(Limits::default());
    let _names = served.server.open(LEAF, execution("e1", profile(&["example.com"])));
    let mut flows = served.server.flows();
    let (slot, other_slot) = (served.slots[0], served.slots[1]);
    let socket = client(slot).await;
    let source = socket.local_addr().unwrap();
    let query = ask("example.com", RecordType::A);
    let stranger = async |rule: &str, flows: &mut broadcast::Receiver<Arc<FlowRecord>>| {
        socket.send(&query.bytes()).await.unwrap();
        let id = assert_refused(&read(&hear(&socket).await.unwrap(), &query), rule);
        let flow = flows.try_recv().unwrap();
        assert_eq!((flow.decision_id.clone(), flow.rule.as_str(), flow.execution_id.clone()), (id, rule, None));
        assert_eq!(flow.name.as_deref(), Some("example.com"));
    };
    stranger("unattributed", &mut flows).await;
    // Records of something else: another source port, slot, transaction, namespace.
    let elsewhere = SocketAddr::new(source.ip(), source.port() ^ 1);
    for (netns, source, port, id) in [
        (None, elsewhere, slot.port(), query.id),
        (None, source, other_slot.port(), query.id),
        (None, source, slot.port(), query.id ^ 1),
        (Some(9), source, slot.port(), query.id),
    ] {
        served.records.put(netns, source, port, id, LEAF);
        stranger("unattributed", &mut flows).await;
    }
    // A leaf that is not served.
    served.records.put(None, source, slot.port(), query.id, LeafId(99));
    stranger("no_session", &mut flows).await;
    // A record is good for one datagram.
    assert_eq!(addresses(&served.ask_as(LEAF, &socket, &query).await).len(), 1);
    stranger("unattributed", &mut flows).await;
}

#[tokio::test]
async fn strangers_are_bounded() {
    let served = serve(Limits::default());
    let socket = client(served.slots[0]).await;
    for id in 0..1000 {
        socket.send(&Ask { id, ..ask("example.com", RecordType::A) }.bytes()).await.unwrap();
        tokio::task::yield_now().await;
    }
    // An execution is served all the same, and its answer comes after those of what was sent before.
    let _names = served.server.open(LEAF, execution("e1", profile(&["example.com"])));
    let query = ask("example.com", RecordType::A);
    served.records.put(None, socket.local_addr().unwrap(), served.slots[0].port(), query.id, LEAF);
    socket.send(&query.bytes()).await.unwrap();
    let mut heard = 0;
    loop {
        let bytes = hear(&socket).await.expect("an answer");
        if bytes[3] & 0xf == 0 {
            break;
        }
        heard += 1;
    }
    assert!((64..=256).contains(&heard), "{heard}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_of_many_executions_hears_its_own_answers() {
    let served = Arc::new(serve(Limits { queries_burst: 10_000, ..Limits::default() }));
    let mut tasks = Vec::new();
    for number in 1..=50_u64 {
        let served = Arc::clone(&served);
        tasks.push(tokio::spawn(async move {
            let leaf = LeafId(number);
            let names =
                served.server.open(leaf, execution(&number.to_string(), profile(&[&format!("e{number}.test")])));
            let socket = client(served.slots[usize::try_from(number).unwrap() % served.slots.len()]).await;
            for id in 0..100 {
                // All executions use the same ids; each its own names, as many as it has asked for.
                let mine = Ask { id, ..ask(&format!("n{}.e{number}.test", id % 10), RecordType::A) };
                let expected = Ipv4Addr::new(198, 18, 0, 1 + u8::try_from(id % 10).unwrap());
                assert_eq!(addresses(&served.ask_as(leaf, &socket, &mine).await), [expected]);
                let theirs = Ask { id, ..ask(&format!("e{}.test", number % 50 + 1), RecordType::A) };
                assert_refused(&served.ask_as(leaf, &socket, &theirs).await, "name_not_allowed");
            }
            let closed = names.close().await;
            assert_eq!((closed.counts.answered, closed.counts.refused), (100, 100));
            let flow = closed.flows.first().unwrap();
            assert_eq!((flow.execution_id.clone(), flow.connections), (Some(number.to_string()), 100));
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
}

#[tokio::test]
async fn a_namespaces_listener_is_the_execution_and_the_kernel_must_agree() {
    let served = serve(Limits::default());
    let query = ask("one.test", RecordType::A);
    let sockets = || Slots::bind().unwrap().into_sockets();
    let address = |sockets: &[UdpSocket]| sockets[3].local_addr().unwrap();

    // Without records: the listener is all there is.
    let mut alone = served.server.open(LeafId(1), execution("e1", profile(&["one.test"])));
    let own = sockets();
    let slot = address(&own);
    alone.serve_isolated(own, &Isolated { attribution: None, netns: Some(5) }).unwrap();
    let socket = client(slot).await;
    socket.send(&query.bytes()).await.unwrap();
    assert_eq!(addresses(&read(&hear(&socket).await.unwrap(), &query)), [Ipv4Addr::new(198, 18, 0, 1)]);

    // With records: they must be of this leaf and of this namespace.
    let mut both = served.server.open(LeafId(2), execution("e2", profile(&["one.test"])));
    let own = sockets();
    let slot = address(&own);
    let attribution: Arc<dyn DatagramAttribution> = served.records.clone();
    both.serve_isolated(own, &Isolated { attribution: Some(attribution), netns: Some(5) }).unwrap();
    let socket = client(slot).await;
    let source = socket.local_addr().unwrap();
    for (record, rule) in [
        (None, "unattributed"),
        (Some((Some(6), LeafId(2))), "unattributed"),
        (Some((None, LeafId(2))), "unattributed"),
        (Some((Some(5), LeafId(1))), "disputed"),
    ] {
        if let Some((netns, leaf)) = record {
            served.records.put(netns, source, slot.port(), query.id, leaf);
        }
        socket.send(&query.bytes()).await.unwrap();
        assert_refused(&read(&hear(&socket).await.unwrap(), &query), rule);
    }
    assert!(both.table().is_empty());
    served.records.put(Some(5), source, slot.port(), query.id, LeafId(2));
    socket.send(&query.bytes()).await.unwrap();
    assert_eq!(addresses(&read(&hear(&socket).await.unwrap(), &query)).len(), 1);
    // The end of the execution ends its listeners.
    both.close().await;
    served.records.put(Some(5), source, slot.port(), query.id, LeafId(2));
    tokio::task::yield_now().await;
    let _ = socket.send(&query.bytes()).await;
    let silence = timeout(Duration::from_millis(200), socket.recv(&mut [0; 512])).await;
    assert!(!matches!(silence, Ok(Ok(_))));
}

#[tokio::test]
async fn what_was_sent_before_the_end_is_in_the_records() {
    let served = serve(Limits::default());
    let names = served.server.open(LEAF, execution("e1", profile(&["example.com"])));
    let slot = served.slots[5];
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    // No await in between: the runtime has not heard of any of them when the end begins.
    for id in 0..100 {
        served.records.put(None, socket.local_addr().unwrap(), slot.port(), id, LEAF);
        let query = Ask { id, ..ask(&format!("last{id}.evil.test"), RecordType::A) };
        socket.send_to(&query.bytes(), slot).unwrap();
    }
    let closed = names.close().await;
    assert_eq!(closed.counts.queries, 100);
    assert_eq!(closed.flows.len(), 100);
}

#[tokio::test]
async fn a_tunnel_is_refused_and_recorded_and_goes_nowhere() {
    // A server that the gate would ask, if it asked.
    let upstream = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    upstream.set_nonblocking(true).unwrap();
    let upstream_tcp = std::net::TcpListener::bind(upstream.local_addr().unwrap()).unwrap();
    upstream_tcp.set_nonblocking(true).unwrap();
    let resolver = Resolver::new(ResolverConfig {
        hosts: BTreeMap::new(),
        servers: vec![upstream.local_addr().unwrap()],
        timeout: Duration::from_millis(50),
    });

    let served = serve(Limits { queries_burst: 1000, ..Limits::default() });
    let names = served.server.open(LEAF, execution("e1", profile(&["example.com"])));
    let socket = client(served.slots[0]).await;
    let mut sent = 0_u64;
    // As iodine and dnscat2 do: long labels of what is carried, every type that brings much back, names never repeated.
    for number in 0..40_u16 {
        let chunk = |n: u16| format!("{:063x}", u32::from(number) << 16 | u32::from(n));
        let name = format!("{}.{}.{}.t.evil.test", chunk(1), chunk(2), chunk(3));
        for kind in
            [RecordType::TXT, RecordType::NULL, RecordType::CNAME, RecordType::MX, RecordType::SRV, RecordType::A]
        {
            sent += 1;
            let query = Ask { id: u16::try_from(sent).unwrap(), ..ask(&name, kind) };
            assert_refused(&served.ask_as(LEAF, &socket, &query).await, "name_not_allowed");
        }
    }
    // Bytes that no host name has, and names that end like the one that is allowed.
    for name in [&[&b"\xff\x00\x01raw"[..], b"evil", b"test"][..], &[b"data", b"example", b"com", b"evil", b"test"]] {
        sent += 1;
        let name = name.iter().map(|label| label.to_vec()).collect();
        let query = Ask { id: u16::try_from(sent).unwrap(), name, ..ask("x", RecordType::NULL) };
        let answer = served.ask_as(LEAF, &socket, &query).await;
        assert_eq!(answer.metadata.response_code, ResponseCode::Refused);
    }
    // The allowed name, too, is not asked of anybody: its stand-in is made here.
    assert_eq!(addresses(&served.ask_as(LEAF, &socket, &ask("api.example.com", RecordType::A)).await).len(), 1);
    let closed = names.close().await;
    assert_eq!(closed.flows.len(), 42);
    assert_eq!(closed.flows.iter().map(|flow| flow.connections).sum::<u64>(), sent);
    assert!(closed.flows.iter().all(|flow| flow.verdict == Verdict::Deny && flow.protocol == Some(Protocol::Dns)));
    assert!(closed.flows[0].name.as_deref().unwrap().ends_with(".t.evil.test"));

    let mut buffer = [0; 512];
    assert_eq!(upstream.recv_from(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    assert_eq!(upstream_tcp.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    // And that server does hear what the proxy asks.
    assert!(resolver.resolve("api.example.com").await.is_err());
    assert!(upstream.recv_from(&mut buffer).is_ok());
}

/// A connection to a task that serves it as the proxy will.
async fn stream(names: &OpenNames) -> TcpStream {
    let listener = TcpListener::bind(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let (accepted, peer) = listener.accept().await.unwrap();
    let over_tcp = names.over_tcp();
    tokio::spawn(async move { over_tcp.serve(accepted, peer).await });
    stream
}

fn framed(query: &Ask) -> Vec<u8> {
    let bytes = query.bytes();
    [&u16::try_from(bytes.len()).unwrap().to_be_bytes(), bytes.as_slice()].concat()
}

async fn hear_framed(stream: &mut TcpStream, query: &Ask) -> Message {
    let length = stream.read_u16().await.unwrap();
    let mut bytes = vec![0; usize::from(length)];
    stream.read_exact(&mut bytes).await.unwrap();
    read(&bytes, query)
}

#[tokio::test]
async fn streams_are_answered_in_order_whatever_their_segments() {
    let one = one(&["example.com"]);
    let mut stream = stream(&one.names).await;
    let allowed = Ask { id: 1, ..ask("example.com", RecordType::A) };
    let denied = Ask { id: 2, ..ask("evil.test", RecordType::TXT) };
    // Byte by byte.
    for byte in framed(&allowed) {
        stream.write_all(&[byte]).await.unwrap();
        tokio::task::yield_now().await;
    }
    assert_eq!(addresses(&hear_framed(&mut stream, &allowed).await).len(), 1);
    // Many at once, and half of one more; then the rest, and the end of what the client sends.
    let (head, tail) = framed(&denied).split_at(7).to_owned_parts();
    let many = [framed(&allowed), framed(&denied)].concat().repeat(20);
    stream.write_all(&[many, head].concat()).await.unwrap();
    for _ in 0..20 {
        assert_eq!(addresses(&hear_framed(&mut stream, &allowed).await).len(), 1);
        assert_refused(&hear_framed(&mut stream, &denied).await, "name_not_allowed");
    }
    stream.write_all(&tail).await.unwrap();
    stream.shutdown().await.unwrap();
    assert_refused(&hear_framed(&mut stream, &denied).await, "name_not_allowed");
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0);
    assert_eq!(one.names.close().await.counts.queries, 42);
}

trait OwnedParts {
    fn to_owned_parts(self) -> (Vec<u8>, Vec<u8>);
}

impl OwnedParts for (&[u8], &[u8]) {
    fn to_owned_parts(self) -> (Vec<u8>, Vec<u8>) {
        (self.0.to_vec(), self.1.to_vec())
    }
}

#[tokio::test]
async fn streams_that_are_no_dns_end() {
    let one = one(&["example.com"]);
    let query = ask("example.com", RecordType::A).bytes();
    let response = [&[0, u8::try_from(query.len()).unwrap()], &query[..2], &[0x81], &query[3..]].concat();
    for bytes in
        [&[0, 0][..], &[0xff, 0xff, 1, 2, 3], b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", &[0, 3, 1, 2, 3], &response]
    {
        let mut stream = stream(&one.names).await;
        stream.write_all(bytes).await.unwrap();
        let mut rest = Vec::new();
        let ended = timeout(Duration::from_secs(5), stream.read_to_end(&mut rest)).await.expect("an end");
        assert!(rest.is_empty() && !matches!(ended, Ok(1..)), "{bytes:02x?}");
    }
    let closed = one.names.close().await;
    assert_eq!((closed.counts.malformed, closed.counts.dropped), (5, 5));
}

#[tokio::test]
async fn streams_end_with_the_execution() {
    let one = one(&["example.com"]);
    let mut stream = stream(&one.names).await;
    let query = ask("example.com", RecordType::A);
    stream.write_all(&framed(&query)).await.unwrap();
    hear_framed(&mut stream, &query).await;
    one.names.close().await;
    let ended = timeout(Duration::from_secs(5), stream.read(&mut [0; 1])).await.expect("an end");
    assert!(matches!(ended, Ok(0) | Err(_)));
}

#[tokio::test]
async fn streams_that_say_nothing_end() {
    let limits = Limits { stream_time: Duration::from_millis(100), queries_burst: 10_000, ..Limits::default() };
    let one = one_with(limits, profile(&["example.com"]));
    for sent in [&[][..], &[0], &[0, 40, 1, 2, 3]] {
        let (mut client, server) = tokio::io::duplex(4096);
        let over_tcp = one.names.over_tcp();
        let task = tokio::spawn(async move { over_tcp.serve(server, CLIENT).await });
        client.write_all(sent).await.unwrap();
        // The client neither sends the rest nor closes.
        timeout(Duration::from_secs(10), task).await.expect("an end").unwrap();
        drop(client);
    }
    // Nor may it ask and never read.
    let (mut client, server) = tokio::io::duplex(64);
    let over_tcp = one.names.over_tcp();
    let task = tokio::spawn(async move { over_tcp.serve(server, CLIENT).await });
    let query = framed(&ask("example.com", RecordType::A));
    let asking = async { while client.write_all(&query).await.is_ok() {} };
    timeout(Duration::from_secs(10), asking).await.expect("the other end closes");
    timeout(Duration::from_secs(10), task).await.expect("an end").unwrap();
}

/// More than the usual buffer of a socket holds (`net.core.rmem_default`: some 270), all sent before anything is read.
#[tokio::test]
async fn a_burst_of_one_execution_is_answered_whole() {
    const BURST: u16 = 500;
    let server = DnsServer::new(Limits::default(), Arc::new(Told::default()));
    for isolated in [true, false] {
        let records = Arc::new(Records::default());
        let mut names = server.open(LEAF, execution("e1", profile(&["example.com"])));
        let sockets = Slots::bind().unwrap().into_sockets();
        let slot = sockets[0].local_addr().unwrap();
        let socket = client(slot).await;
        if rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, 1 << 20).is_err() {
            assert!(std::env::var_os("CI").is_none(), "CAP_NET_ADMIN is missing");
            eprintln!("skipped: CAP_NET_ADMIN is missing");
            return;
        }
        if isolated {
            names.serve_isolated(sockets, &Isolated { attribution: Some(records.clone()), netns: None }).unwrap();
        } else {
            server.serve(sockets, records.clone()).unwrap();
        }
        socket.writable().await.unwrap();
        // On this thread the tasks that read run only while this one waits.
        for id in 0..BURST {
            let query = Ask { id, ..ask("example.com", RecordType::A) };
            records.put(None, socket.local_addr().unwrap(), slot.port(), id, LEAF);
            socket.try_send(&query.bytes()).unwrap();
        }
        let mut heard = 0;
        while let Ok(Ok(_)) = timeout(Duration::from_secs(2), socket.recv(&mut [0; 4096])).await {
            heard += 1;
            if heard == BURST {
                break;
            }
        }
        assert_eq!(heard, BURST, "isolated: {isolated}");
    }
}
