//! The root that the program sees, made with the new mount API (AppArmor in pods refuses mount(2)).
//!
//! A tmpfs of the sandbox's own, with the host's parts bound into it read-only, becomes the root, and the host's root is
//! unmounted before anything else happens. A path that is not put here does not exist inside: the gate's sockets, keys
//! and ledger have no name to be asked for.
#![allow(unsafe_code)] // mount_setattr(2), which rustix does not have.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Component, Path};

use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree, unmount,
};

use super::super::protocol::{Root, Session, Spec, Stage};
use super::init::{Failure, at};
use crate::guards::{self, Guard};

/// Top-level names that the host root takes from the host; a link stays a link.
pub const HOST_BINDS: [&str; 7] = ["usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32"];
/// What of `/etc` programs need and the sandbox does not write itself.
pub const ETC_BINDS: [&str; 12] = [
    "ssl",
    "pki",
    "crypto-policies",
    "ca-certificates",
    "ca-certificates.conf",
    "alternatives",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "mime.types",
    "services",
];
const ETC_FILES: [(&str, &str); 6] = [
    ("passwd", "root:x:0:0::/:/usr/sbin/nologin\nnobody:x:65534:65534::/tmp:/bin/sh\n"),
    ("group", "root:x:0:\nnogroup:x:65534:\n"),
    ("hosts", "127.0.0.1 localhost\n::1 localhost\n"),
    ("hostname", "sandbox\n"),
    ("nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n"),
    ("resolv.conf", "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n"),
];
const DEVICES: [&str; 5] = ["null", "zero", "full", "random", "urandom"];
const DEVICE_LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    // One bound for all that is written: shared memory is in the scratch directory.
    ("shm", "/tmp/.shm"),
];
/// Of a directory root, these are the sandbox's own.
const OWN_NAMES: [&str; 6] = ["dev", "proc", "sys", "run", "tmp", ".sealed"];

/// The names in `TRUST_BUNDLE`, but for the file's.
const TRUST_PATH: [&str; 3] = ["etc", "ssl", "latchgate"];

const SEALED_DIRECTORY: &str = "/.sealed";

/// Room of the root itself, beside the sealed copies: directories, links and generated files.
const ROOT_BYTES: u64 = 1 << 20;
const ROOT_INODES: u64 = 4096;
const SCRATCH_INODES_MIN: u64 = 64;
const SCRATCH_INODES_MAX: u64 = 65_536;
const PAGE_BYTES: u64 = 4096;

const READ_ONLY: MountAttrFlags =
    MountAttrFlags::MOUNT_ATTR_RDONLY.union(MountAttrFlags::MOUNT_ATTR_NOSUID).union(MountAttrFlags::MOUNT_ATTR_NODEV);
const WRITABLE: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID.union(MountAttrFlags::MOUNT_ATTR_NODEV);
/// A device in a read-only mount can be written to, not changed.
const DEVICE: MountAttrFlags =
    MountAttrFlags::MOUNT_ATTR_RDONLY.union(MountAttrFlags::MOUNT_ATTR_NOSUID).union(MountAttrFlags::MOUNT_ATTR_NOEXEC);

pub fn build(spec: &Spec, sealed: Vec<(&Path, OwnedFd)>, socket: Option<OwnedFd>) -> Result<(), Failure> {
    set_attributes(CWD.as_fd(), "/", MountAttrFlags::empty(), libc::MS_PRIVATE, true)
        .map_err(at(Stage::Root, "mounts of its own"))?;
    let bytes = ROOT_BYTES.saturating_add(spec.sealed_bytes);
    let root = tmpfs(bytes, ROOT_INODES, "0755", WRITABLE).map_err(at(Stage::Root, "tmpfs"))?;
    // On top of the host's root: it can be relied on to be a directory.
    attach(&root, CWD.as_fd(), "/").map_err(at(Stage::Root, "root"))?;
    if spec.entry.has_directories() {
        match &spec.root {
            Root::Empty => {}
            Root::Host => host(root.as_fd(), spec.trust)?,
            Root::Directory(directory) => take_entries(root.as_fd(), directory, spec.trust)?,
        }
        own_directories(root.as_fd(), spec)?;
    }
    if let Some(session) = &spec.session {
        show(root.as_fd(), session, socket)?;
    }
    pivot(&root)?;
    for (number, (path, copy)) in sealed.into_iter().enumerate() {
        place(number, path, &copy).map_err(at(Stage::Sealed, path.display()))?;
    }
    set_attributes(root.as_fd(), "", READ_ONLY, 0, false).map_err(at(Stage::Root, "read-only"))?;
    let start = if spec.entry.has_directories() { "/tmp" } else { "/" };
    let start = spec.session.as_ref().map_or(Path::new(start), |session| &session.directory);
    rustix::process::chdir(start).map_err(at(Stage::Root, start.display()))?;
    rustix::system::sethostname(b"sandbox").map_err(at(Stage::Root, "hostname"))
}

