//! What an action does to other processes, to the machine and to its own bounds.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use latchgate_tests::inside::root;
use serde_json::{Value, json};

use crate::network::{BASE, attacker};
use crate::technique::{By, Shown, Technique, walk};
use crate::world::{PORTS, Target};

/// A process outside with sockets that anybody may connect to, a file that nobody may read, and a cgroup of no leaf.
pub struct Victim {
    process: Child,
    directory: PathBuf,
    cgroup: PathBuf,
    said: Value,
    abstract_name: String,
}

impl Victim {
    pub fn start(target: &Target) -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let name = format!("lgesc-victim-{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        let directory = std::env::temp_dir().join(&name);
        fs::create_dir(&directory).unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(directory.join("secret"), "the secret").unwrap();
        fs::set_permissions(directory.join("secret"), fs::Permissions::from_mode(0o600)).unwrap();
        let cgroup = root().join(&name);
        fs::create_dir(&cgroup).unwrap();
        let mut process = Command::new("/usr/bin/python3")
            .args(["-c", include_str!("../../escape/victim.py"), &target.v4, &PORTS[0].to_string()])
            .args([directory.to_str().unwrap(), &name])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let said = serde_json::from_str(&line).unwrap();
        Self { process, directory, cgroup, said, abstract_name: name }
    }

    pub fn params(&self) -> Value {
        json!({
            "victim": self.said, "unix": self.directory.join("socket"), "rights": self.directory.join("rights"),
            "abstract": self.abstract_name, "secret": self.directory.join("secret"), "cgroup": self.cgroup,
            "cgroup_path": format!("/{}", self.abstract_name),
        })
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.directory);
        let _ = fs::remove_dir(&self.cgroup);
    }
}

pub const TABLE: &[Technique] = &[
    Technique {
        name: "a socket that has a path",
        code: attacker!("unix_path"),
        guards: &["seccomp:socket_families", "mount_namespace", "landlock"],
        // Paths of sockets are Landlock's from its ABI 9 on.
        needs: &["landlock"],
        ..BASE
    },
    Technique {
        name: "an abstract socket",
        code: attacker!("unix_abstract"),
        guards: &["seccomp:socket_families", "landlock"],
        ..BASE
    },
    Technique {
        name: "a connection that is given away",
        code: attacker!("scm_rights"),
        guards: &["seccomp:socket_families", "mount_namespace", "landlock"],
        needs: &["landlock"],
        ..BASE
    },
    Technique {
        name: "a connection that is taken",
        code: attacker!("pidfd_getfd"),
        said: "ESRCH",
        by: By::Namespace,
        guards: &["seccomp:processes", "pid_namespace", "user_namespace", "capabilities", "landlock"],
        ..BASE
    },
    Technique {
        name: "ptrace",
        code: attacker!("ptrace"),
        shown: Shown::ByItself,
        guards: &["seccomp:processes", "pid_namespace", "user_namespace", "capabilities", "landlock"],
        ..BASE
    },
    Technique {
        name: "a signal",
        code: attacker!("signal"),
        said: "ESRCH",
        by: By::Namespace,
        shown: Shown::ByItself,
        guards: &["pid_namespace", "user_namespace", "landlock"],
        ..BASE
    },
    Technique {
        name: "a file of the gate's user",
        code: attacker!("secret"),
        said: "ENOENT",
        by: By::Namespace,
        shown: Shown::ByItself,
        guards: &["mount_namespace", "user_namespace"],
        ..BASE
    },
    Technique {
        name: "another cgroup",
        code: attacker!("cgroup_move"),
        said: "ENOENT",
        by: By::Namespace,
        guards: &["mount_namespace", "user_namespace", "landlock"],
        ..BASE
    },
    Technique {
        name: "another cgroup, by a mount of its own",
        code: attacker!("cgroup_remount"),
        guards: &["seccomp:mounts", "user_namespace", "capabilities", "landlock"],
        ..BASE
    },
    Technique {
        name: "a symbolic link out of the scratch directory",
        code: attacker!("symlink"),
        said: "ENOENT",
        by: By::Namespace,
        shown: Shown::ByItself,
        guards: &["mount_namespace", "user_namespace"],
        ..BASE
    },
    Technique {
        name: "a hard link out of the scratch directory",
        code: attacker!("hard_link"),
        said: "ENOENT",
        by: By::Namespace,
        shown: Shown::ByItself,
        guards: &["mount_namespace", "user_namespace"],
        ..BASE
    },
    Technique {
        name: "bpf",
        code: attacker!("bpf"),
        shown: Shown::ByItself,
        guards: &["seccomp:programs", "user_namespace", "capabilities"],
        ..BASE
    },
    Technique {
        name: "mount",
        code: attacker!("mount"),
        shown: Shown::ByItself,
        guards: &["seccomp:mounts", "capabilities", "landlock"],
        ..BASE
    },
    Technique {
        name: "a namespace of its own",
        code: attacker!("unshare"),
        shown: Shown::ByItself,
        guards: &["seccomp:namespaces"],
        ..BASE
    },
    Technique {
        name: "a file's handle",
        code: attacker!("handle"),
        shown: Shown::ByItself,
        guards: &["seccomp:handles"],
        ..BASE
    },
    Technique { name: "keyrings", code: attacker!("key"), shown: Shown::ByItself, guards: &["seccomp:keys"], ..BASE },
    Technique {
        name: "the machine's tables",
        code: attacker!("descriptor_table"),
        shown: Shown::ByItself,
        guards: &["seccomp:machine"],
        ..BASE
    },
    Technique {
        name: "input of a terminal",
        code: attacker!("terminal_input"),
        shown: Shown::ByItself,
        guards: &["seccomp:terminal"],
        ..BASE
    },
    Technique {
        name: "a fork bomb",
        code: attacker!("fork_bomb"),
        said: "EAGAIN",
        by: By::Kernel,
        shown: Shown::ByItself,
        guards: &["resource_limits"],
        ..BASE
    },
    Technique {
        name: "filling the scratch directory",
        code: attacker!("scratch"),
        said: "ENOSPC",
        by: By::Kernel,
        shown: Shown::ByItself,
        guards: &["scratch_limit"],
        ..BASE
    },
    Technique {
        name: "a core dump",
        code: attacker!("core_dump"),
        said: "EFBIG",
        by: By::Kernel,
        shown: Shown::ByItself,
        guards: &["resource_limits"],
        ..BASE
    },
    Technique {
        name: "the first process",
        code: attacker!("first_process"),
        said: "EACCES",
        by: By::Kernel,
        shown: Shown::ByItself,
        guards: &["hide"],
        ..BASE
    },
    Technique {
        name: "setuid programs",
        code: attacker!("privileges"),
        by: By::Kernel,
        shown: Shown::ByItself,
        guards: &["no_new_privs", "seccomp", "landlock"],
        // The kernel takes neither from a process that has no capability and could still gain one; Landlock sets it too.
        needs: &["seccomp", "landlock"],
        ..BASE
    },
];

#[test]
fn nothing_outside_is_touched() {
    let target = Target::start();
    let victim = Victim::start(&target);
    walk(&target, TABLE, &victim.params());
}
