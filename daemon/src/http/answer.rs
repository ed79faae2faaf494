//! Answers as JSON.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use prost_reflect::{DynamicMessage, SerializeOptions};
use tonic::{Code, Status};

/// JSON that is text already.
pub(super) fn json_text(status: StatusCode, text: impl Into<axum::body::Body>) -> Response {
    let kind = (header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    // What is true now is asked for again: no proxy keeps it.
    let keep = (header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    (status, [kind, keep], text.into()).into_response()
}

/// A message in proto3's mapping, with fields named as in the `.proto` files.
pub(super) fn message(message: &DynamicMessage) -> Response {
    let options = SerializeOptions::new()
        .skip_default_fields(false)
        .use_proto_field_name(true)
        // Nothing here comes near 2^53, from which on JavaScript would round.
        .stringify_64_bit_integers(false);
    let mut text = Vec::new();
    match message.serialize_with_options(&mut serde_json::Serializer::new(&mut text), &options) {
        Ok(()) => json_text(StatusCode::OK, text),
        Err(error) => refusal(StatusCode::INTERNAL_SERVER_ERROR, "INTERNAL", &error.to_string()),
    }
}

/// A refusal of the gate or of a verb.
pub(super) fn refused(status: &Status) -> Response {
    let (http, word) = match status.code() {
        Code::InvalidArgument => (StatusCode::BAD_REQUEST, "INVALID_ARGUMENT"),
        Code::OutOfRange => (StatusCode::BAD_REQUEST, "OUT_OF_RANGE"),
        Code::FailedPrecondition => (StatusCode::CONFLICT, "FAILED_PRECONDITION"),
        Code::Aborted => (StatusCode::CONFLICT, "ABORTED"),
        Code::AlreadyExists => (StatusCode::CONFLICT, "ALREADY_EXISTS"),
        Code::Unauthenticated => (StatusCode::UNAUTHORIZED, "UNAUTHENTICATED"),
        Code::PermissionDenied => (StatusCode::FORBIDDEN, "PERMISSION_DENIED"),
        Code::NotFound => (StatusCode::NOT_FOUND, "NOT_FOUND"),
        Code::ResourceExhausted => (StatusCode::INSUFFICIENT_STORAGE, "RESOURCE_EXHAUSTED"),
        Code::Cancelled => (StatusCode::SERVICE_UNAVAILABLE, "CANCELLED"),
        Code::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, "UNAVAILABLE"),
        Code::DeadlineExceeded => (StatusCode::GATEWAY_TIMEOUT, "DEADLINE_EXCEEDED"),
        Code::Unimplemented => (StatusCode::NOT_IMPLEMENTED, "UNIMPLEMENTED"),
        Code::DataLoss => (StatusCode::INTERNAL_SERVER_ERROR, "DATA_LOSS"),
        Code::Ok | Code::Unknown | Code::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "INTERNAL"),
    };
    refusal(http, word, status.message())
}

/// An error as JSON: gRPC's word for its kind, and the message for people.
pub(super) fn refusal(status: StatusCode, code: &str, message: &str) -> Response {
    let body = serde_json::json!({ "error": { "code": code, "message": message } }).to_string();
    let mut response = json_text(status, body);
    if status == StatusCode::UNAUTHORIZED {
        let scheme = HeaderValue::from_static("Bearer realm=\"treeboot\"");
        response.headers_mut().insert(header::WWW_AUTHENTICATE, scheme);
    }
    response
}
