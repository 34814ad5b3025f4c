//! Starting and ending: whatever ends first, nothing is left.

use super::*;

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
async fn the_caller_can_end_it() {
    let leaf = tree().leaf().unwrap();
    let cancel = tokio::time::sleep(Duration::from_secs(2));
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
    // And its uid, the only one, is free again, though the leaf was taken away meanwhile.
    let leaf = tree().leaf().unwrap();
    loop {
        match one.run(&leaf, shell("true"), pending()).await {
            Err(SandboxError::NoUid) => assert!(ended.elapsed() < Duration::from_secs(5)),
            again => break assert_eq!(again.unwrap().exit, Exit::Code(0)),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_at_once_do_not_hold_each_other() {
    let one = |number: u32| async move {
        for _ in 0..3 {
            let mut job = shell(&format!("cat; echo {number}; [ {number} = 7 ] && sleep 100; true"));
            job.stdin = vec![b'x'; 100_000];
            job.limits.timeout = Duration::from_secs(if number == 7 { 1 } else { 60 });
            let done = run(job).await;
            let whole = 100_001 + number.to_string().len();
            if number == 7 {
                // How far it comes in its second is the machine's business.
                assert_eq!(done.exit, Exit::TimedOut);
                assert!(done.stdout.len() <= whole);
            } else {
                assert_eq!((done.exit, done.stdout.len()), (Exit::Code(0), whole));
            }
        }
    };
    let all: Vec<_> = (0..24).map(|number| tokio::spawn(one(number))).collect();
    for task in all {
        task.await.unwrap();
    }
}

/// What a pod can give (BPF, NET_ADMIN, SETUID, SETGID) is enough: nothing leans on CAP_SYS_ADMIN or CAP_KILL.
#[test]
fn four_capabilities_are_enough() {
    let done = std::process::Command::new("setpriv")
        .args(["--bounding-set", "-all,+bpf,+net_admin,+setuid,+setgid", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "lifetime::input_output_and_exit_code_travel", "inside::nothing_is_held_that_could_be_used"])
        .args([
            "lifetime::the_caller_can_end_it",
            "limits::time_is_limited",
            "lifetime::the_sandbox_dies_with_the_gate",
            "inside::host_programs_run",
        ])
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
        .args(["--exact", "lifetime::helper_gate", "--ignored", "--nocapture"])
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
            .args(["--exact", "lifetime::helper_busy_gate", "--ignored", "--nocapture"])
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
        .args(["--exact", "lifetime::input_output_and_exit_code_travel", "lifetime::the_sandbox_dies_with_the_gate"])
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
