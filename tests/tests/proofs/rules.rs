//! The rules of a proof, one broken at a time.

use aws_lc_rs::hmac;
use latchgate_tests::agent::{Agent, Key};
use latchgate_tests::http::{Target, once};
use latchgate_tests::{base64url, hex, now, sha256};
use serde_json::{Value, json};

use crate::{gate, get, proof_of, readable, refused, tcp, with};

/// The order of P-256 (SEC 2 §2.4.2).
pub const ORDER: [u8; 32] = [
    0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xbc, 0xe6, 0xfa, 0xad, 0xa7,
    0x17, 0x9e, 0x84, 0xf3, 0xb9, 0xca, 0xc2, 0xfc, 0x63, 0x25, 0x51,
];

/// What a wrong request is made from: the agent, and proper claims that nobody has used yet.
struct Spoil<'a> {
    agent: &'a Agent,
    other: &'a Agent,
    claims: Value,
}

type Headers = Vec<(String, String)>;

impl Spoil<'_> {
    fn proof(&self, proof: impl Into<String>) -> Headers {
        with(self.agent, proof)
    }

    fn proper(&self) -> String {
        proof_of(self.agent, &self.claims)
    }

    /// One claim set, or taken out where the value is null.
    fn claim(&self, name: &str, value: Value) -> Headers {
        let mut claims = self.claims.clone();
        if value.is_null() {
            claims.as_object_mut().unwrap().remove(name);
        } else {
            claims[name] = value;
        }
        self.proof(proof_of(self.agent, &claims))
    }

    /// One member of the header set or taken out, and signed as it then is.
    fn header(&self, name: &str, value: Value) -> Headers {
        let mut header = self.agent.header();
        if value.is_null() {
            header.as_object_mut().unwrap().remove(name);
        } else {
            header[name] = value;
        }
        self.raw(&header.to_string(), &self.claims.to_string())
    }

    /// One member of the jwk.
    fn jwk(&self, name: &str, value: Value) -> Headers {
        let mut jwk = self.agent.key.jwk();
        if value.is_null() {
            jwk.as_object_mut().unwrap().remove(name);
        } else {
            jwk[name] = value;
        }
        self.header("jwk", jwk)
    }

    /// Header and claims as these very texts, properly signed.
    fn raw(&self, header: &str, claims: &str) -> Headers {
        self.proof(self.agent.key.jwt(header, claims))
    }

    /// The proper proof with another signature.
    fn signature(&self, change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> Headers {
        let proper = self.proper();
        let (signed, _) = proper.rsplit_once('.').unwrap();
        let signature = change(self.agent.key.sign(signed.as_bytes()));
        self.proof(format!("{signed}.{}", base64url(signature)))
    }

    fn hmac(&self, secret: &[u8]) -> Headers {
        let header = json!({"typ": "dpop+jwt", "alg": "HS256", "jwk": self.agent.key.jwk()}).to_string();
        let signed = format!("{}.{}", base64url(header), base64url(self.claims.to_string()));
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), signed.as_bytes());
        self.proof(format!("{signed}.{}", base64url(tag)))
    }
}

/// DER (RFC 3279 §2.2.3) of a P1363 signature.
fn der(signature: &[u8]) -> Vec<u8> {
    let integer = |bytes: &[u8]| {
        let start = bytes.iter().position(|&byte| byte != 0).unwrap_or(31);
        let mut value = bytes[start..].to_vec();
        if value[0] & 0x80 != 0 {
            value.insert(0, 0);
        }
        [vec![2, u8::try_from(value.len()).unwrap()], value].concat()
    };
    let inside = [integer(&signature[..32]), integer(&signature[32..])].concat();
    [vec![0x30, u8::try_from(inside.len()).unwrap()], inside].concat()
}

/// (what is wrong, code, words of the reason, the headers)
type Row = (&'static str, &'static str, &'static str, fn(&Spoil<'_>) -> Headers);

const DPOP: &str = "401 invalid_dpop";
const SHAPE: &str = "well-formed JWT";

