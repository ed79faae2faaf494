//! What transfers need of a disk: layers that are held while they are shipped, and the end of all writing.

use std::sync::Arc;

use treeboot_types::SnapshotName;

use super::{GATE_LIMIT, LayerError, LayeredDisk, blocking};
use crate::layers::frozen::Frozen;
use crate::layers::tree::LayerId;

impl LayeredDisk {
    /// Freezes what is there for a transfer, without a name, and keeps it until [`release`](Self::release). Once held it stays the
    /// same. Returns the layer.
    ///
    /// # Errors
    /// There are too many layers, or a file.
    pub async fn hold(&self, transfer: u64) -> Result<LayerId, LayerError> {
        let _one = self.changing.lock().await;
        let mut tree = self.tree();
        if let Some(held) = tree.held_by(transfer) {
            return Ok(held);
        }
        let held = tree.hold_live(transfer)?;
        self.begin_live(tree).await?;
        Ok(held)
    }

    /// As [`hold`](Self::hold), and keeps all layers below as they are, too.
    ///
    /// # Errors
    /// There are too many layers, or a file.
    pub async fn hold_all(&self, transfer: u64) -> Result<(), LayerError> {
        let _one = self.changing.lock().await;
        let mut tree = self.tree();
        if tree.held_by(transfer).is_some() {
            return Ok(());
        }
        tree.hold_all(transfer)?;
        self.begin_live(tree).await
    }

    /// Ends all writing for good, and makes what was written durable; reads go on. What is not served any more may still have writes
    /// under way that nobody waits for.
    ///
    /// # Errors
    /// A write does not end, or a file; nothing changed for writes then.
    pub async fn fence(&self) -> Result<(), LayerError> {
        self.close().await;
        let alone = tokio::time::timeout(GATE_LIMIT, Arc::clone(&self.gate).write_owned())
            .await
            .map_err(|_| LayerError::Busy)?;
        let shared = Arc::clone(&self.shared);
        blocking(move || {
            let now = shared.now();
            let live = now.tree.live();
            let core = now.core(live).ok_or(LayerError::Stopping)?;
            core.set_frozen(true);
            let flushed = core.flush_now().map_err(shared.io(live));
            core.set_frozen(flushed.is_ok());
            drop(alone);
            flushed
        })
        .await
    }

    /// What one layer has, to be shipped; where it has nothing the reader says that it is the base's. Nothing may be written to it meanwhile.
    pub fn alone(&self, layer: LayerId) -> Option<Frozen> {
        let layer = self.shared.now().open.get(&layer).cloned()?;
        Some(Frozen::new(Arc::clone(&self.shared.base), vec![layer]))
    }

    /// As [`hold`](Self::hold), for a snapshot.
    ///
    /// # Errors
    /// There is no such snapshot, or the manifest cannot be written.
    pub async fn hold_snapshot(&self, snapshot: &SnapshotName, transfer: u64) -> Result<LayerId, LayerError> {
        let _one = self.changing.lock().await;
        let mut tree = self.tree();
        let id = tree.find(snapshot)?;
        tree.hold(id, transfer);
        let shared = Arc::clone(&self.shared);
        blocking(move || shared.rename(tree)).await?;
        Ok(id)
    }

    /// A transfer has ended; without one, all have.
    ///
    /// # Errors
    /// The manifest cannot be written.
    pub async fn release(&self, transfer: Option<u64>) -> Result<(), LayerError> {
        let _one = self.changing.lock().await;
        let mut tree = self.tree();
        if !tree.release(transfer) {
            return Ok(());
        }
        let shared = Arc::clone(&self.shared);
        blocking(move || shared.rename(tree)).await
    }

    /// What a transfer holds, as a disk of its own.
    pub fn held(&self, transfer: u64) -> Option<Frozen> {
        self.tree().held_by(transfer).map(|layer| self.frozen(layer))
    }

    /// The disk as it was when `layer`, which is frozen, was frozen.
    pub fn frozen(&self, layer: LayerId) -> Frozen {
        let now = self.shared.now();
        let chain = now.tree.chain(layer);
        let layers = chain.iter().filter_map(|id| now.open.get(id).cloned()).collect();
        Frozen::new(Arc::clone(&self.shared.base), layers)
    }
}
