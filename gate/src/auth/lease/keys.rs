//! The key that signs leases, and the one before it.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use p256::SecretKey;
use p256::pkcs8::{
    DecodePrivateKey as _, DecodePublicKey as _, EncodePrivateKey as _, EncodePublicKey as _, LineEnding,
};
use serde_json::{Value, json};

use super::MAX_TTL_SECONDS;
use crate::auth::jwk::{PublicJwk, base64url};
use crate::time::Timestamp;
use crate::{files, ids};

const CURRENT: &str = "lease.pem";
const PREVIOUS: &str = "lease.previous.pem";

/// Why the lease keys could not be had.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{}: not a P-256 key in PEM (PKCS#8)", .0.display())]
    NotAKey(PathBuf),
    #[error("{}: a private key that others may read: chmod 600 it", .0.display())]
    Exposed(PathBuf),
    #[error("no key could be made")]
    Generate,
}

/// The keys of a gate's leases: one that signs, and one that still verifies what it signed before the rotation.
pub struct LeaseKeys {
    signing: EcdsaKeyPair,
    current: PublicJwk,
    kid: String,
    previous: Option<Previous>,
    run: String,
}

struct Previous {
    key: PublicJwk,
    kid: String,
    /// When the last lease under it has run out.
    until: Timestamp,
}

impl LeaseKeys {
    /// Reads `lease.pem` (P-256, PKCS#8) of `dir`, and `lease.previous.pem` (private or public) if it is there; makes
    /// directory (0700) and key (0600) when there is none. The directory may be a mounted Secret.
    ///
    /// # Errors
    /// When a file is there and is not such a key or is open to others; when none can be made.
    pub fn load_or_create(dir: &Path) -> Result<Self, KeyError> {
        let path = dir.join(CURRENT);
        match fs::symlink_metadata(&path) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                files::private_directory(dir).map_err(|source| KeyError::Io { path: dir.to_owned(), source })?;
                create(&path)?;
            }
            Err(source) => return Err(KeyError::Io { path, source }),
        }
        Self::load(dir)
    }

    /// Makes a new key; the public half of the present one is kept as the previous one, until the leases under it have
    /// run out. The private half is gone.
    ///
    /// # Errors
    /// As [`LeaseKeys::load_or_create`]. An error between the two steps leaves the present key in force.
    pub fn rotate(dir: &Path) -> Result<Self, KeyError> {
        let (current, previous) = (dir.join(CURRENT), dir.join(PREVIOUS));
        let public = secret(&current)?.public_key();
        let pem = public.to_public_key_pem(LineEnding::LF).map_err(|_| KeyError::NotAKey(current.clone()))?;
        write(&previous, pem.as_bytes(), Existing::Replace)?;
        write(&current, generate()?.as_bytes(), Existing::Replace)?;
        Self::load(dir)
    }

    fn load(dir: &Path) -> Result<Self, KeyError> {
        let path = dir.join(CURRENT);
        let secret = secret(&path)?;
        let der = secret.to_pkcs8_der().map_err(|_| KeyError::NotAKey(path.clone()))?;
        let signing = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, der.as_bytes())
            .map_err(|_| KeyError::NotAKey(path.clone()))?;
        let current = public_jwk(&secret.public_key()).ok_or(KeyError::NotAKey(path))?;
        let kid = current.thumbprint();
        let previous = previous(&dir.join(PREVIOUS))?.filter(|previous| previous.kid != kid);
        Ok(Self { signing, current, kid, previous, run: ids::mint() })
    }

    /// The id of the signing key: its thumbprint (RFC 7638).
    pub fn kid(&self) -> &str {
        &self.kid
    }

    /// A name for this run of the gate. A lease that carries it was issued after this run's replay set began, so no
    /// proof for it can have been used before.
    pub fn run(&self) -> &str {
        &self.run
    }

    /// The JWK Set (RFC 7517 §5) of `/.well-known/jwks.json`.
    pub fn jwks(&self) -> Value {
        self.jwks_at(Timestamp::now())
    }

    /// The JWK Set with the keys whose leases may still be good at `now`.
    pub fn jwks_at(&self, now: Timestamp) -> Value {
        let mut keys = vec![published(&self.current, &self.kid)];
        keys.extend(self.live_previous(now).map(|previous| published(&previous.key, &previous.kid)));
        json!({"keys": keys})
    }

    /// The key with this id, while leases under it may still be good.
    pub(super) fn public(&self, kid: &str, now: Timestamp) -> Option<&PublicJwk> {
        if kid == self.kid {
            return Some(&self.current);
        }
        self.live_previous(now).filter(|previous| previous.kid == kid).map(|previous| &previous.key)
    }

    /// A compact JWT with these parts; `None` when the signer fails.
    pub(in crate::auth) fn sign(&self, header: &Value, payload: &Value) -> Option<String> {
        let signed =
            format!("{}.{}", base64url(header.to_string().as_bytes()), base64url(payload.to_string().as_bytes()));
        let signature = self.signing.sign(&SystemRandom::new(), signed.as_bytes()).ok()?;
        Some(format!("{signed}.{}", base64url(signature.as_ref())))
    }

    fn live_previous(&self, now: Timestamp) -> Option<&Previous> {
        self.previous.as_ref().filter(|previous| now < previous.until)
    }
}

