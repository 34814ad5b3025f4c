//! Leases: what may be asked, what is answered, and where a lease is good.

use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};
use base64::Engine as _;
use latchgate_tests::agent::{Agent, Key, lease};
use latchgate_tests::http::{Target, once};
use latchgate_tests::now;
use serde_json::{Value, json};

use crate::answers::{assert_minted, passed, refused, refused_with, tcp, with_echo};

fn unbase64url(text: &str) -> Vec<u8> {
    base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(text).unwrap()
}

/// The header (0) or the claims (1) of a JWT.
pub fn decoded(jwt: &str, segment: usize) -> Value {
    serde_json::from_slice(&unbase64url(jwt.split('.').nth(segment).unwrap())).unwrap()
}

#[test]
fn what_a_lease_says_and_the_published_key_verifies() {
    let gate = with_echo("lease").start();
    let asked = json!({"scopes": ["tools:call"], "budgets": {"max_calls": 7}, "fs_root": "/work"});
    let agent = Agent::connect_with(&gate.agent(), asked);
    let second = Agent::connect(&gate.agent());
    assert_minted(&agent.granted["session_id"]);
    assert_minted(&agent.granted["lease_jti"]);
    assert_ne!(agent.lease_jti, second.lease_jti);
    let expires = agent.granted["expires_at"].as_str().unwrap();
    let shape: String = expires.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    assert_eq!(shape, "0000-00-00T00:00:00Z");

    let (header, claims) = (decoded(&agent.lease, 0), decoded(&agent.lease, 1));
    let jwks = passed(&once(&agent.target, "GET", "/.well-known/jwks.json", &[], None));
    let keys = jwks["keys"].as_array().unwrap();
    let key = keys.iter().find(|key| key["kid"] == header["kid"]).expect("the key of the lease");
    assert_eq!(header, json!({"typ": "JWT", "alg": "ES256", "kid": key["kid"]}));
    assert_eq!(
        (key["kty"].as_str(), key["crv"].as_str(), key["alg"].as_str()),
        (Some("EC"), Some("P-256"), Some("ES256"))
    );
    assert!(key.get("d").is_none(), "the private key is published");
    let point = [vec![4], unbase64url(key["x"].as_str().unwrap()), unbase64url(key["y"].as_str().unwrap())].concat();
    let (signed, signature) = agent.lease.rsplit_once('.').unwrap();
    let verify = |signed: &str| {
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &point).verify(signed.as_bytes(), &unbase64url(signature))
    };
    verify(signed).unwrap();
    verify(&signed.replacen('.', ".A", 1)).unwrap_err();

    assert_eq!(claims["sub"], "tester");
    assert_eq!(claims["jti"], agent.lease_jti.as_str());
    assert_eq!(claims["session_id"], agent.session_id.as_str());
    assert_eq!(claims["scope"], json!(["tools:call"]));
    assert_eq!(claims["budgets"], json!({"max_calls": 7}));
    assert_eq!(claims["cnf"]["jkt"], agent.key.thumbprint());
    let time = |name: &str| claims[name].as_i64().unwrap();
    assert_eq!(time("exp") - time("iat"), 300);
    assert_eq!(time("nbf"), time("iat"));
    assert!((time("iat") - now()).abs() <= 5);
    assert!(claims["iss"].is_string() && claims["aud"].is_string());
    assert!(decoded(&second.lease, 1).get("budgets").is_none());
}

#[test]
fn what_a_lease_request_may_say() {
    let gate = with_echo("request").start();
    let target = gate.agent();
    let key = Key::generate();
    let good = json!({"scopes": ["tools:call"], "dpop_jwk": key.jwk()});
    let with = |name: &str, value: Value| {
        let mut request = good.clone();
        request[name] = value;
        request
    };
    let jwk_with = |name: &str, value: &str| {
        let mut jwk = key.jwk();
        jwk[name] = json!(value);
        with("dpop_jwk", jwk)
    };
    // As the published client sends it; a kind of budget that is not known is ignored.
    for request in [
        good.clone(),
        with("budgets", json!({"max_calls": 1, "max_cost_usd_cents": 2, "max_wall_seconds": 3})),
        with("budgets", json!({})),
        with("fs_root", json!("/x")),
        with("scopes", json!([])),
    ] {
        let granted = passed(&lease(&target, &request));
        let mut names: Vec<&String> = granted.as_object().unwrap().keys().collect();
        names.sort();
        assert_eq!(names, ["expires_at", "lease_jti", "lease_jwt", "session_id"]);
    }
    for request in [
        with("agent_id", json!("admin")),
        with("principal", json!("admin")),
        with("ttl", json!(86400)),
        with("listener", json!("agent")),
        with("session_id", json!("0198f3a0-0000-7000-8000-000000000000")),
        with("scopes", json!("tools:call")),
        with("scopes", json!(["a b"])),
        with("scopes", json!([1])),
        with("budgets", json!({"max_calls": -1})),
        with("budgets", json!({"max_calls": 1.5})),
        with("budgets", json!({"max_calls": "1"})),
        with("budgets", json!([])),
        with("fs_root", json!(1)),
        with("dpop_jwk", json!(null)),
        with("dpop_jwk", json!("x")),
        jwk_with("d", "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE"),
        jwk_with("crv", "P-384"),
        jwk_with("kty", "OKP"),
        jwk_with("y", "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE"),
        jwk_with("x", "AAAA"),
        json!({"dpop_jwk": key.jwk()}),
        json!({"scopes": ["tools:call"]}),
        json!({}),
        json!([]),
        json!(null),
    ] {
        refused_with(&lease(&target, &request), "400 invalid_request", &["message"]);
    }
    for scopes in [json!(["tools:call", "admin"]), json!(["*"]), json!(["tools:*"])] {
        refused_with(&lease(&target, &with("scopes", scopes)), "403 scope_not_permitted", &["deny_reason"]);
    }
    passed(&lease(&target, &good));
}

