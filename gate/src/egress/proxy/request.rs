//! What a client asks of the proxy, parsed once: a tunnel, or a request to pass on.

use super::head::{Framing, Malformed, RequestHead, Version};
use crate::egress::address::{Host, HostError, parse_port};
use crate::egress::flow::Protocol;
use crate::guards::{self, Guard};

/// Where a client wants to go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub host: Host,
    pub port: u16,
    pub protocol: Protocol,
}

/// A request of a form that the proxy serves.
#[derive(Debug)]
pub struct Request {
    pub target: Target,
    /// `None` for CONNECT.
    pub forward: Option<Forward>,
}

/// A request to pass on, as it is written to the origin: all of it was parsed, and nothing else is sent.
#[derive(Debug)]
pub struct Forward {
    pub method: String,
    pub version: Version,
    /// Path and query: as the URL parser has them, or byte for byte what a client wrote that names no host there.
    pub path: String,
    pub framing: Framing,
    /// Whether the client waits for `100 Continue` before it sends the body.
    pub expects_continue: bool,
    /// Whether another request may come after this one.
    pub keeps_alive: bool,
    /// Path, Host and fields of the head that goes out; no hop-by-hop field, no framing.
    head: RequestHead,
}

/// Why a request is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error(transparent)]
    Host(#[from] HostError),
}

impl Request {
    /// # Errors
    /// [`RequestError`] for what is not HTTP, not a form that a proxy serves, or could be read in two ways.
    pub fn parse(head: &[u8]) -> Result<Self, RequestError> {
        let head = RequestHead::parse(head)?;
        if head.method == "CONNECT" { Self::connect(&head) } else { Self::absolute(head) }
    }

    fn connect(head: &RequestHead) -> Result<Self, RequestError> {
        let (host, port) = Host::parse_authority(&head.target)?;
        if !matches!(head.framing()?, Framing::None | Framing::Length(0)) {
            return Err(Malformed("CONNECT with a body").into());
        }
        let named = Host::to_authority(&host);
        // Old clients send CONNECT without Host, or Host without the port.
        if let Some(value) = only_host(head)? {
            let (other, other_port) = split_host(value)?;
            if other.to_authority() != named || other_port.is_some_and(|other| other != port) {
                return Err(Malformed("Host is not the host of the request target").into());
            }
        }
        Ok(Self { target: Target { host, port, protocol: Protocol::Connect }, forward: None })
    }

    fn absolute(mut head: RequestHead) -> Result<Self, RequestError> {
        const FORM: Malformed = Malformed("the request target must be an absolute http or https URL");
        let (scheme, rest) = head.target.split_once("://").ok_or(FORM)?;
        let protocol = match scheme.to_ascii_lowercase().as_str() {
            "http" => Protocol::Http,
            "https" => Protocol::Https,
            _ => return Err(FORM.into()),
        };
        // The URL parser reads a backslash as a slash, and passes over slashes before the host: others do not.
        if rest.starts_with('/') || rest.contains('\\') || rest.contains('#') {
            return Err(FORM.into());
        }
        let url = url::Url::parse(&head.target).map_err(|_| FORM)?;
        let authority = rest.split(['/', '?']).next().unwrap_or_default();
        if authority.contains('@') {
            return Err(Malformed("the request target carries credentials").into());
        }
        let host = Host::from_url(url.host().ok_or(FORM)?.to_owned())?;
        let port = url.port_or_known_default().filter(|&port| port != 0).ok_or(HostError::Port)?;
        let default_port = url.port().is_none();

        match only_host(&head)? {
            Some(value) => {
                let (other, other_port) = split_host(value)?;
                let standard = if protocol == Protocol::Https { 443 } else { 80 };
                if other != host || other_port.unwrap_or(standard) != port {
                    return Err(Malformed("Host is not the host of the request target").into());
                }
            }
            None if head.version == Version::Http11 => return Err(Malformed("no Host field").into()),
            None => {}
        }
        if head.method == "TRACE" {
            return Err(Malformed("TRACE is not served").into());
        }
        let framing = head.framing()?;
        let expects_continue = expects_continue(&head, framing)?;

        let path = match url.query() {
            Some(query) => format!("{}?{query}", url.path()),
            None => url.path().to_owned(),
        };
        let authority = match (host.to_authority(), default_port) {
            (host, true) => host,
            (host, false) => format!("{host}:{port}"),
        };
        clean(&mut head, authority);
        Ok(Self {
            target: Target { host, port, protocol },
            forward: Some(Forward {
                method: head.method.clone(),
                version: head.version,
                path,
                framing,
                expects_continue,
                keeps_alive: false,
                head,
            }),
        })
    }
}

/// Why a request inside a connection is not passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// It is not one, or could be read in two ways.
    Invalid(RequestError),
    /// It is for another host than the connection.
    OtherHost,
}

impl<E: Into<RequestError>> From<E> for Refused {
    fn from(error: E) -> Self {
        Self::Invalid(error.into())
    }
}

