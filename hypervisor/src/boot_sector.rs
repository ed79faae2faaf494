//! A guest of 512 bytes: enough to see that a processor is emulated rightly, small enough to carry along.
//!
//! It lets the firmware's timer wake it twice (interrupts work), sets up page tables, enters 64-bit mode as every kernel
//! does, writes [`READY`] to the serial port, leaves through `isa-debug-exit` where that device is there, and halts.

/// What the guest writes to its serial port, without the line's end.
pub(crate) const READY: &str = "treeboot: probe is up";

/// Exit status of QEMU when the guest left through `isa-debug-exit` at port 0xf4: `(0x10 << 1) | 1`.
pub(crate) const EXIT_STATUS: i32 = 33;

/// Bytes of a disk that holds the guest: SeaBIOS finds no geometry on one of a single sector.
pub(crate) const DISK_BYTES: usize = 1024 * 1024;

/// The first sector. Machine code in the order of its listing; the program counter starts at 0x7c00.
#[rustfmt::skip]
const CODE: &[u8] = &[
    0xfa, 0xfc,                                     // cli; cld
    0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, // ax = ds = es = ss = 0
    0xbc, 0x00, 0x7c,                               // mov sp, 0x7c00
    0xfb, 0xf4, 0xf4, 0xfa,                         // sti; hlt; hlt; cli: two ticks of the timer
    0xbf, 0x00, 0x10, 0xb9, 0x00, 0x18, 0xf3, 0xab, // zero 0x1000..0x4000, the page tables
    0xc7, 0x06, 0x00, 0x10, 0x03, 0x20,             // PML4[0] = 0x2003
    0xc7, 0x06, 0x00, 0x20, 0x03, 0x30,             // PDPT[0] = 0x3003
    0xc7, 0x06, 0x00, 0x30, 0x83, 0x00,             // PD[0] = the first 2 MiB
    0x0f, 0x20, 0xe0, 0x0c, 0x20, 0x0f, 0x22, 0xe0, // cr4 |= PAE
    0x66, 0xb8, 0x00, 0x10, 0x00, 0x00,             // mov eax, 0x1000
    0x0f, 0x22, 0xd8,                               // cr3 = eax
    0x66, 0xb9, 0x80, 0x00, 0x00, 0xc0,             // ecx = EFER
    0x0f, 0x32, 0x0d, 0x00, 0x01, 0x0f, 0x30,       // EFER |= LME
    0x0f, 0x01, 0x16, 0x8a, 0x7c,                   // lgdt [0x7c8a]
    0x0f, 0x20, 0xc0, 0x66, 0x0d, 0x01, 0x00, 0x00, 0x80, 0x0f, 0x22, 0xc0, // cr0 |= PG | PE
    0xea, 0x5f, 0x7c, 0x08, 0x00,                   // ljmp 8:0x7c5f, into 64-bit mode
    0xbe, 0x90, 0x7c, 0x00, 0x00,                   // mov esi, 0x7c90
    0xac, 0x84, 0xc0, 0x74, 0x07,                   // next: lodsb; test al, al; jz done
    0x66, 0xba, 0xf8, 0x03, 0xee, 0xeb, 0xf4,       // dx = COM1; out dx, al; jmp next
    0x66, 0xba, 0xf4, 0x00, 0xb0, 0x10, 0xee,       // done: out 0xf4, 0x10
    0xf4, 0xeb, 0xfd,                               // hlt, for ever
    0, 0, 0, 0, 0, 0, 0, 0,                         // the descriptor table: null,
    0x00, 0x00, 0x00, 0x00, 0x00, 0x9a, 0x20, 0x00, // 64-bit code
    0x0f, 0x00, 0x7a, 0x7c, 0x00, 0x00,             // its limit and address
];

/// A disk of [`DISK_BYTES`] that boots the guest.
pub(crate) fn disk() -> Vec<u8> {
    let mut disk = vec![0; DISK_BYTES];
    disk[..CODE.len()].copy_from_slice(CODE);
    let text = format!("{READY}\r\n");
    disk[CODE.len()..CODE.len() + text.len()].copy_from_slice(text.as_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_begins_where_the_code_looks_for_it() {
        assert_eq!(0x7c00 + CODE.len(), 0x7c90);
        assert_eq!(disk().len(), DISK_BYTES);
    }
}
