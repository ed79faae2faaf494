//! The gRPC service: messages become events, answers become messages, refusals become statuses. No decisions.

mod convert;
mod edges;
mod heartbeat;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use tokio::sync::watch;
use tonic::{Request, Response, Status, Streaming};
use treeboot_identity::Who;
use treeboot_identity::gate::Caller;
use treeboot_identity::tls::Peer;
use treeboot_proto::v1::coordinator_server::Coordinator;
use treeboot_proto::{InvalidMessage, endpoint, image_id, image_id_or_newest, new_image, v1};
use treeboot_types::{HostName, Image, ImageName};

pub use edges::Edges;

use crate::identity::{EnrollError, Registrar};
use crate::owner::{CallError, Handle};
use crate::rules::{Denied, Rules, RulesError};
use crate::tree::{Answer, Call, Refusal, Speaker};

/// Candidates of a search that names no limit.
const SEARCH_LIMIT: usize = 16;
/// Most candidates of a search.
const MAX_SEARCH_LIMIT: usize = 1_024;

/// The service over the owner's handle.
#[derive(Debug, Clone)]
pub struct CoordinatorService {
    owner: Handle,
    registrar: Registrar,
    edges: Edges,
    rules: Arc<Rules>,
    next_stream: Arc<AtomicU64>,
    stop: watch::Receiver<bool>,
}

impl CoordinatorService {
    /// A service whose heartbeat streams end when `stop` says so.
    pub fn new(
        owner: Handle,
        registrar: Registrar,
        edges: Edges,
        rules: Arc<Rules>,
        stop: watch::Receiver<bool>,
    ) -> Self {
        Self {
            owner,
            registrar,
            edges,
            rules,
            next_stream: Arc::new(AtomicU64::new(1)),
            stop,
        }
    }

    /// Whether a host may use an image; whoever holds all of it, and gives it to others, may.
    async fn host_may(&self, image: &ImageName, host: &HostName) -> Result<(), Status> {
        if !self.rules.names_hosts(image) {
            return Ok(());
        }
        let (asked, name) = (host.clone(), image.clone());
        let known = self
            .owner
            .ask(move |forest| {
                let mut images = forest.list_images().into_iter();
                let holds = images.any(|i| {
                    i.id.name == name
                        && i.origins
                            .iter()
                            .any(|origin| origin.host.as_ref() == Some(&asked))
                });
                (holds, forest.host_labels(&asked))
            })
            .await;
        let (holds, labels) = known.map_err(status_of_call)?;
        if holds {
            return Ok(());
        }
        let may = self.rules.host(image, host, &labels.unwrap_or_default());
        may.map_err(|denied| denied_to(&host.to_string(), &denied))
    }

    /// Whether a host may be another origin of what is there already. Who brings new content has it, and needs nobody's leave.
    async fn may_hold(&self, image: &Image, host: &HostName) -> Result<(), Status> {
        if !self.rules.names_hosts(&image.id.name) {
            return Ok(());
        }
        let (name, digest) = (image.id.name.clone(), image.digest);
        let there = self
            .owner
            .ask(move |forest| {
                let mut images = forest.list_images().into_iter();
                images.any(|image| image.id.name == name && image.digest == digest)
            })
            .await
            .map_err(status_of_call)?;
        if there {
            return self.host_may(&image.id.name, host).await;
        }
        Ok(())
    }

    /// Whether whoever asks may use an image.
    async fn caller_may<T>(&self, request: &Request<T>, image: &ImageName) -> Result<(), Status> {
        match request.extensions().get::<Caller>() {
            Some(Caller(Who::Host(host))) => self.host_may(image, host).await,
            Some(Caller(who @ Who::Person { role, .. })) => {
                let may = self.rules.role(image, *role);
                may.map_err(|denied| denied_to(&who.to_string(), &denied))
            }
            _ => Ok(()),
        }
    }

    async fn call(&self, call: Call) -> Result<Answer, Status> {
        self.owner.call(call).await.map_err(status_of_call)
    }
}

/// Who called, on a connection of ours; without a word about it nobody did.
fn peer<T>(request: &Request<T>) -> Peer {
    request
        .extensions()
        .get::<Peer>()
        .cloned()
        .unwrap_or(Peer::Unknown {
            address: std::net::SocketAddr::from(([0, 0, 0, 0], 0)),
        })
}

/// A host speaks for itself only.
fn speaker(peer: &Peer, host: &str, instance: &str) -> Result<Speaker, Status> {
    let speaker = convert::speaker(host, instance).map_err(invalid)?;
    own_name(peer, &speaker.host)?;
    Ok(speaker)
}

