//! Which leaf a connection comes from, and how much payload it carried.

use core::mem::MaybeUninit;
use core::ptr::write_volatile;

use aya_ebpf::bindings::{
    BPF_EXIST, BPF_NOEXIST, BPF_SK_STORAGE_GET_F_CREATE, BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB,
    BPF_SOCK_OPS_PARSE_ALL_HDR_OPT_CB_FLAG, BPF_SOCK_OPS_PARSE_HDR_OPT_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB,
    BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, bpf_sock,
};
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_sk_storage_get, bpf_tcp_sock};
use aya_ebpf::programs::SockOpsContext;

use egress_ebpf::{
    CONNECTION_CLOSED, CONNECTION_ENDING, CONNECTION_FAILED, CONNECTION_OPEN, Connection, ConnectionKey, Destination,
    MAX_CONNECTIONS_PER_LEAF, NO_NUMBER,
};

use crate::inbound;
use crate::packet::Endpoint;
use crate::refuse::{Refusal, add, counts_of, note, take_number};
use crate::{
    ACCEPTED, AF_INET, AF_INET6, AcceptedSocket, CONNECTIONS, COUNTS, FLOWS, FlowKey, FlowRecord, Hook, IPPROTO_TCP,
    MAPPED_WORD, Reason, client, now_ns, word,
};

const TCP_ESTABLISHED: u32 = 1;
const TCP_SYN_SENT: u32 = 2;
const TCP_FIN_WAIT1: u32 = 4;
const TCP_FIN_WAIT2: u32 = 5;
const TCP_CLOSE: u32 = 7;
const TCP_CLOSE_WAIT: u32 = 8;
const TCP_LAST_ACK: u32 = 9;
const TCP_CLOSING: u32 = 11;

const FIN: u32 = 1;

/// Writes a field of a value that is being made. Volatile, word by word: LLVM makes zeroes in a row a call of memset,
/// whose loop the verifier refuses.
macro_rules! set {
    ($to:expr, $field:ident $([$at:literal])? $(.$inner:ident $([$inner_at:literal])?)?, $value:expr) => {
        let value = $value;
        // SAFETY: `to` points to a value of the function's own.
        unsafe { write_volatile(&raw mut (*$to).$field $([$at])? $(.$inner $([$inner_at])?)?, value) };
    };
}

#[inline(always)]
fn socket(ctx: &SockOpsContext) -> Option<*mut bpf_sock> {
    // SAFETY: a field of the context; null when the socket is not a full one.
    let sk = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    if sk.is_null() { None } else { Some(sk) }
}

/// The two ends of the context's socket: (local address, local port, remote address, remote port).
#[inline(always)]
fn ends(ctx: &SockOpsContext) -> ([u32; 4], u32, [u32; 4], u32) {
    let local4 = word!(ctx.ops, local_ip4);
    let remote4 = word!(ctx.ops, remote_ip4);
    let local6 = [
        word!(ctx.ops, local_ip6[0]),
        word!(ctx.ops, local_ip6[1]),
        word!(ctx.ops, local_ip6[2]),
        word!(ctx.ops, local_ip6[3]),
    ];
    let remote6 = [
        word!(ctx.ops, remote_ip6[0]),
        word!(ctx.ops, remote_ip6[1]),
        word!(ctx.ops, remote_ip6[2]),
        word!(ctx.ops, remote_ip6[3]),
    ];
    let local_port = word!(ctx.ops, local_port);
    // The kernel gives the port in network byte order in the upper half of a little-endian word.
    let remote_port = u32::from_be(word!(ctx.ops, remote_port));
    // An IPv6 socket that speaks IPv4 has the mapped address of its peer from the start, its own perhaps later.
    let mapped = remote6[0] == 0 && remote6[1] == 0 && remote6[2] == MAPPED_WORD;
    if word!(ctx.ops, family) == AF_INET6 && !mapped {
        (local6, local_port, remote6, remote_port)
    } else {
        ([0, 0, MAPPED_WORD, local4], local_port, [0, 0, MAPPED_WORD, remote4], remote_port)
    }
}

#[inline(always)]
fn cookie(ctx: &SockOpsContext) -> u64 {
    // SAFETY: the context is what the helper asks for.
    unsafe { bpf_get_netns_cookie(ctx.ops.cast()) }
}

#[inline(always)]
fn socket_cookie(ctx: &SockOpsContext) -> u64 {
    // SAFETY: the context is what the helper asks for.
    unsafe { bpf_get_socket_cookie(ctx.ops.cast()) }
}

