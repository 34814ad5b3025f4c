//! What each connection carried: the kernel's figures of one connection against what its two ends sent and got.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use latchgate::egress::kernel::{Enforcer, KernelConnection, KernelProfile};
use latchgate::egress::{Attribution, LeafId};

use super::actor::Actor;
use super::tree::{LONG, Leaf, Tree};

/// Bytes of the header with which a client says what it is going to do.
const HEADER: u64 = 24;

/// What the two ends of a connection know of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Carried {
    client: SocketAddr,
    sent: u64,
    received: u64,
}

type Book = Mutex<HashMap<(LeafId, u64), Vec<Carried>>>;

/// The proxy's side of one connection: reads what the header announces, answers with as much as it asks for.
fn serve(stream: &mut TcpStream, enforcer: &Enforcer, book: &Book) -> Option<()> {
    let (leaf, number) = (enforcer.leaf_of(stream.as_fd())?, enforcer.connection_of(stream.as_fd()));
    let client = stream.peer_addr().unwrap();
    let client = SocketAddr::new(client.ip().to_canonical(), client.port());
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut header = [0; 24];
    stream.read_exact(&mut header).ok()?;
    let word = |at: usize| u64::from_be_bytes(header[at..at + 8].try_into().unwrap());
    let (tag, sends, wants) = (word(0), word(8), word(16));
    assert_eq!(tag, leaf.0, "attributed to another leaf");
    let got = std::io::copy(&mut stream.take(sends), &mut std::io::sink()).ok()?;
    stream.write_all(&vec![3; usize::try_from(wants).unwrap()]).ok()?;
    let carried = Carried { client, sent: HEADER + got, received: wants };
    // Past the limit a connection has no number, and is served all the same.
    if let Some(number) = number {
        book.lock().unwrap().entry((leaf, number)).or_default().push(carried);
    }
    // The client ends it.
    let _ = stream.read(&mut [0; 1]);
    Some(())
}

/// Ends the threads also when a test panics.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Accepts until `work` is done.
fn proxying(tree: &Tree, enforcer: &Enforcer, book: &Book, work: impl FnOnce()) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = Stop(&stop);
        for listener in [&tree.proxy.v4, &tree.proxy.v6, &tree.proxy.v4, &tree.proxy.v6] {
            listener.set_nonblocking(true).unwrap();
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    match listener.accept() {
                        Ok((mut stream, _)) => {
                            stream.set_nonblocking(false).unwrap();
                            serve(&mut stream, enforcer, book);
                        }
                        Err(_) => std::thread::sleep(Duration::from_micros(200)),
                    }
                }
            });
        }
        work();
    });
}

