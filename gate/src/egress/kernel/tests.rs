use std::net::{IpAddr, Ipv4Addr};

use super::events::parse;
use super::*;
use crate::time::Timestamp;

fn bytes_of(event: &types::Event) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(event.at_ns.to_ne_bytes());
    bytes.extend(event.leaf.to_ne_bytes());
    let words = [event.hook, event.reason, event.family, event.protocol];
    for word in words.into_iter().chain(event.address).chain([event.address_family, event.port]) {
        bytes.extend(word.to_ne_bytes());
    }
    bytes
}

fn refusal() -> types::Event {
    types::Event {
        at_ns: 5_000_000_000,
        leaf: 77,
        hook: types::Hook::Connect4 as u32,
        reason: types::Reason::NotTheProxy as u32,
        family: 2,
        protocol: 6,
        address: [u32::from_ne_bytes([203, 0, 113, 9]), 0, 0, 0],
        address_family: 2,
        port: 443,
    }
}

#[test]
fn an_event_is_read_as_it_was_written() {
    let event = parse(&bytes_of(&refusal()), 5_250_000_000, Timestamp::from_millis(10_000)).unwrap();
    assert_eq!(event.leaf, LeafId(77));
    assert_eq!((event.hook, event.reason), ("connect4", "not_the_proxy"));
    assert_eq!((event.family, event.protocol.as_str()), ("inet", "tcp"));
    assert_eq!((event.address, event.port), (Some(IpAddr::V4(Ipv4Addr::new(203, 0, 113, 9))), 443));
    assert_eq!(event.time, Timestamp::from_millis(9_750));
    assert_eq!(serde_json::to_value(&event).unwrap()["leaf"], 77);
}

#[test]
fn an_event_of_a_machine_that_runs_for_years_can_be_signed() {
    let mut raw = refusal();
    raw.at_ns = 10 * 365 * 86_400 * 1_000_000_000;
    let event = parse(&bytes_of(&raw), raw.at_ns, Timestamp::from_millis(10_000)).unwrap();
    let shown = serde_json::to_value(&event).unwrap();
    // RFC 8785 numbers are doubles: past 2^53 the ledger refuses the whole receipt.
    let numbers: Vec<u64> = shown.as_object().unwrap().values().filter_map(serde_json::Value::as_u64).collect();
    assert!(!numbers.is_empty() && numbers.iter().all(|number| *number < 1 << 53), "{shown}");
}

#[test]
fn bytes_that_are_no_event_are_not_read() {
    let whole = bytes_of(&refusal());
    let read = |bytes: &[u8]| parse(bytes, 0, Timestamp::from_millis(0));
    assert!(read(&whole).is_some());
    for length in 0..whole.len() {
        assert!(read(&whole[..length]).is_none(), "{length}");
    }
    let with = |change: fn(&mut types::Event)| {
        let mut event = refusal();
        change(&mut event);
        read(&bytes_of(&event))
    };
    assert!(with(|event| event.hook = 99).is_none());
    assert!(with(|event| event.reason = 0).is_none());
    assert!(with(|event| event.port = 65_536).is_none());
    assert_eq!(with(|event| event.address_family = 0).unwrap().address, None);
}

#[test]
fn map_values_have_no_padding() {
    assert_eq!(size_of::<types::LeafEntry>(), 8 * 3 + 4 * 2);
    assert_eq!(size_of::<types::Control>(), 8 + 4 * 16);
    assert_eq!(size_of::<types::Counts>(), 8 * (types::HOOKS + 12));
    assert_eq!(size_of::<types::Event>(), 8 * 2 + 4 * 10);
    assert_eq!(size_of::<types::AcceptedSocket>(), 8 * 2 + 4 * 6);
    assert_eq!(size_of::<types::QueryKey>(), 8 + 4 * 4 + 2 * 4);
    assert_eq!(size_of::<types::QueryRecord>(), 8 * 2 + 4 * 6);
    assert_eq!(size_of::<types::Connection>(), 8 * 6 + 4 * 12);
    assert_eq!(size_of::<types::ConnectionKey>(), 8 * 2);
    assert_eq!(size_of::<types::FlowKey>(), 8 + 4 * 10);
    assert_eq!(size_of::<types::InboundKey>(), 8 + 4 * 2);
}

