//! The sockets that are attacked: the gate's own, on loopback and in its state directory, for one run.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket, UnixListener};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::TARGET_TIME;
use crate::ids;
use crate::sandbox::attempts::{TECHNIQUES, Target};

/// Outside, in the leaf of profile none, and in the one that has a name.
const RUNS: usize = 3;
/// Of `sun_path`.
const MAX_UNIX_PATH: usize = 108;
const UNIX_NAME: &str = "selftest.sock";
/// How long one call into a leaf may take before the next is made.
const CALL_TIME: Duration = Duration::from_millis(200);
const CALL_PAUSE: Duration = Duration::from_millis(10);

/// Which run each technique's target heard from.
type Heard = Arc<Mutex<BTreeSet<(String, usize)>>>;

/// What runs say to be known by.
#[derive(Clone)]
struct Tokens(Arc<[String; RUNS]>);

impl Tokens {
    fn run_of(&self, said: &[u8]) -> Option<usize> {
        self.0.iter().position(|token| said.starts_with(token.as_bytes()))
    }
}

/// The open sockets. Dropped, they are closed.
pub struct Targets {
    addresses: BTreeMap<String, SocketAddr>,
    inbound: [u16; RUNS],
    dns: [SocketAddr; 2],
    at: PathBuf,
    unix_path: PathBuf,
    _directory: std::fs::File,
    unix_abstract: String,
    tokens: Tokens,
    heard: Heard,
    _tasks: JoinSet<()>,
}

impl Targets {
    /// Opens them, and begins to call where runs will listen.
    pub async fn open(state_dir: &Path) -> io::Result<Self> {
        let tokens = Tokens(Arc::new(std::array::from_fn(|_| ids::mint())));
        let heard = Heard::default();
        let mut tasks = JoinSet::new();
        let note = |name: &str| Note { name: name.to_owned(), tokens: tokens.clone(), heard: Arc::clone(&heard) };
        let mut addresses = BTreeMap::new();
        for technique in TECHNIQUES {
            let Some(target) = technique.target else { continue };
            let ip: IpAddr = match target {
                Target::Tcp4 | Target::Udp4 => Ipv4Addr::LOCALHOST.into(),
                Target::Tcp6 | Target::Udp6 => Ipv6Addr::LOCALHOST.into(),
            };
            let opened = match target {
                Target::Tcp4 | Target::Tcp6 => streams(ip, note(technique.name), &mut tasks).await,
                Target::Udp4 | Target::Udp6 => datagrams(ip, note(technique.name), &mut tasks).await,
            };
            match opened {
                Ok(address) => drop(addresses.insert(technique.name.to_owned(), address)),
                // A machine without IPv6 has none to be attacked over.
                Err(_) if ip.is_ipv6() => {}
                Err(error) => return Err(error),
            }
        }
        let at = state_dir.join(UNIX_NAME);
        let _ = std::fs::remove_file(&at);
        // An address has little room (unix(7)): a longer path is reached by way of its directory, which stays open.
        let directory = std::fs::File::open(state_dir)?;
        let unix_path = if at.as_os_str().len() < MAX_UNIX_PATH {
            at.clone()
        } else {
            format!("/proc/{}/fd/{}/{UNIX_NAME}", std::process::id(), directory.as_raw_fd()).into()
        };
        serve_unix(UnixListener::bind(&unix_path)?, note("unix_path"), &mut tasks);
        let unix_abstract = format!("latchgate-selftest-{}", ids::mint());
        let name = std::os::unix::net::SocketAddr::from_abstract_name(&unix_abstract)?;
        let listener = std::os::unix::net::UnixListener::bind_addr(&name)?;
        listener.set_nonblocking(true)?;
        serve_unix(UnixListener::from_std(listener)?, note("unix_abstract"), &mut tasks);
        let dns = answer_dns(&mut tasks).await?;
        let mut inbound = [0; RUNS];
        for (run, port) in inbound.iter_mut().enumerate() {
            // Free at this moment; the run binds it.
            *port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?.local_addr()?.port();
            tasks.spawn(call(*port, run, note("inbound")));
        }
        Ok(Self {
            addresses,
            inbound,
            dns,
            at,
            unix_path,
            _directory: directory,
            unix_abstract,
            tokens,
            heard,
            _tasks: tasks,
        })
    }

    pub fn has(&self, technique: &str) -> bool {
        self.addresses.contains_key(technique)
    }