#[test]
fn a_listener_permits_its_own_scopes() {
    let gate = with_echo("scopes")
        .manifest("scoped", &crate::answers::echo("scoped", "low", "required_scopes: [files:read]"))
        .config("[[listeners]]\nname = \"wide\"\npath = \"{dir}/wide/gate.sock\"\nprincipal = \"wide\"\nscopes = [\"tools:call\", \"files:read\"]")
        .start();
    let wide = Target::Unix(gate.directory().join("wide/gate.sock"));
    let asked = json!({"scopes": ["tools:call", "files:read"]});
    passed(&Agent::connect_with(&wide, asked.clone()).execute("scoped", &json!({})));
    let body = refused(&Agent::connect(&wide).execute("scoped", &json!({})), "403 scope_not_permitted");
    assert!(body["deny_reason"].as_str().unwrap().contains("files:read"));
    let mut request = asked;
    request["dpop_jwk"] = Key::generate().jwk();
    refused(&lease(&gate.agent(), &request), "403 scope_not_permitted");
}

#[test]
fn a_lease_is_good_on_its_listener_alone() {
    let gate = with_echo("listeners")
        .config("[[listeners]]\nname = \"second\"\npath = \"{dir}/second/gate.sock\"\nprincipal = \"tester\"")
        .config("[[listeners]]\nname = \"tcp\"\naddress = \"127.0.0.1:0\"\n[identity.tcp]\nprincipal = \"tester\"")
        .start();
    let elsewhere = with_echo("elsewhere").start();
    let second = Target::Unix(gate.directory().join("second/gate.sock"));
    // The same principal everywhere: it is the listener, and the gate, that the lease names.
    for target in [gate.agent(), second.clone(), tcp(&gate, "tcp")] {
        let mut agent = Agent::connect(&target);
        passed(&agent.execute("echo", &json!({})));
        let (own, own_base) = (agent.target.clone(), agent.base.clone());
        for other in [gate.agent(), second.clone(), tcp(&gate, "tcp"), elsewhere.agent()] {
            if format!("{other:?}") == format!("{own:?}") {
                continue;
            }
            agent.base = match &other {
                Target::Unix(_) => "http://localhost".to_owned(),
                Target::Tcp(address) => format!("http://{address}"),
            };
            agent.target = other;
            refused(&agent.execute("echo", &json!({})), "401 invalid_lease");
        }
        (agent.target, agent.base) = (own, own_base);
        passed(&agent.execute("echo", &json!({})));
    }
}

#[test]
fn a_lease_that_ran_out() {
    let gate = with_echo("expired").config("[auth]\nlease_ttl_seconds = 2").start();
    let agent = Agent::connect(&gate.agent());
    passed(&agent.execute("echo", &json!({})));
    let expires = decoded(&agent.lease, 1)["exp"].as_i64().unwrap();
    while now() < expires {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    // No leeway: the first second after the last is too late.
    refused(&agent.execute("echo", &json!({})), "401 lease_expired");
    // A lease that ran out is said so before the proof is looked at, so that a client knows to ask for another.
    let (authorization, path) = (agent.authorization(), "/v1/actions/echo/execute");
    let headers = [("authorization", authorization.as_str()), ("content-type", "application/json")];
    refused(&once(&gate.agent(), "POST", path, &headers, Some(b"{}")), "401 lease_expired");
    passed(&Agent::connect(&gate.agent()).execute("echo", &json!({})));
}
