//! One request: JSON to message, message through the gRPC service, and back.

use std::convert::Infallible;
use std::pin::Pin;
use std::time::Duration;

use axum::extract::{FromRequestParts as _, RawPathParams, Request};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use bytes::Buf as _;
use prost::Message as _;
use prost_reflect::{DeserializeOptions, DynamicMessage, Kind, MessageDescriptor, MethodDescriptor};
use serde_json::{Map, Value};
use tokio::time::timeout;
use tonic::Status;
use tonic::body::Body;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::Body as _;
use tonic::codegen::http::uri::PathAndQuery;
use tower::Service;

use super::answer::{self, refusal, refused};
use super::{FaceError, Route};

/// Longest body. The largest request that a platform writes is a VM's user data, which QEMU's seed bounds to less.
const MAX_BODY_BYTES: usize = 1 << 20;
/// How long a body may take to arrive: a mebibyte over the slowest line that anybody administers a cluster by.
const BODY_LIMIT: Duration = Duration::from_secs(10);
/// Longest answer: the tree of an image with 100,000 hosts is about 30 MB.
const MAX_ANSWER_BYTES: usize = 128 << 20;

/// One verb, ready to be called.
#[derive(Debug)]
pub(super) struct Caller {
    verb: MethodDescriptor,
    path: PathAndQuery,
    /// The fields of the request that stand in the path, in their order.
    slots: Vec<&'static str>,
    query: &'static [(&'static str, &'static str)],
    has_body: bool,
}

/// Why a request is no call.
struct Refused(StatusCode, String);

impl From<String> for Refused {
    fn from(what: String) -> Self {
        Self(StatusCode::BAD_REQUEST, what)
    }
}

impl Caller {
    pub(super) fn new(route: &Route, verb: MethodDescriptor) -> Result<Self, FaceError> {
        let slots: Vec<&str> = route.slots().map(|(_, field)| field).collect();
        let fields = slots.iter().chain(route.query.iter().map(|(_, field)| field));
        for field in fields {
            leaf(&verb.input(), field).ok_or_else(|| FaceError::Field {
                verb: route.verb,
                field: (*field).to_owned(),
            })?;
        }
        let path = format!("/{}/{}", verb.parent_service().full_name(), verb.name());
        Ok(Self {
            path: path.parse().map_err(|_| FaceError::Verb(route.verb))?,
            slots,
            query: route.query,
            has_body: route.method.has_body(),
            verb,
        })
    }

    /// Answers one request.
    pub(super) async fn call<S>(&self, grpc: S, request: Request) -> Response
    where
        S: Service<axum::http::Request<Body>, Response = axum::http::Response<Body>, Error = Infallible>,
    {
        let (mut parts, body) = request.into_parts();
        let in_path = RawPathParams::from_request_parts(&mut parts, &()).await.ok();
        let message = async {
            let mut json = read(body, self.has_body, &parts.headers).await?;
            for (field, (_, text)) in self.slots.iter().zip(in_path.iter().flatten()) {
                self.set(&mut json, field, text)?;
            }
            let query = parts.uri.query().unwrap_or_default();
            for (word, text) in form_urlencoded::parse(query.as_bytes()) {
                let known = self.query.iter().find(|(name, _)| *name == word);
                let (_, field) = known.ok_or_else(|| self.unknown(&word))?;
                self.set(&mut json, field, &text)?;
            }
            let options = DeserializeOptions::new();
            DynamicMessage::deserialize_with_options(self.verb.input(), Value::Object(json), &options)
                .map_err(|error| format!("this is not what {} takes: {error}", self.verb.name()).into())
        };
        let message = match message.await {
            Ok(message) => message,
            Err(Refused(status, what)) => return refusal(status, "INVALID_ARGUMENT", &what),
        };
        let mut inner = tonic::Request::new(message);
        // Who asks: the connection's peer, and the token.
        *inner.extensions_mut() = parts.extensions;
        if let Some(token) = parts.headers.get(header::AUTHORIZATION)
            && let Ok(token) = tonic::metadata::MetadataValue::try_from(token.as_bytes())
        {
            inner.metadata_mut().insert("authorization", token);
        }
        let mut client = tonic::client::Grpc::new(grpc).max_decoding_message_size(MAX_ANSWER_BYTES);
        let Ok(()) = client.ready().await;
        let codec = Dynamic(self.verb.output());
        match client.unary(inner, self.path.clone(), codec).await {
            Ok(answer) => answer::message(&answer.into_inner()),
            Err(status) => refused(&status),
        }
    }

