//! `delta import`: a new VM whose disk is what a qcow2 file has, over an image.
//!
//! A file that names a backing file has the difference to it: what it stores is sent as a clone's blocks are, the rest stays the
//! image's. A file that names none has a whole disk. A backing file is never opened because the file names it; `--backing` opens
//! one, to compare its content with the image's.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use treeboot_block::storage::{FileStorage, OpenMode};
use treeboot_block::{BlockDevice as _, Provisioning, VerityBuilder, VerityLayout};
use treeboot_proto::v1;
use treeboot_proto::v1::disk_answer::Answer;
use treeboot_proto::v1::disk_part::Part;
use treeboot_types::{HostName, ImageRef, VmName};

use super::{BLOCK_BYTES, export};
use crate::client::{Agent, Coordinator, Options, incomplete, refused};
use crate::failure::{Exit, Failure};
use crate::import::{ImportError, OpenOptions, Own, Qcow2, Qcow2Error, Source, Stamp};
use crate::output::{self, JsonFlag, Progress};

/// Bytes of data in one part.
const PART_BYTES: u64 = 256 << 10;
/// Bytes of zeroes in one part, which carries none of them.
const ZERO_BYTES: u64 = 1 << 30;
/// Parts that wait for the network.
const PARTS: usize = 8;
/// How long the host may take nothing.
const STALL_LIMIT: Duration = Duration::from_secs(60);
/// For the host to sync the disk and to attach the image.
const TAKE_LIMIT: Duration = Duration::from_secs(240);

/// Make a new VM with the disk that a qcow2 file has, over an image
///
/// A file over a backing file (qemu-img create -b, 'delta export --backing') has what differs from it: the image must have that file's
/// content, and nothing else is sent. A file that stands by itself is sent as a whole; 'image import' makes an image of it instead.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  treeboot delta import web-9 web-1.qcow2 --image debian@1 --host host-2 --backing debian.raw"
)]
pub(crate) struct ImportArgs {
    /// The new VM's name
    vm: VmName,
    /// The qcow2 file
    file: PathBuf,
    /// The image that the disk is over
    #[arg(long)]
    image: ImageRef,
    /// The new VM's host
    #[arg(long)]
    host: HostName,
    /// The file's backing file, raw or qcow2, to make sure that it has the image's content
    #[arg(long, value_name = "IMAGE-FILE")]
    backing: Option<PathBuf>,
    #[command(flatten)]
    json: JsonFlag,
}

#[derive(Debug, Serialize)]
struct ImportedJson {
    vm: String,
    host: String,
    image: String,
    file: String,
    /// As the file names it; null where it has a whole disk.
    backing: Option<String>,
    /// Whether the backing file was compared with the image.
    compared: bool,
    /// Of the disk.
    bytes: u64,
    data_bytes: u64,
    zero_bytes: u64,
}

/// `delta import`.
pub(super) async fn run(options: &Options, args: ImportArgs) -> Result<(), Failure> {
    let (stamp, file) = open(&args.file).await?;
    let file = Arc::new(file);
    let coordinator = Coordinator::connect(options).await?;
    let image = coordinator.image(&args.image).await?;
    let id = image.id.clone().unwrap_or_default();
    let name = crate::tree::id_words(&id);
    let bytes = file.geometry().bytes;
    if bytes != image.bytes {
        let what = format!(
            "the disk in '{}' has {bytes} bytes, and {name} has {}",
            args.file.display(),
            image.bytes
        );
        let advice = "name the image that the file is over; a VM's disk has its image's size";
        return Err(Failure::new(Exit::Refused, what).advice(advice));
    }
    if let Some(backing) = &args.backing {
        compare(backing, &image, &name).await?;
    }
    let agent = coordinator.agent(&args.host).await?;
    let parts = Pieces::new(Arc::clone(&file));
    let (data_blocks, zero_blocks) = parts.count().await.map_err(|error| damaged(&args.file, error))?;
    let header = v1::DiskHeader {
        vm: args.vm.to_string(),
        image: Some(id),
        digest: image.digest,
        bytes,
        transfer: rand::random(),
        data_bytes: data_blocks * BLOCK_BYTES,
        layer: None,
        runs: false,
    };
    let end = v1::DiskEnd {
        data_blocks,
        zero_blocks,
    };
    let sending = Sending {
        agent: &agent,
        doing: format!("import '{}' as VM '{}'", args.file.display(), args.vm),
        patience: options.timeout,
        path: &args.file,
        stamp,
    };
    sending.send(parts, header, end).await?;
    let told = ImportedJson {
        vm: args.vm.to_string(),
        host: agent.host,
        image: name,
        file: args.file.display().to_string(),
        backing: file.backing().map(str::to_owned),
        compared: args.backing.is_some(),
        bytes,
        data_bytes: data_blocks * BLOCK_BYTES,
        zero_bytes: zero_blocks * BLOCK_BYTES,
    };
    if args.json.json {
        return output::print_json(&told);
    }
    output::print_text(&format!(
        "imported '{}' as '{}' on host '{}': {} of data and {} of zeroes over {}{}\n  start it with 'treeboot vm start {}'\n",
        told.file,
        told.vm,
        told.host,
        output::bytes(told.data_bytes),
        output::bytes(told.zero_bytes),
        told.image,
        match (&told.backing, told.compared) {
            (Some(backing), false) => format!(", which was taken to be '{backing}': --backing compares them"),
            _ => String::new(),
        },
        told.vm,
    ))
}

