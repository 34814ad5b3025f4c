//! Rego inside the gate, by regorus.

use std::fs;
use std::num::NonZeroU32;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use regorus::utils::limits::{ExecutionTimerConfig, LimitError};
use serde::Serialize;

use super::{Engine, PolicyDecision, PolicyError, PolicyInput, data};
use crate::action::canonical::jcs;
use crate::hash::{sha256_hex, sha256_tagged};

/// The rule that is asked.
const DECISION: &str = "data.latchgate.decision";

/// How long one decision may take.
pub const TIME_LIMIT: Duration = Duration::from_secs(1);

/// Engines that are kept ready. More are made when more calls are decided at once, and dropped afterwards.
const KEPT_ENGINES: usize = 16;

/// A file of policy (`*.rego`) or of data (`*.json`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    pub name: String,
    pub text: String,
}

/// Why a policy does not load.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyLoadError {
    #[error("{file}: {what}")]
    File { file: String, what: String },
    #[error("there is no policy file")]
    NoPolicy,
    #[error("the policy cannot be asked for {DECISION}: {0}")]
    NoDecision(String),
}

/// A policy that was parsed and analysed once.
pub struct Embedded {
    /// Prepared, never evaluated: every other engine is a clone of it, which shares the parsed policy and the data.
    template: Mutex<regorus::Engine>,
    ready: Mutex<Vec<regorus::Engine>>,
    version: String,
}

impl std::fmt::Debug for Embedded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Embedded").field("version", &self.version).finish_non_exhaustive()
    }
}

impl Embedded {
    /// The policy and data in the binary.
    ///
    /// # Errors
    /// Never, as a test sees to it.
    pub fn builtin() -> Result<Self, PolicyLoadError> {
        Self::load(&Self::builtin_files())
    }

    pub fn builtin_files() -> Vec<File> {
        [
            ("latchgate.rego", include_str!("../../../definitions/policies/latchgate.rego")),
            ("data.json", include_str!("../../../definitions/policies/data.json")),
        ]
        .map(|(name, text)| File { name: name.to_owned(), text: text.to_owned() })
        .into()
    }

    /// Every `*.rego` and `*.json` of a directory, but for tests (`*_test.rego`, `test_*.rego`).
    ///
    /// # Errors
    /// [`PolicyLoadError`] with the file.
    pub fn load_directory(directory: &Path) -> Result<Self, PolicyLoadError> {
        Self::load(&Self::directory_files(directory)?)
    }

    /// What [`Self::load_directory`] loads.
    ///
    /// # Errors
    /// [`PolicyLoadError`] with the file that cannot be read.
    pub fn directory_files(directory: &Path) -> Result<Vec<File>, PolicyLoadError> {
        let failed = |path: &Path, error: &std::io::Error| PolicyLoadError::File {
            file: path.display().to_string(),
            what: error.to_string(),
        };
        let mut files = Vec::new();
        for entry in fs::read_dir(directory).map_err(|error| failed(directory, &error))? {
            let path = entry.map_err(|error| failed(directory, &error))?.path();
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let is_test = name.ends_with("_test.rego") || (name.starts_with("test_") && name.ends_with(".rego"));
            if is_test || !(name.ends_with(".rego") || name.ends_with(".json")) {
                continue;
            }
            let text = fs::read_to_string(&path).map_err(|error| failed(&path, &error))?;
            files.push(File { name, text });
        }
        Ok(files)
    }

    /// # Errors
    /// [`PolicyLoadError`] with the file, when one does not parse, two data files contradict each other, or no rule
    /// `decision` is in package `latchgate`.
    pub fn load(files: &[File]) -> Result<Self, PolicyLoadError> {
        Self::load_with_limit(files, TIME_LIMIT)
    }

