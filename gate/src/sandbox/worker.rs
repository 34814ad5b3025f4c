//! What runs inside: the second image of this binary, and what it does before there is anything to fear.

use std::ffi::OsStr;
use std::process::ExitCode;

use super::protocol::INIT_NAME;

mod confine;

pub use confine::landlock_version;
pub mod http;
mod init;
pub(super) mod root;
mod seccomp;

/// The first call of `main`, before the runtime: runs a sandbox's first process if that is what this process was made
/// for, and says what to exit with. `None` in every other process.
pub fn run_if_asked() -> Option<ExitCode> {
    (std::env::args_os().next()?.as_os_str() == OsStr::new(INIT_NAME)).then(init::main)
}
