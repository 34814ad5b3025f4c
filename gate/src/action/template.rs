//! Calls made of a template and validated params.
//!
//! Params come from an agent; where a request goes and how it is framed is the template's to say. So a value is encoded
//! for the place that it lands in, a value that could change the place's structure is refused, and the finished URL is
//! parsed once: the host and port that come out here are what the profile is asked about and what is executed.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::egress::profile::NameError;

mod body;
#[cfg(test)]
mod tests;
mod text;
mod url;

pub use body::BodyTemplate;
pub use text::Text;
pub use url::UrlTemplate;

/// The methods that a call may have.
pub const METHODS: [&str; 7] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];

/// Headers that frame the message or speak to the next hop (RFC 9110 §7.6.1, RFC 9112): the gate's, never a caller's.
const FRAMING_HEADERS: [&str; 14] = [
    "host",
    "content-length",
    "transfer-encoding",
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authorization",
    "proxy-authenticate",
    "te",
    "trailer",
    "upgrade",
    "expect",
    "via",
    "forwarded",
];

/// How an HTTP action makes its request.
#[derive(Clone, Debug)]
pub enum Template {
    /// From the manifest's `template`.
    Given { method: String, url: UrlTemplate, headers: BTreeMap<String, Text>, body: Option<BodyTemplate> },
    /// From the params `method`, `url`, `headers` and `body` themselves: manifests of `builtin:http_api` without a
    /// template, whose schema says what may stand there.
    FromParams,
}

/// A request that is ready to be checked and sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HttpCall {
    pub method: String,
    /// Absolute, http or https, without userinfo and fragment, as the URL parser prints it.
    pub url: String,
    /// Names in lower case.
    pub headers: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
    /// The host of `url`; an IPv6 address without brackets.
    #[serde(skip)]
    pub host: String,
    /// The port of `url`, its scheme's own when it names none.
    #[serde(skip)]
    pub port: u16,
}

/// A template that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateSyntax {
    #[error("method {0:?} is not one of {METHODS:?}")]
    Method(String),
    #[error("{0:?} is not closed by }}}}")]
    Unclosed(String),
    #[error("{0:?} is not the name of a param")]
    Placeholder(String),
    #[error("url_template must begin with http://, https:// or a {{{{param}}}}")]
    Scheme,
    #[error("url_template is not an URL with a host name")]
    NotAUrl,
    #[error("url_template has no host")]
    NoHost,
    #[error("url_template names a user in the URL")]
    UserInfo,
    #[error("url_template: a {{{{param}}}} cannot be a part of {0}")]
    Place(&'static str),
    #[error("url_template: a param that holds the URL's beginning must be followed by /, ? or nothing")]
    AfterBase,
    #[error("header {0:?} is not a header name")]
    HeaderName(String),
    #[error("header {0:?} is the gate's to set")]
    FramingHeader(String),
    #[error("header {0:?} is there twice")]
    HeaderTwice(String),
    #[error("header {0:?} has a value with control characters")]
    HeaderValue(String),
}

/// Params that do not fit the template. What is wrong is said by the param's name, never by its value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    #[error("/{param}: is needed by this action's request")]
    Missing { param: String },
    #[error("/{param}: must be a string, a number or a boolean here")]
    NotScalar { param: String },
    #[error("/{param}: must be a string")]
    NotText { param: String },
    #[error("/{param}: cannot be empty here")]
    Empty { param: String },
    #[error("/{param}: would change the path of the URL")]
    PathStructure { param: String },
    #[error("/{param}: would change the host of the URL")]
    HostStructure { param: String },
    #[error("/{param}: is not an absolute http or https URL")]
    NotAUrl { param: String },
    #[error("/{param}: the URL names a user")]
    UserInfo { param: String },
    #[error("/{param}: the URL that another is built on has a query or a fragment")]
    NotABase { param: String },
    #[error("the URL cannot be parsed")]
    Url,
    #[error("the URL's host {0}")]
    Host(NameError),
    #[error("/headers/{header}: is not a header that a call may set")]
    Header { header: String },
    #[error("header {header}: its value has characters that a header cannot hold")]
    HeaderValue { header: String },
    #[error("/method: is not one of {METHODS:?}")]
    Method,
}

