use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use super::jwk::base64url;
use super::lease::{DEFAULT_TTL_SECONDS, IssuedLease, LeaseKeys, NewLease};
use super::operator::{Operator, Operators};
use super::testing::{Client, METHOD, Memory, NOW, PATH};
use super::*;

/// A gate with one client that holds a lease.
struct Scene {
    _dir: tempfile::TempDir,
    keys: Arc<LeaseKeys>,
    issuer: Arc<Issuer>,
    memory: Arc<Memory>,
    authenticator: Authenticator,
    client: Client,
    lease: IssuedLease,
    bases: Vec<String>,
}

impl Scene {
    fn new() -> Self {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::Builder::new().permissions(std::fs::Permissions::from_mode(0o700)).tempdir().unwrap();
        let keys = Arc::new(LeaseKeys::load_or_create(dir.path()).unwrap());
        let issuer =
            Arc::new(Issuer::new(Arc::clone(&keys), "https://gate.example", "gate-1", DEFAULT_TTL_SECONDS).unwrap());
        let memory = Arc::new(Memory::default());
        let authenticator = Authenticator::new(Arc::clone(&issuer), memory.clone(), memory.clone());
        let client = Client::new(7);
        let lease = issuer.issue(&new_lease(&client), NOW).unwrap();
        let bases = vec!["http://localhost".to_owned(), "http://localhost:3000".to_owned()];
        Self { _dir: dir, keys, issuer, memory, authenticator, client, lease, bases }
    }

    fn authorization(&self) -> String {
        format!("DPoP {}", self.lease.lease_jwt)
    }

    fn proof(&self, jti: &str) -> String {
        self.client.proof(&self.lease.lease_jwt, |_, payload| payload["jti"] = json!(jti))
    }

    fn send(&self, authorization: &[&str], dpop: &[&str]) -> Result<Authenticated, AuthError> {
        self.send_as(authorization, dpop, |_| {})
    }

    fn send_as(
        &self,
        authorization: &[&str],
        dpop: &[&str],
        change: impl FnOnce(&mut Presented<'_>),
    ) -> Result<Authenticated, AuthError> {
        let authorization: Vec<&[u8]> = authorization.iter().map(|value| value.as_bytes()).collect();
        let dpop: Vec<&[u8]> = dpop.iter().map(|value| value.as_bytes()).collect();
        let mut presented = Presented {
            authorization: &authorization,
            dpop: &dpop,
            method: METHOD,
            path: PATH,
            bases: &self.bases,
            listener: "agents",
            require_body_binding: false,
            now: NOW,
        };
        change(&mut presented);
        self.authenticator.authenticate(&presented)
    }

    fn good(&self, jti: &str) -> Result<Authenticated, AuthError> {
        self.send(&[&self.authorization()], &[&self.proof(jti)])
    }

    fn jtis(&self) -> usize {
        self.memory.seen.lock().unwrap().len()
    }
}

fn new_lease(client: &Client) -> NewLease {
    NewLease {
        principal: "agent".to_owned(),
        listener: "agents".to_owned(),
        session_id: None,
        jkt: client.jkt(),
        scopes: vec!["tools:call".to_owned()],
        budgets: None,
    }
}

fn code<T>(outcome: Result<T, AuthError>) -> &'static str {
    outcome.map_or_else(|error| error.code(), |_| "ok")
}

#[test]
fn a_lease_and_its_proof() {
    let scene = Scene::new();
    let caller = scene.good("1").unwrap();
    assert_eq!(caller.lease.principal, "agent");
    assert_eq!(caller.lease.lease_jti, scene.lease.lease_jti);
    assert_eq!(caller.jkt, scene.client.jkt());
    assert_eq!(caller.body_claim, None);
}

