//! What must hold for any DNS message of a sandbox, over both transports: nothing fails, no answer is longer than it may
//! be, and an address is only ever given to a name of the profile. The fuzz target asks it of bytes that it makes up, and
//! an ordinary test asks it of the corpus.
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, OnceLock};

use latchgate::egress::LeafId;
use latchgate::egress::names::message::Query;
use latchgate::egress::names::{DnsServer, Execution, Limits, OpenNames, Reach, ReachError, Transport};
use latchgate::egress::profile::{DEFAULT_PORTS, Entry, Pattern, Profile};

struct Anywhere;

impl Reach for Anywhere {
    fn reach(&self, _: LeafId, _: Ipv4Addr, _: &[u16]) -> Result<(), ReachError> {
        Ok(())
    }
}

fn names() -> &'static OpenNames {
    static NAMES: OnceLock<(DnsServer, OpenNames)> = OnceLock::new();
    let (_, names) = NAMES.get_or_init(|| {
        let limits = Limits { queries_burst: u32::MAX, queries_per_second: u32::MAX, ..Limits::default() };
        let server = DnsServer::new(limits, Arc::new(Anywhere));
        let entry = Entry::new(Pattern::parse("example.com").expect("a name"), DEFAULT_PORTS);
        let execution = Execution {
            execution_id: "e".into(),
            action_id: "a".into(),
            principal: "p".into(),
            workspace: "w".into(),
            profile: Arc::new(Profile::allowlist([entry])),
        };
        let names = server.open(LeafId(1), execution);
        (server, names)
    });
    names
}

pub fn dns_message(message: &[u8]) {
    let client = SocketAddr::from((Ipv4Addr::LOCALHOST, 40000));
    for (transport, limit) in [(Transport::Udp, 1232), (Transport::Tcp, 65535)] {
        let Some(answer) = names().answer(message, transport, client) else {
            assert!(message.len() < 12 || message[2] & 0x80 != 0);
            continue;
        };
        assert!((12..=limit).contains(&answer.len()));
        assert!(answer[..2] == message[..2] && answer[2] & 0x80 != 0);
        if answer[7] != 0 {
            let host = Query::parse(message).ok().and_then(|query| query.host()).expect("a name");
            assert!(host == "example.com" || host.ends_with(".example.com"), "{host}");
        }
    }
}
