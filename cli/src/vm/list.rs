//! `vm list`: VMs and disks of one host or of all.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use treeboot_proto::v1;
use treeboot_types::HostName;

use crate::client::{Agent, Coordinator, Options, PARALLEL_CALLS, find_host};
use crate::failure::Failure;
use crate::output::{self, Align, JsonFlag, Table};
use crate::parallel;
use crate::tree::id_words;

/// A VM in `--json`.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct VmJson {
    pub(crate) name: String,
    pub(crate) host: String,
    pub(crate) image: String,
    /// created, starting, ready, paused, moving, unsure, lost, stopped or failed.
    pub(crate) state: &'static str,
    /// The host it is on its way to; `null` where it is on none.
    pub(crate) moves_to: Option<String>,
    pub(crate) error: Option<String>,
    pub(crate) ready_us: Option<u64>,
    pub(crate) pid: Option<u64>,
    pub(crate) acceleration: Option<String>,
    pub(crate) console_path: Option<String>,
    pub(crate) qmp_path: Option<String>,
    /// The disk's LUN; empty where it is a device of the host.
    pub(crate) url: String,
    /// The only name that may log in to the LUN; `null` where there is none.
    pub(crate) initiator: Option<String>,
    /// It has to prove itself, too (CHAP); 'vm show --secret-file' gives by what.
    pub(crate) chap: bool,
    /// The disk's block device on its host, on the kernel plane.
    pub(crate) device: Option<String>,
    /// Size of the disk.
    pub(crate) bytes: u64,
    pub(crate) delta_bytes: u64,
    /// Of blocks that the VM wrote and did not discard: what a limit counts.
    pub(crate) data_bytes: u64,
    /// The most that these may be; `null`: no limit.
    pub(crate) limit_bytes: Option<u64>,
    /// How near they are: enough, high (from 80 % on) or critical (from 95 % on).
    pub(crate) limit_level: Option<&'static str>,
    pub(crate) sessions: u32,
    pub(crate) read_bytes: u64,
    pub(crate) written_bytes: u64,
    pub(crate) read_operations: u64,
    pub(crate) read_time_ns: u64,
    pub(crate) io_errors: u64,
    /// How often it stood still for its disk.
    pub(crate) pauses: u64,
}

impl VmJson {
    /// What a front end opens: a URL, or a path on the host.
    pub(crate) fn place(&self) -> &str {
        self.device.as_deref().unwrap_or(&self.url)
    }

    /// A row of what an agent says of a VM and of its disk; one of them may be missing.
    pub(crate) fn of(host: &str, vm: Option<v1::Vm>, disk: Option<v1::Disk>) -> Self {
        let text = |text: String| (!text.is_empty()).then_some(text);
        let moving = disk.as_ref().and_then(|disk| disk.moving.as_ref());
        let (state, moves_to, waits) = match moving.map(|moving| (moving.end(), &moving.to, moving.asked)) {
            Some((v1::DiskMoveEnd::Unspecified, to, asked)) => {
                ("moving", Some(to.clone()), asked.then(|| undecided(to)))
            }
            Some((v1::DiskMoveEnd::Unsure, from, _)) => ("unsure", None, Some(unsure(from))),
            Some((v1::DiskMoveEnd::Lost, from, _)) => ("lost", None, Some(lost(from, host))),
            None => (vm.as_ref().map_or("created", state), None, None),
        };
        let limit_level = disk.as_ref().and_then(|disk| limit_level(disk.limit_level()));
        // Bytes are QEMU's own where it runs, and else what the disk's target counted.
        let has_vm = vm.is_some();
        let (vm, disk) = (vm.unwrap_or_default(), disk.unwrap_or_default());
        let image = vm
            .image
            .as_ref()
            .or(disk.image.as_ref())
            .map(id_words)
            .unwrap_or_default();
        Self {
            name: if vm.name.is_empty() { disk.vm } else { vm.name },
            host: host.to_owned(),
            image,
            state,
            moves_to,
            error: waits.or(text(vm.error)),
            ready_us: (vm.ready_us > 0).then_some(vm.ready_us),
            pid: (vm.pid > 0).then_some(vm.pid),
            acceleration: text(vm.acceleration),
            console_path: text(vm.console_path),
            qmp_path: text(vm.qmp_path),
            url: disk.url,
            initiator: text(disk.initiator),
            chap: disk.chap,
            device: text(disk.device),
            bytes: disk.bytes,
            delta_bytes: disk.delta_bytes,
            data_bytes: disk.data_bytes,
            limit_bytes: (disk.limit_bytes > 0).then_some(disk.limit_bytes),
            limit_level,
            sessions: disk.sessions,
            read_bytes: if has_vm { vm.read_bytes } else { disk.read_bytes },
            written_bytes: if has_vm {
                vm.written_bytes
            } else {
                disk.written_bytes
            },
            read_operations: vm.read_operations,
            read_time_ns: vm.read_time_ns,
            io_errors: vm.io_errors,
            pauses: vm.pauses,
        }
    }
}

