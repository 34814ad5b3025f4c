//! A JSON reader (RFC 8259) that refuses whatever two readers could take for two different things.
//!
//! `serde_json` keeps the last of two equal keys and rounds 9007199254740993 to …992: what was hashed is then not what
//! was sent, or not what another reader of the same bytes acts on.

use serde_json::{Map, Number, Value};

/// How many objects and arrays may be open at once.
pub const MAX_DEPTH: usize = 64;

/// How much of a pointer an error shows: pointers hold keys, and keys are as long as the sender likes.
const POINTER_BYTES: usize = 256;

/// Integers with this many digits or fewer are exact in an IEEE 754 double.
const EXACT_DIGITS: usize = 15;

/// Why a body was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StrictError {
    /// Not the grammar of RFC 8259. 400 `invalid_request`.
    #[error("not JSON: {what} at byte {at_byte}")]
    NotJson { at_byte: usize, what: &'static str },
    /// JSON, but not an object. 400 `invalid_request`.
    #[error("not a JSON object")]
    NotObject,
    /// JSON that two readers may understand differently. 422 `schema_violation`.
    #[error("{}: {what}", if pointer.is_empty() { "(whole document)" } else { pointer })]
    Ambiguous {
        /// RFC 6901, shortened when very long.
        pointer: String,
        what: &'static str,
    },
}

impl StrictError {
    /// The error code of the contract.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotJson { .. } | Self::NotObject => "invalid_request",
            Self::Ambiguous { .. } => "schema_violation",
        }
    }
}

/// Reads a call's params. An empty body means `{}`.
///
/// Numbers come out as their JCS form would be read back (`1.0` is `1`, `-0` is `0`), so that equal hashes mean equal
/// values to every later stage.
///
/// # Errors
/// The first offence in reading order.
pub fn parse_strict(bytes: &[u8]) -> Result<Map<String, Value>, StrictError> {
    if bytes.is_empty() {
        return Ok(Map::new());
    }
    let mut reader = Reader { bytes, at: 0, path: Vec::new() };
    reader.skip_whitespace();
    let value = reader.value()?;
    reader.skip_whitespace();
    if reader.peek().is_some() {
        return Err(reader.unexpected("something after the end of the document"));
    }
    match value {
        Value::Object(map) => Ok(map),
        _ => Err(StrictError::NotObject),
    }
}

enum Step {
    Key(String),
    Index(usize),
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    path: Vec<Step>,
}

