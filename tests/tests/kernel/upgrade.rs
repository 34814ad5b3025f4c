//! One gate after another over the same tree, while somebody in a leaf waits for the moment between them.

use std::time::{Duration, Instant};

use latchgate::egress::kernel::{Enforcer, KernelProfile};
use latchgate_tests::storm::{Storm, Tally, Targets, WAYS};

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

/// The same attackers in the same leaves get out by every way when nothing is attached.
fn unheld(tree: &Tree, targets: &Targets, when: &str) {
    for mut storm in attackers(tree, targets) {
        assert!(storm.go());
        std::thread::sleep(Duration::from_millis(100));
        let Tally { attempts, through, .. } = storm.stop();
        for (at, way) in WAYS.iter().enumerate() {
            assert!(
                attempts[at] > 0 && through[at] == attempts[at],
                "{when}, {way}: {} of {}",
                through[at],
                attempts[at]
            );
        }
    }
}

#[test]
fn no_upgrade_leaves_a_moment_open() {
    const UPGRADES: u32 = 1_000;
    let targets = Targets::default();
    let mut tree = Tree::empty("upgrades");
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
    let began = Instant::now();
    let mut present = Some(first);
    for upgrade in 0..UPGRADES {
        if upgrade % 250 == 0 {
            eprintln!("{upgrade} upgrades after {:?}", began.elapsed());
        }
        drop(present.take());
        let next = Enforcer::start(tree.config()).unwrap();
        next.admit(admitted.id, KernelProfile::ProxyOnly, LONG).unwrap();
        present = Some(next);
    }
    let took = began.elapsed();
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
    eprintln!("{attempts} attempts in {UPGRADES} upgrades, which took {took:?}; none got out");
    assert!(attempts > 1_000_000, "{attempts}: too few to have met every moment");

    tree.enforcer.take().unwrap().detach().unwrap();
    unheld(&tree, &targets, "after");
}
