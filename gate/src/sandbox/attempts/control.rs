//! The gate's side: the helper child in which the attempts are free, and the process that they are made at.
#![allow(unsafe_code)] // signals that are waited for.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::mem::zeroed;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, Stdio};

use super::{Order, Saw};

/// `argv[0]` of an image of this binary that makes the attempts where nothing holds them.
pub const CONTROL_NAME: &str = "latchgate-selftest-control";
/// `argv[0]` of an image of this binary that waits to be signalled.
pub const VICTIM_NAME: &str = "latchgate-selftest-victim";

/// Why there is no control.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("the helper outside could not be run: {0}")]
    Io(#[from] io::Error),
    #[error("the helper outside said nothing that can be read")]
    Unreadable,
}

#[expect(clippy::disallowed_methods, reason = "an image of this very binary, for the self-test")]
fn image(name: &str) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0(name).env_clear().stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    command
}

/// Makes the attempts in a child of the gate, and waits for it.
///
/// # Errors
/// When there is no such child, or it does not say what it saw.
pub fn outside(order: &Order) -> Result<BTreeMap<String, Saw>, ControlError> {
    let text = serde_json::to_vec(order).map_err(io::Error::other)?;
    let mut child = image(CONTROL_NAME).spawn()?;
    let fed = match child.stdin.take() {
        Some(mut stdin) => stdin.write_all(&text),
        None => Ok(()),
    };
    let output = child.wait_with_output()?;
    fed?;
    serde_json::from_slice(&output.stdout).map_err(|_| ControlError::Unreadable)
}

/// A process of the gate's that attempts are made at. It ends when this is dropped, or the gate dies.
#[derive(Debug)]
pub struct Victim {
    child: Child,
}

/// Starts it. `token` is seen in its arguments.
///
/// # Errors
/// When there can be no such process.
pub fn victim(token: &str) -> io::Result<Victim> {
    let mut child = image(VICTIM_NAME).arg(token).spawn()?;
    let mut ready = [0];
    match child.stdout.as_mut().map(|stdout| stdout.read_exact(&mut ready)) {
        Some(Ok(())) => Ok(Victim { child }),
        _ => {
            let _ = child.kill();
            let _ = child.wait();
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }
}

impl Victim {
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap_or(0)
    }

    /// Ends it, and gives the numbers that it was signalled with.
    pub fn end(mut self) -> Vec<i32> {
        drop(self.child.stdin.take());
        let mut said = String::new();
        if let Some(stdout) = self.child.stdout.as_mut() {
            let _ = stdout.read_to_string(&mut said);
        }
        said.lines().filter_map(|line| line.parse().ok()).collect()
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn control_main() -> ExitCode {
    super::main()
}

/// Collects signals until standard input ends.
pub fn victim_main() -> ExitCode {
    // SAFETY: plain data; the mask and the signals are this process's own, and it has one thread.
    unsafe {
        let mut wanted: libc::sigset_t = zeroed();
        libc::sigemptyset(&raw mut wanted);
        libc::sigaddset(&raw mut wanted, libc::SIGURG);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const wanted, std::ptr::null_mut());
        // Whoever lets this one be traced is this process itself; that is no part of what is shown.
        let mut out = io::stdout();
        if out.write_all(b"r").and_then(|()| out.flush()).is_err() {
            return ExitCode::FAILURE;
        }
        let _ = io::stdin().read_to_end(&mut Vec::new());
        let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let mut said = String::new();
        loop {
            let mut signal: libc::siginfo_t = zeroed();
            if libc::sigtimedwait(&raw const wanted, &raw mut signal, &raw const none) != libc::SIGURG {
                break;
            }
            said.push_str(&format!("{}\n", signal.si_value().sival_ptr as usize));
        }
        let _ = out.write_all(said.as_bytes()).and_then(|()| out.flush());
    }
    ExitCode::SUCCESS
}
