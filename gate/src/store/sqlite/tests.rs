#![allow(clippy::disallowed_methods)]

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::store::database::OpenError;
use crate::store::{BudgetStore, DebitOutcome, DebitRequest, LeaseBudget, Period, Remaining, RevocationStore, Window};

/// 2026-11-22T00:00:00Z, a Sunday, so that an hour, a day and no month begins.
const NOW: Timestamp = Timestamp::from_secs(1_795_305_600);
const HOUR_MS: i64 = 3_600_000;

struct Bench {
    root: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self { root: tempfile::tempdir().unwrap() }
    }

    fn directory(&self) -> PathBuf {
        self.root.path().join("store")
    }

    fn open(&self) -> Store {
        self.with(1000, "boot")
    }

    fn with(&self, proofs_per_key: u32, boot_id: &str) -> Store {
        let options = Options { proofs_per_key, boot_id: boot_id.into() };
        Store::open_with(&self.directory(), NOW, &options).unwrap()
    }
}

fn soon(now: Timestamp) -> Timestamp {
    now.plus_millis(60_000)
}

#[test]
fn a_proof_is_fresh_once_for_its_key_and_across_a_restart() {
    let bench = Bench::new();
    let store = bench.open();
    let remember = |store: &Store, jkt: &str, jti: &str| store.remember(jkt, jti, soon(NOW), NOW).unwrap();
    assert_eq!(remember(&store, "key", "a"), Freshness::Fresh);
    assert_eq!(remember(&store, "key", "a"), Freshness::Seen);
    assert_eq!(remember(&store, "other", "a"), Freshness::Fresh, "scoped by key");
    assert_eq!(remember(&store, "keya", ""), Freshness::Fresh, "no two pairs share a name");
    assert_eq!(remember(&store, "key", &"é\u{0}'".repeat(64)), Freshness::Fresh);
    drop(store);
    let store = bench.open();
    assert_eq!(remember(&store, "key", "a"), Freshness::Seen);
    assert_eq!(remember(&store, "key", "b"), Freshness::Fresh);
}

