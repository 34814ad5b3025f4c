//! Connections that others make to a leaf.

use std::net::TcpListener;

use latchgate::egress::kernel::{KernelError, KernelProfile};

use super::actor::Actor;
use super::tree::Tree;

/// A port that nothing listens at.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn a_leaf_answers_at_its_listed_ports_and_at_no_other() {
    for profile in [KernelProfile::None, KernelProfile::Allowlist] {
        let mut tree = Tree::attached("answer");
        let leaf = tree.admitted("leaf", profile);
        let (mut inside, mut outside) = (Actor::start_in(&leaf.path), Actor::start());
        let (listed, other) = (free_port(), free_port());
        tree.enforcer().answer_at(leaf.id, &[listed]).unwrap();

        for host in ["127.0.0.1", "[::1]"] {
            assert_eq!(inside.ask(&format!("listen {host}:{listed}")), format!("{host}:{listed}"));
            outside.tell(&format!("hear {host}:{listed}"));
            assert_eq!(inside.ask("answer"), "ok");
            assert_eq!(outside.reply(), "hello");
            assert_eq!(inside.ask(&format!("listen {host}:{other}")), format!("{host}:{other}"));
            assert_eq!(outside.ask(&format!("hear {host}:{other}")), "timeout");
        }
        assert_eq!(tree.enforcer().counts(leaf.id).unwrap().inbound, 2);
        tree.event(leaf.id, "ingress", if profile == KernelProfile::None { "profile_none" } else { "not_the_proxy" });

        // The same port, no longer listed: the control of the whole.
        tree.enforcer().retire(leaf.id).unwrap();
        tree.enforcer().admit(leaf.id, profile, super::tree::LONG).unwrap();
        assert_eq!(inside.ask(&format!("listen 127.0.0.1:{listed}")), format!("127.0.0.1:{listed}"));
        assert_eq!(outside.ask(&format!("hear 127.0.0.1:{listed}")), "timeout");
    }
}

#[test]
fn what_was_accepted_connects_nowhere() {
    let mut tree = Tree::attached("accepted");
    let leaf = tree.admitted("leaf", KernelProfile::Allowlist);
    let (mut inside, mut outside) = (Actor::start_in(&leaf.path), Actor::start());
    let listed = free_port();
    tree.enforcer().answer_at(leaf.id, &[listed]).unwrap();
    let target = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = target.local_addr().unwrap();

    inside.ask(&format!("listen 127.0.0.1:{listed}"));
    outside.tell(&format!("hear 127.0.0.1:{listed}"));
    assert_eq!(inside.ask("answer"), "ok");
    assert_eq!(outside.reply(), "hello");
    assert_eq!(inside.ask(&format!("accepted-elsewhere {target}")), "EPERM");
    tree.event(leaf.id, "connect4", "foreign_socket");
    // Nor does the port by itself let anything out: it is no port of a client.
    let from = format!("127.0.0.1:{}", free_port());
    tree.enforcer().answer_at(leaf.id, &[from.rsplit(':').next().unwrap().parse().unwrap()]).unwrap();
    assert_eq!(inside.ask(&format!("connect-from {from} {target}")), "EPERM");
    tree.event(leaf.id, "connect4", "not_in_profile");
    assert_eq!(outside.ask(&format!("connect-from {from} {target}")), "ok");
}

#[test]
fn a_leaf_does_not_answer_at_anothers_port() {
    let mut tree = Tree::attached("others");
    let (leaf, other) = (tree.admitted("leaf", KernelProfile::None), tree.admitted("other", KernelProfile::None));
    let listed = free_port();
    tree.enforcer().answer_at(leaf.id, &[listed]).unwrap();
    let (mut inside, mut outside) = (Actor::start_in(&other.path), Actor::start());
    inside.ask(&format!("listen 127.0.0.1:{listed}"));
    assert_eq!(outside.ask(&format!("hear 127.0.0.1:{listed}")), "timeout");
    tree.event(other.id, "ingress", "profile_none");
}

#[test]
fn ports_are_bounded_and_go_with_the_leaf() {
    let tree = Tree::attached("ports");
    let leaf = tree.admitted("leaf", KernelProfile::None);
    let ports: Vec<u16> = (1..=64).collect();
    tree.enforcer().answer_at(leaf.id, &ports).unwrap();
    assert!(matches!(tree.enforcer().answer_at(leaf.id, &[65]), Err(KernelError::InboundFull(id)) if id == leaf.id));
    assert!(matches!(tree.enforcer().answer_at(leaf.id, &[0]), Err(KernelError::PortZero)));
    tree.enforcer().retire(leaf.id).unwrap();
    assert!(matches!(tree.enforcer().answer_at(leaf.id, &[1]), Err(KernelError::NotAdmitted(_))));
}
