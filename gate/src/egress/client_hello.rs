//! The first message of TLS, read whole and without trust (RFC 8446 §4.1.2 and §5.1, RFC 5246 §7.4.1.2, RFC 6066 §3).
//!
//! A reader that is lenient where a server is not can be shown one name while the server sees another. So whatever two
//! implementations could read differently is refused here: an extension twice, two names, bytes after the end of the
//! message, empty fragments, another kind of record in between. Encrypted Client Hello hides the name that counts, and
//! what says that it is only GREASE cannot be told from the real thing: the reader says that it is there.

/// Bytes of records, headers included, that a hello may take; the largest real ones have about 4 KiB.
pub const MAX_BYTES: usize = 64 * 1024;

const RECORD_HEADER: usize = 5;
const MAX_FRAGMENT: usize = 1 << 14;
const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;

const SERVER_NAME: u16 = 0;
const ALPN: u16 = 16;
/// `encrypted_client_hello` (RFC 9849), what only an inner hello may have, and the forms of the drafts that were used.
const ENCRYPTED_HELLO: [u16; 6] = [0xfe0d, 0xfd00, 0xffce, 0xfe08, 0xfe09, 0xfe0a];

/// What a hello says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parsed {
    /// The server name as it was sent; letters, digits, `.`, `-` and `_` only.
    pub sni: Option<String>,
    /// The protocols that the client offers to speak inside, in its order.
    pub alpn: Vec<Vec<u8>>,
    /// Whether there may be another, encrypted hello inside.
    pub ech: bool,
    /// Bytes of the records that hold it: what is sent on together, once it was judged.
    pub length: usize,
}

/// Why bytes are no hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct Malformed {
    pub why: &'static str,
}

/// Why there is no hello yet, or never will be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unread {
    #[error("the hello is not whole")]
    Incomplete,
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

/// Reads the hello at the start of these bytes.
///
/// # Errors
/// [`Unread`]: `Incomplete` only when more bytes could make it a hello.
pub fn parse(bytes: &[u8]) -> Result<Parsed, Unread> {
    Reader::default().read(bytes)?.ok_or(Unread::Incomplete)
}

/// Puts a hello together from bytes that come in any pieces. It looks at each byte once.
#[derive(Clone, Debug, Default)]
pub struct Reader {
    /// How much of the input was used, in whole records.
    used: usize,
    message: Vec<u8>,
}

impl Reader {
    /// Looks at all bytes that are there, those of earlier calls included; `None` when more are needed.
    ///
    /// # Errors
    /// [`Malformed`], as soon as it cannot become a hello any more.
    pub fn read(&mut self, bytes: &[u8]) -> Result<Option<Parsed>, Malformed> {
        while let Some(rest) = bytes.get(self.used..).filter(|rest| !rest.is_empty()) {
            let length = record_length(rest)?;
            if self.used + RECORD_HEADER + length.unwrap_or(1) > MAX_BYTES {
                return Err(Malformed { why: "the hello is too long" });
            }
            let Some(fragment) =
                length.and_then(|length| rest.get(RECORD_HEADER..).and_then(|rest| rest.get(..length)))
            else {
                // What kind of message it is shows before the record is whole.
                let first = self.message.first().or(rest.get(RECORD_HEADER));
                check_kind(first.copied())?;
                return Ok(None);
            };
            self.message.extend_from_slice(fragment);
            self.used += RECORD_HEADER + fragment.len();
            check_kind(self.message.first().copied())?;
            if let &[_, a, b, c, ref body @ ..] = self.message.as_slice() {
                let announced = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
                if announced + 4 + RECORD_HEADER > MAX_BYTES {
                    return Err(Malformed { why: "the hello is too long" });
                }
                if body.len() > announced {
                    return Err(Malformed { why: "bytes after the hello in its record" });
                }
                if body.len() == announced {
                    return parse_body(body).map(|parsed| Some(Parsed { length: self.used, ..parsed }));
                }
            }
        }
        Ok(None)
    }
}