fn host(root: std::os::fd::BorrowedFd<'_>, trust: bool) -> Result<(), Failure> {
    for name in HOST_BINDS {
        take(root, &Path::new("/").join(name), name, Links::Remade)?;
    }
    make_directory(root, "etc")?;
    for name in ETC_BINDS {
        let (source, inside) = (Path::new("/etc").join(name), format!("etc/{name}"));
        match name {
            "ssl" if trust && source.is_dir() => take_around(root, &source, &inside, &TRUST_PATH[2..])?,
            // A link may lead out of what is bound (localtime).
            _ => take(root, &source, &inside, Links::Followed)?,
        }
    }
    for (name, text) in ETC_FILES {
        let write = || -> io::Result<()> {
            let file = create(root, format!("etc/{name}"), 0o644)?;
            io::Write::write_all(&mut fs::File::from(file), text.as_bytes())
        };
        write().map_err(at(Stage::Root, name))?;
    }
    make_directory(root, "var")?;
    rustix::fs::symlinkat("/tmp", root, "var/tmp").map_err(at(Stage::Root, "var/tmp"))
}

fn take_entries(root: std::os::fd::BorrowedFd<'_>, directory: &Path, trust: bool) -> Result<(), Failure> {
    for (name, source) in entries(directory)? {
        match name.as_str() {
            own if OWN_NAMES.contains(&own) => {}
            "etc" if trust && is_directory(&source) => take_around(root, &source, &name, &TRUST_PATH[1..])?,
            _ => take(root, &source, &name, Links::Remade)?,
        }
    }
    Ok(())
}

fn entries(directory: &Path) -> Result<Vec<(String, std::path::PathBuf)>, Failure> {
    let failed = |error| at(Stage::Root, directory.display())(error);
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        match entry.file_name().into_string() {
            Ok(name) => found.push((name, entry.path())),
            Err(_) => return Err(failed(io::Error::other("a name that is not UTF-8"))),
        }
    }
    Ok(found)
}

/// A directory of the sandbox's own at `name` that shows all of `source`, so that `kept[0]` can be made in it; that is
/// itself such a directory, down to the last name, which is not taken.
fn take_around(root: std::os::fd::BorrowedFd<'_>, source: &Path, name: &str, kept: &[&str]) -> Result<(), Failure> {
    make_directory(root, name)?;
    for (entry, source) in entries(source)? {
        let inside = format!("{name}/{entry}");
        match kept.split_first() {
            Some((first, [])) if entry == *first => {}
            Some((first, rest)) if entry == *first && is_directory(&source) => {
                take_around(root, &source, &inside, rest)?;
            }
            _ => take(root, &source, &inside, Links::Remade)?,
        }
    }
    Ok(())
}

/// A directory, and no link to one: where a link leads is only known inside.
fn is_directory(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.is_dir())
}

/// What becomes of a link.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Links {
    /// It is a link again, to whatever is there in the new root.
    Remade,
    /// What it leads to on the host is shown in its place.
    Followed,
}

/// Shows `source` at `name`, read-only; what is neither file, directory nor link is left out.
fn take(root: std::os::fd::BorrowedFd<'_>, source: &Path, name: &str, links: Links) -> Result<(), Failure> {
    let failed = |error: io::Error| at(Stage::Root, source.display())(error);
    let found = match fs::symlink_metadata(source) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(failed)?,
    };
    if found.is_symlink() && links == Links::Remade {
        let target = fs::read_link(source).map_err(failed)?;
        return rustix::fs::symlinkat(&target, root, name).map_err(|e| failed(e.into()));
    }
    let Ok(found) = fs::metadata(source) else {
        return Ok(());
    };
    if found.is_dir() {
        make_directory(root, name)?;
    } else if found.is_file() {
        create(root, name, 0o644).map_err(failed)?;
    } else {
        return Ok(());
    }
    bind(source, root, name, READ_ONLY).map_err(failed)
}

