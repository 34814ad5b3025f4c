use super::*;

/// A hello to be made wrong in one place.
#[derive(Clone)]
struct Hello {
    version: [u8; 2],
    session_id: Vec<u8>,
    suites: Vec<u8>,
    compression: Vec<u8>,
    /// `None`: the block is not there at all.
    extensions: Option<Vec<(u16, Vec<u8>)>>,
    after: Vec<u8>,
}

impl Default for Hello {
    fn default() -> Self {
        Self {
            version: [3, 3],
            session_id: vec![7; 32],
            suites: vec![0x0a, 0x0a, 0x13, 0x01],
            compression: vec![0],
            extensions: Some(vec![(0x0a0a, vec![]), (0, names(&["origin.test"])), (16, alpn(&["h2", "http/1.1"]))]),
            after: vec![],
        }
    }
}

fn prefixed(width: usize, data: &[u8]) -> Vec<u8> {
    let mut out = (data.len() as u32).to_be_bytes()[4 - width..].to_vec();
    out.extend(data);
    out
}

fn names(names: &[&str]) -> Vec<u8> {
    let list: Vec<u8> = names.iter().flat_map(|name| [vec![0], prefixed(2, name.as_bytes())].concat()).collect();
    prefixed(2, &list)
}

fn alpn(names: &[&str]) -> Vec<u8> {
    prefixed(2, &names.iter().flat_map(|name| prefixed(1, name.as_bytes())).collect::<Vec<_>>())
}

impl Hello {
    fn with(kind: u16, data: Vec<u8>) -> Self {
        let mut hello = Self::default();
        hello.extensions.as_mut().unwrap().push((kind, data));
        hello
    }

    fn sni(data: Vec<u8>) -> Self {
        Self { extensions: Some(vec![(0, data)]), ..Self::default() }
    }

    fn message(&self) -> Vec<u8> {
        let mut body = self.version.to_vec();
        body.extend([9; 32]);
        body.extend(prefixed(1, &self.session_id));
        body.extend(prefixed(2, &self.suites));
        body.extend(prefixed(1, &self.compression));
        if let Some(extensions) = &self.extensions {
            let block: Vec<u8> = extensions
                .iter()
                .flat_map(|(kind, data)| [&kind.to_be_bytes(), &*prefixed(2, data)].concat())
                .collect();
            body.extend(prefixed(2, &block));
        }
        body.extend(&self.after);
        [vec![1], prefixed(3, &body)].concat()
    }

    fn bytes(&self) -> Vec<u8> {
        records(&self.message(), MAX_FRAGMENT)
    }
}

fn records(message: &[u8], size: usize) -> Vec<u8> {
    message.chunks(size).flat_map(|part| [vec![22, 3, 1], prefixed(2, part)].concat()).collect()
}

