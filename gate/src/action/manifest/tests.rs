use serde_json::json;

use super::*;
use crate::egress::profile::{DenyReason, Form, NOT_ENFORCED};

const HTTP: &str = r#"action_id: read_one
version: "1.2.0"
provider_module_digest: builtin:http_api
template:
  method: GET
  url_template: "https://api.example.com/v1/{{id}}"
  headers: { Accept: application/json }
io:
  request_schema:
    type: object
    required: [id]
    additionalProperties: false
    properties: { id: { type: string, maxLength: 20 } }
  max_request_bytes: 4096
  max_response_bytes: 65536
resource_limits: { memory_mb: 64, timeout_seconds: 5, max_io_calls: 1, fuel: 7 }
egress:
  profile: proxy_allowlist
  allowed_domains: [api.example.com]
risk_level: low
verifier_kind: http_status
declared_side_effects: [http_read]
tags: [test]
"#;

const COMMAND: &str = r#"action_id: run_one
version: "1"
provider_module_digest: builtin:command
command:
  argv: [/usr/bin/python3, /opt/tool.py, --json]
  env: { LANG: C.UTF-8 }
  files:
    - path: /opt/tool.py
      sha256: e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
egress: { profile: none }
risk_level: medium
"#;

fn parse(text: &str) -> Result<Manifest, ManifestError> {
    Manifest::parse(text, None)
}

/// A manifest that differs from another in one piece of text.
fn replaced(text: &str, from: &str, to: &str) -> Result<Manifest, ManifestError> {
    assert!(text.contains(from), "{from:?} is not in the manifest");
    parse(&text.replace(from, to))
}

fn params(value: Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

#[test]
fn an_http_manifest_is_read() {
    let manifest = parse(HTTP).unwrap();
    assert_eq!(manifest.warnings, []);
    assert_eq!(manifest.provider(), "builtin:http_api");
    assert_eq!(manifest.required_scopes, ["tools:call"]);
    let none_of_its_own = replaced(HTTP, "tags: [test]", "required_scopes: []").unwrap();
    assert!(none_of_its_own.required_scopes.is_empty());
    assert_eq!(manifest.risk_level, RiskLevel::Low);
    assert_eq!(manifest.limits.timeout_seconds, 5);
    assert_eq!(manifest.limits.max_host_response_bytes, ResourceLimits::default().max_host_response_bytes);
    assert_eq!(manifest.cost_usd_cents, 0);
    assert!(manifest.validate(&json!({"id": "x"})).is_ok());
    assert_eq!(manifest.validate(&json!({"id": 1})).unwrap_err().pointer, "/id");
    let call = manifest.prepare(&params(json!({"id": "a/b"}))).unwrap();
    assert_eq!(call.targets(), [("api.example.com".to_owned(), 443)]);
    assert_eq!(targets(&manifest, &params(json!({"id": "x"}))).unwrap(), call.targets());
    assert_eq!(manifest.permits(&call), Ok(()));
}

#[test]
fn a_command_manifest_is_read() {
    let manifest = parse(COMMAND).unwrap();
    assert_eq!(manifest.provider(), "builtin:command");
    assert!(manifest.profile.is_none());
    let Prepared::Command { command, stdin } = manifest.prepare(&params(json!({"b": 1, "a": "{{x}}"}))).unwrap() else {
        panic!()
    };
    assert_eq!(command.argv, ["/usr/bin/python3", "/opt/tool.py", "--json"]);
    assert_eq!(command.files[0].path, Path::new("/opt/tool.py"));
    assert_eq!(command.root, RootFilesystem::Host);
    assert_eq!(serde_json::from_slice::<Value>(&stdin).unwrap(), json!({"a": "{{x}}", "b": 1}));
    for (rootfs, root) in [
        ("host", RootFilesystem::Host),
        ("empty", RootFilesystem::Empty),
        ("/srv/root", RootFilesystem::Directory("/srv/root".into())),
    ] {
        let manifest = replaced(COMMAND, "  env:", &format!("  rootfs: {rootfs}\n  stdin: none\n  env:")).unwrap();
        let Call::Command(command) = &manifest.call else { panic!() };
        assert_eq!((&command.root, command.stdin), (&root, Stdin::None));
    }
}

#[test]
fn the_views_are_the_contracts() {
    let manifest = parse(HTTP).unwrap();
    assert_eq!(manifest.list_item(), json!({"action_id": "read_one", "version": "1.2.0", "risk_level": "low"}));
    let detail = manifest.detail();
    let expected = json!({
        "action_id": "read_one", "version": "1.2.0", "provider_module_digest": "builtin:http_api", "risk_level": "low",
        "resource_limits": {
            "memory_mb": 64, "timeout_seconds": 5, "max_io_calls": 1, "fuel": 7, "max_host_response_bytes": 4_194_304
        },
        "io": {
            "max_request_bytes": 4096, "max_response_bytes": 65536, "has_request_schema": true,
            "has_response_schema": false
        },
        "egress": {"proxy_allowlist": {"allowed_domains": ["api.example.com"]}},
        "declared_side_effects": ["http_read"],
    });
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&detail[key], value, "{key}");
    }
    assert_eq!(manifest.request_schema_view()["required"], json!(["id"]));
    let command = parse(COMMAND).unwrap();
    assert_eq!(command.detail()["egress"], json!("none"));
    assert_eq!(command.request_schema_view(), json!({"type": "object"}));
}

