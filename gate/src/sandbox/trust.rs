//! The certificates that a command trusts: those of its root, and the gate's own authority.
//!
//! Nothing but certificates goes in: the sources are read as PEM and written anew, so that a key that lies in the same
//! file, or a file that is something else, never gets inside.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::io::Errno;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::SandboxError;
use super::protocol::{Root, TRUST_BUNDLE};
use super::sealed::{SealedCopy, seal};

/// What clients read: OpenSSL and Python's `ssl`, Go, Ruby; requests; Node (adds to its own); curl; git.
const VARIABLES: [&str; 5] =
    ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO"];

/// Where distributions keep all certificates in one file; the first that is there counts.
const BUNDLES: [&str; 5] = [
    "etc/ssl/certs/ca-certificates.crt",
    "etc/pki/tls/certs/ca-bundle.crt",
    "etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "etc/ssl/ca-bundle.pem",
    "etc/ssl/cert.pem",
];
const BUNDLE_MAX_BYTES: u64 = 16 << 20;
/// Bundles that are kept: one for each root that commands name.
const KEPT: usize = 16;
const TRIES: usize = 64;

/// The authority's certificates, and which state of which file they are put beside.
type Key = (Vec<u8>, Option<Source>);

/// A file that has not changed since: device, inode, size, seconds and nanoseconds of the last change.
type Source = (u64, u64, u64, i64, i64);

/// Bundles as sealed copies, made once for each authority and state of the root's own file.
#[derive(Debug, Default)]
pub struct TrustStore(Mutex<HashMap<Key, Arc<SealedCopy>>>);

impl TrustStore {
    /// The bundle of what `root` trusts and `authority`. A directory that has no bundle is given the host's.
    ///
    /// # Errors
    /// An authority without a certificate; a file that is there and cannot be read.
    pub fn bundle(&self, authority: &[u8], root: &Root) -> Result<Arc<SealedCopy>, SandboxError> {
        let own = match root {
            Root::Directory(directory) => open_bundle(directory)?,
            Root::Host | Root::Empty => None,
        };
        let found = match own {
            Some(found) => Some(found),
            None => open_bundle(Path::new("/"))?,
        };
        let key = (authority.to_vec(), found.as_ref().map(|found| found.source));
        if let Some(kept) = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(Arc::clone(kept));
        }
        let mut bundle = String::new();
        if let Some(Found { path, file, .. }) = found {
            let mut bytes = Vec::new();
            file.take(BUNDLE_MAX_BYTES).read_to_end(&mut bytes).map_err(unreadable(&path))?;
            // One that does not parse is one that no client could use.
            CertificateDer::pem_slice_iter(&bytes).flatten().for_each(|found| append(&mut bundle, &found));
        }
        let mut authorities = 0;
        for certificate in CertificateDer::pem_slice_iter(authority) {
            let certificate = certificate.map_err(|e| SandboxError::Config(format!("trusted certificates: {e}")))?;
            append(&mut bundle, &certificate);
            authorities += 1;
        }
        if authorities == 0 {
            return Err(SandboxError::Config("trusted certificates: there is none".into()));
        }
        let (copy, _) = seal(&mut bundle.as_bytes()).map_err(unreadable(Path::new(TRUST_BUNDLE)))?;
        let copy = Arc::new(copy);
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= KEPT {
            kept.clear();
        }
        kept.insert(key, Arc::clone(&copy));
        Ok(copy)
    }
}

/// Names the bundle in every variable that the command does not set itself.
pub fn add_variables(env: &mut Vec<(String, String)>) {
    for name in VARIABLES {
        if !env.iter().any(|(given, _)| given == name) {
            env.push((name.to_owned(), TRUST_BUNDLE.to_owned()));
        }
    }
}

struct Found {
    path: PathBuf,
    file: File,
    source: Source,
}

fn unreadable(path: &Path) -> impl Fn(io::Error) -> SandboxError {
    move |source| SandboxError::SealedUnreadable { path: path.to_owned(), source }
}

