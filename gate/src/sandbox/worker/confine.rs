//! What the first process takes from itself, and so from the program.
#![allow(unsafe_code)] // signal dispositions, resource limits and capabilities, which end at the C library or below it.

use std::io;

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr,
    Scope,
};
use rustix::process::{DumpableBehavior, Resource, Rlimit, Signal};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets};

use super::super::protocol::{Spec, Stage};
use super::init::{Failure, at};

/// Not 0: a core that is piped to a handler outside is made in spite of 0, and is not for 1 (core(5), `fs/coredump.c`).
const CORE_BYTES: u64 = 1;
/// Open files of one process.
const OPEN_FILES: u64 = 1024;
const SESSION_OPEN_FILES: u64 = 4096;
/// Bytes of POSIX message queues, which the memory limits of a process do not count: none.
const QUEUE_BYTES: u64 = 0;
const LOCKED_BYTES: u64 = 64 << 10;
const PENDING_SIGNALS: u64 = 1024;

/// `PR_SET_SECUREBITS`: no uid ever means a capability again.
const SECURE_BITS: CapabilitiesSecureBits = CapabilitiesSecureBits::NO_ROOT
    .union(CapabilitiesSecureBits::NO_ROOT_LOCKED)
    .union(CapabilitiesSecureBits::NO_SETUID_FIXUP)
    .union(CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED)
    .union(CapabilitiesSecureBits::KEEP_CAPS_LOCKED)
    .union(CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE)
    .union(CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED);

/// Keeps the program, which has the same uid, away from this process's memory and descriptors.
pub fn hide() -> io::Result<()> {
    Ok(rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

/// Undoes [`hide`] when its guard is off, which is known only once there is a spec.
#[cfg(feature = "test-guards")]
pub fn show_again() {
    if !crate::guards::on(crate::guards::Guard::Hide) {
        let _ = rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable);
    }
}

/// Limits that hold this process and the program.
pub fn shared_limits(spec: &Spec) -> Result<(), Failure> {
    // One more for this process. The uid is this execution's alone, so the count is too.
    let processes = u64::from(spec.processes).saturating_add(1);
    for (resource, limit) in [
        (Resource::Nproc, processes),
        (Resource::Core, CORE_BYTES),
        (Resource::Nofile, if spec.session.is_some() { SESSION_OPEN_FILES } else { OPEN_FILES }),
        (Resource::Msgqueue, QUEUE_BYTES),
        (Resource::Memlock, LOCKED_BYTES),
        (Resource::Sigpending, PENDING_SIGNALS),
    ] {
        lower(resource, limit).map_err(at(Stage::Limits, format!("{resource:?}")))?;
    }
    Ok(())
}

/// Limits of the program alone.
pub fn program_limits(spec: &Spec, executes: bool) -> io::Result<()> {
    // A session writes to files of the machine.
    if spec.session.is_none() {
        // Past the size of the scratch directory a write there is ENOSPC already; this one is for other files in memory.
        lower(Resource::Fsize, spec.scratch_bytes.max(4096).saturating_add(4096))?;
    }
    if let Some(bytes) = spec.process_memory_bytes {
        if executes && spec.session.is_none() {
            // Of the whole address space: nothing else counts shared mappings.
            lower(Resource::As, bytes)?;
        }
        lower(Resource::Data, bytes)?;
    }
    Ok(())
}

/// A hard limit can only go down.
fn lower(resource: Resource, limit: u64) -> io::Result<()> {
    let held = rustix::process::getrlimit(resource).maximum;
    let limit = Some(held.map_or(limit, |held| held.min(limit)));
    Ok(rustix::process::setrlimit(resource, Rlimit { current: limit, maximum: limit })?)
}

/// Empties every capability set, the bounding set first, and sees that none can come back.
pub fn drop_capabilities() -> Result<(), Failure> {
    let secure = rustix::thread::set_capabilities_secure_bits(SECURE_BITS);
    secure.map_err(at(Stage::Capabilities, "securebits"))?;
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // Past the last capability that this kernel has.
            Err(rustix::io::Errno::INVAL) if number > 0 => break,
            Err(error) => return Err(at(Stage::Capabilities, "bounding set")(error)),
        }
    }
    rustix::thread::clear_ambient_capability_set().map_err(at(Stage::Capabilities, "ambient set"))?;
    let none = CapabilitySet::empty();
    let none = CapabilitySets { effective: none, permitted: none, inheritable: none };
    rustix::thread::set_capabilities(None, none).map_err(at(Stage::Capabilities, "capset"))
}

