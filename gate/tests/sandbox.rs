//! Real executions in real leaves: what is inside, what is refused, and that everything ends.
//!
//! Needs root (or the capabilities that the gate has), a v2 hierarchy, `/bin/sh` and `/usr/bin/perl`.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used)]

use std::future::pending;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use latchgate::sandbox::{
    CgroupTree, Completed, Exit, Job, Leaf, Limits, Program, Root, Runner, RunnerConfig, SandboxError, SealedFile,
};

const UID_BASE: u32 = 2_000_000;
const UIDS: u32 = 64;

fn tree() -> &'static CgroupTree {
    static TREE: OnceLock<CgroupTree> = OnceLock::new();
    TREE.get_or_init(|| {
        let tree = CgroupTree::open(None, &format!("test-{}", std::process::id())).unwrap();
        // What earlier runs of this suite left.
        for old in std::fs::read_dir(tree.gate().ancestors().nth(2).unwrap()).unwrap().flatten() {
            let name = old.file_name().into_string().unwrap();
            let pid = name.rsplit_once('-').map_or("self", |(_, pid)| pid);
            if name.starts_with("test-") && !Path::new("/proc").join(pid).exists() {
                for part in ["actions", "gate", ""] {
                    let _ = std::fs::remove_dir(old.path().join(part));
                }
            }
        }
        tree
    })
}

fn runner() -> Runner {
    static RUNNER: OnceLock<Runner> = OnceLock::new();
    RUNNER.get_or_init(|| make_runner(UIDS)).clone()
}

fn make_runner(uid_count: u32) -> Runner {
    Runner::new(RunnerConfig {
        uid_base: UID_BASE,
        uid_count,
        executable: env!("CARGO_BIN_EXE_latchgate").into(),
        protected: vec!["/var/lib/latchgate".into(), "/run/latchgate".into()],
    })
    .unwrap()
}

const LIMITS: Limits = Limits {
    memory_bytes: 256 << 20,
    timeout: Duration::from_secs(20),
    stdout_bytes: 1 << 20,
    stderr_bytes: 64 << 10,
    processes: 32,
    scratch_bytes: 4 << 20,
};

fn command(argv: &[&str]) -> Job {
    Job {
        program: Program::Command {
            argv: argv.iter().map(|&text| text.to_owned()).collect(),
            env: Vec::new(),
            files: Vec::new(),
            root: Root::Host,
        },
        stdin: Vec::new(),
        limits: LIMITS,
    }
}

fn shell(script: &str) -> Job {
    command(&["/bin/sh", "-c", script])
}

fn perl(script: &str) -> Job {
    command(&["/usr/bin/perl", "-e", script])
}

async fn run_in(leaf: &Leaf, job: Job) -> Completed {
    runner().run(leaf, job, pending()).await.unwrap()
}

async fn run(job: Job) -> Completed {
    let leaf = tree().leaf().unwrap();
    let done = run_in(&leaf, job).await;
    assert_eq!(std::fs::read_to_string(leaf.path().join("cgroup.procs")).unwrap(), "", "something is left");
    leaf.remove().unwrap();
    done
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

async fn output(job: Job) -> String {
    let done = run(job).await;
    assert_eq!(done.exit, Exit::Code(0), "{}{}", text(&done.stdout), text(&done.stderr));
    text(&done.stdout)
}

#[tokio::test]
async fn input_output_and_exit_code_travel() {
    let mut job = shell("cat; echo oops >&2; exit 7");
    job.stdin = b"hello".to_vec();
    let done = run(job).await;
    assert_eq!(
        (done.exit, done.stdout.as_slice(), done.stderr.as_slice()),
        (Exit::Code(7), &b"hello"[..], &b"oops\n"[..])
    );
    assert!(!done.stderr_truncated && done.module_digest.starts_with("sha256:"));
    assert_eq!(run(shell("kill -TERM $$")).await.exit, Exit::Signal(15));
    // More than a pipe holds, to a program that does not read it.
    let mut job = shell("exit 0");
    job.stdin = vec![b'x'; 1 << 20];
    assert_eq!(run(job).await.exit, Exit::Code(0));
}

#[tokio::test]
async fn nothing_is_held_that_could_be_used() {
    let status = output(shell("cat /proc/self/status")).await;
    for line in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert!(status.contains(&format!("{line}:\t0000000000000000")), "{line} in {status}");
    }
    assert!(output(shell("ulimit -Hc")).await.trim().parse::<u32>().is_ok_and(|blocks| blocks <= 1));
    if let Ok(expected) = std::env::var("LATCHGATE_TEST_EXPECT_CAPS") {
        let own = std::fs::read_to_string("/proc/self/status").unwrap();
        assert!(own.contains(&format!("CapEff:\t{expected}")), "{own}");
    }
    assert!(status.contains("NoNewPrivs:\t1"), "{status}");
    assert!(status.contains("Seccomp:\t2"), "{status}");
    assert!(status.contains("Uid:\t65534\t65534\t65534\t65534"), "{status}");
    assert!(status.contains("Gid:\t65534\t65534\t65534\t65534"), "{status}");
    assert!(status.contains("Groups:\t \n") || status.contains("Groups:\t\n"), "{status}");
    let pids = output(shell("echo $$; ls /proc | grep -c '^[0-9]'")).await;
    assert_eq!(pids.lines().next(), Some("2"));
    // Its own end of `ls` is the fourth; the first is of the pipeline.
    assert_eq!(output(perl("print join ',', sort grep { -e \"/proc/self/fd/$_\" } 0..1023")).await, "0,1,2");
    assert_eq!(output(shell("kill -9 1; kill -9 -1; echo still")).await.lines().last().unwrap_or(""), "still");
}

