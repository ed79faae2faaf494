//! `treeboot publish`: a new version of an image, of what a VM wrote over an old one.

use std::cell::{Cell, RefCell};

use tokio::sync::mpsc;
use treeboot_proto::v1;
use treeboot_proto::v1::import_part::Part;
use treeboot_types::{HostName, ImageRef, SnapshotName, VmName};

use crate::client::{Coordinator, Options, incomplete};
use crate::exported::{Exported, Piece};
use crate::failure::Failure;
use crate::image::{origin_of, report, upload};
use crate::import::Parts;
use crate::output::{JsonFlag, Progress};
use crate::tree::id_words;
use crate::vm::agent_with;

/// Make a new version of an image of what a VM wrote
///
/// The VM goes on meanwhile; without a snapshot it is its disk as it is now, as a power cut would leave it, so stop it or take a snapshot of a quiet moment
/// where that matters. The origin stores only the blocks that differ from the version that the VM stands on. VMs that run keep
/// their version; new ones get the newest.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  treeboot publish web-1\n  treeboot publish web-1 web@4 --snapshot updated"
)]
pub(crate) struct PublishArgs {
    /// The VM's name
    vm: VmName,
    /// NAME or NAME@VERSION; without it the next version of the image that the VM stands on
    image: Option<ImageRef>,
    /// The disk as it was then
    #[arg(long)]
    snapshot: Option<SnapshotName>,
    /// The VM's host; looked up where it is left out
    #[arg(long)]
    host: Option<HostName>,
    /// The host whose store has the image; may be left out where only one has
    #[arg(long, value_name = "HOST")]
    to: Option<HostName>,
    #[command(flatten)]
    json: JsonFlag,
}

/// `publish`.
pub(crate) async fn run(options: &Options, args: PublishArgs) -> Result<(), Failure> {
    let coordinator = Coordinator::connect(options).await?;
    let agent = agent_with(&coordinator, options, &args.vm, args.host).await?;
    let request = v1::ExportDiskRequest {
        vm: args.vm.to_string(),
        snapshot: args.snapshot.map(|name| name.to_string()).unwrap_or_default(),
        whole: false,
    };
    let doing = format!("publish VM '{}' of host '{}'", args.vm, agent.host);
    let mut exported = Exported::begin(&agent, request, doing.clone(), options.timeout).await?;
    let base = exported.header.image.clone();
    let base = base.ok_or_else(|| incomplete(&agent.peer, "image"))?;
    let of: ImageRef = id_words(&base)
        .parse()
        .map_err(|_| incomplete(&agent.peer, "image"))?;
    let name = args.image.unwrap_or(ImageRef {
        name: of.name.clone(),
        version: None,
    });
    let origin = match &args.to {
        Some(host) => coordinator.agent(host).await?,
        None => origin_of(&coordinator, options, &of).await?,
    };
    eprintln!(
        "publishing what '{}' wrote over {of} on host '{}' into the store of host '{}'",
        args.vm, agent.host, origin.host
    );
    let (sender, parts) = Parts::new();
    let header = v1::ImportHeader {
        image: Some((&name).into()),
        bytes: exported.header.bytes,
        chunk_bytes: 0,
        base: Some(base),
    };
    let progress = RefCell::new(Progress::of_bytes("publishing", exported.header.data_bytes));
    let last_step = Cell::new(tokio::time::Instant::now());
    let feeding = feed(&mut exported, header, sender, |sent| {
        progress.borrow_mut().set(sent);
        last_step.set(tokio::time::Instant::now());
    });
    let (response, sent) = upload(&origin, &doing, parts, feeding, &last_step, options.timeout).await?;
    progress.into_inner().finish();
    report(&origin, response, Some(sent), args.json)
}

/// Hands a disk's pieces on as parts of an import. Nothing is said where nobody takes them: that one has a reason of its own.
async fn feed(
    exported: &mut Exported,
    header: v1::ImportHeader,
    parts: mpsc::Sender<v1::ImportPart>,
    mut step: impl FnMut(u64),
) -> Result<u64, Option<Failure>> {
    let send = async |part| {
        let sent = parts.send(v1::ImportPart { part: Some(part) }).await;
        sent.map_err(|_| None)
    };
    send(Part::Header(header)).await?;
    let mut data_bytes = 0;
    while let Some(piece) = exported.next().await.map_err(Some)? {
        match piece {
            Piece::Data(offset, data) => {
                data_bytes += data.len() as u64;
                send(Part::Data(v1::ImportData { offset, data })).await?;
            }
            Piece::Zero(offset, bytes) => send(Part::Zero(v1::ImportZero { offset, bytes })).await?,
        }
        step(data_bytes);
    }
    send(Part::End(v1::ImportEnd { data_bytes })).await?;
    Ok(data_bytes)
}
