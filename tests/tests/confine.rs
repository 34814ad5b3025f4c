//! `latchgate confine` with the real binary, on a real terminal: what a session has, what it does not reach, how it ends.

#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used)]

#[path = "confine/ends.rs"]
mod ends;
#[path = "confine/network.rs"]
mod network;
#[path = "confine/reach.rs"]
mod reach;
#[path = "confine/terminal.rs"]
mod terminal;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use latchgate_tests::gate::{Gate, Setup};
use latchgate_tests::operator::{heard, with_operator};

/// A gate with an operator, and a directory that every uid may write in.
fn gate(name: &str, config: &str) -> (Gate, PathBuf) {
    let setup = with_operator(Setup::new(name).config(config));
    let gate = setup.start();
    heard(&gate);
    let work = gate.directory().join("work");
    fs::create_dir(&work).unwrap();
    fs::set_permissions(&work, fs::Permissions::from_mode(0o777)).unwrap();
    fs::set_permissions(gate.directory(), fs::Permissions::from_mode(0o755)).unwrap();
    (gate, work.canonicalize().unwrap())
}
