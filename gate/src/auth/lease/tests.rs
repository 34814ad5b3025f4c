use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use serde_json::{Map, json};

use super::*;
use crate::auth::jwk::{PublicJwk, base64url, from_base64url};
use crate::auth::testing::{Client, NOW};

fn directory() -> tempfile::TempDir {
    tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o700)).tempdir().unwrap()
}

fn issuer(keys: &Arc<LeaseKeys>) -> Issuer {
    Issuer::new(Arc::clone(keys), "https://gate.example", "gate-1", DEFAULT_TTL_SECONDS).unwrap()
}

fn new_lease() -> NewLease {
    NewLease {
        principal: "agent".to_owned(),
        listener: "agents".to_owned(),
        session_id: None,
        jkt: Client::new(7).jkt(),
        scopes: vec!["tools:call".to_owned()],
        budgets: Some(Budgets { max_calls: Some(3), max_cost_usd_cents: None }),
    }
}

fn payload(token: &str) -> Map<String, Value> {
    let claims = from_base64url(token.split('.').nth(1).unwrap()).unwrap();
    serde_json::from_slice(&claims).unwrap()
}

#[test]
fn a_lease_says_what_the_contract_says() {
    let dir = directory();
    let keys = Arc::new(LeaseKeys::load_or_create(dir.path()).unwrap());
    let issuer = issuer(&keys);
    let issued = issuer.issue(&new_lease(), NOW).unwrap();
    assert_eq!(issued.expires_at, Timestamp::from_secs(NOW.secs() + 300).to_seconds_string());
    let header: Value =
        serde_json::from_slice(&from_base64url(issued.lease_jwt.split('.').next().unwrap()).unwrap()).unwrap();
    assert_eq!(header, json!({"typ": "JWT", "alg": "ES256", "kid": keys.kid()}));
    let claims = payload(&issued.lease_jwt);
    assert_eq!(
        Value::Object(claims),
        json!({
            "iss": "https://gate.example", "aud": "gate-1", "sub": "agent", "listener": "agents",
            "exp": NOW.secs() + 300, "nbf": NOW.secs(), "iat": NOW.secs(), "jti": issued.lease_jti,
            "session_id": issued.session_id, "scope": ["tools:call"], "budgets": {"max_calls": 3},
            "cnf": {"jkt": Client::new(7).jkt()}, "run": keys.run(),
        })
    );
    let read = issuer.verify_signature(issued.lease_jwt.as_bytes(), NOW).unwrap();
    assert_eq!((read.principal.as_str(), read.jkt()), ("agent", Client::new(7).jkt().as_str()));
    assert_eq!(issuer.check(&read, "agents", NOW), Ok(()));
    let renewed = issuer.issue(&NewLease { session_id: Some(issued.session_id.clone()), ..new_lease() }, NOW).unwrap();
    assert_eq!(renewed.session_id, issued.session_id);
    assert_ne!(renewed.lease_jti, issued.lease_jti);
}

#[test]
fn times_have_no_leeway() {
    let dir = directory();
    let issuer = issuer(&Arc::new(LeaseKeys::load_or_create(dir.path()).unwrap()));
    let issued = issuer.issue(&new_lease(), NOW).unwrap();
    let claims = issuer.verify_signature(issued.lease_jwt.as_bytes(), NOW).unwrap();
    let at = |millis: i64| issuer.check(&claims, "agents", Timestamp::from_millis(millis));
    let (from, until) = (NOW.secs() * 1000, (NOW.secs() + 300) * 1000);
    assert_eq!(at(from - 1), Err(LeaseError::NotYet));
    assert_eq!(at(from), Ok(()));
    assert_eq!(at(until - 1), Ok(()));
    assert_eq!(at(until), Err(LeaseError::Expired));
}

