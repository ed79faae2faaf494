//! The agent as HTTP: the verbs that people and platforms ask for, its health and its figures. Streams are left out: an image is
//! imported by `treeboot image import`.

use std::collections::BTreeMap;

use treeboot_daemon::http::metrics::{Family, Labels};
use treeboot_daemon::http::{Check, Condition, Face, Method, Route, Vitals};
use treeboot_proto::v1;

use crate::host::{Host, Room, RoomLevel, VmReport, VmRun};
use crate::rpc;

const ROUTES: &[Route] = &[
    Route::new(Method::Get, "/v1/status", "Agent/Status"),
    Route::new(Method::Get, "/v1/disks", "Agent/List"),
    Route::new(Method::Post, "/v1/disks", "Agent/CreateMany"),
    Route::new(Method::Put, "/v1/disks/{vm}", "Agent/Create"),
    Route::new(Method::Delete, "/v1/disks/{vm}", "Agent/Destroy").with(&[("keep_base", "instance_only")]),
    Route::new(Method::Get, "/v1/disks/{vm}", "Agent/Describe"),
    Route::new(Method::Post, "/v1/disks/{vm}/check", "Agent/CheckDelta"),
    Route::new(Method::Put, "/v1/disks/{vm}/limit", "Agent/LimitDisk"),
    Route::new(Method::Get, "/v1/disks/{vm}/snapshots", "Agent/ListSnapshots"),
    Route::new(
        Method::Put,
        "/v1/disks/{vm}/snapshots/{snapshot}",
        "Agent/Snapshot",
    ),
    Route::new(
        Method::Delete,
        "/v1/disks/{vm}/snapshots/{snapshot}",
        "Agent/DeleteSnapshot",
    ),
    Route::new(
        Method::Post,
        "/v1/disks/{vm}/snapshots/{snapshot}/roll-back",
        "Agent/RollBack",
    ),
    Route::new(Method::Put, "/v1/bases/{image=image.name}", "Agent/Attach")
        .with(&[("version", "image.version")]),
    Route::new(Method::Delete, "/v1/bases/{image=image.name}", "Agent/Detach")
        .with(&[("version", "image.version")]),
    Route::new(Method::Get, "/v1/cache", "Agent/ShowCache"),
    Route::new(Method::Post, "/v1/cache/members", "Agent/ChangeCache"),
    Route::new(Method::Post, "/v1/cache/pin", "Agent/PinCached"),
    Route::new(Method::Post, "/v1/cache/drop", "Agent/DropCached"),
    Route::new(Method::Get, "/v1/vms", "Agent/ListVms"),
    Route::new(Method::Put, "/v1/vms/{vm}", "Agent/StartVm"),
    Route::new(Method::Post, "/v1/vms/{vm}/stop", "Agent/StopVm"),
    Route::new(Method::Post, "/v1/doctor", "Agent/Doctor"),
];

/// The face of an agent.
pub(crate) fn face(insecure: bool) -> Face {
    Face {
        title: "treeboot agent",
        descriptors: treeboot_proto::DESCRIPTORS,
        package: "treeboot.v1",
        service: "Agent",
        routes: ROUTES,
        insecure,
    }
}

/// What is seen of the agent over its host.
pub(crate) struct Life(pub(crate) Host);

#[tonic::async_trait]
impl Vitals for Life {
    async fn checks(&self) -> Vec<Check> {
        let alone = (!self.0.connected()).then(|| {
            "no word from the coordinator; VMs and children are served, and nothing new can be attached until it is back".to_owned()
        });
        vec![
            Check::new("coordinator", alone),
            Check::new("journal", self.0.journal_problem().await),
            Check {
                name: "room",
                condition: condition_of(self.0.room()),
            },
            Check {
                name: "cache",
                condition: match self
                    .0
                    .plane()
                    .troubles()
                    .into_iter()
                    .find(|trouble| trouble.kind == "cache")
                {
                    Some(trouble) => Condition::Busy(format!("{}: {}", trouble.name, trouble.why)),
                    None => Condition::Good,
                },
            },
        ]
    }

    async fn figures(&self) -> Vec<Family> {
        let status = rpc::status_of(&self.0);
        let vms = self.0.vms().await;
        let mut families = of_host(&self.0, &status);
        families.extend(of_cache(&self.0, &status.cache_members));
        families.extend(of_bases(&status.bases));
        families.extend(of_vms(&self.0, &vms));
        families
    }
}

/// What little room means for whoever places VMs: none is to be placed where there is none.
fn condition_of(room: Option<Room>) -> Condition {
    let Some(room) = room else {
        return Condition::Good;
    };
    let free = room.free_bytes >> 20;
    match room.level() {
        RoomLevel::Enough => Condition::Good,
        RoomLevel::Low => Condition::Busy(format!("{free} MiB are left for VMs' writes; make room soon")),
        RoomLevel::Full => Condition::Impaired(format!(
            "{free} MiB are left for VMs' writes: VMs stand still until there is room; destroy VMs or snapshots that nobody needs"
        )),
    }
}

