//! Bytes: what is refused as a message, and sizes.

use super::*;

/// The header of an answer: response code, and counts of questions, answers, authorities, additional.
fn header(bytes: &[u8]) -> (u8, [u16; 4]) {
    let count = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    (bytes[3] & 0xf, [count(4), count(6), count(8), count(10)])
}

fn answer(one: &One, message: &[u8]) -> Option<Vec<u8>> {
    one.names.answer(message, Transport::Udp, CLIENT)
}

#[tokio::test]
async fn what_is_no_query_is_refused_as_a_whole() {
    let one = one(&["example.com"]);
    let good = ask("example.com", RecordType::A).bytes();
    let plain = ask("example.com", RecordType::A).without_edns().bytes();
    let with = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    let question = plain[12..].to_vec();
    let opt = good[plain.len()..].to_vec();
    let header_of = |counts: [u16; 4]| {
        let mut bytes = plain[..4].to_vec();
        bytes.extend(counts.map(u16::to_be_bytes).concat());
        bytes
    };
    let a_record = [&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 1, 2, 3, 4][..]].concat();
    let tsig = [&[0, 0, 250, 0, 255, 0, 0, 0, 0, 0, 0][..]].concat();
    let named_opt = [&[1, b'a', 0][..], &opt[1..]].concat();
    let long_name: Vec<u8> = [[&[63_u8][..], &[b'a'; 63]].concat().repeat(4), vec![0, 0, 1, 0, 1]].concat();
    let name_of_255: Vec<u8> =
        [[&[63_u8][..], &[b'a'; 63]].concat().repeat(3), [&[61_u8][..], &[b'a'; 61]].concat(), vec![0, 0, 1, 0, 1]]
            .concat();
    let formats: Vec<(&str, Vec<u8>)> = vec![
        ("no question", header_of([0, 0, 0, 0])),
        ("no question, said to be one", header_of([1, 0, 0, 0])),
        ("two questions", [header_of([2, 0, 0, 0]), question.clone(), question.clone()].concat()),
        (
            "two questions, the second a pointer",
            [header_of([2, 0, 0, 0]), question.clone(), vec![0xc0, 12, 0, 1, 0, 1]].concat(),
        ),
        ("65535 questions", [header_of([65535, 0, 0, 0]), question.clone()].concat()),
        ("an answer", [header_of([1, 1, 0, 0]), question.clone(), a_record.clone()].concat()),
        ("an authority", [header_of([1, 0, 1, 0]), question.clone(), a_record.clone()].concat()),
        ("a record that is no OPT", [header_of([1, 0, 0, 1]), question.clone(), a_record.clone()].concat()),
        ("a signature", [header_of([1, 0, 0, 1]), question.clone(), tsig].concat()),
        ("two OPT", [header_of([1, 0, 0, 2]), question.clone(), opt.clone(), opt.clone()].concat()),
        ("an OPT with a name", [header_of([1, 0, 0, 1]), question.clone(), named_opt].concat()),
        ("an OPT that is not there", [header_of([1, 0, 0, 1]), question.clone()].concat()),
        ("an OPT that is cut", good[..good.len() - 1].to_vec()),
        ("an OPT with half an option", [&good[..good.len() - 2], &[0, 3, 0, 10, 0]].concat()),
        ("an option longer than the OPT", [&good[..good.len() - 2], &[0, 5, 0, 10, 0, 8, 1]].concat()),
        ("bytes after the end", [good.clone(), vec![0]].concat()),
        ("bytes after the question", [plain.clone(), vec![0]].concat()),
        ("a name that is a pointer to itself", [header_of([1, 0, 0, 0]), vec![0xc0, 12, 0, 1, 0, 1]].concat()),
        ("a name that is a pointer into the header", [header_of([1, 0, 0, 0]), vec![0xc0, 4, 0, 1, 0, 1]].concat()),
        ("a label and a pointer back to it", [header_of([1, 0, 0, 0]), vec![1, b'a', 0xc0, 12, 0, 1, 0, 1]].concat()),
        ("a label of type 01", [header_of([1, 0, 0, 0]), vec![0x41, 0, 0, 1, 0, 1]].concat()),
        ("a label of 64", [header_of([1, 0, 0, 0]), vec![64], vec![b'a'; 64], vec![0, 0, 1, 0, 1]].concat()),
        ("a name without an end", [header_of([1, 0, 0, 0]), vec![7, b'e', b'x']].concat()),
        ("a name of 257", [header_of([1, 0, 0, 0]), long_name].concat()),
        ("a question without a class", plain[..plain.len() - 2].to_vec()),
        (
            "a message of 4097",
            [good[..good.len() - 2].to_vec(), (4097 - good.len() as u16).to_be_bytes().to_vec(), {
                let mut option = vec![0, 12];
                option.extend((4097 - good.len() as u16 - 4).to_be_bytes());
                option.resize(4097 - good.len(), 0);
                option
            }]
            .concat(),
        ),
    ];
    for (what, message) in &formats {
        let bytes = answer(&one, message).unwrap_or_else(|| panic!("{what}"));
        assert_eq!(header(&bytes), (1, [0, 0, 0, 0]), "{what}");
        assert_eq!(bytes.len(), 12, "{what}");
        assert_eq!(bytes[..2], good[..2], "{what}");
        assert_ne!(bytes[2] & 0x80, 0, "{what}");
        assert!(Message::from_vec(&bytes).is_ok(), "{what}");
    }
    // What must not be answered: an answer (two servers would never stop), and what has no id to answer to.
    let mut silent = vec![with(2, 0x81), with(2, 0x80)];
    silent.extend((0..12).map(|length| good[..length].to_vec()));
    for message in &silent {
        assert_eq!(answer(&one, message), None, "{message:02x?}");
    }
    // Other operations: NOTIMP, with the operation that it was.
    for opcode in 1..16 {
        let bytes = answer(&one, &with(2, opcode << 3)).unwrap();
        assert_eq!(header(&bytes), (4, [0, 0, 0, 0]));
        assert_eq!(bytes[2] >> 3 & 0xf, opcode);
    }
    // A name of exactly 255 bytes is one, and a message of exactly 4096.
    let longest = answer(&one, &[header_of([1, 0, 0, 0]), name_of_255].concat()).unwrap();
    assert_eq!(header(&longest).0, 5);
    let mut padded = good[..good.len() - 2].to_vec();
    let rest = u16::try_from(MAX_QUERY_BYTES - good.len()).unwrap();
    padded.extend(rest.to_be_bytes());
    padded.extend([0, 12]);
    padded.extend((rest - 4).to_be_bytes());
    padded.resize(MAX_QUERY_BYTES, 0);
    assert_eq!(addresses(&Message::from_vec(&answer(&one, &padded).unwrap()).unwrap()).len(), 1);

    let closed = one.names.close().await;
    let malformed = u64::try_from(formats.len() + silent.len() + 15).unwrap();
    assert_eq!(closed.counts.malformed, malformed);
    assert_eq!(closed.counts.dropped, u64::try_from(silent.len()).unwrap());
    let record = closed.flows.iter().find(|flow| flow.rule == "dns_malformed").unwrap();
    assert_eq!(record.connections, malformed);
}

