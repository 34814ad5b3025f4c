//! The entries of `allowed_domains` as manifests write them.

use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::name::{Pattern, PatternError, SuffixKind};
use super::network::{Network, NetworkError};
use super::{Entry, EntryProtocol, Name, NetworkEntry};
use crate::action::template::METHODS;

/// The forms of entries that the contract has and that nothing holds an execution to yet. A manifest with one does not
/// load. A form goes from here when what enforces it is there, and with that it loads.
pub const NOT_ENFORCED: &[Form] = &[];

/// A form that an entry may have beside a name, ports and `exact`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    Cidr,
    Http,
    Tcp,
    Terminate,
    Methods,
}

impl Form {
    pub const ALL: [Self; 5] = [Self::Cidr, Self::Http, Self::Tcp, Self::Terminate, Self::Methods];

    /// The form as an error names it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cidr => "a {cidr} entry",
            Self::Http => "protocol: http",
            Self::Tcp => "protocol: tcp",
            Self::Terminate => "tls: terminate",
            Self::Methods => "methods of a domain entry",
        }
    }
}

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

/// An entry as a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rule {
    Names(Entry),
    Addresses(NetworkEntry),
}

/// Why an entry is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    #[error(transparent)]
    Pattern(#[from] PatternError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error("an entry names either a domain or a cidr")]
    NeitherOrBoth,
    #[error("{what} is a network, and a name is wanted")]
    NotAName { what: String },
    #[error("{what:?}: ports is empty; leave it out for 443 and 80")]
    NoPorts { what: String },
    #[error("{what:?}: port 0 cannot be connected to")]
    PortZero { what: String },
    #[error("{what:?}: {why}")]
    Contradiction { what: String, why: &'static str },
    #[error("{what:?}: {method:?} is no HTTP method that is known here")]
    Method { what: String, method: String },
    #[error("{what:?}: an item of approved_egress has a domain or a cidr, ports and exact, and no {key}")]
    NotALimit { what: String, key: &'static str },
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
    /// [`EntryError`] when it is not a name or a network, is as wide as a registry's suffix, contradicts itself, or asks
    /// for what is not enforced yet.
    pub fn rule(&self) -> Result<(Rule, Option<String>), EntryError> {
        self.rule_without(NOT_ENFORCED)
    }

    /// The same for an entry that must be about names.
    ///
    /// # Errors
    /// [`EntryError`], also for a network.
    pub fn compile(&self) -> Result<(Entry, Option<String>), EntryError> {
        match self.rule()? {
            (Rule::Names(entry), remark) => Ok((entry, remark)),
            (Rule::Addresses(entry), _) => Err(EntryError::NotAName { what: entry.to_string() }),
        }
    }

    /// The same where `not_enforced` is what nothing enforces.
    ///
    /// # Errors
    /// [`EntryError`].
    pub(super) fn rule_without(&self, not_enforced: &[Form]) -> Result<(Rule, Option<String>), EntryError> {
        let (domain, entry) = match self {
            Self::Plain(domain) => (domain.as_str(), Entry::new(Pattern::parse(domain)?, [])),
            Self::Detailed(options) => {
                if let Some(form) = options.forms().find(|form| not_enforced.contains(form)) {
                    return Err(NotEnforced::new(form.name()).into());
                }
                match (&options.domain, &options.cidr) {
                    (Some(domain), None) => (domain.as_str(), options.names(domain)?),
                    (None, Some(cidr)) => {
                        let (entry, remark) = options.addresses(cidr)?;
                        return Ok((Rule::Addresses(entry), remark));
                    }
                    _ => return Err(EntryError::NeitherOrBoth),
                }
            }
        };
        let remark = match entry.pattern.covers_public_suffix() {
            None => None,
            Some(SuffixKind::Registry) => {
                let suffix = entry.pattern.name().to_string();
                return Err(PatternError::PublicSuffix { domain: domain.to_owned(), suffix }.into());
            }
            // Published manifests hold `*.s3.amazonaws.com`, so these load; whoever lints learns what they mean.
            Some(SuffixKind::Private) => {
                Some(format!("{domain:?} reaches every customer of {}, not one", entry.pattern.name()))
            }
        };
        Ok((Rule::Names(entry), remark))
    }
}

impl EntryOptions {
    fn forms(&self) -> impl Iterator<Item = Form> {
        [
            self.cidr.as_ref().map(|_| Form::Cidr),
            (self.protocol == Some(Protocol::Http)).then_some(Form::Http),
            (self.protocol == Some(Protocol::Tcp)).then_some(Form::Tcp),
            (self.tls == Some(TlsMode::Terminate)).then_some(Form::Terminate),
            self.methods.as_ref().map(|_| Form::Methods),
        ]
        .into_iter()
        .flatten()
    }

    fn names(&self, domain: &str) -> Result<Entry, EntryError> {
        let refuse = |why| Err(EntryError::Contradiction { what: domain.to_owned(), why });
        let pattern = self.pattern(domain)?;
        let protocol = self.protocol(domain)?;
        if protocol == EntryProtocol::Tcp && !(matches!(pattern, Pattern::Exact(_)) && self.ports.is_some()) {
            // Nothing inside the connection says whom it is for: what is dialled must be one name at named ports.
            return refuse("protocol: tcp needs exact: true and ports");
        }
        let methods = match &self.methods {
            None => Vec::new(),
            Some(_) if !protocol.shows_requests() => {
                return refuse("methods needs protocol: http or tls: terminate, where requests can be seen");
            }
            Some(methods) if methods.is_empty() => return refuse("methods is empty; leave it out for all of them"),
            Some(methods) => methods.iter().map(|method| method.to_ascii_uppercase()).collect(),
        };
        if let Some(method) = methods.iter().find(|method| !METHODS.contains(&method.as_str())) {
            return Err(EntryError::Method { what: domain.to_owned(), method: method.clone() });
        }
        Ok(Entry::new(pattern, self.ports(domain)?).speaking(protocol, methods))
    }

    fn addresses(&self, cidr: &str) -> Result<(NetworkEntry, Option<String>), EntryError> {
        let refuse = |why| Err(EntryError::Contradiction { what: cidr.to_owned(), why });
        if self.exact {
            return refuse("exact is for names");
        }
        if self.methods.is_some() {
            return refuse("methods is for names: without one no request can be told to be for whom it was checked");
        }
        let protocol = self.protocol(cidr)?;
        if matches!(protocol, EntryProtocol::Tls { terminate: true }) {
            return refuse("tls: terminate needs a name, for which a certificate can be made");
        }
        let (network, remark) = Network::parse_entry(cidr)?;
        Ok((NetworkEntry::new(network.address(), network.prefix(), self.ports(cidr)?, protocol), remark))
    }

    fn protocol(&self, what: &str) -> Result<EntryProtocol, EntryError> {
        Ok(match (self.protocol, self.tls) {
            (None, None) => EntryProtocol::Auto,
            (Some(Protocol::Http), None) => EntryProtocol::Http,
            (Some(Protocol::Tcp), None) => EntryProtocol::Tcp,
            (None | Some(Protocol::Tls), tls) => EntryProtocol::Tls { terminate: tls == Some(TlsMode::Terminate) },
            (Some(_), Some(_)) => {
                return Err(EntryError::Contradiction { what: what.to_owned(), why: "tls belongs to protocol: tls" });
            }
        })
    }

    fn ports(&self, what: &str) -> Result<Vec<u16>, EntryError> {
        match &self.ports {
            None => Ok(Vec::new()),
            Some(ports) if ports.is_empty() => Err(EntryError::NoPorts { what: what.to_owned() }),
            Some(ports) if ports.contains(&0) => Err(EntryError::PortZero { what: what.to_owned() }),
            Some(ports) => Ok(ports.clone()),
        }
    }

    fn pattern(&self, domain: &str) -> Result<Pattern, PatternError> {
        match (Pattern::parse(domain)?, self.exact) {
            (Pattern::Tree(name), true) => Ok(Pattern::Exact(name)),
            (Pattern::Below(_), true) => Err(PatternError::ExactWildcard { domain: domain.to_owned() }),
            (pattern, _) => Ok(pattern),
        }
    }

    /// The entry as a limit on others: everything that it leaves open stays as the others have it. What cannot narrow is
    /// refused, for it would look as if it did.
    #[expect(clippy::type_complexity, reason = "one caller, which takes it apart at once")]
    pub(super) fn as_limit(&self) -> Result<(Result<Pattern, Network>, Option<Vec<u16>>), EntryError> {
        let (what, limit) = match (&self.domain, &self.cidr) {
            (Some(domain), None) => (domain, Ok(self.pattern(domain)?)),
            (None, Some(cidr)) => (cidr, Err(Network::parse(cidr)?)),
            _ => return Err(EntryError::NeitherOrBoth),
        };
        let more = [
            ("protocol", self.protocol.is_some()),
            ("tls", self.tls.is_some()),
            ("methods", self.methods.is_some()),
            ("exact", self.exact && self.cidr.is_some()),
        ];
        if let Some((key, _)) = more.into_iter().find(|(_, there)| *there) {
            return Err(EntryError::NotALimit { what: what.clone(), key });
        }
        self.ports(what)?;
        Ok((limit, self.ports.clone()))
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
