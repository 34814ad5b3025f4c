//! Connects that are carried: where they end, what their client is told, what the proxy is told.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use latchgate::egress::kernel::{Enforcer, KernelError, KernelProfile};
use latchgate::egress::{Attribution, Caller, LeafId};

use super::actor::{Actor, canonical};
use super::tree::{LONG, Leaf, Tree, base};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// The next connection that the proxy accepts, as the kernel knows it.
fn accepted(tree: &Tree, v6: bool) -> Option<Caller> {
    let (stream, _) = if v6 { &tree.proxy.v6 } else { &tree.proxy.v4 }.accept().unwrap();
    tree.enforcer().caller(stream.as_fd())
}

fn carried(leaf: &Leaf, to: &str) -> Option<Caller> {
    Some(Caller { leaf: leaf.id, original: Some(canonical(to.parse().unwrap())) })
}

#[test]
fn a_connect_to_what_the_leaf_reaches_is_carried_and_seems_to_go_there() {
    let mut tree = Tree::attached("carry");
    let (leaf, other) =
        (tree.admitted("leaf", KernelProfile::Allowlist), tree.admitted("other", KernelProfile::Allowlist));
    let (mut inside, mut beside) = (Actor::start_in(&leaf.path), Actor::start_in(&other.path));
    let addresses = ["198.18.0.5:443", "[::ffff:198.18.0.5]:443", "[2001:db8::5]:443"];
    for to in addresses {
        assert_eq!(inside.ask(&format!("peer {to}")), "EPERM");
        let hook = if to.starts_with('[') { "connect6" } else { "connect4" };
        let event = tree.event(leaf.id, hook, "not_in_profile");
        let meant = canonical(to.parse().unwrap());
        assert_eq!((event.address, event.port), (Some(meant.ip()), meant.port()));
    }
    for network in [(ip("198.18.0.5"), 32), (ip("2001:db8::5"), 128)] {
        tree.enforcer().reach(leaf.id, network, &[443]).unwrap();
    }
    for to in addresses {
        assert_eq!(inside.ask(&format!("peer {to}")), to);
        assert_eq!(accepted(&tree, to.starts_with("[2001")), carried(&leaf, to), "{to}");
        assert_eq!(beside.ask(&format!("peer {to}")), "EPERM", "what one leaf reaches is not another's");
    }
    for to in ["198.18.0.5:80", "198.18.0.5:0", "198.18.0.4:443", "[2001:db8::5]:80", "[2001:db8::4]:443"] {
        assert_eq!(inside.ask(&format!("peer {to}")), "EPERM", "{to}");
    }
    assert_eq!(inside.ask("fast-open-peer 198.18.0.5:443"), "198.18.0.5:443");
    assert_eq!(accepted(&tree, false), carried(&leaf, "198.18.0.5:443"));
    // Who knows the proxy speaks to it, and is told so.
    for (host, v6) in [("127.0.0.1", false), ("[::ffff:127.0.0.1]", false), ("[::1]", true)] {
        let proxy = format!("{host}:{}", tree.proxy.port);
        assert_eq!(inside.ask(&format!("peer {proxy}")), proxy);
        assert_eq!(accepted(&tree, v6), Some(Caller { leaf: leaf.id, original: None }));
    }
    let counts = tree.enforcer().retire(leaf.id).unwrap();
    assert_eq!((counts.connections, counts.denied.connect4, counts.denied.connect6), (7, 4, 4));
    assert_eq!(inside.ask("peer 198.18.0.5:443"), "EPERM");
    // The leaf's addresses went with it.
    tree.enforcer().admit(leaf.id, KernelProfile::Allowlist, LONG).unwrap();
    assert_eq!(inside.ask("peer 198.18.0.5:443"), "EPERM");
    tree.event(leaf.id, "connect4", "not_in_profile");
}

