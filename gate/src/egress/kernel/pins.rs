//! What stays when this process is gone: the links, which hold the programs, which hold their maps. Below
//! `<bpffs>/latchgate/<instance>/<generation>/`.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use aya::programs::links::PinnedLink;
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::mount::MountFlags;

use super::{KernelConfig, KernelError, sys};

const BPF_FS_MAGIC: u64 = 0xcafe_4a11;
const CGROUP2_SUPER_MAGIC: u64 = 0x6367_7270;

/// One gate an `actions` directory: two would refuse each other's leaves. The kernel gives the lock back when the
/// process dies, however it dies.
pub fn lock(config: &KernelConfig) -> Result<OwnedFd, KernelError> {
    let name_is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if config.instance.is_empty()
        || config.instance.len() > 64
        || config.instance.starts_with('.')
        || !config.instance.chars().all(name_is_plain)
    {
        return Err(KernelError::Instance(config.instance.clone()));
    }
    let directory = cgroup(&config.actions)?;
    // A child of a dying predecessor that has not reached exec may hold the lock for a moment longer.
    for _ in 0..20 {
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(directory),
            Err(rustix::io::Errno::WOULDBLOCK) => thread::sleep(Duration::from_millis(50)),
            Err(error) => return Err(KernelError::io(config.actions.display().to_string())(error.into())),
        }
    }
    Err(KernelError::InUse(config.actions.clone()))
}

/// Opens a cgroup directory; anything else is refused, because a program attached elsewhere holds nobody.
pub fn cgroup(path: &Path) -> Result<OwnedFd, KernelError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(path, flags, Mode::empty())
        .map_err(|error| KernelError::io(path.display().to_string())(error.into()))?;
    if magic(&directory).map_err(KernelError::io(path.display().to_string()))? != CGROUP2_SUPER_MAGIC {
        return Err(KernelError::NotCgroup2(path.to_owned()));
    }
    Ok(directory)
}

/// The kernel's id of a cgroup: its inode.
pub fn cgroup_id(directory: &OwnedFd) -> io::Result<u64> {
    Ok(rustix::fs::fstat(directory)?.st_ino)
}

fn magic(directory: impl AsFd) -> io::Result<u64> {
    let found = rustix::fs::fstatfs(directory)?;
    u64::try_from(found.f_type).map_err(io::Error::other)
}

/// A run of the gate. Never zero, and not to be guessed: an entry of another run is no entry.
pub fn new_generation() -> Result<u64, KernelError> {
    let (high, low) = uuid::Uuid::new_v4().as_u64_pair();
    match high ^ low.rotate_left(17) {
        0 => Err(KernelError::Missing("random generation")),
        generation => Ok(generation),
    }
}

/// The directory of this instance's pins.
pub fn directory(config: &KernelConfig) -> PathBuf {
    config.bpffs.join("latchgate").join(&config.instance)
}

/// Mounts a bpffs where there is none and this process may.
pub fn bpffs(path: &Path) -> Result<(), KernelError> {
    let refused = |source| KernelError::NoBpffs { path: path.to_owned(), source };
    let is_bpffs = || -> io::Result<bool> { Ok(magic(fs::File::open(path)?)? == BPF_FS_MAGIC) };
    if !is_bpffs().map_err(refused)? {
        // One gate at a time: a second mount would cover the first, and the pins that another gate has made there.
        let bare = fs::File::open(path).map_err(refused)?;
        rustix::fs::flock(&bare, FlockOperation::LockExclusive).map_err(|error| refused(error.into()))?;
        if !is_bpffs().map_err(refused)? {
            let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
            rustix::mount::mount("bpf", path, "bpf", flags, Some(c"mode=0700"))
                .map_err(|error| refused(error.into()))?;
        }
    }
    Ok(())
}

/// The pins of one run.
pub struct Pins {
    instance: PathBuf,
    generation: PathBuf,
    links: Vec<Link>,
}

struct Link {
    /// Of the pin, in the directory of this run.
    name: String,
    /// That it must be attached to.
    cgroup: u64,
    /// Held, so that removing the pin alone detaches nothing while this process lives.
    _held: PinnedLink,
}

impl Pins {
    pub fn make(instance: PathBuf, generation: u64) -> Result<Self, KernelError> {
        let path = instance.join(format!("{generation:016x}"));
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&instance)
            .and_then(|()| fs::DirBuilder::new().mode(0o700).create(&path))
            .map_err(KernelError::io(path.display().to_string()))?;
        // bpffs gives everybody who can open a pin what is behind it.
        let found = fs::symlink_metadata(&instance).map_err(KernelError::io(instance.display().to_string()))?;
        if found.uid() != rustix::process::geteuid().as_raw() || found.mode() & 0o077 != 0 {
            let error = io::Error::from(io::ErrorKind::PermissionDenied);
            return Err(KernelError::io(format!("{} is open to others", instance.display()))(error));
        }
        Ok(Self { instance, generation: path, links: Vec::new() })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.generation.join(name)
    }

    pub fn add_link(&mut self, name: &str, cgroup: u64, held: PinnedLink) {
        self.links.push(Link { name: name.to_owned(), cgroup, _held: held });
    }

    /// Every link must be there and attached to the cgroup that it was attached to.
    pub fn check(&self) -> Result<(), KernelError> {
        for Link { name, cgroup, .. } in &self.links {
            match sys::cgroup_of_link(&self.path(name)) {
                Ok(found) if found == *cgroup => {}
                Ok(_) => return Err(KernelError::Detached(name.clone())),
                Err(error) => return Err(KernelError::io(format!("link {name}"))(error)),
            }
        }
        Ok(())
    }

    /// Removes what earlier runs of this instance pinned. Their heartbeat has stopped, so they refuse everything; and the
    /// lock on `actions` says that they are dead. A run that holds another tree under the same name keeps its pins:
    /// without them it would be open.
    pub fn sweep_predecessors(&self) -> Result<(), KernelError> {
        let failed = || KernelError::io(self.instance.display().to_string());
        for entry in fs::read_dir(&self.instance).map_err(failed())? {
            let path = entry.map_err(failed())?.path();
            if path == self.generation {
                continue;
            }
            if self.is_of_this_tree(&path).map_err(failed())? {
                remove(&path)?;
            } else {
                tracing::warn!(path = %path.display(), "pins of a gate that holds another cgroup tree; left alone");
            }
        }
        Ok(())
    }

    /// Whether each link of an earlier run is attached to a cgroup of ours, or to one that is no longer there.
    fn is_of_this_tree(&self, run: &Path) -> io::Result<bool> {
        for entry in fs::read_dir(run)? {
            let cgroup = sys::cgroup_of_link(&entry?.path())?;
            if cgroup != 0 && !self.links.iter().any(|link| link.cgroup == cgroup) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Detaches: the pins go, and with this the held links.
    pub fn remove(self) -> Result<(), KernelError> {
        remove(&self.generation)?;
        // Another instance's are beside it.
        let _ = fs::remove_dir(&self.instance);
        Ok(())
    }
}

fn remove(directory: &Path) -> Result<(), KernelError> {
    let failed = || KernelError::io(directory.display().to_string());
    for entry in fs::read_dir(directory).map_err(failed())? {
        fs::remove_file(entry.map_err(failed())?.path()).map_err(failed())?;
    }
    fs::remove_dir(directory).map_err(failed())
}
