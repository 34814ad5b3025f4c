use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;

use super::verify::Tail;
use super::*;
use crate::action::canonical::jcs;

mod attacks;
mod crash;

pub const NOW: Timestamp = Timestamp::from_millis(1_795_305_600_123);

pub struct Bench {
    pub root: tempfile::TempDir,
    pub keys: Arc<ReceiptKeys>,
}

impl Bench {
    pub fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let keys = Arc::new(ReceiptKeys::load_or_create(&root.path().join("keys")).unwrap());
        Self { root, keys }
    }

    pub fn directory(&self) -> PathBuf {
        self.root.path().join("ledger")
    }

    pub fn open(&self) -> (Ledger, Vec<ClosedOrphan>) {
        Ledger::open(&self.directory(), self.keys.clone(), &LedgerConfig::default(), NOW).unwrap()
    }

    pub fn verify(&self) -> VerifyReport {
        verify(&self.directory(), self.keys.public(), None).unwrap()
    }

    /// `calls` calls, each an intent and a receipt, with an event between them; and the records' texts.
    pub async fn filled(&self, calls: usize) -> Vec<String> {
        let (ledger, _) = self.open();
        for index in 0..calls {
            call(&ledger, index).await;
        }
        drop(ledger);
        lines(&self.directory())
    }
}

pub fn lines(path: &Path) -> Vec<String> {
    let mut out = Vec::new();
    verify::export(path, &mut out).unwrap();
    String::from_utf8(out).unwrap().lines().map(str::to_owned).collect()
}

pub fn decided(index: usize) -> (Grant, IntentRecord) {
    let params = jcs(&json!({"url": format!("https://example.org/{index}"), "text": "é\u{1f600}\u{7}"})).unwrap();
    let plan = Plan {
        action_id: "web_read".into(),
        action_version: "1.0.0".into(),
        action_digest: hash::sha256_tagged(b"manifest"),
        request_hash: hash::sha256_tagged(&params),
        profile_hash: hash::sha256_tagged(b"profile"),
        secret_names: vec![],
        policy_version: hash::sha256_tagged(b"policy"),
        principal: "uid-1000".into(),
        listener: "default".into(),
        workspace: "default".into(),
        not_after: NOW.plus_millis(30_000),
    };
    let grant = Grant::mint(&plan, "lease", "thumbprint").unwrap();
    let intent = IntentRecord {
        trace_id: format!("trace-{index}"),
        decision_id: "decision".into(),
        session_id: "session".into(),
        plan,
        provider_module_digest: "builtin:http_api".into(),
        params,
        approval: None,
        at: NOW,
    };
    (grant, intent)
}

pub fn outcome(grant: &Grant, intent: &IntentRecord) -> ReceiptDraft {
    ReceiptDraft {
        grant_id: grant.grant_id.clone(),
        trace_id: intent.trace_id.clone(),
        decision_id: intent.decision_id.clone(),
        principal: intent.plan.principal.clone(),
        session_id: intent.session_id.clone(),
        action_id: intent.plan.action_id.clone(),
        action_version: intent.plan.action_version.clone(),
        request_hash: intent.plan.request_hash.clone(),
        policy_version: intent.plan.policy_version.clone(),
        provider_module_digest: hash::sha256_tagged(b"what ran"),
        provider_receipt: json!({"status_code": 200}),
        normalized_result: NormalizedResult::Success { summary: "200".into() },
        verification_outcome: VerificationOutcome::Verified { evidence: json!({"status_code": 200}) },
        effect_evidence: vec![],
        egress_evidence: vec![json!({"kernel": {"connections": 1}, "not_seen": ["seccomp"], "incomplete": false})],
        failure_class: None,
        approval: None,
        started_at: NOW,
        finished_at: NOW.plus_millis(42),
        contents: vec![Content { name: "output".into(), bytes: format!("the page of {}", intent.trace_id).into() }],
    }
}

pub fn note(index: usize) -> EventDraft {
    EventDraft {
        event_type: "execution.dispatched".into(),
        trace_id: format!("trace-{index}"),
        decision_id: String::new(),
        action_id: "web_read".into(),
        principal: "uid-1000".into(),
        session_id: "session".into(),
        decision: String::new(),
        details: json!({"leaf": index}),
        at: NOW.plus_millis(i64::try_from(index).unwrap()),
    }
}

