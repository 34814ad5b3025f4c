//! What one query of one execution is answered.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::books::{Books, Counts};
use super::message::{CLASS_IN, Malformed, Query, TYPE_A, TYPE_AAAA, TYPE_ANY, TYPE_HTTPS, TYPE_SVCB, Transport};
use super::table::{NameTable, Unnamed};
use super::{Execution, ReachError, Shared};
use crate::egress::LeafId;
use crate::egress::flow::{FlowRecord, Verdict};
use crate::egress::profile::{AUDIT_PORTS, DenyReason, Name, NameError, Profile};
use crate::guards::{self, Guard};

/// An execution that asks. Nothing here has a way to ask anybody else.
pub struct Asking {
    leaf: LeafId,
    execution: Execution,
    table: Arc<NameTable>,
    shared: Arc<Shared>,
    books: Mutex<Books>,
    over: watch::Sender<bool>,
    /// Whether the log has heard that a name got no address.
    warned: AtomicBool,
}

/// What a query comes to.
enum Judgement {
    Address(Ipv4Addr),
    /// The same for a name that is let through and recorded.
    Audited(Ipv4Addr, DenyReason),
    NoData,
    Refused(&'static str),
    Failed(&'static str),
}

impl Asking {
    pub fn new(leaf: LeafId, execution: Execution, shared: Arc<Shared>) -> Self {
        let limits = &shared.limits;
        Self {
            leaf,
            execution,
            table: Arc::new(NameTable::new(limits.names_per_execution)),
            books: Mutex::new(Books::new(limits)),
            over: watch::Sender::new(false),
            warned: AtomicBool::new(false),
            shared,
        }
    }

    pub const fn leaf(&self) -> LeafId {
        self.leaf
    }

    pub const fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub const fn table(&self) -> &Arc<NameTable> {
        &self.table
    }

    /// Answers one message; `None` where nothing may be sent back.
    pub fn answer(&self, message: &[u8], transport: Transport, client: SocketAddr) -> Option<Vec<u8>> {
        let mut books = self.books();
        if books.closed {
            return None;
        }
        books.counts.queries += 1;
        let within_rate = books.within_rate();
        let query = match Query::parse(message) {
            Ok(query) => query,
            Err(Malformed { why, reply }) => {
                books.counts.malformed += 1;
                self.refuse(&mut books, None, "dns_malformed", client);
                let reply = reply.filter(|_| within_rate);
                tracing::debug!(execution_id = self.execution.execution_id, %client, why, "a DNS message was refused");
                books.counts.dropped += u64::from(reply.is_none());
                return reply.map(|reply| reply.to_bytes(transport));
            }
        };
        if !within_rate {
            books.counts.over_rate += 1;
            books.counts.refused += 1;
            // No name: at such a rate they are what is being carried.
            let text = explain("dns_rate", &self.refuse(&mut books, None, "dns_rate", client));
            return Some(query.refused(&text).to_bytes(transport));
        }
        let text;
        let reply = match self.judge(&query) {
            Judgement::Address(address) => {
                books.counts.answered += 1;
                query.address(address)
            }
            Judgement::Audited(address, reason) => {
                books.counts.answered += 1;
                self.note(&mut books, Verdict::WouldDeny, Some(query.printed()), reason.as_str(), client);
                query.address(address)
            }
            Judgement::NoData => {
                books.counts.answered += 1;
                query.no_data()
            }
            Judgement::Refused(rule) => {
                books.counts.refused += 1;
                text = explain(rule, &self.refuse(&mut books, Some(query.printed()), rule, client));
                query.refused(&text)
            }
            Judgement::Failed(rule) => {
                books.counts.failed += 1;
                text = explain(rule, &self.refuse(&mut books, Some(query.printed()), rule, client));
                query.failed(&text)
            }
        };
        Some(reply.to_bytes(transport))
    }

    /// Notes something that is no message at all.
    pub fn note_malformed(&self, client: SocketAddr) {
        let mut books = self.books();
        if !books.closed {
            books.counts.queries += 1;
            books.counts.malformed += 1;
            books.counts.dropped += 1;
            self.refuse(&mut books, None, "dns_malformed", client);
        }
    }

    /// Ends the service: nothing is answered from now on.
    pub fn end(&self) {
        self.over.send_replace(true);
        self.books().closed = true;
    }

    /// Ends the service and gives what is to be kept of it.
    pub fn close(&self) -> (Vec<FlowRecord>, Counts) {
        self.end();
        let mut books = self.books();
        (books.take(), books.counts)
    }

    /// Returns once the execution is over.
    pub async fn over(&self) {
        // The sender lives in `self`, so that the only end is the one that is waited for.
        let _ = self.over.subscribe().wait_for(|over| *over).await;
    }

    /// Whether the name is the profile's, at any port: a query does not say which one it is for.
    fn judge(&self, query: &Query<'_>) -> Judgement {
        if query.class() != CLASS_IN {
            return Judgement::Refused("dns_class_not_allowed");
        }
        let Permitted { name, ports, would_deny } = match permitted(&self.execution.profile, query.host()) {
            Ok(permitted) => permitted,
            Err(reason) => return Judgement::Refused(reason.as_str()),
        };
        match query.kind() {
            // RFC 8482 §4.1: to ANY, one of the types will do.
            TYPE_A | TYPE_ANY => {}
            // No AAAA: only stand-ins of v4 are carried. No HTTPS: without it a client has neither hints of addresses to
            // go to, nor a key with which to hide the name that it goes to.
            TYPE_AAAA | TYPE_HTTPS | TYPE_SVCB => return Judgement::NoData,
            _ => return Judgement::Refused("dns_type_not_allowed"),
        }
        let ready = |address| self.shared.reach.reach(self.leaf, address, &ports);
        match self.table.stand_in_once(&name, ready) {
            Ok(address) => match would_deny {
                None => Judgement::Address(address),
                Some(reason) => Judgement::Audited(address, reason),
            },
            Err(Unnamed::Full) => Judgement::Refused("dns_names_per_execution"),
            Err(Unnamed::NotReady(ReachError(why))) => {
                // A client that asks for a thousand more is not to fill the log.
                if !self.warned.swap(true, Ordering::Relaxed) {
                    tracing::warn!(execution_id = self.execution.execution_id, %name, why, "a name got no address");
                }
                Judgement::Failed("kernel_refused")
            }
        }
    }

    fn refuse(&self, books: &mut Books, name: Option<String>, rule: &'static str, client: SocketAddr) -> String {
        self.note(books, Verdict::Deny, name, rule, client)
    }

    fn note(
        &self,
        books: &mut Books,
        verdict: Verdict,
        name: Option<String>,
        rule: &'static str,
        client: SocketAddr,
    ) -> String {
        books.note(&self.execution, &self.shared.flows, verdict, (name, rule), client)
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A name that is answered.
struct Permitted {
    name: Name,
    /// Those that may be connected to.
    ports: Vec<u16>,
    /// Set when no entry has it.
    would_deny: Option<DenyReason>,
}

/// The name, if the profile has it at any port, and the ports that it has it at.
fn permitted(profile: &Profile, host: Option<String>) -> Result<Permitted, DenyReason> {
    if profile.is_none() {
        return Err(DenyReason::NoEgress);
    }
    let host = host.ok_or(DenyReason::InvalidName)?;
    let name = Name::parse(&host).map_err(|error| match error {
        NameError::AddressLiteral => DenyReason::AddressLiteral,
        _ => DenyReason::InvalidName,
    })?;
    // The name that is answered is the one that was asked for, and not what a parser of URLs makes of it.
    if name.as_str() != host {
        return Err(DenyReason::InvalidName);
    }
    let named =
        profile.entries().iter().filter(|entry| entry.pattern().matches(&name) || !guards::on(Guard::ResolverNames));
    let mut ports: Vec<u16> = named.flat_map(|entry| entry.ports().iter().copied()).collect();
    let would_deny = ports.is_empty().then_some(DenyReason::NameNotAllowed);
    ports.extend(AUDIT_PORTS.iter().filter(|&&port| profile.audits(name.as_str(), port).is_ok()));
    ports.sort_unstable();
    ports.dedup();
    if ports.is_empty() { Err(DenyReason::NameNotAllowed) } else { Ok(Permitted { name, ports, would_deny }) }
}

/// The EXTRA-TEXT of a refusal.
pub fn explain(rule: &str, decision_id: &str) -> String {
    format!("refused by LatchGate: {rule}; decision {decision_id}")
}
