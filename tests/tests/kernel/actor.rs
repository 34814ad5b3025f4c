//! A process that is put into a cgroup and then tries what it is told: the test binary itself, started again.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use latchgate::egress::LeafId;
use latchgate::egress::kernel::{Enforcer, KernelConfig, KernelProfile, ProxyAddresses};

const ASKED: &str = "LATCHGATE_TEST_ACTOR";
/// The test's own output goes the same way; replies are marked.
const REPLY: &str = "@reply ";

pub struct Actor {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Actor {
    /// Starts it where this process is.
    pub fn start() -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "actor_process", "--nocapture", "--test-threads=1"])
            .env(ASKED, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut actor = Self { child, stdin, stdout };
        assert_eq!(actor.ask("ready"), "ok");
        actor
    }

    pub fn start_in(cgroup: &Path) -> Self {
        let actor = Self::start();
        actor.enter(cgroup);
        actor
    }

    pub fn enter(&self, cgroup: &Path) {
        std::fs::write(cgroup.join("cgroup.procs"), self.child.id().to_string()).unwrap();
    }

    /// Does something in the actor's network namespace, from this process: on the gate's side.
    pub fn in_its_network<T: Send + 'static>(&mut self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let thread = self.ask("thread");
        let namespace = std::fs::File::open(format!("/proc/{}/task/{thread}/ns/net", self.child.id())).unwrap();
        let thread = std::thread::spawn(move || {
            rustix::thread::move_into_link_name_space(
                std::os::fd::AsFd::as_fd(&namespace),
                Some(rustix::thread::LinkNameSpaceType::Network),
            )
            .unwrap();
            work()
        });
        thread.join().unwrap()
    }

    pub fn tell(&mut self, command: &str) {
        writeln!(self.stdin, "{command}").unwrap();
    }

    pub fn reply(&mut self) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert_ne!(self.stdout.read_line(&mut line).unwrap(), 0, "the actor is gone");
            if let Some(at) = line.find(REPLY) {
                return line[at + REPLY.len()..].trim_end().to_owned();
            }
        }
    }

    pub fn ask(&mut self, command: &str) -> String {
        self.tell(command);
        self.reply()
    }

    /// SIGKILL, as an out-of-memory killer would.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the started process does. Returns at once in the test run itself.
pub fn run() {
    if std::env::var_os(ASKED).is_none() {
        return;
    }
    let mut state = State::default();
    for line in std::io::stdin().lock().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        let said = match act(&mut state, &words) {
            Ok(said) => said,
            Err(error) => match error.raw_os_error() {
                Some(libc::EPERM) => "EPERM".to_owned(),
                Some(libc::ETIMEDOUT) => "timeout".to_owned(),
                _ if matches!(error.kind(), std::io::ErrorKind::TimedOut | std::io::ErrorKind::WouldBlock) => {
                    "timeout".to_owned()
                }
                _ => format!("error: {error}"),
            },
        };
        println!("{REPLY}{said}");
    }
}

#[derive(Default)]
struct State {
    stream: Option<TcpStream>,
    socket: Option<OwnedFd>,
    listener: Option<TcpListener>,
    udp: Option<UdpSocket>,
    enforcer: Option<Enforcer>,
    many: Vec<OwnedFd>,
}

const PATIENCE: Duration = Duration::from_millis(1_000);

fn connect(to: &str) -> std::io::Result<TcpStream> {
    TcpStream::connect_timeout(&to.parse().unwrap(), PATIENCE)
}