const HEADERS: &[Row] = &[
    //= RFC 9449 §4.3 (1)
    ("no proof", DPOP, "no DPoP header", |s| vec![("authorization".into(), s.agent.authorization())]),
    ("two proofs", DPOP, "more than one", |s| {
        let mut headers = s.proof(s.proper());
        headers.push(("dpop".into(), s.proper()));
        headers
    }),
    ("two proofs, the second empty", DPOP, "more than one", |s| {
        let mut headers = s.proof(s.proper());
        headers.push(("DPoP".into(), String::new()));
        headers
    }),
    ("two proofs in one header", DPOP, SHAPE, |s| s.proof(format!("{}, {}", s.proper(), s.proper()))),
    ("no lease", "401 missing_auth_header", "", |s| vec![("dpop".into(), s.proper())]),
    ("two leases", "401 invalid_lease", "more than one", |s| {
        let mut headers = s.proof(s.proper());
        headers.push(("authorization".into(), s.agent.authorization()));
        headers
    }),
    ("a bearer token", "401 invalid_lease", "", |s| {
        vec![("authorization".into(), format!("Bearer {}", s.agent.lease)), ("dpop".into(), s.proper())]
    }),
    ("two leases in one header", "401 invalid_lease", "", |s| {
        vec![("authorization".into(), format!("DPoP {}, DPoP {0}", s.agent.lease)), ("dpop".into(), s.proper())]
    }),
    ("a scheme alone", "401 invalid_lease", "", |s| {
        vec![("authorization".into(), "DPoP".into()), ("dpop".into(), s.proper())]
    }),
    //= RFC 9449 §4.3 (2)
    ("an empty proof", DPOP, SHAPE, |s| s.proof("")),
    ("no JWT", DPOP, SHAPE, |s| s.proof("proof")),
    ("two segments", DPOP, SHAPE, |s| s.proof(s.proper().rsplit_once('.').unwrap().0)),
    ("four segments", DPOP, SHAPE, |s| s.proof(format!("{}.", s.proper()))),
    ("padding", DPOP, SHAPE, |s| s.proof(format!("{}==", s.proper()))),
    ("bits that base64url leaves over", DPOP, SHAPE, |s| {
        let mut proof = s.proper();
        // 64 bytes leave 4 bits of the last character unused: the next character decodes to the same bytes.
        let last = proof.pop().unwrap();
        proof.push(char::from(u8::try_from(last).unwrap() + 1));
        s.proof(proof)
    }),
    ("the standard alphabet", DPOP, SHAPE, |s| {
        // A text whose base64 needs both characters that differ.
        let header = s.agent.header().to_string().replacen('{', "{\"kid\":\"\u{3fb}\u{fff}\u{3fb}?>?>~~~\",", 1);
        let signed =
            format!("{}.{}", base64url(header), base64url(s.claims.to_string())).replace('-', "+").replace('_', "/");
        assert!(signed.contains('+') || signed.contains('/'));
        s.proof(format!("{signed}.{}", base64url(s.agent.key.sign(signed.as_bytes()))))
    }),
    ("JSON serialisation", DPOP, SHAPE, |s| {
        let proof = s.proper();
        let parts: Vec<&str> = proof.split('.').collect();
        s.proof(json!({"protected": parts[0], "payload": parts[1], "signature": parts[2]}).to_string())
    }),
    ("five segments of encryption", DPOP, SHAPE, |s| s.proof(format!("{}.AA.AA", s.proper()))),
    ("longer than is read", DPOP, "longer than", |s| s.claim("more", json!("x".repeat(4096)))),
    ("a header that is no JSON", DPOP, SHAPE, |s| s.raw("typ=dpop+jwt", &s.claims.to_string())),
    ("a header that is an array", DPOP, SHAPE, |s| s.raw("[]", &s.claims.to_string())),
    ("claims that are no object", DPOP, SHAPE, |s| s.raw(&s.agent.header().to_string(), "\"claims\"")),
    ("something after the claims", DPOP, SHAPE, |s| {
        s.raw(&s.agent.header().to_string(), &format!("{} {{}}", s.claims))
    }),
    ("alg twice", DPOP, SHAPE, |s| {
        s.raw(&s.agent.header().to_string().replacen('{', "{\"alg\":\"none\",", 1), &s.claims.to_string())
    }),
    ("typ twice, the same", DPOP, SHAPE, |s| {
        s.raw(&s.agent.header().to_string().replacen('{', "{\"typ\":\"dpop+jwt\",", 1), &s.claims.to_string())
    }),
    ("jwk twice", DPOP, SHAPE, |s| {
        let other = format!("{{\"jwk\":{},", s.other.key.jwk());
        s.raw(&s.agent.header().to_string().replacen('{', &other, 1), &s.claims.to_string())
    }),
    ("x twice in the jwk", DPOP, SHAPE, |s| {
        let header = s.agent.header().to_string().replacen("\"crv\"", "\"x\":\"AAAA\",\"crv\"", 1);
        s.raw(&header, &s.claims.to_string())
    }),
    ("alg twice, one of them escaped", DPOP, SHAPE, |s| {
        s.raw(&s.agent.header().to_string().replacen('{', "{\"\\u0061lg\":\"none\",", 1), &s.claims.to_string())
    }),
    ("jti twice", DPOP, SHAPE, |s| {
        s.raw(&s.agent.header().to_string(), &s.claims.to_string().replacen('{', "{\"jti\":\"another\",", 1))
    }),
    ("htu twice, the same", DPOP, SHAPE, |s| {
        let htu = format!("{{\"htu\":{},", s.claims["htu"]);
        s.raw(&s.agent.header().to_string(), &s.claims.to_string().replacen('{', &htu, 1))
    }),
    ("a lone surrogate", DPOP, SHAPE, |s| {
        s.raw(&s.agent.header().to_string(), &s.claims.to_string().replacen('{', "{\"note\":\"\\ud800\",", 1))
    }),
    //= RFC 9449 §4.3 (4)
    ("no typ", DPOP, "typ", |s| s.header("typ", Value::Null)),
    ("typ JWT", DPOP, "typ", |s| s.header("typ", json!("JWT"))),
    ("typ in capitals", DPOP, "typ", |s| s.header("typ", json!("DPOP+JWT"))),
    ("typ as a full media type", DPOP, "typ", |s| s.header("typ", json!("application/dpop+jwt"))),
    ("typ as a list", DPOP, "typ", |s| s.header("typ", json!(["dpop+jwt"]))),
    //= RFC 9449 §4.3 (5)
    ("no alg", DPOP, "alg", |s| s.header("alg", Value::Null)),
    ("alg none, signed", DPOP, "alg", |s| s.header("alg", json!("none"))),
    ("alg none, without a signature", DPOP, "alg", |s| {
        let header = json!({"typ": "dpop+jwt", "alg": "none", "jwk": s.agent.key.jwk()});
        s.proof(format!("{}.{}.", base64url(header.to_string()), base64url(s.claims.to_string())))
    }),
    ("alg nOnE", DPOP, "alg", |s| s.header("alg", json!("nOnE"))),
    ("HS256 with the public key", DPOP, "alg", |s| s.hmac(s.agent.key.jwk().to_string().as_bytes())),
    ("HS256 with the x of the public key", DPOP, "alg", |s| {
        s.hmac(s.agent.key.jwk()["x"].as_str().unwrap().as_bytes())
    }),
    ("alg ES384", DPOP, "alg", |s| s.header("alg", json!("ES384"))),
    ("alg RS256", DPOP, "alg", |s| s.header("alg", json!("RS256"))),
    ("alg es256", DPOP, "alg", |s| s.header("alg", json!("es256"))),
    ("members that ask for another reading", DPOP, "members other than", |s| {
        let mut header = s.agent.header();
        header["crit"] = json!(["b64"]);
        header["b64"] = json!(false);
        s.raw(&header.to_string(), &s.claims.to_string())
    }),
    ("a kid", DPOP, "members other than", |s| s.header("kid", json!("../../key"))),
    ("a jku", DPOP, "members other than", |s| s.header("jku", json!("http://127.0.0.1/jwks"))),
    ("an x5c", DPOP, "members other than", |s| s.header("x5c", json!(["AAAA"]))),
];

