use super::*;
use crate::egress::profile::Pattern;

fn flow(name: &str, port: u16, protocol: &str, verdict: &str, rule: &str) -> Value {
    json!({"name": name, "port": port, "protocol": protocol, "verdict": verdict, "rule": rule, "connections": 1})
}

fn profile() -> Profile {
    let terminate = Entry::new(Pattern::parse("api.example.net").unwrap(), [443])
        .speaking(EntryProtocol::Tls { terminate: true }, ["GET".to_owned()]);
    let plain = Entry::new(Pattern::parse("example.com").unwrap(), []);
    let unused = Entry::new(Pattern::parse("never.example.org").unwrap(), [8443]);
    Profile::allowlist([terminate, plain, unused]).in_audit()
}

fn seen() -> Vec<Value> {
    vec![
        flow("www.example.com", 443, "tls", "allow", "profile"),
        flow("www.example.com", 443, "tls", "allow", "profile"),
        flow("www.example.com", 80, "http", "allow", "profile"),
        flow("api.example.net", 443, "https", "allow", "profile"),
        flow("cdn.example.org", 443, "tls", "would_deny", "name_not_allowed"),
        flow("cdn.example.org", 53, "dns", "would_deny", "name_not_allowed"),
        flow("asked-only.example.org", 53, "dns", "would_deny", "name_not_allowed"),
        flow("evil.example.org", 443, "tls", "deny", "name_not_allowed"),
        flow("fronted.example.org", 443, "tls", "deny", "sni_mismatch"),
        json!({"address": "10.1.2.3", "name": "10.1.2.3", "port": 22, "verdict": "deny", "rule": "not_in_profile"}),
    ]
}

#[test]
fn what_was_let_through_is_covered_and_no_more() {
    let told = suggest("a", &profile(), &seen(), false);
    assert_eq!(
        told.manifest,
        "egress:\n  profile: proxy_allowlist\n  allowed_domains:\n    \
         - {domain: api.example.net, exact: true, ports: [443], tls: terminate, methods: [GET]}\n    \
         - {domain: cdn.example.org, exact: true, ports: [443], protocol: tls}  # new\n    \
         - {domain: www.example.com, exact: true, ports: [80], protocol: http}\n    \
         - {domain: www.example.com, exact: true, ports: [443], protocol: tls}\n  \
         # nothing seen needs: never.example.org:8443\n"
    );
    assert_eq!(told.flows, 5);
    let with_refused = suggest("a", &profile(), &seen(), true);
    assert!(with_refused.manifest.contains("evil.example.org"));
    assert!(with_refused.manifest.contains("{cidr: \"10.1.2.3/32\", ports: [22]}"));
    assert!(!with_refused.manifest.contains("fronted"), "no entry would have permitted that");
}

#[test]
fn the_section_loads_and_permits_what_was_seen() {
    let told = suggest("a", &profile(), &seen(), true);
    let manifest = format!("action_id: a\nversion: \"1\"\nprovider_module_digest: builtin:http_api\n{}", told.manifest);
    let manifest = crate::action::manifest::Manifest::parse(&manifest, None).unwrap();
    for flow in seen().iter().filter(|flow| flow["protocol"] != "dns" && flow["rule"] != "sni_mismatch") {
        let (name, port) = (flow["name"].as_str().unwrap(), flow["port"].as_u64().unwrap() as u16);
        assert!(manifest.profile.permits_target(name, port).is_ok(), "{flow}");
    }
    for (name, port) in [("sub.www.example.com", 443), ("example.com", 443), ("cdn.example.org", 80)] {
        assert!(manifest.profile.permits(name, port).is_err(), "{name}:{port}");
    }
}

#[test]
fn nothing_seen_is_nothing_needed() {
    let told = suggest("a", &profile(), &[], true);
    assert!(told.manifest.starts_with("egress:\n  profile: none\n"), "{}", told.manifest);
    assert_eq!(told.unused.len(), 3);
}

#[test]
fn what_a_client_wrote_cannot_write_the_manifest() {
    let nasty = "a.example.org, exact: true}\n    - {domain: evil.example";
    let told = suggest("a", &profile(), &[flow(nasty, 443, "tls", "would_deny", "name_not_allowed")], true);
    assert!(told.items.is_empty(), "{:?}", told.items);
    assert!(!told.manifest.lines().any(|line| line.trim_start().starts_with("- {")), "{}", told.manifest);
}
