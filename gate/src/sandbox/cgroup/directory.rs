//! A cgroup directory that is held open. What is done in it is done by its descriptor: in a container no path leads to
//! one that can be written to.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Access, AtFlags, CWD, Dir, FileType, Mode, OFlags};

use super::{CgroupError, io_error};

/// `CGROUP2_SUPER_MAGIC` of linux/magic.h.
const CGROUP2_MAGIC: u64 = 0x6367_7270;

const OPEN_DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// Clones are the same open directory.
#[derive(Clone, Debug)]
pub struct Directory {
    descriptor: Arc<OwnedFd>,
    shown: PathBuf,
    /// The directory whose descriptor `shown` begins with, where it goes through `/proc/self/fd`.
    _root: Option<Arc<OwnedFd>>,
}

impl Directory {
    /// # Errors
    /// [`CgroupError::NotCgroup`] for what is no directory of the v2 hierarchy.
    pub fn open(path: &Path) -> Result<Self, CgroupError> {
        let failed = |what| move |error: rustix::io::Errno| io_error(path, what)(error.into());
        let descriptor = rustix::fs::openat(CWD, path, OPEN_DIRECTORY, Mode::empty()).map_err(failed("open"))?;
        let found = rustix::fs::fstatfs(&descriptor).map_err(failed("statfs"))?;
        if u64::try_from(found.f_type).ok() != Some(CGROUP2_MAGIC) {
            return Err(CgroupError::NotCgroup(path.to_owned()));
        }
        Ok(Self { descriptor: Arc::new(descriptor), shown: path.to_owned(), _root: None })
    }

    /// One that has no path: it is shown as a descriptor of this process.
    pub fn without_path(descriptor: OwnedFd) -> Self {
        use std::os::fd::AsRawFd;
        let shown = PathBuf::from(format!("/proc/self/fd/{}", descriptor.as_raw_fd()));
        let descriptor = Arc::new(descriptor);
        Self { _root: Some(Arc::clone(&descriptor)), descriptor, shown }
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }

    /// A path by which this process can open it while a directory of the same root is held.
    pub fn shown(&self) -> &Path {
        &self.shown
    }

    fn failed(&self, name: &str, what: &'static str) -> impl FnOnce(io::Error) -> CgroupError {
        let path = self.shown.join(name);
        move |source| CgroupError::Io { path, what, source }
    }

    pub fn open_child(&self, name: &str) -> Result<Self, CgroupError> {
        let flags = OPEN_DIRECTORY | OFlags::NOFOLLOW;
        let descriptor = rustix::fs::openat(&self.descriptor, name, flags, Mode::empty())
            .map_err(|error| self.failed(name, "open")(error.into()))?;
        Ok(Self { descriptor: Arc::new(descriptor), shown: self.shown.join(name), _root: self._root.clone() })
    }

    /// Makes a child; false if there is one of this name.
    pub fn make_new(&self, name: &str) -> Result<bool, CgroupError> {
        match rustix::fs::mkdirat(&self.descriptor, name, Mode::from_raw_mode(0o755)) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::EXIST) => Ok(false),
            Err(error) => Err(self.failed(name, "mkdir")(error.into())),
        }
    }

    /// Opens a child, made if it is not there.
    pub fn make(&self, name: &str) -> Result<Self, CgroupError> {
        self.make_new(name)?;
        self.open_child(name)
    }

    pub fn remove(&self, name: &str) -> Result<(), CgroupError> {
        rustix::fs::unlinkat(&self.descriptor, name, AtFlags::REMOVEDIR)
            .map_err(|error| self.failed(name, "rmdir")(error.into()))
    }

    /// Whether children can be made in it, by this process as it is.
    pub fn is_writable(&self) -> Result<(), CgroupError> {
        let flags = AtFlags::EACCESS;
        rustix::fs::accessat(&self.descriptor, ".", Access::WRITE_OK | Access::EXEC_OK, flags)
            .map_err(|error| io_error(&self.shown, "not writable")(error.into()))
    }

    pub fn inode(&self) -> Result<u64, CgroupError> {
        let found = rustix::fs::fstat(&self.descriptor).map_err(|error| io_error(&self.shown, "stat")(error.into()))?;
        Ok(found.st_ino)
    }

    pub fn has(&self, name: &str) -> bool {
        rustix::fs::accessat(&self.descriptor, name, Access::EXISTS, AtFlags::empty()).is_ok()
    }

    fn file(&self, name: &str, flags: OFlags) -> Result<File, CgroupError> {
        rustix::fs::openat(&self.descriptor, name, flags | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty())
            .map(File::from)
            .map_err(|error| self.failed(name, "open")(error.into()))
    }

    pub fn open_file(&self, name: &str) -> Result<File, CgroupError> {
        self.file(name, OFlags::RDONLY)
    }

    pub fn read(&self, name: &str) -> Result<String, CgroupError> {
        let mut text = String::new();
        self.open_file(name)?.read_to_string(&mut text).map_err(self.failed(name, "read"))?;
        Ok(text)
    }

    pub fn write(&self, name: &str, text: &str) -> Result<(), CgroupError> {
        self.file(name, OFlags::WRONLY)?.write_all(text.as_bytes()).map_err(self.failed(name, "write"))
    }

    /// Names of the cgroups in it.
    pub fn children(&self) -> Result<Vec<String>, CgroupError> {
        let failed = |error: rustix::io::Errno| io_error(&self.shown, "read")(error.into());
        let mut found = Vec::new();
        for entry in Dir::read_from(&self.descriptor).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type() == FileType::Directory && name != "." && name != ".." {
                found.push(name);
            }
        }
        Ok(found)
    }
}
