//! URL templates: every placeholder knows which part of the URL it stands in.

use serde_json::{Map, Value};
use url::{Host, Url};

use super::text::{Part, Text, percent_encoded, scalar};
use super::{TemplateError, TemplateSyntax};
use crate::egress::profile::Name;

/// A URL with `{{param}}` in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UrlTemplate {
    parts: Vec<Placed>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Placed {
    Literal(String),
    /// The whole URL is the param, as it is.
    Whole(String),
    /// The URL begins with the param, which is an URL without query and fragment.
    Base(String),
    Host(String),
    Port(String),
    Path {
        param: String,
        keep_slashes: bool,
    },
    Query(String),
}

impl Placed {
    fn param(&self) -> Option<&str> {
        match self {
            Self::Literal(_) => None,
            Self::Whole(name) | Self::Base(name) | Self::Host(name) | Self::Port(name) | Self::Query(name) => {
                Some(name)
            }
            Self::Path { param, .. } => Some(param),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Host,
    Port,
    Path,
    Query,
    Fragment,
}

impl UrlTemplate {
    pub fn parse(template: &str) -> Result<Self, TemplateSyntax> {
        let text = Text::parse(template)?;
        if let Some(param) = text.single() {
            return Ok(Self { parts: vec![Placed::Whole(param.to_owned())] });
        }
        let mut parts = Vec::new();
        let mut place = Place::Host;
        for (at, part) in text.0.iter().enumerate() {
            match (at, part) {
                (0, Part::Literal(literal)) => {
                    let rest = literal
                        .strip_prefix("https://")
                        .or_else(|| literal.strip_prefix("http://"))
                        .ok_or(TemplateSyntax::Scheme)?;
                    place = advance(Place::Host, rest)?;
                    if rest.starts_with(['/', '?', '#', ':']) {
                        return Err(TemplateSyntax::NoHost);
                    }
                    parts.push(Placed::Literal(literal.clone()));
                }
                (0, Part::Param { name, .. }) => {
                    if !text.0.get(1).is_some_and(|next| matches!(next, Part::Literal(t) if t.starts_with(['/', '?'])))
                    {
                        return Err(TemplateSyntax::AfterBase);
                    }
                    place = Place::Path;
                    parts.push(Placed::Base(name.clone()));
                }
                (_, Part::Literal(literal)) => {
                    place = advance(place, literal)?;
                    parts.push(Placed::Literal(literal.clone()));
                }
                (_, Part::Param { name, keep_slashes }) => parts.push(match place {
                    Place::Host => Placed::Host(name.clone()),
                    Place::Port => Placed::Port(name.clone()),
                    Place::Path => Placed::Path { param: name.clone(), keep_slashes: *keep_slashes },
                    Place::Query => Placed::Query(name.clone()),
                    Place::Fragment => return Err(TemplateSyntax::Place("the fragment")),
                }),
            }
        }
        // `https://host/{{path}}` gives the whole path to the caller, so there is no structure of the template's to
        // keep, and an encoded slash would make it useless.
        if let [Placed::Literal(origin), Placed::Path { keep_slashes, .. }] = parts.as_mut_slice()
            && origin.matches('/').count() == 3
            && origin.ends_with('/')
        {
            *keep_slashes = true;
        }
        let template = Self { parts };
        template.probe()?;
        Ok(template)
    }

    /// Renders the template with harmless values, so that a literal part which is no URL shows at load.
    fn probe(&self) -> Result<(), TemplateSyntax> {
        let value = |part: &Placed| match part {
            Placed::Base(_) => Value::from("https://a.example"),
            Placed::Port(_) => Value::from(1),
            _ => Value::from("a"),
        };
        let params = self.parts.iter().filter_map(|part| Some((part.param()?.to_owned(), value(part)))).collect();
        // One param in two places cannot suit both; that is for the schema and the call to find.
        let mut names = self.params();
        names.sort_unstable();
        let distinct = names.windows(2).all(|pair| pair.first() != pair.last());
        let fine = self.render(&params).and_then(|url| target(&url)).is_ok();
        if fine || !distinct { Ok(()) } else { Err(TemplateSyntax::NotAUrl) }
    }

    pub fn params(&self) -> Vec<&str> {
        self.parts.iter().filter_map(Placed::param).collect()
    }

    pub(super) fn render(&self, params: &Map<String, Value>) -> Result<Url, TemplateError> {
        if let [Placed::Whole(param)] = self.parts.as_slice() {
            return whole(params, param);
        }
        let mut out = String::new();
        for part in &self.parts {
            match part {
                Placed::Literal(text) => out.push_str(text),
                Placed::Whole(param) | Placed::Base(param) => {
                    let base = whole(params, param)?;
                    if base.query().is_some() || base.fragment().is_some() {
                        return Err(TemplateError::NotABase { param: param.clone() });
                    }
                    out.push_str(base.as_str().trim_end_matches('/'));
                }
                Placed::Host(param) => out.push_str(&host_part(params, param)?),
                Placed::Port(param) => {
                    let port = scalar(params, param)?;
                    if port.is_empty() || port.len() > 5 || !port.bytes().all(|b| b.is_ascii_digit()) {
                        return Err(TemplateError::HostStructure { param: param.clone() });
                    }
                    out.push_str(&port);
                }
                Placed::Path { param, keep_slashes } => out.push_str(&path_part(params, param, *keep_slashes)?),
                Placed::Query(param) => out.push_str(&percent_encoded(&scalar(params, param)?)),
            }
        }
        // Two values, or a value and a literal, can make a dot segment that neither is: `{{a}}{{b}}` of "." and ".".
        let path = out.split(['?', '#']).next().unwrap_or_default();
        if path.split('/').skip(3).any(is_dot_segment) {
            let param = self.params().first().copied().unwrap_or_default().to_owned();
            return Err(TemplateError::PathStructure { param });
        }
        Url::parse(&out).map_err(|_| TemplateError::Url)
    }
}

/// The place after `literal`, when it begins in `place`.
fn advance(mut place: Place, literal: &str) -> Result<Place, TemplateSyntax> {
    for c in literal.chars() {
        place = match (place, c) {
            (Place::Host | Place::Port, '@') => return Err(TemplateSyntax::UserInfo),
            (Place::Host | Place::Port, '\\') => return Err(TemplateSyntax::Place("an authority with a backslash")),
            (Place::Host, ':') => Place::Port,
            (Place::Host | Place::Port, '/') => Place::Path,
            (Place::Host | Place::Port | Place::Path, '?') => Place::Query,
            (Place::Host | Place::Port | Place::Path | Place::Query, '#') => Place::Fragment,
            (place, _) => place,
        };
    }
    Ok(place)
}

/// A param that is a whole URL: absolute, http or https, without userinfo, and free of what parsers disagree about.
pub(super) fn whole(params: &Map<String, Value>, param: &str) -> Result<Url, TemplateError> {
    let owned = || param.to_owned();
    let text = match params.get(param) {
        None | Some(Value::Null) => return Err(TemplateError::Missing { param: owned() }),
        Some(Value::String(text)) => text,
        Some(_) => return Err(TemplateError::NotText { param: owned() }),
    };
    // The parser drops tabs and line ends, trims spaces and takes a backslash for a slash; another reader of the same
    // text may not.
    if text.chars().any(|c| c.is_control() || c.is_whitespace() || c == '\\') {
        return Err(TemplateError::NotAUrl { param: owned() });
    }
    let lower = text.get(..8).unwrap_or(text).to_ascii_lowercase();
    let after = match (lower.strip_prefix("https://"), lower.strip_prefix("http://")) {
        (Some(_), _) => text.get(8..),
        (_, Some(_)) => text.get(7..),
        _ => None,
    };
    // "https:example.com" and "https:///example.com" are mended by the parser; a URL that needs mending is refused.
    let Some(after) = after.filter(|rest| !rest.is_empty() && !rest.starts_with('/')) else {
        return Err(TemplateError::NotAUrl { param: owned() });
    };
    let authority = after.split(['/', '?', '#']).next().unwrap_or_default();
    if authority.contains('@') {
        return Err(TemplateError::UserInfo { param: owned() });
    }
    Url::parse(text).map_err(|_| TemplateError::NotAUrl { param: owned() })
}

/// The host and port of a finished URL, which are what is checked and what is executed.
pub(super) fn target(url: &Url) -> Result<(String, u16), TemplateError> {
    if !matches!(url.scheme(), "http" | "https") || !url.username().is_empty() || url.password().is_some() {
        return Err(TemplateError::Url);
    }
    let host = match url.host().ok_or(TemplateError::Url)? {
        Host::Domain(name) => Name::parse(name).map_err(TemplateError::Host)?.to_string(),
        // An address is no name and every profile of this build refuses it; it is a target nevertheless.
        Host::Ipv4(address) => address.to_string(),
        Host::Ipv6(address) => address.to_string(),
    };
    let port = url.port_or_known_default().ok_or(TemplateError::Url)?;
    Ok((host, port))
}

/// Letters, digits, hyphens and inner dots: a value is labels, and cannot end the host or begin something else.
fn host_part(params: &Map<String, Value>, param: &str) -> Result<String, TemplateError> {
    let value = scalar(params, param)?;
    let plain = value.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.' || b == b'_');
    if value.is_empty() || !plain || value.starts_with('.') || value.ends_with('.') || value.contains("..") {
        return Err(TemplateError::HostStructure { param: param.to_owned() });
    }
    Ok(value.to_ascii_lowercase())
}

fn path_part(params: &Map<String, Value>, param: &str, keep_slashes: bool) -> Result<String, TemplateError> {
    let value = scalar(params, param)?;
    let structure = || TemplateError::PathStructure { param: param.to_owned() };
    if value.is_empty() {
        return Err(TemplateError::Empty { param: param.to_owned() });
    }
    if !keep_slashes {
        // An encoded slash is data to the URL parser, but many servers decode before they route.
        return if value.split(['/', '\\']).any(is_dot_segment) {
            Err(structure())
        } else {
            Ok(percent_encoded(&value))
        };
    }
    let segments: Vec<&str> = value.trim_start_matches('/').split('/').collect();
    let empty_inside = segments.split_last().is_some_and(|(_, rest)| rest.iter().any(|segment| segment.is_empty()));
    if empty_inside || segments.iter().any(|segment| is_dot_segment(segment) || segment.contains('\\')) {
        return Err(structure());
    }
    Ok(segments.iter().map(|segment| percent_encoded(segment)).collect::<Vec<_>>().join("/"))
}

/// `.` and `..`, also as the URL parser knows them (WHATWG URL §4.4: `%2e` is a dot there).
fn is_dot_segment(segment: &str) -> bool {
    let lower = segment.to_ascii_lowercase().replace("%2e", ".");
    lower == "." || lower == ".."
}
