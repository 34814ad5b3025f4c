//! The first process of a sandbox: builds the root, confines itself, starts the program, and stays as its reaper.
//!
//! It is single-threaded and talks to the gate over two pipes (`protocol`). Everything that it can do to itself is done
//! before the fork, so that the program inherits it and there is no moment in which it runs with more.
#![allow(unsafe_code)] // fork, waitpid, and descriptors that are known by number.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::process::ExitCode;
use std::ptr;

use super::super::protocol::{CONTROL_FD, Entry, FIRST_SEALED_FD, STATUS_FD, Session, Spec, Stage, Status, read_spec};
use super::{confine, http, root, seccomp};
use crate::guards::{self, Guard};

/// What ends the making, and where.
#[derive(Debug)]
pub struct Failure {
    stage: Stage,
    detail: String,
    source: io::Error,
}

/// Marks an error with the stage and the thing it was about.
pub fn at<E: Into<io::Error>>(stage: Stage, detail: impl ToString) -> impl FnOnce(E) -> Failure {
    move |source| Failure { stage, detail: detail.to_string(), source: source.into() }
}

const PATH: &str = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin";
const DEFAULT_ENVIRONMENT: [(&str, &str); 4] =
    [("PATH", PATH), ("HOME", "/tmp"), ("TMPDIR", "/tmp"), ("LANG", "C.UTF-8")];

pub fn main() -> ExitCode {
    // SAFETY: the spawner laid these two descriptors out for this image, and nothing else here owns them.
    let (mut control, mut status) = unsafe { (File::from_raw_fd(CONTROL_FD), File::from_raw_fd(STATUS_FD)) };
    match prepare(&mut control) {
        Ok(spec) => {
            // The gate may have died before the parent-death signal was set: only its word starts the program.
            let mut go = [0];
            if status.write_all(&Status::Ready.encode()).is_err() || control.read_exact(&mut go).is_err() {
                return ExitCode::FAILURE;
            }
            drop(control);
            start(&spec, status)
        }
        Err(Failure { stage, detail, source }) => {
            let errno = source.raw_os_error().unwrap_or(0);
            let detail = if errno == 0 { format!("{detail}: {source}") } else { detail };
            let _ = status.write_all(&Status::Failed { stage, errno, detail }.encode());
            ExitCode::FAILURE
        }
    }
}

fn prepare(control: &mut File) -> Result<Spec, Failure> {
    confine::hide().map_err(at(Stage::Reaper, "dumpable"))?;
    let spec = read_spec(control).map_err(at(Stage::Spec, "spec"))?;
    #[cfg(feature = "test-guards")]
    guards::set(spec.guards_off);
    #[cfg(feature = "test-guards")]
    confine::show_again();
    let sealed = (FIRST_SEALED_FD..)
        .zip(&spec.sealed)
        // SAFETY: the spawner laid one descriptor out for each sealed path, from this number on.
        .map(|(fd, path)| (path.as_path(), unsafe { OwnedFd::from_raw_fd(fd) }))
        .collect();
    let after_sealed = FIRST_SEALED_FD + i32::try_from(spec.sealed.len()).unwrap_or(i32::MAX - FIRST_SEALED_FD);
    let shows_socket = spec.session.as_ref().is_some_and(|session| session.socket.is_some());
    // SAFETY: the spawner laid the mount out there for a session with a socket.
    let socket = shows_socket.then(|| unsafe { OwnedFd::from_raw_fd(after_sealed) });
    if guards::on(Guard::MountNamespace) {
        root::build(&spec, sealed, socket)?;
    }
    if let Some(session) = &spec.session {
        take_terminal(session)?;
    }
    if guards::on(Guard::ResourceLimits) {
        confine::shared_limits(&spec)?;
    }
    if guards::on(Guard::Capabilities) {
        confine::drop_capabilities()?;
    }
    if guards::on(Guard::DieWithGate) {
        confine::die_with_gate()?;
    }
    if guards::on(Guard::NoNewPrivileges) {
        confine::no_new_privileges()?;
    }
    if guards::on(Guard::Landlock) {
        confine::landlock(&spec)?;
    }
    if guards::on(Guard::Seccomp) {
        let program = seccomp::program(spec.process_memory_bytes.is_some(), spec.session.is_some());
        seccomp::install(&program).map_err(at(Stage::Seccomp, "filter"))?;
    }
    Ok(spec)
}

