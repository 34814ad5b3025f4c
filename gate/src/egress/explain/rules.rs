//! What each rule means, and what would change its answer.

use super::{Change, Flow};
use crate::egress::profile::{DenyReason, Form, NOT_ENFORCED, Name, Profile};

type Told = (String, Change);

/// A refusal.
pub fn refused(flow: &Flow<'_>) -> Told {
    match flow.text("decided_by") {
        Some("hook" | "kernel") => by_kernel(flow),
        _ => by_name(flow)
            .or_else(|| by_content(flow))
            .or_else(|| by_dns(flow))
            .or_else(|| by_limit(flow))
            .unwrap_or_else(|| {
                let because = format!("the rule {:?} refused it", flow.rule());
                (because, Change::none("This build does not know what would allow it."))
            }),
    }
}

/// Refusals of a name, an address or a port.
fn by_name(flow: &Flow<'_>) -> Option<Told> {
    let (action, target) = (flow.action(), flow.target());
    let rule = flow.rule();
    let (word, detail) = rule.split_once(':').unwrap_or((rule, ""));
    Some(match word {
        "name_not_allowed" | "port_not_allowed" | "no_egress" | "protocol_not_allowed" => match flow.profile {
            // By its profile it may: so it is not the profile that refused.
            Some(profile) if permits(profile, flow) => (
                format!("the profile that {action} ran with does not have {target}, and the action's own profile does"),
                Change::none(
                    "Policy narrowed the profile of this call (`approved_egress`), or the manifest was changed since: \
                     let the policy's approved_egress name it.",
                ),
            ),
            profile => (not_permitted(word, flow), entry_for(flow, profile)),
        },
        "address_literal" | "address_not_allowed" => {
            (format!("{target} is an address, and the profile of {action} does not permit it"), address_entry(flow))
        }
        "invalid_name" => (
            format!("{target} is not a name that DNS could carry"),
            Change::none("Nothing allows this: the client has to ask for a DNS name."),
        ),
        "address_not_public" => (
            format!(
                "{target} has an address that is not public ({detail}), and one such address refuses the whole name"
            ),
            Change {
                what: "If the gate is meant to dial it, add its network to the gate's configuration, as narrow as can \
                       be."
                .to_owned(),
                configuration: Some(match flow.address() {
                    Some(address) => {
                        let bits = if address.is_ipv4() { 32 } else { 128 };
                        format!("[egress]\nallow_addresses = [\"{address}/{bits}\"]")
                    }
                    None => format!("[egress]\nallow_addresses = [\"ADDRESS-OF-{}/32\"]", flow.host().unwrap_or("IT")),
                }),
                ..Change::default()
            },
        ),
        "method_not_allowed" => {
            let method = flow.text("method").unwrap_or("that method");
            (
                format!("{action} may not use {method} there"),
                Change::none(format!(
                    "Add {method} to the manifest's egress.allowed_methods, or to `methods` of the entry for {target}."
                )),
            )
        }
        _ => return None,
    })
}

/// Refusals of what was sent.
fn by_content(flow: &Flow<'_>) -> Option<Told> {
    let (target, sni) = (flow.target(), flow.text("sni").unwrap_or("another name"));
    let never = |because: String, what: &str| (because, Change::none(what));
    Some(match flow.rule() {
        "malformed" => never(
            "what was sent is not HTTP, or could be read in two ways".to_owned(),
            "Nothing allows this: the client has to send a request that has one meaning.",
        ),
        "no_request" => never(
            "the connection was opened and nothing was asked for in time".to_owned(),
            "Nothing to allow: the client sent no request.",
        ),
        "sni_mismatch" => never(
            format!("{target} was asked for, and TLS inside named {sni}: domain fronting"),
            "Nothing allows this: the client has to name in TLS what it asked for.",
        ),
        "sni_missing" => never(
            format!("TLS to {target} named no host, so that what was asked for cannot be compared with it"),
            "The client has to send SNI; for what speaks no TLS an entry with `protocol: tcp`.",
        ),
        "ech" => never(
            format!("TLS to {target} hides the name of the host (ECH)"),
            "The client has to do without encrypted ClientHello; or an entry with `tls: terminate`.",
        ),
        "not_tls" => never(
            format!("{target} may be reached by TLS, and what was sent is not TLS"),
            "An entry with `protocol: http` for HTTP in the clear, `protocol: tcp` for anything else.",
        ),
        "host_mismatch" => never(
            format!("{target} was asked for, and the request inside is for another host"),
            "Nothing allows this: the Host of each request has to be the name that was asked for.",
        ),
        _ => return None,
    })
}

