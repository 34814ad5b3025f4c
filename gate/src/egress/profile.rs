//! What an execution may reach, by name and port.
//!
//! A profile is made once, from the manifest, and only ever narrowed afterwards. The gate asks it before policy is
//! asked, and the proxy asks it again for every connection: both call [`Profile::permits`], so they cannot disagree.

use std::fmt;
use std::net::IpAddr;

use serde_json::{Value, json};

use super::address::Cidr;
use crate::hash::sha256_tagged;

mod entry;
mod name;
#[cfg(test)]
mod tests;

pub use entry::{DomainEntry, EntryError, EntryOptions, NotEnforced, Protocol, TlsMode};
pub use name::{Name, NameError, Pattern, PatternError};

/// The ports of an entry that names none.
pub const DEFAULT_PORTS: [u16; 2] = [80, 443];

/// What an execution may reach. An [`Profile::Allowlist`] without entries reaches nothing, as [`Profile::None`] does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Profile {
    /// Nothing leaves the sandbox, DNS and loopback included.
    None,
    /// Only the gate's proxy is reached, and through it only what the entries name.
    Allowlist(Allowlist),
}

/// The entries of a profile, sorted and without repetitions, so that equal lists have equal hashes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allowlist {
    entries: Vec<Entry>,
    networks: Vec<NetworkEntry>,
}

/// One rule of an allowlist: some names, at some ports.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    pattern: Pattern,
    /// Sorted, without repetitions, never empty.
    ports: Vec<u16>,
    protocol: EntryProtocol,
    /// Empty: all of them.
    methods: Vec<String>,
}

/// What may be spoken with the names of an entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum EntryProtocol {
    /// TLS that is passed through, or HTTP in the clear, by what the client sends first.
    #[default]
    Auto,
    Tls {
        /// Whether the proxy ends it, to see the requests inside.
        terminate: bool,
    },
    Http,
    /// Anything; nothing of it is looked at.
    Tcp,
}

/// One rule for addresses that have no name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NetworkEntry {
    network: IpAddr,
    prefix: u8,
    ports: Vec<u16>,
    protocol: EntryProtocol,
}

/// A name and port that the profile does not permit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Denied {
    pub reason: DenyReason,
}

/// Why a name and port are not permitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DenyReason {
    /// The profile is `none`.
    NoEgress,
    /// The target is an address; profiles name names.
    AddressLiteral,
    /// The target is no DNS name: an empty label, a trailing dot, a character that no host name has, too long.
    InvalidName,
    /// No entry names it.
    NameNotAllowed,
    /// An entry names it, at other ports.
    PortNotAllowed,
    /// The action may not use this HTTP method.
    MethodNotAllowed,
}

impl DenyReason {
    /// The code that is sent as `deny_reason` and written into flow records.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NoEgress => "no_egress",
            Self::AddressLiteral => "address_literal",
            Self::InvalidName => "invalid_name",
            Self::NameNotAllowed => "name_not_allowed",
            Self::PortNotAllowed => "port_not_allowed",
            Self::MethodNotAllowed => "method_not_allowed",
        }
    }
}

impl fmt::Display for DenyReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl From<DenyReason> for Denied {
    fn from(reason: DenyReason) -> Self {
        Self { reason }
    }
}

impl Profile {
    /// An allowlist of `entries`. Without entries it reaches nothing.
    pub fn allowlist(entries: impl IntoIterator<Item = Entry>) -> Self {
        let mut entries: Vec<Entry> = entries.into_iter().collect();
        entries.sort();
        entries.dedup();
        Self::Allowlist(Allowlist { entries, networks: Vec::new() })
    }

    /// The same profile with these networks besides.
    #[must_use]
    pub fn with_networks(self, networks: impl IntoIterator<Item = NetworkEntry>) -> Self {
        match self {
            Self::None => Self::None,
            Self::Allowlist(list) => Self::Allowlist(Allowlist { networks: networks.into_iter().collect(), ..list }),
        }
    }

