//! The smallest profile that covers what an action was seen to contact.
//!
//! Flows are read as records have them. What was let through counts, by an entry or by `egress.mode: unsafe_audit`; what
//! was refused does only where it is asked for, because an attack is refused too. An entry of the profile that has a rule of
//! its own (a protocol, TLS that is ended, methods) passes that rule on to the names that it covered.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use serde::Serialize;
use serde_json::{Value, json};

use super::profile::{DomainEntry, Entry, EntryProtocol, Name, Profile, Rule};

#[cfg(test)]
mod tests;

/// What was seen, as a profile.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Suggestion {
    pub action_id: String,
    /// Connections that count.
    pub flows: u64,
    pub items: Vec<Item>,
    /// Entries that nothing that was seen needs.
    pub unused: Vec<String>,
    /// What was seen and cannot be written as an entry.
    pub left_out: Vec<String>,
    /// The `egress` section that takes the place of the manifest's, in YAML.
    pub manifest: String,
}

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Item {
    /// In YAML.
    pub entry: String,
    /// Whether the profile that the action has permits it.
    pub permitted: bool,
    pub flows: u64,
}

/// Names and addresses, each with what was spoken at which port.
#[derive(Debug, Default)]
struct Seen {
    names: BTreeMap<Name, Ports>,
    addresses: BTreeMap<IpAddr, Ports>,
    left_out: BTreeSet<String>,
    flows: u64,
}

#[derive(Clone, Debug, Default)]
struct Spoken {
    protocols: BTreeSet<&'static str>,
    flows: u64,
}

type Ports = BTreeMap<u16, Spoken>;

/// What would have to stand in the manifest of an action of this profile. With `refused`, what was refused for its name,
/// address or port counts as well.
pub fn suggest(action_id: &str, profile: &Profile, flows: &[Value], refused: bool) -> Suggestion {
    let mut seen = Seen::default();
    flows.iter().for_each(|flow| seen.take(flow, refused));
    let mut rows: BTreeMap<(String, &'static str, Vec<String>), Row> = BTreeMap::new();
    for (name, ports) in &seen.names {
        for (&port, spoken) in ports {
            let entry = profile.permits(name.as_str(), port).ok();
            let (rule, methods) = rule_of(entry, spoken);
            let row = rows.entry((format!("domain: {name}, exact: true"), rule, methods)).or_default();
            row.add(port, spoken.flows, entry.is_some());
        }
    }
    for (address, ports) in &seen.addresses {
        for (&port, spoken) in ports {
            let entry = profile.permits_address(*address, port).ok();
            let rule = entry.map_or_else(|| spoken.rule(), |entry| written(entry.protocol()));
            let network = format!("cidr: \"{address}/{}\"", if address.is_ipv4() { 32 } else { 128 });
            rows.entry((network, rule, Vec::new())).or_default().add(port, spoken.flows, entry.is_some());
        }
    }
    let mut items: Vec<Item> = Vec::new();
    for ((what, rule, methods), row) in rows {
        let item = row.item(&what, rule, &methods);
        match compiles(&item.entry) {
            Ok(()) => items.push(item),
            Err(why) => {
                seen.left_out.insert(format!("{}: {why}", item.entry));
            }
        }
    }
    let unused = unused(profile, &seen);
    let mut suggestion = Suggestion {
        action_id: action_id.to_owned(),
        flows: seen.flows,
        items,
        unused,
        left_out: seen.left_out.into_iter().collect(),
        manifest: String::new(),
    };
    suggestion.manifest = suggestion.section();
    suggestion
}

/// The ports of one entry, and how often it was seen.
#[derive(Debug, Default)]
struct Row {
    ports: Vec<u16>,
    flows: u64,
    outside: bool,
}

impl Row {
    fn add(&mut self, port: u16, flows: u64, permitted: bool) {
        self.ports.push(port);
        self.flows += flows;
        self.outside |= !permitted;
    }

    fn item(&self, what: &str, rule: &str, methods: &[String]) -> Item {
        let ports: Vec<String> = self.ports.iter().map(u16::to_string).collect();
        let mut entry = format!("{{{what}, ports: [{}]{rule}", ports.join(", "));
        if !methods.is_empty() {
            let _ = write!(entry, ", methods: [{}]", methods.join(", "));
        }
        entry.push('}');
        Item { entry, permitted: !self.outside, flows: self.flows }
    }
}

/// The rule of the entry that permitted it; without one, what was spoken.
fn rule_of(entry: Option<&Entry>, spoken: &Spoken) -> (&'static str, Vec<String>) {
    match entry {
        Some(entry) if entry.protocol() != EntryProtocol::Auto => (written(entry.protocol()), entry.methods().to_vec()),
        _ => (spoken.rule(), Vec::new()),
    }
}

/// As the members of an entry.
const fn written(protocol: EntryProtocol) -> &'static str {
    match protocol {
        EntryProtocol::Auto => "",
        EntryProtocol::Tls { terminate: false } => ", protocol: tls",
        EntryProtocol::Tls { terminate: true } => ", tls: terminate",
        EntryProtocol::Http => ", protocol: http",
        EntryProtocol::Tcp => ", protocol: tcp",
    }
}