#[test]
fn counts_keep_each_hook_apart() {
    let raw = types::Counts {
        denied: [1, 2, 3, 4, 5, 6, 7, 8],
        connections: 9,
        flows_begun: 12,
        flows_closed: 10,
        ..types::Counts::default()
    };
    let counts = KernelCounts::from(raw);
    let denied = counts.denied;
    assert_eq!((denied.connect4, denied.connect6, denied.sendmsg4, denied.sendmsg6), (1, 2, 3, 4));
    assert_eq!((denied.sock_create, denied.egress, denied.ingress, denied.sock_ops), (5, 6, 7, 8));
    assert_eq!(denied.total(), 36);
    assert_eq!((counts.connections, counts.open_flows), (9, 2));
}

#[test]
fn the_checked_in_object_is_the_one_of_the_lock() {
    let lock: serde_json::Value = serde_json::from_str(include_str!("latchgate.bpf.lock.json")).unwrap();
    assert_eq!(lock["object_sha256"], crate::hash::sha256_hex(OBJECT));
}

#[test]
fn an_instance_cannot_name_a_path() {
    for name in ["", ".", "..", "a/b", "../x", "a b", &"x".repeat(65)] {
        let config = KernelConfig {
            instance: name.to_owned(),
            actions: "/".into(),
            gate: "/".into(),
            bpffs: "/".into(),
            proxy: ProxyAddresses { v4: SocketAddrV4::new(Ipv4Addr::LOCALHOST, 1), v6: None },
            resolver: None,
        };
        assert!(matches!(Enforcer::start(config), Err(KernelError::Instance(_))), "{name}");
    }
}

#[test]
fn a_directory_that_is_no_cgroup_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let config = KernelConfig {
        instance: "unit".to_owned(),
        actions: directory.path().to_owned(),
        gate: directory.path().to_owned(),
        bpffs: directory.path().to_owned(),
        proxy: ProxyAddresses { v4: SocketAddrV4::new(Ipv4Addr::LOCALHOST, 1), v6: None },
        resolver: None,
    };
    assert!(matches!(Enforcer::start(config), Err(KernelError::NotCgroup2(_))));
}

#[test]
fn a_resolver_whose_ports_cannot_be_told_from_others_is_refused() {
    let with = |port: u16, port6: Option<u16>, slots: u16| {
        let v6_base = port6.map(|port| SocketAddrV6::new(std::net::Ipv6Addr::LOCALHOST, port, 0, 0));
        ResolverAddresses { v4_base: SocketAddrV4::new(Ipv4Addr::LOCALHOST, port), v6_base, slots }.check()
    };
    for (port, port6, slots) in [(20_000, None, 8), (65_528, Some(54), 8), (45, None, 8), (65_535, None, 1)] {
        with(port, port6, slots).unwrap();
    }
    for (port, port6, slots) in [
        (20_000, None, 0),
        (20_000, None, 9),
        (65_529, None, 8),
        (20_000, Some(65_529), 8),
        (46, None, 8),
        (53, None, 1),
        (0, None, 8),
        (20_000, Some(0), 8),
    ] {
        assert!(matches!(with(port, port6, slots), Err(KernelError::Resolver(_))), "{port} {port6:?} {slots}");
    }
    let resolver = ResolverAddresses { v4_base: SocketAddrV4::new(Ipv4Addr::LOCALHOST, 53), v6_base: None, slots: 8 };
    let config = KernelConfig {
        instance: "unit".to_owned(),
        actions: "/".into(),
        gate: "/".into(),
        bpffs: "/".into(),
        proxy: ProxyAddresses { v4: SocketAddrV4::new(Ipv4Addr::LOCALHOST, 1), v6: None },
        resolver: Some(resolver),
    };
    assert!(matches!(Enforcer::start(config), Err(KernelError::Resolver(_))));
}

#[test]
fn the_loading_thread_keeps_two_capabilities() {
    let effective = || {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap().trim().to_owned();
        u64::from_str_radix(&line, 16).unwrap()
    };
    let before = effective();
    match load::with_capabilities(false, move || Ok(effective())) {
        Ok(found) => assert_eq!(found, 1 << 39 | 1 << 12),
        Err(KernelError::Privilege(name)) => {
            let bit = if name == "CAP_BPF" { 39 } else { 12 };
            assert_eq!(before & 1 << bit, 0, "{name}");
        }
        Err(other) => panic!("{other}"),
    }
    assert_eq!(effective(), before);
}

#[test]
fn a_missing_privilege_is_named() {
    use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
    let without = std::thread::spawn(|| {
        let none = CapabilitySet::empty();
        set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none }).unwrap();
        load::with_capabilities(false, || Ok(()))
    });
    assert!(matches!(without.join().unwrap(), Err(KernelError::Privilege("CAP_BPF"))));
}
