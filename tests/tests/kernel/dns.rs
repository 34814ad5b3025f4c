//! DNS from a leaf: to whatever server it was sent, it comes to the resolver, which knows who asked.

use std::net::{SocketAddr, UdpSocket};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use latchgate::egress::kernel::{Enforcer, KernelProfile};
use latchgate::egress::{Asker, DatagramAttribution, DatagramKey, LeafId};

use super::actor::{Actor, canonical};
use super::tree::{LONG, Leaf, Resolver, Tree, base};

/// Reads one query and who sent it.
fn read(socket: &UdpSocket, enforcer: &Enforcer, netns: Option<u64>) -> Option<(SocketAddr, [u8; 12], Option<Asker>)> {
    let mut message = [0; 12];
    let (_, source) = socket.recv_from(&mut message).ok()?;
    let slot_port = socket.local_addr().unwrap().port();
    let id = u16::from_be_bytes([message[0], message[1]]);
    Some((source, message, enforcer.asker(&DatagramKey { netns, source, slot_port, id })))
}

/// Says in the answer who asked whom; who is nobody gets none.
fn answer(socket: &UdpSocket, source: SocketAddr, query: [u8; 12], asker: Asker) {
    let mut answer = query.to_vec();
    answer.extend(format!("{} {}", asker.leaf.0, asker.server).bytes());
    socket.send_to(&answer, source).unwrap();
}

/// Runs `work` while the resolver answers; gives back how many queries were nobody's.
fn answering(tree: &Tree, work: impl FnOnce()) -> u64 {
    let resolver = tree.resolver.as_ref().unwrap();
    answering_at(resolver, tree.enforcer(), None, work)
}

fn answering_at(resolver: &Resolver, enforcer: &Enforcer, netns: Option<u64>, work: impl FnOnce()) -> u64 {
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let (stop, nobodys) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        // Also when `work` panics.
        let _stop = Stop(&stop);
        for socket in resolver.sockets() {
            socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            let (stop, nobodys) = (&stop, &nobodys);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    match read(socket, enforcer, netns) {
                        Some((source, query, Some(asker))) => answer(socket, source, query, asker),
                        Some((_, _, None)) => _ = nobodys.fetch_add(1, Ordering::Relaxed),
                        None => {}
                    }
                }
            });
        }
        work();
    });
    nobodys.into_inner()
}

/// The next query at a slot of the resolver, which does not answer.
fn taken(tree: &Tree, slot: usize) -> Option<Asker> {
    let socket = &tree.resolver.as_ref().unwrap().v4[slot];
    socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    read(socket, tree.enforcer(), None).expect("a query").2
}

fn said(leaf: &Leaf, server: &str) -> String {
    format!("{server} {} {}", leaf.id.0, canonical(server.parse().unwrap()))
}

#[test]
fn whatever_server_is_asked_the_resolver_answers_in_its_name() {
    let tree = Tree::resolving("servers");
    let leaf = tree.admitted("leaf", KernelProfile::Allowlist);
    let mut inside = Actor::start_in(&leaf.path);
    let base = tree.resolver.as_ref().unwrap().base;
    let nobodys = answering(&tree, || {
        for (from, servers) in [
            ("0.0.0.0:0", ["9.9.9.9:53", "127.0.0.53:53", "127.0.0.1:53", "10.0.0.1:53"]),
            ("127.0.0.5:0", ["9.9.9.9:53", "127.0.0.53:53", "127.0.0.1:53", "10.0.0.1:53"]),
            ("[::]:0", ["[2620:fe::fe]:53", "[::ffff:9.9.9.9]:53", "[::1]:53", "[::ffff:127.0.0.1]:53"]),
        ] {
            inside.ask(&format!("udp-bind {from} alone"));
            for (id, server) in servers.into_iter().enumerate() {
                for _ in 0..2 {
                    assert_eq!(inside.ask(&format!("udp-ask {server} {id}")), said(&leaf, server));
                }
            }
            for server in servers {
                inside.ask(&format!("udp-bind {from} alone"));
                assert_eq!(inside.ask(&format!("udp-join {server}")), server);
                assert_eq!(inside.ask("udp-ask - 65535"), said(&leaf, server));
            }
        }
        // An IPv6 socket that is connected and also sends elsewhere.
        inside.ask("udp-bind [::]:0 alone");
        assert_eq!(inside.ask("udp-join [::ffff:9.9.9.9]:53"), "[::ffff:9.9.9.9]:53");
        for _ in 0..3 {
            assert_eq!(inside.ask("udp-ask - 7"), said(&leaf, "[::ffff:9.9.9.9]:53"));
        }
        // The kernel reads the unspecified address as loopback, and that is who answers.
        inside.ask("udp-bind 0.0.0.0:0 alone");
        assert_eq!(inside.ask("udp-ask 0.0.0.0:53 1"), said(&leaf, "127.0.0.1:53"));
        inside.ask("udp-bind [::]:0 alone");
        assert_eq!(inside.ask("udp-ask [::]:53 1"), said(&leaf, "[::1]:53"));
        // From outside a leaf the same socket is reached, and nobody asked.
        let mut outside = Actor::start();
        outside.ask("udp-bind 0.0.0.0:0 alone");
        assert_eq!(outside.ask(&format!("udp-ask 127.0.0.1:{base} 1")), "timeout");
    });
    assert_eq!(nobodys, 1);
    let counts = tree.enforcer().retire(leaf.id).unwrap();
    assert_eq!(counts.denied.total(), 0);
}

