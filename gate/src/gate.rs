//! The gate, put together: each part is built from what is there already, in the order that lets a failure stop the
//! start before anything listens.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::Ipv4Addr;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, watch};

use crate::action::manifest::{Call, Manifest};
use crate::action::registry::{AddedDomains, Registry, Source};
use crate::auth::Authenticator;
use crate::auth::lease::{Issuer, LeaseKeys};
use crate::auth::operator::{Operator, Operators};
use crate::config::{Config, NetworkMode};
use crate::egress::address::AllowAddresses;
use crate::egress::flows::Flows;
use crate::egress::kernel::{self, AttachMode, Enforcer, KernelConfig};
use crate::egress::names::{self, DnsServer, Reach, ReachError, Slots};
use crate::egress::proxy::{self, Proxy, ProxyConfig};
use crate::egress::refusals::Refusals;
use crate::egress::{Asker, Attribution, Caller, DatagramAttribution, DatagramKey, LeafId};
use crate::executions::Executions;
use crate::ledger::{Ledger, LedgerConfig, ReceiptKeys, VerifyReport, verify::VerifyError};
use crate::pipeline::budget::Budgets;
use crate::policy::{self, embedded::Embedded};
use crate::sandbox::{CgroupTree, Job, Limits, Network, Program, Root, Runner, RunnerConfig, SandboxError};
use crate::selftest::Selftest;
use crate::server::metrics::Metrics;
use crate::store::sqlite::{Options, Store};
use crate::time::Timestamp;
use crate::{confine, files, guards, hash};

/// Everything that a request may need.
pub struct Gate {
    pub config: Config,
    pub registry: Registry,
    pub policy: Box<dyn policy::Engine>,
    pub issuer: Arc<Issuer>,
    lease_keys: Arc<LeaseKeys>,
    pub authenticator: Authenticator,
    pub operators: Operators,
    pub budgets: Budgets,
    pub ledger: Ledger,
    pub cgroups: CgroupTree,
    pub runner: Runner,
    pub enforcer: Arc<Enforcer>,
    pub refusals: Refusals,
    pub flows: Flows,
    pub proxy: Proxy,
    /// The resolver that sandboxes see.
    pub dns: DnsServer,
    /// Where executions run: a namespace of their own each, or the gate's.
    pub network: Network,
    /// Whether the gate has tried itself, and what came of it.
    pub selftest: Selftest,
    /// Why executions have one wall fewer than was left to the gate to have.
    one_wall: Option<String>,
    pub metrics: Metrics,
    /// Executions at the same time.
    pub places: Semaphore,
    /// What sessions can be held to.
    pub confined: confine::Profiles,
    /// Sessions at the same time.
    pub sessions: Arc<Semaphore>,
    /// Where the sockets of sessions are made; nobody else's directory.
    pub session_sockets: PathBuf,
    /// Those that run, and how to end one.
    pub executions: Executions,
    draining: AtomicBool,
    running: AtomicUsize,
    idle: Notify,
    cancel: watch::Sender<bool>,
}

/// What `/readyz` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    Ready,
    Degraded(String),
    NotReady(String),
}

/// Why the gate does not start: which part, and what it said.
#[derive(Debug, thiserror::Error)]
#[error("{part}: {message}")]
pub struct StartError {
    part: &'static str,
    message: String,
}

/// Names the part that failed.
fn part<E: std::fmt::Display>(part: &'static str) -> impl Fn(E) -> StartError {
    move |error| StartError { part, message: error.to_string() }
}

/// The proxy listens before the kernel program knows its port, and the program is what tells whose a connection is.
/// Until it is there, nobody is anybody.
#[derive(Default)]
struct Later(OnceLock<Arc<Enforcer>>);

impl Attribution for Later {
    fn caller(&self, accepted: BorrowedFd<'_>) -> Option<Caller> {
        self.0.get()?.caller(accepted)
    }

    fn connection_of(&self, accepted: BorrowedFd<'_>) -> Option<u64> {
        self.0.get()?.connection_of(accepted)
    }
}

impl DatagramAttribution for Later {
    fn asker(&self, query: &DatagramKey) -> Option<Asker> {
        self.0.get()?.asker(query)
    }
}

