//! A network namespace of its own: what is in it, who answers there, and that the program waits for the gate.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::MetadataExt;

use latchgate::egress::Attribution;
use latchgate::egress::kernel::{Enforcer, KernelConfig, KernelProfile, ProxyAddresses};

use super::*;

/// Answers each connection with `greeting` and the address that it was made to.
fn greet(listener: TcpListener, greeting: &'static str) {
    listener.set_nonblocking(false).unwrap();
    std::thread::spawn(move || {
        while let Ok((mut connection, _)) = listener.accept() {
            let _ = writeln!(connection, "{greeting} {}", connection.local_addr().unwrap());
        }
    });
}

/// Sends every datagram back with the port that it came to.
fn echo(socket: UdpSocket) {
    socket.set_nonblocking(false).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let said = String::from_utf8_lossy(&buffer[..length]).into_owned();
            let _ = socket.send_to(format!("{said}@{}", socket.local_addr().unwrap()).as_bytes(), from);
        }
    });
}

fn connect(address: &str) -> String {
    format!(
        "use IO::Socket::IP; my ($h, $p) = '{address}' =~ /^\\[?(.*?)\\]?:(\\d+)$/; \
         my $s = IO::Socket::IP->new(PeerHost => $h, PeerPort => $p, Timeout => 5); print $s ? <$s> : $!+0, qq{{\\n}};"
    )
}

