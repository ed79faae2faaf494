//! Connections whose two ends know each other: TLS 1.3 on which both show certificates of one authority.
//!
//! A server is known by the name in its certificate, never by its address. A connection lives no longer than the certificate
//! that opened it. Whoever shows no certificate gets a connection, because a host that joins has none yet; what may be asked
//! on it is the [gate](crate::gate)'s to say.

mod other;

use std::fmt;
use std::future::Future as _;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{
    ClientHello, NoServerSessionStorage, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier,
};
use rustls::sign::CertifiedKey;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig,
    SignatureScheme,
};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{Sleep, sleep, timeout};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};
use tokio_stream::Stream;
use tonic::transport::server::Connected;
use tonic::transport::{Channel, Endpoint};

use crate::authority::Fingerprint;
use crate::credentials::Holder;
use crate::unix_now;
use crate::who::{Certified, Who};

/// From the first byte to the end of the handshake; a peer beyond an ocean takes a second.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Handshakes under way. Each takes memory and no name was shown yet; the others wait in the kernel's queue.
const MAX_HANDSHAKES: usize = 512;
/// After a failed accept: the process has too many files open, and trying at once would only burn the processor.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Longest time to a connection's forced end that a timer is set for; beyond it nobody waits.
const MAX_LIFE: Duration = Duration::from_secs(365 * 86_400);
/// What HTTP/2 is called in the handshake (RFC 9113 §3.1).
const ALPN: &[u8] = b"h2";
/// What HTTP/1.1 is called there (RFC 7301 §6), for those who speak no gRPC.
const ALPN_HTTP1: &[u8] = b"http/1.1";

/// Something about a configuration that cannot be: an algorithm that our own provider lacks.
#[derive(Debug, thiserror::Error)]
#[error("TLS cannot be set up: {0}")]
pub struct SetupError(String);

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

impl ResolvesServerCert for Holder {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.current().signer))
    }
}

impl ResolvesClientCert for Holder {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        // Whatever the server hints at: it will say what is wrong with ours better than our silence would.
        Some(Arc::clone(&self.current().signer))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

fn roots(authority: &CertificateDer<'static>) -> Result<RootCertStore, SetupError> {
    let mut roots = RootCertStore::empty();
    roots
        .add(authority.clone())
        .map_err(|error| SetupError(error.to_string()))?;
    Ok(roots)
}

fn server_config(holder: &Holder) -> Result<ServerConfig, SetupError> {
    let setup = |error: &dyn fmt::Display| SetupError(error.to_string());
    let roots = Arc::new(roots(holder.current().authority())?);
    let clients: Arc<dyn ClientCertVerifier> = WebPkiClientVerifier::builder_with_provider(roots, provider())
        .allow_unauthenticated()
        .build()
        .map_err(|error| setup(&error))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| setup(&error))?
        .with_client_cert_verifier(clients)
        .with_cert_resolver(Arc::new(holder.clone()));
    config.alpn_protocols = vec![ALPN.to_vec(), ALPN_HTTP1.to_vec()];
    // A resumed session is not checked for its certificate's end.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// Who is at the other end of a connection to a server of ours; an extension of each request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    /// There is no TLS: anybody.
    Insecure,
    /// They showed no certificate.
    Unknown {
        /// From where.
        address: SocketAddr,
    },
    /// They showed one of our authority's.
    Known {
        /// Whose.
        who: Who,
        /// From where.
        address: SocketAddr,
    },
}

impl Peer {
    /// Whether they may speak for `host`: without TLS everybody may.
    ///
    /// # Errors
    /// Who they are, for a refusal.
    pub fn speaks_for(&self, host: &treeboot_types::HostName) -> Result<(), String> {
        match self {
            Self::Insecure => Ok(()),
            Self::Known {
                who: Who::Host(own), ..
            } if own == host => Ok(()),
            Self::Known { who, .. } => Err(who.to_string()),
            Self::Unknown { .. } => Err("somebody without a certificate".into()),
        }
    }
}

