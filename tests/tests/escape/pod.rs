//! The same techniques where the gate is a sidecar with four capabilities (`tests/tests/container.rs`), with no guard
//! taken away: the binary there is the one that is shipped.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use latchgate_tests::agent::Agent;
use latchgate_tests::bundle::{Container, Pod, missing};

use crate::technique::{Technique, nothing_more, setup, stays_in};
use crate::world::Target;
use crate::{names, network, processes};

/// What a container's masked `/proc` takes with it: no first process is to be seen, nor what a process may, where there is
/// no `/proc`.
fn there(technique: &Technique) -> Technique {
    match technique.name {
        "the first process" | "setuid programs" => Technique { said: "ENOENT", ..*technique },
        _ => *technique,
    }
}

#[test]
fn nothing_gets_out_of_a_pod() {
    if missing() {
        return;
    }
    let pod = Pod::new("escape");
    // In the pod's network: this test stands where the agent's container and the gate's are.
    pod.inside(|| {
        let target = Target::start();
        let victim = processes::Victim::start(&target);
        for network in ["isolated", "shared"] {
            let setup = setup(&target, network);
            fs::set_permissions(&setup.directory, fs::Permissions::from_mode(0o755)).unwrap();
            let id = format!("gate-{network}");
            let container = Container::gate(&setup.directory);
            let gate = pod.contain(setup, &id, &container).start();
            let agent = Agent::connect(&gate.agent());
            for (table, more) in
                [(network::TABLE, nothing_more()), (names::TABLE, nothing_more()), (processes::TABLE, victim.params())]
            {
                let table: Vec<_> = table.iter().map(there).collect();
                stays_in(&target, &agent, &table, &more, network);
            }
        }
    });
}
