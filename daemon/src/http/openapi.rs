//! The OpenAPI document (version 3.1), made of the descriptors and their comments.

use std::collections::BTreeMap;

use prost_reflect::{
    Cardinality, DescriptorPool, FieldDescriptor, FileDescriptor, Kind, MessageDescriptor, MethodDescriptor,
};
use serde_json::{Map, Value, json};

use super::call::leaf;
use super::{Face, FaceError, METRICS_PATH, OPENAPI_PATH, Route, verb};

/// The document as JSON.
pub(super) fn document(face: &Face, pool: &DescriptorPool) -> Result<String, FaceError> {
    let mut paths: BTreeMap<String, Map<String, Value>> = BTreeMap::new();
    let mut schemas = BTreeMap::new();
    for route in face.routes {
        let verb = verb(face, pool, route.verb)?;
        add(&verb.output(), &mut schemas);
        if route.method.has_body() {
            add(&verb.input(), &mut schemas);
        }
        let path = route.path_with(|_, name| name.to_owned());
        let operations = paths.entry(path).or_default();
        operations.insert(route.method.word().to_owned(), operation(route, &verb));
    }
    for (path, words, kind) in [
        (OPENAPI_PATH, "This document.", "application/json"),
        (
            "/healthz",
            "Whether the process is worth keeping: 200, or 503 where only a restart would help.",
            "application/json",
        ),
        (
            "/readyz",
            "Whether it can take work on: 200, or 503 with the reasons.",
            "application/json",
        ),
        (METRICS_PATH, "Figures for Prometheus.", "text/plain"),
    ] {
        let mut get = json!({
            "operationId": path.trim_start_matches('/').replace('.', "_"),
            "description": words,
            "responses": {"200": {"description": "the answer", "content": {kind: {}}}},
        });
        if path != METRICS_PATH {
            get["security"] = json!([]);
        }
        paths.insert(path.to_owned(), Map::from_iter([("get".to_owned(), get)]));
    }
    schemas.insert(
        "Error".to_owned(),
        json!({"type": "object", "properties": {"error": {"type": "object", "properties": {
            "code": {"type": "string", "description": "as gRPC calls its kind, for instance NOT_FOUND"},
            "message": {"type": "string", "description": "what failed, with which name, and what to do"},
        }, "required": ["code", "message"]}}, "required": ["error"]}),
    );
    let mut document = json!({
        "openapi": "3.1.0",
        "info": {"title": face.title, "version": env!("CARGO_PKG_VERSION")},
        "paths": paths,
        "components": {"schemas": schemas},
    });
    if !face.insecure {
        document["components"]["securitySchemes"] = json!({
            "bearer": {"type": "http", "scheme": "bearer"},
            "certificate": {"type": "mutualTLS"},
        });
        document["security"] = json!([{"certificate": []}, {"bearer": []}]);
    }
    Ok(document.to_string())
}

fn operation(route: &Route, verb: &MethodDescriptor) -> Value {
    let parameter = |place: &str, name: &str, field: &str| {
        let schema = leaf(&verb.input(), field).map_or(Value::Null, |kind| of_kind(&kind));
        json!({
            "name": name, "in": place, "required": place == "path", "schema": schema,
            "description": described(&verb.input(), field),
        })
    };
    let in_path = route.slots().map(|(name, field)| parameter("path", name, field));
    let in_query = route
        .query
        .iter()
        .map(|(name, field)| parameter("query", name, field));
    let mut operation = json!({
        "operationId": route.verb.replace('/', "_"),
        "description": comment(&verb.parent_file(), verb.path()),
        "parameters": in_path.chain(in_query).collect::<Vec<_>>(),
        "responses": {
            "200": {
                "description": "done",
                "content": {"application/json": {"schema": reference(&verb.output())}},
            },
            "default": {
                "description": "refused, or failed",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            },
        },
    });
    if route.method.has_body() {
        operation["requestBody"] = json!({
            "description": "what stands in path and query may be left out",
            "content": {"application/json": {"schema": reference(&verb.input())}},
        });
    }
    operation
}

fn reference(message: &MessageDescriptor) -> Value {
    json!({ "$ref": format!("#/components/schemas/{}", message.name()) })
}

/// A message's schema, and those of all messages in it.
fn add(message: &MessageDescriptor, schemas: &mut BTreeMap<String, Value>) {
    if schemas.contains_key(message.name()) {
        return;
    }
    // First, so that a message that holds itself ends.
    schemas.insert(message.name().to_owned(), Value::Null);
    let mut properties = Map::new();
    for field in message.fields() {
        if let Kind::Message(inner) = field.kind()
            && !field.is_map()
        {
            add(&inner, schemas);
        }
        properties.insert(field.name().to_owned(), schema(&field));
    }
    let mut object = json!({"type": "object", "properties": properties});
    let words = comment(&message.parent_file(), message.path());
    if !words.is_empty() {
        object["description"] = words.into();
    }
    schemas.insert(message.name().to_owned(), object);
}

fn schema(field: &FieldDescriptor) -> Value {
    let mut schema = match field.kind() {
        Kind::Message(entry) if field.is_map() => json!({
            "type": "object", "additionalProperties": of_kind(&entry.map_entry_value_field().kind()),
        }),
        kind => of_kind(&kind),
    };
    if field.cardinality() == Cardinality::Repeated && !field.is_map() {
        schema = json!({"type": "array", "items": schema});
    }
    let words = comment(&field.parent_file(), field.path());
    if !words.is_empty() {
        schema["description"] = words.into();
    }
    schema
}

fn of_kind(kind: &Kind) -> Value {
    match kind {
        Kind::Double | Kind::Float => json!({"type": "number"}),
        Kind::Bool => json!({"type": "boolean"}),
        Kind::String => json!({"type": "string"}),
        Kind::Bytes => json!({"type": "string", "contentEncoding": "base64"}),
        Kind::Message(message) => reference(message),
        Kind::Enum(of) => {
            let names: Vec<String> = of.values().map(|value| value.name().to_owned()).collect();
            json!({"type": "string", "enum": names})
        }
        Kind::Int64 | Kind::Uint64 | Kind::Sint64 | Kind::Fixed64 | Kind::Sfixed64 => {
            json!({"type": "integer", "format": "int64"})
        }
        _ => json!({"type": "integer", "format": "int32"}),
    }
}

/// What stands above, or behind, the declaration of a field of a message, or of one within it.
fn described(message: &MessageDescriptor, path: &str) -> String {
    let mut message = message.clone();
    let mut words = String::new();
    for name in path.split('.') {
        let Some(field) = message.get_field_by_name(name) else {
            break;
        };
        words = comment(&field.parent_file(), field.path());
        if let Kind::Message(inner) = field.kind() {
            message = inner;
        }
    }
    words
}

fn comment(file: &FileDescriptor, path: &[i32]) -> String {
    let Some(info) = &file.file_descriptor_proto().source_code_info else {
        return String::new();
    };
    let location = info.location.iter().find(|location| location.path == path);
    let words = location.map(|location| {
        [
            location.leading_comments.as_deref(),
            location.trailing_comments.as_deref(),
        ]
        .into_iter()
        .flatten()
        .map(str::trim)
        .collect::<Vec<_>>()
        .join(" ")
    });
    words.unwrap_or_default().replace("\n ", " ")
}
