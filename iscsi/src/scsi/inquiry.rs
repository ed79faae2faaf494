//! INQUIRY data and vital product data pages (SPC-4 §6.6 and §7.8, SBC-3 §6.6).

use treeboot_block::Geometry;

use super::alua::PortGroup;
use super::unit::{Identity, MAX_TRANSFER_BYTES, MAX_UNMAP_DESCRIPTORS, MAX_WRITE_SAME_BYTES};

/// Who made it, in 8 characters.
const VENDOR: &[u8; 8] = b"TREEBOOT";
/// Peripheral device type of a disk.
const DISK: u8 = 0;
/// Peripheral qualifier and type where there is no logical unit.
const NO_UNIT: u8 = 0x7f;

/// Text in a field of fixed width, filled with blanks; what is not ASCII becomes `?`.
fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut out = [b' '; N];
    for (to, from) in out.iter_mut().zip(text.chars()) {
        *to = if from.is_ascii_graphic() || from == ' ' {
            from as u8
        } else {
            b'?'
        };
    }
    out
}

/// Standard INQUIRY data; `None` where there is no logical unit.
pub fn standard(identity: Option<&Identity>) -> Vec<u8> {
    let mut out = vec![0; 96];
    out[0] = if identity.is_some() { DISK } else { NO_UNIT };
    out[2] = 6; // SPC-4
    out[3] = 0x12; // HISUP, response data format 2
    out[4] = 96 - 5;
    out[5] = 0x10; // TPGS: implicit ALUA
    out[6] = 0x10; // MULTIP
    out[7] = 0x02; // CMDQUE
    out[8..16].copy_from_slice(VENDOR);
    out[16..32].copy_from_slice(&padded::<16>(identity.map_or("", |i| &i.product)));
    out[32..36].copy_from_slice(b"0001");
    // SAM-5, iSCSI, SPC-4, SBC-3.
    for (at, version) in [0x00a0u16, 0x0960, 0x0460, 0x04c0].iter().enumerate() {
        out[58 + at * 2..60 + at * 2].copy_from_slice(&version.to_be_bytes());
    }
    out
}

/// A vital product data page, or `None` where there is no such page.
pub fn page(code: u8, identity: &Identity, geometry: &Geometry, group: PortGroup) -> Option<Vec<u8>> {
    let body = match code {
        0x00 => vec![0x00, 0x80, 0x83, 0x86, 0xb0, 0xb1, 0xb2],
        0x80 => identity.serial.as_bytes().to_vec(),
        0x83 => identification(identity, group),
        0x86 => extended(),
        0xb0 => block_limits(geometry),
        0xb1 => characteristics(),
        0xb2 => provisioning(geometry),
        _ => return None,
    };
    let mut out = vec![DISK, code];
    out.extend_from_slice(&(body.len() as u16).to_be_bytes());
    out.extend_from_slice(&body);
    Some(out)
}

/// Device identification (SPC-4 §7.8.5).
fn identification(identity: &Identity, group: PortGroup) -> Vec<u8> {
    const BINARY: u8 = 1;
    const ASCII: u8 = 2;
    const UTF8: u8 = 3;
    const PORT: u8 = 0x10;
    const TARGET: u8 = 0x20;
    /// This descriptor names the port by way of iSCSI.
    const ISCSI_PORT: u8 = 0x90;
    let mut out = Vec::new();
    let mut descriptor = |code_set: u8, kind: u8, value: &[u8]| {
        let protocol = if kind & 0x80 != 0 { 0x50 } else { 0 };
        out.extend_from_slice(&[protocol | code_set, kind, 0, value.len() as u8]);
        out.extend_from_slice(value);
    };
    // NAA 3h, locally assigned: the first 60 bits of the identity.
    let mut naa = [0; 8];
    naa.copy_from_slice(&identity.ident[..8]);
    naa[0] = 0x30 | naa[0] & 0x0f;
    descriptor(BINARY, 0x03, &naa);
    let mut t10 = VENDOR.to_vec();
    t10.extend(
        identity
            .ident
            .iter()
            .flat_map(|byte| format!("{byte:02x}").into_bytes()),
    );
    descriptor(ASCII, 0x01, &t10);
    let [high, low] = group.get().to_be_bytes();
    // Relative target port, and target port group: each group has one port.
    descriptor(BINARY, PORT | 0x04, &[0, 0, high, low]);
    descriptor(BINARY, PORT | 0x05, &[0, 0, high, low]);
    let name = |text: String| {
        let mut name = text.into_bytes();
        name.truncate(248);
        name.resize((name.len() + 1).next_multiple_of(4), 0);
        name
    };
    descriptor(
        UTF8,
        ISCSI_PORT | 0x08,
        &name(format!("{},t,0x0001", identity.target)),
    );
    descriptor(UTF8, 0x80 | TARGET | 0x08, &name(identity.target.to_string()));
    out
}

