//! The Ed25519 keys that sign a ledger, and the public ones that verify it.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair, ParsedPublicKey};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::{Value, json};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::{files, hash};

const PRIVATE: &str = "receipt-signing-key.pem";
const PUBLIC: &str = "receipt-keys.json";
const PEM_BEGIN: &str = "-----BEGIN PRIVATE KEY-----";
const PEM_END: &str = "-----END PRIVATE KEY-----";

#[derive(Debug, Error)]
pub enum KeyError {
    #[error("{path}: {source}")]
    File { path: PathBuf, source: io::Error },
    #[error("{path}: {what}")]
    Unusable { path: PathBuf, what: String },
    #[error("no key could be made")]
    Generate,
    #[error("not a set of receipt keys: {0}")]
    Jwks(String),
}

/// The key that signs now and the public half of every one that signed before.
pub struct ReceiptKeys {
    pair: Ed25519KeyPair,
    id: String,
    public: PublicKeys,
}

impl ReceiptKeys {
    /// Reads the signing key of `directory` (PKCS#8 PEM, RFC 8410) or makes one, 0600. `receipt-keys.json` beside it
    /// collects the public half of every key that was ever loaded from there, so that replacing the PEM keeps old
    /// records verifiable.
    pub fn load_or_create(directory: &Path) -> Result<Self, KeyError> {
        let file = |path: &Path, source| KeyError::File { path: path.to_owned(), source };
        files::private_directory(directory).map_err(|error| file(directory, error))?;
        let path = directory.join(PRIVATE);
        if let Err(error) = std::fs::symlink_metadata(&path) {
            if error.kind() != io::ErrorKind::NotFound {
                return Err(file(&path, error));
            }
            let pem = generate()?;
            match files::create_private(&path, pem.as_bytes()) {
                // Another process made it in between: that one counts.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                other => other.map_err(|error| file(&path, error))?,
            }
        }
        let pair = read_private(&path)?;
        let key = Public::new(pair.public_key().as_ref()).map_err(KeyError::Jwks)?;
        let id = key.id.clone();
        let known = directory.join(PUBLIC);
        let mut public = match std::fs::read(&known) {
            Ok(bytes) => PublicKeys::from_slice(&bytes)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => PublicKeys::default(),
            Err(error) => return Err(file(&known, error)),
        };
        if !public.keys.contains_key(&id) {
            public.keys.insert(id.clone(), key);
            let text = format!("{:#}\n", public.jwks());
            replace(&known, text.as_bytes()).map_err(|error| file(&known, error))?;
        }
        Ok(Self { pair, id, public })
    }

    /// `signing_key_id` of what this signs: the first 16 hex digits of the SHA-256 of the public key.
    pub fn id(&self) -> &str {
        &self.id
    }

    pub fn public(&self) -> &PublicKeys {
        &self.public
    }

    /// The JWK set (RFC 8037) of the present and all past public keys.
    pub fn jwks(&self) -> Value {
        self.public.jwks()
    }

    pub(super) fn sign(&self, message: &[u8]) -> String {
        hash::hex(self.pair.sign(message).as_ref())
    }
}

/// Public keys by their id. The ids are computed from the keys, never taken from whoever names them.
#[derive(Default)]
pub struct PublicKeys {
    keys: BTreeMap<String, Public>,
}

struct Public {
    id: String,
    bytes: [u8; 32],
    parsed: ParsedPublicKey,
}

impl Public {
    fn new(bytes: &[u8]) -> Result<Self, String> {
        let bytes: [u8; 32] = bytes.try_into().map_err(|_| "a key that is not 32 bytes".to_owned())?;
        let parsed = ParsedPublicKey::new(&ED25519, bytes).map_err(|_| "a key that is no point".to_owned())?;
        let mut id = hash::sha256_hex(&bytes);
        id.truncate(16);
        Ok(Self { id, bytes, parsed })
    }
}

