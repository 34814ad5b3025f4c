//! What an action can and cannot do, through the real gate: every refusal inside is paired with the same attempt where
//! nothing holds it. Everything goes to listeners on loopback that the test made.
//!
//! Needs root, a v2 hierarchy, `/usr/bin/python3`, perl and curl.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used)]

#[path = "confinement/ends.rs"]
mod ends;
#[path = "confinement/origin.rs"]
mod origin;
#[path = "confinement/proxy.rs"]
mod proxy;
#[path = "confinement/visible.rs"]
mod visible;
#[path = "confinement/ways_out.rs"]
mod ways_out;

/// Python that asks the proxy by hand; `end` follows it.
fn asking(end: &str) -> String {
    format!("{}{end}", include_str!("confinement/ask.py"))
}

/// A profile of these names, exactly, at one port.
fn reaching(names: &[&str], port: u16) -> String {
    let entries: Vec<String> =
        names.iter().map(|name| format!("{{domain: {name}, ports: [{port}], exact: true}}")).collect();
    format!("{{profile: proxy_allowlist, allowed_domains: [{}]}}", entries.join(", "))
}

const NOTHING: &str = "{profile: none}";
