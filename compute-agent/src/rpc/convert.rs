//! Answers as messages, and the requests that have more in them than a name.

use std::collections::BTreeSet;
use std::time::Duration;

use tonic::Status;
use treeboot_block::layers::LayerReport;
use treeboot_hypervisor::{Readiness, Seed};
use treeboot_proto::v1;
use treeboot_types::{HostName, ImageRef, SnapshotName, VmName};

use super::invalid;
use crate::desired::{DiskState, Move, Stage};
use crate::doctor::Finding;
use crate::host::{
    CloneRequest, ExportRequest, Freeze, Host, Imported, LimitLevel, Limited, MEMORY_MIB, MigrateRequest,
    Moved, Phase, Progress, READY_LIMIT, RoomLevel, Shipped, StartRequest, TakenBack, VmReport, VmRun,
};
use crate::plane::{BaseStats, PathStats};

/// Longest text that a console is searched for.
const MAX_CONSOLE_LINE_BYTES: usize = 1024;

/// Most VMs that one call creates: what a client lets an answer be (4 MiB) holds twice as many.
const MAX_VMS: usize = 4096;

/// Names of VMs, each once.
pub(super) fn names_once(names: &[String]) -> Result<Vec<VmName>, Status> {
    if names.is_empty() || names.len() > MAX_VMS {
        return Err(invalid(format!(
            "{} VMs in one call; give 1 to {MAX_VMS}",
            names.len()
        )));
    }
    let mut seen = BTreeSet::new();
    let parsed = names.iter().map(|name| VmName::new(name).map_err(invalid));
    let parsed: Vec<_> = parsed.collect::<Result<_, _>>()?;
    match parsed.iter().find(|vm| !seen.insert(*vm)) {
        Some(twice) => Err(invalid(format!("VM '{twice}' is named twice"))),
        None => Ok(parsed),
    }
}

