//! One writer for each directory of state.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{FlockOperation, OFlags, flock};

/// Holds the lock of a directory for as long as it lives; the kernel lets go when the process dies, however it dies.
#[derive(Debug)]
pub struct DirectoryLock(#[expect(dead_code, reason = "the lock is the open file")] File);

impl DirectoryLock {
    /// Takes the lock without waiting. `WouldBlock` when another process, or another part of this one, has it.
    pub fn acquire(directory: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or(0))
            .open(directory.join("lock"))?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Self(file))
    }
}
