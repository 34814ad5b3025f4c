//! What a successful answer and its receipt carry, and the receipt's hash and signature computed here, from the bytes.

use std::fs;

use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use base64::Engine as _;
use latchgate_tests::agent::Agent;
use latchgate_tests::{hex, now, sha256};
use serde_json::{Map, Value, json};

use crate::answers::{assert_minted, passed, with_echo};

/// RFC 8785 for what receipts are made of: whole numbers, strings, no floats.
fn jcs(value: &Value) -> String {
    match value {
        Value::Object(members) => {
            let mut names: Vec<&String> = members.keys().collect();
            names.sort_by_key(|name| name.encode_utf16().collect::<Vec<u16>>());
            let inside: Vec<String> = names
                .iter()
                .map(|name| format!("{}:{}", Value::String((*name).clone()), jcs(&members[*name])))
                .collect();
            format!("{{{}}}", inside.join(","))
        }
        Value::Array(items) => format!("[{}]", items.iter().map(jcs).collect::<Vec<_>>().join(",")),
        Value::Number(number) => {
            assert!(!number.is_f64(), "a receipt with a float: {number}");
            number.to_string()
        }
        other => other.to_string(),
    }
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

fn hash_of(receipt: &Map<String, Value>) -> String {
    let mut content = receipt.clone();
    for name in ["result_hash", "receipt_signature", "signature_status"] {
        content.remove(name);
    }
    hex(sha256(jcs(&Value::Object(content))))
}

#[test]
fn an_answer_and_its_receipt_have_every_field() {
    let gate = with_echo("fields").start();
    let agent = Agent::connect(&gate.agent());
    let params = json!({"text": "gr\u{fc}n \u{1f33f}"});
    let executed = passed(&agent.execute("echo", &params));

    assert_eq!(executed["decision"], "executed");
    assert_eq!(executed["action_id"], "echo");
    assert_eq!(executed["output"], params);
    for id in ["trace_id", "grant_id", "receipt_id"] {
        assert_minted(&executed[id]);
    }
    assert_eq!(executed["verification"], json!({"outcome": "unverifiable_declared", "is_fully_successful": true}));
    assert_eq!(executed["verification_outcome"]["status"], "unverifiable_declared");
    assert!(executed["runtime"]["duration_ms"].is_u64() && executed["runtime"]["fuel_consumed"].is_u64());
    assert_eq!(executed["runtime"]["exit_code"], 0);
    assert_eq!(executed["egress"], json!({"connections": 0, "denied": 0, "bytes_sent": 0, "bytes_received": 0}));

    let receipt = passed(&agent.receipt(executed["receipt_id"].as_str().unwrap()));
    let fields = receipt.as_object().unwrap();
    for name in [
        "receipt_id",
        "grant_id",
        "provider_module_digest",
        "provider_receipt",
        "normalized_result",
        "verification_outcome",
        "effect_evidence",
        "result_hash",
        "receipt_signature",
        "signing_key_id",
        "started_at",
        "finished_at",
        "failure_class",
        "principal",
        "session_id",
        "workspace",
        "log_id",
        "decision_id",
        "action_id",
        "action_version",
        "request_hash",
        "policy_version",
        "sequence",
        "prev_receipt_hash",
        "egress_evidence",
        "signature_status",
    ] {
        assert!(fields.contains_key(name), "no {name} in {receipt}");
    }
    for name in ["receipt_id", "grant_id", "action_id", "verification_outcome", "trace_id"] {
        assert_eq!(receipt[name], executed[name], "{name}");
    }
    assert_eq!(receipt["principal"], "tester");
    assert_eq!(receipt["session_id"], agent.session_id.as_str());
    assert_eq!(receipt["workspace"], "default");
    assert_eq!(receipt["action_version"], "1.2.3");
    assert_eq!(receipt["normalized_result"]["kind"], "success");
    assert!(receipt["normalized_result"]["summary"].is_string());
    assert_eq!(receipt["failure_class"], Value::Null);
    assert_eq!(receipt["request_hash"], format!("sha256:{}", hex(sha256(jcs(&params)))));
    for name in ["provider_module_digest", "policy_version"] {
        let text = receipt[name].as_str().unwrap();
        assert!(text.strip_prefix("sha256:").is_some_and(|digits| digits.len() == 64), "{name}: {text}");
    }
    for name in ["started_at", "finished_at"] {
        let shape: String =
            receipt[name].as_str().unwrap().chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
        assert_eq!(shape, "0000-00-00T00:00:00.000Z", "{name}");
    }
    assert!(receipt["started_at"].as_str() <= receipt["finished_at"].as_str());
    uuid::Uuid::parse_str(receipt["log_id"].as_str().unwrap()).unwrap();
    let summary = &receipt["egress_evidence"][0];
    for name in ["kernel", "proxy", "profile_hash", "program_hash", "not_seen", "incomplete"] {
        assert!(!summary[name].is_null(), "{name} in {summary}");
    }
    assert_eq!(summary["not_seen"], json!(["seccomp"]));
    assert_eq!(summary["incomplete"], false);
}

#[test]
fn the_hash_and_the_signature_are_what_the_contract_says() {
    let gate = with_echo("bytes").start();
    let agent = Agent::connect(&gate.agent());
    let keys: Value = serde_json::from_slice(&fs::read(gate.ledger().join("receipt-keys.json")).unwrap()).unwrap();
    let public =
        base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(keys["keys"][0]["x"].as_str().unwrap()).unwrap();
    let mut previous: Option<(u64, String)> = None;
    for _ in 0..2 {
        let executed = passed(&agent.execute("echo", &json!({"text": "\u{e9}\u{1}\"\\"})));
        let receipt = passed(&agent.receipt(executed["receipt_id"].as_str().unwrap()));
        assert_eq!(receipt["signature_status"], "valid");
        let fields = receipt.as_object().unwrap();
        let hash = hash_of(fields);
        assert_eq!(receipt["result_hash"], hash.as_str());
        assert_eq!(receipt["signing_key_id"], &hex(sha256(&public))[..16]);
        let signature = unhex(receipt["receipt_signature"].as_str().unwrap());
        let key = UnparsedPublicKey::new(&ED25519, &public);
        key.verify(format!("latchgate.receipt.v1\n{hash}").as_bytes(), &signature).unwrap();
        key.verify(format!("latchgate.event.v1\n{hash}").as_bytes(), &signature).unwrap_err();
        // Whatever is changed, the hash is another.
        for name in fields
            .keys()
            .filter(|name| !["result_hash", "receipt_signature", "signature_status"].contains(&name.as_str()))
        {
            let mut other = fields.clone();
            other.insert(name.clone(), json!("changed"));
            assert_ne!(hash_of(&other), hash, "{name} is not in the hash");
        }
        let sequence = receipt["sequence"].as_u64().unwrap();
        assert!(
            receipt["prev_receipt_hash"].as_str().is_some_and(|hash| hash.len() == 64),
            "an intent comes before it"
        );
        if let Some((before, hash_before)) = &previous {
            // One intent lies between two receipts, and it is what the second links to.
            assert_eq!(sequence, before + 2);
            assert_ne!(receipt["prev_receipt_hash"], hash_before.as_str());
        }
        previous = Some((sequence, hash));
    }
    let (code, said, _) = gate.verify();
    assert_eq!(code, 0, "{said}");
}

#[test]
fn a_call_whose_client_hangs_up_has_its_receipt() {
    let gate =
        latchgate_tests::gate::Setup::new("hangup").command("slow", "sleep 1; echo '{}'", crate::answers::NONE).start();
    let agent = Agent::connect(&gate.agent());
    let path = "/v1/actions/slow/execute";
    let mut connection = latchgate_tests::http::Connection::open(&gate.agent()).unwrap();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: {}\r\ndpop: {}\r\ncontent-length: 0\r\n\r\n",
        agent.authorization(),
        agent.proof("POST", path)
    );
    connection.send(head.as_bytes()).unwrap();
    // The intent is durable before the action runs: once the ledger has it, the client goes.
    let began = now();
    let records = || gate.verify().1;
    let empty = records();
    while records() == empty {
        assert!(now() - began < 20, "no intent: {empty}");
    }
    drop(connection);
    let mut gate = gate;
    assert_eq!(gate.stop(), 0, "a drain waits for what runs");
    let (code, said, _) = gate.verify();
    assert_eq!(code, 0, "{said}");
    gate.start();
    assert!(!gate.logged(|line| line.contains("left open")), "{}", gate.log_text());
}

