//! `latchgate egress`: who contacted what, the profiles in force, and why something was refused.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use serde_json::Value;
use url::form_urlencoded::Serializer;

use super::client::OperatorArguments;
use super::{Failure, print};
use crate::time::Timestamp;

/// How long the gate may wait for a flow before it answers that there is none.
const WAIT_SECONDS: u64 = 20;
/// The shortest time between two questions: each is a record in the ledger.
const PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// What actions contacted or tried to: a table on a terminal, JSON lines in a pipe.
    #[command(after_help = "Examples:\n  latchgate egress flows --verdict deny --since 15m\n  \
        latchgate egress flows --follow | jq .name")]
    Flows(Flows),
    /// What each action may reach.
    #[command(after_help = "Example: latchgate egress profiles")]
    Profiles(Profiles),
    /// Why something was refused, and the smallest change that would allow it.
    #[command(after_help = "Example: latchgate egress explain 0199a1b2-…\n\nThe id is the `decision_id` of a refusal \
        (403 body, proxy answer, DNS text, flow), or that of a receipt or an execution.")]
    Explain(Explain),
    /// Try every way out of a sandbox of the running gate: a table on a terminal, JSON in a pipe.
    #[command(after_help = "Example: latchgate egress selftest\n\nExit code 0 only when nothing gets out and \
        nothing is inconclusive. The result is signed into the ledger; until it is good, the gate is not ready.")]
    Selftest(super::selftest::Arguments),
    /// The smallest `egress` section that covers what an action was seen to contact, as a patch of its manifest.
    #[command(
        after_help = "Example: latchgate egress suggest web_read --since 7d > egress.yaml\n\nWhat was seen is in the \
        ledger (the newest 10,000 records of the action) and what runs now contacts. It was let through: by the profile, or \
        by egress.mode unsafe_audit. Read what is new before you take it over."
    )]
    Suggest(Suggest),
}

