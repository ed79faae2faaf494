//! `treeboot host …`: the hosts that the coordinator knows, and one host as its agent sees itself.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use treeboot_proto::v1;
use treeboot_types::HostName;

use crate::cache::MemberJson;
use crate::client::{Coordinator, Options};
use crate::failure::Failure;
use crate::output::{self, Align, JsonFlag, Table};
use crate::tree::id_words;
use crate::vm::limit_level;

/// Verbs on hosts.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum HostVerb {
    /// List the hosts that the coordinator knows
    #[command(
        after_help = "Example:\n  treeboot host list\n  treeboot host list --json | jq -r '.[] | select(.connected) | .name'"
    )]
    List(JsonFlag),
    /// Show one host as its agent sees itself: bases, counters, paths, store
    #[command(after_help = "Example:\n  treeboot host show host-1")]
    Show {
        /// The host's name
        host: HostName,
        #[command(flatten)]
        json: JsonFlag,
    },
}

/// A host in `--json`.
#[derive(Debug, Serialize)]
struct HostJson {
    name: String,
    connected: bool,
    silent_ms: u64,
    agent_address: String,
    portal: String,
    plane: &'static str,
    max_stripes: u32,
    runs_vms: bool,
    holds_store: bool,
    images: u32,
    vms: u32,
    wrong_bytes_reports: u64,
    labels: BTreeMap<String, String>,
    version: String,
}

impl From<&v1::HostRecord> for HostJson {
    fn from(record: &v1::HostRecord) -> Self {
        let info = record.info.clone().unwrap_or_default();
        Self {
            plane: plane(&info),
            name: info.name,
            connected: record.connected,
            silent_ms: record.silent_ms,
            agent_address: info.agent_address,
            portal: info.portal,
            max_stripes: info.max_stripes,
            runs_vms: info.runs_vms,
            holds_store: info.holds_store,
            images: record.attachments,
            vms: record.vms,
            wrong_bytes_reports: record.wrong_bytes_reports,
            labels: info.labels.into_iter().collect(),
            version: info.version,
        }
    }
}

#[derive(Debug, Serialize)]
struct StatusJson {
    #[serde(flatten)]
    host: HostJson,
    coordinator_connected: bool,
    uptime_ms: u64,
    cache_used_bytes: u64,
    room: Option<RoomJson>,
    near_limit: Vec<NearLimitJson>,
    cache: Vec<MemberJson>,
    bases: Vec<BaseJson>,
    store: Vec<StoredJson>,
}

/// The file system of the VMs' writes.
#[derive(Debug, Serialize)]
struct RoomJson {
    free_bytes: u64,
    size_bytes: u64,
    /// enough, low or full.
    level: &'static str,
}

impl From<v1::Room> for RoomJson {
    fn from(room: v1::Room) -> Self {
        Self {
            free_bytes: room.free_bytes,
            size_bytes: room.size_bytes,
            level: match room.level() {
                v1::RoomLevel::Low => "low",
                v1::RoomLevel::Full => "full",
                v1::RoomLevel::Enough | v1::RoomLevel::Unspecified => "enough",
            },
        }
    }
}

/// A VM that wrote most of what it may.
#[derive(Debug, Serialize)]
struct NearLimitJson {
    vm: String,
    data_bytes: u64,
    limit_bytes: u64,
    /// high (from 80 % on) or critical (from 95 % on).
    level: Option<&'static str>,
}

impl From<v1::NearLimit> for NearLimitJson {
    fn from(near: v1::NearLimit) -> Self {
        Self {
            level: limit_level(near.level()),
            vm: near.vm,
            data_bytes: near.data_bytes,
            limit_bytes: near.limit_bytes,
        }
    }
}