fn why(bytes: &[u8]) -> &'static str {
    match parse(bytes) {
        Err(Unread::Malformed(error)) => error.why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_hello_says_what_it_says() {
    let bytes = Hello::default().bytes();
    let parsed = parse(&bytes).unwrap();
    assert_eq!(parsed.sni.as_deref(), Some("origin.test"));
    assert_eq!(parsed.alpn, [b"h2".to_vec(), b"http/1.1".to_vec()]);
    assert!(!parsed.ech);
    assert_eq!(parsed.length, bytes.len());
    for extensions in [None, Some(vec![])] {
        let parsed = parse(&Hello { extensions, ..Hello::default() }.bytes()).unwrap();
        assert_eq!((parsed.sni, parsed.alpn.len()), (None, 0));
    }
}

#[test]
fn it_is_one_hello_however_it_is_cut_into_records_and_packets() {
    let message = Hello::default().message();
    for size in 1..=message.len() {
        let bytes = records(&message, size);
        assert_eq!(parse(&bytes).unwrap().sni.as_deref(), Some("origin.test"), "{size}");
        let mut reader = Reader::default();
        for end in 0..bytes.len() {
            assert_eq!(reader.read(&bytes[..end]), Ok(None), "{size} {end}");
        }
        assert_eq!(reader.read(&bytes).unwrap().unwrap().length, bytes.len());
    }
}

#[test]
fn what_comes_after_in_records_of_its_own_is_not_part_of_it() {
    let hello = Hello::default().bytes();
    let with_early_data = [hello.clone(), vec![20, 3, 3, 0, 1, 1, 23, 3, 3, 0, 2, 1, 2]].concat();
    assert_eq!(parse(&with_early_data).unwrap().length, hello.len());
}

#[test]
fn an_encrypted_hello_is_seen_real_or_grease() {
    for kind in ENCRYPTED_HELLO {
        for data in [vec![], vec![0, 0, 1, 0, 1, 42, 0, 0, 0, 0], vec![1]] {
            assert!(parse(&Hello::with(kind, data).bytes()).unwrap().ech, "{kind:x}");
        }
    }
}

#[test]
fn what_two_servers_could_read_differently_is_refused() {
    let twice = Hello { extensions: Some(vec![(0, names(&["a.test"])), (0, names(&["b.test"]))]), ..Hello::default() };
    assert_eq!(why(&twice.bytes()), "an extension that is there twice");
    let same = Hello { extensions: Some(vec![(0, names(&["a.test"])), (0, names(&["a.test"]))]), ..Hello::default() };
    assert_eq!(why(&same.bytes()), "an extension that is there twice");
    assert_eq!(why(&Hello::with(0x0a0a, vec![]).bytes()), "an extension that is there twice");
    assert_eq!(why(&Hello::sni(names(&["a.test", "b.test"])).bytes()), "more than one server name");
    let (mut other_kind, mut trailing) = (names(&["a.test"]), names(&["a.test"]));
    other_kind[2] = 1;
    assert_eq!(why(&Hello::sni(other_kind).bytes()), "a server name of an unknown kind");
    trailing.push(0);
    assert_eq!(why(&Hello::sni(trailing).bytes()), "bytes after the server name");
    for name in ["", "a\0.test", "a test", "[::1]", "a.test:443", "ä.test", "%61.test", "a/b", &"a".repeat(256)] {
        assert_eq!(why(&Hello::sni(names(&[name])).bytes()), "a server name that is not a DNS name", "{name:?}");
    }
    for data in [vec![], vec![0], vec![0, 0], vec![0, 9, 0, 0, 1, b'a']] {
        why(&Hello::sni(data).bytes());
    }
    assert_eq!(why(&Hello { after: vec![0], ..Hello::default() }.bytes()), "bytes after the extensions");
    let mut message = Hello::default().message();
    message.push(0);
    assert_eq!(why(&records(&message, MAX_FRAGMENT)), "bytes after the hello in its record");
    let empty = [vec![22, 3, 1, 0, 0], Hello::default().bytes()].concat();
    assert_eq!(why(&empty), "an empty handshake record");
    let (first, second) = message.split_at(20);
    let between = [records(first, 100), vec![21, 3, 1, 0, 2, 1, 0], records(second, 1000)].concat();
    assert_eq!(why(&between), "not a TLS handshake record");
}

#[test]
fn what_is_not_the_hello_of_tls_is_refused_at_its_first_wrong_byte() {
    for (bytes, expected) in [
        (&b"GET / HTTP/1.1\r\n"[..], "not a TLS handshake record"),
        (b"SSH-2.0-x", "not a TLS handshake record"),
        (&[0x80, 0x2e, 1, 3, 1], "not TLS, or the hello of SSLv2"),
        (&[22, 2], "not a version of TLS"),
        (&[22, 3, 5], "not a version of TLS"),
        (&[22, 3, 1, 0x40, 1], "a record that is too long"),
        (&[22, 3, 1, 0, 40, 2], "the first message is not a client hello"),
        (&[22, 3, 1, 0, 4, 1, 1, 0, 0], "the hello is too long"),
        (&[22, 3, 1, 0, 4, 1, 0, 0, 0], "a length that goes past the end"),
    ] {
        assert_eq!(why(bytes), expected, "{bytes:?}");
    }
    let wrong = [
        Hello { version: [2, 0], ..Hello::default() },
        Hello { session_id: vec![0; 33], ..Hello::default() },
        Hello { suites: vec![], ..Hello::default() },
        Hello { suites: vec![1], ..Hello::default() },
        Hello { compression: vec![], ..Hello::default() },
        Hello { extensions: Some(vec![(16, vec![0, 0])]), ..Hello::default() },
        Hello { extensions: Some(vec![(16, vec![0, 2, 1, b'a', 0])]), ..Hello::default() },
        Hello { extensions: Some(vec![(16, vec![0, 1, 0])]), ..Hello::default() },
    ];
    for hello in wrong {
        why(&hello.bytes());
    }
}

#[test]
fn a_hello_has_its_length() {
    let hello = Hello::with(21, vec![0; 60_000]);
    assert!(parse(&hello.bytes()).is_ok());
    assert_eq!(why(&records(&hello.message(), 1)), "the hello is too long");
}

proptest::proptest! {
    #[test]
    fn no_bytes_make_it_panic_and_pieces_make_no_difference(
        tail in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300),
        at in 0_usize..120,
        cut in 0_usize..120,
    ) {
        let mut bytes = Hello::default().bytes();
        bytes.truncate(at);
        bytes.extend(tail);
        let whole = parse(&bytes);
        let mut reader = Reader::default();
        let pieces = match reader.read(&bytes[..cut.min(bytes.len())]) {
            Ok(None) => reader.read(&bytes),
            early => early,
        };
        match (whole, pieces) {
            (Ok(whole), Ok(Some(pieces))) => assert_eq!(whole, pieces),
            (Err(Unread::Incomplete), Ok(None)) => {}
            (Err(Unread::Malformed(_)), Err(_)) => {}
            (whole, pieces) => panic!("{whole:?} {pieces:?}"),
        }
    }
}
