//! What one execution may reach, by name and port.

/// The egress profile of an execution.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Profile {
    /// Nothing leaves.
    None,
    /// Only what is listed leaves.
    Allowlist(Vec<Entry>),
}

/// A name and what is below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(String);

impl Pattern {
    /// # Errors
    /// Never; a name is taken as it is.
    pub fn parse(domain: &str) -> Result<Self, std::convert::Infallible> {
        Ok(Self(domain.to_owned()))
    }
}

/// A pattern at some ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pattern: Pattern,
    ports: Vec<u16>,
}

impl Entry {
    pub fn new(pattern: Pattern, ports: impl IntoIterator<Item = u16>) -> Self {
        Self { pattern, ports: ports.into_iter().collect() }
    }
}

/// A name or port outside the profile.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Denied {
    pub reason: String,
}

impl Profile {
    pub fn allowlist(entries: impl IntoIterator<Item = Entry>) -> Self {
        Self::Allowlist(entries.into_iter().collect())
    }

    /// The entry that lets `host`, lower-case and without a trailing dot, be reached on `port`.
    ///
    /// # Errors
    /// [`Denied`] when there is none.
    pub fn permits(&self, host: &str, port: u16) -> Result<&Entry, Denied> {
        let entries = match self {
            Self::None => &[][..],
            Self::Allowlist(entries) => entries,
        };
        let named = |entry: &&Entry| {
            host.strip_suffix(&entry.pattern.0).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        };
        let mut named = entries.iter().filter(named).peekable();
        let reason = if named.peek().is_some() { "port_not_allowed" } else { "name_not_allowed" };
        named.find(|entry| entry.ports.contains(&port)).ok_or_else(|| Denied { reason: reason.to_owned() })
    }
}
