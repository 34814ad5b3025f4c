//! What an ended process means: its kind, its output, and whether the effect was verified.

use serde_json::{Value, json};

use crate::action::manifest::{Call, Manifest, Verification};
use crate::egress::flow::{FlowRecord, Verdict};
use crate::executions::Killed;
use crate::hash;
use crate::ledger::{NormalizedResult, VerificationOutcome};
use crate::sandbox::{Completed, Exit};

/// The meaning of a run.
#[derive(Debug)]
pub struct Interpreted {
    pub result: NormalizedResult,
    /// Why it is no success; `None` for one.
    pub reason: Option<String>,
    pub failure_class: Option<&'static str>,
    pub output: Value,
    pub verification: VerificationOutcome,
    pub effect_evidence: Vec<Value>,
    /// Set when the proxy refused what the action needed: the agent is told that, not of an outage.
    pub egress_denied: Option<String>,
    /// Whether a process may have run at all.
    pub dispatched: bool,
}

impl Interpreted {
    fn failed(
        result: impl FnOnce(String) -> NormalizedResult,
        failure_class: &'static str,
        reason: impl Into<String>,
    ) -> Self {
        let reason = reason.into();
        Self {
            result: result(reason.clone()),
            reason: Some(reason.clone()),
            failure_class: Some(failure_class),
            output: Value::Null,
            verification: VerificationOutcome::ProviderFailedBeforeVerification { reason },
            effect_evidence: Vec::new(),
            egress_denied: None,
            dispatched: true,
        }
    }

    pub fn not_started(message: &str) -> Self {
        tracing::error!(message, "an execution did not start");
        Self { dispatched: false, ..Self::failed(internal_error, "not_started", "the sandbox could not be made") }
    }

    /// An operator ended it; the agent learns that, and not who.
    pub fn killed(killed: &Killed, dispatched: bool) -> Self {
        let mut meant = Self::failed(cancelled, "killed", "killed");
        let why = killed.why.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
        meant.result = cancelled(format!("killed by {}{why}", killed.by));
        Self { dispatched, ..meant }
    }

    /// Nobody can say whether it ran, or how far.
    pub fn unknown(message: &str) -> Self {
        tracing::error!(message, "it is not known how an execution ended");
        Self::failed(internal_error, "outcome_unknown", "it is not known how the execution ended")
    }
}

fn provider_failure(reason: String) -> NormalizedResult {
    NormalizedResult::ProviderFailure { reason }
}

fn timeout(reason: String) -> NormalizedResult {
    NormalizedResult::Timeout { reason }
}

fn cancelled(reason: String) -> NormalizedResult {
    NormalizedResult::Cancelled { reason }
}

fn internal_error(reason: String) -> NormalizedResult {
    NormalizedResult::InternalError { reason }
}

pub fn interpret(manifest: &Manifest, completed: &Completed, flows: &[FlowRecord]) -> Interpreted {
    match completed.exit {
        Exit::TimedOut => {
            return Interpreted::failed(timeout, "timeout", "the action took longer than its manifest allows");
        }
        Exit::Cancelled => return Interpreted::failed(cancelled, "cancelled", "the execution was ended by the gate"),
        Exit::OutputTooLarge => {
            return Interpreted::failed(
                provider_failure,
                "output_too_large",
                "the output is larger than io.max_response_bytes",
            );
        }
        Exit::Signal(signal) => {
            return Interpreted::failed(
                provider_failure,
                "signal",
                format!("the process was ended by signal {signal}"),
            );
        }
        Exit::Code(_) => {}
    }
    let Exit::Code(code) = completed.exit else { unreachable!("the other ends returned above") };
    let parsed: Option<Value> = serde_json::from_slice(&completed.stdout).ok();
    if matches!(manifest.call, Call::Http(_)) {
        return http(manifest, parsed, flows);
    }
    if code != 0 {
        return Interpreted::failed(provider_failure, "exit_code", format!("the command ended with exit code {code}"));
    }
    match parsed {
        None => Interpreted::failed(provider_failure, "output_not_json", "the command's standard output is not JSON"),
        Some(output) => succeeded(manifest, output, Vec::new()),
    }
}

