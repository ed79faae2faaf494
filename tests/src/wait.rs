//! Waiting on a condition, with a deadline; never on a timer alone.

use std::future::Future;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// How often a condition that cannot announce itself is looked at.
pub(crate) const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Looks at `condition` until it gives a value; an error of it ends the waiting at once.
///
/// # Errors
/// The condition's own, or that `limit` passed; both name `what` was waited for.
pub async fn wait_until<T>(
    limit: Duration,
    what: &str,
    mut condition: impl AsyncFnMut() -> Result<Option<T>>,
) -> Result<T> {
    let began = Instant::now();
    loop {
        let left = limit.saturating_sub(began.elapsed());
        match tokio::time::timeout(left.max(LOOK_EVERY), condition()).await {
            Ok(Ok(Some(value))) => return Ok(value),
            Ok(Ok(None)) => {}
            Ok(Err(error)) => return Err(error).with_context(|| format!("while waiting for {what}")),
            Err(_) => bail!("{what}: not within {limit:?}"),
        }
        if began.elapsed() >= limit {
            bail!("{what}: not within {limit:?}");
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Awaits a future for at most `limit`.
///
/// # Errors
/// That `limit` passed, naming `what`.
pub async fn within<T>(limit: Duration, what: &str, future: impl Future<Output = T>) -> Result<T> {
    tokio::time::timeout(limit, future)
        .await
        .with_context(|| format!("{what}: not within {limit:?}"))
}
