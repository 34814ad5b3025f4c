//! Arbitrary bytes. Whatever arrives, the gate neither fails nor gives an address to what may have none.

use proptest::prelude::*;

use super::*;

fn asked() -> One {
    one_with(Limits { queries_burst: u32::MAX, ..Limits::default() }, profile(&["example.com"]))
}

/// What holds for every answer to every message.
fn check(message: &[u8], answer: Option<&[u8]>, transport: Transport, told: &Told) {
    let Some(answer) = answer else {
        // Only what has no header, or says that it is an answer itself, is left without one.
        assert!(message.len() < 12 || message[2] & 0x80 != 0);
        return;
    };
    assert!(answer.len() >= 12 && answer.len() <= if transport == Transport::Udp { 1232 } else { 65535 });
    assert_eq!(answer[..2], message[..2], "the id");
    assert_ne!(answer[2] & 0x80, 0, "an answer");
    let parsed = Message::from_vec(answer);
    let count = u16::from_be_bytes([answer[6], answer[7]]);
    assert!(count <= 1);
    if count == 1 {
        // An independent reader finds a name of the profile in the query, and in the answer the address for it.
        let query = Message::from_vec(message).unwrap();
        let [question] = query.queries.as_slice() else { panic!("questions") };
        let name = question.name.to_ascii().to_ascii_lowercase();
        assert!(name == "example.com." || name.ends_with(".example.com."), "{name}");
        assert!(matches!(question.query_type, RecordType::A | RecordType::ANY));
        let parsed = parsed.unwrap();
        let [address] = addresses(&parsed)[..] else { panic!("addresses") };
        assert!(lock(&told.calls).iter().any(|call| call.1 == address));
    } else if u16::from_be_bytes([answer[4], answer[5]]) == 0 {
        assert!(parsed.is_ok());
    }
}

fn both_ways(one: &One, message: &[u8]) {
    for transport in [Transport::Udp, Transport::Tcp] {
        check(message, one.names.answer(message, transport, CLIENT).as_deref(), transport, &one.told);
    }
}

/// Names near to the one that is allowed, of any bytes.
fn labels() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let label = prop_oneof![
        Just(b"example".to_vec()),
        Just(b"com".to_vec()),
        Just(b"EXAMPLE".to_vec()),
        Just(b"example.com".to_vec()),
        "[a-zA-Z0-9_-]{1,63}".prop_map(String::into_bytes),
        prop::collection::vec(any::<u8>(), 1..=63),
    ];
    let near = prop::collection::vec(label, 0..5);
    (near, any::<bool>()).prop_map(|(mut labels, below)| {
        if below {
            labels.extend([b"example".to_vec(), b"com".to_vec()]);
        }
        while labels.iter().map(|label| label.len() + 1).sum::<usize>() > 254 {
            labels.remove(0);
        }
        labels
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_bytes(messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..600), 8)) {
        let one = asked();
        for message in messages {
            both_ways(&one, &message);
        }
    }

    #[test]
    fn queries_with_bytes_changed(
        name in labels(),
        kind in prop_oneof![Just(1_u16), Just(28), Just(65), Just(255), any::<u16>()],
        edns in prop::option::of((any::<u16>(), any::<bool>())),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
        more in prop::collection::vec(any::<u8>(), 0..20),
    ) {
        let one = asked();
        let mut message = Ask { name, kind, edns, ..ask("x", RecordType::A) }.bytes();
        both_ways(&one, &message);
        for (at, value) in changes {
            let at = at.index(message.len());
            message[at] = value;
        }
        both_ways(&one, &message);
        if let Some(at) = cut {
            message.truncate(at.index(message.len()));
        }
        message.extend(more);
        both_ways(&one, &message);
    }

    #[test]
    fn names_of_any_bytes_are_answered_exactly_when_they_are_the_profiles(name in labels(), edns in any::<bool>()) {
        let one = asked();
        let query = Ask { name: name.clone(), ..ask("x", RecordType::A) };
        let query = if edns { query } else { query.without_edns() };
        let answer = one.names.answer(&query.bytes(), Transport::Udp, CLIENT).unwrap();
        let lower: Vec<Vec<u8>> = name.iter().map(|label| label.to_ascii_lowercase()).collect();
        let ends = lower.ends_with(&[b"example".to_vec(), b"com".to_vec()]);
        let plain = lower.iter().flatten().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
        // Labels that claim to be IDNA and are not are nobody's.
        let idna = lower.iter().any(|label| label.starts_with(b"xn--"));
        let allowed = ends && plain && !idna;
        if allowed || !idna {
            prop_assert_eq!(answer[7] == 1, allowed);
        }
    }

    #[test]
    fn printed_names_have_no_control_characters_and_are_bounded(name in labels()) {
        let bytes = Ask { name, ..ask("x", RecordType::A) }.bytes();
        let printed = message::Query::parse(&bytes).unwrap().printed();
        prop_assert!(printed.len() <= 1017);
        prop_assert!(printed.bytes().all(|b| b.is_ascii_graphic()));
    }
}
