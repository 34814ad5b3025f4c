//! HTTP that the proxy reads: in the clear, and in TLS that it ends with the authority of this start, which clients trust by
//! what their environment names.

use latchgate_tests::origin::{Authority, Origin};
use serde_json::{Value, json};

use super::clients::{Verify, clients};
use super::world::{Archive, LOOPBACK, NETWORKS, Plan, Ran, World, requests};

const NAME: &str = "read.test";
const OTHER: &str = "other.test";

/// Allowed with GET; refused with POST by the proxy, whose answer has the decision id of the record.
fn methods(world: &World, origin: &Origin, url: &str, protocol: &str, site: Option<&Archive>) {
    for client in clients("GET", url, Verify::Environment, site) {
        let ran = world.run("get", &client.argv());
        ran.succeeded("was read 200");
        let flow = ran.one("allow", &json!({"name": NAME, "protocol": protocol}));
        assert_eq!(
            (&flow["name_verified"], &flow["opaque"], &flow["carried"]),
            (&json!("host"), &json!(false), &json!(true)),
            "{}: {ran}",
            client.label
        );
    }
    let before = origin.requests().len();
    for client in clients("POST", url, Verify::Environment, site) {
        let ran = world.run("get", &client.argv());
        ran.succeeded("egress_denied");
        ran.succeeded("403");
        let id = decision_id(&ran);
        let flow = ran.one("deny", &json!({"name": NAME, "decided_by": "proxy", "rule": "method_not_allowed"}));
        assert_eq!(flow["decision_id"], id, "{}: {ran}", client.label);
    }
    assert_eq!(origin.requests().len(), before, "{:?}", origin.requests());
}

fn decision_id(ran: &Ran) -> Value {
    let body = &ran.out[ran.out.find('{').unwrap()..=ran.out.rfind('}').unwrap()];
    serde_json::from_str::<Value>(body).unwrap()["decision_id"].clone()
}

#[test]
fn requests_in_the_clear_are_held_to_name_and_method() {
    let origin = Origin::clear(LOOPBACK, "was read");
    let port = origin.address.port();
    for network in NETWORKS {
        let mut plan = Plan::default()
            .host(NAME)
            .host(OTHER)
            .reaching("get", &[format!("{{domain: {NAME}, ports: [{port}], protocol: http, methods: [GET]}}")]);
        let site = requests();
        if let Some(site) = &site {
            plan = plan.file(site.0.clone());
        }
        let world = plan.start("clear", network);
        methods(&world, &origin, &format!("http://{NAME}:{port}/"), "http", site.as_ref());
        let before = origin.requests().len();
        for client in clients("GET", &format!("http://{OTHER}:{port}/"), Verify::Environment, site.as_ref()) {
            let ran = world.run("get", &client.argv());
            ran.failed();
            ran.any("deny", &json!({"name": OTHER, "decided_by": "resolver"}));
        }
        // TLS where HTTP in the clear is what the entry allows.
        let ran = world.run("get", &["curl", "-sSk", "-m", "20", &format!("https://{NAME}:{port}/")]);
        ran.failed();
        assert_eq!(origin.requests().len(), before, "{:?}", origin.requests());
    }
}

#[test]
fn tls_that_the_proxy_ends_is_trusted_by_the_clients_and_read_by_the_proxy() {
    let authority = Authority::default();
    let origin = Origin::tls(&authority, &[NAME], LOOPBACK, "was read");
    let port = origin.address.port();
    for network in NETWORKS {
        let mut plan = Plan::default()
            .host(NAME)
            .host(OTHER)
            .ca(&authority.pem)
            .reaching("get", &[format!("{{domain: {NAME}, ports: [{port}], tls: terminate, methods: [GET]}}")]);
        let site = requests();
        if let Some(site) = &site {
            plan = plan.file(site.0.clone());
        }
        let world = plan.start("terminate", network);
        methods(&world, &origin, &format!("https://{NAME}:{port}/"), "https", site.as_ref());
        // Not because they trust anything: without the variable the gate's certificate is nobody's.
        let untrusting = format!("unset CURL_CA_BUNDLE SSL_CERT_FILE; exec curl -sS -m 20 https://{NAME}:{port}/");
        assert_eq!(world.shell("get", &untrusting).code, 60);
        let other = world.run("get", &["curl", "-sS", "-m", "20", &format!("https://{OTHER}:{port}/")]);
        assert_eq!(other.code, 6, "{other}");
    }
}

/// The origin of a terminated name is verified as ever: what the proxy vouches for inside is what it has checked.
#[test]
fn an_origin_that_the_proxy_does_not_trust_is_not_vouched_for() {
    let (authority, stranger) = (Authority::default(), Authority::default());
    let origin = Origin::tls(&stranger, &[NAME], LOOPBACK, "never");
    let port = origin.address.port();
    let world = Plan::default()
        .host(NAME)
        .ca(&authority.pem)
        .reaching("get", &[format!("{{domain: {NAME}, ports: [{port}], tls: terminate}}")])
        .start("untrusted", "isolated");
    let ran = world.run("get", &["curl", "-sS", "-m", "20", "-w", " %{http_code}", &format!("https://{NAME}:{port}/")]);
    ran.succeeded(" 502");
    ran.one("allow", &json!({"name": NAME, "error": "tls_certificate"}));
    assert!(origin.requests().is_empty());
}

/// HTTP/2 passes in TLS that is passed through; TLS that the proxy ends offers HTTP/1.1 alone, and clients take that.
#[test]
fn http_2_is_between_client_and_origin_or_not_spoken() {
    let authority = Authority::default();
    let origin = Origin::tls(&authority, &[NAME], LOOPBACK, "over 1.1");
    let asked = Origin::offering(&authority, &[NAME], LOOPBACK, &["h2", "http/1.1"]);
    let (port, asked_port) = (origin.address.port(), asked.address.port());
    let world = Plan::default()
        .host(NAME)
        .ca(&authority.pem)
        .reaching("ended", &[format!("{{domain: {NAME}, ports: [{port}], tls: terminate}}")])
        .reaching("passed", &[format!("{{domain: {NAME}, ports: [{asked_port}]}}")])
        .start("h2", "isolated");
    let alpn = |port: u16, more: &str| {
        format!(
            "import socket, ssl\nc = ssl.create_default_context(); {more}\nc.set_alpn_protocols(['h2', 'http/1.1'])\n\
             s = c.wrap_socket(socket.create_connection(('{NAME}', {port})), server_hostname='{NAME}'); print(s.selected_alpn_protocol())"
        )
    };
    world.python("ended", &alpn(port, "")).succeeded("http/1.1");
    let ran =
        world.run("ended", &["curl", "-sS", "--http2", "-w", " %{http_version}", &format!("https://{NAME}:{port}/")]);
    ran.succeeded("over 1.1 1.1");
    let loose = "c.check_hostname = False; c.verify_mode = ssl.CERT_NONE";
    world.python("passed", &alpn(asked_port, loose)).succeeded("h2");
}
