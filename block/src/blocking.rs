//! Where blocking calls meet async: inline if they do not block, else on tokio's threads for that.

use std::sync::Arc;

use crate::storage::Storage;
use crate::{BlockError, IoFuture};

/// A future that has already ended.
pub(crate) fn ready<'a, T: Send + 'a>(result: Result<T, BlockError>) -> IoFuture<'a, T> {
    Box::pin(std::future::ready(result))
}

/// Runs `work` where blocking is allowed. It runs to its end even if the future is dropped.
pub(crate) async fn run<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BlockError> + Send + 'static,
) -> Result<T, BlockError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // The runtime is going down, so nobody waits for the answer.
        Err(_) => Err(BlockError::Unavailable {
            what: "the process is shutting down".into(),
        }),
    }
}

/// Fills `buf` from `at` on in `storage`: ready at once where the bytes are in memory. Errors name `offset`, the
/// device's own offset.
pub(crate) fn read_storage<'a, S: Storage + ?Sized>(
    storage: &Arc<S>,
    at: u64,
    offset: u64,
    buf: &'a mut [u8],
) -> IoFuture<'a, ()> {
    match storage.try_read_at(at, buf) {
        Ok(Some(())) => ready(Ok(())),
        Ok(None) => {
            let storage = Arc::clone(storage);
            Box::pin(async move {
                let bytes = buf.len();
                // The buffer is borrowed and a blocking thread may outlive the borrow, hence the copy.
                let filled = run(move || {
                    let mut filled = vec![0; bytes];
                    storage
                        .read_at(at, &mut filled)
                        .map_err(|source| BlockError::Io { offset, source })?;
                    Ok(filled)
                })
                .await?;
                buf.copy_from_slice(&filled);
                Ok(())
            })
        }
        Err(source) => ready(Err(BlockError::Io { offset, source })),
    }
}
