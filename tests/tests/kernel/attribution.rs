//! Who is calling the proxy, and how many bytes went which way.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use latchgate::egress::kernel::{Enforcer, KernelProfile};
use latchgate::egress::{Attribution, LeafId};

use super::actor::Actor;
use super::tree::{Tree, base};

const LEAVES: usize = 32;
const EACH: usize = 625;

#[derive(Default)]
struct Seen {
    right: AtomicU64,
    wrong: AtomicU64,
    outsiders: AtomicU64,
    outsiders_taken_for_a_leaf: AtomicU64,
}

/// Compares what the kernel says of a connection with what its client says, which an outsider says 0.
fn serve(stream: &mut TcpStream, enforcer: &Enforcer, seen: &Seen) {
    let leaf = enforcer.leaf_of(stream.as_fd());
    let mut tag = [0; 8];
    if stream.read_exact(&mut tag).is_err() {
        return;
    }
    let _ = stream.write_all(&[1]);
    let counter = match (u64::from_be_bytes(tag), leaf) {
        (0, None) => &seen.outsiders,
        (0, Some(_)) => &seen.outsiders_taken_for_a_leaf,
        (said, Some(LeafId(found))) if said == found => &seen.right,
        _ => &seen.wrong,
    };
    counter.fetch_add(1, Ordering::Relaxed);
}

#[test]
fn each_of_20000_connections_is_attributed_to_its_leaf() {
    let mut tree = Tree::attached("stress");
    let enforcer = Arc::new(tree.enforcer.take().unwrap());
    let (seen, stop) = (Arc::new(Seen::default()), Arc::new(AtomicBool::new(false)));
    let port = tree.proxy.port;
    let mut servers = Vec::new();
    for listener in [&tree.proxy.v4, &tree.proxy.v6] {
        listener.set_nonblocking(true).unwrap();
        let listener: TcpListener = listener.try_clone().unwrap();
        let (enforcer, seen, stop) = (Arc::clone(&enforcer), Arc::clone(&seen), Arc::clone(&stop));
        servers.push(std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((mut stream, _)) => {
                        stream.set_nonblocking(false).unwrap();
                        serve(&mut stream, &enforcer, &seen);
                    }
                    Err(_) => std::thread::sleep(Duration::from_micros(200)),
                }
            }
        }));
    }
    let mut outsider = Actor::start_in(&base().join("outside"));
    let mut clients: Vec<(LeafId, Actor)> = (0..LEAVES)
        .map(|at| {
            let path = tree.actions.join(format!("leaf-{at}"));
            std::fs::create_dir(&path).unwrap();
            let id = LeafId(std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(&path).unwrap()));
            enforcer.admit(id, KernelProfile::ProxyOnly, Duration::from_secs(120)).unwrap();
            (id, Actor::start_in(&path))
        })
        .collect();
    let started = Instant::now();
    outsider.tell(&format!("burst {port} 2000 0"));
    for (id, client) in &mut clients {
        client.tell(&format!("burst {port} {EACH} {}", id.0));
    }
    for (_, client) in &mut clients {
        assert_eq!(client.reply(), EACH.to_string());
    }
    assert_eq!(outsider.reply(), "2000");
    let all = u64::try_from(LEAVES * EACH).unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    let done = || seen.right.load(Ordering::Relaxed) + seen.wrong.load(Ordering::Relaxed);
    while Instant::now() < until && done() + seen.outsiders.load(Ordering::Relaxed) < all + 2_000 {
        std::thread::sleep(Duration::from_millis(10));
    }
    stop.store(true, Ordering::Relaxed);
    for server in servers {
        server.join().unwrap();
    }
    eprintln!("{all} connections from {LEAVES} leaves in {:?}", started.elapsed());
    assert_eq!(seen.wrong.load(Ordering::Relaxed), 0);
    assert_eq!(seen.right.load(Ordering::Relaxed), all);
    assert_eq!(seen.outsiders_taken_for_a_leaf.load(Ordering::Relaxed), 0);
    assert_eq!(seen.outsiders.load(Ordering::Relaxed), 2_000);
    for (id, _) in &clients {
        let counts = enforcer.retire(*id).unwrap();
        assert_eq!(counts.connections, u64::try_from(EACH).unwrap());
        assert_eq!(counts.denied.total(), 0);
    }
    drop(clients);
    assert_eq!(records_left(tree.proxy.port), 0);
    tree.enforcer = Arc::into_inner(enforcer);
}

