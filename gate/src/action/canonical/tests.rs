use serde_json::{Value, json};

use super::*;
use crate::hash::{hex, unhex};

const GOLDEN: &str = include_str!("../../../../definitions/test_vectors/jcs/golden.json");
const REFUSED: &str = include_str!("../../../../definitions/test_vectors/jcs/refused.json");

fn cases(text: &str) -> Vec<Value> {
    serde_json::from_str(text).unwrap()
}

fn text<'a>(case: &'a Value, field: &str) -> &'a str {
    case[field].as_str().unwrap_or_else(|| panic!("{field} of {case}"))
}

#[test]
fn golden_vectors() {
    let cases = cases(GOLDEN);
    assert!(cases.len() >= 40, "{}", cases.len());
    for case in &cases {
        let what = text(case, "description");
        let params = parse_strict(text(case, "input").as_bytes()).unwrap_or_else(|error| panic!("{what}: {error}"));
        let canonical = jcs(&params).unwrap();
        assert_eq!(String::from_utf8_lossy(&canonical), text(case, "canonical"), "{what}");
        assert_eq!(hex(&canonical), text(case, "canonical_hex"), "{what}");
        assert_eq!(request_hash(&params).unwrap(), text(case, "sha256"), "{what}");
        // The canonical form is a fixed point, and reads back to the very same value.
        assert_eq!(parse_strict(&canonical).as_ref(), Ok(&params), "{what}");
    }
}

#[test]
fn refused_vectors() {
    for case in cases(REFUSED) {
        let why = text(&case, "reason");
        let input = match case.get("input_hex") {
            Some(hex) => unhex(hex.as_str().unwrap()).unwrap(),
            None => text(&case, "input").as_bytes().to_vec(),
        };
        let error = parse_strict(&input).expect_err(why);
        assert_eq!(error.code(), text(&case, "error"), "{why}: {error}");
        if let (StrictError::Ambiguous { pointer, .. }, Some(expected)) = (&error, case.get("pointer")) {
            assert_eq!(pointer, expected, "{why}: {error}");
        }
    }
}

//= RFC 8785 appendix B
#[test]
fn numbers_of_the_rfc() {
    for (bits, printed) in [
        (0x0000_0000_0000_0000, "0"),
        (0x8000_0000_0000_0000, "0"),
        (0x0000_0000_0000_0001, "5e-324"),
        (0x8000_0000_0000_0001, "-5e-324"),
        (0x7fef_ffff_ffff_ffff, "1.7976931348623157e+308"),
        (0xffef_ffff_ffff_ffff, "-1.7976931348623157e+308"),
        (0x4340_0000_0000_0000, "9007199254740992"),
        (0xc340_0000_0000_0000, "-9007199254740992"),
        (0x4430_0000_0000_0000, "295147905179352830000"),
        (0x44b5_2d02_c7e1_4af5, "9.999999999999997e+22"),
        (0x44b5_2d02_c7e1_4af6, "1e+23"),
        (0x44b5_2d02_c7e1_4af7, "1.0000000000000001e+23"),
        (0x444b_1ae4_d6e2_ef4e, "999999999999999700000"),
        (0x444b_1ae4_d6e2_ef4f, "999999999999999900000"),
        (0x444b_1ae4_d6e2_ef50, "1e+21"),
        (0x3eb0_c6f7_a0b5_ed8c, "9.999999999999997e-7"),
        (0x3eb0_c6f7_a0b5_ed8d, "0.000001"),
        (0x41b3_de43_5555_5553, "333333333.3333332"),
        (0x41b3_de43_5555_5554, "333333333.33333325"),
        (0x41b3_de43_5555_5555, "333333333.3333333"),
        (0x41b3_de43_5555_5556, "333333333.3333334"),
        (0x41b3_de43_5555_5557, "333333333.33333343"),
        (0xbecb_f647_612f_3696, "-0.0000033333333333333333"),
        (0x4314_3ff3_c1cb_0959, "1424953923781206.2"),
    ] {
        let number = f64::from_bits(bits);
        assert_eq!(jcs(&number).unwrap(), printed.as_bytes(), "{bits:016x}");
        assert_eq!(jcs(&json!([number])).unwrap(), format!("[{printed}]").into_bytes(), "{bits:016x}");
    }
    assert!(jcs(&f64::NAN).is_err());
    assert!(jcs(&f64::INFINITY).is_err());
}

