//! A cgroup tree, a bpffs and a proxy address of the test's own. What a killed run left is swept at the next start.

use std::fs;
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6, TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use latchgate::egress::LeafId;
use latchgate::egress::kernel::{
    Enforcer, KernelConfig, KernelEvent, KernelProfile, ProxyAddresses, ResolverAddresses,
};
use tokio::sync::broadcast;

const PREFIX: &str = "latchgate-test-kernel-";
pub const LONG: Duration = Duration::from_secs(60);

fn root() -> PathBuf {
    ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
        .into_iter()
        .map(PathBuf::from)
        .find(|path| path.join("cgroup.procs").exists() && path.join("cgroup.controllers").exists())
        .expect("a cgroup v2 tree")
}

/// Gates that can be there at one time: each locks a directory that this process is in or below.
const GATES: usize = 8;
static FREE_GATES: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// `gate`, in whose innermost child this process is, and beside it an `actions` for each test.
pub fn base() -> &'static Path {
    static BASE: OnceLock<PathBuf> = OnceLock::new();
    BASE.get_or_init(|| {
        sweep(|pid| !Path::new(&format!("/proc/{pid}")).exists());
        let base = root().join(format!("{PREFIX}{}", std::process::id()));
        let mut gate = base.join("gate");
        let mut free = FREE_GATES.lock().unwrap();
        for _ in 0..GATES {
            fs::create_dir_all(&gate).unwrap();
            free.push(gate.clone());
            gate.push("gate");
        }
        let innermost = free.last().unwrap().join("cgroup.procs");
        fs::create_dir_all(base.join("outside")).unwrap();
        fs::create_dir_all(bpffs_of(std::process::id())).unwrap();
        fs::write(innermost, std::process::id().to_string()).unwrap();
        // SAFETY: registers a plain function.
        unsafe { libc::atexit(at_exit) };
        base
    })
}

extern "C" fn at_exit() {
    let _ = fs::write(root().join("cgroup.procs"), std::process::id().to_string());
    let own = std::process::id();
    sweep(|pid| pid == own);
}

fn bpffs_of(pid: u32) -> PathBuf {
    std::env::temp_dir().join(format!("{PREFIX}{pid}"))
}

fn sweep(of: impl Fn(u32) -> bool) {
    let named = |directory: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        let wanted = entries.filter(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            name.strip_prefix(PREFIX).and_then(|pid| pid.parse().ok()).is_some_and(&of)
        });
        wanted.map(|entry| entry.path()).collect()
    };
    for tree in named(&root()) {
        let _ = fs::write(tree.join("cgroup.kill"), "1");
        for _ in 0..100 {
            remove_tree(&tree);
            if !tree.exists() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    for directory in named(&std::env::temp_dir()) {
        let _ = rustix::mount::unmount(&directory, rustix::mount::UnmountFlags::DETACH);
        let _ = fs::remove_dir(&directory);
    }
}

fn remove_tree(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_tree(&entry.path());
        }
    }
    let _ = fs::remove_dir(directory);
}

/// Where the gate's proxy would listen.
pub struct Proxy {
    pub v4: TcpListener,
    pub v6: TcpListener,
    pub port: u16,
}

impl Proxy {
    pub fn bind() -> Self {
        base();
        for _ in 0..50 {
            let v4 = TcpListener::bind("127.0.0.1:0").unwrap();
            let port = v4.local_addr().unwrap().port();
            if let Ok(v6) = TcpListener::bind(format!("[::1]:{port}")) {
                return Self { v4, v6, port };
            }
        }
        panic!("no port that is free in both families");
    }

    pub fn addresses(&self) -> ProxyAddresses {
        let SocketAddr::V6(v6) = self.v6.local_addr().unwrap() else { panic!() };
        ProxyAddresses {
            v4: SocketAddrV4::new([127, 0, 0, 1].into(), self.port),
            v6: Some(SocketAddrV6::new(*v6.ip(), v6.port(), 0, 0)),
        }
    }
}

/// Where the gate's resolver would listen: eight ports in a row, the same in both families.
pub struct Resolver {
    pub v4: Vec<UdpSocket>,
    pub v6: Vec<UdpSocket>,
    pub base: u16,
}

impl Resolver {
    pub fn bind() -> Self {
        for _ in 0..100 {
            let Ok(probe) = UdpSocket::bind("127.0.0.1:0") else { continue };
            let base = probe.local_addr().unwrap().port();
            drop(probe);
            if let Some(bound) = Self::bind_at(base) {
                return bound;
            }
        }
        panic!("no eight ports in a row that are free in both families");
    }

