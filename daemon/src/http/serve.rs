//! One listener for gRPC, HTTP/1.1 and HTTP/2.

use std::io;
use std::time::Duration;

use axum::Router;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::Connected;

/// Connections on their way from the listener to their server, which takes them at once.
const QUEUE: usize = 64;

/// Serves `router` on all connections of `incoming` until `stop` says so, and those that are open to the end of what is under way.
///
/// `is_http2` says whether both ends know already that a connection is HTTP/2. The server then speaks first, as that protocol
/// lets it: our own clients wait for it, because it tells that their certificate was liked. On all others the server waits for the
/// first bytes, which tell what they are. `keepalive` is how often a connection of HTTP/2 is asked for a sign of life.
///
/// # Errors
/// A server ended by itself.
pub async fn serve<C>(
    incoming: impl Stream<Item = io::Result<C>> + Send + 'static,
    is_http2: fn(&C) -> bool,
    router: Router,
    keepalive: Option<Duration>,
    stop: watch::Receiver<bool>,
) -> Result<(), tonic::transport::Error>
where
    C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    let (known, known_taken) = mpsc::channel(QUEUE);
    let (open, open_taken) = mpsc::channel(QUEUE);
    let mut stopped = stop.clone();
    let sort = async move {
        let mut incoming = std::pin::pin!(incoming);
        loop {
            let connection = tokio::select! {
                _ = stopped.wait_for(|stop| *stop) => break,
                next = incoming.next() => match next {
                    Some(Ok(connection)) => connection,
                    Some(Err(_)) => continue,
                    None => break,
                },
            };
            let server = if is_http2(&connection) { &known } else { &open };
            if server.send(Ok::<_, io::Error>(connection)).await.is_err() {
                break;
            }
        }
        Ok(())
    };
    let server = |http1: bool, taken| {
        let mut stop = stop.clone();
        Server::builder()
            .accept_http1(http1)
            .http2_keepalive_interval(keepalive)
            .add_routes(Routes::from(router.clone()))
            .serve_with_incoming_shutdown(ReceiverStream::new(taken), async move {
                let _ = stop.wait_for(|stop| *stop).await;
            })
    };
    tokio::try_join!(sort, server(false, known_taken), server(true, open_taken))?;
    Ok(())
}
