//! What a command comes to: a finished answer, or I/O for the target to carry out.

use super::sense::Sense;

/// What a command comes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Status GOOD and nothing else.
    Good,
    /// Data for the initiator, cut to the allocation length, and GOOD.
    Data(Vec<u8>),
    /// CHECK CONDITION.
    Check(Sense),
    /// RESERVATION CONFLICT.
    Conflict,
    /// Read from the device for the initiator.
    Read {
        /// First byte.
        offset: u64,
        /// Length in bytes, at most [`MAX_TRANSFER_BYTES`].
        bytes: u64,
    },
    /// Take data from the initiator, then do something with them.
    Out {
        /// How many bytes the CDB calls for.
        bytes: u64,
        /// What to do.
        then: OutAction,
    },
    /// Make all writes before it durable.
    Flush,
    /// Read and drop.
    Verify {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        bytes: u64,
    },
    /// Look whether the device can be read.
    SelfTest,
    /// Give the range back, so that it reads as zeroes.
    Discard {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        bytes: u64,
    },
    /// Tell how a range is provisioned.
    LbaStatus {
        /// First byte.
        offset: u64,
        /// ALLOCATION LENGTH.
        allocation: u32,
    },
}

/// What is done with data from the initiator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutAction {
    /// Write them.
    Write {
        /// First byte.
        offset: u64,
        /// Answer only when they are durable.
        durable: bool,
        /// Read them back and compare.
        verify: bool,
    },
    /// Compare the device with them.
    Compare {
        /// First byte.
        offset: u64,
        /// How much of the device to compare.
        bytes: u64,
        /// The data are one block, to compare with each.
        repeated: bool,
    },
    /// Compare with the first half; if equal, write the second.
    CompareAndWrite {
        /// First byte.
        offset: u64,
        /// Length in bytes of each half.
        bytes: u64,
        /// Answer only when durable.
        durable: bool,
    },
    /// OR them to what is there.
    OrWrite {
        /// First byte.
        offset: u64,
        /// Answer only when durable.
        durable: bool,
    },
    /// Write one block over and over.
    WriteSame {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        bytes: u64,
        /// A block of zeroes may become a hole.
        unmap: bool,
        /// Answer only when durable.
        durable: bool,
    },
    /// Give ranges back; the parameter list is parsed by [`LogicalUnit::unmap_ranges`].
    Unmap,
    /// Parameters of MODE SELECT.
    ModeSelect {
        /// The ten-byte form.
        long: bool,
    },
    /// Parameters of PERSISTENT RESERVE OUT.
    Reserve {
        /// Service action.
        action: u8,
        /// SCOPE.
        scope: u8,
        /// TYPE.
        kind: u8,
    },
}
