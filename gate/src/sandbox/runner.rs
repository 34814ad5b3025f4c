//! Starting an execution, carrying its pipes, and bringing it to an end.

use std::ffi::CString;
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until};

use super::namespace::{NamespaceListeners, Ports};
use super::protocol::{self, Spec, Stage, Status};
use super::sealed::SealedStore;
use super::spawner::{self, Child, Request, Spawner};
use super::trust::TrustStore;
use super::worker::root::{ETC_BINDS, HOST_BINDS};
use super::{Completed, Exit, Job, Leaf, Limits, Program, SandboxError};
use crate::egress::kernel::boottime_ns;

mod prepare;
mod session;

use prepare::{check_exposed, open_executable, prepare};

/// How long the pipes of a killed execution may take to close.
const KILL_WAIT: Duration = Duration::from_secs(5);

/// What a runner needs to know.
#[derive(Clone, Debug)]
pub struct RunnerConfig {
    /// First uid and gid outside that an execution may have; none of the range may belong to anything else.
    pub uid_base: u32,
    /// How many executions can run at one time.
    pub uid_count: u32,
    /// The image whose `main` calls `worker::run_if_asked` first: `/proc/self/exe`. Opened now and never again, so
    /// that an upgrade on disk does not change what runs.
    pub executable: PathBuf,
    /// What no root may show: the gate's state, keys and sockets.
    pub protected: Vec<PathBuf>,
}

/// Runs jobs. Clones are the same runner.
#[derive(Clone, Debug)]
pub struct Runner(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    uids: Mutex<Vec<u32>>,
    executable: Arc<OwnedFd>,
    executable_digest: String,
    protected: Vec<PathBuf>,
    sealed: SealedStore,
    trust: TrustStore,
    spawner: Spawner,
}

impl Runner {
    /// Opens and hashes the executable and starts the spawner thread.
    ///
    /// # Errors
    /// A range of uids that reaches root or this process, a protected path that the host root would show, an
    /// executable that cannot be read.
    pub fn new(config: RunnerConfig) -> Result<Self, SandboxError> {
        let RunnerConfig { uid_base, uid_count, executable, protected } = config;
        let own = rustix::process::geteuid().as_raw();
        let range = uid_base..uid_base.checked_add(uid_count).unwrap_or(0);
        if range.is_empty() || range.contains(&0) || range.contains(&own) || range.contains(&protocol::INSIDE_ID) {
            return Err(SandboxError::Config(format!("uids {range:?} are no range that executions can have")));
        }
        let host = HOST_BINDS.iter().map(|name| Path::new("/").join(name));
        for bound in host.chain(ETC_BINDS.iter().map(|name| Path::new("/etc").join(name))) {
            check_exposed(&bound, &protected)?;
        }
        let (executable, digest) = open_executable(&executable).map_err(|e| SandboxError::Io("own executable", e))?;
        Ok(Self(Arc::new(Inner {
            uids: Mutex::new(range.rev().collect()),
            executable: Arc::new(executable),
            executable_digest: format!("sha256:{}", crate::hash::hex(&digest)),
            protected,
            sealed: SealedStore::default(),
            trust: TrustStore::default(),
            spawner: Spawner::start().map_err(|e| SandboxError::Io("spawner thread", e))?,
        })))
    }

    /// `sha256:<hex>` of the executable that HTTP actions run.
    pub fn executable_digest(&self) -> &str {
        &self.0.executable_digest
    }

    /// Runs `job` in `leaf` until it ends, its time is over, it writes too much, or `cancel` is ready. When this
    /// returns, nothing of it runs; the leaf is still there. Dropping the future cancels too, and the end is then
    /// brought about behind it.
    ///
    /// # Errors
    /// [`SandboxError::NotTaken`] for an isolated job: its listeners need someone who serves them ([`Self::run_with`]).
    pub async fn run(
        &self,
        leaf: &Leaf,
        job: Job,
        cancel: impl Future<Output = ()>,
    ) -> Result<Completed, SandboxError> {
        self.run_with(leaf, job, async |_| Err("nobody serves them"), cancel).await
    }

