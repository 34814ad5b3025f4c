//! A result, as it is signed, shown and read again.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::time::Timestamp;

/// Techniques that a reason names; JSON has them all.
const NAMED: usize = 5;

/// What came of one technique in one leaf.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    pub technique: String,
    /// Of the leaf: `none`, or `proxy_allowlist` with one name.
    pub profile: String,
    pub outcome: Outcome,
    /// Who refused: `hook`, `seccomp`, `namespace`, `landlock`, `proxy`, `resolver`, `kernel`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
    /// The step that was refused, a system call where it was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
    /// As `EPERM`, or the answer's own code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What the refusal left: the hook and its reason, or `not_seen`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record: Option<String>,
    /// Why it is no refusal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Refused,
    Escaped,
    /// Nobody can say: the control did not reach, or nothing was seen.
    Inconclusive,
    /// The kernel has no such thing, outside neither.
    NotApplicable,
}

/// All of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// When it began.
    pub at: Timestamp,
    pub took_ms: u64,
    /// `start`, or the operator's name.
    pub asked_by: String,
    /// What it is good for.
    pub conditions: BTreeMap<String, String>,
    pub findings: Vec<Finding>,
}

impl Report {
    fn count(&self, outcome: Outcome) -> usize {
        self.findings.iter().filter(|finding| finding.outcome == outcome).count()
    }

    /// Whether everything was refused that there is; a run that tried nothing shows nothing.
    pub fn passed(&self) -> bool {
        self.count(Outcome::Refused) > 0 && self.count(Outcome::Escaped) == 0 && self.count(Outcome::Inconclusive) == 0
    }

    /// Why the gate is not ready.
    pub fn reason(&self) -> String {
        let of = |outcome: Outcome| {
            let these = self.findings.iter().filter(|finding| finding.outcome == outcome);
            let mut named: Vec<String> =
                these.map(|finding| format!("{} ({})", finding.technique, finding.profile)).collect();
            let more = named.len().saturating_sub(NAMED);
            named.truncate(NAMED);
            if more > 0 { format!("{} and {more} more", named.join(", ")) } else { named.join(", ") }
        };
        match (self.count(Outcome::Escaped), self.count(Outcome::Inconclusive)) {
            (0, 0) => "self-test: nothing was tried".to_owned(),
            (0, _) => format!("self-test: inconclusive: {}", of(Outcome::Inconclusive)),
            (_, 0) => format!("self-test: gets out: {}", of(Outcome::Escaped)),
            (_, _) => {
                format!("self-test: gets out: {}; inconclusive: {}", of(Outcome::Escaped), of(Outcome::Inconclusive))
            }
        }
    }

    /// One line of counts.
    pub fn line(&self) -> String {
        format!(
            "{} at {}: {} refused, {} escaped, {} inconclusive, {} not applicable",
            if self.passed() { "passed" } else { "FAILED" },
            self.at,
            self.count(Outcome::Refused),
            self.count(Outcome::Escaped),
            self.count(Outcome::Inconclusive),
            self.count(Outcome::NotApplicable)
        )
    }

    pub fn view(&self) -> Value {
        json!({
            "outcome": if self.passed() { "passed" } else { "failed" },
            "at": self.at,
            "took_ms": self.took_ms,
            "asked_by": self.asked_by,
            "conditions": self.conditions,
            "refused": self.count(Outcome::Refused),
            "escaped": self.count(Outcome::Escaped),
            "inconclusive": self.count(Outcome::Inconclusive),
            "not_applicable": self.count(Outcome::NotApplicable),
            "findings": self.findings,
        })
    }

    /// Reads what [`Self::view`] wrote.
    pub fn from_view(view: &Value) -> Option<Self> {
        let read = |name: &str| view.get(name).cloned();
        Some(Self {
            at: serde_json::from_value(read("at")?).ok()?,
            took_ms: view.get("took_ms")?.as_u64()?,
            asked_by: view.get("asked_by")?.as_str()?.to_owned(),
            conditions: serde_json::from_value(read("conditions")?).ok()?,
            findings: serde_json::from_value(read("findings")?).ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(outcome: Outcome) -> Finding {
        Finding {
            technique: "tcp_v4".to_owned(),
            profile: "none".to_owned(),
            outcome,
            by: None,
            at: None,
            error: None,
            record: None,
            reason: None,
        }
    }

    fn report(outcomes: &[Outcome]) -> Report {
        Report {
            at: Timestamp::from_secs(1),
            took_ms: 7,
            asked_by: "start".to_owned(),
            conditions: BTreeMap::from([("kernel".to_owned(), "6".to_owned())]),
            findings: outcomes.iter().map(|outcome| finding(*outcome)).collect(),
        }
    }

    #[test]
    fn only_refusals_pass() {
        use Outcome::{Escaped, Inconclusive, NotApplicable, Refused};
        assert!(report(&[Refused, NotApplicable]).passed());
        for wrong in [&[][..], &[NotApplicable], &[Refused, Escaped], &[Refused, Inconclusive]] {
            assert!(!report(wrong).passed(), "{wrong:?}");
        }
        assert_eq!(report(&[Refused, Escaped]).reason(), "self-test: gets out: tcp_v4 (none)");
        assert!(report(&[Inconclusive; 7]).reason().ends_with("and 2 more"));
    }

    #[test]
    fn what_was_signed_is_what_is_read() {
        let report = report(&[Outcome::Refused, Outcome::NotApplicable]);
        assert_eq!(Report::from_view(&report.view()), Some(report));
        assert_eq!(Report::from_view(&json!({"outcome": "passed"})), None);
    }
}