impl Reader<'_> {
    fn value(&mut self) -> Result<Value, StrictError> {
        match self.peek() {
            Some(b'{') => self.object(),
            Some(b'[') => self.array(),
            Some(b'"') => self.string().map(Value::String),
            Some(b'-' | b'0'..=b'9') => self.number(),
            Some(b't') => self.word("true", Value::Bool(true)),
            Some(b'f') => self.word("false", Value::Bool(false)),
            Some(b'n') => self.word("null", Value::Null),
            // Python and JavaScript writers print these; they are numbers to their senders.
            Some(b'N') if self.rest().starts_with(b"NaN") => Err(self.ambiguous(NOT_FINITE)),
            Some(b'I') if self.rest().starts_with(b"Infinity") => Err(self.ambiguous(NOT_FINITE)),
            Some(0x80..) => {
                self.is_utf8()?;
                Err(self.not_json(if self.rest().starts_with(b"\xEF\xBB\xBF") {
                    "a byte order mark"
                } else {
                    "a character that begins no value"
                }))
            }
            Some(_) => Err(self.not_json("a character that begins no value")),
            None => Err(self.not_json("the end where a value should be")),
        }
    }

    fn object(&mut self) -> Result<Value, StrictError> {
        self.open()?;
        let mut map = Map::new();
        self.skip_whitespace();
        if self.take(b'}') {
            return Ok(Value::Object(map));
        }
        loop {
            self.skip_whitespace();
            if self.peek() != Some(b'"') {
                return Err(self.unexpected("something other than a key"));
            }
            let key = self.string()?;
            self.skip_whitespace();
            if !self.take(b':') {
                return Err(self.unexpected("a key without a colon"));
            }
            self.skip_whitespace();
            self.path.push(Step::Key(key));
            if let Some(Step::Key(key)) = self.path.last()
                && map.contains_key(key)
            {
                return Err(self.ambiguous("the same key twice"));
            }
            let value = self.value()?;
            if let Some(Step::Key(key)) = self.path.pop() {
                map.insert(key, value);
            }
            self.skip_whitespace();
            if self.take(b'}') {
                return Ok(Value::Object(map));
            }
            if !self.take(b',') {
                return Err(self.unexpected("an object that is not closed"));
            }
        }
    }

    fn array(&mut self) -> Result<Value, StrictError> {
        self.open()?;
        let mut items = Vec::new();
        self.skip_whitespace();
        if self.take(b']') {
            return Ok(Value::Array(items));
        }
        loop {
            self.skip_whitespace();
            self.path.push(Step::Index(items.len()));
            items.push(self.value()?);
            self.path.pop();
            self.skip_whitespace();
            if self.take(b']') {
                return Ok(Value::Array(items));
            }
            if !self.take(b',') {
                return Err(self.unexpected("an array that is not closed"));
            }
        }
    }

    /// Steps over the bracket. The path has one step for each that is open around this one.
    fn open(&mut self) -> Result<(), StrictError> {
        if self.path.len() >= MAX_DEPTH {
            return Err(self.ambiguous("nested too deeply"));
        }
        self.at += 1;
        Ok(())
    }

    fn string(&mut self) -> Result<String, StrictError> {
        self.at += 1;
        let mut out = String::new();
        loop {
            let rest = self.rest();
            let plain = rest.iter().position(|&byte| matches!(byte, b'"' | b'\\' | 0..=0x1F)).unwrap_or(rest.len());
            let (span, after) = rest.split_at(plain);
            match std::str::from_utf8(span) {
                Ok(text) => out.push_str(text),
                Err(_) => return Err(self.ambiguous(NOT_UTF8)),
            }
            let next = after.first().copied();
            self.at += plain;
            match next {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(out);
                }
                Some(b'\\') => out.push(self.escape()?),
                Some(_) => return Err(self.not_json("a control character in a string")),
                None => return Err(self.not_json("a string that is not closed")),
            }
        }
    }

    fn escape(&mut self) -> Result<char, StrictError> {
        let escaped = match self.bytes.get(self.at + 1) {
            Some(b'"') => '"',
            Some(b'\\') => '\\',
            Some(b'/') => '/',
            Some(b'b') => '\u{8}',
            Some(b'f') => '\u{c}',
            Some(b'n') => '\n',
            Some(b'r') => '\r',
            Some(b't') => '\t',
            Some(b'u') => return self.unicode_escape(),
            _ => return Err(self.not_json("an unknown escape in a string")),
        };
        self.at += 2;
        Ok(escaped)
    }

    fn unicode_escape(&mut self) -> Result<char, StrictError> {
        let first = self.utf16_unit(self.at)?;
        self.at += 6;
        if let Some(c) = char::from_u32(u32::from(first)) {
            return Ok(c);
        }
        if first < 0xDC00 && self.rest().starts_with(b"\\u") {
            let second = self.utf16_unit(self.at)?;
            if let Some(Ok(c)) = char::decode_utf16([first, second]).next() {
                self.at += 6;
                return Ok(c);
            }
        }
        Err(self.ambiguous("half of a surrogate pair"))
    }

    /// The four digits of the `\uXXXX` that begins at `at`.
    fn utf16_unit(&self, at: usize) -> Result<u16, StrictError> {
        let digits = self.bytes.get(at + 2..at + 6).unwrap_or_default();
        if digits.len() != 4 {
            return Err(self.not_json("an unknown escape in a string"));
        }
        digits.iter().try_fold(0_u16, |unit, &digit| match char::from(digit).to_digit(16) {
            Some(value) => Ok(unit << 4 | u16::try_from(value).unwrap_or_default()),
            None => Err(self.not_json("an unknown escape in a string")),
        })
    }

    fn number(&mut self) -> Result<Value, StrictError> {
        let start = self.at;
        let negative = self.take(b'-');
        let first = self.at;
        let digits = self.digits();
        if digits == 0 {
            if negative && self.rest().starts_with(b"Infinity") {
                return Err(self.ambiguous(NOT_FINITE));
            }
            return Err(self.not_json("a minus sign without a number"));
        }
        if digits > 1 && self.bytes.get(first) == Some(&b'0') {
            return Err(self.not_json("a number that begins with 0"));
        }
        let mut integer = true;
        if self.take(b'.') {
            integer = false;
            if self.digits() == 0 {
                return Err(self.not_json("a fraction without digits"));
            }
        }
        if self.take(b'e') || self.take(b'E') {
            integer = false;
            let _ = self.take(b'+') || self.take(b'-');
            if self.digits() == 0 {
                return Err(self.not_json("an exponent without digits"));
            }
        }
        let literal = self.bytes.get(start..self.at).unwrap_or_default();
        let literal = std::str::from_utf8(literal).map_err(|_| self.ambiguous(NOT_UTF8))?;
        if integer
            && digits <= EXACT_DIGITS
            && let Ok(small) = literal.parse::<i64>()
        {
            return Ok(Value::from(small));
        }
        let double: f64 = literal.parse().map_err(|_| self.not_json("a malformed number"))?;
        if !double.is_finite() {
            return Err(self.ambiguous(NOT_FINITE));
        }
        let canonical = serde_jcs::to_string(&double).map_err(|_| self.ambiguous(NOT_FINITE))?;
        if integer && canonical != literal {
            return Err(self.ambiguous("an integer that a double does not hold exactly"));
        }
        as_read_back(&canonical, double).ok_or_else(|| self.ambiguous(NOT_FINITE))
    }

    fn digits(&mut self) -> usize {
        let count = self.rest().iter().take_while(|byte| byte.is_ascii_digit()).count();
        self.at += count;
        count
    }

    fn word(&mut self, word: &str, value: Value) -> Result<Value, StrictError> {
        if !self.rest().starts_with(word.as_bytes()) {
            return Err(self.not_json("a word that is not true, false or null"));
        }
        self.at += word.len();
        Ok(value)
    }

    fn skip_whitespace(&mut self) {
        self.at += self.rest().iter().take_while(|byte| matches!(byte, b' ' | b'\t' | b'\n' | b'\r')).count();
    }

    fn take(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn rest(&self) -> &[u8] {
        self.bytes.get(self.at..).unwrap_or_default()
    }

    /// Whether a character that JSON has no place for is at least a character.
    fn is_utf8(&self) -> Result<(), StrictError> {
        let head = self.rest().get(..4).unwrap_or_else(|| self.rest());
        match std::str::from_utf8(head) {
            Err(error) if error.valid_up_to() == 0 => Err(self.ambiguous(NOT_UTF8)),
            _ => Ok(()),
        }
    }

    fn unexpected(&self, what: &'static str) -> StrictError {
        self.is_utf8().err().unwrap_or_else(|| self.not_json(what))
    }

    fn not_json(&self, what: &'static str) -> StrictError {
        StrictError::NotJson { at_byte: self.at, what }
    }

    fn ambiguous(&self, what: &'static str) -> StrictError {
        StrictError::Ambiguous { pointer: pointer(&self.path), what }
    }
}

const NOT_FINITE: &str = "a number that is not finite";
const NOT_UTF8: &str = "bytes that are not UTF-8";

/// The number that a reader of the canonical form would have: an integer where that form is one and fits.
fn as_read_back(canonical: &str, double: f64) -> Option<Value> {
    let number = match (canonical.parse::<i64>(), canonical.parse::<u64>()) {
        (Ok(signed), _) => Some(Number::from(signed)),
        (_, Ok(unsigned)) => Some(Number::from(unsigned)),
        _ => Number::from_f64(double),
    };
    number.map(Value::Number)
}

fn pointer(path: &[Step]) -> String {
    let mut out = String::new();
    for step in path {
        out.push('/');
        match step {
            Step::Index(index) => out.push_str(&index.to_string()),
            Step::Key(key) => {
                for c in key.chars().take(POINTER_BYTES) {
                    match c {
                        '~' => out.push_str("~0"),
                        '/' => out.push_str("~1"),
                        _ => out.push(c),
                    }
                }
            }
        }
        if out.len() > POINTER_BYTES {
            out.truncate(out.floor_char_boundary(POINTER_BYTES));
            out.push('…');
            break;
        }
    }
    out
}