    /// As [`Self::run`]. The listeners of an isolated job are handed to `take`; nothing of the job has run by then, and
    /// nothing will before `take` is done and says `Ok`. It is not called for a job in the shared network. Its time is
    /// part of the job's.
    ///
    /// # Errors
    /// [`SandboxError::NotTaken`] with what `take` says; the listeners are the caller's to close in any case.
    pub async fn run_with<Taken, E>(
        &self,
        leaf: &Leaf,
        job: Job,
        take: impl FnOnce(NamespaceListeners) -> Taken,
        cancel: impl Future<Output = ()>,
    ) -> Result<Completed, SandboxError>
    where
        Taken: Future<Output = Result<(), E>>,
        E: Into<NotTaken>,
    {
        let (stop, stopped) = oneshot::channel::<()>();
        let (offer, offered) = oneshot::channel();
        let (go, may_go) = oneshot::channel();
        let handover = Handover { offer, may_go };
        let (runner, leaf) = (Arc::clone(&self.0), leaf.clone());
        let mut task = tokio::spawn(async move { execute(&runner, &leaf, job, handover, stopped).await });
        let taking = async {
            if let Ok(listeners) = offered.await {
                let _ = go.send(take(listeners).await.map_err(Into::into));
            }
            std::future::pending::<()>().await;
        };
        let ended = tokio::select! {
            ended = &mut task => ended,
            () = cancel => {
                drop(stop);
                task.await
            }
            () = taking => task.await,
        };
        ended.map_err(|e| SandboxError::Io("execution", io::Error::other(e)))?
    }

    /// Whether an isolated execution can be made here: makes a namespace with a listener, and lets it go.
    ///
    /// # Errors
    /// What a job with [`Network::Isolated`](super::Network::Isolated) would meet.
    pub async fn can_isolate(&self, leaf: &Leaf) -> Result<(), SandboxError> {
        let uid = Uid::take(&self.0)?;
        let ports = Ports::of(super::Network::Isolated { tcp_port: 1, udp_base: Some(1), udp_slots: 1 })?;
        // Its end of these tells the child that the gate is there.
        let (_ours, descriptors) = pipes().map_err(|e| SandboxError::Io("pipes", e))?;
        let child = spawn(&self.0, leaf, descriptors, (uid.id, uid.id), None, ports).await?;
        child.kill();
        spawner::collect(&child);
        Ok(())
    }
}

type NotTaken = Box<dyn std::error::Error + Send + Sync>;

/// The listeners' way to the caller, and the caller's word.
struct Handover {
    offer: oneshot::Sender<NamespaceListeners>,
    may_go: oneshot::Receiver<Result<(), NotTaken>>,
}

impl Handover {
    /// Waits for the caller's word. `Some`: what ended the execution first.
    async fn give(
        self,
        listeners: NamespaceListeners,
        deadline: Instant,
        stopped: &mut oneshot::Receiver<()>,
    ) -> Result<Option<Exit>, SandboxError> {
        // A caller that is gone takes neither this nor the word: cancelled.
        let _ = self.offer.send(listeners);
        tokio::select! {
            biased;
            _ = stopped => Ok(Some(Exit::Cancelled)),
            word = self.may_go => match word {
                Ok(Ok(())) => Ok(None),
                Ok(Err(why)) => Err(SandboxError::NotTaken(why)),
                Err(_) => Ok(Some(Exit::Cancelled)),
            },
            () = sleep_until(deadline) => Ok(Some(Exit::TimedOut)),
        }
    }
}

/// An uid of the range, given back when it goes; kept from reuse for ever if its execution would not die.
struct Uid<'a> {
    inner: &'a Inner,
    id: u32,
    reusable: bool,
}

