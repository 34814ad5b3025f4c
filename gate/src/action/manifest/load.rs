//! From text to a [`Manifest`].

use std::fs;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};
use serde_saphyr::{Location, Spanned};

use super::raw::{
    Mode, OnUnresolved, RawCommand, RawEgress, RawManifest, RawProfile, RawVerification, RawVerifierKind,
};
use super::{Call, Command, MAX_MANIFEST_BYTES, Manifest, RootFilesystem, SealedFile, Verifier, Warning, keys};
use crate::action::canonical;
use crate::action::registry::AddedDomains;
use crate::action::schema::Schema;
use crate::action::template::{METHODS, Template};
use crate::egress::profile::{DomainEntry, NotEnforced, Profile, Rule};
use crate::hash::sha256_tagged;

/// Why a manifest does not load.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{what}", line.map(|line| format!("line {line}: ")).unwrap_or_default())]
pub struct ManifestError {
    /// Counted from 1; absent for what is missing.
    pub line: Option<u64>,
    pub what: String,
}

impl ManifestError {
    fn new(what: impl ToString) -> Self {
        Self { line: None, what: what.to_string() }
    }

    fn at(location: Location, what: impl ToString) -> Self {
        Self { line: line(location), what: what.to_string() }
    }

    fn yaml(error: &serde_saphyr::Error) -> Self {
        let plain = error.without_snippet();
        // The position is in `line`; the rest of what the parser renders is a picture for terminals.
        let text = plain.to_string();
        let what = text.lines().next().unwrap_or_default().to_owned();
        Self { line: error.location().and_then(line), what }
    }
}

fn line(location: Location) -> Option<u64> {
    Some(location.line()).filter(|&line| line > 0)
}

pub(super) fn parse(text: &str, base: Option<&Path>, added: &AddedDomains) -> Result<Manifest, ManifestError> {
    if text.len() > MAX_MANIFEST_BYTES {
        return Err(ManifestError::new(format!("is longer than {MAX_MANIFEST_BYTES} bytes")));
    }
    // `yes`, `no` and `on` are strings, as YAML 1.2 has them and as the published gate reads them.
    let options = || serde_saphyr::options! { strict_booleans: true };
    let mut raw: RawManifest =
        serde_saphyr::from_str_with_options(text, options()).map_err(|error| ManifestError::yaml(&error))?;
    let mut plain: Value =
        serde_saphyr::from_str_with_options(text, options()).map_err(|error| ManifestError::yaml(&error))?;
    let mut warnings = keys::unknown(&plain, text);

    check_identity(&raw)?;
    if let Some(added) = added.get(&raw.action_id.value) {
        add_domains(&mut raw, &mut plain, added)?;
    }
    let allowed_methods = allowed_methods(&raw)?;
    let call = call(&raw, allowed_methods.as_deref())?;
    let profile = profile(&raw.egress, &mut warnings)?;
    check_secrets(&raw, &mut warnings)?;
    check_scopes(&raw.required_scopes)?;
    check_limits(&raw)?;
    let request_schema = schema(raw.io.request_schema.as_ref(), "request_schema", base, &mut plain)?;
    let response_schema = schema(raw.io.response_schema.as_ref(), "response_schema", base, &mut plain)?;
    if let (Call::Http(template), Some(schema)) = (&call, &request_schema) {
        unreachable_params(template, schema, &mut warnings);
    }
    let defaults = match (&call, &request_schema) {
        (Call::Http(template), Some(schema)) => defaults(template, schema)?,
        _ => Map::new(),
    };
    let digest = canonical::jcs(&plain).map(|bytes| sha256_tagged(&bytes)).map_err(ManifestError::new)?;
    Ok(Manifest {
        action_id: raw.action_id.value,
        version: raw.version.value,
        call,
        required_imports: raw.required_imports,
        request_schema,
        response_schema,
        max_request_bytes: raw.io.max_request_bytes,
        max_response_bytes: raw.io.max_response_bytes,
        limits: raw.resource_limits,
        profile: Arc::new(profile),
        asks_for_audit: audit(&raw.egress).is_some(),
        allowed_methods,
        cost_usd_cents: raw.cost_usd_cents,
        secrets: raw.secrets.into_iter().map(|secret| secret.value).collect(),
        risk_level: raw.risk_level,
        verifier: verifier(raw.verifier_kind, raw.verification_config.unwrap_or_default())?,
        declared_side_effects: raw.declared_side_effects,
        required_scopes: raw.required_scopes.value,
        tags: raw.tags,
        warnings,
        digest,
        defaults,
    })
}

