//! Operators: an API key that is bound to a key pair, proved with DPoP like a lease.

use std::sync::Arc;

use subtle::ConstantTimeEq as _;

use super::dpop::{Expected, Proof};
use super::jwk::PublicJwk;
use super::{AuthError, Clock, Presented, dpop_token, remember};
use crate::hash;
use crate::store::ReplayStore;

/// An operator as configured.
#[derive(Clone, Debug)]
pub struct Operator {
    pub name: String,
    /// SHA-256 of the API key: the gate does not keep the key itself.
    pub api_key_sha256: [u8; 32],
    /// RFC 7638 thumbprint of the operator's key.
    pub dpop_jkt: String,
    /// The key pair was made in this run of the gate, so that no proof of it can have been used before.
    pub made_in_this_run: bool,
}

/// An operator who proved both keys.
#[derive(Clone, Debug)]
pub struct AuthenticatedOperator {
    name: String,
    key: PublicJwk,
}

impl AuthenticatedOperator {
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The key that signs this operator's decisions.
    pub fn key(&self) -> &PublicJwk {
        &self.key
    }
}

/// Everyone who may use the operator socket.
pub struct Operators {
    operators: Vec<Operator>,
    replay: Arc<dyn ReplayStore>,
    clock: Clock,
}

impl Operators {
    pub fn new(operators: Vec<Operator>, replay: Arc<dyn ReplayStore>) -> Self {
        Self { operators, replay, clock: Clock::default() }
    }

    /// Checks API key and proof. `listener` and `require_body_binding` of the request take no part.
    ///
    /// # Errors
    /// `identity_unauthenticated` for a key that is nobody's; for the proof as with a lease.
    pub fn authenticate(&self, request: &Presented<'_>) -> Result<AuthenticatedOperator, AuthError> {
        self.clock.check(request.now)?;
        let token = match dpop_token(request.authorization) {
            Ok(Some(token)) => token,
            Ok(None) | Err(AuthError::SeveralHeaders) => return Err(AuthError::UnknownOperator),
            Err(error) => return Err(error),
        };
        let digest = hash::sha256(token);
        // All are compared, so that the time tells nothing about who is configured.
        let found = self.operators.iter().fold(None, |found, operator| {
            if bool::from(operator.api_key_sha256.ct_eq(&digest)) { Some(operator) } else { found }
        });
        let operator = found.ok_or(AuthError::UnknownOperator)?;
        let proof = Proof::verify(
            request.dpop,
            &Expected {
                method: request.method,
                path: request.path,
                bases: request.bases,
                token,
                jkt: &operator.dpop_jkt,
                now: request.now,
                not_before: if operator.made_in_this_run { None } else { self.replay.not_before() },
            },
        )?;
        remember(self.replay.as_ref(), &operator.dpop_jkt, &proof, request.now)?;
        Ok(AuthenticatedOperator { name: operator.name.clone(), key: proof.key().clone() })
    }
}
