//! The published version-2 protocol (`dart-and-dma.md` 1.1 and 1.2), so that a guest with the reference module works.

use crate::registers::constants;

constants! { CONSTANTS:
    /// PCI vendor.
    PUBLISHED_PCI_VENDOR: u16 = 0x1b36;
    /// PCI device id.
    PUBLISHED_PCI_DEVICE: u16 = 0x0015;
    /// Bytes of BAR 0; 32-bit accesses only.
    PUBLISHED_BAR_BYTES: u32 = 0x1000;
    /// R: [`PUBLISHED_VERSION_VALUE`].
    PUBLISHED_VERSION: u32 = 0x00;
    /// What it reads, in both layouts.
    PUBLISHED_VERSION_VALUE: u32 = 2;
    /// R: bus number in bits 15:8, device and function number in bits 7:0 of the served function.
    PUBLISHED_MANAGED_BDF: u32 = 0x04;
    /// R: most entries of a command.
    PUBLISHED_MAX_ENTRIES: u32 = 0x08;
    /// What it reads.
    PUBLISHED_MAX_ENTRIES_VALUE: u32 = 4096;
    /// R: result of the last doorbell.
    PUBLISHED_STATUS: u32 = 0x0c;
    /// W: guest-physical address of the command page, low half.
    PUBLISHED_CMD_LO: u32 = 0x10;
    /// W: the same, high half.
    PUBLISHED_CMD_HI: u32 = 0x14;
    /// W: any value runs the command.
    PUBLISHED_DOORBELL: u32 = 0x18;
    /// Bytes of the command page: u32 type, u32 count, u32 status, u32 reserved, u64 requests, u64 responses.
    PUBLISHED_CMD_BYTES: u32 = 32;
    /// In the command page: where the device writes the status.
    PUBLISHED_CMD_STATUS: u32 = 0x08;
    /// Command: map.
    PUBLISHED_MAP: u32 = 1;
    /// Command: unmap.
    PUBLISHED_UNMAP: u32 = 2;
    /// Status: every entry succeeded.
    PUBLISHED_OK: u32 = 0;
    /// Status: an entry failed.
    PUBLISHED_IOERR: u32 = 1;
    /// Status: the command is malformed, no entry was touched.
    PUBLISHED_INVAL: u32 = 3;
}

/// The two layouts that exist under one version number. A command cannot say which one it is in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// 32-bit lengths: map requests of 16 bytes, responses of 24.
    #[default]
    A,
    /// 64-bit lengths, packed: map requests of 20 bytes, responses of 28.
    B,
}
