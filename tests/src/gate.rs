//! A real gate of a test's own: its binary, its directory, its cgroups and pins.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::http::Target;

/// Directories, instances and cgroups of tests begin so, and are swept by it.
pub const PREFIX: &str = "lgtest-";

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// The built binary, beside the tests that use it.
pub fn binary() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let debug = test.parent().and_then(Path::parent).unwrap();
    let binary = debug.join("latchgate");
    assert!(binary.exists(), "{} is not built: cargo build --workspace", binary.display());
    binary
}

/// The gate whose guards can be taken away, beside it.
pub fn unguarded_binary() -> PathBuf {
    let binary = binary().with_file_name("latchgate-unguarded");
    let how = "cargo build --package latchgate --features test-guards --bin latchgate-unguarded";
    assert!(binary.exists(), "{} is not built: {how}", binary.display());
    binary
}

/// What a test wants of its gate. Paths in `extra` may use `{dir}`.
pub struct Setup {
    pub name: String,
    pub directory: PathBuf,
    config: String,
    /// Guards that are off; with any, it is another binary.
    guards_off: Vec<String>,
    /// Whether a gate without its guards tries itself all the same.
    selftest: bool,
    /// What the shell does before it becomes the gate.
    before: Option<String>,
    /// What executes the gate.
    through: Vec<String>,
    /// What starts the gate, where that is not its binary by itself.
    launcher: Option<Vec<String>>,
}

