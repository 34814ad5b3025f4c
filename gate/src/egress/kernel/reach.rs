//! What leaves may connect to and so are carried: entries of one trie of prefixes, each the kernel's for one leaf.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{MapData, MapError};
use latchgate_egress_types as types;

use super::{KernelError, KernelProfile, address, errno_of};
use crate::egress::LeafId;

struct Admitted {
    profile: KernelProfile,
    entries: HashSet<(u32, types::ReachKey)>,
}

/// The trie and, for each admitted leaf, what it holds of it.
pub struct Reach {
    trie: LpmTrie<MapData, types::ReachKey, u64>,
    leaves: HashMap<LeafId, Admitted>,
}

impl Reach {
    pub fn new(trie: LpmTrie<MapData, types::ReachKey, u64>) -> Self {
        Self { trie, leaves: HashMap::new() }
    }

    pub fn admit(&mut self, leaf: LeafId, profile: KernelProfile) {
        self.leaves.insert(leaf, Admitted { profile, entries: HashSet::new() });
    }

    /// All ports or none: what was inserted is taken back when one cannot be.
    pub fn insert(&mut self, leaf: LeafId, network: (IpAddr, u8), ports: &[u16]) -> Result<(), KernelError> {
        let admitted = self.leaves.get_mut(&leaf).ok_or(KernelError::NotAdmitted(leaf))?;
        if admitted.profile != KernelProfile::Allowlist {
            return Err(KernelError::NotAllowlist(leaf));
        }
        let wanted = entries(leaf, network, ports)?;
        let mut added = Vec::new();
        for entry in wanted {
            if admitted.entries.contains(&entry) {
                continue;
            }
            let inserted = if admitted.entries.len() >= types::MAX_REACH_PER_LEAF {
                Err(KernelError::ReachFull(leaf))
            } else {
                self.trie.insert(&Key::new(entry.0, entry.1), leaf.0, 0).map_err(|source| refused(leaf, source))
            };
            if let Err(error) = inserted {
                for entry in added {
                    admitted.entries.remove(&entry);
                    remove(&mut self.trie, entry);
                }
                return Err(error);
            }
            admitted.entries.insert(entry);
            added.push(entry);
        }
        Ok(())
    }

    /// To be called when the leaf's own entry is gone, so that nothing is reached meanwhile.
    pub fn retire(&mut self, leaf: LeafId) {
        for entry in self.leaves.remove(&leaf).map(|admitted| admitted.entries).unwrap_or_default() {
            remove(&mut self.trie, entry);
        }
    }
}

/// What stays behind is of a leaf that has no entry, and whose id is not given again.
fn remove(trie: &mut LpmTrie<MapData, types::ReachKey, u64>, (length, key): (u32, types::ReachKey)) {
    if let Err(error) = trie.remove(&Key::new(length, key)) {
        tracing::error!(%error, "an address that a leaf reached was not removed");
    }
}

fn refused(leaf: LeafId, source: MapError) -> KernelError {
    match errno_of(&source) {
        Some(libc::ENOSPC) => KernelError::ReachFull(leaf),
        _ => KernelError::Map { map: "REACH", source },
    }
}

/// A key for each port, with its length in bits. Bits beyond the prefix are zero, so that a network has one key.
fn entries(leaf: LeafId, network: (IpAddr, u8), ports: &[u16]) -> Result<Vec<(u32, types::ReachKey)>, KernelError> {
    let (ip, prefix) = canonical(network).ok_or(KernelError::Network(network.0, network.1))?;
    let (family, words) = address::family_and_words(ip);
    let length = types::REACH_BITS_BEFORE_ADDRESS + u32::from(prefix);
    let all = [0];
    let ports = match ports {
        [] => all.as_slice(),
        // To the kernel it would mean every port.
        ports if ports.contains(&0) => return Err(KernelError::PortZero),
        ports => ports,
    };
    Ok(ports.iter().map(|port| (length, types::reach_key(leaf.0, family, *port, words))).collect())
}

fn canonical((ip, prefix): (IpAddr, u8)) -> Option<(IpAddr, u8)> {
    match (ip, ip.to_canonical()) {
        (IpAddr::V6(_), IpAddr::V4(v4)) if prefix >= 96 => masked(IpAddr::V4(v4), prefix.checked_sub(96)?),
        _ => masked(ip, prefix),
    }
}

fn masked(ip: IpAddr, prefix: u8) -> Option<(IpAddr, u8)> {
    let (ones4, ones6) = (u32::MAX, u128::MAX);
    let ip = match ip {
        IpAddr::V4(v4) => {
            let beyond = 32_u32.checked_sub(prefix.into())?;
            IpAddr::V4((v4.to_bits() & ones4.checked_shl(beyond).unwrap_or(0)).into())
        }
        IpAddr::V6(v6) => {
            let beyond = 128_u32.checked_sub(prefix.into())?;
            IpAddr::V6((v6.to_bits() & ones6.checked_shl(beyond).unwrap_or(0)).into())
        }
    };
    Some((ip, prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(network: &str, prefix: u8, ports: &[u16]) -> Vec<(u32, types::ReachKey)> {
        entries(LeafId(7), (network.parse().unwrap(), prefix), ports).unwrap()
    }

    #[test]
    fn a_network_has_one_key_however_it_is_written() {
        let v4 = made("10.1.0.0", 16, &[443]);
        assert_eq!(v4, made("10.1.2.3", 16, &[443]));
        assert_eq!(v4, made("::ffff:10.1.0.0", 112, &[443]));
        assert_ne!(v4, made("10.1.0.0", 17, &[443]));
        assert_eq!(v4[0].0, 128 + 16);
        assert_eq!(made("2001:db8::1", 32, &[]), made("2001:db8::", 32, &[]));
        assert_eq!(made("192.0.2.1", 0, &[]), made("0.0.0.0", 0, &[]));
        assert_eq!(made("10.0.0.0", 8, &[1, 2]).len(), 2);
    }

    /// `::/0` is every IPv6 address and no IPv4 one: those are looked up under their own family.
    #[test]
    fn an_ipv6_network_covers_no_ipv4_address() {
        let (all6, all4) = (made("::", 0, &[]), made("0.0.0.0", 0, &[]));
        assert_eq!((all6[0].1[2], all4[0].1[2]), (address::AF_INET6, address::AF_INET));
        assert_eq!(made("::ffff:0.0.0.0", 90, &[])[0].1[2], address::AF_INET6);
    }

    #[test]
    fn what_is_no_network_is_refused() {
        let ip: IpAddr = "10.0.0.0".parse().unwrap();
        assert!(matches!(entries(LeafId(7), (ip, 33), &[]), Err(KernelError::Network(..))));
        assert!(matches!(entries(LeafId(7), ("::1".parse().unwrap(), 129), &[]), Err(KernelError::Network(..))));
        assert!(matches!(
            entries(LeafId(7), ("::ffff:1.2.3.4".parse().unwrap(), 129), &[]),
            Err(KernelError::Network(..))
        ));
        assert!(matches!(entries(LeafId(7), (ip, 8), &[443, 0]), Err(KernelError::PortZero)));
    }
}