const KEYS: &[Row] = &[
    //= RFC 9449 §4.3 (7), and that there is a key at all
    ("no jwk", DPOP, "jwk", |s| s.header("jwk", Value::Null)),
    ("a jwk as text", DPOP, "jwk", |s| s.header("jwk", json!(s.agent.key.jwk().to_string()))),
    ("a private member", DPOP, "private", |s| s.jwk("d", json!(base64url([7; 32])))),
    ("an empty private member", DPOP, "private", |s| s.jwk("d", json!(""))),
    ("a symmetric key", DPOP, "private", |s| s.jwk("k", json!(base64url([7; 32])))),
    ("no kty", DPOP, "P-256", |s| s.jwk("kty", Value::Null)),
    ("kty OKP", DPOP, "P-256", |s| s.jwk("kty", json!("OKP"))),
    ("no crv", DPOP, "P-256", |s| s.jwk("crv", Value::Null)),
    ("crv P-384", DPOP, "P-256", |s| s.jwk("crv", json!("P-384"))),
    ("crv secp256k1", DPOP, "P-256", |s| s.jwk("crv", json!("secp256k1"))),
    ("no y", DPOP, "coordinate", |s| s.jwk("y", Value::Null)),
    ("x of 31 bytes", DPOP, "coordinate", |s| s.jwk("x", json!(base64url([1; 31])))),
    ("x of 33 bytes", DPOP, "coordinate", |s| s.jwk("x", json!(base64url([1; 33])))),
    ("x with padding", DPOP, "coordinate", |s| {
        s.jwk("x", json!(format!("{}=", s.agent.key.jwk()["x"].as_str().unwrap())))
    }),
    ("a point off the curve", DPOP, "curve", |s| s.jwk("y", json!(base64url([1; 32])))),
    ("the point (0, 0)", DPOP, "curve", |s| {
        let zero = json!(base64url([0; 32]));
        s.header("jwk", json!({"kty": "EC", "crv": "P-256", "x": zero, "y": zero}))
    }),
    ("x beyond the field", DPOP, "curve", |s| s.jwk("x", json!(base64url([0xff; 32])))),
    ("a key for encryption", DPOP, "ES256 signatures", |s| s.jwk("use", json!("enc"))),
    ("a key for another alg", DPOP, "ES256 signatures", |s| s.jwk("alg", json!("ES384"))),
    ("a key that may not verify", DPOP, "ES256 signatures", |s| s.jwk("key_ops", json!(["sign"]))),
    //= RFC 9449 §4.3 (6)
    ("no signature", DPOP, "signature", |s| s.signature(|_| Vec::new())),
    ("a bit of the signature", DPOP, "signature", |s| {
        s.signature(|mut signature| {
            signature[40] ^= 1;
            signature
        })
    }),
    ("a signature in DER", DPOP, "signature", |s| s.signature(|signature| der(&signature))),
    ("63 bytes", DPOP, "signature", |s| s.signature(|signature| signature[..63].to_vec())),
    ("65 bytes", DPOP, "signature", |s| s.signature(|signature| [signature, vec![0]].concat())),
    ("r and s zero", DPOP, "signature", |s| s.signature(|_| vec![0; 64])),
    ("r zero", DPOP, "signature", |s| s.signature(|signature| [vec![0; 32], signature[32..].to_vec()].concat())),
    ("s the order of the group", DPOP, "signature", |s| {
        s.signature(|signature| [signature[..32].to_vec(), ORDER.to_vec()].concat())
    }),
    ("r and s the order of the group", DPOP, "signature", |s| s.signature(|_| [ORDER, ORDER].concat())),
    ("the signature of another proof", DPOP, "signature", |s| {
        let other = s.agent.key.sign(b"something else");
        s.signature(|_| other)
    }),
    ("another's signature under the own key", DPOP, "signature", |s| {
        s.proof(s.other.key.jwt(&s.agent.header().to_string(), &s.claims.to_string()))
    }),
    ("a claim changed afterwards", DPOP, "signature", |s| {
        let proof = s.proper();
        let parts: Vec<&str> = proof.split('.').collect();
        let mut claims = s.claims.clone();
        claims["iat"] = json!(now() - 1);
        s.proof(format!("{}.{}.{}", parts[0], base64url(claims.to_string()), parts[2]))
    }),
    //= RFC 9449 §4.3 (12): the key that the lease is bound to
    ("another key's proof", DPOP, "the lease is bound to", |s| {
        s.proof(s.other.key.jwt(&s.other.header().to_string(), &s.claims.to_string()))
    }),
    ("another's lease, with the own key", DPOP, "the lease is bound to", |s| {
        let mut claims = s.claims.clone();
        claims["ath"] = json!(base64url(sha256(&s.other.lease)));
        vec![("authorization".into(), s.other.authorization()), ("dpop".into(), proof_of(s.agent, &claims))]
    }),
    ("a key that has no lease", DPOP, "the lease is bound to", |s| {
        let key = Key::generate();
        let header = json!({"typ": "dpop+jwt", "alg": "ES256", "jwk": key.jwk()});
        s.proof(key.jwt(&header.to_string(), &s.claims.to_string()))
    }),
];