#[test]
fn authorization_headers() {
    let scene = Scene::new();
    let lease = &scene.lease.lease_jwt;
    let right = scene.authorization();
    for (headers, expected) in [
        (vec![], "missing_auth_header"),
        (vec![right.clone(), right.clone()], "invalid_lease"),
        (vec![right.clone(), String::new()], "invalid_lease"),
        (vec![String::new()], "invalid_lease"),
        (vec!["DPoP".to_owned()], "invalid_lease"),
        (vec!["DPoP ".to_owned()], "invalid_lease"),
        (vec![lease.clone()], "invalid_lease"),
        (vec![format!("Bearer {lease}")], "invalid_lease"),
        (vec![format!("DPoP{lease}")], "invalid_lease"),
        (vec![format!("DPoP\t{lease}")], "invalid_lease"),
        (vec![format!("DPoP {lease} ")], "invalid_lease"),
        (vec![format!("DPoP {lease} {lease}")], "invalid_lease"),
        (vec![format!("DPoP {lease},{lease}")], "invalid_lease"),
        (vec![format!("DPoP {lease}, DPoP {lease}")], "invalid_lease"),
        (vec![format!("DPoP \u{e9}{lease}")], "invalid_lease"),
        (vec![format!("DPoP {}", &lease[1..])], "invalid_lease"),
        (vec![right.clone()], "ok"),
        // RFC 9110 §11.1: the scheme's case does not matter.
        (vec![format!("dpop  {lease}")], "ok"),
    ] {
        let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
        let proof = scene.proof(&headers.concat());
        let proof = if expected == "ok" { scene.proof(&format!("jti-{}", headers[0].len())) } else { proof };
        assert_eq!(code(scene.send(&headers, &[&proof])), expected, "{headers:?}");
    }
    assert_eq!(scene.jtis(), 2, "what is refused burns no jti");
}

#[test]
fn proofs_of_several_headers() {
    let scene = Scene::new();
    let authorization = scene.authorization();
    let (one, two) = (scene.proof("1"), scene.proof("2"));
    for headers in [vec![], vec![one.as_str(), one.as_str()], vec![one.as_str(), two.as_str()], vec![""]] {
        let error = scene.send(&[&authorization], &headers).unwrap_err();
        assert_eq!(error.code(), "invalid_dpop", "{headers:?}");
        assert!(!error.deny_reason().is_empty());
    }
    assert_eq!(scene.jtis(), 0);
    assert_eq!(code(scene.good("1")), "ok");
}

#[test]
fn leases_by_time_place_and_revocation() {
    let scene = Scene::new();
    let authorization = scene.authorization();
    let send = |change: &dyn Fn(&mut Presented<'_>)| {
        let proof = scene.proof("place");
        scene.send_as(&[&authorization], &[&proof], |presented| change(presented))
    };
    assert_eq!(code(send(&|presented| presented.listener = "others")), "invalid_lease");
    assert_eq!(code(send(&|presented| presented.now = Timestamp::from_secs(NOW.secs() - 1))), "invalid_lease");
    scene.memory.broken.store(true, Ordering::Relaxed);
    assert_eq!(code(scene.good("2")), "store_unavailable");
    scene.memory.broken.store(false, Ordering::Relaxed);
    for name in [scene.lease.lease_jti.as_str(), "agent"] {
        scene.memory.revoked.lock().unwrap().insert(name.to_owned());
        assert_eq!(code(scene.good("3")), "lease_revoked");
        scene.memory.revoked.lock().unwrap().clear();
    }
    assert_eq!(scene.jtis(), 0);
    assert_eq!(code(scene.good("4")), "ok");
    // A proof of that later time, so that only the lease is at fault.
    let later = NOW.plus_millis(300_000);
    let proof = scene.client.proof(&scene.lease.lease_jwt, |_, payload| payload["iat"] = json!(later.secs()));
    assert_eq!(code(scene.send_as(&[&authorization], &[&proof], |presented| presented.now = later)), "lease_expired");
}

/// A lease that is refused is refused before anything is said about the proof.
#[test]
fn the_order_of_the_checks() {
    let scene = Scene::new();
    let nonsense = "no proof";
    assert_eq!(code(scene.send(&[], &[nonsense])), "missing_auth_header");
    assert_eq!(code(scene.send(&["DPoP x.y.z"], &[nonsense])), "invalid_lease");
    scene.memory.revoked.lock().unwrap().insert("agent".to_owned());
    assert_eq!(code(scene.send(&[&scene.authorization()], &[nonsense])), "lease_revoked");
    scene.memory.revoked.lock().unwrap().clear();
    assert_eq!(code(scene.send(&[&scene.authorization()], &[nonsense])), "invalid_dpop");
    scene.memory.full.store(true, Ordering::Relaxed);
    assert_eq!(code(scene.send(&[&scene.authorization()], &[nonsense])), "invalid_dpop");
    assert_eq!(code(scene.good("1")), "replay_cache_unavailable");
}

