//! Who is calling: a lease of this gate and listener, and a proof that its key made for this very request.

use std::sync::Arc;

use crate::auth::{AuthError, Authenticated, Presented};
use crate::gate::Gate;
use crate::pipeline::{Refusal, Request};
use crate::server::listen::{ListenerIdentity, Peer};

/// An authenticated caller.
#[derive(Debug)]
pub struct Caller {
    proven: Authenticated,
    listener: Arc<ListenerIdentity>,
    peer: Peer,
}

impl Caller {
    pub fn principal(&self) -> &str {
        &self.proven.lease.principal
    }

    pub fn session_id(&self) -> &str {
        &self.proven.lease.session_id
    }

    pub fn lease_jti(&self) -> &str {
        &self.proven.lease.lease_jti
    }

    pub fn scopes(&self) -> &[String] {
        &self.proven.lease.scope
    }

    /// Thumbprint of the key that the lease is bound to.
    pub fn jkt(&self) -> &str {
        self.proven.lease.jkt()
    }

    pub fn proven(&self) -> &Authenticated {
        &self.proven
    }

    pub fn listener(&self) -> &ListenerIdentity {
        &self.listener
    }

    pub const fn peer(&self) -> Peer {
        self.peer
    }
}

/// Checks lease, revocation, proof and jti, in that order, and that the peer may still act as the lease's principal.
pub fn authenticate(gate: &Gate, request: &Request) -> Result<Caller, Refusal> {
    let authorization: Vec<&[u8]> = request.authorization.iter().map(Vec::as_slice).collect();
    let dpop: Vec<&[u8]> = request.dpop.iter().map(Vec::as_slice).collect();
    let proven = gate.authenticator.authenticate(&Presented {
        authorization: &authorization,
        dpop: &dpop,
        method: &request.method,
        path: &request.path,
        bases: &request.listener.bases,
        listener: &request.listener.name,
        require_body_binding: request.listener.require_body_binding,
        now: request.received_at,
    })?;
    if request.listener.principal_of(request.peer)? != proven.lease.principal {
        return Err(AuthError::IdentityForbidden.into());
    }
    Ok(Caller { proven, listener: Arc::clone(&request.listener), peer: request.peer })
}
