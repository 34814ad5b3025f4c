//! How deep a leaf is. A path does not say: it depends on where the tree's root was mounted from and on cgroup
//! namespaces. So a process is born in a leaf and the kernel is asked.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use aya::maps::{Array, MapData};
use aya::programs::{CgroupAttachMode, CgroupSock};
use latchgate_egress_types as types;

use super::{KernelConfig, KernelError, pins, sys};

/// The ancestor level at which the program finds the leaf of a task, whatever the leaf has nested in it.
pub fn level(
    config: &KernelConfig,
    generation: u64,
    program: &mut CgroupSock,
    ancestors: &Array<MapData, u64>,
) -> Result<u32, KernelError> {
    let leaf = ProbeLeaf::make(config.actions.join(format!("probe-{generation:016x}")))?;
    let directory = pins::cgroup(&leaf.0)?;
    let id = pins::cgroup_id(&directory).map_err(KernelError::io("the probe's cgroup"))?;
    let refused = |source| KernelError::Program { program: "probe_level", source };
    let link = program.attach(&directory, CgroupAttachMode::Single).map_err(refused)?;
    let tried = sys::socket_in_cgroup(&directory).map_err(KernelError::io("starting the probe"));
    program.detach(link).map_err(refused)?;
    tried?;
    for level in 0..types::MAX_LEVEL {
        let found = ancestors.get(&level, 0).map_err(|source| KernelError::Map { map: "PROBE", source })?;
        if found == id {
            return Ok(level);
        }
    }
    Err(KernelError::NoLevel)
}

struct ProbeLeaf(PathBuf);

impl ProbeLeaf {
    fn make(path: PathBuf) -> Result<Self, KernelError> {
        fs::create_dir(&path).map_err(KernelError::io(path.display().to_string()))?;
        Ok(Self(path))
    }
}

impl Drop for ProbeLeaf {
    fn drop(&mut self) {
        // The last task's exit may still be on its way through the kernel.
        for _ in 0..50 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}