fn damaged(path: &Path, source: Qcow2Error) -> Failure {
    let path = path.to_owned();
    ImportError::Qcow2 { path, source }.into()
}

/// Opens a file whose runs are whole blocks of a delta.
async fn open(path: &Path) -> Result<(Stamp, Qcow2), Failure> {
    let (stamp, _) = Stamp::of(path)?;
    let owned = path.to_owned();
    let opened = tokio::task::spawn_blocking(move || Qcow2::open_over(&owned, 512)).await;
    let opened = opened.map_err(|error| Failure::new(Exit::Failed, error.to_string()))?;
    let file = opened.map_err(|error| damaged(path, error))?;
    let unfit = match file.needs_qemu_img() {
        Some(why) => why.to_owned(),
        None if file.cluster_bytes() < BLOCK_BYTES => format!("clusters of {} bytes", file.cluster_bytes()),
        None => return Ok((stamp, file)),
    };
    let path = path.display();
    let over = file.backing().map(|backing| format!(" -B {backing} -F FORMAT"));
    let what = format!("'{path}' has {unfit}, which is not read here");
    Err(Failure::new(Exit::Refused, what).advice(format!(
        "write it anew first: qemu-img convert -O qcow2{} {path} PLAIN.qcow2",
        over.unwrap_or_default()
    )))
}

/// Makes sure that a file has an image's content: by the root of its hash tree, as when an image is imported.
async fn compare(path: &Path, image: &v1::Image, name: &str) -> Result<(), Failure> {
    let options = export::read_only();
    let source = Source::open(path, &options).await?;
    let bytes = source.device.geometry().bytes;
    let same = bytes == image.bytes && digest(&source, &options).await?.0[..] == *image.digest;
    match same {
        true => Ok(()),
        false => {
            let what = format!("'{}' has another content than {name}", path.display());
            let advice = "name the image that was imported from it, or import it: treeboot image import";
            Err(Failure::new(Exit::Refused, what).advice(advice))
        }
    }
}

async fn digest(source: &Source, options: &OpenOptions) -> Result<treeboot_types::Digest, Failure> {
    let scratch = |error: &std::io::Error| Failure::io("cannot keep the hash tree while it is made", error);
    let kept = tempfile::NamedTempFile::new_in(&options.scratch).map_err(|error| scratch(&error))?;
    let hash = FileStorage::open(kept.path(), OpenMode::Create).map_err(|error| scratch(&error))?;
    let (device, bytes) = (&source.device, source.device.geometry().bytes);
    let mut builder = VerityBuilder::new(VerityLayout::new(bytes), &hash);
    let mut progress = Progress::of_bytes("comparing", bytes);
    let (mut at, mut data) = (0, vec![0; PART_BYTES as usize]);
    while at < bytes {
        let read = |error| ImportError::Read {
            path: source.path().into(),
            source: error,
        };
        let extent = device.extent(at, bytes - at).await.map_err(read)?;
        let hole = extent.state == Provisioning::Hole;
        let run = match hole {
            true => extent.bytes.clamp(1, bytes - at),
            false => extent.bytes.clamp(1, PART_BYTES).min(bytes - at),
        };
        if !hole {
            device.read(at, &mut data[..run as usize]).await.map_err(read)?;
        }
        let taken = tokio::task::block_in_place(|| match hole {
            true => builder.skip_zeroes(run),
            false => builder.update(&data[..run as usize]),
        });
        taken.map_err(|error| scratch(&error))?;
        at += run;
        progress.set(at);
    }
    progress.finish();
    builder.finish().map_err(|error| scratch(&error))
}

/// What the file has by itself, in order.
struct Pieces {
    file: Arc<Qcow2>,
    at: u64,
}

impl Pieces {
    fn new(file: Arc<Qcow2>) -> Self {
        Self { file, at: 0 }
    }

    async fn own(&self, at: u64, most: u64) -> Result<(Own, u64), Qcow2Error> {
        let file = Arc::clone(&self.file);
        let told = tokio::task::spawn_blocking(move || file.own(at, most)).await;
        told.unwrap_or_else(|error| Err(Qcow2Error::Io(std::io::Error::other(error))))
    }

    /// Blocks of data and of zeroes.
    async fn count(&self) -> Result<(u64, u64), Qcow2Error> {
        let bytes = self.file.geometry().bytes;
        let (mut data, mut zero, mut at) = (0, 0, 0);
        while at < bytes {
            let (own, run) = self.own(at, bytes - at).await?;
            match own {
                Own::Below => {}
                Own::Zero => zero += run.div_ceil(BLOCK_BYTES),
                Own::Data => data += run.div_ceil(BLOCK_BYTES),
            }
            at += run;
        }
        Ok((data, zero))
    }

