//! Sockets of the internet families, and those that only look like it.

use crate::technique::{By, Shown, Technique, nothing_more, walk};
use crate::world::Target;

macro_rules! attacker {
    ($file:literal) => {
        include_str!(concat!("../../escape/", $file, ".py"))
    };
}
pub(crate) use attacker;

pub const BASE: Technique = Technique {
    name: "",
    code: "",
    with: "{}",
    action: "nothing",
    said: "EPERM",
    by: By::Seccomp,
    shown: Shown::ByTheTarget,
    guards: &[],
    needs: &[],
};

/// The handshake needs both directions of packets.
pub const CONNECT4: &[&str] = &["connect4", "egress", "ingress"];
const CONNECT6: &[&str] = &["connect6", "egress", "ingress"];

pub const TABLE: &[Technique] = &[
    Technique {
        name: "tcp v4",
        code: attacker!("tcp_v4"),
        by: By::Hook("connect4", "profile_none"),
        guards: CONNECT4,
        ..BASE
    },
    Technique {
        name: "tcp v6",
        code: attacker!("tcp_v6"),
        by: By::Hook("connect6", "profile_none"),
        guards: CONNECT6,
        ..BASE
    },
    Technique {
        name: "tcp v4-mapped",
        code: attacker!("tcp_mapped"),
        by: By::Hook("connect6", "profile_none"),
        guards: CONNECT6,
        ..BASE
    },
    Technique {
        name: "tcp v4, with names",
        code: attacker!("tcp_v4"),
        action: "names",
        by: By::Hook("connect4", "not_in_profile"),
        guards: CONNECT4,
        ..BASE
    },
    Technique {
        name: "tcp again after AF_UNSPEC",
        code: attacker!("tcp_unspec"),
        action: "names",
        by: By::Hook("connect4", "not_in_profile"),
        guards: CONNECT4,
        ..BASE
    },
    Technique {
        name: "tcp fast open",
        code: attacker!("tcp_fast_open"),
        by: By::Hook("connect4", "profile_none"),
        guards: CONNECT4,
        // With a cookie of an earlier connection the data goes with the first packet.
        needs: &["ingress"],
        ..BASE
    },
    Technique {
        name: "udp v4",
        code: attacker!("udp_v4_sendto"),
        by: By::Hook("sendmsg4", "profile_none"),
        guards: &["sendmsg4", "egress"],
        ..BASE
    },
    Technique {
        name: "udp v6",
        code: attacker!("udp_v6_sendto"),
        by: By::Hook("sendmsg6", "profile_none"),
        guards: &["sendmsg6", "egress"],
        ..BASE
    },
    Technique {
        name: "udp v4-mapped",
        code: attacker!("udp_mapped_sendto"),
        by: By::Hook("sendmsg4", "profile_none"),
        guards: &["sendmsg4", "egress"],
        ..BASE
    },
    Technique {
        name: "udp v4, connected",
        code: attacker!("udp_v4_connected"),
        by: By::Hook("connect4", "profile_none"),
        guards: &["connect4", "egress"],
        ..BASE
    },
    Technique {
        name: "udp v6, connected",
        code: attacker!("udp_v6_connected"),
        by: By::Hook("connect6", "profile_none"),
        guards: &["connect6", "egress"],
        ..BASE
    },
    Technique {
        name: "udp v6, connected to a v4 address",
        code: attacker!("udp_v6_connected_by_v4"),
        by: By::Hook("connect4", "profile_none"),
        // Its datagrams are sent to an address of the other family, which is a hook of its own.
        guards: &["connect4", "sendmsg4", "egress"],
        ..BASE
    },
    Technique {
        name: "udp to another than its peer",
        code: attacker!("udp_rebound"),
        action: "names",
        by: By::Hook("sendmsg4", "datagram"),
        guards: &["sendmsg4", "egress"],
        ..BASE
    },
    Technique {
        name: "mptcp",
        code: attacker!("mptcp"),
        guards: &["seccomp:socket_families", "socket_kind", "connect4", "egress", "ingress"],
        ..BASE
    },
    Technique {
        name: "udp-lite",
        code: attacker!("udplite"),
        guards: &["seccomp:socket_families", "socket_kind", "sendmsg4", "egress"],
        ..BASE
    },
    Technique {
        name: "sctp",
        code: attacker!("sctp"),
        guards: &["seccomp:socket_families", "socket_kind", "connect4", "egress", "ingress"],
        ..BASE
    },
    Technique {
        name: "io_uring",
        code: attacker!("io_uring"),
        with: r#"{"polled": false}"#,
        guards: &["seccomp:io_uring", "connect4", "egress", "ingress"],
        ..BASE
    },
    Technique {
        name: "io_uring, polled by the kernel",
        code: attacker!("io_uring"),
        with: r#"{"polled": true}"#,
        guards: &["seccomp:io_uring", "connect4", "egress", "ingress"],
        ..BASE
    },
    Technique {
        name: "listening, and answering",
        code: attacker!("inbound"),
        said: "timeout",
        by: By::Hook("ingress", "profile_none"),
        guards: &["ingress", "egress"],
        ..BASE
    },
    Technique {
        name: "raw icmp",
        code: attacker!("raw_icmp"),
        guards: &["seccomp:socket_families", "socket_kind", "user_namespace", "capabilities", "egress"],
        ..BASE
    },
    Technique {
        name: "raw ip",
        code: attacker!("raw_header"),
        guards: &["seccomp:socket_families", "socket_kind", "user_namespace", "capabilities", "egress"],
        ..BASE
    },
    Technique {
        name: "frames",
        code: attacker!("packet"),
        guards: &["seccomp:socket_families", "user_namespace", "capabilities"],
        ..BASE
    },
    Technique {
        name: "netlink",
        code: attacker!("netlink"),
        shown: Shown::ByItself,
        guards: &["seccomp:socket_families"],
        ..BASE
    },
    Technique {
        name: "vsock",
        code: attacker!("vsock"),
        shown: Shown::ByItself,
        guards: &["seccomp:socket_families"],
        ..BASE
    },
    Technique {
        name: "xdp",
        code: attacker!("xdp"),
        shown: Shown::ByItself,
        guards: &["seccomp:socket_families", "user_namespace", "capabilities"],
        ..BASE
    },
    Technique {
        name: "alg",
        code: attacker!("alg"),
        shown: Shown::ByItself,
        guards: &["seccomp:socket_families"],
        ..BASE
    },
];

#[test]
fn no_socket_gets_out() {
    walk(&Target::start(), TABLE, &nothing_more());
}
