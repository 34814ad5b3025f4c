use super::*;

const HYBRID: &str = "\
23 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 23 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
40 30 0:30 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";
const PURE: &str = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";

#[test]
fn finds_the_hierarchy_pure_hybrid_and_seen_from_a_container() {
    let cases = [
        (HYBRID, "4:memory:/elsewhere\n0::/\n", Some("/sys/fs/cgroup/unified")),
        (HYBRID, "0::/system.slice/a.service\n", Some("/sys/fs/cgroup/unified/system.slice/a.service")),
        (PURE, "0::/\n", Some("/sys/fs/cgroup")),
        (PURE, "0::/user.slice\n", Some("/sys/fs/cgroup/user.slice")),
        ("9 8 0:26 /kubepods/p1 /sys/fs/cgroup ro - cgroup2 cgroup rw\n", "0::/kubepods/p1\n", Some("/sys/fs/cgroup")),
        ("9 8 0:26 /other /mnt ro - cgroup2 cgroup rw\n", "0::/kubepods/p1\n", None),
        ("9 8 0:26 / /a\\040b rw - cgroup2 cgroup rw\n", "0::/x\n", Some("/a b/x")),
        ("9 8 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n", "0::/\n", None),
        (PURE, "3:pids:/only/v1\n", None),
    ];
    for (mountinfo, cgroup, expected) in cases {
        assert_eq!(locate(mountinfo, cgroup), expected.map(PathBuf::from).into_iter().collect::<Vec<_>>(), "{cgroup}");
    }
}

#[test]
fn every_mount_is_a_candidate_since_one_may_hide_another() {
    let both = format!("{HYBRID}{PURE}");
    let expected = ["/sys/fs/cgroup/unified/a", "/sys/fs/cgroup/a"].map(PathBuf::from);
    assert_eq!(locate(&both, "0::/a\n"), expected);
}

#[test]
fn a_restarted_gate_does_not_nest_in_its_own_cgroup() {
    assert_eq!(locate(PURE, "0::/a/latchgate/default/gate\n"), [PathBuf::from("/sys/fs/cgroup/a")]);
    assert_eq!(locate(PURE, "0::/latchgate/default/gate\n"), [PathBuf::from("/sys/fs/cgroup")]);
    assert_eq!(locate(PURE, "0::/a/gate\n"), [PathBuf::from("/sys/fs/cgroup/a/gate")]);
}

#[test]
fn only_a_clear_no_means_empty() {
    assert!(!populated("populated 0\nfrozen 0\n"));
    for text in ["populated 1\nfrozen 0\n", "", "frozen 0\n", "populated 01\n"] {
        assert!(populated(text), "{text:?}");
    }
}

#[test]
fn refuses_names_that_would_leave_the_tree() {
    for name in ["", ".", "..", "a/b", "../x", ".hidden", "a b", &"x".repeat(65)] {
        assert!(matches!(CgroupTree::open(None, name), Err(CgroupError::Instance(_))), "{name:?}");
    }
}

#[test]
fn refuses_a_root_that_is_no_cgroup() {
    assert!(matches!(CgroupTree::open(Some(Path::new("/tmp")), "t"), Err(CgroupError::NotCgroup(_))));
}
