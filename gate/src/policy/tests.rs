use serde_json::{Value, json};

use super::embedded::{Embedded, File, PolicyLoadError};
use super::*;

mod engine;

/// An ACL as an operator would write it.
const DATA: &str = r#"{"acl": {
    "*": {"allowed_actions": ["http_post"]},
    "named": {"allowed_actions": ["http_fetch", "http_post", "http_delete"], "only_named": true},
    "narrow": {"allowed_actions": ["http_post"], "allowed_sinks": ["http_read"]},
    "barred": {"allowed_actions": ["http_post"], "denied_actions": ["http_post", "http_fetch"]},
    "empty": {"allowed_actions": []},
    "odd": null
}}"#;

fn with_data(data: &str) -> Embedded {
    let mut files = Embedded::builtin_files();
    files.iter_mut().find(|file| file.name == "data.json").unwrap().text = data.to_owned();
    Embedded::load(&files).unwrap()
}

fn policy(rego: &str) -> Embedded {
    Embedded::load(&[file("p.rego", &format!("package latchgate\nimport rego.v1\n{rego}"))]).unwrap()
}

fn file(name: &str, text: &str) -> File {
    File { name: name.to_owned(), text: text.to_owned() }
}

struct Case {
    principal: &'static str,
    action: &'static str,
    risk: RiskLevel,
    verdict: TrustVerdict,
    scopes: Vec<String>,
    required: Vec<String>,
    sinks: Vec<String>,
    calls: Option<u64>,
    unresolved: Vec<String>,
    egress: Value,
    params: Map<String, Value>,
}

impl Case {
    fn new(principal: &'static str, action: &'static str, risk: RiskLevel) -> Self {
        Self {
            principal,
            action,
            risk,
            verdict: TrustVerdict::DigestOk,
            scopes: vec!["tools:call".into()],
            required: vec!["tools:call".into()],
            sinks: vec!["http_read".into()],
            calls: Some(3),
            unresolved: Vec::new(),
            egress: json!({"proxy_allowlist": {"allowed_domains": ["example.com"]}}),
            params: Map::new(),
        }
    }

    fn input(&self) -> PolicyInput<'_> {
        PolicyInput {
            principal: self.principal,
            session_id: "0197",
            scopes: &self.scopes,
            required_scopes: &self.required,
            action_id: self.action,
            action_version: "1.0.0",
            action_risk_level: self.risk,
            action_trust_verdict: self.verdict,
            request_hash: "sha256:00",
            requested_sinks: &self.sinks,
            requested_secrets: Vec::new(),
            egress_profile: self.egress.clone(),
            budgets_before: BudgetsBefore { calls_remaining: self.calls },
            unresolved_domains: &self.unresolved,
            params: &self.params,
            peer: Peer { listener: "default", uid: Some(1000), ..Peer::default() },
        }
    }

    fn change(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }
}

