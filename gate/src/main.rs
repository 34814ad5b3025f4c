//! Parses the command line and nothing else.

use std::process::ExitCode;

fn main() -> ExitCode {
    // Inside a sandbox this same binary is the first process and the HTTP worker: that is decided before anything else
    // starts, tokio above all.
    if let Some(code) = latchgate::sandbox::worker::run_if_asked() {
        return code;
    }
    latchgate::cli::main()
}
