//! `/v1/egress/…`: who contacted what, the profiles in force, and why something was refused.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use url::form_urlencoded;

use crate::confine;
use crate::egress::explain;
use crate::egress::flows::{Filter, KEPT};
use crate::egress::profile::Profile;
use crate::egress::suggest;
use crate::gate::Gate;
use crate::pipeline::Refusal;
use crate::time::Timestamp;

/// The longest that a reader may wait for something new, in seconds.
const MAX_WAIT_SECONDS: u64 = 25;
/// What comes while the first is handed out goes with it.
const GATHER: Duration = Duration::from_millis(100);
/// Records of the ledger that a suggestion is made from, the newest.
const MAX_SUGGESTED_FROM: u32 = 10_000;
/// Explanations of one answer.
const MAX_EXPLAINED: usize = 100;

/// What an id that is asked about may look like (API.md §1.8).
pub fn is_id(id: &str) -> bool {
    (8..=256).contains(&id.len())
        && id.starts_with(|c: char| c.is_ascii_alphanumeric())
        && id.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
}

/// The profiles of all actions.
pub fn profiles(gate: &Gate) -> Value {
    let profile = |manifest: &crate::action::manifest::Manifest| {
        json!({
            "action_id": manifest.action_id,
            "profile": manifest.profile.to_public(),
            "profile_hash": manifest.profile.hash(),
            "entries": entries(&manifest.profile),
            "allowed_methods": manifest.allowed_methods,
            "mode": if manifest.profile.is_audit() { "unsafe_audit" } else { "enforce" },
        })
    };
    let configured = gate.confined.all().filter(|(name, _)| *name != confine::NONE);
    let sessions = configured.map(|(name, held)| {
        json!({
            "action_id": format!("{}{name}", confine::ACTION_PREFIX),
            "profile": held.egress.to_public(),
            "profile_hash": held.egress.hash(),
            "entries": entries(&held.egress),
            "inbound_ports": held.config.inbound_ports,
        })
    });
    let actions = gate.registry.actions().map(|manifest| profile(manifest));
    json!({"profiles": actions.chain(sessions).collect::<Vec<_>>()})
}

/// The rules as an operator reads them.
fn entries(profile: &Profile) -> Vec<String> {
    let networks = profile.network_entries().iter().map(ToString::to_string);
    profile.entries().iter().map(ToString::to_string).chain(networks).collect()
}

/// What `GET /v1/egress/flows` asks for.
#[derive(Debug, PartialEq, Eq)]
struct Asked {
    filter: Filter,
    /// How long to wait when there is nothing yet.
    wait: Duration,
}

fn asked(query: &str) -> Result<Asked, String> {
    let (mut filter, mut wait) = (Filter::default(), Duration::ZERO);
    let mut seen: Vec<String> = Vec::new();
    for (key, value) in form_urlencoded::parse(query.as_bytes()) {
        let (key, value) = (key.into_owned(), value.into_owned());
        let number = || value.parse::<u64>().map_err(|_| format!("{key}: {value:?} is not a whole number"));
        match key.as_str() {
            "action" => filter.action = Some(value),
            "principal" => filter.principal = Some(value),
            "verdict" if ["allow", "deny", "would_deny"].contains(&value.as_str()) => filter.verdict = Some(value),
            "verdict" => return Err("verdict is allow, deny or would_deny".to_owned()),
            "since" => {
                let since = Timestamp::parse(&value);
                filter.since = Some(since.ok_or("since is a time as YYYY-MM-DDTHH:MM:SSZ, in UTC")?);
            }
            "after" => filter.after = Some(number()?),
            "limit" => filter.limit = Some(usize::try_from(number()?).unwrap_or(usize::MAX)),
            "wait" => wait = Duration::from_secs(number()?.min(MAX_WAIT_SECONDS)),
            other => {
                return Err(format!("{other:?} is not known; action, principal, verdict, since, limit, after, wait"));
            }
        }
        if seen.contains(&key) {
            return Err(format!("{key} is there twice"));
        }
        seen.push(key);
    }
    Ok(Asked { filter, wait })
}