#[inline(always)]
fn key_of_client(ctx: &SockOpsContext) -> FlowKey {
    let (client_ip, client_port, server_ip, server_port) = ends(ctx);
    FlowKey { netns_cookie: cookie(ctx), client_ip, server_ip, client_port, server_port }
}

#[inline(always)]
pub fn on_client(ctx: &SockOpsContext) {
    match word!(ctx.ops, op) {
        BPF_SOCK_OPS_TCP_CONNECT_CB => begin(ctx),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => {
            let Some(sk) = socket(ctx) else { return };
            let Some(stored) = client(sk) else { return };
            // SAFETY: checked for null above; the counter is a field of a map's value.
            unsafe {
                let Some(counts) = counts_of((*stored).leaf) else { return };
                add(&raw mut (*counts).connections, 1);
            }
        }
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => {
            if let Some(sk) = socket(ctx) {
                inbound::accepted(sk);
            }
        }
        BPF_SOCK_OPS_PARSE_HDR_OPT_CB => look_for_fin(ctx),
        BPF_SOCK_OPS_STATE_CB => {
            let old = word!(ctx.ops, __bindgen_anon_1.args[0]);
            let new = word!(ctx.ops, __bindgen_anon_1.args[1]);
            if new == TCP_FIN_WAIT1 {
                // From here on the state alone no longer says whether the peer's FIN has come.
                let flags = BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_PARSE_ALL_HDR_OPT_CB_FLAG;
                let _ = ctx.set_cb_flags(flags as i32);
            }
            if new == TCP_FIN_WAIT1 || new == TCP_LAST_ACK {
                figure(ctx, old, CONNECTION_ENDING);
            } else if new == TCP_CLOSE {
                figure(ctx, old, if old == TCP_SYN_SENT { CONNECTION_FAILED } else { CONNECTION_CLOSED });
            }
        }
        _ => {}
    }
}

/// The source port is known and the first packet has not left.
#[inline(always)]
fn begin(ctx: &SockOpsContext) {
    let Some(sk) = socket(ctx) else { return };
    let Some(stored) = client(sk) else { return };
    // SAFETY: checked for null above. The connect that wrote the destination holds the socket's lock still.
    let (leaf, original) = unsafe {
        (*stored).fin_seen = 0;
        (*stored).number = NO_NUMBER;
        ((*stored).leaf, (*stored).original)
    };
    let Some(counts) = counts_of(leaf) else { return };
    // SAFETY: a field of a map's value.
    let number = take_number(unsafe { &raw mut (*counts).flows_begun });
    let key = key_of_client(ctx);
    let number = if write_down(ctx, &key, leaf, number, original) { number } else { NO_NUMBER };
    if number == NO_NUMBER {
        // SAFETY: as above.
        add(unsafe { &raw mut (*counts).connections_lost }, 1);
    }
    // SAFETY: as above.
    unsafe { (*stored).number = number };
    let record = FlowRecord { key, leaf, number, original };
    // Without the end of the flow its record would stay, so it gets none: the gate then gives no service.
    if ctx.set_cb_flags(BPF_SOCK_OPS_STATE_CB_FLAG as i32).is_err() || FLOWS.insert(key, record, 0).is_err() {
        let family = word!(ctx.ops, family);
        let to = if family == AF_INET { Endpoint::v4(key.server_ip[3], 0) } else { Endpoint::NONE };
        note(&Refusal { leaf, hook: Hook::SockOps, reason: Reason::MapFull, family, protocol: IPPROTO_TCP, to });
    }
}