#[derive(Debug, Serialize)]
struct BaseJson {
    image: String,
    state: &'static str,
    pinned: bool,
    disks: u32,
    portal: String,
    target: String,
    shipped_wire_bytes: u64,
    fetched_parent_bytes: u64,
    fetched_fallback_bytes: u64,
    fetched_hash_bytes: u64,
    guest_read_bytes: u64,
    guest_unique_bytes: u64,
    child_read_bytes: u64,
    chunk_hits: u64,
    chunk_misses: u64,
    chunk_joined: u64,
    bad_chunks: u64,
    cached_bytes: u64,
    uncached_bytes: u64,
    longest_stall_us: u64,
    paths: Vec<PathJson>,
}

#[derive(Debug, Serialize)]
struct PathJson {
    stripe: u32,
    host: Option<String>,
    portal: String,
    active: bool,
    state: String,
    in_flight: u32,
    bytes: u64,
    failures: u64,
    service_time_us: u64,
}

#[derive(Debug, Serialize)]
struct StoredJson {
    image: String,
    digest: String,
    bytes: u64,
    allocated_bytes: u64,
    directory: String,
}

/// Runs a verb.
pub(crate) async fn run(options: &Options, verb: HostVerb) -> Result<(), Failure> {
    match verb {
        HostVerb::List(json) => list(options, json).await,
        HostVerb::Show { host, json } => show(options, &host, json).await,
    }
}

async fn list(options: &Options, json: JsonFlag) -> Result<(), Failure> {
    let hosts: Vec<HostJson> = Coordinator::connect(options)
        .await?
        .hosts()
        .await?
        .iter()
        .map(HostJson::from)
        .collect();
    if json.json {
        return output::print_json(&hosts);
    }
    output::print_text(&render_list(&hosts))
}

fn render_list(hosts: &[HostJson]) -> String {
    if hosts.is_empty() {
        return "no host has joined; start one with 'treeboot-agent --name HOST …'\n".to_owned();
    }
    let mut table = Table::new(&[
        ("HOST", Align::Left),
        ("STATE", Align::Left),
        ("AGENT", Align::Left),
        ("PORTAL", Align::Left),
        ("ROLES", Align::Left),
        ("IMAGES", Align::Right),
        ("VMS", Align::Right),
        ("LABELS", Align::Left),
    ]);
    for host in hosts {
        let state = if host.connected {
            "connected".to_owned()
        } else {
            format!(
                "silent {}",
                output::duration(Duration::from_millis(host.silent_ms))
            )
        };
        let state = match host.wrong_bytes_reports {
            0 => state,
            reports => format!("{state}, shipped wrong bytes {reports}×"),
        };
        let mut roles = vec![host.plane];
        roles.extend(host.holds_store.then_some("store"));
        roles.extend(host.runs_vms.then_some("vms"));
        let labels: Vec<String> = host
            .labels
            .iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        table.row([
            host.name.clone(),
            state,
            host.agent_address.clone(),
            host.portal.clone(),
            roles.join(","),
            host.images.to_string(),
            host.vms.to_string(),
            labels.join(","),
        ]);
    }
    table.render()
}

async fn show(options: &Options, name: &HostName, json: JsonFlag) -> Result<(), Failure> {
    let coordinator = Coordinator::connect(options).await?;
    let record = coordinator.host(name).await?;
    let status = crate::client::Agent::connect(&record, options.timeout)
        .await?
        .status()
        .await?;
    let status = StatusJson {
        host: HostJson::from(&record),
        coordinator_connected: status.coordinator_connected,
        uptime_ms: status.uptime_ms,
        cache_used_bytes: status.cache_used_bytes,
        room: status.room.map(RoomJson::from),
        near_limit: status.near_limit.into_iter().map(NearLimitJson::from).collect(),
        cache: status.cache_members.into_iter().map(MemberJson::from).collect(),
        bases: status.bases.into_iter().map(BaseJson::from).collect(),
        store: status.store.iter().map(StoredJson::from).collect(),
    };
    if json.json {
        return output::print_json(&status);
    }
    output::print_text(&render_status(&status))
}

