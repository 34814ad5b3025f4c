//! What the embedded engine makes of policies that are not ours.

use std::time::Duration;

use super::*;

/// In the style of policies that are in the field: an else-chain, data of its own, `budgets_after`.
const FIELD_STYLE: &str = r#"
default decision := {"allow": false, "deny_reason": "no matching allow rule"}
decision := r if { r := _untrusted } else := r if { r := _acl } else := r if { r := _hold } else := r if { r := _ok }
_untrusted := {"allow": false, "deny_reason": "untrusted"} if input.action_trust_verdict != "digest_ok"
_acl := {"allow": false, "deny_reason": sprintf("principal '%s' may not call '%s'", [input.principal, input.action_id])} if {
    not _has
}
_has if {
    some action in data.acl[input.principal].allowed_actions
    action == input.action_id
}
_terms := {
    "budgets_after": {"calls_remaining": input.budgets_before.calls_remaining - 1},
    "allowed_sinks": data.acl[input.principal].allowed_sinks,
    "approved_secrets": object.get(input, "requested_secrets", []),
    "approved_egress": object.get(input, "egress_profile", "none"),
    "policy_version": data.policy_version,
}
_hold := object.union(_terms, {"allow": true, "requires_approval": true}) if input.action_risk_level in {"high", "critical"}
_hold := object.union(_terms, {"allow": true, "requires_approval": true}) if count(object.get(input, "unresolved_domains", [])) > 0
_ok := object.union(_terms, {"allow": true, "requires_approval": false}) if count(object.get(input, "unresolved_domains", [])) == 0
"#;

#[test]
fn a_policy_from_the_field_works() {
    let engine = Embedded::load(&[
        file("latchgate.rego", &format!("package latchgate\n\nimport rego.v1\n{FIELD_STYLE}")),
        file(
            "data.json",
            r#"{"policy_version": "m1", "acl": {"agent:a": {"allowed_actions": ["http_fetch"], "allowed_sinks": ["http_read"]}}}"#,
        ),
    ])
    .unwrap();
    let case = |risk| Case::new("agent:a", "http_fetch", risk);
    let PolicyDecision::Allow(terms) = engine.evaluate(&case(RiskLevel::Medium).input()).unwrap() else { panic!() };
    assert_eq!(terms.label(), Some("m1"));
    assert_eq!(terms.sinks(&["http_read".into(), "http_write".into()]), ["http_read"]);
    let profile =
        Profile::allowlist([crate::egress::profile::DomainEntry::Plain("example.com".into()).compile().unwrap().0]);
    assert_eq!(terms.profile(&profile), profile);
    let held = engine.evaluate(&case(RiskLevel::High).input()).unwrap();
    assert!(matches!(held, PolicyDecision::Hold { approvers_required: 1, not_the_requester: false, .. }), "{held:?}");
    let unresolved = case(RiskLevel::Low).change(|c| c.unresolved = vec!["x.example".into()]);
    check(&engine, "unresolved", &unresolved, &Said::Hold);
    check(&engine, "other", &Case::new("agent:b", "http_fetch", RiskLevel::Low), &Said::Deny("'agent:b' may not call"));
    let bad = case(RiskLevel::Low).change(|c| c.verdict = TrustVerdict::DigestMismatch);
    check(&engine, "digest", &bad, &Said::Deny("untrusted"));
}

/// Constructs that such policies are made of and that an evaluator could have its own mind about: data below the
/// package's own name, functions, comprehensions with negation, set union, `%v`, `glob.match`, inherited entries.
#[test]
fn what_policies_in_the_field_are_made_of_is_understood() {
    let rego = r#"
decision := r if { r := _missing } else := r if { r := _listed } else := r if { r := _sensitive } else := r if { r := _open }
default decision := {"allow": false, "deny_reason": "no matching allow rule"}
_absent := {s | some s in input.required_scopes; not _carries(s)}
_carries(s) if {
    some one in input.scopes
    one == s
}
_missing := {"allow": false, "deny_reason": sprintf("missing %v of %v", [_absent, input.required_scopes])} if count(_absent) > 0
_listed := {"allow": true, "allowed_sinks": _sinks} if data.latchgate.allowlist[input.action_id][input.principal]
_sensitive := {"allow": true, "requires_approval": true} if glob.match("**/.env", [], object.get(input.params, "path", ""))
_sinks := sort(own | base) if {
    data.acl[input.principal].inherits_wildcard == true
    own := {s | some s in data.acl[input.principal].allowed_sinks}
    base := {s | some s in data.acl["*"].allowed_sinks}
}
_sinks := data.acl["*"].allowed_sinks if not data.acl[input.principal]
_open := {"allow": true, "allowed_sinks": _sinks} if input.action_risk_level == "low"
"#;
    let data = r#"{
        "acl": {"*": {"allowed_sinks": ["b"]}, "agent:i": {"inherits_wildcard": true, "allowed_sinks": ["a"]}},
        "latchgate": {"allowlist": {"http_post": {"agent:i": true}}}
    }"#;
    let policy = file("p.rego", &format!("package latchgate\nimport rego.v1\n{rego}"));
    let engine = Embedded::load(&[policy, file("data.json", data)]).unwrap();
    let sinks = |case: &Case| match engine.evaluate(&case.input()).unwrap() {
        PolicyDecision::Allow(terms) => terms.sinks(&["a".into(), "b".into(), "c".into()]),
        other => panic!("{other:?}"),
    };
    assert_eq!(sinks(&Case::new("agent:i", "http_post", RiskLevel::High)), ["a", "b"]);
    assert_eq!(sinks(&Case::new("agent:i", "http_fetch", RiskLevel::Low)), ["a", "b"]);
    assert_eq!(sinks(&Case::new("agent:x", "http_fetch", RiskLevel::Low)), ["b"]);
    let high = Case::new("agent:x", "http_post", RiskLevel::High);
    check(&engine, "not listed", &high, &Said::Deny("no matching allow rule"));
    let sensitive = high.change(|c| c.params = json!({"path": "/srv/app/.env"}).as_object().unwrap().clone());
    check(&engine, "sensitive path", &sensitive, &Said::Hold);
    let missing = Case::new("agent:x", "http_fetch", RiskLevel::Low).change(|c| c.required.push("mail:send".into()));
    check(&engine, "missing", &missing, &Said::Deny("mail:send"));
}