/// Makes the record of a connection. Without one it is served all the same, and the receipt says that a figure is missing.
#[inline(always)]
fn write_down(ctx: &SockOpsContext, key: &FlowKey, leaf: u64, number: u64, original: Destination) -> bool {
    // A leaf without an entry shares its counters, and so its numbers, with others.
    if number >= MAX_CONNECTIONS_PER_LEAF || COUNTS.get_ptr(leaf).is_none() {
        return false;
    }
    let mut record = MaybeUninit::<Connection>::uninit();
    let to = record.as_mut_ptr();
    set!(to, socket, socket_cookie(ctx));
    set!(to, netns_cookie, key.netns_cookie);
    set!(to, begun_ns, now_ns());
    set!(to, ended_ns, 0);
    set!(to, bytes_sent, 0);
    set!(to, bytes_received, 0);
    set!(to, client_ip[0], key.client_ip[0]);
    set!(to, client_ip[1], key.client_ip[1]);
    set!(to, client_ip[2], key.client_ip[2]);
    set!(to, client_ip[3], key.client_ip[3]);
    set!(to, client_port, key.client_port);
    set!(to, state, CONNECTION_OPEN);
    set!(to, original.address[0], original.address[0]);
    set!(to, original.address[1], original.address[1]);
    set!(to, original.address[2], original.address[2]);
    set!(to, original.address[3], original.address[3]);
    set!(to, original.family, original.family);
    set!(to, original.port, original.port);
    // SAFETY: every field was written.
    let record = unsafe { record.assume_init_ref() };
    CONNECTIONS.insert(ConnectionKey { leaf, number }, record, u64::from(BPF_NOEXIST)).is_ok()
}

/// Keeps where the peer's stream ends. FIN_WAIT2 goes to CLOSE with the peer's FIN or without (the socket becomes a
/// time-wait one either way), and `bytes_received` counts a FIN as a byte.
#[inline(always)]
fn look_for_fin(ctx: &SockOpsContext) {
    if word!(ctx.ops, skb_tcp_flags) & FIN == 0 {
        return;
    }
    let Some(sk) = socket(ctx) else { return };
    let Some(stored) = client(sk) else { return };
    let length = word!(ctx.ops, skb_len);
    // SAFETY: the verifier sees the comparison with the end of the packet before the reads.
    unsafe {
        let start = (*ctx.ops).__bindgen_anon_3.skb_data.cast::<u8>().cast_const();
        let end = (*ctx.ops).__bindgen_anon_4.skb_data_end.cast::<u8>().cast_const();
        if start.add(20) > end {
            return;
        }
        let sequence = u32::from_be_bytes([*start.add(4), *start.add(5), *start.add(6), *start.add(7)]);
        let header = u32::from(*start.add(12) >> 4) * 4;
        (*stored).fin_end = sequence.wrapping_add(length.wrapping_sub(header)).wrapping_add(1);
        (*stored).fin_seen = 1;
    }
}

/// What a connection has carried when it leaves the state `old`.
#[inline(always)]
fn figure(ctx: &SockOpsContext, old: u32, state: u32) {
    let Some(sk) = socket(ctx) else { return };
    let Some(stored) = client(sk) else { return };
    let is_over = state != CONNECTION_ENDING;
    if is_over {
        let _ = FLOWS.remove(key_of_client(ctx));
    }
    // SAFETY: `stored` was checked for null, and `sk` is the context's socket.
    let (leaf, number, fin_seen, fin_end, tcp) =
        unsafe { ((*stored).leaf, (*stored).number, (*stored).fin_seen, (*stored).fin_end, bpf_tcp_sock(sk)) };
    let Some(counts) = counts_of(leaf) else { return };
    let (mut sent, mut received) = (0, 0);
    if !tcp.is_null() {
        let (acked, arrived) = (word!(tcp, bytes_acked), word!(tcp, bytes_received));
        let all_acked = word!(tcp, snd_una) == word!(tcp, snd_nxt);
        let at_fin = fin_seen != 0 && fin_end == word!(tcp, rcv_nxt);
        // SYN and FIN count as a byte each in the sequence space (RFC 9293 §3.4). `bytes_acked` has the SYN; whether it
        // has the FIN, and `bytes_received` the peer's, follows from the state that the socket was in.
        let established = old == TCP_ESTABLISHED
            || old == TCP_FIN_WAIT1
            || old == TCP_FIN_WAIT2
            || old == TCP_CLOSE_WAIT
            || old == TCP_LAST_ACK
            || old == TCP_CLOSING;
        let our_fin = old == TCP_FIN_WAIT2 || ((old == TCP_LAST_ACK || old == TCP_CLOSING) && all_acked);
        let peer_fin = old == TCP_CLOSE_WAIT
            || old == TCP_LAST_ACK
            || old == TCP_CLOSING
            || ((old == TCP_FIN_WAIT1 || old == TCP_FIN_WAIT2) && at_fin);
        sent = acked.saturating_sub(established as u64 + our_fin as u64);
        received = arrived.saturating_sub(peer_fin as u64);
    }
    // SAFETY: fields of a map's value that was looked up in this run.
    unsafe {
        if is_over && !tcp.is_null() {
            add(&raw mut (*counts).bytes_sent, sent);
            add(&raw mut (*counts).bytes_received, received);
            add(&raw mut (*counts).flows_closed, 1);
        }
        if number != NO_NUMBER && !(!tcp.is_null() && amend(ctx, ConnectionKey { leaf, number }, state, sent, received))
        {
            add(&raw mut (*counts).connections_lost, 1);
        }
    }
}