impl From<v1::BaseStatus> for BaseJson {
    fn from(base: v1::BaseStatus) -> Self {
        let attachment = base.attachment.unwrap_or_default();
        let endpoint = attachment.endpoint.clone().unwrap_or_default();
        let counters = base.counters.unwrap_or_default();
        Self {
            image: attachment.image.as_ref().map(id_words).unwrap_or_default(),
            state: match attachment.state() {
                v1::AttachState::Ready => "ready",
                _ => "pending",
            },
            pinned: base.pinned,
            disks: base.disks,
            portal: endpoint.portal,
            target: endpoint.target,
            shipped_wire_bytes: counters.shipped_wire_bytes,
            fetched_parent_bytes: counters.fetched_parent_bytes,
            fetched_fallback_bytes: counters.fetched_fallback_bytes,
            fetched_hash_bytes: counters.fetched_hash_bytes,
            guest_read_bytes: counters.guest_read_bytes,
            guest_unique_bytes: counters.guest_unique_bytes,
            child_read_bytes: counters.child_read_bytes,
            chunk_hits: counters.chunk_hits,
            chunk_misses: counters.chunk_misses,
            chunk_joined: counters.chunk_joined,
            bad_chunks: counters.bad_chunks,
            cached_bytes: counters.cached_bytes,
            uncached_bytes: counters.uncached_bytes,
            longest_stall_us: counters.longest_stall_us,
            paths: base
                .paths
                .into_iter()
                .map(|path| PathJson {
                    stripe: path.stripe,
                    host: (!path.host.is_empty()).then_some(path.host),
                    portal: path.portal,
                    active: path.active,
                    state: path.state,
                    in_flight: path.in_flight,
                    bytes: path.bytes,
                    failures: path.failures,
                    service_time_us: path.service_time_us,
                })
                .collect(),
        }
    }
}

impl From<&v1::StoredImage> for StoredJson {
    fn from(stored: &v1::StoredImage) -> Self {
        Self {
            image: stored.image.as_ref().map(id_words).unwrap_or_default(),
            digest: crate::image::digest_words(&stored.digest),
            bytes: stored.bytes,
            allocated_bytes: stored.allocated_bytes,
            directory: stored.directory.clone(),
        }
    }
}

fn render_status(status: &StatusJson) -> String {
    let host = &status.host;
    let connected = if status.coordinator_connected {
        "connected"
    } else {
        "NOT connected"
    };
    let mut text = format!(
        "{}  up {}, {connected} to its coordinator, agent {}, portal {}, {} plane, cache {}\n",
        output::printable(&host.name),
        output::duration(Duration::from_millis(status.uptime_ms)),
        output::printable(&host.agent_address),
        output::printable(&host.portal),
        host.plane,
        output::bytes(status.cache_used_bytes),
    );
    if let Some(room) = &status.room {
        let (free, size) = (output::bytes(room.free_bytes), output::bytes(room.size_bytes));
        text += &match room.level {
            "full" => format!(
                "NO ROOM for VMs' writes: {free} of {size} free; VMs stand still until there is more\n"
            ),
            "low" => format!(
                "LITTLE ROOM for VMs' writes: {free} of {size} free; destroy VMs or snapshots that nobody needs\n"
            ),
            _ => format!("room for VMs' writes: {free} of {size} free\n"),
        };
    }
    for near in &status.near_limit {
        text += &format!(
            "NEAR ITS LIMIT: VM '{}' has written {} of {}; raise it with 'treeboot vm limit', or have it discard what it needs no more\n",
            output::printable(&near.vm),
            output::bytes(near.data_bytes),
            output::bytes(near.limit_bytes),
        );
    }
    for member in &status.cache {
        text += &member.alarm();
    }
    if !status.store.is_empty() {
        text += "\nSTORE\n";
        let mut table = Table::new(&[
            ("IMAGE", Align::Left),
            ("SIZE", Align::Right),
            ("STORED", Align::Right),
            ("DIRECTORY", Align::Left),
        ]);
        for stored in &status.store {
            table.row([
                stored.image.clone(),
                output::bytes(stored.bytes),
                output::bytes(stored.allocated_bytes),
                stored.directory.clone(),
            ]);
        }
        text += &table.render();
    }
    for base in &status.bases {
        text += &format!("\n{}", render_base(base));
    }
    text
}

