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

/// One entry of each form that may not be enforced yet.
fn form(form: Form) -> serde_json::Value {
    match form {
        Form::Cidr => json!({"cidr": "10.0.0.0/8", "ports": [5432]}),
        Form::Http => json!({"domain": "example.com", "protocol": "http"}),
        Form::Tcp => json!({"domain": "example.com", "protocol": "tcp", "ports": [5432], "exact": true}),
        Form::Terminate => json!({"domain": "example.com", "tls": "terminate"}),
        Form::Methods => json!({"domain": "example.com", "methods": ["GET"], "tls": "terminate"}),
    }
}

/// The rule of an entry where everything is enforced.
fn rule(value: serde_json::Value) -> Result<Rule, EntryError> {
    serde_json::from_value::<DomainEntry>(value).unwrap().rule_without(&[]).map(|(rule, _)| rule)
}

fn names(value: serde_json::Value) -> Entry {
    match rule(value).unwrap() {
        Rule::Names(entry) => entry,
        Rule::Addresses(entry) => panic!("{entry}"),
    }
}

fn addresses(value: serde_json::Value) -> NetworkEntry {
    match rule(value).unwrap() {
        Rule::Addresses(entry) => entry,
        Rule::Names(entry) => panic!("{entry}"),
    }
}

#[test]
fn what_is_not_enforced_yet_is_refused() {
    for wanted in Form::ALL {
        let entry: DomainEntry = serde_json::from_value(form(wanted)).unwrap();
        let one = entry.rule_without(&[wanted]).unwrap_err();
        assert_eq!(one.to_string(), NotEnforced::new(wanted.name()).to_string());
        assert!(entry.rule_without(&[]).is_ok(), "{wanted:?}");
        let others: Vec<Form> = Form::ALL.into_iter().filter(|other| *other != wanted).collect();
        let alone = entry.rule_without(&others);
        assert_eq!(alone.is_ok(), wanted != Form::Methods, "{wanted:?}: methods come with what shows them");
        assert_eq!(entry.rule().is_err(), entry.rule_without(NOT_ENFORCED).is_err());
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
fn each_form_is_read_as_it_is_written() {
    let terminate = EntryProtocol::Tls { terminate: true };
    let passthrough = EntryProtocol::Tls { terminate: false };
    for (value, protocol, methods) in [
        (json!({"domain": "a.example"}), EntryProtocol::Auto, &[][..]),
        (json!({"domain": "a.example", "protocol": "tls"}), passthrough, &[]),
        (json!({"domain": "a.example", "tls": "passthrough"}), passthrough, &[]),
        (json!({"domain": "a.example", "tls": "terminate"}), terminate, &[]),
        (
            json!({"domain": "a.example", "tls": "terminate", "methods": ["post", "GET", "GET"]}),
            terminate,
            &["GET", "POST"],
        ),
        (json!({"domain": "a.example", "protocol": "http", "methods": ["GET"]}), EntryProtocol::Http, &["GET"]),
        (json!({"domain": "a.example", "protocol": "tcp", "ports": [5432], "exact": true}), EntryProtocol::Tcp, &[]),
    ] {
        let entry = names(value.clone());
        assert_eq!(
            (entry.protocol(), entry.methods()),
            (protocol, methods.iter().map(|it| (*it).to_owned()).collect::<Vec<_>>().as_slice()),
            "{value}"
        );
    }
    let network = addresses(json!({"cidr": "10.1.0.0/16", "ports": [5432, 22], "protocol": "tcp"}));
    assert_eq!(network.network(), ("10.1.0.0".parse().unwrap(), 16));
    assert_eq!((network.ports(), network.protocol()), (&[22, 5432][..], EntryProtocol::Tcp));
    assert_eq!(addresses(json!({"cidr": "192.0.2.7/32"})).ports(), DEFAULT_PORTS);
    assert_eq!(
        names(json!({"domain": "a.example", "tls": "terminate", "methods": ["GET"]})).to_string(),
        "a.example:80,443 tls terminate GET"
    );
    assert_eq!(network.to_string(), "10.1.0.0/16:22,5432 tcp");
}

#[test]
fn forms_that_could_not_be_held_to_are_refused() {
    for value in [
        // Nothing inside tells for whom it is.
        json!({"domain": "a.example", "protocol": "tcp", "ports": [5432]}),
        json!({"domain": "*.a.example", "protocol": "tcp", "ports": [5432]}),
        json!({"domain": "a.example", "protocol": "tcp", "exact": true}),
        // No request is seen.
        json!({"domain": "a.example", "methods": ["GET"]}),
        json!({"domain": "a.example", "methods": ["GET"], "protocol": "tls"}),
        json!({"domain": "a.example", "methods": ["GET"], "protocol": "tcp", "ports": [1], "exact": true}),
        json!({"domain": "a.example", "methods": [], "protocol": "http"}),
        json!({"domain": "a.example", "methods": ["CONNECT"], "protocol": "http"}),
        json!({"domain": "a.example", "methods": ["GE\"T"], "protocol": "http"}),
        json!({"domain": "a.example", "protocol": "http", "tls": "terminate"}),
        json!({"domain": "a.example", "protocol": "tcp", "tls": "passthrough", "ports": [1], "exact": true}),
        json!({"domain": "a.example", "cidr": "10.0.0.0/8"}),
        json!({"cidr": "10.0.0.0/8", "exact": true}),
        json!({"cidr": "10.0.0.0/8", "methods": ["GET"], "protocol": "http"}),
        json!({"cidr": "10.0.0.0/8", "tls": "terminate"}),
        json!({"cidr": "10.0.0.0/8", "ports": []}),
        json!({"cidr": "10.0.0.0/8", "ports": [0]}),
        // Not a network in its one spelling.
        json!({"cidr": "10.0.0.0"}),
        json!({"cidr": "10.0.0.1/8"}),
        json!({"cidr": "10.0.0.0/33"}),
        json!({"cidr": "10.0.0.0/+8"}),
        json!({"cidr": "10.0.0.0/"}),
        json!({"cidr": "010.0.0.0/8"}),
        json!({"cidr": "0x0a000000/8"}),
        json!({"cidr": "example.com/8"}),
        json!({"cidr": "::ffff:10.0.0.0/104"}),
        json!({"cidr": "fe80::%1/64"}),
        // Everything, or near it.
        json!({"cidr": "0.0.0.0/0"}),
        json!({"cidr": "128.0.0.0/1"}),
        json!({"cidr": "::/0"}),
        json!({"cidr": "2000::/3"}),
        // Nobody to connect to, and the gate's own.
        json!({"cidr": "224.0.0.0/8"}),
        json!({"cidr": "0.0.0.0/8"}),
        json!({"cidr": "255.255.255.255/32"}),
        json!({"cidr": "ff02::/16"}),
        json!({"cidr": "198.18.0.0/15"}),
        json!({"cidr": "198.18.4.0/24"}),
        json!({"cidr": "198.0.0.0/8"}),
    ] {
        assert!(rule(value.clone()).is_err(), "{value}");
    }
    let remark = |cidr: &str| {
        let entry: DomainEntry = serde_json::from_value(json!({"cidr": cidr})).unwrap();
        entry.rule_without(&[]).unwrap().1
    };
    assert!(remark("127.0.0.0/8").unwrap().contains("the gate's own machine"));
    assert!(remark("169.254.169.254/32").unwrap().contains("credentials"));
    for quiet in ["10.0.0.0/8", "192.0.2.0/24", "8.8.8.8/32", "2001:db8::/32", "fc00::/7", "fd00::/8"] {
        assert_eq!(remark(quiet), None, "{quiet}");
    }
}

#[test]
fn the_most_particular_entry_is_the_rule() {
    let list = Profile::allowlist([
        names(json!({"domain": "example.com"})),
        names(
            json!({"domain": "api.example.com", "exact": true, "tls": "terminate", "methods": ["GET"], "ports": [443]}),
        ),
        names(json!({"domain": "*.cdn.example.com", "protocol": "tls"})),
    ]);
    let rule = |host: &str, port: u16| list.permits(host, port).map(ToString::to_string).unwrap();
    assert_eq!(rule("api.example.com", 443), "=api.example.com:443 tls terminate GET");
    assert_eq!(rule("v1.api.example.com", 443), "example.com:80,443");
    assert_eq!(rule("x.cdn.example.com", 443), "*.cdn.example.com:80,443 tls");
    assert_eq!(rule("cdn.example.com", 443), "example.com:80,443");
    // Each port has its own rule.
    assert_eq!(rule("api.example.com", 80), "example.com:80,443");
    assert_eq!(list.contradiction(), None);
    for (one, other) in [
        (json!({"domain": "a.example"}), json!({"domain": "a.example", "protocol": "tls"})),
        (json!({"domain": "*.a.example", "ports": [443, 1]}), json!({"domain": "*.a.example", "tls": "terminate"})),
        (
            json!({"domain": "a.example", "protocol": "http"}),
            json!({"domain": "a.example", "protocol": "http", "methods": ["GET"]}),
        ),
    ] {
        let both = Profile::allowlist([names(one.clone()), names(other.clone())]);
        assert!(both.contradiction().is_some(), "{one} {other}");
    }
    let networks = |other: serde_json::Value| {
        profile(&[]).with_networks([addresses(json!({"cidr": "10.0.0.0/8"})), addresses(other)]).contradiction()
    };
    assert!(networks(json!({"cidr": "10.0.0.0/8", "protocol": "tcp", "ports": [443]})).is_some());
    assert!(networks(json!({"cidr": "10.0.0.0/8", "protocol": "tcp", "ports": [22]})).is_none());
    assert!(networks(json!({"cidr": "10.1.0.0/16", "protocol": "tcp"})).is_none());
}

#[test]
fn addresses_are_permitted_by_networks_alone() {
    let list = profile(&["example.com"]).with_networks([
        addresses(json!({"cidr": "10.0.0.0/8", "ports": [443]})),
        addresses(json!({"cidr": "10.1.0.0/16", "ports": [443, 5432], "protocol": "tcp"})),
        addresses(json!({"cidr": "2001:db8::/32"})),
    ]);
    let reason = |address: &str, port: u16| {
        list.permits_address(address.parse().unwrap(), port).err().map(|denied| denied.reason)
    };
    for (address, port, denied) in [
        ("10.0.0.1", 443, None),
        ("10.255.255.255", 443, None),
        ("::ffff:10.0.0.1", 443, None),
        ("2001:db8::1", 80, None),
        ("10.1.2.3", 5432, None),
        ("10.0.0.1", 80, Some(DenyReason::PortNotAllowed)),
        ("11.0.0.0", 443, Some(DenyReason::AddressNotAllowed)),
        ("9.255.255.255", 443, Some(DenyReason::AddressNotAllowed)),
        ("2001:db9::", 443, Some(DenyReason::AddressNotAllowed)),
        ("::10.0.0.1", 443, Some(DenyReason::AddressNotAllowed)),
    ] {
        assert_eq!(reason(address, port), denied, "{address}:{port}");
    }
    let address = "10.1.2.3".parse().unwrap();
    assert_eq!(list.permits_address(address, 443).unwrap().protocol(), EntryProtocol::Tcp);
    assert_eq!(profile(&["a.example"]).permits_address(address, 443).unwrap_err().reason, DenyReason::AddressLiteral);
    assert_eq!(Profile::None.permits_address(address, 443).unwrap_err().reason, DenyReason::NoEgress);
    // Every spelling is one address, and none of them is a name.
    for host in ["10.0.0.1", "[::ffff:10.0.0.1]", "::ffff:10.0.0.1", "0xa000001", "167772161", "10.1"] {
        assert!(matches!(list.permits_target(host, 443), Ok(Permitted::Address(_))), "{host}");
        assert_eq!(list.permits(host, 443).unwrap_err().reason, DenyReason::AddressLiteral, "{host}");
    }
    assert!(matches!(list.permits_target("example.com", 443), Ok(Permitted::Name(_))));
    assert_eq!(list.permits_target("10.0.0.1.", 80).unwrap_err().reason, DenyReason::PortNotAllowed);
    let networks: Vec<(IpAddr, u8, &[u16])> = list.networks().collect();
    assert_eq!(networks.len(), 3);
    assert_eq!(networks[0], ("10.0.0.0".parse().unwrap(), 8, &[443][..]));
    assert_eq!(Profile::None.with_networks([addresses(json!({"cidr": "10.0.0.0/8"}))]), Profile::None);
}

#[test]
fn a_request_is_held_to_the_protocol_and_methods_of_its_entry() {
    let denied = |value: serde_json::Value, method: &str, over_tls: bool| {
        names(value).permits_request(method, over_tls).err().map(|denied| denied.reason)
    };
    let plain = || json!({"domain": "a.example"});
    let tls = || json!({"domain": "a.example", "tls": "terminate", "methods": ["GET"]});
    let http = || json!({"domain": "a.example", "protocol": "http"});
    assert_eq!((denied(plain(), "PUT", true), denied(plain(), "PUT", false)), (None, None));
    assert_eq!(denied(tls(), "GET", true), None);
    assert_eq!(denied(tls(), "PUT", true), Some(DenyReason::MethodNotAllowed));
    assert_eq!(denied(tls(), "GET", false), Some(DenyReason::ProtocolNotAllowed));
    assert_eq!(
        (denied(http(), "PUT", false), denied(http(), "PUT", true)),
        (None, Some(DenyReason::ProtocolNotAllowed))
    );
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
    // Names, ports and `exact` hash as they did when there was nothing else.
    assert_eq!(
        profile(&["b.example.com"]).canonical(),
        r#"{"entries":[{"match":"tree","name":"b.example.com","ports":[80,443]}],"profile":"proxy_allowlist"}"#
    );
    let mut hashes = std::collections::BTreeSet::new();
    for value in [
        json!({"domain": "a.example", "exact": true, "ports": [1]}),
        json!({"domain": "a.example", "exact": true, "ports": [1], "protocol": "tls"}),
        json!({"domain": "a.example", "exact": true, "ports": [1], "protocol": "tcp"}),
        json!({"domain": "a.example", "exact": true, "ports": [1], "protocol": "http"}),
        json!({"domain": "a.example", "exact": true, "ports": [1], "protocol": "http", "methods": ["GET"]}),
        json!({"domain": "a.example", "exact": true, "ports": [1], "protocol": "http", "methods": ["GET", "PUT"]}),
        json!({"domain": "a.example", "exact": true, "ports": [1], "tls": "terminate"}),
    ] {
        let one = Profile::allowlist([names(value)]);
        let parsed: serde_json::Value = serde_json::from_str(&one.canonical()).unwrap();
        assert_eq!(crate::action::canonical::jcs(&parsed).unwrap(), one.canonical().as_bytes());
        hashes.insert(one.hash());
    }
    for value in [
        json!({"cidr": "10.0.0.0/8", "ports": [1]}),
        json!({"cidr": "10.0.0.0/9", "ports": [1]}),
        json!({"cidr": "10.0.0.0/8", "ports": [2]}),
        json!({"cidr": "10.0.0.0/8", "ports": [1], "protocol": "tcp"}),
    ] {
        let one = profile(&[]).with_networks([addresses(value)]);
        let parsed: serde_json::Value = serde_json::from_str(&one.canonical()).unwrap();
        assert_eq!(crate::action::canonical::jcs(&parsed).unwrap(), one.canonical().as_bytes());
        hashes.insert(one.hash());
    }
    assert_eq!(hashes.len(), 11, "every difference is in the hash");
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
        // What does not narrow must not look as if it did.
        json!({"proxy_allowlist": {"allowed_domains": [{"domain": "example.com", "protocol": "tls"}]}}),
        json!({"proxy_allowlist": {"allowed_domains": [{"domain": "example.com", "methods": ["GET"]}]}}),
        json!({"proxy_allowlist": {"allowed_domains": [{"cidr": "10.0.0.0/8", "exact": true}]}}),
        json!({"proxy_allowlist": {"allowed_domains": ["10.0.0.1/8"]}}),
    ] {
        assert!(Narrowing::parse(&wrong).is_err(), "{wrong}");
    }
}

#[test]
fn policy_narrows_networks_and_keeps_rules() {
    let narrowed = |list: &Profile, domains: serde_json::Value| {
        let approved = json!({"proxy_allowlist": {"allowed_domains": domains}});
        list.narrowed(&Narrowing::parse(&approved).unwrap())
    };
    let list = profile(&["example.com"]).with_networks([
        addresses(json!({"cidr": "10.0.0.0/8", "ports": [443]})),
        addresses(json!({"cidr": "10.1.0.0/16", "ports": [443], "protocol": "tcp"})),
    ]);
    assert_eq!(
        list.to_public()["proxy_allowlist"]["allowed_domains"],
        json!(["example.com", "10.0.0.0/8", "10.1.0.0/16"])
    );
    let same = narrowed(&list, list.to_public()["proxy_allowlist"]["allowed_domains"].clone());
    assert_eq!(same, list);
    let only = narrowed(&list, json!([{"cidr": "10.1.2.0/24", "ports": [443, 22]}]));
    let rule = only.permits_address("10.1.2.3".parse().unwrap(), 443).unwrap();
    // The wide entry is cut to the same network; the narrow one's rule stays the rule.
    assert_eq!((rule.protocol(), only.contradiction()), (EntryProtocol::Tcp, None));
    for (address, port) in [("10.1.2.3", 22), ("10.1.3.1", 443), ("10.0.0.1", 443)] {
        assert!(only.permits_address(address.parse().unwrap(), port).is_err(), "{address}:{port}");
    }
    assert!(only.permits("example.com", 443).is_err());
    assert_eq!(narrowed(&list, json!(["example.com"])), profile(&["example.com"]));
    let list = Profile::allowlist([
        names(json!({"domain": "example.com"})),
        names(json!({"domain": "api.example.com", "tls": "terminate", "methods": ["GET"]})),
    ]);
    let only = narrowed(&list, json!(["v1.api.example.com"]));
    assert_eq!(only.permits("v1.api.example.com", 443).unwrap().methods(), ["GET"]);
    assert_eq!(only.contradiction(), None);
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

    /// Whatever policy leaves, it leaves the rule that held before.
    #[test]
    fn narrowing_never_changes_the_rule_of_what_it_leaves(
        entries in prop::collection::vec((pattern(), 0..3_u8), 1..6),
        limits in prop::collection::vec(pattern(), 1..4),
        host in prop::collection::vec("[ab]", 1..5),
    ) {
        let protocol = |kind: u8| match kind {
            0 => EntryProtocol::Auto,
            1 => EntryProtocol::Http,
            _ => EntryProtocol::Tls { terminate: true },
        };
        let before = Profile::allowlist(entries.into_iter().map(|(pattern, kind)| Entry::new(pattern, [443]).speaking(protocol(kind), [])));
        prop_assume!(before.contradiction().is_none());
        let text = |pattern: &Pattern| match pattern {
            Pattern::Exact(name) => json!({"domain": name.as_str(), "exact": true}),
            other => json!(other.to_string()),
        };
        let approved: Vec<serde_json::Value> = limits.iter().map(text).collect();
        let approved = Narrowing::parse(&json!({"proxy_allowlist": {"allowed_domains": approved}})).unwrap();
        let after = before.narrowed(&approved);
        prop_assert_eq!(after.contradiction(), None);
        let (host, name) = (host.join("."), Name::parse(&host.join(".")).unwrap());
        let left = limits.iter().any(|limit| limit.matches(&name));
        let rule = |profile: &Profile| profile.permits(&host, 443).ok().map(Entry::protocol);
        prop_assert_eq!(rule(&after), rule(&before).filter(|_| left));
    }

    #[test]
    fn an_intersection_is_what_both_match(a in pattern(), b in pattern(), host in prop::collection::vec("[ab]", 1..5)) {
        let name = Name::parse(&host.join(".")).unwrap();
        let both = a.intersect(&b).is_some_and(|pattern| pattern.matches(&name));
        prop_assert_eq!(both, a.matches(&name) && b.matches(&name));
    }
}

#[test]
fn audit_lets_through_public_names_at_two_ports_and_nothing_else() {
    let entry = Entry::new(Pattern::parse("kept.example.org").unwrap(), [8443]);
    let strict = Profile::allowlist([entry]);
    let audit = strict.clone().in_audit();
    for (host, port, reason) in [
        ("other.example.com", 443, DenyReason::NameNotAllowed),
        ("a.b.co.uk", 80, DenyReason::NameNotAllowed),
        ("OTHER.Example.com", 443, DenyReason::NameNotAllowed),
        ("kept.example.org", 443, DenyReason::PortNotAllowed),
    ] {
        assert_eq!(audit.audits(host, port), Ok(reason), "{host}:{port}");
        assert!(strict.audits(host, port).is_err(), "{host}:{port} without the mode");
        assert!(audit.permits(host, port).is_err(), "what is let through is not permitted: {host}:{port}");
    }
    for (host, port) in [
        ("other.example.com", 22),
        ("other.example.com", 8443),
        ("localhost", 80),
        ("db", 443),
        ("router.local", 80),
        ("metadata.google.internal", 80),
        ("printer.lan", 443),
        ("1.0.0.127.in-addr.arpa", 80),
        ("hidden.onion", 443),
        ("8.8.8.8", 443),
        ("0x08080808", 443),
        ("[2001:4860:4860::8888]", 443),
        ("2001:4860:4860::8888", 443),
        ("other.example.com.", 443),
        ("com", 443),
        ("", 443),
        // An entry's own rule holds there.
        ("kept.example.org", 8443),
    ] {
        assert!(audit.audits(host, port).is_err(), "{host}:{port}");
    }
    assert!(!Profile::None.in_audit().is_audit());
    assert_ne!(audit.hash(), strict.hash());
}

#[test]
fn policy_may_take_the_audit_away_and_never_gives_it() {
    let narrow = |profile: &Profile, public: &Value| profile.narrowed(&Narrowing::parse(public).unwrap());
    let strict = Profile::allowlist([Entry::new(Pattern::parse("kept.example.org").unwrap(), [])]);
    let audit = strict.clone().in_audit();
    // The built-in policy says again what it was told.
    assert_eq!(narrow(&audit, &audit.to_public()), audit);
    assert_eq!(narrow(&audit, &strict.to_public()), strict);
    assert_eq!(narrow(&strict, &audit.to_public()), strict);
    assert!(Narrowing::parse(&json!({"proxy_allowlist": {"allowed_domains": [], "mode": "on"}})).is_err());
    assert!(Narrowing::parse(&json!({"proxy_allowlist": {"mode": 1}})).is_err());
}
