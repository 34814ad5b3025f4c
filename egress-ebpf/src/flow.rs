//! Which leaf a connection comes from, and how much payload it carried.

use aya_ebpf::bindings::{
    BPF_SK_STORAGE_GET_F_CREATE, BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PARSE_ALL_HDR_OPT_CB_FLAG,
    BPF_SOCK_OPS_PARSE_HDR_OPT_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB,
    BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, bpf_sock,
};
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_sk_storage_get, bpf_tcp_sock};
use aya_ebpf::programs::SockOpsContext;

use egress_ebpf::Destination;

use crate::inbound;
use crate::packet::Endpoint;
use crate::refuse::{Refusal, add, counts_of, note};
use crate::{
    ACCEPTED, AF_INET, AF_INET6, AcceptedSocket, FLOWS, FlowKey, FlowRecord, Hook, IPPROTO_TCP, MAPPED_WORD, Reason,
    client, word,
};

const TCP_ESTABLISHED: u32 = 1;
const TCP_FIN_WAIT1: u32 = 4;
const TCP_FIN_WAIT2: u32 = 5;
const TCP_CLOSE: u32 = 7;
const TCP_CLOSE_WAIT: u32 = 8;
const TCP_LAST_ACK: u32 = 9;
const TCP_CLOSING: u32 = 11;

const FIN: u32 = 1;

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
            } else if new == TCP_CLOSE {
                end(ctx, old);
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
        ((*stored).leaf, (*stored).original)
    };
    let Some(counts) = counts_of(leaf) else { return };
    // SAFETY: a field of a map's value.
    add(unsafe { &raw mut (*counts).flows_begun }, 1);
    let key = key_of_client(ctx);
    let record = FlowRecord { key, leaf, original };
    // Without the end of the flow its record would stay, so it gets none: the gate then gives no service.
    if ctx.set_cb_flags(BPF_SOCK_OPS_STATE_CB_FLAG as i32).is_err() || FLOWS.insert(key, record, 0).is_err() {
        let family = word!(ctx.ops, family);
        let to = if family == AF_INET { Endpoint::v4(key.server_ip[3], 0) } else { Endpoint::NONE };
        note(&Refusal { leaf, hook: Hook::SockOps, reason: Reason::MapFull, family, protocol: IPPROTO_TCP, to });
    }
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

#[inline(always)]
fn end(ctx: &SockOpsContext, old: u32) {
    let Some(sk) = socket(ctx) else { return };
    let Some(stored) = client(sk) else { return };
    let _ = FLOWS.remove(key_of_client(ctx));
    // SAFETY: `stored` was checked for null, and `sk` is the context's socket.
    let (leaf, fin_seen, fin_end, tcp) =
        unsafe { ((*stored).leaf, (*stored).fin_seen, (*stored).fin_end, bpf_tcp_sock(sk)) };
    if tcp.is_null() {
        return;
    }
    let (acked, received) = (word!(tcp, bytes_acked), word!(tcp, bytes_received));
    let all_acked = word!(tcp, snd_una) == word!(tcp, snd_nxt);
    let at_fin = fin_seen != 0 && fin_end == word!(tcp, rcv_nxt);
    // SYN and FIN count as a byte each in the sequence space (RFC 9293 §3.4). `bytes_acked` has the SYN; whether it has
    // the FIN, and `bytes_received` the peer's, follows from the state that the socket was in.
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
    let beside_sent = established as u64 + our_fin as u64;
    let beside_received = peer_fin as u64;
    let Some(counts) = counts_of(leaf) else { return };
    // SAFETY: fields of a map's value that was looked up in this run.
    unsafe {
        if acked > beside_sent {
            add(&raw mut (*counts).bytes_sent, acked - beside_sent);
        }
        if received > beside_received {
            add(&raw mut (*counts).bytes_received, received - beside_received);
        }
        add(&raw mut (*counts).flows_closed, 1);
    }
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
    let mut accepted = AcceptedSocket { leaf: word!(record, leaf), original };
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