#[test]
fn nothing_else_leaves_as_a_datagram() {
    let mut tree = Tree::resolving("datagrams");
    let leaf = tree.admitted("leaf", KernelProfile::Allowlist);
    let (mut inside, mut outside) = (Actor::start_in(&leaf.path), Actor::start());
    let base = tree.resolver.as_ref().unwrap().base;
    let other = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    // The resolver's own ports too: they stand for servers that this socket has not asked.
    for to in [
        "127.0.0.1:443".to_owned(),
        "[::1]:443".to_owned(),
        "[::ffff:127.0.0.1]:443".to_owned(),
        "127.0.0.1:5353".to_owned(),
        other.to_string(),
        format!("127.0.0.1:{base}"),
        format!("127.0.0.1:{}", base + 7),
        format!("127.0.0.1:{}", tree.proxy.port),
        format!("[::1]:{base}"),
        format!("[::ffff:127.0.0.1]:{base}"),
    ] {
        for (attempt, hook4, hook6) in [("sendto", "sendmsg4", "sendmsg6"), ("udp-connect", "connect4", "connect6")] {
            assert_eq!(inside.ask(&format!("{attempt} {to}")), "EPERM", "{attempt} {to}");
            // A mapped address goes by the IPv4 hook when it is sent to, by the IPv6 one when it is connected to.
            let is_v4 = !to.starts_with('[') || (attempt == "sendto" && to.contains("ffff"));
            tree.event(leaf.id, if is_v4 { hook4 } else { hook6 }, "datagram");
            assert_eq!(outside.ask(&format!("{attempt} {to}")), "ok", "{attempt} {to}");
        }
    }
    // Shorter than a DNS header: only the packet filter sees its length.
    inside.ask("udp-bind 0.0.0.0:0 alone");
    assert_eq!(inside.ask("udp-send 9.9.9.9:53 11"), "EPERM");
    tree.event(leaf.id, "egress", "malformed");
    assert_eq!(inside.ask("udp-send 9.9.9.9:53 12"), "ok");
    // Having asked one, the socket may use that slot and no other.
    assert_eq!(inside.ask(&format!("udp-send 127.0.0.1:{base} 12")), "ok");
    assert_eq!(inside.ask(&format!("udp-send 127.0.0.1:{} 12", base + 1)), "EPERM");
}

#[test]
fn profiles_without_dns_send_no_datagram() {
    let mut tree = Tree::resolving("no-dns");
    for (name, profile, reason) in
        [("none", KernelProfile::None, "profile_none"), ("proxy", KernelProfile::ProxyOnly, "datagram")]
    {
        let leaf = tree.admitted(name, profile);
        let mut inside = Actor::start_in(&leaf.path);
        for (attempt, hook) in [
            ("sendto 9.9.9.9:53", "sendmsg4"),
            ("sendto [2620:fe::fe]:53", "sendmsg6"),
            ("udp-connect 9.9.9.9:53", "connect4"),
            ("udp-connect [2620:fe::fe]:53", "connect6"),
        ] {
            assert_eq!(inside.ask(attempt), "EPERM", "{attempt}");
            tree.event(leaf.id, hook, reason);
        }
    }
    let mut tree = Tree::attached("no-resolver");
    let leaf = tree.admitted("leaf", KernelProfile::Allowlist);
    let mut inside = Actor::start_in(&leaf.path);
    for (attempt, hook) in [("sendto 127.0.0.1:53", "sendmsg4"), ("udp-connect [::1]:53", "connect6")] {
        assert_eq!(inside.ask(attempt), "EPERM", "{attempt}");
        tree.event(leaf.id, hook, "datagram");
    }
}

