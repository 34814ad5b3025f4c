//! The terminal, as whoever sits before it knows one.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use latchgate_tests::session::Session;

use super::gate;

#[test]
fn a_shell_talks_sizes_and_ends_with_its_code() {
    let (gate, work) = gate("shell", "");
    let mut session = Session::start(&gate, "none", &work, &["/bin/sh", "-i"]);
    session.say("echo a$((40 + 2))b; stty size; tty; pwd\r");
    session.see("a42b");
    session.see("24 80");
    session.see("/dev/pts/");
    session.see(work.to_str().unwrap());
    session.resize(50, 132);
    // What is typed may come before the size does.
    session.say("until stty size | grep '50 132'; do sleep 0.1; done; echo res'i'zed\r");
    session.see("\n50 132");
    session.see("resized");
    session.say("echo written > here; exec 3>/dev/tty; echo to-the-terminal >&3; echo both > /dev/stderr\r");
    session.see("\nto-the-terminal");
    session.see("\nboth");
    session.say("exit 7\r");
    assert_eq!(session.end().code(), Some(7));
    assert_eq!(fs::read_to_string(work.join("here")).unwrap(), "written\n");
}

#[test]
fn ctrl_c_ends_what_is_in_the_foreground_and_not_the_shell() {
    let (gate, work) = gate("signals", "");
    fs::write(work.join("stays"), "#!/bin/sh\necho lingering $1\nsleep 100\n").unwrap();
    fs::set_permissions(work.join("stays"), fs::Permissions::from_mode(0o755)).unwrap();
    let mut session = Session::start(&gate, "none", &work, &["/bin/bash", "--norc", "-i"]);
    session.see("$ ");
    session.say("./stays\r");
    session.see("lingering");
    session.say("\x03");
    session.see("^C");
    session.say("echo wa's' $?\r");
    session.see("was 130");
    // Job control.
    session.say("./stays again\r");
    session.see("lingering again");
    session.say("\x1a");
    session.see("Stopped");
    session.say("fg; echo ba'ck' $?\r");
    std::thread::sleep(std::time::Duration::from_secs(1));
    session.say("\x03");
    session.say("echo ag'ain' $?\r");
    session.see("again 130");
    session.say("exit 3\r");
    assert_eq!(session.end().code(), Some(3));
    // A signal to the client goes to what is in the foreground.
    let mut session = Session::start(
        &gate,
        "none",
        &work,
        &["/bin/sh", "-c", "trap 'echo ter''minated; exit 9' TERM; echo r''eady; while :; do sleep 0.1; done"],
    );
    session.see("ready");
    session.signal(rustix::process::Signal::TERM);
    session.see("terminated");
    assert_eq!(session.end().code(), Some(9));
}

#[test]
fn without_a_terminal_bytes_pass_and_input_ends() {
    use std::io::Write;
    use std::process::{Command, Stdio};
    let (gate, work) = gate("pipes", "");
    let mut client = Command::new(latchgate_tests::gate::binary())
        .args(latchgate_tests::session::arguments(&gate, "none"))
        .args(["--quiet", "--", "/bin/sh", "-c", "cat; echo end; kill -9 $$"])
        .current_dir(&work)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    client.stdin.take().unwrap().write_all(b"one\ntwo\n").unwrap();
    let output = client.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "one\ntwo\nend\n", "{output:?}");
    assert_eq!(output.status.code(), Some(128 + 9), "{output:?}");
}

#[test]
fn a_paused_terminal_loses_nothing_and_ends_nothing() {
    use rustix::process::Signal;
    const LINES: usize = 200_000;
    let (gate, work) = gate("paused", "[limits]\nwrite_timeout_seconds = 1\n");
    let flood = format!("echo r''eady; seq -f 'line %.0f' 1 {LINES}; echo d''one; exit 4");
    let mut session = Session::start(&gate, "none", &work, &["/bin/sh", "-c", &flood]);
    session.see("ready");
    session.signal(Signal::STOP);
    // Several times what an agent is waited for.
    std::thread::sleep(std::time::Duration::from_secs(5));
    assert!(!session.shown().contains("done"), "the client was paused in the middle");
    session.signal(Signal::CONT);
    session.see("done");
    assert_eq!(session.end().code(), Some(4));
    let shown = session.shown();
    let seen: Vec<usize> = shown.lines().filter_map(|line| line.trim().strip_prefix("line ")?.parse().ok()).collect();
    assert!(seen.iter().copied().eq(1..=LINES), "{} lines", seen.len());

    // Killed while its client is paused in the middle of what it wrote: the last word still comes as one.
    let mut session =
        Session::start(&gate, "none", &work, &["/bin/sh", "-c", "echo r''eady; while :; do echo and more of it; done"]);
    session.see("ready");
    session.signal(Signal::STOP);
    std::thread::sleep(std::time::Duration::from_secs(2));
    let running = latchgate_tests::operator::lines(&gate, &["executions", "list", "--json"]);
    let id = running[0]["id"].as_str().unwrap().to_owned();
    let killing = std::thread::spawn({
        let signal = rustix::process::Pid::from_raw(i32::try_from(session.client.id()).unwrap()).unwrap();
        move || {
            std::thread::sleep(std::time::Duration::from_millis(500));
            rustix::process::kill_process(signal, Signal::CONT).unwrap();
        }
    });
    let (code, _, error) = latchgate_tests::operator::operate(&gate, &["executions", "kill", &id]);
    assert_eq!(code, 0, "{error}");
    killing.join().unwrap();
    assert_eq!(session.end().code(), Some(255));
    let shown = session.shown();
    assert!(shown.contains("killed by tester"), "{}", &shown[shown.len().saturating_sub(300)..]);
}
