//! The kernel program, attached for real: each refusal from inside a leaf, and the same attempt from outside it, which
//! succeeds. Everything goes to listeners on loopback that the test made.

#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used)]

#[path = "kernel/actor.rs"]
mod actor;
#[path = "kernel/attribution.rs"]
mod attribution;
#[path = "kernel/carry.rs"]
mod carry;
#[path = "kernel/closing.rs"]
mod closing;
#[path = "kernel/dns.rs"]
mod dns;
#[path = "kernel/figures.rs"]
mod figures;
#[path = "kernel/full.rs"]
mod full;
#[path = "kernel/inbound.rs"]
mod inbound;
#[path = "kernel/multi.rs"]
mod multi;
#[path = "kernel/tree.rs"]
mod tree;
#[path = "kernel/upgrade.rs"]
mod upgrade;

use std::net::{TcpListener, UdpSocket};

use latchgate::egress::kernel::{KernelError, KernelProfile};

use actor::Actor;
use tree::{LONG, Tree};

/// Not a test: what [`Actor`] starts.
#[test]
fn actor_process() {
    actor::run();
}

#[test]
fn nothing_leaves_a_leaf_with_profile_none() {
    let mut tree = Tree::attached("none");
    let leaf = tree.admitted("leaf", KernelProfile::None);
    let (mut inside, mut outside) = (Actor::start_in(&leaf.path), Actor::start());
    let (v4, v6) = (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("[::1]:0").unwrap());
    let udp4 = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (v4, v6) = (v4.local_addr().unwrap(), v6.local_addr().unwrap());
    let udp6 = UdpSocket::bind("[::1]:0").unwrap();
    let udp6 = udp6.local_addr().unwrap();
    let mapped = format!("[::ffff:127.0.0.1]:{}", v4.port());
    let proxy = format!("127.0.0.1:{}", tree.proxy.port);
    for (attempt, hook) in [
        (format!("connect {v4}"), "connect4"),
        (format!("connect {v6}"), "connect6"),
        (format!("connect {mapped}"), "connect6"),
        (format!("connect {proxy}"), "connect4"),
        (format!("udp-connect {udp4}"), "connect4"),
        (format!("udp-connect {udp6}"), "connect6"),
        (format!("sendto {udp4}"), "sendmsg4"),
        (format!("sendto {udp6}"), "sendmsg6"),
        (format!("sendto [::ffff:127.0.0.1]:{}", udp4.port()), "sendmsg4"),
        (format!("fast-open {v4}"), "connect4"),
    ] {
        assert_eq!(inside.ask(&attempt), "EPERM", "{attempt}");
        let event = tree.event(leaf.id, hook, "profile_none");
        assert!(event.address.is_some_and(|address| address.to_canonical().is_loopback()), "{attempt}: {event:?}");
        assert!(attempt.ends_with(&format!(":{}", event.port)), "{attempt}: {event:?}");
        if !attempt.starts_with("fast-open") {
            assert_eq!(outside.ask(&attempt), "ok", "{attempt}");
        }
    }
    let counts = tree.enforcer().retire(leaf.id).unwrap();
    let denied = counts.denied;
    assert_eq!((denied.connect4, denied.connect6, denied.sendmsg4, denied.sendmsg6), (4, 3, 2, 1));
    assert_eq!((denied.sock_create, denied.egress, denied.sock_ops), (0, 0, 0));
    assert_eq!((counts.connections, counts.bytes_sent, counts.open_flows), (0, 0, 0));
    assert_eq!(counts.wire_bytes_out, 0);
}

#[test]
fn a_leaf_with_the_proxy_reaches_the_proxy_and_nothing_else() {
    let mut tree = Tree::attached("proxy");
    let leaf = tree.admitted("leaf", KernelProfile::ProxyOnly);
    let (mut inside, mut outside) = (Actor::start_in(&leaf.path), Actor::start());
    let port = tree.proxy.port;
    for allowed in [format!("127.0.0.1:{port}"), format!("[::1]:{port}"), format!("[::ffff:127.0.0.1]:{port}")] {
        assert_eq!(inside.ask(&format!("connect {allowed}")), "ok", "{allowed}");
    }
    let (v4, v6) = (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("[::1]:0").unwrap());
    let (other4, other6) = (v4.local_addr().unwrap().port(), v6.local_addr().unwrap().port());
    let same_port = TcpListener::bind(format!("127.0.0.2:{port}")).unwrap();
    for (attempt, hook, reason) in [
        (format!("connect 127.0.0.1:{other4}"), "connect4", "not_the_proxy"),
        (format!("connect [::1]:{other6}"), "connect6", "not_the_proxy"),
        (format!("connect [::ffff:127.0.0.1]:{other4}"), "connect6", "not_the_proxy"),
        (format!("connect {}", same_port.local_addr().unwrap()), "connect4", "not_the_proxy"),
        // Loopback by another name: the kernel reads 0.0.0.0 as 127.0.0.1 after the hook.
        (format!("connect 0.0.0.0:{port}"), "connect4", "not_the_proxy"),
        (format!("connect [::]:{port}"), "connect6", "not_the_proxy"),
        (format!("udp-connect 127.0.0.1:{port}"), "connect4", "datagram"),
        (format!("sendto 127.0.0.1:{port}"), "sendmsg4", "datagram"),
        (format!("sendto [::1]:{port}"), "sendmsg6", "datagram"),
    ] {
        assert_eq!(inside.ask(&attempt), "EPERM", "{attempt}");
        tree.event(leaf.id, hook, reason);
        assert_eq!(outside.ask(&attempt), "ok", "{attempt}");
    }
    let counts = tree.enforcer().retire(leaf.id).unwrap();
    assert_eq!(counts.connections, 3);
    assert_eq!(counts.denied.total(), 9);
    assert!(counts.wire_bytes_out > 0 && counts.wire_bytes_in > 0);
}