impl Reach for Later {
    fn reach(&self, leaf: LeafId, address: Ipv4Addr, ports: &[u16]) -> Result<(), ReachError> {
        let enforcer = self.0.get().ok_or_else(|| ReachError("the kernel program is not there yet".to_owned()))?;
        enforcer.reach(leaf, (address.into(), 32), ports).map_err(|error| ReachError(error.to_string()))
    }
}

/// The tests of a manifest that need the machine: files that are what they should be, roots that show nothing of ours.
struct Directories {
    store: PathBuf,
    ledger: PathBuf,
    lease_keys: PathBuf,
    sessions: PathBuf,
    protected: Vec<PathBuf>,
}

impl Directories {
    fn make(config: &Config) -> Result<Self, StartError> {
        let state = &config.state_dir;
        let made = Self {
            store: state.join("store"),
            ledger: state.join("ledger"),
            lease_keys: state.join("lease-keys"),
            sessions: state.join("sessions"),
            protected: protected(config),
        };
        for directory in [state, &made.store, &made.ledger, &made.lease_keys, &made.sessions] {
            files::private_directory(directory).map_err(part("state_dir"))?;
        }
        // Sockets that a dead gate left: the sessions died with it.
        for left in std::fs::read_dir(&made.sessions).map_err(part("state_dir"))?.flatten() {
            std::fs::remove_file(left.path()).map_err(part("state_dir"))?;
        }
        Ok(made)
    }
}

/// What no sandbox may see: state, and the directories of all sockets.
fn protected(config: &Config) -> Vec<PathBuf> {
    let sockets = config.listeners.iter().filter_map(|listener| listener.path.as_ref()).chain(&config.operators.socket);
    std::iter::once(config.state_dir.clone())
        .chain(sockets.filter_map(|path| path.parent().map(std::path::Path::to_path_buf)))
        .collect()
}