/// Writes added domains into both readings of the manifest.
fn add_domains(raw: &mut RawManifest, plain: &mut Value, added: &[Value]) -> Result<(), ManifestError> {
    let wrong = |error: &dyn std::fmt::Display| ManifestError::new(format!("added domains: {error}"));
    if raw.egress.profile == RawProfile::None {
        return Err(wrong(&"egress.profile none reaches nothing"));
    }
    for entry in added {
        let domain: DomainEntry = serde_json::from_value(entry.clone()).map_err(|error| wrong(&error))?;
        domain.rule().map_err(|error| wrong(&error))?;
        raw.egress.allowed_domains.push(Spanned::new(domain, Location::UNKNOWN, Location::UNKNOWN));
    }
    let written = plain
        .pointer_mut("/egress")
        .and_then(Value::as_object_mut)
        .map(|egress| egress.entry("allowed_domains").or_insert_with(|| Value::Array(Vec::new())))
        .and_then(Value::as_array_mut)
        .ok_or_else(|| wrong(&"egress.allowed_domains is not a list"))?;
    written.extend(added.iter().cloned());
    Ok(())
}

fn check_identity(raw: &RawManifest) -> Result<(), ManifestError> {
    let id = &raw.action_id;
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if id.value.len() > 128 || !id.value.starts_with(|c: char| c.is_ascii_alphanumeric()) || !id.value.chars().all(fits)
    {
        return Err(ManifestError::at(id.referenced, "action_id must match ^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"));
    }
    let version = &raw.version;
    if version.value.is_empty() || version.value.len() > 64 || !version.value.chars().all(|c| c.is_ascii_graphic()) {
        return Err(ManifestError::at(version.referenced, "version must be 1 to 64 printable characters"));
    }
    Ok(())
}

fn call(raw: &RawManifest, allowed: Option<&[String]>) -> Result<Call, ManifestError> {
    let provider = &raw.provider_module_digest;
    let here = |what: String| ManifestError::at(provider.referenced, what);
    match provider.value.as_str() {
        "builtin:http_api" => {
            if let Some(command) = &raw.command {
                return Err(ManifestError::at(command.referenced, "command belongs to builtin:command"));
            }
            let Some(template) = &raw.template else {
                return Ok(Call::Http(Template::FromParams));
            };
            let (at, raw) = (template.referenced, &template.value);
            let template = Template::parse(&raw.method, &raw.url_template, &raw.headers, raw.body_template.as_ref())
                .map_err(|error| ManifestError::at(at, error))?;
            if let (Some(method), Some(allowed)) = (template.method(), allowed)
                && !allowed.iter().any(|one| one == method)
            {
                return Err(ManifestError::at(at, format!("allowed_methods does not have the template's {method}")));
            }
            Ok(Call::Http(template))
        }
        "builtin:command" => {
            if let Some(template) = &raw.template {
                return Err(ManifestError::at(template.referenced, "template belongs to builtin:http_api"));
            }
            let command = raw.command.as_ref().ok_or_else(|| here("builtin:command needs a command".to_owned()))?;
            if let Some(methods) = &raw.egress.allowed_methods {
                let what = NotEnforced::new("allowed_methods for builtin:command");
                return Err(ManifestError::at(methods.referenced, what));
            }
            compile_command(&command.value)
                .map(Call::Command)
                .map_err(|what| ManifestError::at(command.referenced, what))
        }
        other if other.strip_prefix("sha256:").is_some_and(is_sha256) => {
            Err(here("a provider by digest is a WebAssembly module, which this build does not run".to_owned()))
        }
        other => Err(here(format!("provider_module_digest {other:?} is none of builtin:http_api, builtin:command"))),
    }
}

fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

fn is_absolute_and_plain(path: &Path) -> bool {
    path.is_absolute() && path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
}

