//! The coordinator's authority at work: how it answers with TLS, lets hosts join, and what a person types to make tokens and users.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use treeboot_identity::authority::{self, Authority, AuthorityError, Fingerprint};
use treeboot_identity::edges::{EdgeKey, EdgesError};
use treeboot_identity::gate::Gate;
use treeboot_identity::tls::{Acceptance, SetupError};
use treeboot_identity::token::{self, Gatebook, JoinToken, TokenError};
use treeboot_identity::{Holder, Person, Role, Who, unix_now};
use treeboot_proto::v1;
use treeboot_types::HostName;

use crate::rpc::Edges;
use crate::rules::{Rules, RulesError};

/// How long the coordinator's own certificate holds. It is made anew at each start and at two thirds of this; nobody keeps it.
const OWN_LIFE: Duration = Duration::from_secs(30 * 86_400);
/// Longest sleep of the task that renews the coordinator's own certificate: a clock that was set is noticed within it.
const LOOK: Duration = Duration::from_secs(600);

/// `90s`, `15m`, `12h` or `30d`.
///
/// # Errors
/// It is something else, or zero.
pub fn parse_life(text: &str) -> Result<Duration, String> {
    let wrong = || format!("'{text}' is no time; write a number with s, m, h or d, for instance 1h or 30d");
    let unit = text.chars().next_back().ok_or_else(wrong)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3_600,
        'd' => 86_400,
        _ => return Err(wrong()),
    };
    let digits = text.strip_suffix(unit).unwrap_or_default();
    let count: u64 = digits.parse().map_err(|_| wrong())?;
    // A century: beyond it dates end.
    match count.checked_mul(seconds) {
        Some(seconds @ 1..=3_155_760_000) => Ok(Duration::from_secs(seconds)),
        _ => Err(wrong()),
    }
}

/// What a person does with the authority while the coordinator runs or not.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum Command {
    /// Make the cluster's authority; from its next start on the coordinator speaks to hosts and people with certificates only
    #[command(after_help = "Example:\n  treeboot-coordinator init --state /var/lib/treeboot/coordinator")]
    Init {
        /// The coordinator's state directory
        #[arg(long, env = "TREEBOOT_STATE", value_name = "DIR")]
        state: PathBuf,
        /// A DNS name or address of the coordinator, for foreign programs that look at it (treeboot's do not); may be repeated
        #[arg(long = "name", value_name = "NAME")]
        names: Vec<String>,
    },
    /// Make join tokens for hosts
    #[command(subcommand)]
    Token(TokenCommand),
    /// Make identities for people
    #[command(subcommand)]
    User(UserCommand),
}

/// Verbs of join tokens.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum TokenCommand {
    /// Print a token by which a host joins: treeboot-agent --join-token TOKEN
    #[command(
        after_help = "Example:\n  treeboot-coordinator token create --state /var/lib/treeboot/coordinator --host host-1"
    )]
    Create {
        /// The coordinator's state directory
        #[arg(long, env = "TREEBOOT_STATE", value_name = "DIR")]
        state: PathBuf,
        /// How long it is good
        #[arg(long, default_value = "1h", value_parser = parse_life, value_name = "TIME")]
        ttl: Duration,
        /// The only host that may use it; also one that has joined before
        #[arg(long, value_name = "HOST")]
        host: Option<HostName>,
        /// How many hosts may use it
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
        uses: u32,
    },
}

/// Verbs of people.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum UserCommand {
    /// Print an identity for a person (certificate and key, for 'treeboot login'), or a bearer token for a program
    #[command(
        after_help = "Example:\n  treeboot-coordinator user create alice --role admin --state /var/lib/treeboot/coordinator > alice.pem"
    )]
    Create {
        /// Who: letters, digits, '-', '.', '_' and '@'
        name: Person,
        /// admin, operator (VMs, no images) or viewer
        #[arg(long, value_name = "ROLE")]
        role: Role,
        /// How long it is good
        #[arg(long, default_value = "90d", value_parser = parse_life, value_name = "TIME")]
        ttl: Duration,
        /// A bearer token instead, for the header 'authorization'
        #[arg(long)]
        bearer: bool,
        /// The coordinator's state directory
        #[arg(long, env = "TREEBOOT_STATE", value_name = "DIR")]
        state: PathBuf,
    },
}