/// How a server takes connections in.
#[derive(Clone)]
pub enum Acceptance {
    /// Without TLS.
    Insecure,
    /// With TLS.
    Mutual(Arc<ServerConfig>),
}

impl Acceptance {
    /// With TLS, showing what `holder` holds.
    ///
    /// # Errors
    /// [`SetupError`].
    pub fn mutual(holder: &Holder) -> Result<Self, SetupError> {
        Ok(Self::Mutual(Arc::new(server_config(holder)?)))
    }
}

/// The connections that a listener takes in, their handshakes done. Never ends and never fails: a peer that cannot be
/// let in is logged.
pub struct Incoming {
    listener: TcpListener,
    acceptance: Acceptance,
    handshakes: JoinSet<Option<Connection>>,
    pause: Option<Pin<Box<Sleep>>>,
}

impl Incoming {
    /// Of `listener`.
    #[must_use]
    pub fn new(listener: TcpListener, acceptance: Acceptance) -> Self {
        Self {
            listener,
            acceptance,
            handshakes: JoinSet::new(),
            pause: None,
        }
    }
}

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            match this.handshakes.poll_join_next(context) {
                Poll::Ready(Some(Ok(Some(connection)))) => return Poll::Ready(Some(Ok(connection))),
                Poll::Ready(Some(_)) => continue,
                Poll::Ready(None) | Poll::Pending => {}
            }
            if let Some(pause) = &mut this.pause {
                ready!(pause.as_mut().poll(context));
                this.pause = None;
            }
            if this.handshakes.len() >= MAX_HANDSHAKES {
                return Poll::Pending;
            }
            match ready!(this.listener.poll_accept(context)) {
                Ok((stream, address)) => {
                    // Only slower without it.
                    let _ = stream.set_nodelay(true);
                    match &this.acceptance {
                        Acceptance::Insecure => {
                            return Poll::Ready(Some(Ok(Connection {
                                stream: Transport::Plain(stream),
                                peer: Peer::Insecure,
                                end: None,
                            })));
                        }
                        Acceptance::Mutual(config) => {
                            let config = Arc::clone(config);
                            this.handshakes.spawn(shake(stream, address, config));
                        }
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be taken in");
                    this.pause = Some(Box::pin(sleep(ACCEPT_PAUSE)));
                }
            }
        }
    }
}

async fn shake(stream: TcpStream, address: SocketAddr, config: Arc<ServerConfig>) -> Option<Connection> {
    let stream = match timeout(HANDSHAKE_LIMIT, TlsAcceptor::from(config).accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            let reason = words(&error).unwrap_or_else(|| error.to_string());
            tracing::warn!(peer = %address, %reason, "a connection was refused");
            return None;
        }
        Err(_) => {
            tracing::warn!(peer = %address, "a connection was refused: its handshake took too long");
            return None;
        }
    };
    let (peer, end) = match stream.get_ref().1.peer_certificates() {
        None => (Peer::Unknown { address }, None),
        Some(chain) => match chain.first().map(Certified::of) {
            Some(Ok(Certified { who, until, .. })) => {
                let left = Duration::from_secs(until.saturating_sub(unix_now())).min(MAX_LIFE);
                (Peer::Known { who, address }, Some(Box::pin(sleep(left))))
            }
            Some(Err(error)) => {
                tracing::warn!(peer = %address, reason = %error, "a connection was refused");
                return None;
            }
            None => (Peer::Unknown { address }, None),
        },
    };
    Some(Connection {
        stream: Transport::Server(Box::new(stream)),
        peer,
        end,
    })
}

enum Transport {
    Plain(TcpStream),
    Server(Box<server::TlsStream<TcpStream>>),
    Client(Box<client::TlsStream<TcpStream>>),
}

/// A connection, of either side, with or without TLS.
pub struct Connection {
    stream: Transport,
    peer: Peer,
    /// When the peer's certificate ends, and the connection with it.
    end: Option<Pin<Box<Sleep>>>,
}