    /// The next part; `None` at the end.
    async fn next(&mut self) -> Result<Option<Part>, Failure> {
        let bytes = self.file.geometry().bytes;
        while self.at < bytes {
            let offset = self.at;
            let ask = (bytes - offset).min(ZERO_BYTES);
            let read =
                |error: &dyn std::error::Error| Failure::new(Exit::Failed, crate::failure::chain(error));
            let (own, run) = self.own(offset, ask).await.map_err(|error| read(&error))?;
            match own {
                Own::Below => self.at += run,
                Own::Zero => {
                    self.at += run;
                    return Ok(Some(Part::Zero(v1::DiskZero { offset, bytes: run })));
                }
                Own::Data => {
                    let mut data = vec![0; run.min(PART_BYTES) as usize];
                    self.at += data.len() as u64;
                    let come = self.file.read(offset, &mut data).await;
                    come.map_err(|error| read(&error))?;
                    let checksum = crc32c::crc32c(&data);
                    return Ok(Some(Part::Data(v1::DiskData {
                        offset,
                        data,
                        checksum,
                    })));
                }
            }
        }
        Ok(None)
    }
}

/// A disk on its way to a host.
struct Sending<'a> {
    agent: &'a Agent,
    /// What follows "cannot".
    doing: String,
    patience: Duration,
    path: &'a Path,
    stamp: Stamp,
}

impl Sending<'_> {
    fn late(&self, what: &str, limit: Duration) -> Failure {
        let (doing, peer) = (&self.doing, &self.agent.peer);
        let words = format!("cannot {doing}: {peer} {what} for {}", output::duration(limit));
        Failure::new(Exit::TimedOut, words).advice("see what its agent logs, and whether its disk is full")
    }

    async fn answer(
        &self,
        answers: &mut Streaming<v1::DiskAnswer>,
        limit: Duration,
    ) -> Result<Answer, Failure> {
        let limit = limit.max(self.patience);
        let answer = tokio::time::timeout(limit, answers.message()).await;
        let answer = answer.map_err(|_| self.late("said nothing", limit))?;
        let answer = answer.map_err(|status| self.refused(&status))?;
        let answer = answer.and_then(|answer| answer.answer);
        answer.ok_or_else(|| incomplete(&self.agent.peer, "answer"))
    }

    fn refused(&self, status: &Status) -> Failure {
        refused(&self.agent.peer, &self.doing, status)
    }

    /// Sends all of it. A host that does not get all of it removes what came within a minute.
    async fn send(
        &self,
        mut pieces: Pieces,
        header: v1::DiskHeader,
        end: v1::DiskEnd,
    ) -> Result<(), Failure> {
        let of = |part| v1::DiskPart { part: Some(part) };
        let (parts, stream) = mpsc::channel(PARTS);
        let mut progress = Progress::of_bytes("importing", header.data_bytes);
        // There is room for one.
        let _ = parts.try_send(of(Part::Header(header)));
        let mut client = self.agent.client.clone();
        let begun = client.receive_disk(ReceiverStream::new(stream));
        let mut answers = self.agent.call(&self.doing, begun).await?;
        if let Answer::Taken(_) = self.answer(&mut answers, STALL_LIMIT).await? {
            return Err(incomplete(&self.agent.peer, "wanted_from"));
        }
        let mut sent = 0;
        loop {
            let next = pieces.next().await?;
            let last = next.is_none();
            if last && !self.stamp.is_unchanged() {
                let path = self.path.into();
                return Err(ImportError::Changed { path }.into());
            }
            let part = next.unwrap_or(Part::End(end));
            if let Part::Data(data) = &part {
                sent += data.data.len() as u64;
            }
            tokio::select! {
                // It has no reason to speak now but to refuse.
                early = answers.message() => return Err(match early {
                    Err(status) => self.refused(&status),
                    Ok(_) => incomplete(&self.agent.peer, "status"),
                }),
                permit = tokio::time::timeout(STALL_LIMIT, parts.reserve()) => match permit {
                    Ok(Ok(permit)) => permit.send(of(part)),
                    // Its answer says why.
                    Ok(Err(_)) => {
                        self.answer(&mut answers, STALL_LIMIT).await?;
                        return Err(incomplete(&self.agent.peer, "status"));
                    }
                    Err(_) => return Err(self.late("took nothing", STALL_LIMIT)),
                },
            }
            progress.set(sent);
            if last {
                break;
            }
        }
        match self.answer(&mut answers, TAKE_LIMIT).await? {
            Answer::Taken(_) => {
                progress.finish();
                Ok(())
            }
            Answer::WantedFrom(_) => Err(incomplete(&self.agent.peer, "taken")),
        }
    }
}