/// Extended INQUIRY data (SPC-4 §7.8.7).
fn extended() -> Vec<u8> {
    let mut out = vec![0; 60];
    out[1] = 0x07; // HEADSUP, ORDSUP, SIMPSUP
    out[2] = 0x01; // V_SUP: a volatile cache
    out[3] = 0x01; // LUICLR
    out
}

/// What files, caches and deltas keep storage in, whatever a physical block is said to be: a smaller write costs a read, and a
/// smaller UNMAP gives nothing back (it still reads as zeroes).
const STORAGE_BYTES: u32 = 4096;

/// Block limits (SBC-3 §6.6.4).
fn block_limits(geometry: &Geometry) -> Vec<u8> {
    let block = u64::from(geometry.block_bytes);
    let blocks = |bytes: u64| (bytes / block) as u32;
    let mut out = vec![0; 60];
    out[0] = 0x01; // WSNZ: a WRITE SAME of 0 blocks is refused
    out[1] = max_compare_and_write_blocks(geometry);
    let granularity = geometry.physical_block_bytes.max(STORAGE_BYTES) / geometry.block_bytes;
    out[2..4].copy_from_slice(&(granularity as u16).to_be_bytes());
    out[4..8].copy_from_slice(&blocks(MAX_TRANSFER_BYTES).to_be_bytes());
    out[8..12].copy_from_slice(&blocks(1 << 20).to_be_bytes());
    out[12..16].copy_from_slice(&blocks(MAX_TRANSFER_BYTES).to_be_bytes());
    if geometry.thin {
        out[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
        out[20..24].copy_from_slice(&(MAX_UNMAP_DESCRIPTORS as u32).to_be_bytes());
        out[24..28].copy_from_slice(&granularity.to_be_bytes());
        out[28..32].copy_from_slice(&0x8000_0000u32.to_be_bytes()); // UGAVALID, alignment 0
    }
    out[32..40].copy_from_slice(&(MAX_WRITE_SAME_BYTES / block).to_be_bytes());
    out
}

/// A COMPARE AND WRITE locks its range, so it is small: the count has eight bits anyway.
pub fn max_compare_and_write_blocks(geometry: &Geometry) -> u8 {
    if geometry.block_bytes == 512 { 255 } else { 128 }
}

/// Block device characteristics (SBC-3 §6.6.2).
fn characteristics() -> Vec<u8> {
    let mut out = vec![0; 60];
    out[1] = 1; // not rotating
    out
}

/// Logical block provisioning (SBC-3 §6.6.6).
fn provisioning(geometry: &Geometry) -> Vec<u8> {
    match (geometry.thin, geometry.read_only) {
        (false, _) => vec![0, 0, 0, 0],
        // LBPU, LBPWS, LBPWS10, LBPRZ; thin.
        (true, false) => vec![0, 0xe4, 2, 0],
        // LBPU and LBPRZ. Holes are told, and UNMAP is known, as a thin unit must know one way; but WRITE SAME can give nothing
        // back where it can write nothing.
        (true, true) => vec![0, 0x84, 2, 0],
    }
}