pub async fn call(ledger: &Ledger, index: usize) -> Receipt {
    let (grant, intent) = decided(index);
    ledger.intent(&grant, intent.clone()).await.unwrap();
    ledger.event(note(index)).await.unwrap();
    ledger.receipt(outcome(&grant, &intent)).await.unwrap()
}

#[tokio::test]
async fn a_call_leaves_an_intent_and_a_receipt_that_verify() {
    let bench = Bench::new();
    let (ledger, orphans) = bench.open();
    assert!(orphans.is_empty());
    let receipt = call(&ledger, 0).await;
    assert_eq!(receipt.sequence(), 3);
    assert_eq!(receipt.signature_status(bench.keys.public()), SignatureStatus::Valid);
    assert_eq!(ledger.receipt_by_id(receipt.receipt_id()).unwrap().unwrap(), receipt);
    assert_eq!(ledger.receipt_by_grant(receipt.grant_id()).unwrap().unwrap(), receipt);
    assert_eq!(ledger.receipt_by_id("another").unwrap(), None);
    // While the gate still has it open, and by a reader of its own.
    let live = bench.verify();
    assert!(live.intact && ledger.is_running(), "{live:?}");
    assert_eq!((live.total_events, live.verified_links, live.receipts, live.contents), (3, 3, 1, Some(2)));
    assert_eq!((live.tail, live.open_intents, live.log_id.as_deref()), (Tail::Head, 0, Some(ledger.log_id())));
    drop(ledger);
    assert!(bench.verify().intact);
}

/// The bytes of API.md section 8, made here by hand and not by the module under test.
#[tokio::test]
async fn the_signed_bytes_are_the_contracts() {
    let bench = Bench::new();
    let (ledger, _) = bench.open();
    let receipt = call(&ledger, 0).await;
    let mut stored = receipt.fields().clone();
    let public = bench.keys.jwks()["keys"][0]["x"].as_str().unwrap().to_owned();
    let public = base64::Engine::decode(&base64::engine::general_purpose::URL_SAFE_NO_PAD, public).unwrap();
    let verifier = aws_lc_rs::signature::UnparsedPublicKey::new(&aws_lc_rs::signature::ED25519, &public);
    let take = |record: &mut Map<String, Value>, field: &str| match record.remove(field) {
        Some(Value::String(text)) => text,
        other => panic!("{field}: {other:?}"),
    };

    let result_hash = take(&mut stored, "result_hash");
    let signature = hash::unhex(&take(&mut stored, "receipt_signature")).unwrap();
    assert_eq!(stored["signing_key_id"], hash::sha256_hex(&public)[..16]);
    assert_eq!(result_hash, hash::sha256_hex(&serde_jcs::to_vec(&stored).unwrap()));
    verifier.verify(format!("latchgate.receipt.v1\n{result_hash}").as_bytes(), &signature).unwrap();
    assert_eq!(stored["started_at"], "2026-11-22T00:00:00.123Z");
    for field in [
        "receipt_id",
        "grant_id",
        "provider_module_digest",
        "provider_receipt",
        "normalized_result",
        "verification_outcome",
        "effect_evidence",
        "signing_key_id",
        "started_at",
        "finished_at",
        "failure_class",
        "principal",
        "session_id",
        "workspace",
        "log_id",
        "decision_id",
        "action_id",
        "action_version",
        "request_hash",
        "policy_version",
        "sequence",
        "prev_receipt_hash",
        "egress_evidence",
    ] {
        assert!(stored.contains_key(field), "{field}");
    }
    assert!(!stored.contains_key("approval") && !stored.contains_key("signature_status"));
    assert_eq!(stored["normalized_result"], json!({"kind": "success", "summary": "200"}));
    assert_eq!(stored["verification_outcome"]["status"], "verified");

    let events = ledger.events(&EventFilter::default()).unwrap();
    let mut event = events[0].as_object().unwrap().clone();
    let event_hash = take(&mut event, "event_hash");
    let signature = hash::unhex(&take(&mut event, "event_signature")).unwrap();
    assert_eq!(event_hash, hash::sha256_tagged(&serde_jcs::to_vec(&event).unwrap()));
    verifier.verify(format!("latchgate.event.v1\n{event_hash}").as_bytes(), &signature).unwrap();
    assert_eq!(stored["prev_receipt_hash"], event_hash["sha256:".len()..]);
    assert_eq!(event["prev_hash"], events[1]["event_hash"]);
    assert_eq!(events[1]["prev_hash"], Value::Null);
}

