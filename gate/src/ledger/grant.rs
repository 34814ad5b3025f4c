//! What was decided, as it is bound into a grant.

use serde::{Deserialize, Serialize};

use crate::action::canonical::jcs;
use crate::time::Timestamp;
use crate::{hash, ids};

const PLAN_DOMAIN: &[u8] = b"latchgate.plan.v1\n";

/// Everything that a decision was made about. Its hash is what grants and operators' decisions name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    pub action_id: String,
    pub action_version: String,
    pub action_digest: String,
    pub request_hash: String,
    pub profile_hash: String,
    pub secret_names: Vec<String>,
    pub policy_version: String,
    pub principal: String,
    pub listener: String,
    pub workspace: String,
    pub not_after: Timestamp,
}

impl Plan {
    /// `sha256:<hex>` over `latchgate.plan.v1\n` and the JCS form of the plan.
    ///
    /// # Errors
    /// Never for these fields; the serialiser's signature has one.
    pub fn hash(&self) -> Result<String, serde_json::Error> {
        let mut bytes = PLAN_DOMAIN.to_vec();
        bytes.extend_from_slice(&jcs(self)?);
        Ok(hash::sha256_tagged(&bytes))
    }
}

/// The right to carry out one plan once, until a time; used up by the intent that the ledger records.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    pub grant_id: String,
    pub plan_hash: String,
    pub lease_jti: String,
    pub jkt: String,
    pub listener: String,
    pub not_after: Timestamp,
}

impl Grant {
    /// A grant for `plan`, bound to the lease and key that asked.
    ///
    /// # Errors
    /// As [`Plan::hash`].
    pub fn mint(plan: &Plan, lease_jti: &str, jkt: &str) -> Result<Self, serde_json::Error> {
        Ok(Self {
            grant_id: ids::mint(),
            plan_hash: plan.hash()?,
            lease_jti: lease_jti.to_owned(),
            jkt: jkt.to_owned(),
            listener: plan.listener.clone(),
            not_after: plan.not_after,
        })
    }
}
