//! The gate's test of itself, where it is a sidecar.

use latchgate_tests::bundle::{Container, Pod, missing};
use latchgate_tests::http::once;
use latchgate_tests::inside::verified;
use latchgate_tests::operator::{heard, operate, with_operator};
use serde_json::{Value, json};

use super::setup;

#[test]
fn it_tries_itself_before_it_serves_and_whenever_it_is_asked() {
    if missing() {
        return;
    }
    let pod = Pod::new("selftest");
    for network in ["isolated", "shared"] {
        let name = format!("pod-selftest-{network}");
        let setup =
            setup(&name, None).config(&format!("[egress]\nselftest = \"start\"\n[sandbox]\nnetwork = \"{network}\"\n"));
        let setup = with_operator(setup);
        let container = Container::gate(&setup.directory);
        let gate = pod.contain(setup, network, &container).start();
        let ready = once(&gate.agent(), "GET", "/readyz", &[], None);
        assert_eq!((ready.status, ready.json()), (200, json!({"status": "ready"})), "{}", gate.log_text());
        heard(&gate);
        for (arguments, asked_by) in
            [(["egress", "selftest", "--last"].as_slice(), "start"), (&["egress", "selftest"], "tester")]
        {
            let (code, out, err) = operate(&gate, arguments);
            let result: Value = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}"));
            assert_eq!((code, &result["outcome"]), (0, &json!("passed")), "{result:#}");
            assert_eq!((&result["asked_by"], &result["conditions"]["network"]), (&json!(asked_by), &json!(network)));
            let findings = result["findings"].as_array().unwrap();
            let with =
                |outcome: &str| findings.iter().filter(|finding| finding["outcome"] == outcome).collect::<Vec<_>>();
            assert_eq!(with("escaped").len() + with("inconclusive").len(), 0, "{result:#}");
            eprintln!("{network}: {} refused, not applicable: {:#?}", with("refused").len(), with("not_applicable"));
            // What no kernel lacks.
            for technique in [
                "tcp_v4",
                "tcp_v6",
                "udp_sendto_v4",
                "udp_rebound_v4",
                "inbound",
                "dns_udp",
                "name_other_port",
                "unix_path",
                "bpf",
                "signal",
                "cgroup_move",
                "state_directory",
            ] {
                let refused = with("refused").iter().any(|finding| finding["technique"] == technique);
                assert!(refused, "{technique}: {result:#}");
            }
        }
        verified(&gate);
    }
}