impl Forward {
    /// Parses a request of a connection to `host`: its target is a path, or names that host again.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn inside(head: &[u8], host: &Host, port: u16, scheme: Protocol) -> Result<Self, Refused> {
        let mut head = RequestHead::parse(head)?;
        if matches!(head.method.as_str(), "CONNECT" | "TRACE") {
            return Err(Malformed("CONNECT and TRACE are not served here").into());
        }
        let (standard, prefix) = if scheme == Protocol::Https { (443, "https://") } else { (80, "http://") };
        // Without a port it is the one that was connected to: no origin tells its hosts apart by a port it was not told.
        let same = |(other, other_port): (Host, Option<u16>)| {
            if (other == *host || !guards::on(Guard::Host)) && other_port.is_none_or(|other| other == port) {
                Ok(other_port)
            } else {
                Err(Refused::OtherHost)
            }
        };
        let named = match only_host(&head)? {
            Some(value) => same(split_host(value)?)?,
            None if head.version == Version::Http11 => return Err(Malformed("no Host field").into()),
            None => (port != standard).then_some(port),
        };
        if head.target.contains(['#', '\\']) {
            return Err(Malformed("the request target has a character that it may not have").into());
        }
        let path = if head.target.starts_with('/') || (head.target == "*" && head.method == "OPTIONS") {
            head.target.clone()
        } else {
            let rest = head
                .target
                .split_at_checked(prefix.len())
                .filter(|(start, _)| start.eq_ignore_ascii_case(prefix))
                .ok_or(Malformed("the request target is neither a path nor an URL of this connection"))?
                .1;
            let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
            same(split_host(authority)?)?;
            if path.starts_with('/') { path.to_owned() } else { format!("/{path}") }
        };
        let framing = head.framing()?;
        let expects_continue = expects_continue(&head, framing)?;
        let keeps_alive = head.keeps_alive();
        clean(&mut head, named.map_or_else(|| host.to_authority(), |port| format!("{}:{port}", host.to_authority())));
        Ok(Self {
            method: head.method.clone(),
            version: head.version,
            path,
            framing,
            expects_continue,
            keeps_alive,
            head,
        })
    }

    /// The head that goes to the origin.
    pub fn to_head(&self) -> Vec<u8> {
        let mut fields = self.head.fields.clone();
        match self.framing {
            Framing::Length(bytes) => fields.push("Content-Length", bytes.to_string()),
            Framing::Chunked => fields.push("Transfer-Encoding", "chunked"),
            Framing::None | Framing::UntilClose => {}
        }
        fields.push("Via", VIA);
        if !self.keeps_alive {
            fields.push("Connection", "close");
        }
        let mut out = format!("{} {} HTTP/1.1\r\n", self.method, self.path).into_bytes();
        fields.write(&mut out);
        out
    }
}

/// RFC 9110 §7.6.3 wants every proxy named in what it forwards.
pub const VIA: &str = "1.1 latchgate";

fn expects_continue(head: &RequestHead, framing: Framing) -> Result<bool, Malformed> {
    match head.fields.all("expect").collect::<Vec<_>>().as_slice() {
        [] => Ok(false),
        [value] if value.eq_ignore_ascii_case(b"100-continue") => Ok(framing != Framing::None),
        _ => Err(Malformed("an expectation other than 100-continue")),
    }
}

/// Leaves the fields that go on, with this Host first.
fn clean(head: &mut RequestHead, authority: String) {
    let mut fields = super::head::Fields::default();
    fields.push("Host", authority);
    head.fields.remove_hop_by_hop();
    head.fields.remove(&["host", "content-length", "expect"]);
    for (name, value) in head.fields.iter() {
        fields.push(name, value);
    }
    head.fields = fields;
}

fn only_host(head: &RequestHead) -> Result<Option<&str>, RequestError> {
    let mut hosts = head.fields.all("host");
    let first = hosts.next();
    if hosts.next().is_some() {
        return Err(Malformed("more than one Host field").into());
    }
    Ok(first.map(|value| std::str::from_utf8(value).map_err(|_| HostError::Invalid)).transpose()?)
}