fn act(state: &mut State, words: &[&str]) -> std::io::Result<String> {
    let ok = Ok("ok".to_owned());
    let number = |at: usize| words[at].parse::<usize>().unwrap();
    match words[0] {
        "ready" => ok,
        "connect" => connect(words[1]).map(|_| "ok".to_owned()),
        "hold" => {
            state.stream = Some(connect(words[1])?);
            ok
        }
        "write" => {
            state.stream.as_mut().unwrap().write_all(&vec![7; number(1)])?;
            ok
        }
        "read" => {
            let stream = state.stream.as_mut().unwrap();
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.read_exact(&mut vec![0; number(1)])?;
            ok
        }
        // One TCP socket made now and connected later.
        "make" => {
            state.socket = Some(socket(libc::AF_INET, libc::SOCK_STREAM, 0)?);
            ok
        }
        "connect-made" => {
            let to: SocketAddr = words[1].parse().unwrap();
            connect_raw(state.socket.as_ref().unwrap(), to)?;
            ok
        }
        "sendto" => {
            let to: SocketAddr = words[1].parse().unwrap();
            let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            UdpSocket::bind(any)?.send_to(b"datagram", to)?;
            ok
        }
        "udp-connect" => {
            let to: SocketAddr = words[1].parse().unwrap();
            let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            UdpSocket::bind(any)?.connect(to)?;
            ok
        }
        "fast-open" => {
            let to: SocketAddr = words[1].parse().unwrap();
            fast_open(to)?;
            ok
        }
        "socket" => {
            let argument = |at: usize| words[at].parse::<i32>().unwrap();
            socket(argument(1), argument(2), argument(3))?;
            ok
        }
        "listen" => {
            let listener = TcpListener::bind(words[1])?;
            let at = listener.local_addr()?.to_string();
            state.listener = Some(listener);
            Ok(at)
        }
        // Accepts one, and says something to it.
        "answer" => {
            let stream = accept_soon(state.listener.as_ref().unwrap())?;
            (&stream).write_all(b"hello")?;
            state.stream = Some(stream);
            ok
        }
        // Takes what was accepted apart and connects elsewhere with it.
        "accepted-elsewhere" => {
            let socket = OwnedFd::from(state.stream.take().unwrap());
            disconnect(&socket)?;
            connect_raw(&socket, words[1].parse().unwrap())?;
            ok
        }
        // Connects from the address that something else listens on.
        "connect-from" => {
            let socket = socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
            bind_raw(&socket, words[1].parse().unwrap())?;
            connect_raw(&socket, words[2].parse().unwrap())?;
            ok
        }
        "hear" => {
            let mut stream = connect(words[1])?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut heard = [0; 5];
            stream.read_exact(&mut heard)?;
            Ok(String::from_utf8_lossy(&heard).into_owned())
        }
        "udp-listen" => {
            let udp = UdpSocket::bind(words[1])?;
            udp.set_read_timeout(Some(PATIENCE))?;
            let at = udp.local_addr()?.to_string();
            state.udp = Some(udp);
            Ok(at)
        }
        "udp-read" => {
            state.udp.as_ref().unwrap().recv_from(&mut [0; 64])?;
            ok
        }
        // Connects without waiting until one is refused; says how many were not.
        "hold-many" => {
            raise_descriptors();
            for at in 0..number(2) {
                let socket = socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0)?;
                match connect_raw(&socket, words[1].parse().unwrap()) {
                    Err(error) if error.raw_os_error() == Some(libc::EPERM) => return Ok(format!("{at} EPERM")),
                    Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error),
                    _ => state.many.push(socket),
                }
            }
            ok
        }
        "drop-many" => {
            state.many.clear();
            ok
        }
        // Connects and says whom the socket is connected to.
        "peer" => Ok(connect(words[1])?.peer_addr()?.to_string()),
        "peer-held" => Ok(state.stream.as_ref().unwrap().peer_addr()?.to_string()),
        // Connects a socket, disconnects it, connects it to somebody else and says to whom.
        "reconnect" => {
            let socket = socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
            connect_raw(&socket, words[1].parse().unwrap())?;
            disconnect(&socket)?;
            connect_raw(&socket, words[2].parse().unwrap())?;
            Ok(TcpStream::from(socket).peer_addr()?.to_string())
        }
        "fast-open-peer" => Ok(TcpStream::from(fast_open(words[1].parse().unwrap())?).peer_addr()?.to_string()),
        "burst-carried" => burst_carried(words[1].parse().unwrap(), number(2), words[3].parse().unwrap()),
        "thread" => Ok(rustix::thread::gettid().as_raw_nonzero().to_string()),
        // Another network namespace with nothing but lo.
        "isolate" => {
            isolate()?;
            ok
        }
        // A UDP socket that stays.
        "udp-bind" => {
            let udp =
                if words[2] == "shared" { bind_shared(words[1].parse().unwrap())? } else { UdpSocket::bind(words[1])? };
            udp.set_read_timeout(Some(PATIENCE))?;
            let at = udp.local_addr()?.to_string();
            state.udp = Some(udp);
            Ok(at)
        }
        "udp-join" => {
            let udp = state.udp.as_ref().unwrap();
            udp.connect(words[1])?;
            Ok(udp.peer_addr()?.to_string())
        }
        // Sends a query with an id to a server, or to whom the socket is connected.
        "udp-query" => {
            query(state.udp.as_ref().unwrap(), words[1], words[2].parse().unwrap())?;
            ok
        }
        "udp-ask" => {
            let udp = state.udp.as_ref().unwrap();
            query(udp, words[1], words[2].parse().unwrap())?;
            answer(udp, words[2].parse().unwrap())
        }
        "udp-send" => {
            state.udp.as_ref().unwrap().send_to(&vec![0; number(2)], words[1])?;
            ok
        }
        "ask-many" => ask_many(number(1), words[2].parse().unwrap()),
        "burst-sized" => burst_sized(words[1].parse().unwrap(), number(2), words[3].parse().unwrap()),
        "reuse-port" => reuse_port(words[1], words[2].parse().unwrap(), number(3), words[4].parse().unwrap()),
        // The same query again and again; says how many were not refused.
        "udp-flood" => {
            let udp = state.udp.as_ref().unwrap();
            Ok((0..number(2)).filter(|_| query(udp, words[1], 1).is_ok()).count().to_string())
        }
        "burst" => burst(words[1].parse().unwrap(), number(2), words[3].parse().unwrap()),
        "transfer" => transfer(words[1], words[2], number(3), number(4)),
        "load" => {
            let config = KernelConfig {
                instance: words[1].to_owned(),
                actions: words[2].into(),
                gate: words[3].into(),
                bpffs: words[4].into(),
                proxy: ProxyAddresses { v4: words[5].parse().unwrap(), v6: None },
                resolver: None,
            };
            match Enforcer::start(config) {
                Ok(enforcer) => {
                    state.enforcer = Some(enforcer);
                    ok
                }
                Err(error) => Ok(error.to_string()),
            }
        }
        "admit" => {
            let leaf = LeafId(words[1].parse().unwrap());
            let enforcer = state.enforcer.as_ref().unwrap();
            enforcer.admit(leaf, KernelProfile::ProxyOnly, Duration::from_secs(60)).unwrap();
            ok
        }
        other => panic!("{other}"),
    }
}

