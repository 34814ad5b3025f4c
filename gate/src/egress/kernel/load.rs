//! Loads the object with two capabilities, attaches its programs.

use std::os::fd::OwnedFd;
use std::thread;

use aya::maps::{Array, HashMap, Map, MapData, RingBuf, SkStorage};
use aya::programs::links::FdLink;
use aya::programs::{
    CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, CgroupSock, CgroupSockAddr, Program, ProgramError, SockOps,
};
use aya::{Ebpf, EbpfLoader, VerifierLogLevel};
use latchgate_egress_types as types;
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

use super::attached::{self, AttachMode, Attached};
use super::inbound::Inbound;
use super::reach::Reach;
use super::{KernelConfig, KernelError, OBJECT, address, connections, pins, pod, probe, queries, sys};

/// What the rest of the gate holds of the loaded program.
pub struct Loaded {
    pub leaves: HashMap<MapData, u64, pod::LeafEntry>,
    pub counts: HashMap<MapData, u64, pod::Counts>,
    pub accepted: SkStorage<MapData, pod::AcceptedSocket>,
    pub connections: connections::Map,
    pub reach: Reach,
    pub inbound: Inbound,
    pub queries: queries::Maps,
    pub control: Array<MapData, pod::Control>,
    pub heartbeat: Array<MapData, u64>,
    pub events: RingBuf<MapData>,
    pub attached: Attached,
}

/// Before this, the verifier takes a number on the stack that is written over in halves for a pointer, unless the loader
/// has CAP_PERFMON (fixed by "bpf: fix check for attempt to corrupt spilled pointer").
const VERIFIER_TELLS_NUMBERS_FROM_POINTERS: (u32, u32) = (6, 8);

/// Loads with CAP_BPF and CAP_NET_ADMIN alone; with CAP_PERFMON as well where the kernel is too old for less and this
/// process has it.
pub fn with_least_capabilities(config: &KernelConfig, mode: AttachMode) -> Result<(Loaded, u64), KernelError> {
    let attempt = |perfmon| {
        let (config, generation) = (config.clone(), pins::new_generation()?);
        with_capabilities(perfmon, move || Ok((load(&config, mode, generation)?, generation)))
    };
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    match attempt(false) {
        Err(KernelError::Program { program, source })
            if version(&release).is_some_and(|version| version < VERIFIER_TELLS_NUMBERS_FROM_POINTERS) =>
        {
            let has_perfmon = capabilities(None).is_ok_and(|sets| sets.permitted.contains(CapabilitySet::PERFMON));
            if !has_perfmon {
                return Err(KernelError::OldVerifier { release, program, source });
            }
            tracing::warn!(release, program, "this kernel's verifier wants CAP_PERFMON too; loading with it");
            attempt(true)
        }
        other => other,
    }
}

/// Major and minor number of a kernel release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Runs `work` on a thread that keeps CAP_BPF and CAP_NET_ADMIN, CAP_PERFMON if asked, and gives up everything else, so
/// that a kernel or a change of the program that asks for more is found at once and not in somebody's pod.
pub fn with_capabilities<T: Send + 'static>(
    perfmon: bool,
    work: impl FnOnce() -> Result<T, KernelError> + Send + 'static,
) -> Result<T, KernelError> {
    let thread = thread::Builder::new()
        .name("kernel-load".into())
        .spawn(move || {
            reduce(perfmon)?;
            work()
        })
        .map_err(KernelError::io("starting the loading thread"))?;
    thread.join().unwrap_or(Err(KernelError::Missing("result of the loading thread")))
}

