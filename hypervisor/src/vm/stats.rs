//! What QEMU counts of a VM's disk.

use serde_json::Value;

/// What went through a VM's disk since QEMU started (QMP `query-blockstats`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct BlockStats {
    /// Bytes read.
    pub read_bytes: u64,
    /// Reads.
    pub read_operations: u64,
    /// Time from a read's arrival at the block layer to its answer, all together.
    pub read_time_ns: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Writes.
    pub write_operations: u64,
    /// As `read_time_ns`.
    pub write_time_ns: u64,
    /// Flushes.
    pub flush_operations: u64,
    /// As `read_time_ns`.
    pub flush_time_ns: u64,
    /// Reads whose failure the guest was told: none as long as `rerror=stop` holds, which pauses it instead.
    pub failed_reads: u64,
    /// As `failed_reads`.
    pub failed_writes: u64,
    /// As `failed_reads`.
    pub failed_flushes: u64,
}

impl BlockStats {
    /// Numbers that are missing count as 0: QEMU's versions differ in what they tell.
    pub(super) fn parse(stats: &Value) -> Self {
        let number = |name: &str| stats.get(name).and_then(Value::as_u64).unwrap_or(0);
        Self {
            read_bytes: number("rd_bytes"),
            read_operations: number("rd_operations"),
            read_time_ns: number("rd_total_time_ns"),
            written_bytes: number("wr_bytes"),
            write_operations: number("wr_operations"),
            write_time_ns: number("wr_total_time_ns"),
            flush_operations: number("flush_operations"),
            flush_time_ns: number("flush_total_time_ns"),
            failed_reads: number("failed_rd_operations"),
            failed_writes: number("failed_wr_operations"),
            failed_flushes: number("failed_flush_operations"),
        }
    }
}