    pub fn bind_at(base: u16) -> Option<Self> {
        let all = |host: &str| -> Option<Vec<UdpSocket>> {
            let ports = base..base.checked_add(ResolverAddresses::SLOTS)?;
            let bind = |port| {
                let socket = UdpSocket::bind(format!("{host}:{port}")).ok()?;
                // The usual buffer holds fewer queries than a leaf may have under way.
                rustix::net::sockopt::set_socket_recv_buffer_size(&socket, 1 << 20).ok()?;
                Some(socket)
            };
            ports.map(bind).collect()
        };
        Some(Self { v4: all("127.0.0.1")?, v6: all("[::1]")?, base })
    }

    pub fn addresses(&self) -> ResolverAddresses {
        ResolverAddresses {
            v4_base: SocketAddrV4::new([127, 0, 0, 1].into(), self.base),
            v6_base: Some(SocketAddrV6::new([0, 0, 0, 0, 0, 0, 0, 1].into(), self.base, 0, 0)),
            slots: ResolverAddresses::SLOTS,
        }
    }

    pub fn sockets(&self) -> impl Iterator<Item = &UdpSocket> {
        self.v4.iter().chain(&self.v6)
    }
}

/// The kernel's name for the network namespace of a socket.
pub fn netns_cookie(socket: &UdpSocket) -> u64 {
    const SO_NETNS_COOKIE: i32 = 71;
    let (mut cookie, mut length) = (0_u64, 8);
    // SAFETY: a buffer of the length that is given.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    assert_eq!(result, 0);
    cookie
}

/// One test's `actions`, with the program attached.
pub struct Tree {
    pub name: String,
    pub actions: PathBuf,
    pub gate: PathBuf,
    pub proxy: Proxy,
    pub resolver: Option<Resolver>,
    pub enforcer: Option<Enforcer>,
    pub events: Option<broadcast::Receiver<KernelEvent>>,
}

impl Tree {
    pub fn empty(name: &str) -> Self {
        let actions = base().join(format!("actions-{name}"));
        fs::create_dir(&actions).unwrap();
        let gate = loop {
            match FREE_GATES.lock().unwrap().pop() {
                Some(gate) => break gate,
                None => std::thread::sleep(Duration::from_millis(50)),
            }
        };
        Self {
            name: name.to_owned(),
            actions,
            gate,
            proxy: Proxy::bind(),
            resolver: None,
            enforcer: None,
            events: None,
        }
    }

    pub fn attached(name: &str) -> Self {
        Self::empty(name).attach()
    }

    /// With a resolver.
    pub fn resolving(name: &str) -> Self {
        let mut tree = Self::empty(name);
        tree.resolver = Some(Resolver::bind());
        tree.attach()
    }

    fn attach(self) -> Self {
        let mut tree = self;
        let enforcer = Enforcer::start(tree.config()).unwrap();
        tree.events = Some(enforcer.events());
        tree.enforcer = Some(enforcer);
        tree
    }

    pub fn config(&self) -> KernelConfig {
        KernelConfig {
            instance: self.name.clone(),
            actions: self.actions.clone(),
            gate: self.gate.clone(),
            bpffs: bpffs_of(std::process::id()),
            proxy: self.proxy.addresses(),
            resolver: self.resolver.as_ref().map(Resolver::addresses),
        }
    }

    pub fn enforcer(&self) -> &Enforcer {
        self.enforcer.as_ref().unwrap()
    }

    pub fn pins(&self) -> PathBuf {
        self.config().bpffs.join("latchgate").join(&self.name)
    }

    /// A leaf without an entry.
    pub fn leaf(&self, name: &str) -> Leaf {
        let path = self.actions.join(name);
        fs::create_dir(&path).unwrap();
        let id = LeafId(fs::metadata(&path).unwrap().ino());
        Leaf { path, id }
    }

    pub fn admitted(&self, name: &str, profile: KernelProfile) -> Leaf {
        let leaf = self.leaf(name);
        self.enforcer().admit(leaf.id, profile, LONG).unwrap();
        leaf
    }

    /// Waits for the event of a refusal.
    pub fn event(&mut self, leaf: LeafId, hook: &str, reason: &str) -> KernelEvent {
        let until = Instant::now() + Duration::from_secs(3);
        let mut seen = Vec::new();
        while Instant::now() < until {
            match self.events.as_mut().unwrap().try_recv() {
                Ok(event) if event.leaf == leaf && event.hook == hook && event.reason == reason => return event,
                Ok(event) => seen.push(event),
                Err(broadcast::error::TryRecvError::Empty) => std::thread::sleep(Duration::from_millis(5)),
                Err(error) => panic!("{error}"),
            }
        }
        panic!("no event {hook} {reason} of {leaf:?}; seen: {seen:#?}");
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        if let Some(enforcer) = self.enforcer.take() {
            let _ = enforcer.detach();
        }
        FREE_GATES.lock().unwrap().push(self.gate.clone());
        let _ = fs::write(self.actions.join("cgroup.kill"), "1");
        for _ in 0..100 {
            remove_tree(&self.actions);
            if !self.actions.exists() {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

pub struct Leaf {
    pub path: PathBuf,
    pub id: LeafId,
}