fn reduce(perfmon: bool) -> Result<(), KernelError> {
    let failed = |error: rustix::io::Errno| KernelError::io("capabilities")(error.into());
    let permitted = capabilities(None).map_err(failed)?.permitted;
    for (wanted, name) in [(CapabilitySet::BPF, "CAP_BPF"), (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN")] {
        if !permitted.contains(wanted) {
            return Err(KernelError::Privilege(name));
        }
    }
    let mut least = CapabilitySet::BPF | CapabilitySet::NET_ADMIN;
    if perfmon {
        least |= CapabilitySet::PERFMON;
    }
    let sets = CapabilitySets { effective: least, permitted: least, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).map_err(failed)
}

pub fn load(config: &KernelConfig, mode: AttachMode, generation: u64) -> Result<Loaded, KernelError> {
    let actions = pins::cgroup(&config.actions)?;
    let gate = pins::cgroup(&config.gate)?;
    // Nothing in the program is relocated against the running kernel's types. The verifier is asked for its log only when
    // it has refused.
    let mut loader = EbpfLoader::new();
    loader.btf(None).verifier_log_level(VerifierLogLevel::DEBUG);
    #[cfg(feature = "test-guards")]
    let guards_off = crate::guards::kernel_bits();
    #[cfg(feature = "test-guards")]
    loader.override_global("GUARDS_OFF", &guards_off, true);
    let mut ebpf = loader.load(OBJECT)?;

    let mut control: Array<_, pod::Control> = map(&mut ebpf, "CONTROL")?;
    let mut heartbeat: Array<_, u64> = map(&mut ebpf, "HEARTBEAT")?;
    let mut counts: HashMap<_, u64, pod::Counts> = map(&mut ebpf, "COUNTS")?;
    let level = {
        let ancestors: Array<_, u64> = map(&mut ebpf, "PROBE")?;
        let probe: &mut CgroupSock = program(&mut ebpf, "probe_level")?;
        probe.load().map_err(|source| KernelError::Program { program: "probe_level", source })?;
        probe::level(config, generation, probe, &ancestors)?
    };
    let refused = |map| move |source| KernelError::Map { map, source };
    counts.insert(0, pod::Counts::default(), 0).map_err(refused("COUNTS"))?;
    heartbeat.set(0, sys::boottime_ns(), 0).map_err(refused("HEARTBEAT"))?;
    control.set(0, pod::Control(control_of(config, generation, level)), 0).map_err(refused("CONTROL"))?;

    let mut attached = Attached::make(mode, config, generation)?;
    let mut attaching = Attaching { attached: &mut attached, ebpf: &mut ebpf };
    for name in ["connect4", "connect6", "sendmsg4", "sendmsg6", "getpeername4", "getpeername6", "recvmsg4", "recvmsg6"]
    {
        attaching.attach(name, &actions, CgroupSockAddr::load, |program, cgroup| {
            let link = program.attach(cgroup, CgroupAttachMode::Single)?;
            FdLink::try_from(program.take_link(link)?).map_err(|_| ProgramError::NotAttached)
        })?;
    }
    attaching.attach("sock_create", &actions, CgroupSock::load, |program, cgroup| {
        let link = program.attach(cgroup, CgroupAttachMode::Single)?;
        FdLink::try_from(program.take_link(link)?).map_err(|_| ProgramError::NotAttached)
    })?;
    for (name, direction) in [("egress", CgroupSkbAttachType::Egress), ("ingress", CgroupSkbAttachType::Ingress)] {
        attaching.attach(name, &actions, CgroupSkb::load, |program, cgroup| {
            let link = program.attach(cgroup, direction, CgroupAttachMode::Single)?;
            FdLink::try_from(program.take_link(link)?).map_err(|_| ProgramError::NotAttached)
        })?;
    }
    for (name, cgroup) in [("flow_client", &actions), ("flow_gate", &gate)] {
        attaching.attach(name, cgroup, SockOps::load, |program, cgroup| {
            let link = program.attach(cgroup, CgroupAttachMode::Single)?;
            FdLink::try_from(program.take_link(link)?).map_err(|_| ProgramError::NotAttached)
        })?;
    }

    Ok(Loaded {
        leaves: map(&mut ebpf, "LEAVES")?,
        counts,
        accepted: map(&mut ebpf, "ACCEPTED")?,
        connections: map(&mut ebpf, "CONNECTIONS")?,
        reach: Reach::new(map(&mut ebpf, "REACH")?),
        inbound: Inbound::new(map(&mut ebpf, "INBOUND")?),
        queries: queries::Maps {
            queries: map(&mut ebpf, "QUERIES")?,
            taken: map(&mut ebpf, "TAKEN")?,
            pace: map(&mut ebpf, "PACE")?,
        },
        control,
        heartbeat,
        events: map(&mut ebpf, "EVENTS")?,
        attached,
    })
}

fn control_of(config: &KernelConfig, generation: u64, level: u32) -> types::Control {
    let (proxy, resolver) = (&config.proxy, config.resolver.as_ref());
    let resolver6 = resolver.and_then(|resolver| resolver.v6_base);
    types::Control {
        generation,
        level,
        proxy_ip4: address::word(*proxy.v4.ip()),
        proxy_ip6: proxy.v6.map_or([0; 4], |v6| address::words(*v6.ip())),
        proxy_port4: u32::from(proxy.v4.port().to_be()),
        proxy_port6: proxy.v6.map_or(0, |v6| u32::from(v6.port().to_be())),
        resolver_ip4: resolver.map_or(0, |resolver| address::word(*resolver.v4_base.ip())),
        resolver_ip6: resolver6.map_or([0; 4], |v6| address::words(*v6.ip())),
        resolver_port4: resolver.map_or(0, |resolver| resolver.v4_base.port().into()),
        resolver_port6: resolver6.map_or(0, |v6| v6.port().into()),
        resolver_slots: resolver.map_or(0, |resolver| resolver.slots.into()),
    }
}

struct Attaching<'a> {
    attached: &'a mut Attached,
    ebpf: &'a mut Ebpf,
}

impl Attaching<'_> {
    fn attach<P: 'static>(
        &mut self,
        name: &'static str,
        cgroup: &OwnedFd,
        load: impl FnOnce(&mut P) -> Result<(), ProgramError>,
        link: impl FnOnce(&mut P, &OwnedFd) -> Result<FdLink, ProgramError>,
    ) -> Result<(), KernelError>
    where
        for<'p> &'p mut P: TryFrom<&'p mut Program>,
    {
        load(program(self.ebpf, name)?).map_err(|source| KernelError::Program { program: name, source })?;
        let loaded = self.ebpf.program(name).ok_or(KernelError::Missing(name))?;
        let descriptor = attached::descriptor(loaded, name)?;
        let program: &mut P = program(self.ebpf, name)?;
        self.attached.add(name, cgroup, descriptor, || link(program, cgroup))
    }
}

fn map<T: TryFrom<Map>>(ebpf: &mut Ebpf, name: &'static str) -> Result<T, KernelError> {
    let map = ebpf.take_map(name).ok_or(KernelError::Missing(name))?;
    T::try_from(map).map_err(|_| KernelError::Missing(name))
}

fn program<'p, P: 'p>(ebpf: &'p mut Ebpf, name: &'static str) -> Result<&'p mut P, KernelError>
where
    &'p mut P: TryFrom<&'p mut Program>,
{
    let program = ebpf.program_mut(name).ok_or(KernelError::Missing(name))?;
    <&mut P>::try_from(program).map_err(|_| KernelError::Missing(name))
}