/// Refusals of the resolver that are not about which name.
fn by_dns(flow: &Flow<'_>) -> Option<Told> {
    let (action, target) = (flow.action(), flow.target());
    let never = |because: String, what: &str| Some((because, Change::none(what)));
    match flow.rule() {
        "dns_malformed" => never(
            "what was sent is not one DNS query, or could be read in two ways".to_owned(),
            "Nothing allows this: the client has to send a query of one question.",
        ),
        "dns_type_not_allowed" | "dns_class_not_allowed" => never(
            format!("{action} asked for other records of {target} than addresses"),
            "Nothing allows this: records that carry text or names are a way out.",
        ),
        "dns_rate" => never(
            format!("{action} asked faster than an execution may"),
            "No setting allows more: let the action ask less often, or keep the answers that it has.",
        ),
        "dns_names_per_execution" => never(
            format!("one execution of {action} has asked for as many names as it may"),
            "No setting allows more: split the work.",
        ),
        "disputed" => never(
            "the kernel's record and the listener say different things about whose it is".to_owned(),
            "Nothing allows this: what cannot be proved to be one execution's is refused.",
        ),
        "kernel_refused" => never(
            format!("the kernel program could not be told of {target}"),
            "Nothing to allow: the gate's log says what is full.",
        ),
        "no_resolver" => never(
            "the execution has no resolver over TCP".to_owned(),
            "Let the program use the proxy that its environment names, which resolves by itself.",
        ),
        _ => None,
    }
}

/// Refusals for how much, and of connections that are nobody's.
fn by_limit(flow: &Flow<'_>) -> Option<Told> {
    let action = flow.action();
    Some(match flow.rule() {
        "connection_limit" => (
            format!("{action} had as many connections open as an execution may"),
            Change {
                what: "Raise the limit in the gate's configuration, or let the action open fewer at a time.".to_owned(),
                configuration: Some("[egress]\nmax_connections_per_execution = 128".to_owned()),
                ..Change::default()
            },
        ),
        "connections_per_execution" => (
            format!("one execution of {action} made as many connections as are recorded one by one"),
            Change::none("No setting allows more: let the action make fewer connections, or split the work."),
        ),
        "unattributed" => (
            "the kernel has no record of an action that made this connection".to_owned(),
            Change::none("Nothing allows this: the proxy serves actions of this gate alone."),
        ),
        "no_session" => (
            "the execution that made this connection was over".to_owned(),
            Change::none("Nothing allows this: an execution that has ended reaches nothing."),
        ),
        _ => return None,
    })
}

/// Refusals of the kernel program.
fn by_kernel(flow: &Flow<'_>) -> Told {
    let (action, target) = (flow.action(), flow.target());
    let port = flow.port().unwrap_or_default();
    let gone = "Nothing allows this: the sandbox was not, or no longer, admitted.";
    match flow.rule() {
        "profile_none" => (
            format!("the profile of {action} is `none`: not even the gate's proxy is reached"),
            Change {
                what: format!("Give {action} an allowlist with the name behind {target}."),
                manifest: Some("egress: {profile: proxy_allowlist, allowed_domains: [NAME]}".to_owned()),
                ..Change::default()
            },
        ),
        "not_the_proxy" => (
            format!("{action} went to {target} by itself, and may talk to the gate's proxy alone"),
            Change::none(
                "Let the program use the proxy that its environment names (HTTPS_PROXY), or ask for a name of its \
                 profile: an address by itself is refused.",
            ),
        ),
        "not_in_profile" => (format!("the profile of {action} has nothing at {target}"), address_entry(flow)),
        "too_many_servers" => (
            "one socket asked more DNS servers than are told apart".to_owned(),
            Change::none("Nothing allows more: every server gives the gate's answer, so one is enough."),
        ),
        "query_rate" => (
            format!("{action} sent DNS queries faster than a sandbox may"),
            Change::none("No setting allows more: let the action ask less often, or keep the answers that it has."),
        ),
        "too_many_queries" | "query_in_flight" => (
            format!("{action} had a DNS query under way that could not be told from this one, or too many of them"),
            Change::none("Nothing to allow: clients ask again."),
        ),
        "datagram" if port == 443 => (
            format!("QUIC (UDP to {target}) is refused so that clients fall back to TCP"),
            Change::none("Nothing allows this: let the client use HTTP/2 or HTTP/1.1."),
        ),
        "datagram" if port == 53 => (
            format!("a DNS query to {target}, which nothing in this sandbox carries"),
            Change::none(
                "The proxy resolves names by itself: let the program use the proxy that its environment names.",
            ),
        ),
        "datagram" => (
            format!("UDP to {target}: no datagram leaves a sandbox"),
            Change::none("Nothing allows this: let the program use TCP."),
        ),
        "socket_kind" => (
            "only TCP and UDP sockets can be made in a sandbox".to_owned(),
            Change::none("Nothing allows this: raw sockets, SCTP and the like are never given."),
        ),
        "expired" => (
            format!("the time of this execution of {action} was over"),
            Change::none("If the action needs longer, raise resource_limits.timeout_seconds in its manifest."),
        ),
        "too_many_flows" | "map_full" => (
            format!("{action} had more connections open than the kernel program keeps"),
            Change::none("No setting allows more: let the action open fewer at a time."),
        ),
        "heartbeat_stopped" => (
            "the gate had stopped saying that it is alive, and then nothing leaves".to_owned(),
            Change::none("Nothing to allow: see why the gate hung (its log, `latchgate status`)."),
        ),
        "no_entry" | "foreign_generation" => ("the sandbox had no entry of this gate's".to_owned(), Change::none(gone)),
        "foreign_socket" => (
            "the socket was not made in the sandbox that used it".to_owned(),
            Change::none("Nothing allows this: a sandbox uses sockets of its own making."),
        ),
        "malformed" => (
            "a packet that cannot be read".to_owned(),
            Change::none("Nothing allows this: what cannot be judged is dropped."),
        ),
        other => (
            format!("the kernel program refused it ({other})"),
            Change::none("This build does not know what would allow it."),
        ),
    }
}

