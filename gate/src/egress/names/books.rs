//! What an execution asked and was refused.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use serde::Serialize;
use tokio::sync::broadcast;
use tokio::time::Instant;

use super::rate::Bucket;
use super::{Execution, Limits};
use crate::egress::flow::{DecidedBy, End, FlowRecord, Protocol, Verdict};
use crate::ids;
use crate::time::Timestamp;

/// The port that names are asked for at.
pub const DNS_PORT: u16 = 53;

/// What came of an execution's queries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    pub queries: u64,
    /// With an address, or with the word that the name has no record of that type.
    pub answered: u64,
    pub refused: u64,
    /// Messages that are no query that is served, those of `dropped` included.
    pub malformed: u64,
    /// Past the rate; among the refused.
    pub over_rate: u64,
    /// Allowed names that could not be given an address.
    pub failed: u64,
    /// Messages that nothing was sent back for.
    pub dropped: u64,
}

/// The records and counts of one execution.
#[derive(Debug)]
pub struct Books {
    pub counts: Counts,
    pub bucket: Bucket,
    /// Set when the execution is over: what is asked after that is not answered.
    pub closed: bool,
    limit: usize,
    records: Vec<FlowRecord>,
    /// Where the record of this name and rule is.
    places: HashMap<(Option<String>, &'static str), usize>,
}

impl Books {
    pub fn new(limits: &Limits) -> Self {
        Self {
            counts: Counts::default(),
            bucket: Bucket::new(limits.queries_burst, limits.queries_per_second),
            closed: false,
            limit: limits.records_per_execution,
            records: Vec::new(),
            places: HashMap::new(),
        }
    }

    /// Whether one more query may be answered now.
    pub fn within_rate(&mut self) -> bool {
        self.bucket.take(Instant::now())
    }

    /// Notes a refusal, or what would be one, and gives its decision id. Clients ask the same thing again and again, for
    /// each type and of each server: the same name refused by the same rule is one record and has one id, and the record
    /// says how often.
    pub fn note(
        &mut self,
        execution: &Execution,
        flows: &broadcast::Sender<Arc<FlowRecord>>,
        verdict: Verdict,
        mut key: (Option<String>, &'static str),
        client: SocketAddr,
    ) -> String {
        let full = (None, "dns_records_per_execution");
        if !self.places.contains_key(&key) && self.records.len() >= self.limit {
            key = full;
        }
        if let Some(record) = self.places.get(&key).and_then(|&place| self.records.get_mut(place)) {
            record.connections = record.connections.saturating_add(1);
            return record.decision_id.clone();
        }
        let record = FlowRecord {
            execution_id: Some(execution.execution_id.clone()),
            action_id: Some(execution.action_id.clone()),
            principal: Some(execution.principal.clone()),
            workspace: Some(execution.workspace.clone()),
            verdict,
            ..refusal(key.0.clone(), key.1, client)
        };
        let decision_id = record.decision_id.clone();
        let _ = flows.send(Arc::new(record.clone()));
        self.places.insert(key, self.records.len());
        self.records.push(record);
        decision_id
    }

    /// The records, oldest first.
    pub fn take(&mut self) -> Vec<FlowRecord> {
        self.places.clear();
        std::mem::take(&mut self.records)
    }
}

/// The record of a query that was refused, of nobody as yet.
pub fn refusal(name: Option<String>, rule: &str, client: SocketAddr) -> FlowRecord {
    FlowRecord {
        time: Timestamp::now(),
        execution_id: None,
        action_id: None,
        principal: None,
        workspace: None,
        name,
        address: None,
        port: Some(DNS_PORT),
        protocol: Some(Protocol::Dns),
        sni: None,
        name_verified: None,
        carried: true,
        opaque: false,
        verdict: Verdict::Deny,
        decided_by: DecidedBy::Resolver,
        rule: rule.to_owned(),
        end: End::Answered,
        error: None,
        bytes_from_sandbox: 0,
        bytes_to_sandbox: 0,
        bytes_to_upstream: 0,
        bytes_from_upstream: 0,
        duration_ms: 0,
        decision_id: ids::mint(),
        client: Some(client),
        connections: 1,
        connection: None,
        uncounted: false,
        kernel: None,
        agreement: None,
    }
}
