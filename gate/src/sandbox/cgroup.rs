//! The gate's cgroups: itself in `gate/`, executions in leaves under `actions/`.

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

use self::directory::Directory;
use crate::egress::LeafId;
use crate::guards::{self, Guard};

mod directory;
mod writable;

/// How long a killed leaf may take to empty. A task in an uninterruptible sleep can exceed it.
const KILL_WAIT: Duration = Duration::from_secs(5);

const POLL: Duration = Duration::from_micros(500);

/// An empty cgroup that says, over a crash, that the last gate attached its program without pins.
const UNPINNED: &str = "unpinned";

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("no cgroup v2 hierarchy is mounted: mount -t cgroup2 cgroup2 /sys/fs/cgroup")]
    NoHierarchy,
    /// Neither by its path nor through a mount of the gate's own.
    #[error(
        "no leaf can be made: {shown}; and {helper}. Give the gate a writable cgroup v2 directory, or let it make user, \
         mount and cgroup namespaces (user.max_user_namespaces, the container's seccomp profile)"
    )]
    NotWritable { shown: String, helper: String },
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
    gate: Directory,
    actions: Directory,
    next: AtomicU64,
    own_mount: bool,
    /// Holds the lock that tells a running gate of this instance from a dead one.
    _lock: Directory,
}

impl CgroupTree {
    /// Finds the v2 hierarchy (pure or hybrid), makes `<root or own cgroup>/latchgate/<instance>/{gate,actions}`, moves
    /// this process into `gate` and clears out what a dead predecessor of the same instance left in `actions`. Where the
    /// hierarchy is shown read-only, as in a container, a helper has it mounted for itself and hands over the directory.
    pub fn open(root: Option<&Path>, instance: &str) -> Result<Self, CgroupError> {
        Self::open_for(root, instance, true)
    }

    /// The same for a kernel program that is attached without pins. What was attached so cannot be found and taken off
    /// again by another process, and would refuse everything: `actions` and `gate` are made anew, and it goes with the old.
    pub fn open_unpinned(root: Option<&Path>, instance: &str) -> Result<Self, CgroupError> {
        Self::open_for(root, instance, false)
    }

    fn open_for(root: Option<&Path>, instance: &str, pinned: bool) -> Result<Self, CgroupError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if instance.is_empty() || instance.len() > 64 || instance.starts_with('.') || !instance.chars().all(plain) {
            return Err(CgroupError::Instance(instance.to_owned()));
        }
        let (base, own_mount) = base(root)?;
        let shared = base.make("latchgate")?;
        let own = shared.make(instance)?;
        // Of the instance's own directory: `actions` is locked by whoever attaches the kernel program to it.
        match flock(own.fd(), FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(CgroupError::InUse(own.shown().to_owned())),
            Err(error) => return Err(io_error(own.shown(), "lock")(error.into())),
        }
        let was_unpinned = own.has(UNPINNED);
        if pinned && !was_unpinned {
            let actions = own.make("actions")?;
            for leaf in actions.children()? {
                remove_tree(&actions, &leaf)?;
            }
        } else {
            own.make(UNPINNED)?;
            remove_tree(&own, "actions")?;
            // Kept while something is in it: this process, when a gate started it.
            let _ = own.remove("gate");
        }
        if pinned && was_unpinned {
            own.remove(UNPINNED)?;
        }
        let (gate, actions) = (own.make("gate")?, own.make("actions")?);
        gate.write("cgroup.procs", "0")?;
        for directory in [&base, &shared, &own, &actions] {
            for controller in ["+memory", "+pids"] {
                // Not there in a hybrid hierarchy, or not delegated: the leaf then has no such file, and rlimits hold.
                let _ = directory.write("cgroup.subtree_control", controller);
            }
        }
        Ok(Self { gate, actions, next: AtomicU64::new(0), own_mount, _lock: own })
    }

    /// The directory that leaves are made in; the kernel program is attached here. Where no mount of the gate's shows it,
    /// a path through `/proc/self/fd`, good in this process and while this value lives.
    pub fn actions(&self) -> &Path {
        self.actions.shown()
    }

    /// The directory of the gate's own processes; a path as that of [`Self::actions`].
    pub fn gate(&self) -> &Path {
        self.gate.shown()
    }

    /// Whether the directories are reached through a mount that only this process has.
    pub fn has_own_mount(&self) -> bool {
        self.own_mount
    }

    /// A fresh, empty leaf.
    pub fn leaf(&self) -> Result<Leaf, CgroupError> {
        loop {
            let name = format!("x{:x}", self.next.fetch_add(1, Ordering::Relaxed));
            if self.actions.make_new(&name)? {
                return Leaf::open(&self.actions, name);
            }
        }
    }
}

/// The directory to work under, and whether it is there through a mount of this process alone.
fn base(root: Option<&Path>) -> Result<(Directory, bool), CgroupError> {
    let shown = match root {
        Some(root) => Directory::open(root),
        None => own_cgroup().and_then(|path| Directory::open(&path)),
    };
    if let Err(error @ CgroupError::NotCgroup(_)) = shown {
        return Err(error);
    }
    let refused = match &shown {
        Ok(directory) => match directory.is_writable() {
            Ok(()) => return shown.map(|shown| (shown, false)),
            Err(error) => error.to_string(),
        },
        Err(error) => error.to_string(),
    };
    let fresh = writable::own_cgroup()
        .map_err(|error| CgroupError::NotWritable { shown: refused.clone(), helper: error.to_string() })?;
    // It is the cgroup of this process; another that was asked for cannot be had in its place.
    match (root, shown) {
        (Some(_), Ok(shown)) if shown.inode()? != fresh.inode()? => Err(CgroupError::NotWritable {
            shown: refused,
            helper: "it is not the cgroup of this process, so that no other way leads there".to_owned(),
        }),
        (Some(_), Err(error)) => Err(error),
        _ => Ok((fresh, true)),
    }
}

