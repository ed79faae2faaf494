//! Connections to the coordinator and, by a host's name, to its agent; gRPC statuses become words here.
//!
//! Every call is bounded by `--timeout`; names were validated before anything is sent.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};
use treeboot_identity::tls::Dialer;
use treeboot_identity::{Credentials, Holder, Who};
use treeboot_proto::v1;
use treeboot_proto::v1::agent_client::AgentClient;
use treeboot_proto::v1::coordinator_client::CoordinatorClient;
use treeboot_types::{HostName, ImageRef};

use crate::failure::{Exit, Failure, chain, io_words};
use crate::output::{duration, parse_duration, printable};

/// Where the coordinator listens unless it is told otherwise.
pub(crate) const DEFAULT_COORDINATOR: &str = "http://127.0.0.1:7400";

/// The longest that making a connection may take: a machine that is up answers much sooner, and whoever typed a
/// wrong address should not wait for the whole `--timeout`.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// How many calls go to different hosts at once: enough to hide their latency, few enough for the default limit
/// on open files.
pub(crate) const PARALLEL_CALLS: usize = 64;

/// Options of every verb that speaks to the coordinator.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// Where the coordinator answers; an IPv6 address in brackets: http://[::1]:7400
    #[arg(long, global = true, help_heading = "Connection", env = "TREEBOOT_COORDINATOR", default_value = DEFAULT_COORDINATOR, value_name = "URL")]
    pub(crate) coordinator: String,
    /// How long one call may take (30s, 500ms, 2m)
    #[arg(long, global = true, help_heading = "Connection", env = "TREEBOOT_TIMEOUT", default_value = "30s", value_parser = parse_duration, value_name = "TIME")]
    pub(crate) timeout: Duration,
    /// Who you are: the file of 'treeboot-coordinator user create' [default: what 'treeboot login' keeps]
    #[arg(
        long,
        global = true,
        help_heading = "Connection",
        env = "TREEBOOT_IDENTITY",
        value_name = "FILE"
    )]
    pub(crate) identity: Option<PathBuf>,
    /// Show no identity, for a laptop: speaks to loopback addresses only
    #[arg(long, global = true, help_heading = "Connection", env = "TREEBOOT_INSECURE")]
    pub(crate) insecure: bool,
}

/// Who types: one person a process, found out before anything is asked.
static IDENTITY: OnceLock<Option<Holder>> = OnceLock::new();

fn identity() -> Option<&'static Holder> {
    IDENTITY.get().and_then(Option::as_ref)
}

/// Where 'treeboot login' keeps an identity.
///
/// # Errors
/// There is no home.
pub(crate) fn kept_identity() -> Result<PathBuf, Failure> {
    let set = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    set("XDG_CONFIG_HOME")
        .or_else(|| set("HOME").map(|home| home.join(".config")))
        .map(|config| config.join("treeboot/identity.pem"))
        .ok_or_else(|| {
            Failure::new(Exit::Usage, "there is no home directory to keep an identity in")
                .advice("name the file with --identity or TREEBOOT_IDENTITY")
        })
}

/// Reads a person's identity.
///
/// # Errors
/// The file is none, or another's.
pub(crate) fn read_identity(path: &Path) -> Result<Option<Credentials>, Failure> {
    let failure = |error: &dyn std::error::Error| {
        Failure::new(Exit::Usage, chain(error)).advice(
            "an administrator makes one: treeboot-coordinator user create NAME --role ROLE > NAME.pem",
        )
    };
    let credentials = Credentials::load(path).map_err(|error| failure(&error))?;
    if let Some(credentials) = &credentials
        && !matches!(credentials.certified().who, Who::Person { .. })
    {
        let who = credentials.certified().who.to_string();
        return Err(Failure::new(
            Exit::Usage,
            format!("{} is the identity of {who}, not of a person", path.display()),
        ));
    }
    Ok(credentials)
}

