//! docs/limits.md against the code: every row has the value of what it names, and every bound that the code has is in a row.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use latchgate::config::{Config, ConfineProfile};
use latchgate::egress::{names, proxy};

/// Constants whose names look like a bound's, and that bound nothing that grows with what somebody sends.
const NO_BOUNDS: [(&str, &str); 16] = [
    ("action/canonical/strict::MAX_DEPTH", "of one JSON value, within a body that is bounded"),
    ("auth/lease::MAX_TTL_SECONDS", "stands as auth.lease_ttl_seconds"),
    ("egress/client_hello::MAX_FRAGMENT", "of the format (RFC 8446 §5.1)"),
    ("egress/flows::DEFAULT_LIMIT", "what an answer has when nobody says how much"),
    ("egress/names/message::MAX_DATAGRAM_BYTES", "of an answer, which is made here"),
    ("egress/terminate::KEPT_TIME", "how long a certificate is used"),
    ("sandbox/protocol::DETAIL_MAX_BYTES", "of a message between the gate's own processes"),
    ("doctor/inflate::MAX_BYTES", "of the kernel's own configuration, which doctor reads"),
    ("selftest/targets::MAX_UNIX_PATH", "of the format (unix(7))"),
    ("ledger/record::MAX_INTEGER", "what JSON can say"),
    ("ledger/record::MAX_DEPTH", "of one JSON value, within a record that is bounded"),
    ("ledger/verify::MAX_PROBLEMS", "of a report"),
    ("sandbox/namespace::MAX_SOCKETS", "follows from the slots"),
    ("sandbox/spawner::KEPT", "capabilities"),
    ("server/patient::LIMIT", "of a test"),
    ("egress-ebpf::MAX_LEVEL", "of the cgroup tree"),
];

#[test]
fn the_document_has_every_bound_with_its_value_and_no_other() {
    let mut code = config();
    code.extend(defaults());
    let mut constants = constants();
    for (name, _) in NO_BOUNDS {
        assert!(constants.remove(name).is_some(), "{name} is not there any more");
    }
    code.extend(constants);
    let document = document();
    let (in_code, written): (BTreeSet<_>, BTreeSet<_>) = (code.keys().collect(), document.keys().collect());
    let missing: Vec<_> = in_code.difference(&written).map(|name| (*name, code[*name])).collect();
    let unknown: Vec<_> = written.difference(&in_code).collect();
    assert!(
        missing.is_empty() && unknown.is_empty(),
        "not in docs/limits.md: {missing:#?}\nnot in the code: {unknown:#?}"
    );
    for (name, value) in &code {
        assert_eq!(document[name], *value, "{name}");
    }
}