impl Gate {
    /// Builds every part.
    ///
    /// # Errors
    /// The first part that cannot be had: nothing listens then, and the kernel program of a predecessor still holds.
    pub async fn build(config: Config) -> Result<Self, StartError> {
        let now = Timestamp::now();
        if let Some(warning) = guards::warning() {
            tracing::error!("{warning}");
        }
        let directories = Directories::make(&config)?;
        let registry = load_registry(&config)?;
        let confined = confine::Profiles::load(&config.profiles).map_err(part("configuration"))?;
        for warning in registry.warnings() {
            tracing::warn!("{warning}");
        }
        for action in registry.in_audit() {
            tracing::warn!(action, "egress.mode is unsafe_audit: the action is not held to its profile");
        }
        let policy: Box<dyn policy::Engine> = Box::new(load_policy(&config)?);

        let options = Options { proofs_per_key: config.auth.max_live_proofs_per_key, ..Options::default() };
        let store = Arc::new(Store::open_with(&directories.store, now, &options).map_err(part("store"))?);
        let lease_keys = Arc::new(LeaseKeys::load_or_create(&directories.lease_keys).map_err(part("lease keys"))?);
        let ttl = u32::try_from(config.auth.lease_ttl_seconds).unwrap_or(u32::MAX);
        let gate_name = format!("latchgate:{}", config.instance);
        let issuer = Arc::new(Issuer::new(Arc::clone(&lease_keys), &gate_name, &gate_name, ttl).map_err(part("auth"))?);
        let authenticator = Authenticator::new(Arc::clone(&issuer), store.clone(), store.clone());
        let operators = Operators::new(operators(&config)?, store.clone());
        let budgets = Budgets::new(store, config.budgets.clone());

        let receipt_keys = Arc::new(ReceiptKeys::load_or_create(&directories.ledger).map_err(part("receipt keys"))?);
        let ledger_config = LedgerConfig { workspace: config.workspace.clone(), ..LedgerConfig::default() };
        let (ledger, orphans) =
            Ledger::open(&directories.ledger, receipt_keys, &ledger_config, now).map_err(part("ledger"))?;
        for orphan in &orphans {
            tracing::warn!(receipt_id = orphan.receipt.receipt_id(), "closed an execution that a dead gate left open");
        }

        let attach = AttachMode::choose(&config.egress.bpffs, config.egress.attach).map_err(part("kernel program"))?;
        let cgroups = match attach {
            AttachMode::Pinned => CgroupTree::open(config.sandbox.cgroup.as_deref(), &config.instance),
            AttachMode::Multi => CgroupTree::open_unpinned(config.sandbox.cgroup.as_deref(), &config.instance),
        }
        .map_err(part("cgroups"))?;
        let runner = Runner::new(RunnerConfig {
            uid_base: config.sandbox.uid_base,
            uid_count: config.sandbox.uid_count,
            executable: PathBuf::from("/proc/self/exe"),
            protected: directories.protected,
        })
        .map_err(part("sandbox"))?;

        let attribution = Arc::new(Later::default());
        let proxy = Proxy::start(proxy_config(&config)?, attribution.clone()).await.map_err(part("proxy"))?;
        let addresses = proxy.addresses();
        let slots = Slots::bind().map_err(part("resolver"))?;
        let v4_base = slots.v4_base().map_err(part("resolver"))?;
        let resolver = kernel::ResolverAddresses {
            v4_base,
            v6_base: slots.v6_base().map_err(part("resolver"))?,
            slots: names::SLOTS,
        };
        let dns = DnsServer::new(names::Limits::default(), attribution.clone());
        dns.serve(slots.into_sockets(), attribution.clone()).map_err(part("resolver"))?;
        let kernel_config = KernelConfig {
            instance: config.instance.clone(),
            actions: cgroups.actions().to_owned(),
            gate: cgroups.gate().to_owned(),
            bpffs: config.egress.bpffs.clone(),
            proxy: kernel::ProxyAddresses { v4: addresses.v4, v6: addresses.v6 },
            resolver: Some(resolver),
        };
        let enforcer = tokio::task::spawn_blocking(move || Enforcer::start_as(kernel_config, Some(attach)))
            .await
            .map_err(part("kernel program"))?
            .map_err(part("kernel program"))?;
        let enforcer = Arc::new(enforcer);
        let _ = attribution.0.set(Arc::clone(&enforcer));
        try_sandbox(&cgroups, &runner).await?;
        let flows = Flows::default();
        tokio::spawn(flows.clone().collect(proxy.flows()));
        tokio::spawn(flows.clone().collect(dns.flows()));
        let mut one_wall = None;
        let network = match config.sandbox.network {
            Some(NetworkMode::Shared) => Network::Shared,
            wanted => {
                let leaf = cgroups.leaf().map_err(part("cgroups"))?;
                let can = runner.can_isolate(&leaf).await;
                let _ = leaf.remove();
                match (can, wanted) {
                    (Ok(()), _) => Network::Isolated {
                        tcp_port: addresses.v4.port(),
                        udp_base: Some(v4_base.port()),
                        udp_slots: names::SLOTS,
                    },
                    (Err(error), Some(_)) => return Err(part("sandbox.network = isolated")(error)),
                    (Err(error), None) => {
                        tracing::warn!(%error, "no network namespaces here: the kernel program is the only wall");
                        one_wall = Some(
                            "no network namespaces can be made here, so the kernel program is the only wall: set \
                             sandbox.network to `isolated` to start only with both, or to `shared` to have it so"
                                .to_owned(),
                        );
                        Network::Shared
                    }
                }
            }
        };
        let selftest = Selftest::new(&config);
        let refusals = Refusals::new(flows.clone());
        tokio::spawn(refusals.clone().collect(enforcer.events()));

        Ok(Self {
            places: Semaphore::new(config.sandbox.max_concurrent),
            executions: Executions::default(),
            confined,
            sessions: Arc::new(Semaphore::new(confine::MAX_SESSIONS)),
            session_sockets: directories.sessions,
            config,
            registry,
            policy,
            issuer,
            lease_keys,
            authenticator,
            operators,
            budgets,
            ledger,
            cgroups,
            runner,
            enforcer,
            refusals,
            flows,
            proxy,
            dns,
            network,
            selftest,
            one_wall,
            metrics: Metrics::default(),
            draining: AtomicBool::new(false),
            running: AtomicUsize::new(0),
            idle: Notify::new(),
            cancel: watch::Sender::new(false),
        })
    }

