//! Placeholder.
pub mod http;
