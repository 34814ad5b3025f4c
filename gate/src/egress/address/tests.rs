use super::*;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn every_class_is_refused_at_both_edges_and_its_neighbours_pass() {
    for (first, last, before, after, class) in [
        ("0.0.0.0", "0.255.255.255", None, Some("1.0.0.0"), "this_network"),
        ("10.0.0.0", "10.255.255.255", Some("9.255.255.255"), Some("11.0.0.0"), "private"),
        ("100.64.0.0", "100.127.255.255", Some("100.63.255.255"), Some("100.128.0.0"), "shared"),
        ("127.0.0.0", "127.255.255.255", Some("126.255.255.255"), Some("128.0.0.0"), "loopback"),
        ("169.254.0.0", "169.254.255.255", Some("169.253.255.255"), Some("169.255.0.0"), "link_local"),
        ("172.16.0.0", "172.31.255.255", Some("172.15.255.255"), Some("172.32.0.0"), "private"),
        ("192.0.0.0", "192.0.0.255", Some("191.255.255.255"), Some("192.0.1.0"), "protocol_assignment"),
        ("192.0.2.0", "192.0.2.255", Some("192.0.1.255"), Some("192.0.3.0"), "documentation"),
        ("192.88.99.0", "192.88.99.255", Some("192.88.98.255"), Some("192.88.100.0"), "relay_anycast"),
        ("192.168.0.0", "192.168.255.255", Some("192.167.255.255"), Some("192.169.0.0"), "private"),
        ("198.18.0.0", "198.19.255.255", Some("198.17.255.255"), Some("198.20.0.0"), "benchmarking"),
        ("198.51.100.0", "198.51.100.255", Some("198.51.99.255"), Some("198.51.101.0"), "documentation"),
        ("203.0.113.0", "203.0.113.255", Some("203.0.112.255"), Some("203.0.114.0"), "documentation"),
        ("224.0.0.0", "239.255.255.255", Some("223.255.255.255"), None, "multicast"),
        ("240.0.0.0", "255.255.255.254", None, None, "reserved"),
        ("255.255.255.255", "255.255.255.255", None, None, "broadcast"),
        ("168.63.129.16", "168.63.129.16", Some("168.63.129.15"), Some("168.63.129.17"), "cloud_platform"),
        ("169.254.169.254", "169.254.170.2", None, None, "link_local"),
        ("::", "::", None, None, "unspecified"),
        ("::1", "::1", None, None, "loopback"),
        ("::2", "::ffff:ffff", None, None, "ipv4_compatible"),
        ("::ffff:0:0:0", "::ffff:0:ffff:ffff", None, None, "ipv4_translated"),
        ("100::", "100::ffff:ffff:ffff:ffff", Some("ff:ffff::"), Some("100:0:0:1::"), "discard"),
        ("2001::", "2001:0:ffff:ffff:ffff:ffff:ffff:ffff", Some("2000:ffff::"), Some("2001:1::"), "teredo"),
        (
            "2001:db8::",
            "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff",
            Some("2001:db7::1"),
            Some("2001:db9::"),
            "documentation",
        ),
        ("fc00::", "fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", Some("fbff::1"), Some("fe00::1"), "unique_local"),
        ("fe80::", "febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff", Some("fe7f::1"), None, "link_local"),
        ("fec0::", "feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", None, None, "site_local"),
        ("ff00::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", None, None, "multicast"),
    ] {
        for edge in [first, last] {
            assert_eq!(classify(ip(edge)), Err(Refused { class }), "{edge}");
        }
        for neighbour in [before, after].into_iter().flatten() {
            assert_eq!(classify(ip(neighbour)), Ok(()), "{neighbour}");
        }
    }
}

#[test]
fn an_address_that_carries_another_is_judged_as_that_one() {
    for (form, class) in [
        ("::ffff:127.0.0.1", Some("loopback")),
        ("::ffff:169.254.169.254", Some("link_local")),
        ("::ffff:8.8.8.8", None),
        ("64:ff9b::10.0.0.1", Some("private")),
        ("64:ff9b::8.8.8.8", None),
        ("64:ff9b:1::192.168.0.1", Some("private")),
        ("64:ff9b:1::8.8.8.8", None),
        // RFC 6052 §2.2 with a /48 prefix: 10.0.0.1 in bits 48 to 87 around the null octet; then /56 and /64.
        ("64:ff9b:1:a00:0:100::", Some("private")),
        ("64:ff9b:1:a00:0:100:808:808", Some("private")),
        ("64:ff9b:1:7f:0:0:0100:0", Some("loopback")),
        ("64:ff9b:1:0:a9:fea9:fe00:0", Some("link_local")),
        ("64:ff9b:1::", Some("this_network")),
        ("2002:7f00:1::", Some("loopback")),
        ("2002:a9fe:a9fe::1", Some("link_local")),
        ("2002:808:808::1", None),
        ("2606:4700::1111", None),
    ] {
        assert_eq!(classify(ip(form)).err().map(|refused| refused.class), class, "{form}");
    }
}