impl std::fmt::Debug for LeaseKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LeaseKeys({})", self.kid)
    }
}

fn published(key: &PublicJwk, kid: &str) -> Value {
    let mut jwk = key.to_value();
    if let Some(members) = jwk.as_object_mut() {
        members.insert("kid".to_owned(), kid.into());
        members.insert("alg".to_owned(), "ES256".into());
        members.insert("use".to_owned(), "sig".into());
    }
    jwk
}

fn public_jwk(key: &p256::PublicKey) -> Option<PublicJwk> {
    PublicJwk::from_sec1(&key.to_sec1_bytes())
}

fn secret(path: &Path) -> Result<SecretKey, KeyError> {
    let io_error = |source| KeyError::Io { path: path.to_owned(), source };
    // A Secret's file belongs to root and is read by the pod's group; nobody else has any business with it.
    if fs::metadata(path).map_err(io_error)?.mode() & 0o037 != 0 {
        return Err(KeyError::Exposed(path.to_owned()));
    }
    let pem = zeroize::Zeroizing::new(fs::read_to_string(path).map_err(io_error)?);
    SecretKey::from_pkcs8_pem(&pem).map_err(|_| KeyError::NotAKey(path.to_owned()))
}

fn previous(path: &Path) -> Result<Option<Previous>, KeyError> {
    let io_error = |source| KeyError::Io { path: path.to_owned(), source };
    let pem = match fs::read_to_string(path) {
        Ok(pem) => zeroize::Zeroizing::new(pem),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(io_error(source)),
    };
    let public = match p256::PublicKey::from_public_key_pem(&pem) {
        Ok(public) => public,
        Err(_) => secret(path)?.public_key(),
    };
    let key = public_jwk(&public).ok_or_else(|| KeyError::NotAKey(path.to_owned()))?;
    // The file was written when the key was retired.
    let retired = Timestamp::from_secs(fs::metadata(path).map_err(io_error)?.mtime());
    let until = retired.plus_millis(i64::from(MAX_TTL_SECONDS) * 1000);
    Ok(Some(Previous { kid: key.thumbprint(), key, until }))
}

fn generate() -> Result<zeroize::Zeroizing<String>, KeyError> {
    let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new())
        .map_err(|_| KeyError::Generate)?;
    SecretKey::from_pkcs8_der(document.as_ref())
        .and_then(|key| key.to_pkcs8_pem(LineEnding::LF))
        .map_err(|_| KeyError::Generate)
}

fn create(path: &Path) -> Result<(), KeyError> {
    match write(path, generate()?.as_bytes(), Existing::Keep) {
        // Another gate of the same state made one meanwhile: that one it is.
        Err(KeyError::Io { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

enum Existing {
    Keep,
    Replace,
}

/// Writes a file that is whole from the moment on that it has its name.
fn write(path: &Path, contents: &[u8], existing: Existing) -> Result<(), KeyError> {
    let temporary = path.with_extension(format!("{}.tmp", ids::mint()));
    let written = files::create_private(&temporary, contents)
        .and_then(|()| match existing {
            Existing::Keep => fs::hard_link(&temporary, path).and_then(|()| fs::remove_file(&temporary)),
            Existing::Replace => fs::rename(&temporary, path),
        })
        .and_then(|()| path.parent().map_or(Ok(()), |dir| fs::File::open(dir)?.sync_all()));
    written.map_err(|source| {
        // What cannot be removed either is an unused key that nobody else can read.
        let _ = fs::remove_file(&temporary);
        KeyError::Io { path: path.to_owned(), source }
    })
}
