//! The bytes of a record: canonical form, hash, signature, link to the record before.
//!
//! A record is a JSON object, kept as its JCS text. It is a receipt when it has `receipt_id` and an event when it has
//! `event_id`; the two share one numbering and one chain and differ in the names and domains of hash and signature:
//!
//! |            | hash field, as written      | signature field     | signed bytes                            | previous            |
//! |------------|-----------------------------|---------------------|-----------------------------------------|---------------------|
//! | receipt    | `result_hash`, `<hex>`      | `receipt_signature` | `latchgate.receipt.v1\n` + `result_hash`| `prev_receipt_hash`, `<hex>` |
//! | event      | `event_hash`, `sha256:<hex>`| `event_signature`   | `latchgate.event.v1\n` + `event_hash`   | `prev_hash`, `sha256:<hex>`  |
//!
//! The hash is the SHA-256 of the JCS form without the hash and signature fields; `signing_key_id`, `log_id`,
//! `sequence` and the link are inside it.

use serde_json::{Map, Value};

use super::keys::{PublicKeys, ReceiptKeys};
use super::{LedgerError, SignatureStatus};
use crate::action::canonical::jcs;
use crate::hash;

/// Longest record that is taken in. What is larger belongs beside the record, by hash.
pub const MAX_RECORD_BYTES: usize = 4 << 20;
const MAX_DEPTH: usize = 64;
/// What a double holds exactly (RFC 8785 §3.2.2.3): a larger number would not come back as it was written.
const MAX_INTEGER: u64 = (1 << 53) - 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Receipt,
    Event,
}

impl Kind {
    pub fn of(record: &Map<String, Value>) -> Option<Self> {
        match (record.contains_key("receipt_id"), record.contains_key("event_id")) {
            (true, false) => Some(Self::Receipt),
            (false, true) => Some(Self::Event),
            _ => None,
        }
    }

    pub fn id_field(self) -> &'static str {
        match self {
            Self::Receipt => "receipt_id",
            Self::Event => "event_id",
        }
    }

    pub fn hash_field(self) -> &'static str {
        match self {
            Self::Receipt => "result_hash",
            Self::Event => "event_hash",
        }
    }

    pub fn signature_field(self) -> &'static str {
        match self {
            Self::Receipt => "receipt_signature",
            Self::Event => "event_signature",
        }
    }

    pub fn previous_field(self) -> &'static str {
        match self {
            Self::Receipt => "prev_receipt_hash",
            Self::Event => "prev_hash",
        }
    }

    /// A bare hash in the spelling of this kind.
    pub fn spell(self, bare: &str) -> String {
        match self {
            Self::Receipt => bare.to_owned(),
            Self::Event => format!("sha256:{bare}"),
        }
    }

    /// The bare hash of a spelled one; `None` for the other kind's spelling.
    pub fn bare(self, spelled: &str) -> Option<&str> {
        let bare = match self {
            Self::Receipt => spelled,
            Self::Event => spelled.strip_prefix("sha256:")?,
        };
        let digits = bare.len() == 64 && bare.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'));
        digits.then_some(bare)
    }

    fn signed_bytes(self, spelled_hash: &str) -> Vec<u8> {
        let domain = match self {
            Self::Receipt => "latchgate.receipt.v1\n",
            Self::Event => "latchgate.event.v1\n",
        };
        [domain.as_bytes(), spelled_hash.as_bytes()].concat()
    }
}

/// The end of a chain: what the next record links to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    pub log_id: String,
    /// Of the last record; 0 when there is none.
    pub sequence: u64,
    /// Bare hash of the last record.
    pub hash: Option<String>,
}

/// A record as it is stored.
pub struct Sealed {
    pub record: Map<String, Value>,
    pub text: String,
    pub head: Head,
}

