//! `latchgate serve`, and what `latchgate up` shares with it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use tokio::sync::watch;

use super::Failure;
use crate::config::Config;
use crate::gate::Gate;
use crate::privileges;
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
    let (stop, stopping) = watch::channel(false);
    let limits = ConnectionLimits {
        max_connections: gate.config.limits.max_connections,
        header_timeout: Duration::from_secs(gate.config.limits.header_timeout_seconds),
    };
    let mut servers = tokio::task::JoinSet::new();
    for listener in &gate.config.listeners {
        let bound = match (&listener.path, listener.address) {
            (Some(path), _) => {
                let mode = listener.mode.as_deref().and_then(|mode| u32::from_str_radix(mode, 8).ok()).unwrap_or(0o600);
                listen::unix(path, mode, listener.group).map_err(Failure::new)?
            }
            (None, Some(address)) => listen::tcp(address).await.map_err(Failure::new)?,
            (None, None) => continue,
        };
        let identity = Arc::new(listen::identity(&gate.config, listener, &bound));
        tracing::info!(listener = identity.name, at = %describe(&bound), principal = identity.identity.principal, "listening");
        let gate = Arc::clone(&gate);
        servers.spawn(server::serve(bound, limits, stopping.clone(), move |peer, request| {
            server::agent::handle(Arc::clone(&gate), Arc::clone(&identity), peer, request)
        }));
    }
    if let Some(path) = &gate.config.operators.socket {
        let bound = listen::unix(path, 0o600, None).map_err(Failure::new)?;
        tracing::info!(at = %describe(&bound), "operators");
        let gate = Arc::clone(&gate);
        servers.spawn(server::serve(bound, limits, stopping.clone(), move |_, request| {
            server::operator::handle(Arc::clone(&gate), request)
        }));
    }
    if let Some(address) = gate.config.metrics.listen {
        let bound = listen::tcp(address).await.map_err(Failure::new)?;
        tracing::info!(at = %describe(&bound), "metrics");
        let gate = Arc::clone(&gate);
        servers.spawn(server::serve(bound, limits, stopping.clone(), move |_, request| {
            let answer = gate.metrics.answer(&request);
            async move { answer }
        }));
    }
    tracing::info!(took_ms = began.elapsed().as_millis() as u64, "ready");
    told_to_stop().await?;
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

fn describe(bound: &listen::Bound) -> String {
    match bound {
        listen::Bound::Unix(_, path) => path.display().to_string(),
        listen::Bound::Tcp(socket) => {
            socket.local_addr().map_or_else(|_| "?".to_owned(), |address| address.to_string())
        }
    }
}

async fn told_to_stop() -> Result<(), Failure> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).map_err(Failure::new)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Failure::new)?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
