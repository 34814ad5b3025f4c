//! What the container must be given: each thing is taken away, and the gate says which it was and does not start.

use latchgate_tests::agent::Agent;
use latchgate_tests::bundle::{CAPABILITIES, Container, Pod, extra_calls, missing, seccomp_without};
use latchgate_tests::inside::inside;
use serde_json::json;

use super::setup;

/// Starts a gate that must refuse to, in a container that is almost the one that it needs.
fn refusal(pod: &Pod, id: &str, config: &str, change: impl FnOnce(Container) -> Container) -> String {
    let setup = setup(&format!("needs-{id}"), None).config(config);
    let container = change(Container::gate(&setup.directory));
    let (code, said) = pod.contain(setup, id, &container).refuse();
    assert_eq!(code, 1, "{id}: {said}");
    assert!(!said.contains(" ready"), "{id}: {said}");
    said
}

#[test]
fn each_capability_is_needed_and_is_named_when_it_is_not_there() {
    if missing() {
        return;
    }
    let pod = Pod::new("caps");
    for capability in CAPABILITIES {
        let id = capability.to_lowercase().replace('_', "-");
        let said = refusal(&pod, &id, "", |container| container.without_capability(capability));
        for other in CAPABILITIES {
            assert_eq!(said.contains(other), other == capability, "{other} of {said}");
        }
    }
}

#[test]
fn each_system_call_beyond_the_runtime_s_own_is_needed() {
    if missing() {
        return;
    }
    let pod = Pod::new("calls");
    let calls = extra_calls();
    assert!(calls.len() > 5, "{calls:?}");
    for call in calls {
        let id = format!("no-{}", call.replace('_', "-"));
        // Where a network namespace may be left out, one wall is left in its place; here both are asked for.
        let said = refusal(&pod, &id, "[sandbox]\nnetwork = \"isolated\"\n", |container| {
            container.with_seccomp(Some(seccomp_without(Some(&call))))
        });
        let errno = if call == "clone3" { "Function not implemented" } else { "Operation not permitted" };
        assert!(said.contains(errno), "{call}: {said}");
    }
}

#[test]
fn under_the_runtime_s_own_profile_nothing_starts_and_the_profile_is_named() {
    if missing() {
        return;
    }
    let pod = Pod::new("plain");
    let said = refusal(&pod, "plain", "", |container| container.with_seccomp(Some(seccomp_without(None))));
    assert!(said.contains("no leaf can be made") && said.contains("seccomp profile"), "{said}");
    let said = refusal(&pod, "pinned", "[egress]\nattach = \"pinned\"\n", |container| container);
    assert!(said.contains("bpffs"), "{said}");
}

#[test]
fn a_cgroup_that_is_named_or_not_even_mounted_is_found() {
    if missing() {
        return;
    }
    let pod = Pod::new("found");
    for (id, config, mounted) in [
        ("named", "[sandbox]\ncgroup = \"/sys/fs/cgroup\"\n", true),
        ("unmounted", "", false),
        ("multi", "[egress]\nattach = \"multi\"\n", true),
    ] {
        let setup = setup(&format!("found-{id}"), None).config(config);
        let container = Container { cgroup_mount: mounted, ..Container::gate(&setup.directory) };
        let gate = pod.contain(setup, id, &container).start();
        let agent = Agent::connect(&gate.agent());
        let code = "print(json.dumps(7))";
        assert_eq!(inside(&agent, "python", code, &json!({})).0, 7, "{id}");
    }
    // Another cgroup than that of the gate cannot be had through a mount of its own.
    let said = refusal(&pod, "absent", "[sandbox]\ncgroup = \"/sys/fs/cgroup/other\"\n", |container| container);
    assert!(said.contains("/sys/fs/cgroup/other"), "{said}");
}