#[allow(clippy::cast_precision_loss, reason = "a figure for people")]
fn of_host(host: &Host, status: &v1::StatusResponse) -> Vec<Family> {
    let mut store = BTreeMap::new();
    for image in &status.store {
        store.insert(&image.digest, image.allocated_bytes);
    }
    // A file system that does not say has no figure.
    let room = status.room;
    vec![
        Family::gauge(
            "treeboot_agent_uptime_seconds",
            "Since the agent's start.",
            host.uptime().as_secs_f64(),
        ),
        Family::gauge(
            "treeboot_agent_connected",
            "1 while the heartbeat stream to the coordinator stands.",
            f64::from(u8::from(status.coordinator_connected)),
        ),
        Family::counter(
            "treeboot_agent_journal_errors_total",
            "Writes of the journal that failed.",
            host.journal_errors() as f64,
        ),
        Family::gauge(
            "treeboot_agent_cache_used_bytes",
            "Of all images that are cached here.",
            status.cache_used_bytes as f64,
        ),
        Family::gauge(
            "treeboot_agent_store_bytes",
            "Allocated by the images in this origin's store.",
            store.values().sum::<u64>() as f64,
        ),
        Family::gauges(
            "treeboot_agent_room_bytes",
            "Free in the file system of the VMs' writes; where it is full they stand still.",
            room.map(|room| (Labels::new(), room.free_bytes as f64)),
        ),
        Family::gauges(
            "treeboot_agent_room_size_bytes",
            "The size of that file system.",
            room.map(|room| (Labels::new(), room.size_bytes as f64)),
        ),
    ]
}

#[allow(clippy::cast_precision_loss, reason = "a figure for people")]
fn of_cache(host: &Host, members: &[v1::CacheMember]) -> Vec<Family> {
    let Ok(view) = host.show_cache() else {
        return Vec::new();
    };
    let each = |pick: fn(&v1::CacheMember) -> f64| {
        let figures = members.iter();
        figures.map(move |member| {
            (
                vec![("directory", member.directory.clone())] as Labels,
                pick(member),
            )
        })
    };
    vec![
        Family::gauges(
            "treeboot_agent_cache_member_failed",
            "1 where a directory of the cache group is not used any more because its I/O failed.",
            each(|member| f64::from(u8::from(member.state() == v1::CacheMemberState::Failed))),
        ),
        Family::gauges(
            "treeboot_agent_cache_member_used_bytes",
            "Bytes of a directory of the cache group.",
            each(|member| member.used_bytes as f64),
        ),
        Family::gauges(
            "treeboot_agent_cache_member_budget_bytes",
            "What it may hold; 0: all the room that there is.",
            each(|member| member.budget_bytes as f64),
        ),
        Family::counter(
            "treeboot_agent_cache_hits_total",
            "Chunk-sized parts of reads that the cache group had.",
            view.group.hits as f64,
        ),
        Family::counter(
            "treeboot_agent_cache_misses_total",
            "Chunks that were fetched because the cache group did not have them.",
            view.group.misses as f64,
        ),
        Family::counter(
            "treeboot_agent_cache_evicted_bytes_total",
            "What went from the cache group for other content, or was dropped.",
            view.group.evicted_bytes as f64,
        ),
    ]
}

fn image_of(base: &v1::BaseStatus) -> String {
    let id = base
        .attachment
        .as_ref()
        .and_then(|attachment| attachment.image.as_ref());
    id.map(|id| format!("{}@{}", id.name, id.version))
        .unwrap_or_default()
}

