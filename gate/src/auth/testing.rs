//! Clients, proofs and stores for the tests of this module.

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use p256::ecdsa::signature::Signer as _;
use p256::ecdsa::{Signature, SigningKey};
use serde_json::{Value, json};

use super::jwk::{PublicJwk, base64url};
use crate::hash;
use crate::store::{Epoch, Freshness, ReplayStore, RevocationStore, StoreError};
use crate::time::Timestamp;

pub const NOW: Timestamp = Timestamp::from_millis(1_795_305_600_900);
pub const METHOD: &str = "POST";
pub const PATH: &str = "/v1/actions/http_fetch/execute";
pub const TOKEN: &str = "the.access.token";

/// Someone with a key. Signatures are deterministic (RFC 6979), so vectors come out the same every time.
pub struct Client {
    key: SigningKey,
}

impl Client {
    pub fn new(scalar: u8) -> Self {
        Self { key: SigningKey::from_slice(&[scalar; 32]).unwrap() }
    }

    pub fn sec1(&self) -> Vec<u8> {
        self.key.verifying_key().to_sec1_point(false).as_bytes().to_vec()
    }

    pub fn public(&self) -> PublicJwk {
        PublicJwk::from_sec1(&self.sec1()).unwrap()
    }

    pub fn jwk(&self) -> Value {
        self.public().to_value()
    }

    pub fn jkt(&self) -> String {
        self.public().thumbprint()
    }

    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        let signature: Signature = self.key.sign(message);
        signature.to_bytes().to_vec()
    }

    /// A JWT over these very texts.
    pub fn jwt(&self, header: &str, payload: &str) -> String {
        let signed = format!("{}.{}", base64url(header.as_bytes()), base64url(payload.as_bytes()));
        format!("{signed}.{}", base64url(&self.sign(signed.as_bytes())))
    }

    /// A proof that is right for [`METHOD`], [`PATH`] on `http://localhost` and [`NOW`], after `change`.
    pub fn proof(&self, token: &str, change: impl FnOnce(&mut Value, &mut Value)) -> String {
        let mut header = json!({"typ": "dpop+jwt", "alg": "ES256", "jwk": self.jwk()});
        let mut payload = json!({
            "jti": "0b0c2c4e-7d6b-4d2f-9f55-2e9f1f5a7a10",
            "htm": METHOD,
            "htu": format!("http://localhost{PATH}"),
            "iat": NOW.secs(),
            "ath": base64url(&hash::sha256(token.as_bytes())),
        });
        change(&mut header, &mut payload);
        self.jwt(&header.to_string(), &payload.to_string())
    }
}

/// A replay set and a revocation list in memory, with switches for what a disk can do.
#[derive(Default)]
pub struct Memory {
    pub seen: Mutex<HashSet<(String, String)>>,
    pub revoked: Mutex<HashSet<String>>,
    pub began: Mutex<Option<Timestamp>>,
    pub broken: AtomicBool,
    pub full: AtomicBool,
}

impl ReplayStore for Memory {
    fn remember(&self, jkt: &str, jti: &str, expires: Timestamp, now: Timestamp) -> Result<Freshness, StoreError> {
        assert!(expires > now.plus_millis(5_000), "a proof that is accepted is remembered as long as it is good");
        if self.full.load(Ordering::Relaxed) {
            return Err(StoreError::Full);
        }
        let fresh = self.seen.lock().unwrap().insert((jkt.to_owned(), jti.to_owned()));
        Ok(if fresh { Freshness::Fresh } else { Freshness::Seen })
    }

    fn not_before(&self) -> Option<Timestamp> {
        *self.began.lock().unwrap()
    }
}

impl RevocationStore for Memory {
    fn is_revoked(&self, lease_jti: &str, principal: &str, _iat: Timestamp) -> Result<bool, StoreError> {
        if self.broken.load(Ordering::Relaxed) {
            return Err(StoreError::Poisoned);
        }
        let revoked = self.revoked.lock().unwrap();
        Ok(revoked.contains(lease_jti) || revoked.contains(principal))
    }

    fn revoke_lease(&self, lease_jti: &str, _keep_until: Timestamp, _now: Timestamp) -> Result<(), StoreError> {
        self.revoked.lock().unwrap().insert(lease_jti.to_owned());
        Ok(())
    }

    fn revoke_principal(&self, principal: &str, _now: Timestamp) -> Result<(), StoreError> {
        self.revoked.lock().unwrap().insert(principal.to_owned());
        Ok(())
    }

    fn revoke_all(&self, _now: Timestamp) -> Result<Epoch, StoreError> {
        Err(StoreError::Poisoned)
    }

    fn epoch(&self) -> Result<Epoch, StoreError> {
        Err(StoreError::Poisoned)
    }
}
