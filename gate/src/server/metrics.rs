//! Counters for Prometheus, on a listener of their own and only where one is configured. Label sets are closed: nothing
//! that a client writes becomes a label.

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::{Method, Request, Response, header};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::{Answer, error};
use crate::egress::flow::Verdict;
use crate::ledger::NormalizedResult;
use crate::pipeline::{Ids, Refusal, Refused};

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct CodeLabel {
    code: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct VerdictLabel {
    verdict: &'static str,
}

/// The gate's own counters.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    executions: Family<KindLabel, Counter>,
    refusals: Family<CodeLabel, Counter>,
    flows: Family<VerdictLabel, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("latchgate");
        let executions = Family::<KindLabel, Counter>::default();
        let refusals = Family::<CodeLabel, Counter>::default();
        registry.register("executions", "Executions that ended, by kind of result", executions.clone());
        registry.register("refusals", "Requests refused, by error code", refusals.clone());
        let flows = Family::<VerdictLabel, Counter>::default();
        registry.register("flows", "What executions contacted or tried to, by verdict", flows.clone());
        Self { registry, executions, refusals, flows }
    }
}

impl Metrics {
    pub fn executed(&self, result: &NormalizedResult) {
        let kind = match result {
            NormalizedResult::Success { .. } => "success",
            NormalizedResult::ProviderFailure { .. } => "provider_failure",
            NormalizedResult::Timeout { .. } => "timeout",
            NormalizedResult::Cancelled { .. } => "cancelled",
            NormalizedResult::InternalError { .. } => "internal_error",
        };
        self.executions.get_or_create(&KindLabel { kind }).inc();
    }

    pub fn flow(&self, verdict: Verdict) {
        let verdict = match verdict {
            Verdict::Allow => "allow",
            Verdict::Deny => "deny",
            Verdict::WouldDeny => "would_deny",
        };
        self.flows.get_or_create(&VerdictLabel { verdict }).inc();
    }

    pub fn refused(&self, cause: &Refusal) {
        self.refusals.get_or_create(&CodeLabel { code: error::code(cause) }).inc();
    }

    /// The exposition text; empty when it cannot be written, which a scraper reports.
    pub fn text(&self) -> String {
        let mut text = String::new();
        if encode(&mut text, &self.registry).is_err() {
            text.clear();
        }
        text
    }

    /// Answers on the metrics listener: `GET /metrics` and nothing else.
    pub fn answer(&self, request: &Request<Incoming>) -> Answer {
        if request.uri().path() != "/metrics" {
            return error::answer(&Refused::new(&Ids::mint(), Refusal::NotFound));
        }
        if request.method() != Method::GET {
            return error::answer(&Refused::new(&Ids::mint(), Refusal::MethodNotAllowed { allow: "GET" }));
        }
        self.exposition()
    }

    pub fn exposition(&self) -> Answer {
        let mut answer = Response::new(Full::new(Bytes::from(self.text())));
        let kind = header::HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
        answer.headers_mut().insert(header::CONTENT_TYPE, kind);
        answer
    }
}
