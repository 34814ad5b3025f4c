use super::*;

#[test]
fn the_helper_hands_over_the_cgroup_of_this_process_and_no_path_shows_it() {
    let directory = own_cgroup().unwrap();
    let text = std::fs::read_to_string("/proc/self/cgroup").unwrap();
    let own = text.lines().find_map(|line| line.strip_prefix("0::/")).unwrap();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mounted = mounts.lines().find(|line| line.contains(" - cgroup2 ")).and_then(|line| line.split(' ').nth(4));
    if let Some(found) = mounted.and_then(|mount| std::fs::metadata(std::path::Path::new(mount).join(own)).ok()) {
        assert_eq!(std::os::unix::fs::MetadataExt::ino(&found), directory.inode().unwrap());
    }
    assert!(directory.read("cgroup.controllers").is_ok());
    // What it is shown as leads to the same, while it is held.
    assert_eq!(Directory::open(directory.shown()).unwrap().inode().unwrap(), directory.inode().unwrap());
    assert_eq!(std::fs::read_to_string("/proc/self/mountinfo").unwrap(), mounts);
}

#[test]
fn a_failure_has_its_step_and_silence_is_one() {
    let pair = || socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    for (number, step) in (1..).zip(STEPS) {
        let (ours, theirs) = pair();
        let [a, b, c, d] = libc::EPERM.to_le_bytes();
        send(theirs.as_fd(), [number, a, b, c, d], None).unwrap();
        let failed = receive(&ours).unwrap_err();
        assert_eq!((failed.step, failed.source.raw_os_error()), (step, Some(libc::EPERM)));
    }
    // Gone without a word, a good word without a descriptor, and a step that there is not.
    let (ours, theirs) = pair();
    drop(theirs);
    assert!(receive(&ours).is_err());
    for (message, given) in [([0; MESSAGE_BYTES], false), ([99, 0, 0, 0, 0], true)] {
        let (ours, theirs) = pair();
        send(theirs.as_fd(), message, given.then_some(theirs.as_fd())).unwrap();
        assert!(receive(&ours).is_err(), "{message:?}");
    }
}