/// Why such a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// There is none yet.
    #[error("there is no authority in {}; make one: treeboot-coordinator init --state {}", state.display(), state.display())]
    NoAuthority {
        /// The state directory.
        state: PathBuf,
    },
    /// The authority.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// A token.
    #[error(transparent)]
    Token(#[from] TokenError),
}

fn open(state: &Path) -> Result<Authority, CommandError> {
    Authority::open(&authority::dir(state))?.ok_or_else(|| CommandError::NoAuthority {
        state: state.to_owned(),
    })
}

impl Command {
    /// Does it; the answer is for standard output.
    ///
    /// # Errors
    /// [`CommandError`].
    pub fn run(&self) -> Result<String, CommandError> {
        match self {
            Self::Init { state, names } => {
                let authority = Authority::create(&authority::dir(state), names)?;
                Ok(welcome(state, authority.fingerprint()))
            }
            Self::Token(TokenCommand::Create {
                state,
                ttl,
                host,
                uses,
            }) => {
                let authority = open(state)?;
                let token = Gatebook::new(&authority).create(host.clone(), *uses, *ttl)?;
                Ok(format!("{token}\n"))
            }
            Self::User(UserCommand::Create {
                name,
                role,
                ttl,
                bearer,
                state,
            }) => {
                let authority = open(state)?;
                if *bearer {
                    return Ok(token::bearer(&authority, name, *role, *ttl)? + "\n");
                }
                let who = Who::Person {
                    name: name.clone(),
                    role: *role,
                };
                Ok(authority.issue(&who, *ttl)?.to_pem())
            }
        }
    }
}

fn welcome(state: &Path, fingerprint: Fingerprint) -> String {
    let state = state.display();
    format!(
        "The authority is made; its fingerprint (SHA-256) is {fingerprint}\n\
         Keep {state}/identity secret, and a copy of it safe.\n\
         Next:\n  \
         treeboot-coordinator --state {state} --listen ADDRESS:7400\n  \
         treeboot-coordinator user create NAME --role admin --state {state} > NAME.pem   # then: treeboot login NAME.pem\n  \
         treeboot-coordinator token create --state {state}                               # then: treeboot-agent --join-token TOKEN …\n"
    )
}

/// Why a host gets no certificate.
#[derive(Debug, thiserror::Error)]
pub enum EnrollError {
    /// The coordinator runs without.
    #[error(
        "this coordinator has no authority, so hosts join it without a token; to have one: treeboot-coordinator init"
    )]
    NoAuthority,
    /// The token, or the request.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// A bug of ours.
    #[error("the request was not worked on to its end; see the coordinator's log")]
    Ended,
}

#[derive(Debug)]
struct Desk {
    authority: Authority,
    host_life: Duration,
    /// One at a time: a token's uses are counted.
    turn: Mutex<()>,
}

/// Gives hosts their certificates.
#[derive(Debug, Clone)]
pub struct Registrar {
    desk: Option<Arc<Desk>>,
}

impl Registrar {
    /// Lets a host join by its token.
    ///
    /// # Errors
    /// [`EnrollError`].
    pub async fn enroll(
        &self,
        token: &str,
        host: HostName,
        request: Vec<u8>,
    ) -> Result<v1::CertifyResponse, EnrollError> {
        let desk = self.desk.clone().ok_or(EnrollError::NoAuthority)?;
        let token: JoinToken = token.parse()?;
        desk.work(move |desk| Gatebook::new(&desk.authority).enroll(&token, &host, &request, desk.host_life))
            .await
    }

    /// Gives a host that proved its name its next certificate.
    ///
    /// # Errors
    /// [`EnrollError`].
    pub async fn renew(&self, host: HostName, request: Vec<u8>) -> Result<v1::CertifyResponse, EnrollError> {
        let desk = self.desk.clone().ok_or(EnrollError::NoAuthority)?;
        desk.work(move |desk| Gatebook::new(&desk.authority).certify(&host, &request, desk.host_life))
            .await
    }
}

impl Desk {
    async fn work(
        self: Arc<Self>,
        work: impl FnOnce(&Self) -> Result<Vec<u8>, TokenError> + Send + 'static,
    ) -> Result<v1::CertifyResponse, EnrollError> {
        let done = tokio::task::spawn_blocking(move || {
            let _turn = self.turn.lock();
            let certificate = work(&self)?;
            Ok(v1::CertifyResponse {
                certificate,
                authority: self.authority.certificate().to_vec(),
            })
        });
        done.await.map_err(|_| EnrollError::Ended)?
    }
}

