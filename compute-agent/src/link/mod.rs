//! The agent's side of the coordinator: calls with a limit, and one heartbeat stream that comes back by itself.
//!
//! Losing the coordinator stops nothing here: the host keeps its last placement, and what needs the coordinator fails
//! with an error that names its address. Deliberately absent: what a placement means (the image owners' business).

mod beat;
pub mod talk;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint as Address};
use treeboot_identity::Role;
use treeboot_identity::tls::Dialer;
use treeboot_proto::v1;
use treeboot_proto::v1::coordinator_client::CoordinatorClient;
use treeboot_types::{Endpoint, Epoch, HostName, Image, ImageId, ImageName, ImageRef, Placement};

use crate::keys::Keys;

pub use beat::HostView;

/// Longest wait for a connection to the coordinator.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// Longest wait for the answer to a call: the coordinator syncs its store before it answers, and a disk may be slow.
const CALL_LIMIT: Duration = Duration::from_secs(5);
/// How long a call waits for the heartbeat stream, which must come first, before it fails.
const STREAM_LIMIT: Duration = Duration::from_secs(3);
/// Events from the coordinator that may wait for the host; one placement an image, and there are few at once.
const EVENTS: usize = 1024;

/// Who this agent is to the coordinator.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Its host.
    pub host: HostName,
    /// Random, kept in the state directory.
    pub instance: String,
}

/// Why a call to the coordinator failed.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Nobody answers.
    #[error(
        "the coordinator at {address} cannot be reached ({why}); see that it runs and that --coordinator names it"
    )]
    Unavailable {
        /// Its address.
        address: String,
        /// What was seen last.
        why: String,
    },
    /// It answered, and no.
    #[error("{}", .0.message())]
    Refused(Box<tonic::Status>),
    /// It answered with something that makes no sense.
    #[error("the coordinator at {address} sent what cannot be used: {why}")]
    Invalid {
        /// Its address.
        address: String,
        /// What.
        why: String,
    },
}

impl LinkError {
    /// The coordinator acts on another epoch or does not know the place: ask again with what is in force.
    pub fn is_stale(&self) -> bool {
        use tonic::Code;
        matches!(self, Self::Refused(status)
            if matches!(status.code(), Code::Aborted | Code::FailedPrecondition | Code::NotFound))
    }

    /// Nobody was there to answer.
    pub fn is_unavailable(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }
}

/// What the coordinator said by itself.
#[derive(Debug)]
pub enum LinkEvent {
    /// A stream stands.
    Connected {
        /// The coordinator's last decision; its incarnation tells one state from the next.
        epoch: Epoch,
    },
    /// A new place.
    Placed(Box<Placement>),
    /// An attachment is no longer wanted.
    Detach(Unwanted),
    /// This agent is not let in, for good.
    Refused {
        /// For people.
        reason: String,
    },
}

/// The coordinator's wish that an attachment end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unwanted {
    /// Of which image.
    pub image: ImageId,
    /// When this was decided.
    pub epoch: Epoch,
    /// For people.
    pub reason: String,
    /// What is cached of it is of no use any more, either.
    pub drop_cache: bool,
}

/// The state of the heartbeat stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stream {
    /// Welcome came, of this incarnation.
    Up,
    /// Not now; what was seen last.
    Down(String),
}

/// The link. Clones share it.
#[derive(Clone)]
pub struct Link {
    client: CoordinatorClient<Channel>,
    address: String,
    identity: Identity,
    keys: Arc<Keys>,
    stream: watch::Receiver<Stream>,
}

impl Link {
    /// Makes the link and starts its heartbeat, which goes on until `stop`. Nothing is waited for.
    ///
    /// # Errors
    /// The address is not one.
    pub fn start(
        address: &str,
        dialer: &Dialer,
        keys: Arc<Keys>,
        identity: Identity,
        view: impl HostView,
        stop: CancellationToken,
    ) -> Result<(Self, mpsc::Receiver<LinkEvent>), LinkError> {
        let endpoint = Address::from_shared(address.to_owned())
            .map_err(|error| LinkError::Invalid {
                address: address.to_owned(),
                why: format!("the address is not a URL such as http://127.0.0.1:7400: {error}"),
            })?
            .connect_timeout(CONNECT_LIMIT)
            .tcp_nodelay(true);
        let client = CoordinatorClient::new(dialer.channel(&endpoint));
        let (events, inbox) = mpsc::channel(EVENTS);
        let (state, stream) = watch::channel(Stream::Down("not connected yet".into()));
        let link = Self {
            client: client.clone(),
            address: address.to_owned(),
            identity: identity.clone(),
            keys: Arc::clone(&keys),
            stream,
        };
        let heart = beat::Heart {
            client,
            address: address.to_owned(),
            identity,
            keys,
            view,
            state,
            events,
        };
        tokio::spawn(heart.run(stop));
        Ok((link, inbox))
    }

    /// Whether the stream stands.
    pub fn connected(&self) -> bool {
        *self.stream.borrow() == Stream::Up
    }

    /// The coordinator's address.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Takes a place in an image's trees.
    ///
    /// # Errors
    /// [`LinkError`].
    pub async fn join(&self, image: &ImageId, endpoint: &Endpoint) -> Result<Placement, LinkError> {
        self.wait_for_stream().await?;
        let request = v1::JoinRequest {
            host: self.identity.host.to_string(),
            instance: self.identity.instance.clone(),
            image: Some(image.into()),
            endpoint: Some(endpoint.into()),
        };
        let mut client = self.client.clone();
        let response = self.call(client.join(request)).await?;
        let placement = response.placement.ok_or_else(|| self.invalid("no placement"))?;
        // Before anybody acts on the place.
        self.keys.placed(&placement).await;
        (&placement).try_into().map_err(|error| self.invalid(error))
    }

