//! An image as the messages of `ImportImage`: allocated ranges that are not zero, in order, holes left out.

use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::sync::mpsc;
use tokio_stream::Stream;
use treeboot_block::{BlockDevice, BlockError, Provisioning};
use treeboot_proto::v1;

/// The most data in one message (`ImportData.data`).
const PART_BYTES: u64 = 1 << 20;

/// The unit in which zeroes are found, and to which parts are aligned: a block of the hash tree.
const GRAIN: u64 = 4096;

/// How far ahead the state of ranges is asked for at once.
const LOOK_AHEAD: u64 = 1 << 30;

/// How many parts wait for the network: enough that reading and sending overlap, 8 MiB at most.
const QUEUE: usize = 8;

/// The stream of messages that an agent receives. Only a part that says so makes the image complete; that the stream
/// ends says nothing (`docs/decisions/0052`).
#[derive(Debug)]
pub(crate) struct Parts(mpsc::Receiver<v1::ImportPart>);

impl Parts {
    /// A stream and where its messages go in.
    pub(crate) fn new() -> (mpsc::Sender<v1::ImportPart>, Self) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        (sender, Self(receiver))
    }
}

impl Stream for Parts {
    type Item = v1::ImportPart;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<v1::ImportPart>> {
        self.0.poll_recv(context)
    }
}

/// Why feeding ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FeedError {
    /// The image cannot be read.
    #[error(transparent)]
    Read(#[from] BlockError),
    /// Somebody wrote to the image meanwhile.
    #[error("the image changed while it was read")]
    Changed,
    /// Whoever received the parts went away; its own error says why.
    #[error("the receiver went away")]
    Gone,
}

/// Sends the whole of `device` as parts, then, if it is `unchanged` after the last of them was read, the end. `at` is
/// told up to where it has come, in bytes.
///
/// # Errors
/// [`FeedError`]; the part that says that this is all was not sent then.
pub(crate) async fn feed(
    device: &dyn BlockDevice,
    header: v1::ImportHeader,
    parts: mpsc::Sender<v1::ImportPart>,
    unchanged: impl FnOnce() -> bool,
    mut at: impl FnMut(u64),
) -> Result<u64, FeedError> {
    use v1::import_part::Part;
    let bytes = device.geometry().bytes;
    send(&parts, Part::Header(header)).await?;
    let (mut offset, mut sent) = (0, 0);
    while offset < bytes {
        let ask = (bytes - offset).min(LOOK_AHEAD);
        let extent = device.extent(offset, ask).await?;
        // A device that answers with less than its contract demands must not make this loop for ever.
        let end = offset + extent.bytes.clamp(1, ask);
        if extent.state == Provisioning::Hole {
            offset = end;
            if end < bytes && end % GRAIN != 0 {
                // Data begins within a grain, which then counts as data as a whole.
                offset = end / GRAIN * GRAIN;
                let end = (offset + GRAIN).min(bytes);
                sent += range(device, offset, end, &parts, &mut at).await?;
                offset = end;
            }
        } else {
            let end = end.next_multiple_of(GRAIN).min(bytes);
            sent += range(device, offset, end, &parts, &mut at).await?;
            offset = end;
        }
        at(offset);
    }
    if !unchanged() {
        return Err(FeedError::Changed);
    }
    send(&parts, Part::End(v1::ImportEnd { data_bytes: sent })).await?;
    Ok(sent)
}

/// Sends what is not zero between two offsets; both are multiples of the grain, or the end is the device's.
async fn range(
    device: &dyn BlockDevice,
    mut offset: u64,
    end: u64,
    parts: &mpsc::Sender<v1::ImportPart>,
    at: &mut impl FnMut(u64),
) -> Result<u64, FeedError> {
    use v1::import_part::Part;
    let mut sent = 0;
    let mut buffer = Vec::new();
    while offset < end {
        let now = (end - offset).min(PART_BYTES);
        // At most PART_BYTES, which fits any usize.
        buffer.resize(now as usize, 0);
        device.read(offset, &mut buffer).await?;
        for (first, length) in runs(&buffer) {
            let data = buffer[first..first + length].to_vec();
            sent += length as u64;
            send(
                parts,
                Part::Data(v1::ImportData {
                    offset: offset + first as u64,
                    data,
                }),
            )
            .await?;
        }
        offset += now;
        at(offset);
    }
    Ok(sent)
}

