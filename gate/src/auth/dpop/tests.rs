use serde_json::{Value, json};

use super::*;
use crate::auth::testing::{Client, METHOD, NOW, PATH, TOKEN};

/// Written by `latchgate==0.2.0` of PyPI at [`NOW`] with the key of RFC 6979 A.2.5.
const PUBLISHED_CLIENT: &str = "eyJ0eXAiOiJkcG9wK2p3dCIsImFsZyI6IkVTMjU2IiwiandrIjp7Imt0eSI6IkVDIiwiY3J2IjoiUC0yNTYiLCJ4IjoiWVA3VXVpVmFuVEhKWWV0MHhqVnRhTUJKdUpJN1lmcHM1bWxpTG1EeW43WSIsInkiOiJlUVAtRUFpNHZKbWtHdW5wVmlpOFpQTHhzZ3d0ZnA5UmQ2UENsTlJHSXBrIn19.eyJqdGkiOiJhMmRhNGEyYS1mZDFlLTQ5YjgtYjI0YS1iY2MwZGQ1MzZjYTQiLCJodG0iOiJQT1NUIiwiaHR1IjoiaHR0cDovL2xvY2FsaG9zdC92MS9hY3Rpb25zL2h0dHBfZmV0Y2gvZXhlY3V0ZSIsImlhdCI6MTc5NTMwNTYwMCwiYXRoIjoiUjJhN3lDc3hTOEJwQ2drLTJWUlAzeEhaSjhuNnpTdk95Z1RsVTk3WjltMCJ9.-4szUEmuUEX4MSfRUqCvovoC3psowsbr_Rz-lsNTEMrp0cHNMCdmOhbAsK-YH11fEPmgPUkYBCGwOpBI5RbkhQ";
/// RFC 9449 §7.1, figure 12.
const RFC_PROOF: &str = "eyJ0eXAiOiJkcG9wK2p3dCIsImFsZyI6IkVTMjU2IiwiandrIjp7Imt0eSI6IkVDIiwieCI6Imw4dEZyaHgtMzR0VjNoUklDUkRZOXpDa0RscEJoRjQyVVFVZldWQVdCRnMiLCJ5IjoiOVZFNGpmX09rX282NHpiVFRsY3VOSmFqSG10NnY5VERWclUwQ2R2R1JEQSIsImNydiI6IlAtMjU2In19.eyJqdGkiOiJlMWozVl9iS2ljOC1MQUVCIiwiaHRtIjoiR0VUIiwiaHR1IjoiaHR0cHM6Ly9yZXNvdXJjZS5leGFtcGxlLm9yZy9wcm90ZWN0ZWRyZXNvdXJjZSIsImlhdCI6MTU2MjI2MjYxOCwiYXRoIjoiZlVIeU8ycjJaM0RaNTNFc05yV0JiMHhXWG9hTnk1OUlpS0NBcWtzbVFFbyJ9.2oW9RP35yRqzhrtNP86L-Ey71EOptxRimPPToA1plemAgR6pxHF8y6-yqyVnmcw6Fy1dqd-jfxSYoMxhAJpLjA";
const VECTORS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../definitions/test_vectors/dpop/proofs.json");

fn bases() -> Vec<String> {
    ["http://localhost", "http://localhost:3000", "https://gate.example/"].map(str::to_owned).to_vec()
}

fn check(headers: &[String], jkt: &str) -> Result<Proof, ProofError> {
    let headers: Vec<&[u8]> = headers.iter().map(String::as_bytes).collect();
    let expected = Expected {
        method: METHOD,
        path: PATH,
        bases: &bases(),
        token: TOKEN.as_bytes(),
        jkt,
        now: NOW,
        not_before: None,
    };
    Proof::verify(&headers, &expected)
}

#[test]
fn the_published_clients_proof() {
    let jkt = "0".to_owned();
    assert_eq!(check(&[PUBLISHED_CLIENT.to_owned()], &jkt).unwrap_err(), ProofError::Key);
    let jwt = Compact::decode(PUBLISHED_CLIENT.as_bytes(), MAX_PROOF_BYTES).unwrap();
    let jkt = PublicJwk::parse(&jwt.header["jwk"]).unwrap().thumbprint();
    let proof = check(&[PUBLISHED_CLIENT.to_owned()], &jkt).unwrap();
    assert_eq!((proof.jti(), proof.body_claim()), ("a2da4a2a-fd1e-49b8-b24a-bcc0dd536ca4", None));
}