/// The value of a Host field (RFC 9110 §7.2): a host, and a port or none.
fn split_host(value: &str) -> Result<(Host, Option<u16>), RequestError> {
    match value.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => Ok((Host::parse(host)?, Some(parse_port(port)?))),
        _ => Ok((Host::parse(value)?, None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Request, RequestError> {
        Request::parse(text.as_bytes())
    }

    fn sent(text: &str) -> String {
        String::from_utf8(parse(text).unwrap().forward.unwrap().to_head()).unwrap()
    }

    #[test]
    fn connect_names_a_host_and_a_port() {
        for (text, host, port) in [
            ("CONNECT Example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n", "example.com", 443),
            ("CONNECT example.com.:8443 HTTP/1.1\r\nHost: example.com\r\n\r\n", "example.com", 8443),
            ("CONNECT example.com:443 HTTP/1.0\r\n\r\n", "example.com", 443),
            ("CONNECT 0x7f.1:443 HTTP/1.1\r\nHost: 127.0.0.1:443\r\n\r\n", "127.0.0.1", 443),
            ("CONNECT [::FFFF:7f00:1]:443 HTTP/1.1\r\nContent-Length: 0\r\n\r\n", "127.0.0.1", 443),
        ] {
            let request = parse(text).unwrap();
            assert_eq!((request.target.host.to_string().as_str(), request.target.port), (host, port), "{text:?}");
            assert!(request.forward.is_none());
        }
        for text in [
            "CONNECT example.com HTTP/1.1\r\n\r\n",
            "CONNECT http://example.com:443/ HTTP/1.1\r\n\r\n",
            "CONNECT /x:443 HTTP/1.1\r\n\r\n",
            "CONNECT a.test:443 HTTP/1.1\r\nHost: b.test:443\r\n\r\n",
            "CONNECT a.test:443 HTTP/1.1\r\nHost: a.test:80\r\n\r\n",
            "CONNECT a.test:443 HTTP/1.1\r\nHost: a.test\r\nHost: a.test\r\n\r\n",
            "CONNECT a.test:443 HTTP/1.1\r\nContent-Length: 5\r\n\r\n",
            "CONNECT a.test:443 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
            "CONNECT u@a.test:443 HTTP/1.1\r\n\r\n",
        ] {
            assert!(parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn what_goes_out_is_what_was_parsed() {
        assert_eq!(
            sent(
                "GET HTTPS://Example.com:443/a/../b?x=%20y HTTP/1.1\r\nHost: example.com\r\nConnection: x-drop\r\n\
                 X-Drop: 1\r\nProxy-Authorization: Basic c2VjcmV0\r\nAccept: */*\r\n\r\n"
            ),
            "GET /b?x=%20y HTTP/1.1\r\nHost: example.com\r\nAccept: */*\r\nVia: 1.1 latchgate\r\nConnection: close\r\n\r\n"
        );
        assert_eq!(
            sent("PUT http://[2001:DB8::1]:8080 HTTP/1.1\r\nHost: [2001:db8::1]:8080\r\ncontent-length: 3\r\n\r\n"),
            "PUT / HTTP/1.1\r\nHost: [2001:db8::1]:8080\r\nContent-Length: 3\r\nVia: 1.1 latchgate\r\nConnection: close\r\n\r\n"
        );
        assert!(
            sent("POST http://a.test/ HTTP/1.1\r\nHost: a.test:80\r\nTransfer-Encoding: chunked\r\n\r\n")
                .contains("Transfer-Encoding: chunked\r\n")
        );
        assert!(sent("GET http://a.test/ HTTP/1.0\r\n\r\n").starts_with("GET / HTTP/1.1\r\nHost: a.test\r\n"));
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
        for text in [
            "GET / HTTP/1.1\r\nHost: a.test\r\n\r\n",
            "GET a.test HTTP/1.1\r\nHost: a.test\r\n\r\n",
            "GET http:a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
            "GET http:///a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
            "GET http://a.test\\@b.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
            "GET http://u:p@a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
            "GET http://@a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
            "GET http://a.test/#x HTTP/1.1\r\nHost: a.test\r\n\r\n",
            "GET http://a.test:0/ HTTP/1.1\r\nHost: a.test:0\r\n\r\n",
            "GET ftp://a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
            "GET file:///etc/passwd HTTP/1.1\r\nHost: a.test\r\n\r\n",
            "GET http://a.test/ HTTP/1.1\r\nHost: b.test\r\n\r\n",
            "GET http://a.test/ HTTP/1.1\r\nHost: a.test:81\r\n\r\n",
            "GET https://a.test/ HTTP/1.1\r\nHost: a.test:80\r\n\r\n",
            "GET http://a.test/ HTTP/1.1\r\nHost: a.test\r\nHost: a.test\r\n\r\n",
            "GET http://a.test/ HTTP/1.1\r\nHost: a.test, b.test\r\n\r\n",
            "GET http://a.test/ HTTP/1.1\r\nHost:\r\n\r\n",
            "GET http://a.test/ HTTP/1.1\r\n\r\n",
            "POST http://a.test/ HTTP/1.1\r\nHost: a.test\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            "POST http://a.test/ HTTP/1.1\r\nHost: a.test\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
            "POST http://a.test/ HTTP/1.1\r\nHost: a.test\r\nExpect: 200-ok\r\n\r\n",
            "TRACE http://a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
            "PRI * HTTP/2.0\r\n\r\n",
        ] {
            assert!(parse(text).is_err(), "{text:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_target_makes_it_panic_or_split_a_line(target in "[!-~]{1,60}") {
            let text = format!("GET http://{target} HTTP/1.1\r\nHost: a\r\n\r\n");
            if let Ok(Request { forward: Some(forward), .. }) = parse(&text) {
                let head = String::from_utf8(forward.to_head()).unwrap();
                assert_eq!(head.lines().next().unwrap().split(' ').count(), 3);
            }
        }
    }
}