    pub fn addresses(&self) -> &BTreeMap<String, SocketAddr> {
        &self.addresses
    }

    pub fn token(&self, run: usize) -> &str {
        self.tokens.0.get(run).map_or("", String::as_str)
    }

    pub fn inbound_port(&self, run: usize) -> u16 {
        self.inbound.get(run).copied().unwrap_or(0)
    }

    /// Servers that answer every query, over UDP and over TCP.
    pub fn dns(&self) -> [SocketAddr; 2] {
        self.dns
    }

    pub fn unix_path(&self) -> &Path {
        &self.unix_path
    }

    pub fn unix_abstract(&self) -> &str {
        &self.unix_abstract
    }

    /// Which techniques' targets heard from which runs.
    pub fn heard(&self) -> BTreeSet<(String, usize)> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Targets {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.at);
    }
}

/// Where one target notes whom it heard.
#[derive(Clone)]
struct Note {
    name: String,
    tokens: Tokens,
    heard: Heard,
}

impl Note {
    fn hear(&self, said: &[u8]) {
        if let Some(run) = self.tokens.run_of(said) {
            self.heard.lock().unwrap_or_else(PoisonError::into_inner).insert((self.name.clone(), run));
        }
    }
}

async fn streams(ip: IpAddr, note: Note, tasks: &mut JoinSet<()>) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind((ip, 0)).await?;
    let address = listener.local_addr()?;
    tasks.spawn(async move {
        let mut open = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            open.spawn(listen_to(stream, note.clone()));
        }
    });
    Ok(address)
}

fn serve_unix(listener: UnixListener, note: Note, tasks: &mut JoinSet<()>) {
    tasks.spawn(async move {
        let mut open = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            open.spawn(listen_to(stream, note.clone()));
        }
    });
}

async fn listen_to(mut stream: impl AsyncRead + AsyncWrite + Unpin, note: Note) {
    let mut said = [0; 64];
    if let Ok(Ok(read)) = timeout(TARGET_TIME, stream.read(&mut said)).await {
        note.hear(said.get(..read).unwrap_or_default());
        let _ = stream.write_all(b"heard").await;
    }
}

async fn datagrams(ip: IpAddr, note: Note, tasks: &mut JoinSet<()>) -> io::Result<SocketAddr> {
    let socket = UdpSocket::bind((ip, 0)).await?;
    let address = socket.local_addr()?;
    tasks.spawn(async move {
        let mut said = [0; 512];
        while let Ok((read, from)) = socket.recv_from(&mut said).await {
            note.hear(said.get(..read).unwrap_or_default());
            let _ = socket.send_to(b"heard", from).await;
        }
    });
    Ok(address)
}

/// Calls a port of loopback until whoever listens there says the run's token.
async fn call(port: u16, run: usize, note: Note) {
    loop {
        let said = async {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
            let mut said = [0; 64];
            let read = stream.read(&mut said).await?;
            Ok::<_, io::Error>(said.get(..read).unwrap_or_default().to_vec())
        };
        if let Ok(Ok(said)) = timeout(CALL_TIME, said).await
            && note.tokens.run_of(&said) == Some(run)
        {
            return note.hear(&said);
        }
        tokio::time::sleep(CALL_PAUSE).await;
    }
}

/// Turns every query into an empty answer: that it comes back is all that counts.
async fn answer_dns(tasks: &mut JoinSet<()>) -> io::Result<[SocketAddr; 2]> {
    let (socket, listener) =
        (UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?, TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?);
    let addresses = [socket.local_addr()?, listener.local_addr()?];
    tasks.spawn(async move {
        let mut query = [0; 512];
        while let Ok((read, from)) = socket.recv_from(&mut query).await {
            let query = query.get_mut(..read).unwrap_or_default();
            as_answer(query);
            let _ = socket.send_to(query, from).await;
        }
    });
    tasks.spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut query = [0; 512];
            let Ok(Ok(read)) = timeout(TARGET_TIME, stream.read(&mut query)).await else { continue };
            let query = query.get_mut(..read).unwrap_or_default();
            as_answer(query.get_mut(2..).unwrap_or_default());
            let _ = stream.write_all(query).await;
        }
    });
    Ok(addresses)
}

/// QR is set, the code is NOERROR (RFC 1035 §4.1.1).
fn as_answer(query: &mut [u8]) {
    if let Some(flags) = query.get_mut(2) {
        *flags |= 0x80;
    }
}