fn socket(family: i32, kind: i32, protocol: i32) -> std::io::Result<OwnedFd> {
    // SAFETY: makes a descriptor that is owned here.
    unsafe {
        let made = libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol);
        if made < 0 { Err(std::io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(made)) }
    }
}

fn raise_descriptors() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let limit = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
}

fn address_of(to: SocketAddr) -> libc::sockaddr_in {
    let IpAddr::V4(ip) = to.ip() else { panic!("v4 only") };
    libc::sockaddr_in {
        sin_family: u16::try_from(libc::AF_INET).unwrap(),
        sin_port: to.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(ip.octets()) },
        sin_zero: [0; 8],
    }
}

fn connect_raw(socket: &OwnedFd, to: SocketAddr) -> std::io::Result<()> {
    let address = address_of(to);
    // SAFETY: a valid address of the length that is given.
    let result = unsafe {
        libc::connect(socket.as_raw_fd(), (&raw const address).cast(), u32::try_from(size_of_val(&address)).unwrap())
    };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

fn disconnect(socket: &OwnedFd) -> std::io::Result<()> {
    let nobody = libc::sockaddr { sa_family: u16::try_from(libc::AF_UNSPEC).unwrap(), sa_data: [0; 14] };
    // SAFETY: a valid address of the length that is given.
    let result =
        unsafe { libc::connect(socket.as_raw_fd(), &raw const nobody, u32::try_from(size_of_val(&nobody)).unwrap()) };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

fn accept_soon(listener: &TcpListener) -> std::io::Result<TcpStream> {
    listener.set_nonblocking(true)?;
    let began = std::time::Instant::now();
    loop {
        match listener.accept() {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock && began.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(5));
            }
            accepted => {
                let (stream, _) = accepted?;
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
        }
    }
}

fn bind_raw(socket: &OwnedFd, to: SocketAddr) -> std::io::Result<()> {
    let (address, one) = (address_of(to), 1_i32);
    let length = |value: usize| u32::try_from(value).unwrap();
    // SAFETY: valid buffers of the lengths that are given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_REUSEPORT,
            (&raw const one).cast(),
            length(size_of_val(&one)),
        ) | libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length(size_of_val(&address)))
    };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// With SO_REUSEADDR, which lets two UDP sockets have one address when both have it.
fn bind_shared(to: SocketAddr) -> std::io::Result<UdpSocket> {
    let (socket, address, one) = (socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?, address_of(to), 1_i32);
    let length = |value: usize| u32::try_from(value).unwrap();
    // SAFETY: valid buffers of the lengths that are given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_REUSEADDR,
            (&raw const one).cast(),
            length(size_of_val(&one)),
        ) | libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length(size_of_val(&address)))
    };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(socket.into()) }
}