    /// Whether `host` may be contacted at `port`, and by which entry.
    ///
    /// `host` is the host of an URL or of a CONNECT line as it was asked for; it is parsed here as an URL parser does
    /// (lower case, IDNA), so that every spelling of an address is seen as an address.
    ///
    /// # Errors
    /// [`Denied`] for whatever is not named, and for what is not a DNS name at all.
    pub fn permits(&self, host: &str, port: u16) -> Result<&Entry, Denied> {
        let Self::Allowlist(list) = self else {
            return Err(DenyReason::NoEgress.into());
        };
        let name = Name::parse(host).map_err(|error| match error {
            NameError::AddressLiteral => DenyReason::AddressLiteral,
            _ => DenyReason::InvalidName,
        })?;
        let mut named = false;
        for entry in &list.entries {
            if entry.pattern.matches(&name) {
                if entry.ports.binary_search(&port).is_ok() {
                    return Ok(entry);
                }
                named = true;
            }
        }
        Err(if named { DenyReason::PortNotAllowed } else { DenyReason::NameNotAllowed }.into())
    }

    /// Whether an address that no name stands for may be connected to at `port`, and by which entry.
    ///
    /// # Errors
    /// [`Denied`] for every address that is in no network of the profile.
    pub fn permits_address(&self, address: IpAddr, port: u16) -> Result<&NetworkEntry, Denied> {
        let Self::Allowlist(list) = self else {
            return Err(DenyReason::NoEgress.into());
        };
        let within = |entry: &&NetworkEntry| entry.contains(address);
        let mut networks = list.networks.iter().filter(within).peekable();
        let other = if networks.peek().is_some() { DenyReason::PortNotAllowed } else { DenyReason::AddressLiteral };
        networks.find(|entry| entry.ports.is_empty() || entry.ports.contains(&port)).ok_or(other.into())
    }

    /// Whether nothing at all leaves, so that the kernel need not let even the proxy be reached.
    pub const fn is_none(&self) -> bool {
        matches!(self, Self::None)
    }

    pub fn entries(&self) -> &[Entry] {
        match self {
            Self::None => &[],
            Self::Allowlist(list) => &list.entries,
        }
    }

    /// What both this profile and `approved` permit: policy can take away and never add.
    pub fn narrowed(&self, approved: &Narrowing) -> Self {
        let (Self::Allowlist(list), Narrowing::Only(limits)) = (self, approved) else {
            return Self::None;
        };
        Self::allowlist(list.entries.iter().flat_map(|entry| limits.iter().filter_map(|limit| entry.within(limit))))
    }

    /// `sha256:<hex>` over `latchgate.profile.v1\n` and the JCS form of the profile.
    pub fn hash(&self) -> String {
        sha256_tagged(format!("latchgate.profile.v1\n{}", self.canonical()).as_bytes())
    }

