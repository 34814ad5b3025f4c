use serde_json::json;

use super::*;
use crate::egress::profile::DomainEntry;

fn profile(entries: &[Value]) -> Profile {
    Profile::allowlist(entries.iter().map(|entry| {
        let entry: DomainEntry = serde_json::from_value(entry.clone()).unwrap();
        entry.compile().unwrap().0
    }))
}

fn denied(rule: &str, name: &str, port: u16) -> Value {
    json!({"verdict": "deny", "decided_by": "proxy", "rule": rule, "name": name, "port": port, "protocol": "connect",
        "action_id": "web_read", "decision_id": "d"})
}

/// The entry that an explanation proposes, read back as a manifest would.
fn proposed(explanation: &Explanation) -> Value {
    let change = explanation.change.as_ref().unwrap();
    let table: toml::Table = toml::from_str(change.configuration.as_ref().unwrap()).unwrap();
    serde_json::to_value(&table["definitions"]["allowed_domains"]["web_read"][0]).unwrap()
}

#[test]
fn the_change_that_is_proposed_allows_that_and_no_more() {
    let before = profile(&[json!("example.com")]);
    for (rule, name, port) in [
        ("name_not_allowed", "api.evil.test", 443),
        ("port_not_allowed", "example.com", 8443),
        ("name_not_allowed", "xn--bcher-kva.example", 22),
    ] {
        let explanation = explain(&denied(rule, name, port), Some(&before));
        let entry = proposed(&explanation);
        let after = profile(&[json!("example.com"), entry.clone()]);
        assert!(before.permits(name, port).is_err() && after.permits(name, port).is_ok(), "{entry}");
        assert!(after.permits(&format!("sub.{name}"), port).is_err(), "{entry}");
        assert!(after.permits(name, port + 1).is_err(), "{entry}");
        let manifest = explanation.change.unwrap().manifest.unwrap();
        let list: Vec<Value> = serde_saphyr::from_str(&manifest).unwrap();
        assert_eq!(list, [entry]);
    }
}

#[test]
fn an_action_without_egress_needs_an_allowlist_first() {
    let explanation = explain(&denied("no_egress", "example.com", 443), Some(&Profile::None));
    assert!(explanation.because.contains("`none`"), "{explanation:?}");
    let change = explanation.change.unwrap();
    assert!(change.manifest.unwrap().starts_with("egress: {profile: proxy_allowlist"));
    // `definitions.allowed_domains` adds to an allowlist, and cannot make one.
    assert_eq!(change.configuration, None);
}

#[test]
fn what_the_manifest_permits_was_taken_away_by_policy() {
    let list = profile(&[json!("example.com")]);
    let explanation = explain(&denied("name_not_allowed", "example.com", 443), Some(&list));
    assert!(explanation.change.as_ref().unwrap().what.contains("approved_egress"), "{explanation:?}");
    let question = json!({"verdict": "deny", "decided_by": "resolver", "rule": "name_not_allowed",
        "name": "example.com", "protocol": "dns"});
    assert!(explain(&question, Some(&list)).change.unwrap().what.contains("approved_egress"));
    // The port that was asked is the resolver's, and none of the name's.
    let question = json!({"verdict": "deny", "decided_by": "resolver", "rule": "name_not_allowed",
        "name": "other.test", "port": 53, "protocol": "dns", "action_id": "web_read"});
    let explanation = explain(&question, Some(&list));
    assert_eq!(explanation.asked, "the addresses of other.test");
    assert_eq!(proposed(&explanation), json!({"domain": "other.test", "ports": [443], "exact": true}));
}

#[test]
fn a_hostile_name_is_never_proposed() {
    for name in ["a\"] = 1\n[operators]", "1.2.3.4", "*.com", "x y", ""] {
        let change = explain(&denied("name_not_allowed", name, 443), Some(&profile(&[]))).change.unwrap();
        assert_eq!((change.manifest, change.configuration), (None, None), "{name:?}");
    }
}