#[test]
fn a_socket_asks_eight_servers_and_no_ninth() {
    let mut tree = Tree::resolving("slots");
    let leaf = tree.admitted("leaf", KernelProfile::Allowlist);
    let mut inside = Actor::start_in(&leaf.path);
    answering(&tree, || {
        inside.ask("udp-bind [::]:0 alone");
        // Both families share the slots of a socket.
        let servers: Vec<String> = (1..=8)
            .map(|at| if at % 2 == 0 { format!("[2620:fe::{at}]:53") } else { format!("[::ffff:9.9.9.{at}]:53") })
            .collect();
        for _ in 0..2 {
            for server in &servers {
                assert_eq!(inside.ask(&format!("udp-ask {server} 1")), said(&leaf, server));
            }
        }
        assert_eq!(inside.ask("udp-query [::ffff:9.9.9.9]:53 1"), "EPERM");
        assert_eq!(inside.ask("udp-join [2620:fe::fe]:53"), "EPERM");
        for server in &servers {
            assert_eq!(inside.ask(&format!("udp-ask {server} 1")), said(&leaf, server));
        }
        inside.ask("udp-bind [::]:0 alone");
        assert_eq!(inside.ask("udp-ask [::ffff:9.9.9.9]:53 1"), said(&leaf, "[::ffff:9.9.9.9]:53"));
    });
    tree.event(leaf.id, "sendmsg4", "too_many_servers");
    tree.event(leaf.id, "connect6", "too_many_servers");
}

#[test]
fn fewer_slots_are_kept_to() {
    let mut tree = Tree::empty("few-slots");
    tree.resolver = Some(Resolver::bind());
    let mut config = tree.config();
    let resolver = config.resolver.as_mut().unwrap();
    (resolver.slots, resolver.v6_base) = (2, None);
    let enforcer = Enforcer::start(config).unwrap();
    tree.events = Some(enforcer.events());
    tree.enforcer = Some(enforcer);
    let leaf = tree.admitted("leaf", KernelProfile::Allowlist);
    let mut inside = Actor::start_in(&leaf.path);
    inside.ask("udp-bind [::]:0 alone");
    assert_eq!(inside.ask("udp-query [::ffff:9.9.9.1]:53 1"), "ok");
    assert_eq!(inside.ask("udp-query [::ffff:9.9.9.2]:53 1"), "ok");
    assert_eq!(inside.ask("udp-query [::ffff:9.9.9.3]:53 1"), "EPERM");
    tree.event(leaf.id, "sendmsg4", "too_many_servers");
    assert_eq!(inside.ask("udp-query [2620:fe::fe]:53 1"), "EPERM");
    tree.event(leaf.id, "sendmsg6", "datagram");
}

#[test]
fn a_leaf_has_so_many_queries_under_way_and_leaves_room_for_others() {
    let mut tree = Tree::resolving("queries");
    let (leaf, other) =
        (tree.admitted("leaf", KernelProfile::Allowlist), tree.admitted("other", KernelProfile::Allowlist));
    let (mut inside, mut beside) = (Actor::start_in(&leaf.path), Actor::start_in(&other.path));
    inside.ask("udp-bind 0.0.0.0:0 alone");
    for id in 0..256 {
        assert_eq!(inside.ask(&format!("udp-query 9.9.9.9:53 {id}")), "ok", "{id}");
    }
    assert_eq!(inside.ask("udp-query 9.9.9.9:53 256"), "EPERM");
    tree.event(leaf.id, "egress", "too_many_queries");
    beside.ask("udp-bind 0.0.0.0:0 alone");
    assert_eq!(beside.ask("udp-query 9.9.9.9:53 0"), "ok");
    let server: SocketAddr = "9.9.9.9:53".parse().unwrap();
    for _ in 0..256 {
        assert_eq!(taken(&tree, 0), Some(Asker { leaf: leaf.id, server }));
    }
    assert_eq!(taken(&tree, 0), Some(Asker { leaf: other.id, server }));
    assert_eq!(inside.ask("udp-query 9.9.9.9:53 256"), "ok");
    assert_eq!(taken(&tree, 0), Some(Asker { leaf: leaf.id, server }));
}