    /// The ES256 keys that leases are signed with (RFC 7517).
    pub fn lease_jwks(&self) -> serde_json::Value {
        self.lease_keys.jwks()
    }

    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    /// From now on nothing new is begun.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
        self.flows.close();
    }

    /// Whether calls can be held to what is decided, asked of the kernel at this moment.
    pub fn readiness(&self) -> Readiness {
        if self.is_draining() {
            return Readiness::NotReady("draining".to_owned());
        }
        if !self.ledger.is_running() {
            return Readiness::NotReady("the ledger has stopped: nothing can be recorded, so nothing runs".to_owned());
        }
        match self.enforcer.health() {
            Ok(()) => match self.selftest.readiness() {
                Readiness::NotReady(reason) => Readiness::NotReady(reason),
                Readiness::Degraded(reason) => self.degraded(Some(reason)),
                Readiness::Ready => self.degraded(None),
            },
            Err(error) => {
                tracing::error!(%error, "the kernel program does not hold");
                Readiness::NotReady("the kernel program does not hold".to_owned())
            }
        }
    }

    /// Everything that makes it hold less than it could, or ready when there is nothing.
    fn degraded(&self, untested: Option<String>) -> Readiness {
        let audited: Vec<&str> = self.registry.in_audit().collect();
        let in_audit = (!audited.is_empty())
            .then(|| format!("egress.mode is unsafe_audit: not held to their profiles are {}", audited.join(", ")));
        let reasons: Vec<String> =
            guards::warning().into_iter().chain(untested).chain(self.one_wall.clone()).chain(in_audit).collect();
        if reasons.is_empty() { Readiness::Ready } else { Readiness::Degraded(reasons.join("; ")) }
    }

    /// Counts a call as running until the guard goes; `None` when as many run or wait as may. A call outlives its
    /// connection, so that no limit of connections bounds them.
    pub fn enter(self: &Arc<Self>) -> Option<Running> {
        let most = self.config.sandbox.max_concurrent.saturating_add(self.config.sandbox.max_waiting);
        let entered = |running: usize| (running < most).then(|| running + 1);
        self.running.fetch_update(Ordering::SeqCst, Ordering::SeqCst, entered).ok()?;
        Some(Running(Arc::clone(self)))
    }

    pub fn running(&self) -> usize {
        self.running.load(Ordering::SeqCst)
    }

    /// Ends every execution that runs.
    pub fn cancel(&self) {
        self.cancel.send_replace(true);
    }

    /// Ready once [`Self::cancel`] was called.
    pub fn cancelled(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut cancel = self.cancel.subscribe();
        async move {
            let _ = cancel.wait_for(|cancelled| *cancelled).await;
        }
    }

    /// Waits until nothing runs; false if something still does when the time is over.
    pub async fn idle_within(&self, patience: Duration) -> bool {
        let all_done = async {
            loop {
                let idle = self.idle.notified();
                if self.running() == 0 {
                    return;
                }
                idle.await;
            }
        };
        tokio::time::timeout(patience, all_done).await.is_ok()
    }

    /// The digest of what an action of this manifest runs: the gate's own executable, or its sealed copies.
    pub fn module_digest(&self, manifest: &Manifest) -> String {
        match &manifest.call {
            Call::Http(_) => self.runner.executable_digest().to_owned(),
            Call::Command(command) => {
                let files: Vec<serde_json::Value> = command
                    .files
                    .iter()
                    .map(|file| serde_json::json!({"path": file.path, "sha256": format!("sha256:{}", file.sha256)}))
                    .collect();
                hash::sha256_tagged(&crate::action::canonical::jcs(&files).unwrap_or_default())
            }
        }
    }

    /// Verifies the whole ledger from another connection.
    pub fn verify_ledger(&self) -> Result<VerifyReport, VerifyError> {
        self.ledger.verify(None)
    }
}

/// A call that runs.
pub struct Running(Arc<Gate>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::AcqRel);
        self.0.idle.notify_waiters();
    }
}

