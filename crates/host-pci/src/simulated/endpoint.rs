use super::Model;
use crate::HostBarKind;

/// What BAR 0 of [`endpoint`] understands: dwords and quadwords, written and read by calls, as the BAR is too small to be mapped.
pub mod registers {
    /// Vendor and device ID of the endpoint.
    pub const IDS: (u16, u16) = (0x1234, 0x0b0d);
    /// Reads [`MAGIC`].
    pub const ID: u64 = 0x00;
    /// What [`ID`] reads.
    pub const MAGIC: u32 = 0x6f75_7462;
    /// Bus address to copy from, 8 bytes.
    pub const FROM: u64 = 0x08;
    /// Bus address to copy to, 8 bytes.
    pub const TO: u64 = 0x10;
    /// Bytes to copy, at most 64 KiB.
    pub const LEN: u64 = 0x18;
    /// Vector to fire.
    pub const VECTOR: u64 = 0x1c;
    /// A write starts a command; reads as 0 once it is done.
    pub const COMMAND: u64 = 0x20;
    /// 1 if the last copy met an address that was not mapped, or bus master was off.
    pub const FAILED: u64 = 0x24;
    /// Command: copy by DMA.
    pub const COPY: u32 = 1;
    /// Command: fire the vector.
    pub const FIRE: u32 = 2;
    /// Command: raise the pin.
    pub const RAISE: u32 = 3;
    /// Command: lower the pin.
    pub const LOWER: u32 = 4;
}

/// A plain PCIe endpoint with one of everything: a small BAR with [`registers`], a large one of plain memory, one with an MSI-X table
/// of 16 vectors and its pending bits in pages of their own, I/O ports, MSI with 4 vectors, a pin, FLR, AER, a ROM.
pub fn endpoint() -> Model {
    let mut rom = vec![0; 2048];
    rom[..3].copy_from_slice(&[0x55, 0xaa, 4]);
    Model::new(registers::IDS.0, registers::IDS.1, 0xff_0000, 1)
        .subsystem(0x1234, 1)
        .pin()
        .bar(0, HostBarKind::Memory32 { prefetchable: false }, 4 << 10)
        .bar(1, HostBarKind::Memory32 { prefetchable: false }, 128 << 10)
        .bar(2, HostBarKind::Memory64 { prefetchable: true }, 1 << 20)
        .bar(4, HostBarKind::Io, 32)
        .content(0, registers::ID, registers::MAGIC)
        .content(1, 0, 0x1111_1111)
        .content(2, 0, 0x2222_2222)
        // Power management version 3, D3hot keeps state (PCIe 7.5.2).
        .capability(0x01, 0x40, &[0x03, 0x00, 0x08, 0x00, 0x00, 0x00])
        .writable(0x44, &[0x03, 0x01])
        // 4 vectors, 64-bit address, maskable (PCIe 7.7.1).
        .capability(0x05, 0x50, &[0x84, 0x01])
        .writable(0x52, &[0x71, 0x00, 0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff])
        // Endpoint, version 2; FLR; payload up to 256 (PCIe 7.5.3).
        .capability(
            0x10,
            0x70,
            &[0x02, 0x00, 0x01, 0x80, 0x00, 0x10, 0x10, 0x28, 0x00, 0x00, 0x11, 0x04, 0x00, 0x00],
        )
        .writable(0x78, &[0xff, 0x7f])
        .writable(0x80, &[0xc3, 0x01])
        // 16 vectors; table at 0x8000 and pending bits at 0xc000 of BAR 1 (PCIe 7.7.2).
        .capability(0x11, 0xb0, &[0x0f, 0x00, 0x01, 0x80, 0x00, 0x00, 0x01, 0xc0, 0x00, 0x00])
        .writable(0xb3, &[0xc0])
        .extended(0x0001, 2, 0x100, &[0; 0x44])
        .extended(0x0003, 1, 0x148, &[1, 2, 3, 4, 5, 6, 7, 8])
        .rom(rom)
        .commands()
}
