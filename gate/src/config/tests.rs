use super::*;

fn load(text: &str, environment: &[(&str, &str)]) -> Result<Config, String> {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join("latchgate.toml");
    std::fs::write(&file, text).expect("written");
    let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    Config::load(Some(&file), environment).map_err(|error| error.to_string())
}

#[test]
fn an_unknown_key_is_refused_with_its_line() {
    let error = load("instance = \"a\"\n\n[egress]\nallow_everything = true\n", &[]).expect_err("refused");
    assert!(error.contains("latchgate.toml"), "{error}");
    assert!(error.contains("line 4"), "{error}");
    assert!(error.contains("allow_everything"), "{error}");
}

#[test]
fn an_unknown_variable_is_refused_by_its_name() {
    let error = load("", &[("LATCHGATE_CONFIG__EGRESS__PERMISSIVE", "true")]).expect_err("refused");
    assert!(error.contains("LATCHGATE_CONFIG__EGRESS__PERMISSIVE"), "{error}");
    assert!(error.contains("permissive"), "{error}");
}

#[test]
fn a_variable_wins_over_the_file_and_others_are_left_alone() {
    let config = load(
        "[auth]\nlease_ttl_seconds = 60\n[egress]\nallow_addresses = [\"10.0.0.0/8\"]\n",
        &[
            ("LATCHGATE_CONFIG__AUTH__LEASE_TTL_SECONDS", "120"),
            ("LATCHGATE_CONFIG__EGRESS__CA_FILE", "/etc/ca.pem"),
            ("PATH", "/bin"),
        ],
    )
    .expect("loads");
    assert_eq!(config.auth.lease_ttl_seconds, 120);
    assert_eq!(config.egress.ca_file.as_deref(), Some(Path::new("/etc/ca.pem")));
    assert_eq!(config.egress.allow_addresses, ["10.0.0.0/8"]);
}

#[test]
fn what_cannot_be_right_does_not_start() {
    for (text, says) in [
        ("auth.lease_ttl_seconds = 3601", "lease_ttl_seconds"),
        ("instance = \"../x\"", "instance"),
        ("state_dir = \"here\"", "state_dir"),
        ("sandbox.uid_base = 0", "uid_base"),
        ("sandbox.uid_base = 4294967295", "uid_count"),
        ("sandbox.max_concurrent = 5000", "max_concurrent"),
        ("[[listeners]]\nname = \"a\"\npath = \"/run/x/a.sock\"", "principal"),
        ("[[listeners]]\nname = \"a\"", "exactly one"),
        ("[[listeners]]\nname = \"a\"\naddress = \"127.0.0.1:1\"\nprincipal = \"p\"", "identity.tcp"),
        ("[[listeners]]\nname = \"a\"\npath = \"/run/x/a.sock\"\nprincipal = \"p\"\nmode = \"999\"", "octal"),
        (
            "[[listeners]]\nname = \"a\"\npath = \"/run/x/a.sock\"\nprincipal = \"p\"\n[listeners.peers]\nroot = \"p\"",
            "numeric",
        ),
        (
            "operators.socket = \"/run/x/o.sock\"\n[[listeners]]\nname = \"a\"\npath = \"/run/x/a.sock\"\nprincipal = \"p\"",
            "share",
        ),
        (
            "operators.socket = \"/run/x/op/o.sock\"\n[[listeners]]\nname = \"a\"\npath = \"/run/x/a.sock\"\nprincipal = \"p\"",
            "share",
        ),
        (
            "state_dir = \"/srv/x/state\"\n[[listeners]]\nname = \"a\"\npath = \"/srv/x/./a.sock\"\nprincipal = \"p\"",
            "state_dir",
        ),
        ("[[listeners]]\nname = \"a\"\npath = \"/srv/y/../x/a.sock\"\nprincipal = \"p\"", ".."),
        ("[[budgets]]\nprincipal = \"*\"\nwindow = \"hour\"", "limits nothing"),
        ("[[budgets]]\nprincipal = \"*\"\nwindow = \"eon\"\nmax_calls = 1", "window"),
    ] {
        let error = load(text, &[]).expect_err(text);
        assert!(error.contains(says), "{text}: {error}");
    }
    // An agent's directory may lie below what is nobody's to mount.
    load(
        "state_dir = \"/srv/x/state\"\noperators.socket = \"/srv/x/operator/o.sock\"\n\
         [[listeners]]\nname = \"a\"\npath = \"/srv/x/a/a.sock\"\nprincipal = \"p\"",
        &[],
    )
    .expect("loads");
}
