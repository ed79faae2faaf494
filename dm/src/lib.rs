//! device-mapper for treeboot: one grammar of names, typed tables and status, the ioctls, loop devices.
//!
//! A table is built as values, printed once for the kernel and parsed back from what the kernel reports, so that
//! wanted and found can be compared. Deliberately absent: running `dmsetup`, and anything that knows images or
//! iSCSI beyond their names.
//!
//! | module | holds | needs `kernel-plane` |
//! | --- | --- | --- |
//! | [`name`] | the grammar of names: [`DmDevice`] | no |
//! | [`table`] | tables: [`Table`], [`Line`], [`Target`] | no |
//! | [`status`] | what targets report of themselves: [`Status`] | no |
//! | `ioctl` | `Mapper`: make, change, remove and ask for devices | yes |
//! | [`loops`] | files as block devices | no |
//! | [`bcache`] | superblocks; `Bcache`: register, attach, stop, tune | for `Bcache` |
//! | [`group`] | the cache group: ranges, state, pace; `Group` and `Filler` | for these two |
//!
//! Everything that talks to the kernel blocks and has no time limit of its own: call it in `spawn_blocking`, with a limit
//! around it. A call that hangs has a device below that hangs; it ends when that does.

pub mod bcache;
pub mod group;
pub mod name;
pub mod status;
pub mod table;
mod unit;

#[cfg(feature = "kernel-plane")]
pub mod ioctl;
#[cfg(feature = "kernel-plane")]
mod log;
pub mod loops;
mod missing;

#[cfg(feature = "kernel-plane")]
pub use ioctl::{Mapper, MapperError, Outcome, Seen};
pub use missing::Missing;
pub use name::DmDevice;
pub use status::{Status, StatusLine};
pub use table::{Line, Table, TableError, Target};
pub use unit::{DeviceNumber, Mode, Sectors};
