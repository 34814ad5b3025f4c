//! LatchGate: a sidecar that every call of an AI agent goes through.
//!
//! The one path is [`pipeline`]; `docs/architecture.md` has the rooms and the reasons.

pub mod action;
pub mod auth;
pub mod egress;
pub mod files;
pub mod hash;
pub mod ids;
pub mod ledger;
pub mod policy;
pub mod sandbox;
pub mod store;
pub mod time;
