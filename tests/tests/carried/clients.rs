//! What people use, over TLS that is passed through: clients, allowed and forbidden, in both networks.

use latchgate_tests::origin::{Authority, Origin};
use serde_json::json;

use super::world::{Archive, LOOPBACK, NETWORKS, Plan, World, has_node, requests};

const NAME: &str = "origin.carried.test";
const OTHER: &str = "other.carried.test";

pub struct Client {
    pub label: &'static str,
    pub argv: Vec<String>,
}

impl Client {
    fn new(label: &'static str, argv: &[&str]) -> Self {
        Self { label, argv: argv.iter().map(|one| (*one).to_owned()).collect() }
    }

    pub fn argv(&self) -> Vec<&str> {
        self.argv.iter().map(String::as_str).collect()
    }
}

/// Whether clients verify certificates: with what their environment names, or not at all.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Verify {
    Environment,
    Nothing,
}

/// Each asks for `url` with `method`, prints the status code and what it got, and fails if it gets no answer.
pub fn clients(method: &str, url: &str, verify: Verify, site: Option<&Archive>) -> Vec<Client> {
    let nothing = verify == Verify::Nothing;
    let mut curl = vec!["curl", "-sS", "-m", "20", "-X", method, "-w", " %{http_code}"];
    if nothing {
        curl.push("-k");
    }
    let with = |more: &[&'static str]| [&curl[..], more, &[url]].concat();
    let context = if nothing { "ssl._create_unverified_context()" } else { "ssl.create_default_context()" };
    let urllib = format!(
        "import ssl, urllib.request as u, urllib.error as e\n\
         try: r = u.urlopen(u.Request('{url}', method='{method}'), context={context}, timeout=20)\n\
         except e.HTTPError as error: r = error\n\
         print(r.read().decode(), r.status)"
    );
    let mut clients = vec![
        Client::new("curl, TLS 1.3 if it can", &with(&["--http1.1"])),
        Client::new("curl, TLS 1.2", &with(&["--tls-max", "1.2"])),
        Client::new("curl, HTTP/2 if it can", &with(&["--http2"])),
        Client::new("Python urllib", &["/usr/bin/python3", "-c", &urllib]),
    ];
    if let Some(site) = site {
        let path = format!("PYTHONPATH={}", site.0.display());
        let code = format!(
            "import requests; r = requests.request('{method}', '{url}', timeout=20, verify={}); print(r.text, r.status_code)",
            if nothing { "False" } else { "True" }
        );
        clients.push(Client::new("Python requests", &["env", &path, "/usr/bin/python3", "-W", "ignore", "-c", &code]));
    }
    if has_node() {
        let loose = if nothing { "process.env.NODE_TLS_REJECT_UNAUTHORIZED = '0'; " } else { "" };
        let node = format!(
            "{loose}fetch('{url}', {{method: '{method}'}}).then(async r => console.log(await r.text(), r.status), \
             e => {{ console.error(e.cause || e); process.exit(1); }})"
        );
        clients.push(Client::new("Node fetch", &["/usr/bin/node", "-e", &node]));
    }
    clients
}

struct Stage {
    world: World,
    origin: Origin,
    other: Origin,
    site: Option<Archive>,
}

fn stage(network: &str) -> Stage {
    let authority = Authority::default();
    let origin = Origin::tls(&authority, &[NAME], LOOPBACK, "carried");
    let other = Origin::tls(&authority, &[OTHER], LOOPBACK, "never");
    let site = requests();
    let mut plan = Plan::default()
        .host(NAME)
        .host(OTHER)
        .action("alone", "{profile: none}")
        .reaching("run", &[format!("{{domain: {NAME}, ports: [{}]}}", origin.address.port())]);
    if let Some(site) = &site {
        plan = plan.file(site.0.clone());
    }
    Stage { world: plan.start("clients", network), origin, other, site }
}

#[test]
fn an_allowed_name_is_reached_and_the_receipt_says_what_was_seen() {
    for network in NETWORKS {
        let Stage { world, origin, site, .. } = stage(network);
        let url = format!("https://{NAME}:{}/", origin.address.port());
        for client in clients("GET", &url, Verify::Nothing, site.as_ref()) {
            let ran = world.run("run", &client.argv());
            ran.succeeded("carried 200");
            let flow = ran.one("allow", &json!({"name": NAME, "sni": NAME, "carried": true}));
            // Passed through: what is inside was not seen, and the receipt says so.
            assert_eq!((&flow["opaque"], &flow["name_verified"]), (&json!(true), &json!("sni")), "{}", client.label);
            assert_eq!(ran.evidence[0]["incomplete"], false, "{}: {ran}", client.label);
            // A client may hang up before it has read the origin's last record; the receipt then says that they differ.
            let (kernel, proxy) = (&ran.evidence[0]["kernel"], &ran.evidence[0]["proxy"]);
            let equal = ["bytes_sent", "bytes_received"].iter().all(|side| kernel[side] == proxy[side]);
            assert_eq!(ran.evidence[0]["agreement"] == "equal", equal, "{}: {ran}", client.label);
            assert_eq!(kernel["bytes_sent"], proxy["bytes_sent"], "{}: {ran}", client.label);
        }
    }
}

#[test]
fn another_name_has_no_address_and_nobody_hears_of_it() {
    for network in NETWORKS {
        let Stage { world, other, site, .. } = stage(network);
        let url = format!("https://{OTHER}:{}/", other.address.port());
        for client in clients("GET", &url, Verify::Nothing, site.as_ref()) {
            let ran = world.run("run", &client.argv());
            ran.failed();
            ran.nothing_allowed();
            ran.any("deny", &json!({"name": OTHER, "decided_by": "resolver", "rule": "name_not_allowed"}));
        }
        assert!(other.requests().is_empty(), "{:?}", other.requests());
    }
}

#[test]
fn an_address_and_another_port_are_refused_at_once_by_the_kernel() {
    for network in NETWORKS {
        let Stage { world, origin, other, site } = stage(network);
        let (port, other_port) = (origin.address.port(), other.address.port());
        for url in [format!("https://127.0.0.1:{port}/"), format!("https://{NAME}:{other_port}/")] {
            for client in clients("GET", &url, Verify::Nothing, site.as_ref()) {
                let ran = world.run("run", &client.argv());
                ran.failed();
                ran.nothing_allowed();
                ran.any("deny", &json!({"decided_by": "hook"}));
                let said = ran.err.to_lowercase();
                let named = ["operation not permitted", "eperm", "couldn't connect", "could not connect"];
                assert!(named.iter().any(|word| said.contains(word)), "{} in {network}: {ran}", client.label);
            }
        }
        assert!(origin.requests().is_empty() && other.requests().is_empty());
    }
}

#[test]
fn a_profile_of_none_has_no_names_at_all() {
    for network in NETWORKS {
        let Stage { world, origin, .. } = stage(network);
        let url = format!("https://{NAME}:{}/", origin.address.port());
        for client in clients("GET", &url, Verify::Nothing, None) {
            let ran = world.run("alone", &client.argv());
            ran.failed();
            ran.nothing_allowed();
        }
        assert!(origin.requests().is_empty());
    }
}
