//! HTTP/1.x heads, read strictly (RFC 9112).
//!
//! A proxy that is lenient where its neighbour is not can be made to see one message where the other sees two. So
//! what RFC 9112 lets a recipient repair is refused here: bare CR or LF, folded lines, space before a colon, more than
//! one length, a length beside a coding. What is forwarded is written anew from what was parsed.

/// The longest head that is read; a longer one is refused.
pub const MAX_HEAD_BYTES: usize = 64 * 1024;
/// The most fields that a head may have.
pub const MAX_FIELDS: usize = 200;

/// Why bytes are no head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub &'static str);

/// The version of a message; nothing else than these two is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    Http10,
    Http11,
}

/// Field lines in their order. Names compare without case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fields(Vec<(String, Vec<u8>)>);

/// A request line and its fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestHead {
    pub method: String,
    /// Visible ASCII only.
    pub target: String,
    pub version: Version,
    pub fields: Fields,
}

/// A status line and its fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResponseHead {
    pub version: Version,
    pub status: u16,
    pub reason: Vec<u8>,
    pub fields: Fields,
}

/// How the end of a body is found (RFC 9112 §6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// There is no body.
    None,
    Length(u64),
    Chunked,
    /// The body ends with the connection; of responses only.
    UntilClose,
}

/// The length of the head at the start of `bytes`, its empty line included; `None` when more is needed.
/// `scanned` says how much was looked at before and may be 0.
///
/// # Errors
/// As soon as a line ends in anything but CRLF, so that a client that never will is not waited for.
pub fn end_of_head(bytes: &[u8], scanned: usize) -> Result<Option<usize>, Malformed> {
    let mut at = scanned.saturating_sub(3);
    while let Some(&byte) = bytes.get(at) {
        match byte {
            b'\n' if at == 0 || bytes.get(at - 1) != Some(&b'\r') => return Err(Malformed("a line ends in a bare LF")),
            b'\n' if at >= 3 && bytes.get(at - 3..at) == Some(b"\r\n\r") => return Ok(Some(at + 1)),
            b'\r' if bytes.get(at + 1).is_some_and(|&next| next != b'\n') => return Err(Malformed("a bare CR")),
            0 => return Err(Malformed("a NUL")),
            _ => {}
        }
        at += 1;
    }
    Ok(None)
}

impl RequestHead {
    /// Parses a head that [`end_of_head`] found the end of.
    ///
    /// # Errors
    /// [`Malformed`] says what is wrong.
    pub fn parse(head: &[u8]) -> Result<Self, Malformed> {
        let (line, fields) = split(head)?;
        let line = std::str::from_utf8(line).map_err(|_| Malformed("the request line is not ASCII"))?;
        let mut parts = line.split(' ');
        let (Some(method), Some(target), Some(version), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(Malformed("the request line does not have three parts"));
        };
        if !is_token(method.as_bytes()) {
            return Err(Malformed("the method is not a token"));
        }
        if target.is_empty() || !target.bytes().all(|c| c.is_ascii_graphic()) {
            return Err(Malformed("the request target has a character that it may not have"));
        }
        let version = parse_version(version.as_bytes())?;
        Ok(Self { method: method.to_owned(), target: target.to_owned(), version, fields })
    }

    /// Whether the client means to use the connection again (RFC 9112 §9.3).
    pub fn keeps_alive(&self) -> bool {
        self.version == Version::Http11 && !self.fields.close()
    }

    /// # Errors
    /// [`Malformed`] for every combination of lengths and codings but none, one length, or `chunked` alone.
    pub fn framing(&self) -> Result<Framing, Malformed> {
        match self.fields.lengths(self.version)? {
            Some(framing) => Ok(framing),
            None => Ok(Framing::None),
        }
    }
}

impl ResponseHead {
    /// Parses a head that [`end_of_head`] found the end of.
    ///
    /// # Errors
    /// [`Malformed`] says what is wrong.
    pub fn parse(head: &[u8]) -> Result<Self, Malformed> {
        const SHAPE: Malformed = Malformed("the status line has the wrong form");
        let (line, fields) = split(head)?;
        let (version, rest) = line.split_at_checked(8).ok_or(SHAPE)?;
        let (status, reason) = rest.split_at_checked(4).ok_or(SHAPE)?;
        let status = match status {
            &[b' ', a @ b'1'..=b'9', b @ b'0'..=b'9', c @ b'0'..=b'9'] => {
                u16::from(a - b'0') * 100 + u16::from(b - b'0') * 10 + u16::from(c - b'0')
            }
            _ => return Err(SHAPE),
        };
        // Some servers leave out the space before an empty reason.
        let reason = match reason {
            [] => reason,
            [b' ', reason @ ..] if is_field_content(reason) => reason,
            _ => return Err(SHAPE),
        };
        Ok(Self { version: parse_version(version)?, status, reason: reason.to_vec(), fields })
    }

    /// Whether the connection may be used again after this answer (RFC 9112 §9.3).
    pub fn keeps_alive(&self) -> bool {
        self.version == Version::Http11 && !self.fields.close()
    }

    /// # Errors
    /// [`Malformed`] as for a request.
    pub fn framing(&self, method: &str) -> Result<Framing, Malformed> {
        let lengths = self.fields.lengths(self.version)?;
        if method == "HEAD" || matches!(self.status, 100..=199 | 204 | 304) {
            return Ok(Framing::None);
        }
        Ok(lengths.unwrap_or(Framing::UntilClose))
    }
}

