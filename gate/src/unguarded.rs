//! The gate without the guards that `LATCHGATE_TEST_GUARDS_OFF` names. For tests; nothing that is shipped is built of it.

use std::process::ExitCode;

fn main() -> ExitCode {
    if let Some(code) = latchgate::sandbox::worker::run_if_asked() {
        return code;
    }
    if let Err(why) = latchgate::guards::take_from_environment() {
        eprintln!("latchgate-unguarded: {why}");
        return ExitCode::FAILURE;
    }
    latchgate::cli::main()
}