#[test]
fn only_tcp_and_udp_sockets_are_made() {
    const MPTCP: i32 = 262;
    const UDPLITE: i32 = 136;
    let mut tree = Tree::attached("kinds");
    let leaf = tree.admitted("leaf", KernelProfile::ProxyOnly);
    let (mut inside, mut outside) = (Actor::start_in(&leaf.path), Actor::start());
    for (family, kind, protocol) in [
        (libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP),
        (libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_ICMPV6),
        (libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_RAW),
        (libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_TCP),
        (libc::AF_INET, libc::SOCK_STREAM, MPTCP),
        (libc::AF_INET, libc::SOCK_DGRAM, UDPLITE),
        (libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_ICMP),
    ] {
        let attempt = format!("socket {family} {kind} {protocol}");
        let without = outside.ask(&attempt);
        if without != "ok" {
            // The kernel was built without it, or a sysctl forbids it to everybody.
            eprintln!("{attempt}: {without} outside as well");
            continue;
        }
        assert_eq!(inside.ask(&attempt), "EPERM", "{attempt}");
        let event = tree.event(leaf.id, "sock_create", "socket_kind");
        assert_eq!(event.address, None);
    }
    for family in [libc::AF_INET, libc::AF_INET6] {
        assert_eq!(inside.ask(&format!("socket {family} {} 0", libc::SOCK_STREAM)), "ok");
        assert_eq!(inside.ask(&format!("socket {family} {} 0", libc::SOCK_DGRAM)), "ok");
    }
}

#[test]
fn what_was_not_admitted_is_closed() {
    let mut tree = Tree::attached("missing");
    let leaf = tree.leaf("leaf");
    let mut inside = Actor::start_in(&leaf.path);
    let proxy = format!("127.0.0.1:{}", tree.proxy.port);
    assert_eq!(inside.ask(&format!("connect {proxy}")), "EPERM");
    tree.event(leaf.id, "sock_create", "no_entry");
    assert_eq!(inside.ask(&format!("sendto {proxy}")), "EPERM");
    // No limit silences what has no entry.
    for _ in 0..1_100 {
        assert_eq!(inside.ask("sendto 127.0.0.1:9"), "EPERM");
    }
    while tree.events.as_mut().unwrap().try_recv().is_ok() {}
    assert_eq!(inside.ask("sendto 127.0.0.1:9"), "EPERM");
    tree.event(leaf.id, "sock_create", "no_entry");
    // A process in `actions` itself is in no leaf.
    let mut above = Actor::start_in(&tree.actions);
    assert_eq!(above.ask(&format!("connect {proxy}")), "EPERM");
    assert_eq!(tree.enforcer().counts_without_leaf().unwrap().denied.sock_create, 3 + 1_101);
    // The same process, once admitted.
    tree.enforcer().admit(leaf.id, KernelProfile::ProxyOnly, LONG).unwrap();
    assert_eq!(inside.ask(&format!("connect {proxy}")), "ok");
    assert!(matches!(
        tree.enforcer().admit(leaf.id, KernelProfile::None, LONG),
        Err(KernelError::AlreadyAdmitted(id)) if id == leaf.id
    ));
    tree.enforcer().retire(leaf.id).unwrap();
    assert_eq!(inside.ask(&format!("connect {proxy}")), "EPERM");
    assert!(matches!(tree.enforcer().retire(leaf.id), Err(KernelError::NotAdmitted(_))));
}

#[test]
fn a_nested_cgroup_has_its_leafs_profile() {
    let mut tree = Tree::attached("nested");
    let (leaf, other) = (tree.admitted("leaf", KernelProfile::ProxyOnly), tree.admitted("other", KernelProfile::None));
    let nested = leaf.path.join("a/b");
    std::fs::create_dir_all(&nested).unwrap();
    let mut inside = Actor::start_in(&nested);
    let elsewhere = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert_eq!(inside.ask(&format!("connect 127.0.0.1:{}", tree.proxy.port)), "ok");
    assert_eq!(inside.ask(&format!("connect {elsewhere}")), "EPERM");
    tree.event(leaf.id, "connect4", "not_the_proxy");
    assert_eq!(tree.enforcer().counts(other.id).unwrap().denied.total(), 0);
}