#[test]
fn a_proof_is_spent_once() {
    let scene = Scene::new();
    let (authorization, proof) = (scene.authorization(), scene.proof("once"));
    assert_eq!(code(scene.send(&[&authorization], &[&proof])), "ok");
    assert_eq!(code(scene.send(&[&authorization], &[&proof])), "replay_detected");
    // A new signature over the same jti, and the same jti on another path, are the same proof.
    let elsewhere = scene.client.proof(&scene.lease.lease_jwt, |_, payload| {
        payload["jti"] = json!("once");
        payload["htu"] = json!("http://localhost/v1/receipts/1");
    });
    let outcome = scene.send_as(&[&authorization], &[&elsewhere], |presented| presented.path = "/v1/receipts/1");
    assert_eq!(code(outcome), "replay_detected");
    // Another client's jti is its own: nobody can use up another's.
    let other = Client::new(9);
    let lease = scene.issuer.issue(&new_lease(&other), NOW).unwrap().lease_jwt;
    let proof = other.proof(&lease, |_, payload| payload["jti"] = json!("once"));
    assert_eq!(code(scene.send(&[&format!("DPoP {lease}")], &[&proof])), "ok");
}

/// What the first request proved must not carry over to the second.
#[test]
fn a_known_lease_spares_no_rule() {
    let scene = Scene::new();
    let authorization = scene.authorization();
    assert_eq!(code(scene.good("first")), "ok");
    let lease = &scene.lease.lease_jwt;
    let other = Client::new(9);
    let changed = |change: &dyn Fn(&mut Value, &mut Value)| {
        scene.client.proof(lease, |header, payload| {
            payload["jti"] = json!("second");
            change(header, payload);
        })
    };
    let second = scene.proof("second");
    let segments: Vec<&str> = second.split('.').collect();
    for (what, proof) in [
        ("wrong typ", changed(&|header, _| header["typ"] = json!("JWT"))),
        ("alg none", changed(&|header, _| header["alg"] = json!("none"))),
        ("private member", changed(&|header, _| header["jwk"]["d"] = json!("AA"))),
        ("another key's jwk, signed by this one", changed(&|header, _| header["jwk"] = other.jwk())),
        ("another key's proof", other.proof(lease, |_, payload| payload["jti"] = json!("second"))),
        ("another key's jwk with its own signature", {
            let header = json!({"typ": "dpop+jwt", "alg": "ES256", "jwk": other.jwk()}).to_string();
            let claims = super::jwk::from_base64url(segments[1]).unwrap();
            other.jwt(&header, &String::from_utf8(claims).unwrap())
        }),
        ("this jwk, another key's signature", {
            let signed = format!("{}.{}", segments[0], segments[1]);
            format!("{signed}.{}", base64url(&other.sign(signed.as_bytes())))
        }),
        ("no signature", format!("{}.{}.", segments[0], segments[1])),
        ("off the curve", changed(&|header, _| header["jwk"]["y"] = header["jwk"]["x"].clone())),
        ("htm", changed(&|_, payload| payload["htm"] = json!("GET"))),
        ("htu", changed(&|_, payload| payload["htu"] = json!("http://localhost/"))),
        ("ath", changed(&|_, payload| payload["ath"] = json!("AA"))),
        ("old", changed(&|_, payload| payload["iat"] = json!(NOW.secs() - 61))),
    ] {
        let outcome = scene.send(&[&authorization], &[&proof]);
        assert_eq!(code(outcome), "invalid_dpop", "{what}");
    }
    assert_eq!(scene.jtis(), 1);
    assert_eq!(code(scene.send(&[&authorization], &[&second])), "ok");
}

/// Two leases of two clients: neither proof goes with the other's lease, in either order.
#[test]
fn proofs_are_bound_to_their_lease() {
    let scene = Scene::new();
    let other = Client::new(9);
    let theirs = scene.issuer.issue(&new_lease(&other), NOW).unwrap().lease_jwt;
    assert_eq!(code(scene.good("1")), "ok");
    let stolen = other.proof(&theirs, |_, payload| payload["jti"] = json!("2"));
    assert_eq!(code(scene.send(&[&scene.authorization()], &[&stolen])), "invalid_dpop");
    assert_eq!(code(scene.send(&[&format!("DPoP {theirs}")], &[&scene.proof("3")])), "invalid_dpop");
    // The same key, an earlier lease of it.
    let renewed = scene.issuer.issue(&new_lease(&scene.client), NOW).unwrap().lease_jwt;
    assert_eq!(code(scene.send(&[&format!("DPoP {renewed}")], &[&scene.proof("4")])), "invalid_dpop");
}