#[derive(Debug, Args)]
pub(crate) struct Flows {
    #[command(flatten)]
    operator: OperatorArguments,
    /// Go on with what comes, until the gate goes away.
    #[arg(long, short)]
    follow: bool,
    /// Only this action.
    #[arg(long, value_name = "ACTION")]
    action: Option<String>,
    /// Only this principal.
    #[arg(long, value_name = "PRINCIPAL")]
    principal: Option<String>,
    /// Only this verdict.
    #[arg(long, value_parser = ["allow", "deny", "would_deny"])]
    verdict: Option<String>,
    /// Only flows that began since: 90s, 15m, 2h, 1d ago, or a time as 2026-01-02T03:04:05Z.
    #[arg(long, value_name = "WHEN", value_parser = since)]
    since: Option<Timestamp>,
    /// At most so many, the newest.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// JSON lines on a terminal too.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Profiles {
    #[command(flatten)]
    operator: OperatorArguments,
    /// JSON lines on a terminal too.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Explain {
    #[command(flatten)]
    operator: OperatorArguments,
    /// A decision id, or the id of a receipt or an execution.
    #[arg(value_parser = id)]
    id: String,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Suggest {
    #[command(flatten)]
    operator: OperatorArguments,
    /// The action.
    #[arg(value_parser = action)]
    action: String,
    /// Only what was contacted since: 90s, 15m, 2h, 1d ago, or a time as 2026-01-02T03:04:05Z.
    #[arg(long, value_name = "WHEN", value_parser = since)]
    since: Option<Timestamp>,
    /// Count what was refused for its name, address or port as well.
    #[arg(long)]
    refused: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

fn action(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    match !text.is_empty() && text.chars().all(fits) {
        true => Ok(text.to_owned()),
        false => Err("an action's id is of A-Z a-z 0-9 . _ -".to_owned()),
    }
}

/// What can stand in a path as it is.
pub(super) fn id(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    match text.len() >= 8 && text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.chars().all(fits) {
        true => Ok(text.to_owned()),
        false => Err("an id is at least 8 of A-Z a-z 0-9 . _ -".to_owned()),
    }
}

fn since(text: &str) -> Result<Timestamp, String> {
    if let Some(time) = Timestamp::parse(text) {
        return Ok(time);
    }
    let units = [('s', 1_000_i64), ('m', 60_000), ('h', 3_600_000), ('d', 86_400_000)];
    units
        .iter()
        .find_map(|(unit, millis)| text.strip_suffix(*unit)?.parse::<u32>().ok().map(|count| i64::from(count) * millis))
        .map(|ago| Timestamp::now().plus_millis(-ago))
        .ok_or_else(|| "write 90s, 15m, 2h, 1d, or 2026-01-02T03:04:05Z".to_owned())
}

pub(crate) fn run(command: &Command) -> Result<(), Failure> {
    match command {
        Command::Flows(flows) => run_flows(flows),
        Command::Profiles(profiles) => run_profiles(profiles),
        Command::Explain(explain) => run_explain(explain),
        Command::Selftest(arguments) => super::selftest::run(arguments),
        Command::Suggest(suggest) => run_suggest(suggest),
    }
}

#[expect(clippy::disallowed_methods, reason = "the pause between two questions is on the caller's clock")]
fn run_flows(arguments: &Flows) -> Result<(), Failure> {
    let table = std::io::stdout().is_terminal() && !arguments.json;
    let mut next = None;
    let mut headed = false;
    let mut lost_before = 0;
    loop {
        let asked = Instant::now();
        let answer = arguments.operator.get(&arguments.path(next))?;
        let empty = Vec::new();
        let flows = answer.get("flows").and_then(Value::as_array).unwrap_or(&empty);
        let mut text = String::new();
        if table && !headed {
            text.push_str(&head());
            headed = true;
        }
        for flow in flows {
            text.push_str(&if table { row(flow) } else { format!("{flow}\n") });
        }
        if !emit(&text)? {
            return Ok(());
        }
        let lost = answer.get("lost").and_then(Value::as_u64).unwrap_or(0);
        if lost > lost_before {
            eprintln!("latchgate: {} flows are not shown; the receipts have them", lost - lost_before);
            lost_before = lost;
        }
        if !arguments.follow {
            return Ok(());
        }
        next = answer.get("next").and_then(Value::as_u64).or(next);
        std::thread::sleep(PAUSE.saturating_sub(asked.elapsed()));
    }
}

impl Flows {
    fn path(&self, after: Option<u64>) -> String {
        let mut query = Serializer::new(String::new());
        let texts = [("action", &self.action), ("principal", &self.principal), ("verdict", &self.verdict)];
        for (name, value) in texts {
            if let Some(value) = value {
                query.append_pair(name, value);
            }
        }
        if let Some(since) = self.since {
            query.append_pair("since", &since.to_string());
        }
        match after {
            // A limit is for what was before.
            Some(after) => {
                query.append_pair("after", &after.to_string()).append_pair("wait", &WAIT_SECONDS.to_string());
                query.append_pair("limit", "1000");
            }
            None => {
                if let Some(limit) = self.limit {
                    query.append_pair("limit", &limit.to_string());
                }
            }
        }
        format!("/v1/egress/flows?{}", query.finish())
    }
}

/// False when nobody reads any more.
fn emit(text: &str) -> Result<bool, Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Failure::new(error)),
    }
}

fn head() -> String {
    format!(
        "{:<25}{:<8}{:<10}{:<18}{:<14}{:<34}{:<9}{:<24}{:>9}{:>10}  {:<14}{}\n",
        "TIME", "VERDICT", "BY", "ACTION", "PRINCIPAL", "TO", "PROTOCOL", "RULE", "OUT", "IN", "KERNEL", "DECISION"
    )
}

fn row(flow: &Value) -> String {
    let text = |name: &str| flow.get(name).and_then(Value::as_str).map_or_else(|| "-".to_owned(), plain);
    let bytes = |name: &str| flow.get(name).and_then(Value::as_u64).unwrap_or(0);
    let host = match (text("name"), text("address")) {
        (name, address) if name == "-" => address,
        (name, _) => name,
    };
    let to = match flow.get("port").and_then(Value::as_u64) {
        Some(port) if port > 0 && host.contains(':') && !host.starts_with('[') => format!("[{host}]:{port}"),
        Some(port) if port > 0 => format!("{host}:{port}"),
        _ => host,
    };
    let rule = match text("error") {
        none if none == "-" => text("rule"),
        error => error,
    };
    format!(
        "{:<24} {:<7} {:<9} {:<17} {:<13} {:<33} {:<8} {:<23} {:>9} {:>9}  {:<13} {}\n",
        text("time"),
        text("verdict"),
        text("decided_by"),
        text("action_id"),
        text("principal"),
        to,
        text("protocol"),
        rule,
        bytes("bytes_from_sandbox"),
        bytes("bytes_to_sandbox"),
        text("agreement"),
        text("decision_id")
    )
}

/// What a terminal may be sent: names come from whoever asked for them.
pub(super) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

