//! The entries of `allowed_domains` as manifests write them.

use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::name::{Pattern, PatternError, SuffixKind};
use super::{Entry, Name};

/// One item of `allowed_domains`: a name, or an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DomainEntry {
    Plain(String),
    Detailed(EntryOptions),
}

/// An entry written as an object. A misspelt key here would widen the entry, so unknown ones are refused.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EntryOptions {
    domain: Option<String>,
    cidr: Option<String>,
    ports: Option<Vec<u16>>,
    #[serde(default)]
    exact: bool,
    protocol: Option<Protocol>,
    tls: Option<TlsMode>,
    methods: Option<Vec<String>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tls,
    Http,
    Tcp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TlsMode {
    Passthrough,
    Terminate,
}

/// Why an entry is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    #[error(transparent)]
    Pattern(#[from] PatternError),
    #[error("an entry names either a domain or a cidr")]
    NeitherOrBoth,
    #[error("{domain:?}: ports is empty; leave it out for 443 and 80")]
    NoPorts { domain: String },
    #[error("{domain:?}: port 0 cannot be connected to")]
    PortZero { domain: String },
    #[error(transparent)]
    NotEnforced(#[from] NotEnforced),
}

/// Something that the contract has and that this build could not hold an execution to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} is not enforced yet, so a manifest with it does not load")]
pub struct NotEnforced {
    what: String,
}

impl NotEnforced {
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into() }
    }
}

impl DomainEntry {
    /// The entry as a rule, and a remark for whoever lints the manifest.
    ///
    /// # Errors
    /// [`EntryError`] when it is not a name, is as wide as a registry's suffix, or asks for what is not enforced yet.
    pub fn compile(&self) -> Result<(Entry, Option<String>), EntryError> {
        let (domain, pattern, ports) = match self {
            Self::Plain(domain) => (domain.as_str(), Pattern::parse(domain)?, Vec::new()),
            Self::Detailed(options) => options.compile()?,
        };
        let remark = match pattern.covers_public_suffix() {
            None => None,
            Some(SuffixKind::Registry) => {
                let suffix = pattern.name().to_string();
                return Err(PatternError::PublicSuffix { domain: domain.to_owned(), suffix }.into());
            }
            // Published manifests hold `*.s3.amazonaws.com`, so these load; whoever lints learns what they mean.
            Some(SuffixKind::Private) => {
                Some(format!("{domain:?} reaches every customer of {}, not one", pattern.name()))
            }
        };
        Ok((Entry::new(pattern, ports), remark))
    }
}

impl EntryOptions {
    fn compile(&self) -> Result<(&str, Pattern, Vec<u16>), EntryError> {
        let domain = match (&self.domain, &self.cidr) {
            (Some(domain), None) => domain,
            (None, Some(_)) => return Err(NotEnforced::new("a {cidr} entry").into()),
            _ => return Err(EntryError::NeitherOrBoth),
        };
        match self.protocol {
            None | Some(Protocol::Tls) => {}
            Some(Protocol::Http) => return Err(NotEnforced::new("protocol: http").into()),
            Some(Protocol::Tcp) => return Err(NotEnforced::new("protocol: tcp").into()),
        }
        if self.tls == Some(TlsMode::Terminate) {
            return Err(NotEnforced::new("tls: terminate").into());
        }
        if self.methods.is_some() {
            return Err(NotEnforced::new("methods of a domain entry").into());
        }
        let ports = match &self.ports {
            None => Vec::new(),
            Some(ports) if ports.is_empty() => return Err(EntryError::NoPorts { domain: domain.clone() }),
            Some(ports) if ports.contains(&0) => return Err(EntryError::PortZero { domain: domain.clone() }),
            Some(ports) => ports.clone(),
        };
        Ok((domain, self.pattern(domain)?, ports))
    }

    fn pattern(&self, domain: &str) -> Result<Pattern, PatternError> {
        match (Pattern::parse(domain)?, self.exact) {
            (Pattern::Tree(name), true) => Ok(Pattern::Exact(name)),
            (Pattern::Below(_), true) => Err(PatternError::ExactWildcard { domain: domain.to_owned() }),
            (pattern, _) => Ok(pattern),
        }
    }

    /// The entry as a limit on another: everything that it leaves open stays as the other has it.
    pub(super) fn as_limit(&self) -> Result<(Pattern, Option<Vec<u16>>), EntryError> {
        let (_, pattern, _) = self.compile()?;
        Ok((pattern, self.ports.clone()))
    }
}

impl From<&Name> for DomainEntry {
    fn from(name: &Name) -> Self {
        Self::Plain(name.to_string())
    }
}

impl<'de> Deserialize<'de> for DomainEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = DomainEntry;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a domain, or an object with a domain")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<DomainEntry, E> {
                Ok(DomainEntry::Plain(text.to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<DomainEntry, A::Error> {
                EntryOptions::deserialize(de::value::MapAccessDeserializer::new(map)).map(DomainEntry::Detailed)
            }
        }
        deserializer.deserialize_any(Either)
    }
}
