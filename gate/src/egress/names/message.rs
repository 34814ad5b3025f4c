//! The DNS message (RFC 1035 §4): as much of a query as is served, and the answers to it.
//!
//! A query is one question and at most an OPT record. Everything else is refused as a whole, so that nothing is passed
//! over: what was read is all that was there.

use std::net::Ipv4Addr;

/// A longer query is refused. Names have 255 bytes; the rest is room for options of EDNS.
pub const MAX_QUERY_BYTES: usize = 4096;
/// The most that is sent in one datagram, whatever the client would take: nothing of it is ever fragmented.
pub const MAX_DATAGRAM_BYTES: u16 = 1232;
/// What every client takes (RFC 1035 §4.2.1).
const PLAIN_DATAGRAM_BYTES: u16 = 512;
const HEADER_BYTES: usize = 12;
/// For how long clients may keep an answer. It holds for as long as the execution does.
const TTL_SECONDS: u32 = 60;

pub const TYPE_A: u16 = 1;
pub const TYPE_AAAA: u16 = 28;
pub const TYPE_SVCB: u16 = 64;
pub const TYPE_HTTPS: u16 = 65;
pub const TYPE_ANY: u16 = 255;
const TYPE_SOA: u16 = 6;
const TYPE_OPT: u16 = 41;
pub const CLASS_IN: u16 = 1;

/// Response codes (RFC 1035 §4.1.1, RFC 6891 §9).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    NoError = 0,
    FormErr = 1,
    ServFail = 2,
    NotImp = 4,
    Refused = 5,
    BadVers = 16,
}

/// Extended errors (RFC 8914 §4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtendedCode {
    Other = 0,
    Blocked = 15,
}

/// What a query came by, which says how long its answer may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Udp,
    Tcp,
}

/// A query that is understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Query<'q> {
    head: Head,
    /// Name, type and class as they were sent. They are echoed byte for byte, so that a client that plays with the case
    /// of letters (draft-vixie-dnsext-dns0x20) finds its own.
    question: &'q [u8],
    kind: u16,
    class: u16,
    edns: Option<Edns>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Head {
    id: u16,
    opcode: u8,
    recursion_desired: bool,
    checking_disabled: bool,
}

/// What the client said of itself (RFC 6891 §6.1.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Edns {
    udp_bytes: u16,
    dnssec_ok: bool,
}

/// A message that is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed<'q> {
    /// What is wrong with it.
    pub why: &'static str,
    /// What is sent back; nothing where an answer could itself be answered, or where there is no id to answer to.
    pub reply: Option<Reply<'q>>,
}

/// An answer, before it has bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply<'q> {
    head: Head,
    question: &'q [u8],
    edns: Option<Edns>,
    code: Code,
    content: Content,
    extended: Option<(ExtendedCode, &'q str)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Nothing,
    Address(Ipv4Addr),
    /// The name is there and has no record of this type (RFC 2308 §2.2).
    NoData,
}

impl<'q> Query<'q> {
    /// Reads a message.
    ///
    /// # Errors
    /// [`Malformed`] for all that is not a standard query with one question, whole and without anything after it.
    pub fn parse(message: &'q [u8]) -> Result<Self, Malformed<'q>> {
        let mut rest = Reader(message);
        let head = (rest.u16(), rest.u8(), rest.u8());
        let counts = (rest.u16(), rest.u16(), rest.u16(), rest.u16());
        let ((Some(id), Some(high), Some(low)), (Some(questions), Some(answers), Some(authorities), Some(additional))) =
            (head, counts)
        else {
            return Err(Malformed { why: "short", reply: None });
        };
        let head =
            Head { id, opcode: high >> 3 & 0xf, recursion_desired: high & 1 != 0, checking_disabled: low & 0x10 != 0 };
        if high & 0x80 != 0 {
            // An answer to an answer could go on for ever.
            return Err(Malformed { why: "response", reply: None });
        }
        let wrong = |why, code, question, edns| Malformed {
            why,
            reply: Some(Reply { head, question, edns, code, content: Content::Nothing, extended: None }),
        };
        let format = |why| wrong(why, Code::FormErr, &[], None);
        if head.opcode != 0 {
            return Err(wrong("opcode", Code::NotImp, &[], None));
        }
        if message.len() > MAX_QUERY_BYTES {
            return Err(format("long"));
        }
        //= RFC 9619 §4: a query has one question.
        if questions != 1 {
            return Err(format("questions"));
        }
        if answers != 0 || authorities != 0 || additional > 1 {
            return Err(format("records"));
        }
        let start = rest.0;
        rest.name().ok_or_else(|| format("name"))?;
        let (Some(kind), Some(class)) = (rest.u16(), rest.u16()) else {
            return Err(format("question"));
        };
        let question = start.get(..start.len() - rest.0.len()).unwrap_or_default();
        let edns = match additional {
            0 => None,
            _ => Some(rest.opt().ok_or_else(|| format("opt"))?),
        };
        if !rest.0.is_empty() {
            return Err(format("trailing"));
        }
        let edns = match edns {
            Some((edns, 0)) => Some(edns),
            Some((edns, _)) => return Err(wrong("edns_version", Code::BadVers, question, Some(edns))),
            None => None,
        };
        Ok(Self { head, question, kind, class, edns })
    }

    pub const fn kind(&self) -> u16 {
        self.kind
    }

    pub const fn class(&self) -> u16 {
        self.class
    }

    fn labels(&self) -> impl Iterator<Item = &'q [u8]> {
        let mut rest = Reader(self.question);
        std::iter::from_fn(move || {
            let length = rest.u8().filter(|&length| length != 0)?;
            rest.take(usize::from(length))
        })
    }

