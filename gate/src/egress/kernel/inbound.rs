//! The ports that leaves answer at.

use std::collections::HashMap as Admitted;

use aya::maps::{HashMap, MapData, MapError};
use latchgate_egress_types as types;

use super::{KernelError, errno_of, pod};
use crate::egress::LeafId;

/// The map and, for each leaf, what it holds of it.
pub struct Inbound {
    map: HashMap<MapData, pod::InboundKey, u64>,
    leaves: Admitted<LeafId, Vec<u16>>,
}

const fn key(leaf: LeafId, port: u16) -> pod::InboundKey {
    pod::InboundKey(types::InboundKey { leaf: leaf.0, port: port as u32, reserved: 0 })
}

impl Inbound {
    pub fn new(map: HashMap<MapData, pod::InboundKey, u64>) -> Self {
        Self { map, leaves: Admitted::new() }
    }

    pub fn admit(&mut self, leaf: LeafId) {
        self.leaves.insert(leaf, Vec::new());
    }

    /// All ports or none.
    pub fn insert(&mut self, leaf: LeafId, ports: &[u16]) -> Result<(), KernelError> {
        let held = self.leaves.get_mut(&leaf).ok_or(KernelError::NotAdmitted(leaf))?;
        if ports.contains(&0) {
            return Err(KernelError::PortZero);
        }
        let mut wanted: Vec<u16> = ports.iter().copied().filter(|port| !held.contains(port)).collect();
        wanted.sort_unstable();
        wanted.dedup();
        if held.len() + wanted.len() > types::MAX_INBOUND_PER_LEAF {
            return Err(KernelError::InboundFull(leaf));
        }
        for (at, port) in wanted.iter().enumerate() {
            if let Err(source) = self.map.insert(key(leaf, *port), leaf.0, 0) {
                for port in wanted.iter().take(at) {
                    remove(&mut self.map, leaf, *port);
                }
                return Err(match errno_of(&source) {
                    Some(libc::E2BIG) => KernelError::InboundFull(leaf),
                    _ => KernelError::Map { map: "INBOUND", source },
                });
            }
        }
        held.extend(wanted);
        Ok(())
    }

    /// To be called when the leaf's own entry is gone.
    pub fn retire(&mut self, leaf: LeafId) {
        for port in self.leaves.remove(&leaf).unwrap_or_default() {
            remove(&mut self.map, leaf, port);
        }
    }
}

/// What stays behind is of a leaf that has no entry, and whose id is not given again.
fn remove(map: &mut HashMap<MapData, pod::InboundKey, u64>, leaf: LeafId, port: u16) {
    match map.remove(&key(leaf, port)) {
        Ok(()) | Err(MapError::KeyNotFound) => {}
        Err(error) => tracing::error!(%error, "a port that a leaf answered at was not removed"),
    }
}
