//! A gate that dies, is told to stop, loses its client or its disk: what ran is confined all the same, nothing of it is
//! left, and the ledger says what is known.
//!
//! Needs root, a v2 hierarchy and `/usr/bin/python3`.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used)]

#[path = "crash/disk.rs"]
mod disk;
#[path = "crash/drain.rs"]
mod drain;
#[path = "crash/killed.rs"]
mod killed;
#[path = "confinement/origin.rs"]
mod origin;

/// Python that asks the proxy by hand; `end` follows it.
fn asking(end: &str) -> String {
    format!("{}{end}", include_str!("confinement/ask.py"))
}

/// A profile of one name at one port.
fn reaching(name: &str, port: u16) -> String {
    format!("{{profile: proxy_allowlist, allowed_domains: [{{domain: {name}, ports: [{port}], exact: true}}]}}")
}

/// `origin.test` is at this address, and may be dialled.
fn origin_at(address: &str) -> String {
    format!("[egress]\nallow_addresses = [\"{address}/32\"]\n[egress.hosts]\n\"origin.test\" = [\"{address}\"]\n")
}