fn settled(enforcer: &Enforcer, leaf: LeafId) {
    let until = Instant::now() + Duration::from_secs(10);
    while Instant::now() < until && enforcer.counts(leaf).unwrap().open_flows > 0 {
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn as_carried(kernel: &KernelConnection) -> Carried {
    Carried { client: kernel.client, sent: kernel.bytes_sent, received: kernel.bytes_received }
}

const LEAVES: usize = 32;
const EACH: usize = 625;

#[test]
fn each_of_20000_connections_has_the_figures_of_its_ends() {
    let tree = Tree::attached("figures");
    let (enforcer, book) = (tree.enforcer(), Book::default());
    let port = tree.proxy.port;
    let mut clients: Vec<(Leaf, Actor)> = (0..LEAVES)
        .map(|at| {
            let leaf = tree.leaf(&format!("leaf-{at}"));
            enforcer.admit(leaf.id, KernelProfile::ProxyOnly, Duration::from_secs(240)).unwrap();
            let actor = Actor::start_in(&leaf.path);
            (leaf, actor)
        })
        .collect();
    proxying(&tree, enforcer, &book, || {
        for (leaf, client) in &mut clients {
            client.tell(&format!("burst-sized {port} {EACH} {}", leaf.id.0));
        }
        let replies: Vec<String> = clients.iter_mut().map(|(_, client)| client.reply()).collect();
        assert!(replies.iter().all(|reply| *reply == EACH.to_string()), "{replies:?}");
    });
    let mut book = book.into_inner().unwrap();
    let (mut compared, mut ports) = (0, HashMap::<_, u32>::new());
    for (leaf, _) in &clients {
        settled(enforcer, leaf.id);
        let (counts, connections) = enforcer.retire_with_connections(leaf.id).unwrap();
        assert_eq!((connections.lost, connections.records.len()), (0, EACH));
        let sums = connections
            .records
            .iter()
            .fold((0, 0), |(sent, received), record| (sent + record.bytes_sent, received + record.bytes_received));
        assert_eq!(sums, (counts.bytes_sent, counts.bytes_received));
        for kernel in &connections.records {
            let known = book.remove(&(leaf.id, kernel.number)).expect("a connection that the proxy took");
            assert_eq!(known, [as_carried(kernel)], "{kernel:?}");
            assert!(kernel.closed && kernel.established && kernel.ended_ns.is_some(), "{kernel:?}");
            assert!(kernel.ended_ns.unwrap() >= kernel.begun_ns);
            *ports.entry(kernel.client).or_default() += 1;
            compared += 1;
        }
    }
    assert_eq!((compared, book.len()), (LEAVES * EACH, 0));
    let reused = ports.values().filter(|times| **times > 1).count();
    eprintln!("{compared} connections compared; {reused} addresses of clients were used more than once");
}

#[test]
fn a_port_that_is_used_again_is_another_connection() {
    let tree = Tree::attached("reused");
    let leaf = tree.admitted("leaf", KernelProfile::ProxyOnly);
    let (enforcer, book) = (tree.enforcer(), Book::default());
    let mut inside = Actor::start_in(&leaf.path);
    let (proxy, tag) = (format!("127.0.0.1:{}", tree.proxy.port), leaf.id.0);
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    proxying(&tree, enforcer, &book, || {
        assert_eq!(inside.ask(&format!("reuse-port {proxy} {free} 40 {tag}")), "40");
    });
    settled(enforcer, leaf.id);
    let (_, connections) = enforcer.retire_with_connections(leaf.id).unwrap();
    assert_eq!((connections.lost, connections.records.len()), (0, 40));
    let book = book.into_inner().unwrap();
    for (at, kernel) in (0_u64..).zip(&connections.records) {
        assert_eq!((kernel.number, kernel.client.port()), (at, free));
        assert_eq!((kernel.bytes_sent, kernel.bytes_received), (HEADER + at + 1, 2 * at + 1), "{kernel:?}");
        assert_eq!(book[&(leaf.id, at)], [as_carried(kernel)]);
    }
}

#[test]
fn a_connection_that_is_open_says_so_and_one_that_is_killed_says_when() {
    let tree = Tree::attached("open");
    let leaf = tree.admitted("leaf", KernelProfile::ProxyOnly);
    let enforcer = tree.enforcer();
    let mut inside = Actor::start_in(&leaf.path);
    assert_eq!(inside.ask(&format!("hold 127.0.0.1:{}", tree.proxy.port)), "ok");
    assert_eq!(inside.ask("write 100"), "ok");
    let (mut accepted, _) = tree.proxy.v4.accept().unwrap();
    accepted.read_exact(&mut [0; 100]).unwrap();
    let only = || {
        let connections = enforcer.connections(leaf.id).unwrap();
        assert_eq!((connections.lost, connections.records.len()), (0, 1));
        connections.records[0]
    };
    assert_eq!((only().closed, only().ended_ns, only().original), (false, None, None));
    let before = latchgate::egress::kernel::boottime_ns();
    inside.kill();
    let until = Instant::now() + Duration::from_secs(3);
    while only().ended_ns.is_none() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
    // Its end of it is over; the proxy's is not. What is known by now is a lower bound.
    let half = only();
    assert!(half.ended_ns.unwrap() >= before && !half.closed && half.bytes_sent == 100, "{half:?}");
    drop(accepted);
    settled(enforcer, leaf.id);
    let (_, connections) = enforcer.retire_with_connections(leaf.id).unwrap();
    let whole = connections.records[0];
    assert!(whole.closed && whole.ended_ns == half.ended_ns && whole.bytes_sent == 100, "{whole:?}");
    assert!(matches!(enforcer.connections(leaf.id), Err(latchgate::egress::kernel::KernelError::NotAdmitted(_))));
}

#[test]
fn connections_past_the_limit_are_counted_as_lost_and_leave_nothing() {
    let tree = Tree::attached("past");
    let enforcer = tree.enforcer();
    let (leaf, other) = (tree.leaf("leaf"), tree.admitted("other", KernelProfile::ProxyOnly));
    enforcer.admit(leaf.id, KernelProfile::ProxyOnly, 4 * LONG).unwrap();
    let (mut inside, mut beside) = (Actor::start_in(&leaf.path), Actor::start_in(&other.path));
    let book = Book::default();
    proxying(&tree, enforcer, &book, || {
        let proxy = tree.proxy.port;
        assert_eq!(inside.ask(&format!("burst-sized {proxy} 4200 {}", leaf.id.0)), "4200");
        assert_eq!(beside.ask(&format!("burst-sized {proxy} 3 {}", other.id.0)), "3");
    });
    settled(enforcer, leaf.id);
    settled(enforcer, other.id);
    let (counts, connections) = enforcer.retire_with_connections(leaf.id).unwrap();
    assert_eq!((counts.connections, counts.connections_lost), (4_200, 104));
    assert_eq!((connections.lost, connections.records.len()), (104, 4_096));
    let (_, connections) = enforcer.retire_with_connections(other.id).unwrap();
    assert_eq!((connections.lost, connections.records.len()), (0, 3));
    assert_eq!((left_of(leaf.id), left_of(other.id)), (0, 0));
}

/// Records of a leaf's connections in any map of them.
fn left_of(leaf: LeafId) -> usize {
    let maps = aya::maps::loaded_maps().flatten().filter(|map| map.name_as_str() == Some("CONNECTIONS"));
    let maps = maps.filter_map(|map| aya::maps::MapData::from_id(map.id()).ok());
    let own: Vec<_> = maps
        .filter_map(|map| aya::maps::HashMap::<_, [u64; 2], [u64; 12]>::try_from(aya::maps::Map::HashMap(map)).ok())
        .collect();
    assert!(!own.is_empty());
    own.iter().map(|map| map.keys().flatten().filter(|key| key[0] == leaf.0).count()).sum()
}
