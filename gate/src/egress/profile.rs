//! What an execution may reach, by name and port.
//!
//! A profile is made once, from the manifest, and only ever narrowed afterwards. The gate asks it before policy is
//! asked, and the proxy asks it again for every connection: both call [`Profile::permits`], so they cannot disagree.

use std::fmt;
use std::net::IpAddr;

use serde_json::{Value, json};

use super::address::Host;
use crate::guards::{self, Guard};
use crate::hash::sha256_tagged;

mod entry;
mod name;
mod narrow;
mod network;
#[cfg(test)]
mod tests;

pub use entry::{DomainEntry, EntryError, EntryOptions, Form, NOT_ENFORCED, NotEnforced, Protocol, Rule, TlsMode};
pub use name::{Name, NameError, Pattern, PatternError};
pub use narrow::{Limit, Narrowing};
pub use network::{Network, NetworkEntry, NetworkError};

/// The ports of an entry that names none.
pub const DEFAULT_PORTS: [u16; 2] = [80, 443];
/// The ports at which `egress.mode: unsafe_audit` lets names through.
pub const AUDIT_PORTS: [u16; 2] = [80, 443];

/// What an execution may reach. An [`Profile::Allowlist`] without entries reaches nothing, as [`Profile::None`] does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Profile {
    /// Nothing leaves the sandbox, DNS and loopback included.
    None,
    /// Only the gate's proxy is reached, and through it only what the entries permit.
    Allowlist(Allowlist),
}

/// The entries of a profile, sorted and without repetitions, so that equal lists have equal hashes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allowlist {
    entries: Vec<Entry>,
    networks: Vec<NetworkEntry>,
    /// Whether names that no entry has are let through and recorded (`egress.mode: unsafe_audit`).
    audit: bool,
}

/// One rule of an allowlist: some names, at some ports.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    pattern: Pattern,
    /// Sorted, without repetitions, never empty.
    ports: Vec<u16>,
    protocol: EntryProtocol,
    /// In upper case, sorted, without repetitions. Empty: all of them.
    methods: Vec<String>,
}

/// What may be spoken with what an entry permits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum EntryProtocol {
    /// TLS that is passed through, or HTTP in the clear: what the client sends first decides.
    #[default]
    Auto,
    Tls {
        /// Whether the proxy ends it and sees the requests inside.
        terminate: bool,
    },
    Http,
    /// Anything: nothing of it is looked at.
    Tcp,
}

