//! The manifest as it is written.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use serde_json::Value;
use serde_saphyr::Spanned;

use super::{ResourceLimits, RiskLevel, SecretDeclaration, Stdin};
use crate::egress::profile::DomainEntry;

#[derive(Debug, Deserialize)]
pub(super) struct RawManifest {
    pub action_id: Spanned<String>,
    pub version: Spanned<String>,
    pub provider_module_digest: Spanned<String>,
    #[serde(default)]
    pub required_imports: Vec<String>,
    pub template: Option<Spanned<RawTemplate>>,
    pub command: Option<Spanned<RawCommand>>,
    #[serde(default)]
    pub io: RawIo,
    #[serde(default)]
    pub resource_limits: ResourceLimits,
    #[serde(default)]
    pub egress: RawEgress,
    #[serde(default)]
    pub cost_usd_cents: u64,
    #[serde(default)]
    pub secrets: Vec<Spanned<SecretDeclaration>>,
    /// Left out, the action is taken for a dangerous one.
    #[serde(default = "high")]
    pub risk_level: RiskLevel,
    pub verifier_kind: Option<RawVerifierKind>,
    pub verification_config: Option<RawVerification>,
    #[serde(default)]
    pub declared_side_effects: Vec<String>,
    #[serde(default = "tools_call")]
    pub required_scopes: Spanned<Vec<String>>,
    #[serde(default)]
    pub tags: Vec<String>,
}

const fn high() -> RiskLevel {
    RiskLevel::High
}

fn tools_call() -> Spanned<Vec<String>> {
    Spanned::new(vec!["tools:call".to_owned()], serde_saphyr::Location::UNKNOWN, serde_saphyr::Location::UNKNOWN)
}

#[derive(Debug, Deserialize)]
pub(super) struct RawTemplate {
    pub method: String,
    pub url_template: String,
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    pub body_template: Option<Value>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawCommand {
    pub argv: Vec<String>,
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    #[serde(default)]
    pub stdin: Stdin,
    #[serde(default)]
    pub files: Vec<RawFile>,
    pub rootfs: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawFile {
    pub path: PathBuf,
    pub sha256: String,
}

#[derive(Debug, Deserialize)]
#[serde(default)]
pub(super) struct RawIo {
    /// A schema, or the path of a file that holds one.
    pub request_schema: Option<Spanned<Value>>,
    pub response_schema: Option<Spanned<Value>>,
    pub max_request_bytes: u64,
    pub max_response_bytes: u64,
}

impl Default for RawIo {
    fn default() -> Self {
        Self { request_schema: None, response_schema: None, max_request_bytes: 64 * 1024, max_response_bytes: 1 << 20 }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct RawEgress {
    pub profile: RawProfile,
    pub allowed_domains: Vec<Spanned<DomainEntry>>,
    pub allowed_methods: Option<Spanned<Vec<String>>>,
    pub on_unresolved: Option<Spanned<OnUnresolved>>,
    pub mode: Option<Spanned<Mode>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum RawProfile {
    #[default]
    None,
    ProxyAllowlist,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum OnUnresolved {
    Deny,
    Hold,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Mode {
    Enforce,
    UnsafeAudit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum RawVerifierKind {
    HttpStatus,
    None,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct RawVerification {
    pub expected_status: Vec<u16>,
    pub required_fields: Vec<String>,
}
