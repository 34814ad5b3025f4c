//! Draining, the operator's socket, metrics, configuration errors, and what `up` asks of the machine.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use latchgate_tests::agent::{Agent, Key, lease};
use latchgate_tests::gate::{Gate, Setup, binary};
use latchgate_tests::http::{Response, Target, once};
use latchgate_tests::{base64url, hex, now, sha256, skip};
use serde_json::{Value, json};

use crate::answers::{logged_address, passed, refused, with_echo};

/// A uid that is nobody's on any machine that runs this.
const STRANGER: u32 = 54_321;

/// An operator with an API key and the key pair that proves its use.
pub struct Operator {
    key: Key,
    api_key: &'static str,
}

impl Operator {
    pub fn new() -> Self {
        Self { key: Key::generate(), api_key: "lgop_test" }
    }

    pub fn config(&self) -> String {
        format!(
            "[[operators.keys]]\nname = \"op\"\ndpop_jkt = \"{}\"\napi_key_hash = \"sha256:{}\"\n",
            self.key.thumbprint(),
            hex(sha256(self.api_key))
        )
    }

    /// One call; proofs of this key are refused in the first seconds of a gate, which cannot know that the key is new.
    pub fn call(&self, gate: &Gate, method: &str, path: &str) -> Response {
        let began = Instant::now();
        loop {
            let response = self.call_once(gate, method, path, self.api_key, &self.key);
            let early = response.status == 401
                && response.json()["deny_reason"].as_str().is_some_and(|reason| reason.contains("began to remember"));
            if !early {
                return response;
            }
            assert!(began.elapsed() < Duration::from_secs(20), "the gate takes no proof");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn call_once(&self, gate: &Gate, method: &str, path: &str, api_key: &str, key: &Key) -> Response {
        let claims = json!({
            "jti": uuid::Uuid::new_v4().to_string(), "htm": method, "htu": format!("http://localhost{path}"),
            "iat": now(), "ath": base64url(sha256(api_key)),
        });
        let header = json!({"typ": "dpop+jwt", "alg": "ES256", "jwk": key.jwk()});
        let proof = key.jwt(&header.to_string(), &claims.to_string());
        let authorization = format!("DPoP {api_key}");
        once(&socket(gate), method, path, &[("authorization", &authorization), ("dpop", &proof)], None)
    }
}

fn socket(gate: &Gate) -> Target {
    Target::Unix(gate.directory().join("operator/operator.sock"))
}

pub fn drain(gate: &Gate, operator: &Operator) {
    passed(&operator.call(gate, "POST", "/v1/admin/drain"));
}

#[test]
fn a_draining_gate_begins_nothing() {
    let operator = Operator::new();
    let gate = with_echo("drain").config(&operator.config()).start();
    let agent = Agent::connect(&gate.agent());
    let executed = passed(&agent.execute("echo", &json!({})));
    let ready = passed(&once(&gate.agent(), "GET", "/readyz", &[], None));
    assert_eq!(ready["status"], "ready");

    drain(&gate, &operator);
    refused(&agent.execute("echo", &json!({})), "503 draining");
    refused(&agent.receipt(executed["receipt_id"].as_str().unwrap()), "503 draining");
    refused(&lease(&gate.agent(), &json!({"scopes": ["tools:call"], "dpop_jwk": agent.key.jwk()})), "503 draining");
    for path in ["/v1/actions", "/.well-known/jwks.json", "/nowhere"] {
        refused(&once(&gate.agent(), "GET", path, &[], None), "503 draining");
    }
    let health = passed(&once(&gate.agent(), "GET", "/healthz", &[], None));
    assert_eq!(health, json!({"status": "ok"}));
    let ready = once(&gate.agent(), "GET", "/readyz", &[], None);
    assert_eq!((ready.status, ready.json()["status"].as_str()), (503, Some("not_ready")));
}

#[test]
fn only_a_known_operator_operates() {
    let operator = Operator::new();
    let gate = with_echo("operator").config(&operator.config()).start();
    let status = passed(&operator.call(&gate, "GET", "/v1/admin/status"));
    assert_eq!(status["status"], "ready");

    let path = "/v1/admin/drain";
    refused(&once(&socket(&gate), "POST", path, &[], None), "401 missing_auth_header");
    let other = operator.call_once(&gate, "POST", path, "lgop_guessed", &operator.key);
    refused(&other, "401 identity_unauthenticated");
    let other = operator.call_once(&gate, "POST", path, operator.api_key, &Key::generate());
    refused(&other, "401 invalid_dpop");
    // A lease is no API key, and an API key is no lease.
    let agent = Agent::connect(&gate.agent());
    let (authorization, proof) = (agent.authorization(), agent.proof("POST", path));
    let headers = [("authorization", authorization.as_str()), ("dpop", proof.as_str())];
    refused(&once(&socket(&gate), "POST", path, &headers, None), "401 identity_unauthenticated");
    // The operator's routes are not on the agents' socket, nor the agents' on the operator's.
    refused(&once(&gate.agent(), "POST", path, &headers, None), "404 not_found");
    refused(&operator.call(&gate, "POST", "/v1/leases"), "404 not_found");
    let response = operator.call(&gate, "GET", path);
    refused(&response, "405 method_not_allowed");
    assert_eq!(response.header("allow"), Some("POST"));

    passed(&agent.execute("echo", &json!({})));
    let keys = passed(&operator.call(&gate, "GET", "/v1/receipt-keys"));
    assert_eq!(keys["keys"][0]["crv"], "Ed25519");
    assert_eq!(passed(&operator.call(&gate, "GET", "/v1/audit/verify"))["intact"], true);
}

#[test]
fn metrics_have_a_listener_of_their_own() {
    let gate = with_echo("metrics").config("[metrics]\nlisten = \"127.0.0.1:0\"").start();
    let log = gate.log_text();
    let target = Target::Tcp(logged_address(log.lines().find(|line| line.contains(" metrics ")).unwrap()));
    let agent = Agent::connect(&gate.agent());
    passed(&agent.execute("echo", &json!({})));
    refused(&agent.execute("absent", &json!({})), "404 action_not_found");
    let response = once(&target, "GET", "/metrics", &[], None);
    assert_eq!(response.status, 200);
    assert!(response.header("content-type").unwrap().starts_with("application/openmetrics-text"));
    let text = String::from_utf8(response.body).unwrap();
    for line in [
        "latchgate_executions_total{kind=\"success\"} 1",
        "latchgate_refusals_total{code=\"action_not_found\"} 1",
        "# EOF",
    ] {
        assert!(text.lines().any(|found| found == line), "no {line} in\n{text}");
    }
    refused(&once(&target, "POST", "/metrics", &[], None), "405 method_not_allowed");
    refused(&once(&target, "GET", "/healthz", &[], None), "404 not_found");
    refused(&once(&target, "GET", "/v1/actions", &[], None), "404 not_found");
    refused(&once(&gate.agent(), "GET", "/metrics", &[], None), "404 not_found");
}

#[test]
fn a_configuration_error_names_its_place() {
    for (text, wanted) in [
        ("[auth]\nlease_ttl_second = 3", &["lease_ttl_second"][..]),
        ("[limits]\nmax_request_bytes = \"many\"", &["many"]),
        ("[egress]\nenforce = false", &["enforce"]),
        ("[[listeners]]\nname = \"x\"\npath = \"/x/gate.sock\"\nprincipals = \"p\"", &["principals"]),
    ] {
        let setup = Setup::new("config");
        fs::write(setup.config_file(), text).unwrap();
        let output = Command::new(binary()).args(["serve", "--config"]).arg(setup.config_file()).output().unwrap();
        fs::remove_dir_all(&setup.directory).unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(setup.config_file().to_str().unwrap()), "{said}");
        // What is wrong is on the last line.
        assert!(said.contains(&format!("line {}", text.lines().count())), "{said}");
        for word in wanted {
            assert!(said.contains(word), "{said}");
        }
    }
    for (text, wanted) in [
        ("[auth]\nlease_ttl_seconds = 3601", "auth.lease_ttl_seconds"),
        ("[[listeners]]\nname = \"x\"\npath = \"{dir}/x/gate.sock\"", "listeners[1].principal"),
        ("[[listeners]]\nname = \"agent\"\npath = \"{dir}/x/gate.sock\"\nprincipal = \"p\"", "listeners[1].name"),
        ("[[listeners]]\nname = \"x\"\npath = \"{dir}/operator/gate.sock\"\nprincipal = \"p\"", "listeners[1].path"),
    ] {
        let (code, said) = Setup::new("config").config(text).refuse();
        assert_eq!(code, 1);
        assert!(said.contains(wanted), "{said}");
    }
}

#[test]
fn a_variable_sets_a_key_and_an_unknown_one_is_named() {
    let gate = with_echo("variable").start();
    let ttl = |gate: &Gate| {
        let claims = crate::leases::decoded(&Agent::connect(&gate.agent()).lease, 1);
        claims["exp"].as_i64().unwrap() - claims["iat"].as_i64().unwrap()
    };
    assert_eq!(ttl(&gate), 300);
    let file = gate.directory().join("latchgate.toml");
    let run = |name: &str, value: &str| {
        Command::new(binary()).args(["serve", "--config"]).arg(&file).env(name, value).output().unwrap()
    };
    for (name, value, word) in [
        ("LATCHGATE_CONFIG__AUTH__LEASE_TTL_SECOND", "77", "lease_ttl_second"),
        ("LATCHGATE_CONFIG__AUTH__LEASE_TTL_SECONDS", "soon", "soon"),
        ("LATCHGATE_CONFIG__NOWHERE__AT_ALL", "1", "nowhere"),
    ] {
        let output = run(name, value);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(name) && said.contains(word), "{said}");
    }
    let mut gate = gate;
    gate.kill();
    let mut serving = Command::new(binary());
    serving.args(["serve", "--config"]).arg(&file).env("LATCHGATE_CONFIG__AUTH__LEASE_TTL_SECONDS", "77");
    serve_until(serving, || assert_eq!(ttl(&gate), 77));
}

