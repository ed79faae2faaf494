//! What the kernel and other programs may report of device-mapper devices: names, tables, status lines.

use treeboot_dm::{DmDevice, Table};

/// Whatever parses as a table or a name prints to what parses to the same.
pub fn text(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(table) = text.parse::<Table>() {
        let printed = table.to_string();
        assert_eq!(printed.parse::<Table>().as_ref(), Ok(&table), "{printed}");
    }
    if let Ok(device) = text.parse::<DmDevice>() {
        assert_eq!(device.to_string(), text);
    }
    // "kind status": as a status line has it after its sectors.
    let (kind, rest) = text.split_once(' ').unwrap_or((text, ""));
    let _ = treeboot_dm::status::Status::parse(kind, rest);
}
