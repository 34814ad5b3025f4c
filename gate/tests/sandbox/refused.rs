//! The system calls that are refused, asked of the kernel, and those that must not be.

use super::*;

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
