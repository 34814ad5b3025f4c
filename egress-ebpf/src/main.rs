//! The kernel program. Every path that is not plainly allowed returns `DENY`.
//!
//! Loaded with CAP_BPF and CAP_NET_ADMIN alone: without CAP_PERFMON there is no arithmetic with a variable on a pointer.
//! Context words are read volatile, all of them, and selected afterwards: LLVM otherwise merges accesses or computes the
//! offset, and the verifier refuses both.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![allow(internal_features)]

mod carry;
mod flow;
mod packet;
mod query;
mod refuse;

use aya_ebpf::bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock};
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, RingBuf, SkStorage};
use aya_ebpf::helpers::generated::{
    bpf_get_current_ancestor_cgroup_id, bpf_get_netns_cookie, bpf_ktime_get_boot_ns, bpf_sk_storage_get,
    bpf_skb_ancestor_cgroup_id,
};
use aya_ebpf::macros::{btf_map, cgroup_skb, cgroup_sock, cgroup_sock_addr, sock_ops};
use aya_ebpf::programs::{SkBuffContext, SockAddrContext, SockContext, SockOpsContext};
use egress_ebpf::{
    AcceptedSocket, AskedServers, ClientSocket, Control, Counts, EVENT_BYTES, Event, FlowKey, FlowRecord,
    HEARTBEAT_LIMIT_NS, HEARTBEAT_SKEW_NS, Hook, KIND_ALLOWLIST, KIND_NONE, KIND_PROXY_ONLY, LeafEntry, MAPPED_WORD,
    MAX_FLOWS, MAX_LEAVES, MAX_LEVEL, MAX_QUERIES, MAX_REACH, QueryKey, QueryRecord, ReachKey, Reason,
};

use crate::refuse::{Refusal, refuse};

const ALLOW: i32 = 1;
const DENY: i32 = 0;

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
const SOCK_STREAM: u32 = 1;
const SOCK_DGRAM: u32 = 2;
const IPPROTO_TCP: u32 = 6;
const IPPROTO_UDP: u32 = 17;

const NO_PREALLOC: usize = 1;

#[btf_map]
static CONTROL: Array<Control, 1> = Array::new();
/// CLOCK_BOOTTIME when the gate was last known to be alive.
#[btf_map]
static HEARTBEAT: Array<u64, 1> = Array::new();
#[btf_map]
static LEAVES: HashMap<u64, LeafEntry, MAX_LEAVES, NO_PREALLOC> = HashMap::new();
#[btf_map]
static COUNTS: HashMap<u64, Counts, { MAX_LEAVES + 1 }, NO_PREALLOC> = HashMap::new();
#[btf_map]
static FLOWS: HashMap<FlowKey, FlowRecord, MAX_FLOWS, NO_PREALLOC> = HashMap::new();
/// What leaves with an allowlist may reach. A value is the leaf of its key.
#[btf_map]
static REACH: LpmTrie<ReachKey, u64, MAX_REACH> = LpmTrie::new();
/// Who asks, until the resolver takes it.
#[btf_map]
static QUERIES: HashMap<QueryKey, QueryRecord, MAX_QUERIES, NO_PREALLOC> = HashMap::new();
/// How many records of a leaf have been taken; written by the gate alone.
#[btf_map]
static TAKEN: HashMap<u64, u64, MAX_LEAVES, NO_PREALLOC> = HashMap::new();
/// On UDP sockets that have asked a DNS server.
#[btf_map]
static SERVERS: SkStorage<AskedServers> = SkStorage::new();
#[btf_map]
static CLIENTS: SkStorage<ClientSocket> = SkStorage::new();
#[btf_map]
static ACCEPTED: SkStorage<AcceptedSocket> = SkStorage::new();
#[btf_map]
static EVENTS: RingBuf<Event, EVENT_BYTES> = RingBuf::new();
/// Ids of the ancestors of whoever makes a socket in the probe's cgroup, by level.
#[btf_map]
static PROBE: Array<u64, { MAX_LEVEL as usize }> = Array::new();

/// Reads a word of the context at its own, constant offset.
macro_rules! word {
    ($context:expr, $($field:tt)+) => {
        // SAFETY: the verifier has checked that the context has this field.
        unsafe { core::ptr::read_volatile(&raw const (*$context).$($field)+) }
    };
}
pub(crate) use word;