/// Finds out who types; every verb that speaks to others comes after it.
///
/// # Errors
/// The identity that was named is not there, or is none.
pub(crate) fn identify(options: &Options) -> Result<(), Failure> {
    let found = match &options.identity {
        _ if options.insecure => None,
        Some(path) => Some(read_identity(path)?.ok_or_else(|| {
            Failure::new(
                Exit::NotFound,
                format!("there is no identity file {}", path.display()),
            )
            .advice(
                "an administrator makes one: treeboot-coordinator user create NAME --role ROLE > NAME.pem",
            )
        })?),
        None => match kept_identity() {
            Ok(path) => read_identity(&path)?,
            Err(_) => None,
        },
    };
    // A second time is a test's; the first one counts.
    let _ = IDENTITY.set(found.map(Holder::new));
    Ok(())
}

/// The coordinator, connected.
#[derive(Debug, Clone)]
pub(crate) struct Coordinator {
    client: CoordinatorClient<Channel>,
    peer: String,
    timeout: Duration,
}

impl Coordinator {
    /// Connects to the coordinator of `--coordinator`.
    ///
    /// # Errors
    /// The URL is not one, or nothing answers there.
    pub(crate) async fn connect(options: &Options) -> Result<Self, Failure> {
        let url = coordinator_url(&options.coordinator)?;
        if options.insecure {
            only_loopback(&url)?;
        }
        let peer = format!("the coordinator at {url}");
        let channel = connect(&url, &peer, Who::Coordinator, options.timeout).await.map_err(|failure| {
            failure.advice(
                "start one with 'treeboot-coordinator --state DIR', or name another with --coordinator or TREEBOOT_COORDINATOR",
            )
        })?;
        Ok(Self {
            client: CoordinatorClient::new(channel),
            peer,
            timeout: options.timeout,
        })
    }

