//! What a session reaches on this machine: the gate's socket, and no other; its own directory; no more rights.

use std::fs;
use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use latchgate_tests::inside::missing;
use latchgate_tests::session::Session;
use serde_json::{Value, json};

use super::gate;

/// Each attempt's errno by name, or what it gave.
const ATTEMPTS: &str = r#"
import ctypes, errno, json, os, socket, sys
p = json.loads(sys.argv[1])
def said(attempt):
    try:
        return attempt()
    except OSError as e:
        return errno.errorcode.get(e.errno, str(e))
def unix(name, kind=socket.SOCK_STREAM):
    s = socket.socket(socket.AF_UNIX, kind)
    s.connect(name)
    s.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    return s.recv(12).decode()
def status(name):
    return [l.split()[1] for l in open("/proc/self/status") if l.startswith(name + ":")][0]
got = {
    "gate": said(lambda: unix(p["gate"])),
    "operator": said(lambda: unix(p["operator"])),
    "path": said(lambda: unix(p["path"])),
    "in_work": said(lambda: unix(p["in_work"])),
    "abstract": said(lambda: unix("\0" + p["abstract"])),
    "datagram": said(lambda: unix("\0" + p["abstract"], socket.SOCK_DGRAM)),
    "netlink": said(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).fileno()),
    "state": said(lambda: os.listdir(p["state"])),
    "descriptors": sorted(int(f) for f in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd/" + f)),
    "capabilities": [status(n) for n in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
    "no_new_privs": status("NoNewPrivs"),
    "seccomp": status("Seccomp"),
    "uid": os.getuid(),
    "processes": len([n for n in os.listdir("/proc") if n.isdigit()]),
    "operators_variable": os.environ.get("LATCHGATE_OPERATOR_KEY"),
    "tiocsti": said(lambda: __import__("fcntl").ioctl(0, 0x5412, b"x")),
    "unshare": said(lambda: ctypes.CDLL(None, use_errno=True).unshare(0x10000000) and (_ for _ in ()).throw(OSError(ctypes.get_errno(), ""))),
}
open("said.json", "w").write(json.dumps(got))
"#;

fn listen_and_answer(listener: UnixListener) {
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let _ = stream.read(&mut [0; 256]);
            let _ = stream.write_all(b"HTTP/1.1 200 outside");
        }
    });
}

#[test]
fn no_socket_but_the_gates_is_reached() {
    if missing(&["/usr/bin/python3"]) {
        return;
    }
    for network in ["shared", "isolated"] {
        let (gate, work) = gate("sockets", &format!("[sandbox]\nnetwork = \"{network}\"\n"));
        let path = |name: &str| gate.directory().join(name);
        let name = format!("latchgate-test-{}", std::process::id());
        for socket in [path("other.sock"), work.join("in-work.sock")] {
            listen_and_answer(UnixListener::bind(&socket).unwrap());
            fs::set_permissions(&socket, fs::Permissions::from_mode(0o777)).unwrap();
        }
        let address = SocketAddr::from_abstract_name(format!("{name}-{network}")).unwrap();
        listen_and_answer(UnixListener::bind_addr(&address).unwrap());
        let params = json!({
            "gate": path("agent/gate.sock"), "operator": path("operator/operator.sock"), "path": path("other.sock"),
            "in_work": work.join("in-work.sock"), "abstract": format!("{name}-{network}"), "state": path("state"),
        })
        .to_string();
        let said = || -> Value { serde_json::from_slice(&fs::read(work.join("said.json")).unwrap()).unwrap() };

        // The control: outside, with the same attempts, every one of them succeeds.
        let outside = std::process::Command::new("/usr/bin/python3")
            .args(["-c", ATTEMPTS, &params])
            .current_dir(&work)
            .status()
            .unwrap();
        assert!(outside.success());
        let control = said();
        for name in ["path", "in_work", "abstract"] {
            assert_eq!(control[name], "HTTP/1.1 200", "{name} {control}");
        }
        assert!(control["netlink"].is_number() && control["state"].is_array(), "{control}");
        fs::remove_file(work.join("said.json")).unwrap();

        let command = ["/usr/bin/python3", "-c", ATTEMPTS, &params];
        let mut session = Session::start(&gate, "none", &work, &command);
        assert_eq!(session.end().code(), Some(0), "{}", session.shown());
        let inside = said();
        assert_eq!(inside["gate"], "HTTP/1.1 200", "{inside}");
        for name in ["operator", "path", "state"] {
            assert_eq!(inside[name], "ENOENT", "{name}: {inside}");
        }
        // An empty file of nobody's lies over it.
        assert_eq!(inside["in_work"], "EACCES", "{inside}");
        let nobody = if network == "shared" { "EPERM" } else { "ECONNREFUSED" };
        assert_eq!(inside["abstract"], nobody, "{inside}");
        for name in ["datagram", "netlink", "tiocsti", "unshare"] {
            assert_eq!(inside[name], "EPERM", "{name}: {inside}");
        }
        assert_eq!(inside["descriptors"], json!([0, 1, 2]), "{inside}");
        assert_eq!(inside["capabilities"], json!(vec!["0000000000000000"; 5]), "{inside}");
        assert_eq!((&inside["no_new_privs"], &inside["seccomp"]), (&json!("1"), &json!("2")), "{inside}");
        assert_ne!(inside["uid"], 0);
        assert_eq!(inside["processes"], 2, "{inside}");
        assert_eq!(inside["operators_variable"], Value::Null);
    }
}