    /// Tells that an export is up. Returns the epoch in force.
    ///
    /// # Errors
    /// [`LinkError`].
    pub async fn register(&self, image: &ImageId, epoch: Epoch) -> Result<Epoch, LinkError> {
        let request = v1::RegisterRequest {
            host: self.identity.host.to_string(),
            instance: self.identity.instance.clone(),
            image: Some(image.into()),
            epoch: Some(epoch.into()),
        };
        let mut client = self.client.clone();
        let response = self.call(client.register(request)).await?;
        Ok(response.epoch.map_or(epoch, Into::into))
    }

    /// Gives a place up.
    ///
    /// # Errors
    /// [`LinkError`].
    pub async fn remove(&self, image: &ImageId, epoch: Epoch) -> Result<(), LinkError> {
        let request = v1::RemoveRequest {
            host: self.identity.host.to_string(),
            instance: self.identity.instance.clone(),
            image: Some(image.into()),
            epoch: Some(epoch.into()),
        };
        let mut client = self.client.clone();
        self.call(client.remove(request)).await.map(|_| ())
    }

    /// An image's record.
    ///
    /// # Errors
    /// [`LinkError`].
    pub async fn image(&self, image: &ImageRef) -> Result<Image, LinkError> {
        self.image_for(image, None).await
    }

    /// An image's record, asked for on behalf of somebody of this role.
    ///
    /// # Errors
    /// [`LinkError`]; refused where that role may not use the image.
    pub async fn image_for(&self, image: &ImageRef, role: Option<Role>) -> Result<Image, LinkError> {
        let request = v1::GetImageRequest {
            id: Some(image.into()),
            role: role.map(|role| role.to_string()).unwrap_or_default(),
        };
        let mut client = self.client.clone();
        let response = self.call(client.get_image(request)).await?;
        let image = response.image.ok_or_else(|| self.invalid("no image"))?;
        (&image).try_into().map_err(|error| self.invalid(error))
    }

    /// Every version of a name.
    ///
    /// # Errors
    /// [`LinkError`].
    pub async fn versions(&self, name: &ImageName) -> Result<Vec<Image>, LinkError> {
        let mut images = self.images().await?;
        images.retain(|image| image.id.name == *name);
        Ok(images)
    }

    /// Every image.
    ///
    /// # Errors
    /// [`LinkError`].
    pub async fn images(&self) -> Result<Vec<Image>, LinkError> {
        let mut client = self.client.clone();
        let response = self.call(client.list_images(v1::ListImagesRequest {})).await?;
        let images = response.images.iter().map(|image| image.try_into());
        let images: Result<Vec<Image>, _> = images.collect();
        images.map_err(|error| self.invalid(error))
    }

    /// What the coordinator knows of a host; nothing where it knows none of the name.
    ///
    /// # Errors
    /// [`LinkError`].
    pub async fn host(&self, name: &HostName) -> Result<Option<v1::HostRecord>, LinkError> {
        let mut client = self.client.clone();
        let request = v1::GetHostRequest {
            host: name.to_string(),
        };
        Ok(self.call(client.get_host(request)).await?.host)
    }

    /// Records an image, or another origin of one. Returns the record and whether it is new.
    ///
    /// # Errors
    /// [`LinkError`].
    pub async fn add_image(&self, image: v1::Image) -> Result<(Image, bool), LinkError> {
        let mut client = self.client.clone();
        let request = v1::AddImageRequest { image: Some(image) };
        let response = self.call(client.add_image(request)).await?;
        let image = response.image.ok_or_else(|| self.invalid("no image"))?;
        let image = (&image).try_into().map_err(|error| self.invalid(error))?;
        Ok((image, response.created))
    }

    fn invalid(&self, why: impl ToString) -> LinkError {
        LinkError::Invalid {
            address: self.address.clone(),
            why: why.to_string(),
        }
    }

    fn unavailable(&self, why: impl ToString) -> LinkError {
        LinkError::Unavailable {
            address: self.address.clone(),
            why: why.to_string(),
        }
    }

    /// A host that the coordinator does not know yet cannot join.
    async fn wait_for_stream(&self) -> Result<(), LinkError> {
        let mut stream = self.stream.clone();
        let up = tokio::time::timeout(STREAM_LIMIT, stream.wait_for(|state| *state == Stream::Up)).await;
        match up {
            Ok(Ok(_)) => Ok(()),
            _ => match &*self.stream.borrow() {
                Stream::Up => Ok(()),
                Stream::Down(why) => Err(self.unavailable(why)),
            },
        }
    }

    async fn call<T>(
        &self,
        call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    ) -> Result<T, LinkError> {
        match tokio::time::timeout(CALL_LIMIT, call).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) if is_transport(&status) => {
                Err(self.unavailable(crate::identity::reason(&status)))
            }
            Ok(Err(status)) => Err(LinkError::Refused(Box::new(status))),
            Err(_) => Err(self.unavailable(format_args!("no answer within {} s", CALL_LIMIT.as_secs()))),
        }
    }
}

/// A status that no coordinator sent: tonic made it of a connection that failed.
fn is_transport(status: &tonic::Status) -> bool {
    status.code() == tonic::Code::Unavailable || std::error::Error::source(status).is_some()
}