fn run_profiles(arguments: &Profiles) -> Result<(), Failure> {
    let answer = arguments.operator.get("/v1/egress/profiles")?;
    let table = std::io::stdout().is_terminal() && !arguments.json;
    let mut text = if table { format!("{:<26}{:<24}{}\n", "ACTION", "HASH", "REACHES") } else { String::new() };
    for profile in answer.get("profiles").and_then(Value::as_array).into_iter().flatten() {
        text.push_str(&if table { profile_row(profile) } else { format!("{profile}\n") });
    }
    print(&text)
}

fn profile_row(profile: &Value) -> String {
    let field = |name: &str| profile.get(name).and_then(Value::as_str).unwrap_or("-");
    let entries = profile.get("entries").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let entries: Vec<&str> = entries.iter().filter_map(Value::as_str).collect();
    let reaches = match (profile.get("profile").and_then(Value::as_str), entries.as_slice()) {
        (Some(none), _) => none.to_owned(),
        (None, []) => "nothing: its allowlist is empty".to_owned(),
        (None, entries) => entries.join("  "),
    };
    // Enough of a hash to tell two apart by eye; JSON has the whole.
    let hash: String = field("profile_hash").chars().take(22).collect();
    format!("{:<25} {hash:<23} {reaches}\n", field("action_id"))
}

fn run_explain(arguments: &Explain) -> Result<(), Failure> {
    let answer = arguments.operator.get(&format!("/v1/egress/explain/{}", arguments.id))?;
    if arguments.json {
        return print(&format!("{answer}\n"));
    }
    print(&explanation(&answer))
}

fn run_suggest(arguments: &Suggest) -> Result<(), Failure> {
    let mut query = Serializer::new(String::new());
    query.append_pair("refused", if arguments.refused { "true" } else { "false" });
    if let Some(since) = arguments.since {
        query.append_pair("since", &since.to_string());
    }
    let path = format!("/v1/egress/suggest/{}?{}", arguments.action, query.finish());
    let answer = arguments.operator.get(&path)?;
    if arguments.json {
        return print(&format!("{answer}\n"));
    }
    print(&suggestion(&answer))
}

fn suggestion(answer: &Value) -> String {
    let text = |path: &str| answer.pointer(path).and_then(Value::as_str).map(plain_lines).unwrap_or_default();
    let number = |path: &str| answer.pointer(path).and_then(Value::as_u64).unwrap_or(0);
    let seen = match number("/flows") {
        0 => "nothing that was let through was seen".to_owned(),
        flows => format!("{flows} connections from {} to {}", text("/window/first"), text("/window/last")),
    };
    let cut = match answer.pointer("/window/whole") {
        Some(Value::Bool(true)) => "",
        _ => ", the newest of them only",
    };
    let records = number("/window/records");
    format!("# {}: {seen}; out of {records} records{cut}\n{}\n", text("/action_id"), text("/manifest"))
}

fn explanation(answer: &Value) -> String {
    let mut text = String::new();
    let explained = answer.get("explained").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    for (index, one) in explained.iter().enumerate() {
        if index > 0 {
            text.push('\n');
        }
        let part = |path: &str| one.pointer(path).and_then(Value::as_str).map(plain_lines);
        let mut line = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                text.push_str(&format!("{name:<10}{}\n", value.replace('\n', "\n          ")));
            }
        };
        line("asked", part("/explanation/asked"));
        let whose = [part("/flow/action_id"), part("/flow/principal"), part("/flow/time")];
        line("by", Some(whose.into_iter().flatten().collect::<Vec<_>>().join(", ")).filter(|whose| !whose.is_empty()));
        let rule = part("/explanation/rule").unwrap_or_default();
        let by = part("/explanation/decided_by").unwrap_or_default();
        line(&part("/explanation/outcome").unwrap_or_default(), Some(format!("by the {by}: {rule}")));
        line("because", part("/explanation/because"));
        line("kernel", one.get("flow").and_then(witnesses));
        line("change", part("/explanation/change/what"));
        line("manifest", part("/explanation/change/manifest"));
        line("or config", part("/explanation/change/configuration"));
        line("decision", part("/flow/decision_id"));
    }
    let flows = answer.get("flows").and_then(Value::as_u64).unwrap_or(0);
    if flows > explained.len() as u64 {
        text.push_str(&format!("\n… and {} more\n", flows - explained.len() as u64));
    }
    if explained.is_empty() {
        match answer.get("cause").and_then(Value::as_str) {
            Some(cause) => text.push_str(&format!("refused, but not for what it would contact: {}\n", plain(cause))),
            None => text.push_str("nothing was contacted, and nothing was refused, under this id\n"),
        }
    }
    if let Some(receipt) = answer.get("receipt_id").and_then(Value::as_str) {
        text.push_str(&format!("\nreceipt   {}\n", plain(receipt)));
    }
    text
}