fn own_name(peer: &Peer, host: &HostName) -> Result<(), Status> {
    peer.speaks_for(host).map_err(|who| {
        tracing::warn!(%who, %host, "a request for another host was refused");
        Status::permission_denied(format!(
            "a host speaks for itself only: this is {who}, and not host '{host}'"
        ))
    })
}

fn denied_to(who: &str, denied: &Denied) -> Status {
    tracing::warn!(who, reason = %denied, "an image was refused");
    Status::permission_denied(denied.to_string())
}

fn status_of_rules(error: &RulesError) -> Status {
    match error {
        RulesError::Rule { .. } => Status::invalid_argument(error.to_string()),
        RulesError::File { .. } | RulesError::Damaged { .. } => {
            Status::unavailable(crate::owner::chain(error))
        }
    }
}

fn status_of_enroll(error: &EnrollError) -> Status {
    match error {
        EnrollError::NoAuthority => Status::failed_precondition(error.to_string()),
        EnrollError::Token(token) if token.is_refusal() => Status::permission_denied(error.to_string()),
        EnrollError::Token(_) | EnrollError::Ended => Status::internal(error.to_string()),
    }
}

fn invalid(error: InvalidMessage) -> Status {
    Status::invalid_argument(error.to_string())
}

fn status_of_call(error: CallError) -> Status {
    match error {
        CallError::Refused(refusal) => status(&refusal),
        CallError::NotSaved(why) => Status::unavailable(why),
        CallError::Stopping => Status::unavailable(error.to_string()),
    }
}

fn status(refusal: &Refusal) -> Status {
    let message = refusal.to_string();
    match refusal {
        Refusal::UnknownHost { .. } | Refusal::ImageInUse { .. } | Refusal::OtherHost { .. } => {
            Status::failed_precondition(message)
        }
        Refusal::OtherInstance { .. }
        | Refusal::ImageExists { .. }
        | Refusal::ImageDiffers { .. }
        | Refusal::EndpointTaken { .. } => Status::already_exists(message),
        Refusal::UnknownImage { .. } | Refusal::NotAttached { .. } => Status::not_found(message),
        Refusal::OtherEpoch { .. } => {
            // Mostly a host that was overtaken by its own move, at times one that repeats what it heard.
            tracing::info!(reason = %message, "an epoch that is over was refused");
            Status::aborted(message)
        }
        Refusal::TooMany { .. } => Status::resource_exhausted(message),
    }
}

/// An answer of another kind than the call's: a bug of ours, which costs this call and not the daemon.
fn mismatch() -> Status {
    Status::internal("the coordinator's answer is not of the call's kind; please report this")
}

#[tonic::async_trait]
impl Coordinator for CoordinatorService {
    async fn join(&self, request: Request<v1::JoinRequest>) -> Result<Response<v1::JoinResponse>, Status> {
        let (peer, request) = (peer(&request), request.into_inner());
        let call = Call::Join {
            speaker: speaker(&peer, &request.host, &request.instance)?,
            image: image_id_or_newest(request.image.as_ref()).map_err(invalid)?,
            endpoint: endpoint(request.endpoint.as_ref()).map_err(invalid)?,
        };
        if let Call::Join { speaker, image, .. } = &call {
            self.host_may(&image.name, &speaker.host).await?;
        }
        match self.call(call).await? {
            Answer::Joined(placement) => {
                let mut placement = v1::Placement::from(&placement);
                self.edges.fill(&peer, &self.owner, &mut placement).await;
                Ok(Response::new(v1::JoinResponse {
                    placement: Some(placement),
                }))
            }
            _ => Err(mismatch()),
        }
    }

    async fn register(
        &self,
        request: Request<v1::RegisterRequest>,
    ) -> Result<Response<v1::RegisterResponse>, Status> {
        let (peer, request) = (peer(&request), request.into_inner());
        let call = Call::Register {
            speaker: speaker(&peer, &request.host, &request.instance)?,
            image: image_id(request.image.as_ref()).map_err(invalid)?.into(),
            epoch: convert::epoch(request.epoch).map_err(invalid)?,
        };
        if let Call::Register { speaker, image, .. } = &call {
            self.host_may(&image.name, &speaker.host).await?;
        }
        match self.call(call).await? {
            Answer::Registered(epoch) => Ok(Response::new(v1::RegisterResponse {
                epoch: Some(epoch.into()),
            })),
            _ => Err(mismatch()),
        }
    }

