//! A daemon's services as HTTP with JSON, for platforms that cannot speak gRPC, and what a monitoring system asks.
//!
//! A route is a way of writing a call of the gRPC service: path and query fill fields of the request's message, the body is the
//! message as JSON (the mapping of proto3). The call then goes the way of every gRPC call, through the same gate, so whoever may
//! not ask there may not ask here. Deliberately absent: what a verb does; a second list of messages, because the descriptors say what
//! there is.

mod answer;
mod call;
mod grpc;
pub mod metrics;
mod openapi;
mod serve;
mod vitals;

use std::convert::Infallible;
use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::{MethodFilter, get, on};
use prost_reflect::{DescriptorPool, MethodDescriptor};
use tokio::sync::Semaphore;
use tonic::body::Body;
use tower::Service;

pub use self::grpc::services;
pub use self::serve::serve;
pub use self::vitals::{Check, Condition, Vitals};

use self::answer::refusal;
use self::call::Caller;

/// Calls over HTTP at once. Each may hold a body and an answer as text; a platform that asks for more waits its turn
/// and asks again.
const MAX_CALLS: usize = 64;
/// Where the OpenAPI document is.
pub const OPENAPI_PATH: &str = "/openapi.json";
/// Where the figures are; also their verb in the gate's table.
pub const METRICS_PATH: &str = "/metrics";

/// How a verb of a service is written in HTTP.
#[derive(Debug, Clone, Copy)]
pub struct Route {
    /// Which method.
    pub method: Method,
    /// The path; a field of the request stands in braces under a name of its own: `/v1/images/{name=id.name}`.
    pub path: &'static str,
    /// Words of the query, and the fields of the request that they fill.
    pub query: &'static [(&'static str, &'static str)],
    /// Service and verb: `Coordinator/GetImage`.
    pub verb: &'static str,
}

impl Route {
    /// A route without a query.
    #[must_use]
    pub const fn new(method: Method, path: &'static str, verb: &'static str) -> Self {
        Self {
            method,
            path,
            query: &[],
            verb,
        }
    }

    /// With these words of the query.
    #[must_use]
    pub const fn with(mut self, query: &'static [(&'static str, &'static str)]) -> Self {
        self.query = query;
        self
    }

    /// Names and fields of the path, in their order.
    fn slots(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        let parts = self.path.split('{').skip(1);
        parts.filter_map(|rest| {
            let slot = rest.split('}').next()?;
            Some(slot.split_once('=').unwrap_or((slot, slot)))
        })
    }

    /// The path with what `slot` makes of each slot in braces.
    fn path_with(&self, slot: impl Fn(usize, &str) -> String) -> String {
        let mut parts = self.path.split('{');
        let mut path = parts.next().unwrap_or_default().to_owned();
        for ((number, part), (name, _)) in parts.enumerate().zip(self.slots()) {
            let rest = part.split_once('}').map_or("", |(_, rest)| rest);
            path.push_str(&format!("{{{}}}{rest}", slot(number, name)));
        }
        path
    }
}

/// The methods that are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Reads.
    Get,
    /// Makes, or finds that it is there.
    Put,
    /// Asks for an act.
    Post,
    /// Removes, or finds that it is gone.
    Delete,
}

impl Method {
    fn filter(self) -> MethodFilter {
        match self {
            Self::Get => MethodFilter::GET,
            Self::Put => MethodFilter::PUT,
            Self::Post => MethodFilter::POST,
            Self::Delete => MethodFilter::DELETE,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Put => "put",
            Self::Post => "post",
            Self::Delete => "delete",
        }
    }

    fn has_body(self) -> bool {
        matches!(self, Self::Put | Self::Post)
    }
}

/// What a daemon offers over HTTP beside its gRPC service.
#[derive(Debug, Clone, Copy)]
pub struct Face {
    /// In the OpenAPI document, for instance "treeboot coordinator".
    pub title: &'static str,
    /// The descriptors of all messages, as a `FileDescriptorSet` with comments.
    pub descriptors: &'static [u8],
    /// The package of the services.
    pub package: &'static str,
    /// The service whose health is the daemon's, without its package.
    pub service: &'static str,
    /// The verbs.
    pub routes: &'static [Route],
    /// Nobody is asked who they are. Then a page in a browser of this machine must not pass for somebody who is on it.
    pub insecure: bool,
}

