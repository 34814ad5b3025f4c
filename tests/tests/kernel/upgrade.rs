//! One gate after another over the same tree, while somebody in a leaf waits for the moment between them.

use std::ffi::CString;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::time::{Duration, Instant};

use latchgate::egress::kernel::{Enforcer, KernelError, KernelProfile};
use latchgate_tests::storm::{Storm, Tally, Targets, WAYS};

use super::full::bpf;
use super::tree::{LONG, Tree};

/// Not a test: what [`Storm`] starts.
#[test]
fn storm_process() {
    latchgate_tests::storm::run();
}

const ENTRY: &str = "upgrade::storm_process";

/// Two attackers: one whose leaf every gate admits to its proxy, and one in a leaf that nobody admits. The sockets that
/// they keep are made now: while nothing is attached, and the packet filter alone sees a datagram of the connected one.
fn attackers(tree: &Tree, targets: &Targets) -> [Storm; 2] {
    ["admitted", "bare"].map(|name| {
        let mut storm = Storm::start(ENTRY, targets);
        storm.enter(&tree.actions.join(name)).unwrap();
        assert!(storm.make());
        storm
    })
}

/// The same attacker gets out of the leaf by every way when nothing is attached.
fn unheld_in(leaf: &Path, targets: &Targets, when: &str) {
    let mut storm = Storm::start(ENTRY, targets);
    storm.enter(leaf).unwrap();
    assert!(storm.make() && storm.go());
    std::thread::sleep(Duration::from_millis(100));
    let Tally { attempts, through, .. } = storm.stop();
    for (at, way) in WAYS.iter().enumerate() {
        assert!(attempts[at] > 0 && through[at] == attempts[at], "{when}, {way}: {} of {}", through[at], attempts[at]);
    }
}

fn unheld(tree: &Tree, targets: &Targets, when: &str) {
    for leaf in ["admitted", "bare"] {
        unheld_in(&tree.actions.join(leaf), targets, when);
    }
}

/// The next gate. A child of another thread's that has not come to its end holds the last one's lock with all that this
/// process has open: gates are in processes of their own elsewhere.
fn next_gate(tree: &Tree) -> Enforcer {
    let began = Instant::now();
    loop {
        match Enforcer::start(tree.config()) {
            Err(KernelError::InUse(_)) if began.elapsed() < Duration::from_secs(30) => {}
            other => return other.unwrap(),
        }
    }
}

/// So many gates, one after another, over one tree; how many attempts were made meanwhile.
fn upgrades(name: &str, count: u32) -> u64 {
    let targets = Targets::default();
    let mut tree = Tree::empty(name);
    let admitted = tree.leaf("admitted");
    tree.leaf("bare");

    unheld(&tree, &targets, "before");
    assert!(targets.reached() > 0);

    let mut storms = attackers(&tree, &targets);
    let first = Enforcer::start(tree.config()).unwrap();
    first.admit(admitted.id, KernelProfile::ProxyOnly, LONG).unwrap();
    let reached = targets.reached();
    for storm in &mut storms {
        assert!(storm.go());
    }
    let mut present = Some(first);
    for _ in 0..count {
        drop(present.take());
        let next = next_gate(&tree);
        next.admit(admitted.id, KernelProfile::ProxyOnly, LONG).unwrap();
        present = Some(next);
    }
    tree.enforcer = present;
    tree.enforcer().health().unwrap();
    assert_eq!(std::fs::read_dir(tree.pins()).unwrap().count(), 1);
    let mut attempts = 0;
    for storm in storms {
        let tally = storm.stop();
        assert_eq!(tally.escapes(), 0, "{tally:?}");
        attempts += tally.total();
    }
    assert_eq!(targets.reached(), reached);

    tree.enforcer.take().unwrap().detach().unwrap();
    unheld(&tree, &targets, "after");
    attempts
}

