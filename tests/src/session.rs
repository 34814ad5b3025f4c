//! `latchgate confine` on a terminal of the test's own.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::pty::OpenptFlags;
use rustix::termios::{OptionalActions, Winsize};

use crate::gate::{Gate, binary};

/// A running client, and everything that its terminal has shown.
pub struct Session {
    pub client: Child,
    terminal: OwnedFd,
    shown: Arc<Mutex<String>>,
}

/// The arguments before the command, for an operator's test gate.
pub fn arguments(gate: &Gate, profile: &str) -> Vec<String> {
    let path = |name: &str| gate.directory().join(name).display().to_string();
    let (socket, key) = (path("operator/operator.sock"), path("operator.json"));
    ["confine", "--socket", &socket, "--key", &key, "--profile", profile].map(str::to_owned).to_vec()
}

impl Session {
    /// Starts a command in `directory`, on a terminal of 24 rows and 80 columns.
    pub fn start(gate: &Gate, profile: &str, directory: &Path, command: &[&str]) -> Self {
        Self::start_with(&arguments(gate, profile), directory, command)
    }

    pub fn start_with(arguments: &[String], directory: &Path, command: &[&str]) -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let terminal = rustix::pty::openpt(flags).unwrap();
        rustix::pty::unlockpt(&terminal).unwrap();
        let device = rustix::pty::ioctl_tiocgptpeer(&terminal, flags).unwrap();
        // As a terminal emulator has it, so that what is shown is what the other side sends.
        let mut termios = rustix::termios::tcgetattr(&device).unwrap();
        termios.output_modes &= !rustix::termios::OutputModes::OPOST;
        rustix::termios::tcsetattr(&device, OptionalActions::Now, &termios).unwrap();
        resize(&terminal, 24, 80);
        let stream = || Stdio::from(device.try_clone().unwrap());
        let client = Command::new(binary())
            .args(arguments)
            .arg("--")
            .args(command)
            .current_dir(directory)
            .env("TERM", "dumb")
            .env("PS1", "$ ")
            .stdin(stream())
            .stdout(stream())
            .stderr(stream())
            .spawn()
            .unwrap();
        drop(device);
        let shown = Arc::new(Mutex::new(String::new()));
        let (mut from, kept) = (File::from(terminal.try_clone().unwrap()), Arc::clone(&shown));
        std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(read @ 1..) = from.read(&mut chunk) {
                kept.lock().unwrap().push_str(&String::from_utf8_lossy(&chunk[..read]));
            }
        });
        Self { client, terminal, shown }
    }

    /// Types.
    pub fn say(&self, text: &str) {
        File::from(self.terminal.try_clone().unwrap()).write_all(text.as_bytes()).unwrap();
    }

    pub fn shown(&self) -> String {
        self.shown.lock().unwrap().clone()
    }

    /// Waits until the terminal has shown this.
    pub fn see(&self, wanted: &str) {
        let began = Instant::now();
        while !self.shown().contains(wanted) {
            assert!(began.elapsed() < Duration::from_secs(20), "waited for {wanted:?}; there is {:?}", self.shown());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn resize(&self, rows: u16, columns: u16) {
        resize(&self.terminal, rows, columns);
        self.signal(rustix::process::Signal::WINCH);
    }

    /// To the client itself.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(i32::try_from(self.client.id()).unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Waits for the end of the client.
    pub fn end(&mut self) -> ExitStatus {
        let began = Instant::now();
        loop {
            if let Some(status) = self.client.try_wait().unwrap() {
                // The last of what was shown is on its way.
                std::thread::sleep(Duration::from_millis(50));
                return status;
            }
            assert!(began.elapsed() < Duration::from_secs(30), "it does not end; there is {:?}", self.shown());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The receipt that the client names at its end.
    pub fn receipt_id(&self) -> String {
        let shown = self.shown();
        let (_, rest) = shown.rsplit_once("latchgate: receipt ").unwrap_or_else(|| panic!("no receipt in {shown:?}"));
        rest.split_whitespace().next().unwrap().to_owned()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.client.kill();
        let _ = self.client.wait();
    }
}

fn resize(terminal: &OwnedFd, rows: u16, columns: u16) {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(terminal.as_fd(), size).unwrap();
}
