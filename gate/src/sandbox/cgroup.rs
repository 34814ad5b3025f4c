//! The gate's cgroups: itself in `gate/`, executions in leaves under `actions/`.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

use crate::egress::LeafId;
use crate::guards::{self, Guard};

/// How long a killed leaf may take to empty. A task in an uninterruptible sleep can exceed it.
const KILL_WAIT: Duration = Duration::from_secs(5);

const POLL: Duration = Duration::from_micros(500);

/// `CGROUP2_SUPER_MAGIC` of linux/magic.h.
const CGROUP2_MAGIC: u64 = 0x6367_7270;

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("no cgroup v2 hierarchy is mounted: mount -t cgroup2 cgroup2 /sys/fs/cgroup")]
    NoHierarchy,
    #[error("{} is not a cgroup v2 directory", .0.display())]
    NotCgroup(PathBuf),
    #[error("`{0}` is no instance name: letters, digits, `-`, `_` and `.`, at most 64")]
    Instance(String),
    #[error("another gate runs as this instance: {} is locked", .0.display())]
    InUse(PathBuf),
    #[error("{} is not empty after {KILL_WAIT:?}", .0.display())]
    StillPopulated(PathBuf),
    #[error("{}: {what}: {source}", path.display())]
    Io { path: PathBuf, what: &'static str, source: io::Error },
}

fn io_error(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::Io { path, what, source }
}

/// The two cgroups of one gate. One process has one: opening it moves the process.
#[derive(Debug)]
pub struct CgroupTree {
    gate: PathBuf,
    actions: PathBuf,
    next: AtomicU64,
    /// Holds the lock that tells a running gate of this instance from a dead one.
    _lock: File,
}

impl CgroupTree {
    /// Finds the v2 hierarchy (pure or hybrid), makes `<root or own cgroup>/latchgate/<instance>/{gate,actions}`, moves
    /// this process into `gate` and clears out what a dead predecessor of the same instance left in `actions`.
    pub fn open(root: Option<&Path>, instance: &str) -> Result<Self, CgroupError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if instance.is_empty() || instance.len() > 64 || instance.starts_with('.') || !instance.chars().all(plain) {
            return Err(CgroupError::Instance(instance.to_owned()));
        }
        let base = match root {
            Some(root) => root.to_owned(),
            None => own_cgroup()?,
        };
        if !is_cgroup2(&base).map_err(io_error(&base, "statfs"))? {
            return Err(CgroupError::NotCgroup(base));
        }
        let shared = base.join("latchgate");
        let own = shared.join(instance);
        let (gate, actions) = (own.join("gate"), own.join("actions"));
        for path in [&shared, &own, &gate, &actions] {
            make_directory(path)?;
        }
        // Of the instance's own directory: `actions` is locked by whoever attaches the kernel program to it.
        let lock = File::open(&own).map_err(io_error(&own, "open"))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(CgroupError::InUse(own)),
            Err(error) => return Err(io_error(&own, "lock")(error.into())),
        }
        write(&gate.join("cgroup.procs"), "0")?;
        for path in [&base, &shared, &own, &actions] {
            for controller in ["+memory", "+pids"] {
                // Not there in a hybrid hierarchy, or not delegated: the leaf then has no such file, and rlimits hold.
                let _ = fs::write(path.join("cgroup.subtree_control"), controller);
            }
        }
        sweep(&actions)?;
        Ok(Self { gate, actions, next: AtomicU64::new(0), _lock: lock })
    }

    /// The directory that leaves are made in; the kernel program is attached here.
    pub fn actions(&self) -> &Path {
        &self.actions
    }

    /// The directory of the gate's own processes.
    pub fn gate(&self) -> &Path {
        &self.gate
    }

    /// A fresh, empty leaf.
    pub fn leaf(&self) -> Result<Leaf, CgroupError> {
        loop {
            let name = format!("x{:x}", self.next.fetch_add(1, Ordering::Relaxed));
            let path = self.actions.join(name);
            match fs::create_dir(&path) {
                Ok(()) => return Leaf::open(path),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(io_error(&path, "mkdir")(error)),
            }
        }
    }
}

