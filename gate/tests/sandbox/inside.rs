//! What a program finds: itself, the root it was given, and nothing that it could use.

use super::*;

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
    let (a, b) = (run_in(&first, shell("sleep 3; true")), run_in(&second, shell("sleep 3; true")));
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
        let mut job = shell("");
        (job.program, job.stdin) = (Program::HttpWorker, b"not a job".to_vec());
        let done = runner.run(&leaf, job, pending()).await.unwrap();
        assert_eq!(done.module_digest, digest);
        assert!(matches!(done.exit, Exit::Code(_)) && !text(&done.stdout).contains("swapped"), "{done:?}");
        leaf.remove().unwrap();
        std::fs::write(&executable, kept).unwrap();
    }
}

#[tokio::test]
async fn host_programs_run() {
    let done = run(command(&["/usr/bin/curl", "-sS", "--max-time", "5", "https://127.0.0.1:1/"])).await;
    assert_eq!(done.exit, Exit::Code(7), "could not connect: {}", text(&done.stderr));
    if Path::new("/usr/bin/python3").exists() {
        let script = "import ssl, json, multiprocessing, socket, threading; t = threading.Thread(target=print, args=('thread',)); t.start(); t.join(); multiprocessing.Lock()";
        assert_eq!(output(command(&["/usr/bin/python3", "-c", script])).await, "thread\n");
    } else {
        assert!(std::env::var_os("CI").is_none(), "skipped in CI: no /usr/bin/python3");
        eprintln!("SKIPPED: no /usr/bin/python3");
    }
}