    async fn call<T>(
        &self,
        doing: &str,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Failure> {
        unary(&self.peer, doing, self.timeout, call).await
    }

    /// The record of an image; the newest version where `image` has none.
    pub(crate) async fn image(&self, image: &ImageRef) -> Result<v1::Image, Failure> {
        Ok(self.labelled_image(image).await?.0)
    }

    /// An image's record, and its labels.
    pub(crate) async fn labelled_image(
        &self,
        image: &ImageRef,
    ) -> Result<(v1::Image, BTreeMap<String, String>), Failure> {
        let request = v1::GetImageRequest {
            id: Some(image.into()),
            role: String::new(),
        };
        let doing = format!("look up the image '{}'", image_words(image));
        let answer = self
            .call(&doing, self.client.clone().get_image(request))
            .await
            .map_err(|failure| match failure.exit {
                Exit::NotFound => failure.advice("see which there are: treeboot image list"),
                _ => failure,
            })?;
        let image = answer.image.ok_or_else(|| incomplete(&self.peer, "image"))?;
        Ok((image, answer.labels.into_iter().collect()))
    }

    /// Sets and removes labels of an image's name; gives all that it has then.
    pub(crate) async fn label_image(
        &self,
        name: &str,
        set: &[(String, String)],
        remove: &[String],
    ) -> Result<BTreeMap<String, String>, Failure> {
        let request = v1::LabelImageRequest {
            name: name.to_owned(),
            set: set.iter().cloned().collect(),
            remove: remove.to_vec(),
        };
        let doing = format!("label the image '{name}'");
        let answer = self
            .call(&doing, self.client.clone().label_image(request))
            .await?;
        Ok(answer.labels.into_iter().collect())
    }

    /// The records of all images, by name and version.
    pub(crate) async fn images(&self) -> Result<Vec<v1::Image>, Failure> {
        let request = v1::ListImagesRequest {};
        let mut images = self
            .call("list images", self.client.clone().list_images(request))
            .await?
            .images;
        images.sort_by_key(|image| image.id.clone().map(|id| (id.name, id.version)));
        Ok(images)
    }

    /// Takes an image's record away; the answer is the record as it was.
    pub(crate) async fn remove_image(&self, image: &v1::ImageId, force: bool) -> Result<v1::Image, Failure> {
        let doing = format!("remove the image '{}@{}'", image.name, image.version);
        let request = v1::RemoveImageRequest {
            id: Some(image.clone()),
            force,
        };
        let answer = self
            .call(&doing, self.client.clone().remove_image(request))
            .await?;
        answer.image.ok_or_else(|| incomplete(&self.peer, "image"))
    }

    /// The records of all hosts, by name.
    pub(crate) async fn hosts(&self) -> Result<Vec<v1::HostRecord>, Failure> {
        let mut hosts = self
            .call(
                "list hosts",
                self.client.clone().list_hosts(v1::ListHostsRequest {}),
            )
            .await?
            .hosts;
        hosts.sort_by(|a, b| crate::output::natural(host_name(a), host_name(b)));
        Ok(hosts)
    }

    /// An image's trees.
    pub(crate) async fn tree(&self, image: &ImageRef) -> Result<v1::GetTreeResponse, Failure> {
        let doing = format!("show the tree of '{}'", image_words(image));
        let request = v1::GetTreeRequest {
            image: Some(image.into()),
        };
        self.call(&doing, self.client.clone().get_tree(request))
            .await
            .map_err(|failure| match failure.exit {
                Exit::NotFound => failure.advice("see which images there are: treeboot image list"),
                _ => failure,
            })
    }

    /// Exports of an image for a host, best first.
    pub(crate) async fn search(
        &self,
        image: &ImageRef,
        host: Option<&HostName>,
        limit: u32,
    ) -> Result<Vec<v1::Candidate>, Failure> {
        let doing = format!("search exports of '{}'", image_words(image));
        let request = v1::SearchRequest {
            image: Some(image.into()),
            host: host.map(ToString::to_string).unwrap_or_default(),
            limit,
        };
        let answer = self.call(&doing, self.client.clone().search(request)).await;
        let answer = answer.map_err(|failure| match failure.exit {
            Exit::NotFound => failure.advice("see which images there are: treeboot image list"),
            _ => failure,
        })?;
        Ok(answer.candidates)
    }

    /// The record of the host of exactly this name.
    pub(crate) async fn host(&self, name: &HostName) -> Result<v1::HostRecord, Failure> {
        find_host(&self.hosts().await?, name)
    }

    /// The agent on the host of exactly this name.
    pub(crate) async fn agent(&self, name: &HostName) -> Result<Agent, Failure> {
        Agent::connect(&self.host(name).await?, self.timeout).await
    }
}

/// The host of exactly this name among `hosts`.
///
/// # Errors
/// There is none; the advice names those that there are.
pub(crate) fn find_host(hosts: &[v1::HostRecord], name: &HostName) -> Result<v1::HostRecord, Failure> {
    /// How many names an error lists: more do not help.
    const NAMED: usize = 12;
    let mut known: Vec<String> = hosts.iter().map(|host| printable(host_name(host))).collect();
    if let Some(host) = hosts.iter().find(|host| host_name(host) == name.as_str()) {
        return Ok(host.clone());
    }
    let failure = Failure::new(Exit::NotFound, format!("the coordinator knows no host '{name}'"));
    if known.is_empty() {
        return Err(failure.advice("no host has joined yet; start one with 'treeboot-agent --name HOST …'"));
    }
    let more = known.len().saturating_sub(NAMED);
    known.truncate(NAMED);
    let more = if more > 0 {
        format!(" and {more} more (treeboot host list)")
    } else {
        String::new()
    };
    Err(failure.advice(format!("it knows: {}{more}", known.join(", "))))
}

/// The name in a host's record; empty where the record is damaged.
pub(crate) fn host_name(host: &v1::HostRecord) -> &str {
    host.info.as_ref().map_or("", |info| &info.name)
}

/// One host's agent, connected.
#[derive(Debug, Clone)]
pub(crate) struct Agent {
    /// The generated client, for calls that stream.
    pub(crate) client: AgentClient<Channel>,
    /// The host.
    pub(crate) host: String,
    /// Its `host:port`.
    pub(crate) address: String,
    /// How errors name the agent.
    pub(crate) peer: String,
    /// The limit of one call.
    pub(crate) timeout: Duration,
}

impl Agent {
    /// Connects to the agent that a host's record names.
    ///
    /// # Errors
    /// Nothing answers there.
    pub(crate) async fn connect(host: &v1::HostRecord, timeout: Duration) -> Result<Self, Failure> {
        let name = printable(host_name(host));
        let address = host.info.as_ref().map_or("", |info| &info.agent_address);
        let peer = format!("the agent of host '{name}' at {}", printable(address));
        let advice = if host.connected {
            format!(
                "its coordinator still hears it, so look for a firewall between here and {}",
                printable(address)
            )
        } else {
            let silent = duration(Duration::from_millis(host.silent_ms));
            format!("the coordinator has not heard it for {silent}; see whether treeboot-agent runs there")
        };
        let who = Who::Host(HostName::new(host_name(host)).map_err(|error| {
            Failure::new(
                Exit::Failed,
                format!("the coordinator named a host wrongly: {error}"),
            )
        })?);
        let channel = connect(&format!("http://{address}"), &peer, who, timeout)
            .await
            .map_err(|failure| failure.advice(advice))?;
        Ok(Self {
            client: AgentClient::new(channel),
            host: name,
            address: address.to_owned(),
            peer,
            timeout,
        })
    }

