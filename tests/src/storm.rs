//! An attacker that tries the same few ways out, over and over, for as long as it lives: what it takes to find a moment
//! in which nobody holds a leaf. It is the test binary itself, started again; [`run`] is what it does.
//!
//! It writes what it counted to a file of its own, so that its count outlives it.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType};

use crate::inside::Counting;

const ASKED: &str = "LATCHGATE_TEST_STORM";
const REPLY: &str = "@storm ";

/// What is tried, in this order, again and again.
pub const WAYS: [&str; 7] = [
    "a new TCP socket",
    "a new TCP socket of IPv6",
    "a new TCP socket of IPv6 to a mapped address",
    "a TCP socket that was kept",
    "a datagram from a new socket",
    "a datagram from a socket that was kept",
    "a datagram from a socket that was kept connected",
];

/// What one attacker did, by [`WAYS`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub attempts: [u64; WAYS.len()],
    /// Those that nobody refused with EPERM.
    pub through: [u64; WAYS.len()],
    /// What the last of those came to: an error's number, 0 for none.
    pub last: u64,
}

impl Tally {
    pub fn total(&self) -> u64 {
        self.attempts.iter().sum()
    }

    pub fn escapes(&self) -> u64 {
        self.through.iter().sum()
    }

    fn words(&self) -> Vec<u8> {
        let words = self.attempts.iter().chain(&self.through).chain(std::iter::once(&self.last));
        words.flat_map(|word| word.to_le_bytes()).collect()
    }

    fn read(file: &File) -> Self {
        let mut bytes = [0; (2 * WAYS.len() + 1) * 8];
        if file.read_exact_at(&mut bytes, 0).is_err() {
            return Self::default();
        }
        let word = |at: usize| u64::from_le_bytes(bytes[at * 8..at * 8 + 8].try_into().unwrap());
        Self {
            attempts: std::array::from_fn(word),
            through: std::array::from_fn(|at| word(WAYS.len() + at)),
            last: word(2 * WAYS.len()),
        }
    }
}

/// Where the attacker wants to get: nothing that is in anybody's profile.
pub struct Targets {
    pub v4: Counting,
    pub v6: Counting,
    pub udp: Counting,
}

impl Default for Targets {
    fn default() -> Self {
        Self { v4: Counting::tcp("127.0.0.1:0"), v6: Counting::tcp("[::1]:0"), udp: Counting::udp("127.0.0.1:0") }
    }
}

impl Targets {
    /// How often anything arrived.
    pub fn reached(&self) -> usize {
        self.v4.reached() + self.v6.reached() + self.udp.reached()
    }
}

/// An attacker that was started.
pub struct Storm {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
    path: PathBuf,
    tally: File,
}

impl Storm {
    /// Starts it where this process is. `entry` is the name of the test that calls [`run`].
    pub fn start(entry: &str, targets: &Targets) -> Self {
        let path = std::env::temp_dir().join(format!("{}storm-{}", crate::gate::PREFIX, uuid::Uuid::new_v4()));
        let tally = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        let asked = format!("{} {} {} {}", path.display(), targets.v4.address, targets.v6.address, targets.udp.address);
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", entry, "--nocapture", "--test-threads=1"])
            .env(ASKED, asked)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut storm = Self { child, stdin, stdout, path, tally };
        assert!(storm.line(), "the attacker is gone");
        storm
    }

    /// Puts it into a cgroup, which may be going away at this moment.
    pub fn enter(&self, cgroup: &Path) -> std::io::Result<()> {
        std::fs::write(cgroup.join("cgroup.procs"), self.child.id().to_string())
    }

    /// It makes the sockets that it keeps, where it is now. One that it may not make it does without: the ways that
    /// need it are refused then. False when it was killed before.
    pub fn make(&mut self) -> bool {
        self.say("make") && self.line()
    }

    /// It begins, and does not stop by itself. False when it was killed before.
    pub fn go(&mut self) -> bool {
        self.say("go") && self.line()
    }

    /// What it has done so far, whether it lives or not.
    pub fn tally(&self) -> Tally {
        Tally::read(&self.tally)
    }

    /// Whether it is there still.
    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Ends it, after the attempt that it is at.
    pub fn stop(mut self) -> Tally {
        self.stdin = None;
        while self.line() {}
        self.child.wait().unwrap();
        self.tally()
    }

