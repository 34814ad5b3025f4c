//! One session, from the request to its receipt.

use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixListener;
use tokio::sync::{oneshot, watch};

use super::frame::{Frame, Outbox};
use super::record::{self, Ended, Intended};
use super::{Asked, HeldProfile};
use crate::auth::peer;
use crate::config;
use crate::egress::flows::Owner;
use crate::egress::profile::EntryProtocol;
use crate::executions::Registered;
use crate::gate::{Gate, Readiness, Running};
use crate::pipeline::dispatch::{self, EgressEvidence, Held, Hold, PROXY_VARIABLES};
use crate::pipeline::{Ids, Refusal};
use crate::sandbox::session::{Device, Size};
use crate::sandbox::{Exit, Leaf, Network, SandboxError, SessionJob, SessionSocket, Terminal};
use crate::server::listen::{Bound, ListenerIdentity, Peer};
use crate::server::{self, ConnectionLimits};

/// What a program has between SIGHUP and the end, when its client went away or the gate is stopping.
const HANGUP_GRACE: Duration = Duration::from_secs(5);
/// What the program left on its terminal is read for so long.
const LAST_OUTPUT: Duration = Duration::from_secs(2);
/// What the program does not read in this time is lost: behind it come signals, and the end of the client.
const INPUT_PATIENCE: Duration = Duration::from_secs(30);
/// How often a session looks whether the gate is stopping.
const DRAIN_PERIOD: Duration = Duration::from_millis(200);
/// Connections that one session may have to the gate at one time.
const MAX_CONNECTIONS: usize = 256;
/// Variables of the client that say how to reach or configure the gate as an operator.
const OPERATORS_OWN: [&str; 2] = ["LATCHGATE_OPERATOR_", "LATCHGATE_CONFIG__"];
/// Signals that a client may pass on.
const SIGNALS: [Signal; 7] =
    [Signal::HUP, Signal::INT, Signal::QUIT, Signal::TERM, Signal::USR1, Signal::USR2, Signal::CONT];

/// A request that can be carried out.
pub struct Planned {
    pub(super) profile_name: String,
    pub(super) profile: HeldProfile,
    pub(super) listener: config::Listener,
    pub(super) principal: String,
    pub(super) argv: Vec<String>,
    pub(super) directory: PathBuf,
    pub(super) operator: String,
    pub(super) operator_jkt: String,
    environment: Vec<(String, String)>,
    identity: Option<(u32, u32)>,
    size: Size,
    echo: bool,
}

impl Planned {
    /// What stands where an action has its lease: no lease was used, an operator asked.
    pub(super) fn lease_jti(&self) -> String {
        format!("operator:{}", self.operator)
    }
}

/// Judges a request. What it gives is to be run with the connection that the client has then.
///
/// # Errors
/// [`Refusal`] for an unknown profile or listener, a directory that cannot be shown, or a gate that is stopping, full or not
/// ready: what could not be held, or recorded, is not begun.
pub fn begin(gate: &Arc<Gate>, asked: Asked, operator: (&str, &str), peer: Peer) -> Result<Ready, Refusal> {
    let invalid = |message: String| Refusal::InvalidRequest { message };
    let place = Arc::clone(&gate.sessions).try_acquire_owned().map_err(|_| Refusal::Busy)?;
    let running = gate.enter().ok_or(Refusal::Busy)?;
    // After it is counted: a drain that began meanwhile either sees it or is seen here.
    if gate.is_draining() {
        return Err(Refusal::Draining);
    }
    if let Readiness::NotReady(reason) = gate.readiness() {
        return Err(Refusal::Conflict { message: format!("the gate is not ready: {reason}") });
    }
    let Some(profile) = gate.confined.named(&asked.profile) else {
        let names: Vec<&str> = gate.confined.names().collect();
        return Err(invalid(format!("no profile `{}`; there are: {}", asked.profile, names.join(", "))));
    };
    let listener = listener(&gate.config, asked.listener.as_deref()).map_err(invalid)?;
    // As the operator socket says who is there. The gate's own uid is nobody's in particular, and root never.
    let caller = peer.uid.filter(|uid| *uid != 0 && *uid != rustix::process::geteuid().as_raw());
    let identity = match (profile.config.uid, caller) {
        (Some(uid), _) => Some((uid, profile.config.gid.unwrap_or(uid))),
        (None, Some(uid)) => Some((uid, peer.gid.filter(|gid| *gid != 0).unwrap_or(uid))),
        (None, None) => None,
    };
    let named = identity.and_then(|(uid, _)| listener.peers.as_ref()?.get(&uid.to_string()));
    let Some(principal) = named.or(listener.principal.as_ref()).cloned() else {
        return Err(invalid(format!("listener `{}` has no principal to give", listener.name)));
    };
    let directory = asked.directory.canonicalize();
    let directory = directory.map_err(|error| invalid(format!("{}: {error}", asked.directory.display())))?;
    let planned = Planned {
        profile_name: asked.profile,
        profile: profile.clone(),
        listener,
        principal,
        argv: asked.argv,
        directory,
        operator: operator.0.to_owned(),
        operator_jkt: operator.1.to_owned(),
        environment: asked.environment,
        identity,
        size: Size { rows: asked.rows, columns: asked.columns },
        echo: asked.terminal,
    };
    Ok(Ready { gate: Arc::clone(gate), planned, _running: running, _place: place })
}

