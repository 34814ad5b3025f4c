//! A refusal: counted for its leaf, told to the gate.

use core::intrinsics::{AtomicOrdering, atomic_cxchg, atomic_xadd};
use core::mem::MaybeUninit;
use core::ptr::{read_volatile, write_volatile};

use crate::packet::Endpoint;
use crate::{COUNTS, Counts, DENY, EVENTS, Event, Hook, Reason, now_ns};
use egress_ebpf::EVENTS_PER_LEAF;

pub struct Refusal {
    pub leaf: u64,
    pub hook: Hook,
    pub reason: Reason,
    pub family: u32,
    pub protocol: u32,
    pub to: Endpoint,
}

#[inline(always)]
pub fn add(counter: *mut u64, amount: u64) {
    // SAFETY: points to an aligned word of a map's value; other CPUs add to it in the same way.
    // The target has no compare-and-swap, so `AtomicU64` has no `fetch_add` here.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(counter, amount) };
}

/// Adds one and gives what was there before.
#[inline(always)]
pub fn take_number(counter: *mut u64) -> u64 {
    // SAFETY: as in `add`.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(counter, 1) }
}

/// Writes `new` when `old` is there still.
#[inline(always)]
pub fn exchange(word: *mut u64, old: u64, new: u64) -> bool {
    // SAFETY: as in `add`.
    unsafe { atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(word, old, new).1 }
}

/// The counters of a leaf, or the common ones of what has no entry.
#[inline(always)]
pub fn counts_of(leaf: u64) -> Option<*mut Counts> {
    match COUNTS.get_ptr_mut(leaf) {
        Some(counts) => Some(counts),
        None => COUNTS.get_ptr_mut(0),
    }
}

/// Connections of a leaf that have begun and not ended.
#[inline(always)]
pub fn open_flows(leaf: u64) -> u64 {
    let Some(counts) = COUNTS.get_ptr(leaf) else { return u64::MAX };
    // SAFETY: fields of a map's value that was looked up in this run.
    unsafe {
        let closed = read_volatile(&raw const (*counts).flows_closed);
        let begun = read_volatile(&raw const (*counts).flows_begun);
        // A flow of a leaf that had this id's counters before may end later than it.
        if begun < closed { 0 } else { begun - closed }
    }
}

#[inline(always)]
pub fn note(refusal: &Refusal) {
    // What has no entry shares its counters: a limit there would silence all of it for good.
    let (counts, limit) = match COUNTS.get_ptr_mut(refusal.leaf) {
        Some(counts) => (counts, EVENTS_PER_LEAF),
        None => match COUNTS.get_ptr_mut(0) {
            Some(counts) => (counts, u64::MAX),
            None => return,
        },
    };
    // SAFETY: fields of a map's value that was looked up in this run.
    unsafe {
        let denied = match refusal.hook {
            Hook::Connect4 => &raw mut (*counts).denied[0],
            Hook::Connect6 => &raw mut (*counts).denied[1],
            Hook::Sendmsg4 => &raw mut (*counts).denied[2],
            Hook::Sendmsg6 => &raw mut (*counts).denied[3],
            Hook::SockCreate => &raw mut (*counts).denied[4],
            Hook::Egress => &raw mut (*counts).denied[5],
            Hook::Ingress => &raw mut (*counts).denied[6],
            Hook::SockOps => &raw mut (*counts).denied[7],
        };
        add(denied, 1);
        if read_volatile(&raw const (*counts).events) >= limit {
            add(&raw mut (*counts).events_lost, 1);
            return;
        }
        // Volatile, word by word: LLVM makes zeroes in a row a call of memset, whose loop the verifier refuses.
        let mut event = MaybeUninit::<Event>::uninit();
        let to = event.as_mut_ptr();
        write_volatile(&raw mut (*to).at_ns, now_ns());
        write_volatile(&raw mut (*to).leaf, refusal.leaf);
        write_volatile(&raw mut (*to).hook, refusal.hook as u32);
        write_volatile(&raw mut (*to).reason, refusal.reason as u32);
        write_volatile(&raw mut (*to).family, refusal.family);
        write_volatile(&raw mut (*to).protocol, refusal.protocol);
        write_volatile(&raw mut (*to).address[0], refusal.to.address[0]);
        write_volatile(&raw mut (*to).address[1], refusal.to.address[1]);
        write_volatile(&raw mut (*to).address[2], refusal.to.address[2]);
        write_volatile(&raw mut (*to).address[3], refusal.to.address[3]);
        write_volatile(&raw mut (*to).address_family, refusal.to.family);
        write_volatile(&raw mut (*to).port, u32::from(u16::from_be(refusal.to.port as u16)));
        let lost = EVENTS.output(event.assume_init_ref(), 0).is_err() as u64;
        // Both are added to: a choice between two counters would become an offset that is not constant.
        add(&raw mut (*counts).events, 1 - lost);
        add(&raw mut (*counts).events_lost, lost);
    }
}

#[inline(always)]
pub fn refuse(refusal: &Refusal) -> i32 {
    note(refusal);
    DENY
}

#[inline(always)]
pub fn count_wire(leaf: u64, hook: Hook, bytes: u32) {
    let Some(counts) = counts_of(leaf) else { return };
    // SAFETY: fields of a map's value that was looked up in this run.
    unsafe {
        match hook {
            Hook::Egress => add(&raw mut (*counts).wire_bytes_out, u64::from(bytes)),
            _ => add(&raw mut (*counts).wire_bytes_in, u64::from(bytes)),
        }
    }
}
