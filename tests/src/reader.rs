//! Reads an image whole through a VM's disk, as a front end would, and compares every block with what the image is known to hold.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::stream::{StreamExt as _, TryStreamExt as _};
use treeboot_iscsi::initiator::{Session, SessionOptions};
use treeboot_iscsi::login::{Chap, Credentials, Secret};
use treeboot_proto::v1;
use treeboot_types::{Iqn, IscsiUrl, VmName};

use crate::daemon::Daemon;
use crate::image::{BLOCK_BYTES, Pattern};
use crate::measure::newest;

/// One command.
const READ_BYTES: u64 = 64 * 1024;
/// Commands under way at once: enough to keep every hop busy.
const DEPTH: usize = 16;

/// What a whole read took.
#[derive(Debug, Clone, Copy)]
pub struct WholeRead {
    /// Altogether.
    pub took: Duration,
    /// The longest single command.
    pub longest: Duration,
}

/// Logs in at a VM's disk, as its front end; the disk is made, and the host attached, where they are not.
///
/// # Errors
/// The agent cannot attach, or refuses.
pub async fn log_in(agent: &Daemon, image: &str, vm: &str) -> Result<(Session, u16)> {
    let request = v1::CreateRequest {
        vm: vm.to_owned(),
        image: Some(newest(image)),
        device: false,
        limit_bytes: None,
    };
    let answer = agent.agent().await?.create(request).await?;
    log_in_to(answer.into_inner(), vm).await
}

/// Logs in at the disk of an answer to `Create`, as the VM's front end.
///
/// # Errors
/// The host refuses.
pub async fn log_in_to(answer: v1::CreateResponse, vm: &str) -> Result<(Session, u16)> {
    let disk = answer.disk.context("an answer without the disk")?;
    let url: IscsiUrl = disk.url.parse()?;
    let mut options = SessionOptions::new(url.portal(), url.target.clone(), Iqn::of_vm(&VmName::new(vm)?));
    if let Some(secret) = answer.secret {
        let credentials = Credentials::new(secret.user, Secret::new(secret.secret)?)?;
        options.chap = Some(Chap::one_way(credentials));
    }
    let session = Session::connect(options).await?;
    Ok((session, url.lun))
}

/// Reads all of an image through one session, some commands at a time.
///
/// # Errors
/// A command failed, or a block is not the image's; the error says which.
pub async fn read_whole(session: &Session, lun: u16, pattern: Pattern) -> Result<WholeRead> {
    let began = Instant::now();
    let offsets = (0..pattern.bytes).step_by(usize::try_from(READ_BYTES)?);
    let longest = futures_util::stream::iter(offsets)
        .map(|offset| async move {
            let began = Instant::now();
            let bytes = u32::try_from(READ_BYTES.min(pattern.bytes - offset))?;
            let read = session.read(lun, offset, bytes).await?;
            match pattern.first_wrong_block(offset, &read) {
                Some(block) => bail!("block {block} is not the image's"),
                None => Ok(began.elapsed()),
            }
        })
        .buffer_unordered(DEPTH)
        .try_fold(
            Duration::ZERO,
            |longest, took| async move { Ok(longest.max(took)) },
        )
        .await?;
    Ok(WholeRead {
        took: began.elapsed(),
        longest,
    })
}

/// Blocks of [`BLOCK_BYTES`] of a disk that are not the image's, each filled with a byte.
pub type Blocks = BTreeMap<u64, u8>;

/// Fills blocks of a disk.
///
/// # Errors
/// A command failed.
pub async fn write_blocks(session: &Session, lun: u16, blocks: &[u64], fill: u8) -> Result<()> {
    for block in blocks {
        let data = vec![fill; BLOCK_BYTES].into();
        session.write(lun, block * BLOCK_BYTES as u64, data).await?;
    }
    session.flush(lun).await?;
    Ok(())
}

/// The disk has these blocks, and the image's elsewhere.
///
/// # Errors
/// A command failed, or a block is another; the error says which.
pub async fn check_blocks(session: &Session, lun: u16, image: Pattern, blocks: &Blocks) -> Result<()> {
    for offset in (0..image.bytes).step_by(usize::try_from(READ_BYTES)?) {
        let bytes = u32::try_from(READ_BYTES.min(image.bytes - offset))?;
        check_read(offset, &session.read(lun, offset, bytes).await?, image, blocks)?;
    }
    Ok(())
}

/// What was read of a disk at `offset`, a multiple of [`BLOCK_BYTES`], is these blocks, and the image's elsewhere.
///
/// # Errors
/// A block is another; the error says which.
pub fn check_read(offset: u64, read: &[u8], image: Pattern, blocks: &Blocks) -> Result<()> {
    for (n, bytes) in (offset / BLOCK_BYTES as u64..).zip(read.chunks(BLOCK_BYTES)) {
        let right = match blocks.get(&n) {
            Some(fill) => bytes.iter().all(|byte| byte == fill),
            None => image.first_wrong_block(n * BLOCK_BYTES as u64, bytes).is_none(),
        };
        ensure!(right, "block {n} is not what it should be");
    }
    Ok(())
}
