//! `latchgate status`.

use clap::Args;
use serde_json::Value;

use super::client::OperatorArguments;
use super::{Failure, print};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    operator: OperatorArguments,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let status = arguments.operator.get("/v1/admin/status")?;
    if arguments.json {
        return print(&format!("{status}\n"));
    }
    let mut text = String::new();
    for (name, value) in status.as_object().into_iter().flatten() {
        let shown = match value {
            Value::Null => continue,
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        text.push_str(&format!("{name:<16}{shown}\n"));
    }
    print(&text)
}