    async fn search(
        &self,
        request: Request<v1::SearchRequest>,
    ) -> Result<Response<v1::SearchResponse>, Status> {
        let image = image_id_or_newest(request.get_ref().image.as_ref()).map_err(invalid)?;
        self.caller_may(&request, &image.name).await?;
        let request = request.into_inner();
        let host = match request.host.as_str() {
            "" => None,
            name => Some(HostName::new(name).map_err(|error| invalid(error.into()))?),
        };
        if let Some(host) = &host {
            self.host_may(&image.name, host).await?;
        }
        let limit = match usize::try_from(request.limit).unwrap_or(MAX_SEARCH_LIMIT) {
            0 => SEARCH_LIMIT,
            limit => limit.min(MAX_SEARCH_LIMIT),
        };
        let found = self
            .owner
            .ask(move |forest| forest.search(&image, host.as_ref(), limit))
            .await
            .map_err(status_of_call)?
            .map_err(|refusal| status(&refusal))?;
        Ok(Response::new(v1::SearchResponse {
            candidates: found.iter().map(convert::candidate).collect(),
        }))
    }

    async fn remove(
        &self,
        request: Request<v1::RemoveRequest>,
    ) -> Result<Response<v1::RemoveResponse>, Status> {
        let (peer, request) = (peer(&request), request.into_inner());
        let call = Call::Remove {
            speaker: speaker(&peer, &request.host, &request.instance)?,
            image: image_id(request.image.as_ref()).map_err(invalid)?.into(),
            epoch: convert::epoch(request.epoch).map_err(invalid)?,
        };
        self.call(call).await?;
        Ok(Response::new(v1::RemoveResponse {}))
    }

    async fn leave(&self, request: Request<v1::LeaveRequest>) -> Result<Response<v1::LeaveResponse>, Status> {
        let (peer, request) = (peer(&request), request.into_inner());
        let speaker = speaker(&peer, &request.host, &request.instance)?;
        self.call(Call::Leave { speaker }).await?;
        Ok(Response::new(v1::LeaveResponse {}))
    }

    type HeartbeatStream = heartbeat::Pushes;

    async fn heartbeat(
        &self,
        request: Request<Streaming<v1::Beat>>,
    ) -> Result<Response<Self::HeartbeatStream>, Status> {
        let pushes = heartbeat::open(
            self.owner.clone(),
            &self.next_stream,
            self.stop.clone(),
            peer(&request),
            self.edges.clone(),
            Arc::clone(&self.rules),
            request.into_inner(),
        );
        Ok(Response::new(pushes.await.map_err(status_of_call)?))
    }

    async fn add_image(
        &self,
        request: Request<v1::AddImageRequest>,
    ) -> Result<Response<v1::AddImageResponse>, Status> {
        let (peer, request) = (peer(&request), request.into_inner());
        let image = new_image(request.image.as_ref()).map_err(invalid)?;
        // A person's role was looked at already; a host adds what it holds itself.
        if let Peer::Known {
            who: Who::Host(_), ..
        } = &peer
        {
            for host in image.origins.iter().filter_map(|origin| origin.host.as_ref()) {
                own_name(&peer, host)?;
                self.may_hold(&image, host).await?;
            }
        }
        match self.call(Call::AddImage { image }).await? {
            Answer::Image { image, created } => Ok(Response::new(v1::AddImageResponse {
                image: Some((&image).into()),
                created,
            })),
            _ => Err(mismatch()),
        }
    }

    async fn get_image(
        &self,
        request: Request<v1::GetImageRequest>,
    ) -> Result<Response<v1::GetImageResponse>, Status> {
        let asked = image_id_or_newest(request.get_ref().id.as_ref()).map_err(invalid)?;
        self.caller_may(&request, &asked.name).await?;
        let request = request.into_inner();
        if !request.role.is_empty() {
            let role = request.role.parse().map_err(|_| {
                Status::invalid_argument(format!("'{}' is no role", request.role.escape_debug()))
            })?;
            let may = self.rules.role(&asked.name, role);
            may.map_err(|denied| denied_to(role.as_str(), &denied))?;
        }
        let labels = self.rules.labels(&asked.name);
        let image = self
            .owner
            .ask(move |forest| forest.image(&asked))
            .await
            .map_err(status_of_call)?
            .map_err(|refusal| status(&refusal))?;
        Ok(Response::new(v1::GetImageResponse {
            image: Some(image.as_ref().into()),
            labels: labels.into_iter().collect(),
        }))
    }

    async fn list_images(
        &self,
        request: Request<v1::ListImagesRequest>,
    ) -> Result<Response<v1::ListImagesResponse>, Status> {
        let role = match request.extensions().get::<Caller>() {
            Some(Caller(Who::Person { role, .. })) => Some(*role),
            // A host that takes an image in has to know which versions there are.
            _ => None,
        };
        let mut images = self
            .owner
            .ask(crate::tree::Forest::list_images)
            .await
            .map_err(status_of_call)?;
        if let Some(role) = role {
            images.retain(|image| self.rules.role(&image.id.name, role).is_ok());
        }
        Ok(Response::new(v1::ListImagesResponse {
            images: images.iter().map(|image| image.as_ref().into()).collect(),
        }))
    }