#[tokio::test]
async fn the_gate_s_sockets_answer_and_are_the_gate_s() {
    let mut script = String::new();
    for address in ["127.0.0.1", "::1", "::ffff:127.0.0.1"] {
        script.push_str(&format!("{{ {} }}", connect(&format!("[{address}]:{TCP_PORT}"))));
    }
    script.push_str(&format!(
        "for my $h ('127.0.0.1', '::1') {{ for my $p ({UDP_BASE}..{}) {{ \
           my $u = IO::Socket::IP->new(PeerHost => $h, PeerPort => $p, Type => SOCK_DGRAM) or die; \
           send $u, 'hello', 0; recv $u, my $got, 64, 0; print qq{{$got\\n}} }} }}",
        UDP_BASE + UDP_SLOTS - 1
    ));
    let mut cookie = 0;
    let done = run_isolated(perl(&script), |listeners| {
        let tcp: Vec<_> = listeners.tcp.iter().map(|socket| socket.local_addr().unwrap().to_string()).collect();
        assert_eq!(tcp, [format!("127.0.0.1:{TCP_PORT}"), format!("[::1]:{TCP_PORT}")]);
        assert_eq!(listeners.udp.len(), 2 * usize::from(UDP_SLOTS));
        // Non-blocking, as a runtime needs them.
        assert_eq!(listeners.tcp[0].accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        assert_eq!(listeners.udp[0].recv(&mut [0; 1]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        cookie = listeners.netns_cookie;
        listeners.tcp.into_iter().for_each(|listener| greet(listener, "gate"));
        listeners.udp.into_iter().for_each(echo);
    })
    .await;
    let mut expected = format!("gate 127.0.0.1:{TCP_PORT}\n\ngate [::1]:{TCP_PORT}\n\ngate 127.0.0.1:{TCP_PORT}\n\n");
    for host in ["127.0.0.1", "[::1]"] {
        for slot in 0..UDP_SLOTS {
            expected.push_str(&format!("hello@{host}:{}\n", UDP_BASE + slot));
        }
    }
    assert_eq!(text(&done.stdout), expected, "{}", text(&done.stderr));
    let mut other = 0;
    run_isolated(shell("true"), |listeners| other = listeners.netns_cookie).await;
    let host = TcpListener::bind("127.0.0.1:0").unwrap();
    assert!(cookie != 0 && other != 0 && cookie != other && cookie != netns_cookie(&host), "{cookie} {other}");
}

fn netns_cookie(socket: &TcpListener) -> u64 {
    use std::os::fd::AsRawFd;
    let (mut cookie, mut length) = (0_u64, 8);
    #[allow(unsafe_code)]
    // SAFETY: eight bytes are there for the eight that are asked for.
    let done = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, 71, (&raw mut cookie).cast(), &raw mut length)
    };
    assert_eq!(done, 0);
    cookie
}

/// What the host has, seen from the host's network namespace and not from one of its own.
#[tokio::test]
async fn nothing_of_the_host_s_network_is_there() {
    use std::os::linux::net::SocketAddrExt;
    let host = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = host.local_addr().unwrap().port();
    greet(host, "host");
    let name = format!("latchgate-visible-{}", std::process::id());
    let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
    let _abstract = std::os::unix::net::UnixListener::bind_addr(&address).unwrap();
    let look = format!(
        "print 'unix ', scalar(grep {{ /{name}/ }} do {{ open my $f, '<', '/proc/net/unix' or die; <$f> }}), qq{{\\n}}; \
         my $hex = sprintf ':%04X', {port}; \
         print 'tcp ', scalar(grep {{ /$hex 0+:0000 0A/ }} do {{ open my $f, '<', '/proc/net/tcp' or die; <$f> }}), qq{{\\n}}; {}",
        connect(&format!("127.0.0.1:{port}"))
    );
    let seen = output(perl(&look)).await;
    assert_eq!(seen, format!("unix 1\ntcp 1\nhost 127.0.0.1:{port}\n\n"));
    let unseen = run_isolated(perl(&look), |_| ()).await;
    assert_eq!(text(&unseen.stdout), "unix 0\ntcp 0\n111\n", "{}", text(&unseen.stderr));

    let inside = run_isolated(
        shell(
            "readlink /proc/self/ns/net; tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '; echo routes; \
             tail -n +2 /proc/net/route; echo v6; cut -d' ' -f1,3- /proc/net/if_inet6; echo unix; tail -n +2 /proc/net/unix; \
             tail -qn +2 /proc/net/packet /proc/net/raw",
        ),
        |_| (),
    )
    .await;
    let inside = text(&inside.stdout);
    let own = std::fs::read_link("/proc/self/ns/net").unwrap();
    let (namespace, rest) = inside.split_once('\n').unwrap();
    assert!(namespace.starts_with("net:[") && namespace != own.to_str().unwrap(), "{namespace}");
    let v6 = "00000000000000000000000000000001 80 10 80       lo";
    assert_eq!(rest, format!("lo\nroutes\nv6\n{v6}\nunix\n"));
    // No route leads out, and none can be made.
    let out = "for my $a ('192.0.2.1:443', '[2001:db8::1]:443', '169.254.169.254:80') { my ($h, $p) = $a =~ /^\\[?(.*?)\\]?:(\\d+)$/; \
               my $s = IO::Socket::IP->new(PeerHost => $h, PeerPort => $p, Timeout => 5); print $s ? 'OUT' : $!+0, q{ }; } \
               my $r = 'lo' . \"\\0\" x 38; socket(my $s, 2, 2, 0); for (0x8914, 0x8916, 0x890B) { print ioctl($s, $_, $r) ? 'DONE' : $!+0, q{ } }";
    let done = run_isolated(perl(&format!("use IO::Socket::IP; {out}")), |_| ()).await;
    assert_eq!(text(&done.stdout), "101 101 101 1 1 1 ", "ENETUNREACH, EPERM: {}", text(&done.stderr));
}

/// A socket that is bound more narrowly, or to the same port as well, would get what is meant for the gate.
#[tokio::test]
async fn the_gate_s_ports_cannot_be_shared() {
    let script = format!(
        "use Socket qw(:all); my %got; \
         for my $h ('127.0.0.1', '0.0.0.0', '::1', '::', '::ffff:127.0.0.1') {{ \
           for my $k ([SOCK_STREAM, {TCP_PORT}], [SOCK_DGRAM, {UDP_BASE}], [SOCK_DGRAM, {}]) {{ \
             for my $o ([], [SO_REUSEADDR], [SO_REUSEPORT], [SO_REUSEADDR, SO_REUSEPORT]) {{ \
               my $six = $h =~ /:/; socket(my $s, $six ? AF_INET6 : AF_INET, $k->[0], 0) or die; \
               setsockopt($s, SOL_SOCKET, $_, 1) or die for @$o; \
               my $at = $six ? pack_sockaddr_in6($k->[1], inet_pton(AF_INET6, $h)) : pack_sockaddr_in($k->[1], inet_aton($h)); \
               my $ok = bind($s, $at) && ($k->[0] == SOCK_DGRAM || listen($s, 1)); \
               $got{{$ok ? \"$h $k->[1] @$o\" : $!+0}}++ }} }} }} \
         print qq{{$_ $got{{$_}}\n}} for sort keys %got",
        UDP_BASE + UDP_SLOTS - 1
    );
    let mut held = None;
    let done = run_isolated(perl(&script), |listeners| held = Some(listeners)).await;
    assert_eq!(text(&done.stdout), "98 60\n", "EADDRINUSE each time: {}", text(&done.stderr));
    assert!(held.is_some());
}

/// Two at once have the same ports, each its own.
#[tokio::test]
async fn executions_do_not_reach_each_other_s_listeners() {
    let script = format!("sleep 1; {}", connect(&format!("127.0.0.1:{TCP_PORT}")));
    let serve = |greeting| {
        move |listeners: NamespaceListeners| listeners.tcp.into_iter().for_each(|socket| greet(socket, greeting))
    };
    let both = tokio::join!(run_isolated(perl(&script), serve("one")), run_isolated(perl(&script), serve("two")));
    for (done, greeting) in [(both.0, "one"), (both.1, "two")] {
        assert_eq!(text(&done.stdout), format!("{greeting} 127.0.0.1:{TCP_PORT}\n\n"));
    }
}

#[tokio::test]
async fn nothing_runs_before_the_listeners_are_taken() {
    let one = make_runner(1);
    // A fresh leaf each time: the kernel kills what is cloned into a cgroup that has been killed before.
    let leaf = || tree().leaf().unwrap();
    let touch = || isolated(shell("date +%s%N"));
    let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos();
    let mut went = 0;
    let first = leaf();
    let take = async |listeners: NamespaceListeners| -> Result<(), String> {
        tokio::time::sleep(Duration::from_millis(300)).await;
        // One process, and not even the second image of the gate: it waits for its uid.
        let procs = std::fs::read_to_string(first.path().join("cgroup.procs")).unwrap();
        let image = |pid: &str| std::fs::metadata(format!("/proc/{pid}/exe")).map(|found| found.ino()).unwrap();
        assert_eq!(procs.lines().map(image).collect::<Vec<_>>(), [image("self")]);
        drop(listeners);
        went = now();
        Ok(())
    };
    let done = one.run_with(&first, touch(), take, pending()).await.unwrap();
    let began: u128 = text(&done.stdout).trim().parse().unwrap();
    assert!(began > went && went > 0, "{began} {went}");

    // A refusal is an error, and nothing is left of it, as the only uid shows.
    let refused = one.run_with(&leaf(), touch(), async |_| Err("no room at the proxy"), pending()).await;
    assert!(matches!(&refused, Err(SandboxError::NotTaken(why)) if why.to_string().contains("no room")), "{refused:?}");
    let refused = one.run(&leaf(), touch(), pending()).await;
    assert!(matches!(refused, Err(SandboxError::NotTaken(_))), "{refused:?}");
    // Time and the caller end it while it waits.
    let forever = async |_listeners: NamespaceListeners| -> Result<(), String> { pending().await };
    let mut job = touch();
    job.limits.timeout = Duration::from_millis(200);
    assert_eq!(one.run_with(&leaf(), job, forever, pending()).await.unwrap().exit, Exit::TimedOut);
    let cancel = tokio::time::sleep(Duration::from_millis(200));
    assert_eq!(one.run_with(&leaf(), touch(), forever, cancel).await.unwrap().exit, Exit::Cancelled);
    let last = leaf();
    let dropped = one.run_with(&last, touch(), forever, pending());
    assert!(tokio::time::timeout(Duration::from_millis(200), dropped).await.is_err());
    let ended = Instant::now();
    let done = loop {
        match one.run_with(&leaf(), touch(), async |_| Ok::<_, String>(()), pending()).await {
            Err(SandboxError::NoUid) => assert!(ended.elapsed() < Duration::from_secs(5)),
            again => break again.unwrap(),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    assert_eq!(done.exit, Exit::Code(0));
    assert_eq!(std::fs::read_to_string(last.path().join("cgroup.procs")).unwrap(), "");
}

#[tokio::test]
async fn ports_that_cannot_be_had_are_refused_before_anything_is_made() {
    let leaf = tree().leaf().unwrap();
    let mut job = shell("true");
    job.network = Network::Isolated { tcp_port: 0, udp_base: None, udp_slots: 0 };
    let refused = runner().run_with(&leaf, job, async |_| Ok::<_, String>(()), pending()).await;
    assert!(matches!(refused, Err(SandboxError::Config(_))), "{refused:?}");
    runner().can_isolate(&leaf).await.unwrap();
    // It leaves the leaf as it was.
    assert_eq!(run_in(&leaf, shell("true")).await.exit, Exit::Code(0));
    leaf.remove().unwrap();
    // The HTTP worker too, without datagrams.
    let mut job = shell("");
    job.program = Program::HttpWorker;
    let leaf = tree().leaf().unwrap();
    job.network = Network::Isolated { tcp_port: TCP_PORT, udp_base: None, udp_slots: 8 };
    let take = async |listeners: NamespaceListeners| -> Result<(), String> {
        assert_eq!((listeners.tcp.len(), listeners.udp.len()), (2, 0));
        listeners.tcp.into_iter().for_each(|listener| {
            listener.set_nonblocking(false).unwrap();
            std::thread::spawn(move || {
                let (mut connection, _) = listener.accept().unwrap();
                let mut request = [0; 1024];
                let length = connection.read(&mut request).unwrap();
                assert!(text(&request[..length]).starts_with("GET http://allowed.test/ HTTP/1.1\r\n"));
                let _ = connection.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfound");
            });
        });
        Ok(())
    };
    job.stdin = format!(
        "{{\"proxy\":\"127.0.0.1:{TCP_PORT}\",\"method\":\"GET\",\"url\":\"http://allowed.test/\",\
          \"max_response_bytes\":1000,\"timeout_ms\":5000}}"
    )
    .into_bytes();
    let done = runner().run_with(&leaf, job, take, pending()).await.unwrap();
    assert!(text(&done.stdout).contains("\"body\":\"found\""), "{done:?}");
    leaf.remove().unwrap();
}

/// In a process of its own, as nothing else may run below its `actions`: the kernel program with no entry but for this
/// leaf's drops what a leaf's sockets send. That the connection comes about shows whose the listener is; the program's
/// record of the accepted socket and the listener name the same execution.
#[tokio::test]
#[ignore = "started by the_kernel_s_record_agrees_with_the_listener"]
async fn helper_enforced() {
    let instance = std::env::var("LATCHGATE_TEST_INSTANCE").unwrap();
    let tree = CgroupTree::open(None, &instance).unwrap();
    let bpffs = std::env::temp_dir().join(&instance);
    std::fs::create_dir_all(&bpffs).unwrap();
    let enforcer = Enforcer::start(KernelConfig {
        resolver: None,
        instance,
        actions: tree.actions().to_owned(),
        gate: tree.gate().to_owned(),
        bpffs: bpffs.clone(),
        proxy: ProxyAddresses {
            v4: format!("127.0.0.1:{TCP_PORT}").parse().unwrap(),
            v6: Some(format!("[::1]:{TCP_PORT}").parse().unwrap()),
        },
    })
    .unwrap();
    let script = format!(
        "{{ {} }} {{ {} }} {{ {} }}",
        connect(&format!("127.0.0.1:{TCP_PORT}")),
        connect(&format!("[::1]:{TCP_PORT}")),
        connect(&format!("127.0.0.1:{}", TCP_PORT + 1))
    );
    let mut seen = Vec::new();
    for _ in 0..2 {
        let leaf = tree.leaf().unwrap();
        enforcer.admit(leaf.id(), KernelProfile::ProxyOnly, Duration::from_secs(60)).unwrap();
        let (accepted, at) = std::sync::mpsc::channel();
        let take = async |listeners: NamespaceListeners| -> Result<(), String> {
            for listener in listeners.tcp {
                listener.set_nonblocking(false).unwrap();
                let accepted = accepted.clone();
                std::thread::spawn(move || {
                    let (mut connection, _): (TcpStream, _) = listener.accept().unwrap();
                    let _ = connection.write_all(b"served\n");
                    connection.shutdown(std::net::Shutdown::Write).unwrap();
                    accepted.send(connection).unwrap();
                });
            }
            Ok(())
        };
        let done = runner().run_with(&leaf, isolated(perl(&script)), take, pending()).await.unwrap();
        assert_eq!(text(&done.stdout), "served\n\nserved\n\n1\n", "{done:?}");
        // The client may have all that it was served before the thread that served it comes to hand the connection over.
        let connections: Vec<TcpStream> =
            (0..2).map(|_| at.recv_timeout(Duration::from_secs(10)).expect("a connection")).collect();
        for connection in connections {
            use std::os::fd::AsFd;
            assert_eq!(enforcer.leaf_of(connection.as_fd()), Some(leaf.id()));
        }
        let counts = enforcer.retire(leaf.id()).unwrap();
        assert_eq!((counts.connections, counts.denied.connect4, counts.denied.egress), (2, 1, 0), "{counts:?}");
        seen.push(leaf.id());
        leaf.remove().unwrap();
    }
    assert_ne!(seen[0], seen[1]);
    enforcer.detach().unwrap();
    println!("actions={}", tree.actions().display());
    rustix::mount::unmount(&bpffs, rustix::mount::UnmountFlags::DETACH).unwrap();
    std::fs::remove_dir(&bpffs).unwrap();
}

#[test]
fn the_kernel_s_record_agrees_with_the_listener() {
    let instance = format!("test-enforced-{}", std::process::id());
    let done = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "network::helper_enforced", "--ignored", "--nocapture"])
        .env("LATCHGATE_TEST_INSTANCE", &instance)
        .output()
        .unwrap();
    let (printed, errors) = (text(&done.stdout), text(&done.stderr));
    assert!(done.status.success() && printed.contains("1 passed"), "{printed}{errors}");
    let actions = printed.lines().find_map(|line| Some(PathBuf::from(line.split_once("actions=")?.1))).unwrap();
    for part in ["actions", "gate", ""] {
        std::fs::remove_dir(actions.parent().unwrap().join(part)).unwrap();
    }
}

/// In a process of its own, whose descriptors nobody else opens.
#[tokio::test]
#[ignore = "started by nothing_is_held_when_it_is_over"]
async fn helper_descriptors() {
    let tree = CgroupTree::open(None, &std::env::var("LATCHGATE_TEST_INSTANCE").unwrap()).unwrap();
    let held = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let children = || {
        std::fs::read_dir("/proc/self/task")
            .unwrap()
            .flatten()
            .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok())
            .map(|children| children.split_whitespace().count())
            .sum::<usize>()
    };
    let mut before = 0;
    for round in 0..20 {
        if round == 2 {
            before = held();
        }
        let leaf = tree.leaf().unwrap();
        let done =
            runner().run_with(&leaf, isolated(shell("true")), async |_| Ok::<_, String>(()), pending()).await.unwrap();
        assert_eq!(done.exit, Exit::Code(0));
        leaf.remove().unwrap();
    }
    assert_eq!((held(), children()), (before, 0));
    println!("actions={}", tree.actions().display());
}

#[test]
fn nothing_is_held_when_it_is_over() {
    let done = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "network::helper_descriptors", "--ignored", "--nocapture"])
        .env("LATCHGATE_TEST_INSTANCE", format!("test-held-{}", std::process::id()))
        .output()
        .unwrap();
    let (printed, errors) = (text(&done.stdout), text(&done.stderr));
    assert!(done.status.success() && printed.contains("1 passed"), "{printed}{errors}");
    let actions = printed.lines().find_map(|line| Some(PathBuf::from(line.split_once("actions=")?.1))).unwrap();
    for part in ["actions", "gate", ""] {
        std::fs::remove_dir(actions.parent().unwrap().join(part)).unwrap();
    }
}