/// The length of the fragment of the record that starts here, once it is known.
fn record_length(record: &[u8]) -> Result<Option<usize>, Malformed> {
    match *record {
        // SSLv2's hello (RFC 5246 appendix E.2) has its length first, with the top bit set.
        [first, ..] if first & 0x80 != 0 => Err(Malformed { why: "not TLS, or the hello of SSLv2" }),
        [first, ..] if first != HANDSHAKE => Err(Malformed { why: "not a TLS handshake record" }),
        [_, major, ..] if major != 3 => Err(Malformed { why: "not a version of TLS" }),
        [_, _, minor, ..] if minor > 4 => Err(Malformed { why: "not a version of TLS" }),
        [_, _, _, high, low, ..] => match usize::from(high) << 8 | usize::from(low) {
            0 => Err(Malformed { why: "an empty handshake record" }),
            length if length > MAX_FRAGMENT => Err(Malformed { why: "a record that is too long" }),
            length => Ok(Some(length)),
        },
        _ => Ok(None),
    }
}

fn check_kind(first: Option<u8>) -> Result<(), Malformed> {
    match first {
        None | Some(CLIENT_HELLO) => Ok(()),
        Some(_) => Err(Malformed { why: "the first message is not a client hello" }),
    }
}

fn parse_body(body: &[u8]) -> Result<Parsed, Malformed> {
    let mut body = Input(body);
    if body.take(2)?.first() != Some(&3) {
        return Err(Malformed { why: "not a version of TLS" });
    }
    body.take(32)?;
    if body.vector(1)?.0.len() > 32 {
        return Err(Malformed { why: "a session id that is too long" });
    }
    let suites = body.vector(2)?.0.len();
    if suites == 0 || !suites.is_multiple_of(2) {
        return Err(Malformed { why: "a list of cipher suites with a wrong length" });
    }
    if body.vector(1)?.0.is_empty() {
        return Err(Malformed { why: "no compression methods" });
    }
    let mut parsed = Parsed::default();
    // Old clients have no extensions at all.
    if body.is_empty() {
        return Ok(parsed);
    }
    let mut extensions = body.vector(2)?;
    if !body.is_empty() {
        return Err(Malformed { why: "bytes after the extensions" });
    }
    let mut seen = Vec::new();
    while !extensions.is_empty() {
        let kind = extensions.number(2)?;
        let data = extensions.vector(2)?;
        seen.push(kind);
        match u16::try_from(kind) {
            Ok(SERVER_NAME) => parsed.sni = Some(server_name(data)?),
            Ok(ALPN) => parsed.alpn = protocols(data)?,
            Ok(kind) if ENCRYPTED_HELLO.contains(&kind) => parsed.ech = true,
            _ => {}
        }
    }
    let all = seen.len();
    seen.sort_unstable();
    seen.dedup();
    if seen.len() != all {
        return Err(Malformed { why: "an extension that is there twice" });
    }
    Ok(parsed)
}

/// The one host name of a server name list (RFC 6066 §3).
fn server_name(mut data: Input<'_>) -> Result<String, Malformed> {
    let mut list = data.vector(2)?;
    if !data.is_empty() {
        return Err(Malformed { why: "bytes after the server name" });
    }
    if list.number(1)? != 0 {
        return Err(Malformed { why: "a server name of an unknown kind" });
    }
    let name = list.vector(2)?.0;
    if !list.is_empty() {
        return Err(Malformed { why: "more than one server name" });
    }
    let plain = |c: &u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'-' | b'_');
    if name.is_empty() || name.len() > 255 || !name.iter().all(plain) {
        return Err(Malformed { why: "a server name that is not a DNS name" });
    }
    Ok(String::from_utf8_lossy(name).into_owned())
}

/// The list of RFC 7301 §3.1.
fn protocols(mut data: Input<'_>) -> Result<Vec<Vec<u8>>, Malformed> {
    let mut list = data.vector(2)?;
    let mut protocols = Vec::new();
    while !list.is_empty() {
        protocols.push(list.vector(1)?.0.to_vec());
    }
    if !data.is_empty() || protocols.is_empty() || protocols.iter().any(Vec::is_empty) {
        return Err(Malformed { why: "a list of protocols with a wrong length" });
    }
    Ok(protocols)
}

/// What is left of a structure.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn take(&mut self, bytes: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) =
            self.0.split_at_checked(bytes).ok_or(Malformed { why: "a length that goes past the end" })?;
        self.0 = rest;
        Ok(taken)
    }

    fn number(&mut self, bytes: usize) -> Result<usize, Malformed> {
        Ok(self.take(bytes)?.iter().fold(0, |number, &byte| number << 8 | usize::from(byte)))
    }

    /// A vector behind a length of so many bytes.
    fn vector(&mut self, bytes: usize) -> Result<Self, Malformed> {
        let length = self.number(bytes)?;
        self.take(length).map(Input)
    }
}

#[cfg(test)]
mod tests;
