//! Binding sockets, and who is at the other end of one.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tokio::net::{TcpListener, UnixListener, UnixStream};

use crate::auth::{AuthError, peer};
use crate::config;
use crate::server::body::Room;

/// What a listener says of everyone who calls on it.
#[derive(Clone, Debug)]
pub struct ListenerIdentity {
    pub name: String,
    pub identity: peer::ListenerIdentity,
    /// Bases that a proof's `htu` may have here (API.md §1.5).
    pub bases: Vec<String>,
    /// What a lease of this listener may ask for.
    pub scopes: Vec<String>,
    pub require_body_binding: bool,
    /// For the bodies of requests.
    pub room: Room,
}

/// What the kernel says of the process at the other end. Absent where it says nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Peer {
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub pid: Option<i32>,
}

impl Peer {
    /// The credentials of the process that connected (unix(7), `SO_PEERCRED`). A pid of 0 is one of another PID
    /// namespace: not known.
    pub fn of(stream: &UnixStream) -> io::Result<Self> {
        let credentials = stream.peer_cred()?;
        Ok(Self {
            uid: Some(credentials.uid()),
            gid: Some(credentials.gid()),
            pid: credentials.pid().filter(|pid| *pid != 0),
        })
    }
}

impl ListenerIdentity {
    /// The principal of a peer: the listener's, narrowed by its table of uids.
    ///
    /// # Errors
    /// As [`peer::ListenerIdentity::principal`].
    pub fn principal_of(&self, peer: Peer) -> Result<&str, AuthError> {
        self.identity.principal(peer.uid)
    }
}

/// A bound socket.
#[derive(Debug)]
pub enum Bound {
    Unix(UnixListener, PathBuf),
    Tcp(TcpListener),
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Why a socket is not opened.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("{}: {why}", path.display())]
    Refused { path: PathBuf, why: String },
    #[error("{}: {source}", path.display())]
    Path { path: PathBuf, source: io::Error },
    #[error("{address}: {source}")]
    Address { address: SocketAddr, source: io::Error },
}

/// Binds a Unix socket with `mode` and `group`.
///
/// A directory that somebody else could write is refused: who can replace the socket is the gate to every client. A
/// socket that a dead gate left is removed; one that answers belongs to a living one and is refused.
pub fn unix(path: &Path, mode: u32, group: Option<u32>) -> Result<Bound, ListenError> {
    let failed = |source| ListenError::Path { path: path.to_owned(), source };
    let refused = |why: &str| Err(ListenError::Refused { path: path.to_owned(), why: why.to_owned() });
    let Some(directory) = path.parent() else { return refused("has no directory") };
    own_directory(directory)?;
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => return refused("is there and is no socket"),
        Ok(_) => match std::os::unix::net::UnixStream::connect(path) {
            Ok(_) => return refused("another gate listens there"),
            Err(_) => std::fs::remove_file(path).map_err(failed)?,
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    // Bound under a umask that lets nobody in, then opened as configured: there is no moment in which it is wider.
    let listener = {
        let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
        let bound = UnixListener::bind(path);
        rustix::process::umask(before);
        bound.map_err(failed)?
    };
    if let Some(group) = group {
        std::os::unix::fs::chown(path, None, Some(group)).map_err(failed)?;
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(failed)?;
    Ok(Bound::Unix(listener, path.to_owned()))
}

/// Makes the directory of a socket, or checks that nobody but this user can put something else there.
fn own_directory(directory: &Path) -> Result<(), ListenError> {
    let failed = |source| ListenError::Path { path: directory.to_owned(), source };
    match std::fs::symlink_metadata(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return crate::files::private_directory(directory).map_err(failed);
        }
        Err(error) => return Err(failed(error)),
        Ok(found) => {
            let refused = |why: &str| Err(ListenError::Refused { path: directory.to_owned(), why: why.to_owned() });
            if !found.is_dir() {
                return refused("is not a directory; a symlink is not followed");
            }
            if found.uid() != rustix::process::geteuid().as_raw() {
                return refused("belongs to another user, who could replace the socket");
            }
            if found.mode() & 0o022 != 0 {
                return refused("others may write in it and could replace the socket: chmod go-w");
            }
        }
    }
    Ok(())
}

/// Binds a TCP address.
pub async fn tcp(address: SocketAddr) -> Result<Bound, ListenError> {
    let listener = TcpListener::bind(address).await.map_err(|source| ListenError::Address { address, source })?;
    Ok(Bound::Tcp(listener))
}

/// What the configuration says of one listener, with the address that was really bound.
pub fn identity(config: &config::Config, listener: &config::Listener, bound: &Bound) -> ListenerIdentity {
    let mut bases: Vec<String> = config.public_base_urls.clone();
    let mut loopback = true;
    match bound {
        Bound::Unix(..) => bases.extend(["http://localhost".to_owned(), "http://localhost:3000".to_owned()]),
        Bound::Tcp(socket) => {
            if let Ok(address) = socket.local_addr() {
                loopback = address.ip().is_loopback();
                bases.push(format!("http://{address}"));
                if loopback {
                    bases.push(format!("http://localhost:{}", address.port()));
                }
            }
        }
    }
    let principal = match bound {
        Bound::Unix(..) => listener.principal.clone(),
        Bound::Tcp(_) => config.identity.tcp.as_ref().map(|tcp| tcp.principal.clone()),
    };
    let uids = listener.peers.as_ref().map(|peers| {
        peers.iter().filter_map(|(uid, principal)| Some((uid.parse().ok()?, principal.clone()))).collect()
    });
    ListenerIdentity {
        name: listener.name.clone(),
        identity: peer::ListenerIdentity { principal, uids },
        bases,
        scopes: listener.scopes.clone().unwrap_or_else(|| vec!["tools:call".to_owned()]),
        require_body_binding: config.auth.require_body_binding || !loopback,
        room: Room::new(config.limits.max_body_bytes_in_flight),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_is_not_opened_where_others_could_replace_it() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let open = directory.path().join("open");
        std::fs::create_dir(&open).expect("made");
        std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o777)).expect("opened");
        assert!(matches!(unix(&open.join("g.sock"), 0o600, None), Err(ListenError::Refused { .. })));

        let linked = directory.path().join("linked");
        std::os::unix::fs::symlink(directory.path(), &linked).expect("linked");
        assert!(matches!(unix(&linked.join("g.sock"), 0o600, None), Err(ListenError::Refused { .. })));

        let path = directory.path().join("mine/g.sock");
        let first = unix(&path, 0o660, None).expect("bound");
        assert_eq!(std::fs::metadata(&path).expect("there").mode() & 0o777, 0o660);
        assert_eq!(std::fs::metadata(directory.path().join("mine")).expect("there").mode() & 0o777, 0o700);
        assert!(matches!(unix(&path, 0o600, None), Err(ListenError::Refused { .. })), "a living gate keeps its socket");
        std::mem::forget(first); // a gate that died leaves the name behind, but this one still listens
        std::fs::remove_file(&path).expect("removed");
        std::fs::write(&path, b"").expect("written");
        assert!(matches!(unix(&path, 0o600, None), Err(ListenError::Refused { .. })), "a file is not removed");
    }
}
