//! All that verbs make and take away, on the hosts and at the coordinator, as lines that can be compared. Absent: what caches hold, what
//! journals and logs say, and numbers that no two runs share.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::cluster::Cluster;
use crate::daemon::Daemon;
use crate::measure::newest;
use anyhow::Result;
use treeboot_proto::v1;
use treeboot_types::PlaneKind;

/// Files of the agent itself, which verbs neither make nor take away.
const OWN: [&str; 4] = ["journal", "journal.new", "journal.forgot", "orphans.json"];

/// What the doctor finds; deleted files that are held open; what an agent tries out at its first start.
const PASSING: [&str; 3] = [" doctor: ", " (deleted)", " state: probe."];

/// Lines, each as often as the thing is there.
pub(super) type Footprint = BTreeMap<String, usize>;

/// What is there at this moment. `mark` is a part of names by which this test's devices are known.
pub(super) async fn take(cluster: &Cluster, plane: PlaneKind, mark: &str) -> Result<Footprint> {
    let mut lines = Vec::new();
    for agent in cluster.agents() {
        of_host(agent, &mut lines).await?;
    }
    of_coordinator(cluster, &mut lines).await?;
    of_machine(cluster, mark, &mut lines);
    if plane == PlaneKind::Kernel {
        of_kernel(&mut lines);
    }
    let mut footprint = Footprint::new();
    for line in lines {
        *footprint.entry(line).or_default() += 1;
    }
    Ok(footprint)
}

/// What one has and the other has not.
pub(super) fn differences(expected: &Footprint, seen: &Footprint) -> Vec<String> {
    let missing = expected.iter().filter(|(line, n)| seen.get(*line) != Some(n));
    let more = seen.iter().filter(|(line, n)| expected.get(*line) != Some(n));
    let missing = missing.map(|(line, n)| format!("expected {n}: {line}"));
    missing
        .chain(more.map(|(line, n)| format!("seen {n}: {line}")))
        .collect()
}

/// What must not stay, whatever was done.
pub(super) fn wrong(footprint: &Footprint) -> Vec<&String> {
    let wrong = footprint
        .keys()
        .filter(|line| PASSING.iter().any(|part| line.contains(part)));
    wrong.collect()
}

async fn of_host(agent: &Daemon, lines: &mut Vec<String>) -> Result<()> {
    let name = agent.name();
    let mut say = |line: String| lines.push(format!("{name} {line}"));
    let mut client = agent.agent().await?;
    for disk in client.list(v1::ListRequest {}).await?.into_inner().disks {
        say(format!(
            "disk of {}: limit {}, sessions {}, device '{}'",
            disk.vm, disk.limit_bytes, disk.sessions, disk.device
        ));
    }
    for vm in client.list_vms(v1::ListVmsRequest {}).await?.into_inner().vms {
        say(format!("vm {}: {:?}", vm.name, vm.state()));
    }
    let status = client.status(v1::StatusRequest {}).await?.into_inner();
    for base in status.bases {
        let attachment = base.attachment.unwrap_or_default();
        say(format!(
            "base {}: pinned {}, disks {}",
            words(attachment.image),
            base.pinned,
            base.disks
        ));
    }
    for stored in status.store {
        say(format!("stored {}", words(stored.image)));
    }
    for member in status.cache_members {
        say(format!("cache in {}", member.directory));
    }
    let found = client.doctor(v1::DoctorRequest::default()).await?.into_inner();
    for finding in found.findings {
        if !["used", "kept"].contains(&finding.condition.as_str()) {
            say(format!(
                "doctor: {} {} {}",
                finding.condition, finding.kind, finding.name
            ));
        }
    }
    for failure in found.failures {
        say(format!("doctor: {failure}"));
    }
    for part in ["state", "store"] {
        let root = agent.folder().join(part);
        files(&root, &root, &mut |file| say(format!("{part}: {file}")));
    }
    if let Some(pid) = agent.pid() {
        // A version that was flattened is read from the files that it shared, until its base is opened anew.
        let own = agent.folder().join("state").display().to_string();
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
            let target = fs::read_link(entry.path()).unwrap_or_default();
            let target = target.display().to_string();
            if target.starts_with(&own) && target.ends_with(" (deleted)") {
                say(format!("open: {target}"));
            }
        }
    }
    if has_sessions(&agent.portal()?) {
        say("sessions at its portal".into());
    }
    Ok(())
}