fn compile_command(raw: &RawCommand) -> Result<Command, String> {
    let program = raw.argv.first().ok_or("argv is empty")?;
    if !is_absolute_and_plain(Path::new(program)) {
        return Err(format!("argv: {program:?} is not an absolute path without . and .."));
    }
    for text in raw.argv.iter().chain(raw.env.values()) {
        if text.contains('\0') {
            return Err("a NUL character cannot be in argv or env".to_owned());
        }
        // Expanding it would put an agent's words where a program reads options; leaving it would surprise.
        if text.contains("{{") {
            return Err(format!("{text:?}: params are given on stdin, never in argv or env"));
        }
    }
    for name in raw.env.keys() {
        let fits = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if name.starts_with(|c: char| c.is_ascii_digit()) || name.is_empty() || !name.chars().all(fits) {
            return Err(format!("env: {name:?} is not a variable name"));
        }
    }
    let mut files: Vec<SealedFile> = Vec::new();
    for file in &raw.files {
        if !is_absolute_and_plain(&file.path) {
            return Err(format!("files: {} is not an absolute path without . and ..", file.path.display()));
        }
        let digest = file.sha256.strip_prefix("sha256:").unwrap_or(&file.sha256);
        if !is_sha256(digest) {
            return Err(format!("files: {}: sha256 is not 64 lower-case hexadecimal digits", file.path.display()));
        }
        if files.iter().any(|other| other.path == file.path) {
            return Err(format!("files: {} is there twice", file.path.display()));
        }
        files.push(SealedFile { path: file.path.clone(), sha256: digest.to_owned() });
    }
    let root = match raw.rootfs.as_deref() {
        None | Some("host") => RootFilesystem::Host,
        Some("empty") => RootFilesystem::Empty,
        Some(path) if path != "/" && is_absolute_and_plain(Path::new(path)) => {
            RootFilesystem::Directory(PathBuf::from(path))
        }
        Some(other) => return Err(format!("rootfs: {other:?} is none of host, empty and an absolute path")),
    };
    Ok(Command { argv: raw.argv.clone(), env: raw.env.clone(), stdin: raw.stdin, files, root })
}

fn allowed_methods(raw: &RawManifest) -> Result<Option<Vec<String>>, ManifestError> {
    let Some(methods) = &raw.egress.allowed_methods else {
        return Ok(None);
    };
    let upper: Vec<String> = methods.value.iter().map(|method| method.to_ascii_uppercase()).collect();
    match upper.iter().find(|method| !METHODS.contains(&method.as_str())) {
        Some(other) => Err(ManifestError::at(methods.referenced, format!("allowed_methods: {other:?} is unknown"))),
        None => Ok(Some(upper)),
    }
}

/// The mode, where it is `unsafe_audit`.
fn audit(raw: &RawEgress) -> Option<&Spanned<Mode>> {
    raw.mode.as_ref().filter(|it| it.value == Mode::UnsafeAudit)
}

fn profile(raw: &RawEgress, warnings: &mut Vec<Warning>) -> Result<Profile, ManifestError> {
    if let Some(hold) = raw.on_unresolved.as_ref().filter(|it| it.value == OnUnresolved::Hold) {
        return Err(ManifestError::at(hold.referenced, NotEnforced::new("egress.on_unresolved: hold")));
    }
    if let (Some(audit), RawProfile::None) = (audit(raw), raw.profile) {
        return Err(ManifestError::at(
            audit.referenced,
            "egress.mode unsafe_audit lets names through, and profile none lets nothing",
        ));
    }
    let (mut entries, mut networks) = (Vec::new(), Vec::new());
    for domain in &raw.allowed_domains {
        let (rule, remark) = domain
            .value
            .rule()
            .map_err(|error| ManifestError::at(domain.referenced, format!("allowed_domains: {error}")))?;
        warnings.extend(remark.map(|what| Warning { line: line(domain.referenced), what }));
        match rule {
            Rule::Names(entry) => entries.push(entry),
            Rule::Addresses(entry) => networks.push(entry),
        }
    }
    match (raw.profile, raw.allowed_domains.first()) {
        (RawProfile::None, Some(first)) => Err(ManifestError::at(
            first.referenced,
            "egress.profile none reaches nothing, and allowed_domains names something",
        )),
        (RawProfile::None, None) => Ok(Profile::None),
        (RawProfile::ProxyAllowlist, first) => {
            let profile = Profile::allowlist(entries).with_networks(networks);
            match (profile.contradiction(), first) {
                (Some((one, other)), Some(first)) => Err(ManifestError::at(
                    first.referenced,
                    format!(
                        "allowed_domains: `{one}` and `{other}` say different things about the same names and ports"
                    ),
                )),
                _ => Ok(profile),
            }
        }
    }
}

fn check_secrets(raw: &RawManifest, warnings: &mut Vec<Warning>) -> Result<(), ManifestError> {
    for secret in &raw.secrets {
        let (at, name) = (secret.referenced, &secret.value.name);
        if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-') {
            return Err(ManifestError::at(at, format!("secrets: {name:?} is not a name")));
        }
        if secret.value.required {
            let what = format!("the secret {name} is required, and this build cannot give secrets to actions yet");
            return Err(ManifestError::at(at, what));
        }
        let what = format!("the secret {name} is optional and is not given: this build has no secrets yet");
        warnings.push(Warning { line: line(at), what });
    }
    Ok(())
}