/// Makes a whole sandbox and lets it go, in a leaf that may do nothing. Where that cannot be had no action could run, and
/// a gate that says so at its start is better than one whose every call fails.
async fn try_sandbox(cgroups: &CgroupTree, runner: &Runner) -> Result<(), StartError> {
    const TIMEOUT: Duration = Duration::from_secs(10);
    let limits = Limits {
        memory_bytes: 256 << 20,
        timeout: TIMEOUT,
        stdout_bytes: 1 << 20,
        stderr_bytes: 1 << 16,
        processes: 8,
        scratch_bytes: 1 << 20,
    };
    // Everything is made, up to a program that is not there.
    let program = Program::Command {
        argv: vec!["/.sealed/nothing".to_owned()],
        env: Vec::new(),
        files: Vec::new(),
        root: Root::Host,
    };
    let job = Job { program, stdin: Vec::new(), limits, network: Network::Shared, trust_pem: None };
    let leaf = cgroups.leaf().map_err(part("cgroups"))?;
    let tried = runner.run(&leaf, job, std::future::pending()).await;
    let _ = leaf.remove();
    let message = match tried {
        Err(SandboxError::Exec { source }) if source.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Ok(completed) => format!("a sandbox with nothing in it ended as {:?}", completed.exit),
        Err(error) => error.to_string(),
    };
    Err(StartError {
        part: "sandbox",
        message: format!(
            "{message}. Executions need namespaces of their own: user.max_user_namespaces must not be 0, and a container \
             needs a seccomp profile that permits them (deploy/seccomp/latchgate.json)"
        ),
    })
}

fn load_registry(config: &Config) -> Result<Registry, StartError> {
    let definitions = &config.definitions;
    let builtin = definitions.builtin.unwrap_or(definitions.manifests.is_none());
    let directory = definitions.manifests.clone().map(Source::Directory);
    let sources: Vec<Source> = builtin.then_some(Source::Embedded).into_iter().chain(directory).collect();
    let added = definitions
        .allowed_domains
        .iter()
        .map(|(id, entries)| {
            let entries = entries.iter().map(serde_json::to_value).collect::<Result<Vec<_>, _>>();
            entries.map(|entries| (id.clone(), entries))
        })
        .collect::<Result<AddedDomains, _>>()
        .map_err(part("definitions.allowed_domains"))?;
    let registry = Registry::load_with(&sources, &added).map_err(part("manifests"))?;
    let registry = registry.permitting_audit(&config.egress.permit_unsafe_audit).map_err(part("manifests"))?;
    let registry = if config.definitions.strict { registry.strict().map_err(part("manifests"))? } else { registry };
    Ok(registry.with_pins(config.definitions.pins.clone()))
}

fn load_policy(config: &Config) -> Result<Embedded, StartError> {
    let mut files = match &config.definitions.policy {
        None => Embedded::builtin_files(),
        Some(directory) => Embedded::directory_files(directory).map_err(part("policy"))?,
    };
    if let Some(path) = &config.definitions.policy_data {
        let text = std::fs::read_to_string(path).map_err(|error| StartError {
            part: "definitions.policy_data",
            message: format!("{}: {error}", path.display()),
        })?;
        files.retain(|file| !file.name.ends_with(".json"));
        files.push(policy::embedded::File { name: "data.json".to_owned(), text });
    }
    Embedded::load(&files).map_err(part("policy"))
}

fn operators(config: &Config) -> Result<Vec<Operator>, StartError> {
    config
        .operators
        .keys
        .iter()
        .map(|key| {
            let digest = key.api_key_hash.strip_prefix("sha256:").and_then(hash::unhex);
            let api_key_sha256 = digest.and_then(|bytes| bytes.try_into().ok()).ok_or_else(|| StartError {
                part: "operators.keys",
                message: format!("{}: api_key_hash must be sha256: and 64 hexadecimal digits", key.name),
            })?;
            Ok(Operator {
                name: key.name.clone(),
                api_key_sha256,
                dpop_jkt: key.dpop_jkt.clone(),
                made_in_this_run: key.made_in_this_run,
            })
        })
        .collect()
}

fn proxy_config(config: &Config) -> Result<ProxyConfig, StartError> {
    let egress = &config.egress;
    Ok(ProxyConfig {
        ca_file: egress.ca_file.clone(),
        hosts: egress
            .hosts
            .iter()
            .map(|(name, addresses)| (name.clone(), addresses.clone()))
            .collect::<BTreeMap<_, _>>(),
        allow_addresses: AllowAddresses::parse(&egress.allow_addresses).map_err(part("egress.allow_addresses"))?,
        dns_servers: (!egress.dns_servers.is_empty()).then(|| egress.dns_servers.clone()),
        limits: proxy::Limits {
            concurrent_connections_per_execution: egress.max_connections_per_execution,
            bytes_per_execution: egress.max_bytes_per_execution,
            connections_burst: egress.connections_burst,
            connections_per_second: egress.connections_per_second,
            ..proxy::Limits::default()
        },
    })
}
