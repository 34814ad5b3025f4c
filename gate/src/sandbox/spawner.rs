//! The thread that makes the children.
//!
//! The parent-death signal follows the *thread* that made a child, not its process (prctl(2), PR_SET_PDEATHSIG): a
//! child made from a worker thread of the runtime would die with that worker. So one thread makes them all and lives as
//! long as the runner.
#![allow(unsafe_code)] // clone3 and what its child does before it executes: no safe interface reaches there.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, waitid};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

use super::SandboxError;
use super::namespace::{self, NamespaceListeners, Ports};
use super::protocol::{CONTROL_FD, INSIDE_ID, STATUS_FD, Stage, Status};
use crate::guards::{self, Guard};

/// `argv[0]` again, as the kernel takes it; a test holds the two together.
const INIT_ARGUMENT: &CStr = c"latchgate-sandbox-init";

/// Flags of linux/sched.h above 32 bits (the libc crate has them as a C int, where they are lost).
const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// `close_range` to the last descriptor there can be.
const LAST_FD: u32 = u32::MAX;

/// One child to be made.
#[derive(Debug)]
pub struct Request {
    /// The leaf's directory.
    pub leaf: OwnedFd,
    /// What it becomes: an image of this binary.
    pub executable: Arc<OwnedFd>,
    /// Its descriptors 0, 1, 2, … in order. Closed on this side once the child has them.
    pub descriptors: Vec<OwnedFd>,
    /// The uid and gid outside.
    pub outside: (u32, u32),
    /// A path of the gate's, of which the child has a detached mount as the descriptor after its others.
    pub tree: Option<CString>,
    /// A network namespace of its own, with the gate's sockets on these.
    pub network: Option<Ports>,
    pub reply: oneshot::Sender<Result<Child, SandboxError>>,
}

/// A child that waits for a byte on its control pipe. Its exit status is the receiver's to collect.
#[derive(Debug)]
pub struct Child {
    pub pidfd: OwnedFd,
    /// The gate's sockets in its network namespace, if it has one.
    pub listeners: Option<NamespaceListeners>,
}

impl Child {
    /// Readable when the child is gone (pidfd_open(2)). Needs a running runtime.
    pub fn watch(&self) -> io::Result<AsyncFd<OwnedFd>> {
        let pidfd = self.pidfd.try_clone()?;
        // SAFETY: the value owns its descriptor, always names the same one, and is closed only after deregistration.
        Ok(unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?)
    }

    pub fn kill(&self) {
        // The only error is that it is gone already.
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}

#[derive(Clone, Debug)]
pub struct Spawner {
    requests: Sender<Request>,
}

impl Spawner {
    pub fn start() -> io::Result<Self> {
        let (requests, queue) = channel();
        std::thread::Builder::new().name("sandbox-spawner".into()).spawn(move || serve(&queue))?;
        Ok(Self { requests })
    }

    pub fn send(&self, request: Request) -> Result<(), SandboxError> {
        self.requests.send(request).map_err(|_| SandboxError::SpawnerGone)
    }
}

fn serve(queue: &Receiver<Request>) {
    while let Ok(Request { leaf, executable, descriptors, outside, tree, network, reply }) = queue.recv() {
        let made = spawn(&leaf, &executable, &descriptors, outside, tree.as_deref(), network);
        drop(descriptors);
        if let Err(Ok(child)) = reply.send(made) {
            child.kill();
            collect(&child);
        }
    }
}

/// Reaps a child that is dead or dying.
pub fn collect(child: &Child) {
    while let Err(rustix::io::Errno::INTR) = waitid(WaitId::PidFd(child.pidfd.as_fd()), WaitIdOptions::EXITED) {}
}

fn setup_error(stage: Stage, detail: &str, source: io::Error) -> SandboxError {
    SandboxError::Setup { stage, detail: detail.to_owned(), source }
}

/// All that the child needs before it executes, made beforehand: it must not allocate.
struct Layout<'a> {
    /// Descriptors above every target, in the order of the targets.
    sources: &'a [RawFd],
    executable: RawFd,
    /// Null: none.
    tree: *const libc::c_char,
    argv: [*const libc::c_char; 2],
    envp: [*const libc::c_char; 1],
}

