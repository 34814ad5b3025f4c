use proptest::prelude::*;
use serde_json::json;

use super::*;

fn entry(text: &str) -> Entry {
    DomainEntry::Plain(text.to_owned()).compile().unwrap().0
}

fn detailed(value: serde_json::Value) -> Result<Entry, EntryError> {
    serde_json::from_value::<DomainEntry>(value).unwrap().compile().map(|(entry, _)| entry)
}

fn profile(entries: &[&str]) -> Profile {
    Profile::allowlist(entries.iter().map(|text| entry(text)))
}

fn reason(profile: &Profile, host: &str, port: u16) -> Option<DenyReason> {
    profile.permits(host, port).err().map(|denied| denied.reason)
}

#[test]
fn names_match_at_label_boundaries_only() {
    let tree = profile(&["example.com"]);
    for host in ["example.com", "api.example.com", "a.b.example.com", "EXAMPLE.com", "Api.Example.COM"] {
        assert_eq!(reason(&tree, host, 443), None, "{host}");
    }
    for host in ["notexample.com", "example.com.evil.net", "example.co", "com", "xample.com", "example-com.net"] {
        assert_eq!(reason(&tree, host, 443), Some(DenyReason::NameNotAllowed), "{host}");
    }
    let below = profile(&["*.example.com"]);
    for host in ["api.example.com", "a.b.example.com"] {
        assert_eq!(reason(&below, host, 443), None, "{host}");
    }
    for host in ["example.com", "notexample.com", "xexample.com"] {
        assert_eq!(reason(&below, host, 443), Some(DenyReason::NameNotAllowed), "{host}");
    }
    let exact = Profile::allowlist([detailed(json!({"domain": "example.com", "exact": true})).unwrap()]);
    assert_eq!(reason(&exact, "example.com", 443), None);
    assert_eq!(reason(&exact, "api.example.com", 443), Some(DenyReason::NameNotAllowed));
}

#[test]
fn addresses_and_malformed_names_are_never_permitted() {
    let wide = profile(&["example.com", "localhost"]);
    for host in [
        "127.0.0.1",
        "127.1",
        "0x7f000001",
        "2130706433",
        "0177.0.0.1",
        "[::1]",
        "::1",
        "[::ffff:127.0.0.1]",
        "1.2.3.4.",
    ] {
        assert_eq!(reason(&wide, host, 443), Some(DenyReason::AddressLiteral), "{host}");
    }
    for host in [
        "",
        ".",
        "example.com.",
        ".example.com",
        "a..example.com",
        "example.com:443",
        "user@example.com",
        "example.com/",
        "*.example.com",
        "example%2ecom",
        "exam ple.com",
        "example.com\0",
        "example.com\r\nx",
        "1.2.3.999",
        &format!("{}.example.com", "a".repeat(64)),
        &format!("{}example.com", "abcdefg.".repeat(40)),
    ] {
        assert_eq!(reason(&wide, host, 443), Some(DenyReason::InvalidName), "{host}");
    }
}

#[test]
fn unicode_names_are_compared_as_a_labels() {
    let list = profile(&["bücher.example"]);
    assert_eq!(list.entries()[0].pattern().name().as_str(), "xn--bcher-kva.example");
    for host in ["bücher.example", "BÜCHER.example", "xn--bcher-kva.example", "XN--BCHER-KVA.example"] {
        assert_eq!(reason(&list, host, 443), None, "{host}");
    }
    // U+3002 is a label separator to IDNA: one name, however it is spelt.
    assert_eq!(reason(&profile(&["example.com"]), "api\u{3002}example.com", 443), None);
    // Cyrillic а: another name.
    assert_eq!(reason(&profile(&["example.com"]), "ex\u{430}mple.com", 443), Some(DenyReason::NameNotAllowed));
}

#[test]
fn ports_default_to_80_and_443_and_are_kept_to_their_entry() {
    let list = Profile::allowlist([
        entry("a.example.com"),
        detailed(json!({"domain": "b.example.com", "ports": [8443]})).unwrap(),
    ]);
    assert_eq!(reason(&list, "a.example.com", 443), None);
    assert_eq!(reason(&list, "a.example.com", 80), None);
    assert_eq!(reason(&list, "a.example.com", 8443), Some(DenyReason::PortNotAllowed));
    assert_eq!(reason(&list, "b.example.com", 8443), None);
    assert_eq!(reason(&list, "b.example.com", 443), Some(DenyReason::PortNotAllowed));
    assert_eq!(reason(&list, "c.example.com", 8443), Some(DenyReason::NameNotAllowed));
}

#[test]
fn an_empty_allowlist_and_none_reach_nothing() {
    assert_eq!(reason(&profile(&[]), "example.com", 443), Some(DenyReason::NameNotAllowed));
    assert_eq!(reason(&Profile::None, "example.com", 443), Some(DenyReason::NoEgress));
}

