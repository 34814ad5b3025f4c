//! Each of these is something that a person with write access to the file could do to it.

use super::*;
use crate::ledger::record::{self, Head, Kind};

/// Verifies `lines` as an export.
fn judge(bench: &Bench, lines: &[String]) -> VerifyReport {
    judge_bytes(bench, format!("{}\n", lines.join("\n")).as_bytes(), None)
}

fn judge_bytes(bench: &Bench, bytes: &[u8], anchor: Option<&Anchor>) -> VerifyReport {
    let path = bench.root.path().join("export.jsonl");
    std::fs::write(&path, bytes).unwrap();
    verify(&path, bench.keys.public(), anchor).unwrap()
}

fn anchor_of(line: &str) -> Anchor {
    let record: Map<String, Value> = serde_json::from_str(line).unwrap();
    let kind = Kind::of(&record).unwrap();
    let hash = kind.bare(record[kind.hash_field()].as_str().unwrap()).map(str::to_owned);
    Anchor { sequence: record["sequence"].as_u64().unwrap(), hash }
}

/// Changes the file itself, past the gate.
fn tamper(bench: &Bench, change: impl FnOnce(&Connection)) {
    change(&Connection::open(bench.directory().join(FILE)).unwrap());
}

#[tokio::test]
async fn an_untouched_export_verifies() {
    let bench = Bench::new();
    let lines = bench.filled(3).await;
    let report = judge(&bench, &lines);
    assert!(report.intact, "{report:?}");
    assert_eq!((report.total_events, report.verified_links, report.tail), (9, 9, Tail::Unknown));
    assert!(judge_bytes(&bench, b"", None).intact, "nothing recorded, nothing wrong");
}

#[tokio::test]
async fn any_flipped_bit_of_any_record_shows_at_its_place() {
    let bench = Bench::new();
    let (ledger, _) = bench.open();
    let (grant, intent) = decided(0);
    ledger.intent(&grant, intent.clone()).await.unwrap();
    ledger.receipt(outcome(&grant, &intent)).await.unwrap();
    let good = format!("{}\n", lines(&bench.directory()).join("\n")).into_bytes();
    let second = good.iter().position(|byte| *byte == b'\n').unwrap() + 1;
    let flip = |at: usize, mask: u8| {
        let mut bad = good.clone();
        bad[at] ^= mask;
        let path = bench.root.path().join(format!("export-{at}-{mask}.jsonl"));
        std::fs::write(&path, bad).unwrap();
        let report = verify(&path, bench.keys.public(), None).unwrap();
        std::fs::remove_file(&path).unwrap();
        let place = if at < second { 1 } else { 2 };
        let shows = report.broken_at.is_some_and(|broken_at| broken_at == place || broken_at == place + 1);
        assert!(!report.intact && shows, "byte {at} ({:?}) of record {place}: {report:?}", char::from(good[at]));
    };
    // One bit of each byte by its position, and the case of each letter, which hex and JSON escapes tolerate.
    std::thread::scope(|scope| {
        for share in 0..4 {
            let (good, flip) = (&good, &flip);
            scope.spawn(move || {
                for at in (share..good.len()).step_by(4) {
                    flip(at, 1 << ((at / 4) % 8));
                    if good[at].is_ascii_alphabetic() && (at / 4) % 8 != 5 {
                        flip(at, 0x20);
                    }
                }
            });
        }
    });
}

#[tokio::test]
async fn the_same_content_in_other_words_is_not_the_record() {
    let bench = Bench::new();
    let lines = bench.filled(1).await;
    for (from, to) in [
        ("{", "{ "),
        ("\"action_id\"", "\"action_id\":\"http_post\",\"action_id\""),
        ("\"sequence\":3", "\"sequence\":3.0"),
        ("web_read", "web_rea\\u0064"),
    ] {
        let mut bad = lines.clone();
        bad[2] = bad[2].replacen(from, to, 1);
        assert_ne!(bad[2], lines[2], "{from}");
        assert_eq!(judge(&bench, &bad).broken_at, Some(3), "{from}");
    }
    // A word that is outside the hash must not be there at all.
    let mut bad = lines.clone();
    bad[2] = bad[2].replacen(",\"started_at\"", ",\"signature_status\":\"valid\",\"started_at\"", 1);
    assert_ne!(bad[2], lines[2]);
    assert_eq!(judge(&bench, &bad).broken_at, Some(3), "signature_status");
}

