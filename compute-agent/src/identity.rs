//! This host's certificate: got once for a join token, kept in the state directory, renewed before it ends.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;
use treeboot_identity::tls::{Dialer, SetupError, words};
use treeboot_identity::token::{JoinToken, TokenError};
use treeboot_identity::{Credentials, CredentialsError, Holder, NewKey, Who, unix_now};
use treeboot_proto::v1;
use treeboot_proto::v1::coordinator_client::CoordinatorClient;
use treeboot_types::HostName;

/// How long a first start waits for its coordinator: both may have been started at once. Whoever starts the agent again after
/// that has a line in the log to look at.
const JOIN_LIMIT: Duration = Duration::from_secs(60);
/// Between two attempts to join.
const JOIN_PAUSE: Duration = Duration::from_millis(500);
/// Longest wait for a connection, and for an answer.
const CALL_LIMIT: Duration = Duration::from_secs(10);
/// Shortest and longest pause before renewal is tried again.
const RENEW_PAUSE: (u64, u64) = (1, 600);

/// How a host proves who it is.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct IdentityOptions {
    /// The token of 'treeboot-coordinator token create', by which this host joins. Needed once: the certificate that it gives
    /// is kept in the state directory and renewed by itself.
    #[arg(
        long,
        env = "TREEBOOT_JOIN_TOKEN",
        value_name = "TOKEN",
        conflicts_with = "join_token_file",
        hide_env_values = true
    )]
    pub join_token: Option<String>,
    /// A file that holds the token, so that it does not stand in the list of processes.
    #[arg(long, env = "TREEBOOT_JOIN_TOKEN_FILE", value_name = "FILE")]
    pub join_token_file: Option<PathBuf>,
    /// No certificates, for a laptop: listens on loopback only.
    #[arg(long, env = "TREEBOOT_INSECURE")]
    pub insecure: bool,
}

/// Why the host has no identity that it could show.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// It is another host's.
    #[error("{} is the identity of {found}, not of host '{given}'; remove it and join with a token", path.display())]
    OtherHost {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        found: Who,
        /// As given.
        given: HostName,
    },
    /// The token's file.
    #[error("cannot read the join token in {}", path.display())]
    TokenFile {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The token is none.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// TLS.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The coordinator says no.
    #[error("the coordinator at {address} does not let host '{host}' join: {why}")]
    Refused {
        /// Its address.
        address: String,
        /// Who asked.
        host: HostName,
        /// Its words.
        why: String,
    },
    /// The coordinator does not answer.
    #[error(
        "host '{host}' cannot join at {address} ({why}); see that the coordinator runs there and has an authority"
    )]
    Unreachable {
        /// Its address.
        address: String,
        /// Who asked.
        host: HostName,
        /// What was seen last.
        why: String,
    },
    /// `--insecure` beside an identity.
    #[error("{} is there, so this host has an identity, and --insecure would not use it; leave one of them out", path.display())]
    Insecure {
        /// The file.
        path: PathBuf,
    },
    /// TLS without an identity.
    #[error("https:// needs a certificate, and host '{host}' has none; start it with --join-token")]
    NoIdentity {
        /// Whose.
        host: HostName,
    },
}

/// This host's identity, and where it is kept.
#[derive(Debug, Clone)]
pub struct Identity {
    /// What is shown.
    pub holder: Holder,
    path: PathBuf,
    host: HostName,
}

/// The host's identity, from its state directory or for a token; `None` where there is neither.
///
/// # Errors
/// [`IdentityError`].
pub async fn open(
    options: &IdentityOptions,
    state: &Path,
    host: &HostName,
    coordinator: &str,
) -> Result<Option<Identity>, IdentityError> {
    let path = state.join("identity.pem");
    let token = match (&options.join_token, &options.join_token_file) {
        (Some(token), _) => Some(token.clone()),
        (None, Some(path)) => {
            Some(
                std::fs::read_to_string(path).map_err(|source| IdentityError::TokenFile {
                    path: path.clone(),
                    source,
                })?,
            )
        }
        (None, None) => None,
    };
    let kept = Credentials::load(&path)?;
    if options.insecure && (kept.is_some() || token.is_some()) {
        return Err(IdentityError::Insecure { path });
    }
    let credentials = match (kept, token) {
        (Some(kept), token) => {
            let certified = kept.certified().clone();
            if certified.who != Who::Host(host.clone()) {
                return Err(IdentityError::OtherHost {
                    path,
                    found: certified.who,
                    given: host.clone(),
                });
            }
            match token {
                _ if certified.holds(unix_now()) => kept,
                Some(token) => join(&token, host, coordinator).await?,
                // Its VMs read from here, so it serves; the coordinator will say no.
                None => {
                    tracing::error!(
                        "the certificate of host '{host}' {}, so its coordinator will not hear it; make a token with \
                         'treeboot-coordinator token create --host {host}' and start the agent with --join-token",
                        if unix_now() < certified.from {
                            "begins in the future by this machine's clock"
                        } else {
                            "has expired"
                        }
                    );
                    kept
                }
            }
        }
        (None, Some(token)) => join(&token, host, coordinator).await?,
        (None, None) if coordinator.starts_with("https://") => {
            return Err(IdentityError::NoIdentity { host: host.clone() });
        }
        (None, None) => return Ok(None),
    };
    credentials.save(&path)?;
    Ok(Some(Identity {
        holder: Holder::new(credentials),
        path,
        host: host.clone(),
    }))
}

