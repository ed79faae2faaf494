//! Reading a range whose runs have their content in different places.

use futures_util::future::try_join_all;

use crate::{BlockDevice, IoFuture, blocking};

/// A device that knows for each run of blocks who has its content.
pub(crate) trait Runs: BlockDevice {
    /// Who has the content of a run.
    type Who: Copy;

    /// The run that begins at `offset`: who has it, and its length in bytes, at least one and at most `bytes`.
    fn run(&self, offset: u64, bytes: u64) -> (Self::Who, u64);

    /// Fills `buf` from one run.
    fn read_run<'a>(&'a self, who: Self::Who, offset: u64, buf: &'a mut [u8]) -> IoFuture<'a, ()>;
}

/// Fills `buf` from all runs in its range at once; one run, the usual case, without a list.
pub(crate) fn read<'a, D: Runs>(device: &'a D, offset: u64, buf: &'a mut [u8]) -> IoFuture<'a, ()> {
    let bytes = buf.len() as u64;
    if let Err(error) = device.check_range(offset, bytes) {
        return blocking::ready(Err(error));
    }
    if bytes == 0 {
        return blocking::ready(Ok(()));
    }
    let (who, run) = device.run(offset, bytes);
    if run == bytes {
        return device.read_run(who, offset, buf);
    }
    let mut reads = vec![];
    let (mut at, mut rest) = (offset, buf);
    while !rest.is_empty() {
        let (who, run) = device.run(at, rest.len() as u64);
        let (part, tail) = rest.split_at_mut(run as usize);
        reads.push(device.read_run(who, at, part));
        at += run;
        rest = tail;
    }
    Box::pin(async move { try_join_all(reads).await.map(drop) })
}