/// Numbers, links, hashes and signs a record that has no such fields yet.
pub fn seal(mut record: Map<String, Value>, head: &Head, keys: &ReceiptKeys) -> Result<Sealed, LedgerError> {
    let kind = Kind::of(&record).ok_or_else(|| LedgerError::Refused("a record that is of no kind".into()))?;
    let sequence = head.sequence + 1;
    record.insert("log_id".into(), head.log_id.clone().into());
    record.insert("sequence".into(), sequence.into());
    record.insert(kind.previous_field().into(), head.hash.as_deref().map(|bare| kind.spell(bare)).into());
    record.insert("signing_key_id".into(), keys.id().into());
    for derived in [kind.hash_field(), kind.signature_field(), "signature_status"] {
        record.remove(derived);
    }
    let unwritable = |error: serde_json::Error| LedgerError::Refused(error.to_string());
    let bare = hash::sha256_hex(&jcs(&record).map_err(unwritable)?);
    let spelled = kind.spell(&bare);
    record.insert(kind.signature_field().into(), keys.sign(&kind.signed_bytes(&spelled)).into());
    record.insert(kind.hash_field().into(), spelled.into());
    let text = jcs(&record).map_err(unwritable)?;
    if text.len() > MAX_RECORD_BYTES {
        return Err(LedgerError::Refused(format!("a record of more than {MAX_RECORD_BYTES} bytes")));
    }
    let text = String::from_utf8(text).map_err(|error| LedgerError::Refused(error.to_string()))?;
    Ok(Sealed { record, text, head: Head { log_id: head.log_id.clone(), sequence, hash: Some(bare) } })
}

/// Whether a record's stored signature is good for its stored content: the hash is computed anew.
pub fn signature_status(record: &Map<String, Value>, kind: Kind, keys: &PublicKeys) -> SignatureStatus {
    signature_status_of(record, kind, keys, content_hash(record, kind).ok().as_deref())
}

/// The same for a content whose bare hash was computed already; `None` when it has none.
pub fn signature_status_of(
    record: &Map<String, Value>,
    kind: Kind,
    keys: &PublicKeys,
    bare: Option<&str>,
) -> SignatureStatus {
    let field = |name: &str| record.get(name).filter(|value| !value.is_null());
    let Some(signature) = field(kind.signature_field()) else { return SignatureStatus::MissingSignature };
    let Some(key_id) = field("signing_key_id") else { return SignatureStatus::MissingKeyId };
    // One spelling only: upper-case hex would be other bytes with the same meaning.
    let bytes = signature
        .as_str()
        .and_then(|text| hash::unhex(text).filter(|bytes| bytes.len() == 64 && hash::hex(bytes) == text));
    let Some(bytes) = bytes else { return SignatureStatus::MalformedSignature };
    let Some(bare) = bare else { return SignatureStatus::Invalid };
    let spelled = kind.spell(bare);
    match key_id.as_str().and_then(|id| keys.verify(id, &kind.signed_bytes(&spelled), &bytes)) {
        None => SignatureStatus::UnknownKeyId,
        Some(true) if field(kind.hash_field()).and_then(Value::as_str) == Some(&spelled) => SignatureStatus::Valid,
        Some(_) => SignatureStatus::Invalid,
    }
}

/// The bare hash that the record's content has, whatever it says.
pub fn content_hash(record: &Map<String, Value>, kind: Kind) -> Result<String, serde_json::Error> {
    let mut content = record.clone();
    for derived in [kind.hash_field(), kind.signature_field(), "signature_status"] {
        content.remove(derived);
    }
    Ok(hash::sha256_hex(&jcs(&content)?))
}

/// Refuses what would not read back as it was written: fractions, integers beyond 2^53 − 1, too deep a nesting.
pub fn check_representable(value: &Value) -> Result<(), LedgerError> {
    fn walk(value: &Value, depth: usize) -> Result<(), &'static str> {
        if depth > MAX_DEPTH {
            return Err("nested too deep");
        }
        match value {
            Value::Number(number) => match (number.as_u64(), number.as_i64()) {
                (Some(positive), _) if positive <= MAX_INTEGER => Ok(()),
                (_, Some(signed)) if signed.unsigned_abs() <= MAX_INTEGER => Ok(()),
                _ => Err("a number that is not an integer within 2^53 - 1"),
            },
            Value::Array(items) => items.iter().try_for_each(|item| walk(item, depth + 1)),
            Value::Object(members) => members.values().try_for_each(|member| walk(member, depth + 1)),
            _ => Ok(()),
        }
    }
    walk(value, 0).map_err(|what| LedgerError::Refused(what.to_owned()))
}