/// Records of flows to `port` that nobody took, in any map of flows.
pub fn records_left(port: u16) -> usize {
    let maps = aya::maps::loaded_maps().flatten().filter(|map| map.name_as_str() == Some("FLOWS"));
    let maps = maps.filter_map(|map| aya::maps::MapData::from_id(map.id()).ok());
    // Another gate of this machine may have maps of another layout.
    let own: Vec<_> = maps
        .filter_map(|map| aya::maps::HashMap::<_, [u32; 12], [u32; 22]>::try_from(aya::maps::Map::HashMap(map)).ok())
        .collect();
    assert!(!own.is_empty());
    // The last word of the key is the port of the server.
    own.iter().map(|map| map.keys().flatten().filter(|key| key[11] == u32::from(port)).count()).sum()
}

/// Serves `count` exchanges; gives back how much each client is said to have sent and got, headers included.
fn exchange(listener: &TcpListener) -> (u64, u64) {
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut header = [0; 17];
    stream.read_exact(&mut header).unwrap();
    let number = |from: usize| u64::from_be_bytes(header[from..from + 8].try_into().unwrap());
    let (incoming, outgoing) = (number(1), number(9));
    let got = std::io::copy(&mut (&mut stream).take(incoming), &mut std::io::sink()).unwrap();
    assert_eq!(got, incoming);
    stream.write_all(&vec![2; usize::try_from(outgoing).unwrap()]).unwrap();
    if header[0] == 0 {
        // The client ends it: by a FIN, or a reset.
        let _ = stream.read(&mut [0; 1]);
    }
    if header[0] == 2 {
        // Longer than a delayed acknowledgement: the client's socket is gone before this end's FIN comes.
        let _ = stream.read(&mut [0; 1]);
        std::thread::sleep(Duration::from_millis(150));
    }
    (got + 17, outgoing)
}

#[test]
fn payload_is_counted_to_the_byte_however_a_connection_ends() {
    let tree = Tree::attached("bytes");
    let port = tree.proxy.port;
    let sizes = [(0, 0), (1, 0), (0, 1), (1, 1), (1_000, 70_000), (300_000, 3), (1_000_000, 2_000_000)];
    let mut totals = HashMap::new();
    for mode in ["half-close", "server-first", "client-first", "client-alone", "reset"] {
        let leaf = tree.admitted(mode, KernelProfile::ProxyOnly);
        let mut client = Actor::start_in(&leaf.path);
        let (mut sent, mut received) = (0, 0);
        // A reset leaves no time for an acknowledgement of its own: the answer has to carry it.
        let sizes = sizes.into_iter().filter(|(_, want)| mode != "reset" || *want > 0);
        for (at, (send, want)) in sizes.enumerate() {
            let (host, listener) = match at % 3 {
                0 => ("127.0.0.1", &tree.proxy.v4),
                1 => ("[::1]", &tree.proxy.v6),
                _ => ("[::ffff:127.0.0.1]", &tree.proxy.v4),
            };
            client.tell(&format!("transfer {host}:{port} {mode} {send} {want}"));
            let (up, down) = exchange(listener);
            assert_eq!(client.reply(), "ok");
            sent += up;
            received += down;
        }
        totals.insert(mode, (leaf, sent, received));
    }
    for (mode, (leaf, sent, received)) in totals {
        let until = Instant::now() + Duration::from_secs(5);
        while Instant::now() < until && tree.enforcer().counts(leaf.id).unwrap().open_flows > 0 {
            std::thread::sleep(Duration::from_millis(10));
        }
        let counts = tree.enforcer().retire(leaf.id).unwrap();
        assert_eq!(counts.open_flows, 0, "{mode}");
        assert_eq!((counts.bytes_sent, counts.bytes_received), (sent, received), "{mode}");
        assert_eq!(counts.connections, if mode == "reset" { 5 } else { 7 }, "{mode}");
        assert!(counts.wire_bytes_out > sent && counts.wire_bytes_in > received, "{mode}");
    }
}