#[test]
fn a_query_that_the_resolver_never_reads_does_not_count_for_ever() {
    let tree = Tree::resolving("unread");
    let leaf = tree.admitted("leaf", KernelProfile::Allowlist);
    let mut inside = Actor::start_in(&leaf.path);
    inside.ask("udp-bind 0.0.0.0:0 alone");
    for id in 0..256 {
        assert_eq!(inside.ask(&format!("udp-query 9.9.9.9:53 {id}")), "ok");
    }
    assert_eq!(inside.ask("udp-query 9.9.9.9:53 256"), "EPERM");
    let until = Instant::now() + Duration::from_secs(25);
    while inside.ask("udp-query 9.9.9.9:53 256") == "EPERM" {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(500));
    }
    // Too late to say whose the earlier ones are.
    for _ in 0..256 {
        assert_eq!(taken(&tree, 0), None);
    }
    assert_eq!(taken(&tree, 0).map(|asker| asker.leaf), Some(leaf.id));
}

#[test]
fn a_record_is_taken_once_and_by_what_was_sent() {
    let tree = Tree::resolving("once");
    let leaf = tree.admitted("leaf", KernelProfile::Allowlist);
    let mut inside = Actor::start_in(&leaf.path);
    let source: SocketAddr = inside.ask("udp-bind 127.0.0.1:0 alone").parse().unwrap();
    let base = tree.resolver.as_ref().unwrap().base;
    let key = DatagramKey { netns: None, source, slot_port: base, id: 77 };
    assert_eq!(tree.enforcer().asker(&key), None);
    // Sent twice before it is read, it is one query.
    assert_eq!(inside.ask("udp-query 9.9.9.9:53 77"), "ok");
    assert_eq!(inside.ask("udp-query 9.9.9.9:53 77"), "ok");
    for other in [
        DatagramKey { id: 78, ..key },
        DatagramKey { slot_port: base + 1, ..key },
        DatagramKey { netns: Some(u64::MAX), ..key },
        DatagramKey { source: SocketAddr::new([127, 0, 0, 2].into(), source.port()), ..key },
        DatagramKey { source: SocketAddr::new(source.ip(), source.port() ^ 1), ..key },
    ] {
        assert_eq!(tree.enforcer().asker(&other), None, "{other:?}");
    }
    let asker = Asker { leaf: leaf.id, server: "9.9.9.9:53".parse().unwrap() };
    let mapped = DatagramKey { source: format!("[::ffff:127.0.0.1]:{}", source.port()).parse().unwrap(), ..key };
    assert_eq!(tree.enforcer().asker(&mapped), Some(asker));
    assert_eq!(tree.enforcer().asker(&key), None);
    assert_eq!(inside.ask("udp-query 9.9.9.9:53 77"), "ok");
    assert_eq!(tree.enforcer().asker(&key), Some(asker));
    // Of a leaf that has been retired nothing is said.
    assert_eq!(inside.ask("udp-query 9.9.9.9:53 77"), "ok");
    tree.enforcer().retire(leaf.id).unwrap();
    assert_eq!(tree.enforcer().asker(&key), None);
}

#[test]
fn two_leaves_with_one_source_address_are_not_taken_for_each_other() {
    let mut tree = Tree::resolving("one-source");
    let (leaf, other) =
        (tree.admitted("leaf", KernelProfile::Allowlist), tree.admitted("other", KernelProfile::Allowlist));
    let (mut one, mut two) = (Actor::start_in(&leaf.path), Actor::start_in(&other.path));
    let at = one.ask("udp-bind 127.0.0.1:0 shared");
    assert_eq!(two.ask(&format!("udp-bind {at} shared")), at);
    assert_eq!(one.ask("udp-query 9.9.9.9:53 5"), "ok");
    assert_eq!(two.ask("udp-query 9.9.9.9:53 5"), "EPERM");
    tree.event(other.id, "egress", "query_in_flight");
    // Another id, or the first one read, and it can be told apart.
    assert_eq!(two.ask("udp-query 9.9.9.9:53 6"), "ok");
    assert_eq!(taken(&tree, 0).map(|asker| asker.leaf), Some(leaf.id));
    assert_eq!(two.ask("udp-query 9.9.9.9:53 5"), "ok");
    assert_eq!(taken(&tree, 0).map(|asker| asker.leaf), Some(other.id));
    assert_eq!(taken(&tree, 0).map(|asker| asker.leaf), Some(other.id));
    // The same leaf through another socket, under way to another server.
    let mut three = Actor::start_in(&leaf.path);
    assert_eq!(three.ask(&format!("udp-bind {at} shared")), at);
    assert_eq!(one.ask("udp-query 9.9.9.9:53 7"), "ok");
    assert_eq!(three.ask("udp-query 8.8.8.8:53 7"), "EPERM");
    tree.event(leaf.id, "egress", "query_in_flight");
}