#[test]
fn a_plan_hashes_as_the_contract_says() {
    let (grant, intent) = decided(0);
    let plan = &intent.plan;
    let listed = format!(
        concat!(
            r#"{{"action_digest":"{}","action_id":"web_read","action_version":"1.0.0","listener":"default","#,
            r#""not_after":"2026-11-22T00:00:30.123Z","policy_version":"{}","principal":"uid-1000","#,
            r#""profile_hash":"{}","request_hash":"{}","secret_names":[],"workspace":"default"}}"#
        ),
        plan.action_digest, plan.policy_version, plan.profile_hash, plan.request_hash
    );
    assert_eq!(grant.plan_hash, hash::sha256_tagged(format!("latchgate.plan.v1\n{listed}").as_bytes()));
}

#[tokio::test]
async fn a_grant_is_good_for_one_intent_of_two_at_once() {
    let bench = Bench::new();
    let (ledger, _) = bench.open();
    for index in 0..20 {
        let (grant, intent) = decided(index);
        let (one, other) = tokio::join!(ledger.intent(&grant, intent.clone()), ledger.intent(&grant, intent.clone()));
        let consumed = |result: &Result<Recorded, LedgerError>| matches!(result, Err(LedgerError::GrantConsumed));
        assert!(one.is_ok() && consumed(&other) || other.is_ok() && consumed(&one), "{one:?} {other:?}");
        ledger.receipt(outcome(&grant, &intent)).await.unwrap();
        assert!(consumed(&ledger.intent(&grant, intent.clone()).await), "not after its receipt either");
        assert!(matches!(ledger.receipt(outcome(&grant, &intent)).await, Err(LedgerError::NoIntent)));
    }
    let (grant, intent) = decided(99);
    assert!(matches!(ledger.receipt(outcome(&grant, &intent)).await, Err(LedgerError::NoIntent)));
    let report = bench.verify();
    assert!(report.intact && report.intents == 20 && report.total_events == 40, "{report:?}");
}

#[tokio::test]
async fn a_grant_is_good_for_its_own_plan_in_its_own_time_only() {
    let bench = Bench::new();
    let (ledger, _) = bench.open();
    let refused = |result| matches!(result, Err(LedgerError::Refused(_)));
    let (grant, intent) = decided(0);
    let mut other = intent.clone();
    other.plan.action_id = "http_post".into();
    assert!(refused(ledger.intent(&grant, other).await));
    let mut other = intent.clone();
    other.params = b"{}".to_vec();
    assert!(refused(ledger.intent(&grant, other).await));
    let mut longer = grant.clone();
    longer.not_after = longer.not_after.plus_millis(1);
    assert!(refused(ledger.intent(&longer, intent.clone()).await));
    let mut late = intent.clone();
    late.at = grant.not_after.plus_millis(1);
    assert!(matches!(ledger.intent(&grant, late).await, Err(LedgerError::GrantExpired)));
    // No refusal used it up.
    let mut last = intent;
    last.at = grant.not_after;
    ledger.intent(&grant, last).await.unwrap();
}

#[tokio::test]
async fn a_receipt_says_what_its_intent_said() {
    let bench = Bench::new();
    let (ledger, _) = bench.open();
    let (grant, intent) = decided(0);
    ledger.intent(&grant, intent.clone()).await.unwrap();
    let good = outcome(&grant, &intent);
    for other in [
        ReceiptDraft { action_id: "http_post".into(), ..good.clone() },
        ReceiptDraft { principal: "uid-0".into(), ..good.clone() },
        ReceiptDraft { request_hash: hash::sha256_tagged(b"{}"), ..good.clone() },
    ] {
        assert!(matches!(ledger.receipt(other).await, Err(LedgerError::Refused(_))));
    }
    let twice = [good.contents.clone(), good.contents.clone()].concat();
    assert!(ledger.receipt(ReceiptDraft { contents: twice, ..good.clone() }).await.is_err(), "two of one name");
    let huge = json!("x".repeat(5 << 20));
    assert!(ledger.receipt(ReceiptDraft { provider_receipt: huge, ..good.clone() }).await.is_err());
    ledger.receipt(good).await.unwrap();
    let report = bench.verify();
    assert!(report.intact && report.total_events == 2, "{report:?}");
}