pub(super) fn limit_level(limited: &Limited) -> v1::LimitLevel {
    match limited.level() {
        LimitLevel::Enough => v1::LimitLevel::Enough,
        LimitLevel::High => v1::LimitLevel::High,
        LimitLevel::Critical => v1::LimitLevel::Critical,
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn finding(finding: &Finding) -> v1::Finding {
    v1::Finding {
        condition: finding.condition.name().into(),
        kind: finding.kind.into(),
        name: finding.name.clone(),
        why: finding.why.clone(),
        mendable: finding.condition.is_mended(),
        fix: finding.fix.clone(),
        unclaimed_ms: finding.unclaimed.map_or(0, |it| millis(it.so_far)),
        removable_in_ms: finding.unclaimed.map_or(0, |it| millis(it.left)),
    }
}

pub(super) fn imported(imported: &Imported) -> v1::ImportResponse {
    v1::ImportResponse {
        image: Some((&imported.image).into()),
        directory: imported.directory.display().to_string(),
        created: imported.created,
    }
}

pub(crate) fn status(host: &Host) -> v1::StatusResponse {
    let desired = host.desired();
    let mut cache_used_bytes = 0;
    let mut bases = Vec::new();
    for (image, state) in &desired.images {
        let stats = host.plane().base_stats(&state.content.digest).unwrap_or_default();
        if state.stored.is_none() {
            cache_used_bytes += stats.cached_bytes;
        }
        let attachment = host.attachment(image).map_or_else(
            // An origin has no place in the trees that it is the root of.
            || v1::Attachment {
                image: Some(image.into()),
                digest: state.content.digest.0.to_vec(),
                epoch: None,
                endpoint: Some((&host.endpoint(image)).into()),
                state: v1::AttachState::Ready.into(),
                stripes: Vec::new(),
            },
            |attachment| (&attachment).into(),
        );
        bases.push(v1::BaseStatus {
            attachment: Some(attachment),
            pinned: state.pinned || state.stored.is_some(),
            disks: u32::try_from(desired.disks_of(image).count()).unwrap_or(u32::MAX),
            counters: Some(counters(&stats)),
            paths: stats.paths.iter().map(path).collect(),
        });
    }
    let mut store = Vec::new();
    for (manifest, directory) in host.stored() {
        for name in &manifest.names {
            store.push(v1::StoredImage {
                digest: manifest.digest.0.to_vec(),
                image: Some(name.into()),
                bytes: manifest.bytes,
                allocated_bytes: manifest.allocated_bytes,
                directory: directory.display().to_string(),
            });
        }
    }
    let limited = host.limited().into_iter();
    let near = limited.filter(|it| it.level() > LimitLevel::Enough);
    v1::StatusResponse {
        near_limit: near
            .map(|it| v1::NearLimit {
                vm: it.vm.to_string(),
                data_bytes: it.data_bytes,
                limit_bytes: it.limit_bytes,
                level: limit_level(&it).into(),
            })
            .collect(),
        host: Some((&host.info()).into()),
        coordinator_connected: host.connected(),
        bases,
        store,
        cache_used_bytes,
        cache_members: host
            .show_cache()
            .map(|view| view.group.members.iter().map(super::cache::member).collect())
            .unwrap_or_default(),
        uptime_ms: host.uptime().as_millis() as u64,
        room: host.room().map(|room| v1::Room {
            free_bytes: room.free_bytes,
            size_bytes: room.size_bytes,
            level: match room.level() {
                RoomLevel::Enough => v1::RoomLevel::Enough,
                RoomLevel::Low => v1::RoomLevel::Low,
                RoomLevel::Full => v1::RoomLevel::Full,
            }
            .into(),
        }),
    }
}

fn counters(stats: &BaseStats) -> v1::BaseCounters {
    v1::BaseCounters {
        shipped_wire_bytes: stats.shipped_wire_bytes,
        fetched_parent_bytes: stats.parent_bytes,
        fetched_fallback_bytes: stats.fallback_bytes,
        fetched_hash_bytes: stats.hash_bytes,
        guest_read_bytes: stats.guest_read_bytes,
        guest_unique_bytes: stats.guest_unique_bytes,
        child_read_bytes: stats.child_read_bytes,
        chunk_hits: stats.chunk_hits,
        chunk_misses: stats.chunk_misses,
        chunk_joined: stats.chunk_joined,
        bad_chunks: stats.bad_chunks,
        cached_bytes: stats.cached_bytes,
        uncached_bytes: stats.uncached_bytes,
        longest_stall_us: stats.longest_stall_us,
    }
}

fn path(path: &PathStats) -> v1::PathStatus {
    v1::PathStatus {
        stripe: path.stripe,
        host: path.host.as_ref().map(ToString::to_string).unwrap_or_default(),
        portal: path.portal.clone(),
        active: path.active,
        state: path.state.into(),
        in_flight: path.in_flight,
        bytes: path.bytes,
        failures: path.failures,
        service_time_us: path.service_time_us,
    }
}

pub(super) fn vm(report: &VmReport) -> v1::Vm {
    let (state, error) = match &report.run {
        VmRun::Absent => (v1::VmState::Unspecified, ""),
        VmRun::Starting => (v1::VmState::Starting, ""),
        VmRun::Ready => (v1::VmState::Ready, ""),
        VmRun::Stopped => (v1::VmState::Stopped, ""),
        VmRun::Failed(why) => (v1::VmState::Failed, why.as_str()),
    };
    let running = report.running.as_deref();
    let stats = &report.stats;
    v1::Vm {
        name: report.name.to_string(),
        image: report.image.as_ref().map(Into::into),
        state: state.into(),
        error: error.into(),
        ready_us: report.ready_us,
        pid: running.map_or(0, |running| running.pid().into()),
        console_path: running
            .map(|running| running.console().display().to_string())
            .unwrap_or_default(),
        qmp_path: running
            .map(|running| running.spec().run_dir.join("qmp.sock").display().to_string())
            .unwrap_or_default(),
        acceleration: report.acceleration.into(),
        read_bytes: stats.read_bytes,
        written_bytes: stats.written_bytes,
        read_operations: stats.read_operations,
        read_time_ns: stats.read_time_ns,
        io_errors: stats.failed_reads + stats.failed_writes + stats.failed_flushes,
        paused: running.is_some_and(|running| running.is_paused()),
        pauses: running.map_or(0, |running| running.pauses()),
    }
}

/// A layer; with what a check of it found where there was one.
pub(super) fn layer(layer: &LayerReport, checked: bool) -> v1::Layer {
    let check = &layer.check;
    let damage = check.damage.iter().map(|damage| v1::DeltaDamage {
        offset: damage.offset,
        bytes: damage.bytes,
        what: damage.what.clone(),
    });
    v1::Layer {
        number: layer.layer,
        parent: layer.parent,
        snapshot: layer
            .snapshot
            .as_ref()
            .map(|snapshot| snapshot.name.to_string())
            .unwrap_or_default(),
        created_unix_ms: layer
            .snapshot
            .as_ref()
            .map_or(0, |snapshot| snapshot.created_unix_ms),
        live: layer.live,
        allocated_bytes: layer.allocated_bytes,
        sealed: check.sealed,
        frozen: layer.snapshot.as_ref().is_some_and(|snapshot| snapshot.frozen),
        report: checked.then(|| v1::DeltaReport {
            base_blocks: check.base_blocks,
            data_blocks: check.data_blocks,
            zero_blocks: check.zero_blocks,
            stray_bytes: check.stray_bytes,
            damage: damage.collect(),
        }),
    }
}

/// One VM with all that is known of it.
pub(super) async fn described(host: &Host, name: &VmName, disk: v1::Disk) -> v1::DescribeResponse {
    // A plane without layers has none to show.
    let layers = host.layers(name, false).await.unwrap_or_default();
    let desired = host.desired();
    let run = match desired.vms.contains_key(name) {
        true => Some(vm(&host.report(name).await)),
        false => None,
    };
    let image = desired.disks.get(name).map(|disk| &disk.image);
    let attachment = image.and_then(|image| host.attachment(image));
    v1::DescribeResponse {
        disk: Some(disk),
        layers: layers.iter().map(|found| layer(found, false)).collect(),
        run,
        attachment: attachment.map(|attachment| (&attachment).into()),
        host: host.info().name.to_string(),
    }
}

/// A snapshot, or now.
fn point_in_time(snapshot: &str) -> Result<Option<SnapshotName>, Status> {
    match snapshot {
        "" => Ok(None),
        name => super::snapshot_name(name).map(Some),
    }
}

pub(super) fn export_request(request: v1::ExportDiskRequest) -> Result<ExportRequest, Status> {
    Ok(ExportRequest {
        vm: super::vm_name(&request.vm)?,
        snapshot: point_in_time(&request.snapshot)?,
        whole: request.whole,
    })
}

pub(super) fn clone_request(request: v1::CloneRequest) -> Result<CloneRequest, Status> {
    Ok(CloneRequest {
        vm: super::vm_name(&request.vm)?,
        snapshot: point_in_time(&request.snapshot)?,
        to: (
            HostName::new(&request.destination).map_err(invalid)?,
            request.destination_address,
        ),
        new_vm: super::vm_name(&request.new_vm)?,
    })
}

pub(super) fn clone_progress(now: Progress, end: Option<Shipped>) -> v1::CloneProgress {
    v1::CloneProgress {
        done_bytes: now.done_bytes,
        total_bytes: now.total_bytes,
        result: end.map(|shipped| v1::CloneResponse {
            data_bytes: shipped.data_bytes,
            sent_bytes: shipped.sent_bytes,
            resumed: shipped.resumed,
        }),
    }
}

pub(super) fn migrate_request(request: v1::MigrateRequest) -> Result<MigrateRequest, Status> {
    Ok(MigrateRequest {
        vm: super::vm_name(&request.vm)?,
        to: (
            HostName::new(&request.destination).map_err(invalid)?,
            request.destination_address,
        ),
    })
}

pub(super) fn migrate_progress(now: Progress, end: Option<Moved>) -> v1::MigrateProgress {
    v1::MigrateProgress {
        done_bytes: now.done_bytes,
        total_bytes: now.total_bytes,
        phase: match now.phase {
            Phase::Running => v1::MigratePhase::Running,
            Phase::Stopping => v1::MigratePhase::Stopping,
            Phase::Stopped => v1::MigratePhase::Stopped,
            Phase::Taking => v1::MigratePhase::Taking,
        }
        .into(),
        result: end.map(|moved| v1::MigrateResponse {
            data_bytes: moved.shipped.data_bytes,
            sent_bytes: moved.shipped.sent_bytes,
            resumed: moved.shipped.resumed,
            stopped_us: moved.stopped.as_micros() as u64,
            was_there: moved.was_there,
            trouble: moved.trouble,
        }),
    }
}

/// Where a disk goes, or came from; nothing for one that comes.
pub(super) fn moving(disk: &DiskState) -> Option<v1::DiskMove> {
    let came = |end: v1::DiskMoveEnd| v1::DiskMove {
        to: disk
            .from
            .as_ref()
            .map(|from| from.host.to_string())
            .unwrap_or_default(),
        asked: false,
        end: end.into(),
    };
    match disk.moving.as_ref()? {
        Move::Arriving => None,
        Move::Unsure => Some(came(v1::DiskMoveEnd::Unsure)),
        Move::Lost => Some(came(v1::DiskMoveEnd::Lost)),
        Move::Leaving { to, stage, .. } => Some(v1::DiskMove {
            to: to.to_string(),
            asked: *stage == Stage::Asked,
            end: v1::DiskMoveEnd::Unspecified.into(),
        }),
    }
}

pub(super) fn freeze(freeze: v1::Freeze) -> Freeze {
    match freeze {
        v1::Freeze::Unspecified | v1::Freeze::Auto => Freeze::Auto,
        v1::Freeze::Require => Freeze::Require,
        v1::Freeze::Never => Freeze::Never,
    }
}

pub(super) fn taken_back(how: TakenBack) -> v1::TakenBack {
    match how {
        TakenBack::WasHere => v1::TakenBack::WasHere,
        TakenBack::ByItsWord => v1::TakenBack::ByItsWord,
        TakenBack::ByForce => v1::TakenBack::ByForce,
    }
}

pub(super) fn start_request(request: v1::StartVmRequest) -> Result<StartRequest, Status> {
    let image: Option<ImageRef> = match &request.image {
        None => None,
        image => Some(treeboot_proto::image_id_or_newest(image.as_ref()).map_err(invalid)?),
    };
    let deadline_ms = request.ready.as_ref().map_or(0, |ready| ready.deadline_ms);
    let ready = match request.ready.and_then(|ready| ready.when) {
        None => Readiness::Started,
        Some(v1::readiness::When::ConsoleLine(line)) => {
            if line.is_empty() || line.len() > MAX_CONSOLE_LINE_BYTES {
                return Err(invalid(format_args!(
                    "the console line to wait for has {} bytes; give 1 to {MAX_CONSOLE_LINE_BYTES}",
                    line.len()
                )));
            }
            Readiness::Console { any_of: vec![line] }
        }
        Some(v1::readiness::When::GuestPort(port)) => Readiness::Port {
            guest_port: u16::try_from(port)
                .ok()
                .filter(|port| *port > 0)
                .ok_or_else(|| invalid(format_args!("{port} is no TCP port; give 1 to 65535")))?,
            send: Vec::new(),
        },
    };
    Ok(StartRequest {
        image,
        memory_mib: nonzero_or(request.memory_mib, MEMORY_MIB),
        cpus: nonzero_or(request.cpus, 1),
        ready,
        ready_limit: match deadline_ms {
            0 => READY_LIMIT,
            ms => Duration::from_millis(ms),
        },
        seed: Seed {
            authorized_keys: request.ssh_authorized_keys,
            ..Seed::default()
        }
        .with_user_data(&request.user_data),
    })
}

fn nonzero_or(value: u32, default: u32) -> u32 {
    if value == 0 { default } else { value }
}