#[test]
fn leases_for_elsewhere() {
    let dir = directory();
    let keys = Arc::new(LeaseKeys::load_or_create(dir.path()).unwrap());
    let ours = issuer(&keys);
    let issued = ours.issue(&new_lease(), NOW).unwrap();
    let claims = ours.verify_signature(issued.lease_jwt.as_bytes(), NOW).unwrap();
    assert_eq!(ours.check(&claims, "others", NOW), Err(LeaseError::Listener));
    let neighbour = Issuer::new(Arc::clone(&keys), "https://gate.example", "gate-2", 300).unwrap();
    assert_eq!(neighbour.check(&claims, "agents", NOW), Err(LeaseError::Audience));
    let stranger = Issuer::new(Arc::clone(&keys), "https://other.example", "gate-1", 300).unwrap();
    assert_eq!(stranger.check(&claims, "agents", NOW), Err(LeaseError::Issuer));
    let endless = LeaseClaims { exp: claims.exp + 3600, ..claims };
    assert_eq!(ours.check(&endless, "agents", NOW), Err(LeaseError::TooLong));
}

#[test]
fn leases_that_are_not_ours() {
    let dir = directory();
    let keys = Arc::new(LeaseKeys::load_or_create(dir.path()).unwrap());
    let issuer = issuer(&keys);
    let issued = issuer.issue(&new_lease(), NOW).unwrap().lease_jwt;
    let segments: Vec<&str> = issued.split('.').collect();
    let claims = Value::Object(payload(&issued));
    let signed = |header: Value, claims: &Value| keys.sign(&header, claims).unwrap();
    let header = json!({"typ": "JWT", "alg": "ES256", "kid": keys.kid()});
    let with = |name: &str, value: Value| {
        let mut header = header.clone();
        header[name] = value;
        signed(header, &claims)
    };
    let without = |name: &str| {
        let mut claims = claims.clone();
        claims.as_object_mut().unwrap().remove(name);
        signed(header.clone(), &claims)
    };
    let of_type = |name: &str, value: Value| {
        let mut claims = claims.clone();
        claims[name] = value;
        signed(header.clone(), &claims)
    };
    let mut table = vec![
        (String::new(), LeaseError::Malformed),
        ("lease".to_owned(), LeaseError::Malformed),
        (format!("{issued}="), LeaseError::Malformed),
        (format!("{issued}.AA"), LeaseError::Malformed),
        (format!("{issued}{}", "A".repeat(MAX_LEASE_BYTES)), LeaseError::Malformed),
        (with("alg", json!("none")), LeaseError::Header),
        (with("alg", json!("HS256")), LeaseError::Header),
        (with("typ", json!("dpop+jwt")), LeaseError::Header),
        (with("typ", json!("at+jwt")), LeaseError::Header),
        (with("crit", json!([])), LeaseError::Header),
        (with("jwk", Client::new(3).jwk()), LeaseError::Header),
        (with("kid", json!(Client::new(3).jkt())), LeaseError::UnknownKey),
        (with("kid", json!("")), LeaseError::UnknownKey),
        (format!("{}.{}.", segments[0], segments[1]), LeaseError::Signature),
        (format!("{}.{}.{}", segments[0], segments[1], base64url(&[0; 64])), LeaseError::Signature),
        (of_type("scope", json!("tools:call")), LeaseError::Claims),
        (of_type("exp", json!("never")), LeaseError::Claims),
        (of_type("aud", json!(["gate-1"])), LeaseError::Claims),
    ];
    for name in ["iss", "aud", "sub", "listener", "exp", "nbf", "iat", "jti", "session_id", "scope", "cnf", "run"] {
        table.push((without(name), LeaseError::Claims));
    }
    // Signed with a key of the client's own, under the gate's kid.
    let other = Client::new(3).jwt(&header.to_string(), &claims.to_string());
    table.push((other, LeaseError::Signature));
    let richer = base64url(claims.to_string().replace("tools:call", "tools:all!").as_bytes());
    table.push((format!("{}.{richer}.{}", segments[0], segments[2]), LeaseError::Signature));
    for (token, expected) in table {
        assert_eq!(issuer.verify_signature(token.as_bytes(), NOW).unwrap_err(), expected, "{token}");
    }
}