#[tokio::test]
async fn other_classes_are_refused() {
    let one = one(&["example.com", "version.bind"]);
    for class in [0, 2, 3, 4, 254, 255, 65535] {
        let query = Ask { class, ..ask("version.bind", RecordType::TXT) };
        let bytes = answer(&one, &query.bytes()).unwrap();
        assert_eq!(header(&bytes), (5, [1, 0, 0, 1]));
        assert!(String::from_utf8_lossy(&bytes).contains("dns_class_not_allowed; decision "));
    }
}

#[tokio::test]
async fn flags_come_back_as_rfc_1035_and_4035_have_them() {
    let one = one(&["example.com"]);
    for (sent, expected) in [(0x0100, 0x8180), (0x0000, 0x8080), (0x0110, 0x8190), (0x0120, 0x8180), (0x0730, 0x8190)] {
        let bytes = answer(&one, &Ask { flags: sent, ..ask("example.com", RecordType::A) }.bytes()).unwrap();
        assert_eq!(u16::from_be_bytes([bytes[2], bytes[3]]), expected, "{sent:04x}");
    }
}

#[tokio::test]
async fn edns_is_answered_when_it_is_asked_and_only_then() {
    let one = one(&["example.com"]);
    let refused = one.ask(&ask("evil.test", RecordType::A).without_edns());
    assert_eq!(refused.metadata.response_code, ResponseCode::Refused);
    assert_eq!(refused.edns, None);
    for dnssec in [false, true] {
        let query = Ask { edns: Some((4096, dnssec)), ..ask("example.com", RecordType::A) };
        let edns = one.ask(&query).edns.unwrap();
        assert_eq!((edns.max_payload(), edns.version(), edns.flags().dnssec_ok), (1232, 0, dnssec));
    }
    // A version that is not there: BADVERS, and the one that is.
    let mut bytes = ask("example.com", RecordType::A).bytes();
    let version = bytes.len() - 5;
    bytes[version] = 1;
    let message = Message::from_vec(&answer(&one, &bytes).unwrap()).unwrap();
    // The reader calls 16 by its other name (RFC 8945).
    assert_eq!(u16::from(message.metadata.response_code), 16);
    assert_eq!(message.edns.unwrap().version(), 0);
    assert!(message.answers.is_empty());
}