/// The terminal by the path that it has inside: what is opened again by way of `/proc/self/fd` is then found there too.
fn take_terminal(session: &Session) -> Result<(), Failure> {
    let failed = || at(Stage::Root, session.terminal.display());
    let terminal = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(&session.terminal)
        .map_err(failed())?;
    for target in 0..=2 {
        // SAFETY: the standard streams of this process, which nothing here owns.
        if unsafe { libc::dup2(terminal.as_raw_fd(), target) } < 0 {
            return Err(failed()(io::Error::last_os_error()));
        }
    }
    Ok(())
}

/// Forks. The child comes back from here only if it is an image of this binary; the parent never does.
fn start(spec: &Spec, mut status: File) -> ExitCode {
    let prepared = match Command::prepare(&spec.entry) {
        Ok(prepared) => prepared,
        Err(error) => return exec_failed(&mut status, error.raw_os_error().unwrap_or(libc::EINVAL)),
    };
    let Ok((told, tell)) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC) else {
        return exec_failed(&mut status, libc::EMFILE);
    };
    // SAFETY: this process has one thread, so the child may do anything.
    match unsafe { libc::fork() } {
        -1 => exec_failed(&mut status, io::Error::last_os_error().raw_os_error().unwrap_or(libc::EAGAIN)),
        0 => {
            drop((told, status));
            match prepared {
                None => {
                    drop(tell);
                    if matches!(spec.entry, Entry::Attempts) { attempts(spec) } else { worker(spec) }
                }
                Some(command) => {
                    let error = command.become_program(spec, &tell);
                    let _ = File::from(tell).write_all(&error.to_le_bytes());
                    exit(127)
                }
            }
        }
        child => {
            drop(tell);
            reap(child, told, status)
        }
    }
}

fn exec_failed(status: &mut File, errno: i32) -> ExitCode {
    let _ = status.write_all(&Status::ExecFailed { errno }.encode());
    ExitCode::FAILURE
}

/// The HTTP worker is this image, so nothing is executed, and nothing can be: a second filter sees to it.
fn worker(spec: &Spec) -> ExitCode {
    // A descriptor table of 0, 1 and 2; what the pipes of the start left is closed.
    // SAFETY: nothing here owns a descriptor above 2 any more, or touches it again.
    unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, 0_u32) };
    let limited = confine::program_limits(spec, false).and_then(|()| seccomp::install(&seccomp::no_new_processes()));
    if limited.is_err() {
        return ExitCode::FAILURE;
    }
    http::main()
}

/// The self-test's attempts are this image too, and have what a command has.
fn attempts(spec: &Spec) -> ExitCode {
    confine::fresh_signals();
    if guards::on(Guard::ResourceLimits) && confine::program_limits(spec, true).is_err() {
        return ExitCode::FAILURE;
    }
    // SAFETY: no arguments, as for a command; nothing here owns a descriptor above 2 any more, or touches it again.
    unsafe {
        libc::setsid();
        if guards::on(Guard::CloseDescriptors) {
            libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, 0_u32);
        }
    }
    super::super::attempts::main()
}

/// A command with its strings made, and every place where it may be.
struct Command {
    candidates: Vec<CString>,
    argv: Vec<CString>,
    envp: Vec<CString>,
}

