//! What VMs wrote whose disks are copied or moved, and how it is seen that nothing else is there.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use treeboot_iscsi::initiator::Session;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::daemon::Daemon;
use treeboot_tests::image::Pattern;
use treeboot_tests::reader::log_in;
use treeboot_tests::relay::Relay;
use treeboot_tests::wait::wait_until;

pub(crate) const IMAGE: &str = "pattern";
pub(crate) const PATTERN: Pattern = Pattern {
    seed: 73,
    bytes: 32 << 20,
};
pub(crate) const SOON: Duration = Duration::from_secs(60);
pub(crate) const BLOCK: u64 = 4096;
pub(crate) const MIB: u64 = 1 << 20;

pub(crate) fn plan(hosts: usize, secure: bool) -> Plan {
    Plan {
        hosts,
        secure,
        ..Plan::default()
    }
}

pub(crate) async fn import(cluster: &Cluster) -> Result<()> {
    let file = cluster.path().join("pattern.raw");
    PATTERN.write(&file)?;
    cluster.import(&file, IMAGE).await
}

/// What a VM wrote: blocks, each `step`th of the disk.
#[derive(Clone, Copy)]
pub(crate) struct Written {
    pub(crate) blocks: u64,
    pub(crate) step: u64,
    pub(crate) fill: u8,
}

/// Alone, so that each is a part of its own on the wire.
pub(crate) const SPARSE: Written = Written {
    blocks: 1024,
    step: 8,
    fill: 1,
};
/// Half of the disk.
pub(crate) const DENSE: Written = Written {
    blocks: 4096,
    step: 1,
    fill: 9,
};

impl Written {
    pub(crate) fn filled(self, fill: u8) -> Self {
        Self { fill, ..self }
    }

    pub(crate) fn bytes(self) -> u64 {
        self.blocks * BLOCK
    }

    pub(crate) async fn write(self, session: &Session, lun: u16) -> Result<()> {
        for n in 0..self.blocks {
            let data = vec![self.fill ^ n as u8; BLOCK as usize];
            session.write(lun, n * self.step * BLOCK, data.into()).await?;
        }
        session.flush(lun).await?;
        Ok(())
    }

    /// The VM's disk has these blocks, and the image's elsewhere.
    pub(crate) async fn check(self, agent: &Daemon, vm: &str) -> Result<()> {
        let (session, lun) = log_in(agent, IMAGE, vm).await?;
        for n in 0..PATTERN.bytes / BLOCK {
            let at = n * BLOCK;
            if n >= self.blocks * self.step && !n.is_multiple_of(64) {
                continue;
            }
            let read = session.read(lun, at, BLOCK as u32).await?;
            let right = match n.is_multiple_of(self.step) && n / self.step < self.blocks {
                true => read.iter().all(|byte| *byte == self.fill ^ (n / self.step) as u8),
                false => PATTERN.first_wrong_block(at, &read).is_none(),
            };
            ensure!(right, "{vm}: block {n} is not what it should be");
        }
        Ok(())
    }
}

pub(crate) fn deltas(cluster: &Cluster, host: &Daemon) -> Result<Vec<String>> {
    let dir = cluster.path().join(host.name()).join("state/deltas");
    let mut names: Vec<_> = std::fs::read_dir(dir)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    names.sort();
    Ok(names)
}

/// On both hosts there is nothing but the disks of these VMs, of one layer each.
pub(crate) async fn only(cluster: &Cluster, expected: &[(&Daemon, &[&str])]) -> Result<()> {
    for (host, vms) in expected {
        let seen = parking_lot::Mutex::new(vec![]);
        let settled = wait_until(SOON, "the disks alone to be left", async || {
            let names = deltas(cluster, host)?;
            // The first layer may have been merged into a later one, which a manifest names then.
            let disks = names
                .iter()
                .filter(|name| !name.ends_with(".layers") && !name.ends_with(".layers.new"));
            let disks: Vec<_> = disks
                .map(|name| name.split(['+', '.']).next().unwrap_or_default())
                .collect();
            let settled = disks == *vms
                && !names
                    .iter()
                    .any(|name| name.ends_with(".incoming") || name.ends_with(".received"));
            *seen.lock() = names.clone();
            Ok(settled.then_some(()))
        });
        settled
            .await
            .with_context(|| format!("{} on {}: {:?}", vms.join(", "), host.name(), seen.lock()))?;
    }
    Ok(())
}

pub(crate) async fn crossed(relay: &Relay, bytes: u64) -> Result<()> {
    wait_until(SOON, "bytes to cross the relay", async || {
        Ok((relay.sent() >= bytes).then_some(()))
    })
    .await
}