#[test]
fn a_literal_is_one_address_in_every_spelling() {
    for text in [
        "127.0.0.1",
        "127.0.0.1.",
        "127.1",
        "127.0.1",
        "2130706433",
        "0x7f000001",
        "0x7F.1",
        "017700000001",
        "0177.0.0.1",
        "127.0.0.0x1",
        "[::ffff:127.0.0.1]",
        "[::FFFF:7f00:1]",
        "[0:0:0:0:0:ffff:7f00:0001]",
        "127.0.0.%31",
        "%31%32%37.0.0.1",
        "１２７.０.０.１",
        "127。0。0。1",
        "①②⑦.0.0.1",
    ] {
        assert_eq!(Host::parse(text), Ok(Host::Address(ip("127.0.0.1"))), "{text}");
    }
    for (text, address) in [("[::1]", "::1"), ("[fe80::1]", "fe80::1"), ("[::ffff:0:7f00:1]", "::ffff:0:7f00:1")] {
        assert_eq!(Host::parse(text), Ok(Host::Address(ip(address))), "{text}");
    }
}

#[test]
fn what_is_no_host_is_refused() {
    let long_label = "a".repeat(64);
    let long_name = "a.".repeat(127) + "a";
    for text in [
        "",
        ".",
        "..",
        "a..b",
        ".a",
        "a b",
        "a\tb",
        "a/b",
        "a@b",
        "a\\b",
        "a%00b",
        "a%2fb",
        "a%23b",
        "a:b",
        "::1",
        "[::1",
        "::1]",
        "[::1%25lo]",
        "[::1%lo]",
        "[fe80::1%25eth0]",
        "[127.0.0.1]",
        "[]",
        "1.2.3.256",
        "256.1.1.1",
        "1.2.3.4.5",
        "0x100000000",
        "999999999999",
        "127.0.0.0x",
        "a.1",
        "example..",
        "exa\u{0}mple",
        "a\u{ad}..b",
        "*.example.com",
        &long_label,
        &long_name,
    ] {
        // `127.0.0.0x` is 127.0.0.0 to the URL Standard: an address all the same, and not one that is dialled.
        match Host::parse(text) {
            Err(_) => {}
            Ok(Host::Address(address)) if text == "127.0.0.0x" => assert!(classify(address).is_err()),
            Ok(other) => panic!("{text} became {other:?}"),
        }
    }
}

#[test]
fn names_come_out_in_one_spelling() {
    for (text, name) in [
        ("Example.COM", "example.com"),
        ("example.com.", "example.com"),
        ("ex%61mple.com", "example.com"),
        ("ｅｘａｍｐｌｅ．com", "example.com"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("exam\u{ad}ple.com", "example.com"),
        ("_dmarc.example.com", "_dmarc.example.com"),
        // A Cyrillic а is another name, and is spelled so that it shows.
        ("ex\u{430}mple.com", "xn--exmple-4nf.com"),
    ] {
        assert_eq!(Host::parse(text), Ok(Host::Name(name.to_owned())), "{text}");
    }
}

#[test]
fn an_authority_has_a_host_and_a_port() {
    assert_eq!(Host::parse_authority("Example.com:443"), Ok((Host::Name("example.com".into()), 443)));
    assert_eq!(Host::parse_authority("[::1]:80"), Ok((Host::Address(ip("::1")), 80)));
    for text in [
        "example.com",
        "example.com:",
        "example.com:0",
        "example.com:65536",
        "example.com:+1",
        "example.com:4a",
        ":443",
        "::1:443",
        "[::1]",
        "a:b:1",
        "user@host:443",
        "example.com:443/",
        "example.com: 443",
        "example.com:443 ",
    ] {
        assert!(Host::parse_authority(text).is_err(), "{text}");
    }
}

#[test]
fn networks_are_read_strictly() {
    for text in
        ["", "/8", "10.0.0.0/", "10.0.0.0/33", "10.0.0.1/8", "10.0.0.0/+8", "::/129", "::ffff:10.0.0.0/104", "x/8"]
    {
        assert!(text.parse::<Cidr>().is_err(), "{text}");
    }
    let allow = AllowAddresses::parse(&["10.1.0.0/16", "127.0.0.1", "fd00::/8", "64:ff9b::/96"]).unwrap();
    for text in ["10.1.255.255", "127.0.0.1", "::ffff:10.1.0.1", "fd12::1", "64:ff9b::10.0.0.1", "8.8.8.8"] {
        assert_eq!(allow.check(ip(text)), Ok(()), "{text}");
    }
    for text in ["10.2.0.0", "127.0.0.2", "fc00::1", "::1", "2002:a01::1"] {
        assert!(allow.check(ip(text)).is_err(), "{text}");
    }
    let everything = AllowAddresses::parse(&["0.0.0.0/0", "::/0"]).unwrap();
    for text in ["255.255.255.255", "::1", "0.0.0.0"] {
        assert_eq!(everything.check(ip(text)), Ok(()), "{text}");
    }
    assert!(AllowAddresses::default().check(ip("127.0.0.1")).is_err());
}

#[test]
fn only_a_network_that_is_non_public_as_a_whole_has_a_class() {
    for (network, prefix, class) in [
        ("10.0.0.0", 8, Some("private")),
        ("10.1.2.3", 32, Some("private")),
        ("127.0.0.1", 32, Some("loopback")),
        ("169.254.169.254", 32, Some("link_local")),
        ("fd00::", 8, Some("unique_local")),
        ("10.0.0.0", 7, None),
        ("0.0.0.0", 0, None),
        ("128.0.0.0", 1, None),
        ("::", 0, None),
        ("192.168.0.0", 15, None),
        ("93.184.216.0", 24, None),
    ] {
        assert_eq!(class_of(network.parse().unwrap(), prefix), class, "{network}/{prefix}");
    }
}