#[test]
fn keys_are_made_once_and_kept() {
    let outer = directory();
    let dir = outer.path().join("keys");
    let first = LeaseKeys::load_or_create(&dir).unwrap();
    let file = dir.join("lease.pem");
    assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o600);
    assert_eq!(fs::metadata(&dir).unwrap().mode() & 0o777, 0o700);
    assert!(fs::read_to_string(&file).unwrap().starts_with("-----BEGIN PRIVATE KEY-----\n"));
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "nothing half-written is left");
    let second = LeaseKeys::load_or_create(&dir).unwrap();
    assert_eq!(first.kid(), second.kid());
    assert_ne!(first.run(), second.run());
    let jwks = second.jwks();
    let jwk = &jwks["keys"][0];
    assert_eq!(jwks["keys"].as_array().unwrap().len(), 1);
    assert_eq!(
        (jwk["kid"].as_str(), jwk["alg"].as_str(), jwk["use"].as_str()),
        (Some(first.kid()), Some("ES256"), Some("sig"))
    );
    assert_eq!(jwk.as_object().unwrap().len(), 7, "{jwk}");
    assert_eq!(PublicJwk::parse(jwk).unwrap().thumbprint(), first.kid());
}

#[test]
fn a_restart_and_a_rotation_keep_leases_valid() {
    let dir = directory();
    let keys = Arc::new(LeaseKeys::load_or_create(dir.path()).unwrap());
    let now = Timestamp::now();
    let before = issuer(&keys);
    let issued = before.issue(&new_lease(), now).unwrap();
    let restarted = issuer(&Arc::new(LeaseKeys::load_or_create(dir.path()).unwrap()));
    let claims = restarted.verify_signature(issued.lease_jwt.as_bytes(), now).unwrap();
    assert!(before.issued_in_this_run(&claims) && !restarted.issued_in_this_run(&claims));

    let rotated = Arc::new(LeaseKeys::rotate(dir.path()).unwrap());
    assert_ne!(rotated.kid(), keys.kid());
    assert!(!fs::read_to_string(dir.path().join("lease.previous.pem")).unwrap().contains("PRIVATE"));
    let after = issuer(&rotated);
    assert!(after.verify_signature(issued.lease_jwt.as_bytes(), now).is_ok());
    assert_eq!(rotated.jwks_at(now)["keys"].as_array().unwrap().len(), 2);
    let later = now.plus_millis(i64::from(MAX_TTL_SECONDS) * 1000 + 5_000);
    assert_eq!(after.verify_signature(issued.lease_jwt.as_bytes(), later), Err(LeaseError::UnknownKey));
    assert_eq!(rotated.jwks_at(later)["keys"].as_array().unwrap().len(), 1);
}

#[test]
fn keys_that_are_not_used() {
    let dir = directory();
    let file = dir.path().join("lease.pem");
    drop(LeaseKeys::load_or_create(dir.path()).unwrap());
    let pem = fs::read_to_string(&file).unwrap();
    for mode in [0o644, 0o604, 0o660, 0o602] {
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
        assert!(matches!(LeaseKeys::load_or_create(dir.path()), Err(KeyError::Exposed(_))), "{mode:o}");
    }
    // As a Secret is mounted for the pod's group.
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
    assert!(LeaseKeys::load_or_create(dir.path()).is_ok());
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    for broken in ["", "key", &pem[..pem.len() / 2], &pem.replace("PRIVATE", "PUBLIC")] {
        fs::write(&file, broken).unwrap();
        assert!(matches!(LeaseKeys::load_or_create(dir.path()), Err(KeyError::NotAKey(_))), "{broken}");
    }
    // A broken key is never replaced by a new one: leases in the field would die without a word.
    assert_eq!(fs::read_to_string(&file).unwrap(), pem.replace("PRIVATE", "PUBLIC"));
}

#[test]
fn times_to_live_are_bounded() {
    let dir = directory();
    let keys = Arc::new(LeaseKeys::load_or_create(dir.path()).unwrap());
    for (ttl, fine) in [(0, false), (1, true), (3600, true), (3601, false), (u32::MAX, false)] {
        assert_eq!(Issuer::new(Arc::clone(&keys), "i", "g", ttl).is_ok(), fine, "{ttl}");
    }
    assert!(matches!(issuer(&keys).issue(&new_lease(), Timestamp::from_secs(-5)), Err(IssueError::Clock)));
}