#[test]
fn a_socket_does_not_carry_its_leafs_profile_into_another() {
    let mut tree = Tree::attached("carried");
    let (first, second) =
        (tree.admitted("first", KernelProfile::ProxyOnly), tree.admitted("second", KernelProfile::ProxyOnly));
    let mut actor = Actor::start_in(&first.path);
    assert_eq!(actor.ask("make"), "ok");
    actor.enter(&second.path);
    assert_eq!(actor.ask(&format!("connect-made 127.0.0.1:{}", tree.proxy.port)), "EPERM");
    tree.event(second.id, "connect4", "foreign_socket");
}

#[test]
fn nobody_reaches_a_leaf_from_outside() {
    let mut tree = Tree::attached("inbound");
    let leaf = tree.admitted("leaf", KernelProfile::ProxyOnly);
    let (mut inside, mut outside) = (Actor::start_in(&leaf.path), Actor::start());
    let at = inside.ask("listen 127.0.0.1:0");
    assert_eq!(outside.ask(&format!("connect {at}")), "timeout");
    let event = tree.event(leaf.id, "ingress", "not_the_proxy");
    assert_eq!(event.protocol, "tcp");
    let at = inside.ask("udp-listen [::1]:0");
    assert_eq!(outside.ask(&format!("sendto {at}")), "ok");
    assert_eq!(inside.ask("udp-read"), "timeout");
    tree.event(leaf.id, "ingress", "datagram");
    // The same from a process beside the leaf.
    let mut beside = Actor::start_in(&tree::base().join("outside"));
    let at = beside.ask("udp-listen [::1]:0");
    assert_eq!(outside.ask(&format!("sendto {at}")), "ok");
    assert_eq!(beside.ask("udp-read"), "ok");
}

#[test]
fn a_noisy_leaf_cannot_hide_anothers_refusal() {
    let mut tree = Tree::attached("noisy");
    let (noisy, quiet) = (tree.admitted("noisy", KernelProfile::None), tree.admitted("quiet", KernelProfile::None));
    let (mut one, mut other) = (Actor::start_in(&noisy.path), Actor::start_in(&quiet.path));
    for _ in 0..1_500 {
        one.tell("sendto 127.0.0.1:9");
    }
    for _ in 0..1_500 {
        assert_eq!(one.reply(), "EPERM");
    }
    assert_eq!(other.ask("sendto 127.0.0.1:9"), "EPERM");
    tree.event(quiet.id, "sendmsg4", "profile_none");
    let counts = tree.enforcer().retire(noisy.id).unwrap();
    assert_eq!((counts.denied.sendmsg4, counts.events_lost), (1_500, 1_500 - 1_024));
}

#[test]
fn two_gates_do_not_share_actions() {
    let tree = Tree::attached("twice");
    let again = latchgate::egress::kernel::Enforcer::start(tree.config());
    assert!(matches!(again, Err(KernelError::InUse(_))));
    tree.enforcer().health().unwrap();
    assert!(tree.enforcer().program_hash().starts_with("sha256:"));
}

/// A kernel whose verifier walks more paths than this one's must still come to an end: it gives up after a million.
#[test]
fn the_verifier_is_far_from_giving_up() {
    let tree = Tree::attached("verifier");
    // The programs have no names; those of other gates on this machine are no longer than these.
    let walked = aya::programs::loaded_programs().flatten().filter_map(|program| program.verified_instruction_count());
    let walked: Vec<_> = walked.collect();
    assert!(walked.iter().any(|count| *count > 1_000), "{walked:?}");
    assert!(walked.iter().all(|count| *count < 50_000), "{walked:?}");
    drop(tree);
}

#[test]
fn a_leaf_cannot_fill_the_map_of_flows_for_the_others() {
    let mut tree = Tree::attached("many");
    let (greedy, other) =
        (tree.admitted("greedy", KernelProfile::ProxyOnly), tree.admitted("other", KernelProfile::ProxyOnly));
    let (mut one, mut two) = (Actor::start_in(&greedy.path), Actor::start_in(&other.path));
    let proxy = format!("127.0.0.1:{}", tree.proxy.port);
    assert_eq!(one.ask(&format!("hold-many {proxy} 3000")), "2048 EPERM");
    tree.event(greedy.id, "connect4", "too_many_flows");
    // It is the listener's queue that is full for the other one; it gets its own record all the same.
    two.ask(&format!("hold-many {proxy} 1"));
    assert_eq!(tree.enforcer().counts(other.id).unwrap().denied.total(), 0);
    assert_eq!(one.ask("drop-many"), "ok");
    assert_eq!(one.ask(&format!("hold-many {proxy} 1")), "ok");
}

#[test]
fn when_the_map_of_leaves_is_full_the_next_is_refused() {
    let tree = Tree::attached("full");
    let invented = |at: u64| latchgate::egress::LeafId(u64::MAX - at);
    for at in 0..16_384 {
        tree.enforcer().admit(invented(at), KernelProfile::None, LONG).unwrap();
    }
    let next = tree.enforcer().admit(invented(16_384), KernelProfile::None, LONG);
    assert!(matches!(next, Err(KernelError::Full)));
    tree.enforcer().retire(invented(7)).unwrap();
    tree.enforcer().admit(invented(16_384), KernelProfile::None, LONG).unwrap();
}
