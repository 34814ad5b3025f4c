//! An operator of a test's gate: keys in its directory, and the command line with them.

use std::time::{Duration, Instant};

use latchgate::auth::operator_key::OperatorKeyFile;
use serde_json::Value;

use crate::gate::{Gate, Setup};

/// Gives a gate the operator `tester`.
pub fn with_operator(setup: Setup) -> Setup {
    let key = OperatorKeyFile::load_or_create(&setup.directory.join("operator.json"), "tester").unwrap();
    setup.config(&format!(
        "[[operators.keys]]\nname = \"tester\"\ndpop_jkt = \"{}\"\napi_key_hash = \"{}\"\n",
        key.jkt(),
        key.api_key_hash()
    ))
}

/// Runs a command of the operator's: exit code, output, errors.
pub fn operate(gate: &Gate, arguments: &[&str]) -> (i32, String, String) {
    let (socket, key) = (gate.directory().join("operator/operator.sock"), gate.directory().join("operator.json"));
    let mut all = arguments.to_vec();
    all.extend(["--socket", socket.to_str().unwrap(), "--key", key.to_str().unwrap()]);
    gate.cli(&all)
}

/// Waits until operators are heard: a gate that has just begun to remember proofs takes none that could be older.
pub fn heard(gate: &Gate) {
    let began = Instant::now();
    while operate(gate, &["status"]).0 != 0 {
        assert!(began.elapsed() < Duration::from_secs(20), "operators are refused: {}", gate.log_text());
        std::thread::sleep(Duration::from_millis(300));
    }
}

/// The JSON lines of a command that must succeed.
pub fn lines(gate: &Gate, arguments: &[&str]) -> Vec<Value> {
    let (code, out, err) = operate(gate, arguments);
    assert_eq!(code, 0, "{err}");
    out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}
