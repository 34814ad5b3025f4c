//! Placeholder.

pub mod worker;