#[tokio::test]
async fn a_record_taken_out_or_moved_shows() {
    let bench = Bench::new();
    let lines = bench.filled(4).await;
    for at in 0..lines.len() - 1 {
        let mut without = lines.clone();
        without.remove(at);
        assert_eq!(judge(&bench, &without).broken_at, Some(at as u64 + 1), "without {at}");
        let mut swapped = lines.clone();
        swapped.swap(at, at + 1);
        assert_eq!(judge(&bench, &swapped).broken_at, Some(at as u64 + 1), "swapped {at}");
        let mut twice = lines.clone();
        twice.insert(at, lines[at].clone());
        assert_eq!(judge(&bench, &twice).broken_at, Some(at as u64 + 2), "twice {at}");
    }
}

/// Removing records and giving the others new numbers breaks their hashes; that they still link is no help.
#[tokio::test]
async fn a_renumbered_log_shows() {
    let bench = Bench::new();
    let mut lines = bench.filled(3).await;
    lines.drain(3..6);
    for (at, line) in lines.iter_mut().enumerate() {
        let mut record: Map<String, Value> = serde_json::from_str(line).unwrap();
        record.insert("sequence".into(), (at + 1).into());
        *line = String::from_utf8(jcs(&record).unwrap()).unwrap();
    }
    assert_eq!(judge(&bench, &lines).broken_at, Some(4));
}

#[tokio::test]
async fn a_signature_is_good_for_its_own_record_only() {
    let bench = Bench::new();
    let lines = bench.filled(2).await;
    let mut records: Vec<Map<String, Value>> = lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (one, other) = (records[2]["receipt_signature"].clone(), records[5]["receipt_signature"].clone());
    records[2].insert("receipt_signature".into(), other);
    records[5].insert("receipt_signature".into(), one);
    let swapped: Vec<String> = records.iter().map(|record| String::from_utf8(jcs(record).unwrap()).unwrap()).collect();
    let report = judge(&bench, &swapped);
    assert_eq!((report.broken_at, report.problem_count), (Some(3), 2), "{report:?}");
}

#[tokio::test]
async fn statuses_of_a_receipts_signature() {
    let bench = Bench::new();
    let (ledger, _) = bench.open();
    let good = call(&ledger, 0).await;
    let with = |field: &str, value: Option<Value>| {
        let mut fields = good.fields().clone();
        match value {
            Some(value) => fields.insert(field.into(), value),
            None => fields.remove(field),
        };
        Receipt::from_record(fields).signature_status(bench.keys.public())
    };
    let upper = good.fields()["receipt_signature"].as_str().unwrap().to_uppercase();
    assert_eq!(with("receipt_signature", None), SignatureStatus::MissingSignature);
    assert_eq!(with("receipt_signature", Some(Value::Null)), SignatureStatus::MissingSignature);
    assert_eq!(with("receipt_signature", Some(json!("00"))), SignatureStatus::MalformedSignature);
    assert_eq!(with("receipt_signature", Some(json!(upper))), SignatureStatus::MalformedSignature);
    assert_eq!(with("receipt_signature", Some(json!("00".repeat(64)))), SignatureStatus::Invalid);
    assert_eq!(with("signing_key_id", None), SignatureStatus::MissingKeyId);
    assert_eq!(with("signing_key_id", Some(json!("0123456789abcdef"))), SignatureStatus::UnknownKeyId);
    assert_eq!(with("result_hash", Some(json!("00".repeat(32)))), SignatureStatus::Invalid);
    assert_eq!(with("principal", Some(json!("uid-0"))), SignatureStatus::Invalid, "the stored hash alone is not asked");
    assert_eq!(with("more", Some(json!(1))), SignatureStatus::Invalid);
    assert_eq!(with("signature_status", Some(json!("invalid"))), SignatureStatus::Valid, "never part of it");
}

