//! The whole configuration: defaults, then a file, then the environment; checked once, then immutable.
//!
//! Every key has a default, so that the file alone and each variable alone can be judged by itself and an error names
//! the line or the variable that it comes from.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::egress::kernel::AttachMode;

/// Variables that begin so set one key each: `LATCHGATE_CONFIG__EGRESS__CA_FILE=/etc/ca.pem`.
pub const ENVIRONMENT_PREFIX: &str = "LATCHGATE_CONFIG__";

/// The longest lease that a configuration may hand out (API.md §1).
pub const LEASE_TTL_CEILING_SECONDS: u64 = 3600;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Names this gate among those on one machine: its cgroups and pins are kept under it.
    pub instance: String,
    /// Stands in every record.
    pub workspace: String,
    /// Keys, store and ledger. 0700, owned by the gate.
    pub state_dir: PathBuf,
    /// Base URLs that a proof's `htu` may name besides the listeners' own.
    pub public_base_urls: Vec<String>,
    pub listeners: Vec<Listener>,
    pub identity: Identity,
    pub operators: Operators,
    pub auth: Auth,
    pub definitions: Definitions,
    pub budgets: Vec<Budget>,
    pub egress: Egress,
    /// What `latchgate confine` can hold a command to, by name; `none` is always there.
    pub profiles: BTreeMap<String, ConfineProfile>,
    pub sandbox: Sandbox,
    pub limits: Limits,
    pub metrics: Metrics,
}

