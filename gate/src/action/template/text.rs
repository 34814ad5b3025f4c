//! Text with `{{param}}` in it.

use serde_json::{Map, Value};

use super::{TemplateError, TemplateSyntax};

/// Text that was split at its placeholders, once, at load: a value that holds `{{…}}` is never looked into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text(pub(super) Vec<Part>);

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Literal(String),
    Param {
        name: String,
        /// `{{+name}}`: in a path, `/` in the value separates segments (after RFC 6570 §3.2.3).
        keep_slashes: bool,
    },
}

impl Text {
    pub fn parse(text: &str) -> Result<Self, TemplateSyntax> {
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once("{{") {
            if !before.is_empty() {
                parts.push(Part::Literal(before.to_owned()));
            }
            let Some((inside, after)) = after.split_once("}}") else {
                return Err(TemplateSyntax::Unclosed(text.to_owned()));
            };
            let inside = inside.trim();
            let (name, keep_slashes) = match inside.strip_prefix('+') {
                Some(name) => (name, true),
                None => (inside, false),
            };
            if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-') {
                return Err(TemplateSyntax::Placeholder(inside.to_owned()));
            }
            parts.push(Part::Param { name: name.to_owned(), keep_slashes });
            rest = after;
        }
        if !rest.is_empty() {
            parts.push(Part::Literal(rest.to_owned()));
        }
        Ok(Self(parts))
    }

    /// The param, when the text is one placeholder and nothing else.
    pub fn single(&self) -> Option<&str> {
        match self.0.as_slice() {
            [Part::Param { name, .. }] => Some(name),
            _ => None,
        }
    }

    pub fn params(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|part| match part {
            Part::Param { name, .. } => Some(name.as_str()),
            Part::Literal(_) => None,
        })
    }

    pub fn literals(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|part| match part {
            Part::Literal(text) => Some(text.as_str()),
            Part::Param { .. } => None,
        })
    }

    /// The text with its params as they are.
    pub fn render(&self, params: &Map<String, Value>) -> Result<String, TemplateError> {
        let mut out = String::new();
        for part in &self.0 {
            match part {
                Part::Literal(text) => out.push_str(text),
                Part::Param { name, .. } => out.push_str(&scalar(params, name)?),
            }
        }
        Ok(out)
    }
}

/// A param as text.
pub(super) fn scalar(params: &Map<String, Value>, name: &str) -> Result<String, TemplateError> {
    match params.get(name) {
        None | Some(Value::Null) => Err(TemplateError::Missing { param: name.to_owned() }),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(value @ (Value::Number(_) | Value::Bool(_))) => Ok(value.to_string()),
        Some(_) => Err(TemplateError::NotScalar { param: name.to_owned() }),
    }
}

/// Percent-encodes what is not unreserved (RFC 3986 §2.3).
pub(super) fn percent_encoded(text: &str) -> String {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push('%');
            for digit in [byte >> 4, byte & 15] {
                out.push(char::from(DIGITS.get(usize::from(digit)).copied().unwrap_or(b'0')));
            }
        }
    }
    out
}

/// A name from a peer, short and printable enough for an error message.
pub(super) fn shown(name: &str) -> String {
    name.chars().filter(|c| c.is_ascii_graphic()).take(64).collect()
}