/// The listener of that name, or the only one that there is.
fn listener(config: &config::Config, name: Option<&str>) -> Result<config::Listener, String> {
    let unix: Vec<&config::Listener> = config.listeners.iter().filter(|listener| listener.path.is_some()).collect();
    let names = || unix.iter().map(|listener| listener.name.as_str()).collect::<Vec<_>>().join(", ");
    match (name, unix.as_slice()) {
        (Some(name), all) => match all.iter().find(|listener| listener.name == name) {
            Some(found) => Ok((*found).clone()),
            None => Err(format!("no Unix listener `{name}`; there are: {}", names())),
        },
        (None, [only]) => Ok((*only).clone()),
        (None, []) => Err("a session needs a Unix listener, and the configuration has none".to_owned()),
        (None, _) => Err(format!("which listener is it to call on? There are: {}", names())),
    }
}

/// A request that was judged; it counts as running.
pub struct Ready {
    gate: Arc<Gate>,
    planned: Planned,
    _running: Running,
    _place: tokio::sync::OwnedSemaphorePermit,
}

impl Ready {
    /// Runs it to its end and tells the client. It ends if the client goes away.
    pub async fn run(self, ids: Ids, client: impl AsyncRead + AsyncWrite + Send) {
        let (gate, planned) = (&self.gate, &self.planned);
        let (from, to) = tokio::io::split(client);
        let mut to = Outbox::new(to);
        let intended = match record::intend(gate, planned, &ids).await {
            Ok(intended) => intended,
            Err(error) => {
                tracing::error!(%error, decision_id = ids.decision_id, "a session has no intent, so it does not run");
                let last = json!({"exit_code": 255, "error": "the intent could not be made durable"});
                return last_word(gate, &mut to, &last).await;
            }
        };
        let execution = gate.executions.register(intended.execution(planned, &ids));
        let ran = dispatch::unless_it_panics(run(gate, planned, &intended, &ids, &execution, from, &mut to)).await;
        let (ended, egress) = ran.unwrap_or_else(|| {
            let egress = EgressEvidence { incomplete: true, ..EgressEvidence::default() };
            (Ended::Unknown("the gate panicked".to_owned()), egress)
        });
        let ended = match execution.ending() {
            Some(killed) => Ended::Killed(killed),
            None => ended,
        };
        drop(execution);
        if let Ended::NotStarted(reason) | Ended::Unknown(reason) = &ended {
            tracing::error!(reason, decision_id = ids.decision_id, "a session did not run as it should");
        }
        let mut last = json!({"exit_code": record::code_of(&ended), "action_id": intended.action_id});
        match &ended {
            Ended::NotStarted(reason) | Ended::Unknown(reason) => last["error"] = json!(reason),
            Ended::Killed(killed) => last["error"] = json!(format!("killed by {}", killed.by)),
            Ended::Drained => last["error"] = json!("the gate was stopped"),
            Ended::Exit(_) | Ended::HungUp => {}
        }
        match record::receipt(gate, planned, intended, &ids, &ended, &egress).await {
            Ok(receipt) => last["receipt_id"] = json!(receipt.receipt_id()),
            Err(error) => {
                tracing::error!(%error, decision_id = ids.decision_id, "a session has no receipt");
                last["error"] = json!("the receipt could not be made durable");
            }
        }
        last_word(gate, &mut to, &last).await;
    }
}