#[test]
fn what_listens_at_a_carried_address_is_not_reached() {
    let tree = Tree::attached("real");
    let leaf = tree.admitted("leaf", KernelProfile::Allowlist);
    let (mut inside, mut outside) = (Actor::start_in(&leaf.path), Actor::start());
    let real = TcpListener::bind("127.0.0.2:0").unwrap();
    let to = real.local_addr().unwrap();
    assert_eq!(outside.ask(&format!("peer {to}")), to.to_string());
    real.accept().unwrap();
    tree.enforcer().reach(leaf.id, (to.ip(), 32), &[to.port()]).unwrap();
    assert_eq!(inside.ask(&format!("peer {to}")), to.to_string());
    assert_eq!(accepted(&tree, false), carried(&leaf, &to.to_string()));
    real.set_nonblocking(true).unwrap();
    assert!(real.accept().is_err());
    // One that comes from no leaf is nobody's.
    assert_eq!(outside.ask(&format!("peer 127.0.0.1:{}", tree.proxy.port)), format!("127.0.0.1:{}", tree.proxy.port));
    assert_eq!(accepted(&tree, false), None);
}

#[test]
fn overlapping_networks_add_up() {
    let tree = Tree::attached("networks");
    let leaf = tree.admitted("leaf", KernelProfile::Allowlist);
    let mut inside = Actor::start_in(&leaf.path);
    for (network, prefix, ports) in [
        ("10.0.0.0", 8, [443].as_slice()),
        ("10.1.0.0", 16, &[22]),
        // Host bits do not count.
        ("10.1.2.3", 24, &[5432, 5433]),
        ("10.200.0.1", 32, &[]),
        ("::", 0, &[8_080]),
        ("2001:db8:1::", 48, &[8_443]),
    ] {
        tree.enforcer().reach(leaf.id, (ip(network), prefix), ports).unwrap();
    }
    for (to, goes) in [
        ("10.9.9.9:443", true),
        ("10.9.9.9:22", false),
        ("10.1.9.9:443", true),
        ("10.1.9.9:22", true),
        ("10.1.9.9:5432", false),
        ("10.1.2.9:443", true),
        ("10.1.2.9:22", true),
        ("10.1.2.9:5433", true),
        ("10.1.2.9:5434", false),
        ("10.200.0.1:1", true),
        ("10.200.0.1:65535", true),
        // All ports are 1 to 65535.
        ("10.200.0.1:0", false),
        ("10.200.0.2:1", false),
        ("11.0.0.1:443", false),
        ("[2001:db8:1::1]:8443", true),
        ("[2001:db8:1::1]:8080", true),
        ("[2001:db8:2::1]:8443", false),
        ("[2001:db8:2::1]:8080", true),
        // Every IPv6 address is not every IPv4 address.
        ("10.9.9.9:8080", false),
        ("[::ffff:10.9.9.9]:8080", false),
        ("[::ffff:10.9.9.9]:443", true),
    ] {
        let expected = if goes { to } else { "EPERM" };
        assert_eq!(inside.ask(&format!("peer {to}")), expected, "{to}");
    }
}

