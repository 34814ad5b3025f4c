//! Running a program with a terminal.

use std::ffi::CString;
use std::future::Future;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::super::namespace::{NamespaceListeners, Ports};
use super::super::protocol::{self, Entry, Root, Session, Spec, TRUST_BUNDLE};
use super::super::session::{Device, SessionJob, Terminal};
use super::super::worker::landlock_version;
use super::super::{Exit, Leaf, Network, SandboxError, spawner, trust};
use super::prepare::{check_exposed, check_strings};
use super::{NotTaken, Runner, Uid, exit_of, spawn, statuses};

/// How long the making may take.
const START_TIME: Duration = Duration::from_secs(20);
/// Entries below what is shown that are looked at for sockets; more are refused.
const WALK_MAX: usize = 2_000_000;
/// Sockets that are covered; more are refused.
const COVERED_MAX: usize = 256;
/// Landlock's scope for abstract Unix sockets came with this version of its interface (landlock(7)).
const LANDLOCK_WITH_SCOPES: i32 = 6;

impl Runner {
    /// Runs `job` in `leaf` on `device` until it ends or `cancel` is ready. When this returns nothing of it runs; the
    /// leaf is still there. `take` as in [`Runner::run_with`].
    ///
    /// # Errors
    /// As [`Runner::run_with`], and [`SandboxError::Config`] where a socket of others could be reached.
    pub async fn run_session<Taken, E>(
        &self,
        leaf: &Leaf,
        job: SessionJob,
        device: Device,
        take: impl FnOnce(NamespaceListeners) -> Taken,
        cancel: impl Future<Output = ()>,
    ) -> Result<Exit, SandboxError>
    where
        Taken: Future<Output = Result<(), E>>,
        E: Into<NotTaken>,
    {
        let inner = &self.0;
        let network = Ports::of(job.network)?;
        let mut uid = None;
        let outside = match job.identity {
            Some((user, group)) if user != 0 && group != 0 => (user, group),
            Some(_) => return Err(SandboxError::Config("a session never has the uid or gid 0".into())),
            None => {
                let taken = uid.insert(Uid::take(inner)?);
                (taken.id, taken.id)
            }
        };
        let held = leaf.limit(job.memory_bytes, job.processes.saturating_add(1))?;
        let tree = match &job.socket {
            None => None,
            Some(socket) => {
                std::os::unix::fs::chown(&socket.source, Some(outside.0), Some(outside.1))
                    .map_err(|e| SandboxError::Io("the session's socket", e))?;
                let path = CString::new(socket.source.as_os_str().as_bytes());
                Some(path.map_err(|e| SandboxError::Config(e.to_string()))?)
            }
        };
        rustix::fs::fchown(&device.fd, Some(owner(outside.0)), Some(group(outside.1)))
            .map_err(|e| SandboxError::Io("the session's terminal", e.into()))?;
        let runner = Arc::clone(inner);
        let terminal = device.path.clone();
        let (spec, sealed) = tokio::task::spawn_blocking(move || prepare(&runner, job, terminal, held))
            .await
            .map_err(|e| SandboxError::Io("session", io::Error::other(e)))??;
        let spec = protocol::encode_spec(&spec).map_err(|e| SandboxError::Io("spec", e))?;

        let make = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
        let failed = |error: io::Error| SandboxError::Io("pipes", error);
        let (control, status) = (make().map_err(|e| failed(e.into()))?, make().map_err(|e| failed(e.into()))?);
        let (mut say, hear) = (
            pipe::Sender::from_owned_fd(control.1).map_err(failed)?,
            pipe::Receiver::from_owned_fd(status.0).map_err(failed)?,
        );
        let stream = || device.fd.try_clone().map_err(|e| SandboxError::Io("descriptors", e));
        let mut descriptors = vec![stream()?, stream()?, stream()?, control.0, status.1];
        for copy in &sealed {
            descriptors.push(copy.file.try_clone().map_err(|e| SandboxError::Io("descriptors", e))?);
        }
        // The program's ends are its own alone: when it is gone, the terminal says so.
        drop(device);
        let mut child = spawn(inner, leaf, descriptors, outside, tree, network).await?;

        if let Some(uid) = &mut uid {
            uid.reusable = false;
        }
        let listeners = child.listeners.take();
        let ended = {
            let run = async {
                if let Some(listeners) = listeners {
                    take(listeners).await.map_err(|error| SandboxError::NotTaken(error.into()))?;
                }
                let watched = child.watch().map_err(|e| SandboxError::Io("pidfd", e))?;
                let (ready, is_ready) = oneshot::channel();
                let talk = async {
                    let begun = say.write_all(b"m").await.is_ok() && say.write_all(&spec).await.is_ok();
                    let deadline = Instant::now() + START_TIME;
                    if begun && matches!(tokio::time::timeout_at(deadline, is_ready).await, Ok(Ok(()))) {
                        let _ = say.write_all(b"g").await;
                    }
                    drop(say);
                };
                let (said, (), _) = tokio::join!(statuses(hear, ready), talk, watched.readable());
                exit_of(&said)
            };
            tokio::select! {
                ended = run => ended,
                () = cancel => Ok(Exit::Cancelled),
            }
        };
        child.kill();
        let doomed = leaf.clone();
        tokio::task::spawn_blocking(move || doomed.kill())
            .await
            .map_err(|e| SandboxError::Io("kill", io::Error::other(e)))??;
        spawner::collect(&child);
        if let Some(uid) = &mut uid {
            uid.reusable = true;
        }
        ended
    }