    /// Awaits one call, bounded by `--timeout`, in words where it fails.
    pub(crate) async fn call<T>(
        &self,
        doing: &str,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Failure> {
        unary(&self.peer, doing, self.timeout, call).await
    }

    /// What the agent knows of itself.
    pub(crate) async fn status(&self) -> Result<v1::StatusResponse, Failure> {
        let doing = format!("ask host '{}' for its state", self.host);
        self.call(&doing, self.client.clone().status(v1::StatusRequest {}))
            .await
    }

    /// The VMs of the host, by name.
    pub(crate) async fn vms(&self) -> Result<Vec<v1::Vm>, Failure> {
        let doing = format!("list the VMs of host '{}'", self.host);
        Ok(self
            .call(&doing, self.client.clone().list_vms(v1::ListVmsRequest {}))
            .await?
            .vms)
    }

    /// The disks of the host.
    pub(crate) async fn disks(&self) -> Result<Vec<v1::Disk>, Failure> {
        let doing = format!("list the disks of host '{}'", self.host);
        Ok(self
            .call(&doing, self.client.clone().list(v1::ListRequest {}))
            .await?
            .disks)
    }
}

/// `debian` or `debian@2`, as it was typed.
pub(crate) fn image_words(image: &ImageRef) -> String {
    match image.version {
        Some(version) => format!("{}@{version}", image.name),
        None => image.name.to_string(),
    }
}

/// Checks the coordinator's URL; `HOST:PORT` is taken as `http://HOST:PORT`.
fn coordinator_url(text: &str) -> Result<String, Failure> {
    let wrong = |why: &str| {
        Failure::new(
            Exit::Usage,
            format!("'{text}' is not the URL of a coordinator: {why}"),
        )
        .advice(format!(
            "write http://HOST:PORT, an IPv6 address in brackets; the default is {DEFAULT_COORDINATOR}"
        ))
    };
    let secure = text.strip_prefix("https://");
    if secure.is_some() && identity().is_none() {
        return Err(wrong(
            "https:// needs an identity, and there is none; see 'treeboot login --help'",
        ));
    }
    let rest = secure
        .or(text.strip_prefix("http://"))
        .unwrap_or(text)
        .trim_end_matches('/');
    if rest.contains("://") {
        return Err(wrong("only http:// and https:// are spoken"));
    }
    // With an identity every connection has TLS; the scheme is not what decides.
    let url = format!("http://{rest}");
    let uri: tonic::codegen::http::Uri = url.parse().map_err(|_| wrong("it cannot be parsed"))?;
    match (uri.host(), uri.port_u16(), uri.path()) {
        (Some(host), Some(port), "/" | "") if !host.is_empty() && port != 0 && !rest.contains('@') => Ok(url),
        (_, None, _) => Err(wrong("it has no port")),
        _ => Err(wrong("there is more than HOST:PORT in it")),
    }
}

/// Refuses a coordinator on another machine.
fn only_loopback(url: &str) -> Result<(), Failure> {
    let uri: tonic::codegen::http::Uri = url.parse().unwrap_or_default();
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let loopback = host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback());
    if loopback {
        return Ok(());
    }
    Err(Failure::new(
        Exit::Usage,
        format!("--insecure is for this machine only, and {url} is another"),
    )
    .advice("leave --insecure out, and show an identity; see 'treeboot login --help'"))
}

async fn connect(url: &str, peer: &str, who: Who, timeout: Duration) -> Result<Channel, Failure> {
    let dialer = match identity() {
        None => Dialer::Insecure,
        Some(holder) => {
            Dialer::mutual(holder, who).map_err(|error| Failure::new(Exit::Failed, chain(&error)))?
        }
    };
    let limit = timeout.min(CONNECT_LIMIT);
    let unreachable = |why: &str| Failure::new(Exit::Unreachable, format!("cannot reach {peer}: {why}"));
    let endpoint = Endpoint::from_shared(url.to_owned())
        .map_err(|error| unreachable(&chain(&error)))?
        .connect_timeout(limit)
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(10))
        .tcp_nodelay(true);
    match tokio::time::timeout(limit, dialer.connect(&endpoint)).await {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(error)) => Err(unreachable(&transport_words(&error))),
        Err(_) => Err(unreachable(&format!("no answer within {}", duration(limit)))),
    }
}

