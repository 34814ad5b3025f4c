//! `latchgate egress selftest`.

use std::io::IsTerminal as _;

use clap::Args;
use serde_json::{Value, json};

use super::client::OperatorArguments;
use super::egress::plain;
use super::{Failure, print};

const PATH: &str = "/v1/egress/selftest";

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    operator: OperatorArguments,
    /// Show the result that stands, and try nothing.
    #[arg(long)]
    last: bool,
    /// JSON on a terminal too.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let result =
        if arguments.last { arguments.operator.get(PATH)? } else { arguments.operator.post(PATH, &json!({}))? };
    if std::io::stdout().is_terminal() && !arguments.json {
        print(&table(&result))?;
    } else {
        print(&format!("{result}\n"))?;
    }
    match text(&result, "outcome") {
        "passed" => Ok(()),
        outcome => Err(Failure::new(format!("the self-test: {outcome}: the gate is not ready"))),
    }
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value.get(name).and_then(Value::as_str).unwrap_or_default()
}

fn table(result: &Value) -> String {
    let findings = result.get("findings").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let row = |cells: [&str; 7]| {
        let [technique, profile, outcome, by, at, error, note] = cells.map(plain);
        format!("{technique:<22}{profile:<17}{outcome:<16}{by:<11}{at:<13}{error:<14}{note}\n")
    };
    let mut out = row(["TECHNIQUE", "PROFILE", "OUTCOME", "BY", "AT", "ERROR", "RECORD OR REASON"]);
    for finding in findings {
        let of = |name: &str| match text(finding, name) {
            "" => "-",
            there => there,
        };
        let note = if of("reason") == "-" { of("record") } else { of("reason") };
        out.push_str(&row([of("technique"), of("profile"), of("outcome"), of("by"), of("at"), of("error"), note]));
    }
    let count = |name: &str| result.get(name).and_then(Value::as_u64).unwrap_or(0);
    let reason = text(result, "reason");
    out.push_str(&format!(
        "\n{}{}{}: {} refused, {} escaped, {} inconclusive, {} not applicable; {} ms\n",
        plain(text(result, "outcome")),
        if reason.is_empty() { "" } else { ": " },
        plain(reason),
        count("refused"),
        count("escaped"),
        count("inconclusive"),
        count("not_applicable"),
        count("took_ms")
    ));
    out
}