/// A whole log written anew, well-formed in everything, under a key that the verifier was not given.
#[tokio::test]
async fn a_log_signed_again_by_another_shows() {
    let bench = Bench::new();
    let lines = bench.filled(2).await;
    let forger = ReceiptKeys::load_or_create(&bench.root.path().join("forged")).unwrap();
    let resign = |claim: Option<&str>| {
        let first: Map<String, Value> = serde_json::from_str(&lines[0]).unwrap();
        let log_id = first["log_id"].as_str().unwrap().to_owned();
        let mut head = Head { log_id, sequence: 0, hash: None };
        lines
            .iter()
            .map(|line| {
                let sealed = record::seal(serde_json::from_str(line).unwrap(), &head, &forger).unwrap();
                head = sealed.head.clone();
                let mut record = sealed.record;
                if let Some(id) = claim {
                    record.insert("signing_key_id".into(), id.into());
                }
                String::from_utf8(jcs(&record).unwrap()).unwrap()
            })
            .collect::<Vec<_>>()
    };
    let report = judge(&bench, &resign(None));
    assert_eq!((report.broken_at, report.problem_count), (Some(1), 6), "{report:?}");
    assert!(report.problems[0].what.contains("UnknownKeyId"));
    assert_eq!(judge(&bench, &resign(Some(bench.keys.id()))).broken_at, Some(1), "under the real key's name");
}

/// What the signer itself may never have written, even with good signatures.
#[tokio::test]
async fn a_grant_used_twice_or_a_receipt_out_of_nothing_shows() {
    let bench = Bench::new();
    let lines = bench.filled(1).await;
    let reseal = |order: &[usize], change: &dyn Fn(usize, &mut Map<String, Value>)| {
        let mut head = Head { log_id: "log".into(), sequence: 0, hash: None };
        let lines: Vec<String> = order
            .iter()
            .enumerate()
            .map(|(at, from)| {
                let mut fields: Map<String, Value> = serde_json::from_str(&lines[*from]).unwrap();
                change(at, &mut fields);
                let sealed = record::seal(fields, &head, &bench.keys).unwrap();
                head = sealed.head;
                sealed.text
            })
            .collect();
        judge(&bench, &lines)
    };
    let fresh = |_: usize, fields: &mut Map<String, Value>| {
        let id = Kind::of(fields).unwrap().id_field();
        fields.insert(id.into(), crate::ids::mint().into());
    };
    assert!(reseal(&[0, 1, 2], &fresh).intact);
    assert_eq!(reseal(&[0, 2, 0, 2], &fresh).broken_at, Some(3), "the grant again");
    assert_eq!(reseal(&[0, 2, 2], &fresh).broken_at, Some(3), "a second receipt");
    assert_eq!(reseal(&[1, 2], &fresh).broken_at, Some(2), "a receipt without intent");
    assert_eq!(reseal(&[1, 1], &|_, _| {}).broken_at, Some(2), "an id again");
    let other_principal = |at: usize, fields: &mut Map<String, Value>| {
        if at == 2 {
            fields.insert("principal".into(), "uid-0".into());
        }
    };
    assert_eq!(reseal(&[0, 1, 2], &other_principal).broken_at, Some(3));
    let other_plan = |at: usize, fields: &mut Map<String, Value>| {
        if at == 0 {
            fields["details"]["plan"]["policy_version"] = json!("sha256:00");
        }
    };
    assert_eq!(reseal(&[0, 1, 2], &other_plan).broken_at, Some(1));
}

