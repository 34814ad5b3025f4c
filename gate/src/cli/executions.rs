//! `latchgate executions`: what runs in a gate at this moment, and ending it.

use std::io::IsTerminal as _;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::client::OperatorArguments;
use super::{Failure, print};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// What runs: a table on a terminal, JSON lines in a pipe.
    #[command(after_help = "Example: latchgate executions list")]
    List(List),
    /// End one: its processes and connections at once. Its caller gets 502 with the reason `killed`, its receipt says who
    /// ended it.
    #[command(after_help = "Example: latchgate executions kill 0199a1b2-… --reason \"runs wild\"")]
    Kill(Kill),
}

#[derive(Debug, Args)]
pub(crate) struct List {
    #[command(flatten)]
    operator: OperatorArguments,
    /// JSON lines on a terminal too.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Kill {
    #[command(flatten)]
    operator: OperatorArguments,
    /// The execution, as `list` has it.
    #[arg(value_parser = super::egress::id)]
    id: String,
    /// Why; stands in the receipt and in the audit event.
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(command: &Command) -> Result<(), Failure> {
    match command {
        Command::List(list) => run_list(list),
        Command::Kill(kill) => run_kill(kill),
    }
}

fn run_list(arguments: &List) -> Result<(), Failure> {
    let answer = arguments.operator.get("/v1/executions")?;
    let table = std::io::stdout().is_terminal() && !arguments.json;
    let mut text = String::new();
    if table {
        text.push_str(&format!("{:<37} {:<8} {:>8} {:<25} {}\n", "ID", "PHASE", "SECONDS", "ACTION", "PRINCIPAL"));
    }
    for execution in answer.get("executions").and_then(Value::as_array).into_iter().flatten() {
        text.push_str(&if table { row(execution) } else { format!("{execution}\n") });
    }
    print(&text)
}

fn row(execution: &Value) -> String {
    let field = |name: &str| super::egress::plain(execution.get(name).and_then(Value::as_str).unwrap_or("-"));
    let seconds = execution.get("running_ms").and_then(Value::as_u64).unwrap_or(0) / 1000;
    format!(
        "{:<37} {:<8} {seconds:>8} {:<25} {}\n",
        field("id"),
        field("phase"),
        field("action_id"),
        field("principal")
    )
}

fn run_kill(arguments: &Kill) -> Result<(), Failure> {
    let body = arguments.reason.as_ref().map_or_else(|| json!({}), |reason| json!({"reason": reason}));
    let answer = arguments.operator.post(&format!("/v1/executions/{}/kill", arguments.id), &body)?;
    if arguments.json {
        return print(&format!("{answer}\n"));
    }
    let field = |name: &str| {
        let value = answer.pointer(&format!("/killed/{name}")).and_then(Value::as_str);
        super::egress::plain(value.unwrap_or_default())
    };
    if answer.pointer("/killed/gone") != Some(&Value::Bool(true)) {
        return Err(Failure::new(format!("{} is killed, and something of it is still there", field("id"))));
    }
    print(&format!("killed {} ({} of {})\n", field("id"), field("action_id"), field("principal")))
}
