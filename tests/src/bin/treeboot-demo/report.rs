//! What the demo found, as tables for a person and as JSON for a program.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::Result;
use serde::Serialize;
use treeboot_proto::v1;
use treeboot_tests::measure::FleetFigures;
use treeboot_tests::table::{bytes, draw};

use crate::Options;

/// One VM's boot.
#[derive(Debug, Serialize)]
pub(crate) struct VmReport {
    pub(crate) name: String,
    pub(crate) host: String,
    /// From the request to its being ready; absent where it failed.
    pub(crate) boot_seconds: Option<f64>,
    pub(crate) error: Option<String>,
    pub(crate) read_bytes: u64,
    pub(crate) read_operations: u64,
    pub(crate) read_time_ns: u64,
    pub(crate) written_bytes: u64,
    pub(crate) io_errors: u64,
    pub(crate) acceleration: String,
}

impl VmReport {
    pub(crate) fn new(host: &str, vm: &v1::Vm, error: Option<String>) -> Self {
        Self {
            name: vm.name.clone(),
            host: host.to_owned(),
            boot_seconds: error.is_none().then_some(vm.ready_us as f64 / 1e6),
            error,
            read_bytes: vm.read_bytes,
            read_operations: vm.read_operations,
            read_time_ns: vm.read_time_ns,
            written_bytes: vm.written_bytes,
            io_errors: vm.io_errors,
            acceleration: vm.acceleration.clone(),
        }
    }
}

/// The whole demo.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) guest: String,
    pub(crate) vms_ready: usize,
    pub(crate) vms_failed: usize,
    /// Of each VM that came up, by its name.
    pub(crate) boot_seconds: BTreeMap<String, f64>,
    #[serde(flatten)]
    pub(crate) figures: FleetFigures,
    pub(crate) origin_limit_bytes: u64,
    /// The deepest host's depth.
    pub(crate) levels: u32,
    /// From the request to the export's being registered, by host.
    pub(crate) attach_ms: BTreeMap<String, f64>,
    pub(crate) vms: Vec<VmReport>,
}

impl Report {
    pub(crate) fn new(
        options: &Options,
        figures: FleetFigures,
        vms: Vec<VmReport>,
        attach_ms: BTreeMap<String, f64>,
    ) -> Self {
        let boot_seconds: BTreeMap<String, f64> = vms
            .iter()
            .filter_map(|vm| Some((vm.name.clone(), vm.boot_seconds?)))
            .collect();
        Self {
            guest: options.guest.clone(),
            vms_ready: boot_seconds.len(),
            vms_failed: vms.len() - boot_seconds.len(),
            boot_seconds,
            origin_limit_bytes: figures.origin_limit_bytes(),
            levels: figures.hosts.iter().map(|host| host.depth).max().unwrap_or(0),
            figures,
            attach_ms,
            vms,
        }
    }

    pub(crate) fn json(&self) -> Result<String> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        Ok(text)
    }

    pub(crate) fn text(&self) -> String {
        let mut text = self.vm_table();
        text.push('\n');
        text.push_str(&self.host_table());
        let figures = &self.figures;
        let times = match figures.unique_chunk_bytes {
            0 => 0.0,
            unique => figures.origin_bytes as f64 / unique as f64,
        };
        let _ = write!(
            text,
            "
{} of {} VMs are up. The guests asked for {} of distinct blocks, which lie in {} of chunks.
The origin shipped {} in all: {times:.2} times these chunks (at most {} times, its children, and 5 %). {} came from fallbacks.
",
            self.vms_ready,
            self.vms.len(),
            bytes(figures.unique_bytes),
            bytes(figures.unique_chunk_bytes),
            bytes(figures.origin_bytes),
            figures.origin_children,
            bytes(figures.fallback_bytes),
        );
        text
    }

    fn vm_table(&self) -> String {
        let rows: Vec<Vec<String>> = self
            .vms
            .iter()
            .map(|vm| {
                vec![
                    vm.name.clone(),
                    vm.host.clone(),
                    match vm.boot_seconds {
                        Some(seconds) => format!("{seconds:.1} s"),
                        None => "failed".into(),
                    },
                    bytes(vm.read_bytes),
                    bytes(vm.written_bytes),
                    match vm.read_operations {
                        0 => "-".into(),
                        operations => format!("{} µs", vm.read_time_ns / operations / 1000),
                    },
                    vm.io_errors.to_string(),
                    vm.acceleration.clone(),
                ]
            })
            .collect();
        let headings = [
            "VM",
            "host",
            "ready after",
            "read",
            "written",
            "a read took",
            "I/O errors",
            "by",
        ];
        draw(&headings, &rows)
    }

    fn host_table(&self) -> String {
        let rows: Vec<Vec<String>> = self
            .figures
            .hosts
            .iter()
            .map(|host| {
                vec![
                    host.host.clone(),
                    host.depth.to_string(),
                    bytes(host.shipped_wire_bytes),
                    bytes(host.fetched_bytes),
                    bytes(host.fallback_bytes),
                    bytes(host.guest_read_bytes),
                    bytes(host.guest_unique_bytes),
                    host.cache_hits.to_string(),
                    host.cache_misses.to_string(),
                    host.cache_joined.to_string(),
                ]
            })
            .collect();
        let headings = [
            "host",
            "level",
            "shipped",
            "from parent",
            "from fallback",
            "VMs read",
            "distinct",
            "cache hits",
            "fetches",
            "joined",
        ];
        draw(&headings, &rows)
    }
}
