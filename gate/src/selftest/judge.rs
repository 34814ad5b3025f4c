//! What an attempt means, from the attempt's own word, the control's, the target's and the kernel's.

use std::sync::Arc;

use super::report::{Finding, Outcome};
use crate::egress::flow::{DecidedBy, FlowRecord, Verdict};
use crate::egress::flows::KernelRefusal;
use crate::sandbox::attempts::{Answerer, Control, Guard, Saw, Technique};

const DNS_PORT: u16 = 53;

/// What is known of an attempt in a leaf.
pub struct Inside<'a> {
    pub profile: &'a str,
    pub saw: Option<&'a Saw>,
    /// The target heard this run's token.
    pub heard: bool,
    /// Of the target.
    pub port: Option<u16>,
    /// The kernel program's, of this leaf.
    pub refusals: &'a [Arc<KernelRefusal>],
    /// The proxy's and the resolver's.
    pub flows: &'a [FlowRecord],
    /// Whether the leaf is in a network namespace of its own.
    pub isolated: bool,
}

/// Judges a technique in a leaf. `there` is false when it needs a socket that this machine cannot have.
pub fn judge(technique: &Technique, there: bool, outside: Option<&Saw>, inside: &Inside<'_>) -> Finding {
    let finding = |outcome: Outcome| Finding {
        technique: technique.name.to_owned(),
        profile: inside.profile.to_owned(),
        outcome,
        by: None,
        at: None,
        error: None,
        record: None,
        reason: None,
    };
    let because = |outcome: Outcome, reason: String| Finding { reason: Some(reason), ..finding(outcome) };
    // First of all: whatever else is wrong, out is out.
    if inside.heard {
        return because(Outcome::Escaped, "the target heard it".to_owned());
    }
    if let Some(Saw::Reached { how }) = inside.saw
        && !technique.witness
    {
        return because(Outcome::Escaped, how.clone());
    }
    if !there {
        return because(Outcome::NotApplicable, "this machine has no such loopback address".to_owned());
    }
    if let Some((outcome, reason)) = uncontrolled(technique, outside) {
        return because(outcome, reason);
    }
    let event = event(technique, inside);
    let record = event
        .map(|event| format!("{} {}", event.event.hook, event.event.reason))
        .or_else(|| flow(technique, inside).map(|flow| format!("flow {}", flow.rule)))
        .unwrap_or_else(|| "not_seen".to_owned());
    let refused = |by: Guard, at: Option<&str>, error: Option<String>| Finding {
        by: Some(name_of(by)),
        at: at.map(str::to_owned),
        error,
        record: Some(record.clone()),
        ..finding(Outcome::Refused)
    };
    match inside.saw {
        None => because(Outcome::Inconclusive, "the attempt was not made".to_owned()),
        Some(Saw::Hindered { why }) => because(Outcome::Inconclusive, why.clone()),
        Some(Saw::Refused { at, errno }) => {
            let error = (*errno != 0).then(|| errno_name(*errno));
            refused(by_errno(technique, *errno, event.is_some(), inside), Some(at), error)
        }
        Some(Saw::Answered { by, what }) => {
            let by = if *by == Answerer::Proxy { Guard::Proxy } else { Guard::Resolver };
            refused(by, None, Some(what.clone()))
        }
        Some(Saw::Died { signal }) if *signal == libc::SIGSYS => {
            refused(Guard::Seccomp, None, Some("SIGSYS".to_owned()))
        }
        Some(Saw::Died { signal }) => because(Outcome::Inconclusive, format!("the attempt died of signal {signal}")),
        Some(Saw::Silent { at }) if event.is_some() => refused(Guard::Hook, Some(at), None),
        // Nobody can call into another network namespace.
        Some(Saw::Silent { at }) if inside.isolated && technique.name == "inbound" => {
            refused(Guard::Namespace, Some(at), None)
        }
        Some(Saw::Silent { at }) => {
            because(Outcome::Inconclusive, format!("nothing came of it ({at}), and nobody says that he refused it"))
        }
        // With a witness that saw nothing: it was done, to something of its own.
        Some(Saw::Reached { .. }) => refused(Guard::Namespace, None, None),
    }
}

