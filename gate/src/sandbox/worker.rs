//! What runs inside: the second image of this binary, and what it does before there is anything to fear.

use std::ffi::OsStr;
use std::process::ExitCode;

use super::attempts;
use super::protocol::INIT_NAME;

mod confine;

pub use confine::landlock_version;
pub mod http;
mod init;
pub(super) mod root;
mod seccomp;

/// The first call of `main`, before the runtime: runs a sandbox's first process if that is what this process was made
/// for, or its part of the self-test, and says what to exit with. `None` in every other process.
pub fn run_if_asked() -> Option<ExitCode> {
    let name = std::env::args_os().next()?;
    let is = |known: &str| name.as_os_str() == OsStr::new(known);
    if is(INIT_NAME) {
        Some(init::main())
    } else if is(attempts::CONTROL_NAME) {
        Some(attempts::control_main())
    } else {
        is(attempts::VICTIM_NAME).then(attempts::victim_main)
    }
}
