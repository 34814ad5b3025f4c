//! What holds when the gate dies, cannot start, is stopped, or has its footing taken away: everything, and it says why.
//!
//! Needs root, a v2 hierarchy, `/usr/bin/python3`, setpriv, timeout and unshare.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used)]

#[path = "holding/crashes.rs"]
mod crashes;
#[path = "holding/faults.rs"]
mod faults;

/// Not a test: what [`latchgate_tests::storm::Storm`] starts.
#[test]
fn storm_process() {
    latchgate_tests::storm::run();
}
