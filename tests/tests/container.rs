//! The gate as a sidecar has it: uid 0 with four capabilities, no_new_privs, its own seccomp profile, a read-only cgroup
//! mount, no bpffs, a PID namespace of its own; the agent in a second container, with the socket's directory read-only.

#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used)]

#[path = "container/crash.rs"]
mod crash;
#[path = "container/holds.rs"]
mod holds;
#[path = "container/needs.rs"]
mod needs;
#[path = "container/selftest.rs"]
mod selftest;

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::PermissionsExt;

use latchgate_tests::bundle::{Container, Pod};
use latchgate_tests::gate::{Gate, Setup};
use latchgate_tests::inside::python;
use latchgate_tests::origin::{Authority, Origin};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const NAME: &str = "origin.test";

/// A gate in a container of a pod, with an origin on the pod's network.
struct Scene {
    gate: Gate,
    pod: Pod,
    origin: Origin,
}

/// Actions: `python` with no way out, `allowed` with the origin in its profile, `fetch` with the same over HTTP, `slow`.
fn setup(name: &str, origin: Option<(&Origin, &Authority)>) -> Setup {
    let setup = Setup::new(name);
    // A directory as a volume of the pod is: the agent's uid may enter it, and only the gate's may write.
    let sockets = setup.directory.join("agent");
    fs::create_dir(&sockets).unwrap();
    fs::set_permissions(&sockets, fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&setup.directory, fs::Permissions::from_mode(0o755)).unwrap();
    let setup = setup.config("mode = \"0666\"\n").roomy_command("python", &python(), "{profile: none}", 1024).command(
        "slow",
        "sleep 300 & sleep 300",
        "{profile: none}",
    );
    let Some((origin, authority)) = origin else { return setup };
    fs::write(setup.directory.join("ca.pem"), &authority.pem).unwrap();
    let port = origin.address.port();
    let profile = format!("{{profile: proxy_allowlist, allowed_domains: [{{domain: {NAME}, ports: [{port}]}}]}}");
    setup
        .config(&format!(
            "[egress]\nca_file = \"{{dir}}/ca.pem\"\nallow_addresses = [\"127.0.0.1/32\"]\n[egress.hosts]\n\"{NAME}\" = [\"127.0.0.1\"]\n"
        ))
        .roomy_command("allowed", &python(), &profile, 1024)
        .fetch("fetch", &profile)
}

fn scene(name: &str) -> Scene {
    scene_with(name, Pod::contain)
}

fn scene_with(name: &str, contain: impl FnOnce(&Pod, Setup, &str, &Container) -> Setup) -> Scene {
    let authority = Authority::default();
    let pod = Pod::new(name);
    let origin = pod.inside(|| Origin::tls(&authority, &[NAME], LOOPBACK, "hello"));
    let setup = setup(name, Some((&origin, &authority)));
    let container = Container::gate(&setup.directory);
    let gate = contain(&pod, setup, "gate", &container).start();
    Scene { gate, pod, origin }
}