/// Awaits one call that answers once.
async fn unary<T>(
    peer: &str,
    doing: &str,
    timeout: Duration,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Failure> {
    match tokio::time::timeout(timeout, call).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(refused(peer, doing, &status)),
        Err(_) => Err(Failure::new(
            Exit::TimedOut,
            format!(
                "cannot {doing}: {peer} did not answer within {}",
                duration(timeout)
            ),
        )
        .advice("allow more with --timeout, or see what that process logs")),
    }
}

/// What a gRPC status means, in words; the server's message names the thing and, mostly, the way out.
pub(crate) fn refused(peer: &str, doing: &str, status: &Status) -> Failure {
    let broken = std::error::Error::source(status).is_some()
        && matches!(
            status.code(),
            Code::Unknown | Code::Internal | Code::Cancelled | Code::Unavailable
        );
    if broken {
        let why = transport_words(status);
        return Failure::new(
            Exit::Unreachable,
            format!("cannot {doing}: the connection to {peer} broke ({why})"),
        )
        .advice("see whether that process still runs, then try again");
    }
    let (exit, words) = match status.code() {
        Code::NotFound => (Exit::NotFound, "it is not there"),
        Code::AlreadyExists => (Exit::Exists, "there is one already"),
        Code::InvalidArgument | Code::OutOfRange => (Exit::Usage, "the request is not valid"),
        Code::FailedPrecondition => (Exit::Refused, "its present state does not allow it"),
        Code::Aborted => (Exit::Refused, "its state changed meanwhile; try again"),
        Code::PermissionDenied | Code::Unauthenticated => (Exit::Refused, "it is not allowed"),
        Code::ResourceExhausted => (Exit::NoRoom, "no room left"),
        Code::Unavailable => (Exit::Unreachable, "it is not available at the moment; try again"),
        Code::DeadlineExceeded => (Exit::TimedOut, "it was not done in time"),
        Code::Unimplemented => (Exit::Failed, "this version does not offer that"),
        Code::Cancelled => (Exit::Failed, "it was cancelled"),
        Code::DataLoss => (Exit::Failed, "data is damaged"),
        Code::Ok | Code::Unknown | Code::Internal => (Exit::Failed, "no reason was given; see its log"),
    };
    let message = printable(status.message().trim());
    // Messages of the services are "what; what to do".
    match message.split_once("; ") {
        _ if message.is_empty() => Failure::new(exit, format!("cannot {doing}: {peer}: {words}")),
        Some((what, advice)) => Failure::new(exit, format!("cannot {doing}: {what}")).advice(advice),
        None => Failure::new(exit, format!("cannot {doing}: {message}")),
    }
}