/// What failed after it was allowed.
pub fn failed(error: &str) -> String {
    let what = match error {
        "name_not_found" => "the name does not exist in DNS",
        "connect_refused" => "nothing listens there",
        "connect_timeout" => "nothing answered in time",
        "connect_unreachable" => "there is no way there from this machine",
        "tls_certificate" => "the certificate of the other side was refused",
        "not_accepted" => "the execution ended before the proxy took the connection",
        "not_established" => "the connection was given up before it was made",
        "tls_timeout" => "the TLS handshake was not finished in time",
        other => return format!("it was permitted; then: {other}"),
    };
    format!("it was permitted; then: {what} ({error})")
}

fn permits(profile: &Profile, flow: &Flow<'_>) -> bool {
    match (flow.host(), flow.port()) {
        (Some(host), Some(port)) => profile.permits(host, port).is_ok(),
        // A question for a name has no port.
        (Some(host), None) => {
            let reason = profile.permits(host, 0).err().map(|denied| denied.reason);
            reason == Some(DenyReason::PortNotAllowed)
        }
        _ => false,
    }
}

fn not_permitted(word: &str, flow: &Flow<'_>) -> String {
    let (action, target) = (flow.action(), flow.target());
    match word {
        "no_egress" => format!("the profile of {action} is `none`: it reaches nothing"),
        "port_not_allowed" => format!("an entry of {action}'s profile has the name of {target}, at other ports"),
        "protocol_not_allowed" => format!("an entry of {action}'s profile has {target}, for another protocol"),
        _ => format!("no entry of {action}'s profile has the name of {target}"),
    }
}

/// An entry for that one address and port.
fn address_entry(flow: &Flow<'_>) -> Change {
    let (Some(address), false) = (flow.address(), NOT_ENFORCED.contains(&Form::Cidr)) else {
        return Change::none("Ask for it by its name.");
    };
    let (action, port) = (flow.action(), flow.port().unwrap_or(443));
    let network = format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 });
    Change {
        what: format!("Ask for it by its name. If it has none, add this entry to {action}."),
        manifest: Some(format!("- {{cidr: \"{network}\", ports: [{port}]}}")),
        configuration: Some(format!(
            "[definitions.allowed_domains]\n\"{action}\" = [{{ cidr = \"{network}\", ports = [{port}] }}]"
        )),
    }
}

/// The narrowest entry that would permit it: that name and that port.
fn entry_for(flow: &Flow<'_>, profile: Option<&Profile>) -> Change {
    let action = flow.action();
    let Some(name) = flow.host().and_then(|host| Name::parse(host).ok()) else {
        return Change::none("Nothing allows this: the client has to ask for a DNS name.");
    };
    let port = flow.port().unwrap_or(443);
    let yaml = format!("{{domain: {name}, ports: [{port}], exact: true}}");
    let none = profile.is_some_and(Profile::is_none);
    Change {
        what: if none {
            format!("Give {action} an allowlist with this one entry, in its manifest.")
        } else {
            format!("Add this entry to {action}: in its manifest, or in the gate's configuration.")
        },
        manifest: Some(if none {
            format!("egress: {{profile: proxy_allowlist, allowed_domains: [{yaml}]}}")
        } else {
            format!("- {yaml}")
        }),
        // A configuration adds to an allowlist, and cannot make one.
        configuration: (!none).then(|| {
            format!(
                "[definitions.allowed_domains]\n\"{action}\" = [{{ domain = \"{name}\", ports = [{port}], exact = true }}]"
            )
        }),
    }
}
