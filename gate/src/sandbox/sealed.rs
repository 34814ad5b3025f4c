//! Copies of files that nothing can change any more: read once, hashed, kept in a sealed memfd.
//!
//! A copy is found again by its digest, so the second execution of an action reads no file at all, and a file that was
//! swapped meanwhile changes nothing: what runs is what the digest says.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path};
use std::sync::{Arc, Mutex, PoisonError};

use aws_lc_rs::digest::{Context, SHA256};
use rustix::fs::{MemfdFlags, SealFlags};

use super::{SandboxError, SealedFile};

/// A larger file is refused.
const FILE_MAX_BYTES: u64 = 256 << 20;
/// Above this, copies that no execution uses are let go.
const STORE_MAX_BYTES: u64 = 512 << 20;
const CHUNK_BYTES: usize = 64 << 10;

#[derive(Debug)]
pub struct SealedCopy {
    pub file: OwnedFd,
    pub bytes: u64,
}

#[derive(Debug, Default)]
pub struct SealedStore {
    copies: Mutex<HashMap<[u8; 32], Arc<SealedCopy>>>,
}

impl SealedStore {
    /// The copy of `wanted`. Blocks on the file, if it must be read.
    pub fn copy_of(&self, wanted: &SealedFile) -> Result<Arc<SealedCopy>, SandboxError> {
        let invalid = |why| SandboxError::SealedInvalid { path: wanted.path.clone(), why };
        check_path(&wanted.path).map_err(invalid)?;
        let hex = wanted.sha256.strip_prefix("sha256:").unwrap_or(&wanted.sha256);
        let digest: [u8; 32] = crate::hash::unhex(hex)
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or_else(|| invalid("its digest is not a SHA-256 in hex"))?;
        let found = self.copies.lock().unwrap_or_else(PoisonError::into_inner).get(&digest).cloned();
        if let Some(copy) = found {
            return Ok(copy);
        }
        let unreadable = |source| SandboxError::SealedUnreadable { path: wanted.path.clone(), source };
        let mut source = open_regular(&wanted.path).map_err(unreadable)?;
        let (copy, actual) = seal(&mut source).map_err(unreadable)?;
        if actual != digest {
            return Err(SandboxError::SealedDigest { path: wanted.path.clone() });
        }
        let copy = Arc::new(copy);
        let mut copies = self.copies.lock().unwrap_or_else(PoisonError::into_inner);
        if copies.values().map(|copy| copy.bytes).sum::<u64>() + copy.bytes > STORE_MAX_BYTES {
            copies.retain(|_, copy| Arc::strong_count(copy) > 1);
        }
        copies.insert(digest, Arc::clone(&copy));
        Ok(copy)
    }
}

/// The path is a place inside the sandbox too: it must be plain, and not where the kernel's own files are.
fn check_path(path: &Path) -> Result<(), &'static str> {
    let mut components = path.components();
    if components.next() != Some(Component::RootDir) {
        return Err("the path is not absolute");
    }
    let Some(Component::Normal(first)) = components.next() else {
        return Err("the path names no file");
    };
    if ["proc", "dev", "sys", ".sealed"].iter().any(|reserved| first == *reserved) {
        return Err("nothing can be placed there");
    }
    if !components.all(|component| matches!(component, Component::Normal(_))) {
        return Err("the path is not plain");
    }
    if path.to_str().is_none() {
        return Err("the path is not UTF-8");
    }
    Ok(())
}

fn open_regular(path: &Path) -> io::Result<File> {
    // O_NONBLOCK: a FIFO must not hold the gate.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let found = file.metadata()?;
    if !found.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(file)
}

/// Copies all of `source` into a sealed memfd and says what was copied.
pub fn seal(source: &mut impl Read) -> io::Result<(SealedCopy, [u8; 32])> {
    let mut copy =
        File::from(rustix::fs::memfd_create("latchgate-sealed", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    let (digest, bytes) = pump(source, |piece| copy.write_all(piece))?;
    rustix::fs::fcntl_add_seals(&copy, SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL)?;
    Ok((SealedCopy { file: copy.into(), bytes }, digest))
}

/// SHA-256 of all that `source` gives.
pub fn digest(source: &mut impl Read) -> io::Result<[u8; 32]> {
    pump(source, |_| Ok(())).map(|(digest, _)| digest)
}

fn pump(source: &mut impl Read, mut sink: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<([u8; 32], u64)> {
    let mut hash = Context::new(&SHA256);
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut bytes = 0_u64;
    loop {
        let piece = match source.read(&mut chunk) {
            Ok(read) => chunk.get(..read).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if piece.is_empty() {
            break;
        }
        bytes = bytes.saturating_add(piece.len() as u64);
        if bytes > FILE_MAX_BYTES {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "larger than 256 MiB"));
        }
        hash.update(piece);
        sink(piece)?;
    }
    let digest = hash.finish().as_ref().try_into().map_err(io::Error::other)?;
    Ok((digest, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn sealed(path: &Path, contents: &[u8]) -> SealedFile {
        SealedFile { path: path.to_owned(), sha256: crate::hash::sha256_tagged(contents) }
    }

    #[test]
    fn the_copy_is_what_was_hashed_and_stays_so() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tool");
        std::fs::write(&path, b"first").unwrap();
        let store = SealedStore::default();
        let copy = store.copy_of(&sealed(&path, b"first")).unwrap();
        std::fs::write(&path, b"other").unwrap();
        let again = store.copy_of(&sealed(&path, b"first")).unwrap();
        assert!(Arc::ptr_eq(&copy, &again));
        let mut bytes = [0; 16];
        assert_eq!(rustix::io::pread(&copy.file, &mut bytes, 0).unwrap(), 5);
        assert_eq!(&bytes[..5], b"first");
        assert_eq!(rustix::io::pwrite(&copy.file, b"x", 0), Err(rustix::io::Errno::PERM));
        assert!(rustix::fs::ftruncate(&copy.file, 0).is_err());
        // A store that has never seen the first contents refuses the swapped file.
        let refused = SealedStore::default().copy_of(&sealed(&path, b"first"));
        assert!(matches!(refused, Err(SandboxError::SealedDigest { .. })));
    }

    #[test]
    fn refuses_what_is_no_file_and_no_plain_path() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        for path in [fifo, directory.path().to_owned(), directory.path().join("none")] {
            let refused = SealedStore::default().copy_of(&sealed(&path, b""));
            assert!(matches!(refused, Err(SandboxError::SealedUnreadable { .. })), "{path:?}");
        }
        for path in ["tool", "/", "/a/../b", "/proc/self/exe", "/dev/null", ""] {
            let refused = SealedStore::default().copy_of(&sealed(&PathBuf::from(path), b""));
            assert!(matches!(refused, Err(SandboxError::SealedInvalid { .. })), "{path:?}");
        }
        for digest in ["", "sha256:", "sha256:zz", "sha1:00", &"0".repeat(63), &"0".repeat(66)] {
            let wanted = SealedFile { path: "/usr/bin/env".into(), sha256: digest.to_owned() };
            let refused = SealedStore::default().copy_of(&wanted);
            assert!(matches!(refused, Err(SandboxError::SealedInvalid { .. })), "{digest:?}");
        }
    }
}
