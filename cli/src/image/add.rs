//! `image import` and `image register`: how an image gets into an origin's store and into the coordinator's record.

use std::cell::Cell;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;
use treeboot_proto::v1;
use treeboot_types::{HostName, ImageRef, IscsiUrl};

use crate::client::{Agent, Coordinator, Options, find_host, host_name, incomplete, refused};
use crate::failure::{Exit, Failure};
use crate::follow::{Followed, follow};
use crate::import::{self, FeedError, Format, ImportError, OpenOptions, Parts, Source};
use crate::output::{self, JsonFlag, Progress, printable};
use crate::tree::id_words;

use super::{digest_words, endpoint_url};

/// How long an agent may take to make the last byte durable and the record known: a slow disk syncs an image of
/// tens of gigabytes in minutes.
const FINISH_LIMIT: Duration = Duration::from_secs(600);

/// How long an agent may show no progress: a disk that syncs answers nothing for a while.
const STALL_LIMIT: Duration = Duration::from_secs(120);

/// Import a disk image from a file into an origin's store
///
/// Reads raw and qcow2 images, and with qemu-img installed also vmdk, vdi, vhd, vhdx and others. The format is told by
/// content. Holes and zeroes are not sent. Without a version the next free one is taken.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  treeboot image import debian.qcow2 debian\n  treeboot image import disk.raw web@3 --to origin"
)]
pub(crate) struct ImportArgs {
    /// The image: a file, or a block device that nobody writes
    file: PathBuf,
    /// NAME or NAME@VERSION
    name: ImageRef,
    #[command(flatten)]
    to: ToHost,
    /// A label, KEY=VALUE, as 'image label' sets it, before the image is there; may be given several times
    #[arg(long = "label", value_name = "LABEL", value_parser = super::label::pair)]
    labels: Vec<(String, String)>,
    /// Take the file for this format, whatever its content says
    #[arg(long, value_enum)]
    format: Option<FormatName>,
    /// Where a format that qemu-img converts is put meanwhile [default: TMPDIR, else /var/tmp]
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    #[command(flatten)]
    json: JsonFlag,
}

/// Register an image that iSCSI targets serve already
///
/// An origin agent reads it once for its hash tree and keeps that tree; the data stays where it is. Several URLs are
/// the same disk over several ways: the first is used, the next when it fails.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  treeboot image register iscsi://san.example/iqn.2001-04.com.example:golden/1 --name golden"
)]
pub(crate) struct RegisterArgs {
    /// iscsi://HOST[:PORT]/TARGET-IQN/LUN
    #[arg(required = true, value_name = "URL")]
    urls: Vec<IscsiUrl>,
    /// NAME or NAME@VERSION
    #[arg(long)]
    name: ImageRef,
    #[command(flatten)]
    to: ToHost,
    #[command(flatten)]
    json: JsonFlag,
}