#[test]
fn body_claims() {
    let scene = Scene::new();
    let authorization = scene.authorization();
    let send = |jti: &str, claim: Option<&str>, required: bool| {
        let proof = scene.client.proof(&scene.lease.lease_jwt, |_, payload| {
            payload["jti"] = json!(jti);
            if let Some(claim) = claim {
                payload["request_hash"] = json!(claim);
            }
        });
        scene.send_as(&[&authorization], &[&proof], |presented| presented.require_body_binding = required).unwrap()
    };
    let hash = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";
    assert_eq!(code(send("1", None, false).bind_body(hash)), "ok");
    assert_eq!(code(send("2", None, true).bind_body(hash)), "invalid_dpop");
    assert_eq!(code(send("3", Some(hash), true).bind_body(hash)), "ok");
    for (jti, claim) in [("4", ""), ("5", &hash[7..]), ("6", &hash.to_uppercase()), ("7", "sha256:00")] {
        for required in [false, true] {
            let caller = send(&format!("{jti}{required}"), Some(claim), required);
            assert_eq!(code(caller.bind_body(hash)), "invalid_dpop", "{claim}");
        }
    }
    // Spent all the same: the jti is noted before the body is looked at.
    assert!(scene.memory.seen.lock().unwrap().contains(&(scene.client.jkt(), "2".to_owned())));
}

#[test]
fn after_a_restart_without_a_replay_set() {
    let scene = Scene::new();
    *scene.memory.began.lock().unwrap() = Some(NOW);
    // A lease of this run: nothing was ever sent with it before this run began.
    assert_eq!(code(scene.good("1")), "ok");
    // The same keys, read by the next run.
    let keys = Arc::new(LeaseKeys::load_or_create(scene._dir.path()).unwrap());
    assert_eq!(keys.kid(), scene.keys.kid());
    let issuer = Arc::new(Issuer::new(keys, "https://gate.example", "gate-1", DEFAULT_TTL_SECONDS).unwrap());
    let restarted =
        Scene { authenticator: Authenticator::new(issuer, scene.memory.clone(), scene.memory.clone()), ..scene };
    let error = restarted.good("2").unwrap_err();
    assert_eq!((error.code(), error.deny_reason().contains("try again")), ("invalid_dpop", true));
    // The set was on disk: then nothing was missed.
    *restarted.memory.began.lock().unwrap() = None;
    assert_eq!(code(restarted.good("3")), "ok");
    *restarted.memory.began.lock().unwrap() = Some(NOW);
    let later = NOW.plus_millis(6_000);
    let proof = restarted.client.proof(&restarted.lease.lease_jwt, |_, payload| payload["iat"] = json!(later.secs()));
    let outcome = restarted.send_as(&[&restarted.authorization()], &[&proof], |presented| presented.now = later);
    assert_eq!(code(outcome), "ok");
}

#[test]
fn a_clock_that_goes_back() {
    let scene = Scene::new();
    let at = |jti: &str, now: Timestamp| {
        let proof = scene.client.proof(&scene.lease.lease_jwt, |_, payload| {
            payload["jti"] = json!(jti);
            payload["iat"] = json!(now.secs());
        });
        code(scene.send_as(&[&scene.authorization()], &[&proof], |presented| presented.now = now))
    };
    assert_eq!(at("1", Timestamp::from_millis(0)), "clock_error");
    assert_eq!(at("2", Timestamp::from_millis(-1)), "clock_error");
    let later = NOW.plus_millis(60_000);
    assert_eq!(at("3", later), "ok");
    assert_eq!(at("4", later.plus_millis(-5_000)), "ok");
    assert_eq!(at("5", later.plus_millis(-5_001)), "clock_error");
    assert_eq!(at("6", NOW), "clock_error");
    assert_eq!(at("7", later), "ok");
}

#[test]
fn the_cache_of_leases_is_bounded() {
    let scene = Scene::new();
    assert_eq!(code(scene.good("1")), "ok");
    let claims = Arc::clone(scene.authenticator.verified.lock().unwrap().values().next().unwrap());
    {
        let mut verified = scene.authenticator.verified.lock().unwrap();
        verified.clear();
        for number in 0..CACHED_LEASES {
            verified.insert(hash::sha256(&number.to_be_bytes()), Arc::clone(&claims));
        }
    }
    assert_eq!(code(scene.good("2")), "ok");
    assert_eq!(scene.authenticator.verified.lock().unwrap().len(), 1);
    // What does not verify is not kept.
    let forged = scene.authorization().replace("DPoP e", "DPoP f");
    assert_eq!(code(scene.send(&[&forged], &[&scene.proof("3")])), "invalid_lease");
    assert_eq!(scene.authenticator.verified.lock().unwrap().len(), 1);
}

