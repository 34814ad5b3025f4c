//! The actions that a gate has: all of them load, or none does.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use serde_json::{Value, json};

use crate::action::manifest::{MAX_MANIFEST_BYTES, Manifest, Warning};

/// The manifests that are in the binary, with the names of their files.
pub const EMBEDDED: [(&str, &str); 8] = [
    ("http_fetch.yaml", include_str!("../../../definitions/manifests/http_fetch.yaml")),
    ("http_post.yaml", include_str!("../../../definitions/manifests/http_post.yaml")),
    ("http_put.yaml", include_str!("../../../definitions/manifests/http_put.yaml")),
    ("http_patch.yaml", include_str!("../../../definitions/manifests/http_patch.yaml")),
    ("http_delete.yaml", include_str!("../../../definitions/manifests/http_delete.yaml")),
    ("web_read.yaml", include_str!("../../../definitions/manifests/web_read.yaml")),
    ("github_read.yaml", include_str!("../../../definitions/manifests/github_read.yaml")),
    ("wikipedia_read.yaml", include_str!("../../../definitions/manifests/wikipedia_read.yaml")),
];

/// Where manifests come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Those in the binary.
    Embedded,
    /// Every `*.yaml` and `*.yml` of a directory, not of those below it.
    Directory(PathBuf),
}

/// Domains that a configuration adds to actions, by action id: entries as `egress.allowed_domains` has them.
pub type AddedDomains = BTreeMap<String, Vec<Value>>;

/// The actions, by id.
#[derive(Debug)]
pub struct Registry {
    actions: BTreeMap<String, Arc<Manifest>>,
    pins: BTreeMap<String, String>,
    warnings: Vec<Remark>,
}

/// Something about one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remark {
    pub file: String,
    pub line: Option<u64>,
    pub what: String,
}

/// Why the registry did not load: everything that is wrong, not only the first.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", problems.iter().map(Remark::to_string).collect::<Vec<_>>().join("\n"))]
pub struct LoadError {
    pub problems: Vec<Remark>,
}

/// `action_trust_verdict` of policy input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TrustVerdict {
    DigestOk,
    DigestMismatch,
    NotRegistered,
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}: {}", self.file, self.what),
            None => write!(f, "{}: {}", self.file, self.what),
        }
    }
}

impl Registry {
    /// Loads every manifest of every source. An action of a later source takes the place of one with the same id in an
    /// earlier source; twice in one source is an error.
    ///
    /// # Errors
    /// [`LoadError`] with file and line of everything that is wrong in any of them.
    pub fn load(sources: &[Source]) -> Result<Self, LoadError> {
        Self::load_with(sources, &AddedDomains::new())
    }

    /// The same, with domains added to some actions, as if they were written in their manifests: digests and profile
    /// hashes are of the result.
    ///
    /// # Errors
    /// [`LoadError`], also for an action that does not exist or whose egress profile is `none`.
    pub fn load_with(sources: &[Source], added: &AddedDomains) -> Result<Self, LoadError> {
        let (mut actions, mut warnings, mut problems) = (BTreeMap::new(), Vec::new(), Vec::new());
        for source in sources {
            let mut of_source: BTreeMap<String, (String, Arc<Manifest>)> = BTreeMap::new();
            for (file, base, text) in source.texts(&mut problems) {
                let manifest = match Manifest::parse_with(&text, base, added) {
                    Ok(manifest) => manifest,
                    Err(error) => {
                        problems.push(Remark { file, line: error.line, what: error.what });
                        continue;
                    }
                };
                let remark =
                    |warning: &Warning| Remark { file: file.clone(), line: warning.line, what: warning.what.clone() };
                warnings.extend(manifest.warnings.iter().map(remark));
                if let Some((first, _)) = of_source.get(&manifest.action_id) {
                    let what = format!("action_id {:?} is in {first} already", manifest.action_id);
                    problems.push(Remark { file, line: None, what });
                    continue;
                }
                of_source.insert(manifest.action_id.clone(), (file, Arc::new(manifest)));
            }
            actions.extend(of_source.into_iter().map(|(id, (_, manifest))| (id, manifest)));
        }
        // A manifest that did not load is not here, and is a problem already.
        if problems.is_empty() {
            problems.extend(added.keys().filter(|id| !actions.contains_key(*id)).map(|id| Remark {
                file: "(configuration)".to_owned(),
                line: None,
                what: format!("domains are added to {id:?}, and there is no such action"),
            }));
        }
        if problems.is_empty() {
            Ok(Self { actions, pins: BTreeMap::new(), warnings })
        } else {
            Err(LoadError { problems })
        }
    }