    pub(super) fn load_with_limit(files: &[File], limit: Duration) -> Result<Self, PolicyLoadError> {
        let mut files: Vec<&File> = files.iter().collect();
        files.sort_by(|a, b| a.name.cmp(&b.name));
        let mut engine = regorus::Engine::new();
        let mut policies = 0;
        for file in &files {
            let wrong = |error: &dyn std::fmt::Display| PolicyLoadError::File {
                file: file.name.clone(),
                what: error.to_string(),
            };
            if file.name.ends_with(".json") {
                let parsed = data::parse(&file.text).map_err(|error| wrong(&error))?;
                engine.add_data(parsed).map_err(|error| wrong(&error))?;
            } else {
                engine.add_policy(file.name.clone(), file.text.clone()).map_err(|error| wrong(&error))?;
                policies += 1;
            }
        }
        if policies == 0 {
            return Err(PolicyLoadError::NoPolicy);
        }
        engine.set_execution_timer_config(ExecutionTimerConfig {
            limit,
            // Work units between looks at the clock.
            check_interval: NonZeroU32::MIN.saturating_add(63),
        });
        // Asking once prepares the engine, and finds a policy without the rule. The answer to an empty input is not
        // looked at.
        engine.set_input(regorus::Value::new_object());
        engine.eval_rule(DECISION.to_owned()).map_err(|error| PolicyLoadError::NoDecision(error.to_string()))?;
        let version = version(&files).map_err(|error| PolicyLoadError::NoDecision(error.to_string()))?;
        Ok(Self { template: Mutex::new(engine), ready: Mutex::new(Vec::new()), version })
    }

    fn engine(&self) -> regorus::Engine {
        // Nothing panics while these are held; a poisoned lock would still guard whole engines.
        let ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner).pop();
        ready.unwrap_or_else(|| self.template.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    fn give_back(&self, mut engine: regorus::Engine) {
        // No call's params stay behind in an engine that waits.
        engine.set_input(regorus::Value::new_object());
        let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        if ready.len() < KEPT_ENGINES {
            ready.push(engine);
        }
    }
}

impl Engine for Embedded {
    fn evaluate(&self, input: &PolicyInput<'_>) -> Result<PolicyDecision, PolicyError> {
        let input = serde_json::to_string(input).map_err(|error| PolicyError::Invalid(error.to_string()))?;
        let mut engine = self.engine();
        let asked = catch_unwind(AssertUnwindSafe(|| {
            engine.set_input(regorus::Value::from_json_str(&input)?);
            engine.eval_rule(DECISION.to_owned())
        }));
        let value = match asked {
            Ok(Ok(value)) => value,
            // An engine that failed is not asked again.
            Ok(Err(error)) if is_timeout(&*error) => return Err(PolicyError::Timeout),
            Ok(Err(error)) => return Err(PolicyError::Invalid(error.to_string())),
            Err(_) => return Err(PolicyError::Unavailable("the evaluator panicked".to_owned())),
        };
        self.give_back(engine);
        if value == regorus::Value::Undefined {
            return Ok(PolicyDecision::deny("no rule of the policy allows this"));
        }
        let output = value.to_json_str().map_err(|error| PolicyError::Invalid(error.to_string()))?;
        PolicyDecision::from_output(&output)
    }

    fn policy_version(&self) -> &str {
        &self.version
    }
}

fn is_timeout(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if matches!(error.downcast_ref(), Some(LimitError::TimeLimitExceeded { .. })) {
            return true;
        }
        cause = error.source();
    }
    false
}

#[derive(Serialize)]
struct Loaded<'a> {
    name: &'a str,
    sha256: String,
}

fn version(files: &[&File]) -> Result<String, serde_json::Error> {
    let loaded: Vec<Loaded<'_>> =
        files.iter().map(|file| Loaded { name: &file.name, sha256: sha256_hex(file.text.as_bytes()) }).collect();
    let mut bytes = b"latchgate.policy.v1\n".to_vec();
    bytes.extend(jcs(&loaded)?);
    Ok(sha256_tagged(&bytes))
}