fn spawn(
    leaf: &OwnedFd,
    executable: &OwnedFd,
    descriptors: &[OwnedFd],
    outside: (u32, u32),
    tree: Option<&CStr>,
    network: Option<Ports>,
) -> Result<Child, SandboxError> {
    let in_clone = |source| setup_error(Stage::Clone, "descriptors", source);
    let count = RawFd::try_from(descriptors.len()).map_err(|e| in_clone(io::Error::other(e)))?;
    // Sources that lie above all targets cannot be overwritten while the targets are filled.
    let raise = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd, count + 2).map_err(|e| in_clone(e.into()));
    let raised = descriptors.iter().map(raise).collect::<Result<Vec<_>, _>>()?;
    let raised_executable = raise(executable)?;
    let sources: Vec<RawFd> = raised.iter().map(AsRawFd::as_raw_fd).collect();
    let layout = Layout {
        sources: &sources,
        executable: raised_executable.as_raw_fd(),
        tree: tree.map_or(ptr::null(), CStr::as_ptr),
        argv: [INIT_ARGUMENT.as_ptr(), ptr::null()],
        envp: [ptr::null()],
    };

    let mut namespaces = libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    if guards::on(Guard::UserNamespace) {
        namespaces |= libc::CLONE_NEWUSER;
    }
    if guards::on(Guard::PidNamespace) {
        namespaces |= libc::CLONE_NEWPID;
    }
    let namespaces = namespaces | if network.is_some() { libc::CLONE_NEWNET } else { 0 };
    // SAFETY: `become_init` makes bare system calls only and never returns; it runs once, in the child.
    let cloned = unsafe { clone_with(namespaces as u64, Some(leaf.as_fd()), || become_init(&layout)) };
    let (pid, pidfd) = cloned.map_err(|e| setup_error(Stage::Clone, "clone3", e))?;
    let mut child = Child { pidfd, listeners: None };
    let made = map_ids(pid, outside).map_err(|e| setup_error(Stage::IdMap, "uid_map, gid_map", e)).and_then(|()| {
        child.listeners = network.map(|ports| namespace::listen(&child, ports)).transpose()?;
        Ok(())
    });
    match made {
        Ok(()) => Ok(child),
        Err(error) => {
            child.kill();
            collect(&child);
            Err(error)
        }
    }
}

/// Makes a child with these `CLONE_NEW…` flags, in `cgroup` or in the cgroup of this process. It runs `in_child`
/// and ends.
///
/// # Safety
/// This process has threads, which the child does not have: `in_child` must make system calls only, and neither
/// allocate nor take a lock.
pub(super) unsafe fn clone_with(
    namespaces: u64,
    cgroup: Option<BorrowedFd<'_>>,
    in_child: impl FnOnce(),
) -> io::Result<(Pid, OwnedFd)> {
    let mut pidfd: RawFd = -1;
    // The gate's signal handlers must not run in the child: they would write to the gate's own pipes.
    let flags = namespaces | libc::CLONE_PIDFD as u64 | CLONE_CLEAR_SIGHAND;
    let mut args = libc::clone_args {
        flags: flags | if cgroup.is_some() { CLONE_INTO_CGROUP } else { 0 },
        pidfd: ptr::from_mut(&mut pidfd) as u64,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: libc::SIGCHLD as u64,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: cgroup.map_or(0, |directory| directory.as_raw_fd() as u64),
    };
    // SAFETY: `args` is a valid clone_args of the size given; without CLONE_VM the child has a copy of this address
    // space and stack, as after fork, and `pidfd` is written here before the call returns.
    let returned = unsafe { libc::syscall(libc::SYS_clone3, ptr::from_mut(&mut args), size_of::<libc::clone_args>()) };
    if returned == 0 {
        in_child();
        // SAFETY: an integer only.
        unsafe { libc::_exit(70) }
    }
    if returned < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: CLONE_PIDFD succeeded, so this is a fresh descriptor that nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    let pid = i32::try_from(returned).ok().and_then(Pid::from_raw).ok_or_else(|| io::Error::other("no pid"))?;
    Ok((pid, pidfd))
}

/// One uid and one gid, and no others, exist in the child's user namespace (user_namespaces(7)).
fn map_ids(pid: Pid, (uid, gid): (u32, u32)) -> io::Result<()> {
    if !guards::on(Guard::UserNamespace) {
        return Ok(());
    }
    let directory = format!("/proc/{}", pid.as_raw_nonzero());
    // When memory is short, a sandbox goes before the gate does. Not being able to say so is no reason to stop.
    let _ = fs::write(format!("{directory}/oom_score_adj"), "1000");
    fs::write(format!("{directory}/gid_map"), format!("{INSIDE_ID} {gid} 1\n"))?;
    fs::write(format!("{directory}/uid_map"), format!("{INSIDE_ID} {uid} 1\n"))
}