    /// Sends a signal to what is in the foreground of a session's terminal, if that is in its leaf.
    pub fn signal_session(&self, leaf: &Leaf, terminal: &Terminal, signal: Signal) -> io::Result<()> {
        let group = terminal.foreground()?;
        // As this process numbers them. A number that was given again meanwhile is nobody's here.
        let inside = std::fs::read_to_string(leaf.path().join("cgroup.procs"))?;
        let number = group.as_raw_nonzero().to_string();
        if !inside.lines().any(|line| line == number) {
            return Err(io::Error::new(io::ErrorKind::NotFound, "nothing is in the foreground"));
        }
        Ok(rustix::process::kill_process_group(group, signal)?)
    }
}

fn owner(uid: u32) -> rustix::fs::Uid {
    rustix::fs::Uid::from_raw(uid)
}

fn group(gid: u32) -> rustix::fs::Gid {
    rustix::fs::Gid::from_raw(gid)
}

type Sealed = Vec<Arc<super::super::sealed::SealedCopy>>;

fn prepare(
    inner: &super::Inner,
    job: SessionJob,
    terminal: PathBuf,
    memory_held: bool,
) -> Result<(Spec, Sealed), SandboxError> {
    let SessionJob { argv, mut env, directory, read_only, writable, socket, .. } = job;
    check_strings(&argv, &env)?;
    let scope_needed = job.network == Network::Shared;
    if scope_needed && landlock_version() < LANDLOCK_WITH_SCOPES {
        return Err(SandboxError::Config(format!(
            "this kernel's Landlock (version {}) cannot keep abstract Unix sockets from a session in the shared network \
             (version {LANDLOCK_WITH_SCOPES} can, Linux 6.12): use sandbox.network = \"isolated\" without inbound_ports",
            landlock_version()
        )));
    }
    let mut covered = Vec::new();
    let mut walked = 0;
    for shown in std::iter::once(&directory).chain(&read_only).chain(&writable) {
        check_shown(shown)?;
        check_exposed(shown, &inner.protected)?;
        walk(shown, &mut covered, &mut walked)?;
    }
    let mut sealed = Vec::new();
    let mut paths = Vec::new();
    let trust = job.trust_pem.is_some();
    if let Some(authority) = job.trust_pem {
        sealed.push(inner.trust.bundle(&authority, &Root::Host)?);
        paths.push(PathBuf::from(TRUST_BUNDLE));
        trust::add_variables(&mut env);
    }
    let spec = Spec {
        entry: Entry::Command { argv, env },
        root: Root::Host,
        sealed_bytes: sealed.iter().map(|copy| copy.bytes.saturating_add(4096)).sum(),
        sealed: paths,
        trust,
        scratch_bytes: job.scratch_bytes,
        processes: job.processes,
        process_memory_bytes: (!memory_held).then_some(job.memory_bytes),
        session: Some(Session {
            terminal,
            directory,
            read_only,
            writable,
            socket: socket.map(|socket| socket.inside),
            covered,
            scope_needed,
        }),
        #[cfg(feature = "test-guards")]
        guards_off: crate::guards::bits(),
    };
    Ok((spec, sealed))
}