#[test]
fn actions_are_listed_described_and_their_schemas_shown() {
    let reachable = crate::answers::Reachable::start();
    let gate = with_echo("views")
        .manifest("medium", &crate::answers::echo("medium", "medium", "declared_side_effects: [notes]"))
        .fetch("fetch", &reachable.egress)
        .config(&reachable.config)
        .start();
    let target = gate.agent();
    let get = |path: &str| passed(&latchgate_tests::http::once(&target, "GET", path, &[], None));
    let mut listed = get("/v1/actions")["actions"].as_array().unwrap().clone();
    listed.sort_by_key(|item| item["action_id"].as_str().unwrap().to_owned());
    assert_eq!(
        listed,
        [
            json!({"action_id": "echo", "version": "1.2.3", "risk_level": "low"}),
            json!({"action_id": "fetch", "version": "1.0.0", "risk_level": "low"}),
            json!({"action_id": "medium", "version": "1.2.3", "risk_level": "medium"}),
        ]
    );
    let detail = get("/v1/actions/medium");
    assert_eq!(detail["action_id"], "medium");
    assert_eq!(detail["version"], "1.2.3");
    assert_eq!(detail["provider_module_digest"], "builtin:command");
    assert_eq!(detail["risk_level"], "medium");
    assert_eq!(detail["declared_side_effects"], json!(["notes"]));
    assert_eq!(detail["egress"], "none");
    assert_eq!(detail["resource_limits"]["memory_mb"], 128);
    assert_eq!(detail["resource_limits"]["timeout_seconds"], 20);
    assert_eq!(
        detail["io"],
        json!({"max_request_bytes": 4096, "max_response_bytes": 65536, "has_request_schema": true, "has_response_schema": false})
    );
    assert!(!detail.to_string().contains("/bin/cat"), "a command line is nobody's to read");
    let fetch = get("/v1/actions/fetch");
    assert_eq!(fetch["provider_module_digest"], "builtin:http_api");
    let domains = fetch["egress"]["proxy_allowlist"]["allowed_domains"].to_string();
    assert!(domains.contains("origin.test"), "{domains}");
    let schema = get("/v1/actions/echo/schema/request");
    assert_eq!(schema["properties"]["text"]["type"], "string");
    assert_eq!(schema["additionalProperties"], false);

    // These routes take no notice of credentials, wrong ones or right ones, and burn no jti.
    let agent = Agent::connect(&target);
    let proof = agent.proof("GET", "/v1/receipts/none");
    let authorization = agent.authorization();
    for path in ["/v1/actions", "/v1/actions/echo", "/v1/actions/echo/schema/request", "/healthz", "/readyz"] {
        for (authorization, proof) in [(authorization.as_str(), proof.as_str()), ("Bearer x", "nonsense")] {
            let headers = [("authorization", authorization), ("dpop", proof)];
            passed(&latchgate_tests::http::once(&target, "GET", path, &headers, None));
        }
    }
    let headers = [("authorization", authorization.as_str()), ("dpop", proof.as_str())];
    let used = || latchgate_tests::http::once(&target, "GET", "/v1/receipts/none", &headers, None);
    crate::answers::refused(&used(), "404 not_found");
    crate::answers::refused(&used(), "401 replay_detected");
}