    fn unknown(&self, word: &str) -> Refused {
        let known: Vec<&str> = self.query.iter().map(|(name, _)| *name).collect();
        let known = match known.as_slice() {
            [] => "it takes no query".to_owned(),
            known => format!("it takes {}", known.join(", ")),
        };
        format!("{} knows no '{word}' in a query; {known}", self.verb.name()).into()
    }

    /// A field of the request from a word of the path or the query.
    fn set(&self, json: &mut Map<String, Value>, field: &str, text: &str) -> Result<(), String> {
        let value = match (leaf(&self.verb.input(), field), text) {
            (Some(Kind::Bool), "true" | "") => Value::Bool(true),
            (Some(Kind::Bool), "false") => Value::Bool(false),
            (Some(Kind::Bool), _) => return Err(format!("'{field}' is true or false, not '{text}'")),
            // JSON's mapping takes numbers as text too, and says what is wrong with one.
            _ => Value::String(text.to_owned()),
        };
        let mut place = json;
        let mut names = field.split('.').peekable();
        while let Some(name) = names.next() {
            if names.peek().is_none() {
                place.insert(name.to_owned(), value);
                return Ok(());
            }
            place = place
                .entry(name)
                .or_insert_with(|| Value::Object(Map::new()))
                .as_object_mut()
                .ok_or_else(|| format!("'{name}' is an object, {{…}}"))?;
        }
        Ok(())
    }
}

/// What a page in somebody's browser sends. Where nobody is asked who they are, any page that they look at could act in
/// their name: across origins (`Origin`, `Sec-Fetch-Site`), or by giving this machine's address a name of its own (`Host`).
pub(super) fn from_a_page(headers: &HeaderMap, insecure: bool) -> Option<Response> {
    if !insecure {
        return None;
    }
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let foreign_name = text(header::HOST).is_some_and(|host| {
        let host = host.rsplit_once(':').map_or(host, |(name, port)| {
            if port.bytes().all(|byte| byte.is_ascii_digit()) {
                name
            } else {
                host
            }
        });
        let address = host.trim_start_matches('[').trim_end_matches(']');
        host != "localhost" && address.parse::<std::net::IpAddr>().is_err()
    });
    let is_page = headers.contains_key(header::ORIGIN)
        || text(header::HeaderName::from_static("sec-fetch-site")).is_some_and(|site| site != "none");
    (is_page || foreign_name).then(|| {
        refusal(
            StatusCode::FORBIDDEN,
            "PERMISSION_DENIED",
            "this daemon asks nobody who they are, so it answers neither pages in a browser nor requests to a name: use its \
             address, or make an authority (treeboot-coordinator init)",
        )
    })
}

/// The kind of a field of a message, or of one within it.
pub(super) fn leaf(message: &MessageDescriptor, path: &str) -> Option<Kind> {
    let (first, rest) = match path.split_once('.') {
        Some((first, rest)) => (first, Some(rest)),
        None => (path, None),
    };
    let field = message.get_field_by_name(first)?;
    match (rest, field.kind()) {
        _ if field.is_list() || field.is_map() => None,
        (None, Kind::Message(_)) => None,
        (None, kind) => Some(kind),
        (Some(rest), Kind::Message(inner)) => leaf(&inner, rest),
        (Some(_), _) => None,
    }
}

