//! A writable view of this process's own cgroup where the one that is mounted cannot be written to.
//!
//! A container's `/sys/fs/cgroup` is read-only. That is a property of the mount, and no right of the gate's: the
//! directories below belong to its uid. A child of the gate makes user, mount and cgroup namespaces of its own, in which it
//! may mount the hierarchy (its root is then the cgroup that the child is in, and so the gate's), opens that, sends the
//! descriptor and is gone. The mount is attached nowhere: no path shows it, to nobody.
#![allow(unsafe_code)] // the child of a threaded process.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::cmsg_space;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

use super::directory::Directory;
use crate::sandbox::spawner;

/// Why there is none.
#[derive(Debug)]
pub struct NoView {
    step: &'static str,
    source: io::Error,
}

impl fmt::Display for NoView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is refused: {}", self.step, self.source)
    }
}

/// What the helper was at when it failed, by its number in the message.
const STEPS: [&str; 4] = ["fsopen(cgroup2)", "fsconfig(cgroup2)", "fsmount(cgroup2)", "opening the mounted cgroup"];

/// 0 or a step from 1, errno.
const MESSAGE_BYTES: usize = 5;

/// The cgroup of this process, writable as far as its owner may write.
pub fn own_cgroup() -> Result<Directory, NoView> {
    let failed = |step| move |source: Errno| NoView { step, source: source.into() };
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(failed("a channel to a helper"))?;
    let namespaces = libc::CLONE_NEWUSER | libc::CLONE_NEWNS | libc::CLONE_NEWCGROUP;
    let in_child = || help(theirs.as_fd());
    // SAFETY: `help` makes system calls only, allocates nothing and never returns.
    let (_, pidfd) = unsafe { spawner::clone_with(namespaces as u64, None, in_child) }
        .map_err(|source| NoView { step: "clone3 with user, mount and cgroup namespaces", source })?;
    let helper = spawner::Child { pidfd, listeners: None };
    drop(theirs);
    let received = receive(&ours);
    helper.kill();
    spawner::collect(&helper);
    received.map(Directory::without_path)
}

/// The helper's whole life. rustix's calls on Linux are bare system calls with their arguments on the stack.
fn help(channel: BorrowedFd<'_>) -> ! {
    // SAFETY: integers only.
    unsafe { libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) };
    let _ = match mount() {
        Ok(directory) => send(channel, [0; MESSAGE_BYTES], Some(directory.as_fd())),
        Err((step, errno)) => {
            let [a, b, c, d] = errno.raw_os_error().to_le_bytes();
            send(channel, [step, a, b, c, d], None)
        }
    };
    // SAFETY: an integer only. Nothing of the gate's state, of which this is a copy, is to be dropped.
    unsafe {
        libc::syscall(libc::SYS_exit_group, 0);
        libc::_exit(0)
    }
}

fn mount() -> Result<OwnedFd, (u8, Errno)> {
    let context = fsopen(c"cgroup2", FsOpenFlags::FSOPEN_CLOEXEC).map_err(|errno| (1, errno))?;
    fsconfig_create(&context).map_err(|errno| (2, errno))?;
    let attributes =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(|errno| (3, errno))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(&mount, c".", flags, Mode::empty()).map_err(|errno| (4, errno))
}

fn send(channel: BorrowedFd<'_>, message: [u8; MESSAGE_BYTES], directory: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let rights = directory.map(|directory| [directory]);
    if let Some(rights) = &rights
        && !control.push(SendAncillaryMessage::ScmRights(rights))
    {
        return Err(Errno::NOBUFS);
    }
    sendmsg(channel, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL).map(drop)
}

fn receive(channel: &OwnedFd) -> Result<OwnedFd, NoView> {
    let ended = |source: io::Error| NoView { step: "the word of a helper", source };
    let mut message = [0; MESSAGE_BYTES];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = loop {
        match recvmsg(channel, &mut [IoSliceMut::new(&mut message)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            other => break other.map_err(|errno| ended(errno.into()))?,
        }
    };
    let mut directory = None;
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            directory = rights.into_iter().next();
        }
    }
    let [step, a, b, c, d] = message;
    match (got.bytes, step, directory) {
        (MESSAGE_BYTES, 0, Some(directory)) => Ok(directory),
        (MESSAGE_BYTES, step, _) => match step.checked_sub(1).and_then(|index| STEPS.get(usize::from(index))) {
            Some(step) => Err(NoView { step, source: io::Error::from_raw_os_error(i32::from_le_bytes([a, b, c, d])) }),
            None => Err(ended(io::ErrorKind::InvalidData.into())),
        },
        _ => Err(ended(io::ErrorKind::UnexpectedEof.into())),
    }
}

#[cfg(test)]
mod tests;