/// A server left out what its answer must hold.
pub(crate) fn incomplete(peer: &str, field: &str) -> Failure {
    Failure::new(Exit::Failed, format!("{peer} answered without '{field}'")).advice(
        "its version may differ from this program's; see 'treeboot host list' and 'treeboot --version'",
    )
}

/// Why a connection failed: the operating system's words where there are any.
fn transport_words(error: &(dyn std::error::Error + 'static)) -> String {
    if let Some(words) = treeboot_identity::tls::words(error) {
        return printable(&words);
    }
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            return io_words(io);
        }
        cause = error.source();
    }
    let text = chain(error);
    printable(text.strip_prefix("transport error: ").unwrap_or(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_coordinators_url_may_leave_out_the_scheme_and_hold_ipv6() {
        for (text, url) in [
            ("http://127.0.0.1:7400", "http://127.0.0.1:7400"),
            ("http://127.0.0.1:7400/", "http://127.0.0.1:7400"),
            ("localhost:7400", "http://localhost:7400"),
            ("[::1]:7400", "http://[::1]:7400"),
        ] {
            assert_eq!(coordinator_url(text).unwrap(), url);
        }
        for bad in [
            "",
            "http://",
            "http://a",
            "https://a:1",
            "ftp://a:1",
            "::1:7400",
            "http://a:1/x",
            "me@a:1",
            "a:0",
            "a b:1",
        ] {
            let failure = coordinator_url(bad).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage, "{bad}");
            assert!(failure.advice.is_some());
        }
    }

    #[test]
    fn statuses_become_words_and_codes() {
        let check = |status: Status, exit: Exit, text: &str| {
            let failure = refused("the coordinator at X", "remove the image 'a@1'", &status);
            assert_eq!((failure.exit, failure.what.as_str()), (exit, text));
        };
        check(
            Status::not_found("there is no image 'a@1'"),
            Exit::NotFound,
            "cannot remove the image 'a@1': there is no image 'a@1'",
        );
        check(
            Status::failed_precondition("2 hosts are attached\u{7}"),
            Exit::Refused,
            "cannot remove the image 'a@1': 2 hosts are attached?",
        );
        let both = refused("X", "do it", &Status::resource_exhausted("no room; make some"));
        assert_eq!(both.advice.as_deref(), Some("make some"));
        check(
            Status::unimplemented(""),
            Exit::Failed,
            "cannot remove the image 'a@1': the coordinator at X: this version does not offer that",
        );
    }

    #[test]
    fn a_host_is_found_by_its_whole_name_only() {
        let record = |name: &str| v1::HostRecord {
            info: Some(v1::HostInfo {
                name: name.into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let hosts = || vec![record("10.0.0.10"), record("10.0.0.1")];
        let wanted = HostName::new("10.0.0.1").unwrap();
        assert_eq!(host_name(&find_host(&hosts(), &wanted).unwrap()), "10.0.0.1");
        let failure = find_host(&hosts(), &HostName::new("10.0.0").unwrap()).unwrap_err();
        assert_eq!(failure.exit, Exit::NotFound);
        assert_eq!(failure.advice.as_deref(), Some("it knows: 10.0.0.10, 10.0.0.1"));
    }
}
