//! Who may ask for what: one table of all verbs, and the layer that compares each request with it.

use std::sync::Arc;
use std::task::{Context, Poll};

use rustls::pki_types::CertificateDer;
use tonic::codegen::http::{HeaderMap, Request, Response, header::AUTHORIZATION};
use tonic::{Status, body::Body};
use tower::{Layer, Service};

use crate::tls::Peer;
use crate::token;
use crate::who::{Role, Who};

/// What a verb asks of whoever calls it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Nothing: the request holds its own proof.
    Nothing,
    /// To be a host.
    Host,
    /// To be a person of this role at least.
    Person(Role),
    /// To be a host, or a person of this role at least.
    HostOr(Role),
}

/// Every verb of every service, by its path without the package. One that is not here is an admin's.
pub const TABLE: &[(&str, Need)] = &[
    ("Coordinator/Enroll", Need::Nothing),
    ("Coordinator/Renew", Need::Host),
    ("Coordinator/Join", Need::Host),
    ("Coordinator/Register", Need::Host),
    ("Coordinator/Remove", Need::Host),
    ("Coordinator/Leave", Need::Host),
    ("Coordinator/Heartbeat", Need::Host),
    ("Coordinator/Search", Need::HostOr(Role::Viewer)),
    ("Coordinator/GetImage", Need::HostOr(Role::Viewer)),
    ("Coordinator/ListImages", Need::HostOr(Role::Viewer)),
    ("Coordinator/ListHosts", Need::Person(Role::Viewer)),
    ("Coordinator/GetHost", Need::HostOr(Role::Viewer)),
    ("Coordinator/GetTree", Need::Person(Role::Viewer)),
    ("Coordinator/AddImage", Need::HostOr(Role::Admin)),
    ("Coordinator/RemoveImage", Need::Person(Role::Admin)),
    ("Coordinator/LabelImage", Need::Person(Role::Admin)),
    ("Agent/List", Need::Person(Role::Viewer)),
    ("Agent/Status", Need::Person(Role::Viewer)),
    ("Agent/AccessMap", Need::Person(Role::Viewer)),
    ("Agent/WatchVm", Need::Person(Role::Viewer)),
    ("Agent/ListVms", Need::Person(Role::Viewer)),
    ("Agent/Create", Need::Person(Role::Operator)),
    ("Agent/CreateMany", Need::Person(Role::Operator)),
    ("Agent/GetDiskSecret", Need::Person(Role::Operator)),
    ("Agent/Destroy", Need::Person(Role::Operator)),
    ("Agent/LimitDisk", Need::Person(Role::Operator)),
    ("Agent/Snapshot", Need::Person(Role::Operator)),
    ("Agent/ListSnapshots", Need::Person(Role::Viewer)),
    ("Agent/RollBack", Need::Person(Role::Operator)),
    ("Agent/DeleteSnapshot", Need::Person(Role::Operator)),
    ("Agent/Describe", Need::Person(Role::Viewer)),
    ("Agent/CheckDelta", Need::Person(Role::Operator)),
    ("Agent/Clone", Need::Person(Role::Operator)),
    ("Agent/ExportDisk", Need::Person(Role::Operator)),
    ("Agent/Migrate", Need::Person(Role::Operator)),
    ("Agent/ReceiveDisk", Need::HostOr(Role::Operator)),
    ("Agent/TakeVm", Need::Host),
    ("Agent/SettleVm", Need::Host),
    ("Agent/VmTaken", Need::Host),
    ("Agent/TakeBackVm", Need::Person(Role::Operator)),
    ("Agent/Attach", Need::Person(Role::Operator)),
    ("Agent/Detach", Need::Person(Role::Operator)),
    ("Agent/Doctor", Need::Person(Role::Operator)),
    ("Agent/ShowCache", Need::Person(Role::Viewer)),
    ("Agent/ChangeCache", Need::Person(Role::Admin)),
    ("Agent/PinCached", Need::Person(Role::Operator)),
    ("Agent/DropCached", Need::Person(Role::Operator)),
    ("Agent/StartVm", Need::Person(Role::Operator)),
    ("Agent/StopVm", Need::Person(Role::Operator)),
    ("Agent/ImportImage", Need::Person(Role::Admin)),
    ("Agent/AdoptImage", Need::Person(Role::Admin)),
    ("Agent/DropImage", Need::Person(Role::Admin)),
    ("Agent/FlattenImage", Need::Person(Role::Admin)),
];

/// What is no verb of ours. Health says no more than a reason in a sentence; the others tell what there is.
const BESIDE: &[(&str, Need)] = &[
    ("/grpc.health.v1.Health/Check", Need::Nothing),
    ("/grpc.health.v1.Health/Watch", Need::Nothing),
    (
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        Need::Person(Role::Viewer),
    ),
    (
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        Need::Person(Role::Viewer),
    ),
    ("/metrics", Need::Person(Role::Viewer)),
];