#[test]
fn nobody_becomes_root_by_a_setuid_program() {
    let (gate, work) = gate("setuid", "");
    // A copy of `id` that is root's and says so.
    let program = gate.directory().join("tools");
    fs::create_dir(&program).unwrap();
    fs::copy("/usr/bin/id", work.join("id-of-root")).unwrap();
    fs::set_permissions(work.join("id-of-root"), fs::Permissions::from_mode(0o4755)).unwrap();
    let mut session = Session::start(
        &gate,
        "none",
        &work,
        &["/bin/sh", "-c", "./id-of-root -u; grep ^Uid /proc/self/status; su -c id </dev/null"],
    );
    session.end();
    let shown = session.shown();
    assert!(shown.contains("65534") && !shown.contains("uid=0"), "{shown}");
    assert!(shown.contains("Uid:\t65534\t65534\t65534\t65534"), "{shown}");
}

#[test]
fn it_runs_as_the_profiles_uid_and_never_as_root() {
    let (gate, work) = gate("uid", "[profiles.named]\nuid = 4242\ngid = 4243\n");
    let mut session = Session::start(&gate, "named", &work, &["/bin/sh", "-c", "touch mine"]);
    assert_eq!(session.end().code(), Some(0), "{}", session.shown());
    let made = fs::metadata(work.join("mine")).unwrap();
    use std::os::unix::fs::MetadataExt;
    assert_eq!((made.uid(), made.gid()), (4242, 4243));
    let mut session = Session::start(&gate, "none", &work, &["/bin/sh", "-c", "touch other"]);
    assert_eq!(session.end().code(), Some(0), "{}", session.shown());
    assert!(fs::metadata(work.join("other")).unwrap().uid() >= 0x4c47_0000);
}

#[test]
fn what_would_show_the_gates_own_is_refused() {
    let (gate, work) = gate("exposed", "");
    for (directory, why) in [(gate.directory(), "would be visible"), (std::path::Path::new("/etc"), "cannot be shown")]
    {
        let mut session = Session::start(&gate, "none", directory, &["/bin/true"]);
        assert_eq!(session.end().code(), Some(255));
        assert!(session.shown().contains(why), "{}", session.shown());
    }
    let mut session = Session::start(&gate, "nobody", &work, &["/bin/true"]);
    assert_eq!(session.end().code(), Some(1));
    assert!(session.shown().contains("no profile `nobody`; there are: none"), "{}", session.shown());
}
