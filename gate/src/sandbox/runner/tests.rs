use super::*;

fn config(uid_base: u32, uid_count: u32, protected: &[&str]) -> RunnerConfig {
    RunnerConfig {
        uid_base,
        uid_count,
        executable: "/proc/self/exe".into(),
        protected: protected.iter().map(PathBuf::from).collect(),
    }
}

#[test]
fn refuses_ranges_that_reach_root_itself_or_nobody() {
    for (base, count) in [(0, 10), (1000, 0), (u32::MAX, 2), (65_000, 1_000)] {
        assert!(matches!(Runner::new(config(base, count, &[])), Err(SandboxError::Config(_))), "{base}+{count}");
    }
}

#[test]
fn refuses_to_start_where_a_root_would_show_what_is_protected() {
    for path in ["/usr/lib/latchgate/keys", "/bin/gate.sock", "/etc/ssl/gate", "/usr"] {
        let refused = Runner::new(config(300_000, 4, &[path]));
        assert!(matches!(refused, Err(SandboxError::Exposed { .. })), "{path}");
    }
    assert!(Runner::new(config(300_000, 4, &["/var/lib/latchgate", "/run/latchgate"])).is_ok());
}

#[test]
fn a_directory_root_may_not_hold_or_be_inside_what_is_protected() {
    let directory = tempfile::tempdir().unwrap();
    let keys = directory.path().join("state/keys");
    std::fs::create_dir_all(&keys).unwrap();
    let link = directory.path().join("link");
    std::os::unix::fs::symlink(directory.path().join("state"), &link).unwrap();
    let protected = [directory.path().join("state")];
    for bound in [directory.path(), &keys, &link, &protected[0]] {
        assert!(check_exposed(bound, &protected).is_err(), "{bound:?}");
    }
    let beside = directory.path().join("beside");
    std::fs::create_dir(&beside).unwrap();
    assert!(check_exposed(&beside, &protected).is_ok());
    // One that does not exist yet is still seen through the links above it.
    assert!(check_exposed(&protected[0], &[link.join("later/gate.sock")]).is_err());
}

#[tokio::test]
async fn output_is_kept_to_the_byte() {
    for (sent, limit, drain, kept, whole) in
        [(10, 10, false, 10, true), (11, 10, false, 10, false), (40_000, 7, true, 7, false), (0, 0, false, 0, true)]
    {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let writing = std::thread::spawn(move || {
            use std::io::Write;
            let _ = std::fs::File::from(writer).write_all(&vec![b'x'; sent]);
        });
        let reader = pipe::Receiver::from_owned_fd(reader).unwrap();
        let (bytes, all) = read_to(reader, limit, drain).await;
        assert_eq!((bytes.len(), all), (kept, whole));
        writing.join().unwrap();
    }
}

#[test]
fn a_silent_end_is_a_kill() {
    assert_eq!(exit_of(&[]).unwrap(), Exit::Signal(9));
    assert_eq!(exit_of(&[Status::Exited { code: 3 }]).unwrap(), Exit::Code(3));
    assert!(matches!(exit_of(&[Status::ExecFailed { errno: 2 }]), Err(SandboxError::Exec { .. })));
}
