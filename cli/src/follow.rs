//! A verb that streams how far it is, and at last its result.

use std::time::Duration;

use tonic::Streaming;

use crate::client::{incomplete, refused};
use crate::failure::{Exit, Failure};
use crate::output::{self, Progress};

/// One message: bytes done, bytes in all, and in the last one the result.
pub(crate) type Step<R> = (u64, u64, Option<R>);

/// Who does what, and what to look at when nothing comes any more.
pub(crate) struct Followed<'a> {
    pub(crate) peer: &'a str,
    /// What follows "cannot".
    pub(crate) doing: &'a str,
    /// How long no message may come.
    pub(crate) patience: Duration,
    pub(crate) advice: &'a str,
}

/// Shows the progress until the result comes.
pub(crate) async fn follow<T, R>(
    followed: &Followed<'_>,
    mut stream: Streaming<T>,
    mut progress: Progress,
    step: impl Fn(T) -> Step<R>,
) -> Result<R, Failure> {
    let Followed {
        peer,
        doing,
        patience,
        advice,
    } = *followed;
    loop {
        let message = tokio::time::timeout(patience, stream.message()).await;
        let message = message.map_err(|_| {
            let words = format!(
                "cannot {doing}: {peer} made no progress for {}",
                output::duration(patience)
            );
            Failure::new(Exit::TimedOut, words).advice(advice)
        })?;
        let message = message.map_err(|status| refused(peer, doing, &status))?;
        let Some((done, total, result)) = message.map(&step) else {
            return Err(incomplete(peer, "result"));
        };
        progress.set_total(total);
        progress.set(done);
        if let Some(result) = result {
            progress.finish();
            return Ok(result);
        }
    }
}
