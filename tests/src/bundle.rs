//! A pod without a registry, a daemon or a node: runc bundles in a pure cgroup v2 view, a PID namespace each, one network.
//!
//! The root of each container is made of parts of this machine, read-only. A gate's directory is at the same path inside, so
//! that what writes its configuration and calls its sockets need not know where it runs.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::{Value, json};

use crate::gate::{PREFIX, Setup, binary};
use crate::inside::wait;

/// All that the gate has in a container.
pub const CAPABILITIES: [&str; 4] = ["CAP_BPF", "CAP_NET_ADMIN", "CAP_SETGID", "CAP_SETUID"];

/// The gate's seccomp profile, as it is shipped.
pub fn seccomp() -> Value {
    let profile = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/seccomp/latchgate.json");
    serde_json::from_slice(&fs::read(profile).unwrap()).unwrap()
}

/// The profile without one of the system calls that it has beside the runtime's own, or without them all.
pub fn seccomp_without(name: Option<&str>) -> Value {
    let mut profile = seccomp();
    let calls = profile["syscalls"].as_array_mut().unwrap();
    calls.retain(|call| match name {
        Some(name) => call["names"] != json!([name]),
        None => call.get("comment").is_none(),
    });
    if name.is_none_or(|name| name == "clone3") {
        // As runtimes have it: C libraries then make their threads with clone.
        calls.push(json!({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}));
    }
    profile
}

/// The calls that the profile has beside the runtime's own.
pub fn extra_calls() -> Vec<String> {
    let profile = seccomp();
    let extra = profile["syscalls"].as_array().unwrap().iter().filter(|call| call.get("comment").is_some());
    extra.map(|call| call["names"][0].as_str().unwrap().to_owned()).collect()
}

/// Why there can be no pod here; says so.
pub fn missing() -> bool {
    if Command::new("runc").arg("--version").output().is_err() {
        crate::skip("runc is not installed");
        return true;
    }
    let view = in_pure_view(&["true".to_owned()]);
    let made = Command::new(&view[0]).args(&view[1..]).output().unwrap();
    if !made.status.success() {
        crate::skip(&format!("no pure cgroup v2 view: {}", String::from_utf8_lossy(&made.stderr)));
    }
    !made.status.success()
}

/// The command in a mount namespace in which `/sys/fs/cgroup` is the v2 hierarchy and nothing else.
fn in_pure_view(command: &[String]) -> Vec<String> {
    let script = "mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec \"$@\"";
    let shell = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"];
    shell.iter().map(|&word| word.to_owned()).chain(command.iter().cloned()).collect()
}

/// What one container is given.
#[derive(Clone, Debug)]
pub struct Container {
    pub capabilities: Vec<String>,
    pub seccomp: Option<Value>,
    pub uid: u32,
    /// Paths of this machine that are at the same place inside; whether they can be written to.
    pub binds: Vec<(PathBuf, bool)>,
    /// `/sys/fs/cgroup`, as every runtime mounts it.
    pub cgroup_mount: bool,
    pub no_new_privileges: bool,
}

impl Container {
    /// The gate's, with what it is documented to need and nothing more.
    pub fn gate(directory: &Path) -> Self {
        Self {
            capabilities: CAPABILITIES.map(str::to_owned).to_vec(),
            seccomp: Some(seccomp()),
            uid: 0,
            binds: vec![(directory.to_owned(), true), (binary(), false)],
            cgroup_mount: true,
            no_new_privileges: true,
        }
    }

    /// An agent's: no capability, an ordinary uid, and the directory of one socket that it cannot write to.
    pub fn agent(sockets: &Path) -> Self {
        Self {
            capabilities: Vec::new(),
            seccomp: Some(seccomp_without(None)),
            uid: 1000,
            binds: vec![(sockets.to_owned(), false)],
            cgroup_mount: true,
            no_new_privileges: true,
        }
    }

    #[must_use]
    pub fn without_capability(mut self, name: &str) -> Self {
        self.capabilities.retain(|capability| capability != name);
        self
    }

    #[must_use]
    pub fn with_seccomp(mut self, profile: Option<Value>) -> Self {
        self.seccomp = profile;
        self
    }

    #[must_use]
    pub fn showing(mut self, path: &Path) -> Self {
        self.binds.push((path.to_owned(), false));
        self
    }
}

/// The network that the containers share, and their bundles.
pub struct Pod {
    directory: PathBuf,
    name: String,
    network: Child,
}