#[test]
fn entries_that_are_no_names_or_too_wide_are_refused() {
    for text in [
        "",
        ".",
        "*",
        "*.",
        "*.*.example.com",
        "a.*.example.com",
        "*example.com",
        "example.com.",
        "a..com",
        "10.0.0.1",
        "0x7f.1",
        "[::1]",
        "https://example.com",
        "example.com:443",
        "example.com/x",
        "user@example.com",
        "a b.com",
    ] {
        assert!(DomainEntry::Plain(text.to_owned()).compile().is_err(), "{text}");
    }
    for text in ["*.com", "com", "*.co.uk", "co.uk", "*.kawasaki.jp", "*.ck", "*.test", "*.internal", "*.xn--p1ai"] {
        let error = DomainEntry::Plain(text.to_owned()).compile().unwrap_err();
        assert!(matches!(error, EntryError::Pattern(PatternError::PublicSuffix { .. })), "{text}: {error}");
    }
    for text in ["example.com", "*.example.co.uk", "localhost", "gitea", "*.svc.cluster.local", "_dmarc.example.com"] {
        let (_, remark) = DomainEntry::Plain(text.to_owned()).compile().unwrap();
        assert_eq!(remark, None, "{text}");
    }
    for text in ["*.github.io", "*.s3.amazonaws.com"] {
        assert!(DomainEntry::Plain(text.to_owned()).compile().unwrap().1.unwrap().contains("every customer"), "{text}");
    }
    assert!(detailed(json!({"domain": "com", "exact": true})).is_ok());
    assert!(detailed(json!({"domain": "*.example.com", "exact": true})).is_err());
}

#[test]
fn what_is_not_enforced_yet_is_refused() {
    for (value, what) in [
        (json!({"cidr": "10.0.0.0/8", "ports": [5432]}), "a {cidr} entry"),
        (json!({"domain": "example.com", "protocol": "tcp", "ports": [5432]}), "protocol: tcp"),
        (json!({"domain": "example.com", "protocol": "http"}), "protocol: http"),
        (json!({"domain": "example.com", "tls": "terminate"}), "tls: terminate"),
        (json!({"domain": "example.com", "methods": ["GET"]}), "methods of a domain entry"),
    ] {
        assert_eq!(detailed(value).unwrap_err().to_string(), NotEnforced::new(what).to_string());
    }
    assert!(detailed(json!({"domain": "example.com", "tls": "passthrough", "protocol": "tls"})).is_ok());
    assert_eq!(detailed(json!({"ports": [443]})), Err(EntryError::NeitherOrBoth));
    assert!(detailed(json!({"domain": "example.com", "ports": []})).is_err());
    assert!(detailed(json!({"domain": "example.com", "ports": [0]})).is_err());
    // A misspelt restriction is an error, not an entry without the restriction.
    assert!(serde_json::from_value::<DomainEntry>(json!({"domain": "example.com", "port": [1]})).is_err());
    assert!(serde_json::from_value::<DomainEntry>(json!({"domain": "example.com", "ports": [70000]})).is_err());
}

#[test]
fn the_hash_is_over_the_jcs_form_and_knows_no_order() {
    let list = Profile::allowlist([
        entry("b.example.com"),
        entry("*.a.example.com"),
        detailed(json!({"domain": "c.example.com", "ports": [8443, 443], "exact": true})).unwrap(),
    ]);
    let same = Profile::allowlist(list.entries().iter().rev().cloned().chain([entry("b.example.com")]));
    assert_eq!(list.hash(), same.hash());
    let parsed: serde_json::Value = serde_json::from_str(&list.canonical()).unwrap();
    assert_eq!(crate::action::canonical::jcs(&parsed).unwrap(), list.canonical().as_bytes());
    assert_ne!(list.hash(), profile(&["b.example.com"]).hash());
    assert_ne!(profile(&[]).hash(), Profile::None.hash());
    assert!(list.hash().starts_with("sha256:"));
}

#[test]
fn the_public_form_is_the_contracts() {
    assert_eq!(Profile::None.to_public(), json!("none"));
    assert_eq!(
        profile(&["b.example.com", "*.example.org"]).to_public(),
        json!({"proxy_allowlist": {"allowed_domains": ["b.example.com", "*.example.org"]}})
    );
}