fn http(manifest: &Manifest, parsed: Option<Value>, flows: &[FlowRecord]) -> Interpreted {
    let Some(output) = parsed else {
        return Interpreted::failed(internal_error, "worker", "the worker did not answer");
    };
    if output.get("ok") != Some(&Value::Bool(true)) {
        let field = |name: &str| output.pointer(&format!("/error/{name}")).and_then(Value::as_str);
        let reason = field("reason").unwrap_or("the request failed").to_owned();
        let denied = field("kind") == Some("egress_denied") || flows.iter().any(|flow| flow.verdict == Verdict::Deny);
        let timed_out = field("kind") == Some("timeout");
        let mut failed = match (denied, timed_out) {
            (true, _) => Interpreted::failed(provider_failure, "egress_denied", reason.clone()),
            (_, true) => Interpreted::failed(timeout, "timeout", reason.clone()),
            _ => Interpreted::failed(provider_failure, "http", reason.clone()),
        };
        failed.egress_denied = denied.then_some(reason);
        return failed;
    }
    let status = output.pointer("/data/status_code").and_then(Value::as_u64);
    let body = output.pointer("/data/body").map(Value::to_string).unwrap_or_default();
    // The origin alone: path and query come from the params, which the record has by hash and which can be erased.
    let origin = output
        .pointer("/data/url")
        .and_then(Value::as_str)
        .and_then(|url| url::Url::parse(url).ok())
        .map(|url| url.origin().ascii_serialization());
    let evidence = json!({
        "kind": "http_response",
        "status_code": status,
        "origin": origin,
        "body_hash": hash::sha256_tagged(body.as_bytes()),
    });
    succeeded(manifest, output, vec![evidence])
}

fn succeeded(manifest: &Manifest, output: Value, effect_evidence: Vec<Value>) -> Interpreted {
    let violation = manifest.response_schema.as_ref().and_then(|schema| schema.validate(&output).err());
    let verification = match violation {
        Some(violation) => VerificationOutcome::VerificationFailed {
            reason: format!(
                "the output is not what io.response_schema says: {}: {}",
                violation.pointer, violation.what
            ),
        },
        None => match manifest.verifier.verify(&output) {
            Verification::Verified { evidence } => VerificationOutcome::Verified { evidence },
            Verification::Failed { reason } => VerificationOutcome::VerificationFailed { reason },
            Verification::UnverifiableDeclared => {
                VerificationOutcome::UnverifiableDeclared { reason: "the manifest declares no verifier".to_owned() }
            }
        },
    };
    Interpreted {
        result: NormalizedResult::Success { summary: "the action ran to its end".to_owned() },
        reason: None,
        failure_class: None,
        output,
        verification,
        effect_evidence,
        egress_denied: None,
        dispatched: true,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::action::registry::{Registry, Source};

    #[test]
    fn what_the_params_said_is_in_no_evidence() {
        let registry = Registry::load(&[Source::Embedded]).unwrap();
        let data = json!({"status_code": 200, "headers": {}, "body": "{}", "url": "https://a.test:8443/people/alice?token=xyz"});
        let completed = Completed {
            exit: Exit::Code(0),
            stdout: json!({"ok": true, "data": data}).to_string().into_bytes(),
            stderr: Vec::new(),
            stderr_truncated: false,
            duration: Duration::from_millis(1),
            module_digest: "sha256:0".to_owned(),
        };
        let meaning = interpret(registry.action("http_fetch").unwrap(), &completed, &[]);
        assert_eq!(meaning.effect_evidence[0]["origin"], "https://a.test:8443");
        let text = serde_json::to_string(&meaning.effect_evidence).unwrap();
        assert!(!text.contains("alice") && !text.contains("xyz"), "{text}");
        assert_eq!(
            meaning.output["data"]["url"], "https://a.test:8443/people/alice?token=xyz",
            "the agent has it whole"
        );
    }
}
