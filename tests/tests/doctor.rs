//! `latchgate doctor`: what it says of this machine, with privileges and without, and what it leaves behind.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

use latchgate_tests::gate::{PREFIX, binary};
use latchgate_tests::{inside, skip};
use serde_json::Value;

fn checks(output: &Output) -> Vec<Value> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let read = |line: &str| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    let checks: Vec<Value> = text.lines().map(read).collect();
    assert!(!checks.is_empty(), "{output:?}");
    checks
}

fn check<'a>(checks: &'a [Value], name: &str) -> &'a Value {
    checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("no check {name}: {checks:?}"))
}

fn doctor(arguments: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.arg("doctor").args(arguments);
    command
}

#[test]
fn a_machine_that_gates_run_on_has_no_fault() {
    if !rustix::process::geteuid().is_root() {
        return skip("a gate needs root");
    }
    let directory = std::env::temp_dir().join(format!("{PREFIX}doctor-{}", std::process::id()));
    fs::create_dir(&directory).unwrap();
    let config = directory.join("latchgate.toml");
    let dir = directory.display();
    let text = format!("state_dir = \"{dir}/state\"\n[operators]\nsocket = \"{dir}/operator/operator.sock\"\n");
    fs::write(&config, text).unwrap();
    let output = doctor(&["--config", config.to_str().unwrap()]).output().unwrap();
    let all = checks(&output);
    assert_eq!(output.status.code(), Some(0), "{all:#?}");
    assert!(all.iter().all(|check| check["state"] != "fault"));
    for name in ["kernel", "cgroup tree", "CAP_BPF", "CAP_NET_ADMIN", "CAP_SETUID", "CAP_SETGID", "seccomp", "disk"] {
        assert_eq!(check(&all, name)["state"], "ok", "{all:#?}");
    }
    let attach = check(&all, "attach");
    assert!(attach["found"].as_str().unwrap().ends_with(" ms"), "{attach}");
    // Nothing of it stays.
    let left = inside::directories(Path::new("/sys/fs/bpf/latchgate"));
    assert!(!left.iter().any(|path| path.to_string_lossy().contains("/doctor-")), "{left:?}");
    let left = inside::directories(&inside::root());
    assert!(!left.iter().any(|path| path.to_string_lossy().contains("latchgate-doctor-")), "{left:?}");

    // A directory that others may write to is a fault, with what to type.
    fs::create_dir(directory.join("operator")).unwrap();
    fs::set_permissions(directory.join("operator"), fs::Permissions::from_mode(0o777)).unwrap();
    let output = doctor(&["--no-attach", "--config", config.to_str().unwrap()]).output().unwrap();
    let all = checks(&output);
    let socket = check(&all, "socket operators");
    assert_eq!((output.status.code(), &socket["state"]), (Some(1), &Value::from("fault")), "{socket}");
    assert_eq!(socket["todo"], format!("chmod 0755 {dir}/operator"));
    assert!(!all.iter().any(|check| check["name"] == "attach"));
    fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn without_privileges_it_says_what_is_missing_and_does_not_die() {
    if !rustix::process::geteuid().is_root() {
        return skip("becoming nobody needs root");
    }
    // Where nobody may read the tests' own directories, the binary is copied to where anybody can.
    let copy = std::env::temp_dir().join(format!("{PREFIX}doctor-binary-{}", std::process::id()));
    fs::copy(binary(), &copy).unwrap();
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
    let output = Command::new(&copy).arg("doctor").uid(65_534).gid(65_534).env_clear().output().unwrap();
    fs::remove_file(&copy).unwrap();
    let all = checks(&output);
    assert_eq!(output.status.code(), Some(1), "{all:#?}");
    for name in ["CAP_BPF", "CAP_NET_ADMIN", "CAP_SETUID", "CAP_SETGID"] {
        let missing = check(&all, name);
        assert_eq!((&missing["state"], &missing["found"]), (&Value::from("fault"), &Value::from("not held")));
        assert!(missing["todo"].as_str().unwrap().contains("start the gate with it"), "{missing}");
    }
    assert_eq!(check(&all, "attach")["state"], "unknown");
    assert!(String::from_utf8_lossy(&output.stderr).contains("faults"), "{output:?}");
}
