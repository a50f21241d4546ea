//! Offsets and bits of the standard header (PCIe 7.5.1) that more than one module needs.

/// COMMAND register.
pub const COMMAND: u16 = 0x04;
/// COMMAND: the function answers to its I/O BARs; a bridge forwards its I/O window.
pub const COMMAND_IO: u16 = 1 << 0;
/// COMMAND: the function answers to its memory BARs.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// COMMAND: the function may send requests, MSI among them.
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Bits of COMMAND that exist here besides those above: parity error response, SERR# enable, INTx disable.
pub(crate) const COMMAND_OTHER: u16 = 1 << 6 | 1 << 8 | 1 << 10;
/// STATUS, in the upper half of COMMAND's dword: a capability list is there.
pub(crate) const STATUS_CAP_LIST: u32 = 1 << (16 + 4);
/// STATUS: error bits, cleared by writing 1.
pub(crate) const STATUS_W1C: u32 = 0xf900 << 16;
/// First base address register.
pub const BAR0: u16 = 0x10;
/// Subsystem vendor ID (lower half), subsystem ID (upper half) of a type-0 header.
pub(crate) const SUBSYSTEM: u16 = 0x2c;
/// Capabilities pointer.
pub const CAP_POINTER: u16 = 0x34;
/// Interrupt line and pin.
pub(crate) const INTERRUPT_LINE: u16 = 0x3c;
/// Capability ID of PCI Express.
pub const CAP_ID_PCIE: u8 = 0x10;
/// Capability ID of MSI-X.
pub const CAP_ID_MSIX: u8 = 0x11;
/// Capability ID of vendor-specific capabilities.
pub const CAP_ID_VENDOR: u8 = 0x09;
/// Capability ID of MSI.
pub(crate) const CAP_ID_MSI: u8 = 0x05;
