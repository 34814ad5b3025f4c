//! JSON Schemas of requests and responses, compiled once at load, without remote references.

use jsonschema::{PatternOptions, Validator};
use serde_json::Value;

/// A compiled schema.
#[derive(Debug)]
pub struct Schema {
    source: Value,
    validator: Validator,
}

/// A schema that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    #[error("a schema is an object or a boolean")]
    NotASchema,
    #[error("at {pointer:?}: the reference {reference:?} leaves the schema")]
    RemoteReference { pointer: String, reference: String },
    #[error("{0}")]
    Invalid(String),
}

/// The first thing that is wrong with a value. The value itself is not in it: it may hold what no log should.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {what}", if pointer.is_empty() { "(the whole object)" } else { pointer })]
pub struct SchemaViolation {
    /// JSON pointer (RFC 6901) into the value; empty for the value as a whole.
    pub pointer: String,
    pub what: String,
}

/// How far a pattern that needs backtracking may go before the value is refused.
const BACKTRACK_LIMIT: usize = 10_000;

impl Schema {
    /// Compiles a schema; draft 2020-12 unless it names another by `$schema`. Formats are checked.
    ///
    /// Patterns are matched in linear time. One with look-around or back-references, which that engine does not have,
    /// is compiled by the other one under a backtracking limit: the values come from a peer.
    ///
    /// # Errors
    /// [`SchemaError`] when it is no schema, or refers to anything outside itself.
    pub fn compile(source: &Value) -> Result<Self, SchemaError> {
        if !source.is_object() && !source.is_boolean() {
            return Err(SchemaError::NotASchema);
        }
        refuse_remote(source, &mut String::new())?;
        let options = || jsonschema::options().offline().should_validate_formats(true);
        let validator = options()
            .with_pattern_options(PatternOptions::regex())
            .build(source)
            .or_else(|_| {
                options()
                    .with_pattern_options(PatternOptions::fancy_regex().backtrack_limit(BACKTRACK_LIMIT))
                    .build(source)
            })
            .map_err(|error| SchemaError::Invalid(error.to_string()))?;
        Ok(Self { source: source.clone(), validator })
    }

    /// # Errors
    /// The first violation.
    pub fn validate(&self, value: &Value) -> Result<(), SchemaViolation> {
        self.validator.validate(value).map_err(|error| SchemaViolation {
            pointer: error.instance_path().to_string(),
            what: error.masked().to_string(),
        })
    }

    /// The schema as it was written.
    pub const fn source(&self) -> &Value {
        &self.source
    }
}

/// A reference may point into its own document (`#…`) or to one of the drafts' meta-schemas, which are compiled in.
fn refuse_remote(value: &Value, pointer: &mut String) -> Result<(), SchemaError> {
    let length = pointer.len();
    match value {
        Value::Object(members) => {
            for (key, member) in members {
                pointer.push('/');
                pointer.push_str(&key.replace('~', "~0").replace('/', "~1"));
                if let ("$ref" | "$dynamicRef" | "$recursiveRef", Some(reference)) = (key.as_str(), member.as_str())
                    && !reference.starts_with('#')
                {
                    return Err(SchemaError::RemoteReference {
                        pointer: pointer.clone(),
                        reference: reference.to_owned(),
                    });
                }
                refuse_remote(member, pointer)?;
                pointer.truncate(length);
            }
        }
        Value::Array(items) => {
            for (at, item) in items.iter().enumerate() {
                pointer.push_str(&format!("/{at}"));
                refuse_remote(item, pointer)?;
                pointer.truncate(length);
            }
        }
        _ => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_violation_names_the_place_and_not_the_value() {
        let schema = Schema::compile(&json!({
            "type": "object", "required": ["url"], "additionalProperties": false,
            "properties": {"url": {"type": "string", "format": "uri"}, "n": {"type": "array", "items": {"type": "integer"}}},
        }))
        .unwrap();
        assert!(schema.validate(&json!({"url": "https://example.com/"})).is_ok());
        for (value, pointer, part) in [
            (json!({}), "", "url"),
            (json!({"url": 7}), "/url", "string"),
            (json!({"url": "no url at all"}), "/url", "uri"),
            (json!({"url": "https://example.com/", "n": [1, "s3cret"]}), "/n/1", "integer"),
            (json!({"url": "https://example.com/", "extra": 1}), "", "extra"),
            (json!([]), "", "object"),
        ] {
            let violation = schema.validate(&value).unwrap_err();
            assert_eq!(violation.pointer, pointer, "{violation}");
            assert!(violation.what.contains(part), "{violation}");
            assert!(!violation.to_string().contains("s3cret"), "{violation}");
        }
    }

    #[test]
    fn references_stay_inside() {
        for reference in
            ["https://example.com/s.json", "http://127.0.0.1/s", "file:///etc/passwd", "other.json", "urn:x", "//h/p"]
        {
            let error = Schema::compile(&json!({"properties": {"a/b": {"$ref": reference}}})).unwrap_err();
            assert!(
                matches!(&error, SchemaError::RemoteReference { pointer, .. } if pointer == "/properties/a~1b/$ref")
            );
        }
        let inside = json!({"$defs": {"n": {"type": "integer"}}, "properties": {"a": {"$ref": "#/$defs/n"}}});
        let schema = Schema::compile(&inside).unwrap();
        assert!(schema.validate(&json!({"a": "x"})).is_err());
        assert!(Schema::compile(&json!({"$ref": "#/nowhere"})).is_err());
        // An `$id` elsewhere does not make a reference remote or fetched.
        let elsewhere = json!({"$id": "https://example.com/x", "properties": {"a": {"$ref": "#/$defs/n"}}});
        assert!(Schema::compile(&elsewhere).is_err());
    }

    #[test]
    fn what_is_no_schema_is_refused() {
        for source in [json!("x"), json!(1), json!([]), json!({"type": "strnig"}), json!({"pattern": "("})] {
            assert!(Schema::compile(&source).is_err(), "{source}");
        }
    }

    #[test]
    fn patterns_cannot_be_made_to_run_away() {
        let long = "a".repeat(5_000) + "!";
        let linear = Schema::compile(&json!({"type": "string", "pattern": "^(a+)+$"})).unwrap();
        assert!(linear.validate(&json!(long)).is_err());
        let backtracking = Schema::compile(&json!({"type": "string", "pattern": r"^(?=(a+)+$)\w*$"})).unwrap();
        assert!(backtracking.validate(&json!("aaa")).is_ok());
        assert!(backtracking.validate(&json!(long)).is_err());
    }
}