fn render_base(base: &BaseJson) -> String {
    let pinned = if base.pinned { ", pinned" } else { "" };
    let mut text = format!(
        "BASE {}  {}{pinned}, {}, served at {}\n",
        base.image,
        base.state,
        output::plural(base.disks as usize, "disk"),
        output::printable(&base.portal),
    );
    let asked = base
        .chunk_hits
        .saturating_add(base.chunk_misses)
        .saturating_add(base.chunk_joined);
    let hits = (u128::from(base.chunk_hits) * 100).checked_div(u128::from(asked));
    let hits = hits.map_or_else(
        || "none asked".to_owned(),
        |percent| format!("{percent} % of {asked}"),
    );
    for (what, value) in [
        ("cached", output::bytes(base.cached_bytes)),
        ("chunks found in the cache", hits),
        ("fetched from parents", output::bytes(base.fetched_parent_bytes)),
        (
            "fetched from fallbacks",
            output::bytes(base.fetched_fallback_bytes),
        ),
        ("read by VMs", output::bytes(base.guest_read_bytes)),
        ("distinct blocks of these", output::bytes(base.guest_unique_bytes)),
        ("shipped to children", output::bytes(base.shipped_wire_bytes)),
        ("chunks with wrong bytes", base.bad_chunks.to_string()),
        (
            "longest stall",
            output::duration(Duration::from_micros(base.longest_stall_us)),
        ),
    ] {
        text += &format!("  {what:<27}{value}\n");
    }
    if base.paths.is_empty() {
        return text;
    }
    let mut table = Table::new(&[
        ("  FROM", Align::Left),
        ("PORTAL", Align::Left),
        ("ROLE", Align::Left),
        ("STATE", Align::Left),
        ("BYTES", Align::Right),
        ("FAILURES", Align::Right),
        ("SERVICE TIME", Align::Right),
    ]);
    for path in &base.paths {
        table.row([
            format!("  {}", path.host.as_deref().unwrap_or("(foreign origin)")),
            path.portal.clone(),
            if path.active {
                "parent".into()
            } else {
                "fallback".into()
            },
            path.state.clone(),
            output::bytes(path.bytes),
            path.failures.to_string(),
            output::duration(Duration::from_micros(path.service_time_us)),
        ]);
    }
    text + &table.render()
}

fn plane(info: &v1::HostInfo) -> &'static str {
    match info.plane() {
        v1::PlaneKind::Kernel => "kernel",
        v1::PlaneKind::User => "user",
        v1::PlaneKind::Unspecified => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_says_who_is_silent_and_what_each_host_can_do() {
        let mut record = v1::HostRecord {
            info: Some(v1::HostInfo {
                name: "origin".into(),
                agent_address: "[::1]:7401".into(),
                portal: "[::1]:3260".into(),
                plane: v1::PlaneKind::User.into(),
                holds_store: true,
                labels: [("rack".to_owned(), "r1".to_owned())].into(),
                ..Default::default()
            }),
            connected: true,
            attachments: 2,
            ..Default::default()
        };
        let first = HostJson::from(&record);
        record.connected = false;
        record.silent_ms = 3200;
        record.wrong_bytes_reports = 2;
        let second = HostJson::from(&record);
        assert_eq!(
            render_list(&[first, second]),
            "HOST    STATE                                  AGENT       PORTAL      ROLES       IMAGES  VMS  LABELS\n\
             origin  connected                              [::1]:7401  [::1]:3260  user,store       2    0  rack=r1\n\
             origin  silent 3.20 s, shipped wrong bytes 2×  [::1]:7401  [::1]:3260  user,store       2    0  rack=r1\n"
        );
    }
}