#[test]
fn an_empty_body_is_an_empty_object() {
    assert_eq!(parse_strict(b"").unwrap(), serde_json::Map::new());
    let hash = |body: &[u8]| request_hash(&parse_strict(body).unwrap()).unwrap();
    assert_eq!(hash(b""), hash(b" { } "));
    assert_eq!(hash(b""), "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a");
}

#[test]
fn equal_hashes_mean_equal_values() {
    // What a template or a schema would see must not depend on the spelling that the hash forgets.
    for (left, right) in
        [("1", "1.0"), ("0", "-0.0"), ("100", "1e2"), ("100000000000000000000", "1e20"), ("1e21", "10e20")]
    {
        let value = |number: &str| parse_strict(format!("{{\"n\":{number}}}").as_bytes()).unwrap();
        assert_eq!(value(left), value(right), "{left} {right}");
        assert_eq!(value(left)["n"].to_string(), value(right)["n"].to_string(), "{left} {right}");
    }
}

#[test]
fn nesting_is_bounded() {
    let nested = |levels: usize| {
        let mut body = b"{\"a\":".to_vec();
        body.extend(b"[".repeat(levels - 1));
        body.extend(b"]".repeat(levels - 1));
        body.push(b'}');
        parse_strict(&body)
    };
    assert!(nested(MAX_DEPTH).is_ok());
    let Err(StrictError::Ambiguous { pointer, what }) = nested(MAX_DEPTH + 1) else { panic!() };
    assert_eq!((pointer, what), (format!("/a{}", "/0".repeat(MAX_DEPTH - 1)), "nested too deeply"));
    // The bound holds before the stack does.
    assert!(parse_strict(&b"[".repeat(10_000_000)).is_err());
}

#[test]
fn pointers_are_bounded() {
    let key = "ü~/".repeat(10_000);
    let Err(StrictError::Ambiguous { pointer, .. }) = parse_strict(format!("{{\"{key}\":NaN}}").as_bytes()) else {
        panic!()
    };
    assert!(pointer.starts_with("/ü~0~1ü") && pointer.len() < 300, "{pointer}");
}

#[test]
fn whole_documents_are_named_in_errors() {
    let shown = |body: &[u8]| parse_strict(body).unwrap_err().to_string();
    assert_eq!(shown(b"\xff"), "(whole document): bytes that are not UTF-8");
    assert_eq!(shown(b"{\"a\":[{\"b\":1,\"b\":2}]}"), "/a/0/b: the same key twice");
    assert_eq!(shown(b"{,}"), "not JSON: something other than a key at byte 1");
    assert_eq!(shown(b"[1]"), "not a JSON object");
}

proptest::proptest! {
    /// Whatever the strict reader takes, serde_json takes as the same value; and no input makes it panic.
    #[test]
    fn never_laxer_than_serde_json(body in "[\\[\\]{}:,\"\\\\a-bu0-9eE+\\-. tfn]{0,40}") {
        if let Ok(map) = parse_strict(body.as_bytes()) && !body.is_empty() {
            let lax: Value = serde_json::from_str(&body).unwrap();
            assert_eq!(jcs(&lax).unwrap(), jcs(&map).unwrap());
        }
    }

    #[test]
    fn any_bytes(body in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..64)) {
        let _ = parse_strict(&body);
    }

    /// Any double that a writer prints in full comes back, and its canonical form is a fixed point.
    #[test]
    fn doubles(bits in proptest::prelude::any::<u64>()) {
        let number = f64::from_bits(bits);
        if number.is_finite() {
            let params = parse_strict(format!("{{\"n\":{number:e}}}").as_bytes()).unwrap();
            assert_eq!(params["n"].as_f64().unwrap(), number);
            assert_eq!(parse_strict(&jcs(&params).unwrap()).unwrap(), params);
        }
    }
}