#[test]
fn of_many_at_once_one_is_fresh() {
    let bench = Bench::new();
    let store = bench.open();
    for round in 0..20 {
        let fresh = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    if store.remember("key", &format!("jti {round}"), soon(NOW), NOW).unwrap() == Freshness::Fresh {
                        fresh.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(fresh.into_inner(), 1);
    }
}

#[test]
fn a_key_that_is_full_is_refused_and_fills_nobody_elses_space() {
    let bench = Bench::new();
    let store = bench.with(50, "boot");
    for jti in 0..50 {
        assert_eq!(store.remember("greedy", &jti.to_string(), soon(NOW), NOW).unwrap(), Freshness::Fresh);
    }
    assert!(matches!(store.remember("greedy", "more", soon(NOW), NOW), Err(StoreError::Full)));
    assert_eq!(store.remember("greedy", "7", soon(NOW), NOW).unwrap(), Freshness::Seen, "known all the same");
    assert_eq!(store.remember("modest", "more", soon(NOW), NOW).unwrap(), Freshness::Fresh);
    drop(store);
    let store = bench.with(50, "boot");
    assert!(matches!(store.remember("greedy", "more", soon(NOW), NOW), Err(StoreError::Full)), "after a restart too");

    // What ended makes room, and is forgotten only when the clock that ended it can no longer go back past it.
    let ended = soon(NOW).plus_millis(10_000);
    assert!(matches!(store.remember("greedy", "more", soon(ended), ended), Err(StoreError::Full)));
    let ended = ended.plus_millis(1);
    for jti in 0..50 {
        assert_eq!(store.remember("greedy", &format!("again {jti}"), soon(ended), ended).unwrap(), Freshness::Fresh);
    }
    assert!(matches!(store.remember("greedy", "more", soon(ended), ended), Err(StoreError::Full)));
}

#[test]
fn what_ended_is_removed() {
    let bench = Bench::new();
    let store = bench.open();
    for second in 0..2_000 {
        let now = NOW.plus_millis(second * 1_000);
        assert_eq!(store.remember("key", &second.to_string(), soon(now), now).unwrap(), Freshness::Fresh);
    }
    let reader = Connection::open(bench.directory().join("replay.db")).unwrap();
    let rows: i64 = reader.query_row("SELECT COUNT(*) FROM proofs", [], |row| row.get(0)).unwrap();
    assert!(rows <= 72, "{rows} of 70 seconds");
}

/// Proofs that ended are forgotten: a clock set back would make them good again.
#[test]
fn a_clock_that_goes_back_is_refused() {
    let bench = Bench::new();
    let store = bench.open();
    let later = NOW.plus_millis(HOUR_MS);
    store.remember("key", "a", soon(later), later).unwrap();
    let back = |by_ms: i64| store.remember("key", &format!("b {by_ms}"), soon(later), later.plus_millis(-by_ms));
    assert!(back(5_000).is_ok(), "skew");
    assert!(matches!(back(5_001), Err(StoreError::Clock { .. })));
    drop(store);
    let store = bench.open();
    assert!(matches!(store.remember("key", "c", soon(NOW), NOW), Err(StoreError::Clock { .. })), "after a restart too");
}

#[test]
fn a_fresh_file_and_a_machine_that_was_down_are_not_trusted_back_in_time() {
    let bench = Bench::new();
    assert_eq!(bench.open().not_before(), Some(NOW));
    let open = |boot_id: &str, seconds: i64| {
        let options = Options { proofs_per_key: 10, boot_id: boot_id.into() };
        Store::open_with(&bench.directory(), NOW.plus_millis(seconds * 1_000), &options).unwrap().not_before()
    };
    assert_eq!(open("boot", 10), Some(NOW), "the file has known everything since");
    assert_eq!(open("next boot", 20), Some(NOW.plus_millis(20_000)));
    assert_eq!(open("next boot", 21), Some(NOW.plus_millis(20_000)), "a second start does not forget it");
    std::fs::remove_file(bench.directory().join("replay.db")).unwrap();
    assert_eq!(open("next boot", 30), Some(NOW.plus_millis(30_000)));
}

const CHILD: &str = "LATCHGATE_TEST_STORE_CHILD";

#[test]
fn child() {
    let Ok(directory) = std::env::var(CHILD) else { return };
    let options = Options { proofs_per_key: u32::MAX, boot_id: "boot".into() };
    let store = Store::open_with(directory.as_ref(), NOW, &options).unwrap();
    for jti in 0_u64.. {
        assert_eq!(store.remember("key", &jti.to_string(), soon(NOW), NOW).unwrap(), Freshness::Fresh);
        println!("\nfresh {jti} .");
    }
}

#[test]
fn a_proof_that_was_taken_is_seen_after_sigkill() {
    let bench = Bench::new();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "store::sqlite::tests::child", "--nocapture", "--test-threads=1"])
        .env(CHILD, bench.directory())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let jti = |line: &String| line.strip_prefix("fresh ")?.strip_suffix(" .")?.parse::<u64>().ok();
    let mut taken = 0;
    while taken < 2_000 {
        taken = jti(&out.next().expect("the child writes until it is killed")).unwrap_or(taken);
    }
    assert!(matches!(Store::open(&bench.directory(), NOW), Err(StoreError::Open(OpenError::Locked(_)))));
    child.kill().unwrap();
    child.wait().unwrap();
    taken = out.filter_map(|line| jti(&line)).fold(taken, u64::max);
    let store = bench.with(u32::MAX, "boot");
    assert_eq!(store.not_before(), Some(NOW), "and it is trusted");
    for jti in 0..=taken {
        assert_eq!(store.remember("key", &jti.to_string(), soon(NOW), NOW).unwrap(), Freshness::Seen, "{jti}");
    }
}