/// The child's way from clone3 to the second image.
///
/// # Safety
/// To be called once, in the fresh child, with descriptors and pointers that are valid there.
unsafe fn become_init(layout: &Layout<'_>) -> ! {
    // SAFETY: system calls with integers and with pointers to locals or to `layout`, which this copy of the address
    // space keeps; nothing allocates, locks or unwinds. libc::syscall, not the wrappers: glibc's setres*id would signal
    // threads that this process does not have.
    unsafe {
        let count = layout.sources.len();
        let mut target = 0;
        while target < count {
            if libc::syscall(libc::SYS_dup3, *layout.sources.as_ptr().add(target), target, 0) < 0 {
                libc::syscall(libc::SYS_exit_group, 70);
            }
            target += 1;
        }
        // After all that the child keeps, a mount that is still to be opened among them.
        let image = if layout.tree.is_null() { count } else { count + 1 };
        check(Stage::Image, libc::syscall(libc::SYS_dup3, layout.executable, image, libc::O_CLOEXEC));
        // Before anything blocks: a copy of another child's control pipe, held here, would hide the gate's death from it.
        if guards::on(Guard::CloseDescriptors) {
            check(Stage::Image, libc::syscall(libc::SYS_close_range, image as u32 + 1, LAST_FD, 0));
        }

        let none = 0_u64;
        check(
            Stage::Image,
            libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, ptr::from_ref(&none), 0_usize, size_of::<u64>()),
        );
        die_with_gate();

        let mut mapped = 0_u8;
        let read = loop {
            let read = libc::syscall(libc::SYS_read, CONTROL_FD, ptr::from_mut(&mut mapped), 1_usize);
            if read >= 0 || *libc::__errno_location() != libc::EINTR {
                break read;
            }
        };
        if read != 1 {
            libc::syscall(libc::SYS_exit_group, 0);
        }

        if !layout.tree.is_null() {
            // While it has the gate's own uid: nobody else finds the way there. It gets the lowest free number, and all
            // below the one that is made free are taken.
            libc::syscall(libc::SYS_close, count);
            check(Stage::Root, libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, layout.tree, libc::OPEN_TREE_CLONE));
        }
        if guards::on(Guard::UserNamespace) {
            check(Stage::Identity, libc::syscall(libc::SYS_setgroups, 0_usize, ptr::null::<libc::gid_t>()));
            check(Stage::Identity, libc::syscall(libc::SYS_setresgid, INSIDE_ID, INSIDE_ID, INSIDE_ID));
            // No uid is 0 in the new namespace, so this change of uid clears no capability (capabilities(7)).
            check(Stage::Identity, libc::syscall(libc::SYS_setresuid, INSIDE_ID, INSIDE_ID, INSIDE_ID));
            keep_across_exec();
        }
        die_with_gate();

        libc::syscall(
            libc::SYS_execveat,
            image,
            c"".as_ptr(),
            layout.argv.as_ptr(),
            layout.envp.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
        check(Stage::Image, -1);
        libc::_exit(70)
    }
}

/// Tells the gate of a call that failed, and ends.
///
/// # Safety
/// In the child, with the status pipe in its place.
unsafe fn check(stage: Stage, returned: libc::c_long) {
    if returned < 0 {
        // SAFETY: errno is this thread's own, and the message is on the stack.
        unsafe {
            let message = Status::bare_failure(stage, *libc::__errno_location());
            libc::syscall(libc::SYS_write, STATUS_FD, message.as_ptr(), message.len());
            libc::syscall(libc::SYS_exit_group, 70);
        }
    }
}

/// # Safety
/// In the child.
unsafe fn die_with_gate() {
    if !guards::on(Guard::DieWithGate) {
        return;
    }
    // SAFETY: integers only.
    unsafe { check(Stage::Identity, libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0)) }
}

/// Capability numbers of linux/capability.h.
const CAP_SETPCAP: u32 = 8;
const CAP_SYS_ADMIN: u32 = 21;

/// Puts the two capabilities that the second image needs, of the child's own user namespace, into its ambient set.
///
/// # Safety
/// In the child.
unsafe fn keep_across_exec() {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    const KEPT: u32 = 1 << CAP_SETPCAP | 1 << CAP_SYS_ADMIN;
    let header = Header { version: VERSION_3, pid: 0 };
    let data = [
        Data { effective: KEPT, permitted: KEPT, inheritable: KEPT },
        Data { effective: 0, permitted: 0, inheritable: 0 },
    ];
    // SAFETY: the two structures are the kernel's (capget(2)), the version-3 array has two elements.
    unsafe {
        check(Stage::Identity, libc::syscall(libc::SYS_capset, ptr::from_ref(&header), data.as_ptr()));
        for capability in [CAP_SETPCAP, CAP_SYS_ADMIN] {
            check(
                Stage::Identity,
                libc::syscall(libc::SYS_prctl, libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, capability, 0, 0),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_of_the_marker_agree() {
        assert_eq!(INIT_ARGUMENT.to_str(), Ok(crate::sandbox::protocol::INIT_NAME));
    }
}
