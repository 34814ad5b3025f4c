//! The command line: one file a command.

mod actions;
mod client;
mod confine;
mod doctor;
mod egress;
mod executions;
mod receipts;
mod selftest;
mod serve;
mod status;
mod up;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Holds an AI agent's calls to what was decided: policy before, the kernel during, a signed receipt after.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, after_help = EXIT_CODES)]
struct Cli {
    /// Log lines as JSON instead of text.
    #[arg(long, global = true)]
    log_json: bool,
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 done; 1 refused or failed, the reason is on standard error; 2 the command line is wrong; \
3 a ledger does not verify.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the gate that a configuration file describes.
    #[command(after_help = "Example: latchgate serve --config /etc/latchgate/latchgate.toml")]
    Serve(serve::Arguments),
    /// Run the gate on its embedded default: keys, sockets, policy and manifests are there already.
    #[command(after_help = "Example: sudo latchgate up")]
    Up(up::Arguments),
    /// What a running gate says of itself, asked on the operator socket.
    #[command(after_help = "Example: latchgate status --json")]
    Status(status::Arguments),
    /// What this machine lacks for a gate, and what to do about it. Needs no running gate and no privilege.
    #[command(after_help = "Example: latchgate doctor --config /etc/latchgate/latchgate.toml\n\nExit code 1 when \
        something is missing without which a gate does not start or does not hold.")]
    Doctor(doctor::Arguments),
    /// The actions that a gate would load.
    #[command(subcommand)]
    Actions(actions::Command),
    /// Run a command (an agent, say) so that it reaches what a profile names, and the gate, and nothing else.
    #[command(after_help = confine::HELP)]
    Confine(confine::Arguments),
    /// Who contacted what, what each action may reach, and why something was refused.
    #[command(subcommand)]
    Egress(egress::Command),
    /// What runs at this moment, and ending it.
    #[command(subcommand)]
    Executions(executions::Command),
    /// What was recorded: list, show, and verify offline.
    #[command(subcommand)]
    Receipts(receipts::Command),
}

/// A command's failure: what to print, and the exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    message: String,
    code: u8,
}

impl Failure {
    pub(crate) fn new(message: impl std::fmt::Display) -> Self {
        Self { message: message.to_string(), code: 1 }
    }

    pub(crate) fn with_code(message: impl std::fmt::Display, code: u8) -> Self {
        Self { message: message.to_string(), code }
    }
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    log_to_stderr(cli.log_json);
    let done = match cli.command {
        // It ends as what it ran.
        Command::Confine(arguments) => match confine::run(&arguments) {
            Ok(code) => return code,
            Err(failure) => Err(failure),
        },
        Command::Serve(arguments) => serve::run(&arguments),
        Command::Up(arguments) => up::run(&arguments),
        Command::Status(arguments) => status::run(&arguments),
        Command::Doctor(arguments) => doctor::run(&arguments),
        Command::Actions(command) => actions::run(&command),
        Command::Egress(command) => egress::run(&command),
        Command::Executions(command) => executions::run(&command),
        Command::Receipts(command) => receipts::run(&command),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("latchgate: {}", failure.message);
            ExitCode::from(failure.code)
        }
    }
}

fn log_to_stderr(as_json: bool) {
    use std::io::IsTerminal as _;

    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_env("LATCHGATE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    if as_json { builder.json().init() } else { builder.with_target(false).init() }
}

/// Standard output that a closed pipe ends quietly.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    use std::io::Write;
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(Failure::new(error)),
        _ => Ok(()),
    }
}
