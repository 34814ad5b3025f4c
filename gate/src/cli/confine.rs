//! `latchgate confine`: a command of the operator's, held by the running gate, on this terminal.

use std::io::{IsTerminal as _, Read as _, Write as _};
use std::process::ExitCode;

use clap::Args;
use rustix::termios::{OptionalActions, Termios};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use super::Failure;
use super::client::OperatorArguments;
use crate::confine::frame::{Frame, PROTOCOL};

pub(super) const HELP: &str = "Example: latchgate confine --profile model -- python3 agent.py

The command starts in this directory, which it may write, with this environment, on a terminal that the gate makes. It sees \
the system's programs read-only, what its profile shows besides, and the socket of the listener at its usual path. It runs \
as the profile's uid, or this user, never as root. When this process goes away the command gets SIGHUP and, five seconds \
later, ends. Exit codes: the command's own; 128 and the signal's number if one ended it; 255 if the gate did.";

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    operator: OperatorArguments,
    /// `none`, or a `[profiles.NAME]` of the gate's configuration.
    #[arg(long, value_name = "NAME")]
    profile: String,
    /// The Unix listener whose principal it has; may be left out where there is only one.
    #[arg(long, value_name = "NAME")]
    listener: Option<String>,
    /// Do not say at the end which receipt was made.
    #[arg(long)]
    quiet: bool,
    /// The command and its arguments.
    #[arg(required = true, last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::new)?;
    let ended = runtime.block_on(session(arguments))?;
    if let Some(error) = ended.get("error").and_then(Value::as_str) {
        eprintln!("latchgate: {error}");
    }
    if let (false, Some(receipt)) = (arguments.quiet, ended.get("receipt_id").and_then(Value::as_str)) {
        eprintln!("latchgate: receipt {receipt}");
    }
    let code = ended.get("exit_code").and_then(Value::as_u64).and_then(|code| u8::try_from(code).ok());
    Ok(ExitCode::from(code.unwrap_or(255)))
}

async fn session(arguments: &Arguments) -> Result<Value, Failure> {
    let stdin = std::io::stdin();
    let terminal = stdin.is_terminal();
    let size = size().unwrap_or((24, 80));
    // What is not text cannot travel, and no program of ours reads it.
    let environment: Vec<(String, String)> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    let asked = json!({
        "profile": arguments.profile,
        "listener": arguments.listener,
        "argv": arguments.command,
        "directory": std::env::current_dir().map_err(Failure::new)?,
        "environment": environment,
        "terminal": terminal,
        "rows": size.0,
        "columns": size.1,
    });
    let signals = Signals::listen()?;
    let connection = arguments.operator.upgrade("/v1/confine", &asked, PROTOCOL).await?;
    let (from, to) = tokio::io::split(connection);
    let raw = if terminal { Some(Raw::set()?) } else { None };
    let ended = tokio::select! {
        ended = hear(from) => ended,
        failed = say(to, signals, terminal) => Err(failed),
    };
    drop(raw);
    ended
}

/// What the program writes, until its end.
async fn hear(mut from: impl AsyncRead + Unpin) -> Result<Value, Failure> {
    loop {
        match Frame::read(&mut from).await.map_err(Failure::new)? {
            Some(Frame::Output(bytes)) => {
                let mut out = std::io::stdout().lock();
                out.write_all(&bytes).and_then(|()| out.flush()).map_err(Failure::new)?;
            }
            Some(Frame::Ended(bytes)) => return serde_json::from_slice(&bytes).map_err(Failure::new),
            Some(_) => return Err(Failure::with_code("the gate does not speak as expected", 255)),
            None => return Err(Failure::with_code("the gate went away; what it held is ended", 255)),
        }
    }
}

/// What is typed, the window's size and signals. Comes back only when nothing can be said any more.
async fn say(mut to: impl AsyncWrite + Unpin, mut signals: Signals, terminal: bool) -> Failure {
    /// End of transmission: the end of input, to a terminal.
    const END_OF_INPUT: u8 = 4;
    const HANGUP: u8 = 1;
    let (typed, mut input) = mpsc::channel::<Vec<u8>>(16);
    // A terminal's reads cannot be given up, so that they have a thread of their own, which ends with the process.
    std::thread::spawn(move || {
        let (mut stdin, mut chunk) = (std::io::stdin().lock(), vec![0; 16 << 10]);
        while let Ok(read @ 1..) = stdin.read(&mut chunk) {
            let piece = chunk.get(..read).unwrap_or_default().to_vec();
            if typed.blocking_send(piece).is_err() {
                return;
            }
        }
        if !terminal {
            let _ = typed.blocking_send(vec![END_OF_INPUT]);
        }
    });
    let mut open = true;
    loop {
        let frame = tokio::select! {
            typed = input.recv(), if open => match typed {
                Some(bytes) => Frame::Input(bytes),
                None => {
                    open = false;
                    continue;
                }
            },
            frame = signals.next() => frame,
        };
        // This terminal is gone, or whoever started this wants it gone: with it goes the connection, and the gate sees to
        // the rest.
        if frame == Frame::Signal(HANGUP) {
            return Failure::with_code("hung up", 128 + HANGUP);
        }
        if let Err(error) = frame.write(&mut to).await {
            // The last word of the gate may be on its way.
            tokio::time::sleep(std::time::Duration::from_secs(5)).await;
            return Failure::with_code(error, 255);
        }
    }
}

fn size() -> Option<(u16, u16)> {
    let size =
        rustix::termios::tcgetwinsize(std::io::stdin()).or_else(|_| rustix::termios::tcgetwinsize(std::io::stdout()));
    size.ok().map(|size| (size.ws_row, size.ws_col))
}

struct Signals {
    window: Signal,
    passed: Vec<(u8, Signal)>,
}

impl Signals {
    fn listen() -> Result<Self, Failure> {
        let kinds = [
            SignalKind::hangup(),
            SignalKind::interrupt(),
            SignalKind::quit(),
            SignalKind::terminate(),
            SignalKind::user_defined1(),
            SignalKind::user_defined2(),
        ];
        let mut passed = Vec::new();
        for kind in kinds {
            let number = u8::try_from(kind.as_raw_value()).map_err(Failure::new)?;
            passed.push((number, signal(kind).map_err(Failure::new)?));
        }
        Ok(Self { window: signal(SignalKind::window_change()).map_err(Failure::new)?, passed })
    }

    async fn next(&mut self) -> Frame {
        std::future::poll_fn(|context| {
            if self.window.poll_recv(context).is_ready()
                && let Some((rows, columns)) = size()
            {
                return std::task::Poll::Ready(Frame::Resize(rows, columns));
            }
            for (number, signal) in &mut self.passed {
                if signal.poll_recv(context).is_ready() {
                    return std::task::Poll::Ready(Frame::Signal(*number));
                }
            }
            std::task::Poll::Pending
        })
        .await
    }
}

/// This terminal in raw mode: what is typed goes to the other one as it is. As before when this goes.
struct Raw(Termios);

impl Raw {
    fn set() -> Result<Self, Failure> {
        let before = rustix::termios::tcgetattr(std::io::stdin()).map_err(Failure::new)?;
        let mut raw = before.clone();
        raw.make_raw();
        rustix::termios::tcsetattr(std::io::stdin(), OptionalActions::Now, &raw).map_err(Failure::new)?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = rustix::termios::tcsetattr(std::io::stdin(), OptionalActions::Now, &self.0);
    }
}
