//! Processes that die, disks that are full, and two that want the same file.
#![allow(clippy::disallowed_methods)]

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use super::*;

const CHILD: &str = "LATCHGATE_TEST_LEDGER_CHILD";

/// Runs in a process of its own, started by the tests below: appends calls until it is killed or refused, and prints
/// the number of each record that it was told is on the disk.
#[test]
fn child() {
    let Ok(root) = std::env::var(CHILD) else { return };
    let root = Path::new(&root);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    let keys = Arc::new(ReceiptKeys::load_or_create(&root.join("keys")).unwrap());
    let config = LedgerConfig { reserve_bytes: 0, ..LedgerConfig::default() };
    runtime.block_on(async {
        let (ledger, _) = match Ledger::open(&root.join("ledger"), keys, &config, NOW) {
            Ok(opened) => opened,
            Err(error) => return println!("\nrefused {error:?}"),
        };
        let ledger = Arc::new(ledger);
        let tasks: Vec<_> = (0..8)
            .map(|task| {
                let ledger = ledger.clone();
                tokio::spawn(async move {
                    for index in 0.. {
                        let (grant, intent) = decided(task * 1_000_000 + index);
                        let recorded = ledger.intent(&grant, intent.clone()).await?;
                        println!("\nrecorded {} {}", recorded.sequence(), recorded.hash());
                        let receipt = ledger.receipt(outcome(&grant, &intent)).await?;
                        println!("\nrecorded {} {}", receipt.sequence(), receipt.result_hash());
                    }
                    Ok::<(), LedgerError>(())
                })
            })
            .collect();
        for task in tasks {
            println!("\nrefused {:?}", task.await.unwrap());
        }
    });
}

fn own_test() -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "ledger::tests::crash::child", "--nocapture", "--test-threads=1"]);
    command
}

/// The anchors that the child was told of, and its refusals.
fn said(lines: impl Iterator<Item = String>) -> (Vec<Anchor>, Vec<String>) {
    let (mut anchors, mut refusals) = (Vec::new(), Vec::new());
    for line in lines {
        if let Some((sequence, hash)) = line.strip_prefix("recorded ").and_then(|rest| rest.split_once(' ')) {
            // A killed process may leave half a line.
            if hash.len() == 64 {
                anchors.push(Anchor { sequence: sequence.parse().unwrap(), hash: Some(hash.to_owned()) });
            }
        } else if let Some(refusal) = line.strip_prefix("refused ") {
            refusals.push(refusal.to_owned());
        }
    }
    (anchors, refusals)
}

fn assert_all_there(bench: &Bench, anchors: &[Anchor]) {
    let records = lines(&bench.directory());
    for anchor in anchors {
        let line = &records[usize::try_from(anchor.sequence).unwrap() - 1];
        assert!(line.contains(anchor.hash.as_deref().unwrap()), "record {} is not what was promised", anchor.sequence);
    }
}