#[test]
fn operators() {
    let scene = Scene::new();
    let api_key = "lgk_0123456789";
    let operator = Operator {
        name: "alice".to_owned(),
        api_key_sha256: hash::sha256(api_key.as_bytes()),
        dpop_jkt: scene.client.jkt(),
        made_in_this_run: false,
    };
    let bob = Operator { name: "bob".to_owned(), api_key_sha256: hash::sha256(b"bob's"), ..operator.clone() };
    let operators = Operators::new(vec![operator.clone(), bob], scene.memory.clone());
    let send_to = |operators: &Operators, authorization: &[&str], proof: &str| {
        let authorization: Vec<&[u8]> = authorization.iter().map(|value| value.as_bytes()).collect();
        operators.authenticate(&Presented {
            authorization: &authorization,
            dpop: &[proof.as_bytes()],
            method: METHOD,
            path: PATH,
            bases: &scene.bases,
            listener: "operators",
            require_body_binding: false,
            now: NOW,
        })
    };
    let send = |authorization: &[&str], proof: &str| send_to(&operators, authorization, proof);
    let right = format!("DPoP {api_key}");
    let proof = |jti: &str| scene.client.proof(api_key, |_, payload| payload["jti"] = json!(jti));
    let alice = send(&[&right], &proof("1")).unwrap();
    assert_eq!((alice.name(), alice.key()), ("alice", &scene.client.public()));
    assert_eq!(code(send(&[&right], &proof("1"))), "replay_detected");
    assert_eq!(code(send(&[], &proof("2"))), "missing_auth_header");
    assert_eq!(code(send(&[&right, &right], &proof("2"))), "identity_unauthenticated");
    for header in ["DPoP lgk_0123456780", "DPoP ", "DPoP", "Bearer lgk_0123456789", &scene.authorization()] {
        assert_eq!(code(send(&[header], &proof("2"))), "identity_unauthenticated", "{header}");
    }
    // A stolen API key without the key pair, and the key pair under another API key.
    let thief = Client::new(9).proof(api_key, |_, _| {});
    assert_eq!(code(send(&[&right], &thief)), "invalid_dpop");
    assert_eq!(code(send(&["DPoP bob's"], &proof("3"))), "invalid_dpop");
    assert_eq!(code(send(&[&right], "")), "invalid_dpop");
    // An API key that is good says nothing about proofs that a lost replay set may have held.
    *scene.memory.began.lock().unwrap() = Some(NOW);
    assert_eq!(code(send(&[&right], &proof("4"))), "invalid_dpop");
    let fresh = Operators::new(vec![Operator { made_in_this_run: true, ..operator }], scene.memory.clone());
    assert_eq!(code(send_to(&fresh, &[&right], &proof("5"))), "ok");
    let nobody = Operators::new(vec![], scene.memory.clone());
    assert_eq!(code(send_to(&nobody, &[&right], &proof("6"))), "identity_unauthenticated");
}

/// What an agent reads names the rule, never a value of the gate's.
#[test]
fn reasons_hold_no_values() {
    let scene = Scene::new();
    let errors = [
        scene.send(&[&scene.authorization()], &[&scene.client.proof("another", |_, _| {})]),
        scene.send_as(&[&scene.authorization()], &[&scene.proof("1")], |presented| presented.listener = "others"),
        scene.send(&["DPoP a.b.c"], &[]),
    ];
    for error in errors {
        let reason = error.unwrap_err().deny_reason();
        for value in ["agents", "gate-1", "gate.example", &scene.client.jkt(), scene.keys.kid()] {
            assert!(!reason.contains(value), "{reason}");
        }
    }
}

proptest::proptest! {
    /// Neither header makes the reader panic, whatever is in it.
    #[test]
    fn any_headers(
        authorization in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..64),
        dpop in "[A-Za-z0-9_.=-]{0,80}",
    ) {
        assert!(dpop_token(&[&authorization]).is_ok());
        let expected = Expected {
            method: METHOD, path: PATH, bases: &[], token: &authorization, jkt: "", now: NOW, not_before: None,
        };
        assert!(Proof::verify(&[dpop.as_bytes()], &expected).is_err());
        assert!(Proof::verify(&[&authorization], &expected).is_err());
    }
}
