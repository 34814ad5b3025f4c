//! The `htu` of a proof: RFC 3986 §6.2.2 and §6.2.3 normalisation of an HTTP URI without query and fragment.

use std::net::Ipv6Addr;

/// The normal form of `uri` without query and fragment; `None` for what is not an absolute `http` or `https` URI of
/// RFC 3986, or has user information.
pub fn normalise(uri: &str) -> Option<String> {
    let uri = uri.split(['?', '#']).next()?;
    let (scheme, rest) = uri.split_once("://")?;
    let scheme = scheme.to_ascii_lowercase();
    let default_port = match scheme.as_str() {
        "http" => 80,
        "https" => 443,
        _ => return None,
    };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let (host, port) = host_and_port(authority)?;
    let path = normal_path(path)?;
    Some(match port {
        Some(port) if port != default_port => format!("{scheme}://{host}:{port}{path}"),
        _ => format!("{scheme}://{host}{path}"),
    })
}

/// Host (lower-case; an IPv6 literal in RFC 5952 form) and port. A host here is a name of letters, digits, `-`, `.` and
/// `_`: percent-encoding and user information are refused, not normalised.
fn host_and_port(authority: &str) -> Option<(String, Option<u16>)> {
    let (host, port) = if let Some(literal) = authority.strip_prefix('[') {
        let (address, after) = literal.split_once(']')?;
        let address: Ipv6Addr = address.parse().ok()?;
        (format!("[{address}]"), after)
    } else {
        let (host, port) = authority.split_at(authority.find(':').unwrap_or(authority.len()));
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
        if host.is_empty() || !host.bytes().all(plain) {
            return None;
        }
        (host.to_ascii_lowercase(), port)
    };
    let port = match port.strip_prefix(':') {
        None if port.is_empty() => None,
        None => return None,
        Some("") => None,
        Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => Some(digits.parse().ok()?),
        Some(_) => return None,
    };
    Some((host, port))
}

/// Percent-encoding first, so that `%2e%2e` is a dot segment, then RFC 3986 §5.2.4.
fn normal_path(path: &str) -> Option<String> {
    let path = normal_escapes(path)?;
    let mut kept: Vec<&str> = Vec::new();
    let mut segments = path.strip_prefix('/').unwrap_or_default().split('/').peekable();
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        match segment {
            "." | ".." => {
                if segment == ".." {
                    kept.pop();
                }
                if last {
                    kept.push("");
                }
            }
            _ => kept.push(segment),
        }
    }
    Some(format!("/{}", kept.join("/")))
}

/// Upper-case digits, and no escape for an unreserved character (RFC 3986 §6.2.2.1 and §6.2.2.2).
fn normal_escapes(path: &str) -> Option<String> {
    let mut out = String::with_capacity(path.len());
    let mut bytes = path.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16);
                let escaped = u8::try_from(digit()? << 4 | digit()?).ok()?;
                if is_unreserved(escaped) {
                    out.push(char::from(escaped));
                } else {
                    out.push_str(&format!("%{escaped:02X}"));
                }
            }
            b'/' | b':' | b'@' | b'!' | b'$' | b'&' | b'\'' | b'(' | b')' | b'*' | b'+' | b',' | b';' | b'=' => {
                out.push(char::from(byte));
            }
            _ if is_unreserved(byte) => out.push(char::from(byte)),
            _ => return None,
        }
    }
    Some(out)
}

fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_after_normalisation() {
        for (left, right) in [
            ("http://localhost", "http://localhost/"),
            ("HTTP://LocalHost:80/a", "http://localhost/a"),
            ("http://localhost:/a", "http://localhost/a"),
            ("https://h:443/a", "https://h/a"),
            ("http://h/%7euser", "http://h/~user"),
            ("http://h/%61%2d", "http://h/a-"),
            ("http://h/a%2fb", "http://h/a%2Fb"),
            ("http://h/a/./b", "http://h/a/b"),
            ("http://h/a/x/../b", "http://h/a/b"),
            ("http://h/a/%2E%2e/b", "http://h/b"),
            ("http://h/../../a", "http://h/a"),
            ("http://h/a/..", "http://h/"),
            ("http://h/a/.", "http://h/a/"),
            ("http://h/a?q=1", "http://h/a"),
            ("http://h/a#f?g", "http://h/a"),
            ("http://h?q=/x", "http://h/"),
            ("http://[0:0:0:0:0:0:0:1]:80/", "http://[::1]/"),
        ] {
            assert_eq!(normalise(left), normalise(right), "{left} {right}");
            assert!(normalise(left).is_some(), "{left}");
            assert_eq!(normalise(&normalise(left).unwrap()), normalise(left), "{left}");
        }
    }

    #[test]
    fn different_after_normalisation() {
        for (left, right) in [
            ("http://h/a", "https://h/a"),
            ("http://h:443/a", "https://h/a"),
            ("http://h/a", "http://h/A"),
            ("http://h/a", "http://h/a/"),
            ("http://h/a/b", "http://h/a%2Fb"),
            ("http://h/a//b", "http://h/a/b"),
            ("http://h/a", "http://h:8080/a"),
            ("http://h/a", "http://h./a"),
            ("http://h/a%20b", "http://h/a+b"),
            ("http://[::1]/", "http://[::2]/"),
        ] {
            assert_ne!(normalise(left), normalise(right), "{left} {right}");
        }
    }

    #[test]
    fn refused() {
        for uri in [
            "",
            "/v1/leases",
            "localhost/a",
            "ftp://h/a",
            "http:/h/a",
            "http:///a",
            "http://",
            "http://user@h/a",
            "http://user:secret@h/a",
            "http://h@evil/a",
            "http://h:80:80/a",
            "http://h:x/a",
            "http://h:+80/a",
            "http://h:65536/a",
            "http://[::1/a",
            "http://[::1]x/a",
            "http://[v1.a]/a",
            "http://%68/a",
            "http://h/a b",
            "http://h/a\\b",
            "http://h\\a/b",
            "http://h/a%2",
            "http://h/a%zz",
            "http://h/é",
            "http://é/",
            "http://h/a\0",
            "http://h/a\r\nb",
            " http://h/a",
        ] {
            assert_eq!(normalise(uri), None, "{uri:?}");
        }
    }
}
