use super::*;

fn request(head: &str) -> Result<RequestHead, Malformed> {
    RequestHead::parse(head.as_bytes())
}

fn framing(fields: &str) -> Result<Framing, Malformed> {
    request(&format!("POST / HTTP/1.1\r\n{fields}\r\n")).and_then(|head| head.framing())
}

#[test]
fn a_plain_head_is_read_and_written_back() {
    let head = request("GET http://a.test/x HTTP/1.1\r\nHost: a.test\r\nX-A:  1 \r\nx-a: \r\n\r\n").unwrap();
    assert_eq!((head.method.as_str(), head.target.as_str(), head.version), ("GET", "http://a.test/x", Version::Http11));
    assert_eq!(head.fields.all("x-A").collect::<Vec<_>>(), [b"1".as_slice(), b""]);
    let mut out = Vec::new();
    head.fields.write(&mut out);
    assert_eq!(out, b"Host: a.test\r\nX-A: 1\r\nx-a: \r\n\r\n");
}

#[test]
fn the_end_is_found_wherever_the_bytes_are_cut() {
    let bytes = b"GET / HTTP/1.1\r\nA: b\r\n\r\nrest";
    let length = bytes.len() - 4;
    for cut in 0..bytes.len() {
        let first = end_of_head(&bytes[..cut], 0).unwrap();
        assert_eq!(first, (cut >= length).then_some(length), "{cut}");
        if first.is_none() {
            assert_eq!(end_of_head(bytes, cut), Ok(Some(length)), "{cut}");
        }
    }
}

#[test]
fn what_a_neighbour_could_read_differently_is_refused() {
    for head in [
        "GET / HTTP/1.1\nHost: a\n\n",
        "GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\rX: b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\r\n\r\n",
        "GET / HTTP/1.1\r\nX: a\r\n b\r\n\r\n",
        "GET / HTTP/1.1\r\n Host: a\r\n\r\n",
        "GET / HTTP/1.1\r\nHost : a\r\n\r\n",
        "GET / HTTP/1.1\r\n: a\r\n\r\n",
        "GET / HTTP/1.1\r\nHost\r\n\r\n",
        "GET / HTTP/1.1\r\nX: a\0b\r\n\r\n",
        "GET / HTTP/1.1\r\nX: a\u{1}b\r\n\r\n",
        "GET / HTTP/1.1\r\nX: a\u{7f}b\r\n\r\n",
        "GET  / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1 \r\n\r\n",
        " GET / HTTP/1.1\r\n\r\n",
        "GET /\tHTTP/1.1\r\n\r\n",
        "GET /a b HTTP/1.1\r\n\r\n",
        "GET / HTTP/2.0\r\n\r\n",
        "GET / http/1.1\r\n\r\n",
        "GET / HTTP/1.12\r\n\r\n",
        "GET /\r\n\r\n",
        "G@T / HTTP/1.1\r\n\r\n",
        "GET /ä HTTP/1.1\r\n\r\n",
        "\r\nGET / HTTP/1.1\r\n\r\n",
        "\r\n\r\n",
        "GET / HTTP/1.1\r\n",
        "GET / HTTP/1.1\r\n\r\nx",
        "",
    ] {
        assert!(request(head).is_err(), "{head:?}");
    }
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(MAX_FIELDS + 1));
    assert!(request(&many).is_err());
}

#[test]
fn a_body_has_one_length_or_none() {
    assert_eq!(framing(""), Ok(Framing::None));
    assert_eq!(framing("Content-Length: 0\r\n"), Ok(Framing::Length(0)));
    assert_eq!(framing("content-length: 12\r\n"), Ok(Framing::Length(12)));
    assert_eq!(framing("Transfer-Encoding: Chunked\r\n"), Ok(Framing::Chunked));
    for fields in [
        "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n",
        "Content-Length: 1\r\nContent-Length: 1\r\n",
        "Content-Length: 1\r\ncontent-length: 2\r\n",
        "Content-Length: 1, 1\r\n",
        "Content-Length: +1\r\n",
        "Content-Length: -1\r\n",
        "Content-Length: 0x1\r\n",
        "Content-Length: 1 \t2\r\n",
        "Content-Length:\r\n",
        "Content-Length: 18446744073709551616\r\n",
        "Transfer-Encoding: gzip, chunked\r\n",
        "Transfer-Encoding: chunked, identity\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: identity\r\n",
        "Transfer-Encoding: xchunked\r\n",
        "Transfer-Encoding: \u{b}chunked\r\n",
        "Transfer-Encoding:\r\n",
    ] {
        assert!(framing(fields).is_err(), "{fields:?}");
    }
    let old = request("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap();
    assert!(old.framing().is_err());
}

#[test]
fn a_response_ends_as_rfc_9112_6_3_says() {
    let response = |head: &str| ResponseHead::parse(head.as_bytes()).unwrap();
    let plain = response("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n");
    assert_eq!((plain.status, plain.reason.as_slice()), (200, b"OK".as_slice()));
    assert_eq!(plain.framing("GET"), Ok(Framing::Length(3)));
    assert_eq!(plain.framing("HEAD"), Ok(Framing::None));
    assert_eq!(response("HTTP/1.1 304 x\r\nContent-Length: 3\r\n\r\n").framing("GET"), Ok(Framing::None));
    assert_eq!(response("HTTP/1.1 204\r\n\r\n").framing("GET"), Ok(Framing::None));
    assert_eq!(response("HTTP/1.0 200 \r\n\r\n").framing("GET"), Ok(Framing::UntilClose));
    for line in [
        "HTTP/1.1 99 x",
        "HTTP/1.1 1000 x",
        "HTTP/1.1  200 x",
        "HTTP/1.1 2x0 x",
        "HTTP/3 200 x",
        "HTTP/1.1",
        "",
        "ICY 200 OK",
    ] {
        assert!(ResponseHead::parse(format!("{line}\r\n\r\n").as_bytes()).is_err(), "{line:?}");
    }
}

#[test]
fn what_is_for_the_next_hop_alone_is_taken_away() {
    let mut fields = request(
        "GET / HTTP/1.1\r\nConnection: close, X-Secret\r\nconnection: x-other\r\nX-Secret: 1\r\nX-OTHER: 2\r\n\
         Keep-Alive: 5\r\nProxy-Authorization: Basic x\r\nProxy-Connection: keep-alive\r\nTE: trailers\r\nTrailer: a\r\n\
         Upgrade: h2c\r\nTransfer-Encoding: chunked\r\nProxy-Authenticate: x\r\nLatchgate-Decision-Id: forged\r\n\
         Authorization: kept\r\n\r\n",
    )
    .unwrap()
    .fields;
    fields.remove_hop_by_hop();
    assert_eq!(fields.iter().collect::<Vec<_>>(), [("Authorization", b"kept".as_slice())]);
}

proptest::proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300)) {
        let _ = end_of_head(&bytes, 0);
        let _ = RequestHead::parse(&bytes);
        let _ = ResponseHead::parse(&[b"HTTP/1.1 ".as_slice(), &bytes, b"\r\n\r\n"].concat());
    }
}