#[tokio::test]
async fn an_event_cannot_pass_for_an_intent_nor_a_number_change_on_its_way() {
    let bench = Bench::new();
    let (ledger, _) = bench.open();
    for event_type in [event::INTENT, event::CONTENTS_ERASED] {
        let forged = EventDraft { event_type: event_type.into(), ..note(0) };
        assert!(matches!(ledger.event(forged).await, Err(LedgerError::Refused(_))));
    }
    let deep = (0..100).fold(Value::Null, |inner, _| json!([inner]));
    for details in [json!({"n": 1.5}), json!([9_007_199_254_740_993_u64]), json!(-9_007_199_254_740_993_i64), deep] {
        assert!(matches!(ledger.event(EventDraft { details, ..note(0) }).await, Err(LedgerError::Refused(_))));
    }
    let details = json!({"n": 9_007_199_254_740_991_u64, "text": "\u{10ffff}\u{0}\"\\é"});
    ledger.event(EventDraft { details, ..note(0) }).await.unwrap();
    assert!(bench.verify().intact);
}

#[tokio::test]
async fn contents_can_be_erased_without_breaking_the_chain() {
    let bench = Bench::new();
    let (ledger, _) = bench.open();
    let secret = "a word that must go: 5b1e9c";
    let (grant, intent) = decided(0);
    ledger.intent(&grant, intent.clone()).await.unwrap();
    let mut draft = outcome(&grant, &intent);
    draft.contents = vec![Content { name: "output".into(), bytes: secret.into() }];
    let receipt = ledger.receipt(draft).await.unwrap();
    let on_disk = || {
        let found = |name: &str| std::fs::read(bench.directory().join(name)).unwrap_or_default();
        let bytes = [found("ledger.db"), found("ledger.db-wal")].concat();
        bytes.windows(secret.len()).any(|window| window == secret.as_bytes())
    };
    assert!(on_disk());
    assert_eq!(ledger.content(receipt.receipt_id(), "output").unwrap().as_deref(), Some(secret.as_bytes()));
    ledger.erase_contents(receipt.receipt_id(), "operator", NOW).await.unwrap();
    // The answer may come before the write-ahead log is emptied; the next record is written after it.
    ledger.event(note(1)).await.unwrap();
    assert!(!on_disk(), "the bytes are gone from the files too");
    assert_eq!(ledger.content(receipt.receipt_id(), "output").unwrap(), None);
    let stored = ledger.receipt_by_id(receipt.receipt_id()).unwrap().unwrap();
    assert_eq!(stored.signature_status(bench.keys.public()), SignatureStatus::Valid);
    assert_eq!(stored.fields()["contents"]["output"]["sha256"], hash::sha256_tagged(secret.as_bytes()));
    let report = bench.verify();
    assert!(report.intact && report.contents == Some(1), "{report:?}");
}

#[tokio::test]
async fn an_intent_without_receipt_is_closed_at_the_next_start() {
    let bench = Bench::new();
    let (ledger, _) = bench.open();
    let (grant, intent) = decided(7);
    ledger.intent(&grant, intent).await.unwrap();
    call(&ledger, 8).await;
    assert_eq!(bench.verify().open_intents, 1);
    drop(ledger);

    let later = NOW.plus_millis(5_000);
    let (ledger, orphans) =
        Ledger::open(&bench.directory(), bench.keys.clone(), &LedgerConfig::default(), later).unwrap();
    let [ClosedOrphan { receipt }] = orphans.as_slice() else { panic!("{orphans:?}") };
    assert_eq!(receipt.grant_id(), grant.grant_id);
    assert_eq!(receipt.fields()["normalized_result"]["kind"], "internal_error");
    assert_eq!(receipt.fields()["verification_outcome"]["status"], "skipped");
    assert_eq!(receipt.fields()["failure_class"], "outcome_unknown");
    assert_eq!(receipt.fields()["egress_evidence"][0]["incomplete"], true);
    assert_eq!(receipt.fields()["started_at"], NOW.to_string());
    assert_eq!(receipt.fields()["finished_at"], later.to_string());
    assert_eq!(receipt.fields()["trace_id"], "trace-7");
    assert_eq!(receipt.signature_status(bench.keys.public()), SignatureStatus::Valid);
    let report = bench.verify();
    assert!(report.intact && report.open_intents == 0 && report.total_events == 5, "{report:?}");
    drop(ledger);
    assert!(bench.open().1.is_empty(), "closed once");
}