#[test]
fn policy_narrows_and_never_widens() {
    let narrowed = |profile: &Profile, value: serde_json::Value| profile.narrowed(&Narrowing::parse(&value).unwrap());
    let list = Profile::allowlist([
        entry("example.com"),
        entry("*.example.org"),
        detailed(json!({"domain": "x.example.net", "ports": [8443], "exact": true})).unwrap(),
    ]);
    // What policy got, given back, changes nothing: ports and exactness included.
    assert_eq!(narrowed(&list, list.to_public()), list);
    assert_eq!(narrowed(&list, json!("none")), Profile::None);
    assert_eq!(
        narrowed(&Profile::None, json!({"proxy_allowlist": {"allowed_domains": ["example.com"]}})),
        Profile::None
    );
    assert_eq!(narrowed(&list, json!({"proxy_allowlist": {"allowed_domains": []}})), profile(&[]));
    let only = |domains: serde_json::Value| narrowed(&list, json!({"proxy_allowlist": {"allowed_domains": domains}}));
    assert_eq!(only(json!(["api.example.com"])), profile(&["api.example.com"]));
    assert_eq!(only(json!(["evil.test"])), profile(&[]));
    assert_eq!(only(json!(["*.com"])), profile(&["example.com"]));
    assert_eq!(only(json!(["example.org"])), profile(&["*.example.org"]));
    let https = only(json!([{"domain": "example.com", "ports": [443, 22], "exact": true}]));
    assert_eq!(reason(&https, "example.com", 443), None);
    assert_eq!(reason(&https, "example.com", 80), Some(DenyReason::PortNotAllowed));
    assert_eq!(reason(&https, "example.com", 22), Some(DenyReason::PortNotAllowed));
    assert_eq!(reason(&https, "a.example.com", 443), Some(DenyReason::NameNotAllowed));
    for wrong in [
        json!(null),
        json!(true),
        json!("all"),
        json!({}),
        json!({"proxy_allowlist": []}),
        json!({"proxy_allowlist": {"allowed_domains": "example.com"}}),
        json!({"proxy_allowlist": {"allowed_domains": [1]}}),
        json!({"proxy_allowlist": {"allowed_domains": ["10.0.0.1"]}}),
        json!({"proxy_allowlist": {"allowed_domains": []}, "also": 1}),
    ] {
        assert!(Narrowing::parse(&wrong).is_err(), "{wrong}");
    }
}

fn label() -> impl Strategy<Value = String> {
    // What stands like `xn--` at a label's start is not free text but Punycode (RFC 5891 §4.2.3.1).
    "[a-z][a-z0-9-]{0,6}[a-z0-9]".prop_filter("reserved", |label| label.get(2..4) != Some("--"))
}

fn dotted(labels: std::ops::Range<usize>) -> impl Strategy<Value = String> {
    prop::collection::vec(label(), labels).prop_map(|labels| labels.join("."))
}

fn pattern() -> impl Strategy<Value = Pattern> {
    // Few labels, so that names and patterns meet often.
    let name = prop::collection::vec("[ab]", 1..4).prop_map(|labels| labels.join("."));
    (name, 0..3_u8).prop_map(|(name, kind)| {
        let name = Name::parse(&name).unwrap();
        match kind {
            0 => Pattern::Exact(name),
            1 => Pattern::Tree(name),
            _ => Pattern::Below(name),
        }
    })
}

proptest! {
    #[test]
    fn a_match_is_whole_labels(suffix in dotted(2..4), host in dotted(1..6)) {
        let suffix_labels: Vec<&str> = suffix.split('.').collect();
        let host_labels: Vec<&str> = host.split('.').collect();
        let below = host_labels.len() > suffix_labels.len() && host_labels.ends_with(&suffix_labels);
        let (tree, wild) = (Pattern::parse(&suffix).unwrap(), Pattern::parse(&format!("*.{suffix}")).unwrap());
        let name = Name::parse(&host).unwrap();
        prop_assert_eq!(tree.matches(&name), below || host == suffix);
        prop_assert_eq!(wild.matches(&name), below);
    }

    #[test]
    fn gluing_text_on_never_matches(suffix in dotted(2..4), glue in "[a-z0-9-]{1,5}") {
        let tree = Pattern::parse(&suffix).unwrap();
        for host in [format!("{glue}{suffix}"), format!("{suffix}{glue}"), format!("{suffix}.{glue}x.zz")] {
            if let Ok(name) = Name::parse(&host) {
                prop_assert!(!tree.matches(&name), "{}", host);
            }
        }
    }

    #[test]
    fn below_the_suffix_always_matches(suffix in dotted(2..4), under in dotted(1..3)) {
        let name = Name::parse(&format!("{under}.{suffix}").to_uppercase()).unwrap();
        let wild = Pattern::parse(&format!("*.{suffix}")).unwrap();
        prop_assert!(wild.matches(&name));
    }

    #[test]
    fn any_text_is_parsed_or_refused_and_parsing_again_changes_nothing(text in "\\PC{0,40}") {
        if let Ok(name) = Name::parse(&text) {
            prop_assert_eq!(Name::parse(name.as_str()).unwrap(), name);
        }
    }

    #[test]
    fn an_intersection_is_what_both_match(a in pattern(), b in pattern(), host in prop::collection::vec("[ab]", 1..5)) {
        let name = Name::parse(&host.join(".")).unwrap();
        let both = a.intersect(&b).is_some_and(|pattern| pattern.matches(&name));
        prop_assert_eq!(both, a.matches(&name) && b.matches(&name));
    }
}
