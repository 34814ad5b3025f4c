//! Every way in which a leaf that was open becomes closed.

use std::time::{Duration, Instant};

use aya::maps::{HashMap, MapData};
use latchgate::egress::kernel::{Enforcer, KernelProfile};

use super::actor::Actor;
use super::tree::{LONG, Tree};

#[test]
fn a_past_deadline_closes_a_leaf_and_its_open_connections() {
    let mut tree = Tree::attached("deadline");
    let leaf = tree.leaf("leaf");
    let mut inside = Actor::start_in(&leaf.path);
    tree.enforcer().admit(leaf.id, KernelProfile::ProxyOnly, Duration::from_millis(1_500)).unwrap();
    let admitted = Instant::now();
    let proxy = format!("127.0.0.1:{}", tree.proxy.port);
    assert_eq!(inside.ask(&format!("hold {proxy}")), "ok");
    assert_eq!(inside.ask("make"), "ok");
    std::thread::sleep(Duration::from_millis(1_550).saturating_sub(admitted.elapsed()));
    assert_eq!(inside.ask(&format!("connect-made {proxy}")), "EPERM");
    tree.event(leaf.id, "connect4", "expired");
    assert_eq!(inside.ask(&format!("connect {proxy}")), "EPERM");
    tree.event(leaf.id, "sock_create", "expired");
    // The write goes to the socket's buffer; its packets are dropped.
    assert_eq!(inside.ask("write 10"), "ok");
    let event = tree.event(leaf.id, "egress", "expired");
    assert_eq!(event.port, tree.proxy.port);
    let (accepted, _) = tree.proxy.v4.accept().unwrap();
    accepted.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(std::io::Read::read(&mut &accepted, &mut [0; 10]).is_err());
    // Nor does anything arrive.
    std::io::Write::write_all(&mut &accepted, b"late").unwrap();
    assert_eq!(inside.ask("read 4"), "timeout");
    tree.event(leaf.id, "ingress", "expired");
    let counts = tree.enforcer().retire(leaf.id).unwrap();
    assert_eq!((counts.connections, counts.open_flows), (1, 1));
    assert!(counts.denied.egress >= 1 && counts.denied.ingress >= 1);
}

#[test]
fn an_entry_of_another_generation_is_no_entry() {
    let mut tree = Tree::attached("generation");
    let leaf = tree.admitted("leaf", KernelProfile::ProxyOnly);
    let mut inside = Actor::start_in(&leaf.path);
    let proxy = format!("127.0.0.1:{}", tree.proxy.port);
    assert_eq!(inside.ask(&format!("connect {proxy}")), "ok");
    // Words of an entry: leaf, generation, deadline, kind.
    let mut changed = 0;
    for map in aya::maps::loaded_maps().flatten().filter(|map| map.name_as_str() == Some("LEAVES")) {
        let Ok(map) = MapData::from_id(map.id()) else { continue };
        let Ok(mut map) = HashMap::<_, u64, [u64; 4]>::try_from(aya::maps::Map::HashMap(map)) else { continue };
        if let Ok(mut entry) = map.get(&leaf.id.0, 0) {
            entry[1] ^= 1;
            map.insert(leaf.id.0, entry, 0).unwrap();
            changed += 1;
        }
    }
    assert_eq!(changed, 1);
    assert_eq!(inside.ask(&format!("connect {proxy}")), "EPERM");
    tree.event(leaf.id, "sock_create", "foreign_generation");
}

#[test]
fn a_killed_gate_leaves_every_leaf_closed_and_the_next_one_takes_over() {
    let mut tree = Tree::empty("killed");
    let leaf = tree.leaf("leaf");
    let config = tree.config();
    let mut gate = Actor::start();
    let load = format!(
        "load {} {} {} {} {}",
        tree.name,
        tree.actions.display(),
        config.gate.display(),
        config.bpffs.display(),
        config.proxy.v4
    );
    assert_eq!(gate.ask(&load), "ok");
    assert_eq!(gate.ask(&format!("admit {}", leaf.id.0)), "ok");
    let mut inside = Actor::start_in(&leaf.path);
    let proxy = config.proxy.v4;
    let elsewhere = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let elsewhere = elsewhere.local_addr().unwrap();
    // Longer than a heartbeat lives: it is being written.
    std::thread::sleep(Duration::from_millis(2_300));
    assert_eq!(inside.ask(&format!("hold {proxy}")), "ok");
    assert_eq!(inside.ask("make"), "ok");

    gate.kill();
    assert_eq!(inside.ask(&format!("connect {elsewhere}")), "EPERM");
    std::thread::sleep(Duration::from_millis(2_100));
    for attempt in [
        format!("connect-made {proxy}"),
        format!("connect {proxy}"),
        format!("connect {elsewhere}"),
        format!("sendto {proxy}"),
    ] {
        assert_eq!(inside.ask(&attempt), "EPERM", "{attempt}");
    }
    assert_eq!(inside.ask("write 10"), "ok");
    let (accepted, _) = tree.proxy.v4.accept().unwrap();
    accepted.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(std::io::Read::read(&mut &accepted, &mut [0; 10]).is_err());

    let runs = || std::fs::read_dir(tree.pins()).unwrap().count();
    assert_eq!(runs(), 1);
    let enforcer = Enforcer::start(config.clone()).unwrap();
    assert_eq!(runs(), 1);
    // The predecessor's leaf is not the successor's.
    assert_eq!(inside.ask(&format!("connect {proxy}")), "EPERM");
    enforcer.admit(leaf.id, KernelProfile::ProxyOnly, LONG).unwrap();
    assert_eq!(inside.ask(&format!("connect {proxy}")), "ok");
    assert_eq!(inside.ask(&format!("connect {elsewhere}")), "EPERM");
    tree.enforcer = Some(enforcer);
}