#[test]
fn what_a_leaf_may_reach_is_bounded_and_all_or_nothing() {
    let tree = Tree::attached("reach");
    let enforcer = tree.enforcer();
    let leaf = tree.leaf("leaf");
    let one = (ip("198.18.0.1"), 32);
    assert!(matches!(enforcer.reach(leaf.id, one, &[443]), Err(KernelError::NotAdmitted(_))));
    for profile in [KernelProfile::None, KernelProfile::ProxyOnly] {
        enforcer.admit(leaf.id, profile, LONG).unwrap();
        assert!(matches!(enforcer.reach(leaf.id, one, &[443]), Err(KernelError::NotAllowlist(_))));
        enforcer.retire(leaf.id).unwrap();
    }
    enforcer.admit(leaf.id, KernelProfile::Allowlist, LONG).unwrap();
    assert!(matches!(enforcer.reach(leaf.id, (ip("198.18.0.1"), 33), &[]), Err(KernelError::Network(..))));
    assert!(matches!(enforcer.reach(leaf.id, one, &[443, 0]), Err(KernelError::PortZero)));
    let numbered = |at: u16| (IpAddr::from([10, 77, (at >> 8) as u8, (at & 255) as u8]), 32);
    for at in 0..4_095 {
        enforcer.reach(leaf.id, numbered(at), &[443]).unwrap();
    }
    let mut inside = Actor::start_in(&leaf.path);
    assert!(matches!(enforcer.reach(leaf.id, one, &[443, 80]), Err(KernelError::ReachFull(_))));
    assert_eq!(inside.ask("peer 198.18.0.1:443"), "EPERM", "half of it was inserted");
    enforcer.reach(leaf.id, one, &[443]).unwrap();
    assert_eq!(inside.ask("peer 198.18.0.1:443"), "198.18.0.1:443");
    // Again the same costs nothing.
    enforcer.reach(leaf.id, one, &[443]).unwrap();
    assert!(matches!(enforcer.reach(leaf.id, one, &[80]), Err(KernelError::ReachFull(_))));
    assert_eq!(entries_of(leaf.id), 4_096);
    let other = tree.admitted("other", KernelProfile::Allowlist);
    enforcer.reach(other.id, one, &[443]).unwrap();
    enforcer.retire(leaf.id).unwrap();
    assert_eq!((entries_of(leaf.id), entries_of(other.id)), (0, 1));
}

/// What a leaf has in any map of reach.
fn entries_of(leaf: LeafId) -> usize {
    let maps = aya::maps::loaded_maps().flatten().filter(|map| map.name_as_str() == Some("REACH"));
    let maps = maps.filter_map(|map| aya::maps::MapData::from_id(map.id()).ok());
    let own: Vec<_> = maps
        .filter_map(|map| aya::maps::lpm_trie::LpmTrie::<_, [u32; 8], u64>::try_from(aya::maps::Map::LpmTrie(map)).ok())
        .collect();
    assert!(!own.is_empty());
    own.iter().map(|map| map.iter().flatten().filter(|(_, found)| *found == leaf.0).count()).sum()
}

#[test]
fn a_socket_that_is_connected_again_is_not_taken_for_carried() {
    let tree = Tree::attached("again");
    let leaf = tree.admitted("leaf", KernelProfile::Allowlist);
    tree.enforcer().reach(leaf.id, (ip("198.18.0.0"), 24), &[]).unwrap();
    let mut inside = Actor::start_in(&leaf.path);
    let proxy = format!("127.0.0.1:{}", tree.proxy.port);
    for (first, second) in
        [("198.18.0.1:443", proxy.as_str()), (&proxy, "198.18.0.1:443"), ("198.18.0.1:1", "198.18.0.2:2")]
    {
        assert_eq!(inside.ask(&format!("reconnect {first} {second}")), second);
        for to in [first, second] {
            let expected =
                if to == proxy { Some(Caller { leaf: leaf.id, original: None }) } else { carried(&leaf, to) };
            assert_eq!(accepted(&tree, false), expected, "{first} {second}: {to}");
        }
    }
}

#[test]
fn only_an_allowlist_is_carried() {
    let mut tree = Tree::resolving("profiles");
    let outside = TcpListener::bind("127.0.0.2:0").unwrap();
    for (name, profile, reason) in
        [("none", KernelProfile::None, "profile_none"), ("proxy", KernelProfile::ProxyOnly, "not_the_proxy")]
    {
        let leaf = tree.admitted(name, profile);
        let mut inside = Actor::start_in(&leaf.path);
        for to in ["127.0.0.1:53", "9.9.9.9:53", &outside.local_addr().unwrap().to_string()] {
            assert_eq!(inside.ask(&format!("peer {to}")), "EPERM", "{to}");
            tree.event(leaf.id, "connect4", reason);
        }
    }
}