/// Starts it, waits until it is ready, does something, and ends it.
fn serve_until(mut command: Command, act: impl FnOnce()) {
    let mut process =
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).env("NO_COLOR", "1").spawn().unwrap();
    let mut lines = BufReader::new(process.stderr.take().unwrap()).lines().map_while(Result::ok);
    let mut said = Vec::new();
    let ready = lines.by_ref().any(|line| {
        let ready = line.contains(" ready");
        said.push(line);
        ready
    });
    let rest = std::thread::spawn(move || lines.for_each(drop));
    let acted = ready.then(|| std::panic::catch_unwind(std::panic::AssertUnwindSafe(act)));
    let pid = rustix::process::Pid::from_raw(i32::try_from(process.id()).unwrap()).unwrap();
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    process.wait().unwrap();
    rest.join().unwrap();
    match acted {
        None => panic!("not ready:\n{}", said.join("\n")),
        Some(Err(panic)) => std::panic::resume_unwind(panic),
        Some(Ok(())) => {}
    }
}

/// `up` with sockets and state of the test's own.
fn up(setup: &Setup, executable: &std::path::Path) -> Command {
    let mut command = Command::new(executable);
    command
        .args(["up", "--config"])
        .arg(setup.config_file())
        .env("XDG_RUNTIME_DIR", setup.directory.join("run"))
        .env("XDG_STATE_HOME", setup.directory.join("home"))
        .env("NO_COLOR", "1");
    command
}

