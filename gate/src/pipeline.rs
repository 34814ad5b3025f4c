//! The one path that every call goes down.
//!
//! [`execute`] takes a request through its stages in the order that the contract promises (API.md §3). A stage is a
//! plain function in a module of its own: it takes what the stage before it made and returns the next thing or a
//! refusal. What a stage returns has no public constructor, so it is the proof that the stage was passed:
//!
//! `Request → Caller → ResolvedAction → ValidCall → Decision → Grant → Outcome → Receipt`
//!
//! Skipping one does not compile. There is no second way to the sandbox: only [`dispatch`] starts one, and it takes a
//! [`grant::Grant`].
//!
//! ```
//! # use latchgate::pipeline::{authenticate::Caller, authorise::Decision, dispatch, grant::Grant, validate::ValidCall};
//! fn read(caller: &Caller, call: &ValidCall, decision: &Decision, grant: &Grant) -> usize {
//!     caller.principal().len() + call.request_hash().len() + decision.policy_version().len() + grant.grant_id().len()
//! }
//! ```
//! ```compile_fail,E0451
//! # use latchgate::pipeline::{authenticate::Caller};
//! fn somebody_else(caller: Caller, other: Caller) -> Caller {
//!     Caller { proven: other.proven, ..caller }
//! }
//! ```
//! ```compile_fail,E0451
//! # use latchgate::pipeline::authorise::Decision;
//! fn under_another_policy(decision: Decision) -> Decision {
//!     Decision { policy_version: String::new(), ..decision }
//! }
//! ```
//! ```compile_fail,E0451
//! # use latchgate::pipeline::grant::Grant;
//! fn for_longer(grant: Grant) -> Grant {
//!     Grant { deadline: std::time::Duration::MAX, ..grant }
//! }
//! ```
//! ```compile_fail,E0308
//! # use latchgate::{gate::Gate, pipeline::{Ids, authorise::Decision, dispatch}};
//! async fn without_a_grant(gate: &Gate, decision: Decision, ids: &Ids) {
//!     dispatch::run(gate, decision, ids).await;
//! }
//! ```
//!
//! From the debit on, a call runs in a task of its own: an agent that hangs up neither stops an action half-way nor
//! loses its receipt.

pub mod authenticate;
pub mod authorise;
pub mod budget;
pub mod dispatch;
pub mod grant;
pub mod record;
pub mod resolve;
pub mod validate;

use std::sync::Arc;

use bytes::Bytes;
use serde_json::Value;

use crate::auth::AuthError;
use crate::gate::{Gate, Running};
use crate::ids;
use crate::ledger::Receipt;
use crate::server::body::BodyError;
use crate::server::listen::{ListenerIdentity, Peer};
use crate::time::Timestamp;

/// A request as it came in, with nothing believed yet.
#[derive(Clone, Debug)]
pub struct Request {
    pub ids: Ids,
    pub listener: Arc<ListenerIdentity>,
    pub peer: Peer,
    /// Every value of the `Authorization` header: two are refused, so all of them count.
    pub authorization: Vec<Vec<u8>>,
    /// Every value of the `DPoP` header.
    pub dpop: Vec<Vec<u8>>,
    pub method: String,
    /// As sent, without the query.
    pub path: String,
    pub received_at: Timestamp,
}

/// One decision id and one trace id stand for a request from its first byte on.
#[derive(Clone, Debug)]
pub struct Ids {
    pub decision_id: String,
    pub trace_id: String,
}

impl Ids {
    pub fn mint() -> Self {
        Self { decision_id: ids::mint(), trace_id: ids::mint() }
    }
}

