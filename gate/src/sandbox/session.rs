//! A program with a terminal, that lasts: what it is given, and the pty that the gate makes for it.
//!
//! It is confined as a command is, with four differences. It starts in a directory of the machine that it may write. Its
//! standard streams are a terminal, and its controlling one. It may make Unix stream sockets, because the gate's own
//! socket is shown to it: the mounts show it no other, and Landlock's scope keeps abstract ones from it. And only its
//! data is bounded where no memory controller is, not its address space, of which interpreters reserve a lot.
#![allow(unsafe_code)] // registering the pty with the runtime.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use rustix::pty::OpenptFlags;
use rustix::termios::{OptionalActions, Winsize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::Network;

/// What runs, and what it sees.
#[derive(Clone, Debug)]
pub struct SessionJob {
    /// `argv[0]` is a path, or a name that is looked up in `PATH` of `env`.
    pub argv: Vec<String>,
    /// The whole environment, but for `PATH`, `HOME`, `TMPDIR` and `LANG`, which have defaults.
    pub env: Vec<(String, String)>,
    /// Absolute and without links; it starts there and may write in it, as far as its uid may.
    pub directory: PathBuf,
    /// Shown besides, at the same paths.
    pub read_only: Vec<PathBuf>,
    pub writable: Vec<PathBuf>,
    pub socket: Option<SessionSocket>,
    /// Uid and gid outside, neither of them 0; of the runner's range when absent.
    pub identity: Option<(u32, u32)>,
    pub memory_bytes: u64,
    pub processes: u32,
    pub scratch_bytes: u64,
    pub network: Network,
    /// As [`super::Job::trust_pem`].
    pub trust_pem: Option<Vec<u8>>,
}

/// The gate's socket, as the session has it.
#[derive(Clone, Debug)]
pub struct SessionSocket {
    /// Where the gate made it. It is given to the session's uid.
    pub source: PathBuf,
    pub inside: PathBuf,
}

/// The gate's end of a pty.
#[derive(Debug)]
pub struct Terminal {
    master: AsyncFd<OwnedFd>,
}

/// Rows and columns, as a client says them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    pub rows: u16,
    pub columns: u16,
}

/// The program's end, before it is born.
#[derive(Debug)]
pub struct Device {
    pub(super) fd: OwnedFd,
    pub(super) path: PathBuf,
}

impl Terminal {
    /// A new pty of that size. Without `echo` the line discipline passes bytes on as they are, but for the characters
    /// that mean signals and the end of input: for a client that has no terminal.
    pub fn open(size: Size, echo: bool) -> io::Result<(Self, Device)> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = rustix::pty::openpt(flags)?;
        rustix::pty::unlockpt(&master)?;
        let name = rustix::pty::ptsname(&master, Vec::new())?;
        let path = PathBuf::from(name.to_str().map_err(io::Error::other)?);
        // Not by its path: a devpts mounted over /dev/pts meanwhile would give another terminal.
        let fd = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
        if !echo {
            let mut termios = rustix::termios::tcgetattr(&fd)?;
            termios.local_modes &= !rustix::termios::LocalModes::ECHO;
            termios.output_modes &= !rustix::termios::OutputModes::OPOST;
            rustix::termios::tcsetattr(&fd, OptionalActions::Now, &termios)?;
        }
        let held = rustix::fs::fcntl_getfl(&master)?;
        rustix::fs::fcntl_setfl(&master, held | rustix::fs::OFlags::NONBLOCK)?;
        // SAFETY: the value owns its descriptor, always names the same one, and is closed only after deregistration.
        let master = unsafe { AsyncFd::register_with_interest(master, Interest::READABLE | Interest::WRITABLE) }?;
        let terminal = Self { master };
        terminal.resize(size)?;
        Ok((terminal, Device { fd, path }))
    }

    /// What the program wrote; 0 when nothing has the other end open any more.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.master.readable().await?;
            match ready.try_io(|master| Ok(rustix::io::read(master, &mut *buffer)?)) {
                // The kernel's word for a terminal without a program (tty_ioctl(4)).
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => return Ok(0),
                Ok(read) => return read,
                Err(_) => {}
            }
        }
    }

    /// Types all of `bytes`.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut ready = self.master.writable().await?;
            if let Ok(written) = ready.try_io(|master| Ok(rustix::io::write(master, bytes)?)) {
                bytes = bytes.get(written?..).unwrap_or_default();
            }
        }
        Ok(())
    }

    /// Tells the program of another size, with SIGWINCH.
    pub fn resize(&self, size: Size) -> io::Result<()> {
        let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(rustix::termios::tcsetwinsize(&self.master, size)?)
    }

    /// The leader of the process group in the foreground, as this process sees it.
    pub(super) fn foreground(&self) -> io::Result<rustix::process::Pid> {
        Ok(rustix::termios::tcgetpgrp(self.master.get_ref().as_fd())?)
    }
}