/// Where agents connect. One of `path` and `address`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Listener {
    pub name: String,
    /// A Unix socket. Its directory must be the gate's own.
    pub path: Option<PathBuf>,
    /// A TCP address; leases are issued there only where `[identity.tcp]` names a principal.
    pub address: Option<SocketAddr>,
    /// Who calls here. Required for a Unix socket.
    pub principal: Option<String>,
    /// Octal permission bits of the socket, `"0600"` when absent.
    pub mode: Option<String>,
    /// Numeric group id of the socket.
    pub group: Option<u32>,
    /// Peer uid to principal. When present, a uid that is not in it gets 403 `identity_forbidden`.
    pub peers: Option<BTreeMap<String, String>>,
    /// What a lease of this listener may ask for.
    pub scopes: Option<Vec<String>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Identity {
    pub tcp: Option<TcpIdentity>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TcpIdentity {
    pub principal: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Operators {
    pub socket: Option<PathBuf>,
    pub keys: Vec<OperatorKey>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OperatorKey {
    pub name: String,
    /// RFC 7638 thumbprint of the operator's P-256 key.
    pub dpop_jkt: String,
    /// `sha256:<hex>` of the API key, which itself is in no configuration.
    pub api_key_hash: String,
    /// Set by `latchgate up` for a key that it has just made; no configuration can say it.
    #[serde(skip)]
    pub made_in_this_run: bool,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Auth {
    pub lease_ttl_seconds: u64,
    /// Refuse proofs without the body claim everywhere. On TCP listeners that are not loopback it is always required.
    pub require_body_binding: bool,
    /// Live proofs that one key may have in the replay store; one more is refused.
    pub max_live_proofs_per_key: u32,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Definitions {
    /// A directory of manifests.
    pub manifests: Option<PathBuf>,
    /// Load the manifests that are built in; `manifests` wins over them. True unless `manifests` is given.
    pub builtin: Option<bool>,
    /// Action id to entries that are added to its `egress.allowed_domains`.
    pub allowed_domains: BTreeMap<String, Vec<toml::Value>>,
    /// Load a manifest with unknown keys as an error instead of a warning.
    pub strict: bool,
    /// A directory of Rego files and JSON data; the default policy when absent.
    pub policy: Option<PathBuf>,
    /// A JSON file in place of the policy's own data: the ACL.
    pub policy_data: Option<PathBuf>,
    /// Action id to the `action_digest` that it must have; another one is `action_digest_mismatch`.
    pub pins: BTreeMap<String, String>,
}

/// An operator's budget: nothing that a client sends refills it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// A principal, or `*` for each principal by itself.
    pub principal: String,
    pub window: BudgetWindow,
    pub max_calls: Option<u64>,
    pub max_cost_usd_cents: Option<u64>,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum BudgetWindow {
    Hour,
    Day,
    Month,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Egress {
    /// How the kernel program is attached: by links pinned in `bpffs`, or without pins. Pinned where a bpffs is there or
    /// can be mounted, when absent.
    pub attach: Option<AttachMode>,
    /// Where a bpffs is, or is to be mounted.
    pub bpffs: PathBuf,
    /// Root certificates for upstream TLS, in place of the system's.
    pub ca_file: Option<PathBuf>,
    /// Names that are resolved from here and never asked of DNS.
    pub hosts: BTreeMap<String, Vec<IpAddr>>,
    /// CIDRs of non-public addresses that the proxy may dial.
    pub allow_addresses: Vec<String>,
    /// DNS servers; those of `/etc/resolv.conf` when empty.
    pub dns_servers: Vec<SocketAddr>,
    /// Open connections that one execution may have at the proxy.
    pub max_connections_per_execution: usize,
    /// Connections that one execution may begin at once, and each second for as long as it goes on.
    pub connections_burst: u32,
    pub connections_per_second: u32,
    /// Payload bytes, both ways together, that one execution may move.
    pub max_bytes_per_execution: u64,
    /// Actions whose manifest may say `egress.mode: unsafe_audit`.
    pub permit_unsafe_audit: BTreeSet<String>,
    /// When the self-test runs. It runs whenever an operator asks, too.
    pub selftest: SelftestMode,
    /// Serve without a self-test. `/readyz` then says `degraded`.
    pub unsafe_skip_selftest: bool,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum SelftestMode {
    /// At each start.
    Start,
    /// At a start for which the ledger has no signed result of the same boot, kernel, programs and configuration.
    Cached,
}

/// What a session of `latchgate confine` is held to.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConfineProfile {
    /// As a manifest's `egress.allowed_domains`; empty reaches nothing.
    pub allowed_domains: Vec<toml::Value>,
    /// TCP ports at which others are answered; the session is then in the shared network.
    pub inbound_ports: Vec<u16>,
    /// Whom it runs as, never 0. Absent: the caller's own, or where that is root or the gate's, one of `sandbox.uid_base`.
    pub uid: Option<u32>,
    /// The uid's number when absent.
    pub gid: Option<u32>,
    /// Directories and files of the machine that it sees besides its working directory, at the same paths.
    pub read_only: Vec<PathBuf>,
    pub writable: Vec<PathBuf>,
    /// Mebibytes of all of it; of the data of each process where no memory controller is.
    pub memory_mb: u64,
    pub max_processes: u32,
}

impl Default for ConfineProfile {
    fn default() -> Self {
        Self {
            allowed_domains: Vec::new(),
            inbound_ports: Vec::new(),
            uid: None,
            gid: None,
            read_only: Vec::new(),
            writable: Vec::new(),
            memory_mb: 4096,
            max_processes: 512,
        }
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sandbox {
    /// `isolated`: each execution in a network namespace of its own, in which the gate listens. `shared`: the gate's own;
    /// the kernel program is then the only wall. Isolated where it can be had, when absent.
    pub network: Option<NetworkMode>,
    /// The v2 cgroup to work under; found when absent.
    pub cgroup: Option<PathBuf>,
    /// Executions get a uid each from `uid_base` up.
    pub uid_base: u32,
    pub uid_count: u32,
    pub max_processes: u32,
    pub scratch_bytes: u64,
    pub stderr_bytes: u64,
    /// Executions at the same time; one more waits its turn.
    pub max_concurrent: usize,
    /// Calls that may wait their turn; one more is 429 `rate_limited`.
    pub max_waiting: usize,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum NetworkMode {
    Isolated,
    Shared,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    pub max_request_bytes: usize,
    pub max_connections: usize,
    pub header_timeout_seconds: u64,
    pub body_timeout_seconds: u64,
    /// How long a client may read nothing of its answer; then its connection is broken off.
    pub write_timeout_seconds: u64,
    /// Bytes of request bodies that one listener holds at a time; one more request is 429 `rate_limited`.
    pub max_body_bytes_in_flight: usize,
    /// How long a drain waits for what runs.
    pub drain_seconds: u64,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Metrics {
    /// Prometheus text without authentication; off when absent.
    pub listen: Option<SocketAddr>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            instance: "default".to_owned(),
            workspace: "default".to_owned(),
            state_dir: PathBuf::from("/var/lib/latchgate"),
            public_base_urls: Vec::new(),
            listeners: Vec::new(),
            identity: Identity::default(),
            operators: Operators::default(),
            auth: Auth::default(),
            definitions: Definitions::default(),
            budgets: Vec::new(),
            egress: Egress::default(),
            profiles: BTreeMap::new(),
            sandbox: Sandbox::default(),
            limits: Limits::default(),
            metrics: Metrics::default(),
        }
    }
}

impl Default for Auth {
    fn default() -> Self {
        Self { lease_ttl_seconds: 300, require_body_binding: false, max_live_proofs_per_key: 65_536 }
    }
}

impl Default for Egress {
    fn default() -> Self {
        Self {
            attach: None,
            bpffs: PathBuf::from("/sys/fs/bpf"),
            ca_file: None,
            hosts: BTreeMap::new(),
            allow_addresses: Vec::new(),
            dns_servers: Vec::new(),
            max_connections_per_execution: 64,
            connections_burst: 1024,
            connections_per_second: 256,
            max_bytes_per_execution: 1 << 30,
            selftest: SelftestMode::Start,
            unsafe_skip_selftest: false,
            permit_unsafe_audit: BTreeSet::new(),
        }
    }
}

impl Default for Sandbox {
    fn default() -> Self {
        Self {
            network: None,
            cgroup: None,
            uid_base: 0x4c47_0000,
            uid_count: 4096,
            max_processes: 64,
            scratch_bytes: 64 << 20,
            stderr_bytes: 64 << 10,
            max_concurrent: 64,
            max_waiting: 256,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_request_bytes: 1 << 20,
            max_connections: 1024,
            header_timeout_seconds: 10,
            body_timeout_seconds: 30,
            write_timeout_seconds: 30,
            max_body_bytes_in_flight: 64 << 20,
            drain_seconds: 30,
        }
    }
}

/// Why a configuration does not start. `source` says the file and line, or the variable.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{path}: cannot be read: {source}")]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{path}: {message}")]
    File { path: PathBuf, message: String },
    #[error("environment variable {name}: {message}")]
    Variable { name: String, message: String },
    #[error("{key}: {message}")]
    Invalid { key: String, message: String },
}

impl Config {
    /// Reads `file`, lays the variables over it, and checks the whole.
    pub fn load(
        file: Option<&Path>,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, ConfigError> {
        let mut table = match file {
            None => toml::Table::new(),
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
                let refuse = |error: toml::de::Error| ConfigError::File {
                    path: path.to_owned(),
                    message: error.to_string().trim_end().to_owned(),
                };
                // Judged by itself first: only here does an error know its line.
                toml::from_str::<Self>(&text).map_err(refuse)?;
                toml::from_str(&text).map_err(refuse)?
            }
        };
        for (name, value) in environment {
            if let Some(path) = name.strip_prefix(ENVIRONMENT_PREFIX) {
                overlay(&mut table, path, &value)
                    .map_err(|message| ConfigError::Variable { name: name.clone(), message })?;
                Self::deserialize(table.clone()).map_err(|error| ConfigError::Variable {
                    name,
                    message: error.to_string().trim_end().to_owned(),
                })?;
            }
        }
        let config = Self::deserialize(table)
            .map_err(|error| ConfigError::Invalid { key: "configuration".to_owned(), message: error.to_string() })?;
        config.check()?;
        Ok(config)
    }

    /// What types alone cannot say.
    pub fn check(&self) -> Result<(), ConfigError> {
        let invalid =
            |key: &str, message: &str| Err(ConfigError::Invalid { key: key.to_owned(), message: message.to_owned() });
        for (key, name) in [("instance", &self.instance), ("workspace", &self.workspace)] {
            if !is_identifier(name) {
                return invalid(key, "must be 1 to 64 of A-Z a-z 0-9 . _ - and begin with a letter or digit");
            }
        }
        if !self.state_dir.is_absolute() {
            return invalid("state_dir", "must be an absolute path");
        }
        if self.auth.lease_ttl_seconds == 0 || self.auth.lease_ttl_seconds > LEASE_TTL_CEILING_SECONDS {
            return invalid("auth.lease_ttl_seconds", "must be 1 to 3600");
        }
        if self.sandbox.uid_base == 0 || self.sandbox.uid_count == 0 {
            return invalid("sandbox.uid_base", "an execution never runs as uid 0, and needs at least one uid");
        }
        if self.sandbox.uid_base.checked_add(self.sandbox.uid_count).is_none() {
            return invalid("sandbox.uid_count", "the range runs past the last uid");
        }
        if self.sandbox.max_concurrent == 0 || self.sandbox.max_concurrent > self.sandbox.uid_count as usize {
            return invalid(
                "sandbox.max_concurrent",
                "must be 1 to sandbox.uid_count: each execution has a uid of its own",
            );
        }
        if let Some(name) = self.profiles.keys().find(|name| !is_identifier(name)) {
            return Err(ConfigError::Invalid {
                key: format!("profiles.{name}"),
                message: "must be 1 to 64 of A-Z a-z 0-9 . _ - and begin with a letter or digit".to_owned(),
            });
        }
        let room = self.limits.max_body_bytes_in_flight;
        if room < self.limits.max_request_bytes || u32::try_from(room).is_err() {
            return invalid(
                "limits.max_body_bytes_in_flight",
                "must be at least limits.max_request_bytes, or no request of that size is ever read, and below 4 GiB",
            );
        }
        for budget in &self.budgets {
            if budget.max_calls.is_none() && budget.max_cost_usd_cents.is_none() {
                return invalid("budgets", "an entry without max_calls and max_cost_usd_cents limits nothing");
            }
        }
        self.check_listeners()
    }

    fn check_listeners(&self) -> Result<(), ConfigError> {
        let mut names = std::collections::BTreeSet::new();
        for (index, listener) in self.listeners.iter().enumerate() {
            let invalid = |key: &str, message: String| {
                Err(ConfigError::Invalid { key: format!("listeners[{index}].{key}"), message })
            };
            if !is_identifier(&listener.name) {
                return invalid("name", "must be 1 to 64 of A-Z a-z 0-9 . _ -".to_owned());
            }
            if !names.insert(&listener.name) {
                return invalid("name", format!("`{}` is taken: a lease names its listener", listener.name));
            }
            match (&listener.path, &listener.address) {
                (Some(path), None) => {
                    if !path.is_absolute() {
                        return invalid("path", "must be an absolute path".to_owned());
                    }
                    if listener.principal.is_none() && listener.peers.is_none() {
                        return invalid(
                            "principal",
                            "a Unix listener needs a principal: it is the identity".to_owned(),
                        );
                    }
                }
                (None, Some(_)) => {
                    if listener.peers.is_some() || listener.mode.is_some() || listener.group.is_some() {
                        return invalid("address", "peers, mode and group are of Unix sockets".to_owned());
                    }
                    if listener.principal.is_some() {
                        return invalid("principal", "a TCP listener's principal stands in [identity.tcp]".to_owned());
                    }
                }
                _ => return invalid("path", "exactly one of path and address".to_owned()),
            }
            let dots = |path: &Path| path.components().any(|part| part == std::path::Component::ParentDir);
            if listener.path.as_deref().is_some_and(dots) {
                return invalid("path", "must not hold `..`".to_owned());
            }
            if let Some(mode) = &listener.mode
                && u32::from_str_radix(mode, 8).map_or(true, |bits| bits > 0o777)
            {
                return invalid("mode", "must be octal permission bits, as \"0660\"".to_owned());
            }
            for (uid, principal) in listener.peers.iter().flatten() {
                if uid.parse::<u32>().is_err() || principal.is_empty() {
                    return invalid("peers", format!("`{uid}` = `{principal}`: a numeric uid and a principal"));
                }
            }
            // Who mounts the directory of an agents' socket has what is below it as well.
            let operators = self.operators.socket.as_deref().and_then(Path::parent);
            if let Some(ours) = listener.path.as_deref().and_then(Path::parent) {
                if operators.is_some_and(|theirs| theirs.starts_with(ours)) {
                    return invalid("path", "agents and operators must not share a directory".to_owned());
                }
                if self.state_dir.starts_with(ours) {
                    return invalid("path", "state_dir must not be in the directory of an agents' socket".to_owned());
                }
            }
        }
        Ok(())
    }
}

/// 1 to 64 characters that are safe in a path, a cgroup name and a log line.
fn is_identifier(name: &str) -> bool {
    name.len() <= 64
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
}

/// Sets `SECTION__KEY` in `table`. The value is read as TOML where it is TOML, as a string where it is not.
fn overlay(table: &mut toml::Table, path: &str, value: &str) -> Result<(), String> {
    let keys: Vec<String> = path.split("__").map(str::to_ascii_lowercase).collect();
    let Some((last, sections)) = keys.split_last().filter(|_| keys.iter().all(|key| !key.is_empty())) else {
        return Err(format!("`{path}` is no key: write {ENVIRONMENT_PREFIX}SECTION__KEY"));
    };
    let mut at = table;
    for section in sections {
        at = at
            .entry(section.clone())
            .or_insert_with(|| toml::Value::Table(toml::Table::new()))
            .as_table_mut()
            .ok_or_else(|| format!("`{section}` is no section"))?;
    }
    let parsed = toml::from_str::<toml::Table>(&format!("value = {value}"))
        .ok()
        .and_then(|mut parsed| if parsed.len() == 1 { parsed.remove("value") } else { None })
        .unwrap_or_else(|| toml::Value::String(value.to_owned()));
    at.insert(last.clone(), parsed);
    Ok(())
}

#[cfg(test)]
mod tests;