/// The bundle as a program in `root` would open it: a link there leads to what is inside, never to the host's files.
fn open_bundle(root: &Path) -> Result<Option<Found>, SandboxError> {
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = openat(CWD, root, directory, Mode::empty()).map_err(|e| unreadable(root)(e.into()))?;
    for name in BUNDLES {
        let path = root.join(name);
        // Non-blocking: a FIFO must not hold the gate.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        // A mount or a rename anywhere, while `..` is resolved, asks for another try (openat2(2), EAGAIN).
        let mut tries = (0..TRIES).map(|_| openat2(&opened, name, flags, Mode::empty(), ResolveFlags::IN_ROOT));
        let file = match tries.find(|got| !matches!(got, Err(Errno::AGAIN))).unwrap_or(Err(Errno::AGAIN)) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT | Errno::NOTDIR) => continue,
            Err(error) => return Err(unreadable(&path)(error.into())),
        };
        let found = file.metadata().map_err(unreadable(&path))?;
        if found.is_file() {
            let source = (found.dev(), found.ino(), found.size(), found.mtime(), found.mtime_nsec());
            return Ok(Some(Found { path, file, source }));
        }
    }
    Ok(None)
}

/// RFC 7468 §2: lines of 64 characters.
fn append(bundle: &mut String, certificate: &[u8]) {
    bundle.push_str("-----BEGIN CERTIFICATE-----\n");
    for (place, character) in STANDARD.encode(certificate).chars().enumerate() {
        if place > 0 && place % 64 == 0 {
            bundle.push('\n');
        }
        bundle.push(character);
    }
    bundle.push_str("\n-----END CERTIFICATE-----\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn authority(name: &str) -> (String, String) {
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap().self_signed(&key).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    fn text(copy: &SealedCopy) -> String {
        let mut bytes = vec![0; copy.bytes as usize];
        assert_eq!(rustix::io::pread(&copy.file, &mut bytes, 0).unwrap(), bytes.len());
        String::from_utf8(bytes).unwrap()
    }

    fn certificates(pem: &[u8]) -> Vec<CertificateDer<'static>> {
        CertificateDer::pem_slice_iter(pem).map(Result::unwrap).collect()
    }

    #[test]
    fn a_bundle_holds_certificates_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let (own, own_key) = authority("own.test");
        let (ours, our_key) = authority("ours.test");
        std::fs::create_dir_all(directory.path().join("etc/ssl/certs")).unwrap();
        let file = directory.path().join(BUNDLES[0]);
        std::fs::write(&file, format!("# a comment\n{own}{own_key}nonsense\n")).unwrap();
        let root = Root::Directory(directory.path().to_owned());
        let store = TrustStore::default();
        let bundle = store.bundle(format!("{our_key}{ours}").as_bytes(), &root).unwrap();
        let bundle_text = text(&bundle);
        assert!(!bundle_text.contains("PRIVATE") && !bundle_text.contains("nonsense"), "{bundle_text}");
        assert_eq!(certificates(bundle_text.as_bytes()), certificates(format!("{own}{ours}").as_bytes()));
        // Kept, until the root's file is another.
        let again = store.bundle(format!("{our_key}{ours}").as_bytes(), &root).unwrap();
        assert!(Arc::ptr_eq(&bundle, &again));
        std::fs::write(&file, "nothing any more").unwrap();
        let changed = store.bundle(ours.as_bytes(), &root).unwrap();
        assert_eq!(certificates(text(&changed).as_bytes()), certificates(ours.as_bytes()));
    }

    #[test]
    fn an_authority_without_a_certificate_is_refused() {
        let (_, key) = authority("a.test");
        for pem in ["", "none", key.as_str(), "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n"] {
            let refused = TrustStore::default().bundle(pem.as_bytes(), &Root::Host);
            assert!(matches!(refused, Err(SandboxError::Config(_))), "{pem}");
        }
    }

    /// A link in a directory root means what it means inside: the host's file at that path is not read.
    #[test]
    fn a_link_out_of_a_directory_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let (secret, ours) = (authority("secret.test").0, authority("ours.test").0);
        let outside = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(outside.path(), &secret).unwrap();
        std::fs::create_dir_all(directory.path().join("etc/ssl/certs")).unwrap();
        std::os::unix::fs::symlink(outside.path(), directory.path().join(BUNDLES[0])).unwrap();
        let root = Root::Directory(directory.path().to_owned());
        let bundle = TrustStore::default().bundle(ours.as_bytes(), &root).unwrap();
        let [wanted] = certificates(secret.as_bytes()).try_into().unwrap();
        assert!(!certificates(text(&bundle).as_bytes()).contains(&wanted));
    }

    #[test]
    fn what_the_command_sets_stays() {
        let mut env = vec![("CURL_CA_BUNDLE".to_owned(), "/mine".to_owned())];
        add_variables(&mut env);
        assert_eq!(env.len(), VARIABLES.len());
        for (name, value) in env {
            assert_eq!(value, if name == "CURL_CA_BUNDLE" { "/mine" } else { TRUST_BUNDLE }, "{name}");
        }
    }
}