#[test]
fn what_is_wrong_is_told_with_its_line() {
    let github = "provider_module_digest: builtin:http_api";
    for (from, to, line, part) in [
        ("action_id: read_one", "action_id: \"../x\"", Some(1), "action_id"),
        ("action_id: read_one", "action_id: \"\"", Some(1), "action_id"),
        ("version: \"1.2.0\"", "version: \"\"", Some(2), "version"),
        (github, "provider_module_digest: builtin:fs", Some(3), "builtin:fs"),
        (github, "provider_module_digest: http_api", Some(3), "http_api"),
        (github, &format!("provider_module_digest: sha256:{}", "a".repeat(64)), Some(3), "WebAssembly"),
        (github, "provider_module_digest: builtin:command", Some(5), "template belongs to builtin:http_api"),
        ("method: GET", "method: TRACE", Some(5), "TRACE"),
        ("/v1/{{id}}", "/v1/{{id", Some(5), "not closed"),
        ("https://api", "gopher://api", Some(5), "must begin with"),
        ("{ Accept: application/json }", "{ Host: evil.example }", Some(5), "the gate's to set"),
        ("type: object", "type: objekt", Some(10), "io.request_schema"),
        ("type: object", "$ref: https://example.com/s", Some(10), "leaves the schema"),
        ("max_request_bytes: 4096", "max_request_bytes: 0", None, "max_request_bytes"),
        ("max_request_bytes: 4096", "max_request_bytes: -1", Some(14), ""),
        ("timeout_seconds: 5", "timeout_seconds: 100000", None, "timeout_seconds"),
        ("memory_mb: 64", "memory_mb: lots", Some(16), ""),
        ("profile: proxy_allowlist", "profile: open", Some(18), "open"),
        ("profile: proxy_allowlist", "profile: none", Some(19), "reaches nothing"),
        ("[api.example.com]", "[\"*.com\"]", Some(19), "public suffix"),
        ("[api.example.com]", "[10.0.0.1]", Some(19), "address"),
        ("[api.example.com]", "[api.example.com.]", Some(19), "dot"),
        ("[api.example.com]", "[{domain: api.example.com, port: 443}]", Some(19), "port"),
        ("risk_level: low", "risk_level: none", Some(20), "none"),
        ("verifier_kind: http_status", "verifier_kind: database", Some(21), "database"),
        ("tags: [test]", "required_scopes: [\"Tools:Call\"]", Some(23), "space:name"),
        ("tags: [test]", "tags: [test]\ntags: [again]", Some(24), "duplicate"),
        ("tags: [test]", "verification_config: { expected_status: [99] }", None, "99"),
        ("tags: [test]", "cost_usd_cents: -1", Some(23), ""),
        ("tags: [test]", "command: { argv: [/bin/true] }", Some(23), "command belongs"),
        ("tags: [test]", "tags: [test", Some(23), ""),
    ] {
        let error = replaced(HTTP, from, to).unwrap_err();
        assert!(error.what.contains(part), "{to}: {error}");
        // Where the parser noticed may be a line past the place, at the end of the text.
        assert!(error.line == line || (part.is_empty() && error.line.is_some()), "{to}: {error}");
    }
    for text in ["", "[]", "x", "action_id: a", "\u{0}"] {
        assert!(parse(text).is_err(), "{text:?}");
    }
    assert!(parse(&format!("{HTTP}# {}", "x".repeat(MAX_MANIFEST_BYTES))).is_err());
}