#[test]
fn every_rule_of_the_kernel_and_of_the_proxy_is_known() {
    let reasons = [
        "no_entry",
        "expired",
        "foreign_generation",
        "heartbeat_stopped",
        "profile_none",
        "not_the_proxy",
        "datagram",
        "socket_kind",
        "foreign_socket",
        "malformed",
        "map_full",
        "too_many_flows",
        "not_in_profile",
        "too_many_servers",
        "too_many_queries",
        "query_in_flight",
        "query_rate",
    ];
    let there = latchgate_egress_types::Reason::ALL.len();
    assert!(there <= reasons.len(), "a reason that is new needs its explanation in `rules`, and its name here");
    for reason in reasons {
        let flow = json!({"verdict": "deny", "decided_by": "hook", "hook": "connect4", "rule": reason, "reason": reason,
            "protocol": "tcp", "address": "192.0.2.1", "port": 80, "action_id": "a"});
        let explanation = explain(&flow, None);
        assert!(!explanation.change.as_ref().unwrap().what.contains("does not know"), "{explanation:?}");
        assert_eq!(explanation.asked, "tcp (connect4) to 192.0.2.1:80");
    }
    for rule in [
        "no_egress",
        "address_literal",
        "invalid_name",
        "name_not_allowed",
        "port_not_allowed",
        "method_not_allowed",
        "address_not_public:private",
        "connection_limit",
        "connections_per_execution",
        "unattributed",
        "no_session",
        "malformed",
        "no_request",
        "sni_mismatch",
        "sni_missing",
        "ech",
        "not_tls",
        "host_mismatch",
        "protocol_not_allowed",
        "address_not_allowed",
        "dns_malformed",
        "dns_type_not_allowed",
        "dns_class_not_allowed",
        "dns_rate",
        "dns_names_per_execution",
        "disputed",
        "kernel_refused",
        "no_resolver",
    ] {
        let explanation = explain(&denied(rule, "a.example", 443), None);
        assert!(!explanation.change.as_ref().unwrap().what.contains("does not know"), "{explanation:?}");
    }
    let strange = explain(&denied("of_next_year", "a.example", 443), None);
    assert!(strange.because.contains("of_next_year"));
}

#[test]
fn what_was_allowed_needs_no_change_and_says_what_failed() {
    let mut flow = denied("profile", "a.example", 443);
    flow["verdict"] = json!("allow");
    let allowed = explain(&flow, None);
    assert_eq!((allowed.outcome, allowed.change), ("allowed", None));
    flow["error"] = json!("tls_certificate");
    let failed = explain(&flow, None);
    assert_eq!((failed.outcome, failed.change), ("allowed, and failed", None));
    assert!(failed.because.contains("certificate"), "{}", failed.because);
}

#[test]
fn a_receipt_gives_the_flow_that_was_asked_about() {
    let receipt = json!({
        "receipt_id": "receipt-1", "grant_id": "grant-1", "decision_id": "call-1", "trace_id": "trace-1",
        "action_id": "a", "principal": "p", "workspace": "w",
        "egress_evidence": [
            {"kernel": null, "proxy": {}},
            {"verdict": "deny", "decided_by": "hook", "decision_id": "kernel-1"},
            {"verdict": "allow", "decision_id": "flow-1", "action_id": "a"},
            {"verdict": "deny", "decision_id": "flow-2", "action_id": "a"},
        ],
    });
    let ids = |id: &str| -> Vec<String> {
        flows_of(&receipt, id).iter().map(|flow| flow["decision_id"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(ids("flow-1"), ["flow-1"]);
    for whole in ["receipt-1", "grant-1", "call-1", "trace-1"] {
        assert_eq!(ids(whole), ["kernel-1", "flow-2"], "{whole}");
    }
    assert!(ids("something-that-it-mentions").is_empty());
    assert_eq!(flows_of(&receipt, "kernel-1")[0]["principal"], "p");
    let event =
        json!({"event_type": "refused", "decision_id": "d", "details": {"flow": {"decision_id": "d", "name": "x"}}});
    assert_eq!(flows_of(&event, "d")[0]["name"], "x");
}