fn check_scopes(scopes: &Spanned<Vec<String>>) -> Result<(), ManifestError> {
    // None of its own: what every execution needs is `tools:call`, and the pipeline asks for it in any case.
    let fits = |scope: &&String| {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b':' | b'_' | b'-' | b'.');
        scope.len() <= 64
            && scope.bytes().all(plain)
            && scope.split_once(':').is_some_and(|(space, name)| !space.is_empty() && !name.is_empty())
    };
    match scopes.value.iter().find(|scope| !fits(scope)) {
        Some(scope) => {
            Err(ManifestError::at(scopes.referenced, format!("required_scopes: {scope:?} is not `space:name`")))
        }
        None => Ok(()),
    }
}

fn check_limits(raw: &RawManifest) -> Result<(), ManifestError> {
    let limits = &raw.resource_limits;
    for (name, value, most) in [
        ("resource_limits.memory_mb", limits.memory_mb, 64 * 1024),
        ("resource_limits.timeout_seconds", limits.timeout_seconds, 3_600),
        ("resource_limits.max_host_response_bytes", limits.max_host_response_bytes, 1 << 30),
        ("io.max_request_bytes", raw.io.max_request_bytes, 64 << 20),
        ("io.max_response_bytes", raw.io.max_response_bytes, 1 << 30),
    ] {
        if value == 0 || value > most {
            return Err(ManifestError::new(format!("{name} must be 1 to {most}, and is {value}")));
        }
    }
    Ok(())
}

fn verifier(kind: Option<RawVerifierKind>, config: RawVerification) -> Result<Verifier, ManifestError> {
    if let Some(status) = config.expected_status.iter().find(|status| !(100..600).contains(*status)) {
        return Err(ManifestError::new(format!("verification_config.expected_status: {status} is no HTTP status")));
    }
    Ok(match kind {
        None | Some(RawVerifierKind::None) => Verifier::None,
        Some(RawVerifierKind::HttpStatus) => {
            Verifier::HttpStatus { expected_status: config.expected_status, required_fields: config.required_fields }
        }
    })
}

/// Compiles a schema that is written out or lies in a file beside the manifests. A file's schema takes the place of its
/// name in what is digested, so that editing the file changes the action.
fn schema(
    raw: Option<&Spanned<Value>>,
    key: &str,
    base: Option<&Path>,
    plain: &mut Value,
) -> Result<Option<Schema>, ManifestError> {
    let Some(raw) = raw.filter(|raw| !raw.value.is_null()) else {
        return Ok(None);
    };
    let wrong = |what: String| ManifestError::at(raw.referenced, format!("io.{key}: {what}"));
    let source = match &raw.value {
        Value::String(path) => {
            let base = base.ok_or_else(|| wrong("a schema file needs a directory of manifests".to_owned()))?;
            let text = fs::read_to_string(base.join(path)).map_err(|error| wrong(format!("{path}: {error}")))?;
            let source: Value = serde_json::from_str(&text).map_err(|error| wrong(format!("{path}: {error}")))?;
            if let Some(place) = plain.pointer_mut(&format!("/io/{key}")) {
                place.clone_from(&source);
            }
            source
        }
        source => source.clone(),
    };
    Schema::compile(&source).map(Some).map_err(|error| wrong(error.to_string()))
}

/// A param that the template needs and the schema does not let in can never be given.
fn unreachable_params(template: &Template, schema: &Schema, warnings: &mut Vec<Warning>) {
    let Template::Given { .. } = template else {
        return;
    };
    let closed = schema.source().get("additionalProperties") == Some(&Value::Bool(false));
    let Some(known) = schema.source().get("properties").and_then(Value::as_object).filter(|_| closed) else {
        return;
    };
    for param in template.params() {
        if !known.contains_key(param) {
            let what = format!("the template uses {{{{{param}}}}}, which the request schema does not let in");
            warnings.push(Warning { line: None, what });
        }
    }
}

/// The defaults of the params that a template names. They stand for what a caller could have sent, so the schema has to
/// let them in.
fn defaults(template: &Template, schema: &Schema) -> Result<Map<String, Value>, ManifestError> {
    let mut found = Map::new();
    let Template::Given { .. } = template else {
        return Ok(found);
    };
    for param in template.params() {
        let property = schema.source().get("properties").and_then(|properties| properties.get(param));
        let Some((property, default)) = property.and_then(|property| Some((property, property.get("default")?))) else {
            continue;
        };
        let wrong = |what: &dyn std::fmt::Display| {
            ManifestError::new(format!("io.request_schema: the default of {param:?}: {what}"))
        };
        // A property that refers elsewhere in its schema cannot be compiled alone: such a default does not load.
        let alone = Schema::compile(property).map_err(|error| wrong(&error))?;
        alone.validate(default).map_err(|violation| wrong(&violation.what))?;
        found.insert(param.to_owned(), default.clone());
    }
    Ok(found)
}
