//! Every way out that we know, from inside an action, at a real target in a network namespace of the test's own. An
//! attempt counts as refused only if the same attempt from outside reaches that target, and each is made again with its
//! guards taken away, when it must succeed: there is no row here that could not fail.
//!
//! Needs root, a v2 hierarchy, `/usr/bin/python3`, ip(8), and the second binary that `make test` builds.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used)]

#[path = "escape/ends.rs"]
mod ends;
#[path = "escape/names.rs"]
mod names;
#[path = "escape/network.rs"]
mod network;
#[path = "escape/others.rs"]
mod others;
#[path = "escape/pod.rs"]
mod pod;
#[path = "escape/processes.rs"]
mod processes;
#[path = "escape/switches.rs"]
mod switches;
#[path = "escape/technique.rs"]
mod technique;
#[path = "escape/world.rs"]
mod world;
