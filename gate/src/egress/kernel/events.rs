//! Refusals, as the kernel program reports them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use aya::maps::{MapData, RingBuf};
use latchgate_egress_types as types;
use serde::Serialize;
use tokio::sync::broadcast;

use super::{KernelError, sys};
use crate::egress::LeafId;
use crate::time::Timestamp;

/// Events that a slow receiver may leave unread before it loses the oldest.
const CHANNEL: usize = 4_096;
const POLL_MS: i32 = 200;

/// One refusal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KernelEvent {
    /// Nanoseconds of CLOCK_BOOTTIME. Not for a receipt: after 104 days they are more than a JSON number holds.
    #[serde(skip)]
    pub at_ns: u64,
    pub time: Timestamp,
    #[serde(serialize_with = "leaf_number")]
    pub leaf: LeafId,
    pub hook: &'static str,
    /// `inet` or `inet6`; of the socket or packet, not of the address.
    pub family: &'static str,
    /// `tcp`, `udp` or the protocol's number.
    pub protocol: String,
    /// Where it wanted to go (for `ingress`: came from). None where the hook does not know.
    pub address: Option<IpAddr>,
    pub port: u16,
    pub reason: &'static str,
}

fn leaf_number<S: serde::Serializer>(leaf: &LeafId, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(leaf.0)
}

const fn hook_name(hook: types::Hook) -> &'static str {
    match hook {
        types::Hook::Connect4 => "connect4",
        types::Hook::Connect6 => "connect6",
        types::Hook::Sendmsg4 => "sendmsg4",
        types::Hook::Sendmsg6 => "sendmsg6",
        types::Hook::SockCreate => "sock_create",
        types::Hook::Egress => "egress",
        types::Hook::Ingress => "ingress",
        types::Hook::SockOps => "sock_ops",
    }
}

const fn reason_name(reason: types::Reason) -> &'static str {
    match reason {
        types::Reason::NoEntry => "no_entry",
        types::Reason::Expired => "expired",
        types::Reason::ForeignGeneration => "foreign_generation",
        types::Reason::HeartbeatStopped => "heartbeat_stopped",
        types::Reason::ProfileNone => "profile_none",
        types::Reason::NotTheProxy => "not_the_proxy",
        types::Reason::Datagram => "datagram",
        types::Reason::SocketKind => "socket_kind",
        types::Reason::ForeignSocket => "foreign_socket",
        types::Reason::Malformed => "malformed",
        types::Reason::MapFull => "map_full",
        types::Reason::TooManyFlows => "too_many_flows",
        types::Reason::NotInProfile => "not_in_profile",
        types::Reason::TooManyServers => "too_many_servers",
        types::Reason::TooManyQueries => "too_many_queries",
        types::Reason::QueryInFlight => "query_in_flight",
    }
}

/// Reads one record of the ring buffer. `None` for bytes that are not one.
pub fn parse(bytes: &[u8], now_ns: u64, now: Timestamp) -> Option<KernelEvent> {
    let (words, rest) = bytes.as_chunks::<4>();
    if !rest.is_empty() || size_of_val(bytes) != size_of::<types::Event>() {
        return None;
    }
    let word = |at: usize| words.get(at).copied().map(u32::from_ne_bytes);
    let long = |at: usize| Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    let (at_ns, leaf) = (long(0)?, long(8)?);
    let hook = types::Hook::ALL.into_iter().find(|hook| Some(*hook as u32) == word(4))?;
    let reason = types::Reason::ALL.into_iter().find(|reason| Some(*reason as u32) == word(5))?;
    let mut octets = [0_u8; 16];
    octets.copy_from_slice(bytes.get(32..48)?);
    let [a, b, c, d, ..] = octets;
    let address = match i32::try_from(word(12)?).ok()? {
        libc::AF_INET => Some(IpAddr::V4(Ipv4Addr::new(a, b, c, d))),
        libc::AF_INET6 => Some(IpAddr::V6(Ipv6Addr::from(octets))),
        _ => None,
    };
    let ago_ms = i64::try_from(now_ns.saturating_sub(at_ns) / 1_000_000).unwrap_or(0);
    Some(KernelEvent {
        at_ns,
        time: now.plus_millis(-ago_ms),
        leaf: LeafId(leaf),
        hook: hook_name(hook),
        family: match i32::try_from(word(6)?).ok()? {
            libc::AF_INET => "inet",
            libc::AF_INET6 => "inet6",
            _ => "other",
        },
        protocol: match i32::try_from(word(7)?).ok()? {
            libc::IPPROTO_TCP => "tcp".to_owned(),
            libc::IPPROTO_UDP => "udp".to_owned(),
            other => other.to_string(),
        },
        address,
        port: u16::try_from(word(13)?).ok()?,
        reason: reason_name(reason),
    })
}

/// The thread that takes events out of the ring buffer.
pub struct Reader {
    sender: broadcast::Sender<KernelEvent>,
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Reader {
    pub fn start(mut ring: RingBuf<MapData>) -> Result<Self, KernelError> {
        let (sender, _) = broadcast::channel(CHANNEL);
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::Builder::new()
            .name("kernel-events".into())
            .spawn({
                let (sender, stop) = (sender.clone(), Arc::clone(&stop));
                move || {
                    while !stop.load(Ordering::Relaxed) {
                        drain(&mut ring, &sender);
                        let _ = sys::wait_readable(ring.as_raw_fd(), POLL_MS);
                    }
                    drain(&mut ring, &sender);
                }
            })
            .map_err(KernelError::io("starting the reader of events"))?;
        Ok(Self { sender, stop, thread: Some(thread) })
    }

    pub fn subscribe(&self) -> broadcast::Receiver<KernelEvent> {
        self.sender.subscribe()
    }
}

fn drain(ring: &mut RingBuf<MapData>, sender: &broadcast::Sender<KernelEvent>) {
    while let Some(record) = ring.next() {
        match parse(&record, sys::boottime_ns(), Timestamp::now()) {
            Some(event) => {
                // Nobody listening is no error.
                let _ = sender.send(event);
            }
            None => tracing::error!("the kernel program reported something unreadable"),
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