#[test]
fn what_cannot_be_enforced_yet_does_not_load() {
    let domain = |entry: &str| ("[api.example.com]", format!("[{{{entry}}}]"), Some(19));
    let egress = |line: &str| ("risk_level: low", format!("  {line}\nrisk_level: low"), Some(20));
    let form = |form: Form| match form {
        Form::Terminate => "domain: api.example.com, tls: terminate",
        Form::Tcp => "domain: api.example.com, protocol: tcp, ports: [5432], exact: true",
        Form::Http => "domain: api.example.com, protocol: http",
        Form::Methods => "domain: api.example.com, methods: [GET]",
        Form::Cidr => "cidr: 10.0.0.0/8, ports: [5432], protocol: tcp",
    };
    let forms = NOT_ENFORCED.iter().map(|&wanted| (domain(form(wanted)), wanted.name()));
    let never = [(egress("on_unresolved: hold"), "on_unresolved: hold")];
    for ((from, to, line), part) in forms.chain(never) {
        let error = replaced(HTTP, from, &to).unwrap_err();
        assert!(error.what.contains("not enforced yet"), "{to}: {error}");
        // An entry with two such forms is refused for one of them.
        assert!(error.what.contains(part) || to.contains("cidr"), "{to}: {error}");
        assert_eq!(error.line, line, "{to}: {error}");
    }
    let error = replaced(COMMAND, "{ profile: none }", "{ profile: none, allowed_methods: [GET] }").unwrap_err();
    assert!(error.what.contains("allowed_methods for builtin:command is not enforced yet"), "{error}");
    for (from, to, _) in [egress("on_unresolved: deny"), egress("mode: enforce")] {
        assert!(replaced(HTTP, from, &to).is_ok(), "{to}");
    }
}

#[test]
fn audit_is_asked_for_and_not_there_before_it_is_permitted() {
    let text = HTTP.replace("risk_level: low", "  mode: unsafe_audit\nrisk_level: low");
    let manifest = parse(&text).unwrap();
    assert!(manifest.asks_for_audit && !manifest.profile.is_audit());
    let error = replaced(COMMAND, "{ profile: none }", "{ profile: none, mode: unsafe_audit }").unwrap_err();
    assert!(error.what.contains("profile none lets nothing"), "{error}");
}

#[test]
fn entries_that_contradict_each_other_do_not_load() {
    let error = replaced(HTTP, "[api.example.com]", "[api.example.com, {domain: api.example.com, protocol: tls}]");
    let error = error.unwrap_err();
    assert!(error.what.contains("`api.example.com:80,443` and `api.example.com:80,443 tls`"), "{error}");
    assert_eq!(error.line, Some(19));
    assert!(replaced(HTTP, "[api.example.com]", "[example.com, {domain: api.example.com, protocol: tls}]").is_ok());
}

#[test]
fn a_call_is_held_to_the_protocol_of_its_entry() {
    let text = HTTP.replace("[api.example.com]", "[{domain: api.example.com, protocol: tls}]");
    let manifest = parse(&text.replace("https://api", "http://api")).unwrap();
    let call = manifest.prepare(&params(json!({"id": "x"}))).unwrap();
    assert_eq!(manifest.permits(&call).unwrap_err().reason, DenyReason::ProtocolNotAllowed);
    let manifest = parse(&text).unwrap();
    assert_eq!(manifest.permits(&manifest.prepare(&params(json!({"id": "x"}))).unwrap()), Ok(()));
}