/// `/dev`, `/proc` and `/tmp`.
fn own_directories(root: std::os::fd::BorrowedFd<'_>, spec: &Spec) -> Result<(), Failure> {
    for name in ["dev", "proc", "tmp"] {
        make_directory(root, name)?;
    }
    for name in DEVICES {
        let inside = format!("dev/{name}");
        create(root, &inside, 0o644)
            .and_then(|_| bind(&Path::new("/").join(&inside), root, &inside, DEVICE))
            .map_err(at(Stage::Root, inside))?;
    }
    for (name, target) in DEVICE_LINKS {
        rustix::fs::symlinkat(target, root, format!("dev/{name}")).map_err(at(Stage::Root, name))?;
    }
    // A size of 0 would mean no limit (tmpfs(5)).
    let bytes = spec.scratch_bytes.max(PAGE_BYTES);
    let inodes = (bytes / PAGE_BYTES).clamp(SCRATCH_INODES_MIN, SCRATCH_INODES_MAX);
    let bytes = if guards::on(Guard::ScratchLimit) { bytes } else { 1 << 40 };
    let scratch = tmpfs(bytes, inodes, "0700", WRITABLE).map_err(at(Stage::Root, "scratch"))?;
    attach(&scratch, root, "tmp").map_err(at(Stage::Root, "tmp"))?;
    rustix::fs::mkdirat(&scratch, ".shm", Mode::from_raw_mode(0o700)).map_err(at(Stage::Root, ".shm"))?;
    match proc() {
        Ok(proc) => attach(&proc, root, "proc").map_err(at(Stage::Root, "proc")),
        // Parts of the container's own /proc are covered, so a fresh one is refused: then none, never the container's.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(()),
        Err(error) => Err(at(Stage::Root, "proc")(error)),
    }
}

/// What a session has besides: its terminal, its directories, the gate's socket.
fn show(root: std::os::fd::BorrowedFd<'_>, session: &Session, socket: Option<OwnedFd>) -> Result<(), Failure> {
    make_directory(root, "dev/pts")?;
    for device in [Path::new("/dev/tty"), &session.terminal] {
        let inside = below_root(device);
        create(root, &inside, 0o644)
            .and_then(|_| bind(device, root, &inside, DEVICE))
            .map_err(at(Stage::Root, device.display()))?;
    }
    let mut shown: Vec<(&Path, MountAttrFlags)> = Vec::new();
    shown.extend(session.read_only.iter().map(|path| (path.as_path(), READ_ONLY)));
    shown.extend(session.writable.iter().chain([&session.directory]).map(|path| (path.as_path(), WRITABLE)));
    // What lies in another comes after it.
    shown.sort_by_key(|(path, _)| path.components().count());
    for (path, attributes) in shown {
        let failed = || at(Stage::Root, path.display());
        let inside = place_for(root, path, path.is_dir())?;
        bind(path, root, &inside, attributes).map_err(failed())?;
    }
    if !session.covered.is_empty() {
        create(root, ".covered", 0).map_err(at(Stage::Root, ".covered"))?;
        for path in &session.covered {
            let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
            let cover = || -> io::Result<()> {
                let empty = open_tree(root, ".covered", flags)?;
                set_attributes(empty.as_fd(), "", READ_ONLY, 0, false)?;
                attach(&empty, root, &below_root(path))
            };
            match cover() {
                // It went meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => other.map_err(at(Stage::Root, path.display()))?,
            }
        }
    }
    if let (Some(path), Some(socket)) = (&session.socket, socket) {
        let failed = || at(Stage::Root, path.display());
        let inside = place_for(root, path, false)?;
        set_attributes(socket.as_fd(), "", READ_ONLY, 0, false).map_err(failed())?;
        attach(&socket, root, &inside).map_err(failed())?;
    }
    Ok(())
}

/// The name of an absolute path as the new root has it.
fn below_root(path: &Path) -> String {
    path.strip_prefix("/").unwrap_or(path).to_string_lossy().into_owned()
}

/// Makes the directories on the way and what is to be covered, where they are not there already.
fn place_for(root: std::os::fd::BorrowedFd<'_>, path: &Path, directory: bool) -> Result<String, Failure> {
    let inside = below_root(path);
    let mut parent = std::path::PathBuf::new();
    for component in Path::new(&inside).parent().into_iter().flat_map(Path::components) {
        parent.push(component);
        make_directory(root, &parent.to_string_lossy())?;
    }
    if directory {
        make_directory(root, &inside)?;
    } else {
        match create(root, &inside, 0o644) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(at(Stage::Root, &inside)(error)),
            _ => {}
        }
    }
    Ok(inside)
}