/// Files, sockets and links, and folders but the uppermost, below a folder.
fn files(root: &Path, folder: &Path, say: &mut impl FnMut(String)) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(relative) = path.strip_prefix(root) else {
            continue;
        };
        let name = relative.display().to_string();
        if OWN.contains(&name.as_str()) {
            continue;
        }
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        // What is in a folder of the agent's own comes and goes; the folder stays.
        if !is_folder || folder != root {
            // A layer's number is the next free one, and what was given up had one, too.
            say(match name.rsplit_once('+') {
                Some((disk, number)) if number.ends_with(".layer") => format!("{disk}, a layer"),
                _ => name,
            });
        }
        if is_folder {
            files(root, &path, say);
        }
    }
}

async fn of_coordinator(cluster: &Cluster, lines: &mut Vec<String>) -> Result<()> {
    let mut client = cluster.coordinator.coordinator().await?;
    let hosts = client
        .list_hosts(v1::ListHostsRequest {})
        .await?
        .into_inner()
        .hosts;
    for host in hosts {
        let info = host.info.unwrap_or_default();
        lines.push(format!("known host {}: connected {}", info.name, host.connected));
    }
    let images = client
        .list_images(v1::ListImagesRequest {})
        .await?
        .into_inner()
        .images;
    for image in images {
        let id = image.id.unwrap_or_else(|| newest("?"));
        let origins = image.origins.iter().map(|origin| origin.host.clone());
        let origins: Vec<_> = origins.collect();
        let name = words(Some(id.clone()));
        lines.push(format!("known image {name} at {}", origins.join(", ")));
        let request = v1::GetTreeRequest { image: Some(id) };
        for node in client.get_tree(request).await?.into_inner().nodes {
            lines.push(format!(
                "in the tree of {name}, stripe {}: {}",
                node.stripe, node.host
            ));
        }
    }
    Ok(())
}

/// Mounts, loop devices, links, sockets and processes.
fn of_machine(cluster: &Cluster, mark: &str, lines: &mut Vec<String>) {
    let folder = cluster.path().display().to_string();
    for table in ["/proc/self/mountinfo", "/proc/net/unix"] {
        for line in fs::read_to_string(table).unwrap_or_default().lines() {
            let ours = line.split(' ').find(|word| word.starts_with(&folder));
            if let Some(ours) = ours {
                let line = format!("{table}: {ours}");
                // A socket is there once for itself and once for each connection.
                if table.ends_with("mountinfo") || !lines.contains(&line) {
                    lines.push(line);
                }
            }
        }
    }
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let file = fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
        if file.contains(mark) || file.starts_with(&folder) {
            lines.push(format!("loop device on {}", file.trim()));
        }
    }
    for entry in fs::read_dir("/dev/treeboot").into_iter().flatten().flatten() {
        let name = entry.file_name().display().to_string();
        if name.contains(mark) {
            lines.push(format!("link {name}"));
        }
    }
    for pid in cluster.scratch().processes() {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        lines.push(format!("process {}", name.trim()));
    }
}

/// What the kernel plane has of its kernel, which is a guest's and nobody else's: devices by name, caches, sessions and targets.
fn of_kernel(lines: &mut Vec<String>) {
    let entries = |folder: &str| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    for (folder, attribute, what) in [
        ("/sys/block", "dm/name", "device"),
        ("/sys/block", "bcache/backing_dev_uuid", "bcache"),
        ("/sys/class/iscsi_session", "targetname", "session with"),
    ] {
        for entry in entries(folder) {
            if let Ok(name) = fs::read_to_string(entry.join(attribute)) {
                // A number is the device's own.
                let name = if what == "bcache" { "" } else { name.trim() };
                lines.push(format!("{what} {name}"));
            }
        }
    }
    for target in entries("/sys/kernel/config/target/iscsi") {
        let name = target.file_name().unwrap_or_default().display().to_string();
        if name.starts_with("iqn.") {
            lines.push(format!("target {name}"));
        }
    }
    for adapter in entries("/sys/kernel/config/target/core") {
        let stores = entries(&adapter.display().to_string());
        for store in stores.iter().filter(|store| store.join("udev_path").exists()) {
            let name = store.file_name().unwrap_or_default().display().to_string();
            lines.push(format!("backstore {name}"));
        }
    }
}

/// Whether anybody is connected to an address of IPv4.
fn has_sessions(portal: &str) -> bool {
    const ESTABLISHED: &str = "01";
    let Ok(std::net::SocketAddr::V4(address)) = portal.parse() else {
        return false;
    };
    let local = format!(
        "{:08X}:{:04X}",
        u32::from_le_bytes(address.ip().octets()),
        address.port()
    );
    let table = fs::read_to_string("/proc/net/tcp").unwrap_or_default();
    table.lines().any(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        fields.get(1) == Some(&local.as_str()) && fields.get(3) == Some(&ESTABLISHED)
    })
}

fn words(id: Option<v1::ImageId>) -> String {
    let id = id.unwrap_or_else(|| newest("?"));
    format!("{}@{}", id.name, id.version)
}