fn isolate() -> std::io::Result<()> {
    // SAFETY: this thread alone, the one that does what is asked.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    let done = Command::new("ip").args(["link", "set", "lo", "up"]).status()?;
    if done.success() { Ok(()) } else { Err(std::io::Error::other(format!("ip: {done}"))) }
}

/// A DNS header and nothing more; `-`: to whom the socket is connected.
fn query(udp: &UdpSocket, server: &str, id: u16) -> std::io::Result<()> {
    let mut message = [0; 12];
    message[..2].copy_from_slice(&id.to_be_bytes());
    match server {
        "-" => udp.send(&message)?,
        server => udp.send_to(&message, server)?,
    };
    Ok(())
}

/// Who the answer came from, and what it says behind the header.
fn answer(udp: &UdpSocket, id: u16) -> std::io::Result<String> {
    let mut message = [0; 256];
    let (length, from) = udp.recv_from(&mut message)?;
    assert_eq!(message[..2], id.to_be_bytes());
    Ok(format!("{from} {}", std::str::from_utf8(&message[12..length]).unwrap()))
}

/// Asks six servers at a time, over sockets of both families, connected ones and others, and compares what the resolver
/// knows of the asker. `tag` 0 is somebody outside, who gets no answer.
fn ask_many(rounds: usize, tag: u64) -> std::io::Result<String> {
    let mut right = 0;
    for round in 0..rounds {
        let id = u16::try_from(round % 7).unwrap();
        let v4 = round % 3 == 0;
        let udp = UdpSocket::bind(if v4 { "0.0.0.0:0" } else { "[::]:0" })?;
        udp.set_read_timeout(Some(Duration::from_secs(5)))?;
        let servers: Vec<SocketAddr> = (1..=6_u8)
            .map(|at| match round % 3 {
                0 => format!("9.9.{}.{at}:53", round % 200).parse().unwrap(),
                1 => format!("[2620:fe::{:x}:{at}]:53", round % 200).parse().unwrap(),
                _ => format!("[::ffff:9.9.{}.{at}]:53", round % 200).parse().unwrap(),
            })
            .collect();
        // The last one connected; in flight at once, under one id: only the server tells them apart.
        let (connected, others) = servers.split_last().unwrap();
        for server in others {
            query(&udp, &server.to_string(), id)?;
        }
        let mut expected: std::collections::HashSet<String> =
            others.iter().map(|server| format!("{server} {tag} {}", canonical(*server))).collect();
        for _ in others {
            let said = answer(&udp, id)?;
            if !expected.remove(&said) {
                return Ok(format!("{said} was not expected"));
            }
            right += 1;
        }
        udp.connect(connected)?;
        assert_eq!(udp.peer_addr()?, *connected);
        query(&udp, "-", id)?;
        let said = answer(&udp, id)?;
        if said != format!("{connected} {tag} {}", canonical(*connected)) {
            return Ok(format!("{said} was not expected"));
        }
        right += 1;
    }
    Ok(right.to_string())
}

pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// The `at`th of the addresses that a bursting leaf connects to.
fn carried_to(at: usize) -> SocketAddr {
    let (host, port) = (at % 250 + 1, 1_000 + at % 50);
    match at % 3 {
        0 => format!("198.18.7.{host}:{port}").parse().unwrap(),
        1 => format!("[2001:db8::{host:x}]:{port}").parse().unwrap(),
        _ => format!("[::ffff:198.18.7.{host}]:{port}").parse().unwrap(),
    }
}

/// `count` connections to what is carried, each saying the leaf and the address that it meant (0: the proxy itself);
/// half of them are closed before the proxy can have accepted them.
fn burst_carried(port: u16, count: usize, tag: u64) -> std::io::Result<String> {
    for at in 0..count {
        let to = if tag == 0 || at % 5 == 4 { format!("127.0.0.1:{port}").parse().unwrap() } else { carried_to(at) };
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(10))?;
        let peer = stream.peer_addr()?;
        if peer != to {
            return Ok(format!("{peer} instead of {to}"));
        }
        let said = format!("{tag} {}", canonical(to));
        stream.write_all(&[u8::try_from(said.len()).unwrap()])?;
        stream.write_all(said.as_bytes())?;
        if at % 2 == 0 {
            stream.read_exact(&mut [0; 1])?;
        }
    }
    Ok(count.to_string())
}