#[tokio::test]
async fn events_are_found_by_what_they_say() {
    let bench = Bench::new();
    let (ledger, _) = bench.open();
    for index in 0..4 {
        call(&ledger, index).await;
    }
    let count = |filter: EventFilter| ledger.events(&filter).unwrap().len();
    let some = |text: &str| Some(text.to_owned());
    assert_eq!(count(EventFilter::default()), 8);
    assert_eq!(count(EventFilter { trace_id: some("trace-2"), ..EventFilter::default() }), 2);
    assert_eq!(count(EventFilter { event_type: some(event::INTENT), ..EventFilter::default() }), 4);
    assert_eq!(count(EventFilter { decision: some("deny"), ..EventFilter::default() }), 0);
    assert_eq!(count(EventFilter { principal: some("' OR 1=1 --"), ..EventFilter::default() }), 0);
    assert_eq!(count(EventFilter { limit: Some(3), ..EventFilter::default() }), 3);
    let between =
        EventFilter { after: Some(NOW.plus_millis(1)), before: Some(NOW.plus_millis(3)), ..EventFilter::default() };
    assert_eq!(ledger.events(&between).unwrap()[0]["details"]["leaf"], 2);
    assert_eq!(count(between), 1);
}

#[tokio::test]
async fn a_replaced_key_signs_on_and_the_old_one_still_verifies() {
    let bench = Bench::new();
    bench.filled(1).await;
    let key = bench.root.path().join("keys/receipt-signing-key.pem");
    std::fs::remove_file(&key).unwrap();
    let next = Arc::new(ReceiptKeys::load_or_create(&bench.root.path().join("keys")).unwrap());
    assert_ne!(next.id(), bench.keys.id());
    assert_eq!(next.jwks()["keys"].as_array().unwrap().len(), 2);
    let (ledger, _) = Ledger::open(&bench.directory(), next.clone(), &LedgerConfig::default(), NOW).unwrap();
    call(&ledger, 1).await;
    drop(ledger);
    let published = bench.root.path().join("published.json");
    std::fs::write(&published, next.jwks().to_string()).unwrap();
    let report = verify(&bench.directory(), &PublicKeys::read(&published).unwrap(), None).unwrap();
    assert!(report.intact && report.total_events == 6, "{report:?}");
    assert_eq!(bench.verify().broken_at, Some(4), "the old set does not know the new key");
}

#[test]
fn keys_are_private_and_what_is_no_key_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().join("keys");
    let made = ReceiptKeys::load_or_create(&directory).unwrap();
    let path = directory.join("receipt-signing-key.pem");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(ReceiptKeys::load_or_create(&directory).unwrap().id(), made.id());
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
    assert!(ReceiptKeys::load_or_create(&directory).is_err(), "open to the group");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::write(&path, "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n").unwrap();
    assert!(ReceiptKeys::load_or_create(&directory).is_err());

    let good = made.jwks();
    for (pointer, bad) in [
        ("/keys/0/kty", json!("EC")),
        ("/keys/0/crv", json!("X25519")),
        ("/keys/0/x", json!("AAAA")),
        ("/keys/0/kid", json!("0000000000000000")),
        ("/keys", json!({})),
    ] {
        let mut set = good.clone();
        *set.pointer_mut(pointer).unwrap() = bad;
        assert!(PublicKeys::from_jwks(&set).is_err(), "{pointer}");
    }
    let mut private = good;
    private["keys"][0]["d"] = json!("AAAA");
    assert!(PublicKeys::from_jwks(&private).is_err(), "a private key is no public one");
}

/// Printed, not asserted: `cargo test -p latchgate --lib ledger::tests::appends -- --nocapture`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn appends_share_commits() {
    let bench = Bench::new();
    let (ledger, _) = bench.open();
    let ledger = Arc::new(ledger);
    for (waiting, each) in [(1, 200), (64, 50)] {
        let started = tokio::time::Instant::now();
        let tasks: Vec<_> = (0..waiting)
            .map(|_| {
                let ledger = ledger.clone();
                tokio::spawn(async move {
                    for index in 0..each {
                        ledger.event(note(index)).await.unwrap();
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        let rate = f64::from(waiting) * each as f64 / started.elapsed().as_secs_f64();
        println!("{waiting} waiting: {rate:.0} appends/s");
    }
    assert!(bench.verify().intact);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_verifier_that_looks_in_while_the_gate_writes_sees_a_whole_log() {
    let bench = Bench::new();
    let (ledger, _) = bench.open();
    let writer = tokio::spawn(async move {
        for index in 0..60 {
            call(&ledger, index).await;
        }
    });
    let mut seen = 0;
    while seen < 180 {
        let report = bench.verify();
        assert!(report.intact && report.tail == Tail::Head && report.total_events >= seen, "{report:?}");
        seen = report.total_events;
    }
    writer.await.unwrap();
}
