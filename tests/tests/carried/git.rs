//! `git clone https://` from a real server: `git http-backend` behind TLS.

use std::collections::HashMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use latchgate_tests::inside::missing;
use latchgate_tests::origin::{Authority, Origin, WholeAnswers, field};
use serde_json::json;

use super::world::{LOOPBACK, NETWORKS, Plan};

const NAME: &str = "git.test";
const OTHER: &str = "elsewhere.test";
const BACKEND: &str = "/usr/lib/git-core/git-http-backend";
const CONTENT: &str = "the content of the only file";

/// A directory with `repository.git` in it, that goes with its value.
struct Repositories(PathBuf);

impl Repositories {
    fn make() -> Self {
        let place = std::env::temp_dir().join(format!("lgtest-git-{}", uuid::Uuid::new_v4()));
        std::fs::create_dir(&place).unwrap();
        let (work, bare) = (place.join("work"), place.join("repository.git"));
        git(&["init", "-q", "-b", "main", work.to_str().unwrap()]);
        std::fs::write(work.join("file"), CONTENT).unwrap();
        let at = work.to_str().unwrap();
        git(&["-C", at, "add", "file"]);
        git(&["-C", at, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-m", "one file"]);
        git(&["clone", "-q", "--bare", at, bare.to_str().unwrap()]);
        Self(place)
    }
}

impl Drop for Repositories {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn git(arguments: &[&str]) {
    let done = Command::new("/usr/bin/git").args(arguments).output().unwrap();
    assert!(done.status.success(), "{arguments:?}: {done:?}");
}

/// The backend as a web server runs it (git-http-backend(1), RFC 3875).
fn backend(root: &Path) -> WholeAnswers {
    let root = root.to_owned();
    Arc::new(move |head, body| {
        let mut line = head.lines().next().unwrap_or_default().split(' ');
        let (method, target) = (line.next().unwrap_or_default(), line.next().unwrap_or_default());
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let length = body.len().to_string();
        let mut env: HashMap<&str, &str> = HashMap::from([
            ("GIT_HTTP_EXPORT_ALL", "1"),
            ("REQUEST_METHOD", method),
            ("PATH_INFO", path),
            ("QUERY_STRING", query),
            ("CONTENT_LENGTH", &length),
        ]);
        for (variable, name) in [
            ("CONTENT_TYPE", "content-type"),
            ("HTTP_CONTENT_ENCODING", "content-encoding"),
            ("HTTP_GIT_PROTOCOL", "git-protocol"),
        ] {
            env.extend(field(head, name).map(|value| (variable, value)));
        }
        let mut child = Command::new(BACKEND)
            .env_clear()
            .env("GIT_PROJECT_ROOT", &root)
            .env("PATH", "/usr/bin:/bin")
            // The repository is the test's, whoever runs it (git-config(1), safe.directory).
            .envs([("GIT_CONFIG_COUNT", "1"), ("GIT_CONFIG_KEY_0", "safe.directory"), ("GIT_CONFIG_VALUE_0", "*")])
            .envs(env)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(body).unwrap();
        let output = child.wait_with_output().unwrap().stdout;
        let end = output.windows(4).position(|window| window == b"\r\n\r\n").unwrap_or(0);
        let status = field(&String::from_utf8_lossy(&output[..end]), "status").unwrap_or("200 OK").to_owned();
        let mut answer = format!("HTTP/1.1 {status}\r\nconnection: close\r\n").into_bytes();
        answer.extend_from_slice(&output);
        answer
    })
}

#[test]
fn a_repository_is_cloned_and_another_host_is_not() {
    if missing(&["/usr/bin/git", BACKEND]) {
        return;
    }
    let (authority, repositories) = (Authority::default(), Repositories::make());
    let server = Origin::with_bodies(&authority, &[NAME, OTHER], LOOPBACK, backend(&repositories.0));
    let port = server.address.port();
    for network in NETWORKS {
        let world = Plan::default()
            .host(NAME)
            .host(OTHER)
            .ca(&authority.pem)
            .reaching("passed", &[format!("{{domain: {NAME}, ports: [{port}]}}")])
            .reaching("ended", &[format!("{{domain: {NAME}, ports: [{port}], tls: terminate, methods: [GET, POST]}}")])
            .reaching("reading", &[format!("{{domain: {NAME}, ports: [{port}], tls: terminate, methods: [GET]}}")])
            .start("git", network);
        let clone = |host: &str, verify: &str| {
            format!("cd /tmp && git {verify} clone -q https://{host}:{port}/repository.git here && cat here/file")
        };
        let ran = world.shell("passed", &clone(NAME, "-c http.sslVerify=false"));
        ran.succeeded(CONTENT);
        ran.any("allow", &json!({"name": NAME, "sni": NAME, "name_verified": "sni", "opaque": true}));
        // Verified with what the environment names, and read: one connection may hold several requests.
        let ran = world.shell("ended", &clone(NAME, ""));
        ran.succeeded(CONTENT);
        ran.any("allow", &json!({"name": NAME, "protocol": "https", "name_verified": "host", "opaque": false}));
        // What clone needs is POST.
        let ran = world.shell("reading", &clone(NAME, ""));
        assert_eq!((ran.code, ran.err.contains("403")), (128, true), "{ran}");
        ran.any("deny", &json!({"name": NAME, "rule": "method_not_allowed"}));

        let before = server.requests().len();
        let ran = world.shell("passed", &clone(OTHER, "-c http.sslVerify=false"));
        assert_eq!((ran.code, ran.err.contains("Could not resolve host")), (128, true), "{network}: {ran}");
        ran.any("deny", &json!({"name": OTHER, "decided_by": "resolver"}));
        let ran = world.shell("passed", &clone("127.0.0.1", "-c http.sslVerify=false"));
        assert_eq!(ran.code, 128, "{network}: {ran}");
        ran.any("deny", &json!({"decided_by": "hook", "port": port}));
        ran.nothing_allowed();
        assert_eq!(server.requests().len(), before);
    }
}