/// What permits a target: an entry about its name, or one about its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permitted<'a> {
    Name(&'a Entry),
    Address(&'a NetworkEntry),
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
    /// The target is an address, and the profile has names only.
    AddressLiteral,
    /// The target is an address, and in no network of the profile.
    AddressNotAllowed,
    /// The target is no DNS name: an empty label, a trailing dot, a character that no host name has, too long.
    InvalidName,
    /// No entry names it.
    NameNotAllowed,
    /// An entry names it, at other ports.
    PortNotAllowed,
    /// The action may not use this HTTP method, there or anywhere.
    MethodNotAllowed,
    /// An entry names it, for another protocol.
    ProtocolNotAllowed,
}

impl DenyReason {
    /// The code that is sent as `deny_reason` and written into flow records.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NoEgress => "no_egress",
            Self::AddressLiteral => "address_literal",
            Self::AddressNotAllowed => "address_not_allowed",
            Self::InvalidName => "invalid_name",
            Self::NameNotAllowed => "name_not_allowed",
            Self::PortNotAllowed => "port_not_allowed",
            Self::MethodNotAllowed => "method_not_allowed",
            Self::ProtocolNotAllowed => "protocol_not_allowed",
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
        Self::Allowlist(Allowlist { entries, networks: Vec::new(), audit: false })
    }

    /// The same with these networks besides; [`Profile::None`] stays what it is.
    #[must_use]
    pub fn with_networks(self, networks: impl IntoIterator<Item = NetworkEntry>) -> Self {
        let Self::Allowlist(list) = self else {
            return Self::None;
        };
        let mut networks: Vec<NetworkEntry> = list.networks.into_iter().chain(networks).collect();
        networks.sort();
        networks.dedup();
        Self::Allowlist(Allowlist { networks, ..list })
    }

    /// The same, but that public names at [`AUDIT_PORTS`] which no entry permits are let through and recorded
    /// ([`Self::audits`]); [`Profile::None`] stays what it is.
    #[must_use]
    pub fn in_audit(self) -> Self {
        match self {
            Self::None => Self::None,
            Self::Allowlist(list) => Self::Allowlist(Allowlist { audit: true, ..list }),
        }
    }

    /// Whether what no entry permits may be let through.
    pub const fn is_audit(&self) -> bool {
        matches!(self, Self::Allowlist(list) if list.audit)
    }

    /// Whether `host` at `port`, which [`Self::permits`] denies, is let through all the same, and by which reason it
    /// would be refused. Only DNS names that could be public are; an address is not, in no spelling. Of the addresses
    /// that the name turns out to have, every one must be public.
    ///
    /// # Errors
    /// [`Denied`], which is also what would have been said without the mode.
    pub fn audits(&self, host: &str, port: u16) -> Result<DenyReason, Denied> {
        let denied = match self.permits(host, port) {
            Err(denied) => denied,
            // An entry's rule holds: there is nothing to audit.
            Ok(_) => return Err(DenyReason::ProtocolNotAllowed.into()),
        };
        let unnamed = matches!(denied.reason, DenyReason::NameNotAllowed | DenyReason::PortNotAllowed);
        let public = Name::parse(host).is_ok_and(|name| name.could_be_public());
        if self.is_audit() && unnamed && public && AUDIT_PORTS.contains(&port) {
            Ok(denied.reason)
        } else {
            Err(denied)
        }
    }

    /// The first two entries that say different things about the same names (or network) and port, so that neither
    /// could be the rule.
    pub fn contradiction(&self) -> Option<(String, String)> {
        let pair = |a: &dyn fmt::Display, b: &dyn fmt::Display| Some((a.to_string(), b.to_string()));
        let (entries, networks) = (self.entries(), self.network_entries());
        let names = entries.iter().enumerate().find_map(|(at, one)| {
            let other = entries.iter().skip(at + 1).find(|it| it.ports.iter().any(|&port| one.overrules(it, port)))?;
            pair(one, other)
        });
        names.or_else(|| {
            networks.iter().enumerate().find_map(|(at, one)| {
                let mut others = networks.iter().skip(at + 1);
                pair(one, others.find(|it| it.ports().iter().any(|&port| one.overrules(it, port)))?)
            })
        })
    }

    /// Whether `host` may be contacted at `port`, and by which entry: of several, by the one that is most particular
    /// about the name (`exact`, then the longest suffix), so that a rule for one name holds under a rule for many.
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
        let names = |entry: &&Entry| entry.pattern.matches(&name) || !guards::on(Guard::ProxyNames);
        let named = || list.entries.iter().filter(names);
        let none = if named().next().is_some() { DenyReason::PortNotAllowed } else { DenyReason::NameNotAllowed };
        named()
            .filter(|entry| entry.ports.binary_search(&port).is_ok() || !guards::on(Guard::ProxyNames))
            .max_by_key(|entry| entry.pattern.particularity())
            .ok_or(none.into())
    }

    /// Whether an address that no name stands for may be contacted at `port`, and by which entry: of several, by that
    /// of the smallest network.
    ///
    /// # Errors
    /// [`Denied`] for every address that is in no network of the profile.
    pub fn permits_address(&self, address: IpAddr, port: u16) -> Result<&NetworkEntry, Denied> {
        let Self::Allowlist(list) = self else {
            return Err(DenyReason::NoEgress.into());
        };
        let around = || list.networks.iter().filter(|entry| entry.network.contains(address));
        let none = match (around().next(), list.networks.as_slice()) {
            (Some(_), _) => DenyReason::PortNotAllowed,
            (None, []) => DenyReason::AddressLiteral,
            (None, _) => DenyReason::AddressNotAllowed,
        };
        around()
            .filter(|entry| entry.ports.binary_search(&port).is_ok())
            .max_by_key(|entry| entry.network.prefix())
            .ok_or(none.into())
    }

    /// The same for a host of either kind, as it was asked for.
    ///
    /// # Errors
    /// [`Denied`].
    pub fn permits_target(&self, host: &str, port: u16) -> Result<Permitted<'_>, Denied> {
        let address = match (host.parse(), Host::parse(host)) {
            (Ok(address), _) | (_, Ok(Host::Address(address))) => address,
            _ => return self.permits(host, port).map(Permitted::Name),
        };
        self.permits_address(address, port).map(Permitted::Address)
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

    pub fn network_entries(&self) -> &[NetworkEntry] {
        match self {
            Self::None => &[],
            Self::Allowlist(list) => &list.networks,
        }
    }

    /// What the kernel program is to let through besides names: address, length of the prefix in bits, ports.
    pub fn networks(&self) -> impl Iterator<Item = (IpAddr, u8, &[u16])> {
        self.network_entries().iter().map(|entry| {
            let (address, prefix) = entry.network();
            (address, prefix, entry.ports())
        })
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
                let (kind, name) = (entry.pattern.kind(), entry.pattern.name());
                let methods = match entry.methods.as_slice() {
                    [] => String::new(),
                    methods => format!(r#""methods":["{}"],"#, methods.join("\",\"")),
                };
                let (ports, protocol) = (ports_text(&entry.ports), entry.protocol.canonical());
                format!(r#"{{"match":"{kind}",{methods}"name":"{name}","ports":[{ports}]{protocol}}}"#)
            })
            .chain(list.networks.iter().map(|entry| {
                let (network, ports, protocol) = (entry.network, ports_text(&entry.ports), entry.protocol.canonical());
                format!(r#"{{"match":"network","name":"{network}","ports":[{ports}]{protocol}}}"#)
            }))
            .collect();
        let mode = if list.audit { r#""mode":"unsafe_audit","# } else { "" };
        format!(r#"{{"entries":[{}],{mode}"profile":"proxy_allowlist"}}"#, entries.join(","))
    }

    /// The form that action details and policy input show: `"none"` or `{"proxy_allowlist": {"allowed_domains": […]}}`.
    pub fn to_public(&self) -> Value {
        let Self::Allowlist(list) = self else {
            return json!("none");
        };
        let mut names: Vec<String> = list.entries.iter().map(|entry| entry.pattern.to_string()).collect();
        names.extend(list.networks.iter().map(|entry| entry.network.to_string()));
        names.dedup();
        let mut public = json!({ "proxy_allowlist": { "allowed_domains": names } });
        if list.audit {
            public["proxy_allowlist"]["mode"] = json!("unsafe_audit");
        }
        public
    }
}

impl Entry {
    /// `ports` empty means [`DEFAULT_PORTS`].
    pub fn new(pattern: Pattern, ports: impl IntoIterator<Item = u16>) -> Self {
        Self { pattern, ports: default_ports(ports), protocol: EntryProtocol::Auto, methods: Vec::new() }
    }

    /// The same names and ports, for this protocol and these HTTP methods (in upper case); none means all.
    #[must_use]
    pub fn speaking(self, protocol: EntryProtocol, methods: impl IntoIterator<Item = String>) -> Self {
        let mut methods: Vec<String> = methods.into_iter().collect();
        methods.sort();
        methods.dedup();
        Self { protocol, methods, ..self }
    }

    pub fn pattern(&self) -> &Pattern {
        &self.pattern
    }

    pub fn ports(&self) -> &[u16] {
        &self.ports
    }

    pub const fn protocol(&self) -> EntryProtocol {
        self.protocol
    }

    /// The HTTP methods that may be used, in upper case; empty for all of them.
    pub fn methods(&self) -> &[String] {
        &self.methods
    }

    /// Whether a request of this method to an `https` (or else `http`) URL is what the entry is for.
    ///
    /// # Errors
    /// [`Denied`] for another protocol or method.
    pub fn permits_request(&self, method: &str, over_tls: bool) -> Result<(), Denied> {
        self.protocol.permits_request(over_tls)?;
        if self.methods.is_empty() || self.methods.iter().any(|allowed| allowed == method) {
            Ok(())
        } else {
            Err(DenyReason::MethodNotAllowed.into())
        }
    }

    /// Whether this entry's rule holds where the other would have another one.
    fn overrules(&self, other: &Self, port: u16) -> bool {
        self.pattern == other.pattern
            && (self.protocol, &self.methods) != (other.protocol, &other.methods)
            && self.ports.binary_search(&port).is_ok()
    }
}

impl EntryProtocol {
    /// Whether the proxy sees requests, so that their methods can be held to something.
    pub const fn shows_requests(self) -> bool {
        matches!(self, Self::Http | Self::Tls { terminate: true })
    }

    /// # Errors
    /// [`Denied`] when a request over TLS, or in the clear, is not what may be spoken.
    pub fn permits_request(self, over_tls: bool) -> Result<(), Denied> {
        match (self, over_tls) {
            (Self::Tls { .. }, false) | (Self::Http, true) => Err(DenyReason::ProtocolNotAllowed.into()),
            _ => Ok(()),
        }
    }

    /// The members of the canonical form; none for what entries had before there was a choice, so that their hashes stay.
    const fn canonical(self) -> &'static str {
        match self {
            Self::Auto => "",
            Self::Tls { terminate: false } => r#","protocol":"tls""#,
            Self::Tls { terminate: true } => r#","protocol":"tls","tls":"terminate""#,
            Self::Http => r#","protocol":"http""#,
            Self::Tcp => r#","protocol":"tcp""#,
        }
    }

    /// What a printed rule has after its ports.
    const fn suffix(self) -> &'static str {
        match self {
            Self::Auto => "",
            Self::Tls { terminate: false } => " tls",
            Self::Tls { terminate: true } => " tls terminate",
            Self::Http => " http",
            Self::Tcp => " tcp",
        }
    }
}

fn default_ports(ports: impl IntoIterator<Item = u16>) -> Vec<u16> {
    let mut ports: Vec<u16> = ports.into_iter().collect();
    if ports.is_empty() {
        ports.extend(DEFAULT_PORTS);
    }
    ports.sort_unstable();
    ports.dedup();
    ports
}

fn ports_text(ports: &[u16]) -> String {
    ports.iter().map(u16::to_string).collect::<Vec<_>>().join(",")
}

impl fmt::Display for Entry {
    /// The rule as an operator reads it, for example `*.example.com:80,443` or `=api.example.com:443 http GET,HEAD`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exact = if matches!(self.pattern, Pattern::Exact(_)) { "=" } else { "" };
        write!(f, "{exact}{}:{}{}", self.pattern, ports_text(&self.ports), self.protocol.suffix())?;
        match self.methods.as_slice() {
            [] => Ok(()),
            methods => write!(f, " {}", methods.join(",")),
        }
    }
}