#[test]
fn a_damaged_or_foreign_file_is_not_opened() {
    for name in ["replay.db", "state.db"] {
        let bench = Bench::new();
        drop(bench.open());
        let path = bench.directory().join(name);
        let good = std::fs::read(&path).unwrap();
        let refused = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            assert!(Store::open(&bench.directory(), NOW).is_err());
        };
        refused(
            b"this is not a database, and long enough to be read as the header of one, which it is not either......",
        );
        refused(&good[..good.len() / 2]);
        let mut scratched = good.clone();
        for byte in &mut scratched[4096..4200] {
            *byte ^= 0xff;
        }
        refused(&scratched);
        std::fs::write(&path, &good).unwrap();
        Connection::open(&path).unwrap().pragma_update(None, "user_version", 2).unwrap();
        assert!(Store::open(&bench.directory(), NOW).is_err(), "of a later version");
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(bench.root.path().join("elsewhere"), &path).unwrap();
        assert!(Store::open(&bench.directory(), NOW).is_err(), "a symlink");
    }
}

#[test]
fn a_directory_that_others_can_enter_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let bench = Bench::new();
    std::fs::create_dir(bench.directory()).unwrap();
    std::fs::set_permissions(bench.directory(), std::fs::Permissions::from_mode(0o755)).unwrap();
    assert!(Store::open(&bench.directory(), NOW).is_err());
    std::fs::set_permissions(bench.directory(), std::fs::Permissions::from_mode(0o700)).unwrap();
    drop(Store::open(&bench.directory(), NOW).unwrap());
    for name in ["replay.db", "state.db", "lock"] {
        let mode = std::fs::metadata(bench.directory().join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
}

#[test]
fn leases_principals_and_everything_can_be_revoked_for_good() {
    let bench = Bench::new();
    let store = bench.open();
    let (before, after) = (NOW.plus_millis(-1_000), NOW.plus_millis(1_000));
    let revoked = |store: &Store, lease: &str, principal: &str, iat| store.is_revoked(lease, principal, iat).unwrap();
    assert!(!revoked(&store, "one", "alice", before));
    store.revoke_lease("one", NOW.plus_millis(HOUR_MS), NOW).unwrap();
    store.revoke_principal("bob", NOW.plus_millis(500)).unwrap();
    let holds = |store: &Store| {
        assert!(revoked(store, "one", "alice", after), "whenever it was issued");
        assert!(!revoked(store, "two", "alice", before), "another of the same principal");
        assert!(revoked(store, "three", "bob", before));
        assert!(revoked(store, "three", "bob", NOW), "of the same second");
        assert!(!revoked(store, "four", "bob", after), "issued later");
    };
    holds(&store);
    drop(store);
    let store = bench.open();
    holds(&store);
    // A clock that went back takes nothing back.
    store.revoke_principal("bob", NOW.plus_millis(-HOUR_MS)).unwrap();
    holds(&store);

    assert_eq!(store.epoch().unwrap().number, 0);
    let epoch = store.revoke_all(NOW).unwrap();
    assert_eq!((epoch.number, epoch.revoked_at), (1, Some(NOW)));
    assert!(revoked(&store, "two", "alice", NOW) && !revoked(&store, "five", "alice", after));
    store.revoke_all(before).unwrap();
    drop(store);
    let store = bench.open();
    assert_eq!(store.epoch().unwrap().number, 2);
    assert!(revoked(&store, "two", "alice", NOW));
    // Leases that ended are forgotten, the others are not.
    store.revoke_lease("six", NOW.plus_millis(9 * HOUR_MS), NOW.plus_millis(2 * HOUR_MS)).unwrap();
    assert!(!revoked(&store, "one", "alice", after) && revoked(&store, "six", "alice", after));
}

fn window(name: &str, period: Period, max_calls: Option<u64>, max_cost_usd_cents: Option<u64>) -> Window {
    Window { name: name.into(), period, max_calls, max_cost_usd_cents }
}

fn request(operator: Vec<Window>, cost_usd_cents: u64, now: Timestamp) -> DebitRequest {
    DebitRequest { principal: "alice".into(), operator, lease: None, cost_usd_cents, now }
}

fn left(calls_remaining: Option<u64>, cost_remaining_usd_cents: Option<u64>) -> Remaining {
    Remaining { calls_remaining, cost_remaining_usd_cents }
}

fn exhausted(which: &str) -> DebitOutcome {
    DebitOutcome::Exhausted { which: which.into() }
}

fn debited(outcome: DebitOutcome) -> (crate::store::Ticket, Remaining) {
    match outcome {
        DebitOutcome::Debited { ticket, remaining } => (ticket, remaining),
        DebitOutcome::Exhausted { which } => panic!("{which} is exhausted"),
    }
}

#[test]
fn concurrent_debits_never_overspend() {
    let bench = Bench::new();
    let store = Arc::new(bench.open());
    let wanted = request(vec![window("hourly", Period::Hour, Some(1_000), Some(301))], 3, NOW);
    let (taken, refused) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..20 {
                    match store.debit(&wanted).unwrap() {
                        DebitOutcome::Debited { .. } => taken.fetch_add(1, Ordering::Relaxed),
                        DebitOutcome::Exhausted { .. } => refused.fetch_add(1, Ordering::Relaxed),
                    };
                }
            });
        }
    });
    assert_eq!((taken.into_inner(), refused.into_inner()), (100, 60));
    assert_eq!(store.remaining(&wanted).unwrap(), left(Some(900), Some(1)));
}

