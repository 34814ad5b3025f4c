//! A gate, an agent and what they are asked to run.

use std::path::PathBuf;
use std::process::Command;

use latchgate_tests::agent::Agent;
use latchgate_tests::gate::{Gate, Setup};
use latchgate_tests::{hex, sha256, skip};
use serde_json::{Value, json};

/// Where every origin of these tests listens.
pub const LOOPBACK: std::net::IpAddr = std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

/// Both kinds of network that an execution can be in.
pub const NETWORKS: [&str; 2] = ["isolated", "shared"];

/// Runs the program in `argv`, with no proxy in its environment, and says its exit code and what it wrote. What it says
/// on standard error is kept apart, so that a program may answer in JSON.
const RUN: &str = r#"exec /usr/bin/python3 -c '
import json, os, subprocess, sys
argv = json.load(sys.stdin)["argv"]
env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
done = subprocess.run(argv, env=env, capture_output=True)
said = lambda b: b.decode(errors="replace")[-60000:]
print(json.dumps({"code": done.returncode, "out": said(done.stdout), "err": said(done.stderr)}))
'"#;

/// What a program came to.
pub struct Ran {
    pub code: i64,
    pub out: String,
    pub err: String,
    pub evidence: Vec<Value>,
}

impl Ran {
    /// The records of its connections and queries that were judged so.
    pub fn flows(&self, verdict: &str) -> Vec<&Value> {
        self.evidence.iter().skip(1).filter(|flow| flow["verdict"] == verdict).collect()
    }

    /// The one record with this verdict, and every field as given.
    #[track_caller]
    pub fn one(&self, verdict: &str, fields: &Value) -> &Value {
        let fits = |flow: &&Value| fields.as_object().unwrap().iter().all(|(name, value)| flow[name] == *value);
        let mut fitting = self.flows(verdict).into_iter().filter(fits);
        let found = fitting.next().unwrap_or_else(|| panic!("no {verdict} with {fields} in {self}"));
        assert!(fitting.next().is_none(), "more than one {verdict} with {fields} in {self}");
        found
    }

    #[track_caller]
    pub fn any(&self, verdict: &str, fields: &Value) {
        let fits = |flow: &&Value| fields.as_object().unwrap().iter().all(|(name, value)| flow[name] == *value);
        assert!(self.flows(verdict).into_iter().any(|flow| fits(&flow)), "no {verdict} with {fields} in {self}");
    }

    /// Nothing of what it did was let out.
    #[track_caller]
    pub fn nothing_allowed(&self) {
        assert!(self.flows("allow").is_empty(), "{self}");
    }

    #[track_caller]
    pub fn succeeded(&self, with: &str) {
        assert_eq!((self.code, self.out.contains(with)), (0, true), "{self}");
    }

    #[track_caller]
    pub fn failed(&self) {
        assert_ne!(self.code, 0, "{self}");
    }
}

impl std::fmt::Display for Ran {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "exit {}\n{}\n{}\n{:#?}", self.code, self.out, self.err, self.evidence)
    }
}

/// What the gate is to have besides its network.
#[derive(Default)]
pub struct Plan {
    actions: Vec<Action>,
    hosts: Vec<String>,
    ca_pem: Option<String>,
    seconds: Option<u64>,
}

struct Action {
    id: String,
    egress: String,
    files: Vec<(PathBuf, String)>,
}

impl Plan {
    /// An action that runs any program, with this under `egress:`.
    pub fn action(mut self, id: &str, egress: &str) -> Self {
        self.actions.push(Action { id: id.to_owned(), egress: egress.to_owned(), files: Vec::new() });
        self
    }

    /// One whose profile has these entries.
    pub fn reaching(self, id: &str, entries: &[String]) -> Self {
        let egress = format!("{{profile: proxy_allowlist, allowed_domains: [{}]}}", entries.join(", "));
        self.action(id, &egress)
    }

    /// Shows a file of the host to the last action, at the same path.
    pub fn file(mut self, path: PathBuf) -> Self {
        let digest = hex(sha256(std::fs::read(&path).unwrap()));
        self.actions.last_mut().unwrap().files.push((path, digest));
        self
    }

    /// A name whose origin is on loopback.
    pub fn host(mut self, name: &str) -> Self {
        self.hosts.push(name.to_owned());
        self
    }

    /// What the proxy verifies origins with.
    pub fn ca(mut self, pem: &str) -> Self {
        self.ca_pem = Some(pem.to_owned());
        self
    }

    /// How long an execution may take; 58 unless told.
    pub fn seconds(mut self, seconds: u64) -> Self {
        self.seconds = Some(seconds);
        self
    }