impl Fields {
    /// Every value of a field, in order.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> {
        self.0.iter().filter(move |(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_slice())
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_slice()))
    }

    fn close(&self) -> bool {
        let close = |option: &[u8]| option.trim_ascii().eq_ignore_ascii_case(b"close");
        self.all("connection").any(|value| value.split(|&c| c == b',').any(close))
    }

    /// Adds a field of ours.
    pub fn push(&mut self, name: &str, value: impl Into<Vec<u8>>) {
        self.0.push((name.to_owned(), value.into()));
    }

    /// Takes away every field of these names.
    pub fn remove(&mut self, names: &[&str]) {
        self.0.retain(|(name, _)| !names.iter().any(|gone| name.eq_ignore_ascii_case(gone)));
    }

    /// Takes away what is meant for the next hop alone: the fields that Connection names and those that RFC 9110
    /// §7.6.1 and practice list (`Proxy-Authorization` above all: what authenticates to this proxy is nobody else's).
    pub fn remove_hop_by_hop(&mut self) {
        let mut named: Vec<String> = Vec::new();
        for value in self.all("connection") {
            named.extend(String::from_utf8_lossy(value).split(',').map(|name| name.trim().to_owned()));
        }
        self.remove(&named.iter().map(String::as_str).collect::<Vec<_>>());
        self.remove(&[
            "connection",
            "keep-alive",
            "proxy-authenticate",
            "proxy-authentication-info",
            "proxy-authorization",
            "proxy-connection",
            "te",
            "trailer",
            "transfer-encoding",
            "upgrade",
            "http2-settings",
        ]);
        self.0.retain(|(name, _)| !name.get(..10).is_some_and(|start| start.eq_ignore_ascii_case("latchgate-")));
    }

    /// Writes the lines and the empty line after them.
    pub fn write(&self, out: &mut Vec<u8>) {
        for (name, value) in &self.0 {
            out.extend_from_slice(name.as_bytes());
            out.extend_from_slice(b": ");
            out.extend_from_slice(value);
            out.extend_from_slice(b"\r\n");
        }
        out.extend_from_slice(b"\r\n");
    }

    fn lengths(&self, version: Version) -> Result<Option<Framing>, Malformed> {
        let mut codings = self.all("transfer-encoding");
        let mut lengths = self.all("content-length");
        match (codings.next(), lengths.next()) {
            (None, None) => Ok(None),
            (Some(_), Some(_)) => Err(Malformed("Transfer-Encoding and Content-Length together")),
            (Some(coding), None) => {
                if codings.next().is_some() || !coding.eq_ignore_ascii_case(b"chunked") {
                    return Err(Malformed("a transfer coding other than chunked"));
                }
                if version == Version::Http10 {
                    return Err(Malformed("Transfer-Encoding in HTTP/1.0"));
                }
                Ok(Some(Framing::Chunked))
            }
            (None, Some(length)) => {
                if lengths.next().is_some() {
                    return Err(Malformed("more than one Content-Length"));
                }
                let digits = std::str::from_utf8(length).unwrap_or("");
                if digits.is_empty() || !digits.bytes().all(|c| c.is_ascii_digit()) {
                    return Err(Malformed("Content-Length is not a number"));
                }
                digits.parse().map(|n| Some(Framing::Length(n))).map_err(|_| Malformed("Content-Length is too large"))
            }
        }
    }
}

/// Whether this is a token (RFC 9110 §5.6.2), as methods and field names are.
pub fn is_token(bytes: &[u8]) -> bool {
    !bytes.is_empty() && bytes.iter().all(|&c| c.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&c))
}

/// Whether this may stand in a field value: no control character but a tab (RFC 9110 §5.5).
pub fn is_field_content(bytes: &[u8]) -> bool {
    bytes.iter().all(|&c| c == b'\t' || (c >= b' ' && c != 0x7f))
}

fn parse_version(text: &[u8]) -> Result<Version, Malformed> {
    match text {
        b"HTTP/1.1" => Ok(Version::Http11),
        b"HTTP/1.0" => Ok(Version::Http10),
        _ => Err(Malformed("the version is neither HTTP/1.1 nor HTTP/1.0")),
    }
}

/// The first line, and the fields of the rest.
fn split(head: &[u8]) -> Result<(&[u8], Fields), Malformed> {
    // Whoever calls without `end_of_head` gets the same strictness.
    if end_of_head(head, 0)? != Some(head.len()) {
        return Err(Malformed("the head is not whole"));
    }
    let text = head.strip_suffix(b"\r\n\r\n").unwrap_or(head);
    let mut lines = text.split(|&c| c == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let first = lines.next().unwrap_or_default();
    let mut fields = Fields::default();
    for line in lines {
        if matches!(line, [b' ' | b'\t', ..]) {
            return Err(Malformed("a folded field line"));
        }
        let colon = line.iter().position(|&c| c == b':').ok_or(Malformed("a field line without a colon"))?;
        let (name, value) = line.split_at(colon);
        let value = value.get(1..).unwrap_or_default().trim_ascii();
        if !is_token(name) {
            return Err(Malformed("a field name that is not a token"));
        }
        if !is_field_content(value) {
            return Err(Malformed("a control character in a field value"));
        }
        if fields.0.len() == MAX_FIELDS {
            return Err(Malformed("too many fields"));
        }
        fields.0.push((String::from_utf8_lossy(name).into_owned(), value.to_vec()));
    }
    Ok((first, fields))
}

#[cfg(test)]
mod tests;
