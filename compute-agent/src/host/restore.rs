//! The start: what the journal says is served again, before anyone is asked.

use treeboot_types::{HostInfo, PlaneKind};

use super::{HostError, Settings, chain};
use crate::apply::Applier;
use crate::desired::{Change, DiskState, Move, Stage};
use crate::plane::{self, Plane, Scope};

/// What the journal says is served again, and what was half destroyed is gone.
pub(super) async fn restore(applier: &Applier) -> Result<(), HostError> {
    let desired = applier.journal.desired();
    let detached = crate::heed::left_idle(&desired);
    if !detached.is_empty() {
        applier.journal.commit(detached).await?;
    }
    // VMs that were to move, of which nobody was asked yet whether they did: they are here.
    let staying: Vec<_> = applier
        .journal
        .desired()
        .disks
        .iter()
        .filter(
            |(_, disk)| matches!(&disk.moving, Some(Move::Leaving { stage, .. }) if *stage != Stage::Asked),
        )
        .map(|(vm, disk)| Change::Disk {
            vm: vm.clone(),
            disk: DiskState {
                moving: None,
                ..disk.clone()
            },
        })
        .collect();
    if !staying.is_empty() {
        applier.journal.commit(staying).await?;
    }
    // VMs that came from hosts which may have taken them back while no agent ran here.
    let unsure: Vec<_> = applier
        .journal
        .desired()
        .disks
        .iter()
        .filter(|(_, disk)| disk.is_settled() && disk.from.is_some())
        .map(|(vm, disk)| Change::Disk {
            vm: vm.clone(),
            disk: DiskState {
                moving: Some(Move::Unsure),
                ..disk.clone()
            },
        })
        .collect();
    if !unsure.is_empty() {
        applier.journal.commit(unsure).await?;
    }
    let desired = applier.journal.desired();
    let errors = applier.reach_all(&desired.wanted()).await;
    for error in &errors {
        tracing::error!(error = %chain(error), "not all of this host is served again");
    }
    let found = applier.plane.inspect(&Scope::All).await?;
    for vm in found.deltas.keys().filter(|vm| !desired.disks.contains_key(*vm)) {
        tracing::warn!(%vm, "a delta that the journal does not know; it is left alone");
    }
    let gone_disks = desired
        .disks
        .iter()
        .filter(|(vm, disk)| disk.doomed && !found.deltas.contains_key(*vm))
        .map(|(vm, _)| Change::DiskGone { vm: vm.clone() });
    let gone_stores = desired
        .doomed_stores
        .iter()
        .filter(|digest| !found.stores.contains(*digest))
        .map(|&digest| Change::StoreGone { digest });
    let changes: Vec<_> = gone_disks.chain(gone_stores).collect();
    if !changes.is_empty() {
        applier.journal.commit(changes).await?;
    }
    tracing::info!(
        bases = found.bases.len(),
        disks = found.disks.len(),
        "serving what the journal says"
    );
    Ok(())
}

pub(super) fn host_info(settings: &Settings, plane: &dyn Plane) -> HostInfo {
    HostInfo {
        name: settings.name.clone(),
        instance: settings.instance.clone(),
        agent_address: settings.agent_address.clone(),
        portal: plane.portal(),
        plane: match plane.kind() {
            plane::PlaneKind::Kernel => PlaneKind::Kernel,
            plane::PlaneKind::User | plane::PlaneKind::Model => PlaneKind::User,
        },
        max_stripes: u16::try_from(plane.abilities().max_stripes).unwrap_or(u16::MAX),
        labels: settings.labels.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        weight: settings.weight,
        runs_vms: false,
        holds_store: settings.store_dir.is_some(),
    }
}