/// Every word of it, read unconditionally: a choice between two fields would become an offset that is computed.
#[inline(always)]
fn control() -> Option<Control> {
    let control: *const Control = CONTROL.get(0)?;
    let ip6 = [
        word!(control, proxy_ip6[0]),
        word!(control, proxy_ip6[1]),
        word!(control, proxy_ip6[2]),
        word!(control, proxy_ip6[3]),
    ];
    let resolver_ip6 = [
        word!(control, resolver_ip6[0]),
        word!(control, resolver_ip6[1]),
        word!(control, resolver_ip6[2]),
        word!(control, resolver_ip6[3]),
    ];
    Some(Control {
        generation: word!(control, generation),
        level: word!(control, level),
        proxy_ip4: word!(control, proxy_ip4),
        proxy_ip6: ip6,
        proxy_port4: word!(control, proxy_port4),
        proxy_port6: word!(control, proxy_port6),
        resolver_ip4: word!(control, resolver_ip4),
        resolver_ip6,
        resolver_port4: word!(control, resolver_port4),
        resolver_port6: word!(control, resolver_port6),
        resolver_slots: word!(control, resolver_slots),
    })
}

#[inline(always)]
fn now_ns() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_ktime_get_boot_ns() }
}

/// The valid kind of a leaf's entry, or why there is none.
#[inline(always)]
fn kind_of(control: &Control, leaf: u64) -> Result<u32, Reason> {
    if leaf == 0 || control.generation == 0 {
        return Err(Reason::NoEntry);
    }
    // SAFETY: the element may be reused while it is read; it is compared with its key below.
    let Some(entry) = (unsafe { LEAVES.get(leaf) }) else { return Err(Reason::NoEntry) };
    let (generation, deadline_ns, kind) = (entry.generation, entry.deadline_ns, entry.kind);
    if word!(entry as *const LeafEntry, leaf) != leaf {
        return Err(Reason::NoEntry);
    }
    if generation != control.generation {
        return Err(Reason::ForeignGeneration);
    }
    let now = now_ns();
    let Some(heartbeat) = HEARTBEAT.get_ptr(0) else { return Err(Reason::HeartbeatStopped) };
    // SAFETY: an element of an array map is there as long as the map.
    let heartbeat = unsafe { core::ptr::read_volatile(heartbeat) };
    if heartbeat > now + HEARTBEAT_SKEW_NS || heartbeat + HEARTBEAT_LIMIT_NS < now {
        return Err(Reason::HeartbeatStopped);
    }
    if deadline_ns <= now {
        return Err(Reason::Expired);
    }
    match kind {
        KIND_NONE | KIND_PROXY_ONLY | KIND_ALLOWLIST => Ok(kind),
        _ => Err(Reason::NoEntry),
    }
}

#[inline(always)]
fn current_leaf(control: &Control) -> u64 {
    // SAFETY: a helper with a scalar argument; it gives 0 where there is no such ancestor.
    unsafe { bpf_get_current_ancestor_cgroup_id(control.level as i32) }
}

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    carry::on_connect(&ctx, Hook::Connect4, packet::destination4(&ctx))
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    carry::on_connect(&ctx, Hook::Connect6, packet::destination6(&ctx))
}

#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    query::on_sendmsg(&ctx, Hook::Sendmsg4, packet::destination4(&ctx))
}

#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    query::on_sendmsg(&ctx, Hook::Sendmsg6, packet::destination6(&ctx))
}

// The next four only say what the client expects to be told; the kernel gives them no way to refuse.

#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    carry::on_getpeername(&ctx, false, packet::destination4(&ctx));
    ALLOW
}

#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    carry::on_getpeername(&ctx, true, packet::destination6(&ctx));
    ALLOW
}

#[cgroup_sock_addr(recvmsg4)]
pub fn recvmsg4(ctx: SockAddrContext) -> i32 {
    query::on_recvmsg(&ctx, false, packet::destination4(&ctx));
    ALLOW
}

#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(ctx: SockAddrContext) -> i32 {
    query::on_recvmsg(&ctx, true, packet::destination6(&ctx));
    ALLOW
}

/// What is kept on a socket that was made in a leaf.
#[inline(always)]
fn client(sk: *mut bpf_sock) -> Option<*mut ClientSocket> {
    if sk.is_null() {
        return None;
    }
    // SAFETY: a socket of the context; no value is made.
    let stored =
        unsafe { bpf_sk_storage_get((&raw const CLIENTS).cast_mut().cast(), sk.cast(), core::ptr::null_mut(), 0) };
    if stored.is_null() { None } else { Some(stored.cast()) }
}

/// The same, when the socket was made in this leaf.
#[inline(always)]
fn client_of(sk: *mut bpf_sock, leaf: u64) -> Result<*mut ClientSocket, Reason> {
    let Some(stored) = client(sk) else { return Err(Reason::ForeignSocket) };
    // SAFETY: checked for null above.
    let made_in = unsafe { (*stored).leaf };
    if made_in == leaf { Ok(stored) } else { Err(Reason::ForeignSocket) }
}