/// One execution's cgroup. Clones are the same leaf; when the last goes without [`Leaf::remove`], it is killed and
/// removed as well as that can be done.
#[derive(Clone, Debug)]
pub struct Leaf(Arc<LeafDirectory>);

#[derive(Debug)]
struct LeafDirectory {
    parent: Directory,
    name: String,
    directory: Directory,
    id: LeafId,
}

impl Leaf {
    fn open(parent: &Directory, name: String) -> Result<Self, CgroupError> {
        let directory = parent.open_child(&name)?;
        let id = LeafId(directory.inode()?);
        Ok(Self(Arc::new(LeafDirectory { parent: parent.clone(), name, directory, id })))
    }

    /// The kernel's id: on 64-bit kernels the directory's inode number is the cgroup's id.
    pub fn id(&self) -> LeafId {
        self.0.id
    }

    /// As that of [`CgroupTree::actions`].
    pub fn path(&self) -> &Path {
        self.0.directory.shown()
    }

    pub(super) fn directory(&self) -> BorrowedFd<'_> {
        self.0.directory.fd()
    }

    /// Sets what the controllers can hold; says whether the memory controller is there.
    pub(super) fn limit(&self, memory_bytes: u64, processes: u32) -> Result<bool, CgroupError> {
        if !guards::on(Guard::ResourceLimits) {
            return Ok(true);
        }
        let leaf = &self.0.directory;
        if leaf.has("pids.max") {
            leaf.write("pids.max", &processes.to_string())?;
        }
        if !leaf.has("memory.max") {
            return Ok(false);
        }
        leaf.write("memory.max", &memory_bytes.to_string())?;
        leaf.write("memory.oom.group", "1")?;
        if leaf.has("memory.swap.max") {
            leaf.write("memory.swap.max", "0")?;
        }
        Ok(true)
    }

    /// SIGKILL to everything in it, atomically against forks (`cgroup.kill`, cgroup-v2.rst; Linux 5.14).
    pub(super) fn signal_kill(&self) -> Result<(), CgroupError> {
        if !guards::on(Guard::CgroupKill) {
            return Ok(());
        }
        unless_gone(self.0.directory.write("cgroup.kill", "1"), ())
    }

    pub(super) fn is_populated(&self) -> Result<bool, CgroupError> {
        unless_gone(self.0.directory.read("cgroup.events").map(|text| populated(&text)), false)
    }

    /// Kills everything in it and waits until it is empty.
    pub fn kill(&self) -> Result<(), CgroupError> {
        kill_and_wait(&self.0.directory)
    }

    /// Kills what is left and removes the directory.
    pub fn remove(self) -> Result<(), CgroupError> {
        remove_tree(&self.0.parent, &self.0.name)
    }
}

impl Drop for LeafDirectory {
    fn drop(&mut self) {
        // Gone already after `Leaf::remove`; a name is never used twice.
        if let Err(error) = remove_tree(&self.parent, &self.name) {
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

fn kill_and_wait(directory: &Directory) -> Result<(), CgroupError> {
    unless_gone(kill_until_empty(directory), ())
}

fn kill_until_empty(directory: &Directory) -> Result<(), CgroupError> {
    if !guards::on(Guard::CgroupKill) {
        return Ok(());
    }
    directory.write("cgroup.kill", "1")?;
    let mut events: File = directory.open_file("cgroup.events")?;
    let started = tokio::time::Instant::now();
    loop {
        let mut text = String::new();
        let read = events.rewind().and_then(|()| events.read_to_string(&mut text));
        read.map_err(io_error(directory.shown(), "read cgroup.events"))?;
        if !populated(&text) {
            return Ok(());
        }
        if started.elapsed() > KILL_WAIT {
            return Err(CgroupError::StillPopulated(directory.shown().to_owned()));
        }
        std::thread::sleep(POLL);
    }
}

/// Kills and removes a cgroup and those that were made inside it, deepest first. One that is not there is removed.
fn remove_tree(parent: &Directory, name: &str) -> Result<(), CgroupError> {
    let directory = match parent.open_child(name) {
        Err(CgroupError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    kill_and_wait(&directory)?;
    for child in unless_gone(directory.children(), Vec::new())? {
        remove_tree(&directory, &child)?;
    }
    match parent.remove(name) {
        Err(CgroupError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The directory of this process's own v2 cgroup; of the one above `latchgate/<instance>/gate` when a gate started it.
fn own_cgroup() -> Result<PathBuf, CgroupError> {
    let read = |path: &str| fs::read_to_string(path).map_err(io_error(Path::new(path), "read"));
    // A mount may be hidden by a later one, so what is listed need not be there.
    let candidates = locate(&read("/proc/self/mountinfo")?, &read("/proc/self/cgroup")?);
    candidates.into_iter().find(|path| Directory::open(path).is_ok()).ok_or(CgroupError::NoHierarchy)
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