impl<'a> Uid<'a> {
    fn take(inner: &'a Inner) -> Result<Self, SandboxError> {
        let id = inner.uids.lock().unwrap_or_else(PoisonError::into_inner).pop().ok_or(SandboxError::NoUid)?;
        Ok(Self { inner, id, reusable: true })
    }
}

impl Drop for Uid<'_> {
    fn drop(&mut self) {
        if self.reusable {
            self.inner.uids.lock().unwrap_or_else(PoisonError::into_inner).push(self.id);
        }
    }
}

/// The gate's ends of the five pipes.
struct Pipes {
    stdin: pipe::Sender,
    stdout: pipe::Receiver,
    stderr: pipe::Receiver,
    control: pipe::Sender,
    status: pipe::Receiver,
}

/// The gate's ends, and the child's in the order of its descriptors.
fn pipes() -> io::Result<(Pipes, Vec<OwnedFd>)> {
    let make = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
    let (stdin, stdout, stderr, control, status) = (make()?, make()?, make()?, make()?, make()?);
    let theirs = vec![stdin.0, stdout.1, stderr.1, control.0, status.1];
    let ours = Pipes {
        stdin: pipe::Sender::from_owned_fd(stdin.1)?,
        stdout: pipe::Receiver::from_owned_fd(stdout.0)?,
        stderr: pipe::Receiver::from_owned_fd(stderr.0)?,
        control: pipe::Sender::from_owned_fd(control.1)?,
        status: pipe::Receiver::from_owned_fd(status.0)?,
    };
    Ok((ours, theirs))
}

/// A child in the leaf that waits for its spec.
async fn spawn(
    inner: &Inner,
    leaf: &Leaf,
    descriptors: Vec<OwnedFd>,
    outside: (u32, u32),
    tree: Option<CString>,
    network: Option<Ports>,
) -> Result<Child, SandboxError> {
    let (reply, made) = oneshot::channel();
    let leaf = leaf.directory().try_clone_to_owned().map_err(|e| SandboxError::Io("leaf", e))?;
    let executable = Arc::clone(&inner.executable);
    inner.spawner.send(Request { leaf, executable, descriptors, outside, tree, network, reply })?;
    made.await.map_err(|_| SandboxError::SpawnerGone)?
}

