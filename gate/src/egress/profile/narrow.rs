//! What policy leaves of a profile: `approved_egress` takes away, and never adds.

use std::fmt;

use serde_json::Value;

use super::entry::EntryOptions;
use super::network::Network;
use super::{Entry, NetworkEntry, Pattern, Profile};

/// The `approved_egress` of a policy decision: what a profile is narrowed to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Narrowing {
    Nothing,
    Only {
        limits: Vec<Limit>,
        /// Whether the mode of a profile in audit is left to it.
        audit: bool,
    },
}

/// One item of an `approved_egress`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limit {
    what: What,
    /// `None` leaves the ports of the profile's entry as they are: the plain form, which policy got as its input, does
    /// not carry them.
    ports: Option<Vec<u16>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum What {
    Names(Pattern),
    Addresses(Network),
}

impl Narrowing {
    /// Reads `"none"` or `{"proxy_allowlist": {"allowed_domains": […]}}`, whose items are names, networks (with their
    /// `/`), or `{domain | cidr, ports?, exact?}`.
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
        let audit = match list.get("mode").map(|mode| mode.as_str()) {
            None | Some(Some("enforce")) => false,
            Some(Some("unsafe_audit")) => true,
            Some(_) => return Err("approved_egress: mode is enforce or unsafe_audit".to_owned()),
        };
        let domains = match list.get("allowed_domains") {
            None | Some(Value::Null) => return Ok(Self::Only { limits: Vec::new(), audit }),
            Some(domains) => domains.as_array().ok_or("approved_egress: allowed_domains is not a list")?,
        };
        let limits = domains.iter().map(Limit::parse).collect::<Result<_, _>>()?;
        Ok(Self::Only { limits, audit })
    }
}

impl Limit {
    fn parse(value: &Value) -> Result<Self, String> {
        let wrong = |error: &dyn fmt::Display| format!("approved_egress: {error}");
        // A limit only takes away, so a wide one (`*.com`) is no danger here and public suffixes are not refused.
        let (what, ports) = match value.as_str() {
            Some(text) if text.contains('/') => (What::Addresses(Network::parse(text).map_err(|e| wrong(&e))?), None),
            Some(text) => (What::Names(Pattern::parse(text).map_err(|e| wrong(&e))?), None),
            None => {
                let options: EntryOptions = serde_json::from_value(value.clone()).map_err(|e| wrong(&e))?;
                match options.as_limit().map_err(|e| wrong(&e))? {
                    (Ok(pattern), ports) => (What::Names(pattern), ports),
                    (Err(network), ports) => (What::Addresses(network), ports),
                }
            }
        };
        Ok(Self { what, ports })
    }

    fn ports(&self, of_entry: &[u16]) -> Option<Vec<u16>> {
        let ports: Vec<u16> = match &self.ports {
            None => of_entry.to_vec(),
            Some(allowed) => of_entry.iter().copied().filter(|port| allowed.contains(port)).collect(),
        };
        (!ports.is_empty()).then_some(ports)
    }

    fn on_entry(&self, entry: &Entry) -> Option<Entry> {
        let What::Names(limit) = &self.what else { return None };
        let pattern = entry.pattern.intersect(limit)?;
        Some(Entry { pattern, ports: self.ports(&entry.ports)?, ..entry.clone() })
    }

    fn on_network(&self, entry: &NetworkEntry) -> Option<NetworkEntry> {
        let What::Addresses(limit) = &self.what else { return None };
        let network = entry.network.intersect(*limit)?;
        Some(NetworkEntry { network, ports: self.ports(&entry.ports)?, ..entry.clone() })
    }
}

impl Profile {
    /// What both this profile and `approved` permit.
    pub fn narrowed(&self, approved: &Narrowing) -> Self {
        let (Self::Allowlist(list), Narrowing::Only { limits, audit }) = (self, approved) else {
            return Self::None;
        };
        // The most particular entries first: where two of them are cut to the same names, theirs is the rule that held
        // before.
        let mut origins: Vec<&Entry> = list.entries.iter().collect();
        origins.sort_by_key(|entry| std::cmp::Reverse(entry.pattern.particularity()));
        let mut kept: Vec<Entry> = Vec::new();
        for cut in origins.iter().flat_map(|entry| limits.iter().filter_map(|limit| limit.on_entry(entry))) {
            let free = |port: &u16| !kept.iter().any(|other| other.overrules(&cut, *port));
            let ports: Vec<u16> = cut.ports.iter().copied().filter(free).collect();
            if !ports.is_empty() {
                kept.push(Entry { ports, ..cut });
            }
        }
        let mut origins: Vec<&NetworkEntry> = list.networks.iter().collect();
        origins.sort_by_key(|entry| std::cmp::Reverse(entry.network.prefix()));
        let mut networks: Vec<NetworkEntry> = Vec::new();
        for cut in origins.iter().flat_map(|entry| limits.iter().filter_map(|limit| limit.on_network(entry))) {
            let free = |port: &u16| !networks.iter().any(|other| other.overrules(&cut, *port));
            let ports: Vec<u16> = cut.ports.iter().copied().filter(free).collect();
            if !ports.is_empty() {
                networks.push(NetworkEntry { ports, ..cut });
            }
        }
        let left = Self::allowlist(kept).with_networks(networks);
        if list.audit && *audit { left.in_audit() } else { left }
    }
}
