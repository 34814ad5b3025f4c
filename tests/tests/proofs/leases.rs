//! Leases that are not ours, or no longer what we signed.

use aws_lc_rs::hmac;
use base64::Engine as _;
use latchgate_tests::agent::{Agent, Key};
use latchgate_tests::base64url;
use latchgate_tests::http::once;
use serde_json::{Value, json};

use crate::{gate, get, readable, refused};

fn part(jwt: &str, segment: usize) -> Value {
    let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(jwt.split('.').nth(segment).unwrap()).unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

#[test]
fn a_lease_that_the_gate_did_not_sign() {
    let gate = gate("leases").start();
    let elsewhere = crate::gate("elsewhere").start();
    let mut agent = Agent::connect(&gate.agent());
    let path = readable(&agent);
    let own = agent.lease.clone();
    let (header, claims) = (part(&own, 0), part(&own, 1));
    let signature = own.rsplit_once('.').unwrap().1.to_owned();
    let jwks = once(&agent.target, "GET", "/.well-known/jwks.json", &[], None).json();
    let forger = Key::generate();
    let changed = |name: &str, value: Value| {
        let mut claims = claims.clone();
        claims[name] = value;
        claims.to_string()
    };
    let join = |header: &str, claims: &str, signature: &str| {
        format!("{}.{}.{signature}", base64url(header), base64url(claims))
    };
    let hs256 = |secret: &[u8]| {
        let header = json!({"typ": "JWT", "alg": "HS256", "kid": header["kid"]}).to_string();
        let signed = format!("{}.{}", base64url(header), base64url(claims.to_string()));
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), signed.as_bytes());
        format!("{signed}.{}", base64url(tag))
    };
    let with_header = |name: &str, value: Value| {
        let mut header = header.clone();
        header[name] = value;
        forger.jwt(&header.to_string(), &claims.to_string())
    };
    let own_claims = own.split('.').nth(1).unwrap().to_owned();
    let elsewhere_lease = Agent::connect(&elsewhere.agent()).lease;
    let text = header.to_string();
    let leases = [
        ("a scope more", join(&text, &changed("scope", json!(["tools:call", "admin"])), &signature)),
        ("a budget taken away", join(&text, &changed("budgets", json!(null)), &signature)),
        ("another principal", join(&text, &changed("sub", json!("admin")), &signature)),
        ("a later end", join(&text, &changed("exp", json!(4_102_444_800_i64)), &signature)),
        ("another key", join(&text, &changed("cnf", json!({"jkt": forger.thumbprint()})), &signature)),
        ("signed by another key", forger.jwt(&text, &claims.to_string())),
        ("signed by the client's own key", agent.key.jwt(&text, &claims.to_string())),
        ("alg none", join(&json!({"typ": "JWT", "alg": "none"}).to_string(), &claims.to_string(), "")),
        ("alg none with kid", join(&text.replace("ES256", "none"), &claims.to_string(), "")),
        ("HS256 with the published key", hs256(jwks["keys"][0].to_string().as_bytes())),
        ("HS256 with its x", hs256(jwks["keys"][0]["x"].as_str().unwrap().as_bytes())),
        ("an unknown kid", with_header("kid", json!("other"))),
        ("no kid", forger.jwt(&json!({"typ": "JWT", "alg": "ES256"}).to_string(), &claims.to_string())),
        ("a kid that is a path", with_header("kid", json!("../../../dev/null"))),
        ("a key in the header", with_header("jwk", forger.jwk())),
        ("crit", with_header("crit", json!(["exp"]))),
        ("typ dpop+jwt", with_header("typ", json!("dpop+jwt"))),
        ("a proof", agent.proof("GET", &path)),
        ("no signature", own.rsplit_once('.').unwrap().0.to_owned()),
        ("an empty signature", format!("{}.", own.rsplit_once('.').unwrap().0)),
        ("zeros for a signature", format!("{}.{}", own.rsplit_once('.').unwrap().0, base64url([0; 64]))),
        ("padding", format!("{own}==")),
        ("a claim twice", join(&text, &claims.to_string().replacen('{', "{\"sub\":\"admin\",", 1), &signature)),
        (
            "another header over the same claims",
            format!("{}.{own_claims}.{signature}", base64url(r#"{"alg":"ES256"}"#)),
        ),
        ("another gate's", elsewhere_lease),
        ("not a token", "x".to_owned()),
        ("very long", format!("{own}{}", "A".repeat(17_000))),
    ];
    for (what, lease) in leases {
        agent.lease = lease;
        // The proof is proper for what is presented, ath included: it is the lease that is refused.
        refused(what, &agent.get(&path), "401 invalid_lease", "");
        agent.lease = own.clone();
        assert_eq!(agent.get(&path).status, 200, "beside {what}");
    }
    let headers = [("authorization".to_owned(), "DPoP ".to_owned()), ("dpop".to_owned(), agent.proof("GET", &path))];
    refused("nothing after the scheme", &get(&agent, &path, &headers), "401 invalid_lease", "");
}
