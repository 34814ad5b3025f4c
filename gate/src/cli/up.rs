//! `latchgate up`: the embedded default, for the user who starts it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;

use super::{Failure, serve};
use crate::auth::operator_key::OperatorKeyFile;
use crate::config::{Config, Listener, OperatorKey};
use crate::files;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// A configuration file (TOML) for what should differ from the default.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let mut config = Config::load(arguments.config.as_deref(), std::env::vars()).map_err(Failure::new)?;
    serve::check_privileges()?;
    fill_in(&mut config);
    if config.operators.keys.is_empty() {
        files::private_directory(&config.state_dir).map_err(Failure::new)?;
        let file =
            OperatorKeyFile::load_or_create(&operator_key_path(&config.state_dir), "default").map_err(Failure::new)?;
        config.operators.keys.push(OperatorKey {
            name: file.name().to_owned(),
            dpop_jkt: file.jkt(),
            api_key_hash: file.api_key_hash(),
            made_in_this_run: file.made_now(),
        });
    }
    config.check().map_err(Failure::new)?;
    serve::start(config)
}

/// The places of the user who asks, where the configuration names none.
pub(super) fn fill_in(config: &mut Config) {
    let uid = rustix::process::geteuid().as_raw();
    if uid != 0 && config.state_dir == Config::default().state_dir {
        config.state_dir = user_state_dir(uid);
    }
    if config.listeners.is_empty() {
        config.listeners = default_listeners(uid);
    }
    if config.operators.socket.is_none() {
        config.operators.socket = Some(default_operator_socket(uid));
    }
}

/// Where `up` keeps the one operator key that it makes, and where the command line looks for it.
pub(super) fn operator_key_path(state_dir: &std::path::Path) -> PathBuf {
    state_dir.join("operator.json")
}

/// What is under `up` for a user: `$XDG_STATE_HOME`, the home directory's own place for state, or `/tmp`.
pub(super) fn user_state_dir(uid: u32) -> PathBuf {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_STATE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/state")))
        .map_or_else(|| runtime_directory(uid, "latchgate-state"), |base| base.join("latchgate"))
}

pub(super) fn default_operator_socket(uid: u32) -> PathBuf {
    if uid == 0 {
        PathBuf::from("/run/latchgate-operator/operator.sock")
    } else {
        runtime_directory(uid, "latchgate-operator").join("operator.sock")
    }
}

/// `$XDG_RUNTIME_DIR/NAME`, or `/tmp/NAME-UID`: the places where clients look.
fn runtime_directory(uid: u32, name: &str) -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_absolute()) {
        Some(base) => base.join(name),
        None => PathBuf::from(format!("/tmp/{name}-{uid}")),
    }
}

/// Each listener is the user who started the gate, and refuses every other uid.
fn default_listeners(uid: u32) -> Vec<Listener> {
    let principal = format!("uid-{uid}");
    let listener = |name: &str, path: PathBuf| Listener {
        name: name.to_owned(),
        path: Some(path),
        principal: Some(principal.clone()),
        peers: Some(BTreeMap::from([(uid.to_string(), principal.clone())])),
        ..Listener::default()
    };
    let mut listeners = vec![listener("agent", runtime_directory(uid, "latchgate").join("gate.sock"))];
    if uid == 0 {
        listeners.push(listener("agent-run", PathBuf::from("/run/latchgate/gate.sock")));
    }
    listeners
}