    /// The JCS form (RFC 8785). Written by hand because names hold nothing that JSON would escape; a test compares it
    /// with the general encoder.
    fn canonical(&self) -> String {
        let Self::Allowlist(list) = self else {
            return r#"{"profile":"none"}"#.to_owned();
        };
        let entries: Vec<String> = list
            .entries
            .iter()
            .map(|entry| {
                let ports: Vec<String> = entry.ports.iter().map(u16::to_string).collect();
                let (kind, name) = (entry.pattern.kind(), entry.pattern.name());
                format!(r#"{{"match":"{kind}","name":"{name}","ports":[{}]}}"#, ports.join(","))
            })
            .collect();
        format!(r#"{{"entries":[{}],"profile":"proxy_allowlist"}}"#, entries.join(","))
    }

    /// The form that action details and policy input show: `"none"` or `{"proxy_allowlist": {"allowed_domains": […]}}`.
    pub fn to_public(&self) -> Value {
        let Self::Allowlist(list) = self else {
            return json!("none");
        };
        let mut names: Vec<String> = list.entries.iter().map(|entry| entry.pattern.to_string()).collect();
        names.dedup();
        json!({ "proxy_allowlist": { "allowed_domains": names } })
    }
}

impl Entry {
    /// `ports` empty means [`DEFAULT_PORTS`].
    pub fn new(pattern: Pattern, ports: impl IntoIterator<Item = u16>) -> Self {
        let mut ports: Vec<u16> = ports.into_iter().collect();
        if ports.is_empty() {
            ports.extend(DEFAULT_PORTS);
        }
        ports.sort_unstable();
        ports.dedup();
        Self { pattern, ports, protocol: EntryProtocol::Auto, methods: Vec::new() }
    }

    /// The same names and ports, for this protocol and these HTTP methods; none means all.
    #[must_use]
    pub fn speaking(self, protocol: EntryProtocol, methods: impl IntoIterator<Item = String>) -> Self {
        Self { protocol, methods: methods.into_iter().collect(), ..self }
    }

    pub const fn protocol(&self) -> EntryProtocol {
        self.protocol
    }

    /// The HTTP methods that may be used; empty for all.
    pub fn methods(&self) -> &[String] {
        &self.methods
    }

    pub fn pattern(&self) -> &Pattern {
        &self.pattern
    }

    pub fn ports(&self) -> &[u16] {
        &self.ports
    }

    fn within(&self, limit: &Limit) -> Option<Self> {
        let pattern = self.pattern.intersect(&limit.pattern)?;
        let ports: Vec<u16> = match &limit.ports {
            None => self.ports.clone(),
            Some(allowed) => self.ports.iter().copied().filter(|port| allowed.contains(port)).collect(),
        };
        (!ports.is_empty()).then(|| Self { pattern, ports, protocol: self.protocol, methods: self.methods.clone() })
    }
}

impl NetworkEntry {
    /// `ports` empty means all of them.
    pub fn new(network: IpAddr, prefix: u8, ports: impl IntoIterator<Item = u16>, protocol: EntryProtocol) -> Self {
        Self { network, prefix, ports: ports.into_iter().collect(), protocol }
    }

    pub const fn network(&self) -> (IpAddr, u8) {
        (self.network, self.prefix)
    }

    pub const fn protocol(&self) -> EntryProtocol {
        self.protocol
    }

    fn contains(&self, address: IpAddr) -> bool {
        format!("{}/{}", self.network, self.prefix).parse::<Cidr>().is_ok_and(|cidr| cidr.contains(address))
    }
}

impl fmt::Display for Entry {
    /// The rule as flow records name it, for example `*.example.com:80,443`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ports: Vec<String> = self.ports.iter().map(u16::to_string).collect();
        write!(f, "{}:{}", self.pattern, ports.join(","))
    }
}

/// The `approved_egress` of a policy decision: what a profile is narrowed to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Narrowing {
    Nothing,
    Only(Vec<Limit>),
}

/// One domain of an `approved_egress`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limit {
    pattern: Pattern,
    /// `None` leaves the ports of the profile's entry as they are: the plain form, which policy got as its input, does
    /// not carry them.
    ports: Option<Vec<u16>>,
}

impl Narrowing {
    /// Reads `"none"` or `{"proxy_allowlist": {"allowed_domains": […]}}`, whose items are names or `{domain, ports?,
    /// exact?}`.
    ///
    /// # Errors
    /// What is wrong with it, for anything else: an output that cannot be read must not become an allow.
    pub fn parse(value: &Value) -> Result<Self, String> {
        if value == "none" {
            return Ok(Self::Nothing);
        }
        let list = value
            .as_object()
            .filter(|object| object.len() == 1)
            .and_then(|object| object.get("proxy_allowlist"))
            .and_then(Value::as_object)
            .ok_or("approved_egress is neither \"none\" nor {\"proxy_allowlist\": …}")?;
        let domains = match list.get("allowed_domains") {
            None | Some(Value::Null) => return Ok(Self::Only(Vec::new())),
            Some(domains) => domains.as_array().ok_or("approved_egress: allowed_domains is not a list")?,
        };
        domains.iter().map(Limit::parse).collect::<Result<_, _>>().map(Self::Only)
    }
}

impl Limit {
    fn parse(value: &Value) -> Result<Self, String> {
        let wrong = |error: &dyn fmt::Display| format!("approved_egress: {error}");
        // A limit only takes away, so a wide one (`*.com`) is no danger here and public suffixes are not refused.
        if let Some(text) = value.as_str() {
            return Ok(Self { pattern: Pattern::parse(text).map_err(|e| wrong(&e))?, ports: None });
        }
        let options: EntryOptions = serde_json::from_value(value.clone()).map_err(|e| wrong(&e))?;
        let (pattern, ports) = options.as_limit().map_err(|e| wrong(&e))?;
        Ok(Self { pattern, ports })
    }
}