    /// The name as a host name in lower case; `None` when it has a byte that no host name has, or no label.
    pub fn host(&self) -> Option<String> {
        let plain = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        let mut host = String::new();
        for label in self.labels() {
            if !label.iter().all(plain) {
                return None;
            }
            if !host.is_empty() {
                host.push('.');
            }
            host.extend(label.iter().map(|byte| char::from(byte.to_ascii_lowercase())));
        }
        (!host.is_empty()).then_some(host)
    }

    /// The name for people, in lower case, whatever bytes it has (RFC 1035 §5.1, RFC 4343 §2.1). At most 1017 bytes.
    pub fn printed(&self) -> String {
        let mut text = String::new();
        for label in self.labels() {
            if !text.is_empty() {
                text.push('.');
            }
            for &byte in label {
                match byte.to_ascii_lowercase() {
                    b @ (b'.' | b'\\' | b'"') => text.extend(['\\', char::from(b)]),
                    b if b.is_ascii_graphic() => text.push(char::from(b)),
                    b => text.push_str(&format!("\\{b:03}")),
                }
            }
        }
        if text.is_empty() { ".".to_owned() } else { text }
    }

    pub const fn address(&self, address: Ipv4Addr) -> Reply<'q> {
        self.reply(Code::NoError, Content::Address(address), None)
    }

    pub const fn no_data(&self) -> Reply<'q> {
        self.reply(Code::NoError, Content::NoData, None)
    }

    /// REFUSED, blocked (RFC 8914 §4.16) for the reason in `text`.
    pub const fn refused(&self, text: &'q str) -> Reply<'q> {
        self.reply(Code::Refused, Content::Nothing, Some((ExtendedCode::Blocked, text)))
    }

    /// SERVFAIL: the name is allowed and the gate could not do its part.
    pub const fn failed(&self, text: &'q str) -> Reply<'q> {
        self.reply(Code::ServFail, Content::Nothing, Some((ExtendedCode::Other, text)))
    }

    const fn reply(&self, code: Code, content: Content, extended: Option<(ExtendedCode, &'q str)>) -> Reply<'q> {
        Reply { head: self.head, question: self.question, edns: self.edns, code, content, extended }
    }
}

impl Reply<'_> {
    pub const fn code(&self) -> Code {
        self.code
    }

    /// The answer for a client that asked over `transport`.
    pub fn to_bytes(&self, transport: Transport) -> Vec<u8> {
        self.within(match (transport, self.edns) {
            (Transport::Tcp, _) => usize::from(u16::MAX),
            (Transport::Udp, None) => usize::from(PLAIN_DATAGRAM_BYTES),
            (Transport::Udp, Some(edns)) => {
                //= RFC 6891 §6.2.3: values lower than 512 are treated as 512.
                usize::from(edns.udp_bytes.clamp(PLAIN_DATAGRAM_BYTES, MAX_DATAGRAM_BYTES))
            }
        })
    }

    /// At most `limit` bytes. What does not fit is left out and TC set: first the extended error (RFC 8914 §3), then
    /// the records.
    pub(super) fn within(&self, limit: usize) -> Vec<u8> {
        let whole = self.written(false);
        if whole.len() <= limit {
            return whole;
        }
        let brief = Self { extended: None, ..*self }.written(true);
        if brief.len() <= limit {
            return brief;
        }
        Self { extended: None, content: Content::Nothing, ..*self }.written(true)
    }

    fn written(&self, truncated: bool) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_BYTES + self.question.len() + 128);
        let code = self.code as u16;
        let (answers, authorities) = match self.content {
            Content::Nothing => (0, 0),
            Content::Address(_) => (1, 0),
            Content::NoData => (0, 1_u16),
        };
        let flag = |set: bool, bit: u8| if set { 1 << bit } else { 0 };
        out.extend(self.head.id.to_be_bytes());
        out.push(0x80 | self.head.opcode << 3 | flag(truncated, 1) | flag(self.head.recursion_desired, 0));
        // Recursion is available; CD comes back as it came (RFC 4035 §3.2.2); the rest of the code is in the OPT record.
        out.push(0x80 | flag(self.head.checking_disabled, 4) | (code & 0xf) as u8);
        for count in [u16::from(!self.question.is_empty()), answers, authorities, u16::from(self.edns.is_some())] {
            out.extend(count.to_be_bytes());
        }
        out.extend(self.question);
        match self.content {
            Content::Nothing => {}
            Content::Address(address) => {
                record(&mut out, TYPE_A, &address.octets());
            }
            Content::NoData => {
                // Names of the master and of who is responsible are the root; serial, refresh, retry, expire, minimum.
                let mut soa = vec![0, 0];
                for number in [1, TTL_SECONDS, TTL_SECONDS, TTL_SECONDS, TTL_SECONDS] {
                    soa.extend(number.to_be_bytes());
                }
                record(&mut out, TYPE_SOA, &soa);
            }
        }
        //= RFC 6891 §7: an answer has an OPT record if, and only if, the query has one.
        if let Some(edns) = self.edns {
            out.push(0);
            out.extend(TYPE_OPT.to_be_bytes());
            out.extend(MAX_DATAGRAM_BYTES.to_be_bytes());
            out.extend([(code >> 4) as u8, 0, flag(edns.dnssec_ok, 7), 0]);
            let mut options = Vec::new();
            if let Some((extended, text)) = self.extended {
                //= RFC 8914 §2: option 15, INFO-CODE, EXTRA-TEXT.
                let length = u16::try_from(text.len() + 2).unwrap_or(2);
                let text = if length == 2 { "" } else { text };
                options.extend([15_u16, length, extended as u16].map(u16::to_be_bytes).concat());
                options.extend(text.as_bytes());
            }
            out.extend(u16::try_from(options.len()).unwrap_or(0).to_be_bytes());
            out.extend(options);
        }
        out
    }
}

