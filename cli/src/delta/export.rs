//! `delta export`: a VM's disk, or what it wrote over an image, as a qcow2 file.

use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use treeboot_proto::v1;
use treeboot_types::{HostName, SnapshotName, VmName};

use super::qcow2::{Backing, Writer};
use crate::client::{Coordinator, Options};
use crate::exported::{Exported, Piece};
use crate::failure::{Exit, Failure};
use crate::import::{self, Format, OpenOptions, Source};
use crate::output::{self, JsonFlag, Progress};
use crate::vm::agent_with;

/// Clusters of 64 KiB, as `qemu-img` makes them.
const WHOLE_CLUSTER_BITS: u32 = 16;
/// Clusters of a block of a delta, so that none is partly the backing file's.
const DELTA_CLUSTER_BITS: u32 = 12;

/// Write a VM's disk to a qcow2 file, as one point in time
///
/// The VM goes on meanwhile. Without --backing the file has all of the disk and stands by itself; with it the file has only what the VM
/// wrote, over a file that has the VM's image.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  treeboot delta export web-1 web-1.qcow2\n  treeboot delta export web-1 web-1.qcow2 --snapshot before-upgrade --backing debian.raw"
)]
pub(crate) struct ExportArgs {
    /// The VM's name
    vm: VmName,
    /// The file, which must not exist
    file: PathBuf,
    /// The disk as it was then
    #[arg(long)]
    snapshot: Option<SnapshotName>,
    /// The VM's image as a file, raw or qcow2; it is named in the new file as it is named here
    #[arg(long, value_name = "IMAGE-FILE")]
    backing: Option<PathBuf>,
    /// The VM's host; looked up where it is left out
    #[arg(long)]
    host: Option<HostName>,
    #[command(flatten)]
    json: JsonFlag,
}

#[derive(Debug, Serialize)]
struct ExportedJson {
    vm: String,
    host: String,
    image: String,
    file: String,
    /// Of the disk.
    bytes: u64,
    /// That the VM has of its own, or with the image's.
    data_bytes: u64,
    file_bytes: u64,
    backing: Option<String>,
}

/// `delta export`.
pub(super) async fn run(options: &Options, args: ExportArgs) -> Result<(), Failure> {
    let backing = match &args.backing {
        Some(path) => Some(open_backing(path).await?),
        None => None,
    };
    if args.file.exists() {
        let what = format!("'{}' exists", args.file.display());
        return Err(Failure::new(Exit::Exists, what).advice("name another file, or remove that one"));
    }
    let coordinator = Coordinator::connect(options).await?;
    let agent = agent_with(&coordinator, options, &args.vm, args.host.clone()).await?;
    let doing = format!("export the disk of VM '{}' of host '{}'", args.vm, agent.host);
    let request = v1::ExportDiskRequest {
        vm: args.vm.to_string(),
        snapshot: args
            .snapshot
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        whole: backing.is_none(),
    };
    let mut exported = Exported::begin(&agent, request, doing, options.timeout).await?;
    let bytes = exported.header.bytes;
    if let Some((_, backing_bytes)) = &backing
        && *backing_bytes != bytes
    {
        let what = format!("the backing file has {backing_bytes} bytes, and the VM's image {bytes}");
        return Err(Failure::new(Exit::Refused, what).advice("name the file that was imported"));
    }
    // Removed unless all of it is there.
    let mut unfinished = Unfinished(None);
    let io = |error: io::Error| Failure::io(format!("cannot write '{}'", args.file.display()), &error);
    let name = args.backing.as_ref().map(|path| path.display().to_string());
    let below = backing.as_ref().zip(name.as_deref());
    let below = below.map(|((format, _), name)| Backing { name, format });
    let bits = match below {
        Some(_) => DELTA_CLUSTER_BITS,
        None => WHOLE_CLUSTER_BITS,
    };
    let mut writer = Writer::create(&args.file, bytes, bits, below).map_err(io)?;
    unfinished.0 = Some(&args.file);
    let mut progress = Progress::of_bytes("exporting", exported.header.data_bytes);
    let mut data_bytes = 0;
    while let Some(piece) = exported.next().await? {
        // A slow disk holds up this stream, and nothing else.
        let (at, written) = tokio::task::block_in_place(|| match &piece {
            Piece::Data(offset, data) => {
                data_bytes += data.len() as u64;
                (offset + data.len() as u64, writer.data(*offset, data))
            }
            Piece::Zero(offset, bytes) => (offset + bytes, writer.zeroes(*offset, *bytes)),
        });
        written.map_err(io)?;
        progress.set(if below.is_some() { data_bytes } else { at });
    }
    let file_bytes = tokio::task::block_in_place(|| writer.finish()).map_err(io)?;
    unfinished.0 = None;
    progress.finish();
    let image = exported.header.image.take().unwrap_or_default();
    let told = ExportedJson {
        vm: args.vm.to_string(),
        host: agent.host,
        image: crate::tree::id_words(&image),
        file: args.file.display().to_string(),
        bytes,
        data_bytes,
        file_bytes,
        backing: name,
    };
    if args.json.json {
        return output::print_json(&told);
    }
    output::print_text(&format!(
        "wrote '{}': {} of the disk of '{}' ({} in all), {}\n",
        told.file,
        output::bytes(told.data_bytes),
        told.vm,
        output::bytes(told.bytes),
        match &told.backing {
            Some(backing) => format!("over '{backing}', which must have {}", told.image),
            None => "which stands by itself".to_owned(),
        }
    ))
}

/// How a backing file is opened.
pub(super) fn read_only() -> OpenOptions {
    OpenOptions {
        format: None,
        scratch: import::default_scratch(),
        block_bytes: 512,
        physical_block_bytes: 4096,
        fully_allocated: false,
        writable: false,
    }
}

/// The format and the size of a backing file, in bytes.
async fn open_backing(path: &Path) -> Result<(&'static str, u64), Failure> {
    let source = Source::open(path, &read_only()).await?;
    let format = match source.format {
        Format::Raw => "raw",
        Format::Qcow2 => "qcow2",
        Format::Foreign(_) => {
            let what = format!("'{}' is neither raw nor qcow2", path.display());
            return Err(Failure::new(Exit::Refused, what).advice("name the image as a raw or a qcow2 file"));
        }
    };
    Ok((format, source.device.geometry().bytes))
}

/// A file that is removed where it was not finished.
struct Unfinished<'a>(Option<&'a Path>);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if let Some(path) = self.0 {
            // What cannot be removed is a file that says by its empty header that it is no image.
            let _ = std::fs::remove_file(path);
        }
    }
}