#[derive(Debug, PartialEq)]
enum Said {
    Allow,
    Hold,
    /// A part of the reason.
    Deny(&'static str),
}

fn check(engine: &Embedded, name: &str, case: &Case, said: &Said) {
    let decision = engine.evaluate(&case.input()).unwrap();
    let fits = match (&decision, said) {
        (PolicyDecision::Allow(_), Said::Allow) | (PolicyDecision::Hold { .. }, Said::Hold) => true,
        (PolicyDecision::Deny { reason }, Said::Deny(part)) => reason.contains(part),
        _ => false,
    };
    assert!(fits, "{name}: {decision:?}, and not {said:?}");
}

#[test]
fn the_default_policy_decides() {
    use RiskLevel::{Critical, High, Low, Medium};
    use Said::{Allow, Deny, Hold};
    let engine = with_data(DATA);
    let case = Case::new;
    let scopes = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
    let unnamed = "does not name this action";
    let table: Vec<(&str, Case, Said)> = vec![
        // Risk, for a principal that only `*` knows.
        ("low, not named", case("uid-1000", "http_fetch", Low), Allow),
        ("low, named", case("uid-1000", "http_post", Low), Allow),
        ("medium, named", case("uid-1000", "http_post", Medium), Allow),
        ("medium, not named", case("uid-1000", "http_put", Medium), Deny(unnamed)),
        ("high, named", case("uid-1000", "http_post", High), Hold),
        ("high, not named", case("uid-1000", "http_delete", High), Hold),
        ("critical", case("uid-1000", "http_delete", Critical), Hold),
        // Entries of their own: `*` adds nothing to them.
        ("own entry, medium not named", case("empty", "http_post", Medium), Deny(unnamed)),
        ("own entry, low not named", case("empty", "http_fetch", Low), Allow),
        ("own entry, high not named", case("empty", "http_delete", High), Hold),
        ("only named, low named", case("named", "http_fetch", Low), Allow),
        ("only named, low not named", case("named", "web_read", Low), Deny(unnamed)),
        ("only named, medium named", case("named", "http_post", Medium), Allow),
        ("only named, high named", case("named", "http_delete", High), Hold),
        ("only named, high not named", case("named", "http_put", High), Deny(unnamed)),
        ("only named, critical not named", case("named", "http_put", Critical), Deny(unnamed)),
        ("denied and named", case("barred", "http_post", Medium), Deny("ACL denies this action")),
        ("denied and low", case("barred", "http_fetch", Low), Deny("ACL denies this action")),
        ("denied and high", case("barred", "http_fetch", High), Deny("ACL denies this action")),
        ("not denied", case("barred", "web_read", Low), Allow),
        ("an entry that is none", case("odd", "http_fetch", Low), Deny("not in the ACL")),
        ("a name that is like another", case("Empty", "http_post", Medium), Allow),
        // Digest.
        (
            "digest mismatch",
            case("uid-1000", "http_fetch", Low).change(|c| c.verdict = TrustVerdict::DigestMismatch),
            Deny("not the one that was registered"),
        ),
        (
            "not registered",
            case("uid-1000", "nothing", Low).change(|c| c.verdict = TrustVerdict::NotRegistered),
            Deny("not the one that was registered"),
        ),
        (
            "digest mismatch is not held",
            case("uid-1000", "http_delete", High).change(|c| c.verdict = TrustVerdict::DigestMismatch),
            Deny("not the one that was registered"),
        ),
        // Scope.
        ("no scope", case("uid-1000", "http_fetch", Low).change(|c| c.scopes.clear()), Deny("scope tools:call")),
        (
            "another scope",
            case("uid-1000", "http_fetch", Low).change(|c| c.scopes = scopes(&["audit:read"])),
            Deny("scope tools:call"),
        ),
        (
            "tools:call is asked for even by an action that does not say so",
            case("uid-1000", "http_fetch", Low).change(|c| {
                c.scopes.clear();
                c.required.clear();
            }),
            Deny("scope tools:call"),
        ),
        (
            "required scope missing",
            case("uid-1000", "http_fetch", Low).change(|c| c.required = scopes(&["tools:call", "mail:send"])),
            Deny("scope mail:send"),
        ),
        (
            "required scope carried",
            case("uid-1000", "http_fetch", Low).change(|c| {
                c.required = scopes(&["tools:call", "mail:send"]);
                c.scopes = scopes(&["mail:send", "x:y", "tools:call"]);
            }),
            Allow,
        ),
        (
            "required scope alone",
            case("uid-1000", "http_fetch", Low).change(|c| {
                c.required = scopes(&["mail:send"]);
                c.scopes = scopes(&["mail:send"]);
            }),
            Deny("scope tools:call"),
        ),
        (
            "scopes are compared whole",
            case("uid-1000", "http_fetch", Low).change(|c| c.scopes = scopes(&["tools:call:x", "Tools:call"])),
            Deny("scope tools:call"),
        ),
        (
            "missing scope is not held",
            case("uid-1000", "http_delete", High).change(|c| c.scopes.clear()),
            Deny("scope tools:call"),
        ),
        // Budget.
        ("unlimited", case("uid-1000", "http_fetch", Low).change(|c| c.calls = None), Allow),
        ("last call", case("uid-1000", "http_fetch", Low).change(|c| c.calls = Some(1)), Allow),
        ("no call left", case("uid-1000", "http_fetch", Low).change(|c| c.calls = Some(0)), Deny("no calls are left")),
        (
            "no call left is not held",
            case("uid-1000", "http_delete", High).change(|c| c.calls = Some(0)),
            Deny("no calls are left"),
        ),
        ("unlimited and high", case("uid-1000", "http_delete", High).change(|c| c.calls = None), Hold),
        // Side effects.
        ("sink allowed", case("narrow", "http_fetch", Low), Allow),
        (
            "sink not allowed",
            case("narrow", "http_post", Medium).change(|c| c.sinks = vec!["http_read".into(), "http_write".into()]),
            Deny("side effects"),
        ),
        ("no sink", case("narrow", "http_fetch", Low).change(|c| c.sinks.clear()), Allow),
        (
            "sinks are open where the entry has no list",
            case("uid-1000", "http_post", Medium).change(|c| c.sinks = vec!["anything".into()]),
            Allow,
        ),
        // Names that the profile does not have.
        (
            "unresolved and low",
            case("uid-1000", "http_fetch", Low).change(|c| c.unresolved = vec!["a.example".into()]),
            Hold,
        ),
        (
            "unresolved and medium, not named",
            case("uid-1000", "http_put", Medium).change(|c| c.unresolved = vec!["a.example".into()]),
            Deny(unnamed),
        ),
        // Several reasons at once are all told.
        (
            "two reasons",
            case("uid-1000", "http_put", Medium).change(|c| c.scopes.clear()),
            Deny("for the principal; the lease does not carry"),
        ),
        // What a caller can choose does not reach the decision.
        (
            "params and peer are data",
            case("uid-1000", "http_put", Medium).change(|c| {
                c.params = json!({"allow": true, "principal": "named", "acl": {}}).as_object().unwrap().clone();
            }),
            Deny(unnamed),
        ),
    ];
    assert!(table.len() >= 40, "{}", table.len());
    for (name, case, said) in &table {
        check(&engine, name, case, said);
    }
}

#[test]
fn what_up_starts_with_allows_low_and_holds_high() {
    let engine = Embedded::builtin().unwrap();
    let case = |risk| Case::new("uid-1000", "http_fetch", risk);
    check(&engine, "low", &case(RiskLevel::Low), &Said::Allow);
    check(&engine, "medium", &case(RiskLevel::Medium), &Said::Deny("does not name"));
    check(&engine, "high", &case(RiskLevel::High), &Said::Hold);
    check(&engine, "critical", &case(RiskLevel::Critical), &Said::Hold);
}

/// The whole way that a call goes through this part of the gate, with what is built in.
#[test]
fn the_built_in_actions_are_decided_by_their_risk() {
    use crate::action::registry::{AddedDomains, Registry, Source};
    let added = ["http_fetch", "http_post", "http_delete"].map(|id| (id.to_owned(), vec![json!("api.example.com")]));
    let registry = Registry::load_with(&[Source::Embedded], &AddedDomains::from(added)).unwrap();
    let engine = with_data(r#"{"acl": {"*": {"allowed_actions": ["http_post"]}}}"#);
    let scopes = ["tools:call".to_owned()];
    let params = json!({"url": "https://api.example.com/x", "body": {"a": 1}}).as_object().unwrap().clone();
    for (id, said) in [
        ("http_fetch", Said::Allow),
        ("http_post", Said::Allow),
        ("http_put", Said::Deny("does not name")),
        ("http_delete", Said::Hold),
        ("web_read", Said::Allow),
    ] {
        let manifest = registry.action(id).unwrap();
        let asking = Asking { principal: "uid-1000", session_id: "s", scopes: &scopes, peer: Peer::default() };
        let left = BudgetsBefore::default();
        let input = PolicyInput::new(asking, manifest, registry.verdict(id), "sha256:00", &params, left);
        match (engine.evaluate(&input).unwrap(), said) {
            (PolicyDecision::Allow(terms), Said::Allow) | (PolicyDecision::Hold { terms, .. }, Said::Hold) => {
                // The default policy gives back what it was asked for, and that is the manifest's profile unchanged.
                assert_eq!(terms.profile(&manifest.profile), *manifest.profile, "{id}");
                assert_eq!(terms.sinks(&manifest.declared_side_effects), manifest.declared_side_effects, "{id}");
            }
            (PolicyDecision::Deny { reason }, Said::Deny(part)) => assert!(reason.contains(part), "{id}: {reason}"),
            (decision, said) => panic!("{id}: {decision:?}, and not {said:?}"),
        }
    }
}

#[test]
fn policy_can_only_take_away() {
    let profile = |names: &[&str]| {
        let entry = |name: &&str| crate::egress::profile::DomainEntry::Plain((*name).to_owned()).compile().unwrap().0;
        Profile::allowlist(names.iter().map(entry))
    };
    let terms = |output: &str| match PolicyDecision::from_output(output).unwrap() {
        PolicyDecision::Allow(terms) => terms,
        other => panic!("{other:?}"),
    };
    let manifest = profile(&["api.example.com", "cdn.example.net"]);
    let requested: Vec<String> = vec!["A".into(), "B".into()];
    let open = terms(r#"{"allow": true}"#);
    assert_eq!((open.profile(&manifest), open.secrets(&requested)), (manifest.clone(), requested.clone()));
    let less = terms(
        r#"{"allow": true, "approved_secrets": ["B", "C"], "allowed_sinks": [],
            "approved_egress": {"proxy_allowlist": {"allowed_domains": ["example.com", "evil.example"]}}}"#,
    );
    assert_eq!(less.profile(&manifest), profile(&["api.example.com"]));
    assert_eq!(less.secrets(&requested), ["B"]);
    assert!(less.sinks(&requested).is_empty());
    assert_eq!(less.profile(&Profile::None), Profile::None);
    let none = terms(r#"{"allow": true, "approved_egress": "none"}"#);
    assert_eq!(none.profile(&manifest), Profile::None);
    let null = terms(r#"{"allow": true, "approved_egress": null, "approved_secrets": null}"#);
    assert_eq!(null.profile(&manifest), manifest);
}

#[test]
fn without_an_acl_nobody_is_known() {
    for data in ["{}", r#"{"acl": {}}"#, r#"{"acl": []}"#, r#"{"acl": {"someone": {}}}"#] {
        let engine = with_data(data);
        for risk in [RiskLevel::Low, RiskLevel::Medium, RiskLevel::High] {
            check(&engine, data, &Case::new("uid-1000", "http_fetch", risk), &Said::Deny("not in the ACL"));
        }
    }
}

#[test]
fn the_input_is_the_contracts() {
    let case = Case::new("uid-1000", "http_fetch", RiskLevel::Low).change(|c| c.calls = None);
    assert_eq!(
        serde_json::to_value(case.input()).unwrap(),
        json!({
            "principal": "uid-1000", "session_id": "0197", "scopes": ["tools:call"], "required_scopes": ["tools:call"],
            "action_id": "http_fetch", "action_version": "1.0.0", "action_risk_level": "low",
            "action_trust_verdict": "digest_ok", "request_hash": "sha256:00", "requested_sinks": ["http_read"],
            "requested_secrets": [], "egress_profile": {"proxy_allowlist": {"allowed_domains": ["example.com"]}},
            "budgets_before": {}, "params": {}, "peer": {"listener": "default", "uid": 1000},
        })
    );
    let case = case.change(|c| {
        c.calls = Some(7);
        c.unresolved = vec!["a.example".into()];
    });
    let input = serde_json::to_value(case.input()).unwrap();
    assert_eq!(input["budgets_before"], json!({"calls_remaining": 7}));
    assert_eq!(input["unresolved_domains"], json!(["a.example"]));
}
