//! Every bound, reached.

use super::*;

#[tokio::test]
async fn time_is_limited() {
    let mut job = shell("trap '' TERM; (trap '' TERM; setsid sleep 1000) & echo begun; sleep 1000");
    job.limits.timeout = Duration::from_secs(2);
    let done = run(job).await;
    assert_eq!((done.exit, done.stdout.as_slice()), (Exit::TimedOut, &b"begun\n"[..]));
    assert!(done.duration >= Duration::from_secs(2) && done.duration < Duration::from_secs(8), "{:?}", done.duration);
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
async fn uids_run_out_and_come_back() {
    let one = make_runner(1);
    let (a, b) = (tree().leaf().unwrap(), tree().leaf().unwrap());
    let (first, second) =
        tokio::join!(one.run(&a, shell("sleep 0.3"), pending()), one.run(&b, shell("true"), pending()));
    assert_eq!(first.unwrap().exit, Exit::Code(0));
    assert!(matches!(second, Err(SandboxError::NoUid)));
    assert_eq!(one.run(&b, shell("true"), pending()).await.unwrap().exit, Exit::Code(0));
}
