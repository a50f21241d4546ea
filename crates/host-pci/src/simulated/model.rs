use crate::{HostBar, HostBarKind, IoPorts};

/// What a simulated device is: its config space, BARs and ROM. A description that makes no sense is taken as it is.
#[derive(Clone, Debug)]
pub struct Model {
    pub(super) config: Vec<u8>,
    /// Bits of config space that a write changes.
    pub(super) writable: Vec<u8>,
    pub(super) bars: [Option<HostBar>; 6],
    pub(super) io_ports: IoPorts,
    pub(super) rom: Option<Vec<u8>>,
    /// Contents of BARs at the start: BAR, offset, dword.
    pub(super) contents: Vec<(usize, u64, u32)>,
    /// BAR 0 takes the commands in [`super::registers`].
    pub(super) commands: bool,
    /// Offset of the capability and of the extended capability that the next one is linked from.
    last: u8,
    last_extended: u16,
}

/// Addresses that the host gave its BARs.
const FIRST_BAR_ADDRESS: u32 = 0x8000_0000;
const FIRST_PORT: u32 = 0x1000;

impl Model {
    /// An endpoint without BARs or capabilities, 4 KiB of config space (`class` are class, subclass and interface).
    pub fn new(vendor: u16, device: u16, class: u32, revision: u8) -> Self {
        let mut model = Self {
            config: vec![0; 4096],
            writable: vec![0; 4096],
            bars: [None; 6],
            io_ports: IoPorts::None,
            rom: None,
            contents: vec![],
            commands: false,
            last: 0x34,
            last_extended: 0,
        };
        model.set(0x00, &vendor.to_le_bytes());
        model.set(0x02, &device.to_le_bytes());
        // Memory decode is on, as the host's kernel leaves it.
        model.set(0x04, &[0x02, 0]);
        model.set(0x08, &(class << 8 | u32::from(revision)).to_le_bytes());
        // Command (all that PCIe 7.5.1.1.3 defines), cache line and latency, interrupt line.
        model.writable[0x04..0x06].copy_from_slice(&[0x47, 0x05]);
        model.writable[0x0c..0x0e].copy_from_slice(&[0xff, 0xff]);
        model.writable[0x3c] = 0xff;
        model
    }

    /// Maker and number of the card.
    pub fn subsystem(mut self, vendor: u16, device: u16) -> Self {
        self.set(0x2c, &vendor.to_le_bytes());
        self.set(0x2e, &device.to_le_bytes());
        self
    }

    /// One of several functions of its slot.
    pub fn multifunction(mut self) -> Self {
        self.config[0x0e] |= 0x80;
        self
    }

    /// A conventional device: 256 bytes of config space.
    pub fn conventional(mut self) -> Self {
        self.config.truncate(256);
        self.writable.truncate(256);
        self
    }

    /// An interrupt pin.
    pub fn pin(mut self) -> Self {
        self.config[0x3d] = 1;
        self
    }

    /// BAR `index`, below 6; its register holds an address as the host would give it.
    pub fn bar(mut self, index: usize, kind: HostBarKind, len: u64) -> Self {
        self.bars[index] = Some(HostBar { kind, len });
        let (bits, prefetchable) = match kind {
            HostBarKind::Io => (1, false),
            HostBarKind::Memory32 { prefetchable } => (0, prefetchable),
            HostBarKind::Memory64 { prefetchable } => (4, prefetchable),
        };
        let address = if kind == HostBarKind::Io { FIRST_PORT } else { FIRST_BAR_ADDRESS };
        if kind == HostBarKind::Io {
            self.io_ports = IoPorts::Reachable;
            // I/O decode is on, too.
            self.config[0x04] |= 1;
        }
        let at = 0x10 + 4 * index;
        self.set(at, &(address | bits | u32::from(prefetchable) << 3).to_le_bytes());
        if matches!(kind, HostBarKind::Memory64 { .. }) && index < 5 {
            // Above 4 GiB, each in a place of its own.
            self.set(at + 4, &(0x40 + index as u32).to_le_bytes());
        }
        self
    }

    /// A host that lets no guest at its I/O ports, for the reason that `ports` says.
    pub fn io_ports(mut self, ports: IoPorts) -> Self {
        self.io_ports = ports;
        self
    }

    /// A dword that BAR `bar` reads at `offset`.
    pub fn content(mut self, bar: usize, offset: u64, value: u32) -> Self {
        self.contents.push((bar, offset, value));
        self
    }

    /// A capability at `at`, linked behind the last one; `body` follows its ID and pointer.
    pub fn capability(mut self, id: u8, at: u8, body: &[u8]) -> Self {
        self.config[0x06] |= 0x10;
        // The pointer in the header is a byte of its own; that of a capability is its second.
        let pointer = if self.last == 0x34 { 0x34 } else { usize::from(self.last) + 1 };
        self.config[pointer] = at;
        self.set(at.into(), &[id, 0]);
        self.set(usize::from(at) + 2, body);
        self.last = at;
        self
    }

    /// An extended capability at `at`, linked behind the last one, the first at 0x100; `body` follows its header.
    pub fn extended(mut self, id: u16, version: u8, at: u16, body: &[u8]) -> Self {
        if self.last_extended != 0 {
            let pointer = usize::from(self.last_extended) + 2;
            let link = u16::from_le_bytes([self.config[pointer], self.config[pointer + 1]]) & 0xf;
            self.set(pointer, &(link | at << 4).to_le_bytes());
        }
        self.set(at.into(), &(u32::from(id) | u32::from(version) << 16).to_le_bytes());
        self.set(usize::from(at) + 4, body);
        self.last_extended = at;
        self
    }

    /// Lets a write change the bits of `mask` from `at` on.
    pub fn writable(mut self, at: usize, mask: &[u8]) -> Self {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
        self
    }

    /// Any bytes anywhere in config space: how a broken device is made.
    pub fn raw(mut self, at: usize, bytes: &[u8]) -> Self {
        self.set(at, bytes);
        self
    }

    /// An expansion ROM.
    pub fn rom(mut self, image: Vec<u8>) -> Self {
        self.rom = Some(image);
        self
    }

    /// Lets BAR 0 take the commands of [`super::registers`].
    pub fn commands(mut self) -> Self {
        self.commands = true;
        self
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        self.config[at..at + bytes.len()].copy_from_slice(bytes);
    }
}
