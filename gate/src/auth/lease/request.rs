//! The body of `POST /v1/leases`.

use serde_json::{Map, Value};

use super::Budgets;
use crate::action::canonical::{StrictError, parse_strict};
use crate::auth::jwk::{JwkError, PublicJwk};

/// How many scopes a lease may have, and how long each may be: they travel in a header with every call.
const MAX_SCOPES: usize = 64;
const MAX_SCOPE_BYTES: usize = 128;
const MAX_FS_ROOT_BYTES: usize = 4096;

/// Why a lease request was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LeaseRequestError {
    #[error("{0}")]
    Json(#[from] StrictError),
    #[error("unknown member {0:?}")]
    UnknownMember(String),
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error("scopes is not an array of at most {MAX_SCOPES} scope tokens")]
    Scopes,
    #[error("dpop_jwk: {0}")]
    Jwk(#[from] JwkError),
    #[error("budgets.{0} is not a whole number of 0 or more")]
    Budget(&'static str),
    #[error("{0} has another type")]
    Type(&'static str),
}

impl LeaseRequestError {
    /// The error code of the contract.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Json(error) => error.code(),
            _ => "invalid_request",
        }
    }
}

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseRequest {
    pub scopes: Vec<String>,
    pub dpop_jwk: PublicJwk,
    pub budgets: Option<Budgets>,
    pub fs_root: Option<String>,
}

impl LeaseRequest {
    /// Reads the body. Unknown top-level members are refused; unknown kinds of budget are ignored.
    ///
    /// # Errors
    /// For a body that is no such request, or a key that is not a public P-256 key with a point on the curve.
    pub fn parse(body: &[u8]) -> Result<Self, LeaseRequestError> {
        let members = parse_strict(body)?;
        let known = ["scopes", "dpop_jwk", "budgets", "fs_root"];
        if let Some(unknown) = members.keys().find(|name| !known.contains(&name.as_str())) {
            return Err(LeaseRequestError::UnknownMember(unknown.chars().take(64).collect()));
        }
        let scopes = scopes(members.get("scopes").ok_or(LeaseRequestError::Missing("scopes"))?)?;
        let dpop_jwk = PublicJwk::parse(members.get("dpop_jwk").ok_or(LeaseRequestError::Missing("dpop_jwk"))?)?;
        let budgets = match present(&members, "budgets") {
            None => None,
            Some(Value::Object(kinds)) => Some(Budgets {
                max_calls: limit(kinds, "max_calls")?,
                max_cost_usd_cents: limit(kinds, "max_cost_usd_cents")?,
            }),
            Some(_) => return Err(LeaseRequestError::Type("budgets")),
        };
        let fs_root = match present(&members, "fs_root") {
            None => None,
            Some(Value::String(path)) if path.len() <= MAX_FS_ROOT_BYTES => Some(path.clone()),
            Some(_) => return Err(LeaseRequestError::Type("fs_root")),
        };
        Ok(Self { scopes, dpop_jwk, budgets, fs_root })
    }
}

/// Some clients write `null` for what they leave out.
fn present<'a>(members: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    members.get(name).filter(|value| !value.is_null())
}

fn limit(kinds: &Map<String, Value>, name: &'static str) -> Result<Option<u64>, LeaseRequestError> {
    present(kinds, name).map(|value| value.as_u64().ok_or(LeaseRequestError::Budget(name))).transpose()
}

/// Scope tokens of RFC 6749 §3.3: printable ASCII without space, quote and backslash.
fn scopes(value: &Value) -> Result<Vec<String>, LeaseRequestError> {
    let token = |text: &str| {
        (1..=MAX_SCOPE_BYTES).contains(&text.len())
            && text.bytes().all(|byte| matches!(byte, 0x21 | 0x23..=0x5B | 0x5D..=0x7E))
    };
    let items = value.as_array().filter(|items| items.len() <= MAX_SCOPES).ok_or(LeaseRequestError::Scopes)?;
    items
        .iter()
        .map(|item| item.as_str().filter(|text| token(text)).map(str::to_owned).ok_or(LeaseRequestError::Scopes))
        .collect()
}
