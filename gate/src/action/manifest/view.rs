//! Manifests as agents read them (API §2).

use serde_json::{Value, json};

use super::Manifest;

impl Manifest {
    /// An item of `GET /v1/actions`.
    pub fn list_item(&self) -> Value {
        json!({ "action_id": self.action_id, "version": self.version, "risk_level": self.risk_level })
    }

    /// `GET /v1/actions/{id}`.
    pub fn detail(&self) -> Value {
        json!({
            "action_id": self.action_id,
            "version": self.version,
            "provider_module_digest": self.provider(),
            "risk_level": self.risk_level,
            "resource_limits": self.limits,
            "io": {
                "max_request_bytes": self.max_request_bytes,
                "max_response_bytes": self.max_response_bytes,
                "has_request_schema": self.request_schema.is_some(),
                "has_response_schema": self.response_schema.is_some(),
            },
            "egress": self.profile.to_public(),
            "declared_side_effects": self.declared_side_effects,
            "required_scopes": self.required_scopes,
        })
    }

    /// `GET /v1/actions/{id}/schema/request`: the JSON Schema of the params; one that lets any object through where the
    /// manifest has none.
    pub fn request_schema_view(&self) -> Value {
        match &self.request_schema {
            Some(schema) => schema.source().clone(),
            None => json!({ "type": "object" }),
        }
    }
}
