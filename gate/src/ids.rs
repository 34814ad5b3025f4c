//! Identifiers that the gate mints.

/// A fresh identifier: a lower-case UUIDv7 (RFC 9562 §5.7), so that ids sort by the time they were made.
pub fn mint() -> String {
    uuid::Uuid::now_v7().to_string()
}
