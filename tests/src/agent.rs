//! An agent that makes leases and proofs by hand, so that it can make them wrong.

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use serde_json::{Value, json};

use crate::http::{Connection, Response, Target, once};
use crate::{base64url, now, sha256};

/// A P-256 key pair.
pub struct Key {
    pair: EcdsaKeyPair,
}

impl Default for Key {
    fn default() -> Self {
        Self::generate()
    }
}

impl Key {
    pub fn generate() -> Self {
        Self { pair: EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap() }
    }

    /// The public key as a JWK.
    pub fn jwk(&self) -> Value {
        let point = self.pair.public_key().as_ref();
        json!({"kty": "EC", "crv": "P-256", "x": base64url(&point[1..33]), "y": base64url(&point[33..65])})
    }

    /// RFC 7638.
    pub fn thumbprint(&self) -> String {
        let jwk = self.jwk();
        let text = |name: &str| jwk[name].as_str().unwrap().to_owned();
        base64url(sha256(format!(r#"{{"crv":"P-256","kty":"EC","x":"{}","y":"{}"}}"#, text("x"), text("y"))))
    }

    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.pair.sign(&SystemRandom::new(), message).unwrap().as_ref().to_vec()
    }

    /// A JWT whose header and claims are the texts given: nothing is checked, repeated or put in order.
    pub fn jwt(&self, header: &str, claims: &str) -> String {
        let signed = format!("{}.{}", base64url(header), base64url(claims));
        let signature = self.sign(signed.as_bytes());
        format!("{signed}.{}", base64url(signature))
    }
}

/// An agent with a lease.
pub struct Agent {
    pub target: Target,
    /// What the proofs' `htu` begin with.
    pub base: String,
    pub key: Key,
    pub lease: String,
    pub session_id: String,
    pub lease_jti: String,
    pub granted: Value,
}

impl Agent {
    /// Posts `/v1/leases` with a fresh key.
    pub fn connect(target: &Target) -> Self {
        Self::connect_with(target, json!({"scopes": ["tools:call"]}))
    }

    /// The same, with more in the request.
    pub fn connect_with(target: &Target, mut request: Value) -> Self {
        let key = Key::generate();
        request["dpop_jwk"] = key.jwk();
        let response = lease(target, &request);
        assert_eq!(response.status, 200, "{}", String::from_utf8_lossy(&response.body));
        let granted = response.json();
        let text = |name: &str| granted[name].as_str().unwrap().to_owned();
        let base = match target {
            Target::Unix(_) => "http://localhost".to_owned(),
            Target::Tcp(address) => format!("http://{address}"),
        };
        Self {
            target: target.clone(),
            base,
            key,
            lease: text("lease_jwt"),
            session_id: text("session_id"),
            lease_jti: text("lease_jti"),
            granted,
        }
    }

    /// The claims of a proper proof, to be spoilt.
    pub fn claims(&self, method: &str, path: &str) -> Value {
        json!({
            "jti": uuid::Uuid::new_v4().to_string(),
            "htm": method,
            "htu": format!("{}{path}", self.base),
            "iat": now(),
            "ath": base64url(sha256(&self.lease)),
        })
    }

    /// The header of a proper proof, to be spoilt.
    pub fn header(&self) -> Value {
        json!({"typ": "dpop+jwt", "alg": "ES256", "jwk": self.key.jwk()})
    }

    /// A proper proof.
    pub fn proof(&self, method: &str, path: &str) -> String {
        self.key.jwt(&self.header().to_string(), &self.claims(method, path).to_string())
    }

    pub fn authorization(&self) -> String {
        format!("DPoP {}", self.lease)
    }

    /// Executes with a proper proof.
    pub fn execute(&self, action: &str, params: &Value) -> Response {
        self.execute_raw(action, params.to_string().as_bytes())
    }

    /// Executes with a proper proof and these very bytes.
    pub fn execute_raw(&self, action: &str, body: &[u8]) -> Response {
        let path = format!("/v1/actions/{action}/execute");
        self.execute_with(&path, &self.proof("POST", &path), body)
    }

    /// Executes with this proof.
    pub fn execute_with(&self, path: &str, proof: &str, body: &[u8]) -> Response {
        let authorization = self.authorization();
        let headers =
            [("authorization", authorization.as_str()), ("dpop", proof), ("content-type", "application/json")];
        once(&self.target, "POST", path, &headers, Some(body))
    }

    /// `GET` with a proper proof.
    pub fn get(&self, path: &str) -> Response {
        let (authorization, proof) = (self.authorization(), self.proof("GET", path));
        once(&self.target, "GET", path, &[("authorization", &authorization), ("dpop", &proof)], None)
    }

    pub fn receipt(&self, id: &str) -> Response {
        self.get(&format!("/v1/receipts/{id}"))
    }
}

/// `POST /v1/leases`.
pub fn lease(target: &Target, request: &Value) -> Response {
    Connection::open(target)
        .unwrap()
        .request("POST", "/v1/leases", &[("content-type", "application/json")], Some(request.to_string().as_bytes()))
        .unwrap()
}
