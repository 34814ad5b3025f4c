//! The key file of an operator, as the command line uses it: an API key and the P-256 key that proves its use.

use std::path::{Path, PathBuf};

use p256::ecdsa::signature::Signer as _;
use p256::ecdsa::{Signature, SigningKey};
use p256::pkcs8::{DecodePrivateKey as _, EncodePrivateKey as _, LineEnding};
use serde::{Deserialize, Serialize};
use serde_json::json;
use zeroize::Zeroizing;

use super::jwk::{PublicJwk, base64url};
use crate::time::Timestamp;
use crate::{files, hash, ids};

/// Bytes of randomness in an API key.
const API_KEY_BYTES: usize = 32;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    name: String,
    api_key: String,
    /// PKCS#8 PEM.
    private_key: String,
}

/// An operator's secrets.
pub struct OperatorKeyFile {
    name: String,
    api_key: Zeroizing<String>,
    key: SigningKey,
    public: PublicJwk,
    made_now: bool,
}

/// Why a key file is of no use.
#[derive(Debug, thiserror::Error)]
pub enum OperatorKeyError {
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: std::io::Error },
    #[error("{}: is readable by others: chmod 600 it and make a new key", path.display())]
    Open { path: PathBuf },
    #[error("{}: is no operator key file: {why}", path.display())]
    Unreadable { path: PathBuf, why: String },
    #[error("no randomness: {0}")]
    Random(String),
}

impl OperatorKeyFile {
    /// Reads the file, or makes one (0600) when there is none.
    ///
    /// # Errors
    /// For a file that others can read, or that cannot be understood; it is never replaced.
    pub fn load_or_create(path: &Path, name: &str) -> Result<Self, OperatorKeyError> {
        match Self::load(path) {
            Err(OperatorKeyError::File { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                Self::create(path, name)
            }
            other => other,
        }
    }

    pub fn load(path: &Path) -> Result<Self, OperatorKeyError> {
        use std::os::unix::fs::MetadataExt as _;
        let failed = |source| OperatorKeyError::File { path: path.to_owned(), source };
        let unreadable = |why: String| OperatorKeyError::Unreadable { path: path.to_owned(), why };
        let text = Zeroizing::new(std::fs::read_to_string(path).map_err(failed)?);
        if std::fs::metadata(path).map_err(failed)?.mode() & 0o077 != 0 {
            return Err(OperatorKeyError::Open { path: path.to_owned() });
        }
        let stored: Stored = serde_json::from_str(&text).map_err(|error| unreadable(error.to_string()))?;
        let pem = Zeroizing::new(stored.private_key);
        let key = SigningKey::from_pkcs8_pem(&pem).map_err(|error| unreadable(error.to_string()))?;
        Self::from_parts(stored.name, Zeroizing::new(stored.api_key), key, false)
            .ok_or_else(|| unreadable("the key is not usable".to_owned()))
    }

    fn create(path: &Path, name: &str) -> Result<Self, OperatorKeyError> {
        let random = |error: &dyn std::fmt::Debug| OperatorKeyError::Random(format!("{error:?}"));
        let mut bytes = Zeroizing::new([0_u8; API_KEY_BYTES]);
        aws_lc_rs::rand::fill(bytes.as_mut()).map_err(|error| random(&error))?;
        let api_key = Zeroizing::new(format!("lgop_{}", base64url(bytes.as_ref())));
        let key = loop {
            let mut scalar = Zeroizing::new([0_u8; 32]);
            aws_lc_rs::rand::fill(scalar.as_mut()).map_err(|error| random(&error))?;
            // Zero and what is not below the order are no keys; the chance is 2^-32.
            if let Ok(key) = SigningKey::from_slice(scalar.as_ref()) {
                break key;
            }
        };
        let pem = key.to_pkcs8_pem(LineEnding::LF).map_err(|error| random(&error))?;
        let stored = Stored { name: name.to_owned(), api_key: api_key.to_string(), private_key: pem.to_string() };
        let text = Zeroizing::new(serde_json::to_vec_pretty(&stored).map_err(|error| random(&error))?);
        files::create_private(path, &text)
            .map_err(|source| OperatorKeyError::File { path: path.to_owned(), source })?;
        Self::from_parts(name.to_owned(), api_key, key, true).ok_or_else(|| random(&"the key is not usable"))
    }

    fn from_parts(name: String, api_key: Zeroizing<String>, key: SigningKey, made_now: bool) -> Option<Self> {
        let public = PublicJwk::from_sec1(&key.verifying_key().to_sec1_point(false).to_bytes())?;
        Some(Self { name, api_key, key, public, made_now })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// RFC 7638 thumbprint, as `operators.keys[].dpop_jkt` has it.
    pub fn jkt(&self) -> String {
        self.public.thumbprint()
    }

    /// As `operators.keys[].api_key_hash` has it.
    pub fn api_key_hash(&self) -> String {
        hash::sha256_tagged(self.api_key.as_bytes())
    }

    /// Whether this call made the key, so that no proof of it can have been used before.
    pub const fn made_now(&self) -> bool {
        self.made_now
    }

    /// The `Authorization` and `DPoP` headers of one request (RFC 9449 §4.2, §7.1).
    pub fn headers(&self, method: &str, url: &str, now: Timestamp) -> (Zeroizing<String>, String) {
        let header = json!({"typ": "dpop+jwt", "alg": "ES256", "jwk": self.public.to_value()});
        let claims = json!({
            "jti": ids::mint(),
            "htm": method,
            "htu": url,
            "iat": now.secs(),
            "ath": base64url(&hash::sha256(self.api_key.as_bytes())),
        });
        let signed =
            format!("{}.{}", base64url(header.to_string().as_bytes()), base64url(claims.to_string().as_bytes()));
        let signature: Signature = self.key.sign(signed.as_bytes());
        (Zeroizing::new(format!("DPoP {}", *self.api_key)), format!("{signed}.{}", base64url(&signature.to_bytes())))
    }
}