#[test]
fn a_gate_that_ends_closes_at_once_and_stays_attached() {
    let mut tree = Tree::attached("ended");
    let leaf = tree.admitted("leaf", KernelProfile::ProxyOnly);
    let mut inside = Actor::start_in(&leaf.path);
    let proxy = format!("127.0.0.1:{}", tree.proxy.port);
    assert_eq!(inside.ask(&format!("connect {proxy}")), "ok");
    drop(tree.enforcer.take());
    assert_eq!(inside.ask(&format!("connect {proxy}")), "EPERM");
    assert_eq!(std::fs::read_dir(tree.pins()).unwrap().count(), 1);
    tree.enforcer = Some(Enforcer::start(tree.config()).unwrap());
}

/// Only the packet filter sees a connection that was made under other rules.
#[test]
fn a_connection_to_an_earlier_proxy_or_profile_is_cut() {
    let mut tree = Tree::attached("earlier");
    let leaf = tree.admitted("leaf", KernelProfile::ProxyOnly);
    let mut inside = Actor::start_in(&leaf.path);
    let earlier = tree.proxy.port;
    assert_eq!(inside.ask(&format!("hold 127.0.0.1:{earlier}")), "ok");
    let (accepted, _) = tree.proxy.v4.accept().unwrap();
    accepted.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let arrives = || std::io::Read::read(&mut &accepted, &mut [0; 64]).is_ok();
    assert_eq!(inside.ask("write 1"), "ok");
    assert!(arrives());

    tree.enforcer().retire(leaf.id).unwrap();
    tree.enforcer().admit(leaf.id, KernelProfile::None, LONG).unwrap();
    assert_eq!(inside.ask("write 1"), "ok");
    assert_eq!(tree.event(leaf.id, "egress", "profile_none").port, earlier);
    assert!(!arrives());

    drop(tree.enforcer.take());
    let other = super::tree::Proxy::bind();
    let mut config = tree.config();
    config.proxy = other.addresses();
    let enforcer = Enforcer::start(config).unwrap();
    tree.events = Some(enforcer.events());
    enforcer.admit(leaf.id, KernelProfile::ProxyOnly, LONG).unwrap();
    tree.enforcer = Some(enforcer);
    assert_eq!(inside.ask("write 1"), "ok");
    assert_eq!(tree.event(leaf.id, "egress", "not_the_proxy").port, earlier);
    assert!(!arrives());
    assert_eq!(inside.ask(&format!("connect 127.0.0.1:{}", other.port)), "ok");
}

#[test]
fn a_link_that_is_gone_is_seen() {
    let tree = Tree::attached("unlinked");
    let pins = tree.pins();
    let run = std::fs::read_dir(&pins).unwrap().next().unwrap().unwrap().path();
    assert_eq!(std::fs::read_dir(&run).unwrap().count(), 13);
    tree.enforcer().health().unwrap();
    std::fs::remove_file(run.join("egress")).unwrap();
    assert!(tree.enforcer().health().is_err());
}

#[test]
fn a_gate_of_the_same_name_with_another_tree_keeps_its_pins() {
    let first = Tree::attached("same-name");
    let leaf = first.admitted("leaf", KernelProfile::None);
    let mut inside = Actor::start_in(&leaf.path);
    let second = Tree::empty("same-name-2");
    let mut config = second.config();
    config.instance.clone_from(&first.name);
    let enforcer = Enforcer::start(config).unwrap();
    first.enforcer().health().unwrap();
    enforcer.health().unwrap();
    assert_eq!(std::fs::read_dir(first.pins()).unwrap().count(), 2);
    assert_eq!(inside.ask("sendto 127.0.0.1:9"), "EPERM");
    enforcer.detach().unwrap();
}