#[test]
fn a_udp_socket_is_its_leafs_and_its_profiles() {
    let mut tree = Tree::resolving("udp-moves");
    let (first, second) =
        (tree.admitted("first", KernelProfile::Allowlist), tree.admitted("second", KernelProfile::Allowlist));
    let mut inside = Actor::start_in(&first.path);
    inside.ask("udp-bind 127.0.0.1:0 alone");
    assert_eq!(inside.ask("udp-query 9.9.9.9:53 1"), "ok");
    inside.enter(&second.path);
    assert_eq!(inside.ask("udp-query 9.9.9.9:53 2"), "EPERM");
    tree.event(second.id, "sendmsg4", "foreign_socket");
    assert_eq!(inside.ask("udp-join 9.9.9.9:53"), "EPERM");
    tree.event(second.id, "connect4", "foreign_socket");
    inside.enter(&first.path);
    assert_eq!(inside.ask("udp-join 9.9.9.9:53"), "9.9.9.9:53");
    assert_eq!(inside.ask("udp-query - 3"), "ok");
    // Connected, so that only the packet filter is asked.
    tree.enforcer().retire(first.id).unwrap();
    assert_eq!(inside.ask("udp-query - 4"), "EPERM");
    tree.event(first.id, "egress", "no_entry");
    for (profile, reason) in [(KernelProfile::ProxyOnly, "datagram"), (KernelProfile::None, "profile_none")] {
        tree.enforcer().admit(first.id, profile, LONG).unwrap();
        assert_eq!(inside.ask("udp-query - 4"), "EPERM");
        tree.event(first.id, "egress", reason);
        tree.enforcer().retire(first.id).unwrap();
    }
}

#[test]
fn only_the_resolver_answers() {
    let mut tree = Tree::resolving("answers");
    let leaf = tree.admitted("leaf", KernelProfile::Allowlist);
    let mut inside = Actor::start_in(&leaf.path);
    let resolver = tree.resolver.as_ref().unwrap();
    let at = inside.ask("udp-bind 127.0.0.1:0 alone");
    assert_eq!(inside.ask("udp-query 9.9.9.9:53 1"), "ok");
    // From the port that was asked, by whoever has it; not from one that was not, nor from anybody else.
    resolver.v4[0].send_to(b"answer", &at).unwrap();
    assert_eq!(inside.ask("udp-read"), "ok");
    resolver.v4[1].send_to(b"answer", &at).unwrap();
    assert_eq!(inside.ask("udp-read"), "timeout");
    let same_port = UdpSocket::bind(("127.0.0.2", resolver.base)).unwrap();
    same_port.send_to(b"answer", &at).unwrap();
    assert_eq!(inside.ask("udp-read"), "timeout");
    for _ in 0..2 {
        tree.event(leaf.id, "ingress", "datagram");
    }
}

#[test]
fn a_namespace_of_its_own_is_told_by_its_cookie() {
    let tree = Tree::resolving("isolated-dns");
    let leaf = tree.admitted("leaf", KernelProfile::Allowlist);
    let mut inside = Actor::start();
    assert_eq!(inside.ask("isolate"), "ok");
    inside.enter(&leaf.path);
    let at = tree.resolver.as_ref().unwrap().base;
    let resolver = inside.in_its_network(move || Resolver::bind_at(at).unwrap());
    let netns = super::tree::netns_cookie(&resolver.v4[0]);
    let nobodys = answering_at(&resolver, tree.enforcer(), Some(netns), || {
        assert!(inside.ask("ask-many 1 0").ends_with("was not expected"));
        assert_eq!(inside.ask(&format!("ask-many 30 {}", leaf.id.0)), "180");
    });
    assert_eq!(nobodys, 0);
    // The same, taken for one of the gate's own namespace.
    let nobodys = answering_at(&resolver, tree.enforcer(), None, || {
        inside.ask("udp-bind 0.0.0.0:0 alone");
        assert_eq!(inside.ask("udp-ask 9.9.9.9:53 1"), "timeout");
    });
    assert_eq!(nobodys, 1);
}

