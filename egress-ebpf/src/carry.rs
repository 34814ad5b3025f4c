//! Carrying: a connect to what the leaf may reach goes to the proxy, and the socket keeps where it was meant to go.

use core::ptr::{read_volatile, write_volatile};

use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::programs::SockAddrContext;
use egress_ebpf::guard::Guard;
use egress_ebpf::{Destination, MAX_FLOWS_PER_LEAF, REACH_BITS_BEFORE_ADDRESS, reach_key};

use crate::guards::on;
use crate::packet::{self, Endpoint};
use crate::refuse::{self, Refusal, refuse};
use crate::{
    ALLOW, ClientSocket, Control, DENY, Hook, IPPROTO_TCP, IPPROTO_UDP, KIND_ALLOWLIST, KIND_NONE, REACH, Reason,
    client, client_of, control, current_leaf, kind_of_caller, query, word,
};

#[inline(always)]
pub fn on_connect(ctx: &SockAddrContext, hook: Hook, to: Endpoint) -> i32 {
    let Some(control) = control() else { return DENY };
    let leaf = current_leaf(&control);
    let protocol = word!(ctx.sock_addr, protocol);
    let family = word!(ctx.sock_addr, family);
    let verdict = match kind_of_caller(&control, leaf) {
        Err(reason) => Err(reason),
        // Switches that let a connect through are asked here, where nothing is left to be returned: among the results of
        // `verdict` the compiler would copy an endpoint that is not there, and the verifier refuses that.
        Ok(_) if !on(Guard::ForeignSocket) && is_foreign(ctx, leaf) => return ALLOW,
        Ok(KIND_ALLOWLIST) if protocol == IPPROTO_UDP && !on(Guard::Dns) => return ALLOW,
        Ok(kind) => verdict(ctx, &control, leaf, kind, protocol, &to),
    };
    match verdict {
        Ok(None) => ALLOW,
        Ok(Some(instead)) => {
            packet::write(ctx, matches!(hook, Hook::Connect6), &instead);
            ALLOW
        }
        Err(reason) => refuse(&Refusal { leaf, hook, reason, family, protocol, to }),
    }
}

/// Whether the socket was made somewhere else.
#[inline(always)]
fn is_foreign(ctx: &SockAddrContext, leaf: u64) -> bool {
    // SAFETY: a field of the context; what is null is no socket of a leaf.
    let sk = unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk };
    client_of(sk, leaf).is_err()
}

/// Where the connect goes instead of where it was meant to, if anywhere.
#[inline(always)]
fn verdict(
    ctx: &SockAddrContext,
    control: &Control,
    leaf: u64,
    kind: u32,
    protocol: u32,
    to: &Endpoint,
) -> Result<Option<Endpoint>, Reason> {
    // SAFETY: a field of the context; what is null is no socket of a leaf.
    let sk = unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk };
    let stored = client_of(sk, leaf)?;
    if kind == KIND_NONE {
        return Err(Reason::ProfileNone);
    }
    if protocol == IPPROTO_UDP && kind == KIND_ALLOWLIST {
        // To musl EPERM is a broken machine, and then no name is found. The connect alone says nothing to anybody, and
        // nothing can be sent on it: neither sendmsg nor egress has a server there.
        if to.is_family_probe() {
            return Ok(None);
        }
        return query::redirect(control, sk, to);
    }
    if protocol != IPPROTO_TCP {
        return Err(Reason::Datagram);
    }
    let instead = if to.is_proxy(control) { None } else { Some(carried(control, leaf, kind, to)?) };
    if refuse::open_flows(leaf) >= MAX_FLOWS_PER_LEAF && on(Guard::FlowLimit) {
        return Err(Reason::TooManyFlows);
    }
    let original = match instead {
        None => Endpoint::NONE,
        Some(_) => *to,
    };
    keep(stored, &original);
    Ok(instead)
}

#[inline(always)]
fn carried(control: &Control, leaf: u64, kind: u32, to: &Endpoint) -> Result<Endpoint, Reason> {
    if kind != KIND_ALLOWLIST {
        return Err(Reason::NotTheProxy);
    }
    let is_dns = control.resolver_slots != 0 && to.is_dns();
    if !is_dns && !is_reached(leaf, to) && on(Guard::Reach) {
        return Err(Reason::NotInProfile);
    }
    to.proxy(control).ok_or(Reason::NotTheProxy)
}

#[inline(always)]
fn is_reached(leaf: u64, to: &Endpoint) -> bool {
    let port = to.host_port();
    // Port 0 of a key means all ports; nobody listens there.
    port != 0 && (has(leaf, to, port) || has(leaf, to, 0))
}

#[inline(always)]
fn has(leaf: u64, to: &Endpoint, port: u16) -> bool {
    let key = Key::new(REACH_BITS_BEFORE_ADDRESS + 128, reach_key(leaf, to.family, port, to.address));
    let Some(found) = REACH.get(&key) else { return false };
    // SAFETY: a map's value that was looked up in this run; an element that was reused is another leaf's.
    unsafe { read_volatile(found) == leaf }
}

/// Only ever called under the socket's lock, which `connect` holds until the flow's record is made.
#[inline(always)]
fn keep(stored: *mut ClientSocket, original: &Endpoint) {
    // Volatile, word by word: LLVM makes zeroes in a row a call of memset.
    // SAFETY: checked for null by who looked it up.
    unsafe {
        let to: *mut Destination = &raw mut (*stored).original;
        write_volatile(&raw mut (*to).address[0], original.address[0]);
        write_volatile(&raw mut (*to).address[1], original.address[1]);
        write_volatile(&raw mut (*to).address[2], original.address[2]);
        write_volatile(&raw mut (*to).address[3], original.address[3]);
        write_volatile(&raw mut (*to).family, original.family);
        write_volatile(&raw mut (*to).port, original.port);
        write_volatile(&raw mut (*stored).accepted, 0);
    }
}

/// `peer` is whom the socket is really connected to.
#[inline(always)]
pub fn on_getpeername(ctx: &SockAddrContext, is_v6: bool, peer: Endpoint) {
    let Some(control) = control() else { return };
    // SAFETY: a field of the context, checked for null before it is used.
    let sk = unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk };
    if word!(ctx.sock_addr, protocol) == IPPROTO_UDP {
        return query::show_server(ctx, &control, sk, is_v6, &peer);
    }
    let Some(stored) = client(sk) else { return };
    let original = Endpoint {
        family: word!(stored, original.family),
        address: [
            word!(stored, original.address[0]),
            word!(stored, original.address[1]),
            word!(stored, original.address[2]),
            word!(stored, original.address[3]),
        ],
        port: word!(stored, original.port),
    };
    if original.family != 0 && peer.is_proxy(&control) {
        packet::write(ctx, is_v6, &original);
    }
}