/// docs/manifests.md against the table of keys and the list of what is not enforced.
#[test]
fn the_documentation_has_every_key_and_no_other() {
    let text = include_str!("../../../../docs/manifests.md");
    let mut documented: Vec<String> = text
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`').map(|(key, _)| key.to_owned()))
        .collect();
    let twice = documented.len();
    documented.sort();
    documented.dedup();
    assert_eq!(documented.len(), twice, "a key is there twice");
    // A section stands in the rows of its keys.
    let sections = ["io", "resource_limits", "egress", "verification_config"];
    let mut known: Vec<String> = keys::paths().into_iter().filter(|path| !sections.contains(&path.as_str())).collect();
    known.sort();
    assert_eq!(documented, known);
    for line in text.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").collect();
        assert!(cells.len() == 3 && cells.iter().all(|cell| !cell.trim().is_empty()), "{line}");
    }

    let list = text.split("## Not enforced yet").nth(1).unwrap();
    let mut listed: Vec<&str> = list.lines().filter_map(|line| line.strip_prefix("- ")).collect();
    let mut refused: Vec<&str> = NOT_ENFORCED.iter().map(|form| form.name()).collect();
    refused.extend(["egress.on_unresolved: hold", "allowed_methods for builtin:command"]);
    listed.sort_unstable();
    refused.sort_unstable();
    assert_eq!(listed, refused);
}

/// The defaults that docs/manifests.md names.
#[test]
fn the_documented_defaults_are_the_defaults() {
    let text = include_str!("../../../../docs/manifests.md");
    let limits = ResourceLimits::default();
    let io = super::raw::RawIo::default();
    for (key, value) in [
        ("io.max_request_bytes", io.max_request_bytes),
        ("io.max_response_bytes", io.max_response_bytes),
        ("resource_limits.memory_mb", limits.memory_mb),
        ("resource_limits.timeout_seconds", limits.timeout_seconds),
        ("resource_limits.max_io_calls", limits.max_io_calls),
        ("resource_limits.fuel", limits.fuel),
        ("resource_limits.max_host_response_bytes", limits.max_host_response_bytes),
        ("cost_usd_cents", 0),
    ] {
        assert!(text.contains(&format!("| `{key}` | {value} |")), "{key}: {value}");
    }
}

#[test]
fn a_required_secret_waits_until_there_are_secrets() {
    let secret = |required: &str| {
        let text = format!("secrets:\n  - name: API_TOKEN\n{required}risk_level: low");
        replaced(HTTP, "risk_level: low", &text)
    };
    for required in ["    required: true\n", "", "    required: true\n    inject: { header: Authorization }\n"] {
        let error = secret(required).unwrap_err();
        assert_eq!(error.line, Some(21), "{error}");
        assert!(error.what.contains("API_TOKEN") && error.what.contains("cannot give secrets"), "{error}");
    }
    let manifest = secret("    required: false\n").unwrap();
    assert_eq!(manifest.secret_names(), ["API_TOKEN"]);
    assert!(manifest.warnings[0].what.contains("API_TOKEN"));
    assert!(secret("    required: false\n    inject: { heade: x }\n").is_err());
}

#[test]
fn unknown_keys_are_warnings_with_their_line() {
    let text = HTTP
        .replace("risk_level: low", "provider_source: http_api.wasm\nrisk_level: low")
        .replace("  max_request_bytes", "  maximum: 1\n  max_request_bytes");
    let manifest = parse(&text).unwrap();
    let said: Vec<(Option<u64>, &str)> = manifest.warnings.iter().map(|w| (w.line, w.what.as_str())).collect();
    assert_eq!(said, [(Some(14), "unknown key \"io.maximum\""), (Some(21), "unknown key \"provider_source\"")]);
    // Inside what only this gate has, a misspelling could widen something: not a warning.
    assert!(replaced(COMMAND, "  env:", "  enviroment: {}\n  env:").is_err());
    assert!(replaced(COMMAND, "    - path", "    - mode: 1\n      path").is_err());
}

#[test]
fn commands_take_nothing_from_params_and_name_whole_paths() {
    for (from, to) in [
        ("[/usr/bin/python3, /opt/tool.py, --json]", "[]"),
        ("[/usr/bin/python3, /opt/tool.py, --json]", "[python3]"),
        ("[/usr/bin/python3, /opt/tool.py, --json]", "[/usr/../bin/python3]"),
        ("--json", "\"--name={{name}}\""),
        ("--json", "\"a\\0b\""),
        ("LANG: C.UTF-8", "\"LA=NG\": x"),
        ("LANG: C.UTF-8", "\"1A\": x"),
        ("LANG: C.UTF-8", "A: \"{{a}}\""),
        ("path: /opt/tool.py", "path: opt/tool.py"),
        ("path: /opt/tool.py", "path: /opt/../tool.py"),
        ("e3b0c442", "E3B0C442"),
        ("e3b0c442", "e3b0"),
        ("  env:", "  rootfs: /\n  env:"),
        ("  env:", "  rootfs: root\n  env:"),
        ("  env:", "  stdin: \"{{a}}\"\n  env:"),
        ("command:", "kommand:"),
    ] {
        assert!(replaced(COMMAND, from, to).is_err(), "{to}");
    }
}

#[test]
fn methods_are_held_to_where_they_are_named() {
    let with =
        |methods: &str| replaced(HTTP, "risk_level: low", &format!("  allowed_methods: {methods}\nrisk_level: low"));
    assert!(with("[GET, HEAD]").is_ok());
    assert!(with("[get]").is_ok());
    assert!(with("[POST]").unwrap_err().what.contains("does not have the template's GET"));
    assert!(with("[]").is_err());
    assert!(with("[CONNECT]").is_err());
    // Where the params say the method, the call is checked.
    let start = HTTP.find("template:").unwrap();
    let end = HTTP.find("io:").unwrap();
    let text =
        format!("{}{}", &HTTP[..start], &HTTP[end..]).replace("risk_level", "  allowed_methods: [GET]\nrisk_level");
    let manifest = parse(&text).unwrap();
    let decide =
        |value: Value| manifest.permits(&manifest.prepare(&params(value)).unwrap()).map_err(|denied| denied.reason);
    assert_eq!(decide(json!({"url": "https://api.example.com/"})), Ok(()));
    assert_eq!(decide(json!({"url": "https://api.example.com/", "method": "PUT"})), Err(DenyReason::MethodNotAllowed));
    assert_eq!(decide(json!({"url": "https://evil.example/"})), Err(DenyReason::NameNotAllowed));
    assert_eq!(decide(json!({"url": "https://api.example.com:22/"})), Err(DenyReason::PortNotAllowed));
    assert_eq!(decide(json!({"url": "https://127.0.0.1/"})), Err(DenyReason::AddressLiteral));
    assert_eq!(decide(json!({"url": "https://[::1]/"})), Err(DenyReason::AddressLiteral));
}

#[test]
fn the_digest_is_over_content_and_not_over_layout() {
    let digest = |text: &str| parse(text).unwrap().digest().to_owned();
    assert_eq!(digest(HTTP), digest(&format!("# a comment\n{HTTP}\n\n")));
    assert_eq!(digest(HTTP), digest(&HTTP.replace("[http_read]", "\n  - http_read")));
    for (from, to) in [("1.2.0", "1.2.1"), ("/v1/", "/v2/"), ("maxLength: 20", "maxLength: 21"), ("[test]", "[other]")]
    {
        assert_ne!(digest(HTTP), digest(&HTTP.replace(from, to)), "{to}");
    }
    assert!(digest(HTTP).starts_with("sha256:"));
}

#[test]
fn what_is_left_out_is_the_careful_choice() {
    let manifest = parse("action_id: a\nversion: \"1\"\nprovider_module_digest: builtin:http_api\n").unwrap();
    assert_eq!(manifest.risk_level, RiskLevel::High);
    assert_eq!(manifest.required_scopes, ["tools:call"]);
    assert!(manifest.profile.is_none());
    let call = manifest.prepare(&params(json!({"url": "https://example.com/"}))).unwrap();
    assert_eq!(manifest.permits(&call).unwrap_err().reason, DenyReason::NoEgress);
}

#[test]
fn yaml_means_what_yaml_1_2_says() {
    let manifest = replaced(HTTP, "[test]", "[no, on, yes]").unwrap();
    assert_eq!(manifest.tags, ["no", "on", "yes"]);
    // Aliases that unfold without end are stopped by the parser.
    let bomb = format!("{HTTP}a: &a [x, x, x, x, x, x, x, x, x]\n")
        + &(0..9)
            .map(|i| {
                format!(
                    "b{i}: &b{i} [{}]\n",
                    vec![if i == 0 { "*a".to_owned() } else { format!("*b{}", i - 1) }; 9].join(", ")
                )
            })
            .collect::<String>();
    assert!(parse(&bomb).is_err());
}

#[test]
fn params_that_the_schema_does_not_let_in_are_noticed() {
    let manifest = replaced(HTTP, "{{id}}", "{{id}}/{{other}}").unwrap();
    assert!(manifest.warnings[0].what.contains("{{other}}"), "{:?}", manifest.warnings);
}

#[test]
fn outcomes_are_verified_by_status_and_members() {
    let output = |status: u64| json!({"ok": true, "data": {"status_code": status}});
    let verifier = |expected: &[u16], fields: &[&str]| Verifier::HttpStatus {
        expected_status: expected.to_vec(),
        required_fields: fields.iter().map(|field| (*field).to_owned()).collect(),
    };
    let verified =
        |verifier: Verifier, output: &Value| matches!(verifier.verify(output), Verification::Verified { .. });
    assert!(verified(verifier(&[], &["ok", "data"]), &output(204)));
    assert!(!verified(verifier(&[], &[]), &output(404)));
    assert!(verified(verifier(&[404], &[]), &output(404)));
    assert!(!verified(verifier(&[404], &[]), &output(200)));
    assert!(!verified(verifier(&[], &["missing"]), &output(200)));
    assert!(!verified(verifier(&[], &[]), &json!({"ok": false})));
    assert!(!verified(verifier(&[], &[]), &json!({"data": {"status_code": "200"}})));
    assert_eq!(Verifier::None.verify(&output(500)), Verification::UnverifiableDeclared);
}

#[test]
fn a_param_that_is_left_out_has_its_default() {
    let with = |default: &str| {
        let text = HTTP.replace("/v1/{{id}}", "/v1?q={{id}}&start={{start}}").replace(
            "maxLength: 20 } }",
            &format!("maxLength: 20 }}, start: {{ type: integer, default: {default} }} }}"),
        );
        parse(&text)
    };
    let manifest = with("10").unwrap();
    let url = |value: Value| match manifest.prepare(&params(value)).unwrap() {
        Prepared::Http(call) => call.url,
        other => panic!("{other:?}"),
    };
    assert_eq!(url(json!({"id": "x"})), "https://api.example.com/v1?q=x&start=10");
    assert_eq!(url(json!({"id": "x", "start": 3})), "https://api.example.com/v1?q=x&start=3");
    assert!(manifest.prepare(&params(json!({"start": 3}))).is_err());
    assert!(with("ten").unwrap_err().what.contains("the default of \"start\""));
}

/// In the form of manifests that are in the field: imports, fuel, tags, an optional secret, schemas written out.
#[test]
fn a_manifest_from_the_field_loads_unchanged() {
    let text = r#"
action_id: "tracker_create"
tags: ["agent", "team"]
version: "1.0.0"
provider_module_digest: "builtin:http_api"
required_imports:
  - "latchgate:io/http"
  - "latchgate:io/log"
template:
  method: POST
  url_template: "https://api.example.com/projects/{{owner}}/{{name}}/issues"
  headers:
    Accept: "application/vnd.example.v3+json"
  body_template:
    title: "{{title}}"
    body: "{{body}}"
io:
  request_schema:
    type: object
    properties:
      owner: { type: string, minLength: 1 }
      name: { type: string, minLength: 1 }
      title: { type: string, minLength: 1, maxLength: 256, description: "Issue title." }
      body: { type: string, maxLength: 65536 }
    required: [owner, name, title]
    additionalProperties: false
  response_schema:
    type: object
    required: [ok]
    properties:
      ok: { type: boolean }
  max_request_bytes: 65536
  max_response_bytes: 1048576
resource_limits:
  fuel: 5000000
  memory_mb: 128
  timeout_seconds: 30
  max_io_calls: 5
egress:
  profile: "proxy_allowlist"
  allowed_domains:
    - "api.example.com"
    - "*.s3.eu-west-1.amazonaws.com"
secrets:
  - name: "TRACKER_TOKEN"
    required: false
risk_level: "medium"
verifier_kind: http_status
verification_config:
  required_fields: ["ok", "data"]
declared_side_effects:
  - "http_write"
"#;
    let manifest = parse(text).unwrap();
    let call = manifest.prepare(&params(json!({"owner": "o", "name": "n", "title": "t \" x"}))).unwrap();
    let Prepared::Http(http) = &call else { panic!() };
    assert_eq!(http.url, "https://api.example.com/projects/o/n/issues");
    assert_eq!(http.body.as_deref(), Some(r#"{"title":"t \" x"}"#));
    assert_eq!(manifest.permits(&call), Ok(()));
    assert_eq!(manifest.response_schema.as_ref().map(|s| s.validate(&json!({"ok": true})).is_ok()), Some(true));
}