const LEAVES: usize = 50;
const ROUNDS: usize = 80;

#[test]
fn each_of_24000_queries_is_attributed_to_its_leaf_and_server() {
    let tree = Tree::resolving("dns-stress");
    let enforcer = tree.enforcer();
    let mut clients: Vec<(LeafId, Actor)> = (0..LEAVES)
        .map(|at| {
            let path = tree.actions.join(format!("leaf-{at}"));
            std::fs::create_dir(&path).unwrap();
            let id = LeafId(std::fs::metadata(&path).unwrap().ino());
            enforcer.admit(id, KernelProfile::Allowlist, Duration::from_secs(180)).unwrap();
            (id, Actor::start_in(&path))
        })
        .collect();
    let mut outsider = Actor::start_in(&base().join("outside"));
    outsider.ask("udp-bind 0.0.0.0:0 alone");
    let port = tree.resolver.as_ref().unwrap().base;
    let started = Instant::now();
    let nobodys = answering(&tree, || {
        for (id, client) in &mut clients {
            client.tell(&format!("ask-many {ROUNDS} {}", id.0));
        }
        for id in 0..500 {
            outsider.tell(&format!("udp-query 127.0.0.1:{} {}", port + id % 8, id % 7));
        }
        for (_, client) in &mut clients {
            assert_eq!(client.reply(), (ROUNDS * 6).to_string());
        }
        for _ in 0..500 {
            assert_eq!(outsider.reply(), "ok");
        }
        std::thread::sleep(Duration::from_millis(200));
    });
    eprintln!("{} queries from {LEAVES} leaves in {:?}", LEAVES * ROUNDS * 6, started.elapsed());
    assert_eq!(nobodys, 500);
    for (id, _) in &clients {
        let counts = enforcer.retire(*id).unwrap();
        assert_eq!(counts.denied.total(), 0);
    }
}

/// The same query again has a record already and makes none: what holds it back is the leaf's allowance alone.
#[test]
fn a_leaf_that_floods_the_resolver_does_not_starve_another() {
    let mut tree = Tree::resolving("flood");
    let (greedy, quiet) =
        (tree.admitted("greedy", KernelProfile::Allowlist), tree.admitted("quiet", KernelProfile::Allowlist));
    let (mut one, mut other) = (Actor::start_in(&greedy.path), Actor::start_in(&quiet.path));
    for actor in [&mut one, &mut other] {
        actor.ask("udp-bind 0.0.0.0:0 alone");
    }
    // Nobody reads meanwhile: what is let through lies in the buffer of the one slot.
    let began = Instant::now();
    let sent: u64 = one.ask("udp-flood 9.9.9.9:53 30000").parse().unwrap();
    let may = 512 + 512 * (began.elapsed().as_secs() + 1);
    assert!((512..=may).contains(&sent), "{sent} of 30,000 in {:?}", began.elapsed());
    tree.event(greedy.id, "egress", "query_rate");
    assert_eq!(other.ask("udp-query 9.9.9.8:53 77"), "ok");
    let quiet_asks = Some(Asker { leaf: quiet.id, server: "9.9.9.8:53".parse().unwrap() });
    let heard = (0..=sent).map(|_| taken(&tree, 0)).any(|asker| asker == quiet_asks);
    assert!(heard, "the query of the quiet leaf was dropped");
    // With a resolver that reads, the quiet one is answered while the other goes on.
    answering(&tree, || {
        one.tell("udp-flood 9.9.9.9:53 200000");
        for id in 100..130 {
            assert_eq!(other.ask(&format!("udp-ask 9.9.9.8:53 {id}")), said(&quiet, "9.9.9.8:53"));
        }
        one.reply();
    });
    assert_eq!(tree.enforcer().counts(quiet.id).unwrap().denied.total(), 0);
    // A long message counts for several.
    let long = tree.admitted("long", KernelProfile::Allowlist);
    let mut long = Actor::start_in(&long.path);
    long.ask("udp-bind 0.0.0.0:0 alone");
    let sent = (0..100).filter(|_| long.ask("udp-send 9.9.9.9:53 40000") == "ok").count();
    assert!(sent < 40, "{sent} of 100 messages of 40,000 bytes");
}
