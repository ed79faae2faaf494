//! `image attach` and `image detach`: a base on hosts without a VM, to warm them up or to relay.

use std::time::Duration;

use serde::Serialize;
use treeboot_proto::v1;
use treeboot_types::{HostName, ImageRef};

use crate::client::{Agent, Coordinator, Options, PARALLEL_CALLS, find_host, host_name, incomplete};
use crate::failure::{Exit, Failure};
use crate::output::{self, Align, JsonFlag, Table};
use crate::parallel;
use crate::tree::id_words;

use super::{distinct, is_origin};

/// Attach an image on hosts, so that it is there before any VM asks for it
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  treeboot image attach debian --all\n  treeboot image attach debian@2 --host host-1 --host host-2"
)]
pub(crate) struct AttachArgs {
    /// NAME or NAME@VERSION; without a version the newest
    image: ImageRef,
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    json: JsonFlag,
}

/// Detach an image from hosts whose VMs do not use it any more
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  treeboot image detach debian --all\n  treeboot image detach debian@2 --host host-1"
)]
pub(crate) struct DetachArgs {
    /// NAME or NAME@VERSION; without a version the newest
    image: ImageRef,
    #[command(flatten)]
    which: Which,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Which {
    /// A host; may be given several times or as a list with commas
    #[arg(long = "host", value_name = "HOST", value_delimiter = ',')]
    hosts: Vec<HostName>,
    /// All connected hosts, except those that store the image
    #[arg(long)]
    all: bool,
}

#[derive(Debug, Serialize)]
struct AttachJson {
    host: String,
    image: String,
    state: Option<&'static str>,
    depth: Option<u32>,
    parents: Vec<String>,
    took_us: u64,
    error: Option<String>,
}

/// `image attach`.
pub(super) async fn attach(options: &Options, args: AttachArgs) -> Result<(), Failure> {
    let (id, hosts) = chosen(options, &args.image, &args.which, "can attach", |_| true).await?;
    let image = id_words(&id);
    let count = hosts.len();
    let results = parallel::each(hosts, PARALLEL_CALLS, |host| {
        let (id, timeout) = (id.clone(), options.timeout);
        async move { (host_name(&host).to_owned(), attach_one(&host, &id, timeout).await) }
    })
    .await;
    let mut failures = Vec::new();
    let rows: Vec<AttachJson> = results
        .into_iter()
        .map(|(host, result)| match result {
            Ok((attachment, took_us)) => AttachJson {
                host,
                image: image.clone(),
                state: Some(match attachment.state() {
                    v1::AttachState::Ready => "ready",
                    _ => "pending",
                }),
                depth: attachment.stripes.iter().map(|stripe| stripe.depth).max(),
                parents: attachment
                    .stripes
                    .iter()
                    .flat_map(|stripe| &stripe.active)
                    .map(parent_name)
                    .collect(),
                took_us,
                error: None,
            },
            Err(failure) => {
                let error = Some(failure.what.clone());
                failures.push(failure);
                AttachJson {
                    host,
                    image: image.clone(),
                    state: None,
                    depth: None,
                    parents: Vec::new(),
                    took_us: 0,
                    error,
                }
            }
        })
        .collect();
    if args.json.json {
        output::print_json(&rows)?;
    } else {
        output::print_text(&render(&rows))?;
    }
    parallel::verdict("host", count, &failures)
}

fn render(rows: &[AttachJson]) -> String {
    let mut table = Table::new(&[
        ("HOST", Align::Left),
        ("IMAGE", Align::Left),
        ("STATE", Align::Left),
        ("DEPTH", Align::Right),
        ("PARENTS", Align::Left),
        ("TOOK", Align::Right),
    ]);
    for row in rows {
        table.row([
            row.host.clone(),
            row.image.clone(),
            row.state.unwrap_or("FAILED").to_owned(),
            row.depth.map(|depth| depth.to_string()).unwrap_or_default(),
            row.parents.join(","),
            if row.error.is_none() {
                output::duration(Duration::from_micros(row.took_us))
            } else {
                String::new()
            },
        ]);
    }
    table.render()
}

fn parent_name(parent: &v1::Parent) -> String {
    if parent.host.is_empty() {
        parent
            .endpoint
            .as_ref()
            .map(|endpoint| endpoint.portal.clone())
            .unwrap_or_default()
    } else {
        parent.host.clone()
    }
}

async fn attach_one(
    host: &v1::HostRecord,
    image: &v1::ImageId,
    timeout: Duration,
) -> Result<(v1::Attachment, u64), Failure> {
    let agent = Agent::connect(host, timeout).await?;
    let doing = format!("attach {} on host '{}'", id_words(image), agent.host);
    let request = v1::AttachRequest {
        image: Some(image.clone()),
    };
    let answer = agent.call(&doing, agent.client.clone().attach(request)).await?;
    let attachment = answer
        .attachment
        .ok_or_else(|| incomplete(&agent.peer, "attachment"))?;
    Ok((attachment, answer.took_us))
}

/// `image detach`.
pub(super) async fn detach(options: &Options, args: DetachArgs) -> Result<(), Failure> {
    let (id, hosts) = chosen(options, &args.image, &args.which, "is attached to", |record| {
        record.attachments > 0
    })
    .await?;
    let image = id_words(&id);
    let count = hosts.len();
    let results = parallel::each(hosts, PARALLEL_CALLS, |host| {
        let (id, timeout, all) = (id.clone(), options.timeout, args.which.all);
        async move {
            match detach_one(&host, &id, timeout).await {
                // With --all, hosts that do not hold this image are none of our business.
                Err(failure) if all && failure.exit == Exit::NotFound => Ok(None),
                other => other.map(|()| Some(host_name(&host).to_owned())),
            }
        }
    })
    .await;
    let mut failures = Vec::new();
    let mut text = String::new();
    for result in results {
        match result {
            Ok(Some(host)) => text += &format!("detached {image} from '{}'\n", output::printable(&host)),
            Ok(None) => {}
            Err(failure) => failures.push(failure),
        }
    }
    output::print_text(&text)?;
    parallel::verdict("host", count, &failures)
}

async fn detach_one(host: &v1::HostRecord, image: &v1::ImageId, timeout: Duration) -> Result<(), Failure> {
    let agent = Agent::connect(host, timeout).await?;
    let doing = format!("detach {} from host '{}'", id_words(image), agent.host);
    let request = v1::DetachRequest {
        image: Some(image.clone()),
    };
    agent
        .call(&doing, agent.client.clone().detach(request))
        .await
        .map(|_| ())
}

/// The image with its version, and the hosts that were asked for; `what` says what these have to do with it.
async fn chosen(
    options: &Options,
    image: &ImageRef,
    which: &Which,
    what: &str,
    wanted: impl Fn(&v1::HostRecord) -> bool,
) -> Result<(v1::ImageId, Vec<v1::HostRecord>), Failure> {
    let coordinator = Coordinator::connect(options).await?;
    let image = coordinator.image(image).await?;
    let id = image
        .id
        .clone()
        .ok_or_else(|| incomplete("the coordinator", "image.id"))?;
    let hosts = coordinator.hosts().await?;
    if !which.all {
        let named = distinct(&which.hosts);
        let found: Result<Vec<_>, _> = named.iter().map(|name| find_host(&hosts, name)).collect();
        return Ok((id, found?));
    }
    let all: Vec<_> = hosts
        .into_iter()
        .filter(|host| host.connected && !is_origin(&image, host_name(host)) && wanted(host))
        .collect();
    if all.is_empty() {
        return Err(Failure::new(
            Exit::NotFound,
            format!("no connected host {what} {}", id_words(&id)),
        )
        .advice("see which there are: treeboot host list; those that store the image count as its origins"));
    }
    Ok((id, all))
}
