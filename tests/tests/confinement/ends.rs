//! How an action can end, and that each end has its answer and its receipt.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use latchgate_tests::agent::Agent;
use latchgate_tests::gate::{Gate, Setup};
use latchgate_tests::inside::{inside, leaves, missing, outside, python, receipt, refused, with_code};
use latchgate_tests::{hex, sha256};
use serde_json::json;

use crate::NOTHING;

/// An action with limits of its own; `argv` in YAML, as `command` has it.
fn limited(id: &str, command: &str, memory_mb: u64, timeout_seconds: u64, max_response_bytes: u64) -> String {
    format!(
        "action_id: {id}\nversion: \"1.0.0\"\nprovider_module_digest: builtin:command\ncommand: {command}\n\
         io: {{request_schema: {{type: object}}, max_request_bytes: 65536, max_response_bytes: {max_response_bytes}}}\n\
         resource_limits: {{memory_mb: {memory_mb}, timeout_seconds: {timeout_seconds}}}\negress: {NOTHING}\n\
         risk_level: low\nverifier_kind: none\n"
    )
}

#[test]
fn every_end_has_its_answer_and_its_receipt() {
    if missing(&["/usr/bin/python3"]) {
        return;
    }
    let run = json!({"argv": ["/bin/sh", "-c", python()]}).to_string();
    let gate = Setup::new("ends")
        .manifest("small", &limited("small", &run, 128, 20, 100_000))
        .manifest("large", &limited("large", &run, 2048, 20, 1_000_000))
        .manifest("short", &limited("short", &run, 128, 1, 100_000))
        .start();
    let agent = Agent::connect(&gate.agent());
    let bomb = "import os\nwhile True: os.fork()";
    // The action, what it does, and the failure class; then the action under which the same succeeds.
    let cases = [
        ("small", "print('\"' + 'a' * 200_000 + '\"')", "provider_failure", "output_too_large", Some("large")),
        ("small", "print('[' + '\"\",' * 10_000_000)", "provider_failure", "output_too_large", None),
        ("short", "import time; time.sleep(3); print(1)", "timeout", "timeout", Some("small")),
        ("short", "import signal, time; signal.signal(15, lambda *_: 0); time.sleep(60)", "timeout", "timeout", None),
        ("small", "x = bytearray(512 << 20); print(1)", "provider_failure", "exit_code", Some("large")),
        ("short", bomb, "", "", None),
        ("small", "print('hello')", "provider_failure", "output_not_json", None),
        ("small", "print('{} {}')", "provider_failure", "output_not_json", None),
        ("small", "pass", "provider_failure", "output_not_json", None),
        ("small", "print('{}'); sys.exit(3)", "provider_failure", "exit_code", None),
        ("small", "import os; print('{}', flush=True); os.kill(os.getpid(), 9)", "provider_failure", "signal", None),
    ];
    for (action, code, kind, class, succeeds) in cases {
        let began = Instant::now();
        let response = agent.execute(action, &with_code(code, &json!({})));
        let answer = refused(&response, "502 action_execution_failed");
        assert!(answer["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{code}: {answer}");
        assert!(answer["output"].is_null() && answer["decision_id"].is_string());
        assert!(began.elapsed() < Duration::from_secs(20), "{code}: {:?}", began.elapsed());
        let receipt = receipt(&agent, &answer);
        if code == bomb {
            // It may run out of processes or of time first.
            let kind = receipt["normalized_result"]["kind"].as_str().unwrap();
            assert!(["timeout", "provider_failure"].contains(&kind), "{kind}");
        } else {
            assert_eq!(
                (&receipt["normalized_result"]["kind"], &receipt["failure_class"]),
                (&json!(kind), &json!(class)),
                "{code}"
            );
        }
        assert_eq!(receipt["verification_outcome"]["status"], "provider_failed_before_verification", "{code}");
        assert_eq!(receipt["action_id"], action);
        assert_eq!(leaves(&gate), Vec::<std::path::PathBuf>::new(), "{code}");
        if let Some(other) = succeeds {
            let (_, receipt) = inside(&agent, other, code, &json!({}));
            assert_eq!(receipt["normalized_result"]["kind"], "success", "{code}");
        }
    }
    // What is within the limits passes, whatever came before.
    let within = "import time; time.sleep(0.1); x = bytearray(16 << 20); print('\"' + 'a' * 50_000 + '\"')";
    let (output, receipt) = inside(&agent, "small", within, &json!({}));
    assert_eq!(output.as_str().unwrap().len(), 50_000);
    assert_eq!(receipt["normalized_result"]["kind"], "success");
    assert_eq!(gate.verify().0, 0);
}

#[test]
fn processes_are_counted() {
    if missing(&["/usr/bin/python3"]) {
        return;
    }
    const FORKS: &str = "
import errno, json, os, signal, time
children, why = [], 'limit'
while len(children) < 300:
    try:
        pid = os.fork()
    except OSError as error:
        why = errno.errorcode[error.errno]
        break
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    children.append(pid)
for pid in children:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
print(json.dumps([len(children), why]))
";
    let gate = Setup::new("forks").command("forks", &python(), NOTHING).start();
    let agent = Agent::connect(&gate.agent());
    // Two at a time: each is counted by itself.
    std::thread::scope(|scope| {
        for call in [(); 2].map(|()| scope.spawn(|| inside(&agent, "forks", FORKS, &json!({})).0)) {
            // The program itself is the sixty-fourth.
            assert_eq!(call.join().unwrap(), json!([63, "EAGAIN"]));
        }
    });
    assert_eq!(outside(FORKS, &json!({})), json!([300, "limit"]));
}

#[test]
fn a_sealed_file_is_what_was_hashed_or_does_not_run() {
    if missing(&["/usr/bin/python3", "/bin/sh"]) {
        return;
    }
    let setup = Setup::new("sealed");
    let (interpreter, script) = (setup.directory.join("interpreter"), setup.directory.join("script"));
    fs::copy("/bin/sh", &interpreter).unwrap();
    fs::write(&script, "echo '\"first\"'\n").unwrap();
    let digest = |path: &Path| hex(sha256(fs::read(path).unwrap()));
    let files = [&interpreter, &script].map(|path| json!({"path": path, "sha256": digest(path)}));
    let sealed = json!({"argv": [interpreter, script], "files": files}).to_string();
    let open = json!({"argv": ["/bin/sh", "-c", "cat"]}).to_string();
    let mut gate = setup
        .manifest("sealed", &limited("sealed", &sealed, 128, 20, 100_000))
        .manifest("open", &limited("open", &open, 128, 20, 100_000))
        .start();
    let call = |gate: &Gate| {
        let agent = Agent::connect(&gate.agent());
        let answer = agent.execute("sealed", &json!({})).json();
        let receipt = receipt(&agent, &answer);
        assert_eq!(answer["output"], "first", "{answer}");
        receipt["provider_module_digest"].as_str().unwrap().to_owned()
    };
    let ran = call(&gate);
    let listed: Vec<String> = [&interpreter, &script]
        .map(|path| format!("{{\"path\":\"{}\",\"sha256\":\"sha256:{}\"}}", path.display(), digest(path)))
        .into();
    assert_eq!(ran, format!("sha256:{}", hex(sha256(format!("[{}]", listed.join(","))))));

    for (changed, to) in [(&script, "echo '\"second\"'\n"), (&interpreter, "#!/bin/sh\necho '\"second\"'\n")] {
        let was = fs::read(changed).unwrap();
        // Under a gate that has hashed it: the copy runs.
        fs::write(changed, to).unwrap();
        assert_eq!(call(&gate), ran);
        // Before a gate has hashed it: nothing runs.
        gate.stop();
        gate.start();
        let agent = Agent::connect(&gate.agent());
        let response = agent.execute("sealed", &json!({}));
        let answer = refused(&response, "502 action_execution_failed");
        assert!(!answer.to_string().contains("second"), "{answer}");
        let refusal = receipt(&agent, &answer);
        assert_eq!(refusal["normalized_result"]["kind"], "internal_error");
        // It is that file alone: others run, and so does it once it is what it was.
        assert_eq!(agent.execute("open", &json!({"a": 1})).json()["output"], json!({"a": 1}));
        fs::write(changed, was).unwrap();
        assert_eq!(call(&gate), ran);
    }
    assert_eq!(gate.verify().0, 0);
}