fn undecided(to: &str) -> String {
    format!("host '{to}' has not said yet whether it took it; until it does the VM runs nowhere")
}

fn unsure(from: &str) -> String {
    format!(
        "host '{from}', from which it came, has not said yet that it did not take it back; until it does the VM runs nowhere"
    )
}

fn lost(from: &str, host: &str) -> String {
    format!("host '{from}', from which it came, took it back; remove what is left of it with --host {host}")
}

/// A word for how near a limit is; `None` where there is none.
pub(crate) fn limit_level(level: v1::LimitLevel) -> Option<&'static str> {
    match level {
        v1::LimitLevel::Unspecified => None,
        v1::LimitLevel::Enough => Some("enough"),
        v1::LimitLevel::High => Some("high"),
        v1::LimitLevel::Critical => Some("critical"),
    }
}

fn state(vm: &v1::Vm) -> &'static str {
    match vm.state() {
        v1::VmState::Starting | v1::VmState::Ready if vm.paused => "paused",
        v1::VmState::Starting => "starting",
        v1::VmState::Ready => "ready",
        v1::VmState::Stopped => "stopped",
        v1::VmState::Failed => "failed",
        v1::VmState::Unspecified => "unknown",
    }
}

/// The VMs of one host by name.
pub(crate) async fn of_host(agent: &Agent) -> Result<Vec<VmJson>, Failure> {
    let mut disks: BTreeMap<String, v1::Disk> = agent
        .disks()
        .await?
        .into_iter()
        .map(|disk| (disk.vm.clone(), disk))
        .collect();
    let vms = agent.vms().await?;
    let mut rows: Vec<VmJson> = vms
        .into_iter()
        .map(|vm| {
            let disk = disks.remove(&vm.name);
            VmJson::of(&agent.host, Some(vm), disk)
        })
        .collect();
    rows.extend(
        disks
            .into_values()
            .map(|disk| VmJson::of(&agent.host, None, Some(disk))),
    );
    rows.sort_by(|a, b| output::natural(&a.name, &b.name));
    Ok(rows)
}

/// The VMs of all `hosts`, by host; and why some of these did not answer.
pub(crate) async fn of_hosts(hosts: Vec<v1::HostRecord>, timeout: Duration) -> (Vec<VmJson>, Vec<Failure>) {
    let answers = parallel::each(hosts, PARALLEL_CALLS, |host| async move {
        of_host(&Agent::connect(&host, timeout).await?).await
    })
    .await;
    let (mut rows, mut failures) = (Vec::new(), Vec::new());
    for answer in answers {
        match answer {
            Ok(more) => rows.extend(more),
            Err(failure) => failures.push(failure),
        }
    }
    (rows, failures)
}

