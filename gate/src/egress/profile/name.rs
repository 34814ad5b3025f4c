//! DNS names and the patterns over them, compared at label boundaries.

use std::fmt;

use psl::Psl;
use url::Host;

/// A DNS name: lower case, A-labels, no trailing dot, not an address in any spelling.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

/// Why a text is no DNS name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("is empty")]
    Empty,
    #[error("ends with a dot")]
    TrailingDot,
    #[error("has an empty label")]
    EmptyLabel,
    #[error("is an address, not a name")]
    AddressLiteral,
    #[error("is longer than DNS allows")]
    TooLong,
    #[error("is not a host name")]
    NotAName,
}

impl Name {
    /// Parses as an URL parser does (WHATWG URL §3.5: percent-decoding apart, IDNA and the IPv4 number forms), then
    /// holds the result to DNS's limits (RFC 1035 §2.3.4) and to the characters that host names have.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        // The URL parser would decode %2e and the like. A name never needs it, so it is a spelling game.
        if text.contains('%') {
            return Err(NameError::NotAName);
        }
        let name = match Host::parse(text) {
            Ok(Host::Domain(name)) => name,
            Ok(Host::Ipv4(_) | Host::Ipv6(_)) => return Err(NameError::AddressLiteral),
            // "::1" without brackets; and "1.2.3.999", which the parser refuses as an address that overflows.
            Err(_) if text.parse::<std::net::IpAddr>().is_ok() => return Err(NameError::AddressLiteral),
            Err(_) => return Err(NameError::NotAName),
        };
        if name.ends_with('.') {
            return Err(NameError::TrailingDot);
        }
        if name.len() > 253 {
            return Err(NameError::TooLong);
        }
        for label in name.split('.') {
            if label.is_empty() {
                return Err(NameError::EmptyLabel);
            }
            if label.len() > 63 {
                return Err(NameError::TooLong);
            }
            if !label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_') {
                return Err(NameError::NotAName);
            }
        }
        Ok(Self(name))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it could be a name of the public DNS: below a suffix that the registries have, and none of the names that
    /// are kept for machines and networks of one's own (RFC 6761, RFC 6762, RFC 7686, RFC 8375).
    pub fn could_be_public(&self) -> bool {
        let last = self.0.rsplit('.').next().unwrap_or_default();
        let registry = psl::List.suffix(self.0.as_bytes()).is_some_and(|suffix| suffix.is_known());
        registry && self.0.contains('.') && !["arpa", "onion"].contains(&last)
    }

    /// Whether this name lies below `suffix`, one label or more.
    fn is_below(&self, suffix: &Self) -> bool {
        self.0.strip_suffix(&suffix.0).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A set of names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pattern {
    /// That name alone.
    Exact(Name),
    /// That name and everything below it: the plain entry.
    Tree(Name),
    /// What is one label or more below that name, and not the name itself: `*.name`.
    Below(Name),
}

/// Why an entry's domain is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    #[error("{domain:?} {error}")]
    Name { domain: String, error: NameError },
    #[error("{domain:?}: a wildcard is `*.` and a name, once, at the front")]
    Wildcard { domain: String },
    #[error("{domain:?} covers everything below the public suffix {suffix:?}")]
    PublicSuffix { domain: String, suffix: String },
    #[error("{domain:?}: `exact` and a wildcard contradict each other")]
    ExactWildcard { domain: String },
}

impl Pattern {
    /// `name` (it and what is below it) or `*.name` (only what is below it). Public suffixes are not looked at; see
    /// [`Pattern::covers_public_suffix`].
    pub fn parse(domain: &str) -> Result<Self, PatternError> {
        let (wildcard, rest) = match domain.strip_prefix("*.") {
            Some(rest) => (true, rest),
            None => (false, domain),
        };
        if rest.contains('*') {
            return Err(PatternError::Wildcard { domain: domain.to_owned() });
        }
        let name = Name::parse(rest).map_err(|error| PatternError::Name { domain: domain.to_owned(), error })?;
        Ok(if wildcard { Self::Below(name) } else { Self::Tree(name) })
    }

    pub fn matches(&self, name: &Name) -> bool {
        match self {
            Self::Exact(only) => name == only,
            Self::Tree(top) => name == top || name.is_below(top),
            Self::Below(top) => name.is_below(top),
        }
    }

    /// The names that both have; `None` when there are none.
    pub fn intersect(&self, other: &Self) -> Option<Self> {
        match (self, other) {
            (Self::Exact(name), pattern) | (pattern, Self::Exact(name)) => {
                pattern.matches(name).then(|| Self::Exact(name.clone()))
            }
            (mine, theirs) => {
                let (a, b) = (mine.name(), theirs.name());
                if a == b {
                    let below = matches!(mine, Self::Below(_)) || matches!(theirs, Self::Below(_));
                    Some(if below { Self::Below(a.clone()) } else { Self::Tree(a.clone()) })
                } else if a.is_below(b) {
                    Some(mine.clone())
                } else if b.is_below(a) {
                    Some(theirs.clone())
                } else {
                    None
                }
            }
        }
    }

    pub const fn name(&self) -> &Name {
        match self {
            Self::Exact(name) | Self::Tree(name) | Self::Below(name) => name,
        }
    }

    /// Of two patterns that match one name, the greater says more about it.
    pub(super) fn particularity(&self) -> (bool, usize, bool) {
        let labels = self.name().0.split('.').count();
        (matches!(self, Self::Exact(_)), labels, matches!(self, Self::Below(_)))
    }

    /// How the pattern is called in the canonical form of a profile.
    pub(super) const fn kind(&self) -> &'static str {
        match self {
            Self::Exact(_) => "exact",
            Self::Tree(_) => "tree",
            Self::Below(_) => "below",
        }
    }

    /// The section of the public suffix list whose rules this pattern would cover as a whole, so that anybody who
    /// registers a name there would be reached: `*.com`, `co.uk`, `*.github.io`.
    pub fn covers_public_suffix(&self) -> Option<SuffixKind> {
        let name = match self {
            Self::Exact(_) => return None,
            Self::Tree(name) | Self::Below(name) => name,
        };
        let found = suffix_kind(&name.0)
            // Rules such as `*.kawasaki.jp` make every child of a name a suffix.
            .or_else(|| suffix_kind(&format!("zzz-not-registered.{name}")));
        // A wildcard over one label that the list does not have (`*.test`, `*.internal`) is as wide as a suffix.
        match (found, self) {
            (None, Self::Below(name)) if !name.0.contains('.') => Some(SuffixKind::Registry),
            (found, _) => found,
        }
    }
}

/// The two sections of the public suffix list (publicsuffix.org).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SuffixKind {
    /// Where registries sell names.
    Registry,
    /// Where a company gives names to its customers (`github.io`, `s3.amazonaws.com`).
    Private,
}

fn suffix_kind(name: &str) -> Option<SuffixKind> {
    let suffix = psl::List.suffix(name.as_bytes()).filter(|suffix| suffix.as_bytes() == name.as_bytes())?;
    Some(match suffix.typ()? {
        psl::Type::Icann => SuffixKind::Registry,
        psl::Type::Private => SuffixKind::Private,
    })
}

impl fmt::Display for Pattern {
    /// As a manifest writes it; an exact entry prints its name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) | Self::Tree(name) => write!(f, "{name}"),
            Self::Below(name) => write!(f, "*.{name}"),
        }
    }
}