/// Flows, the oldest first; with `wait`, once there is one or the time is over.
pub async fn flows(gate: &Gate, query: &str) -> Result<Value, Refusal> {
    let Asked { filter, wait } = asked(query).map_err(|message| Refusal::InvalidRequest { message })?;
    let mut page = gate.flows.page(&filter);
    if page.flows.is_empty() && !wait.is_zero() {
        page = gate.flows.next_page(&filter, tokio::time::sleep(wait)).await;
        if !page.flows.is_empty() {
            tokio::time::sleep(GATHER).await;
            page = gate.flows.page(&filter);
        }
    }
    Ok(json!({"flows": page.flows, "next": page.next, "lost": page.lost}))
}

/// Explains whatever the id stands for: a decision, an execution or a receipt, in the journal or in the ledger.
pub async fn explain(gate: &Arc<Gate>, id: &str) -> Result<Value, Refusal> {
    let noted = gate.flows.of(id);
    if !noted.is_empty() {
        return Ok(explained(gate, id, &noted, None));
    }
    let (ledger, wanted) = (Arc::clone(gate), id.to_owned());
    let found = tokio::task::spawn_blocking(move || ledger.ledger.mentions(&wanted))
        .await
        .map_err(|error| Refusal::Internal { message: error.to_string() })?
        .map_err(|error| Refusal::Store { message: error.to_string() })?;
    let flows: Vec<Value> = found.iter().flat_map(|record| explain::flows_of(record, id)).collect();
    let cause = found.iter().find_map(|record| record.pointer("/details/cause").and_then(Value::as_str));
    if flows.is_empty() && found.is_empty() {
        return Err(Refusal::NotFound);
    }
    let mut answer = explained(gate, id, &flows, cause);
    answer["receipt_id"] = found.iter().find_map(|record| record.get("receipt_id")).cloned().unwrap_or(Value::Null);
    Ok(answer)
}

/// What `GET /v1/egress/suggest/{action}` asks for.
#[derive(Debug, Default, PartialEq, Eq)]
struct Window {
    since: Option<Timestamp>,
    refused: bool,
}

fn window(query: &str) -> Result<Window, String> {
    let mut window = Window::default();
    for (key, value) in form_urlencoded::parse(query.as_bytes()) {
        match (key.as_ref(), value.as_ref()) {
            ("since", value) if window.since.is_none() => {
                let since = Timestamp::parse(value);
                window.since = Some(since.ok_or("since is a time as YYYY-MM-DDTHH:MM:SSZ, in UTC")?);
            }
            ("refused", "true" | "false") => window.refused = value == "true",
            (other, _) => return Err(format!("{other:?}: since, once, and refused (true or false)")),
        }
    }
    Ok(window)
}

