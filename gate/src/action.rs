//! What an agent may ask for: manifests, their schemas and templates, and the canonical form of a call.

pub mod canonical;
pub mod manifest;
pub mod registry;
pub mod schema;
pub mod template;