async fn send(parts: &mpsc::Sender<v1::ImportPart>, part: v1::import_part::Part) -> Result<(), FeedError> {
    parts
        .send(v1::ImportPart { part: Some(part) })
        .await
        .map_err(|_| FeedError::Gone)
}

/// Runs of grains that are not all zero: first byte and length.
fn runs(buffer: &[u8]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (index, grain) in buffer.chunks(GRAIN as usize).enumerate() {
        // Whole words: the compiler makes wide comparisons of it.
        let (words, rest) = grain.as_chunks::<8>();
        if words.iter().all(|word| *word == [0; 8]) && rest.iter().all(|byte| *byte == 0) {
            continue;
        }
        let first = index * GRAIN as usize;
        match runs.last_mut() {
            Some((start, length)) if *start + *length == first => *length += grain.len(),
            _ => runs.push((first, grain.len())),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use treeboot_block::{FileDevice, FileOptions};

    use super::*;

    /// Feeds a sparse file of `bytes` with `data` at these offsets; what arrives is offset and length of each part.
    async fn check(bytes: u64, data: &[(u64, &[u8])], expect: &[(u64, usize)]) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        for (offset, data) in data {
            file.as_file().write_all_at(data, *offset).unwrap();
        }
        let device = FileDevice::open(file.path(), FileOptions::default()).unwrap();
        let (sender, mut parts) = Parts::new();
        let feeding =
            tokio::spawn(
                async move { feed(&device, v1::ImportHeader::default(), sender, || true, |_| ()).await },
            );
        let mut seen = Vec::new();
        let mut end = None;
        let mut image = vec![0; bytes as usize];
        while let Some(part) = tokio_stream::StreamExt::next(&mut parts).await {
            match part.part.unwrap() {
                v1::import_part::Part::Header(_) => {}
                v1::import_part::Part::Data(part) => {
                    seen.push((part.offset, part.data.len()));
                    let offset = part.offset as usize;
                    image[offset..offset + part.data.len()].copy_from_slice(&part.data);
                }
                v1::import_part::Part::End(part) => end = Some(part.data_bytes),
                v1::import_part::Part::Zero(zero) => panic!("zeroes are holes: {zero:?}"),
            }
        }
        assert_eq!(seen, expect);
        assert_eq!(
            feeding.await.unwrap().unwrap(),
            expect.iter().map(|(_, length)| *length as u64).sum::<u64>()
        );
        assert_eq!(end, Some(seen.iter().map(|(_, length)| *length as u64).sum()));
        assert_eq!(image, std::fs::read(file.path()).unwrap());
    }

    #[tokio::test]
    async fn only_what_is_not_zero_is_sent() {
        check(1 << 24, &[], &[]).await;
        check(1 << 24, &[(0, &[0; 65536])], &[]).await;
        check(
            1 << 24,
            &[(8192, &[1; 4096]), (3 << 20, &[2; 10])],
            &[(8192, 4096), (3 << 20, 4096)],
        )
        .await;
        check(
            3 << 20,
            &[(0, &[7; 3 << 20])],
            &[(0, 1 << 20), (1 << 20, 1 << 20), (2 << 20, 1 << 20)],
        )
        .await;
    }

    #[tokio::test]
    async fn a_tail_shorter_than_a_grain_is_sent_as_it_is() {
        check(8192 + 512, &[(8192, &[3; 512])], &[(8192, 512)]).await;
        check(512, &[(0, &[3; 512])], &[(0, 512)]).await;
    }

    #[tokio::test]
    async fn an_image_that_changed_is_never_said_to_be_all_there() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().write_all_at(&[1; 8192], 0).unwrap();
        let device = FileDevice::open(file.path(), FileOptions::default()).unwrap();
        let (sender, parts) = Parts::new();
        let fed = feed(&device, v1::ImportHeader::default(), sender, || false, |_| ()).await;
        assert!(matches!(fed, Err(FeedError::Changed)));
        let parts: Vec<_> = tokio_stream::StreamExt::collect(parts).await;
        assert_eq!(parts.len(), 2, "the header and the data");
    }
}