impl Pod {
    /// The name must be nobody else's: directories and cgroups have it.
    pub fn new(name: &str) -> Self {
        let name = format!("{PREFIX}{name}-{}", std::process::id());
        let directory = std::env::temp_dir().join(format!("{name}-pod"));
        fs::create_dir(&directory).unwrap();
        let network = Command::new("unshare")
            .args(["--net", "--kill-child", "sh", "-c", "ip link set lo up && exec sleep infinity"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let pod = Self { directory, name, network };
        let own = fs::read_link("/proc/self/ns/net").unwrap();
        wait("the pod's network", Duration::from_secs(10), || {
            let there = fs::read_link(pod.network_path()).ok()? != own;
            (there && pod.inside(|| std::net::TcpListener::bind("127.0.0.1:0").is_ok())).then_some(())
        });
        pod
    }

    fn network_path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/net", self.network.id()))
    }

    /// Runs `work` on a thread in the pod's network.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let network = fs::File::open(self.network_path()).unwrap();
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                use std::os::fd::AsFd;
                move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
                work()
            });
            thread.join().unwrap()
        })
    }

    fn bundle(&self, id: &str) -> PathBuf {
        self.directory.join(id)
    }

    /// The cgroup of a container, as this test sees it.
    pub fn cgroup(&self, id: &str) -> PathBuf {
        crate::inside::root().join(self.unique(id))
    }

    fn unique(&self, id: &str) -> String {
        format!("{}-{id}", self.name)
    }

    /// Makes a bundle that runs `arguments`, and the command that runs it in the foreground.
    pub fn prepare(&self, id: &str, container: &Container, arguments: &[String]) -> Vec<String> {
        let bundle = self.bundle(id);
        let root = bundle.join("rootfs");
        for directory in ["usr", "etc", "proc", "sys", "dev", "tmp", "run"] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        for link in ["bin", "sbin", "lib", "lib64"] {
            let _ = std::os::unix::fs::symlink(format!("usr/{link}"), root.join(link));
        }
        fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).unwrap();
        let config = self.specification(id, container, arguments);
        fs::write(bundle.join("config.json"), config.to_string()).unwrap();
        let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
        let mut runc = words(&["runc", "--root"]);
        runc.extend([self.directory.join("state").display().to_string(), "run".to_owned()]);
        runc.extend(["--pid-file".to_owned(), self.pid_file(id).display().to_string()]);
        runc.extend(["--bundle".to_owned(), bundle.display().to_string(), self.unique(id)]);
        in_pure_view(&runc)
    }

    fn pid_file(&self, id: &str) -> PathBuf {
        self.bundle(id).join("pid")
    }

    /// The first process of a running container, as this machine numbers it.
    pub fn pid(&self, id: &str) -> u32 {
        fs::read_to_string(self.pid_file(id)).unwrap().trim().parse().unwrap()
    }

    fn specification(&self, id: &str, container: &Container, arguments: &[String]) -> Value {
        let sets: Vec<_> = ["bounding", "effective", "permitted"].to_vec();
        let capabilities: serde_json::Map<String, Value> =
            sets.into_iter().map(|set| (set.to_owned(), json!(container.capabilities))).collect();
        let bind = |path: &Path, writable: bool| {
            let options = if writable { json!(["rbind", "rw", "nosuid", "nodev"]) } else { json!(["rbind", "ro"]) };
            json!({"destination": path, "type": "bind", "source": path, "options": options})
        };
        let tmpfs = |path: &str| json!({"destination": path, "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev"]});
        let mut mounts = vec![
            json!({"destination": "/proc", "type": "proc", "source": "proc"}),
            json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]}),
            json!({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]}),
            bind(Path::new("/usr"), false),
            bind(Path::new("/etc"), false),
            tmpfs("/tmp"),
            tmpfs("/run"),
        ];
        if container.cgroup_mount {
            mounts.push(json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}));
        }
        mounts.extend(container.binds.iter().map(|(path, writable)| bind(path, *writable)));
        let mut specification = json!({
            "ociVersion": "1.0.2",
            "process": {
                "terminal": false,
                "user": {"uid": container.uid, "gid": container.uid},
                "args": arguments,
                "env": ["PATH=/usr/bin:/usr/sbin", "NO_COLOR=1", "LATCHGATE_LOG=info"],
                "cwd": "/",
                "capabilities": capabilities,
                "noNewPrivileges": container.no_new_privileges,
            },
            "root": {"path": "rootfs", "readonly": true},
            "hostname": id,
            "mounts": mounts,
            "linux": {
                "namespaces": [
                    {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"},
                    {"type": "network", "path": self.network_path()},
                ],
                "cgroupsPath": format!("/{}", self.unique(id)),
                // As containerd has them: because of these a fresh /proc is refused inside.
                "maskedPaths": ["/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                    "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware"],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            },
        });
        if let Some(profile) = &container.seccomp {
            specification["linux"]["seccomp"] = profile.clone();
        }
        specification
    }

    /// Runs a program in a container of its own, to its end.
    pub fn run(&self, id: &str, container: &Container, arguments: &[&str]) -> Output {
        let arguments: Vec<String> = arguments.iter().map(|&argument| argument.to_owned()).collect();
        let command = self.prepare(id, container, &arguments);
        Command::new(&command[0]).args(&command[1..]).stdin(Stdio::null()).output().unwrap()
    }

    /// The setup whose gate runs in this container, called `id`.
    pub fn contain(&self, setup: Setup, id: &str, container: &Container) -> Setup {
        let command = self.prepare(id, container, &serve(&setup));
        setup.launched_by(command)
    }

    /// The same, with a shell as the container's first process that starts the gate again whenever it ends.
    pub fn contain_restarting(&self, setup: Setup, id: &str, container: &Container) -> Setup {
        let shell = ["sh", "-c", "trap 'exit 0' TERM; while :; do \"$@\" & wait $!; done", "sh"].map(str::to_owned);
        let command = self.prepare(id, container, &[&shell, serve(&setup).as_slice()].concat());
        setup.launched_by(command)
    }
}

fn serve(setup: &Setup) -> Vec<String> {
    let (binary, file) = (binary().display().to_string(), setup.config_file().display().to_string());
    vec![binary, "serve".to_owned(), "--config".to_owned(), file]
}

impl Drop for Pod {
    fn drop(&mut self) {
        // runc's own is removed with its container; what a killed one left is removed here.
        for entry in fs::read_dir(self.directory.join("state")).into_iter().flatten().flatten() {
            let id = entry.file_name().to_string_lossy().into_owned();
            let state = self.directory.join("state").display().to_string();
            let runc = ["runc", "--root", &state, "delete", "--force", &id].map(str::to_owned);
            let delete = in_pure_view(&runc);
            let _ = Command::new(&delete[0]).args(&delete[1..]).output();
        }
        let _ = self.network.kill();
        let _ = self.network.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}