async fn execute(
    inner: &Arc<Inner>,
    leaf: &Leaf,
    job: Job,
    handover: Handover,
    mut stopped: oneshot::Receiver<()>,
) -> Result<Completed, SandboxError> {
    let started = Instant::now();
    let Job { program, stdin, limits, network, trust_pem } = job;
    let deadline = started + limits.timeout;
    let ports = Ports::of(network)?;
    let mut uid = Uid::take(inner)?;
    let prepared = match program {
        Program::HttpWorker | Program::Attempts => prepare(inner, program, None)?,
        Program::Command { .. } => {
            let inner = Arc::clone(inner);
            tokio::task::spawn_blocking(move || prepare(&inner, program, trust_pem))
                .await
                .map_err(|e| SandboxError::Io("sealed copies", io::Error::other(e)))??
        }
    };
    // One more for the reaper.
    let memory_held = leaf.limit(limits.memory_bytes, limits.processes.saturating_add(1))?;
    let (ours, mut descriptors) = pipes().map_err(|e| SandboxError::Io("pipes", e))?;
    let own = |fd: &OwnedFd| fd.try_clone().map_err(|e| SandboxError::Io("descriptors", e));
    for (_, copy) in &prepared.sealed {
        descriptors.push(own(&copy.file)?);
    }
    let spec = Spec {
        entry: prepared.entry,
        root: prepared.root,
        sealed_bytes: prepared.sealed.iter().map(|(_, copy)| copy.bytes.saturating_add(4096)).sum(),
        sealed: prepared.sealed.into_iter().map(|(path, _)| path).collect(),
        trust: prepared.trust,
        scratch_bytes: limits.scratch_bytes,
        processes: limits.processes,
        process_memory_bytes: (!memory_held).then_some(limits.memory_bytes),
        session: None,
        #[cfg(feature = "test-guards")]
        guards_off: crate::guards::bits(),
    };
    let spec = protocol::encode_spec(&spec).map_err(|e| SandboxError::Io("spec", e))?;

    let mut child = spawn(inner, leaf, descriptors, (uid.id, uid.id), None, ports).await?;

    // From here on the uid goes back only when the leaf is known to be empty.
    uid.reusable = false;
    let begun = match child.listeners.take() {
        Some(listeners) => handover.give(listeners, deadline, &mut stopped).await,
        None => Ok(None),
    };
    let carried = match (begun, child.watch()) {
        (Ok(None), Ok(watched)) => {
            carry(leaf, &child, &watched, ours, &spec, &stdin, &limits, deadline, &mut stopped).await
        }
        (Ok(Some(exit)), _) => Ok(Carried::nothing(exit)),
        (Err(error), _) => Err(error),
        (_, Err(error)) => Err(SandboxError::Io("pidfd", error)),
    };
    child.kill();
    let blocking = leaf.clone();
    let emptied = if leaf.is_populated()? {
        tokio::task::spawn_blocking(move || blocking.kill())
            .await
            .map_err(|e| SandboxError::Io("kill", io::Error::other(e)))?
    } else {
        Ok(())
    };
    emptied?;
    spawner::collect(&child);
    uid.reusable = true;
    let Carried { forced, killed_ns, stdout, stderr, stderr_truncated, statuses } = carried?;

    let exit = match forced {
        Some(exit) => exit,
        None => exit_of(&statuses)?,
    };
    let module_digest = prepared.module_digest;
    Ok(Completed { exit, stdout, stderr, stderr_truncated, duration: started.elapsed(), killed_ns, module_digest })
}

struct Carried {
    /// An end that the gate brought about.
    forced: Option<Exit>,
    killed_ns: Option<u64>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    stderr_truncated: bool,
    statuses: Vec<Status>,
}

impl Carried {
    /// Of an execution that ended before anything of it ran.
    const fn nothing(exit: Exit) -> Self {
        Self {
            forced: Some(exit),
            killed_ns: None,
            stdout: Vec::new(),
            stderr: Vec::new(),
            stderr_truncated: false,
            statuses: Vec::new(),
        }
    }
}

/// Moves bytes until every pipe is closed and the first process is gone.
#[allow(clippy::too_many_arguments)]
async fn carry(
    leaf: &Leaf,
    child: &Child,
    watched: &AsyncFd<OwnedFd>,
    pipes: Pipes,
    spec: &[u8],
    stdin: &[u8],
    limits: &Limits,
    deadline: Instant,
    stopped: &mut oneshot::Receiver<()>,
) -> Result<Carried, SandboxError> {
    let Pipes { stdin: input, stdout, stderr, mut control, status } = pipes;
    let (overflow, overflowed) = oneshot::channel::<()>();
    let (ready, is_ready) = oneshot::channel::<()>();

    let talk = async {
        // A child that failed has closed its end: the status says why.
        if control.write_all(b"m").await.is_ok() && control.write_all(spec).await.is_ok() && is_ready.await.is_ok() {
            let _ = control.write_all(b"g").await;
        }
        drop(control);
    };
    let feed = async {
        let mut input = input;
        // A program need not read its input.
        let _ = input.write_all(stdin).await;
    };
    let output = async {
        let (bytes, whole) = read_to(stdout, limits.stdout_bytes, false).await;
        if !whole {
            let _ = overflow.send(());
        }
        bytes
    };
    let errors = read_to(stderr, limits.stderr_bytes, true);
    let all = async {
        tokio::join!(talk, feed, output, errors, statuses(status, ready), async {
            let _ = watched.readable().await;
        })
    };
    let (mut all, mut overflowed) = (pin!(all), pin!(overflowed));
    let (mut forced, mut killed_ns, mut give_up) = (None, None, None);
    loop {
        let why = tokio::select! {
            biased;
            ((), (), stdout, (stderr, whole), statuses, ()) = &mut all => {
                return Ok(Carried { forced, killed_ns, stdout, stderr, stderr_truncated: !whole, statuses });
            }
            Ok(()) = &mut overflowed, if forced.is_none() => Exit::OutputTooLarge,
            _ = &mut *stopped, if forced.is_none() => Exit::Cancelled,
            () = sleep_until(deadline), if forced.is_none() => Exit::TimedOut,
            () = async { sleep_until(give_up.unwrap_or(deadline)).await }, if give_up.is_some() => {
                return Err(super::CgroupError::StillPopulated(leaf.path().to_owned()).into());
            }
        };
        forced = Some(why);
        killed_ns = Some(boottime_ns());
        give_up = Some(Instant::now() + KILL_WAIT);
        child.kill();
        leaf.signal_kill()?;
    }
}