/// Tells the client how it ended. One that reads nothing is waited for as any client is, and not by a gate that is stopping.
async fn last_word(gate: &Gate, to: &mut Outbox<impl AsyncWrite + Unpin>, last: &serde_json::Value) {
    to.put(&Frame::Ended(last.to_string().into_bytes()));
    let stopping = async {
        drained(gate).await;
        tokio::time::sleep(HANGUP_GRACE).await;
    };
    tokio::select! {
        _ = to.send() => {}
        () = tokio::time::sleep(Duration::from_secs(gate.config.limits.write_timeout_seconds)) => {}
        () = stopping => {}
        () = gate.cancelled() => {}
    }
}

/// The leaf around it.
async fn run(
    gate: &Arc<Gate>,
    planned: &Planned,
    intended: &Intended,
    ids: &Ids,
    execution: &Registered,
    from: impl AsyncRead + Unpin + Send,
    to: &mut Outbox<impl AsyncWrite + Unpin + Send>,
) -> (Ended, EgressEvidence) {
    let not_started = |error: String| (Ended::NotStarted(error), EgressEvidence::default());
    let leaf = match gate.cgroups.leaf() {
        Ok(leaf) => leaf,
        Err(error) => return not_started(error.to_string()),
    };
    execution.running(leaf.id().0);
    let ports = &planned.profile.config.inbound_ports;
    let hold = Hold {
        owner: Owner {
            execution_id: intended.grant_id.clone(),
            action_id: intended.action_id.clone(),
            principal: planned.principal.clone(),
            workspace: gate.config.workspace.clone(),
        },
        profile: &planned.profile.egress,
        inbound_ports: ports,
        // It has no deadline: the heartbeat closes it when the gate is gone.
        deadline: Duration::MAX,
        network: network(gate, planned),
        first_decision: None,
        lasts: true,
    };
    let (mut held, admitted) = Held::begin(gate, &leaf, hold);
    let ended = match admitted {
        Err(error) => Ended::NotStarted(error.to_string()),
        Ok(()) => match OwnSocket::serve(gate, planned, &intended.grant_id) {
            Err(error) => Ended::NotStarted(format!("the session's socket: {error}")),
            Ok(socket) => {
                let job = job(gate, planned, &socket);
                let ended = on_terminal(gate, planned, &leaf, job, &mut held, execution, from, to).await;
                socket.close().await;
                ended
            }
        },
    };
    execution.ending();
    let egress = held.end(&ids.decision_id, None).await;
    let _ = tokio::task::spawn_blocking(move || drop(leaf)).await;
    (ended, egress)
}

/// Who is called from outside must be where the outside is; others are where actions are.
fn network(gate: &Gate, planned: &Planned) -> Network {
    if planned.profile.config.inbound_ports.is_empty() { gate.network } else { Network::Shared }
}

fn job(gate: &Gate, planned: &Planned, socket: &OwnSocket) -> SessionJob {
    let config = &planned.profile.config;
    let egress = &planned.profile.egress;
    let terminates = |entry: &crate::egress::profile::Entry| entry.protocol() == EntryProtocol::Tls { terminate: true };
    SessionJob {
        argv: planned.argv.clone(),
        env: environment(gate, planned),
        directory: planned.directory.clone(),
        read_only: config.read_only.clone(),
        writable: config.writable.clone(),
        socket: planned.listener.path.clone().map(|inside| SessionSocket { source: socket.path.clone(), inside }),
        identity: planned.identity,
        memory_bytes: config.memory_mb.saturating_mul(1 << 20),
        processes: config.max_processes,
        scratch_bytes: gate.config.sandbox.scratch_bytes,
        network: network(gate, planned),
        trust_pem: egress.entries().iter().any(terminates).then(|| gate.proxy.ca_pem().as_bytes().to_vec()),
    }
}