#[test]
fn dns_over_tcp_is_carried_where_there_is_a_resolver() {
    let tree = Tree::resolving("tcp-dns");
    let leaf = tree.admitted("leaf", KernelProfile::Allowlist);
    let mut inside = Actor::start_in(&leaf.path);
    for to in ["9.9.9.9:53", "127.0.0.53:53", "[2620:fe::fe]:53", "[::ffff:9.9.9.9]:53"] {
        assert_eq!(inside.ask(&format!("peer {to}")), to);
        assert_eq!(accepted(&tree, to.starts_with("[2620")), carried(&leaf, to), "{to}");
    }
    for to in ["9.9.9.9:853", "9.9.9.9:5353", &format!("127.0.0.1:{}", tree.resolver.as_ref().unwrap().base)] {
        assert_eq!(inside.ask(&format!("peer {to}")), "EPERM");
    }
    let mut without = Tree::attached("tcp-no-dns");
    let leaf = without.admitted("leaf", KernelProfile::Allowlist);
    let mut inside = Actor::start_in(&leaf.path);
    assert_eq!(inside.ask("peer 9.9.9.9:53"), "EPERM");
    without.event(leaf.id, "connect4", "not_in_profile");
}

#[test]
fn a_carried_connection_ends_with_its_entry() {
    let mut tree = Tree::attached("carried-end");
    let leaf = tree.admitted("leaf", KernelProfile::Allowlist);
    tree.enforcer().reach(leaf.id, (ip("198.18.0.1"), 32), &[]).unwrap();
    let mut inside = Actor::start_in(&leaf.path);
    assert_eq!(inside.ask("hold 198.18.0.1:443"), "ok");
    assert_eq!(inside.ask("peer-held"), "198.18.0.1:443");
    let (mut stream, _) = tree.proxy.v4.accept().unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert_eq!(inside.ask("write 3"), "ok");
    stream.read_exact(&mut [0; 3]).unwrap();
    tree.enforcer().retire(leaf.id).unwrap();
    assert_eq!(inside.ask("write 3"), "ok");
    assert!(stream.read_exact(&mut [0; 3]).is_err());
    tree.event(leaf.id, "egress", "no_entry");
}

#[test]
fn a_namespace_of_its_own_is_carried_in_the_same_way() {
    let tree = Tree::attached("isolated-carry");
    let leaf = tree.admitted("leaf", KernelProfile::Allowlist);
    tree.enforcer().reach(leaf.id, (ip("198.18.0.1"), 32), &[]).unwrap();
    tree.enforcer().reach(leaf.id, (ip("2001:db8::1"), 128), &[]).unwrap();
    let mut inside = Actor::start();
    assert_eq!(inside.ask("isolate"), "ok");
    inside.enter(&leaf.path);
    let port = tree.proxy.port;
    let (v4, v6) = inside.in_its_network(move || {
        (TcpListener::bind(("127.0.0.1", port)).unwrap(), TcpListener::bind(("::1", port)).unwrap())
    });
    for (to, listener) in [("198.18.0.1:443", &v4), ("[::ffff:198.18.0.1]:443", &v4), ("[2001:db8::1]:443", &v6)] {
        assert_eq!(inside.ask(&format!("peer {to}")), to);
        let (stream, _) = listener.accept().unwrap();
        assert_eq!(tree.enforcer().caller(stream.as_fd()), carried(&leaf, to));
    }
    assert_eq!(inside.ask("peer 198.18.0.2:443"), "EPERM");
}

const LEAVES: usize = 50;
const EACH: usize = 400;

#[derive(Default)]
struct Seen {
    right: AtomicU64,
    direct: AtomicU64,
    outsiders: AtomicU64,
    wrong: Mutex<Vec<String>>,
}