/// A place in the sandbox as outside: absolute, no link anywhere in it, and nothing that the sandbox makes itself.
fn check_shown(path: &Path) -> Result<(), SandboxError> {
    let wrong = |why: &str| Err(SandboxError::Config(format!("{}: {why}", path.display())));
    match path.canonicalize() {
        Err(error) => return wrong(&error.to_string()),
        Ok(real) if real != path => return wrong("is reached by a link, or is not plain: name what it leads to"),
        Ok(_) => {}
    }
    if path.to_str().is_none() {
        return wrong("is not UTF-8");
    }
    let own = ["/proc", "/dev", "/sys", "/run", "/.sealed", "/etc"];
    if own.iter().any(|own| path.starts_with(own)) || path == Path::new("/") || path == Path::new("/tmp") {
        return wrong("cannot be shown: the sandbox has its own");
    }
    if !path.is_dir() && !path.is_file() {
        return wrong("is neither a directory nor a file");
    }
    Ok(())
}

/// Finds the sockets below what is shown. A socket is reached by its path whatever the mount permits.
fn walk(path: &Path, found: &mut Vec<PathBuf>, walked: &mut usize) -> Result<(), SandboxError> {
    let mut left = vec![path.to_owned()];
    while let Some(directory) = left.pop() {
        let entries = match std::fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotADirectory | io::ErrorKind::NotFound) => continue,
            Err(error) => return Err(SandboxError::Config(format!("{}: {error}", directory.display()))),
        };
        for entry in entries.flatten() {
            *walked += 1;
            if *walked > WALK_MAX {
                return Err(SandboxError::Config(format!(
                    "{}: more than {WALK_MAX} files are below what is shown; sockets among them could not be found",
                    path.display()
                )));
            }
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_dir() {
                left.push(entry.path());
            } else if kind.is_socket() {
                found.push(entry.path());
            }
        }
        if found.len() > COVERED_MAX {
            return Err(SandboxError::Config(format!(
                "{}: more than {COVERED_MAX} Unix sockets are below what is shown",
                path.display()
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_places_are_shown() {
        let directory = tempfile::tempdir().unwrap();
        let real = directory.path().canonicalize().unwrap();
        std::os::unix::fs::symlink(&real, real.join("link")).unwrap();
        assert!(check_shown(&real).is_ok());
        for wrong in ["/", "/tmp", "/etc/ssl", "/proc/self", "/run", "relative", "/nowhere/at/all"] {
            assert!(check_shown(Path::new(wrong)).is_err(), "{wrong}");
        }
        assert!(check_shown(&real.join("link")).is_err());
        assert!(check_shown(&real.join("../x")).is_err());
    }

    #[test]
    fn sockets_are_found_however_deep() {
        let directory = tempfile::tempdir().unwrap();
        let deep = directory.path().join("a/b/c");
        std::fs::create_dir_all(&deep).unwrap();
        let socket = deep.join("s");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let (mut found, mut walked) = (Vec::new(), 0);
        walk(directory.path(), &mut found, &mut walked).unwrap();
        assert_eq!((found, walked), (vec![socket], 4));
    }
}