impl Setup {
    /// A gate with one Unix listener (`agent`, principal `tester`), and nothing else.
    pub fn new(name: &str) -> Self {
        let unique = format!("{PREFIX}{name}-{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        let directory = std::env::temp_dir().join(&unique);
        fs::create_dir(&directory).unwrap();
        let dir = directory.display();
        let config = format!(
            "instance = \"{unique}\"\nstate_dir = \"{dir}/state\"\n\n\
             [operators]\nsocket = \"{dir}/operator/operator.sock\"\n\n\
             [[listeners]]\nname = \"agent\"\npath = \"{dir}/agent/gate.sock\"\nprincipal = \"tester\"\n\n"
        );
        fs::create_dir(directory.join("manifests")).unwrap();
        Self {
            name: unique,
            directory,
            config,
            guards_off: Vec::new(),
            selftest: false,
            before: None,
            through: Vec::new(),
            launcher: None,
        }
    }

    /// Takes these guards away (`gate/src/guards/switches.rs` has the names). None of them: the gate as it is.
    pub fn unguarded(mut self, guards: &[&str]) -> Self {
        self.guards_off = guards.iter().map(|guard| (*guard).to_owned()).collect();
        self
    }

    /// Lets a gate without its guards try itself, and find that something gets out.
    pub fn with_selftest(mut self) -> Self {
        self.selftest = true;
        self
    }

    /// Has a shell run `commands` first; what it leaves open, the gate inherits.
    pub fn started_by(mut self, commands: &str) -> Self {
        self.before = Some(commands.to_owned());
        self
    }

    fn serve(&self) -> Command {
        if let Some([program, arguments @ ..]) = self.launcher.as_deref() {
            let mut command = Command::new(program);
            command.args(arguments);
            return command;
        }
        let binary = if self.guards_off.is_empty() { binary() } else { unguarded_binary() };
        let mut command = match (&self.before, self.through.split_first()) {
            (None, None) => Command::new(binary),
            (None, Some((program, arguments))) => {
                let mut command = Command::new(program);
                command.args(arguments).arg(binary);
                command
            }
            (Some(commands), _) => {
                let mut shell = Command::new("/bin/bash");
                shell.arg("-c").arg(format!("{commands}\nexec \"$0\" \"$@\"")).arg(binary);
                shell
            }
        };
        command.arg("serve").arg("--config").arg(self.config_file());
        if !self.guards_off.is_empty() {
            command.env("LATCHGATE_TEST_GUARDS_OFF", self.guards_off.join(","));
            if !self.selftest {
                // With a guard off it says that something gets out, and nothing would run.
                command.env("LATCHGATE_CONFIG__EGRESS__UNSAFE_SKIP_SELFTEST", "true");
            }
        }
        command
    }

    /// Starts the gate through a program that executes what follows its arguments.
    pub fn through(mut self, command: &[&str]) -> Self {
        self.through = command.iter().map(|one| (*one).to_owned()).collect();
        self
    }

    /// Appends to the configuration; `{dir}` stands for the directory.
    pub fn config(mut self, text: &str) -> Self {
        self.config.push_str(&text.replace("{dir}", &self.directory.display().to_string()));
        self.config.push('\n');
        self
    }

    /// Puts keys before every table of the configuration.
    pub fn first(mut self, text: &str) -> Self {
        self.config.insert_str(0, &text.replace("{dir}", &self.directory.display().to_string()));
        self
    }

    /// Adds a manifest. The first one turns the built-in ones off.
    pub fn manifest(mut self, id: &str, yaml: &str) -> Self {
        if !self.config.contains("[definitions]") {
            self = self.config("[definitions]\nmanifests = \"{dir}/manifests\"\n");
        }
        fs::write(self.directory.join("manifests").join(format!("{id}.yaml")), yaml).unwrap();
        self
    }

    /// A command action that runs `/bin/sh -c script`, with the given profile lines (YAML under `egress:`).
    pub fn command(self, id: &str, script: &str, egress: &str) -> Self {
        self.roomy_command(id, script, egress, 256)
    }

    /// The same with so much memory; without a memory controller that bounds the address space, of which some programs
    /// reserve a lot.
    pub fn roomy_command(self, id: &str, script: &str, egress: &str, memory_mb: u32) -> Self {
        self.bounded_command(id, script, egress, memory_mb, 20)
    }

    /// The same with so much time.
    pub fn bounded_command(self, id: &str, script: &str, egress: &str, memory_mb: u32, seconds: u32) -> Self {
        let script = script.trim().replace('\n', "\n      ");
        let yaml = format!(
            "action_id: {id}\nversion: \"1.0.0\"\nprovider_module_digest: builtin:command\ncommand:\n  argv:\n    - /bin/sh\n    - -c\n    - |\n      {script}\n\
             io:\n  request_schema: {{type: object}}\n  max_request_bytes: 65536\n  max_response_bytes: 1048576\n\
             resource_limits: {{memory_mb: {memory_mb}, timeout_seconds: {seconds}}}\negress: {egress}\nrisk_level: low\nverifier_kind: none\n"
        );
        self.manifest(id, &yaml)
    }

    /// An HTTP action that fetches the URL in `url` with any method in `method` (GET when absent).
    pub fn fetch(self, id: &str, egress: &str) -> Self {
        let yaml = format!(
            "action_id: {id}\nversion: \"1.0.0\"\nprovider_module_digest: builtin:http_api\n\
             template: {{method: GET, url_template: \"{{{{url}}}}\"}}\n\
             io:\n  request_schema: {{type: object, properties: {{url: {{type: string}}}}, required: [url], additionalProperties: false}}\n  max_request_bytes: 65536\n  max_response_bytes: 1048576\n\
             resource_limits: {{memory_mb: 256, timeout_seconds: 20}}\negress: {egress}\nrisk_level: low\nverifier_kind: http_status\n"
        );
        self.manifest(id, &yaml)
    }

    /// Has the gate started by this whole command, which must stay while the gate runs and hand its signals on.
    pub fn launched_by(mut self, command: Vec<String>) -> Self {
        self.launcher = Some(command);
        self
    }

    pub fn config_file(&self) -> PathBuf {
        self.directory.join("latchgate.toml")
    }

    /// Starts the gate and waits until it is ready.
    pub fn start(self) -> Gate {
        fs::write(self.config_file(), &self.config).unwrap();
        let mut gate = Gate { setup: self, process: None, log: Arc::default(), cgroup: None };
        gate.start();
        gate
    }

    /// Starts a gate that must refuse to: its exit code and what it said.
    pub fn refuse(self) -> (i32, String) {
        fs::write(self.config_file(), &self.config).unwrap();
        let output = self.serve().output().unwrap();
        let _ = fs::remove_dir_all(&self.directory);
        (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

/// A running gate.
pub struct Gate {
    setup: Setup,
    process: Option<Child>,
    log: Arc<Mutex<Vec<String>>>,
    /// Where its process was, in the v2 tree.
    cgroup: Option<PathBuf>,
}

impl Gate {
    /// Starts it (again), and waits for `ready`.
    pub fn start(&mut self) {
        assert!(self.process.is_none(), "it runs already");
        let mut child = self
            .setup
            .serve()
            .env("LATCHGATE_LOG", std::env::var("LATCHGATE_LOG").unwrap_or_else(|_| "info".to_owned()))
            .env("NO_COLOR", "1")
            .env("TMPDIR", &self.setup.directory)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = child.stderr.take().unwrap();
        self.log.lock().unwrap().clear();
        let log = Arc::clone(&self.log);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                log.lock().unwrap().push(line);
            }
        });
        let began = Instant::now();
        loop {
            if self.logged(|line| line.contains(" ready")) {
                break;
            }
            if let Some(status) = child.try_wait().unwrap() {
                std::thread::sleep(Duration::from_millis(100));
                panic!("the gate did not start ({status}):\n{}", self.log_text());
            }
            assert!(began.elapsed() < Duration::from_secs(60), "the gate is not ready:\n{}", self.log_text());
            std::thread::sleep(Duration::from_millis(10));
        }
        let cgroup = fs::read_to_string(format!("/proc/{}/cgroup", child.id())).unwrap_or_default();
        self.cgroup = cgroup.lines().find_map(|line| line.strip_prefix("0::")).map(PathBuf::from);
        self.process = Some(child);
    }

    /// Starts it, and kills it (SIGKILL) after so long, whatever it is doing then.
    pub fn start_and_kill(&mut self, after: Duration) {
        assert!(self.process.is_none(), "it runs already");
        let mut command = Command::new(binary());
        command.arg("serve").arg("--config").arg(self.setup.config_file());
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(after);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Starts it by way of `wrapper`, a program with arguments that runs what follows them, where it must refuse to
    /// start: its exit code and what it said.
    pub fn refuses_under(&self, wrapper: &[&str]) -> (i32, String) {
        assert!(self.process.is_none(), "it runs");
        let output = Command::new("timeout")
            .arg("60")
            .args(wrapper)
            .arg(binary())
            .arg("serve")
            .arg("--config")
            .arg(self.setup.config_file())
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// Removes the cgroups that a stopped gate leaves: a process cannot remove the one that it is in.
    fn remove_cgroups(&self) {
        let Some(own) = self.cgroup.as_deref().and_then(Path::parent) else { return };
        for tree in ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"] {
            let own = Path::new(tree).join(own.strip_prefix("/").unwrap_or(own));
            for directory in [own.join("gate"), own.join("actions"), own] {
                let _ = fs::remove_dir(directory);
            }
        }
    }

    pub fn logged(&self, wanted: impl Fn(&str) -> bool) -> bool {
        self.log.lock().unwrap().iter().any(|line| wanted(line))
    }

    pub fn log_text(&self) -> String {
        self.log.lock().unwrap().join("\n")
    }

    pub fn pid(&self) -> u32 {
        self.process.as_ref().unwrap().id()
    }

    pub fn directory(&self) -> &Path {
        &self.setup.directory
    }

    pub fn name(&self) -> &str {
        &self.setup.name
    }

    /// The Unix listener called `agent`.
    pub fn agent(&self) -> Target {
        Target::Unix(self.directory().join("agent/gate.sock"))
    }

    pub fn ledger(&self) -> PathBuf {
        self.directory().join("state/ledger")
    }

    /// SIGKILL: nothing is finished, nothing is tidied.
    pub fn kill(&mut self) {
        let mut process = self.process.take().unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
    }

    /// Waits for a process that somebody else has ended.
    pub fn ended(&mut self) {
        self.process.take().unwrap().wait().unwrap();
    }

    /// SIGTERM, and waits for the drain.
    pub fn stop(&mut self) -> i32 {
        let Some(mut process) = self.process.take() else { return 0 };
        let pid = rustix::process::Pid::from_raw(i32::try_from(process.id()).unwrap()).unwrap();
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        process.wait().unwrap().code().unwrap_or(-1)
    }

    /// Runs the command line of the same binary.
    pub fn cli(&self, arguments: &[&str]) -> (i32, String, String) {
        let output = Command::new(binary()).args(arguments).output().unwrap();
        (
            output.status.code().unwrap_or(-1),
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    }

    /// `receipts verify` over this gate's ledger.
    pub fn verify(&self) -> (i32, String, String) {
        let ledger = self.ledger();
        let keys = ledger.join("receipt-keys.json");
        self.cli(&["receipts", "verify", "--ledger", ledger.to_str().unwrap(), "--keys", keys.to_str().unwrap()])
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.stop();
        self.remove_cgroups();
        if std::thread::panicking() {
            eprintln!("--- the gate's log\n{}", self.log_text());
        }
        let _ = fs::remove_dir_all(&self.setup.directory);
        crate::inside::clear(&self.setup.name);
    }
}