#[cgroup_sock(sock_create)]
pub fn sock_create(ctx: SockContext) -> i32 {
    let family = word!(ctx.sock, family);
    let kind = word!(ctx.sock, type_);
    let protocol = word!(ctx.sock, protocol);
    let Some(control) = control() else { return DENY };
    let leaf = current_leaf(&control);
    let usual = (kind == SOCK_STREAM && protocol == IPPROTO_TCP) || (kind == SOCK_DGRAM && protocol == IPPROTO_UDP);
    let verdict = match kind_of(&control, leaf) {
        Err(reason) => Err(reason),
        Ok(_) if !usual || (family != AF_INET && family != AF_INET6) => Err(Reason::SocketKind),
        Ok(_) => remember(&ctx, leaf),
    };
    match verdict {
        Ok(()) => ALLOW,
        Err(reason) => {
            let to = packet::Endpoint::NONE;
            refuse(&Refusal { leaf, hook: Hook::SockCreate, reason, family, protocol, to })
        }
    }
}

#[inline(always)]
fn remember(ctx: &SockContext, leaf: u64) -> Result<(), Reason> {
    // SAFETY: the context is the socket; without a value the kernel makes one of zeroes.
    unsafe {
        let stored = bpf_sk_storage_get(
            (&raw const CLIENTS).cast_mut().cast(),
            ctx.sock.cast(),
            core::ptr::null_mut(),
            u64::from(BPF_SK_STORAGE_GET_F_CREATE),
        )
        .cast::<ClientSocket>();
        if stored.is_null() {
            return Err(Reason::MapFull);
        }
        (*stored).netns_cookie = bpf_get_netns_cookie(ctx.sock.cast());
        (*stored).leaf = leaf;
    }
    Ok(())
}

/// Runs in a cgroup that the gate made to find out how deep a leaf is. It records and refuses.
#[cgroup_sock(sock_create)]
pub fn probe_level(_ctx: SockContext) -> i32 {
    // No loop: without CAP_PERFMON, the verifier of Linux 6.1 also follows what a processor might guess, and there a
    // loop that has ended goes on for ever.
    macro_rules! note_level {
        ($($level:literal)+) => {
            $(
                // SAFETY: a helper with a scalar argument.
                let id = unsafe { bpf_get_current_ancestor_cgroup_id($level) };
                let _ = PROBE.set($level, id, 0);
            )+
        };
    }
    const _: () = assert!(MAX_LEVEL == 32);
    note_level!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31);
    DENY
}

#[cgroup_skb(egress)]
pub fn egress(ctx: SkBuffContext) -> i32 {
    on_packet(&ctx, Hook::Egress)
}

#[cgroup_skb(ingress)]
pub fn ingress(ctx: SkBuffContext) -> i32 {
    on_packet(&ctx, Hook::Ingress)
}

#[inline(always)]
fn on_packet(ctx: &SkBuffContext, hook: Hook) -> i32 {
    let Some(control) = control() else { return DENY };
    // SAFETY: the context is the packet, and it has a socket: a cgroup program runs for no other.
    let leaf = unsafe { bpf_skb_ancestor_cgroup_id(ctx.skb.skb, control.level as i32) };
    let header = packet::parse(ctx, hook);
    let verdict = match kind_of(&control, leaf) {
        Err(reason) => Err(reason),
        Ok(KIND_NONE) => Err(Reason::ProfileNone),
        Ok(_) if !header.readable => Err(Reason::Malformed),
        Ok(kind) if header.protocol == IPPROTO_UDP => query::on_packet(ctx, hook, &control, leaf, kind, &header),
        Ok(_) if header.protocol != IPPROTO_TCP => Err(Reason::SocketKind),
        Ok(_) if !header.peer.is_proxy(&control) => Err(Reason::NotTheProxy),
        Ok(_) => Ok(()),
    };
    match verdict {
        Ok(()) => {
            refuse::count_wire(leaf, hook, word!(ctx.skb.skb, len));
            ALLOW
        }
        Err(reason) => {
            refuse(&Refusal { leaf, hook, reason, family: header.family, protocol: header.protocol, to: header.peer })
        }
    }
}

/// On `actions`: who is about to connect, and what a flow carried when it ends.
#[sock_ops]
pub fn flow_client(ctx: SockOpsContext) -> u32 {
    flow::on_client(&ctx);
    1
}

/// On the gate's own cgroup: moves the record of who connects onto the accepted socket.
#[sock_ops]
pub fn flow_gate(ctx: SockOpsContext) -> u32 {
    flow::on_gate(&ctx);
    1
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