/// Set after the last change of credentials, each of which clears it (prctl(2)).
pub fn die_with_gate() -> Result<(), Failure> {
    let set = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    set.map_err(at(Stage::Reaper, "parent-death signal"))
}

pub fn no_new_privileges() -> Result<(), Failure> {
    rustix::thread::set_no_new_privs(true).map_err(at(Stage::Capabilities, "no_new_privs"))
}

/// A second wall behind the mounts: reading everywhere, writing in the scratch directory and to the devices; no abstract
/// Unix socket and no process outside can be reached. Where the kernel has less of Landlock, less; the mounts, the
/// namespaces and seccomp hold without it.
pub fn landlock(spec: &Spec) -> Result<(), Failure> {
    let abi = ABI::V9;
    let run = || -> Result<(), Box<dyn std::error::Error>> {
        let mut scopes =
            Ruleset::default().set_compatibility(CompatLevel::BestEffort).handle_access(AccessFs::from_all(abi))?;
        if spec.session.as_ref().is_some_and(|session| session.scope_needed) {
            scopes = scopes
                .set_compatibility(CompatLevel::HardRequirement)
                .scope(Scope::AbstractUnixSocket)?
                .set_compatibility(CompatLevel::BestEffort);
        }
        let mut ruleset = scopes
            .scope(Scope::from_all(abi))?
            .create()?
            .add_rule(PathBeneath::new(PathFd::new("/")?, AccessFs::from_read(abi)))?;
        if spec.entry.has_directories() {
            let device = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::ReadDir | AccessFs::IoctlDev;
            ruleset = ruleset
                .add_rule(PathBeneath::new(PathFd::new("/tmp")?, AccessFs::from_all(abi)))?
                .add_rule(PathBeneath::new(PathFd::new("/dev")?, device))?;
        }
        if let Some(session) = &spec.session {
            // Where the kernel knows the right to resolve a socket by its path, the gate's alone has it.
            let write = AccessFs::from_all(abi) & !AccessFs::ResolveUnix;
            for path in session.writable.iter().chain([&session.directory]) {
                let write = if path.is_dir() { write } else { write & AccessFs::from_file(abi) };
                ruleset = ruleset.add_rule(PathBeneath::new(PathFd::new(path)?, write))?;
            }
            if let Some(socket) = &session.socket {
                ruleset = ruleset.add_rule(PathBeneath::new(PathFd::new(socket)?, AccessFs::ResolveUnix))?;
            }
        }
        ruleset.restrict_self()?;
        Ok(())
    };
    run().map_err(|error| at(Stage::Landlock, error)(io::Error::other("landlock")))
}

/// The version of Landlock's interface; 0 where there is none.
pub fn landlock_version() -> i32 {
    const VERSION: u32 = 1;
    // SAFETY: with this flag the call reads nothing (landlock_create_ruleset(2)).
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0_usize, VERSION) };
    i32::try_from(version).unwrap_or(0).max(0)
}

/// Default dispositions and an empty mask: Rust's runtime ignores SIGPIPE, and exec would hand that on.
pub fn fresh_signals() {
    // SAFETY: dispositions of this process alone; numbers that cannot be set are refused with an error.
    unsafe {
        for signal in 1..=64 {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}
