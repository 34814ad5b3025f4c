//! Body templates.

use serde_json::{Map, Value};

use super::text::{Part, Text, percent_encoded, scalar};
use super::{TemplateError, TemplateSyntax};

/// What is sent as the body.
#[derive(Clone, Debug)]
pub enum BodyTemplate {
    /// The whole body is one param: a string as it is, anything else as JSON.
    Param(String),
    /// A JSON value with placeholders in its strings.
    Json(Node),
    /// Text. Inside a JSON string a param is escaped for it; outside it is written as JSON; in a form it is
    /// percent-encoded.
    Text { text: Text, form: bool },
}

/// A JSON value whose strings were split at their placeholders.
#[derive(Clone, Debug)]
pub enum Node {
    Literal(Value),
    Text(Text),
    List(Vec<Node>),
    Object(Vec<(String, Node)>),
}

pub(super) struct Rendered {
    pub text: String,
    /// Whether the gate wrote it as JSON, and so may say so.
    pub json: bool,
}

impl Rendered {
    pub fn raw(text: String) -> Self {
        Self { text, json: false }
    }

    pub fn json(value: &Value) -> Self {
        Self { text: value.to_string(), json: true }
    }
}

impl BodyTemplate {
    pub fn parse(template: &Value, form: bool) -> Result<Self, TemplateSyntax> {
        Ok(match template {
            Value::String(text) => {
                let text = Text::parse(text)?;
                match text.single() {
                    Some(param) => Self::Param(param.to_owned()),
                    None => Self::Text { text, form },
                }
            }
            value => Self::Json(Node::parse(value)?),
        })
    }

    pub fn params(&self) -> Vec<&str> {
        match self {
            Self::Param(name) => vec![name],
            Self::Json(node) => node.params(),
            Self::Text { text, .. } => text.params().collect(),
        }
    }

    /// `None` when the body is one param, and that is not there.
    pub(super) fn render(&self, params: &Map<String, Value>) -> Result<Option<Rendered>, TemplateError> {
        Ok(match self {
            Self::Param(name) => match params.get(name) {
                None | Some(Value::Null) => None,
                Some(Value::String(text)) => Some(Rendered::raw(text.clone())),
                Some(value) => Some(Rendered::json(value)),
            },
            Self::Json(node) => Some(Rendered::json(&node.render(params)?.unwrap_or(Value::Null))),
            Self::Text { text, form: true } => {
                let mut out = String::new();
                for part in &text.0 {
                    match part {
                        Part::Literal(literal) => out.push_str(literal),
                        Part::Param { name, .. } => out.push_str(&percent_encoded(&scalar(params, name)?)),
                    }
                }
                Some(Rendered::raw(out))
            }
            Self::Text { text, form: false } => Some(Rendered::raw(json_text(text, params)?)),
        })
    }
}

/// Whether a placeholder stands inside a JSON string is decided by the template's own quotes, before any value is in.
fn json_text(text: &Text, params: &Map<String, Value>) -> Result<String, TemplateError> {
    let mut out = String::new();
    let (mut in_string, mut escaped) = (false, false);
    for part in &text.0 {
        match part {
            Part::Literal(literal) => {
                for c in literal.chars() {
                    (in_string, escaped) = match c {
                        _ if escaped => (in_string, false),
                        '\\' if in_string => (true, true),
                        '"' => (!in_string, false),
                        _ => (in_string, false),
                    };
                }
                out.push_str(literal);
            }
            Part::Param { name, .. } if in_string => {
                let quoted = Value::String(scalar(params, name)?).to_string();
                out.push_str(quoted.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or_default());
            }
            Part::Param { name, .. } => match params.get(name) {
                None => return Err(TemplateError::Missing { param: name.clone() }),
                Some(value) => out.push_str(&value.to_string()),
            },
        }
    }
    Ok(out)
}

impl Node {
    fn parse(value: &Value) -> Result<Self, TemplateSyntax> {
        Ok(match value {
            Value::String(text) => Self::Text(Text::parse(text)?),
            Value::Array(items) => Self::List(items.iter().map(Self::parse).collect::<Result<_, _>>()?),
            Value::Object(members) => Self::Object(
                members.iter().map(|(key, value)| Ok((key.clone(), Self::parse(value)?))).collect::<Result<_, _>>()?,
            ),
            other => Self::Literal(other.clone()),
        })
    }

    fn params(&self) -> Vec<&str> {
        match self {
            Self::Literal(_) => Vec::new(),
            Self::Text(text) => text.params().collect(),
            Self::List(items) => items.iter().flat_map(Self::params).collect(),
            Self::Object(members) => members.iter().flat_map(|(_, node)| node.params()).collect(),
        }
    }

    /// `None` for a string that is one param which is not there: its key is left out.
    fn render(&self, params: &Map<String, Value>) -> Result<Option<Value>, TemplateError> {
        Ok(Some(match self {
            Self::Literal(value) => value.clone(),
            Self::Text(text) => match text.single() {
                Some(name) => return Ok(params.get(name).cloned()),
                None => Value::String(text.render(params)?),
            },
            Self::List(items) => {
                let mut out = Vec::with_capacity(items.len());
                for item in items {
                    out.extend(item.render(params)?);
                }
                Value::Array(out)
            }
            Self::Object(members) => {
                let mut out = Map::new();
                for (key, node) in members {
                    if let Some(value) = node.render(params)? {
                        out.insert(key.clone(), value);
                    }
                }
                Value::Object(out)
            }
        }))
    }
}
