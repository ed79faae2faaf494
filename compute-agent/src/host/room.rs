//! How much room VMs' writes have, and the alarm before it ends.
//!
//! A VM that finds no room stands still and is resumed until there is some; nothing is lost. Whoever runs the host is to know before that.

use std::path::Path;
use std::time::Duration;

use super::Host;

/// Between two looks.
const PERIOD: Duration = Duration::from_secs(5);
/// A file system that hangs is not waited for.
const LOOK_LIMIT: Duration = Duration::from_secs(2);
/// Low: less than a tenth is free, and less than 10 GiB.
const LOW: (u64, u64) = (10, 10 << 30);
/// Full: less than a hundredth is free, and less than 256 MiB.
const FULL: (u64, u64) = (100, 256 << 20);

/// How far it is from full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RoomLevel {
    /// Far.
    Enough,
    /// Somebody should make room.
    Low,
    /// VMs that write new blocks stand still, or soon will.
    Full,
}

/// The file system of this host's deltas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Bytes that may still be written.
    pub free_bytes: u64,
    /// Its size in bytes.
    pub size_bytes: u64,
}

impl Room {
    fn look(dir: &Path) -> rustix::io::Result<Self> {
        let found = rustix::fs::statvfs(dir)?;
        Ok(Self {
            free_bytes: found.f_bavail.saturating_mul(found.f_frsize),
            size_bytes: found.f_blocks.saturating_mul(found.f_frsize),
        })
    }

    /// How far it is from full.
    pub fn level(&self) -> RoomLevel {
        let below = |(part, bytes): (u64, u64)| self.free_bytes < (self.size_bytes / part).min(bytes);
        match (below(FULL), below(LOW)) {
            (true, _) => RoomLevel::Full,
            (false, true) => RoomLevel::Low,
            (false, false) => RoomLevel::Enough,
        }
    }
}

impl Host {
    /// How much room VMs' writes had a moment ago; `None` where the file system does not say.
    pub fn room(&self) -> Option<Room> {
        *self.shared.room.lock()
    }

    /// Looks again and again, one look at a time, so that a file system that hangs costs one thread; logs whenever it comes nearer to full,
    /// and when there is room again.
    pub(super) async fn watch_room(&self) {
        let mut level = RoomLevel::Enough;
        loop {
            let dir = self.shared.settings.deltas_dir.clone();
            let mut look = tokio::task::spawn_blocking(move || Room::look(&dir));
            let seen = tokio::select! {
                () = self.shared.stop.cancelled() => return,
                seen = tokio::time::timeout(LOOK_LIMIT, &mut look) => seen,
            };
            let room = match seen {
                Ok(room) => room,
                Err(_) => {
                    *self.shared.room.lock() = None;
                    tokio::select! {
                        () = self.shared.stop.cancelled() => return,
                        room = look => room,
                    }
                }
            };
            let room = room.ok().and_then(Result::ok);
            *self.shared.room.lock() = room;
            level = room.map_or(level, |room| self.tell(room, level));
            tokio::select! {
                () = self.shared.stop.cancelled() => return,
                () = tokio::time::sleep(PERIOD) => {}
            }
        }
    }

    /// A line in the log where the level is another than before.
    fn tell(&self, room: Room, before: RoomLevel) -> RoomLevel {
        let (dir, free_bytes) = (self.shared.settings.deltas_dir.display(), room.free_bytes);
        let level = room.level();
        match level {
            _ if level == before => {}
            RoomLevel::Enough => tracing::info!(%dir, free_bytes, "there is room for VMs' writes again"),
            RoomLevel::Low => tracing::warn!(
                %dir, free_bytes,
                "little room is left for VMs' writes; destroy VMs or snapshots that nobody needs, or make the file system larger"
            ),
            RoomLevel::Full => tracing::error!(
                %dir, free_bytes,
                "no room is left for VMs' writes: VMs stand still until there is; destroy VMs or snapshots that nobody needs, or make the file \
                 system larger"
            ),
        }
        level
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_file_system_is_not_low_while_there_is_much_and_a_small_one_not_while_there_is_a_part() {
        const GIB: u64 = 1 << 30;
        for (free_bytes, size_bytes, level) in [
            (11 * GIB, 10_000 * GIB, RoomLevel::Enough),
            (9 * GIB, 10_000 * GIB, RoomLevel::Low),
            (255 << 20, 10_000 * GIB, RoomLevel::Full),
            (2 * GIB, 10 * GIB, RoomLevel::Enough),
            (GIB / 2, 10 * GIB, RoomLevel::Low),
            (GIB / 20, 10 * GIB, RoomLevel::Full),
            (0, 10 * GIB, RoomLevel::Full),
        ] {
            let room = Room {
                free_bytes,
                size_bytes,
            };
            assert_eq!(room.level(), level, "{room:?}");
        }
        assert!(Room::look(Path::new("/")).unwrap().size_bytes > 0);
    }
}
