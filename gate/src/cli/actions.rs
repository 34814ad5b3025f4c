//! `latchgate actions`: what a gate would load, without one.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::Value;

use super::{Failure, print};
use crate::action::registry::{Registry, Source};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Every action.
    #[command(after_help = "Example: latchgate actions list")]
    List(List),
    /// One action, as agents see it.
    #[command(after_help = "Example: latchgate actions show http_fetch")]
    Show(Show),
    /// Load manifests and say what is wrong or odd, with file and line.
    #[command(after_help = "Example: latchgate actions lint --manifests ./manifests --strict")]
    Lint(Lint),
}

#[derive(Debug, Args)]
pub(crate) struct From {
    /// A directory of manifests; those that are built in when not given.
    #[arg(long, value_name = "DIRECTORY")]
    manifests: Option<PathBuf>,
}

impl From {
    fn load(&self) -> Result<Registry, Failure> {
        let source = self.manifests.clone().map_or(Source::Embedded, Source::Directory);
        Registry::load(&[source]).map_err(Failure::new)
    }
}

#[derive(Debug, Args)]
pub(crate) struct List {
    #[command(flatten)]
    from: From,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Show {
    #[command(flatten)]
    from: From,
    /// The action's id.
    action_id: String,
}

#[derive(Debug, Args)]
pub(crate) struct Lint {
    #[command(flatten)]
    from: From,
    /// What is odd is an error too.
    #[arg(long)]
    strict: bool,
}

pub(crate) fn run(command: &Command) -> Result<(), Failure> {
    match command {
        Command::List(list) => {
            let registry = list.from.load()?;
            let mut text = String::new();
            for action in registry.actions() {
                let item = action.list_item();
                if list.json {
                    text.push_str(&format!("{item}\n"));
                } else {
                    let risk = item.get("risk_level").and_then(Value::as_str).unwrap_or("-");
                    let reaches = match action.profile.to_public() {
                        Value::String(none) => none,
                        listed => listed
                            .pointer("/proxy_allowlist/allowed_domains")
                            .and_then(Value::as_array)
                            .map(|domains| domains.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" "))
                            .unwrap_or_default(),
                    };
                    text.push_str(&format!("{:<24}{:<10}{risk:<10}{reaches}\n", action.action_id, action.version));
                }
            }
            print(&text)
        }
        Command::Show(show) => {
            let registry = show.from.load()?;
            let action = registry
                .action(&show.action_id)
                .ok_or_else(|| Failure::new(format!("no action `{}`", show.action_id)))?;
            print(&format!("{:#}\n", action.detail()))
        }
        Command::Lint(lint) => {
            let registry = lint.from.load()?;
            for warning in registry.warnings() {
                print(&format!("{warning}\n"))?;
            }
            let count = registry.actions().count();
            if lint.strict {
                registry.strict().map_err(|_| Failure::new("there are warnings, and --strict was given"))?;
            }
            print(&format!("{count} actions load\n"))
        }
    }
}