#[test]
fn lease_requests() {
    let jwk = Client::new(7).jwk();
    let parse = |body: Value| LeaseRequest::parse(body.to_string().as_bytes());
    let plain = parse(json!({"scopes": ["tools:call"], "dpop_jwk": jwk})).unwrap();
    assert_eq!(plain.dpop_jwk, Client::new(7).public());
    assert_eq!((plain.scopes, plain.budgets, plain.fs_root), (vec!["tools:call".to_owned()], None, None));
    let full = parse(json!({
        "scopes": [], "dpop_jwk": jwk, "fs_root": "/work",
        "budgets": {"max_calls": 5, "max_cost_usd_cents": 0, "max_tokens": "many"},
    }));
    let full = full.unwrap();
    assert_eq!(full.budgets, Some(Budgets { max_calls: Some(5), max_cost_usd_cents: Some(0) }));
    assert_eq!(full.fs_root.as_deref(), Some("/work"));
    assert!(parse(json!({"scopes": [], "dpop_jwk": jwk, "budgets": null, "fs_root": null})).is_ok());

    let mut private = jwk.clone();
    private["d"] = json!("AA");
    let mut off_curve = jwk.clone();
    off_curve["y"] = jwk["x"].clone();
    for (body, expected) in [
        (json!({"dpop_jwk": jwk}), LeaseRequestError::Missing("scopes")),
        (json!({"scopes": []}), LeaseRequestError::Missing("dpop_jwk")),
        (
            json!({"scopes": [], "dpop_jwk": jwk, "agent_id": "me"}),
            LeaseRequestError::UnknownMember("agent_id".to_owned()),
        ),
        (json!({"scopes": "tools:call", "dpop_jwk": jwk}), LeaseRequestError::Scopes),
        (json!({"scopes": [1], "dpop_jwk": jwk}), LeaseRequestError::Scopes),
        (json!({"scopes": [""], "dpop_jwk": jwk}), LeaseRequestError::Scopes),
        (json!({"scopes": ["a b"], "dpop_jwk": jwk}), LeaseRequestError::Scopes),
        (json!({"scopes": vec!["a"; 65], "dpop_jwk": jwk}), LeaseRequestError::Scopes),
        (json!({"scopes": ["a".repeat(129)], "dpop_jwk": jwk}), LeaseRequestError::Scopes),
        (json!({"scopes": [], "dpop_jwk": private}), LeaseRequestError::Jwk(crate::auth::jwk::JwkError::Private)),
        (json!({"scopes": [], "dpop_jwk": off_curve}), LeaseRequestError::Jwk(crate::auth::jwk::JwkError::OffCurve)),
        (json!({"scopes": [], "dpop_jwk": "key"}), LeaseRequestError::Jwk(crate::auth::jwk::JwkError::NotAnObject)),
        (json!({"scopes": [], "dpop_jwk": jwk, "budgets": []}), LeaseRequestError::Type("budgets")),
        (json!({"scopes": [], "dpop_jwk": jwk, "budgets": {"max_calls": -1}}), LeaseRequestError::Budget("max_calls")),
        (json!({"scopes": [], "dpop_jwk": jwk, "budgets": {"max_calls": 1.5}}), LeaseRequestError::Budget("max_calls")),
        (
            json!({"scopes": [], "dpop_jwk": jwk, "budgets": {"max_cost_usd_cents": "1"}}),
            LeaseRequestError::Budget("max_cost_usd_cents"),
        ),
        (json!({"scopes": [], "dpop_jwk": jwk, "fs_root": 1}), LeaseRequestError::Type("fs_root")),
    ] {
        let error = parse(body.clone()).unwrap_err();
        assert_eq!(error, expected, "{body}");
        assert_eq!(error.code(), "invalid_request", "{body}");
    }
    assert_eq!(LeaseRequest::parse(b"").unwrap_err(), LeaseRequestError::Missing("scopes"));
    assert_eq!(LeaseRequest::parse(b"[]").unwrap_err().code(), "invalid_request");
    assert_eq!(LeaseRequest::parse(b"{").unwrap_err().code(), "invalid_request");
    assert_eq!(LeaseRequest::parse(br#"{"scopes":[],"scopes":["admin"]}"#).unwrap_err().code(), "schema_violation");
}
