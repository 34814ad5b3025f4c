//! What holds the programs in their cgroups: pinned links where there is a bpffs, else attachments without a pin.
//!
//! A cgroup keeps a program that was attached by `BPF_PROG_ATTACH` when the process that attached it is gone, however it
//! went, and gives it up only with itself. Nothing is left to be found by a name, so a later gate takes none of it over: it
//! works in cgroups of its own. `BPF_F_ALLOW_MULTI` always: what is attached exclusively, anybody may detach with a bare
//! call, and nobody else can attach beside it.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use aya::programs::links::{FdLink, PinnedLink};

use super::pins::Pins;
use super::{KernelConfig, KernelError, pins, sys};

/// How the programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttachMode {
    /// By links that are pinned in a bpffs.
    Pinned,
    /// By `BPF_PROG_ATTACH` with `BPF_F_ALLOW_MULTI`; needs no bpffs.
    Multi,
}

impl AttachMode {
    /// What was asked for; if nothing was, pins where `bpffs` is a bpffs or one can be mounted there, which is then done.
    ///
    /// # Errors
    /// [`KernelError::NoBpffs`] only where [`AttachMode::Pinned`] is asked for.
    pub fn choose(bpffs: &Path, wanted: Option<Self>) -> Result<Self, KernelError> {
        if wanted == Some(Self::Multi) {
            return Ok(Self::Multi);
        }
        match (wanted, pins::bpffs(bpffs)) {
            (_, Ok(())) => Ok(Self::Pinned),
            (Some(_), Err(error)) => Err(error),
            (None, Err(error)) => {
                tracing::info!(reason = %error, "the kernel program is attached without pins");
                Ok(Self::Multi)
            }
        }
    }

    /// As the configuration has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pinned => "pinned",
            Self::Multi => "multi",
        }
    }
}

/// The programs' names in the object, and where each is attached (`enum bpf_attach_type` of linux/bpf.h).
const POINTS: [(&str, u32); 13] = [
    ("ingress", 0),
    ("egress", 1),
    ("sock_create", 2),
    ("flow_client", 3),
    ("flow_gate", 3),
    ("connect4", 10),
    ("connect6", 11),
    ("sendmsg4", 14),
    ("sendmsg6", 15),
    ("recvmsg4", 19),
    ("recvmsg6", 20),
    ("getpeername4", 29),
    ("getpeername6", 30),
];

fn point(name: &'static str) -> Result<u32, KernelError> {
    POINTS.iter().find(|(known, _)| *known == name).map(|(_, point)| *point).ok_or(KernelError::Missing(name))
}

/// The attachments of one run.
pub enum Attached {
    Pinned(Pins),
    Multi(Vec<Held>),
}

/// One program in one cgroup.
pub struct Held {
    name: &'static str,
    point: u32,
    program: OwnedFd,
    /// The kernel's number for the program.
    id: u32,
    cgroup: OwnedFd,
}

impl Attached {
    pub fn make(mode: AttachMode, config: &KernelConfig, generation: u64) -> Result<Self, KernelError> {
        match mode {
            AttachMode::Pinned => Ok(Self::Pinned(Pins::make(pins::directory(config), generation)?)),
            AttachMode::Multi => Ok(Self::Multi(Vec::new())),
        }
    }

    pub const fn mode(&self) -> AttachMode {
        match self {
            Self::Pinned(_) => AttachMode::Pinned,
            Self::Multi(_) => AttachMode::Multi,
        }
    }

    /// Attaches the program of this name: `link` makes a link of it, where one is wanted.
    pub fn add(
        &mut self,
        name: &'static str,
        cgroup: &OwnedFd,
        program: OwnedFd,
        link: impl FnOnce() -> Result<FdLink, aya::programs::ProgramError>,
    ) -> Result<(), KernelError> {
        let failed = |what: &'static str| KernelError::io(format!("{name}: {what}"));
        match self {
            Self::Pinned(pins) => {
                let id = pins::cgroup_id(cgroup).map_err(failed("the cgroup's id"))?;
                let link = link().map_err(|source| KernelError::Program { program: name, source })?;
                let link: PinnedLink =
                    link.pin(pins.path(name)).map_err(|source| KernelError::Pin { name: name.to_owned(), source })?;
                pins.add_link(name, id, link);
            }
            Self::Multi(held) => {
                let (point, cgroup) = (point(name)?, cgroup.try_clone().map_err(failed("the cgroup"))?);
                let id = sys::program_id(&program).map_err(failed("the program's number"))?;
                sys::attach_multi(&cgroup, &program, point).map_err(failed("attaching"))?;
                held.push(Held { name, point, program, id, cgroup });
            }
        }
        Ok(())
    }

    /// Asks the kernel whether everything is attached still, where it was attached.
    pub fn check(&self) -> Result<(), KernelError> {
        match self {
            Self::Pinned(pins) => pins.check(),
            Self::Multi(held) => held.iter().try_for_each(Held::check),
        }
    }

    /// Takes away what dead predecessors left, once this run's own is there.
    pub fn sweep_predecessors(&self) -> Result<(), KernelError> {
        match self {
            Self::Pinned(pins) => pins.sweep_predecessors(),
            // Theirs went with their cgroups.
            Self::Multi(_) => Ok(()),
        }
    }

    pub fn remove(self) -> Result<(), KernelError> {
        match self {
            Self::Pinned(pins) => pins.remove(),
            Self::Multi(held) => held.into_iter().try_for_each(|held| {
                sys::detach(&held.cgroup, &held.program, held.point)
                    .map_err(KernelError::io(format!("{}: detaching", held.name)))
            }),
        }
    }
}

impl Held {
    fn check(&self) -> Result<(), KernelError> {
        let attached = sys::attached_programs(&self.cgroup, self.point);
        let attached = attached.map_err(KernelError::io(format!("{}: what is attached", self.name)))?;
        if attached.contains(&self.id) { Ok(()) } else { Err(KernelError::Detached(self.name.to_owned())) }
    }
}

/// The descriptor of a loaded program, as an own one.
pub fn descriptor(program: &aya::programs::Program, name: &'static str) -> Result<OwnedFd, KernelError> {
    use std::os::fd::AsFd;
    let program = program.fd().map_err(|source| KernelError::Program { program: name, source })?;
    let owned: io::Result<OwnedFd> = program.as_fd().try_clone_to_owned();
    owned.map_err(KernelError::io(format!("{name}: the program's descriptor")))
}
