use super::*;
use crate::egress::LeafId;
use crate::egress::kernel::KernelEvent;
use crate::sandbox::attempts::{TECHNIQUES, named};
use crate::time::Timestamp;

const REACHED: fn() -> Saw = || Saw::Reached { how: "there".to_owned() };

fn refused(errno: i32) -> Saw {
    Saw::Refused { at: "connect".to_owned(), errno }
}

fn recorded(hook: &'static str, port: u16) -> Arc<KernelRefusal> {
    Arc::new(KernelRefusal::new(
        KernelEvent {
            at_ns: 0,
            time: Timestamp::from_secs(1),
            leaf: LeafId(1),
            hook,
            family: "inet",
            protocol: "tcp".to_owned(),
            address: None,
            port,
            reason: "profile_none",
        },
        None,
    ))
}

fn inside<'a>(saw: Option<&'a Saw>, refusals: &'a [Arc<KernelRefusal>]) -> Inside<'a> {
    Inside { profile: "none", saw, heard: false, port: Some(4000), refusals, flows: &[], isolated: false }
}

#[test]
fn out_is_out_whatever_else_is_said() {
    for technique in TECHNIQUES {
        let eperm = refused(libc::EPERM);
        let heard = Inside { heard: true, ..inside(Some(&eperm), &[]) };
        for outside in [None, Some(&refused(libc::ENOSYS)), Some(&REACHED())] {
            assert_eq!(judge(technique, true, outside, &heard).outcome, Outcome::Escaped, "{}", technique.name);
            let reached = judge(technique, true, outside, &inside(Some(&REACHED()), &[]));
            assert_eq!(reached.outcome == Outcome::Escaped, !technique.witness, "{}", technique.name);
        }
    }
}

#[test]
fn a_refusal_counts_only_where_the_control_reaches() {
    let plain = named("tcp_v4").unwrap();
    let eperm = refused(libc::EPERM);
    for (outside, wanted) in [
        (Some(REACHED()), Outcome::Refused),
        (Some(refused(libc::EPERM)), Outcome::Inconclusive),
        (Some(refused(libc::ECONNREFUSED)), Outcome::Inconclusive),
        (Some(refused(libc::EAFNOSUPPORT)), Outcome::NotApplicable),
        (Some(Saw::Silent { at: "connect".to_owned() }), Outcome::Inconclusive),
        (Some(Saw::Died { signal: 9 }), Outcome::Inconclusive),
        (None, Outcome::Inconclusive),
    ] {
        let judged = judge(plain, true, outside.as_ref(), &inside(Some(&eperm), &[recorded("connect4", 4000)]));
        assert_eq!(judged.outcome, wanted, "{outside:?}");
    }
    // What the kernel may lack, or the gate may not do, is told apart from what nobody could show.
    let packet = named("packet_socket").unwrap();
    let judged = judge(packet, true, Some(&eperm), &inside(Some(&eperm), &[]));
    assert_eq!(judged.outcome, Outcome::NotApplicable);
    assert!(judged.reason.unwrap().contains("EPERM"));
}

#[test]
fn silence_is_a_refusal_only_where_somebody_says_so() {
    let plain = named("tcp_v4").unwrap();
    let silent = Saw::Silent { at: "connect".to_owned() };
    let judged =
        |refusals: &[Arc<KernelRefusal>]| judge(plain, true, Some(&REACHED()), &inside(Some(&silent), refusals));
    assert_eq!(judged(&[]).outcome, Outcome::Inconclusive);
    // Another port is another attempt.
    assert_eq!(judged(&[recorded("egress", 4001)]).outcome, Outcome::Inconclusive);
    let found = judged(&[recorded("egress", 4000)]);
    assert_eq!((found.outcome, found.by.as_deref()), (Outcome::Refused, Some("hook")));
    assert_eq!(found.record.as_deref(), Some("egress profile_none"));
    for saw in [None, Some(&Saw::Hindered { why: "no".to_owned() }), Some(&Saw::Died { signal: 11 })] {
        assert_eq!(judge(plain, true, Some(&REACHED()), &inside(saw, &[])).outcome, Outcome::Inconclusive);
    }
}

#[test]
fn who_refused_is_known_by_the_record_or_by_what_stands_first() {
    let by = |name: &str, errno: i32, isolated: bool, refusals: &[Arc<KernelRefusal>]| {
        let saw = refused(errno);
        let inside = Inside { isolated, ..inside(Some(&saw), refusals) };
        judge(named(name).unwrap(), true, Some(&REACHED()), &inside).by.unwrap()
    };
    assert_eq!(by("tcp_v4", libc::EPERM, false, &[recorded("connect4", 4000)]), "hook");
    assert_eq!(by("tcp_v4", libc::EPERM, false, &[]), "kernel");
    assert_eq!(by("tcp_v4", libc::ECONNREFUSED, true, &[]), "namespace");
    assert_eq!(by("bpf", libc::EPERM, false, &[]), "seccomp");
    assert_eq!(by("bpf", libc::EINVAL, false, &[]), "kernel");
    assert_eq!(by("root_write", libc::EACCES, false, &[]), "landlock");
    assert_eq!(by("root_write", libc::EROFS, false, &[]), "namespace");
}