/// The package of the services.
const PACKAGE: &str = "/treeboot.v1.";

/// What the verb of this path asks for.
#[must_use]
pub fn need(path: &str) -> Need {
    let verb = path.strip_prefix(PACKAGE).unwrap_or(path);
    TABLE
        .iter()
        .chain(BESIDE)
        .find(|(name, _)| *name == verb)
        .map_or(Need::Person(Role::Admin), |(_, need)| *need)
}

impl Need {
    fn met_by(self, who: &Who) -> bool {
        let role = |least: Role| matches!(who, Who::Person { role, .. } if *role >= least);
        match self {
            Self::Nothing => true,
            Self::Host => matches!(who, Who::Host(_)),
            Self::Person(least) => role(least),
            Self::HostOr(least) => matches!(who, Who::Host(_)) || role(least),
        }
    }

    fn words(self) -> String {
        match self {
            Self::Nothing => "nothing".into(),
            Self::Host => "a host's certificate".into(),
            Self::Person(least) => format!("the role {least}"),
            Self::HostOr(least) => format!("a host's certificate or the role {least}"),
        }
    }
}

/// Who asks, as the gate found: put beside the request where there is a certificate or a bearer token.
#[derive(Debug, Clone)]
pub struct Caller(pub Who);

/// The layer. Requests on connections without TLS pass: whoever chose that wants no gate.
#[derive(Debug, Clone)]
pub struct Gate {
    authority: Option<Arc<CertificateDer<'static>>>,
}

impl Gate {
    /// A gate that takes bearer tokens of this authority; without one there is no TLS either.
    #[must_use]
    pub fn new(authority: Option<CertificateDer<'static>>) -> Self {
        Self {
            authority: authority.map(Arc::new),
        }
    }

    /// `inner`, behind this gate.
    pub fn over<S>(&self, inner: S) -> Gated<S> {
        self.layer(inner)
    }

    fn judge(&self, path: &str, peer: Option<&Peer>, headers: &HeaderMap) -> Result<Option<Who>, Status> {
        let need = need(path);
        let address = match peer {
            Some(Peer::Insecure) => return Ok(None),
            Some(Peer::Unknown { address } | Peer::Known { address, .. }) => address.to_string(),
            None => "somewhere".into(),
        };
        let verb = path.rsplit('/').next().unwrap_or(path);
        let refuse = |who: &str, status: Status| {
            tracing::warn!(peer = %address, who, verb, reason = status.message(), "a request was refused");
            Err(status)
        };
        if need == Need::Nothing {
            return Ok(None);
        }
        // A certificate counts before a token.
        let who = match (peer, bearer(headers), &self.authority) {
            (Some(Peer::Known { who, .. }), _, _) => who.clone(),
            (_, Some(token), Some(authority)) => match token::who_bears(token, authority) {
                Ok(who) => who,
                Err(why) => return refuse("", Status::unauthenticated(why)),
            },
            _ => {
                return refuse(
                    "",
                    Status::unauthenticated(format!(
                        "{verb} needs {}, and no certificate was shown; a host gets one by --join-token, a person by \
                         'treeboot-coordinator user create' and 'treeboot login'",
                        need.words()
                    )),
                );
            }
        };
        if need.met_by(&who) {
            return Ok(Some(who));
        }
        let status = Status::permission_denied(format!("{verb} needs {}; this is {who}", need.words()));
        refuse(&who.to_string(), status)
    }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}

impl<S> Layer<S> for Gate {
    type Service = Gated<S>;
    fn layer(&self, inner: S) -> Gated<S> {
        Gated {
            gate: self.clone(),
            inner,
        }
    }
}

/// A service behind the gate.
#[derive(Debug, Clone)]
pub struct Gated<S> {
    gate: Gate,
    inner: S,
}

impl<S, B> Service<Request<B>> for Gated<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Answer<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let peer = request.extensions().get::<Peer>();
        match self.gate.judge(request.uri().path(), peer, request.headers()) {
            Ok(who) => {
                if let Some(who) = who {
                    request.extensions_mut().insert(Caller(who));
                }
                Answer::Asked(Box::pin(self.inner.call(request)))
            }
            Err(status) => Answer::Refused(Some(Box::new(status.into_http()))),
        }
    }
}

/// A refusal, or what the service answers.
pub enum Answer<F> {
    /// By the gate.
    Refused(Option<Box<Response<Body>>>),
    /// By the service.
    Asked(std::pin::Pin<Box<F>>),
}

impl<F: Future<Output = Result<Response<Body>, E>>, E> Future for Answer<F> {
    type Output = Result<Response<Body>, E>;
    fn poll(self: std::pin::Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match self.get_mut() {
            Self::Refused(response) => match response.take() {
                Some(response) => Poll::Ready(Ok(*response)),
                None => Poll::Pending,
            },
            Self::Asked(future) => future.as_mut().poll(context),
        }
    }
}