impl Template {
    /// # Errors
    /// [`TemplateSyntax`] for the first thing that is wrong.
    pub fn parse(
        method: &str,
        url: &str,
        headers: &BTreeMap<String, String>,
        body: Option<&Value>,
    ) -> Result<Self, TemplateSyntax> {
        let method = method.to_ascii_uppercase();
        if !METHODS.contains(&method.as_str()) {
            return Err(TemplateSyntax::Method(method));
        }
        let mut parsed = BTreeMap::new();
        for (name, value) in headers {
            let lower = name.to_ascii_lowercase();
            if !is_token(&lower) {
                return Err(TemplateSyntax::HeaderName(name.clone()));
            }
            if FRAMING_HEADERS.contains(&lower.as_str()) {
                return Err(TemplateSyntax::FramingHeader(name.clone()));
            }
            let text = Text::parse(value)?;
            if !text.literals().all(is_header_value) {
                return Err(TemplateSyntax::HeaderValue(name.clone()));
            }
            if parsed.insert(lower, text).is_some() {
                return Err(TemplateSyntax::HeaderTwice(name.clone()));
            }
        }
        let form = parsed
            .get("content-type")
            .is_some_and(|text| text.literals().any(|t| t.contains("application/x-www-form-urlencoded")));
        let body = body.map(|body| BodyTemplate::parse(body, form)).transpose()?;
        Ok(Self::Given { method, url: UrlTemplate::parse(url)?, headers: parsed, body })
    }

    /// The method, where the template says it.
    pub fn method(&self) -> Option<&str> {
        match self {
            Self::Given { method, .. } => Some(method),
            Self::FromParams => None,
        }
    }

    /// The params that the template names.
    pub fn params(&self) -> Vec<&str> {
        match self {
            Self::FromParams => vec!["method", "url", "headers", "body"],
            Self::Given { url, headers, body, .. } => {
                let mut names: Vec<&str> = url.params();
                names.extend(headers.values().flat_map(Text::params));
                names.extend(body.iter().flat_map(BodyTemplate::params));
                names.sort_unstable();
                names.dedup();
                names
            }
        }
    }
}

/// Makes the call that `template` and `params` say.
///
/// # Errors
/// [`TemplateError`] when a param is missing, or would be something else than data in the place where it lands.
pub fn render(template: &Template, params: &Map<String, Value>) -> Result<HttpCall, TemplateError> {
    match template {
        Template::Given { method, url, headers, body } => {
            let mut rendered = BTreeMap::new();
            for (name, text) in headers {
                // A header that is one optional param and nothing else is left out with it.
                if let Some(param) = text.single()
                    && matches!(params.get(param), None | Some(Value::Null))
                {
                    continue;
                }
                rendered.insert(name.clone(), text.render(params)?);
            }
            let body = body.as_ref().and_then(|body| body.render(params).transpose()).transpose()?;
            finish(method.clone(), url.render(params)?, rendered, body)
        }
        Template::FromParams => from_params(params),
    }
}

fn from_params(params: &Map<String, Value>) -> Result<HttpCall, TemplateError> {
    let method = match params.get("method") {
        None => "GET".to_owned(),
        Some(Value::String(method)) if METHODS.contains(&method.as_str()) => method.clone(),
        Some(_) => return Err(TemplateError::Method),
    };
    let url = url::whole(params, "url")?;
    let mut headers = BTreeMap::new();
    match params.get("headers") {
        None | Some(Value::Null) => {}
        Some(Value::Object(given)) => {
            for (name, value) in given {
                let lower = name.to_ascii_lowercase();
                let refused = || TemplateError::Header { header: text::shown(name) };
                if !is_token(&lower) || FRAMING_HEADERS.contains(&lower.as_str()) {
                    return Err(refused());
                }
                let value = value.as_str().ok_or_else(refused)?.to_owned();
                if headers.insert(lower, value).is_some() {
                    return Err(refused());
                }
            }
        }
        Some(_) => return Err(TemplateError::NotScalar { param: "headers".to_owned() }),
    }
    let body = match params.get("body") {
        None | Some(Value::Null) => None,
        Some(Value::String(text)) => Some(body::Rendered::raw(text.clone())),
        Some(value) => Some(body::Rendered::json(value)),
    };
    finish(method, url, headers, body)
}

fn finish(
    method: String,
    mut url: ::url::Url,
    mut headers: BTreeMap<String, String>,
    body: Option<body::Rendered>,
) -> Result<HttpCall, TemplateError> {
    if let Some((header, _)) = headers.iter().find(|(_, value)| !is_header_value(value)) {
        return Err(TemplateError::HeaderValue { header: header.clone() });
    }
    url.set_fragment(None);
    let (host, port) = url::target(&url)?;
    let body = body.map(|body| {
        if body.json {
            headers.entry("content-type".to_owned()).or_insert_with(|| "application/json".to_owned());
        }
        body.text
    });
    Ok(HttpCall { method, url: url.into(), headers, body, host, port })
}

/// RFC 9110 §5.6.2.
fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

/// RFC 9110 §5.5, without obs-text: visible ASCII, space and tab.
fn is_header_value(text: &str) -> bool {
    text.bytes().all(|b| b == b'\t' || (b' '..=b'~').contains(&b))
}
