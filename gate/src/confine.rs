//! The agent held too: a command of the operator's, with its terminal, in a leaf of its own for as long as it lasts.
//!
//! The problem. A gate that holds what an agent *asks* for holds nothing of what the agent does by itself: it could open
//! its own connections and leave the gate aside. So the agent's own process can be started by the gate
//! (`latchgate confine`), in a leaf that reaches what a profile of the configuration names, carried and recorded as an
//! action's connections are, and the gate's socket.
//!
//! The operator's client and the gate talk over one connection of the operator socket ([`frame`]). The gate makes the pty,
//! so no descriptor of the client's comes into the sandbox, and none of the gate's but the terminal. The gate also makes a
//! socket for this session alone, which stands in the sandbox where the listener's socket stands outside: whoever calls on
//! it has the listener's principal, whatever uid the session has. A session has an intent and a receipt as an action has
//! ([`record`]); what passes over its terminal is in neither.

pub mod frame;
mod profile;
mod record;
mod session;

use std::path::PathBuf;

use serde::Deserialize;

pub use profile::{HeldProfile, NONE, ProfileError, Profiles};
pub use session::begin;

/// What stands before a profile's name where an action's id stands. No action's id has a colon.
pub const ACTION_PREFIX: &str = "confine:";
/// Sessions at one time; one more is refused.
pub const MAX_SESSIONS: usize = 64;
/// What a request for one may be, in bytes; most of it is the environment.
pub const MAX_REQUEST_BYTES: usize = 1 << 20;

/// What a client asks for.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    /// `none`, or one of the configuration.
    pub profile: String,
    /// Whose principal it has; the only Unix listener when absent.
    #[serde(default)]
    pub listener: Option<String>,
    pub argv: Vec<String>,
    pub directory: PathBuf,
    #[serde(default)]
    pub environment: Vec<(String, String)>,
    /// Whether the client's own input is a terminal.
    pub terminal: bool,
    #[serde(default)]
    pub rows: u16,
    #[serde(default)]
    pub columns: u16,
}
