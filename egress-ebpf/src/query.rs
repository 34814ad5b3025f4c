//! DNS over UDP: a query to port 53 of any address goes to the resolver's port that stands for that server on that
//! socket, the answer comes from the server, and who asked is written down before the resolver can read the query.
//!
//! `connect`, `sendmsg` and `recvmsg` hooks run under the socket's lock, so nobody else changes its servers meanwhile.

use core::ptr::{null_mut, read_volatile, write_volatile};

use aya_ebpf::bindings::{BPF_NOEXIST, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock};
use aya_ebpf::helpers::generated::bpf_sk_storage_get;
use aya_ebpf::programs::{SkBuffContext, SockAddrContext};
use egress_ebpf::guard::Guard;
use egress_ebpf::{
    DNS_PORT, Destination, MAX_QUERIES_PER_LEAF, MAX_SLOTS, QUERIES_BURST, QUERIES_PER_SECOND, QUERY_BYTES,
};

use crate::guards::on;
use crate::packet::{self, Endpoint, Header};
use crate::refuse::{Refusal, add, exchange, refuse};
use crate::{
    AF_INET, ALLOW, AskedServers, COUNTS, ClientSocket, Control, DENY, Hook, IPPROTO_UDP, KIND_ALLOWLIST, KIND_NONE,
    PACE, QUERIES, QueryKey, QueryRecord, Reason, SERVERS, TAKEN, client_of, control, current_leaf, kind_of, now_ns,
    word,
};

/// Once for each slot, with its number as a constant: an offset that is computed is refused without CAP_PERFMON.
macro_rules! each_slot {
    (|$at:ident| $body:block) => {
        each_slot!(@ $at $body 0 1 2 3 4 5 6 7)
    };
    (@ $at:ident $body:block $($number:literal)+) => {
        $({
            const $at: usize = $number;
            $body
        })+
    };
}
const _: () = assert!(MAX_SLOTS == 8);

#[inline(always)]
fn servers(sk: *mut bpf_sock, flags: u32) -> Option<*mut AskedServers> {
    if sk.is_null() {
        return None;
    }
    // SAFETY: a socket of the context; what is made is zero, so no slot is used.
    let stored =
        unsafe { bpf_sk_storage_get((&raw const SERVERS).cast_mut().cast(), sk.cast(), null_mut(), u64::from(flags)) };
    if stored.is_null() { None } else { Some(stored.cast()) }
}

/// The server of a slot. Every word is read and one is chosen afterwards.
#[inline(always)]
fn server_at(servers: *mut AskedServers, slot: u32) -> Option<Endpoint> {
    let mut found = Endpoint::NONE;
    each_slot!(|AT| {
        let family = word!(servers, family[AT]);
        let a = word!(servers, address[AT][0]);
        let b = word!(servers, address[AT][1]);
        let c = word!(servers, address[AT][2]);
        let d = word!(servers, address[AT][3]);
        if slot == AT as u32 {
            found = Endpoint { family, address: [a, b, c, d], port: u32::from(DNS_PORT.to_be()) };
        }
    });
    if found.family == 0 { None } else { Some(found) }
}

/// The slot that stands for a server on this socket, the next one if it has none yet.
#[inline(always)]
fn claim(servers: *mut AskedServers, slots: u32, to: &Endpoint) -> Result<u32, Reason> {
    each_slot!(|AT| {
        // One comparison a slot: each more doubles the paths that the verifier walks.
        let differs = (word!(servers, family[AT]) ^ to.family)
            | (word!(servers, address[AT][0]) ^ to.address[0])
            | (word!(servers, address[AT][1]) ^ to.address[1])
            | (word!(servers, address[AT][2]) ^ to.address[2])
            | (word!(servers, address[AT][3]) ^ to.address[3]);
        if differs == 0 {
            return Ok(AT as u32);
        }
    });
    let next = word!(servers, used);
    if next >= slots || next >= MAX_SLOTS as u32 {
        return Err(Reason::TooManyServers);
    }
    // All are written, all but one with what they hold: a choice of where to write would become a computed offset.
    each_slot!(|AT| {
        let chosen = next == AT as u32;
        // SAFETY: fields of a value that was checked for null.
        unsafe {
            put(&raw mut (*servers).address[AT][0], chosen, to.address[0]);
            put(&raw mut (*servers).address[AT][1], chosen, to.address[1]);
            put(&raw mut (*servers).address[AT][2], chosen, to.address[2]);
            put(&raw mut (*servers).address[AT][3], chosen, to.address[3]);
            put(&raw mut (*servers).family[AT], chosen, to.family);
        }
    });
    // SAFETY: as above. Last: a slot that is read before is free.
    unsafe { write_volatile(&raw mut (*servers).used, next + 1) };
    Ok(next)
}