/// A face that cannot be: a bug of ours, found by the first start.
#[derive(Debug, thiserror::Error)]
pub enum FaceError {
    /// The descriptors are none.
    #[error("the descriptors of the services cannot be read")]
    Descriptors(#[source] prost_reflect::DescriptorError),
    /// Reflection does not take them.
    #[error("the descriptors of the services cannot be served")]
    Reflection(#[source] tonic_reflection::server::Error),
    /// A route of a verb that is not there.
    #[error("there is no verb '{0}'")]
    Verb(&'static str),
    /// A path names a field that the request has not.
    #[error("the request of '{verb}' has no field '{field}'")]
    Field {
        /// The verb.
        verb: &'static str,
        /// The field.
        field: String,
    },
}

/// The routes; everything else is for `gated`, the gRPC services and the figures behind their gate.
///
/// # Errors
/// [`FaceError`].
pub fn router<S>(face: &Face, vitals: Arc<dyn Vitals>, gated: S) -> Result<Router, FaceError>
where
    S: Service<axum::http::Request<Body>, Response = axum::http::Response<Body>, Error = Infallible>
        + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send + 'static,
{
    let pool = DescriptorPool::decode(face.descriptors).map_err(FaceError::Descriptors)?;
    let document: Arc<str> = openapi::document(face, &pool)?.into();
    let health = Arc::clone(&vitals);
    let figures = gated.clone();
    let mut router = Router::new()
        .route(
            OPENAPI_PATH,
            get(move || async move { answer::json_text(StatusCode::OK, document.to_string()) }),
        )
        .route(
            "/healthz",
            get(move || async move { vitals::healthz(&*health).await }),
        )
        .route(
            "/readyz",
            get(move || async move { vitals::readyz(&*vitals).await }),
        )
        .route(
            METRICS_PATH,
            get(move |request: Request| async move { behind(figures, request).await }),
        );
    let calls = Arc::new(Semaphore::new(MAX_CALLS));
    let insecure = face.insecure;
    for route in face.routes {
        let caller = Arc::new(Caller::new(route, verb(face, &pool, route.verb)?)?);
        let (grpc, calls) = (gated.clone(), Arc::clone(&calls));
        let handler = move |request: Request| {
            let (caller, grpc, calls) = (Arc::clone(&caller), grpc.clone(), Arc::clone(&calls));
            async move {
                if let Some(refused) = call::from_a_page(request.headers(), insecure) {
                    return refused;
                }
                let Ok(_turn) = calls.try_acquire() else {
                    let what = format!("{MAX_CALLS} calls are under way already; try again in a second");
                    return refusal(StatusCode::SERVICE_UNAVAILABLE, "UNAVAILABLE", &what);
                };
                caller.call(grpc, request).await
            }
        };
        // A router wants one name for all that may stand at a place.
        let path = route.path_with(|number, _| number.to_string());
        router = router.route(&path, on(route.method.filter(), handler));
    }
    Ok(router
        .method_not_allowed_fallback(|request: Request| async move {
            let what = format!(
                "{} takes no {}; {OPENAPI_PATH} lists what there is",
                request.uri().path(),
                request.method()
            );
            refusal(StatusCode::METHOD_NOT_ALLOWED, "UNIMPLEMENTED", &what)
        })
        .fallback(move |request: Request| async move {
            let is_grpc = request
                .headers()
                .get("content-type")
                .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
            if is_grpc {
                return pass(gated, request).await;
            }
            let what = format!(
                "there is nothing at {}; {OPENAPI_PATH} lists what there is",
                request.uri().path()
            );
            refusal(StatusCode::NOT_FOUND, "NOT_FOUND", &what)
        }))
}

async fn pass<S>(mut gated: S, request: Request) -> Response
where
    S: Service<axum::http::Request<Body>, Response = axum::http::Response<Body>, Error = Infallible>,
{
    let Ok(()) = std::future::poll_fn(|context| gated.poll_ready(context)).await;
    let Ok(answer) = gated.call(request.map(Body::new)).await;
    answer.map(axum::body::Body::new)
}

/// Something that is no gRPC, and may be refused by a gate that speaks gRPC.
async fn behind<S>(gated: S, request: Request) -> Response
where
    S: Service<axum::http::Request<Body>, Response = axum::http::Response<Body>, Error = Infallible>,
{
    let response = pass(gated, request).await;
    match tonic::Status::from_header_map(response.headers()) {
        Some(status) => answer::refused(&status),
        None => response,
    }
}

fn verb(face: &Face, pool: &DescriptorPool, name: &'static str) -> Result<MethodDescriptor, FaceError> {
    let (service, method) = name.split_once('/').ok_or(FaceError::Verb(name))?;
    pool.get_service_by_name(&format!("{}.{service}", face.package))
        .and_then(|service| service.methods().find(|found| found.name() == method))
        .ok_or(FaceError::Verb(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slots_of_a_path_are_found_in_their_order() {
        let route = Route::new(
            Method::Get,
            "/v1/images/{image=id.name}/{version=id.version}/tree",
            "A/B",
        );
        let slots: Vec<_> = route.slots().collect();
        assert_eq!(slots, [("image", "id.name"), ("version", "id.version")]);
        assert_eq!(
            route.path_with(|number, _| number.to_string()),
            "/v1/images/{0}/{1}/tree"
        );
        assert_eq!(
            route.path_with(|_, name| name.to_owned()),
            "/v1/images/{image}/{version}/tree"
        );
        let route = Route::new(Method::Put, "/v1/disks/{vm}", "A/B");
        assert_eq!(route.slots().collect::<Vec<_>>(), [("vm", "vm")]);
        assert_eq!(
            Route::new(Method::Get, "/v1/hosts", "A/B").path_with(|_, name| name.into()),
            "/v1/hosts"
        );
    }
}