/// One execution's cgroup. Clones are the same leaf; when the last goes without [`Leaf::remove`], it is killed and
/// removed as well as that can be done.
#[derive(Clone, Debug)]
pub struct Leaf(Arc<LeafDirectory>);

#[derive(Debug)]
struct LeafDirectory {
    path: PathBuf,
    directory: File,
    id: LeafId,
}

impl Leaf {
    fn open(path: PathBuf) -> Result<Self, CgroupError> {
        let directory = File::open(&path).map_err(io_error(&path, "open"))?;
        let inode = directory.metadata().map_err(io_error(&path, "stat"))?.ino();
        Ok(Self(Arc::new(LeafDirectory { path, directory, id: LeafId(inode) })))
    }

    /// The kernel's id: on 64-bit kernels the directory's inode number is the cgroup's id.
    pub fn id(&self) -> LeafId {
        self.0.id
    }

    pub fn path(&self) -> &Path {
        &self.0.path
    }

    pub(super) fn directory(&self) -> BorrowedFd<'_> {
        self.0.directory.as_fd()
    }

    /// Sets what the controllers can hold; says whether the memory controller is there.
    pub(super) fn limit(&self, memory_bytes: u64, processes: u32) -> Result<bool, CgroupError> {
        let path = &self.0.path;
        if path.join("pids.max").exists() {
            write(&path.join("pids.max"), &processes.to_string())?;
        }
        if !path.join("memory.max").exists() {
            return Ok(false);
        }
        write(&path.join("memory.max"), &memory_bytes.to_string())?;
        write(&path.join("memory.oom.group"), "1")?;
        if path.join("memory.swap.max").exists() {
            write(&path.join("memory.swap.max"), "0")?;
        }
        Ok(true)
    }

    /// SIGKILL to everything in it, atomically against forks (`cgroup.kill`, cgroup-v2.rst; Linux 5.14).
    pub(super) fn signal_kill(&self) -> Result<(), CgroupError> {
        if !guards::on(Guard::CgroupKill) {
            return Ok(());
        }
        unless_gone(write(&self.0.path.join("cgroup.kill"), "1"), ())
    }

    pub(super) fn is_populated(&self) -> Result<bool, CgroupError> {
        let path = self.0.path.join("cgroup.events");
        let text = fs::read_to_string(&path).map_err(io_error(&path, "read"));
        unless_gone(text.map(|text| populated(&text)), false)
    }

    /// Kills everything in it and waits until it is empty.
    pub fn kill(&self) -> Result<(), CgroupError> {
        kill_and_wait(&self.0.path)
    }

    /// Kills what is left and removes the directory.
    pub fn remove(self) -> Result<(), CgroupError> {
        remove_tree(&self.0.path)
    }
}

impl Drop for LeafDirectory {
    fn drop(&mut self) {
        if self.path.exists()
            && let Err(error) = remove_tree(&self.path)
        {
            tracing::warn!(leaf = self.id.0, %error, "a leaf was not removed");
        }
    }
}

fn populated(events: &str) -> bool {
    // Anything but a clear "no" counts as populated.
    !events.lines().any(|line| line == "populated 0")
}

/// A directory that is not there any more was empty: the kernel removes no other (cgroup-v2.rst). Its open files then
/// answer ENODEV.
fn unless_gone<T>(result: Result<T, CgroupError>, gone: T) -> Result<T, CgroupError> {
    match result {
        Err(CgroupError::Io { source, .. })
            if source.kind() == io::ErrorKind::NotFound || source.raw_os_error() == Some(libc::ENODEV) =>
        {
            Ok(gone)
        }
        other => other,
    }
}

fn kill_and_wait(path: &Path) -> Result<(), CgroupError> {
    unless_gone(kill_until_empty(path), ())
}