const CLAIMS: &[Row] = &[
    //= RFC 9449 §4.3 (3)
    ("no jti", DPOP, "claim jti", |s| s.claim("jti", Value::Null)),
    ("no htm", DPOP, "claim htm", |s| s.claim("htm", Value::Null)),
    ("no htu", DPOP, "claim htu", |s| s.claim("htu", Value::Null)),
    ("no iat", DPOP, "claim iat", |s| s.claim("iat", Value::Null)),
    ("no ath", DPOP, "claim ath", |s| s.claim("ath", Value::Null)),
    ("no claims", DPOP, "claim", |s| s.raw(&s.agent.header().to_string(), "{}")),
    ("jti a number", DPOP, "claim jti", |s| s.claim("jti", json!(1))),
    ("htm a list", DPOP, "claim htm", |s| s.claim("htm", json!(["GET"]))),
    ("htu a list", DPOP, "claim htu", |s| s.claim("htu", json!([s.claims["htu"]]))),
    ("iat a text", DPOP, "claim iat", |s| s.claim("iat", json!(now().to_string()))),
    ("iat with a fraction", DPOP, "claim iat", |s| s.claim("iat", json!(now() as f64 + 0.5))),
    ("ath a number", DPOP, "claim ath", |s| s.claim("ath", json!(0))),
    ("request_hash a list", DPOP, "claim request_hash", |s| s.claim("request_hash", json!([]))),
    //= RFC 9449 §4.3 (8)
    ("another method", DPOP, "htm", |s| s.claim("htm", json!("POST"))),
    ("the method in small letters", DPOP, "htm", |s| s.claim("htm", json!("get"))),
    ("no method", DPOP, "htm", |s| s.claim("htm", json!(""))),
    ("the method and a space", DPOP, "htm", |s| s.claim("htm", json!("GET "))),
    //= RFC 9449 §4.3 (9)
    ("another path", DPOP, "htu", |s| s.claim("htu", json!(format!("{}/v1/receipts/other", s.agent.base)))),
    ("no path", DPOP, "htu", |s| s.claim("htu", json!(s.agent.base))),
    ("a path that goes on", DPOP, "htu", |s| s.claim("htu", json!(format!("{}/", s.claims["htu"].as_str().unwrap())))),
    ("a path in capitals", DPOP, "htu", |s| {
        s.claim("htu", json!(s.claims["htu"].as_str().unwrap().replace("receipts", "RECEIPTS")))
    }),
    ("an encoded slash", DPOP, "htu", |s| {
        s.claim("htu", json!(s.claims["htu"].as_str().unwrap().replace("v1/", "v1%2f")))
    }),
    ("an empty segment", DPOP, "htu", |s| {
        s.claim("htu", json!(s.claims["htu"].as_str().unwrap().replace("v1/", "v1//")))
    }),
    ("a path alone", DPOP, "htu", |s| {
        s.claim("htu", json!(s.claims["htu"].as_str().unwrap().replace(&s.agent.base, "")))
    }),
    ("another host", DPOP, "htu", |s| {
        s.claim("htu", json!(s.claims["htu"].as_str().unwrap().replace("//", "//evil.")))
    }),
    ("a host that goes on", DPOP, "htu", |s| {
        s.claim("htu", json!(s.claims["htu"].as_str().unwrap().replace("/v1", ".evil.test/v1")))
    }),
    ("user information", DPOP, "htu", |s| {
        s.claim("htu", json!(s.claims["htu"].as_str().unwrap().replace("//", "//a@")))
    }),
    ("https", DPOP, "htu", |s| s.claim("htu", json!(s.claims["htu"].as_str().unwrap().replace("http:", "https:")))),
    ("another port", DPOP, "htu", |s| s.claim("htu", json!(format!("http://localhost:1{}", path_of(s))))),
    ("a host that ends in a dot", DPOP, "htu", |s| s.claim("htu", json!(format!("http://localhost.{}", path_of(s))))),
    ("a space before it", DPOP, "htu", |s| s.claim("htu", json!(format!(" {}", s.claims["htu"].as_str().unwrap())))),
    ("no htu text", DPOP, "htu", |s| s.claim("htu", json!(""))),
    //= RFC 9449 §4.3 (11)
    ("too old", DPOP, "too old", |s| s.claim("iat", json!(now() - 62))),
    ("from long ago", DPOP, "too old", |s| s.claim("iat", json!(0))),
    ("before time", DPOP, "too old", |s| s.claim("iat", json!(-1))),
    ("in the future", DPOP, "future", |s| s.claim("iat", json!(now() + 8))),
    ("far in the future", DPOP, "future", |s| s.claim("iat", json!(1_i64 << 53))),
    ("in milliseconds", DPOP, "future", |s| s.claim("iat", json!(now() * 1000))),
    //= RFC 9449 §4.3 (12)
    ("ath of another lease", DPOP, "ath", |s| s.claim("ath", json!(base64url(sha256(&s.other.lease))))),
    ("ath in hexadecimal", DPOP, "ath", |s| s.claim("ath", json!(hex(sha256(&s.agent.lease))))),
    ("ath with padding", DPOP, "ath", |s| s.claim("ath", json!(format!("{}=", s.claims["ath"].as_str().unwrap())))),
    ("ath of the whole header", DPOP, "ath", |s| s.claim("ath", json!(base64url(sha256(s.agent.authorization()))))),
    ("an empty ath", DPOP, "ath", |s| s.claim("ath", json!(""))),
    //= RFC 9449 §11.1
    ("an empty jti", DPOP, "jti", |s| s.claim("jti", json!(""))),
    ("a jti of 257 characters", DPOP, "jti", |s| s.claim("jti", json!("j".repeat(257)))),
];