/// The bounds that a configuration sets, by key.
fn config() -> BTreeMap<String, u128> {
    let Config { auth, egress, sandbox, limits, .. } = Config::default();
    let profile = ConfineProfile::default();
    [
        ("auth.lease_ttl_seconds", u128::from(auth.lease_ttl_seconds)),
        ("auth.max_live_proofs_per_key", u128::from(auth.max_live_proofs_per_key)),
        ("egress.max_connections_per_execution", egress.max_connections_per_execution as u128),
        ("egress.connections_burst", u128::from(egress.connections_burst)),
        ("egress.connections_per_second", u128::from(egress.connections_per_second)),
        ("egress.max_bytes_per_execution", u128::from(egress.max_bytes_per_execution)),
        ("sandbox.uid_count", u128::from(sandbox.uid_count)),
        ("sandbox.max_processes", u128::from(sandbox.max_processes)),
        ("sandbox.scratch_bytes", u128::from(sandbox.scratch_bytes)),
        ("sandbox.stderr_bytes", u128::from(sandbox.stderr_bytes)),
        ("sandbox.max_concurrent", sandbox.max_concurrent as u128),
        ("sandbox.max_waiting", sandbox.max_waiting as u128),
        ("profiles.NAME.memory_mb", u128::from(profile.memory_mb) << 20),
        ("profiles.NAME.max_processes", u128::from(profile.max_processes)),
        ("limits.max_request_bytes", limits.max_request_bytes as u128),
        ("limits.max_body_bytes_in_flight", limits.max_body_bytes_in_flight as u128),
        ("limits.max_connections", limits.max_connections as u128),
        ("limits.header_timeout_seconds", u128::from(limits.header_timeout_seconds)),
        ("limits.body_timeout_seconds", u128::from(limits.body_timeout_seconds)),
        ("limits.write_timeout_seconds", u128::from(limits.write_timeout_seconds)),
        ("limits.drain_seconds", u128::from(limits.drain_seconds)),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

/// A numeric key of the configuration that is not above would be a bound that this test does not know.
#[test]
fn every_number_of_the_configuration_is_looked_at() {
    let text = include_str!("../../docs/configuration.md");
    let known = config();
    for line in text.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").collect();
        let number = cells.get(1).is_some_and(|default| default.trim().starts_with(|c: char| c.is_ascii_digit()));
        let keys = cells[0].trim().trim_matches('`');
        if !number {
            continue;
        }
        let (section, _) = keys.split_once('.').unwrap();
        for key in keys.split("`, `") {
            let key = if key.starts_with('.') { format!("{section}{key}") } else { key.to_owned() };
            // Where the range of uids begins is no bound.
            assert!(known.contains_key(&key) || key == "sandbox.uid_base", "{key} is not in config()");
        }
    }
}

/// Bounds of the proxy and of the resolver that nobody configures.
fn defaults() -> BTreeMap<String, u128> {
    let (proxy, names) = (proxy::Limits::default(), names::Limits::default());
    [
        ("proxy.connections_per_execution", proxy.connections_per_execution as u128),
        ("proxy.head_time", proxy.head_time.as_millis()),
        ("proxy.connect_time", proxy.connect_time.as_millis()),
        ("proxy.dns_time", proxy.dns_time.as_millis()),
        ("proxy.idle_time", proxy.idle_time.as_millis()),
        ("proxy.connection_time", proxy.connection_time.as_millis()),
        ("resolver.names_per_execution", names.names_per_execution as u128),
        ("resolver.queries_burst", u128::from(names.queries_burst)),
        ("resolver.queries_per_second", u128::from(names.queries_per_second)),
        ("resolver.records_per_execution", names.records_per_execution as u128),
        ("resolver.stream_time", names.stream_time.as_millis()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

/// Constants that are named like bounds, by file and name. Durations are in milliseconds.
fn constants() -> BTreeMap<String, u128> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    collect(&root.join("src"), &mut files);
    let mut found = BTreeMap::new();
    for path in files {
        let place = path.strip_prefix(root.join("src")).unwrap().with_extension("");
        read(&path, &place.display().to_string(), &mut found);
    }
    read(&root.join("../egress-ebpf/src/lib.rs"), "egress-ebpf", &mut found);
    assert!(found.len() > 40, "the search finds them: {found:?}");
    found
}

fn collect(directory: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() && !["tests", "cli", "attempts"].contains(&name) {
            collect(&path, files);
        } else if name.ends_with(".rs") && !["tests.rs", "testing.rs"].contains(&name) {
            files.push(path);
        }
    }
}

/// What a bound is called.
const BOUNDS: [&str; 10] =
    ["MAX", "KEPT", "LEAF", "LIMIT", "STRANGERS", "QUEUE", "BURST", "PATIENCE", "GRACE", "AGAIN"];

fn read(path: &Path, place: &str, found: &mut BTreeMap<String, u128>) {
    let text = std::fs::read_to_string(path).unwrap();
    for line in text.lines() {
        let Some((_, rest)) = line.split_once("const ") else { continue };
        let Some((name, rest)) = rest.split_once(": ") else { continue };
        let Some((kind, value)) = rest.split_once(" = ") else { continue };
        let words: Vec<&str> = name.split('_').collect();
        let bound = BOUNDS.iter().any(|word| words.contains(word))
            || ["_PER_SECOND", "_INODES", "_BUFFER", "START_TIME"].iter().any(|end| name.ends_with(end))
            || (place == "pipeline/dispatch/attempts");
        let counts = ["usize", "u64", "u32", "u16", "i64", "Duration"].contains(&kind);
        if bound && counts && name.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_') {
            let value = value.split(';').next().unwrap();
            // What is not plain arithmetic must be among NO_BOUNDS, or the comparison fails.
            found.insert(format!("{place}::{name}"), arithmetic(value).unwrap_or(u128::MAX));
        }
    }
}

/// Sums, products and shifts of whole numbers, and durations made of those.
fn arithmetic(text: &str) -> Option<u128> {
    let text = text.trim();
    for (make, factor) in [("Duration::from_secs(", 1000), ("Duration::from_millis(", 1)] {
        if let Some(inner) = text.strip_prefix(make) {
            return Some(arithmetic(inner.strip_suffix(')')?)? * factor);
        }
    }
    if let Some((left, right)) = text.split_once(" << ") {
        return Some(arithmetic(left)? << arithmetic(right)?);
    }
    if let Some((left, right)) = text.split_once(" + ") {
        return Some(arithmetic(left)? + arithmetic(right)?);
    }
    if let Some((left, right)) = text.split_once(" * ") {
        return Some(arithmetic(left)? * arithmetic(right)?);
    }
    text.replace('_', "").parse().ok()
}

/// The rows of docs/limits.md: `name`, and its value in the smallest unit (bytes, milliseconds where the code has a
/// duration, seconds where the name says so, or a count).
fn document() -> BTreeMap<String, u128> {
    let text = include_str!("../../docs/limits.md");
    let mut rows = BTreeMap::new();
    for line in text.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [name, value, unit, what] = cells.as_slice() else { panic!("four cells: {line}") };
        assert!(!what.is_empty(), "what happens: {line}");
        let number: u128 = value.replace(' ', "").parse().unwrap_or_else(|_| panic!("a number: {line}"));
        let factor = match *unit {
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            "s" if !name.contains("seconds") && !name.contains("SECONDS") => 1000,
            "bytes" | "ms" | "s" | "count" | "per second" | "ns" => 1,
            other => panic!("{other:?} is no unit: {line}"),
        };
        let name = name.trim_matches('`').to_owned();
        assert!(rows.insert(name.clone(), number * factor).is_none(), "{name} is there twice");
    }
    rows
}

#[test]
fn the_arithmetic_is_right() {
    for (text, value) in [
        ("10_000", Some(10_000)),
        ("64 * 1024", Some(65_536)),
        ("16 << 10", Some(16_384)),
        ("Duration::from_secs(24 * 3600)", Some(86_400_000)),
        ("2 * (1 + MAX)", None),
    ] {
        assert_eq!(arithmetic(text), value, "{text}");
    }
}
