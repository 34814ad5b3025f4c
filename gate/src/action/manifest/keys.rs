//! Keys that no manifest has.

use serde_json::Value;

use super::Warning;

/// What may stand at a place. `Open` is what has keys of the author's own choosing.
enum Known {
    Keys(&'static [(&'static str, Known)]),
    Each(&'static Known),
    Open,
}

use Known::{Each, Keys, Open};

const MANIFEST: Known = Keys(&[
    ("action_id", Open),
    ("version", Open),
    ("provider_module_digest", Open),
    ("required_imports", Open),
    ("template", Keys(&[("method", Open), ("url_template", Open), ("headers", Open), ("body_template", Open)])),
    (
        "command",
        Keys(&[
            ("argv", Open),
            ("env", Open),
            ("stdin", Open),
            ("files", Each(&Keys(&[("path", Open), ("sha256", Open)]))),
            ("rootfs", Open),
        ]),
    ),
    (
        "io",
        Keys(&[
            ("request_schema", Open),
            ("response_schema", Open),
            ("max_request_bytes", Open),
            ("max_response_bytes", Open),
        ]),
    ),
    (
        "resource_limits",
        Keys(&[
            ("memory_mb", Open),
            ("timeout_seconds", Open),
            ("max_io_calls", Open),
            ("fuel", Open),
            ("max_host_response_bytes", Open),
        ]),
    ),
    (
        "egress",
        Keys(&[
            ("profile", Open),
            (
                "allowed_domains",
                Each(&Keys(&[
                    ("domain", Open),
                    ("cidr", Open),
                    ("ports", Open),
                    ("exact", Open),
                    ("protocol", Open),
                    ("tls", Open),
                    ("methods", Open),
                ])),
            ),
            ("allowed_methods", Open),
            ("on_unresolved", Open),
            ("mode", Open),
        ]),
    ),
    ("cost_usd_cents", Open),
    (
        "secrets",
        Each(&Keys(&[
            ("name", Open),
            ("required", Open),
            ("inject", Keys(&[("header", Open), ("format", Open), ("hosts", Open)])),
        ])),
    ),
    ("risk_level", Open),
    ("verifier_kind", Open),
    ("verification_config", Keys(&[("expected_status", Open), ("required_fields", Open)])),
    ("declared_side_effects", Open),
    ("required_scopes", Open),
    ("tags", Open),
]);

/// A warning for every key that this build does not know. In `command`, domain entries and `inject` an unknown key is an
/// error before this, because it could only have narrowed something.
pub(super) fn unknown(manifest: &Value, text: &str) -> Vec<Warning> {
    let mut found = Vec::new();
    walk(manifest, &MANIFEST, "", &mut found);
    found
        .into_iter()
        .map(|(path, key)| Warning { line: line_of(text, &key), what: format!("unknown key {path:?}") })
        .collect()
}

/// Every key, as the documentation writes it: `egress.allowed_domains[].ports`.
#[cfg(test)]
pub(super) fn paths() -> Vec<String> {
    fn below(known: &Known, path: &str, paths: &mut Vec<String>) {
        match known {
            Open => {}
            Each(known) => below(known, &format!("{path}[]"), paths),
            Keys(keys) => {
                for (name, known) in *keys {
                    let path = if path.is_empty() { (*name).to_owned() } else { format!("{path}.{name}") };
                    below(known, &path, paths);
                    paths.push(path);
                }
            }
        }
    }
    let mut paths = Vec::new();
    below(&MANIFEST, "", &mut paths);
    paths
}

fn walk(value: &Value, known: &Known, path: &str, found: &mut Vec<(String, String)>) {
    match (known, value) {
        (Keys(keys), Value::Object(members)) => {
            for (key, member) in members {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                match keys.iter().find(|(name, _)| name == key) {
                    Some((_, below)) => walk(member, below, &path, found),
                    None => found.push((path, key.clone())),
                }
            }
        }
        (Each(known), Value::Array(items)) => {
            for (at, item) in items.iter().enumerate() {
                walk(item, known, &format!("{path}[{at}]"), found);
            }
        }
        _ => {}
    }
}

/// The first line that begins with the key: where a reader would look.
fn line_of(text: &str, key: &str) -> Option<u64> {
    let at = text.lines().position(|line| {
        let line = line.trim_start().trim_start_matches("- ").trim_start_matches(['"', '\'']);
        line.strip_prefix(key).is_some_and(|rest| rest.trim_start_matches(['"', '\'']).trim_start().starts_with(':'))
    })?;
    u64::try_from(at).ok().map(|at| at + 1)
}
