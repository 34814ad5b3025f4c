//! What a job needs, checked and read before anything is made.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::super::protocol::{Entry, Root, TRUST_BUNDLE};
use super::super::sealed::{self, SealedCopy};
use super::super::{Program, SandboxError, trust};
use super::Inner;

/// What the job needs, all of it checked.
pub struct Prepared {
    pub entry: Entry,
    pub root: Root,
    pub sealed: Vec<(PathBuf, Arc<SealedCopy>)>,
    pub trust: bool,
    pub module_digest: String,
}

pub fn prepare(inner: &Inner, program: Program, trust_pem: Option<Vec<u8>>) -> Result<Prepared, SandboxError> {
    let (argv, mut env, files, root) = match program {
        Program::HttpWorker => {
            return Ok(Prepared {
                entry: Entry::HttpWorker,
                root: Root::Empty,
                sealed: Vec::new(),
                trust: false,
                module_digest: inner.executable_digest.clone(),
            });
        }
        Program::Attempts => {
            return Ok(Prepared {
                entry: Entry::Attempts,
                root: Root::Host,
                sealed: Vec::new(),
                trust: false,
                module_digest: inner.executable_digest.clone(),
            });
        }
        Program::Command { argv, env, files, root } => (argv, env, files, root),
    };
    check_strings(&argv, &env)?;
    if let Root::Directory(directory) = &root {
        if !directory.is_absolute() || !directory.is_dir() {
            return Err(SandboxError::Config(format!("{} is not an absolute directory", directory.display())));
        }
        check_exposed(directory, &inner.protected)?;
    }
    let mut list = Vec::with_capacity(files.len());
    let mut sealed = Vec::with_capacity(files.len() + 1);
    let trust = trust_pem.is_some();
    if let Some(authority) = trust_pem {
        // The first, so that a sealed file of the operator's at the same path covers it. No part of what ran: it is the
        // gate's, and another at each start.
        sealed.push((PathBuf::from(TRUST_BUNDLE), inner.trust.bundle(&authority, &root)?));
        trust::add_variables(&mut env);
    }
    for file in files {
        let copy = inner.sealed.copy_of(&file)?;
        let hex = file.sha256.strip_prefix("sha256:").unwrap_or(&file.sha256).to_ascii_lowercase();
        list.push(serde_json::json!({ "path": file.path, "sha256": format!("sha256:{hex}") }));
        sealed.push((file.path, copy));
    }
    let canonical = serde_jcs::to_vec(&list).map_err(|e| SandboxError::Io("digest", io::Error::other(e)))?;
    let module_digest = crate::hash::sha256_tagged(&canonical);
    Ok(Prepared { entry: Entry::Command { argv, env }, root, sealed, trust, module_digest })
}

/// What execve(2) could not take, or would take for something else.
pub fn check_strings(argv: &[String], env: &[(String, String)]) -> Result<(), SandboxError> {
    let nul = |text: &String| text.contains('\0');
    if argv.first().is_none_or(String::is_empty) || argv.iter().any(nul) {
        return Err(SandboxError::Config("argv is empty or holds a NUL".into()));
    }
    if env.iter().any(|(name, value)| name.is_empty() || name.contains('=') || nul(name) || nul(value)) {
        return Err(SandboxError::Config("a name of the environment is empty or holds `=` or NUL".into()));
    }
    Ok(())
}

/// A protected path below what would be bound, or something bound that is itself inside a protected directory.
pub fn check_exposed(bound: &Path, protected: &[PathBuf]) -> Result<(), SandboxError> {
    let Ok(real) = bound.canonicalize() else {
        return Ok(());
    };
    for path in protected {
        let at = real_path(path);
        if at.starts_with(&real) || (real.starts_with(&at) && at != Path::new("/")) {
            return Err(SandboxError::Exposed { protected: path.clone(), bound: bound.to_owned() });
        }
    }
    Ok(())
}

/// The path with links resolved as far as it exists.
fn real_path(path: &Path) -> PathBuf {
    let mut missing = PathBuf::new();
    for ancestor in path.ancestors() {
        if let Ok(real) = ancestor.canonicalize() {
            return if missing.as_os_str().is_empty() { real } else { real.join(missing) };
        }
        let name = ancestor.file_name().map(PathBuf::from).unwrap_or_default();
        missing = if missing.as_os_str().is_empty() { name } else { name.join(missing) };
    }
    path.to_owned()
}

/// A sandbox's uid must be able to execute it by descriptor: a file that others may not read becomes a sealed copy.
pub fn open_executable(path: &Path) -> io::Result<(OwnedFd, [u8; 32])> {
    let mut file = File::open(path)?;
    if file.metadata()?.mode() & 0o005 == 0o005 {
        let digest = sealed::digest(&mut file)?;
        return Ok((file.into(), digest));
    }
    let (copy, digest) = sealed::seal(&mut file)?;
    Ok((copy.file, digest))
}