/// The smallest profile that covers what an action was seen to contact: in the ledger, and by what runs now.
pub async fn suggest(gate: &Arc<Gate>, action_id: &str, query: &str) -> Result<Value, Refusal> {
    let Window { since, refused } = window(query).map_err(|message| Refusal::InvalidRequest { message })?;
    let action = gate.registry.action(action_id).ok_or(Refusal::NotFound)?;
    let (ledger, id) = (Arc::clone(gate), action_id.to_owned());
    let records = tokio::task::spawn_blocking(move || ledger.ledger.of_action(&id, MAX_SUGGESTED_FROM))
        .await
        .map_err(|error| Refusal::Internal { message: error.to_string() })?
        .map_err(|error| Refusal::Store { message: error.to_string() })?;
    let whole = records.len() < MAX_SUGGESTED_FROM as usize;
    let mut flows: Vec<Value> = Vec::new();
    for record in &records {
        let flow = record.pointer("/details/flow");
        let evidence = record.get("egress_evidence").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        // The first item is the summary.
        flows.extend(flow.into_iter().chain(evidence.iter().skip(1)).cloned());
    }
    let running: Vec<String> = gate.executions.list().into_iter().map(|execution| execution.id).collect();
    let noted = Filter { action: Some(action_id.to_owned()), limit: Some(KEPT), ..Filter::default() };
    flows.extend(gate.flows.page(&noted).flows.into_iter().filter(|flow| {
        let execution = flow.get("execution_id").and_then(Value::as_str);
        execution.is_some_and(|id| running.iter().any(|running| running == id))
    }));
    let mut counted = std::collections::BTreeSet::new();
    flows.retain(|flow| {
        let time = flow.get("time").and_then(Value::as_str).and_then(Timestamp::parse);
        since.is_none_or(|since| time.is_some_and(|time| time >= since))
            && flow.get("decision_id").and_then(Value::as_str).is_none_or(|id| counted.insert(id.to_owned()))
    });
    let times = || flows.iter().filter_map(|flow| flow.get("time").and_then(Value::as_str));
    let (first, last) = (times().min().map(str::to_owned), times().max().map(str::to_owned));
    let mut answer = suggest::suggest(action_id, &action.profile, &flows, refused).view();
    answer["window"] = json!({"since": since, "first": first, "last": last, "records": records.len(), "whole": whole});
    Ok(answer)
}

/// That of an action, or of a session.
fn profile_of<'a>(gate: &'a Gate, id: &str) -> Option<&'a Profile> {
    match id.strip_prefix(confine::ACTION_PREFIX) {
        Some(name) => gate.confined.named(name).map(|held| &held.egress),
        None => gate.registry.action(id).map(|action| action.profile.as_ref()),
    }
}

fn explained(gate: &Gate, id: &str, flows: &[Value], cause: Option<&str>) -> Value {
    let explanations: Vec<Value> = flows
        .iter()
        .take(MAX_EXPLAINED)
        .map(|flow| {
            let profile = flow.get("action_id").and_then(Value::as_str).and_then(|id| profile_of(gate, id));
            json!({"flow": flow, "explanation": explain::explain(flow, profile)})
        })
        .collect();
    json!({"id": id, "flows": flows.len(), "explained": explanations, "cause": cause})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_read_whole_or_refused() {
        let read =
            asked("action=web%5Fread&principal=a+b&verdict=deny&since=2026-01-02T03:04:05Z&limit=5&after=7&wait=99");
        let filter = Filter {
            action: Some("web_read".to_owned()),
            principal: Some("a b".to_owned()),
            verdict: Some("deny".to_owned()),
            since: Timestamp::parse("2026-01-02T03:04:05Z"),
            after: Some(7),
            limit: Some(5),
        };
        assert_eq!(read, Ok(Asked { filter, wait: Duration::from_secs(MAX_WAIT_SECONDS) }));
        assert_eq!(asked(""), Ok(Asked { filter: Filter::default(), wait: Duration::ZERO }));
        for wrong in
            ["verdict=denied", "since=yesterday", "limit=-1", "acton=x", "action=a&action=b", "after=", "wait=1s"]
        {
            assert!(asked(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_window_is_read_whole_or_refused() {
        let since = Timestamp::parse("2026-01-02T03:04:05Z");
        assert_eq!(window("since=2026-01-02T03:04:05Z&refused=true"), Ok(Window { since, refused: true }));
        for wrong in ["since=x", "refused=yes", "until=1", "since=2026-01-02T03:04:05Z&since=2026-01-02T03:04:05Z"] {
            assert!(window(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn ids_are_ids() {
        for id in ["0199a1b2-0000-7000-8000-000000000000", "abcdefgh"] {
            assert!(is_id(id), "{id}");
        }
        // A short one would be found all over the ledger.
        for id in ["", "a", "1234567", "-abcdefgh", "abc%2fdefgh", "abc/defgh", "abcdefg\\"] {
            assert!(!is_id(id), "{id}");
        }
    }
}