/// The client's, without what is an operator's, and with the gate's proxy in place of the client's own.
fn environment(gate: &Gate, planned: &Planned) -> Vec<(String, String)> {
    let shown = |home: &str| {
        let config = &planned.profile.config;
        let mut shown = std::iter::once(&planned.directory).chain(&config.read_only).chain(&config.writable);
        shown.any(|path| Path::new(home).starts_with(path))
    };
    let kept = |(name, value): &&(String, String)| match name.as_str() {
        "HOME" => shown(value),
        "TMPDIR" => false,
        name if OPERATORS_OWN.iter().any(|own| name.starts_with(own)) => false,
        name => !PROXY_VARIABLES.contains(&name),
    };
    let mut env: Vec<(String, String)> = planned.environment.iter().filter(kept).cloned().collect();
    if !planned.profile.egress.is_none() {
        let proxy = format!("http://{}", gate.proxy.addresses().v4);
        env.extend(PROXY_VARIABLES.iter().map(|name| ((*name).to_owned(), proxy.clone())));
    }
    env
}

/// Carries the terminal until the program has ended.
#[allow(clippy::too_many_arguments)]
async fn on_terminal(
    gate: &Gate,
    planned: &Planned,
    leaf: &Leaf,
    job: SessionJob,
    held: &mut Held<'_>,
    execution: &Registered,
    from: impl AsyncRead + Unpin + Send,
    to: &mut Outbox<impl AsyncWrite + Unpin + Send>,
) -> Ended {
    let (terminal, device): (Terminal, Device) = match Terminal::open(planned.size, planned.echo) {
        Ok(made) => made,
        Err(error) => return Ended::NotStarted(format!("no terminal could be made: {error}")),
    };
    let (cancel, cancelled) = oneshot::channel::<()>();
    let cancelled = async {
        let _ = cancelled.await;
    };
    let take = async |listeners| held.services().listen(listeners);
    let mut run = pin!(gate.runner.run_session(leaf, job, device, take, cancelled));
    let stopped = {
        let mut output = pin!(output(&terminal, to));
        let mut input = pin!(input(gate, leaf, &terminal, from));
        let mut drained = pin!(drained(gate));
        let mut silent = false;
        loop {
            tokio::select! {
                ended = &mut run => break Err(ended),
                () = execution.killed() => break Ok(Why::Now),
                () = gate.cancelled() => break Ok(Why::Now),
                client = &mut output, if !silent => match client {
                    Ok(()) => silent = true,
                    Err(_) => break Ok(Why::HungUp),
                },
                () = &mut input => break Ok(Why::HungUp),
                () = &mut drained => break Ok(Why::Drained),
            }
        }
    };
    let why = match stopped {
        Ok(why) => why,
        Err(ended) => {
            let _ = tokio::time::timeout(LAST_OUTPUT, rest(&terminal, to)).await;
            return of_exit(ended);
        }
    };
    // The kernel sends SIGHUP to the session of a terminal whose other end is closed.
    drop(terminal);
    let mut gone = false;
    if !matches!(why, Why::Now) {
        tokio::select! {
            _ = &mut run => gone = true,
            () = tokio::time::sleep(HANGUP_GRACE) => {}
            () = execution.killed() => {}
            () = gate.cancelled() => {}
        }
    }
    drop(cancel);
    if !gone {
        let _ = run.await;
    }
    why.into()
}

enum Why {
    HungUp,
    Drained,
    /// An operator's kill, or a drain that took too long.
    Now,
}

impl From<Why> for Ended {
    fn from(why: Why) -> Self {
        match why {
            Why::HungUp => Self::HungUp,
            Why::Drained | Why::Now => Self::Drained,
        }
    }
}

fn of_exit(ended: Result<Exit, SandboxError>) -> Ended {
    match ended {
        Ok(exit) => Ended::Exit(exit),
        Err(error) if error.nothing_ran() => Ended::NotStarted(error.to_string()),
        Err(error) => Ended::Unknown(error.to_string()),
    }
}

