//! `psql` to a real PostgreSQL, by an entry of `protocol: tcp`.

use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use latchgate_tests::inside::wait;
use latchgate_tests::skip;
use serde_json::json;

use super::world::{NETWORKS, Plan};

const NAME: &str = "db.test";
const OTHER: &str = "other-db.test";
/// No user of anything: PostgreSQL does not run as root.
const NOBODY: &str = "65534";

struct Server {
    process: Child,
    directory: PathBuf,
    port: u16,
}

impl Server {
    fn start(binaries: &std::path::Path) -> Self {
        let directory = std::env::temp_dir().join(format!("lgtest-pg-{}", uuid::Uuid::new_v4()));
        std::fs::create_dir(&directory).unwrap();
        std::os::unix::fs::chown(&directory, Some(65534), Some(65534)).unwrap();
        let data = directory.join("data");
        let as_nobody = |program: &str| {
            let mut command = Command::new("setpriv");
            command.args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"]).arg(binaries.join(program));
            command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null());
            command
        };
        let made = as_nobody("initdb").args(["-A", "trust", "-U", "tester", "-N", "-D"]).arg(&data).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let process = as_nobody("postgres")
            .arg("-D")
            .arg(&data)
            .args(["-h", "127.0.0.1", "-p", &port.to_string(), "-c", "fsync=off", "-c", "unix_socket_directories="])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let server = Self { process, directory, port };
        wait("PostgreSQL", Duration::from_secs(60), || TcpStream::connect(("127.0.0.1", port)).ok());
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Fast shutdown (postgres(1)); SIGKILL would leave shared memory behind.
        let pid = rustix::process::Pid::from_raw(i32::try_from(self.process.id()).unwrap()).unwrap();
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
        let _ = self.process.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// The newest one that is installed where sandboxes see it.
fn binaries() -> Option<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = versions.map(|version| version.path().join("bin")).collect();
    found.retain(|place| ["psql", "postgres", "initdb"].iter().all(|program| place.join(program).exists()));
    found.sort();
    found.pop()
}

#[test]
fn a_database_is_reached_by_its_name_and_another_is_not() {
    let Some(binaries) = binaries() else {
        return skip("PostgreSQL is not in /usr/lib/postgresql: make setup-test");
    };
    let server = Server::start(&binaries);
    let (port, psql) = (server.port, binaries.join("psql"));
    for network in NETWORKS {
        let entry = format!("{{domain: {NAME}, ports: [{port}], exact: true, protocol: tcp}}");
        let world = Plan::default().host(NAME).host(OTHER).reaching("run", &[entry]).start("psql", network);
        let ask = |host: &str, port: u16| {
            let to = format!("host={host} port={port} user=tester dbname=postgres connect_timeout=20");
            world.run("run", &[psql.to_str().unwrap(), "-X", "-At", &to, "-c", "select 6 * 7, pg_is_in_recovery()"])
        };
        let ran = ask(NAME, port);
        ran.succeeded("42|f");
        let flow = ran.one("allow", &json!({"name": NAME, "protocol": "tcp", "carried": true, "port": port}));
        // Looked up and dialled by the gate; nothing inside says which name it was for, and the receipt says that.
        assert_eq!((&flow["name_verified"], &flow["opaque"]), (&json!("dns"), &json!(true)), "{ran}");
        assert_eq!(ran.evidence[0]["agreement"], "equal", "{ran}");

        let ran = ask(OTHER, port);
        assert_eq!((ran.code, ran.err.contains("could not translate host name")), (2, true), "{network}: {ran}");
        ran.nothing_allowed();
        ran.any("deny", &json!({"name": OTHER, "decided_by": "resolver", "rule": "name_not_allowed"}));
        for (host, port) in [("127.0.0.1", port), (NAME, port ^ 1)] {
            let ran = ask(host, port);
            assert_eq!((ran.code, ran.err.contains("Operation not permitted")), (2, true), "{network}: {ran}");
            ran.nothing_allowed();
            ran.any("deny", &json!({"decided_by": "hook", "port": port}));
        }
    }
}
