//! `latchgate serve`, and what `latchgate up` shares with it.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use tokio::sync::watch;

use super::Failure;
use crate::config::Config;
use crate::gate::Gate;
use crate::gate::Readiness;
use crate::privileges;
use crate::selftest;
use crate::server::{self, ConnectionLimits, listen};

/// How long ending what runs may take, and how long the last answers may take to be read.
const LAST_PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The configuration file (TOML). `LATCHGATE_CONFIG__SECTION__KEY` variables win over it.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let config = Config::load(Some(&arguments.config), std::env::vars()).map_err(Failure::new)?;
    if config.listeners.is_empty() {
        return Err(Failure::new("no [[listeners]]: nobody could call; add one, or use `latchgate up`"));
    }
    start(config)
}

/// Checks privileges, builds the gate, listens, and runs until it is told to stop.
pub(crate) fn start(config: Config) -> Result<(), Failure> {
    check_privileges()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(format!("the runtime does not start: {error}")))?;
    runtime.block_on(serve(config))
}

/// Refuses with everything that is missing, before anything is made.
pub(super) fn check_privileges() -> Result<(), Failure> {
    let missing = privileges::missing();
    if missing.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> = missing.iter().map(|one| format!("  {}: {}", one.what, one.why)).collect();
    Err(Failure::new(format!("cannot enforce anything here; missing:\n{}", lines.join("\n"))))
}

#[expect(clippy::disallowed_methods, reason = "start-up is measured on the real clock, before any test could pause it")]
async fn serve(config: Config) -> Result<(), Failure> {
    let began = Instant::now();
    let gate = Arc::new(Gate::build(config).await.map_err(Failure::new)?);
    selftest::at_start(&gate).await;
    let (stop, stopping) = watch::channel(false);
    let limits = ConnectionLimits {
        max_connections: gate.config.limits.max_connections,
        write_timeout: Duration::from_secs(gate.config.limits.write_timeout_seconds),
        header_timeout: Duration::from_secs(gate.config.limits.header_timeout_seconds),
    };
    // Heard from before anybody can call, so that no signal ends the gate without a drain.
    let told_to_stop = told_to_stop()?;
    let sockets = Sockets::bind(&gate).await?;
    let mut servers = tokio::task::JoinSet::new();
    for (bound, identity) in sockets.agents {
        tracing::info!(listener = identity.name, at = %describe(&bound), principal = identity.identity.principal, "listening");
        let gate = Arc::clone(&gate);
        servers.spawn(server::serve(bound, limits, stopping.clone(), move |peer, request| {
            server::agent::handle(Arc::clone(&gate), Arc::clone(&identity), peer, request)
        }));
    }
    if let Some(bound) = sockets.operators {
        tracing::info!(at = %describe(&bound), "operators");
        let gate = Arc::clone(&gate);
        servers.spawn(server::serve(bound, limits, stopping.clone(), move |peer, request| {
            server::operator::handle(Arc::clone(&gate), peer, request)
        }));
    }
    if let Some(bound) = sockets.metrics {
        tracing::info!(at = %describe(&bound), "metrics");
        let gate = Arc::clone(&gate);
        servers.spawn(server::serve(bound, limits, stopping.clone(), move |_, request| {
            let answer = gate.metrics.answer(&request);
            async move { answer }
        }));
    }
    let took_ms = began.elapsed().as_millis() as u64;
    match gate.readiness() {
        Readiness::Ready => tracing::info!(took_ms, "ready"),
        Readiness::Degraded(reason) => tracing::warn!(took_ms, reason, "ready, but degraded"),
        // It serves: an operator can see why, and have it tried again.
        Readiness::NotReady(reason) => tracing::error!(took_ms, reason, "serving, but not ready"),
    }
    told_to_stop.await;
    gate.drain();
    tracing::info!(running = gate.running(), "draining");
    // The sockets stay while something runs: who calls now is told so, and does not find nobody there.
    if !gate.idle_within(Duration::from_secs(gate.config.limits.drain_seconds)).await {
        tracing::warn!(running = gate.running(), "the drain took too long; what runs is ended");
        gate.cancel();
        if !gate.idle_within(LAST_PATIENCE).await {
            tracing::error!(running = gate.running(), "executions are left; the kernel closes them");
        }
    }
    let _ = stop.send(true);
    let answered = async { while servers.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(LAST_PATIENCE, answered).await;
    Ok(())
}

/// Every socket, bound before any is served: binding sets the umask of the whole process for a moment, and a gate that
/// cannot have one of its sockets serves none.
struct Sockets {
    agents: Vec<(listen::Bound, Arc<listen::ListenerIdentity>)>,
    operators: Option<listen::Bound>,
    metrics: Option<listen::Bound>,
}

impl Sockets {
    async fn bind(gate: &Gate) -> Result<Self, Failure> {
        let config = &gate.config;
        let mut agents = Vec::new();
        for listener in &config.listeners {
            let bound = match (&listener.path, listener.address) {
                (Some(path), _) => {
                    let bits = listener.mode.as_deref().and_then(|mode| u32::from_str_radix(mode, 8).ok());
                    listen::unix(path, bits.unwrap_or(0o600), listener.group).map_err(Failure::new)?
                }
                (None, Some(address)) => listen::tcp(address).await.map_err(Failure::new)?,
                (None, None) => continue,
            };
            let identity = Arc::new(listen::identity(config, listener, &bound));
            agents.push((bound, identity));
        }
        let operators = match &config.operators.socket {
            Some(path) => Some(listen::unix(path, 0o600, None).map_err(Failure::new)?),
            None => None,
        };
        let metrics = match config.metrics.listen {
            Some(address) => Some(listen::tcp(address).await.map_err(Failure::new)?),
            None => None,
        };
        Ok(Self { agents, operators, metrics })
    }
}

fn describe(bound: &listen::Bound) -> String {
    match bound {
        listen::Bound::Unix(_, path) => path.display().to_string(),
        listen::Bound::Tcp(socket) => {
            socket.local_addr().map_or_else(|_| "?".to_owned(), |address| address.to_string())
        }
    }
}

/// Listens for the signals from now on; what it gives is ready when one has come.
fn told_to_stop() -> Result<impl Future<Output = ()>, Failure> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).map_err(Failure::new)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Failure::new)?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
