//! `latchgate doctor`.

use std::io::IsTerminal as _;
use std::path::PathBuf;

use clap::Args;

use super::{Failure, print, up};
use crate::config::Config;
use crate::doctor::{self, Check, State};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The configuration file (TOML) of the gate that is to run here; that of `latchgate up` when not given.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Do not load the kernel program for a moment to see whether it attaches.
    #[arg(long)]
    no_attach: bool,
    /// JSON lines on a terminal too.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let mut config = Config::load(arguments.config.as_deref(), std::env::vars()).map_err(Failure::new)?;
    if arguments.config.is_none() {
        up::fill_in(&mut config);
    }
    let checks = doctor::examine(&config, !arguments.no_attach);
    let table = std::io::stdout().is_terminal() && !arguments.json;
    let mut text = String::new();
    for check in &checks {
        if table {
            text.push_str(&row(check));
        } else {
            let json = serde_json::to_string(check).map_err(Failure::new)?;
            text.push_str(&json);
            text.push('\n');
        }
    }
    print(&text)?;
    match checks.iter().filter(|check| check.state == State::Fault).count() {
        0 => Ok(()),
        faults => Err(Failure::new(format!("{faults} faults: a gate does not start here, or does not hold"))),
    }
}

fn row(check: &Check) -> String {
    let state = match check.state {
        State::Ok => "ok",
        State::Unknown => "unknown",
        State::Warning => "warning",
        State::Fault => "FAULT",
    };
    let todo = check.todo.as_ref().map(|todo| format!("{:<32}→ {todo}\n", "")).unwrap_or_default();
    format!("{state:<9}{:<23}{}\n{todo}", check.name, check.found)
}
