//! The `[profiles.NAME]` of the configuration, checked at start.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::json;

use crate::action::canonical::jcs;
use crate::config::ConfineProfile;
use crate::egress::profile::{DomainEntry, Profile, Rule};
use crate::hash;

/// The profile that is always there and reaches nothing.
pub const NONE: &str = "none";

/// Why a profile does not load.
#[derive(Debug, thiserror::Error)]
#[error("profiles.{name}: {why}")]
pub struct ProfileError {
    name: String,
    why: String,
}

/// A profile in force.
#[derive(Clone, Debug)]
pub struct HeldProfile {
    pub config: ConfineProfile,
    pub egress: Profile,
    /// `sha256:<hex>` over `latchgate.confine.v1\n` and the JCS form of all that it says.
    pub digest: String,
}

/// By name.
#[derive(Clone, Debug, Default)]
pub struct Profiles(BTreeMap<String, HeldProfile>);

impl Profiles {
    /// # Errors
    /// The first one that says what cannot be enforced.
    pub fn load(configured: &BTreeMap<String, ConfineProfile>) -> Result<Self, ProfileError> {
        let mut all = BTreeMap::new();
        for (name, config) in configured {
            let held = load(config).map_err(|why| ProfileError { name: name.clone(), why })?;
            if name == NONE {
                let why = "the name is that of the profile that reaches nothing".to_owned();
                return Err(ProfileError { name: name.clone(), why });
            }
            all.insert(name.clone(), held);
        }
        let none = load(&ConfineProfile::default()).map_err(|why| ProfileError { name: NONE.to_owned(), why })?;
        all.insert(NONE.to_owned(), none);
        Ok(Self(all))
    }

    pub fn named(&self, name: &str) -> Option<&HeldProfile> {
        self.0.get(name)
    }

    pub fn all(&self) -> impl Iterator<Item = (&str, &HeldProfile)> {
        self.0.iter().map(|(name, held)| (name.as_str(), held))
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

fn load(config: &ConfineProfile) -> Result<HeldProfile, String> {
    let (mut entries, mut networks) = (Vec::new(), Vec::new());
    for item in &config.allowed_domains {
        let entry = DomainEntry::deserialize(item.clone()).map_err(|error| format!("allowed_domains: {error}"))?;
        let (rule, remark) = entry.rule().map_err(|error| format!("allowed_domains: {error}"))?;
        if let Some(remark) = remark {
            tracing::warn!("profiles: {remark}");
        }
        match rule {
            Rule::Names(entry) => entries.push(entry),
            Rule::Addresses(network) => networks.push(network),
        }
    }
    let egress = match config.allowed_domains.as_slice() {
        [] => Profile::None,
        _ => Profile::allowlist(entries).with_networks(networks),
    };
    if let Some((one, other)) = egress.contradiction() {
        return Err(format!(
            "allowed_domains: `{one}` and `{other}` say different things about the same names and ports"
        ));
    }
    if config.inbound_ports.contains(&0) {
        return Err("inbound_ports: 0 is no port".to_owned());
    }
    if config.inbound_ports.len() > latchgate_egress_types::MAX_INBOUND_PER_LEAF {
        let most = latchgate_egress_types::MAX_INBOUND_PER_LEAF;
        return Err(format!("inbound_ports: at most {most}"));
    }
    if config.uid == Some(0) || config.gid == Some(0) {
        return Err("uid, gid: a session is never root".to_owned());
    }
    if config.gid.is_some() && config.uid.is_none() {
        return Err("gid: without a uid it means nothing".to_owned());
    }
    if config.memory_mb == 0 || config.max_processes == 0 {
        return Err("memory_mb, max_processes: 0 lets nothing run".to_owned());
    }
    let paths = config.read_only.iter().chain(&config.writable);
    if let Some(path) = paths.clone().find(|path| !path.is_absolute()) {
        return Err(format!("{}: must be an absolute path", path.display()));
    }
    let said = json!({
        "egress": egress.hash(),
        "inbound_ports": config.inbound_ports,
        "uid": config.uid,
        "gid": config.gid,
        "read_only": config.read_only,
        "writable": config.writable,
        "memory_mb": config.memory_mb,
        "max_processes": config.max_processes,
    });
    let canonical = jcs(&said).map_err(|error| error.to_string())?;
    let digest = hash::sha256_tagged(&[b"latchgate.confine.v1\n", canonical.as_slice()].concat());
    Ok(HeldProfile { config: config.clone(), egress, digest })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profiles(text: &str) -> Result<Profiles, String> {
        let configured: BTreeMap<String, ConfineProfile> = toml::from_str(text).map_err(|error| error.to_string())?;
        Profiles::load(&configured).map_err(|error| error.to_string())
    }

    #[test]
    fn a_profile_says_what_is_reached_and_answered() {
        let loaded = profiles(
            r#"
            [model]
            allowed_domains = ["api.example.com", {domain = "db.example.com", ports = [5432], exact = true, protocol = "tcp"}]
            inbound_ports = [8080]
            "#,
        )
        .unwrap();
        let model = loaded.named("model").unwrap();
        assert!(model.egress.permits("api.example.com", 443).is_ok());
        assert!(model.egress.permits("db.example.com", 5432).is_ok());
        assert!(model.egress.permits("example.com", 443).is_err());
        assert!(loaded.named("none").unwrap().egress.is_none());
        assert!(loaded.named("other").is_none());
        assert_ne!(model.digest, loaded.named("none").unwrap().digest);
        assert_eq!(loaded.names().collect::<Vec<_>>(), ["model", "none"]);
    }

    #[test]
    fn what_cannot_be_held_does_not_load() {
        for (text, why) in [
            ("[none]\n", "reaches nothing"),
            ("[p]\nallowed_domains = [\"*.com\"]\n", "allowed_domains"),
            ("[p]\nallowed_domains = [{domain = \"a.test\", port = 1}]\n", "unknown field"),
            ("[p]\nallowed_methods = [\"GET\"]\n", "unknown field"),
            ("[p]\ninbound_ports = [0]\n", "no port"),
            ("[p]\nuid = 0\n", "never root"),
            ("[p]\nuid = 1000\ngid = 0\n", "never root"),
            ("[p]\ngid = 1000\n", "without a uid"),
            ("[p]\nmemory_mb = 0\n", "lets nothing run"),
            ("[p]\nread_only = [\"here\"]\n", "absolute"),
        ] {
            let refused = profiles(text).unwrap_err();
            assert!(refused.contains(why), "{text}: {refused}");
        }
        let many: Vec<u16> = (1..=65).collect();
        assert!(profiles(&format!("[p]\ninbound_ports = {many:?}\n")).is_err());
    }
}