/// # Safety
/// `to` is a field of a map's value.
#[inline(always)]
unsafe fn put(to: *mut u32, chosen: bool, value: u32) {
    // SAFETY: the caller's promise.
    unsafe {
        let held = read_volatile(to);
        write_volatile(to, if chosen { value } else { held });
    }
}

/// Where a datagram, or the connect of a UDP socket, goes instead of where it was meant to.
#[inline(always)]
pub fn redirect(control: &Control, sk: *mut bpf_sock, to: &Endpoint) -> Result<Option<Endpoint>, Reason> {
    if control.resolver_slots == 0 {
        return Err(Reason::Datagram);
    }
    if let Some(slot) = to.slot(control) {
        // The kernel asks again with what was written before when a connected IPv6 socket sends to a mapped address.
        let Some(servers) = servers(sk, 0) else { return Err(Reason::Datagram) };
        return if server_at(servers, slot).is_some() { Ok(None) } else { Err(Reason::Datagram) };
    }
    if !to.is_dns() || to.resolver(control, 0).is_none() {
        return Err(Reason::Datagram);
    }
    let Some(servers) = servers(sk, BPF_SK_STORAGE_GET_F_CREATE) else { return Err(Reason::MapFull) };
    let slot = claim(servers, control.resolver_slots, &server_of(to))?;
    to.resolver(control, slot).map(Some).ok_or(Reason::TooManyServers)
}

/// The kernel reads the unspecified address as loopback, after the hook; an answer comes from there.
#[inline(always)]
fn server_of(to: &Endpoint) -> Endpoint {
    let unspecified = to.address[0] == 0 && to.address[1] == 0 && to.address[2] == 0 && to.address[3] == 0;
    match (unspecified, to.family) {
        (false, _) => *to,
        (true, AF_INET) => Endpoint::v4(u32::from_ne_bytes([127, 0, 0, 1]), to.port),
        (true, _) => Endpoint { family: to.family, address: [0, 0, 0, 1_u32.to_be()], port: to.port },
    }
}

#[inline(always)]
pub fn on_sendmsg(ctx: &SockAddrContext, hook: Hook, to: Endpoint) -> i32 {
    let Some(control) = control() else { return DENY };
    let leaf = current_leaf(&control);
    // By itself, as in `carry::on_connect`: among what follows, the verifier refuses what the compiler makes of it.
    if !on(Guard::Dns) && matches!(kind_of(&control, leaf), Ok(KIND_ALLOWLIST)) {
        return ALLOW;
    }
    let (family, protocol) = (word!(ctx.sock_addr, family), word!(ctx.sock_addr, protocol));
    let verdict = match kind_of(&control, leaf) {
        Err(reason) => Err(reason),
        Ok(KIND_NONE) => Err(Reason::ProfileNone),
        Ok(KIND_ALLOWLIST) if protocol == IPPROTO_UDP => {
            // SAFETY: a field of the context; what is null is no socket of a leaf.
            let sk = unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk };
            client_of(sk, leaf).and_then(|_| redirect(&control, sk, &to))
        }
        Ok(_) => Err(Reason::Datagram),
    };
    match verdict {
        Ok(None) => ALLOW,
        Ok(Some(instead)) => {
            packet::write(ctx, matches!(hook, Hook::Sendmsg6), &instead);
            ALLOW
        }
        Err(reason) => refuse(&Refusal { leaf, hook, reason, family, protocol, to }),
    }
}

/// `from` is the resolver's port; the client is told the server that it asked.
#[inline(always)]
pub fn on_recvmsg(ctx: &SockAddrContext, is_v6: bool, from: Endpoint) {
    let Some(control) = control() else { return };
    // SAFETY: a field of the context, checked for null before it is used.
    let sk = unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk };
    show_server(ctx, &control, sk, is_v6, &from);
}

#[inline(always)]
pub fn show_server(ctx: &SockAddrContext, control: &Control, sk: *mut bpf_sock, is_v6: bool, from: &Endpoint) {
    let Some(slot) = from.slot(control) else { return };
    let Some(servers) = servers(sk, 0) else { return };
    let Some(server) = server_at(servers, slot) else { return };
    packet::write(ctx, is_v6, &server);
}