/// Compares what the kernel says of a connection with what its client says.
fn judge(stream: &mut TcpStream, enforcer: &Enforcer, proxy: SocketAddr, seen: &Seen) {
    let caller = enforcer.caller(stream.as_fd());
    let mut length = [0; 1];
    let mut said = Vec::new();
    if stream.read_exact(&mut length).is_err() || stream.take(length[0].into()).read_to_end(&mut said).is_err() {
        return;
    }
    let _ = stream.write_all(&[1]);
    let said = String::from_utf8(said).unwrap();
    let known = match caller {
        None => format!("0 {proxy}"),
        Some(Caller { leaf, original }) => format!("{} {}", leaf.0, original.unwrap_or(proxy)),
    };
    if known != said {
        return seen.wrong.lock().unwrap().push(format!("{known} is not {said}"));
    }
    let counter = match caller {
        None => &seen.outsiders,
        Some(Caller { original: None, .. }) => &seen.direct,
        Some(_) => &seen.right,
    };
    counter.fetch_add(1, Ordering::Relaxed);
}

#[test]
fn each_of_20000_carried_connections_has_its_leaf_and_its_destination() {
    let tree = Tree::attached("carry-stress");
    let enforcer = tree.enforcer();
    let proxy: SocketAddr = tree.proxy.addresses().v4.into();
    let (seen, stop) = (Seen::default(), AtomicBool::new(false));
    let mut clients: HashMap<LeafId, Actor> = (0..LEAVES)
        .map(|at| {
            let path = tree.actions.join(format!("leaf-{at}"));
            std::fs::create_dir(&path).unwrap();
            let id = LeafId(std::fs::metadata(&path).unwrap().ino());
            enforcer.admit(id, KernelProfile::Allowlist, Duration::from_secs(180)).unwrap();
            enforcer.reach(id, (ip("198.18.7.0"), 24), &[]).unwrap();
            enforcer.reach(id, (ip("2001:db8::"), 32), &(1_000..1_050).collect::<Vec<_>>()).unwrap();
            (id, Actor::start_in(&path))
        })
        .collect();
    let mut outsider = Actor::start_in(&base().join("outside"));
    let (all, outside) = (u64::try_from(LEAVES * EACH).unwrap(), 2_000);
    let direct = all / 5;
    let started = Instant::now();
    std::thread::scope(|scope| {
        for listener in [&tree.proxy.v4, &tree.proxy.v6] {
            listener.set_nonblocking(true).unwrap();
            let (seen, stop) = (&seen, &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    match listener.accept() {
                        Ok((mut stream, _)) => {
                            stream.set_nonblocking(false).unwrap();
                            judge(&mut stream, enforcer, proxy, seen);
                        }
                        Err(_) => std::thread::sleep(Duration::from_micros(200)),
                    }
                }
            });
        }
        outsider.tell(&format!("burst-carried {} {outside} 0", proxy.port()));
        for (id, client) in &mut clients {
            client.tell(&format!("burst-carried {} {EACH} {}", proxy.port(), id.0));
        }
        let replies: Vec<String> = clients.values_mut().map(Actor::reply).collect();
        let reply = outsider.reply();
        let until = Instant::now() + Duration::from_secs(20);
        let done = || {
            let counters = [&seen.right, &seen.direct, &seen.outsiders];
            let counted: u64 = counters.into_iter().map(|counter| counter.load(Ordering::Relaxed)).sum();
            counted + u64::try_from(seen.wrong.lock().unwrap().len()).unwrap()
        };
        while Instant::now() < until && done() < all + outside {
            std::thread::sleep(Duration::from_millis(10));
        }
        stop.store(true, Ordering::Relaxed);
        assert!(replies.iter().all(|reply| *reply == EACH.to_string()), "{replies:?}");
        assert_eq!(reply, outside.to_string());
    });
    eprintln!("{all} carried connections from {LEAVES} leaves in {:?}", started.elapsed());
    assert_eq!(seen.wrong.into_inner().unwrap(), Vec::<String>::new());
    assert_eq!(seen.right.into_inner(), all - direct);
    assert_eq!((seen.direct.into_inner(), seen.outsiders.into_inner()), (direct, outside));
    for id in clients.keys() {
        let counts = enforcer.retire(*id).unwrap();
        assert_eq!((counts.connections, counts.denied.total()), (u64::try_from(EACH).unwrap(), 0));
    }
    drop(clients);
    assert_eq!(super::attribution::records_left(proxy.port()), 0);
}
