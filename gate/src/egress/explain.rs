//! What a refusal was about: what was asked, which rule refused, and the smallest change that would allow it.
//!
//! A flow is read as records have it, so that one of a receipt of last year is explained like one of this minute, by the
//! profile that its action has *now*.

use std::net::IpAddr;

use serde::Serialize;
use serde_json::Value;

use super::profile::Profile;

mod rules;
#[cfg(test)]
mod tests;

/// One flow, explained.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// What was asked for, in words.
    pub asked: String,
    /// `refused`, `let through, and would be refused`, `allowed`, or `allowed, and failed`.
    pub outcome: &'static str,
    /// `hook`, `resolver`, `proxy` or `gate`.
    pub decided_by: String,
    /// As the record has it.
    pub rule: String,
    /// What the rule means here.
    pub because: String,
    /// Absent where nothing was refused.
    pub change: Option<Change>,
}

/// The smallest change that would have allowed it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Change {
    /// What to do, or why no change of manifest and configuration would allow it.
    pub what: String,
    /// An item for the manifest's `egress.allowed_domains`, in YAML.
    pub manifest: Option<String>,
    /// The same for the gate's configuration, in TOML.
    pub configuration: Option<String>,
}

impl Change {
    fn none(what: impl Into<String>) -> Self {
        Self { what: what.into(), ..Self::default() }
    }
}

/// What a record says, as far as an explanation needs it.
#[derive(Debug)]
struct Flow<'a> {
    record: &'a Value,
    /// The action's profile now; `None` for what is no action's, or of an action that is gone.
    profile: Option<&'a Profile>,
}

/// Explains a flow by the profile of its action.
pub fn explain(record: &Value, profile: Option<&Profile>) -> Explanation {
    let flow = Flow { record, profile };
    let denied = flow.text("verdict") != Some("allow");
    let (because, change) = match (denied, flow.text("error")) {
        (true, _) => {
            let (because, change) = rules::refused(&flow);
            (because, Some(change))
        }
        (false, Some(error)) => (rules::failed(error), None),
        (false, None) => ("the profile of its action permits it".to_owned(), None),
    };
    Explanation {
        asked: flow.asked(),
        outcome: match (denied, flow.text("error")) {
            (true, _) if flow.text("verdict") == Some("would_deny") => "let through, and would be refused",
            (true, _) => "refused",
            (false, Some(_)) => "allowed, and failed",
            (false, None) => "allowed",
        },
        decided_by: flow.text("decided_by").unwrap_or("proxy").to_owned(),
        rule: flow.rule().to_owned(),
        because,
        change,
    }
}

/// The flows of a ledger record that `id` stands for: the one of that decision; or, for the id of the call itself, what
/// was refused in it, or everything when nothing was.
pub fn flows_of(record: &Value, id: &str) -> Vec<Value> {
    if let Some(flow) = record.pointer("/details/flow") {
        return vec![flow.clone()];
    }
    // The first item is the summary.
    let items = record.get("egress_evidence").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let flows: Vec<Value> = items.iter().skip(1).map(|flow| whole(record, flow)).collect();
    let is = |flow: &Value, name: &str, value: &str| flow.get(name).and_then(Value::as_str) == Some(value);
    if flows.iter().any(|flow| is(flow, "decision_id", id)) {
        return flows.into_iter().filter(|flow| is(flow, "decision_id", id)).collect();
    }
    if !["receipt_id", "grant_id", "decision_id", "trace_id"].iter().any(|name| is(record, name, id)) {
        return Vec::new();
    }
    let refused = |flow: &&Value| is(flow, "verdict", "deny") || is(flow, "verdict", "would_deny");
    let denied: Vec<Value> = flows.iter().filter(refused).cloned().collect();
    if denied.is_empty() { flows } else { denied }
}

/// A receipt's flow with what it leaves to its receipt.
fn whole(record: &Value, flow: &Value) -> Value {
    let mut flow = flow.clone();
    for name in ["action_id", "principal", "workspace"] {
        if flow.get(name).is_none_or(Value::is_null)
            && let (Some(fields), Some(value)) = (flow.as_object_mut(), record.get(name))
        {
            fields.insert(name.to_owned(), value.clone());
        }
    }
    flow
}

impl<'a> Flow<'a> {
    fn text(&self, name: &str) -> Option<&'a str> {
        self.record.get(name).and_then(Value::as_str)
    }

    fn rule(&self) -> &'a str {
        self.text("rule").or_else(|| self.text("reason")).unwrap_or_default()
    }

    fn action(&self) -> &'a str {
        self.text("action_id").unwrap_or("(no action)")
    }

    /// Of what was to be contacted: the port of a DNS server is not that.
    fn port(&self) -> Option<u16> {
        if self.text("protocol") == Some("dns") {
            return None;
        }
        self.record.get("port").and_then(Value::as_u64).and_then(|port| u16::try_from(port).ok()).filter(|&it| it != 0)
    }

    /// The host that was asked for, as it is recorded.
    fn host(&self) -> Option<&'a str> {
        self.text("name").or_else(|| self.text("address"))
    }

    /// The same when it is an address.
    fn address(&self) -> Option<IpAddr> {
        self.host()?.trim_start_matches('[').trim_end_matches(']').parse().ok()
    }

    fn target(&self) -> String {
        match (self.host(), self.port()) {
            (Some(host), Some(port)) if host.contains(':') && !host.starts_with('[') => format!("[{host}]:{port}"),
            (Some(host), Some(port)) => format!("{host}:{port}"),
            (Some(host), None) => host.to_owned(),
            (None, Some(port)) => format!("port {port}"),
            (None, None) => "something that was not said".to_owned(),
        }
    }

    fn asked(&self) -> String {
        let how = match (self.text("decided_by"), self.text("protocol")) {
            (Some("gate"), protocol) => {
                let method = self.text("method").unwrap_or("a request");
                format!("{method} over {} of", protocol.unwrap_or("HTTP"))
            }
            (Some("hook"), Some(protocol)) => match self.text("hook") {
                Some("sock_create") => return format!("a socket of protocol {protocol}"),
                Some("ingress") => return format!("a packet ({protocol}) that came from {}", self.target()),
                Some(hook) => format!("{protocol} ({hook}) to"),
                None => format!("{protocol} to"),
            },
            (_, Some("connect")) => "a tunnel (CONNECT) to".to_owned(),
            (_, Some("dns")) => "the addresses of".to_owned(),
            (_, Some(protocol)) => format!("{protocol} to"),
            (_, None) => "a connection to".to_owned(),
        };
        format!("{how} {}", self.target())
    }
}