#[derive(Debug, clap::Args)]
struct ToHost {
    /// The host whose agent keeps it; may be left out where only one has a store
    #[arg(long = "to", value_name = "HOST")]
    host: Option<HostName>,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum FormatName {
    Raw,
    Qcow2,
}

/// `--json` of both verbs.
#[derive(Debug, Serialize)]
struct AddedJson {
    image: String,
    digest: String,
    bytes: u64,
    allocated_bytes: u64,
    /// Payload that went to the agent; none where the agent read by itself.
    sent_bytes: Option<u64>,
    created: bool,
    host: String,
    agent_address: String,
    directory: String,
    urls: Vec<String>,
}

/// `image import`.
pub(super) async fn import(options: &Options, args: ImportArgs) -> Result<(), Failure> {
    let format = args.format.map(|format| match format {
        FormatName::Raw => Format::Raw,
        FormatName::Qcow2 => Format::Qcow2,
    });
    // Before anything is sent: most mistakes are in the file.
    let options_to_open = OpenOptions {
        format,
        scratch: args.scratch.clone().unwrap_or_else(import::default_scratch),
        block_bytes: 512,
        physical_block_bytes: 4096,
        fully_allocated: false,
        writable: false,
    };
    let source = Source::open(&args.file, &options_to_open).await?;
    let coordinator = Coordinator::connect(options).await?;
    let host = choose_store(&coordinator.hosts().await?, args.to.host.as_ref())?;
    let agent = Agent::connect(&host, options.timeout).await?;
    if !args.labels.is_empty() {
        // First, so that nobody uses it for a moment who may not.
        coordinator
            .label_image(args.name.name.as_str(), &args.labels, &[])
            .await?;
    }
    eprintln!(
        "importing '{}' ({}{}, {}, {} in use) into the store of host '{}', agent at {}",
        source.path().display(),
        source.format,
        if source.was_converted() { ", converted" } else { "" },
        output::bytes(source.device.geometry().bytes),
        output::bytes(source.stored_bytes),
        agent.host,
        printable(&agent.address),
    );
    let (response, sent) = send(&agent, &source, &args.name, options.timeout).await?;
    report(&agent, response, Some(sent), args.json)
}

/// Sends an image; the answer is the agent's and the number of bytes sent.
async fn send(
    agent: &Agent,
    source: &Source,
    name: &ImageRef,
    timeout: Duration,
) -> Result<(v1::ImportResponse, u64), Failure> {
    let doing = format!("import '{}' on host '{}'", source.path().display(), agent.host);
    let bytes = source.device.geometry().bytes;
    let header = v1::ImportHeader {
        image: Some(name.into()),
        bytes,
        ..v1::ImportHeader::default()
    };
    let (sender, parts) = Parts::new();
    let progress = std::cell::RefCell::new(Progress::of_bytes("importing", bytes));
    let last_step = Cell::new(Instant::now());
    let feeding = import::feed(
        &*source.device,
        header,
        sender,
        || source.is_unchanged(),
        |at| {
            progress.borrow_mut().set(at);
            last_step.set(Instant::now());
        },
    );
    let path = || source.path().into();
    let feeding = async {
        feeding.await.map_err(|error| match error {
            FeedError::Read(source) => Some(ImportError::Read { path: path(), source }.into()),
            FeedError::Changed => Some(ImportError::Changed { path: path() }.into()),
            FeedError::Gone => None,
        })
    };
    upload(agent, &doing, parts, feeding, &last_step, timeout).await
}

/// Sends what is fed into `parts` as an import; the answer is the agent's and the number of bytes fed. Feeding that fails without a word
/// met an agent that had enough, and which says why itself.
pub(crate) async fn upload(
    agent: &Agent,
    doing: &str,
    parts: Parts,
    feeding: impl Future<Output = Result<u64, Option<Failure>>>,
    last_step: &Cell<Instant>,
    timeout: Duration,
) -> Result<(v1::ImportResponse, u64), Failure> {
    let mut client = agent.client.clone();
    let call = client.import_image(parts);
    tokio::pin!(feeding, call);
    let mut sent = None;
    let limit = timeout.max(STALL_LIMIT);
    let response = loop {
        let patience = if sent.is_some() {
            FINISH_LIMIT.max(timeout)
        } else {
            limit
        };
        let stalled = tokio::time::sleep_until(last_step.get() + patience);
        tokio::select! {
            // Leaving the loop drops the call, and without the last part the agent throws away what it has.
            fed = &mut feeding, if sent.is_none() => match fed {
                Ok(fed) => {
                    sent = Some(fed);
                    last_step.set(Instant::now());
                }
                Err(Some(failure)) => return Err(failure),
                // The call's own error comes next and says why.
                Err(None) => sent = Some(0),
            },
            answer = &mut call => break answer.map_err(|status| refused(&agent.peer, doing, &status))?,
            () = stalled, if last_step.get().elapsed() >= patience => {
                let what = format!("cannot {doing}: {} took nothing for {}", agent.peer, output::duration(patience));
                return Err(Failure::new(Exit::TimedOut, what).advice("see what that process logs, and whether its disk is full"));
            }
        }
    };
    Ok((response.into_inner(), sent.unwrap_or(0)))
}

/// `image register`.
pub(super) async fn register(options: &Options, args: RegisterArgs) -> Result<(), Failure> {
    let coordinator = Coordinator::connect(options).await?;
    let host = choose_store(&coordinator.hosts().await?, args.to.host.as_ref())?;
    let agent = Agent::connect(&host, options.timeout).await?;
    eprintln!(
        "registering {}: host '{}' (agent at {}) reads it once and keeps its hash tree; the data stays there",
        args.urls[0],
        agent.host,
        printable(&agent.address),
    );
    let doing = format!("register {} on host '{}'", args.urls[0], agent.host);
    let request = v1::AdoptRequest {
        image: Some((&args.name).into()),
        urls: args.urls.iter().map(ToString::to_string).collect(),
    };
    let stream = agent
        .call(&doing, agent.client.clone().adopt_image(request))
        .await?;
    let followed = Followed {
        peer: &agent.peer,
        doing: &doing,
        patience: options.timeout.max(STALL_LIMIT),
        advice: "see what that process logs, and whether the target answers: iscsi-ls -s iscsi://HOST",
    };
    let response = follow(&followed, stream, Progress::of_bytes("reading", 0), |step| {
        (step.done_bytes, step.total_bytes, step.result)
    })
    .await?;
    report(&agent, response, None, args.json)
}

/// Says what came of it.
pub(crate) fn report(
    agent: &Agent,
    response: v1::ImportResponse,
    sent: Option<u64>,
    json: JsonFlag,
) -> Result<(), Failure> {
    let image = response.image.ok_or_else(|| incomplete(&agent.peer, "image"))?;
    let urls = image
        .origins
        .iter()
        .filter_map(|origin| origin.endpoint.as_ref())
        .map(endpoint_url);
    let added = AddedJson {
        image: image.id.as_ref().map(id_words).unwrap_or_default(),
        digest: digest_words(&image.digest),
        bytes: image.bytes,
        allocated_bytes: image.allocated_bytes,
        sent_bytes: sent,
        created: response.created,
        host: agent.host.clone(),
        agent_address: agent.address.clone(),
        directory: response.directory,
        urls: urls.collect(),
    };
    if json.json {
        return output::print_json(&added);
    }
    output::print_text(&render(&added))
}

fn render(added: &AddedJson) -> String {
    let mut text = format!(
        "{}{}  {}, {} stored\n  digest    {}\n  kept in   {} on host '{}'\n",
        added.image,
        if added.created {
            ""
        } else {
            " was there already with this content"
        },
        output::bytes(added.bytes),
        output::bytes(added.allocated_bytes),
        added.digest,
        printable(&added.directory),
        added.host,
    );
    for url in &added.urls {
        text += &format!("  serves    {}\n", printable(url));
    }
    text + &format!(
        "  by        treeboot-agent on host '{}' ({})\n",
        added.host,
        printable(&added.agent_address)
    )
}

/// The host that takes an image in: the one named, or the only one with a store.
fn choose_store(hosts: &[v1::HostRecord], named: Option<&HostName>) -> Result<v1::HostRecord, Failure> {
    const START: &str =
        "start one with a store: treeboot-agent --name origin --store DIR --state DIR --coordinator URL";
    let has_store = |host: &v1::HostRecord| host.info.as_ref().is_some_and(|info| info.holds_store);
    if let Some(name) = named {
        let host = find_host(hosts, name)?;
        return if has_store(&host) {
            Ok(host)
        } else {
            Err(
                Failure::new(Exit::Refused, format!("the host '{name}' has no store"))
                    .advice("start its agent again with --store DIR, or name another host with --to"),
            )
        };
    }
    let stores: Vec<_> = hosts
        .iter()
        .filter(|host| host.connected && has_store(host))
        .collect();
    match stores.as_slice() {
        [only] => Ok((*only).clone()),
        [] => Err(Failure::new(Exit::NotFound, "no connected host has a store for images").advice(START)),
        several => {
            let names: Vec<&str> = several.iter().map(|host| host_name(host)).collect();
            let what = format!(
                "{} hosts have a store: {}",
                names.len(),
                printable(&names.join(", "))
            );
            Err(Failure::new(Exit::Usage, what).advice("say which with --to"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str, connected: bool, holds_store: bool) -> v1::HostRecord {
        let info = v1::HostInfo {
            name: name.into(),
            holds_store,
            ..Default::default()
        };
        v1::HostRecord {
            info: Some(info),
            connected,
            ..Default::default()
        }
    }

    #[test]
    fn the_only_store_is_chosen_and_of_several_one_must_be_named() {
        let hosts = [
            host("a", true, true),
            host("b", true, false),
            host("c", false, true),
        ];
        assert_eq!(host_name(&choose_store(&hosts, None).unwrap()), "a");
        let name = |name| HostName::new(name).unwrap();
        assert_eq!(
            choose_store(&hosts, Some(&name("b"))).unwrap_err().exit,
            Exit::Refused
        );
        assert_eq!(
            choose_store(&hosts, Some(&name("d"))).unwrap_err().exit,
            Exit::NotFound
        );
        let none = choose_store(&hosts[1..], None).unwrap_err();
        assert!(none.exit == Exit::NotFound && none.advice.unwrap().contains("--store DIR"));
        let several = choose_store(&[host("a", true, true), host("d", true, true)], None).unwrap_err();
        assert_eq!(
            (several.exit, several.what.as_str()),
            (Exit::Usage, "2 hosts have a store: a, d")
        );
    }

    #[test]
    fn it_says_where_the_bytes_are_and_who_serves_them() {
        let added = AddedJson {
            image: "debian@1".into(),
            digest: "ab".repeat(32),
            bytes: 2 << 30,
            allocated_bytes: 700 << 20,
            sent_bytes: Some(700 << 20),
            created: true,
            host: "origin".into(),
            agent_address: "127.0.0.1:7401".into(),
            directory: "/var/lib/treeboot/store/abab".into(),
            urls: vec!["iscsi://127.0.0.1:3260/iqn.2026-11.dev.treeboot:image:debian:1/0".into()],
        };
        assert_eq!(
            render(&added),
            format!(
                "debian@1  2.00 GiB, 700 MiB stored\n  digest    {}\n  \
                 kept in   /var/lib/treeboot/store/abab on host 'origin'\n  \
                 serves    iscsi://127.0.0.1:3260/iqn.2026-11.dev.treeboot:image:debian:1/0\n  \
                 by        treeboot-agent on host 'origin' (127.0.0.1:7401)\n",
                "ab".repeat(32)
            )
        );
    }
}