async fn read(
    body: axum::body::Body,
    may_be: bool,
    headers: &HeaderMap,
) -> Result<Map<String, Value>, Refused> {
    let bytes = timeout(BODY_LIMIT, collect(body)).await.map_err(|_| {
        let limit = BODY_LIMIT.as_secs();
        Refused(
            StatusCode::REQUEST_TIMEOUT,
            format!("the body did not arrive within {limit} s; send it again"),
        )
    })??;
    if bytes.is_empty() {
        return Ok(Map::new());
    }
    if !may_be {
        return Err("this takes no body; what it takes stands in path and query"
            .to_owned()
            .into());
    }
    let kind = headers
        .get(header::CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok());
    let is_json = kind.is_some_and(|kind| {
        let kind = kind.split(';').next().unwrap_or_default().trim();
        kind.eq_ignore_ascii_case("application/json")
    });
    if !is_json {
        let given = kind.map_or("without one".to_owned(), |kind| format!("with '{kind}'"));
        return Err(Refused(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            format!("a body wants the header 'content-type: application/json'; this came {given}"),
        ));
    }
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err("the body is JSON, but no object, {…}".to_owned().into()),
        Err(error) => Err(format!("the body is not JSON: {error}").into()),
    }
}

async fn collect(mut body: axum::body::Body) -> Result<Vec<u8>, Refused> {
    let mut bytes = Vec::new();
    while let Some(frame) = std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
        let frame = frame.map_err(|error| format!("the body was cut off: {error}"))?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        if bytes.len() + data.len() > MAX_BODY_BYTES {
            return Err(Refused(
                StatusCode::PAYLOAD_TOO_LARGE,
                format!("the body is longer than {MAX_BODY_BYTES} bytes, which is the limit"),
            ));
        }
        bytes.extend_from_slice(&data);
    }
    Ok(bytes)
}

/// Messages that are known by their descriptor alone.
#[derive(Debug, Clone)]
struct Dynamic(MessageDescriptor);

impl Codec for Dynamic {
    type Encode = DynamicMessage;
    type Decode = DynamicMessage;
    type Encoder = Self;
    type Decoder = Self;
    fn encoder(&mut self) -> Self {
        self.clone()
    }
    fn decoder(&mut self) -> Self {
        self.clone()
    }
}

impl Encoder for Dynamic {
    type Item = DynamicMessage;
    type Error = Status;
    fn encode(&mut self, message: DynamicMessage, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        message
            .encode(buffer)
            .map_err(|error| Status::internal(error.to_string()))
    }
}

impl Decoder for Dynamic {
    type Item = DynamicMessage;
    type Error = Status;
    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<DynamicMessage>, Status> {
        let bytes = buffer.copy_to_bytes(buffer.remaining());
        DynamicMessage::decode(self.0.clone(), bytes)
            .map(Some)
            .map_err(|error| Status::internal(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pairs = pairs.iter().map(|(name, value)| {
            let name = header::HeaderName::from_static(name);
            (name, header::HeaderValue::from_static(value))
        });
        pairs.collect()
    }

    #[test]
    fn pages_are_told_from_programs_where_nobody_is_asked_who_they_are() {
        let programs: &[&[(&str, &str)]] = &[
            &[],
            &[("host", "127.0.0.1:7400")],
            &[("host", "127.0.0.1")],
            &[("host", "[::1]:7400")],
            &[("host", "[::1]")],
            &[("host", "localhost:7400")],
            &[("host", "localhost"), ("sec-fetch-site", "none")],
        ];
        for program in programs {
            assert!(from_a_page(&headers(program), true).is_none(), "{program:?}");
        }
        let pages: &[&[(&str, &str)]] = &[
            &[("host", "127.0.0.1:7400"), ("origin", "https://example.org")],
            &[("host", "127.0.0.1:7400"), ("origin", "null")],
            &[("host", "127.0.0.1:7400"), ("sec-fetch-site", "cross-site")],
            &[("host", "rebound.example.org:7400")],
            &[("host", "localhost.example.org")],
        ];
        for page in pages {
            assert!(from_a_page(&headers(page), true).is_some(), "{page:?}");
            assert!(from_a_page(&headers(page), false).is_none(), "{page:?}");
        }
    }
}