fn kill_until_empty(path: &Path) -> Result<(), CgroupError> {
    if !guards::on(Guard::CgroupKill) {
        return Ok(());
    }
    write(&path.join("cgroup.kill"), "1")?;
    let events = path.join("cgroup.events");
    let mut file = File::open(&events).map_err(io_error(&events, "open"))?;
    let started = tokio::time::Instant::now();
    loop {
        let mut text = String::new();
        file.rewind().and_then(|()| file.read_to_string(&mut text)).map_err(io_error(&events, "read"))?;
        if !populated(&text) {
            return Ok(());
        }
        if started.elapsed() > KILL_WAIT {
            return Err(CgroupError::StillPopulated(path.to_owned()));
        }
        std::thread::sleep(POLL);
    }
}

/// Kills and removes a cgroup and those that were made inside it, deepest first.
fn remove_tree(path: &Path) -> Result<(), CgroupError> {
    kill_and_wait(path)?;
    for child in unless_gone(children(path), Vec::new())? {
        remove_tree(&child)?;
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(io_error(path, "rmdir")),
    }
}

fn sweep(actions: &Path) -> Result<(), CgroupError> {
    for leaf in children(actions)? {
        remove_tree(&leaf)?;
    }
    Ok(())
}

fn children(path: &Path) -> Result<Vec<PathBuf>, CgroupError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(path).map_err(io_error(path, "read"))? {
        let entry = entry.map_err(io_error(path, "read"))?;
        if entry.file_type().map_err(io_error(path, "read"))?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

fn make_directory(path: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(io_error(path, "mkdir")(error)),
        _ => Ok(()),
    }
}

fn write(path: &Path, text: &str) -> Result<(), CgroupError> {
    fs::OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(io_error(path, "write"))
}

/// The directory of this process's own v2 cgroup; of the one above `latchgate/<instance>/gate` when a gate started it.
fn own_cgroup() -> Result<PathBuf, CgroupError> {
    let read = |path: &str| fs::read_to_string(path).map_err(io_error(Path::new(path), "read"));
    // A mount may be hidden by a later one, so what is listed need not be there.
    let candidates = locate(&read("/proc/self/mountinfo")?, &read("/proc/self/cgroup")?);
    candidates.into_iter().find(|path| is_cgroup2(path).unwrap_or(false)).ok_or(CgroupError::NoHierarchy)
}

fn is_cgroup2(path: &Path) -> io::Result<bool> {
    Ok(u64::try_from(rustix::fs::statfs(path)?.f_type).ok() == Some(CGROUP2_MAGIC))
}

/// Where this process's cgroup should be seen, mount by mount; `mountinfo` as proc_pid_mountinfo(5), `cgroup` as
/// cgroups(7) have them.
fn locate(mountinfo: &str, cgroup: &str) -> Vec<PathBuf> {
    let Some(own) = cgroup.lines().find_map(|line| line.strip_prefix("0::")).map(Path::new) else {
        return Vec::new();
    };
    let own = match own.components().rev().map(|part| part.as_os_str().to_str()).collect::<Vec<_>>().as_slice() {
        [Some("gate"), Some(_), Some("latchgate"), ..] => own.ancestors().nth(3).unwrap_or(own),
        _ => own,
    };
    let seen_at = |line: &str| {
        let (mount, filesystem) = line.split_once(" - ")?;
        if filesystem.split(' ').next() != Some("cgroup2") {
            return None;
        }
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (unescape(fields.next()?), unescape(fields.next()?));
        // A bind of another part of the hierarchy does not show this process's cgroup.
        let below = own.strip_prefix(&root).ok()?;
        Some(if below.as_os_str().is_empty() { PathBuf::from(point) } else { Path::new(&point).join(below) })
    };
    mountinfo.lines().filter_map(seen_at).collect()
}

/// `\040` and its like, as the kernel writes blanks in mountinfo.
fn unescape(field: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(field.to_owned(), |text, (from, to)| text.replace(from, to))
}

#[cfg(test)]
mod tests;