/// What kernel and proxy counted of a connection; nothing of what was not compared.
fn witnesses(flow: &Value) -> Option<String> {
    let agreement = plain(flow.get("agreement")?.as_str()?).replace('_', " ");
    let number = |path: &str| flow.pointer(path).and_then(Value::as_u64);
    let proxy = [number("/bytes_from_sandbox"), number("/bytes_to_sandbox")].map(Option::unwrap_or_default);
    Some(match (number("/kernel/bytes_sent"), number("/kernel/bytes_received")) {
        (Some(sent), Some(received)) => format!(
            "{agreement}: the kernel counted {sent} bytes out and {received} in, the proxy {} and {}",
            proxy[0], proxy[1]
        ),
        _ => format!(
            "{agreement}: the kernel has no figures, the proxy counted {} bytes out and {} in",
            proxy[0], proxy[1]
        ),
    })
}

fn plain_lines(text: &str) -> String {
    text.lines().map(plain).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn times_are_ago_or_exact() {
        let ago = |text: &str| {
            let then = since(text).unwrap();
            Timestamp::now().millis() - then.millis()
        };
        for (text, millis) in [("90s", 90_000), ("15m", 900_000), ("2h", 7_200_000), ("1d", 86_400_000)] {
            assert!((millis..millis + 5_000).contains(&ago(text)), "{text}");
        }
        assert_eq!(since("2026-01-02T03:04:05Z").unwrap().to_seconds_string(), "2026-01-02T03:04:05Z");
        for wrong in ["", "m", "-5m", "5", "5w", "yesterday", "1.5h"] {
            assert!(since(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_a_client_named_cannot_write_to_the_terminal() {
        let row = row(&json!({"name": "a\u{1b}[31m\nb", "port": 53, "decided_by": "resolver", "verdict": "deny"}));
        assert!(!row.trim_end().contains(['\u{1b}', '\n']), "{row:?}");
        assert!(row.contains("resolver"));
    }

    #[test]
    fn an_address_and_its_port_can_be_told_apart() {
        assert!(row(&json!({"address": "2001:db8::1", "port": 443})).contains(" [2001:db8::1]:443 "));
        assert!(row(&json!({"name": "a.example", "address": "192.0.2.1", "port": 443})).contains(" a.example:443 "));
        assert!(row(&json!({"hook": "sock_create", "port": 0})).contains(" - "));
    }

    #[test]
    fn a_disagreement_is_shown_with_both_figures() {
        let flow = json!({"name": "a.example", "agreement": "disagree", "bytes_from_sandbox": 5, "bytes_to_sandbox": 90,
            "kernel": {"bytes_sent": 5, "bytes_received": 70, "closed": true}});
        assert!(row(&flow).contains(" disagree "), "{}", row(&flow));
        let text = explanation(&json!({"flows": 1, "explained": [{"flow": flow, "explanation": {}}]}));
        let line = "kernel    disagree: the kernel counted 5 bytes out and 70 in, the proxy 5 and 90";
        assert!(text.contains(line), "{text}");
        assert_eq!(witnesses(&json!({"agreement": null, "bytes_to_sandbox": 3})), None);
        let unknown = witnesses(&json!({"agreement": "unknown", "kernel": null})).unwrap();
        assert!(unknown.contains("the kernel has no figures"), "{unknown}");
    }

    #[test]
    fn an_explanation_is_read_from_top_to_bottom() {
        let answer = json!({
            "flows": 2, "receipt_id": "r-1", "explained": [{
                "flow": {"action_id": "web_read", "principal": "p", "time": "t", "decision_id": "d-1"},
                "explanation": {
                    "asked": "https to evil.test:443", "outcome": "refused", "decided_by": "proxy",
                    "rule": "name_not_allowed", "because": "no entry",
                    "change": {"what": "Add it", "manifest": "- x", "configuration": "[a]\nb = 1"}
                }
            }]
        });
        let text = explanation(&answer);
        for line in [
            "asked     https to evil.test:443",
            "by        web_read, p, t",
            "refused   by the proxy: name_not_allowed",
            "or config [a]\n          b = 1",
            "… and 1 more",
            "receipt   r-1",
        ] {
            assert!(text.contains(line), "{line:?} is not in\n{text}");
        }
        let other = explanation(&json!({"flows": 0, "explained": [], "cause": "policy denied: no"}));
        assert!(other.contains("not for what it would contact: policy denied: no"), "{other}");
    }
}
