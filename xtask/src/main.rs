//! Chores of the repository: `cargo xtask ebpf [--check]`, `cargo xtask seccomp [--check]`.

use std::process::ExitCode;

mod ebpf;
mod seccomp;

const USAGE: &str = "usage: cargo xtask ebpf|seccomp [--check]

  ebpf          build the kernel program from source and write the checked-in objects, the gate's and the one of the tests
                that take a guard away, with their lock files
  ebpf --check  build both in a clean directory; when compiler and linker are the recorded ones, the bytes must be the same
  seccomp       make deploy/seccomp/latchgate.json of the list beside it; with --check, say whether it is that";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["ebpf"] => ebpf::write(),
        ["ebpf", "--check"] => ebpf::check(),
        ["seccomp"] => seccomp::write(),
        ["seccomp", "--check"] => seccomp::check(),
        _ => Err(USAGE.to_owned()),
    };
    match result {
        Ok(said) => {
            println!("{said}");
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}
