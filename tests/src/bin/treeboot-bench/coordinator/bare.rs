//! A bare tonic service with the same TLS and the same messages, that decides nothing and keeps nothing: what the connections alone cost.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use futures_util::future::BoxFuture;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};
use treeboot_identity::authority::{self, Authority};
use treeboot_identity::tls::{Acceptance, Incoming};
use treeboot_identity::{Holder, Who};
use treeboot_proto::v1;
use treeboot_proto::v1::coordinator_server::{Coordinator, CoordinatorServer};

const LIFE: Duration = Duration::from_secs(86_400);

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// A coordinator's state directory, for its authority
    #[arg(long)]
    state: PathBuf,
    /// Where the address is written to once it serves
    #[arg(long)]
    ready_file: PathBuf,
}

/// Serves until it is killed.
pub(crate) async fn run(options: &Options) -> Result<()> {
    let authority = Authority::open(&authority::dir(&options.state))?.context("no authority")?;
    let holder = Holder::new(authority.issue(&Who::Coordinator, LIFE)?);
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let ready = serde_json::json!({ "rpc": listener.local_addr()?.to_string() });
    std::fs::write(&options.ready_file, ready.to_string())?;
    let incoming = Incoming::new(listener, Acceptance::mutual(&holder)?);
    Server::builder()
        .add_service(CoordinatorServer::new(Bare))
        .serve_with_incoming(incoming)
        .await?;
    Ok(())
}

struct Bare;

/// A placement of the usual size.
fn placement() -> v1::Placement {
    let parent = |name: &str| v1::Parent {
        host: name.into(),
        endpoint: Some(super::hosts::endpoint("10.1.2.3:3260")),
        ..Default::default()
    };
    let stripe = |stripe| v1::StripePlacement {
        stripe,
        depth: 12,
        active: vec![parent("h1")],
        fallbacks: ["h2", "h3", "h4", ""].map(parent).into(),
        ..Default::default()
    };
    v1::Placement {
        image: Some(super::hosts::image()),
        epoch: Some(v1::Epoch {
            incarnation: 1,
            counter: 1,
        }),
        stripes: vec![stripe(0), stripe(1)],
        ..Default::default()
    }
}

macro_rules! not_here {
    ($($verb:ident: $request:ident -> $response:ident),* $(,)?) => {$(
        // As `async_trait` writes it, which looks at a trait before macros in it are unfolded.
        fn $verb<'a, 'b>(
            &'a self,
            _: Request<v1::$request>,
        ) -> BoxFuture<'b, Result<Response<v1::$response>, Status>>
        where
            'a: 'b,
            Self: 'b,
        {
            Box::pin(async { Err(Status::unimplemented("a bare service")) })
        }
    )*};
}

#[tonic::async_trait]
impl Coordinator for Bare {
    async fn join(&self, _: Request<v1::JoinRequest>) -> Result<Response<v1::JoinResponse>, Status> {
        Ok(Response::new(v1::JoinResponse {
            placement: Some(placement()),
        }))
    }

    async fn register(
        &self,
        _: Request<v1::RegisterRequest>,
    ) -> Result<Response<v1::RegisterResponse>, Status> {
        Ok(Response::new(v1::RegisterResponse { epoch: None }))
    }

    type HeartbeatStream = ReceiverStream<Result<v1::Push, Status>>;

    async fn heartbeat(
        &self,
        request: Request<Streaming<v1::Beat>>,
    ) -> Result<Response<Self::HeartbeatStream>, Status> {
        let mut beats = request.into_inner();
        let (pushes, outgoing) = mpsc::channel(4);
        tokio::spawn(async move {
            let welcome = v1::push::Push::Welcome(v1::Welcome::default());
            let mut next = Some(welcome);
            while let Ok(Some(beat)) = beats.message().await {
                let ack = v1::push::Push::Ack(v1::Ack {
                    sequence: beat.sequence,
                });
                for push in next.take().into_iter().chain([ack]) {
                    if pushes.send(Ok(v1::Push { push: Some(push) })).await.is_err() {
                        return;
                    }
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }

    async fn add_image(
        &self,
        _: Request<v1::AddImageRequest>,
    ) -> Result<Response<v1::AddImageResponse>, Status> {
        Ok(Response::new(v1::AddImageResponse::default()))
    }

    not_here! {
        search: SearchRequest -> SearchResponse,
        remove: RemoveRequest -> RemoveResponse,
        leave: LeaveRequest -> LeaveResponse,
        get_image: GetImageRequest -> GetImageResponse,
        list_images: ListImagesRequest -> ListImagesResponse,
        remove_image: RemoveImageRequest -> RemoveImageResponse,
        list_hosts: ListHostsRequest -> ListHostsResponse,
        get_host: GetHostRequest -> GetHostResponse,
        get_tree: GetTreeRequest -> GetTreeResponse,
        enroll: EnrollRequest -> CertifyResponse,
        renew: RenewRequest -> CertifyResponse,
        label_image: LabelImageRequest -> LabelImageResponse,
    }
}
