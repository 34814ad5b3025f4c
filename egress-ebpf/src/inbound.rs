//! Connections that others make to a leaf, at the ports that its entry lists. Nobody has to be asked before such a
//! socket answers, so its packets are what is held: a listener's SYN-ACK from a listed port, and whatever a socket sends
//! that the kernel itself says was accepted (`sock_ops`), from such a port. A socket that connects is none of these.

use aya_ebpf::bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock};
use aya_ebpf::helpers::generated::{bpf_sk_fullsock, bpf_sk_storage_get};
use aya_ebpf::programs::SkBuffContext;
use core::ptr::{null_mut, read_volatile, write_volatile};
use egress_ebpf::InboundKey;

use crate::packet::{self, Header};
use crate::refuse::{add, counts_of};
use crate::{ClientSocket, Hook, INBOUND, IPPROTO_TCP, client, word};

const TCP_LISTEN: u32 = 10;
const SYN_ACK: u8 = 0x12;

/// `ClientSocket::accepted` of a socket that was accepted, before and after it has sent something.
const ACCEPTED: u32 = 1;
const COUNTED: u32 = 2;

/// Whether the packet belongs to a connection that was made to a listed port of this leaf.
#[inline(always)]
pub fn passes(ctx: &SkBuffContext, hook: Hook, leaf: u64, header: &Header) -> bool {
    if !header.readable || header.protocol != IPPROTO_TCP || !is_listed(leaf, header.own.host_port()) {
        return false;
    }
    // SAFETY: fields of the context, and a helper that takes what is not null.
    let sk = unsafe {
        let sk = (*ctx.skb.skb).__bindgen_anon_2.sk;
        if sk.is_null() {
            return false;
        }
        bpf_sk_fullsock(sk)
    };
    if sk.is_null() {
        return false;
    }
    let out = matches!(hook, Hook::Egress);
    if word!(sk, state) == TCP_LISTEN {
        // Made in this leaf: a listener from elsewhere answers for nobody here.
        let Some(stored) = client(sk) else { return false };
        return word!(stored, leaf) == leaf && (!out || packet::tcp_flags(ctx, header.transport) & SYN_ACK == SYN_ACK);
    }
    let Some(stored) = client(sk) else { return false };
    let accepted = word!(stored, accepted);
    if accepted == 0 {
        return false;
    }
    // What leaves does so under the socket's lock, so that each connection is counted once.
    if out && accepted == ACCEPTED {
        // SAFETY: fields of map values that were checked for null.
        unsafe {
            write_volatile(&raw mut (*stored).accepted, COUNTED);
            if let Some(counts) = counts_of(leaf) {
                add(&raw mut (*counts).inbound, 1);
            }
        }
    }
    true
}

#[inline(always)]
fn is_listed(leaf: u64, port: u16) -> bool {
    let key = InboundKey { leaf, port: u32::from(port), reserved: 0 };
    // SAFETY: an element that is reused while it is read is another leaf's, and says so.
    match unsafe { INBOUND.get(key) } {
        // SAFETY: a map's value that was looked up in this run.
        Some(found) => unsafe { read_volatile(found) == leaf },
        None => false,
    }
}

/// At PASSIVE_ESTABLISHED, before the socket has sent anything. It has no leaf in it: it was made in none, so that it
/// connects nowhere if it is taken apart and used again.
#[inline(always)]
pub fn accepted(sk: *mut bpf_sock) {
    // SAFETY: a socket of the context; without a value the kernel makes one of zeroes. Where none can be made, the
    // socket sends nothing.
    unsafe {
        let stored = bpf_sk_storage_get(
            (&raw const crate::CLIENTS).cast_mut().cast(),
            sk.cast(),
            null_mut(),
            u64::from(BPF_SK_STORAGE_GET_F_CREATE),
        )
        .cast::<ClientSocket>();
        if !stored.is_null() {
            write_volatile(&raw mut (*stored).accepted, ACCEPTED);
        }
    }
}
