//! The loop driver's ioctls (kernel `include/uapi/linux/loop.h`), the only `unsafe` of this crate.

use std::ffi::c_void;
use std::fs::File;
use std::os::fd::AsRawFd as _;

use rustix::io::{Errno, Result};
use rustix::ioctl::{Ioctl, IoctlOutput, NoArg, Opcode, Setter, Updater, ioctl};

const LOOP_CLR_FD: Opcode = 0x4C01;
const LOOP_GET_STATUS64: Opcode = 0x4C05;
const LOOP_SET_CAPACITY: Opcode = 0x4C07;
const LOOP_CONFIGURE: Opcode = 0x4C0A;
const LOOP_CTL_GET_FREE: Opcode = 0x4C82;

const READ_ONLY: u32 = 1;
const DIRECT_IO: u32 = 16;

/// Room for a name, its closing zero included.
pub(super) const NAME_BYTES: usize = 64;

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; NAME_BYTES],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

impl Info {
    const EMPTY: Self = Self {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; NAME_BYTES],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
}

/// How a device reads its file.
#[derive(Debug, Clone, Copy)]
pub(super) enum Way {
    /// Past the page cache; 0 blocks: of the driver's own choice.
    Direct { block_bytes: u32 },
    /// Through it.
    PageCache { block_bytes: u32 },
}

/// How a file becomes a device.
pub(super) struct Settings {
    pub(super) offset: u64,
    pub(super) read_only: bool,
    pub(super) way: Way,
    /// Shorter than [`NAME_BYTES`].
    pub(super) name: Vec<u8>,
}

/// What a device says of itself.
pub(super) struct Status {
    pub(super) offset: u64,
    pub(super) read_only: bool,
    pub(super) direct: bool,
    pub(super) name: Vec<u8>,
}

/// The index of a device that nobody uses; it is made where there is none.
pub(super) fn get_free(control: &File) -> Result<u32> {
    // SAFETY: LOOP_CTL_GET_FREE takes no argument and answers with a number, as `GetFree` says.
    let index = unsafe { ioctl(control, GetFree) }?;
    u32::try_from(index).map_err(|_| Errno::RANGE)
}

/// Gives the device its file; all settings take effect at once. `BUSY` where it has one.
pub(super) fn configure(device: &File, backing: &File, settings: &Settings) -> Result<()> {
    let (direct, block_size) = match settings.way {
        Way::Direct { block_bytes } => (DIRECT_IO, block_bytes),
        Way::PageCache { block_bytes } => (0, block_bytes),
    };
    let mut info = Info {
        offset: settings.offset,
        flags: direct | if settings.read_only { READ_ONLY } else { 0 },
        ..Info::EMPTY
    };
    let room = &mut info.file_name[..NAME_BYTES - 1];
    for (to, from) in room.iter_mut().zip(&settings.name) {
        *to = *from;
    }
    let config = Config {
        fd: u32::try_from(backing.as_raw_fd()).map_err(|_| Errno::BADF)?,
        block_size,
        info,
        reserved: [0; 8],
    };
    // SAFETY: LOOP_CONFIGURE reads one `struct loop_config`, which `Config` is laid out as; the descriptor in it is open
    // for the whole call, because `backing` is borrowed.
    unsafe { ioctl(device, Setter::<LOOP_CONFIGURE, Config>::new(config)) }
}

/// The device's settings; `NXIO` where it has no file.
pub(super) fn status(device: &File) -> Result<Status> {
    let mut info = Info::EMPTY;
    // SAFETY: LOOP_GET_STATUS64 writes one `struct loop_info64`, which `Info` is laid out as; every bit pattern of it is valid.
    unsafe { ioctl(device, Updater::<'_, LOOP_GET_STATUS64, Info>::new(&mut info)) }?;
    Ok(Status {
        offset: info.offset,
        read_only: info.flags & READ_ONLY != 0,
        direct: info.flags & DIRECT_IO != 0,
        name: info.file_name.into_iter().take_while(|&byte| byte != 0).collect(),
    })
}

/// Takes the file's present size.
pub(super) fn set_capacity(device: &File) -> Result<()> {
    // SAFETY: LOOP_SET_CAPACITY takes no argument.
    unsafe { ioctl(device, NoArg::<LOOP_SET_CAPACITY>::new()) }
}

/// Takes the file away; `NXIO` where there is none.
pub(super) fn clear(device: &File) -> Result<()> {
    // SAFETY: LOOP_CLR_FD takes no argument.
    unsafe { ioctl(device, NoArg::<LOOP_CLR_FD>::new()) }
}

/// LOOP_CTL_GET_FREE, whose answer is what the call returns.
struct GetFree;

// SAFETY: the call has no argument (a null pointer is handed on and never read), changes no memory of ours, and its return
// value is the output.
unsafe impl Ioctl for GetFree {
    type Output = IoctlOutput;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        LOOP_CTL_GET_FREE
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> Result<IoctlOutput> {
        Ok(output)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structures_have_the_kernels_sizes() {
        assert_eq!((size_of::<Info>(), size_of::<Config>()), (232, 304));
    }
}
