//! `treeboot image …`: records at the coordinator, bytes on origin agents, bases on hosts.

mod add;
mod attach;
mod flatten;
mod label;
mod list;

use treeboot_proto::v1;
use treeboot_types::{Digest, HostName, ImageRef, Iqn, IscsiUrl};

use crate::client::{Agent, Coordinator, Options};
use crate::failure::{Exit, Failure};
use crate::output::JsonFlag;

pub(crate) use add::{report, upload};

/// Verbs on images.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum ImageVerb {
    Import(add::ImportArgs),
    Register(add::RegisterArgs),
    /// List the images that the coordinator knows
    #[command(
        after_help = "Example:\n  treeboot image list\n  treeboot image list --json | jq -r '.[].name'"
    )]
    List(JsonFlag),
    /// Show one image: content, origins, chunk, stripes
    #[command(after_help = "Example:\n  treeboot image show debian\n  treeboot image show debian@2 --json")]
    Show {
        /// NAME or NAME@VERSION; without a version the newest
        image: ImageRef,
        #[command(flatten)]
        json: JsonFlag,
    },
    Label(label::LabelArgs),
    /// Remove an image: its record at the coordinator and its bytes on the origins that store it
    #[command(
        after_help = "Example:\n  treeboot image remove debian@1\n  treeboot image remove debian@1 --force"
    )]
    Remove {
        /// NAME@VERSION, or NAME for the newest version
        image: ImageRef,
        /// Remove it although hosts are attached: they are told to detach, and their VMs lose their disks' base
        #[arg(long)]
        force: bool,
    },
    Flatten(flatten::FlattenArgs),
    Attach(attach::AttachArgs),
    Detach(attach::DetachArgs),
}

/// Runs a verb.
pub(crate) async fn run(options: &Options, verb: ImageVerb) -> Result<(), Failure> {
    match verb {
        ImageVerb::Import(args) => add::import(options, args).await,
        ImageVerb::Register(args) => add::register(options, args).await,
        ImageVerb::List(json) => list::list(options, json).await,
        ImageVerb::Show { image, json } => list::show(options, &image, json).await,
        ImageVerb::Label(args) => label::label(options, args).await,
        ImageVerb::Remove { image, force } => list::remove(options, &image, force).await,
        ImageVerb::Flatten(args) => flatten::flatten(options, args).await,
        ImageVerb::Attach(args) => attach::attach(options, args).await,
        ImageVerb::Detach(args) => attach::detach(options, args).await,
    }
}

/// The agent in whose store the image is.
pub(crate) async fn origin_of(
    coordinator: &Coordinator,
    options: &Options,
    image: &ImageRef,
) -> Result<Agent, Failure> {
    let hosts = coordinator.hosts().await?;
    let record = coordinator.image(image).await?;
    let origins = record.origins.iter().map(|origin| origin.host.as_str());
    let names: Vec<_> = origins.filter(|host| !host.is_empty()).collect();
    let stores = hosts.iter().filter(|host| {
        let info = host.info.as_ref();
        info.is_some_and(|info| info.holds_store && names.contains(&info.name.as_str()))
    });
    match stores.collect::<Vec<_>>().as_slice() {
        [only] => Agent::connect(only, options.timeout).await,
        [] => Err(
            Failure::new(Exit::NotFound, format!("no host has {image} in its store"))
                .advice("start the agent of the origin; 'treeboot image show' names it"),
        ),
        several => Err(Failure::new(
            Exit::Usage,
            format!("{} hosts have {image} in their stores", several.len()),
        )
        .advice("name one of them")),
    }
}

/// A digest of a message in hexadecimal; what is no digest is shown as it is.
pub(crate) fn digest_words(digest: &[u8]) -> String {
    match Digest::from_slice(digest) {
        Ok(digest) => digest.to_string(),
        Err(_) => digest.iter().map(|byte| format!("{byte:02x}")).collect(),
    }
}

/// The URL under which an endpoint serves data, as QEMU and `iscsi-ls` take it.
pub(crate) fn endpoint_url(endpoint: &v1::Endpoint) -> String {
    let target = Iqn::new(&endpoint.target).map_or_else(|_| endpoint.target.clone(), |iqn| iqn.to_string());
    let url = format!("iscsi://{}/{target}/{}", endpoint.portal, endpoint.data_lun);
    url.parse::<IscsiUrl>().map_or(url, |url| url.to_string())
}

/// Whether a host is among an image's origins.
pub(crate) fn is_origin(image: &v1::Image, host: &str) -> bool {
    image.origins.iter().any(|origin| origin.host == host)
}

/// Names of hosts that were given more than once count once; the order stays.
pub(crate) fn distinct(hosts: &[HostName]) -> Vec<HostName> {
    let mut seen = std::collections::HashSet::new();
    hosts.iter().filter(|host| seen.insert(*host)).cloned().collect()
}
