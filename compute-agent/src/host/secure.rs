//! The host's part in who may use what: secrets that change, disks that ask for one, images that not every role may use.

use tokio::sync::oneshot;
use treeboot_identity::{Role, files};
use treeboot_types::{ImageRef, VmName};

use super::base::BaseMsg;
use super::vm::VmOwner;
use super::{Host, HostError, chain};

impl Host {
    /// Has the plane use the secrets of the moment, now and at each change.
    pub(super) async fn rekey(&self) {
        if !self.shared.settings.keys.is_secure() {
            return;
        }
        let stop = self.shared.stop.clone();
        let mut changes = self.shared.settings.keys.changes();
        loop {
            changes.mark_unchanged();
            if let Err(error) = self.plane().rekey().await {
                tracing::error!(error = %chain(&error), "not all of iSCSI uses the new secrets");
            }
            // Children whose secrets were not known may come now.
            let bases: Vec<_> = self.shared.bases.lock().values().cloned().collect();
            for base in bases {
                let (reply, _) = oneshot::channel();
                let _ = base.send(BaseMsg::Changed { reply }).await;
            }
            tokio::select! {
                () = stop.cancelled() => return,
                changed = changes.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Whether a role may use an image. While the coordinator is away, what it said last counts.
    ///
    /// # Errors
    /// It may not, or nobody can tell.
    pub async fn may_use(&self, image: &ImageRef, role: Role) -> Result<(), HostError> {
        let key = (image.name.clone(), role);
        match self.shared.link.image_for(image, Some(role)).await {
            Ok(_) => {
                self.shared.allowed.lock().insert(key);
                Ok(())
            }
            Err(error) if error.is_unavailable() && self.shared.allowed.lock().contains(&key) => Ok(()),
            Err(error) => {
                if !error.is_unavailable() {
                    self.shared.allowed.lock().remove(&key);
                }
                Err(error.into())
            }
        }
    }

    /// What a VM's front end proves itself by at its disk; none where nobody is asked.
    pub fn disk_secret(&self, vm: &VmName) -> Option<String> {
        self.shared.settings.keys.disk_secret(vm)
    }
}

impl VmOwner {
    /// Puts the disk's secret where QEMU reads it: a command line is seen by everybody on the machine.
    pub(super) fn secret_file(&self) -> Result<Option<std::path::PathBuf>, HostError> {
        let Some(secret) = self.shared.settings.keys.disk_secret(&self.vm) else {
            return Ok(None);
        };
        let dir = self.run_dir();
        let path = dir.join("disk.secret");
        let written = files::private_dir(&dir).and_then(|()| files::write_private(&path, secret.as_bytes()));
        match written {
            Ok(()) => Ok(Some(path)),
            Err(error) => {
                Err(crate::plane::PlaneError::io(format!("writing {}", path.display()), error).into())
            }
        }
    }
}