impl Command {
    fn prepare(entry: &Entry) -> io::Result<Option<Self>> {
        let Entry::Command { argv, env } = entry else {
            return Ok(None);
        };
        let text = |text: String| CString::new(text).map_err(io::Error::from);
        let name = argv.first().ok_or(io::ErrorKind::InvalidInput)?;
        let mut env = env.clone();
        for (key, value) in DEFAULT_ENVIRONMENT {
            if !env.iter().any(|(given, _)| given == key) {
                env.push((key.to_owned(), value.to_owned()));
            }
        }
        let path = env.iter().find(|(key, _)| key == "PATH").map_or(PATH, |(_, value)| value);
        let candidates = if name.contains('/') {
            vec![text(name.clone())?]
        } else {
            // An entry of PATH that is not absolute would mean the scratch directory.
            let directories = path.split(':').filter(|directory| directory.starts_with('/'));
            directories.map(|directory| text(format!("{directory}/{name}"))).collect::<Result<_, _>>()?
        };
        Ok(Some(Self {
            candidates,
            argv: argv.iter().cloned().map(text).collect::<Result<_, _>>()?,
            envp: env.into_iter().map(|(key, value)| text(format!("{key}={value}"))).collect::<Result<_, _>>()?,
        }))
    }

    /// Executes, or says with which errno it could not.
    fn become_program(&self, spec: &Spec, tell: &OwnedFd) -> i32 {
        let errno = || io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL);
        let pointers = |strings: &[CString]| -> Vec<_> {
            strings.iter().map(|text| text.as_ptr()).chain([ptr::null()]).collect::<Vec<_>>()
        };
        // Before the limits: under a small one this image, larger than the program may be, could not allocate.
        let (argv, envp) = (pointers(&self.argv), pointers(&self.envp));
        confine::fresh_signals();
        if guards::on(Guard::ResourceLimits)
            && let Err(error) = confine::program_limits(spec, true)
        {
            return error.raw_os_error().unwrap_or(libc::EINVAL);
        }
        // SAFETY: no arguments; a session of its own has no terminal.
        unsafe { libc::setsid() };
        // SAFETY: descriptor 0 is the session's terminal, and the argument is an integer.
        if spec.session.is_some() && unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) } < 0 {
            return errno();
        }
        // Exactly 0, 1 and 2 are left after the exec: all others go now or are marked to go.
        // SAFETY: marks descriptors, closes none.
        if guards::on(Guard::CloseDescriptors)
            && unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) } < 0
        {
            return errno();
        }
        debug_assert!(tell.as_raw_fd() > 2);
        let mut last = libc::ENOENT;
        for candidate in &self.candidates {
            // SAFETY: both arrays end with a null pointer and their strings outlive the call.
            unsafe { libc::execve(candidate.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
            let error = errno();
            // As execvp(3): a name that is not here may be in the next directory.
            if !matches!(error, libc::ENOENT | libc::ENOTDIR) {
                last = error;
            }
        }
        last
    }
}

/// PID 1: waits for the program, tells the gate how it ended, and leaves. The kernel then kills every other process of
/// this PID namespace, whatever sessions and parents they made for themselves (pid_namespaces(7)).
fn reap(program: libc::pid_t, told: OwnedFd, mut status: File) -> ! {
    // The program's ends of its pipes must be the only ones.
    // SAFETY: nothing in this process uses its standard streams.
    unsafe { libc::syscall(libc::SYS_close_range, 0_u32, 2_u32, 0_u32) };
    let mut errno = [0; 4];
    // Nothing comes if the exec succeeds.
    let exec_error = File::from(told).read_exact(&mut errno).is_ok();
    loop {
        let mut wait_status = 0;
        // SAFETY: `wait_status` is written before it is read.
        let ended = unsafe { libc::waitpid(-1, &raw mut wait_status, 0) };
        if ended < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            exit(1);
        }
        if ended != program {
            continue;
        }
        let message = if exec_error {
            Status::ExecFailed { errno: i32::from_le_bytes(errno) }
        } else if libc::WIFSIGNALED(wait_status) {
            Status::Signalled { signal: libc::WTERMSIG(wait_status) }
        } else {
            Status::Exited { code: libc::WEXITSTATUS(wait_status) }
        };
        let _ = status.write_all(&message.encode());
        exit(0);
    }
}

fn exit(code: i32) -> ! {
    // SAFETY: no destructor of this process has anything to do that its end does not do.
    unsafe { libc::_exit(code) }
}