impl Connection {
    /// Whether both ends agreed in their handshake to speak HTTP/2.
    pub fn is_http2(&self) -> bool {
        match &self.stream {
            Transport::Plain(_) => false,
            Transport::Server(stream) => stream.get_ref().1.alpn_protocol() == Some(ALPN),
            Transport::Client(stream) => stream.get_ref().1.alpn_protocol() == Some(ALPN),
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;
    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(end) = &mut self.end
            && end.as_mut().poll(context).is_ready()
        {
            // A timer that has run out must not be asked again.
            self.end = None;
            return Poll::Ready(Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "the certificate that opened this connection has expired",
            )));
        }
        match &mut self.stream {
            Transport::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Transport::Server(stream) => Pin::new(stream).poll_read(context, buffer),
            Transport::Client(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Transport::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Transport::Server(stream) => Pin::new(stream).poll_write(context, bytes),
            Transport::Client(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Transport::Plain(stream) => Pin::new(stream).poll_flush(context),
            Transport::Server(stream) => Pin::new(stream).poll_flush(context),
            Transport::Client(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Transport::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Transport::Server(stream) => Pin::new(stream).poll_shutdown(context),
            Transport::Client(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

/// Whom a client wants to reach.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Trust {
    /// Whoever this authority calls so.
    Authority(CertificateDer<'static>),
    /// Whoever an authority of this fingerprint calls so.
    Fingerprint(Fingerprint),
}

#[derive(Debug)]
struct Verifier {
    trust: Trust,
    expected: Who,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let authority = match &self.trust {
            Trust::Authority(authority) => authority.clone(),
            Trust::Fingerprint(fingerprint) => intermediates
                .iter()
                .find(|shown| Fingerprint::of(shown) == *fingerprint)
                .ok_or(CertificateError::UnknownIssuer)?
                .clone()
                .into_owned(),
        };
        let mut roots = RootCertStore::empty();
        roots.add(authority)?;
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(certificate)?,
            &roots,
            &[],
            now,
            self.provider.signature_verification_algorithms.all,
        )?;
        let certified =
            Certified::of(certificate).map_err(|error| rustls::Error::General(error.to_string()))?;
        if certified.who != self.expected {
            return Err(rustls::Error::General(format!(
                "{} answers there, not {}",
                certified.who, self.expected
            )));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// How a client makes connections.
#[derive(Clone)]
pub enum Dialer {
    /// Without TLS.
    Insecure,
    /// With TLS; and whom it trusts and what it shows, for other peers.
    Mutual(Arc<ClientConfig>, Option<Arc<Holder>>),
}

impl fmt::Debug for Dialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Insecure => "Insecure",
            Self::Mutual(..) => "Mutual",
        })
    }
}

impl Dialer {
    /// Shows what `holder` holds, and speaks to nobody but `expected`.
    ///
    /// # Errors
    /// [`SetupError`].
    pub fn mutual(holder: &Holder, expected: Who) -> Result<Self, SetupError> {
        let trust = Trust::Authority(holder.current().authority().clone());
        Self::build(trust, expected, Some(holder))
    }

    /// Shows nothing, and speaks to nobody but the coordinator whose authority has this fingerprint.
    ///
    /// # Errors
    /// [`SetupError`].
    pub fn unnamed(fingerprint: Fingerprint) -> Result<Self, SetupError> {
        Self::build(Trust::Fingerprint(fingerprint), Who::Coordinator, None)
    }

    fn build(trust: Trust, expected: Who, holder: Option<&Holder>) -> Result<Self, SetupError> {
        let verifier = Arc::new(Verifier {
            trust,
            expected,
            provider: provider(),
        });
        let config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| SetupError(error.to_string()))?
            // Dangerous is what it does not check: the address. It checks the name instead.
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match holder {
            Some(holder) => config.with_client_cert_resolver(Arc::new(holder.clone())),
            None => config.with_no_client_auth(),
        };
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = Resumption::disabled();
        Ok(Self::Mutual(Arc::new(config), holder.cloned().map(Arc::new)))
    }

    async fn dial(self, uri: tonic::codegen::http::Uri) -> io::Result<TokioIo<Connection>> {
        let host = uri.host().unwrap_or_default();
        let host = host
            .strip_prefix('[')
            .and_then(|h| h.strip_suffix(']'))
            .unwrap_or(host);
        let port = uri.port_u16().unwrap_or(443);
        let stream = TcpStream::connect((host, port)).await?;
        stream.set_nodelay(true)?;
        let address = stream.peer_addr()?;
        let stream = match self {
            Self::Insecure => Transport::Plain(stream),
            Self::Mutual(config, _) => {
                // Nobody looks at it: the verifier asks for the name in the certificate.
                let name = ServerName::try_from("treeboot.invalid").map_err(io::Error::other)?;
                let shake = TlsConnector::from(config).connect(name, stream);
                let shake = async {
                    let mut stream = shake.await?;
                    // With TLS 1.3 our side is done before the server has looked at our certificate. Its first frame says
                    // that it likes it, a refusal comes as an error here, with its reason; HTTP/2 would only know that the
                    // connection ended.
                    stream.fill_buf().await?;
                    Ok::<_, io::Error>(stream)
                };
                let late = || io::Error::new(io::ErrorKind::TimedOut, "the TLS handshake took too long");
                let stream = timeout(HANDSHAKE_LIMIT, shake).await.map_err(|_| late())??;
                Transport::Client(Box::new(stream))
            }
        };
        Ok(TokioIo::new(Connection {
            stream,
            peer: Peer::Unknown { address },
            end: None,
        }))
    }

    /// A channel that connects when it is used, and again when the connection is lost.
    #[must_use]
    pub fn channel(&self, endpoint: &Endpoint) -> Channel {
        let dialer = self.clone();
        endpoint.connect_with_connector_lazy(tower::service_fn(move |uri| dialer.clone().dial(uri)))
    }

    /// A channel that stands.
    ///
    /// # Errors
    /// There is no connection; [`words`] may know why.
    pub async fn connect(&self, endpoint: &Endpoint) -> Result<Channel, tonic::transport::Error> {
        let dialer = self.clone();
        let connector = tower::service_fn(move |uri| dialer.clone().dial(uri));
        endpoint.connect_with_connector(connector).await
    }
}

/// What TLS has against a connection, for people; `None` where the error is another's.
#[must_use]
pub fn words(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let tls = error.downcast_ref::<rustls::Error>().or_else(|| {
            // An error within an I/O error is not among its sources; its own sources are.
            let io = error.downcast_ref::<io::Error>()?;
            io.get_ref()?.downcast_ref::<rustls::Error>()
        });
        if let Some(tls) = tls {
            return Some(tls_words(tls));
        }
        cause = error.source();
    }
    None
}

fn tls_words(error: &rustls::Error) -> String {
    use rustls::Error;
    let words = match error {
        Error::AlertReceived(AlertDescription::CertificateExpired) => {
            "the other side refuses our certificate: it has expired"
        }
        Error::AlertReceived(AlertDescription::UnknownCA | AlertDescription::DecryptError) => {
            "the other side refuses our certificate: it is of another authority than theirs"
        }
        Error::AlertReceived(
            AlertDescription::BadCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::AccessDenied,
        ) => "the other side refuses our certificate; its log says why",
        Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            "the other side's certificate has expired"
        }
        Error::InvalidCertificate(
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. },
        ) => "the other side's certificate is not valid yet; compare the clocks",
        Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            "the other side's certificate is of another authority than ours"
        }
        Error::InvalidMessage(_) => "the other side does not speak TLS",
        Error::General(words) => return words.clone(),
        other => return other.to_string(),
    };
    words.into()
}
