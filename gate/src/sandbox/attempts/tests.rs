use super::*;

#[test]
fn every_technique_has_a_name_of_its_own() {
    let names: std::collections::BTreeSet<_> = TECHNIQUES.iter().map(|technique| technique.name).collect();
    assert_eq!(names.len(), TECHNIQUES.len());
    assert!(TECHNIQUES.iter().all(|technique| named(technique.name).is_some()));
    assert!(named("").is_none());
}

#[test]
fn what_needs_a_listener_says_so_when_there_is_none() {
    let order = order();
    for technique in TECHNIQUES.iter().filter(|technique| technique.target.is_some()) {
        assert!(
            matches!((technique.run)(&order, technique.name), Saw::Hindered { .. }),
            "{} did something without its listener",
            technique.name
        );
    }
}

#[test]
fn what_is_tried_here_is_not_held_and_is_seen_to_reach() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut order = order();
    order.targets.insert("tcp_v4".to_owned(), listener.local_addr().unwrap());
    order.targets.insert("tcp_mapped".to_owned(), listener.local_addr().unwrap());
    order.patience_ms = 100;
    for name in ["tcp_v4", "tcp_mapped"] {
        let technique = named(name).unwrap();
        assert!(matches!((technique.run)(&order, name), Saw::Reached { .. }), "{name}");
    }
    drop(listener);
    let refused = tcp::plain(&order, "tcp_v4");
    assert_eq!(refused, Saw::Refused { at: "connect".to_owned(), errno: libc::ECONNREFUSED });
    // This process has no filter and more than three descriptors.
    assert!(matches!(process::seccomp_filter(&order, ""), Saw::Reached { .. }));
    assert!(matches!(process::descriptors(&order, ""), Saw::Reached { .. }));
    assert!(matches!(process::no_new_privs(&order, ""), Saw::Reached { .. }));
}

fn order() -> Order {
    let nowhere: SocketAddr = "127.0.0.1:1".parse().unwrap();
    Order {
        outside: true,
        techniques: Vec::new(),
        token: "token".to_owned(),
        number: 1,
        targets: BTreeMap::new(),
        inbound_port: 0,
        inbound_ms: 10,
        patience_ms: 10,
        proxy: nowhere,
        dns: [nowhere, nowhere],
        name: None,
        other_name: "other.invalid".to_owned(),
        cgroup_procs: PathBuf::from("/nonexistent"),
        state_dir: (PathBuf::from("/nonexistent"), 0, 0),
        unix_path: PathBuf::from("/nonexistent"),
        unix_abstract: "nobody".to_owned(),
        victim: 0,
        victim_token: String::new(),
    }
}
