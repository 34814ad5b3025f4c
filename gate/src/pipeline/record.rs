//! What goes into the ledger: a receipt for whatever was dispatched, an event for whatever was refused.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::egress::flow::{Agreement, Verdict};
use crate::egress::flows::{Noted, RefusedCall};
use crate::egress::profile::Profile;
use crate::gate::Gate;
use crate::ledger::{Content, EventDraft, ReceiptDraft};
use crate::pipeline::authenticate::Caller;
use crate::pipeline::authorise::AuthoriseError;
use crate::pipeline::dispatch::{DispatchError, EgressEvidence, Outcome};
use crate::pipeline::{Executed, Ids, Refusal, Refused};
use crate::time::Timestamp;

/// Bytes that the flows of one receipt may have, within what a record may have.
const MAX_EVIDENCE_BYTES: usize = 3 << 20;

/// What no hook and no proxy can see.
const NOT_SEEN: [&str; 1] = ["seccomp"];

/// Makes the receipt durable, then says what the agent gets.
pub async fn receipt(gate: &Gate, caller: &Caller, outcome: Outcome, ids: &Ids) -> Result<Executed, Refused> {
    let refuse = |cause: Refusal| Refused::new(ids, cause);
    let summary = outcome.summary();
    let Outcome { grant, interpreted, completed, killed, egress, finished_at } = outcome;
    if !interpreted.dispatched {
        tokio::task::block_in_place(|| gate.budgets.refund(grant.debit()));
    }
    let call = grant.decision().call();
    let manifest = call.manifest();
    let output = serde_json::to_vec(&interpreted.output)
        .map_err(|error| refuse(Refusal::Internal { message: error.to_string() }))?;
    let provider_module_digest = match &completed {
        Some(done) => done.module_digest.clone(),
        None => gate.module_digest(manifest),
    };
    let mut contents = vec![Content { name: "output".to_owned(), bytes: output }];
    if let Some(done) = completed.as_ref().filter(|done| !done.stderr.is_empty()) {
        contents.push(Content { name: "stderr".to_owned(), bytes: done.stderr.clone() });
    }
    let mut provider_receipt = json!({
        "exit_code": summary.exit_code,
        "duration_ms": summary.duration_ms,
        "stderr_truncated": completed.as_ref().is_some_and(|done| done.stderr_truncated),
    });
    if let Some(killed) = &killed {
        provider_receipt["killed"] = json!(killed);
    }
    let egress_flows: Vec<Verdict> = egress.verdicts().collect();
    let draft = ReceiptDraft {
        grant_id: grant.grant_id().to_owned(),
        trace_id: ids.trace_id.clone(),
        decision_id: ids.decision_id.clone(),
        principal: caller.principal().to_owned(),
        session_id: caller.session_id().to_owned(),
        action_id: manifest.action_id.clone(),
        action_version: manifest.version.clone(),
        request_hash: call.request_hash().to_owned(),
        policy_version: grant.decision().policy_version().to_owned(),
        provider_module_digest,
        provider_receipt,
        normalized_result: interpreted.result.clone(),
        verification_outcome: interpreted.verification.clone(),
        effect_evidence: interpreted.effect_evidence.clone(),
        egress_evidence: evidence(gate, grant.decision().profile(), &egress),
        failure_class: interpreted.failure_class.map(str::to_owned),
        approval: None,
        started_at: grant.started_at(),
        finished_at,
        contents,
    };
    let receipt =
        gate.ledger.receipt(draft).await.map_err(|error| refuse(Refusal::Evidence { message: error.to_string() }))?;
    gate.metrics.executed(&interpreted.result);
    egress_flows.iter().for_each(|verdict| gate.metrics.flow(*verdict));
    // One that was killed while it waited did not run, but nothing failed to be made either.
    let ran = interpreted.dispatched || killed.is_some();
    let failure = match (&interpreted.egress_denied, &interpreted.reason, ran) {
        (Some(reason), _, _) => Some(DispatchError::EgressDenied { deny_reason: reason.clone() }),
        (None, Some(reason), true) => Some(DispatchError::ActionFailed { reason: reason.clone() }),
        (None, Some(reason), false) => Some(DispatchError::Sandbox { message: reason.clone() }),
        (None, None, _) => None,
    };
    if let Some(failure) = failure {
        return Err(Refused { receipt_id: Some(receipt.receipt_id().to_owned()), ..refuse(failure.into()) });
    }
    Ok(Executed {
        trace_id: ids.trace_id.clone(),
        output: interpreted.output,
        outcome: summary,
        budget: grant.debit().remaining_view(),
        receipt,
    })
}

