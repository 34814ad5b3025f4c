//! The `latchgate` binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    if let Some(code) = latchgate::sandbox::worker::run_if_asked() {
        return code;
    }
    ExitCode::FAILURE
}
