//! Action manifests: what an action is, what it may reach, and how its call is made.
//!
//! A manifest is read twice: into types, whose errors know their line, and as plain JSON, over which `action_digest` is
//! taken and in which unknown keys are looked for. Whatever the contract has and this build could not hold an execution
//! to is an error here, because a configuration that cannot be enforced does not start.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::action::registry::AddedDomains;
use crate::action::schema::{Schema, SchemaViolation};
use crate::action::template::{self, HttpCall, Template, TemplateError};
use crate::egress::profile::{Denied, DenyReason, Permitted, Profile};

mod keys;
mod load;
mod raw;
#[cfg(test)]
mod tests;
mod verify;
mod view;

pub use load::ManifestError;
pub use verify::{Verification, Verifier};

/// The largest manifest that is read, in bytes.
pub const MAX_MANIFEST_BYTES: usize = 256 * 1024;

/// One action, checked and compiled. Made only by [`Manifest::parse`].
#[derive(Debug)]
pub struct Manifest {
    pub action_id: String,
    pub version: String,
    pub call: Call,
    pub required_imports: Vec<String>,
    pub request_schema: Option<Schema>,
    pub response_schema: Option<Schema>,
    /// The longest request body, in bytes.
    pub max_request_bytes: u64,
    /// The longest answer that an execution may give, in bytes.
    pub max_response_bytes: u64,
    pub limits: ResourceLimits,
    pub profile: Arc<Profile>,
    /// `None` leaves the method to the template and the schema.
    pub allowed_methods: Option<Vec<String>>,
    pub cost_usd_cents: u64,
    pub secrets: Vec<SecretDeclaration>,
    pub risk_level: RiskLevel,
    pub verifier: Verifier,
    pub declared_side_effects: Vec<String>,
    pub required_scopes: Vec<String>,
    pub tags: Vec<String>,
    /// What `latchgate actions lint` says: unknown keys, and things that load and deserve a look.
    pub warnings: Vec<Warning>,
    digest: String,
    /// Whether it says `egress.mode: unsafe_audit`, which the gate's configuration must permit.
    pub asks_for_audit: bool,
    /// The `default`s of the request schema's own properties, for params that a template names and a call leaves out.
    defaults: Map<String, Value>,
}

/// How the action does its work.
#[derive(Debug)]
pub enum Call {
    /// `builtin:http_api`: one request by the gate's worker.
    Http(Template),
    /// `builtin:command`: a program in the sandbox.
    Command(Command),
}

/// A program with what it gets. Nothing in it comes from params: those are on its standard input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// Never empty.
    pub argv: Vec<String>,
    pub env: BTreeMap<String, String>,
    pub stdin: Stdin,
    pub files: Vec<SealedFile>,
    pub root: RootFilesystem,
}

/// A file that is hashed into a sealed copy, which is what runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealedFile {
    pub path: PathBuf,
    /// 64 lower-case hexadecimal digits.
    pub sha256: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stdin {
    /// The validated params, as JSON.
    #[default]
    Params,
    /// Nothing: end of file at once.
    None,
}

/// What the program sees as `/`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum RootFilesystem {
    /// The host's programs and libraries, read-only.
    #[default]
    Host,
    /// Nothing but the sealed files.
    Empty,
    Directory(PathBuf),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RiskLevel {
    Low,
    Medium,
    High,
    Critical,
}

/// What an execution may use. Units are in the names, as the contract writes them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ResourceLimits {
    /// Mebibytes.
    pub memory_mb: u64,
    pub timeout_seconds: u64,
    /// Of WebAssembly providers; a built-in HTTP action makes one call.
    pub max_io_calls: u64,
    /// Of WebAssembly providers; kept because manifests and clients have it.
    pub fuel: u64,
    pub max_host_response_bytes: u64,
}

impl Default for ResourceLimits {
    fn default() -> Self {
        Self {
            memory_mb: 128,
            timeout_seconds: 30,
            max_io_calls: 10,
            fuel: 0,
            max_host_response_bytes: 4 * 1024 * 1024,
        }
    }
}

/// A secret that the manifest names. This build has none to give, so a required one is an error at load.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct SecretDeclaration {
    pub name: String,
    #[serde(default = "yes")]
    pub required: bool,
    #[serde(default)]
    pub inject: Option<SecretInjection>,
}

const fn yes() -> bool {
    true
}

/// Where a secret would be put. Typed so that a mistake in it shows now.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecretInjection {
    pub header: String,
    #[serde(default)]
    pub format: Option<String>,
    #[serde(default)]
    pub hosts: Vec<String>,
}

