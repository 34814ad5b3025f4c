//! The self-test's way to a leaf: the same as an execution's, with the gate's own attempts in the place of an action.
//! Nothing else can be run this way, so that an action still needs its grant.

use std::time::Duration;

use super::{ENTRY_GRACE, EgressEvidence, Held, Hold, NotCompleted};
use crate::egress::flows::Owner;
use crate::egress::profile::Profile;
use crate::gate::Gate;
use crate::ids;
use crate::sandbox::attempts::Order;
use crate::sandbox::{Exit, Job, Limits, Program};

/// The action that the self-test's leaves stand under. No manifest can have this id.
pub const ACTION_ID: &str = "latchgate:selftest";

/// For the attempts of one leaf. They end by themselves before.
const TIME: Duration = Duration::from_secs(10);
/// An image of this binary is larger than most programs, and each attempt has a copy.
const MEMORY_BYTES: u64 = 512 << 20;
/// Each attempt is a process.
const PROCESSES: u32 = 256;

/// Makes the attempts of `order` in a leaf of this profile: what they wrote, and what the kernel and the proxy saw.
///
/// # Errors
/// Why they were not made, or not to their end.
pub async fn run(gate: &Gate, profile: &Profile, order: &Order) -> Result<(Vec<u8>, EgressEvidence), String> {
    let stdin = serde_json::to_vec(order).map_err(|error| error.to_string())?;
    let place = gate.places.acquire().await.map_err(|error| error.to_string())?;
    let leaf = gate.cgroups.leaf().map_err(|error| error.to_string())?;
    let decision_id = ids::mint();
    let hold = Hold {
        owner: Owner {
            execution_id: ids::mint(),
            action_id: ACTION_ID.to_owned(),
            principal: String::new(),
            workspace: gate.config.workspace.clone(),
        },
        profile,
        inbound_ports: &[],
        deadline: TIME + ENTRY_GRACE,
        network: gate.network,
        first_decision: None,
        lasts: false,
    };
    let limits = Limits {
        memory_bytes: MEMORY_BYTES,
        timeout: TIME,
        stdout_bytes: 1 << 20,
        stderr_bytes: gate.config.sandbox.stderr_bytes,
        processes: PROCESSES,
        scratch_bytes: gate.config.sandbox.scratch_bytes,
    };
    let job = Job { program: Program::Attempts, stdin, limits, network: gate.network, trust_pem: None };
    let (mut held, admitted) = Held::begin(gate, &leaf, hold);
    let completed = match admitted {
        Err(error) => Err(NotCompleted::NotStarted(error.to_string())),
        Ok(()) => {
            let take = async |listeners| held.services().listen(listeners);
            gate.runner.run_with(&leaf, job, take, gate.cancelled()).await.map_err(NotCompleted::from)
        }
    };
    let evidence = held.end(&decision_id, None).await;
    let _ = tokio::task::spawn_blocking(move || drop(leaf)).await;
    drop(place);
    match completed {
        Ok(completed) if completed.exit == Exit::Code(0) => Ok((completed.stdout, evidence)),
        Ok(completed) => {
            let said = String::from_utf8_lossy(&completed.stderr).into_owned();
            Err(format!("the attempts ended with {:?}: {said}", completed.exit))
        }
        Err(NotCompleted::NotStarted(why) | NotCompleted::Unknown(why)) => Err(why),
    }
}