    pub fn start(self, name: &str, network: &str) -> World {
        let mut setup = Setup::new(&format!("carried-{name}-{network}"));
        if let Some(pem) = &self.ca_pem {
            std::fs::write(setup.directory.join("ca.pem"), pem).unwrap();
        }
        for Action { id, egress, files } in &self.actions {
            setup = setup.manifest(id, &manifest(id, egress, files, self.seconds.unwrap_or(58)));
        }
        let hosts: String = self.hosts.iter().map(|name| format!("\"{name}\" = [\"127.0.0.1\"]\n")).collect();
        let ca = if self.ca_pem.is_some() { "ca_file = \"{dir}/ca.pem\"\n" } else { "" };
        let gate = setup
            .config(&format!(
                "[sandbox]\nnetwork = \"{network}\"\n\n[egress]\nallow_addresses = [\"127.0.0.0/8\"]\n{ca}\n\
                 [egress.hosts]\n{hosts}\n"
            ))
            .start();
        let agent = Agent::connect(&gate.agent());
        World { gate, agent, network: network.to_owned() }
    }
}

/// Room of address space: where there is no memory controller it is what is bounded, and Node reserves a lot.
fn manifest(id: &str, egress: &str, files: &[(PathBuf, String)], seconds: u64) -> String {
    let script = RUN.replace('\n', "\n      ");
    let files: String =
        files.iter().map(|(path, digest)| format!("\n    - {{path: {}, sha256: {digest}}}", path.display())).collect();
    let files = if files.is_empty() { String::new() } else { format!("  files:{files}\n") };
    format!(
        "action_id: {id}\nversion: \"1.0.0\"\nprovider_module_digest: builtin:command\ncommand:\n  argv:\n    - /bin/sh\n    - -c\n    - |\n      {script}\n{files}\
         io:\n  request_schema: {{type: object}}\n  max_request_bytes: 65536\n  max_response_bytes: 1048576\n\
         resource_limits: {{memory_mb: 65536, timeout_seconds: {seconds}}}\negress: {egress}\nrisk_level: low\nverifier_kind: none\n"
    )
}

pub struct World {
    pub gate: Gate,
    pub agent: Agent,
    pub network: String,
}

impl World {
    /// What the program came to, and the evidence of its receipt.
    #[track_caller]
    pub fn run(&self, action: &str, argv: &[&str]) -> Ran {
        let answer = self.agent.execute(action, &json!({ "argv": argv }));
        let body = answer.json();
        assert_eq!(answer.status, 200, "{argv:?} in {}: {body}\n{}", self.network, self.gate.log_text());
        let receipt = self.agent.receipt(body["receipt_id"].as_str().unwrap()).json();
        assert_eq!(receipt["signature_status"], "valid", "{receipt}");
        let (output, text) = (&body["output"], |value: &Value| value.as_str().unwrap().to_owned());
        Ran {
            code: output["code"].as_i64().unwrap(),
            out: text(&output["out"]),
            err: text(&output["err"]),
            evidence: receipt["egress_evidence"].as_array().unwrap().clone(),
        }
    }

    pub fn shell(&self, action: &str, script: &str) -> Ran {
        self.run(action, &["/bin/sh", "-c", script])
    }

    pub fn python(&self, action: &str, code: &str) -> Ran {
        self.run(action, &["/usr/bin/python3", "-c", code])
    }
}

/// Whether Node is where sandboxes see it; says so if not.
pub fn has_node() -> bool {
    let found = std::path::Path::new("/usr/bin/node").exists();
    if !found {
        skip("/usr/bin/node is not installed");
    }
    found
}

/// The `requests` of PyPI with what it needs, as one file that `PYTHONPATH` may name. `None`, and a word, if the tests'
/// interpreter does not have it.
pub fn requests() -> Option<Archive> {
    let named = std::env::var_os("LATCHGATE_TEST_PYTHON").map(PathBuf::from);
    let usual = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/latchgate/venv/bin/python"));
    let python = named.or_else(usual).filter(|python| python.exists());
    let archive = Archive(std::env::temp_dir().join(format!("lgtest-site-{}.zip", uuid::Uuid::new_v4())));
    let made = python.is_some_and(|python| {
        Command::new(python).args(["-c", ZIP]).arg(&archive.0).status().is_ok_and(|status| status.success())
    });
    if !made {
        skip("no Python with requests: make setup-test");
        return None;
    }
    Some(archive)
}

const ZIP: &str = "
import os, sys, zipfile
import requests
packages = ('requests', 'urllib3', 'idna', 'certifi', 'charset_normalizer')
site = os.path.dirname(os.path.dirname(requests.__file__))
with zipfile.ZipFile(sys.argv[1], 'w', zipfile.ZIP_DEFLATED) as archive:
    for package in packages:
        for place, _, names in os.walk(os.path.join(site, package)):
            for name in names:
                if name.endswith(('.py', '.pem')):
                    path = os.path.join(place, name)
                    archive.write(path, os.path.relpath(path, site))
";

/// A file that goes with its value.
pub struct Archive(pub PathBuf);

impl Drop for Archive {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