/// Why a refusal inside would show nothing.
fn uncontrolled(technique: &Technique, outside: Option<&Saw>) -> Option<(Outcome, String)> {
    match (technique.control, outside) {
        (Control::None, _) | (_, Some(Saw::Reached { .. })) => None,
        (control, Some(Saw::Refused { at, errno })) => {
            let what = format!("outside too: {at}: {}", errno_name(*errno));
            let not_there = no_such_thing(*errno) || (control == Control::ReachesIfThere && not_permitted(*errno));
            Some((if not_there { Outcome::NotApplicable } else { Outcome::Inconclusive }, what))
        }
        (_, Some(other)) => Some((Outcome::Inconclusive, format!("the control did not reach: {other:?}"))),
        (_, None) => Some((Outcome::Inconclusive, "the control was not made".to_owned())),
    }
}

const fn no_such_thing(errno: i32) -> bool {
    matches!(
        errno,
        libc::EAFNOSUPPORT | libc::EPROTONOSUPPORT | libc::ESOCKTNOSUPPORT | libc::ENOPROTOOPT | libc::ENOSYS
    )
}

const fn not_permitted(errno: i32) -> bool {
    matches!(errno, libc::EPERM | libc::EACCES | libc::EOPNOTSUPP | libc::EROFS)
}

/// The kernel program's record of this attempt.
fn event<'a>(technique: &Technique, inside: &Inside<'a>) -> Option<&'a Arc<KernelRefusal>> {
    inside.refusals.iter().find(|refusal| {
        let event = &refusal.event;
        match (technique.name, inside.port) {
            // Whose call it was that did not arrive, or whose answer that did not leave, has no port of ours.
            ("inbound", _) => matches!(event.hook, "ingress" | "egress") && event.protocol == "tcp",
            ("dns_udp" | "dns_tcp", _) => {
                event.port == DNS_PORT && (event.protocol == "tcp") == (technique.name == "dns_tcp")
            }
            (_, Some(port)) => event.port == port,
            _ => false,
        }
    })
}

/// The record that a refusal by the proxy or the resolver leaves.
fn flow<'a>(technique: &Technique, inside: &Inside<'a>) -> Option<&'a FlowRecord> {
    let denied = inside.flows.iter().filter(|flow| flow.verdict == Verdict::Deny);
    denied.into_iter().find(|flow| match technique.guard {
        Guard::Proxy => flow.decided_by == DecidedBy::Proxy && flow.port == inside.port,
        _ => technique.name.starts_with("dns_") && flow.decided_by == DecidedBy::Resolver,
    })
}

/// Who said no with an errno. The kernel program's refusals are known by their records; where a filter of system calls or
/// a namespace stands before the rest, it is the one that was met.
fn by_errno(technique: &Technique, errno: i32, recorded: bool, inside: &Inside<'_>) -> Guard {
    let unreachable =
        matches!(errno, libc::ECONNREFUSED | libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EADDRNOTAVAIL);
    match technique.guard {
        _ if recorded => Guard::Hook,
        Guard::Hook | Guard::Proxy | Guard::Resolver if inside.isolated && unreachable => Guard::Namespace,
        Guard::Seccomp if matches!(errno, libc::EPERM | libc::ENOSYS | 0) => Guard::Seccomp,
        Guard::Namespace if matches!(errno, libc::ENOENT | libc::ESRCH | libc::EPERM) => Guard::Namespace,
        Guard::Landlock if errno == libc::EACCES => Guard::Landlock,
        Guard::Landlock if errno == libc::EROFS => Guard::Namespace,
        _ => Guard::Kernel,
    }
}

fn name_of(guard: Guard) -> String {
    serde_json::to_value(guard).ok().and_then(|name| name.as_str().map(str::to_owned)).unwrap_or_default()
}

fn errno_name(errno: i32) -> String {
    let name = match errno {
        libc::EPERM => "EPERM",
        libc::ENOENT => "ENOENT",
        libc::ESRCH => "ESRCH",
        libc::EACCES => "EACCES",
        libc::EINVAL => "EINVAL",
        libc::EROFS => "EROFS",
        libc::ENOSYS => "ENOSYS",
        libc::EAFNOSUPPORT => "EAFNOSUPPORT",
        libc::EPROTONOSUPPORT => "EPROTONOSUPPORT",
        libc::ESOCKTNOSUPPORT => "ESOCKTNOSUPPORT",
        libc::ENOPROTOOPT => "ENOPROTOOPT",
        libc::EOPNOTSUPP => "EOPNOTSUPP",
        libc::ECONNREFUSED => "ECONNREFUSED",
        libc::ECONNRESET => "ECONNRESET",
        libc::ENETUNREACH => "ENETUNREACH",
        libc::EHOSTUNREACH => "EHOSTUNREACH",
        libc::EADDRNOTAVAIL => "EADDRNOTAVAIL",
        _ => return format!("errno {errno}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests;
