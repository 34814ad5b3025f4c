//! A proof passes once: on one connection or sixteen, before the gate is killed or after.

use std::fs;
use std::sync::Barrier;
use std::time::Duration;

use latchgate_tests::agent::{Agent, Key};
use latchgate_tests::gate::Gate;
use latchgate_tests::{base64url, now};
use serde_json::json;

use crate::rules::ORDER;
use crate::{gate, get, proof_of, readable, refused, tcp, with};

/// Waits until the clock shows a later second than the gate's start, from which on a proof may be dated far enough
/// ahead to be newer than the gate's memory.
fn let_a_second_pass() {
    let began = now();
    while now() <= began + 1 {
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Claims that are as late as they may be.
fn late_claims(agent: &Agent, path: &str) -> serde_json::Value {
    let mut claims = agent.claims("GET", path);
    claims["iat"] = json!(now() + 5);
    claims
}

#[test]
fn a_proof_passes_once() {
    let gate = gate("once").start();
    for target in [gate.agent(), tcp(&gate)] {
        let agent = Agent::connect(&target);
        let path = readable(&agent);
        let proof = agent.proof("GET", &path);
        assert_eq!(get(&agent, &path, &with(&agent, proof.clone())).status, 200);
        for _ in 0..2 {
            refused("again", &get(&agent, &path, &with(&agent, proof.clone())), "401 replay_detected", "");
        }
        // The jti is what counts: not the other claims, not the signature, not the lease.
        let claims = agent.claims("GET", &path);
        assert_eq!(get(&agent, &path, &with(&agent, proof_of(&agent, &claims))).status, 200);
        let mut older = claims.clone();
        older["iat"] = json!(now() - 10);
        refused("older", &get(&agent, &path, &with(&agent, proof_of(&agent, &older))), "401 replay_detected", "");
        let signed_again = get(&agent, &path, &with(&agent, proof_of(&agent, &claims)));
        refused("signed again", &signed_again, "401 replay_detected", "");
        let mut elsewhere = agent.claims("POST", "/v1/actions/echo/execute");
        elsewhere["jti"] = claims["jti"].clone();
        let proof = proof_of(&agent, &elsewhere);
        let response = agent.execute_with("/v1/actions/echo/execute", &proof, b"{}");
        refused("on another route", &response, "401 replay_detected", "");
        assert_eq!(agent.get(&path).status, 200);
    }
}

/// Of a signature (r, s) anyone can make (r, n−s), which verifies as well: another text, the same proof.
#[test]
fn the_other_form_of_a_signature_is_the_same_proof() {
    let gate = gate("malleable").start();
    let agent = Agent::connect(&gate.agent());
    let path = readable(&agent);
    let flipped = |proof: &str| {
        use base64::Engine as _;
        let (signed, signature) = proof.rsplit_once('.').unwrap();
        let mut bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(signature).unwrap();
        let mut borrow = 0_i16;
        for at in (0..32).rev() {
            let difference = i16::from(ORDER[at]) - i16::from(bytes[32 + at]) - borrow;
            borrow = i16::from(difference < 0);
            bytes[32 + at] = u8::try_from(difference + 256 * borrow).unwrap();
        }
        format!("{signed}.{}", base64url(bytes))
    };
    let proof = agent.proof("GET", &path);
    assert_eq!(get(&agent, &path, &with(&agent, proof.clone())).status, 200);
    assert_ne!(flipped(&proof), proof);
    refused("flipped", &get(&agent, &path, &with(&agent, flipped(&proof))), "401 replay_detected", "");
    let proof = agent.proof("GET", &path);
    assert_eq!(get(&agent, &path, &with(&agent, flipped(&proof))).status, 200, "it is a proper signature");
    refused("flipped back", &get(&agent, &path, &with(&agent, proof)), "401 replay_detected", "");
}

/// The same jti of another key is another proof: nobody can spend another's.
#[test]
fn a_jti_belongs_to_its_key() {
    let gate = gate("keys").start();
    let (first, second) = (Agent::connect(&gate.agent()), Agent::connect(&gate.agent()));
    let path = readable(&first);
    let mut claims = first.claims("GET", &path);
    assert_eq!(get(&first, &path, &with(&first, proof_of(&first, &claims))).status, 200);
    refused("own", &get(&first, &path, &with(&first, proof_of(&first, &claims))), "401 replay_detected", "");
    claims["ath"] = second.claims("GET", &path)["ath"].clone();
    assert_eq!(get(&second, &path, &with(&second, proof_of(&second, &claims))).status, 200);
}

/// A second lease for the same key does not make its proofs good again.
#[test]
fn a_renewed_lease_for_the_same_key_renews_no_proof() {
    let gate = gate("renewed").start();
    let mut agent = Agent::connect(&gate.agent());
    let path = readable(&agent);
    let mut claims = agent.claims("GET", &path);
    assert_eq!(get(&agent, &path, &with(&agent, proof_of(&agent, &claims))).status, 200);
    let renewed =
        latchgate_tests::agent::lease(&agent.target, &json!({"scopes": ["tools:call"], "dpop_jwk": agent.key.jwk()}));
    agent.lease = renewed.json()["lease_jwt"].as_str().unwrap().to_owned();
    claims["ath"] = agent.claims("GET", &path)["ath"].clone();
    refused("renewed", &get(&agent, &path, &with(&agent, proof_of(&agent, &claims))), "401 replay_detected", "");
    assert_eq!(agent.get(&path).status, 200);
}

#[test]
fn of_sixteen_at_once_exactly_one_passes() {
    const THREADS: usize = 16;
    let gate = gate("race").start();
    for target in [gate.agent(), tcp(&gate)] {
        let agent = Agent::connect(&target);
        let path = readable(&agent);
        for round in 0..5 {
            let headers = with(&agent, agent.proof("GET", &path));
            let barrier = Barrier::new(THREADS);
            let codes: Vec<String> = std::thread::scope(|scope| {
                let (agent, path, headers, barrier) = (&agent, &path, &headers, &barrier);
                let asking: Vec<_> = (0..THREADS)
                    .map(|_| {
                        scope.spawn(move || {
                            let mut connection = latchgate_tests::http::Connection::open(&agent.target).unwrap();
                            let headers: Vec<(&str, &str)> =
                                headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
                            barrier.wait();
                            let response = connection.request("GET", path, &headers, None).unwrap();
                            if response.status == 200 { "200".to_owned() } else { response.code() }
                        })
                    })
                    .collect();
                asking.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert_eq!(codes.iter().filter(|code| *code == "200").count(), 1, "round {round}: {codes:?}");
            assert_eq!(codes.iter().filter(|code| *code == "401 replay_detected").count(), THREADS - 1, "{codes:?}");
        }
    }
}

/// Kills the gate in the middle of sixteen requests with one proof, and asks again afterwards: however the race went,
/// the proof has passed at most once, and after the restart it passes no more if it had.
#[test]
fn killed_in_the_middle_it_still_passes_at_most_once() {
    const THREADS: usize = 16;
    let mut gate = gate("killed-race").start();
    let_a_second_pass();
    let agent = Agent::connect(&gate.agent());
    let path = readable(&agent);
    for _ in 0..3 {
        let headers = with(&agent, proof_of(&agent, &late_claims(&agent, &path)));
        let barrier = Barrier::new(THREADS + 1);
        let answered: usize = std::thread::scope(|scope| {
            let (agent, path, headers, barrier) = (&agent, &path, &headers, &barrier);
            let asking: Vec<_> = (0..THREADS)
                .map(|_| {
                    scope.spawn(move || {
                        let mut connection = latchgate_tests::http::Connection::open(&agent.target).unwrap();
                        let headers: Vec<(&str, &str)> =
                            headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
                        barrier.wait();
                        connection.request("GET", path, &headers, None).is_ok_and(|response| response.status == 200)
                    })
                })
                .collect();
            barrier.wait();
            gate.kill();
            asking.into_iter().map(|thread| usize::from(thread.join().unwrap())).sum()
        });
        assert!(answered <= 1, "{answered} passed");
        gate.start();
        let after = usize::from(get(&agent, &path, &headers).status == 200);
        assert!(answered + after <= 1, "{answered} before the kill and {after} after it");
        refused("once more", &get(&agent, &path, &headers), "401 replay_detected", "");
        let fresh = proof_of(&agent, &late_claims(&agent, &path));
        assert_eq!(get(&agent, &path, &with(&agent, fresh)).status, 200);
    }
}

fn restarted(how: fn(&mut Gate)) {
    let mut gate = gate("restart").start();
    let_a_second_pass();
    let agent = Agent::connect(&gate.agent());
    let path = readable(&agent);
    let headers = with(&agent, proof_of(&agent, &late_claims(&agent, &path)));
    let unused = with(&agent, proof_of(&agent, &late_claims(&agent, &path)));
    assert_eq!(get(&agent, &path, &headers).status, 200);
    how(&mut gate);
    gate.start();
    refused("after the restart", &get(&agent, &path, &headers), "401 replay_detected", "");
    // The lease is still good, a proof that was made before and never used passes, and then passes no more.
    assert_eq!(get(&agent, &path, &unused).status, 200);
    refused("the other, again", &get(&agent, &path, &unused), "401 replay_detected", "");
    refused("and the first", &get(&agent, &path, &headers), "401 replay_detected", "");
}

#[test]
fn a_replay_after_sigkill() {
    restarted(Gate::kill);
}

#[test]
fn a_replay_after_a_clean_stop() {
    restarted(|gate| assert_eq!(gate.stop(), 0));
}

/// Where the memory of proofs is gone, no window opens: proofs that could have been used before are refused, and so
/// are all that are not newer than the start and the tolerated skew. Leases of the new run need no such patience.
#[test]
fn a_gate_that_lost_its_memory_refuses_what_it_cannot_know() {
    let mut gate = gate("memory").start();
    let agent = Agent::connect(&gate.agent());
    let path = readable(&agent);
    let used = with(&agent, agent.proof("GET", &path));
    let ahead = with(&agent, proof_of(&agent, &late_claims(&agent, &path)));
    assert_eq!(get(&agent, &path, &used).status, 200);
    assert_eq!(get(&agent, &path, &ahead).status, 200);
    gate.kill();
    for file in fs::read_dir(gate.directory().join("state/store")).unwrap() {
        let file = file.unwrap();
        if file.file_name().to_string_lossy().starts_with("replay.db") {
            fs::remove_file(file.path()).unwrap();
        }
    }
    // Before the start that the rule counts from, however long that takes.
    let began = now();
    gate.start();
    let reason = "began to remember";
    refused("used", &get(&agent, &path, &used), "401 invalid_dpop", reason);
    refused("used, and dated ahead", &get(&agent, &path, &ahead), "401 invalid_dpop", reason);
    refused("new", &agent.get(&path), "401 invalid_dpop", reason);
    assert_eq!(Agent::connect(&gate.agent()).get(&path).status, 200, "a lease of this run");
    while agent.get(&path).status != 200 {
        assert!(now() - began < 60, "no proof of the earlier lease passes");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(now() - began >= 4, "it passed too early");
    refused("used, later", &get(&agent, &path, &used), "401 invalid_dpop", reason);
    refused("used, and dated ahead, later", &get(&agent, &path, &ahead), "401 invalid_dpop", reason);
}

/// The dead gate's keys and ours are the same after a restart; another key's proof is as foreign as before.
#[test]
fn a_restart_makes_no_other_key_good() {
    let mut gate = gate("foreign").start();
    let_a_second_pass();
    let agent = Agent::connect(&gate.agent());
    let path = readable(&agent);
    gate.kill();
    gate.start();
    let key = Key::generate();
    let header = json!({"typ": "dpop+jwt", "alg": "ES256", "jwk": key.jwk()}).to_string();
    let foreign = key.jwt(&header, &late_claims(&agent, &path).to_string());
    refused("foreign", &get(&agent, &path, &with(&agent, foreign)), "401 invalid_dpop", "the lease is bound to");
    let own = proof_of(&agent, &late_claims(&agent, &path));
    assert_eq!(get(&agent, &path, &with(&agent, own)).status, 200);
}
