//! The holder may die, as any process may. While an agent serves, it has every connection too: a new holder is started and given them all, and nobody
//! above the devices notices.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use treeboot_types::VmName;

use super::Served;
use crate::holder::Holder;
use crate::plane::PlaneError;
use crate::plane::user::failed;
use crate::plane::user::files::blocking;

/// Before another attempt where no holder can be started, for lack of processes or descriptors.
const AGAIN_AFTER: Duration = Duration::from_secs(1);

/// Sees to it that what is served stays held.
pub(super) struct Keeping {
    holder: Holder,
    serving: Served,
    watching: Mutex<bool>,
    /// Taken by whoever tells the holder what the other must not undo.
    telling: tokio::sync::Mutex<()>,
}

impl Keeping {
    pub(super) fn new(holder: Holder, serving: Served) -> Self {
        Self {
            holder,
            serving,
            watching: Mutex::new(false),
            telling: tokio::sync::Mutex::default(),
        }
    }

    /// Something is served from now on, and is to stay held until nothing is.
    pub(super) fn watch(self: &Arc<Self>) {
        let mut watching = self.watching.lock();
        if !*watching {
            *watching = true;
            tokio::spawn(Arc::clone(self).watch_on());
        }
    }

    /// Nothing is given to the holder while this is kept: what is no longer served is dropped there for good.
    pub(super) async fn pause(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.telling.lock().await
    }

    async fn watch_on(self: Arc<Self>) {
        loop {
            let ended = self.holder_ended().await;
            {
                let mut watching = self.watching.lock();
                if self.serving.lock().is_empty() {
                    *watching = false;
                    return;
                }
            }
            let held = match ended {
                Ok(()) => self.hold_again().await,
                Err(error) => Err(error),
            };
            if let Err(error) = held {
                tracing::warn!(%error, "the devices are not held: if this agent ends now, they end with it");
                tokio::time::sleep(AGAIN_AFTER).await;
            }
        }
    }

    /// Until no holder runs.
    async fn holder_ended(&self) -> Result<(), PlaneError> {
        let what = || "looking after the holder of the devices".to_owned();
        let holder = self.holder.clone();
        let io = move |error| PlaneError::io(what(), error);
        let Some(end) = blocking(move || holder.end().map_err(io)).await? else {
            return Ok(());
        };
        #[expect(
            deprecated,
            reason = "unsound only for what closes its descriptor meanwhile, which `OwnedFd` does not; its successor is unsafe to call"
        )]
        let end =
            AsyncFd::try_with_interest(end, Interest::READABLE).map_err(|error| failed(what(), error))?;
        let _readable = end.readable().await.map_err(|error| failed(what(), error))?;
        Ok(())
    }

    async fn hold_again(&self) -> Result<(), PlaneError> {
        let all: Vec<VmName> = self.serving.lock().keys().cloned().collect();
        tracing::warn!(
            devices = all.len(),
            "the holder of the devices ended; another one is started"
        );
        for vm in all {
            let _telling = self.telling.lock().await;
            let Some(serving) = self.serving.lock().get(&vm).cloned() else {
                continue;
            };
            let holder = self.holder.clone();
            blocking(move || {
                serving
                    .connection()
                    .and_then(|connection| holder.put(vm.as_str(), &connection))
                    .map_err(|error| PlaneError::io(format!("having the device of VM '{vm}' held"), error))
            })
            .await?;
        }
        Ok(())
    }
}