#[test]
fn up_names_every_privilege_that_is_missing() {
    let setup = Setup::new("up");
    let dir = setup.directory.display().to_string();
    let text = format!(
        "instance = \"{}\"\nstate_dir = \"{dir}/state\"\n[operators]\nsocket = \"{dir}/operator/operator.sock\"\n\
         [[listeners]]\nname = \"agent\"\npath = \"{dir}/agent/gate.sock\"\nprincipal = \"me\"\n",
        setup.name
    );
    fs::write(setup.config_file(), text).unwrap();
    let all = ["CAP_SETGID", "CAP_SETUID", "CAP_NET_ADMIN", "CAP_BPF"];
    let lines = |stderr: &[u8]| -> Vec<String> {
        let text = String::from_utf8_lossy(stderr).into_owned();
        text.lines().filter_map(|line| line.strip_prefix("  CAP_")).map(|line| format!("CAP_{line}")).collect()
    };
    let named = |stderr: &[u8]| -> Vec<String> {
        lines(stderr).iter().filter_map(|line| line.split_once(": ")).map(|(name, _)| name.to_owned()).collect()
    };

    // As a user without any. The binary is copied to where that user can read it.
    let copy = setup.directory.join("latchgate");
    fs::copy(binary(), &copy).unwrap();
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
    let stranger_state = setup.directory.join("stranger");
    fs::create_dir(&stranger_state).unwrap();
    std::os::unix::fs::chown(&stranger_state, Some(STRANGER), Some(STRANGER)).unwrap();
    let output = up(&setup, &copy)
        .env("LATCHGATE_CONFIG__STATE_DIR", stranger_state.join("state"))
        .uid(STRANGER)
        .gid(STRANGER)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(named(&output.stderr), all, "{said}");
    for line in lines(&output.stderr) {
        assert!(line.split_once(": ").is_some_and(|(_, why)| why.len() > 10), "a reason: {line}");
    }
    assert!(!setup.directory.join("agent").exists(), "nothing listens");

    // As root without one of them: that one is named and no other.
    if Command::new("setpriv").arg("--version").output().is_ok() {
        for (capability, name) in [("bpf", "CAP_BPF"), ("net_admin", "CAP_NET_ADMIN"), ("setuid", "CAP_SETUID")] {
            let plain = up(&setup, &copy);
            let mut command = Command::new("setpriv");
            command.args(["--bounding-set", &format!("-{capability}"), "--inh-caps", &format!("-{capability}"), "--"]);
            command.arg(plain.get_program()).args(plain.get_args());
            let output = command.output().unwrap();
            assert_eq!(output.status.code(), Some(1));
            assert_eq!(named(&output.stderr), [name], "{}", String::from_utf8_lossy(&output.stderr));
        }
    } else {
        skip("setpriv is not here, so no single capability can be taken away");
    }

    // With all of them the same start is ready, and its keys are nobody else's.
    let started = up(&setup, &copy);
    serve_until(started, || {
        let agent = Agent::connect(&Target::Unix(setup.directory.join("agent/gate.sock")));
        let actions = passed(&once(&agent.target, "GET", "/v1/actions", &[], None));
        let ids: Vec<&Value> = actions["actions"].as_array().unwrap().iter().map(|one| &one["action_id"]).collect();
        for id in [
            "http_fetch",
            "http_post",
            "http_put",
            "http_patch",
            "http_delete",
            "web_read",
            "github_read",
            "wikipedia_read",
        ] {
            assert!(ids.contains(&&json!(id)), "{id} is not built in: {ids:?}");
        }
        // Shipped with an empty allowlist, which reaches nothing.
        let response = agent.execute("http_fetch", &json!({"url": "https://127.0.0.1/"}));
        refused(&response, "403 egress_denied");
        let mode = |path: &str| fs::metadata(setup.directory.join(path)).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode("state"), 0o700);
        assert_eq!(mode("state/operator.json"), 0o600);
        assert_eq!(mode("agent"), 0o700);
        assert_eq!(mode("agent/gate.sock"), 0o600);
    });
    fs::remove_dir_all(&setup.directory).unwrap();
}