/// `LATCHGATE_UPGRADES` says how many; 250 when it is absent, and 1,000 in `make soak`.
#[test]
fn no_upgrade_leaves_a_moment_open() {
    // Most of an upgrade is waiting for the kernel to let go of the last program: several trees wait at one time.
    const TREES: u32 = 4;
    let count: u32 = std::env::var("LATCHGATE_UPGRADES").map_or(250, |text| text.parse().unwrap());
    let began = Instant::now();
    let attempts: u64 = std::thread::scope(|scope| {
        let trees: Vec<_> =
            (0..TREES).map(|at| scope.spawn(move || upgrades(&format!("upgrades-{at}"), count / TREES))).collect();
        trees.into_iter().map(|tree| tree.join().unwrap()).sum()
    });
    eprintln!("{attempts} attempts in {count} upgrades, in {:?}; none got out", began.elapsed());
    assert!(attempts > 1_000 * u64::from(count), "{attempts}: too few to have met every moment");
}

fn made(descriptor: i64) -> OwnedFd {
    assert!(descriptor >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: what the kernel has just made for this process.
    unsafe { OwnedFd::from_raw_fd(i32::try_from(descriptor).unwrap()) }
}

fn word(low: &OwnedFd, high: u32) -> u64 {
    u64::from(low.as_raw_fd().unsigned_abs()) | u64::from(high) << 32
}

fn pin(object: &OwnedFd, path: &Path) {
    const BPF_OBJ_PIN: i64 = 6;
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    let done = bpf(BPF_OBJ_PIN, &mut [path.as_ptr() as u64, word(object, 0)]);
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

/// A program on connect4 that allows everything, attached to `cgroup` and pinned, and a map of leaves of another shape
/// that has an entry for `leaf`: what a predecessor of another version might leave.
fn leave_something_foreign(run: &Path, cgroup: &Path, leaf: u64) {
    const MAP_CREATE: i64 = 0;
    const MAP_UPDATE: i64 = 2;
    const PROG_LOAD: i64 = 5;
    const LINK_CREATE: i64 = 28;
    const CGROUP_SOCK_ADDR: u64 = 18;
    const INET4_CONNECT: u64 = 10;
    const HASH: u64 = 1;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(run.parent().unwrap()).unwrap();
    std::fs::DirBuilder::new().mode(0o700).create(run).unwrap();
    // r0 = 1; exit
    let code: [u64; 2] = [0x0000_0001_0000_00b7, 0x95];
    let mut load = [0_u64; 9];
    load[0] = CGROUP_SOCK_ADDR | 2 << 32;
    load[1] = code.as_ptr() as u64;
    load[2] = c"GPL".as_ptr() as u64;
    load[8] = INET4_CONNECT << 32;
    let program = made(bpf(PROG_LOAD, &mut load));
    let directory = std::fs::File::open(cgroup).unwrap();
    let target = directory.as_raw_fd().unsigned_abs();
    let link = made(bpf(LINK_CREATE, &mut [word(&program, target), INET4_CONNECT]));
    pin(&link, &run.join("connect4"));
    let map = made(bpf(MAP_CREATE, &mut [HASH | 8 << 32, 8 | 16 << 32]));
    let (key, value) = ([leaf], [u64::MAX]);
    assert_eq!(bpf(MAP_UPDATE, &mut [word(&map, 0), key.as_ptr() as u64, value.as_ptr() as u64, 0]), 0);
    pin(&map, &run.join("LEAVES"));
}

#[test]
fn a_program_of_another_layout_is_never_adopted() {
    let targets = Targets::default();
    let mut tree = Tree::empty("layout");
    let leaf = tree.leaf("leaf");
    // The first one mounts the bpffs.
    Enforcer::start(tree.config()).unwrap().detach().unwrap();
    let foreign = tree.pins().join("00000000deadbeef");
    leave_something_foreign(&foreign, &tree.actions, leaf.id.0);
    unheld_in(&leaf.path, &targets, "held by nothing but what allows");

    tree.enforcer = Some(Enforcer::start(tree.config()).unwrap());
    tree.enforcer().health().unwrap();
    assert!(!foreign.exists(), "it is of this tree, and whoever pinned it is dead");
    let mut storm = Storm::start(ENTRY, &targets);
    storm.enter(&leaf.path).unwrap();
    assert!(storm.make() && storm.go());
    std::thread::sleep(Duration::from_millis(200));
    let tally = storm.stop();
    assert_eq!((tally.escapes(), tally.total() > 0), (0, true), "{tally:?}");
    // Nor does its entry count for anything.
    assert!(tree.enforcer().retire(leaf.id).is_err());
}