/// `vm list`.
pub(super) async fn list(options: &Options, host: Option<HostName>, json: JsonFlag) -> Result<(), Failure> {
    let mut hosts = Coordinator::connect(options).await?.hosts().await?;
    match host {
        Some(host) => hosts = vec![find_host(&hosts, &host)?],
        None => hosts.retain(|host| host.connected),
    }
    let count = hosts.len();
    let (rows, failures) = of_hosts(hosts, options.timeout).await;
    if json.json {
        output::print_json(&rows)?;
    } else {
        output::print_text(&render(&rows))?;
    }
    parallel::verdict("host", count, &failures)
}

fn render(rows: &[VmJson]) -> String {
    if rows.is_empty() {
        return "there is no VM; start one with 'treeboot vm start NAME --image IMAGE --host HOST'\n"
            .to_owned();
    }
    let mut table = Table::new(&[
        ("VM", Align::Left),
        ("HOST", Align::Left),
        ("IMAGE", Align::Left),
        ("STATE", Align::Left),
        ("READY AFTER", Align::Right),
        ("READ", Align::Right),
        ("WRITTEN", Align::Right),
        ("DELTA", Align::Right),
        ("", Align::Left),
    ]);
    for row in rows {
        table.row([
            row.name.clone(),
            row.host.clone(),
            row.image.clone(),
            row.state.to_owned(),
            row.ready_us
                .map(|us| output::duration(Duration::from_micros(us)))
                .unwrap_or_default(),
            output::bytes(row.read_bytes),
            output::bytes(row.written_bytes),
            output::bytes(row.delta_bytes),
            row.error.clone().unwrap_or_default(),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_without_a_vm_is_created_and_a_vm_says_how_it_is() {
        let image = Some(v1::ImageId {
            name: "debian".into(),
            version: 1,
        });
        let disk = v1::Disk {
            vm: "a".into(),
            image: image.clone(),
            bytes: 1 << 30,
            read_bytes: 5,
            ..Default::default()
        };
        let vm = v1::Vm {
            name: "b".into(),
            image,
            state: v1::VmState::Failed.into(),
            error: "QEMU ended".into(),
            ready_us: 0,
            ..Default::default()
        };
        let paused = v1::Vm {
            name: "c".into(),
            state: v1::VmState::Ready.into(),
            error: String::new(),
            paused: true,
            ..vm.clone()
        };
        let moving = |vm: &str, asked, end: v1::DiskMoveEnd| v1::Disk {
            vm: vm.into(),
            moving: Some(v1::DiskMove {
                to: "h2".into(),
                asked,
                end: end.into(),
            }),
            ..disk.clone()
        };
        let [asked, unsure, lost] = [
            moving("d", true, v1::DiskMoveEnd::Unspecified),
            moving("e", false, v1::DiskMoveEnd::Unsure),
            moving("f", false, v1::DiskMoveEnd::Lost),
        ];
        let rows = [
            VmJson::of("h", None, Some(disk.clone())),
            VmJson::of("h", Some(vm), None),
            VmJson::of("h", Some(paused), None),
            VmJson::of("h", None, Some(asked)),
            VmJson::of("h", None, Some(unsure)),
            VmJson::of("h", None, Some(lost)),
        ];
        assert_eq!((rows[0].state, rows[0].read_bytes), ("created", 5));
        assert_eq!(
            render(&rows),
            "VM  HOST  IMAGE     STATE    READY AFTER  READ  WRITTEN  DELTA\n\
             a   h     debian@1  created                5 B      0 B    0 B\n\
             b   h     debian@1  failed                 0 B      0 B    0 B  QEMU ended\n\
             c   h     debian@1  paused                 0 B      0 B    0 B\n\
             d   h     debian@1  moving                 5 B      0 B    0 B  host 'h2' has not said yet whether it took it; until it does \
             the VM runs nowhere\n\
             e   h     debian@1  unsure                 5 B      0 B    0 B  host 'h2', from which it came, has not said yet that it did not \
             take it back; until it does the VM runs nowhere\n\
             f   h     debian@1  lost                   5 B      0 B    0 B  host 'h2', from which it came, took it back; remove what is left \
             of it with --host h\n"
        );
    }
}