/// The summary first, then the flows (API.md §2).
pub(crate) fn evidence(gate: &Gate, profile: &Profile, egress: &EgressEvidence) -> Vec<Value> {
    let (mut sent, mut received) = (0_u64, 0_u64);
    for flow in &egress.flows {
        sent = sent.saturating_add(flow.bytes_from_sandbox);
        received = received.saturating_add(flow.bytes_to_sandbox);
    }
    let with = |verdict| egress.flows.iter().filter(|flow| flow.verdict == verdict).count() as u64;
    let (denied, connections) = (with(Verdict::Deny), egress.connections());
    let lost = egress.counts.as_ref().is_none_or(|counts| counts.events_lost > 0);
    let mut summary = json!({
        "kernel": egress.counts,
        "proxy": {
            "connections": connections,
            "denied": denied,
            "bytes_sent": sent,
            "bytes_received": received,
        },
        // The worst of the flows': each has its own.
        "agreement": egress.agreement.unwrap_or(Agreement::Unknown),
        "profile_hash": profile.hash(),
        "program_hash": gate.enforcer.program_hash(),
        "not_seen": NOT_SEEN,
        "incomplete": egress.incomplete || lost,
    });
    if profile.is_audit() {
        summary["mode"] = json!("unsafe_audit");
        summary["proxy"]["would_deny"] = json!(with(Verdict::WouldDeny));
    }
    let items = egress.refusals.iter().map(|refusal| refusal.view());
    let items = items.chain(egress.flows.iter().filter_map(|flow| serde_json::to_value(flow).ok()));
    let (items, left_out) = within(items, MAX_EVIDENCE_BYTES);
    if left_out > 0 {
        summary["left_out"] = json!(left_out);
        summary["incomplete"] = json!(true);
    }
    std::iter::once(summary).chain(items).collect()
}

/// As many as there is room for, and how many are left out. What does not fit must not cost the receipt.
fn within(items: impl Iterator<Item = Value>, mut room: usize) -> (Vec<Value>, usize) {
    let (mut kept, mut left_out) = (Vec::new(), 0);
    for item in items {
        match room.checked_sub(item.to_string().len()) {
            Some(rest) if left_out == 0 => {
                room = rest;
                kept.push(item);
            }
            _ => left_out += 1,
        }
    }
    (kept, left_out)
}

/// Notes that an authenticated caller was refused. The refusal stands whether or not the note is written: nothing ran.
pub async fn refusal(gate: &Gate, caller: &Caller, action_id: &str, refused: &Refused) {
    let mut details = json!({
        "cause": refused.cause.to_string(),
        "listener": caller.listener().name,
    });
    if let Refusal::Authorise(AuthoriseError::EgressDenied { deny_reason, asked }) = refused.cause.as_ref() {
        let call = RefusedCall {
            time: Timestamp::now(),
            action_id: action_id.to_owned(),
            principal: caller.principal().to_owned(),
            workspace: gate.config.workspace.clone(),
            asked: asked.as_ref().clone(),
            rule: deny_reason.clone(),
            decision_id: refused.decision_id.clone(),
        };
        details["flow"] = call.view();
        gate.flows.note(Noted::Call(Arc::new(call)));
    }
    let event = EventDraft {
        event_type: "refused".to_owned(),
        trace_id: refused.trace_id.clone(),
        decision_id: refused.decision_id.clone(),
        action_id: action_id.to_owned(),
        principal: caller.principal().to_owned(),
        session_id: caller.session_id().to_owned(),
        decision: "deny".to_owned(),
        at: Timestamp::now(),
        details,
    };
    if let Err(error) = gate.ledger.event(event).await {
        tracing::error!(%error, decision_id = refused.decision_id, "a refusal is not in the ledger");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_that_do_not_fit_are_counted() {
        let item = json!({"name": "x".repeat(100)});
        let bytes = item.to_string().len();
        let some = |count: usize| std::iter::repeat_n(item.clone(), count);
        assert_eq!(within(some(3), 3 * bytes).1, 0);
        let (kept, left_out) = within(some(5), 3 * bytes + 1);
        assert_eq!((kept.len(), left_out), (3, 2));
    }
}