fn path_of(spoil: &Spoil<'_>) -> String {
    spoil.claims["htu"].as_str().unwrap().replace(&spoil.agent.base, "")
}

/// Each row: the wrong request is refused for the reason that it was made for, and then the proper proof passes with
/// the very claims, jti included: what was refused burned nothing.
fn refuse_each(name: &str, rows: &[Row]) {
    let gate = gate(name).start();
    for target in [gate.agent(), tcp(&gate)] {
        let (agent, other) = (Agent::connect(&target), Agent::connect(&target));
        let path = readable(&agent);
        for (what, code, reason, make) in rows {
            let spoil = Spoil { agent: &agent, other: &other, claims: agent.claims("GET", &path) };
            refused(what, &get(&agent, &path, &make(&spoil)), code, reason);
            let proper = get(&agent, &path, &with(&agent, spoil.proper()));
            assert_eq!(proper.status, 200, "beside {what}: {}", String::from_utf8_lossy(&proper.body));
        }
    }
}

#[test]
fn headers_and_form() {
    refuse_each("form", HEADERS);
}

#[test]
fn keys_and_signatures() {
    refuse_each("keys", KEYS);
}

#[test]
fn claims() {
    refuse_each("claims", CLAIMS);
}

/// What differs from the published client's proof and is a proper one all the same.
#[test]
fn what_is_allowed_to_differ() {
    let gate = gate("differ").config("[auth]\nlease_ttl_seconds = 600").start();
    for target in [gate.agent(), tcp(&gate)] {
        let agent = Agent::connect(&target);
        let path = readable(&agent);
        let base = &agent.base;
        let passes = |what: &str, name: &str, value: Value| {
            let mut claims = agent.claims("GET", &path);
            claims[name] = value;
            let response = get(&agent, &path, &with(&agent, proof_of(&agent, &claims)));
            assert_eq!(response.status, 200, "{what}: {}", String::from_utf8_lossy(&response.body));
        };
        passes("a query", "htu", json!(format!("{base}{path}?x=1")));
        passes("a fragment", "htu", json!(format!("{base}{path}#f")));
        passes("a scheme in capitals", "htu", json!(format!("{base}{path}").replace("http", "HTTP")));
        passes("an escape that needs none", "htu", json!(format!("{base}{}", path.replace("v1", "%76%31"))));
        passes("a dot segment", "htu", json!(format!("{base}{}", path.replace("/v1", "/v1/./x/../../v1"))));
        passes("an old iat", "iat", json!(now() - 55));
        passes("an early iat", "iat", json!(now() + 4));
        passes("a long jti", "jti", json!("j".repeat(256)));
        passes("a long jti that is not ASCII", "jti", json!("\u{e9}".repeat(256)));
        passes("a claim more", "nonce", json!("x"));
        if matches!(target, Target::Unix(_)) {
            passes("the port that some clients name", "htu", json!(format!("http://localhost:3000{path}")));
            passes("the default port", "htu", json!(format!("http://LOCALHOST:80{path}")));
        }
        // The scheme of the Authorization header has no case (RFC 9110 §11.1), and Host takes no part.
        let headers = [("authorization", format!("dpop {}", agent.lease)), ("dpop", agent.proof("GET", &path))]
            .map(|(name, value)| (name.to_owned(), value));
        assert_eq!(get(&agent, &path, &headers).status, 200);
        // The request's own query is no part of htu either.
        let response = get(&agent, &format!("{path}?y=2"), &with(&agent, agent.proof("GET", &path)));
        assert_eq!(response.status, 200);
    }
}