/// Why a request was refused.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error("the gate is draining")]
    Draining,
    #[error("as many calls run or wait as may")]
    Busy,
    #[error("no such resource")]
    NotFound,
    #[error("method not allowed")]
    MethodNotAllowed { allow: &'static str },
    #[error("invalid request: {message}")]
    InvalidRequest { message: String },
    #[error("{message}")]
    Conflict { message: String },
    #[error(transparent)]
    Body(#[from] BodyError),
    #[error(transparent)]
    Authenticate(#[from] AuthError),
    #[error(transparent)]
    Resolve(#[from] resolve::ResolveError),
    #[error(transparent)]
    Validate(#[from] validate::ValidateError),
    #[error(transparent)]
    Authorise(#[from] authorise::AuthoriseError),
    #[error(transparent)]
    Grant(#[from] grant::GrantError),
    #[error(transparent)]
    Dispatch(#[from] dispatch::DispatchError),
    #[error("the receipt could not be made durable: {message}")]
    Evidence { message: String },
    #[error("the store does not answer: {message}")]
    Store { message: String },
    #[error("internal: {message}")]
    Internal { message: String },
}

/// A refusal with the ids that every face of it carries.
#[derive(Debug)]
pub struct Refused {
    pub decision_id: String,
    pub trace_id: String,
    /// Set when the action ran, or may have run: its receipt says what is known.
    pub receipt_id: Option<String>,
    /// Boxed: refusals travel in every `Result` of the path, and are large.
    pub cause: Box<Refusal>,
}

impl Refused {
    pub fn new(ids: &Ids, cause: impl Into<Refusal>) -> Self {
        Self {
            decision_id: ids.decision_id.clone(),
            trace_id: ids.trace_id.clone(),
            receipt_id: None,
            cause: Box::new(cause.into()),
        }
    }
}

/// An executed call: what the agent gets, and the receipt that stands for it.
#[derive(Debug)]
pub struct Executed {
    pub trace_id: String,
    pub output: Value,
    pub outcome: dispatch::Summary,
    pub receipt: Receipt,
    pub budget: Option<Value>,
}

/// Takes one call all the way.
///
/// # Errors
/// The first stage that refuses ends it. Refusals of an authenticated caller are recorded in the ledger.
pub async fn execute(gate: &Arc<Gate>, request: Request, action_id: &str, body: Bytes) -> Result<Executed, Refused> {
    let ids = request.ids.clone();
    // Signatures, the stores' files and policy: none of it may hold up those who only wait for a socket.
    let (caller, decided) = tokio::task::block_in_place(|| {
        let caller = authenticate::authenticate(gate, &request)?;
        let decided = decide(gate, &caller, &request, action_id, &body);
        Ok((caller, decided))
    })
    .map_err(|cause: Refusal| Refused::new(&ids, cause))?;
    match decided {
        Err(cause) => {
            let refused = Refused::new(&ids, cause);
            record::refusal(gate, &caller, action_id, &refused).await;
            Err(refused)
        }
        Ok(decision) => {
            // Not an event: who floods the gate is not to fill its ledger as well.
            let running = gate.enter().ok_or_else(|| Refused::new(&ids, Refusal::Busy))?;
            // After it is counted: a drain that began since the request came either sees it or is seen here.
            if gate.is_draining() {
                return Err(Refused::new(&ids, Refusal::Draining));
            }
            let gate = Arc::clone(gate);
            let running = tokio::spawn(async move { perform(&gate, caller, decision, &ids, running).await });
            running.await.unwrap_or_else(|error| {
                Err(Refused::new(&request.ids, Refusal::Internal { message: error.to_string() }))
            })
        }
    }
}

/// Everything up to the decision: reads, and changes nothing.
fn decide(
    gate: &Gate,
    caller: &authenticate::Caller,
    request: &Request,
    action_id: &str,
    body: &[u8],
) -> Result<authorise::Decision, Refusal> {
    let action = resolve::resolve(gate, caller, action_id)?;
    let call = validate::validate(caller, action, body)?;
    Ok(authorise::authorise(gate, caller, request, call)?)
}

/// Debit, grant, intent, sandbox, receipt. Runs to its end whoever is still listening.
async fn perform(
    gate: &Arc<Gate>,
    caller: authenticate::Caller,
    decision: authorise::Decision,
    ids: &Ids,
    _running: Running,
) -> Result<Executed, Refused> {
    let grant = match grant::issue(gate, &caller, decision, ids).await {
        Ok(grant) => grant,
        Err((action_id, cause)) => {
            let refused = Refused::new(ids, cause);
            record::refusal(gate, &caller, &action_id, &refused).await;
            return Err(refused);
        }
    };
    let outcome = dispatch::run(gate, grant, ids).await;
    record::receipt(gate, &caller, outcome, ids).await
}