#[tokio::test]
async fn the_uid_is_its_own_and_no_other_execution_s() {
    let (first, second) = (tree().leaf().unwrap(), tree().leaf().unwrap());
    let uid_of = |leaf: &Leaf| {
        let procs = leaf.path().join("cgroup.procs");
        let deadline = Instant::now() + Duration::from_secs(5);
        async move {
            loop {
                let pids = std::fs::read_to_string(&procs).unwrap();
                let found: Vec<u32> = pids
                    .lines()
                    .filter_map(|pid| std::fs::read_to_string(format!("/proc/{pid}/status")).ok())
                    .filter_map(|status| {
                        let line = status.lines().find(|line| line.starts_with("Uid:"))?.to_owned();
                        line.split('\t').nth(1)?.parse().ok()
                    })
                    .collect();
                if found.len() >= 2 || Instant::now() > deadline {
                    return found;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
    };
    let (a, b) = (run_in(&first, shell("sleep 0.5; true")), run_in(&second, shell("sleep 0.5; true")));
    let watch = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        (uid_of(&first).await, uid_of(&second).await)
    };
    let (a, b, (one, other)) = tokio::join!(a, b, watch);
    assert_eq!((a.exit, b.exit), (Exit::Code(0), Exit::Code(0)));
    for uids in [&one, &other] {
        assert!(
            uids.len() >= 2 && uids.iter().all(|uid| (UID_BASE..UID_BASE + UIDS).contains(uid) && *uid == uids[0]),
            "{uids:?}"
        );
    }
    assert_ne!(one[0], other[0]);
}

#[tokio::test]
async fn neither_the_gate_nor_the_host_is_visible() {
    let secret = tempfile::tempdir_in("/var/tmp").unwrap();
    std::fs::write(secret.path().join("key"), "secret").unwrap();
    let listing = output(shell("ls -A /; echo; ls -A /etc /dev")).await;
    for absent in ["home", "root", "run", "sys", "work", "mnt", "srv", "boot", "shadow", "kmsg", "pts", "mem"] {
        assert!(!listing.lines().any(|name| name == absent), "{absent} in {listing}");
    }
    let probe = format!(
        "for p in {} /root /run /sys /proc/1/root /proc/1/fd /proc/1/environ /old_root /sys/fs/cgroup; do \
           {{ ls $p/ || cat $p; }} >/dev/null 2>&1 && echo SEEN $p; done; true",
        secret.path().display()
    );
    assert_eq!(output(shell(&probe)).await, "");
    // Nothing outside /tmp can be written, and what is bound cannot be changed.
    let writes = "for d in / /usr /etc /usr/bin /proc/sys/kernel /dev /.sealed; do \
                    (echo x > $d/x) 2>/dev/null && echo WROTE $d; done; \
                  (echo 1 > /proc/sys/kernel/core_pattern) 2>/dev/null && echo CORE; \
                  chmod 777 /dev/null 2>/dev/null && echo CHMOD; \
                  echo kept > /tmp/a && cat /tmp/a && pwd && echo $HOME && echo quiet > /dev/null; umask";
    assert_eq!(output(shell(writes)).await, "kept\n/tmp\n/tmp\n0022\n");
    // The next execution finds none of it.
    assert_eq!(output(shell("ls -A /tmp /dev/shm/.")).await, "/dev/shm/.:\n\n/tmp:\n.shm\n");
    assert_eq!(output(shell("hostname 2>/dev/null || cat /proc/sys/kernel/hostname")).await, "sandbox\n");
}

/// Each call with the errno that it must have: `(name, perl expression)`.
#[cfg(target_arch = "x86_64")]
#[tokio::test]
async fn refused_system_calls_say_so() {
    const EPERM: i32 = 1;
    const ENOSYS: i32 = 38;
    let mut calls: Vec<(String, String, i32)> = Vec::new();
    let mut add = |name: &str, arguments: &str, errno| calls.push((name.to_owned(), arguments.to_owned(), errno));
    for (name, family, kind, protocol) in [
        ("unix stream", 1, 1, 0),
        ("unix datagram", 1, 2, 0),
        ("netlink route", 16, 3, 0),
        ("packet", 17, 3, 0x0300),
        ("vsock", 40, 1, 0),
        ("alg", 38, 5, 0),
        ("bluetooth", 31, 3, 1),
        ("xdp", 44, 3, 0),
        ("smc", 43, 1, 0),
        ("raw icmp", 2, 3, 1),
        ("ping", 2, 2, 1),
        ("udp-lite", 2, 2, 136),
        ("mptcp", 2, 1, 262),
        ("smc over inet", 2, 1, 256),
        ("sctp", 2, 1, 132),
        ("raw v6", 10, 3, 58),
        ("packet by inet type", 2, 10, 0),
    ] {
        add(name, &format!("41, {family}, {kind}, {protocol}"), EPERM);
    }
    add("socketpair unix datagram", "53, 1, 2, 0, $buffer", EPERM);
    add("socketpair tipc", "53, 30, 1, 0, $buffer", EPERM);
    for (name, number) in [
        ("io_uring_setup", 425),
        ("io_uring_enter", 426),
        ("io_uring_register", 427),
        ("ptrace", 101),
        ("process_vm_readv", 310),
        ("process_vm_writev", 311),
        ("bpf", 321),
        ("mount", 165),
        ("umount2", 166),
        ("open_tree", 428),
        ("move_mount", 429),
        ("fsopen", 430),
        ("fsconfig", 431),
        ("fsmount", 432),
        ("fspick", 433),
        ("mount_setattr", 442),
        ("open_tree_attr", 467),
        ("pivot_root", 155),
        ("chroot", 161),
        ("unshare", 272),
        ("setns", 308),
        ("pidfd_getfd", 438),
        ("add_key", 248),
        ("request_key", 249),
        ("keyctl", 250),
        ("userfaultfd", 323),
        ("perf_event_open", 298),
        ("kexec_load", 246),
        ("kexec_file_load", 320),
        ("init_module", 175),
        ("finit_module", 313),
        ("delete_module", 176),
        ("open_by_handle_at", 304),
        ("name_to_handle_at", 303),
        ("swapon", 167),
        ("swapoff", 168),
        ("reboot", 169),
        ("acct", 163),
        ("quotactl", 179),
        ("syslog", 103),
        ("iopl", 172),
        ("ioperm", 173),
        ("modify_ldt", 154),
        ("settimeofday", 164),
        ("fanotify_init", 300),
        ("kcmp", 312),
    ] {
        add(name, &format!("{number}, 0, 0, 0, 0, 0"), EPERM);
    }
    for (name, flag) in
        [("ns", 0x20000), ("cgroup", 0x0200_0000), ("uts", 0x0400_0000), ("ipc", 0x0800_0000), ("user", 0x1000_0000)]
    {
        add(&format!("clone new {name}"), &format!("56, {}, 0, 0, 0, 0", flag | 17), EPERM);
    }
    add("clone new pid", &format!("56, {}, 0, 0, 0, 0", 0x2000_0000 | 17), EPERM);
    add("clone new net", &format!("56, {}, 0, 0, 0, 0", 0x4000_0000 | 17), EPERM);
    add("ioctl TIOCSTI", "16, 0, 0x5412, $buffer", EPERM);
    add("ioctl TIOCLINUX", "16, 0, 0x541c, $buffer", EPERM);
    add("clone3", "435, $buffer, 88", ENOSYS);
    add("later than the list", "470, 0", ENOSYS);
    add("x32 getpid", "0x40000000 + 39", ENOSYS);
    add("x32 execve", "0x40000000 + 520, 0, 0, 0", ENOSYS);

    let mut script = String::from("my $buffer = \"\\0\" x 256;\n");
    for (name, arguments, _) in &calls {
        script.push_str(&format!("$! = 0; $r = syscall({arguments}); printf \"%s|%d|%d\\n\", '{name}', $r, $!;\n"));
    }
    let printed = output(perl(&script)).await;
    let got: Vec<&str> = printed.lines().collect();
    let expected: Vec<String> = calls.iter().map(|(name, _, errno)| format!("{name}|-1|{errno}")).collect();
    assert_eq!(got, expected);
}

#[tokio::test]
async fn ordinary_sockets_pairs_threads_and_children_work() {
    let script = "use Socket; \
        for my $f (AF_INET, 10) { socket(my $t, $f, SOCK_STREAM, 6) or die \"tcp $!\"; socket(my $u, $f, SOCK_DGRAM, 0) or die \"udp $!\"; } \
        socketpair(my $a, my $b, AF_UNIX, SOCK_STREAM, 0) or die \"pair $!\"; \
        my $pid = fork // die; if (!$pid) { close $a; print $b \"from the child\\n\"; exit 0 } \
        close $b; print scalar <$a>; waitpid $pid, 0; print `echo grandchild`;";
    assert_eq!(output(perl(script)).await, "from the child\ngrandchild\n");
}

/// A stream pair cannot be connected again, and a name in the abstract namespace of the network is out of reach.
#[tokio::test]
async fn an_abstract_socket_outside_is_out_of_reach() {
    use std::os::linux::net::SocketAddrExt;
    let name = format!("latchgate-test-{}", std::process::id());
    let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
    let outside = std::os::unix::net::UnixDatagram::bind_addr(&address).unwrap();
    outside.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let script = format!(
        "use Socket; my $n = pack('S a*', 1, \"\\0{name}\"); \
         for my $k (SOCK_STREAM, 5) {{ socketpair(my $a, my $b, AF_UNIX, $k, 0) or die; \
         print connect($a, $n) ? 'CONNECTED' : 'no'; print defined(send($a, 'x', 0, $n)) ? '' : ' no'; print \"\\n\" }}"
    );
    let printed = output(perl(&script)).await;
    assert!(!printed.contains("CONNECTED") && printed.lines().count() == 2, "{printed}");
    assert!(outside.recv(&mut [0; 8]).is_err());
}

/// `int 0x80` runs calls by the 32-bit numbers, which no filter of 64-bit ones describes.
#[cfg(target_arch = "x86_64")]
#[tokio::test]
async fn the_32_bit_interface_kills() {
    // mov eax, 20 (getpid); int 0x80; mov edi, 0; mov eax, 231 (exit_group); syscall
    let by_32 = tiny_elf(&[0xb8, 20, 0, 0, 0, 0xcd, 0x80, 0xbf, 0, 0, 0, 0, 0xb8, 231, 0, 0, 0, 0x0f, 0x05]);
    let by_64 = tiny_elf(&[0xb8, 39, 0, 0, 0, 0x0f, 0x05, 0xbf, 0, 0, 0, 0, 0xb8, 231, 0, 0, 0, 0x0f, 0x05]);
    let directory = tempfile::tempdir().unwrap();
    for (name, code, expected) in [("a32", by_32, Exit::Signal(31)), ("a64", by_64, Exit::Code(0))] {
        let done = run(sealed_job(directory.path(), name, &code, Root::Empty)).await;
        assert!(done.exit == expected || (name == "a32" && done.exit == Exit::Signal(11)), "{name}: {:?}", done.exit);
    }
}

/// A static executable of one segment that runs `code`.
fn tiny_elf(code: &[u8]) -> Vec<u8> {
    let (base, headers) = (0x40_0000_u64, 120_u64);
    let size = headers + code.len() as u64;
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    elf.extend([2_u16, 62].iter().flat_map(|half| half.to_le_bytes()));
    elf.extend(1_u32.to_le_bytes());
    elf.extend([base + headers, 64, 0].iter().flat_map(|word| word.to_le_bytes()));
    elf.extend(0_u32.to_le_bytes());
    elf.extend([64_u16, 56, 1, 0, 0, 0].iter().flat_map(|half| half.to_le_bytes()));
    elf.extend([1_u32, 5].iter().flat_map(|word| word.to_le_bytes()));
    elf.extend([0, base, base, size, size, 4096].iter().flat_map(|word| word.to_le_bytes()));
    elf.extend(code);
    elf
}

fn sealed_job(directory: &Path, name: &str, contents: &[u8], root: Root) -> Job {
    let path = directory.join(name);
    std::fs::write(&path, contents).unwrap();
    let sha256 = latchgate::hash::sha256_tagged(contents);
    Job {
        program: Program::Command {
            argv: vec![path.to_str().unwrap().to_owned()],
            env: vec![("ONLY".into(), "this".into())],
            files: vec![SealedFile { path, sha256 }],
            root,
        },
        stdin: Vec::new(),
        limits: LIMITS,
    }
}

#[tokio::test]
async fn a_sealed_copy_runs_at_its_path_and_cannot_be_written() {
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let script = b"#!/bin/sh\necho first; env | sort | head -3; \
        (echo x >> $0) 2>/dev/null && echo WROTE; rm -f $0 2>/dev/null && echo REMOVED; \
        chmod 777 $0 2>/dev/null && echo CHMOD; cat $0 | head -c 9; true\n";
    let job = sealed_job(directory.path(), "tool", script, Root::Host);
    // What is on disk at the time of the run does not matter any more, once it was read.
    let expected = "first\nHOME=/tmp\nLANG=C.UTF-8\nONLY=this\n#!/bin/sh";
    assert_eq!(output(job.clone()).await, expected);
    std::fs::write(directory.path().join("tool"), "#!/bin/sh\necho swapped\n").unwrap();
    assert_eq!(output(job.clone()).await, expected);
    // A gate that never read the right contents refuses the swapped file.
    let leaf = tree().leaf().unwrap();
    let refused = make_runner(2).run(&leaf, job, pending()).await;
    assert!(matches!(refused, Err(SandboxError::SealedDigest { .. })), "{refused:?}");
}

/// The interpreter too is the copy: over a path of the host, through a link.
#[tokio::test]
async fn a_sealed_interpreter_covers_the_host_s() {
    let perl_path = PathBuf::from("/bin/perl");
    let contents = std::fs::read(&perl_path).unwrap();
    let mut job = perl("open my $m, '<', '/proc/self/mountinfo'; print grep { m{ /usr/bin/perl } } <$m>; print $^X");
    if let Program::Command { files, .. } = &mut job.program {
        files.push(SealedFile { path: perl_path, sha256: latchgate::hash::sha256_tagged(&contents) });
    }
    let digest = run(job.clone()).await.module_digest;
    let printed = output(job).await;
    assert!(printed.contains("/.sealed/0 /usr/bin/perl ro"), "{printed}");
    let list = format!("[{{\"path\":\"/bin/perl\",\"sha256\":\"{}\"}}]", latchgate::hash::sha256_tagged(&contents));
    assert_eq!(digest, latchgate::hash::sha256_tagged(list.as_bytes()));
}

#[tokio::test]
async fn a_directory_can_be_the_root() {
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    std::fs::create_dir_all(directory.path().join("data/sub")).unwrap();
    std::fs::create_dir(directory.path().join("tmp")).unwrap();
    std::fs::write(directory.path().join("data/file"), "content").unwrap();
    std::fs::write(directory.path().join("tmp/hidden"), "not taken").unwrap();
    std::fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    // open("/data/file"), read 7 into rsp, write them; then try to create "/data/x": the exit code is -errno & 0xff.
    let busy = tiny_elf(&[
        0x48, 0x83, 0xec, 0x40, // sub rsp, 64
        0x48, 0xb8, b'/', b'd', b'a', b't', b'a', b'/', b'f', b'i', // mov rax, "/data/fi"
        0x48, 0x89, 0x04, 0x24, // mov [rsp], rax
        0x48, 0xc7, 0x44, 0x24, 0x08, b'l', b'e', 0, 0, // mov qword [rsp+8], "le"
        0x48, 0x89, 0xe7, 0x31, 0xf6, 0xb8, 2, 0, 0, 0, 0x0f, 0x05, // open(rsp, O_RDONLY)
        0x89, 0xc7, 0x48, 0x89, 0xe6, 0xba, 7, 0, 0, 0, 0x31, 0xc0, 0x0f, 0x05, // read(fd, rsp, 7)
        0xbf, 1, 0, 0, 0, 0x48, 0x89, 0xe6, 0xba, 7, 0, 0, 0, 0xb8, 1, 0, 0, 0, 0x0f, 0x05, // write(1, rsp, 7)
        0x48, 0xb8, b'/', b'd', b'a', b't', b'a', b'/', b'x', 0, // mov rax, "/data/x"
        0x48, 0x89, 0x04, 0x24, 0x48, 0x89, 0xe7, // mov [rsp], rax; mov rdi, rsp
        0xbe, 0x41, 0, 0, 0, 0xba, 0xa4, 1, 0, 0, 0xb8, 2, 0, 0, 0, 0x0f,
        0x05, // open(rsp, O_CREAT|O_WRONLY, 0644)
        0xf7, 0xd8, 0x89, 0xc7, 0xb8, 231, 0, 0, 0, 0x0f, 0x05, // exit_group(-eax)
    ]);
    let elsewhere = tempfile::tempdir().unwrap();
    let done = run(sealed_job(elsewhere.path(), "tool", &busy, Root::Directory(directory.path().into()))).await;
    assert_eq!((done.stdout.as_slice(), done.exit), (&b"content"[..], Exit::Code(30)), "EROFS");
}

#[tokio::test]
async fn a_program_that_is_not_there_is_an_error_and_not_an_exit_code() {
    for argv in ["/usr/bin/no-such-program", "no-such-program", "/etc/passwd", "relative/path"] {
        let leaf = tree().leaf().unwrap();
        let refused = runner().run(&leaf, command(&[argv]), pending()).await;
        assert!(matches!(refused, Err(SandboxError::Exec { .. })), "{argv}: {refused:?}");
        leaf.remove().unwrap();
    }
    assert_eq!(output(command(&["sh", "-c", "echo by name"])).await, "by name\n");
}

#[tokio::test]
async fn daemons_die_with_the_program() {
    let leaf = tree().leaf().unwrap();
    let script = "use POSIX; for my $deep (0..3) { next if fork; POSIX::setsid(); exit if fork; POSIX::setsid(); \
                  $SIG{$_} = 'IGNORE' for qw(TERM HUP INT); close STDOUT if $deep == 2; sleep 1000; exit } sleep 1; print 'done'";
    let started = Instant::now();
    let done = run_in(&leaf, perl(script)).await;
    assert_eq!((done.exit, done.stdout.as_slice()), (Exit::Code(0), &b"done"[..]));
    assert!(started.elapsed() < Duration::from_secs(10));
    assert_eq!(std::fs::read_to_string(leaf.path().join("cgroup.procs")).unwrap(), "");
    leaf.remove().unwrap();
}

#[tokio::test]
async fn time_is_limited() {
    let mut job = shell("trap '' TERM; (trap '' TERM; setsid sleep 1000) & echo begun; sleep 1000");
    job.limits.timeout = Duration::from_millis(400);
    let done = run(job).await;
    assert_eq!((done.exit, done.stdout.as_slice()), (Exit::TimedOut, &b"begun\n"[..]));
    assert!(
        done.duration >= Duration::from_millis(400) && done.duration < Duration::from_secs(5),
        "{:?}",
        done.duration
    );
    // Stopped, not ended.
    let mut job = shell("kill -STOP $$");
    job.limits.timeout = Duration::from_millis(300);
    assert_eq!(run(job).await.exit, Exit::TimedOut);
}

#[tokio::test]
async fn output_is_limited() {
    let mut job = shell("yes");
    job.limits.stdout_bytes = 1000;
    let done = run(job).await;
    assert_eq!((done.exit, done.stdout.len()), (Exit::OutputTooLarge, 1000));
    let mut job = shell("head -c 1000 /dev/zero");
    job.limits.stdout_bytes = 1000;
    assert_eq!((run(job.clone()).await.exit, job.limits.stdout_bytes), (Exit::Code(0), 1000));
    let mut job = shell("head -c 3000000 /dev/zero >&2; echo out");
    job.limits.stderr_bytes = 5000;
    let done = run(job).await;
    assert_eq!((done.exit, done.stderr.len(), done.stderr_truncated), (Exit::Code(0), 5000, true));
    assert_eq!(done.stdout, b"out\n");
}

#[tokio::test]
async fn memory_is_limited() {
    let mut job = perl("my @a; push @a, 'x' x 1048576 for 1..512; print 'FREE'");
    job.limits.memory_bytes = 128 << 20;
    let done = run(job).await;
    assert!(done.exit != Exit::Code(0) && done.stdout.is_empty(), "{done:?}");
    // Memory that does not belong to a process: refused, where nothing else would count it.
    let printed = output(perl(
        "$b = \"m\\0\"; print syscall(319, $b, 0) < 0 ? 'no' : 'yes', syscall(29, 0, 4096, 01600) < 0 ? ' no' : ' yes'",
    ))
    .await;
    let controller = tree().actions().join("memory.max").exists();
    assert!(controller || printed == "no no", "{printed}");
}

#[tokio::test]
async fn processes_are_limited() {
    let mut job = perl(
        "my $n = 0; while ($n < 500) { my $p = fork; last unless defined $p; if (!$p) { sleep 100; exit } $n++ } print $n",
    );
    job.limits.processes = 8;
    // The program itself is the eighth.
    assert_eq!(output(job).await, "7");
    let mut job = shell("f() { f | f & }; f; sleep 1; echo survived");
    job.limits.processes = 16;
    job.limits.timeout = Duration::from_secs(5);
    let started = Instant::now();
    let done = run(job).await;
    assert!(started.elapsed() < Duration::from_secs(10), "{done:?}");
}

#[tokio::test]
async fn scratch_is_limited() {
    let mut job = shell(
        "head -c 3000000 /dev/zero > /tmp/a; head -c 3000000 /dev/zero > /dev/shm/b; cat /tmp/a /dev/shm/b | wc -c",
    );
    job.limits.scratch_bytes = 1 << 20;
    let written: u64 = output(job).await.trim().parse().unwrap();
    assert!(written <= 1 << 20, "{written}");
    let mut job = shell("head -c 100000 /dev/zero > /tmp/a; cat /tmp/a | wc -c");
    job.limits.scratch_bytes = 0;
    let written: u64 = output(job).await.trim().parse().unwrap();
    assert!(written <= 4096, "no scratch is not scratch without limit: {written}");
}

#[tokio::test]
async fn the_caller_can_end_it() {
    let leaf = tree().leaf().unwrap();
    let cancel = tokio::time::sleep(Duration::from_millis(200));
    let done = runner().run(&leaf, shell("echo a; sleep 1000"), cancel).await.unwrap();
    assert_eq!((done.exit, done.stdout.as_slice()), (Exit::Cancelled, &b"a\n"[..]));
    leaf.remove().unwrap();
    // A future that is dropped leaves nothing either.
    let leaf = tree().leaf().unwrap();
    let one = make_runner(1);
    let _ = tokio::time::timeout(Duration::from_millis(200), one.run(&leaf, shell("sleep 1000"), pending())).await;
    let ended = Instant::now();
    while std::fs::read_to_string(leaf.path().join("cgroup.procs")).unwrap() != "" {
        assert!(ended.elapsed() < Duration::from_secs(5));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    leaf.remove().unwrap();
    // And its uid, the only one, is free again.
    let leaf = tree().leaf().unwrap();
    let again = one.run(&leaf, shell("true"), pending()).await.unwrap();
    assert_eq!(again.exit, Exit::Code(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_at_once_do_not_hold_each_other() {
    let one = |number: u32| async move {
        for _ in 0..3 {
            let mut job = shell(&format!("cat; echo {number}; [ {number} = 7 ] && sleep 100; true"));
            job.stdin = vec![b'x'; 100_000];
            job.limits.timeout = Duration::from_secs(if number == 7 { 1 } else { 60 });
            let done = run(job).await;
            let expected = if number == 7 { Exit::TimedOut } else { Exit::Code(0) };
            assert_eq!((done.exit, done.stdout.len()), (expected, 100_001 + number.to_string().len()));
        }
    };
    let all: Vec<_> = (0..24).map(|number| tokio::spawn(one(number))).collect();
    for task in all {
        task.await.unwrap();
    }
}

/// What runs is the image that was opened at start, also when others may not read it and when it is replaced.
#[tokio::test]
async fn the_worker_is_the_image_of_the_start() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let executable = directory.path().join("latchgate");
    std::fs::copy(env!("CARGO_BIN_EXE_latchgate"), &executable).unwrap();
    let digest = latchgate::hash::sha256_tagged(&std::fs::read(&executable).unwrap());
    for mode in [0o700, 0o755] {
        std::fs::set_permissions(&executable, std::fs::Permissions::from_mode(mode)).unwrap();
        let config =
            RunnerConfig { uid_base: UID_BASE, uid_count: 1, executable: executable.clone(), protected: vec![] };
        let runner = Runner::new(config).unwrap();
        let kept = std::fs::read(&executable).unwrap();
        std::fs::remove_file(&executable).unwrap();
        std::fs::write(&executable, "#!/bin/sh\necho swapped\n").unwrap();
        let leaf = tree().leaf().unwrap();
        let job = Job { program: Program::HttpWorker, stdin: b"not a job".to_vec(), limits: LIMITS };
        let done = runner.run(&leaf, job, pending()).await.unwrap();
        assert_eq!(done.module_digest, digest);
        assert!(matches!(done.exit, Exit::Code(_)) && !text(&done.stdout).contains("swapped"), "{done:?}");
        leaf.remove().unwrap();
        std::fs::write(&executable, kept).unwrap();
    }
}

#[tokio::test]
async fn uids_run_out_and_come_back() {
    let one = make_runner(1);
    let (a, b) = (tree().leaf().unwrap(), tree().leaf().unwrap());
    let (first, second) =
        tokio::join!(one.run(&a, shell("sleep 0.3"), pending()), one.run(&b, shell("true"), pending()));
    assert_eq!(first.unwrap().exit, Exit::Code(0));
    assert!(matches!(second, Err(SandboxError::NoUid)));
    assert_eq!(one.run(&b, shell("true"), pending()).await.unwrap().exit, Exit::Code(0));
}

#[tokio::test]
async fn host_programs_run() {
    let done = run(command(&["/usr/bin/curl", "-sS", "--max-time", "5", "https://127.0.0.1:1/"])).await;
    assert_eq!(done.exit, Exit::Code(7), "could not connect: {}", text(&done.stderr));
    if Path::new("/usr/bin/python3").exists() {
        let script = "import ssl, json, multiprocessing, socket, threading; t = threading.Thread(target=print, args=('thread',)); t.start(); t.join(); multiprocessing.Lock()";
        assert_eq!(output(command(&["/usr/bin/python3", "-c", script])).await, "thread\n");
    }
}

/// What a pod can give (BPF, NET_ADMIN, SETUID, SETGID) is enough: nothing leans on CAP_SYS_ADMIN or CAP_KILL.
#[test]
fn four_capabilities_are_enough() {
    let done = std::process::Command::new("setpriv")
        .args(["--bounding-set", "-all,+bpf,+net_admin,+setuid,+setgid", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "input_output_and_exit_code_travel", "nothing_is_held_that_could_be_used"])
        .args(["the_caller_can_end_it", "time_is_limited", "the_sandbox_dies_with_the_gate", "host_programs_run"])
        .env("LATCHGATE_TEST_EXPECT_CAPS", "00000080000010c0")
        .output()
        .unwrap();
    let (printed, errors) = (text(&done.stdout), text(&done.stderr));
    assert!(done.status.success() && printed.contains("6 passed"), "{printed}{errors}");
}

/// A gate of its own process, for the test below: runs one long execution and says where.
#[tokio::test]
#[ignore = "started by the_sandbox_dies_with_the_gate"]
async fn helper_gate() {
    let tree = CgroupTree::open(None, &std::env::var("LATCHGATE_TEST_INSTANCE").unwrap()).unwrap();
    let leaf = tree.leaf().unwrap();
    println!("leaf={}", leaf.path().display());
    let job = perl("fork; fork; $SIG{TERM} = 'IGNORE'; sleep 1000");
    let _ = runner().run(&leaf, job, pending()).await;
}

#[tokio::test]
async fn the_sandbox_dies_with_the_gate() {
    use std::io::{BufRead, BufReader};
    let instance = format!("test-helper-{}", std::process::id());
    let mut helper = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "helper_gate", "--ignored", "--nocapture"])
        .env("LATCHGATE_TEST_INSTANCE", &instance)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(helper.stdout.take().unwrap()).lines();
    let leaf = lines.map_while(Result::ok).find_map(|line| Some(PathBuf::from(line.split_once("leaf=")?.1))).unwrap();
    let procs = || std::fs::read_to_string(leaf.join("cgroup.procs")).unwrap().lines().count();
    let started = Instant::now();
    while procs() < 5 {
        assert!(started.elapsed() < Duration::from_secs(10), "{} processes", procs());
        std::thread::sleep(Duration::from_millis(10));
    }
    helper.kill().unwrap();
    let killed = Instant::now();
    helper.wait().unwrap();
    while procs() > 0 {
        assert!(killed.elapsed() < Duration::from_secs(2), "still running");
        std::thread::sleep(Duration::from_millis(1));
    }
    println!("empty {:?} after SIGKILL of the gate", killed.elapsed());
    // The next gate of that instance clears the leaf away.
    assert!(leaf.exists());
    let moved_back = leaf.ancestors().nth(4).unwrap().to_owned();
    let home = tree().gate().to_owned();
    let next = CgroupTree::open(Some(&moved_back), &instance).unwrap();
    assert!(!leaf.exists());
    assert!(matches!(CgroupTree::open(Some(&moved_back), &instance), Err(latchgate::sandbox::CgroupError::InUse(_))));
    std::fs::write(home.join("cgroup.procs"), "0").unwrap();
    let own = next.actions().parent().unwrap().to_owned();
    drop(next);
    for part in ["actions", "gate", ""] {
        std::fs::remove_dir(own.join(part)).unwrap();
    }
}

/// For the test below: starts executions without end, so that a kill meets them at every stage of their making.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "started by a_gate_killed_at_any_moment_leaves_nothing"]
async fn helper_busy_gate() {
    let tree = CgroupTree::open(None, &std::env::var("LATCHGATE_TEST_INSTANCE").unwrap()).unwrap();
    println!("actions={}", tree.actions().display());
    let tree = std::sync::Arc::new(tree);
    let one = |tree: std::sync::Arc<CgroupTree>| async move {
        loop {
            let leaf = tree.leaf().unwrap();
            let _ = runner().run(&leaf, shell("(setsid sleep 1000 &) ; sleep 0.01"), pending()).await;
        }
    };
    for _ in 0..8 {
        tokio::spawn(one(std::sync::Arc::clone(&tree)));
    }
    pending::<()>().await;
}

#[test]
fn a_gate_killed_at_any_moment_leaves_nothing() {
    use std::io::{BufRead, BufReader};
    let home = tree().gate().join("cgroup.procs");
    for round in 0..12_u64 {
        let instance = format!("test-busy-{}", std::process::id());
        let mut helper = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "helper_busy_gate", "--ignored", "--nocapture"])
            .env("LATCHGATE_TEST_INSTANCE", &instance)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(helper.stdout.take().unwrap()).lines();
        let actions =
            lines.map_while(Result::ok).find_map(|line| Some(PathBuf::from(line.split_once("actions=")?.1))).unwrap();
        std::thread::sleep(Duration::from_millis(30 + 17 * round));
        helper.kill().unwrap();
        let killed = Instant::now();
        helper.wait().unwrap();
        let running = || {
            let leaves = std::fs::read_dir(&actions).unwrap().flatten();
            let procs = leaves.filter_map(|leaf| std::fs::read_to_string(leaf.path().join("cgroup.procs")).ok());
            procs.map(|procs| procs.lines().count()).sum::<usize>()
        };
        while running() > 0 {
            assert!(killed.elapsed() < Duration::from_secs(3), "round {round}: {} still running", running());
            std::thread::sleep(Duration::from_millis(1));
        }
        for leaf in std::fs::read_dir(&actions).unwrap().flatten() {
            let _ = std::fs::remove_dir(leaf.path());
        }
        for part in ["actions", "gate", ""] {
            std::fs::remove_dir(actions.parent().unwrap().join(part)).unwrap();
        }
    }
    std::fs::write(home, "0").unwrap();
}

/// The same hierarchy as a machine without v1 shows it.
#[test]
fn a_pure_hierarchy_will_do() {
    let done = std::process::Command::new("unshare")
        .args(["-m", "--", "sh", "-c", "mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec \"$@\"", "sh"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "input_output_and_exit_code_travel", "the_sandbox_dies_with_the_gate"])
        .output()
        .unwrap();
    let (printed, errors) = (text(&done.stdout), text(&done.stderr));
    assert!(done.status.success() && printed.contains("2 passed"), "{printed}{errors}");
}

#[tokio::test]
async fn what_it_costs() {
    const RUNS: u32 = 50;
    let directory = tempfile::tempdir().unwrap();
    let exit = tiny_elf(&[0xbf, 0, 0, 0, 0, 0xb8, 231, 0, 0, 0, 0x0f, 0x05]);
    let jobs = [
        ("static program, empty root", sealed_job(directory.path(), "exit", &exit, Root::Empty)),
        ("/bin/true, host root", command(&["/bin/true"])),
        ("http worker", Job { program: Program::HttpWorker, stdin: b"{}".to_vec(), limits: LIMITS }),
    ];
    for (name, job) in jobs {
        let started = Instant::now();
        for _ in 0..RUNS {
            let leaf = tree().leaf().unwrap();
            run_in(&leaf, job.clone()).await;
            leaf.remove().unwrap();
        }
        println!("{name}: {:?} an execution", started.elapsed() / RUNS);
    }
}