impl PublicKeys {
    /// Reads a JWK set file, as `GET /v1/receipt-keys` answers it.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let bytes = std::fs::read(path).map_err(|source| KeyError::File { path: path.to_owned(), source })?;
        Self::from_slice(&bytes)
    }

    fn from_slice(bytes: &[u8]) -> Result<Self, KeyError> {
        Self::from_jwks(&serde_json::from_slice(bytes).map_err(|error| KeyError::Jwks(error.to_string()))?)
    }

    /// # Errors
    /// When a member is not a public Ed25519 key, or its `kid` is not the key's own. Nothing is skipped: a verifier that
    /// lacks a key it was given would blame the record.
    pub fn from_jwks(set: &Value) -> Result<Self, KeyError> {
        let refuse = |what: &str| KeyError::Jwks(what.to_owned());
        let members = set.get("keys").and_then(Value::as_array).ok_or_else(|| refuse("no `keys`"))?;
        let mut keys = BTreeMap::new();
        for member in members {
            let field = |name: &str| member.get(name).and_then(Value::as_str);
            if field("kty") != Some("OKP") || field("crv") != Some("Ed25519") || member.get("d").is_some() {
                return Err(refuse("a member that is not a public Ed25519 key"));
            }
            let bytes = field("x").and_then(|x| URL_SAFE_NO_PAD.decode(x).ok()).ok_or_else(|| refuse("a bad `x`"))?;
            let key = Public::new(&bytes).map_err(KeyError::Jwks)?;
            if field("kid").is_some_and(|kid| kid != key.id) {
                return Err(refuse("a `kid` that is not the key's"));
            }
            keys.insert(key.id.clone(), key);
        }
        Ok(Self { keys })
    }

    pub fn jwks(&self) -> Value {
        let keys: Vec<Value> = self
            .keys
            .values()
            .map(|key| {
                json!({"kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "use": "sig", "kid": key.id,
                       "x": URL_SAFE_NO_PAD.encode(key.bytes)})
            })
            .collect();
        json!({"keys": keys})
    }

    /// `None` when the id is unknown, else whether the signature (RFC 8032) is that key's.
    pub(super) fn verify(&self, id: &str, message: &[u8], signature: &[u8]) -> Option<bool> {
        Some(self.keys.get(id)?.parsed.verify_sig(message, signature).is_ok())
    }
}

fn generate() -> Result<Zeroizing<String>, KeyError> {
    // Version 1, without the public key in it, is the form that every OpenSSL reads.
    let der = Ed25519KeyPair::generate_pkcs8v1(&SystemRandom::new()).map_err(|_| KeyError::Generate)?;
    let body = Zeroizing::new(STANDARD.encode(der.as_ref()));
    Ok(Zeroizing::new(format!("{PEM_BEGIN}\n{}\n{PEM_END}\n", body.as_str())))
}

fn read_private(path: &Path) -> Result<Ed25519KeyPair, KeyError> {
    let unusable = |what: &str| KeyError::Unusable { path: path.to_owned(), what: what.to_owned() };
    let file = |source| KeyError::File { path: path.to_owned(), source };
    let found = std::fs::metadata(path).map_err(file)?;
    if !found.is_file() {
        return Err(unusable("is not a regular file"));
    }
    if found.mode() & 0o077 != 0 {
        return Err(unusable("is open to others: chmod 600 it"));
    }
    let text = Zeroizing::new(std::fs::read_to_string(path).map_err(file)?);
    let body = text
        .trim()
        .strip_prefix(PEM_BEGIN)
        .and_then(|rest| rest.strip_suffix(PEM_END))
        .ok_or_else(|| unusable("is not a PKCS#8 private key in PEM"))?;
    let body: Zeroizing<String> = Zeroizing::new(body.split_ascii_whitespace().collect());
    let der = STANDARD.decode(body.as_bytes()).map(Zeroizing::new).map_err(|_| unusable("has broken base64"))?;
    Ed25519KeyPair::from_pkcs8(&der).map_err(|_| unusable("is not an Ed25519 key"))
}

fn replace(path: &Path, contents: &[u8]) -> io::Result<()> {
    let mut draft = path.to_owned();
    draft.set_extension(format!("{}.new", crate::ids::mint()));
    files::create_private(&draft, contents)?;
    std::fs::rename(&draft, path)?;
    match path.parent() {
        Some(directory) => std::fs::File::open(directory)?.sync_all(),
        None => Ok(()),
    }
}