#[test]
fn outputs_of_a_wrong_type_are_never_an_allow() {
    for output in [
        r#""allow""#,
        "true",
        "[]",
        "null",
        "{}",
        r#"{"allow": "true"}"#,
        r#"{"allow": 1}"#,
        r#"{"allow": null}"#,
        r#"{"Allow": true}"#,
        r#"{"allow": true, "requires_approval": "yes"}"#,
        r#"{"allow": true, "requires_approval": 1}"#,
        r#"{"allow": true, "requires_approval": true, "approvers_required": 0}"#,
        r#"{"allow": true, "requires_approval": true, "approvers_required": -1}"#,
        r#"{"allow": true, "requires_approval": true, "approvers_required": 1.5}"#,
        r#"{"allow": true, "requires_approval": true, "not_the_requester": "x"}"#,
        r#"{"allow": true, "allowed_sinks": "http_read"}"#,
        r#"{"allow": true, "approved_secrets": [1]}"#,
        r#"{"allow": true, "approved_secrets": {"A": true}}"#,
        r#"{"allow": true, "approved_egress": "proxy_allowlist"}"#,
        r#"{"allow": true, "approved_egress": ["example.com"]}"#,
        r#"{"allow": true, "approved_egress": {"proxy_allowlist": {"allowed_domains": "example.com"}}}"#,
        r#"{"allow": true, "policy_version": 3}"#,
        r#"{"allow": false, "deny_reason": 3}"#,
        r#"{"allow": false, "deny_reason": {"a": 1}}"#,
    ] {
        let engine = policy(&format!("decision := {output}"));
        let case = Case::new("uid-1000", "http_fetch", RiskLevel::Low);
        let answer = engine.evaluate(&case.input());
        assert!(matches!(answer, Err(PolicyError::Invalid(_))), "{output}: {answer:?}");
    }
}