#[test]
fn configured_base_urls_are_accepted_and_those_of_other_listeners_are_not() {
    let gate = gate("bases").config("").start();
    let (unix, net) = (Agent::connect(&gate.agent()), Agent::connect(&tcp(&gate)));
    let (unix_path, net_path) = (readable(&unix), readable(&net));
    let ask = |agent: &Agent, path: &str, base: &str| {
        let mut claims = agent.claims("GET", path);
        claims["htu"] = json!(format!("{base}{path}"));
        get(agent, path, &with(agent, proof_of(agent, &claims)))
    };
    for (agent, path, base) in [
        (&unix, &unix_path, net.base.as_str()),
        (&net, &net_path, "http://localhost"),
        (&net, &net_path, "http://localhost:3000"),
        (&unix, &unix_path, "https://gate.example.test"),
    ] {
        refused(base, &ask(agent, path, base), "401 invalid_dpop", "htu");
        assert_eq!(ask(agent, path, &agent.base).status, 200, "{base}");
    }
    drop(gate);

    let setup = latchgate_tests::gate::Setup::new("public");
    let mut gate = setup.command("echo", "exec cat", "{profile: none}").start();
    gate.kill();
    // `public_base_urls` is a key of the top level, so it goes before the first section.
    let file = gate.directory().join("latchgate.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("public_base_urls = [\"https://gate.example.test/base/\"]\n{text}")).unwrap();
    gate.start();
    let agent = Agent::connect(&gate.agent());
    let path = readable(&agent);
    assert_eq!(ask(&agent, &path, "https://gate.example.test/base").status, 200);
    assert_eq!(ask(&agent, &path, "https://GATE.example.test:443/base").status, 200);
    assert_eq!(ask(&agent, &path, "http://localhost").status, 200);
    refused("no base path", &ask(&agent, &path, "https://gate.example.test"), "401 invalid_dpop", "htu");
}