#[tokio::test]
async fn no_datagram_is_longer_than_the_client_takes() {
    let one = one(&["example.com"]);
    // As long as a name can be: question and extended error together do not fit into 512 bytes only with such a one.
    let label = "a".repeat(63);
    let long = format!("{label}.{label}.{label}.{}", "b".repeat(61));
    for (edns, limit) in [
        (None, 512),
        (Some((0, false)), 512),
        (Some((511, false)), 512),
        (Some((512, true)), 512),
        (Some((65535, false)), 1232),
    ] {
        for name in [long.as_str(), "example.com", "evil.test"] {
            let query = Ask { edns, ..ask(name, RecordType::A) };
            let bytes = answer(&one, &query.bytes()).unwrap();
            assert!(bytes.len() <= limit, "{}", bytes.len());
            assert!(!read(&bytes, &query).metadata.truncation);
        }
    }
}

#[test]
fn what_does_not_fit_is_left_out_and_said_to_be() {
    let query = ask("api.example.com", RecordType::A);
    let bytes = query.bytes();
    let parsed = message::Query::parse(&bytes).unwrap();
    let text = "x".repeat(600);
    let reply = parsed.refused(&text);
    // Over UDP without the text (RFC 8914 §3), and TC; over TCP whole.
    let cut = Message::from_vec(&reply.to_bytes(Transport::Udp)).unwrap();
    assert!(!cut.metadata.truncation, "1232 bytes have room for it");
    let small = Ask { edns: Some((512, false)), ..query.clone() }.bytes();
    let parsed = message::Query::parse(&small).unwrap();
    let reply = parsed.refused(&text);
    let cut = reply.to_bytes(Transport::Udp);
    assert!(cut.len() <= 512);
    let cut = read(&cut, &query);
    assert!(cut.metadata.truncation);
    assert_eq!((cut.metadata.response_code, extended(&cut)), (ResponseCode::Refused, None));
    let whole = read(&reply.to_bytes(Transport::Tcp), &query);
    assert!(!whole.metadata.truncation);
    assert_eq!(extended(&whole), Some((15, text.clone())));
    // Records go last.
    let reply = parsed.address(Ipv4Addr::new(198, 18, 0, 1));
    for limit in 0..reply.to_bytes(Transport::Tcp).len() {
        let cut = read(&reply.within(limit), &query);
        assert!(cut.metadata.truncation && cut.answers.is_empty(), "{limit}");
    }
}