#[test]
fn the_proof_of_the_rfc() {
    let expected = Expected {
        method: "GET",
        path: "/protectedresource",
        bases: &["https://resource.example.org".to_owned()],
        token: b"Kz~8mXK1EalYznwH-LC-1fBAo.4Ljp~zsPE_NeO.gxU",
        jkt: "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I",
        now: Timestamp::from_secs(1_562_262_618),
        not_before: None,
    };
    let proof = Proof::verify(&[RFC_PROOF.as_bytes()], &expected).unwrap();
    assert_eq!(proof.jti(), "e1j3V_bKic8-LAEB");
}

struct Case {
    description: &'static str,
    headers: Vec<String>,
    outcome: Result<(), ProofError>,
}

/// Proofs that are right but for one thing. The wrong ones are signed anew, so that the rule in question is the one
/// that speaks.
fn cases() -> Vec<Case> {
    let client = Client::new(7);
    let other = Client::new(9);
    let mut cases = Vec::new();
    let mut case = |description, headers: Vec<String>, outcome| cases.push(Case { description, headers, outcome });
    let with =
        |change: &dyn Fn(&mut Value, &mut Value)| vec![client.proof(TOKEN, |header, payload| change(header, payload))];
    let payload = |name: &'static str, value: Value| with(&move |_, payload| payload[name] = value.clone());
    let header = |name: &'static str, value: Value| with(&move |header, _| header[name] = value.clone());
    let jwk = |name: &'static str, value: Value| with(&move |header, _| header["jwk"][name] = value.clone());
    let good = client.proof(TOKEN, |_, _| {});
    let segments: Vec<&str> = good.split('.').collect();
    let malformed = Err(ProofError::Malformed(JwtError::Segments));

    case("right", vec![good.clone()], Ok(()));
    case("a body claim", payload("request_hash", json!("sha256:00")), Ok(()));
    case("claims that nobody asked for", payload("nonce", json!("n")), Ok(()));
    case("members of the jwk that say nothing about the key", jwk("kid", json!("k")), Ok(()));

    //= RFC 9449 §4.3 (1)
    case("no DPoP header", vec![], Err(ProofError::Missing));
    case("two DPoP headers, both right", vec![good.clone(), good.clone()], Err(ProofError::Several));
    case("two DPoP headers, one empty", vec![good.clone(), String::new()], Err(ProofError::Several));
    case("two proofs in one header", vec![format!("{good},{good}")], malformed.clone());
    case("two proofs in one header, with a space", vec![format!("{good}, {good}")], malformed.clone());

    //= RFC 9449 §4.3 (2)
    case("an empty header", vec![String::new()], malformed.clone());
    case("a word", vec!["proof".to_owned()], malformed.clone());
    case("two segments", vec![segments[..2].join(".")], malformed.clone());
    case("a fourth segment", vec![format!("{good}.")], malformed.clone());
    case("five segments, as an encrypted token has", vec![format!("{good}.AA.AA")], malformed.clone());
    case("a dot before the proof", vec![format!(".{good}")], malformed.clone());
    case("a space after the proof", vec![format!("{good} ")], malformed.clone());
    case("padding", vec![format!("{good}==")], malformed.clone());
    case("padding of the header", vec![format!("{}=.{}.{}", segments[0], segments[1], segments[2])], malformed.clone());
    for sign in ["+", "/", "\u{e9}", "\0", "\n"] {
        let (_, rest) = segments[2].split_at(1);
        case(
            "a character outside of base64url",
            vec![format!("{}.{}.{sign}{rest}", segments[0], segments[1])],
            malformed.clone(),
        );
    }
    case("unused bits of the last character set", vec![with_unused_bits(&good)], malformed.clone());
    case(
        "a JSON serialisation",
        vec![json!({"payload": segments[1], "signature": segments[2]}).to_string()],
        malformed.clone(),
    );
    case(
        "longer than is read",
        payload("filler", json!("x".repeat(MAX_PROOF_BYTES))),
        Err(ProofError::Malformed(JwtError::TooLong(MAX_PROOF_BYTES))),
    );
    let not_json = |raw_header: &str, raw_payload: &str| {
        let jwt = client.jwt(raw_header, raw_payload);
        let error =
            Compact::decode(jwt.as_bytes(), MAX_PROOF_BYTES).err().map_or(ProofError::Signature, ProofError::Malformed);
        assert!(matches!(error, ProofError::Malformed(JwtError::Json(_))), "{error}");
        (vec![jwt], Err(error))
    };
    let plain_header = json!({"typ": "dpop+jwt", "alg": "ES256", "jwk": client.jwk()}).to_string();
    let plain_payload = String::from_utf8(crate::auth::jwk::from_base64url(segments[1]).unwrap()).unwrap();
    let (headers, outcome) = not_json("[]", &plain_payload);
    case("a header that is not an object", headers, outcome);
    let (headers, outcome) = not_json(&plain_header, "\"claims\"");
    case("claims that are not an object", headers, outcome);
    let (headers, outcome) = not_json(&plain_header, &plain_payload.replacen('}', "} ", 1).replacen("} ", "}{", 1));
    case("something after the claims", headers, outcome);
    let (headers, outcome) = not_json(&plain_header.replacen('{', r#"{"alg":"none","#, 1), &plain_payload);
    case("alg twice", headers, outcome);
    let (headers, outcome) = not_json(&plain_header.replacen('{', r#"{"\u0061lg":"none","#, 1), &plain_payload);
    case("alg twice, once in escapes", headers, outcome);
    let (headers, outcome) = not_json(&plain_header.replacen(r#""jwk":{"#, r#""jwk":{"x":"AA","#, 1), &plain_payload);
    case("a coordinate of the jwk twice", headers, outcome);
    let (headers, outcome) = not_json(&plain_header, &plain_payload.replacen('{', r#"{"htm":"GET","#, 1));
    case("htm twice", headers, outcome);
    let (headers, outcome) = not_json(&plain_header, &plain_payload.replacen('{', r#"{"jti":"another","#, 1));
    case("jti twice", headers, outcome);
    let (headers, outcome) = not_json(&plain_header, &plain_payload.replacen('{', r#"{"a":"\ud800","#, 1));
    case("half of a surrogate pair in a claim", headers, outcome);
    let (headers, outcome) = not_json(&plain_header, &format!("\u{feff}{plain_payload}"));
    case("a byte order mark before the claims", headers, outcome);

    //= RFC 9449 §4.3 (3)
    for name in ["jti", "htm", "htu", "ath", "iat"] {
        let without = with(&move |_, payload| {
            payload.as_object_mut().unwrap().remove(name);
        });
        case("a required claim left out", without, Err(ProofError::Claim(name)));
        case("a required claim that is null", payload(name, Value::Null), Err(ProofError::Claim(name)));
        case("a required claim of another type", payload(name, json!([1])), Err(ProofError::Claim(name)));
    }
    case("a body claim that is not text", payload("request_hash", json!(1)), Err(ProofError::Claim("request_hash")));
    case("an empty jti", payload("jti", json!("")), Err(ProofError::Jti));
    case("a jti of 256 characters", payload("jti", json!("é".repeat(256))), Ok(()));
    case("a jti of 257 characters", payload("jti", json!("j".repeat(257))), Err(ProofError::Jti));

    //= RFC 9449 §4.3 (4)
    for typ in
        [json!("JWT"), json!("DPOP+JWT"), json!("application/dpop+jwt"), json!("dpop+jwt "), json!(null), json!(1)]
    {
        case("another typ", header("typ", typ), Err(ProofError::Typ));
    }
    let no_typ = with(&|header, _| {
        header.as_object_mut().unwrap().remove("typ");
    });
    case("no typ", no_typ, Err(ProofError::Typ));

    //= RFC 9449 §4.3 (5)
    for alg in ["none", "None", "", "es256", "ES256K", "ES384", "RS256", "PS256", "EdDSA", "HS256"] {
        case("another alg", header("alg", json!(alg)), Err(ProofError::Alg));
    }
    let none = json!({"typ": "dpop+jwt", "alg": "none", "jwk": client.jwk()}).to_string();
    let unsigned = format!("{}.{}.", base64url(none.as_bytes()), segments[1]);
    case("alg none and no signature", vec![unsigned], Err(ProofError::Alg));
    let hs256 = json!({"typ": "dpop+jwt", "alg": "HS256", "jwk": client.jwk()}).to_string();
    case(
        "HS256 with the public key as the secret",
        vec![hmac(&hs256, segments[1], &client.sec1())],
        Err(ProofError::Alg),
    );
    case(
        "ES256 in the header, HMAC in the signature",
        vec![hmac(&plain_header, segments[1], &client.sec1())],
        Err(ProofError::Signature),
    );

    //= RFC 9449 §4.3 (6)
    let resigned = |signature: &[u8]| vec![format!("{}.{}.{}", segments[0], segments[1], base64url(signature))];
    case("no signature", resigned(&[]), Err(ProofError::Signature));
    case("a signature of zeros", resigned(&[0; 64]), Err(ProofError::Signature));
    let raw = crate::auth::jwk::from_base64url(segments[2]).unwrap();
    case("a signature cut short", resigned(&raw[..63]), Err(ProofError::Signature));
    case("a byte after the signature", resigned(&[&raw[..], &[0]].concat()), Err(ProofError::Signature));
    case("a signature in DER", resigned(&der(&raw)), Err(ProofError::Signature));
    let mut flipped = raw.clone();
    flipped[40] ^= 1;
    case("a signature with one bit changed", resigned(&flipped), Err(ProofError::Signature));
    let foreign = format!("{}.{}", segments[0], segments[1]);
    case(
        "another key's signature under this jwk",
        resigned(&other.sign(foreign.as_bytes())),
        Err(ProofError::Signature),
    );
    let later = base64url(plain_payload.replace("\"POST\"", "\"GET\"").as_bytes());
    case(
        "claims changed after signing",
        vec![format!("{}.{later}.{}", segments[0], segments[2])],
        Err(ProofError::Signature),
    );

    //= RFC 9449 §4.3 (7)
    for name in ["d", "p", "q", "dp", "dq", "qi", "oth", "k"] {
        case("a private member in the jwk", jwk(name, json!("AA")), Err(JwkError::Private.into()));
    }
    case("a private member that is null", jwk("d", Value::Null), Err(JwkError::Private.into()));
    case("no jwk", header("jwk", Value::Null), Err(JwkError::NotAnObject.into()));
    case("a jwk in text", header("jwk", json!(client.jwk().to_string())), Err(JwkError::NotAnObject.into()));
    case(
        "a kid instead of a jwk",
        with(&|header, _| *header = json!({"typ": "dpop+jwt", "alg": "ES256", "kid": "k"})),
        Err(JwkError::NotAnObject.into()),
    );
    case("another kty", jwk("kty", json!("OKP")), Err(JwkError::NotP256.into()));
    case("a symmetric kty", jwk("kty", json!("oct")), Err(JwkError::NotP256.into()));
    case("another curve", jwk("crv", json!("P-384")), Err(JwkError::NotP256.into()));
    case("secp256k1", jwk("crv", json!("secp256k1")), Err(JwkError::NotP256.into()));
    case("a point off the curve", jwk("y", client.jwk()["x"].clone()), Err(JwkError::OffCurve.into()));
    case("a coordinate that is missing", jwk("y", Value::Null), Err(JwkError::Coordinate.into()));
    case("a coordinate of 31 bytes", jwk("x", json!(base64url(&[1; 31]))), Err(JwkError::Coordinate.into()));
    case("a coordinate of 33 bytes", jwk("x", json!(base64url(&[0; 33]))), Err(JwkError::Coordinate.into()));
    case(
        "a coordinate with padding",
        jwk("x", json!(format!("{}=", client.jwk()["x"].as_str().unwrap()))),
        Err(JwkError::Coordinate.into()),
    );
    case("a key for encryption", jwk("use", json!("enc")), Err(JwkError::OtherUse.into()));
    case("a key for another alg", jwk("alg", json!("ES384")), Err(JwkError::OtherUse.into()));

    // RFC 7515 §4.1.11: what the reader does not understand it must not accept.
    case("crit", header("crit", json!(["b64"])), Err(ProofError::Header));
    case("b64", header("b64", json!(false)), Err(ProofError::Header));
    case("an embedded certificate", header("x5c", json!(["AA"])), Err(ProofError::Header));
    case("a key to be fetched", header("jku", json!("http://localhost/")), Err(ProofError::Header));

    //= RFC 9449 §4.3 (8)
    for htm in ["post", "Post", "GET", "POST ", ""] {
        case("another htm", payload("htm", json!(htm)), Err(ProofError::Htm));
    }

    //= RFC 9449 §4.3 (9)
    for htu in [
        "http://localhost/v1/actions/http_fetch/execute?query=1#fragment",
        "HTTP://LOCALHOST:80/v1/actions/http_fetch/execute",
        "http://localhost:3000/v1/actions/http_fetch/execute",
        "https://gate.example:443/v1/actions/http_fetch/execute",
        "http://localhost/v1/actions/%68ttp%5Ffetch/execute",
        "http://localhost/v1/./actions/x/../http_fetch/execute",
        "http://localhost/v1/actions/x/%2e%2E/http_fetch/execute",
    ] {
        case("another spelling of htu", payload("htu", json!(htu)), Ok(()));
    }
    for htu in [
        "",
        "/v1/actions/http_fetch/execute",
        "localhost/v1/actions/http_fetch/execute",
        "http://localhost",
        "https://localhost/v1/actions/http_fetch/execute",
        "http://localhost:3001/v1/actions/http_fetch/execute",
        "http://localhost:3000@evil.example/v1/actions/http_fetch/execute",
        "http://user@localhost/v1/actions/http_fetch/execute",
        "http://localhost./v1/actions/http_fetch/execute",
        "http://localhost.evil.example/v1/actions/http_fetch/execute",
        "http://127.0.0.1/v1/actions/http_fetch/execute",
        "http://localhost/v1/actions/http_post/execute",
        "http://localhost/v1/actions/HTTP_FETCH/execute",
        "http://localhost/v1/actions/http_fetch/execute/",
        "http://localhost/v1/actions/http_fetch/execute/..",
        "http://localhost//v1/actions/http_fetch/execute",
        "http://localhost/v1/actions/http_fetch%2Fexecute",
        "http://localhost/v1/actions/http_fetch/execute%00",
        "http://localhost/v1/actions/http_fetch/execute%3Fq",
        "http://localhost\\v1/actions/http_fetch/execute",
        "http://localhost/v1/actions/http_fetch/execute ",
    ] {
        case("another htu", payload("htu", json!(htu)), Err(ProofError::Htu));
    }

    //= RFC 9449 §4.3 (11)
    let now = NOW.secs();
    case("60 seconds old", payload("iat", json!(now - 60)), Ok(()));
    case("61 seconds old", payload("iat", json!(now - 61)), Err(ProofError::Stale));
    case("of 1970", payload("iat", json!(0)), Err(ProofError::Stale));
    case("of before 1970", payload("iat", json!(-1)), Err(ProofError::Stale));
    case("5 seconds ahead", payload("iat", json!(now + 5)), Ok(()));
    case("6 seconds ahead", payload("iat", json!(now + 6)), Err(ProofError::Future));
    case("in milliseconds", payload("iat", json!(now * 1000)), Err(ProofError::Future));
    case("an iat with a fraction", payload("iat", json!(now as f64 + 0.5)), Err(ProofError::Claim("iat")));
    case("an iat in text", payload("iat", json!(now.to_string())), Err(ProofError::Claim("iat")));
    case("an iat beyond 64 bits", payload("iat", json!(1e30)), Err(ProofError::Claim("iat")));

    //= RFC 9449 §4.3 (12)
    let ath = |token: &str| base64url(&hash::sha256(token.as_bytes()));
    case("the ath of another token", payload("ath", json!(ath("another"))), Err(ProofError::Ath));
    case("an ath with padding", payload("ath", json!(format!("{}=", ath(TOKEN)))), Err(ProofError::Ath));
    case("an ath in hexadecimal", payload("ath", json!(hash::sha256_hex(TOKEN.as_bytes()))), Err(ProofError::Ath));
    case("the token itself as ath", payload("ath", json!(TOKEN)), Err(ProofError::Ath));
    case("an empty ath", payload("ath", json!("")), Err(ProofError::Ath));
    case("another key, all else right", vec![other.proof(TOKEN, |_, _| {})], Err(ProofError::Key));
    cases
}

fn hmac(header: &str, payload: &str, secret: &[u8]) -> String {
    use aws_lc_rs::hmac;
    let signed = format!("{}.{payload}", base64url(header.as_bytes()));
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), signed.as_bytes());
    format!("{signed}.{}", base64url(tag.as_ref()))
}

fn der(signature: &[u8]) -> Vec<u8> {
    p256::ecdsa::Signature::from_slice(signature).unwrap().to_der().as_bytes().to_vec()
}

/// The signature has 64 bytes, so its last character carries two bits that mean nothing.
fn with_unused_bits(proof: &str) -> String {
    const ALPHABET: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let (head, last) = proof.split_at(proof.len() - 1);
    let value = ALPHABET.find(last).unwrap();
    assert_eq!(value % 16, 0, "64 bytes leave four unused bits");
    format!("{head}{}", &ALPHABET[value + 1..value + 2])
}

#[test]
fn every_rule() {
    let jkt = Client::new(7).jkt();
    for case in cases() {
        let outcome = check(&case.headers, &jkt).map(drop);
        assert_eq!(outcome, case.outcome, "{}: {:?}", case.description, case.headers);
    }
}

/// The same cases for other implementations; `LATCHGATE_WRITE_VECTORS=1` writes the file anew.
#[test]
fn vectors_are_current() {
    let cases: Vec<Value> = cases()
        .into_iter()
        .map(|case| {
            let (error, reason) = match case.outcome {
                Ok(()) => (Value::Null, Value::Null),
                Err(rule) => (json!("invalid_dpop"), json!(rule.to_string())),
            };
            json!({"description": case.description, "dpop": case.headers, "error": error, "deny_reason": reason})
        })
        .collect();
    let document = json!({
        "method": METHOD, "path": PATH, "bases": bases(), "access_token": TOKEN, "now": NOW.secs(),
        "jkt": Client::new(7).jkt(), "cases": cases,
    });
    let text = serde_json::to_string_pretty(&document).unwrap() + "\n";
    if std::env::var_os("LATCHGATE_WRITE_VECTORS").is_some() {
        std::fs::write(VECTORS, &text).unwrap();
    }
    assert_eq!(std::fs::read_to_string(VECTORS).unwrap_or_default(), text, "LATCHGATE_WRITE_VECTORS=1 writes it");
}

#[test]
fn proofs_that_a_fresh_memory_may_have_missed() {
    let client = Client::new(7);
    let at = |start: i64| {
        let proof = client.proof(TOKEN, |_, _| {});
        let expected = Expected {
            method: METHOD,
            path: PATH,
            bases: &bases(),
            token: TOKEN.as_bytes(),
            jkt: &client.jkt(),
            now: NOW,
            not_before: Some(Timestamp::from_secs(NOW.secs() - start)),
        };
        Proof::verify(&[proof.as_bytes()], &expected).map(drop)
    };
    assert_eq!(at(0), Err(ProofError::BeforeStart));
    assert_eq!(at(5), Err(ProofError::BeforeStart));
    assert_eq!(at(6), Ok(()));
}

#[test]
fn a_jti_is_remembered_past_the_end_of_its_proof() {
    let client = Client::new(7);
    let proof = check(&[client.proof(TOKEN, |_, _| {})], &client.jkt()).unwrap();
    let last_good = Timestamp::from_millis((NOW.secs() + MAX_AGE_SECONDS) * 1000 + 999);
    assert!(proof.remember_until() > last_good.plus_millis(MAX_SKEW_SECONDS * 1000));
}
