//! The kernel program loaded and attached for real, in a cgroup that is made for it and goes again.

use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::PathBuf;

use tokio::time::Instant;

use super::{Check, cgroup_mounts};
use crate::config::Config;
use crate::egress::kernel::{Enforcer, KernelConfig, ProxyAddresses};
use crate::privileges;

/// A start should not take longer than this for it.
const LONG_MS: u128 = 1_000;
const NAME: &str = "attach";

/// The cgroups of the attempt. Nothing ever runs in them.
struct Cgroups(PathBuf);

impl Cgroups {
    fn make(config: &Config) -> Result<Self, String> {
        let found = || cgroup_mounts().into_iter().find(|(_, writable)| *writable).map(|(point, _)| point);
        let base = config.sandbox.cgroup.clone().or_else(found).ok_or("no cgroup v2 tree can be written to")?;
        let own = base.join(format!("latchgate-doctor-{}", std::process::id()));
        let made = Self(own);
        for directory in [&made.0, &made.0.join("gate"), &made.0.join("actions")] {
            fs::create_dir(directory).map_err(|error| format!("{}: {error}", directory.display()))?;
        }
        Ok(made)
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        for directory in [self.0.join("gate"), self.0.join("actions"), self.0.clone()] {
            let _ = fs::remove_dir(directory);
        }
    }
}

pub fn time_to_attach(config: &Config) -> Check {
    if !privileges::missing().is_empty() {
        return Check::unknown(NAME, "not tried: it needs the capabilities above");
    }
    let cgroups = match Cgroups::make(config) {
        Ok(cgroups) => cgroups,
        Err(why) => return Check::unknown(NAME, format!("not tried: {why}")),
    };
    let kernel = KernelConfig {
        instance: format!("doctor-{}", std::process::id()),
        actions: cgroups.0.join("actions"),
        gate: cgroups.0.join("gate"),
        bpffs: config.egress.bpffs.clone(),
        proxy: ProxyAddresses { v4: SocketAddrV4::new(Ipv4Addr::LOCALHOST, 1), v6: None },
        resolver: None,
    };
    let began = Instant::now();
    let attached = Enforcer::start(kernel);
    let took = began.elapsed().as_millis();
    match attached {
        Err(error) => Check::fault(NAME, error.to_string(), "the gate does not start like this: see the faults above"),
        Ok(enforcer) => {
            let health = enforcer.health();
            let removed = enforcer.detach();
            match health.and(removed) {
                Err(error) => Check::fault(NAME, error.to_string(), "the program does not stay attached"),
                Ok(()) if took > LONG_MS => Check::warning(
                    NAME,
                    format!("{took} ms"),
                    "a start takes so much longer; the machine is slow or busy",
                ),
                Ok(()) => Check::ok(NAME, format!("{took} ms")),
            }
        }
    }
}
