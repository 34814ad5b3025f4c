//! Whether an execution did what it was for, as far as its output says.

use serde_json::{Value, json};

/// The manifest's `verifier_kind` and `verification_config`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verifier {
    None,
    /// The worker's `data.status_code` is one of these (2xx when empty), and the output has these members.
    HttpStatus {
        expected_status: Vec<u16>,
        required_fields: Vec<String>,
    },
}

/// The `verification_outcome` of a receipt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verification {
    Verified {
        evidence: Value,
    },
    Failed {
        reason: String,
    },
    /// The manifest declares no way to verify.
    UnverifiableDeclared,
}

impl Verifier {
    /// Looks at the output of an execution that ran to its end.
    pub fn verify(&self, output: &Value) -> Verification {
        let Self::HttpStatus { expected_status, required_fields } = self else {
            return Verification::UnverifiableDeclared;
        };
        let failed = |reason: String| Verification::Failed { reason };
        let Some(status) = output.pointer("/data/status_code").and_then(Value::as_u64) else {
            return failed("the output has no status code".to_owned());
        };
        let expected = match expected_status.as_slice() {
            [] => (200..300).contains(&status),
            list => list.iter().any(|&one| u64::from(one) == status),
        };
        if !expected {
            return failed(format!("status {status} was not expected"));
        }
        match required_fields.iter().find(|field| output.get(field.as_str()).is_none()) {
            Some(field) => failed(format!("the output has no {field:?}")),
            None => Verification::Verified { evidence: json!({ "status_code": status }) },
        }
    }
}