/// Until nothing has the program's end open; an error is the client's. While the client takes nothing, nothing more is
/// read, and the program waits as on any terminal that is paused.
async fn output(terminal: &Terminal, to: &mut Outbox<impl AsyncWrite + Unpin>) -> std::io::Result<()> {
    let mut chunk = vec![0; 16 << 10];
    loop {
        to.send().await?;
        let read = terminal.read(&mut chunk).await.unwrap_or(0);
        match chunk.get(..read) {
            Some(piece) if read > 0 => to.put(&Frame::Output(piece.to_vec())),
            _ => return Ok(()),
        }
    }
}

/// What is left on the terminal of a program that is gone: a terminal's buffer at most.
async fn rest(terminal: &Terminal, to: &mut Outbox<impl AsyncWrite + Unpin>) {
    let mut chunk = vec![0; 16 << 10];
    while let Ok(read @ 1..) = terminal.read(&mut chunk).await {
        to.put(&Frame::Output(chunk.get(..read).unwrap_or_default().to_vec()));
    }
}

/// Until the client has closed, or says what is no frame of its own.
async fn input(gate: &Gate, leaf: &Leaf, terminal: &Terminal, mut from: impl AsyncRead + Unpin) {
    while let Ok(Some(frame)) = Frame::read(&mut from).await {
        match frame {
            Frame::Input(bytes) => {
                // What nobody reads is lost; the end of the program is seen elsewhere.
                let _ = tokio::time::timeout(INPUT_PATIENCE, terminal.write_all(&bytes)).await;
            }
            Frame::Resize(rows, columns) => {
                let _ = terminal.resize(Size { rows, columns });
            }
            Frame::Signal(number) => {
                let wanted = SIGNALS.into_iter().find(|signal| signal.as_raw() == i32::from(number));
                let Some(signal) = wanted else { continue };
                if let Err(error) = gate.runner.signal_session(leaf, terminal, signal) {
                    tracing::debug!(%error, number, "a signal found nobody");
                }
            }
            Frame::Output(_) | Frame::Ended(_) => return,
        }
    }
}

async fn drained(gate: &Gate) {
    let mut period = tokio::time::interval(DRAIN_PERIOD);
    while !gate.is_draining() {
        period.tick().await;
    }
}

/// The gate's socket as this session has it.
struct OwnSocket {
    path: PathBuf,
    stop: watch::Sender<bool>,
    served: tokio::task::JoinHandle<()>,
}

impl OwnSocket {
    fn serve(gate: &Arc<Gate>, planned: &Planned, grant_id: &str) -> std::io::Result<Self> {
        // The end of an id is its random part; a socket's path has little room (unix(7)).
        let name = grant_id.get(grant_id.len().saturating_sub(12)..).unwrap_or(grant_id);
        let path = gate.session_sockets.join(name);
        // Nobody but the gate can look into the directory; the mode is for the sandbox, where the socket stands alone.
        let bound = Bound::Unix(UnixListener::bind(&path)?, path.clone());
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        let mut identity = server::listen::identity(&gate.config, &planned.listener, &bound);
        // It is known who is there: whoever has this socket is the session.
        identity.identity = peer::ListenerIdentity { principal: Some(planned.principal.clone()), uids: None };
        let (identity, stop): (Arc<ListenerIdentity>, _) = (Arc::new(identity), watch::Sender::new(false));
        let limits = ConnectionLimits {
            max_connections: MAX_CONNECTIONS.min(gate.config.limits.max_connections),
            header_timeout: Duration::from_secs(gate.config.limits.header_timeout_seconds),
            write_timeout: Duration::from_secs(gate.config.limits.write_timeout_seconds),
        };
        let (stopping, gate) = (stop.subscribe(), Arc::clone(gate));
        let served = tokio::spawn(server::serve(bound, limits, stopping, move |peer, request| {
            server::agent::handle(Arc::clone(&gate), Arc::clone(&identity), peer, request)
        }));
        Ok(Self { path, stop, served })
    }

    /// To be called when nobody is left who could call.
    async fn close(self) {
        let _ = self.stop.send(true);
        let _ = tokio::time::timeout(HANGUP_GRACE, self.served).await;
    }
}
