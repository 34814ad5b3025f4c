//! What one execution may reach, by name and port.

/// The egress profile of an execution.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Profile {
    /// Nothing leaves.
    None,
    /// Only what is listed leaves.
    Allowlist(Vec<Entry>),
}

/// A name that may be reached, with its subdomains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub domain: String,
    pub ports: Vec<u16>,
}

/// A name or port outside the profile.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Denied {
    pub reason: String,
}

impl Profile {
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
            host == entry.domain || host.strip_suffix(&entry.domain).is_some_and(|rest| rest.ends_with('.'))
        };
        match entries.iter().filter(named).find(|entry| entry.ports.contains(&port)) {
            Some(entry) => Ok(entry),
            None => Err(Denied { reason: format!("{host}:{port} is not in the profile of this action") }),
        }
    }
}