#[test]
fn a_refund_gives_back_once_across_a_restart() {
    let bench = Bench::new();
    let store = bench.open();
    let wanted = request(vec![window("hourly", Period::Hour, Some(2), Some(100))], 40, NOW);
    let (ticket, after) = debited(store.debit(&wanted).unwrap());
    assert_eq!(after, left(Some(1), Some(60)));
    let (kept, after) = debited(store.debit(&wanted).unwrap());
    assert_eq!(after, left(Some(0), Some(20)));
    assert_eq!(store.debit(&wanted).unwrap(), exhausted("hourly"));
    assert!(store.refund(&ticket).unwrap());
    assert!(!store.refund(&ticket).unwrap());
    assert_eq!(store.remaining(&wanted).unwrap(), left(Some(1), Some(60)));
    drop(store);
    let store = bench.open();
    assert!(!store.refund(&ticket).unwrap());
    assert_eq!(store.remaining(&wanted).unwrap(), left(Some(1), Some(60)), "what was spent stays spent");
    let given = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| given.fetch_add(u64::from(store.refund(&kept).unwrap()), Ordering::Relaxed));
        }
    });
    assert_eq!(given.into_inner(), 1);
    assert_eq!(store.remaining(&wanted).unwrap(), left(Some(2), Some(100)));
}

#[test]
fn windows_begin_anew_with_the_hour_the_day_and_the_month() {
    let last_second = Timestamp::parse("2026-11-30T23:59:59Z").unwrap();
    let cases = [
        (Period::Hour, "2026-11-30T23:00:00Z", "2026-12-01T00:00:00Z"),
        (Period::Day, "2026-11-30T00:00:00Z", "2026-12-01T00:00:00Z"),
        (Period::Month, "2026-11-01T00:00:00Z", "2026-12-01T00:00:00Z"),
        (Period::Seconds(10), "2026-11-30T23:59:50Z", "2026-12-01T00:00:00Z"),
    ];
    for (period, begin, next) in cases {
        let bench = Bench::new();
        let store = bench.open();
        let at = |now: Timestamp| request(vec![window("w", period, Some(1), None)], 0, now);
        debited(store.debit(&at(Timestamp::parse(begin).unwrap())).unwrap());
        assert_eq!(store.debit(&at(last_second)).unwrap(), exhausted("w"), "{period:?}");
        assert!(store.remaining(&at(last_second)).unwrap().is_exhausted());
        debited(store.debit(&at(Timestamp::parse(next).unwrap())).unwrap());
        // Back in the old window, by a clock that was set back, what was spent there is still spent.
        assert_eq!(store.debit(&at(last_second)).unwrap(), exhausted("w"), "{period:?}");
    }
}