async fn join(token: &str, host: &HostName, coordinator: &str) -> Result<Credentials, IdentityError> {
    let token: JoinToken = token.parse()?;
    let key = NewKey::generate()?;
    let request = v1::EnrollRequest {
        host: host.to_string(),
        token: token.to_string(),
        // The same at each attempt: a coordinator whose answer was lost knows it again.
        request: key.request()?,
    };
    let dialer = Dialer::unnamed(token.fingerprint)?;
    let unreachable = |why: String| IdentityError::Unreachable {
        address: coordinator.to_owned(),
        host: host.clone(),
        why,
    };
    let endpoint = endpoint(coordinator).map_err(unreachable)?;
    let began = tokio::time::Instant::now();
    tracing::info!(%host, coordinator, "joining");
    loop {
        let mut client = CoordinatorClient::new(dialer.channel(&endpoint));
        match client.enroll(request.clone()).await {
            Ok(response) => {
                let response = response.into_inner();
                return Ok(key.with(response.certificate, response.authority)?);
            }
            Err(status) if std::error::Error::source(&status).is_none() => {
                return Err(IdentityError::Refused {
                    address: coordinator.to_owned(),
                    host: host.clone(),
                    why: status.message().to_owned(),
                });
            }
            Err(status) => {
                if began.elapsed() >= JOIN_LIMIT {
                    return Err(unreachable(reason(&status)));
                }
                tracing::debug!(reason = %reason(&status), "could not join yet");
            }
        }
        tokio::time::sleep(JOIN_PAUSE).await;
    }
}

fn endpoint(coordinator: &str) -> Result<Endpoint, String> {
    let endpoint = Endpoint::from_shared(coordinator.to_owned()).map_err(|error| error.to_string())?;
    Ok(endpoint.connect_timeout(CALL_LIMIT).timeout(CALL_LIMIT))
}

/// The innermost reason of a status, which is what a person needs ("Connection refused").
pub(crate) fn reason(status: &tonic::Status) -> String {
    if let Some(words) = words(status) {
        return words;
    }
    let mut reason = status.message().to_owned();
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        reason = error.to_string();
        source = error.source();
    }
    reason
}

impl Identity {
    /// Whom to be let in by: the coordinator and nobody else.
    ///
    /// # Errors
    /// [`SetupError`].
    pub fn dialer(&self) -> Result<Dialer, SetupError> {
        Dialer::mutual(&self.holder, Who::Coordinator)
    }

    /// Asks for the next certificate when it is time, until `stop`.
    pub async fn keep_new(self, dialer: Dialer, coordinator: String, stop: CancellationToken) {
        let Ok(endpoint) = endpoint(&coordinator) else {
            // The link says so.
            return;
        };
        loop {
            let certified = self.holder.current().certified().clone();
            let now = unix_now();
            let due = certified.renew_at();
            // Often enough to notice that the clock was set.
            let pause = match due.saturating_sub(now) {
                0 => certified.until.saturating_sub(now) / 8,
                left => left,
            };
            let pause = Duration::from_secs(pause.clamp(RENEW_PAUSE.0, RENEW_PAUSE.1));
            if certified.is_due(now) {
                match self.renew(&dialer, &endpoint).await {
                    Ok(()) => {
                        tracing::info!(host = %self.host, "the host's certificate was renewed");
                        // Where two clocks differ by hours the next one is due at once, too.
                        if !self.holder.current().certified().is_due(unix_now()) {
                            continue;
                        }
                    }
                    Err(why) => tracing::warn!(
                        host = %self.host, reason = %why, left_seconds = certified.until.saturating_sub(now),
                        "the host's certificate could not be renewed; trying again"
                    ),
                }
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    async fn renew(&self, dialer: &Dialer, endpoint: &Endpoint) -> Result<(), String> {
        let key = NewKey::generate().map_err(|error| error.to_string())?;
        let request = v1::RenewRequest {
            request: key.request().map_err(|error| error.to_string())?,
        };
        let mut client = CoordinatorClient::new(dialer.channel(endpoint));
        let response = client.renew(request).await.map_err(|status| reason(&status))?;
        let response = response.into_inner();
        let credentials = key.with(response.certificate, response.authority);
        let credentials = Arc::new(credentials.map_err(|error| error.to_string())?);
        // First the file: after a restart the newest must be there.
        let (path, saved) = (self.path.clone(), Arc::clone(&credentials));
        let done = tokio::task::spawn_blocking(move || saved.save(&path)).await;
        done.map_err(|error| error.to_string())?
            .map_err(|error| error.to_string())?;
        self.holder.replace(credentials);
        Ok(())
    }
}