#[allow(clippy::cast_precision_loss, reason = "a figure for people")]
fn of_bases(bases: &[v1::BaseStatus]) -> Vec<Family> {
    type Pick = fn(&v1::BaseCounters) -> u64;
    let each = |pick: Pick| {
        bases.iter().map(move |base| {
            let counters = base.counters.unwrap_or_default();
            (vec![("image", image_of(base))] as Labels, pick(&counters) as f64)
        })
    };
    let fetched = bases.iter().flat_map(|base| {
        let counters = base.counters.unwrap_or_default();
        let from = [
            ("parent", counters.fetched_parent_bytes),
            ("fallback", counters.fetched_fallback_bytes),
        ];
        from.map(|(from, bytes)| {
            (
                vec![("image", image_of(base)), ("from", from.to_owned())] as Labels,
                bytes as f64,
            )
        })
    });
    let chunks = bases.iter().flat_map(|base| {
        let counters = base.counters.unwrap_or_default();
        let ends = [
            ("hit", counters.chunk_hits),
            ("fetched", counters.chunk_misses),
            ("joined", counters.chunk_joined),
        ];
        ends.map(|(end, count)| {
            (
                vec![("image", image_of(base)), ("end", end.to_owned())] as Labels,
                count as f64,
            )
        })
    });
    let mut states: BTreeMap<(String, &str), u32> = BTreeMap::new();
    for base in bases {
        for path in &base.paths {
            *states.entry((image_of(base), &path.state)).or_default() += 1;
        }
    }
    let paths = states.into_iter().map(|((image, state), count)| {
        (
            vec![("image", image), ("state", state.to_owned())] as Labels,
            f64::from(count),
        )
    });
    let ready = |base: &&v1::BaseStatus| {
        let state = base.attachment.as_ref().map(v1::Attachment::state);
        state == Some(v1::AttachState::Ready)
    };
    let is_ready = bases.iter().filter(ready).count();
    let states = [("ready", is_ready), ("pending", bases.len() - is_ready)];
    vec![
        Family::gauges(
            "treeboot_agent_bases",
            "Images attached or stored here, by state.",
            states.map(|(state, count)| (vec![("state", state.to_owned())], count as f64)),
        ),
        Family::counters(
            "treeboot_agent_fetched_bytes_total",
            "Payload that came from parents, and from fallbacks where a parent faltered.",
            fetched,
        ),
        Family::counters(
            "treeboot_agent_shipped_wire_bytes_total",
            "Bytes that the sockets of this image's export sent, headers too.",
            each(|counters| counters.shipped_wire_bytes),
        ),
        Family::counters(
            "treeboot_agent_child_read_bytes_total",
            "Bytes of the base that children asked for.",
            each(|counters| counters.child_read_bytes),
        ),
        Family::counters(
            "treeboot_agent_guest_read_bytes_total",
            "Bytes of the base that VMs here asked for.",
            each(|counters| counters.guest_read_bytes),
        ),
        Family::counters(
            "treeboot_agent_chunks_total",
            "How reads of chunks ended.",
            chunks,
        ),
        Family::counters(
            "treeboot_agent_bad_chunks_total",
            "Chunks that came and were not what the hash tree says.",
            each(|counters| counters.bad_chunks),
        ),
        Family::gauges(
            "treeboot_agent_cached_bytes",
            "Of an image, in the cache.",
            each(|counters| counters.cached_bytes),
        ),
        Family::counters(
            "treeboot_agent_uncached_bytes_total",
            "Passed through because the cache had no room.",
            each(|counters| counters.uncached_bytes),
        ),
        Family::gauges(
            "treeboot_agent_longest_stall_seconds",
            "The longest that one read of the base took.",
            bases.iter().map(|base| {
                let stall = base.counters.unwrap_or_default().longest_stall_us as f64 / 1e6;
                (vec![("image", image_of(base))] as Labels, stall)
            }),
        ),
        Family::gauges(
            "treeboot_agent_paths",
            "Paths to parents and fallbacks, by state.",
            paths,
        ),
    ]
}

#[allow(clippy::cast_precision_loss, reason = "a figure for people")]
fn of_vms(host: &Host, vms: &[VmReport]) -> Vec<Family> {
    let mut states = BTreeMap::from(["starting", "ready", "stopped", "failed"].map(|state| (state, 0u32)));
    for vm in vms {
        let state = match vm.run {
            VmRun::Absent | VmRun::Stopped => "stopped",
            VmRun::Starting => "starting",
            VmRun::Ready => "ready",
            VmRun::Failed(_) => "failed",
        };
        *states.entry(state).or_default() += 1;
    }
    let limited = host.limited();
    let is_paused = |vm: &&VmReport| vm.running.as_ref().is_some_and(|running| running.is_paused());
    let errors = |vm: &VmReport| vm.stats.failed_reads + vm.stats.failed_writes + vm.stats.failed_flushes;
    vec![
        Family::gauges(
            "treeboot_agent_vms",
            "VMs of this host, by state.",
            states
                .into_iter()
                .map(|(state, count)| (vec![("state", state.to_owned())], f64::from(count))),
        ),
        Family::gauge(
            "treeboot_agent_disks",
            "VMs' disks on this host.",
            host.desired().disks.len() as f64,
        ),
        Family::gauges(
            "treeboot_agent_disk_limit_bytes",
            "The most that a VM may have written, of those that have a limit.",
            limited
                .iter()
                .map(|it| (vec![("vm", it.vm.to_string())], it.limit_bytes as f64)),
        ),
        Family::gauges(
            "treeboot_agent_disk_data_bytes",
            "What it has written and not discarded, of those that have a limit.",
            limited
                .iter()
                .map(|it| (vec![("vm", it.vm.to_string())], it.data_bytes as f64)),
        ),
        Family::gauge(
            "treeboot_agent_vms_paused",
            "VMs that stand still because their disk answers with errors: no room, or no parent.",
            vms.iter().filter(is_paused).count() as f64,
        ),
        Family::gauge(
            "treeboot_agent_vm_io_errors",
            "Reads, writes and flushes that failed, as the running VMs' QEMUs count them.",
            vms.iter().map(errors).sum::<u64>() as f64,
        ),
    ]
}