/// Writes the figures into a connection's record, as a whole: the gate may be taking the record away meanwhile, and then
/// the element may be another connection's.
#[inline(always)]
fn amend(ctx: &SockOpsContext, key: ConnectionKey, state: u32, bytes_sent: u64, bytes_received: u64) -> bool {
    // SAFETY: read word by word, and what says whose it is last.
    let Some(held) = (unsafe { CONNECTIONS.get(key) }) else { return true };
    let held: *const Connection = held;
    let mut record = MaybeUninit::<Connection>::uninit();
    let to = record.as_mut_ptr();
    // Each word is written when it is read: many that wait are kept in halves of places on the stack that had a pointer,
    // and the verifier refuses that.
    set!(to, netns_cookie, word!(held, netns_cookie));
    set!(to, begun_ns, word!(held, begun_ns));
    set!(to, ended_ns, now_ns());
    let ended_ns = word!(held, ended_ns);
    if ended_ns != 0 {
        set!(to, ended_ns, ended_ns);
    }
    set!(to, bytes_sent, bytes_sent);
    set!(to, bytes_received, bytes_received);
    set!(to, client_ip[0], word!(held, client_ip[0]));
    set!(to, client_ip[1], word!(held, client_ip[1]));
    set!(to, client_ip[2], word!(held, client_ip[2]));
    set!(to, client_ip[3], word!(held, client_ip[3]));
    set!(to, client_port, word!(held, client_port));
    set!(to, state, state);
    set!(to, original.address[0], word!(held, original.address[0]));
    set!(to, original.address[1], word!(held, original.address[1]));
    set!(to, original.address[2], word!(held, original.address[2]));
    set!(to, original.address[3], word!(held, original.address[3]));
    set!(to, original.family, word!(held, original.family));
    set!(to, original.port, word!(held, original.port));
    set!(to, socket, word!(held, socket));
    // SAFETY: every field was written.
    let record = unsafe { record.assume_init_ref() };
    // One that was taken away, or is of a later admission, is nothing that is missing here.
    if record.socket != socket_cookie(ctx) {
        return true;
    }
    CONNECTIONS.insert(key, record, u64::from(BPF_EXIST)).is_ok() || CONNECTIONS.get_ptr(key).is_none()
}

#[inline(always)]
pub fn on_gate(ctx: &SockOpsContext) {
    if word!(ctx.ops, op) != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB {
        return;
    }
    let (server_ip, server_port, client_ip, client_port) = ends(ctx);
    let key = FlowKey { netns_cookie: cookie(ctx), client_ip, server_ip, client_port, server_port };
    // SAFETY: the element may be reused while it is read; what it says of its key is read last and compared.
    let Some(record) = (unsafe { FLOWS.get(key) }) else { return };
    let record: *const FlowRecord = record;
    let original = Destination {
        address: [
            word!(record, original.address[0]),
            word!(record, original.address[1]),
            word!(record, original.address[2]),
            word!(record, original.address[3]),
        ],
        family: word!(record, original.family),
        port: word!(record, original.port),
    };
    let mut accepted = AcceptedSocket { leaf: word!(record, leaf), number: word!(record, number), original };
    let same_client = word!(record, key.client_ip[0]) == key.client_ip[0]
        && word!(record, key.client_ip[1]) == key.client_ip[1]
        && word!(record, key.client_ip[2]) == key.client_ip[2]
        && word!(record, key.client_ip[3]) == key.client_ip[3]
        && word!(record, key.client_port) == key.client_port;
    if !same_client || word!(record, key.netns_cookie) != key.netns_cookie {
        return;
    }
    let _ = FLOWS.remove(key);
    let Some(sk) = socket(ctx) else { return };
    // SAFETY: the record outlives the call. When it cannot be stored the socket has none and gets no service.
    unsafe {
        bpf_sk_storage_get(
            (&raw const ACCEPTED).cast_mut().cast(),
            sk.cast(),
            (&raw mut accepted).cast(),
            u64::from(BPF_SK_STORAGE_GET_F_CREATE),
        );
    }
}