#[test]
fn every_budget_is_debited_or_none() {
    let bench = Bench::new();
    let store = bench.open();
    let lease = |jti: &str| LeaseBudget {
        lease_jti: jti.into(),
        max_calls: Some(2),
        max_cost_usd_cents: None,
        expires: NOW.plus_millis(300_000),
    };
    let windows = vec![window("hourly", Period::Hour, Some(3), None), window("daily", Period::Day, None, Some(25))];
    let wanted = |jti: &str, cost| DebitRequest { lease: Some(lease(jti)), ..request(windows.clone(), cost, NOW) };
    assert_eq!(store.remaining(&wanted("a", 0)).unwrap(), left(Some(2), Some(25)));
    assert_eq!(debited(store.debit(&wanted("a", 10)).unwrap()).1, left(Some(1), Some(15)));
    assert_eq!(debited(store.debit(&wanted("a", 10)).unwrap()).1, left(Some(0), Some(5)));
    assert_eq!(store.debit(&wanted("a", 0)).unwrap(), exhausted("lease"));
    // A new lease is a new lease budget; what is the operator's goes on.
    assert_eq!(store.debit(&wanted("b", 10)).unwrap(), exhausted("daily"), "more than is left");
    assert_eq!(store.remaining(&wanted("b", 0)).unwrap(), left(Some(1), Some(5)), "and nothing was taken");
    assert_eq!(debited(store.debit(&wanted("b", 5)).unwrap()).1, left(Some(0), Some(0)));
    assert_eq!(store.debit(&wanted("c", 0)).unwrap(), exhausted("hourly"));
    let other = DebitRequest { principal: "bob".into(), ..wanted("c", 0) };
    assert_eq!(debited(store.debit(&other).unwrap()).1, left(Some(1), Some(25)), "another principal's own");
    // A lease named like someone's window is not that window.
    let confusing = DebitRequest { lease: Some(lease("[\"window\",\"alice\",\"hourly\"]")), ..request(vec![], 0, NOW) };
    assert_eq!(store.remaining(&confusing).unwrap(), left(Some(2), None));
}

#[test]
fn without_budgets_nothing_is_limited_and_at_zero_nothing_is_free() {
    let bench = Bench::new();
    let store = bench.open();
    assert_eq!(debited(store.debit(&request(vec![], 1_000_000, NOW)).unwrap()).1, left(None, None));
    for window in [window("w", Period::Day, Some(0), None), window("w", Period::Day, None, Some(0))] {
        assert_eq!(store.debit(&request(vec![window], 0, NOW)).unwrap(), exhausted("w"));
    }
    let endless = window("w", Period::Month, Some(u64::MAX), Some(u64::MAX));
    assert!(matches!(store.debit(&request(vec![endless.clone()], u64::MAX, NOW)), Err(StoreError::Invalid(_))));
    debited(store.debit(&request(vec![endless.clone()], i64::MAX as u64, NOW)).unwrap());
    assert!(store.debit(&request(vec![endless.clone()], 1, NOW)).is_err(), "never round to nothing");
    let refused = |operator| matches!(store.debit(&request(operator, 0, NOW)), Err(StoreError::Invalid(_)));
    assert!(refused(vec![window("w", Period::Seconds(0), Some(1), None)]));
    assert!(refused(vec![window("w", Period::Seconds(u64::MAX), Some(1), None)]));
    assert!(refused(vec![endless.clone(), endless]));
}

/// Printed, not asserted: `cargo test -p latchgate --lib store::sqlite::tests::rates -- --nocapture`.
#[test]
fn rates() {
    let bench = Bench::new();
    let store = bench.with(u32::MAX, "boot");
    let measure = |what: &str, count: u32, call: &dyn Fn(u32)| {
        let started = std::time::Instant::now();
        (0..count).for_each(call);
        println!("{what}: {:.0}/s", f64::from(count) / started.elapsed().as_secs_f64());
    };
    measure("proofs", 2_000, &|jti| {
        store.remember("key", &jti.to_string(), soon(NOW), NOW).unwrap();
    });
    let operators = request(vec![window("w", Period::Day, Some(1 << 40), None)], 0, NOW);
    measure("operator debits", 200, &|_| drop(store.debit(&operators).unwrap()));
    let own = LeaseBudget { lease_jti: "l".into(), max_calls: Some(1 << 40), max_cost_usd_cents: None, expires: NOW };
    let leases = DebitRequest { lease: Some(own), ..request(vec![], 0, NOW) };
    measure("lease debits", 2_000, &|_| drop(store.debit(&leases).unwrap()));
}
