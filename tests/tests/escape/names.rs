//! Names: what the resolver and the proxy hold an action to.

use crate::network::{BASE, CONNECT4, attacker};
use crate::technique::{By, Technique, nothing_more, walk};
use crate::world::Target;

const NAMED: Technique = Technique { action: "names", code: attacker!("by_name"), ..BASE };

pub const TABLE: &[Technique] = &[
    Technique {
        name: "a tunnel of names",
        code: attacker!("dns_query"),
        with: r#"{"over": "udp"}"#,
        said: "rcode 5",
        by: By::Rule("resolver", "name_not_allowed"),
        guards: &["dns", "egress"],
        ..NAMED
    },
    Technique {
        name: "a tunnel of names over tcp",
        code: attacker!("dns_query"),
        with: r#"{"over": "tcp"}"#,
        said: "rcode 5",
        by: By::Rule("resolver", "name_not_allowed"),
        guards: CONNECT4,
        ..NAMED
    },
    Technique {
        name: "a name that is not the profile's",
        with: r#"{"name": "no.escape.test", "stands_for": "v4", "at": 4000, "speaks": "tcp"}"#,
        said: "no name",
        by: By::Rule("resolver", "name_not_allowed"),
        guards: &["resolver_names", "proxy_names"],
        ..NAMED
    },
    Technique {
        name: "that name, asked of the proxy",
        code: attacker!("by_proxy"),
        with: r#"{"name": "no.escape.test"}"#,
        said: "403",
        by: By::Rule("proxy", "name_not_allowed"),
        guards: &["proxy_names"],
        ..NAMED
    },
    Technique {
        name: "names over tls, of a server with a name",
        with: r#"{"name": "no.escape.test", "stands_for": "v4", "at": 4000, "speaks": "tls"}"#,
        said: "no name",
        by: By::Rule("resolver", "name_not_allowed"),
        guards: &["resolver_names", "proxy_names"],
        ..NAMED
    },
    Technique {
        name: "a name of the profile at another port",
        with: r#"{"name": "yes.escape.test", "stands_for": "v4", "at": 4003, "speaks": "tcp"}"#,
        by: By::Hook("connect4", "not_in_profile"),
        guards: &["reach", "proxy_names"],
        ..NAMED
    },
    Technique {
        name: "a name whose address is not public",
        with: r#"{"name": "inner.escape.test", "stands_for": "other_v4", "at": 4000, "speaks": "tcp"}"#,
        said: "refused",
        by: By::Rule("proxy", "address_not_public:private"),
        guards: &["address_class"],
        ..NAMED
    },
    Technique {
        name: "fronting in the hello",
        with: r#"{"name": "tls.escape.test", "stands_for": "v4", "at": 4001, "speaks": "tls"}"#,
        said: "refused",
        by: By::Rule("proxy", "sni_mismatch"),
        guards: &["sni"],
        ..NAMED
    },
    Technique {
        name: "fronting in the request",
        with: r#"{"name": "web.escape.test", "stands_for": "v4", "at": 4002, "speaks": "http"}"#,
        said: "refused",
        by: By::Rule("proxy", "host_mismatch"),
        guards: &["host"],
        ..NAMED
    },
];

#[test]
fn no_name_leads_elsewhere() {
    walk(&Target::start(), TABLE, &nothing_more());
}