    async fn remove_image(
        &self,
        request: Request<v1::RemoveImageRequest>,
    ) -> Result<Response<v1::RemoveImageResponse>, Status> {
        let request = request.into_inner();
        // Never "the newest": what is removed stands in the request.
        let image = image_id(request.id.as_ref()).map_err(invalid)?.into();
        let force = request.force;
        match self.call(Call::RemoveImage { image, force }).await? {
            Answer::Image { image, .. } => Ok(Response::new(v1::RemoveImageResponse {
                image: Some((&image).into()),
            })),
            _ => Err(mismatch()),
        }
    }

    async fn label_image(
        &self,
        request: Request<v1::LabelImageRequest>,
    ) -> Result<Response<v1::LabelImageResponse>, Status> {
        let request = request.into_inner();
        let image = ImageName::new(&request.name).map_err(|error| invalid(error.into()))?;
        let set = treeboot_proto::labels(&request.set).map_err(invalid)?;
        let (rules, name) = (Arc::clone(&self.rules), image.clone());
        let changed = tokio::task::spawn_blocking(move || rules.change(&name, set, &request.remove)).await;
        let labels = changed
            .map_err(|error| Status::internal(error.to_string()))?
            .map_err(|error| status_of_rules(&error))?;
        tracing::info!(%image, ?labels, "an image's labels were changed");
        Ok(Response::new(v1::LabelImageResponse {
            labels: labels.into_iter().collect(),
        }))
    }

    async fn list_hosts(
        &self,
        _request: Request<v1::ListHostsRequest>,
    ) -> Result<Response<v1::ListHostsResponse>, Status> {
        let hosts = self
            .owner
            .ask(crate::tree::Forest::list_hosts)
            .await
            .map_err(status_of_call)?;
        Ok(Response::new(v1::ListHostsResponse {
            hosts: hosts.iter().map(convert::host).collect(),
        }))
    }

    async fn get_host(
        &self,
        request: Request<v1::GetHostRequest>,
    ) -> Result<Response<v1::GetHostResponse>, Status> {
        let name = request.into_inner().host;
        let hosts = self
            .owner
            .ask(crate::tree::Forest::list_hosts)
            .await
            .map_err(status_of_call)?;
        let host = hosts.iter().find(|host| host.info.name.as_str() == name);
        Ok(Response::new(v1::GetHostResponse {
            host: host.map(convert::host),
        }))
    }

    async fn get_tree(
        &self,
        request: Request<v1::GetTreeRequest>,
    ) -> Result<Response<v1::GetTreeResponse>, Status> {
        let image = image_id_or_newest(request.get_ref().image.as_ref()).map_err(invalid)?;
        self.caller_may(&request, &image.name).await?;
        let tree = self
            .owner
            .ask(move |forest| forest.tree(&image))
            .await
            .map_err(status_of_call)?
            .map_err(|refusal| status(&refusal))?;
        Ok(Response::new(convert::tree(&tree)))
    }

    async fn enroll(
        &self,
        request: Request<v1::EnrollRequest>,
    ) -> Result<Response<v1::CertifyResponse>, Status> {
        let (peer, request) = (peer(&request), request.into_inner());
        let host = HostName::new(&request.host).map_err(|error| invalid(error.into()))?;
        let enrolled = self
            .registrar
            .enroll(&request.token, host.clone(), request.request);
        match enrolled.await {
            Ok(response) => {
                tracing::info!(%host, "a host joined and has its certificate");
                Ok(Response::new(response))
            }
            Err(error) => {
                tracing::warn!(?peer, %host, reason = %crate::owner::chain(&error), "a host may not join");
                Err(status_of_enroll(&error))
            }
        }
    }

    async fn renew(
        &self,
        request: Request<v1::RenewRequest>,
    ) -> Result<Response<v1::CertifyResponse>, Status> {
        let (peer, request) = (peer(&request), request.into_inner());
        let Peer::Known {
            who: Who::Host(host), ..
        } = peer
        else {
            return Err(Status::unauthenticated(
                "a certificate is renewed for the host that shows it",
            ));
        };
        let renewed = self.registrar.renew(host.clone(), request.request).await;
        let response = renewed.map_err(|error| status_of_enroll(&error))?;
        tracing::info!(%host, "a host has its next certificate");
        Ok(Response::new(response))
    }
}
