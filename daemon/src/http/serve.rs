//! One listener for gRPC, HTTP/1.1 and HTTP/2.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{mpsc, watch};
use tokio::time::{Sleep, sleep};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::Connected;

/// Connections on their way from the listener to their server, which takes them at once.
const QUEUE: usize = 64;
/// From a connection's being taken in to its first bytes; a peer beyond an ocean takes a second.
const FIRST_BYTES_LIMIT: Duration = Duration::from_secs(10);
/// So many bytes are what HTTP/2 begins with (RFC 9113 §3.4): after them the protocol is known, and its own limits count. No request of
/// HTTP/1.1 with its host is shorter.
const FIRST_BYTES: usize = 24;

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
            if server
                .send(Ok::<_, io::Error>(Prompt::new(connection)))
                .await
                .is_err()
            {
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

/// A connection that is given up where its peer does not say in time what it wants.
struct Prompt<C> {
    connection: C,
    /// Until so many bytes have come.
    missing: usize,
    limit: Option<Pin<Box<Sleep>>>,
}

impl<C> Prompt<C> {
    fn new(connection: C) -> Self {
        Self {
            connection,
            missing: FIRST_BYTES,
            limit: Some(Box::pin(sleep(FIRST_BYTES_LIMIT))),
        }
    }
}

impl<C: Connected> Connected for Prompt<C> {
    type ConnectInfo = C::ConnectInfo;
    fn connect_info(&self) -> C::ConnectInfo {
        self.connection.connect_info()
    }
}

impl<C: AsyncRead + Unpin> AsyncRead for Prompt<C> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buffer.filled().len();
        let read = Pin::new(&mut this.connection).poll_read(context, buffer);
        if let Some(limit) = &mut this.limit {
            this.missing = this.missing.saturating_sub(buffer.filled().len() - before);
            if this.missing == 0 {
                this.limit = None;
            } else if read.is_pending() && limit.as_mut().poll(context).is_ready() {
                // A timer that has run out must not be asked again.
                this.limit = None;
                let why = "the peer did not say in time what it wants";
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, why)));
            }
        }
        read
    }
}

impl<C: AsyncWrite + Unpin> AsyncWrite for Prompt<C> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.connection).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.connection).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.connection.is_write_vectored()
    }
}
