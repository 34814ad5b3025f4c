//! Who a connection is: the listener's principal, which the peer's credentials can only narrow.

use std::collections::BTreeMap;

use super::AuthError;

/// The identity that a listener gives its clients.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListenerIdentity {
    /// The principal of every client. A TCP listener may have none: it issues no leases then.
    pub principal: Option<String>,
    /// Where set, only these uids are served, each under its own principal.
    pub uids: Option<BTreeMap<u32, String>>,
}

impl ListenerIdentity {
    /// The principal of a client with this uid (`SO_PEERCRED`; `None` where the kernel names none).
    ///
    /// # Errors
    /// `identity_forbidden` for a uid that the table does not name; `identity_unauthenticated` where the listener has no
    /// identity to give.
    pub fn principal(&self, uid: Option<u32>) -> Result<&str, AuthError> {
        match &self.uids {
            Some(uids) => uid.and_then(|uid| uids.get(&uid)).map(String::as_str).ok_or(AuthError::IdentityForbidden),
            None => self.principal.as_deref().ok_or(AuthError::IdentityUnauthenticated),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_narrows_and_never_widens() {
        let open = ListenerIdentity { principal: Some("agent".to_owned()), uids: None };
        assert_eq!(open.principal(Some(7)).unwrap(), "agent");
        assert_eq!(open.principal(None).unwrap(), "agent");
        let table = ListenerIdentity {
            principal: Some("agent".to_owned()),
            uids: Some(BTreeMap::from([(7, "uid-7".to_owned())])),
        };
        assert_eq!(table.principal(Some(7)).unwrap(), "uid-7");
        for uid in [Some(8), Some(0), None] {
            assert!(matches!(table.principal(uid), Err(AuthError::IdentityForbidden)), "{uid:?}");
        }
        let empty = ListenerIdentity { principal: Some("agent".to_owned()), uids: Some(BTreeMap::new()) };
        assert!(matches!(empty.principal(Some(0)), Err(AuthError::IdentityForbidden)));
        let nobody = ListenerIdentity::default();
        assert!(matches!(nobody.principal(Some(0)), Err(AuthError::IdentityUnauthenticated)));
    }
}