/// A verified lease is remembered; a proof never is. The second request on a warm connection and a warm cache is held
/// to the rules as the first was.
#[test]
fn a_lease_that_was_seen_spares_no_rule() {
    let gate = gate("warm").start();
    let (agent, other) = (Agent::connect(&gate.agent()), Agent::connect(&gate.agent()));
    let path = readable(&agent);
    let mut connection = latchgate_tests::http::Connection::open(&gate.agent()).unwrap();
    let authorization = agent.authorization();
    let mut ask = |proof: String| {
        connection.request("GET", &path, &[("authorization", &authorization), ("dpop", &proof)], None).unwrap()
    };
    let claims = || agent.claims("GET", &path).to_string();
    let typ = agent.header().to_string().replace("dpop+jwt", "jwt");
    let mut private = agent.header();
    private["jwk"]["d"] = json!(base64url([1; 32]));
    let foreign = json!({"typ": "dpop+jwt", "alg": "ES256", "jwk": other.key.jwk()}).to_string();
    for (what, reason, proof) in [
        ("wrong typ", "typ", agent.key.jwt(&typ, &claims())),
        ("another key's jwk", "the lease is bound to", other.key.jwt(&foreign, &claims())),
        ("another key's jwk, own signature", "signature", agent.key.jwt(&foreign, &claims())),
        ("a private member", "private", agent.key.jwt(&private.to_string(), &claims())),
    ] {
        assert_eq!(ask(agent.proof("GET", &path)).status, 200, "before {what}");
        refused(what, &ask(proof), "401 invalid_dpop", reason);
    }
    assert_eq!(ask(agent.proof("GET", &path)).status, 200);
}

