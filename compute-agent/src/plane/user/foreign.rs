//! Reading a disk that a foreign iSCSI target serves, once, from its beginning to its end.

use std::sync::Arc;

use futures_util::StreamExt as _;
use tokio::sync::mpsc;
use treeboot_iscsi::initiator::{Lun, PathGroup, PathGroupOptions, PathSpec, Session, SessionOptions};
use treeboot_types::{HostName, Iqn, IscsiUrl};

use crate::host::chain;
use crate::store::{ImportPart, SentPart, StoreError};

/// One read; the most that the usual targets answer in one command without splitting it into many bursts.
const PIECE_BYTES: u32 = 1 << 20;
/// Reads in flight: enough for a fast link, and 8 MiB of memory.
const IN_FLIGHT: usize = 8;

/// Finds the targets and the size on which they agree. The first is read, the next ones where it fails.
///
/// # Errors
/// None answers, or two that answer differ in size; each is named.
pub async fn open(
    host: &HostName,
    image: &str,
    urls: &[IscsiUrl],
) -> Result<(u64, Arc<PathGroup>), StoreError> {
    let unreadable = |why: String| StoreError::Unreadable {
        image: image.to_owned(),
        why,
    };
    let initiator = Iqn::of_host(host);
    let looks = urls.iter().map(|url| {
        let options = SessionOptions::new(url.portal(), url.target.clone(), initiator.clone());
        async move {
            let session = Session::connect(options)
                .await
                .map_err(|e| format!("{url}: {}", chain(&e)))?;
            let capacity = session.capacity(url.lun).await;
            session.close().await;
            capacity
                .map(|c| c.bytes)
                .map_err(|e| format!("{url}: {}", chain(&e)))
        }
    });
    let mut size: Option<(u64, &IscsiUrl)> = None;
    let mut failures = Vec::new();
    for (url, look) in urls.iter().zip(futures_util::future::join_all(looks).await) {
        match (look, size) {
            (Err(why), _) => failures.push(why),
            (Ok(bytes), Some((first, from))) if bytes != first => {
                return Err(unreadable(format!(
                    "{from} has {first} bytes and {url} has {bytes}; they are not the same disk"
                )));
            }
            (Ok(bytes), None) => size = Some((bytes, url)),
            (Ok(_), Some(_)) => {}
        }
    }
    let Some((bytes, _)) = size else {
        let why = if failures.is_empty() {
            "no target was named".into()
        } else {
            failures.join("; ")
        };
        return Err(unreadable(why));
    };
    for failure in failures {
        tracing::warn!(image, reason = %failure, "one of the targets does not answer; the others are read");
    }
    let mut paths: Vec<_> = urls
        .iter()
        .map(|url| PathSpec {
            portal: url.portal(),
            target: url.target.clone(),
            label: url.portal(),
            data_lun: url.lun,
            hash_lun: None,
            chap: None,
        })
        .collect();
    let group = PathGroup::new(PathGroupOptions::new(initiator));
    let fallbacks = paths.split_off(1);
    group.set_paths(paths, fallbacks);
    Ok((bytes, group))
}

/// Reads everything in order and hands it on.
///
/// # Errors
/// A piece that no target gives.
pub async fn read_all(
    group: &Arc<PathGroup>,
    image: &str,
    bytes: u64,
    parts: &mpsc::Sender<SentPart>,
    mut progress: impl FnMut(u64, u64) + Send,
) -> Result<(), StoreError> {
    let pieces = (0..bytes).step_by(PIECE_BYTES as usize).map(|offset| {
        let length = u64::from(PIECE_BYTES).min(bytes - offset) as u32;
        async move {
            let read = group.read(Lun::Data, offset, length, &[]).await;
            read.map(|(data, _)| ImportPart { offset, data })
        }
    });
    let mut pieces = futures_util::stream::iter(pieces).buffered(IN_FLIGHT);
    while let Some(piece) = pieces.next().await {
        let part = piece.map_err(|error| StoreError::Unreadable {
            image: image.to_owned(),
            why: chain(&error),
        })?;
        let done = part.offset + part.data.len() as u64;
        if parts.send(Ok(part)).await.is_err() {
            // The writer gave up and says why itself.
            return Ok(());
        }
        progress(done, bytes);
    }
    Ok(())
}