impl Spoken {
    fn rule(&self) -> &'static str {
        match self.protocols.iter().copied().collect::<Vec<_>>().as_slice() {
            ["tls"] => ", protocol: tls",
            ["http"] => ", protocol: http",
            // Both, or nothing that was understood.
            _ => "",
        }
    }
}

impl Seen {
    fn take(&mut self, flow: &Value, refused: bool) {
        let text = |name: &str| flow.get(name).and_then(Value::as_str);
        let counts = match text("verdict") {
            Some("allow" | "would_deny") => true,
            Some("deny") => refused && REFUSED.contains(&text("rule").unwrap_or_default()),
            _ => false,
        };
        // A question to the resolver is no connection; what it led to has a record of its own.
        if !counts || text("protocol") == Some("dns") {
            return;
        }
        let port = flow.get("port").and_then(Value::as_u64).and_then(|port| u16::try_from(port).ok());
        let (Some(host), Some(port)) = (text("name").or_else(|| text("address")), port.filter(|&port| port != 0))
        else {
            return;
        };
        let address: Option<IpAddr> = host.trim_start_matches('[').trim_end_matches(']').parse().ok();
        let ports = match (address, Name::parse(host)) {
            (Some(address), _) => self.addresses.entry(address).or_default(),
            (None, Ok(name)) => self.names.entry(name).or_default(),
            (None, Err(error)) => {
                self.left_out.insert(format!("{host:?}:{port}: {error}"));
                return;
            }
        };
        let connections = flow.get("connections").and_then(Value::as_u64).unwrap_or(1);
        let spoken = ports.entry(port).or_default();
        spoken.flows += connections;
        self.flows += connections;
        if let Some(protocol) = match text("protocol") {
            Some("tls" | "https") => Some("tls"),
            Some("http") => Some("http"),
            _ => None,
        } {
            spoken.protocols.insert(protocol);
        }
    }
}

/// Refusals that an entry would have prevented.
const REFUSED: [&str; 6] =
    ["name_not_allowed", "port_not_allowed", "address_not_allowed", "address_literal", "no_egress", "not_in_profile"];

/// Whether a manifest with this item would load.
fn compiles(entry: &str) -> Result<(), String> {
    let item: DomainEntry = serde_saphyr::from_str(entry).map_err(|error| error.to_string())?;
    match item.rule().map_err(|error| error.to_string())? {
        (Rule::Names(_) | Rule::Addresses(_), _) => Ok(()),
    }
}

fn unused(profile: &Profile, seen: &Seen) -> Vec<String> {
    let named = |entry: &&Entry| {
        !seen.names.iter().any(|(name, ports)| {
            ports.keys().any(|&port| profile.permits(name.as_str(), port).is_ok_and(|it| std::ptr::eq(it, *entry)))
        })
    };
    let around = |entry: &&super::profile::NetworkEntry| {
        !seen.addresses.iter().any(|(address, ports)| {
            ports.keys().any(|&port| profile.permits_address(*address, port).is_ok_and(|it| std::ptr::eq(it, *entry)))
        })
    };
    let names = profile.entries().iter().filter(named).map(ToString::to_string);
    names.chain(profile.network_entries().iter().filter(around).map(ToString::to_string)).collect()
}

impl Suggestion {
    fn section(&self) -> String {
        let mut text = String::from("egress:\n  profile: proxy_allowlist\n");
        if self.items.is_empty() {
            text = String::from("egress:\n  profile: none\n");
        } else {
            text.push_str("  allowed_domains:\n");
        }
        for item in &self.items {
            let remark = if item.permitted { "" } else { "  # new" };
            let _ = writeln!(text, "    - {}{remark}", item.entry);
        }
        for unused in &self.unused {
            let _ = writeln!(text, "  # nothing seen needs: {unused}");
        }
        for left in &self.left_out {
            let _ = writeln!(text, "  # seen, and no entry can say it: {}", left.replace('\n', " "));
        }
        text
    }

    /// As an answer.
    pub fn view(&self) -> Value {
        json!(self)
    }
}
