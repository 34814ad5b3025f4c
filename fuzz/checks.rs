//! What must hold for any bytes: the fuzz targets ask it of bytes that they make up, and an ordinary test asks it of the
//! corpora.

use latchgate::egress::address::{Host, parse_port};
use latchgate::egress::client_hello::{self, Reader, Unread};
use latchgate::egress::flow::Protocol;
use latchgate::egress::proxy::head::{MAX_HEAD_BYTES, RequestHead, ResponseHead, end_of_head};
use latchgate::egress::proxy::request::{Forward, Request};

/// However the bytes come, a hello is the same or is none; and it says nothing of what comes after it.
pub fn client_hello(data: &[u8]) {
    let whole = client_hello::parse(data);
    let mut reader = Reader::default();
    let mut pieces = Ok(None);
    for end in 1..=data.len() {
        pieces = reader.read(&data[..end]);
        if !matches!(pieces, Ok(None)) {
            break;
        }
    }
    match (&whole, &pieces) {
        (Ok(whole), Ok(Some(pieces))) => {
            assert_eq!(whole, pieces);
            assert!(whole.length <= data.len());
            assert_eq!(client_hello::parse(&data[..whole.length]).as_ref(), Ok(whole));
            assert_eq!(client_hello::parse(&data[..whole.length - 1]), Err(Unread::Incomplete));
        }
        (Err(Unread::Incomplete), Ok(None)) => {}
        (Err(Unread::Malformed(whole)), Err(pieces)) => assert_eq!(whole, pieces),
        _ => panic!("{whole:?} {pieces:?}"),
    }
}

/// What is passed on is read by the same rules as the same request, and is one request.
pub fn http_head(data: &[u8]) {
    if data.len() > MAX_HEAD_BYTES {
        return;
    }
    let _ = end_of_head(data, data.len() / 2);
    if let Ok(response) = ResponseHead::parse(data) {
        let _ = response.framing("GET");
    }
    if let Ok(head) = RequestHead::parse(data) {
        assert_eq!(end_of_head(data, 0), Ok(Some(data.len())));
        let _ = head.framing();
    }
    if let Ok(Request { forward: Some(forward), .. }) = Request::parse(data) {
        passed_on(&forward);
    }
    let origin = Host::Name("origin.test".to_owned());
    for scheme in [Protocol::Http, Protocol::Https] {
        if let Ok(forward) = Forward::inside(data, &origin, 80, scheme) {
            passed_on(&forward);
            let sent = forward.to_head();
            let again = Forward::inside(&sent, &origin, 80, scheme).expect("for the same host");
            assert_eq!((again.method, again.path, again.framing), (forward.method, forward.path, forward.framing));
        }
    }
}

fn passed_on(forward: &Forward) {
    let sent = forward.to_head();
    let read = RequestHead::parse(&sent).expect("a head");
    assert_eq!((read.method.as_str(), read.target.as_str()), (forward.method.as_str(), forward.path.as_str()));
    assert_eq!(read.framing(), Ok(forward.framing));
    assert_eq!(read.fields.all("host").count(), 1);
    assert_eq!(read.keeps_alive(), forward.keeps_alive);
}

/// A host that was parsed is itself when it is parsed again, and no address hides in a name.
pub fn host(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = parse_port(text);
    if let Ok((host, port)) = Host::parse_authority(text) {
        assert_ne!(port, 0);
        assert_eq!(Host::parse_authority(&format!("{}:{port}", host.to_authority())), Ok((host, port)));
    }
    if let Ok(host) = Host::parse(text) {
        assert_eq!(Host::parse(&host.to_authority()).as_ref(), Ok(&host));
        match &host {
            Host::Name(name) => {
                assert!(name.parse::<std::net::IpAddr>().is_err() && name.len() <= 253);
                assert!(name.bytes().all(|c| matches!(c, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.')));
            }
            Host::Address(address) => assert_eq!(address.to_canonical(), *address),
        }
    }
}