/// Why there is no TLS although there is an authority.
#[derive(Debug, thiserror::Error)]
pub enum SecurityError {
    /// The authority.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// TLS.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The key of the edges' secrets.
    #[error(transparent)]
    Edges(#[from] EdgesError),
    /// Labels of images.
    #[error(transparent)]
    Rules(#[from] RulesError),
}

/// How the coordinator takes connections in, and what it needs for it.
pub struct Security {
    /// With TLS or without.
    pub acceptance: Acceptance,
    /// What looks at each request.
    pub gate: Gate,
    /// Where hosts join.
    pub registrar: Registrar,
    /// Secrets by which hosts read from each other.
    pub edges: Edges,
    /// Who may use which image.
    pub rules: Arc<Rules>,
    own: Option<Holder>,
}

impl Security {
    /// None: whoever reaches the coordinator may do everything.
    #[must_use]
    pub fn none() -> Self {
        Self {
            acceptance: Acceptance::Insecure,
            gate: Gate::new(None),
            registrar: Registrar { desk: None },
            edges: Edges::default(),
            rules: Arc::default(),
            own: None,
        }
    }

    /// What the state directory's authority gives; none where it holds no authority.
    ///
    /// # Errors
    /// [`SecurityError`].
    pub fn open(state: &Path, host_life: Duration) -> Result<Self, SecurityError> {
        let rules = Arc::new(Rules::open(state)?);
        let Some(authority) = Authority::open(&authority::dir(state))? else {
            return Ok(Self {
                rules,
                ..Self::none()
            });
        };
        let own = Holder::new(authority.issue(&Who::Coordinator, OWN_LIFE)?);
        let edges = Edges::of(EdgeKey::open(authority.dir())?);
        tracing::info!(authority = %authority.fingerprint(), "hosts and people need certificates of this authority");
        Ok(Self {
            acceptance: Acceptance::mutual(&own)?,
            gate: Gate::new(Some(authority.certificate().clone())),
            registrar: Registrar {
                desk: Some(Arc::new(Desk {
                    authority,
                    host_life,
                    turn: Mutex::new(()),
                })),
            },
            edges,
            rules,
            own: Some(own),
        })
    }

    /// Whether connections are without TLS.
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.own.is_none()
    }

    /// Keeps the coordinator's own certificate new until `stop` says so.
    pub(crate) fn keep_new(&self, mut stop: watch::Receiver<bool>) {
        let (Some(own), Some(desk)) = (self.own.clone(), self.registrar.desk.clone()) else {
            return;
        };
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = stop.wait_for(|stop| *stop) => return,
                    () = tokio::time::sleep(LOOK) => {}
                }
                if !own.current().certified().is_due(unix_now()) {
                    continue;
                }
                match desk.authority.issue(&Who::Coordinator, OWN_LIFE) {
                    Ok(credentials) => own.replace(credentials),
                    Err(error) => {
                        tracing::error!(%error, "the coordinator's own certificate cannot be renewed")
                    }
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_life_has_a_unit() {
        assert_eq!(parse_life("90s").unwrap().as_secs(), 90);
        assert_eq!(parse_life("30d").unwrap().as_secs(), 30 * 86_400);
        for bad in ["", "1", "h", "0h", "-1h", "1w", "1 h", "99999999999999999d", "é"] {
            assert!(parse_life(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_table_of_verbs_is_that_of_the_services() {
        let files = [
            (
                "Coordinator",
                include_str!("../../proto/proto/treeboot/v1/coordinator.proto"),
            ),
            ("Agent", include_str!("../../proto/proto/treeboot/v1/agent.proto")),
        ];
        let mut verbs: Vec<String> = Vec::new();
        for (service, text) in files {
            let names = text.lines().filter_map(|line| line.trim().strip_prefix("rpc "));
            verbs.extend(names.filter_map(|rest| Some(format!("{service}/{}", rest.split_once('(')?.0))));
        }
        let mut table: Vec<String> = treeboot_identity::gate::TABLE
            .iter()
            .map(|(verb, _)| (*verb).to_owned())
            .collect();
        verbs.sort();
        table.sort();
        assert_eq!(table, verbs);
    }
}