    /// Makes every warning an error: unknown keys, domains that cover the customers of a host, and so on.
    ///
    /// # Errors
    /// [`LoadError`] with every warning.
    pub fn strict(self) -> Result<Self, LoadError> {
        if self.warnings.is_empty() { Ok(self) } else { Err(LoadError { problems: self.warnings }) }
    }

    /// Arms `egress.mode: unsafe_audit` for the actions that `permitted` names. Until then a manifest that asks for it is
    /// held to its profile like every other.
    ///
    /// # Errors
    /// [`LoadError`] for an action that asks for it and is not permitted, and for a permission of no action's.
    pub fn permitting_audit(mut self, permitted: &BTreeSet<String>) -> Result<Self, LoadError> {
        let remark = |file: String, what: String| Remark { file, line: None, what };
        let mut problems: Vec<Remark> = permitted
            .iter()
            .filter(|id| !self.actions.contains_key(*id))
            .map(|id| {
                remark("(configuration)".to_owned(), format!("egress.permit_unsafe_audit: there is no action {id:?}"))
            })
            .collect();
        for (id, action) in self.actions.iter_mut().filter(|(_, action)| action.asks_for_audit) {
            if permitted.contains(id) {
                // The registry is new, so that nobody else has it yet.
                match Arc::get_mut(action) {
                    Some(action) => action.profile = Arc::new(action.profile.as_ref().clone().in_audit()),
                    None => problems.push(remark(format!("action {id}"), "is in use already".to_owned())),
                }
            } else {
                let what = "egress.mode: unsafe_audit lets through what the profile does not have, and this gate does not \
                            permit it: name the action in egress.permit_unsafe_audit, or take the mode away";
                problems.push(remark(format!("action {id}"), what.to_owned()));
            }
        }
        if problems.is_empty() { Ok(self) } else { Err(LoadError { problems }) }
    }

    /// The actions that are not held to their profiles.
    pub fn in_audit(&self) -> impl Iterator<Item = &str> {
        self.actions().filter(|action| action.profile.is_audit()).map(|action| action.action_id.as_str())
    }

    /// Holds actions to digests that an operator wrote down: one that differs is `digest_mismatch` to policy.
    pub fn with_pins(mut self, pins: BTreeMap<String, String>) -> Self {
        self.pins = pins;
        self
    }

    pub fn action(&self, id: &str) -> Option<&Arc<Manifest>> {
        self.actions.get(id)
    }

    pub fn actions(&self) -> impl Iterator<Item = &Arc<Manifest>> {
        self.actions.values()
    }

    /// The answer of `GET /v1/actions`.
    pub fn list(&self) -> Value {
        json!({ "actions": self.actions().map(|manifest| manifest.list_item()).collect::<Vec<_>>() })
    }

    pub fn warnings(&self) -> &[Remark] {
        &self.warnings
    }

    /// Whether the action with this id is the one that was meant.
    pub fn verdict(&self, id: &str) -> TrustVerdict {
        match (self.actions.get(id), self.pins.get(id)) {
            (None, _) => TrustVerdict::NotRegistered,
            (Some(manifest), Some(pin)) if pin != manifest.digest() => TrustVerdict::DigestMismatch,
            (Some(_), _) => TrustVerdict::DigestOk,
        }
    }
}

impl Source {
    fn texts(&self, problems: &mut Vec<Remark>) -> Vec<(String, Option<&Path>, String)> {
        match self {
            Self::Embedded => {
                EMBEDDED.iter().map(|(name, text)| (format!("(built in) {name}"), None, (*text).to_owned())).collect()
            }
            Self::Directory(directory) => match manifest_files(directory) {
                Err(error) => {
                    problems.push(Remark {
                        file: directory.display().to_string(),
                        line: None,
                        what: error.to_string(),
                    });
                    Vec::new()
                }
                Ok(files) => files
                    .into_iter()
                    .filter_map(|path| {
                        let file = path.display().to_string();
                        match read(&path) {
                            Ok(text) => Some((file, Some(directory.as_path()), text)),
                            Err(error) => {
                                problems.push(Remark { file, line: None, what: error.to_string() });
                                None
                            }
                        }
                    })
                    .collect(),
            },
        }
    }
}

