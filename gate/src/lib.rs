//! LatchGate: a sidecar that every call of an AI agent goes through.
//!
//! The one path is [`pipeline`]; `docs/architecture.md` has the rooms and the reasons.

pub mod action;
pub mod auth;
pub mod cli;
pub mod config;
pub mod confine;
pub mod doctor;
pub mod egress;
pub mod executions;
pub mod files;
pub mod gate;
pub mod guards;
pub mod hash;
pub mod ids;
pub mod ledger;
pub mod pipeline;
pub mod policy;
pub mod privileges;
pub mod sandbox;
pub mod selftest;
pub mod server;
pub mod store;
pub mod time;