/// Something to look at, where it is known on which line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    pub line: Option<u64>,
    pub what: String,
}

/// A call that is ready to be checked against the profile and sent into the sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prepared {
    Http(HttpCall),
    Command { command: Command, stdin: Vec<u8> },
}

impl Prepared {
    /// The (host, port) pairs that the params name: what the profile is asked about before policy is.
    pub fn targets(&self) -> Vec<(String, u16)> {
        match self {
            Self::Http(call) => vec![(call.host.clone(), call.port)],
            Self::Command { .. } => Vec::new(),
        }
    }

    /// Whether the profile permits what the params name: host and port, and the protocol and method of its entry.
    ///
    /// # Errors
    /// [`Denied`] for what is not permitted.
    pub fn within(&self, profile: &Profile) -> Result<(), Denied> {
        let Self::Http(call) = self else { return Ok(()) };
        let over_tls = call.url.starts_with("https:");
        let permitted = match profile.permits_target(&call.host, call.port) {
            Err(denied) => return profile.audits(&call.host, call.port).map(drop).map_err(|_| denied),
            Ok(permitted) => permitted,
        };
        match permitted {
            Permitted::Name(entry) => entry.permits_request(&call.method, over_tls),
            Permitted::Address(entry) => entry.protocol().permits_request(over_tls),
        }
    }
}

/// The (host, port) pairs that a call with these params would contact.
///
/// # Errors
/// [`TemplateError`] when the params do not fit the template.
pub fn targets(manifest: &Manifest, params: &Map<String, Value>) -> Result<Vec<(String, u16)>, TemplateError> {
    Ok(manifest.prepare(params)?.targets())
}

impl Manifest {
    /// Reads a manifest. `base` is the directory that schema files are relative to; without it a schema is written
    /// into the manifest.
    ///
    /// # Errors
    /// [`ManifestError`] with the line, for what is malformed, unknown to this build or not enforceable by it.
    pub fn parse(text: &str, base: Option<&Path>) -> Result<Self, ManifestError> {
        load::parse(text, base, &AddedDomains::new())
    }

    /// The same, with what a configuration adds to the action's `egress.allowed_domains`.
    ///
    /// # Errors
    /// [`ManifestError`].
    pub fn parse_with(text: &str, base: Option<&Path>, added: &AddedDomains) -> Result<Self, ManifestError> {
        load::parse(text, base, added)
    }

    /// `action_digest`: `sha256:<hex>` of the JCS form of the manifest as parsed, schema files included.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// `provider_module_digest` as the manifest has it; a receipt names what really ran instead.
    pub const fn provider(&self) -> &'static str {
        match self.call {
            Call::Http(_) => "builtin:http_api",
            Call::Command(_) => "builtin:command",
        }
    }

    /// # Errors
    /// The first violation of the request schema.
    pub fn validate(&self, params: &Value) -> Result<(), SchemaViolation> {
        self.request_schema.as_ref().map_or(Ok(()), |schema| schema.validate(params))
    }

    /// Makes the call of validated params. A param that a template names and the call leaves out has the `default` that
    /// the request schema gives it.
    ///
    /// # Errors
    /// [`TemplateError`] when the params do not fit the template.
    pub fn prepare(&self, params: &Map<String, Value>) -> Result<Prepared, TemplateError> {
        match &self.call {
            Call::Http(template) if self.defaults.keys().all(|name| params.contains_key(name)) => {
                template::render(template, params).map(Prepared::Http)
            }
            Call::Http(template) => {
                let mut filled = self.defaults.clone();
                filled.extend(params.clone());
                template::render(template, &filled).map(Prepared::Http)
            }
            Call::Command(command) => {
                let stdin = match command.stdin {
                    Stdin::Params => Value::Object(params.clone()).to_string().into_bytes(),
                    Stdin::None => Vec::new(),
                };
                Ok(Prepared::Command { command: command.clone(), stdin })
            }
        }
    }

    /// Whether the profile and `allowed_methods` permit what the call names.
    ///
    /// # Errors
    /// [`Denied`] for the first target or method that is not permitted.
    pub fn permits(&self, call: &Prepared) -> Result<(), Denied> {
        if let (Prepared::Http(http), Some(methods)) = (call, &self.allowed_methods)
            && !methods.contains(&http.method)
        {
            return Err(DenyReason::MethodNotAllowed.into());
        }
        call.within(&self.profile)
    }

    /// The names of the secrets that the manifest declares, for policy input.
    pub fn secret_names(&self) -> Vec<String> {
        self.secrets.iter().map(|secret| secret.name.clone()).collect()
    }
}