fn proc() -> io::Result<OwnedFd> {
    let context = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, READ_ONLY | MountAttrFlags::MOUNT_ATTR_NOEXEC)?)
}

fn tmpfs(bytes: u64, inodes: u64, mode: &str, attributes: MountAttrFlags) -> io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "size", bytes.to_string())?;
    fsconfig_set_string(&context, "nr_inodes", inodes.to_string())?;
    fsconfig_set_string(&context, "mode", mode)?;
    fsconfig_create(&context)?;
    Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

fn attach(mount: &OwnedFd, directory: std::os::fd::BorrowedFd<'_>, path: &str) -> io::Result<()> {
    Ok(move_mount(mount, "", directory, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// Binds `source` with all that is mounted below it.
fn bind(
    source: &Path,
    directory: std::os::fd::BorrowedFd<'_>,
    path: &str,
    attributes: MountAttrFlags,
) -> io::Result<()> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(CWD, source, flags)?;
    set_attributes(tree.as_fd(), "", attributes, 0, true)?;
    attach(&tree, directory, path)
}

fn pivot(root: &OwnedFd) -> Result<(), Failure> {
    let run = || -> rustix::io::Result<()> {
        rustix::process::fchdir(root)?;
        // The host's root ends up on top of the new one, at the same place, and is taken off (pivot_root(2), NOTES).
        rustix::process::pivot_root(".", ".")?;
        unmount(".", UnmountFlags::DETACH)?;
        rustix::process::chdir("/")
    };
    run().map_err(at(Stage::Pivot, "pivot_root"))
}

/// Writes a sealed copy and mounts it, read-only, over its path. Links in the path are followed inside the new root.
fn place(number: usize, path: &Path, copy: &OwnedFd) -> io::Result<()> {
    match fs::create_dir(SEALED_DIRECTORY) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let hidden = format!("{SEALED_DIRECTORY}/{number}");
    let file = create(CWD.as_fd(), &hidden, 0o555)?;
    // Reads at offsets of its own: other executions share the description behind this descriptor.
    let mut offset = 0;
    while rustix::fs::sendfile(&file, copy, Some(&mut offset), 1 << 30)? > 0 {}
    drop(file);
    if !fs::metadata(path).is_ok_and(|found| found.is_file()) {
        make_parents(path)?;
        create(CWD.as_fd(), path, 0o555)?;
    }
    let tree = open_tree(CWD, &hidden, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    set_attributes(tree.as_fd(), "", READ_ONLY, 0, false)?;
    let over = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    Ok(move_mount(&tree, "", CWD, path, over)?)
}

fn make_parents(path: &Path) -> io::Result<()> {
    let mut made = std::path::PathBuf::from("/");
    for component in path.parent().into_iter().flat_map(Path::components) {
        if let Component::Normal(name) = component {
            made.push(name);
            match rustix::fs::mkdir(&made, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

fn make_directory(root: std::os::fd::BorrowedFd<'_>, name: &str) -> Result<(), Failure> {
    match rustix::fs::mkdirat(root, name, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(at(Stage::Root, name)(error)),
    }
}

/// A new file with exactly this mode, open for writing.
fn create(directory: std::os::fd::BorrowedFd<'_>, name: impl rustix::path::Arg, mode: u32) -> io::Result<OwnedFd> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = rustix::fs::openat(directory, name, flags, Mode::from_raw_mode(0o600))?;
    rustix::fs::fchmod(&file, Mode::from_raw_mode(mode))?;
    debug_assert_eq!(FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode), FileType::RegularFile);
    Ok(file)
}

/// mount_setattr(2): sets attributes, and the propagation if that is not 0.
fn set_attributes(
    directory: std::os::fd::BorrowedFd<'_>,
    path: &str,
    set: MountAttrFlags,
    propagation: u64,
    recursive: bool,
) -> io::Result<()> {
    #[repr(C)]
    struct MountAttr {
        set: u64,
        clear: u64,
        propagation: u64,
        user_namespace: u64,
    }
    let attributes = MountAttr { set: u64::from(set.bits()), clear: 0, propagation, user_namespace: 0 };
    let path = std::ffi::CString::new(path)?;
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path ends with NUL, and the structure is the kernel's `mount_attr` of the size given.
    let returned = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            directory.as_raw_fd(),
            path.as_ptr(),
            flags,
            &raw const attributes,
            size_of::<MountAttr>(),
        )
    };
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