/// What a verifier can and cannot say about the end of a log.
#[tokio::test]
async fn a_cut_tail_shows_against_the_head_or_an_anchor_and_not_otherwise() {
    let bench = Bench::new();
    let lines = bench.filled(3).await;
    let kept = anchor_of(&lines[8]);
    let cut = &lines[..6];
    let text = format!("{}\n", cut.join("\n"));

    // An export has no head. Without an anchor a shorter log is a good log, and the report says how sure it is.
    let report = judge(&bench, cut);
    assert!(report.intact && report.tail == Tail::Unknown);
    let report = judge_bytes(&bench, text.as_bytes(), Some(&kept));
    assert_eq!((report.intact, report.broken_at), (false, Some(7)), "{report:?}");
    let count = Anchor { sequence: 9, hash: None };
    assert!(!judge_bytes(&bench, text.as_bytes(), Some(&count)).intact, "a number alone will do");
    let there = judge_bytes(&bench, text.as_bytes(), Some(&anchor_of(&lines[5])));
    assert!(there.intact && there.tail == Tail::Anchored);
    let elsewhere = Anchor { sequence: 6, hash: kept.hash.clone() };
    assert_eq!(judge_bytes(&bench, text.as_bytes(), Some(&elsewhere)).broken_at, Some(6));
    // Half of the last line, and its end alone.
    assert_eq!(judge_bytes(&bench, &text.as_bytes()[..text.len() - 40], None).broken_at, Some(6));
    assert_eq!(judge_bytes(&bench, &text.as_bytes()[..text.len() - 1], None).broken_at, Some(6));

    // In the file, the head tells; who sets the head back as well is found out by the anchor alone.
    tamper(&bench, |connection| {
        connection.execute("DELETE FROM records WHERE sequence > 6", []).unwrap();
        connection
            .execute(
                "DELETE FROM contents WHERE record_id IN (SELECT record_id FROM contents ORDER BY rowid DESC LIMIT 2)",
                [],
            )
            .unwrap();
    });
    let report = bench.verify();
    assert_eq!((report.intact, report.broken_at), (false, Some(7)), "{report:?}");
    let opened = Ledger::open(&bench.directory(), bench.keys.clone(), &LedgerConfig::default(), NOW);
    assert!(matches!(opened, Err(LedgerError::Broken(_))), "and nothing is appended to it");
    let before = anchor_of(&lines[5]);
    let connection = Connection::open(bench.directory().join(FILE)).unwrap();
    connection.execute("UPDATE head SET sequence = 6, hash = ?1", [&before.hash]).unwrap();
    let report = bench.verify();
    assert!(report.intact && report.tail == Tail::Head, "{report:?}");
    assert_eq!(verify(&bench.directory(), bench.keys.public(), Some(&kept)).unwrap().broken_at, Some(7));
}

#[tokio::test]
async fn changes_in_the_file_show() {
    for (name, change, place) in [
        ("a record", "UPDATE records SET body = replace(body, 'uid-1000', 'uid-1001') WHERE sequence = 3", 3),
        ("an empty one", "UPDATE records SET body = '{}' WHERE sequence = 2", 2),
        ("a row's number", "UPDATE records SET sequence = 10 WHERE sequence = 6", 6),
        ("a record gone", "DELETE FROM records WHERE sequence = 4", 4),
        ("all gone", "DELETE FROM records; DELETE FROM contents", 1),
        ("the params", "UPDATE contents SET bytes = x'00' WHERE name = 'params'", 1),
        ("the output's name", "UPDATE contents SET name = 'stdout' WHERE name = 'output'", 3),
        ("bytes of no record", "INSERT INTO contents VALUES ('x', 'output', x'00')", 7),
        ("the log's name", "UPDATE head SET log_id = 'another'", 1),
        ("no head", "DELETE FROM head", 7),
        ("the head's hash", "UPDATE head SET hash = NULL", 7),
    ] {
        let bench = Bench::new();
        bench.filled(2).await;
        assert!(bench.verify().intact);
        tamper(&bench, |connection| connection.execute_batch(change).unwrap());
        let report = bench.verify();
        assert_eq!((report.intact, report.broken_at), (false, Some(place)), "{name}: {report:?}");
    }
}

#[tokio::test]
async fn bytes_that_rot_in_the_file_show_or_do_not_matter() {
    let bench = Bench::new();
    let lines = bench.filled(2).await;
    let path = bench.directory().join(FILE);
    let good = std::fs::read(&path).unwrap();
    let mut found = 0;
    for at in (0..good.len()).step_by(211) {
        let mut bad = good.clone();
        bad[at] ^= 0x40;
        std::fs::write(&path, &bad).unwrap();
        // Free space, index pages and statistics are no evidence; what reads well must read the same.
        match verify(&path, bench.keys.public(), None) {
            Ok(report) if report.intact => assert_eq!(super::lines(&path), lines, "byte {at}"),
            _ => found += 1,
        }
    }
    assert!(found > 10, "{found}");
}