#[test]
fn what_was_acknowledged_survives_sigkill_and_the_orphans_are_closed() {
    for (round, patience) in [40, 333, 1001].into_iter().enumerate() {
        let bench = Bench::new();
        let mut child =
            own_test().env(CHILD, bench.root.path()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let mut heard: Vec<String> = Vec::new();
        while heard.iter().filter(|line| line.starts_with("recorded ")).count() < patience {
            heard.push(out.next().expect("the child writes until it is killed"));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        heard.extend(out);
        let (anchors, refusals) = said(heard.into_iter());
        assert!(refusals.is_empty(), "{refusals:?}");

        // The file as it was left, with its write-ahead log, read-only.
        let last = anchors.iter().max_by_key(|anchor| anchor.sequence).unwrap();
        let report = verify(&bench.directory(), bench.keys.public(), Some(last)).unwrap();
        assert!(report.intact && report.tail == Tail::Anchored, "round {round}: {report:?}");
        assert_all_there(&bench, &anchors);

        let (ledger, orphans) = bench.open();
        assert_eq!(orphans.len() as u64, report.open_intents, "round {round}");
        assert!(orphans.len() <= 8);
        drop(ledger);
        let after = verify(&bench.directory(), bench.keys.public(), Some(last)).unwrap();
        assert!(after.intact && after.open_intents == 0, "{after:?}");
        assert_eq!(after.total_events, report.total_events + report.open_intents);
    }
}

#[tokio::test]
async fn one_process_at_a_time_has_a_ledger_and_anyone_may_read_it() {
    let bench = Bench::new();
    let (ledger, _) = bench.open();
    call(&ledger, 0).await;
    let second = own_test().env(CHILD, bench.root.path()).output().unwrap();
    let (anchors, refusals) = said(String::from_utf8(second.stdout).unwrap().lines().map(str::to_owned));
    assert!(anchors.is_empty());
    assert!(refusals.len() == 1 && refusals[0].contains("Locked"), "{refusals:?}");
    let here = Ledger::open(&bench.directory(), bench.keys.clone(), &LedgerConfig::default(), NOW);
    assert!(matches!(here, Err(LedgerError::Open(error)) if matches!(*error, OpenError::Locked(_))));
    call(&ledger, 1).await;
    assert!(bench.verify().intact);
    drop(ledger);
    bench.open();
}

/// Runs the child under a shell's `setup` and expects that it was refused by the disk, keeps what it promised, and that
/// the same ledger goes on when there is room again.
fn fills_up(bench: &Bench, setup: &str, rescue: &str) {
    let script = format!(
        "set -e; {setup}\n\"$0\" --exact ledger::tests::crash::child --nocapture --test-threads=1\nset +e; {rescue}"
    );
    let output = Command::new("unshare")
        .args(["--map-root-user", "--mount", "sh", "-c", &script])
        .arg(std::env::current_exe().unwrap())
        .env(CHILD, bench.root.path())
        .env("LEDGER", bench.directory())
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let (anchors, refusals) = said(String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned));
    assert!(!anchors.is_empty(), "{stderr}");
    assert_eq!(refusals.len(), 8, "every writer was told: {refusals:?} {stderr}");
    assert!(refusals.iter().all(|refusal| !refusal.starts_with("Ok")), "{refusals:?}");

    let last = anchors.iter().max_by_key(|anchor| anchor.sequence).unwrap();
    let report = verify(&bench.directory(), bench.keys.public(), Some(last)).unwrap();
    assert!(report.intact, "nothing half-written: {report:?}");
    assert_all_there(bench, &anchors);
    let (ledger, orphans) = bench.open();
    assert_eq!(orphans.len() as u64, report.open_intents);
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(call(&ledger, 0));
    assert!(bench.verify().intact);
}

#[test]
fn a_full_disk_refuses_and_leaves_nothing_half_written() {
    // A file system of 600 kB in a mount namespace of the child's own; what it held is copied out before it goes.
    let bench = Bench::new();
    fills_up(
        &bench,
        "mkdir -m 700 \"$LEDGER\"; mount -t tmpfs -o size=600k,mode=700 ledger \"$LEDGER\"",
        "mkdir -m 700 \"$LEDGER.copy\"; cp \"$LEDGER\"/* \"$LEDGER.copy\"; umount \"$LEDGER\"; \
         rmdir \"$LEDGER\"; mv \"$LEDGER.copy\" \"$LEDGER\"",
    );
}

#[test]
fn a_file_size_limit_refuses_and_leaves_nothing_half_written() {
    let bench = Bench::new();
    fills_up(&bench, "trap '' XFSZ; ulimit -f 800", "");
}

#[tokio::test]
async fn intents_and_events_leave_room_for_receipts() {
    let bench = Bench::new();
    let (ledger, _) = bench.open();
    let (grant, intent) = decided(0);
    ledger.intent(&grant, intent.clone()).await.unwrap();
    drop(ledger);
    // More than any disk has: intents are refused, and events, of which an agent can cause as many as it likes; what
    // runs already can still be closed.
    let config = LedgerConfig { reserve_bytes: u64::MAX, ..LedgerConfig::default() };
    let (ledger, orphans) = Ledger::open(&bench.directory(), bench.keys.clone(), &config, NOW).unwrap();
    assert_eq!(orphans.len(), 1);
    let (grant, intent) = decided(1);
    assert!(matches!(ledger.intent(&grant, intent).await, Err(LedgerError::NoSpace)));
    assert!(matches!(ledger.event(note(1)).await, Err(LedgerError::NoSpace)));
    let report = bench.verify();
    assert!(report.intact && report.total_events == 2, "{report:?}");
}

#[tokio::test]
async fn a_copy_that_nobody_may_write_verifies() {
    let bench = Bench::new();
    bench.filled(2).await;
    let copy = bench.root.path().join("copy of it?#");
    std::fs::create_dir(&copy).unwrap();
    std::fs::copy(bench.directory().join(FILE), copy.join(FILE)).unwrap();
    let script = "mount --bind \"$0\" \"$0\" && mount -o remount,bind,ro \"$0\" && \
                  exec \"$1\" --exact ledger::tests::crash::read_only_child --nocapture --test-threads=1";
    std::fs::write(bench.root.path().join("public.json"), bench.keys.jwks().to_string()).unwrap();
    let output = Command::new("unshare")
        .args(["--map-root-user", "--mount", "sh", "-c", script])
        .arg(&copy)
        .arg(std::env::current_exe().unwrap())
        .env(CHILD, bench.root.path())
        .output()
        .unwrap();
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(out.contains("read-only: intact 6"), "{out} {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn read_only_child() {
    let Ok(root) = std::env::var(CHILD) else { return };
    let root = Path::new(&root);
    let copy = root.join("copy of it?#");
    assert!(std::fs::write(copy.join("x"), b"").is_err(), "it is read-only");
    let report = verify(&copy, &PublicKeys::read(&root.join("public.json")).unwrap(), None).unwrap();
    assert!(report.intact, "{report:?}");
    println!("read-only: intact {}", report.total_events);
}
