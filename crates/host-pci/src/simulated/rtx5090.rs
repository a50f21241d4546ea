use super::Model;
use crate::HostBarKind;

/// The outside of a GeForce RTX 5090: its graphics function and, beside it, its audio function. What is known of it is in the
/// project's facts, `dart-and-dma.md` 6.1 to 6.3; what is not known (MSI-X) is left out.
pub fn rtx5090() -> [Model; 2] {
    [graphics(), audio()]
}

/// PCIe capability, version 2, Legacy Endpoint, payload up to 256 bytes, FLR, x16 at 32 GT/s (PCIe 7.5.3).
const LEGACY_ENDPOINT: [u8; 0x3a] = {
    let mut body = [0; 0x3a];
    // Capabilities; device capabilities; device control and status.
    (body[0x00], body[0x02], body[0x05]) = (0x12, 0x01, 0x10);
    (body[0x06], body[0x07]) = (0x10, 0x28);
    // Link capabilities and status; second link capabilities: speeds 1 to 5.
    (body[0x0a], body[0x0b], body[0x10], body[0x11]) = (0x05, 0x0d, 0x05, 0x11);
    body[0x2a] = 0x3e;
    body
};

fn graphics() -> Model {
    let mut rom = vec![0; 512 << 10];
    rom[..3].copy_from_slice(&[0x55, 0xaa, 0x80]);
    common(Model::new(0x10de, 0x2b85, 0x03_0000, 0xa1))
        .bar(0, HostBarKind::Memory32 { prefetchable: false }, 64 << 20)
        .bar(1, HostBarKind::Memory64 { prefetchable: true }, 256 << 20)
        .bar(3, HostBarKind::Memory64 { prefetchable: true }, 32 << 20)
        .bar(5, HostBarKind::Io, 128)
        // BOOT_0: architecture 0x1B, implementation 2, revision A1.
        .content(0, 0, 0x1b20_00a1)
        // Virtual channel first (0x100 is where the chain begins); resizable BAR: BAR 1, 64 MiB to 32 GiB, at 256 MiB now, its capability
        // register at 0x138; AER, its status at 0x1bc.
        .extended(0x0002, 1, 0x100, &[0; 0x1c])
        .extended(0x0015, 1, 0x134, &[0x00, 0xfc, 0x0f, 0x00, 0x21, 0x08, 0x00, 0x00])
        .extended(0x0001, 2, 0x1b8, &[0; 0x44])
        .rom(rom)
}

fn audio() -> Model {
    common(Model::new(0x10de, 0x22e8, 0x04_0300, 0xa1))
        .bar(0, HostBarKind::Memory32 { prefetchable: false }, 16 << 10)
        .extended(0x0001, 2, 0x100, &[0; 0x44])
}

fn common(model: Model) -> Model {
    model
        .multifunction()
        .subsystem(0x10de, 0x2057)
        .pin()
        // Version 3, keeps its state in D3hot.
        .capability(0x01, 0x40, &[0x03, 0x00, 0x08, 0x00, 0x00, 0x00])
        .writable(0x44, &[0x03, 0x01])
        // 16 vectors, maskable, 64-bit.
        .capability(0x05, 0x48, &[0x88, 0x01])
        .writable(0x4a, &[0x71, 0x00, 0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff])
        .capability(0x10, 0x60, &LEGACY_ENDPOINT)
        .writable(0x68, &[0xff, 0x7f])
        .writable(0x70, &[0xc3, 0x01])
}