/// A UDP packet of a leaf, either way.
#[inline(always)]
pub fn on_packet(
    ctx: &SkBuffContext,
    hook: Hook,
    control: &Control,
    leaf: u64,
    kind: u32,
    header: &Header,
) -> Result<(), Reason> {
    if kind != KIND_ALLOWLIST {
        return Err(Reason::Datagram);
    }
    let Some(slot) = header.peer.slot(control) else { return Err(Reason::Datagram) };
    // SAFETY: a field of the context, checked for null before it is used.
    let sk = unsafe { (*ctx.skb.skb).__bindgen_anon_2.sk };
    let stored = client_of(sk, leaf)?;
    let Some(servers) = servers(sk, 0) else { return Err(Reason::Datagram) };
    let Some(server) = server_at(servers, slot) else { return Err(Reason::Datagram) };
    if matches!(hook, Hook::Ingress) {
        return Ok(());
    }
    keep_pace(leaf, word!(ctx.skb.skb, len))?;
    let Some(id) = packet::dns_id(ctx, header.transport) else { return Err(Reason::Malformed) };
    let key = QueryKey {
        netns_cookie: netns_of(stored),
        source_ip: header.own.mapped(),
        source_port: header.own.host_port(),
        slot_port: header.peer.host_port(),
        id,
        reserved: 0,
    };
    write_down(leaf, &key, &server)
}

const EACH_NS: u64 = 1_000_000_000 / QUERIES_PER_SECOND;
const WHOLE_NS: u64 = EACH_NS * QUERIES_BURST;
/// More than the CPUs of a leaf that send at the same moment; what comes between then is refused.
const TRIES: usize = 4;

/// Takes a query out of the leaf's allowance, kept as the time at which that is whole again (the generic cell rate
/// algorithm, ATM Forum TM 4.0 §4.4).
#[inline(always)]
fn keep_pace(leaf: u64, length: u32) -> Result<(), Reason> {
    let Some(whole_at) = PACE.get_ptr_mut(leaf) else { return Err(Reason::NoEntry) };
    let takes = EACH_NS * (1 + u64::from(length / QUERY_BYTES));
    let now = now_ns();
    for _ in 0..TRIES {
        // SAFETY: a map's value that was looked up in this run. When its element is reused meanwhile, another leaf has one
        // query less for a moment.
        let held = unsafe { read_volatile(whole_at) };
        let from = if held > now { held } else { now };
        if from + takes > now + WHOLE_NS {
            return Err(Reason::QueryRate);
        }
        if exchange(whole_at, held, from + takes) {
            return Ok(());
        }
    }
    Err(Reason::QueryRate)
}

#[inline(always)]
fn netns_of(stored: *mut ClientSocket) -> u64 {
    // SAFETY: checked for null by who looked it up.
    unsafe { (*stored).netns_cookie }
}

#[inline(always)]
fn write_down(leaf: u64, key: &QueryKey, server: &Endpoint) -> Result<(), Reason> {
    let Some(counts) = COUNTS.get_ptr_mut(leaf) else { return Err(Reason::NoEntry) };
    // SAFETY: the value is one word. When its element is reused while it is read, one query more or less is let through.
    let Some(&taken) = (unsafe { TAKEN.get(leaf) }) else { return Err(Reason::NoEntry) };
    // SAFETY: a field of a map's value that was looked up in this run.
    let made = unsafe { read_volatile(&raw const (*counts).queries) };
    if made > taken && made - taken >= MAX_QUERIES_PER_LEAF {
        return Err(Reason::TooManyQueries);
    }
    let record = QueryRecord { leaf, at_ns: now_ns(), server: server.as_destination() };
    if QUERIES.insert(key, record, u64::from(BPF_NOEXIST)).is_ok() {
        // SAFETY: as above.
        add(unsafe { &raw mut (*counts).queries }, 1);
        return Ok(());
    }
    // SAFETY: read word by word and compared; it is never more than let through.
    let Some(held) = (unsafe { QUERIES.get(key) }) else { return Err(Reason::MapFull) };
    let held: *const QueryRecord = held;
    let same = word!(held, leaf) == leaf && is(held, server);
    // A query that is sent again before the resolver has read it is answered once.
    if same { Ok(()) } else { Err(Reason::QueryInFlight) }
}

#[inline(always)]
fn is(held: *const QueryRecord, server: &Endpoint) -> bool {
    // SAFETY: a field of a map's value.
    let found: *const Destination = unsafe { &raw const (*held).server };
    word!(found, family) == server.family
        && word!(found, address[0]) == server.address[0]
        && word!(found, address[1]) == server.address[1]
        && word!(found, address[2]) == server.address[2]
        && word!(found, address[3]) == server.address[3]
}