    fn say(&mut self, word: &str) -> bool {
        writeln!(self.stdin.as_mut().unwrap(), "{word}").is_ok()
    }

    /// Waits for a reply; false when there will be none.
    fn line(&mut self) -> bool {
        let mut line = String::new();
        loop {
            line.clear();
            match self.stdout.read_line(&mut line) {
                Ok(0) | Err(_) => return false,
                Ok(_) if line.contains(REPLY) => return true,
                Ok(_) => {}
            }
        }
    }
}

impl Drop for Storm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.path);
    }
}

#[derive(Default)]
struct Kept {
    tcp: Option<OwnedFd>,
    udp: Option<OwnedFd>,
    connected: Option<OwnedFd>,
}

/// What the started process does. Returns at once in the test run itself.
pub fn run() {
    let Some(asked) = std::env::var_os(ASKED) else { return };
    let asked = asked.into_string().unwrap();
    let words: Vec<&str> = asked.split(' ').collect();
    let file = File::options().write(true).open(words[0]).unwrap();
    let [v4, v6, udp] = [1, 2, 3].map(|at| words[at].parse::<SocketAddr>().unwrap());
    // It shall not take the processor from what it attacks.
    let _ = rustix::process::nice(19);
    let mut kept = Kept::default();
    println!("{REPLY}ready");
    let mut lines = std::io::stdin().lines();
    while let Some(Ok(word)) = lines.next() {
        match word.as_str() {
            "make" => {
                kept.tcp = tcp(AddressFamily::INET).ok();
                kept.udp = datagram().ok();
                kept.connected = datagram().and_then(|socket| connect(&socket, udp).map(|()| socket)).ok();
            }
            "go" => {
                println!("{REPLY}going");
                break;
            }
            other => panic!("{other}"),
        }
        println!("{REPLY}done");
    }
    let over = Arc::new(AtomicBool::new(false));
    let ended = Arc::clone(&over);
    drop(lines);
    std::thread::spawn(move || {
        for _ in std::io::stdin().lines() {}
        ended.store(true, Ordering::SeqCst);
    });
    let mut tally = Tally::default();
    let mapped = SocketAddr::new(Ipv4Addr::LOCALHOST.to_ipv6_mapped().into(), v4.port());
    assert_eq!(v6.ip(), Ipv6Addr::LOCALHOST);
    while !over.load(Ordering::Relaxed) {
        for _ in 0..64 {
            let tried = [
                tcp(AddressFamily::INET).and_then(|socket| connect(socket, v4)),
                tcp(AddressFamily::INET6).and_then(|socket| connect(socket, v6)),
                tcp(AddressFamily::INET6).and_then(|socket| connect(socket, mapped)),
                with(&kept.tcp, |socket| connect(socket, v4)),
                datagram().and_then(|socket| send(socket, udp)),
                with(&kept.udp, |socket| send(socket, udp)),
                with(&kept.connected, |socket| rustix::net::send(socket, b"out", SendFlags::empty()).map(drop)),
            ];
            for (at, result) in tried.into_iter().enumerate() {
                tally.attempts[at] += 1;
                if result != Err(Errno::PERM) {
                    tally.through[at] += 1;
                    tally.last = result.err().map_or(0, |error| u64::from(error.raw_os_error().unsigned_abs()));
                }
            }
        }
        file.write_all_at(&tally.words(), 0).unwrap();
    }
    // The harness that this process is a test of shall not go on with the others.
    std::process::exit(0);
}

fn with(kept: &Option<OwnedFd>, attempt: impl FnOnce(&OwnedFd) -> rustix::io::Result<()>) -> rustix::io::Result<()> {
    kept.as_ref().map_or(Err(Errno::PERM), attempt)
}

fn tcp(family: AddressFamily) -> rustix::io::Result<OwnedFd> {
    // Where a hook is missing but the packet filter is not, a connect that waits would wait for minutes.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(family, SocketType::STREAM, flags, None)
}

fn datagram() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)
}

fn connect(socket: impl AsFd, to: SocketAddr) -> rustix::io::Result<()> {
    rustix::net::connect(socket, &to)
}

fn send(socket: impl AsFd, to: SocketAddr) -> rustix::io::Result<()> {
    rustix::net::sendto(socket, b"out", SendFlags::empty(), &to).map(drop)
}