/// A record of the name that was asked for: its owner is a pointer to the question.
fn record(out: &mut Vec<u8>, kind: u16, data: &[u8]) {
    out.extend([0xc0, HEADER_BYTES as u8]);
    out.extend([kind, CLASS_IN].map(u16::to_be_bytes).concat());
    out.extend(TTL_SECONDS.to_be_bytes());
    out.extend(u16::try_from(data.len()).unwrap_or(0).to_be_bytes());
    out.extend(data);
}

struct Reader<'q>(&'q [u8]);

impl<'q> Reader<'q> {
    fn take(&mut self, count: usize) -> Option<&'q [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }

    /// Passes over a name. A pointer is refused: the only name of a query that is served is its first, and there is
    /// nothing before it that it could point to.
    fn name(&mut self) -> Option<()> {
        let mut length = 0;
        loop {
            let label = usize::from(self.u8()?);
            length += 1 + label;
            if label > 63 || length > 255 {
                return None;
            }
            if label == 0 {
                return Some(());
            }
            self.take(label)?;
        }
    }

    /// An OPT record and its version; `None` for any other record, or one whose options are broken.
    fn opt(&mut self) -> Option<(Edns, u8)> {
        if self.u8()? != 0 || self.u16()? != TYPE_OPT {
            return None;
        }
        let udp_bytes = self.u16()?;
        let _extended_code = self.u8()?;
        let version = self.u8()?;
        let dnssec_ok = self.u16()? & 0x8000 != 0;
        let length = self.u16()?;
        let mut options = Self(self.take(usize::from(length))?);
        while !options.0.is_empty() {
            let _option = options.u16()?;
            let length = options.u16()?;
            options.take(usize::from(length))?;
        }
        Some((Edns { udp_bytes, dnssec_ok }, version))
    }
}
