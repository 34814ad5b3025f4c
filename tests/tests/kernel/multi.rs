//! Attached without pins, as in a container that has no bpffs.

use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::path::Path;

use aya::programs::loaded_programs;
use latchgate::egress::kernel::{AttachMode, Enforcer, KernelError, KernelProfile};

use super::actor::Actor;
use super::tree::{LONG, Tree};

/// `enum bpf_attach_type` of linux/bpf.h.
const HOOKS: [(&str, u32); 12] = [
    ("ingress", 0),
    ("egress", 1),
    ("sock_create", 2),
    ("flow_client", 3),
    ("connect4", 10),
    ("connect6", 11),
    ("sendmsg4", 14),
    ("sendmsg6", 15),
    ("recvmsg4", 19),
    ("recvmsg6", 20),
    ("getpeername4", 29),
    ("getpeername6", 30),
];

/// `BPF_PROG_DETACH`; without a program: whatever is there, if it is there alone.
fn detach(cgroup: &Path, program: Option<&OwnedFd>, hook: u32) -> std::io::Result<()> {
    const BPF_PROG_DETACH: i64 = 9;
    let cgroup = std::fs::File::open(cgroup).unwrap();
    let program = program.map_or(0, |program| u32::try_from(program.as_raw_fd()).unwrap());
    let mut attributes = [u32::try_from(cgroup.as_raw_fd()).unwrap(), program, hook, 0, 0];
    // SAFETY: the start of `union bpf_attr` as this command reads it, of the length given.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_DETACH, attributes.as_mut_ptr(), std::mem::size_of_val(&attributes))
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Takes every program of this hook off this cgroup, as one who may open programs can.
fn take_off(cgroup: &Path, hook: u32) -> usize {
    use std::os::fd::AsFd;
    let all = loaded_programs().flatten().filter_map(|program| program.fd().ok()?.as_fd().try_clone_to_owned().ok());
    all.filter(|program| detach(cgroup, Some(program), hook).is_ok()).count()
}

fn unpinned(tree: &mut Tree) {
    let enforcer = Enforcer::start_as(tree.config(), Some(AttachMode::Multi)).unwrap();
    assert_eq!(enforcer.attach_mode(), AttachMode::Multi);
    tree.events = Some(enforcer.events());
    tree.enforcer = Some(enforcer);
}

#[test]
fn without_a_pin_it_holds_the_same_and_stays_when_its_process_is_gone() {
    let mut tree = Tree::empty("unpinned");
    unpinned(&mut tree);
    assert!(!tree.pins().exists());
    let leaf = tree.admitted("leaf", KernelProfile::ProxyOnly);
    let (mut inside, mut outside) = (Actor::start_in(&leaf.path), Actor::start());
    let proxy = format!("127.0.0.1:{}", tree.proxy.port);
    let elsewhere = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let elsewhere = format!("connect {}", elsewhere.local_addr().unwrap());
    assert_eq!(inside.ask(&format!("connect {proxy}")), "ok");
    assert_eq!(inside.ask(&elsewhere), "EPERM");
    tree.event(leaf.id, "connect4", "not_the_proxy");
    assert_eq!(outside.ask(&elsewhere), "ok");

    // Nobody has a descriptor of it now.
    drop(tree.enforcer.take());
    assert_eq!(inside.ask(&elsewhere), "EPERM");
    assert_eq!(inside.ask(&format!("connect {proxy}")), "EPERM");
    // The next one attaches beside it, and both must allow: nothing that the first held is opened by the second.
    unpinned(&mut tree);
    tree.enforcer().admit(leaf.id, KernelProfile::ProxyOnly, LONG).unwrap();
    assert_eq!(inside.ask(&format!("connect {proxy}")), "EPERM");
    assert_eq!(inside.ask(&elsewhere), "EPERM");
}

#[test]
fn what_is_taken_off_is_missed_and_a_bare_call_takes_nothing_off() {
    let mut tree = Tree::empty("taken-off");
    unpinned(&mut tree);
    for (name, hook) in HOOKS {
        assert!(detach(&tree.actions, None, hook).is_err(), "{name}");
        tree.enforcer().health().unwrap();
    }
    for (name, hook) in HOOKS {
        assert!(take_off(&tree.actions, hook) > 0, "{name}");
        match tree.enforcer().health() {
            Err(KernelError::Detached(found)) => assert_eq!(found, name),
            other => panic!("{name}: {other:?}"),
        }
        drop(tree.enforcer.take());
        unpinned(&mut tree);
        tree.enforcer().health().unwrap();
    }
    assert!(take_off(&tree.gate, 3) > 0);
    assert!(matches!(tree.enforcer().health(), Err(KernelError::Detached(name)) if name == "flow_gate"));
}