/// Says what it is going to send and wants, does so, and ends it.
fn sized(stream: &mut TcpStream, tag: u64, send: usize, want: usize) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    // In one piece: the rest of many small ones would wait for an acknowledgement.
    let mut message: Vec<u8> = [tag, u64::try_from(send).unwrap(), u64::try_from(want).unwrap()]
        .into_iter()
        .flat_map(u64::to_be_bytes)
        .collect();
    message.resize(message.len() + send, 1);
    stream.write_all(&message)?;
    stream.read_exact(&mut vec![0; want])
}

/// `count` connections to the proxy at `port`, v4, v6 and mapped in turn, of which no two in a row carry the same.
fn burst_sized(port: u16, count: usize, tag: u64) -> std::io::Result<String> {
    for at in 0..count {
        let host = ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]"][at % 3];
        let to = format!("{host}:{port}").parse().unwrap();
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(20))?;
        sized(&mut stream, tag, at * 7 % 5_000, 1 + at * 13 % 9_000)?;
    }
    Ok(count.to_string())
}

/// `count` connections one after the other from one port, each reset when it is over so that the port is free again.
fn reuse_port(to: &str, port: u16, count: usize, tag: u64) -> std::io::Result<String> {
    for at in 0..count {
        let socket = socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
        let own = address_of(SocketAddr::new([127, 0, 0, 1].into(), port));
        // SAFETY: a valid address of the length that is given.
        let bound = unsafe {
            libc::bind(socket.as_raw_fd(), (&raw const own).cast(), u32::try_from(size_of_val(&own)).unwrap())
        };
        if bound < 0 {
            return Err(std::io::Error::last_os_error());
        }
        connect_raw(&socket, to.parse().unwrap())?;
        let mut stream = TcpStream::from(socket);
        sized(&mut stream, tag, at + 1, 2 * at + 1)?;
        rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
    }
    Ok(count.to_string())
}

fn fast_open(to: SocketAddr) -> std::io::Result<OwnedFd> {
    let (socket, address) = (socket(libc::AF_INET, libc::SOCK_STREAM, 0)?, address_of(to));
    // SAFETY: valid buffers of the lengths that are given.
    let result = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            b"early".as_ptr().cast(),
            5,
            libc::MSG_FASTOPEN,
            (&raw const address).cast(),
            u32::try_from(size_of_val(&address)).unwrap(),
        )
    };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(socket) }
}

/// `count` connections to the proxy at `port`, v4, v6 and mapped in turn, each saying `tag`; half of them are closed
/// before the proxy can have accepted them.
fn burst(port: u16, count: usize, tag: u64) -> std::io::Result<String> {
    for at in 0..count {
        let host = match at % 4 {
            0 | 1 => "127.0.0.1",
            2 => "[::1]",
            _ => "[::ffff:127.0.0.1]",
        };
        let mut stream =
            TcpStream::connect_timeout(&format!("{host}:{port}").parse().unwrap(), Duration::from_secs(10))?;
        stream.write_all(&tag.to_be_bytes())?;
        if at % 2 == 0 {
            stream.read_exact(&mut [0; 1])?;
        }
    }
    Ok(count.to_string())
}

/// One exchange with the counting server: says how much it will send and wants, and ends in the way that `mode` names.
fn transfer(to: &str, mode: &str, send: usize, want: usize) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to.parse().unwrap(), Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let header = match mode {
        "server-first" => [1],
        "client-alone" => [2],
        _ => [0],
    };
    stream.write_all(&header)?;
    stream.write_all(&u64::try_from(send).unwrap().to_be_bytes())?;
    stream.write_all(&u64::try_from(want).unwrap().to_be_bytes())?;
    stream.write_all(&vec![1; send])?;
    let mut back = vec![0; want];
    match mode {
        "half-close" => {
            stream.shutdown(std::net::Shutdown::Write)?;
            stream.read_exact(&mut back)?;
            assert_eq!(stream.read(&mut [0; 1])?, 0);
        }
        "server-first" => {
            stream.read_exact(&mut back)?;
            assert_eq!(stream.read(&mut [0; 1])?, 0);
        }
        "client-first" | "client-alone" => stream.read_exact(&mut back)?,
        "reset" => {
            stream.read_exact(&mut back)?;
            let linger = libc::linger { l_onoff: 1, l_linger: 0 };
            // SAFETY: a valid option of the length that is given.
            unsafe {
                libc::setsockopt(
                    stream.as_raw_fd(),
                    libc::SOL_SOCKET,
                    libc::SO_LINGER,
                    (&raw const linger).cast(),
                    u32::try_from(size_of_val(&linger)).unwrap(),
                );
            }
        }
        other => panic!("{other}"),
    }
    drop(stream);
    Ok("ok".to_owned())
}