fn manifest_files(directory: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn read(path: &Path) -> std::io::Result<String> {
    let found = fs::metadata(path)?;
    let invalid = |what: String| Err(std::io::Error::new(std::io::ErrorKind::InvalidData, what));
    if !found.is_file() {
        return invalid("is not a file".to_owned());
    }
    if found.len() > MAX_MANIFEST_BYTES as u64 {
        return invalid(format!("is longer than {MAX_MANIFEST_BYTES} bytes"));
    }
    fs::read_to_string(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(directory.path().join(name), text).unwrap();
        }
        directory
    }

    const MINIMAL: &str = "action_id: one\nversion: \"1\"\nprovider_module_digest: builtin:http_api\n";

    #[test]
    fn what_is_built_in_loads_without_a_warning() {
        let registry = Registry::load(&[Source::Embedded]).unwrap();
        assert_eq!(registry.actions().count(), EMBEDDED.len());
        let registry = registry.strict().unwrap();
        for id in ["http_fetch", "http_post", "http_put", "http_patch", "http_delete"] {
            let action = registry.action(id).unwrap();
            assert!(!action.profile.is_none() && action.profile.entries().is_empty(), "{id} reaches nothing");
        }
        for id in ["web_read", "github_read", "wikipedia_read"] {
            assert!(!registry.action(id).unwrap().profile.entries().is_empty(), "{id}");
        }
        let list = registry.list();
        assert_eq!(list["actions"][0], json!({"action_id": "github_read", "version": "1.0.0", "risk_level": "low"}));
    }

    #[test]
    fn one_bad_manifest_refuses_all_and_every_problem_is_told() {
        let directory = directory(&[
            ("a.yaml", MINIMAL),
            ("b.yaml", "action_id: two\nversion: \"1\"\nprovider_module_digest: builtin:smtp\n"),
            ("c.yml", "action_id: three\n  version: x\n"),
            ("d.yaml", MINIMAL),
            ("notes.txt", "not a manifest"),
        ]);
        let error = Registry::load(&[Source::Directory(directory.path().to_owned())]).unwrap_err();
        let shown = error.to_string();
        assert_eq!(error.problems.len(), 3, "{shown}");
        assert!(shown.contains("b.yaml:3: provider_module_digest \"builtin:smtp\""), "{shown}");
        assert!(error.problems.iter().any(|p| p.file.ends_with("c.yml") && p.line.is_some()), "{shown}");
        assert!(shown.contains("d.yaml: action_id \"one\" is in"), "{shown}");
        assert!(Registry::load(&[Source::Directory(directory.path().join("nowhere"))]).is_err());
    }

    #[test]
    fn a_later_source_takes_the_place_of_an_earlier_one() {
        let text = format!("{MINIMAL}risk_level: low\nnotes: hello\n").replace("one", "http_fetch");
        let directory = directory(&[("mine.yaml", &text)]);
        let sources = [Source::Embedded, Source::Directory(directory.path().to_owned())];
        let registry = Registry::load(&sources).unwrap();
        assert_eq!(registry.actions().count(), EMBEDDED.len());
        assert_eq!(registry.action("http_fetch").unwrap().version, "1");
        assert_eq!(registry.warnings().len(), 1);
        let error = registry.strict().unwrap_err();
        assert!(error.to_string().contains("mine.yaml:5: unknown key \"notes\""), "{error}");
    }

    #[test]
    fn pins_decide_the_verdict() {
        let registry = Registry::load(&[Source::Embedded]).unwrap();
        let digest = registry.action("web_read").unwrap().digest().to_owned();
        let pins = BTreeMap::from([("web_read".to_owned(), digest), ("http_post".to_owned(), "sha256:00".to_owned())]);
        let registry = registry.with_pins(pins);
        assert_eq!(registry.verdict("web_read"), TrustVerdict::DigestOk);
        assert_eq!(registry.verdict("http_post"), TrustVerdict::DigestMismatch);
        assert_eq!(registry.verdict("http_put"), TrustVerdict::DigestOk);
        assert_eq!(registry.verdict("nothing"), TrustVerdict::NotRegistered);
        assert_eq!(serde_json::to_value(TrustVerdict::DigestOk).unwrap(), "digest_ok");
    }

    #[test]
    fn a_configuration_adds_domains_to_an_action() {
        let added = |id: &str, entry: Value| AddedDomains::from([(id.to_owned(), vec![entry])]);
        let load = |added: &AddedDomains| Registry::load_with(&[Source::Embedded], added);
        let (plain, with) =
            (load(&AddedDomains::new()).unwrap(), load(&added("http_fetch", json!("api.example.com"))).unwrap());
        let (before, after) = (plain.action("http_fetch").unwrap(), with.action("http_fetch").unwrap());
        assert!(before.profile.permits("api.example.com", 443).is_err());
        assert!(after.profile.permits("api.example.com", 443).is_ok());
        assert_ne!(before.digest(), after.digest());
        assert_eq!(plain.action("http_post").unwrap().digest(), with.action("http_post").unwrap().digest());
        let ported =
            load(&added("http_fetch", json!({"domain": "origin.test", "ports": [8443], "exact": true}))).unwrap();
        assert!(ported.action("http_fetch").unwrap().profile.permits("origin.test", 8443).is_ok());
        for (id, entry) in [
            ("http_fetch", json!("*.com")),
            ("http_fetch", json!("10.0.0.1")),
            ("http_fetch", json!({"domain": "a.example", "tls": "terminated"})),
            ("http_fetch", json!(1)),
            ("no_such", json!("api.example.com")),
        ] {
            assert!(load(&added(id, entry.clone())).is_err(), "{id} {entry}");
        }
        let none = directory(&[("a.yaml", MINIMAL)]);
        let sources = [Source::Directory(none.path().to_owned())];
        let error = Registry::load_with(&sources, &added("one", json!("api.example.com"))).unwrap_err();
        assert!(error.to_string().contains("reaches nothing"), "{error}");
    }

    #[test]
    fn audit_is_armed_only_where_the_configuration_permits_it() {
        let egress = "egress: {profile: proxy_allowlist, mode: unsafe_audit, allowed_domains: [kept.example.org]}\n";
        let directory =
            directory(&[("a.yaml", &format!("{MINIMAL}{egress}")), ("b.yaml", &MINIMAL.replace("one", "two"))]);
        let load = || Registry::load(&[Source::Directory(directory.path().to_owned())]).unwrap();
        assert!(!load().action("one").unwrap().profile.is_audit(), "not by the manifest alone");
        let permit = |ids: &[&str]| load().permitting_audit(&ids.iter().map(|id| (*id).to_owned()).collect());
        let error = permit(&[]).unwrap_err().to_string();
        assert!(
            error.contains("action one: egress.mode: unsafe_audit") && error.contains("egress.permit_unsafe_audit"),
            "{error}"
        );
        let error = permit(&["one", "no_such"]).unwrap_err().to_string();
        assert!(error.contains("there is no action \"no_such\""), "{error}");
        // A permission is no order.
        let armed = permit(&["one", "two"]).unwrap();
        assert_eq!(armed.in_audit().collect::<Vec<_>>(), ["one"]);
        assert_ne!(armed.action("one").unwrap().profile.hash(), load().action("one").unwrap().profile.hash());
    }

    #[test]
    fn a_schema_file_is_part_of_the_digest() {
        let text = format!("{MINIMAL}io:\n  request_schema: schemas/one.json\n");
        let directory = directory(&[("a.yaml", &text)]);
        fs::create_dir(directory.path().join("schemas")).unwrap();
        let load = |schema: &str| {
            fs::write(directory.path().join("schemas/one.json"), schema).unwrap();
            Registry::load(&[Source::Directory(directory.path().to_owned())])
        };
        let first = load(r#"{"type": "object"}"#).unwrap();
        let second = load(r#"{"type": "object", "required": ["a"]}"#).unwrap();
        assert_ne!(first.action("one").unwrap().digest(), second.action("one").unwrap().digest());
        assert!(second.action("one").unwrap().validate(&json!({})).is_err());
        assert!(load("{").unwrap_err().to_string().contains(":5:"));
    }
}