#[test]
fn undefined_conflicting_and_failing_decisions_are_no_allow() {
    let case = Case::new("uid-1000", "http_fetch", RiskLevel::Low);
    let undefined = policy(r#"decision := {"allow": true} if input.action_id == "other""#);
    check(&undefined, "undefined", &case, &Said::Deny("no rule"));
    let conflicting =
        policy("decision := {\"allow\": true} if input.principal\ndecision := {\"allow\": false} if input.principal");
    assert!(matches!(conflicting.evaluate(&case.input()), Err(PolicyError::Invalid(_))));
    // A failure of one call does not spoil the next.
    let sometimes =
        policy("decision := {\"allow\": true}\ndecision := {\"allow\": false} if input.action_id == \"other\"");
    let other = Case::new("uid-1000", "other", RiskLevel::Low);
    for _ in 0..3 {
        assert!(matches!(sometimes.evaluate(&other.input()), Err(PolicyError::Invalid(_))));
        check(&sometimes, "after a failure", &case, &Said::Allow);
    }
}

#[test]
fn allow_false_wins_over_everything_else() {
    let engine =
        policy(r#"decision := {"allow": false, "requires_approval": true, "approved_egress": input.egress_profile}"#);
    check(&engine, "no", &Case::new("uid-1000", "http_fetch", RiskLevel::Low), &Said::Deny("gave no reason"));
}

#[test]
fn reasons_are_short_and_printable() {
    let engine = policy(r#"decision := {"allow": false, "deny_reason": sprintf("no: %s", [input.params.q])}"#);
    let case = Case::new("uid-1000", "http_fetch", RiskLevel::Low).change(|c| {
        c.params = json!({"q": format!("a\r\nb\u{1b}[31m{}", "é".repeat(600))}).as_object().unwrap().clone();
    });
    let PolicyDecision::Deny { reason } = engine.evaluate(&case.input()).unwrap() else { panic!() };
    assert!(reason.starts_with("no: a  b [31m") && reason.len() <= MAX_REASON_BYTES, "{reason}");
}

#[test]
fn a_policy_that_does_not_end_is_stopped() {
    let rego = "package latchgate\nimport rego.v1\n\
        decision := {\"allow\": true} if {\n\
        input.principal\n\
        some a in numbers.range(1, 2000)\n\
        some b in numbers.range(1, 2000)\n\
        a * b < 0\n\
        }\n";
    let engine = Embedded::load_with_limit(&[file("slow.rego", rego)], Duration::from_millis(50)).unwrap();
    let case = Case::new("uid-1000", "http_fetch", RiskLevel::Low);
    let before = std::time::SystemTime::now();
    for _ in 0..2 {
        assert_eq!(engine.evaluate(&case.input()), Err(PolicyError::Timeout));
    }
    assert!(before.elapsed().unwrap() < Duration::from_secs(5));
    assert_eq!(PolicyError::Timeout.code(), "policy_engine_timeout");
}

#[test]
fn what_is_no_policy_does_not_load() {
    assert_eq!(Embedded::load(&[]).unwrap_err(), PolicyLoadError::NoPolicy);
    assert_eq!(Embedded::load(&[file("data.json", "{}")]).unwrap_err(), PolicyLoadError::NoPolicy);
    for (name, rego) in [
        ("syntax", "package latchgate\ndecision := {"),
        ("other package", "package other\nimport rego.v1\ndecision := {\"allow\": true}"),
        ("other rule", "package latchgate\nimport rego.v1\nallow := true"),
        ("unknown function", "package latchgate\nimport rego.v1\ndecision := {\"allow\": true} if no_such_function(1)"),
    ] {
        assert!(Embedded::load(&[file("p.rego", rego)]).is_err(), "{name}");
    }
    let good = file("p.rego", "package latchgate\nimport rego.v1\ndecision := {\"allow\": data.a}");
    for data in ["", "{", "[]", "1", "{\"a\": 1} x", "{\"a\": {\"b\": 1, \"b\": 1}}", "{\"a\": 1, \"\\u0061\": 2}"] {
        assert!(Embedded::load(&[good.clone(), file("data.json", data)]).is_err(), "{data}");
    }
    assert!(Embedded::load(&[good.clone(), file("1.json", "{\"a\": 1}"), file("2.json", "{\"a\": 2}")]).is_err());
}

#[test]
fn the_version_is_of_policy_and_data() {
    let (one, two) = (with_data(DATA), with_data("{}"));
    assert_ne!(one.policy_version(), two.policy_version());
    assert_eq!(one.policy_version(), with_data(DATA).policy_version());
    let mut files = Embedded::builtin_files();
    files.reverse();
    assert_eq!(Embedded::load(&files).unwrap().policy_version(), Embedded::builtin().unwrap().policy_version());
    files[0].text.push('\n');
    assert_ne!(Embedded::load(&files).unwrap().policy_version(), Embedded::builtin().unwrap().policy_version());
    assert!(one.policy_version().starts_with("sha256:"));
}

#[test]
fn a_directory_loads_without_its_tests() {
    let directory = tempfile::tempdir().unwrap();
    for file in Embedded::builtin_files() {
        std::fs::write(directory.path().join(file.name), file.text).unwrap();
    }
    std::fs::write(directory.path().join("latchgate_test.rego"), "package x\n{{{").unwrap();
    std::fs::write(directory.path().join("test_latchgate.rego"), "package x\n{{{").unwrap();
    std::fs::write(directory.path().join("README.md"), "x").unwrap();
    let engine = Embedded::load_directory(directory.path()).unwrap();
    assert_eq!(engine.policy_version(), Embedded::builtin().unwrap().policy_version());
    assert!(Embedded::load_directory(&directory.path().join("nowhere")).is_err());
}

#[test]
fn decisions_at_the_same_time_do_not_mix() {
    let engine = policy(r#"decision := {"allow": false, "deny_reason": input.action_id}"#);
    std::thread::scope(|scope| {
        for action in ["a", "b", "c", "d"] {
            let engine = &engine;
            scope.spawn(move || {
                for _ in 0..100 {
                    let case = Case::new("uid-1000", action, RiskLevel::Low);
                    let decision = engine.evaluate(&case.input()).unwrap();
                    assert_eq!(decision, PolicyDecision::Deny { reason: action.to_owned() });
                }
            });
        }
    });
}