#[test]
fn the_body_claim_binds_the_body() {
    let path = "/v1/actions/echo/execute";
    let body = br#"{ "b": 1.0, "a": "\u00e9" }"#;
    let canonical = "{\"a\":\"\u{e9}\",\"b\":1}";
    let hash = |text: &str| format!("sha256:{}", hex(sha256(text)));
    for required in [false, true] {
        let gate = gate("body").config(&format!("[auth]\nrequire_body_binding = {required}")).start();
        for target in [gate.agent(), tcp(&gate)] {
            let agent = Agent::connect(&target);
            let execute = |claim: Option<String>, body: &[u8]| {
                let mut claims = agent.claims("POST", path);
                if let Some(claim) = claim {
                    claims["request_hash"] = json!(claim);
                }
                let proof = proof_of(&agent, &claims);
                (agent.execute_with(path, &proof, body), proof)
            };
            let response = execute(Some(hash(canonical)), body).0;
            assert_eq!(response.status, 200, "{}", String::from_utf8_lossy(&response.body));
            assert_eq!(execute(Some(hash("{}")), b"").0.status, 200, "an empty body is {{}}");
            for (what, claim) in [
                ("of another body", hash("{\"a\":\"\u{e9}\",\"b\":2}")),
                ("of the bytes as sent", hash(std::str::from_utf8(body).unwrap())),
                ("without its prefix", hex(sha256(canonical))),
                ("in capitals", hash(canonical).to_uppercase()),
                ("empty", String::new()),
            ] {
                let (response, proof) = execute(Some(claim), body);
                refused(what, &response, "401 invalid_dpop", "request_hash");
                // Seen is spent: the jti is stored before the body claim is compared.
                assert_eq!(agent.execute_with(path, &proof, body).code(), "401 replay_detected", "{what}");
            }
            let response = execute(None, body).0;
            if required {
                refused("absent", &response, "401 invalid_dpop", "request_hash");
            } else {
                assert_eq!(response.status, 200);
            }
            // On other routes it binds nothing, and is not asked for.
            let id = execute(Some(hash("{}")), b"{}").0.json()["receipt_id"].as_str().unwrap().to_owned();
            assert_eq!(agent.receipt(&id).status, 200);
        }
    }
}

/// On a TCP listener that is not loopback the claim is required, whatever the configuration says. The listener is
/// reached over loopback.
#[test]
fn beyond_loopback_the_body_claim_is_required() {
    let gate = latchgate_tests::gate::Setup::new("beyond")
        .command("echo", "exec cat", "{profile: none}")
        .config("[[listeners]]\nname = \"tcp\"\naddress = \"0.0.0.0:0\"\n[identity.tcp]\nprincipal = \"tester\"\n")
        .start();
    let Target::Tcp(address) = tcp(&gate) else { unreachable!() };
    let mut agent = Agent::connect(&Target::Tcp(([127, 0, 0, 1], address.port()).into()));
    agent.base = format!("http://{address}");
    refused("absent", &agent.execute("echo", &json!({})), "401 invalid_dpop", "request_hash");
    let path = "/v1/actions/echo/execute";
    let mut claims = agent.claims("POST", path);
    claims["request_hash"] = json!(format!("sha256:{}", hex(sha256("{}"))));
    assert_eq!(agent.execute_with(path, &proof_of(&agent, &claims), b"{}").status, 200);
    assert_eq!(Agent::connect(&gate.agent()).execute("echo", &json!({})).status, 200, "the Unix listener does not ask");
}

/// Proofs are for execute as they are for a receipt.
#[test]
fn execute_is_held_to_the_same_rules() {
    let gate = gate("execute").start();
    let agent = Agent::connect(&gate.agent());
    let path = "/v1/actions/echo/execute";
    for (what, name, value, reason) in [
        ("htm", "htm", json!("GET"), "htm"),
        ("htu of another action", "htu", json!("http://localhost/v1/actions/other/execute"), "htu"),
        ("iat", "iat", json!(now() - 100), "too old"),
        ("ath", "ath", json!(base64url(sha256("x"))), "ath"),
    ] {
        let mut claims = agent.claims("POST", path);
        let proper = claims.clone();
        claims[name] = value;
        refused(what, &agent.execute_with(path, &proof_of(&agent, &claims), b"{}"), "401 invalid_dpop", reason);
        assert_eq!(agent.execute_with(path, &proof_of(&agent, &proper), b"{}").status, 200, "{what}");
    }
    let authorization = agent.authorization();
    let headers = [("authorization", authorization.as_str()), ("content-type", "application/json")];
    refused("no proof", &once(&agent.target, "POST", path, &headers, Some(b"{}")), "401 invalid_dpop", "no DPoP");
}