/// Reads to the end or the limit, and says whether that was all. Past the limit the rest is dropped if `drain`, else
/// the pipe is left.
async fn read_to(mut from: pipe::Receiver, limit: u64, drain: bool) -> (Vec<u8>, bool) {
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let (mut kept, mut whole) = (Vec::new(), true);
    let mut chunk = vec![0; 16 << 10];
    loop {
        let piece = match from.read(&mut chunk).await {
            Ok(read) => chunk.get(..read).unwrap_or_default(),
            Err(_) => &[],
        };
        if piece.is_empty() {
            return (kept, whole);
        }
        let room = limit - kept.len();
        if let Some(fits) = piece.get(..room.min(piece.len())) {
            kept.extend_from_slice(fits);
        }
        if piece.len() > room {
            whole = false;
            if !drain {
                return (kept, whole);
            }
        }
    }
}

/// Collects what the first process says; what is no message ends the talk and counts as no word at all.
async fn statuses(mut from: pipe::Receiver, ready: oneshot::Sender<()>) -> Vec<Status> {
    let (mut got, mut buffer, mut ready) = (Vec::new(), Vec::new(), Some(ready));
    let mut chunk = [0; 1024];
    while let Ok(read @ 1..) = from.read(&mut chunk).await {
        buffer.extend_from_slice(chunk.get(..read).unwrap_or_default());
        while let Some(status) = Status::take(&mut buffer) {
            match (status, ready.take()) {
                (Some(Status::Ready), Some(ready)) => {
                    let _ = ready.send(());
                }
                (Some(status), kept) => {
                    ready = kept;
                    got.push(status);
                }
                (None, _) => return got,
            }
        }
    }
    got
}

fn exit_of(statuses: &[Status]) -> Result<Exit, SandboxError> {
    match statuses.first() {
        Some(Status::Exited { code }) => Ok(Exit::Code(*code)),
        Some(Status::Signalled { signal }) => Ok(Exit::Signal(*signal)),
        Some(Status::ExecFailed { errno }) => Err(SandboxError::Exec { source: io::Error::from_raw_os_error(*errno) }),
        Some(Status::Failed { stage, errno, detail }) => Err(SandboxError::Setup {
            stage: *stage,
            detail: detail.clone(),
            source: io::Error::from_raw_os_error(*errno),
        }),
        Some(Status::Ready) => Err(SandboxError::Setup {
            stage: Stage::Reaper,
            detail: "ready twice".into(),
            source: io::ErrorKind::InvalidData.into(),
        }),
        // The first process went without a word: it was killed with the rest, by the memory limit or from outside.
        None => Ok(Exit::Signal(libc::SIGKILL)),
    }
}

#[cfg(test)]
mod tests;
