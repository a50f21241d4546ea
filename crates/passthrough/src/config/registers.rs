//! Registers in BARs that lead to config space past its rules, by vendor and generation; docs/register-space.md has the sources, what
//! else stands in the pages that are trapped, and what stays open.

use outboard_host_pci::{FunctionIdentity, HostBar, HostBarKind};
use outboard_pci::BAR_COUNT;
use std::ops::Range;

const NVIDIA: u16 = 0x10de;
const AMD: u16 = 0x1002;
const REALTEK: u16 = 0x10ec;
/// Base classes of display controllers and of processing accelerators (PCI Code and ID Assignment 1.4, 1.19).
const DISPLAY: u32 = 0x03;
const ACCELERATOR: u32 = 0x12;
/// NVIDIA's chip number: BOOT_0, at 0 of BAR 0, bits 28:20; an architecture is sixteen chips.
pub(crate) const BOOT_0: (usize, u64) = (0, 0);
const CHIP: u32 = 20;
const CHIP_MASK: u32 = 0x1ff;

/// What registers lead to, and so what becomes of the guest's accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// The function's own config space, from offset 0 on: accesses go by its rules.
    Config,
    /// Config space of another function: writes are dropped.
    Neighbour,
    /// A dword whose writes reach the real MSI-X table when masked they equal `value`: those are dropped.
    MsixPort {
        /// Bits that tell.
        mask: u32,
        /// What they then hold.
        value: u32,
    },
}

/// Registers in a BAR.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Registers {
    pub(crate) bar: usize,
    pub(crate) range: Range<u64>,
    pub(crate) meaning: Meaning,
}

/// A device, as far as rows tell devices apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Device<'a> {
    pub(crate) identity: FunctionIdentity,
    pub(crate) bars: &'a [Option<HostBar>; BAR_COUNT],
    /// What [`BOOT_0`] reads, if it could be read.
    pub(crate) boot: Option<u32>,
}

impl Device<'_> {
    fn is_gpu_of(&self, vendor: u16) -> bool {
        self.identity.vendor == vendor && matches!(self.identity.class >> 16, DISPLAY | ACCELERATOR)
    }

    /// Whether the generation can be told by [`BOOT_0`].
    pub(crate) fn has_boot_register(identity: FunctionIdentity) -> bool {
        identity.vendor == NVIDIA && matches!(identity.class >> 16, DISPLAY | ACCELERATOR)
    }

    /// An NVIDIA GPU of `chips`, or one whose generation nobody knows here: that gets every row.
    fn is_nvidia(&self, chips: &[Range<u32>]) -> bool {
        let chip =
            self.boot.filter(|boot| *boot != 0 && *boot != u32::MAX).map(|boot| boot >> CHIP & CHIP_MASK);
        let known = chip.filter(|chip| NVIDIA_KNOWN.contains(chip));
        self.is_gpu_of(NVIDIA) && known.is_none_or(|chip| chips.iter().any(|range| range.contains(&chip)))
    }

    /// What of its BARs must not be reached unfiltered.
    pub(crate) fn registers(&self) -> Vec<Registers> {
        let applies = |row: &&Row| (row.applies)(self) && self.has_memory(row.bar);
        let registers =
            |row: &Row| Registers { bar: row.bar, range: row.range.clone(), meaning: row.meaning };
        ROWS.iter().filter(applies).map(registers).collect()
    }

    /// Whether its I/O ports are an index and a data register for all of its other registers, those above too: they are kept from the
    /// guest then. Only firmware for PCs uses them.
    pub(crate) fn ports_lead_to_registers(&self) -> bool {
        self.is_gpu_of(NVIDIA) || self.is_gpu_of(AMD)
    }

    fn has_memory(&self, bar: usize) -> bool {
        self.bars[bar].is_some_and(|bar| bar.kind != HostBarKind::Io)
    }
}

/// NV4 to GB20x.
const NVIDIA_KNOWN: Range<u32> = 0x000..0x1c0;

/// A row of the table.
struct Row {
    #[cfg_attr(not(test), allow(dead_code))]
    name: &'static str,
    applies: fn(&Device<'_>) -> bool,
    bar: usize,
    range: Range<u64>,
    meaning: Meaning,
}

static ROWS: &[Row] = &[
    Row {
        name: "nvidia-pbus-pci",
        applies: |device| device.is_nvidia(&[0x000..0x050, 0x060..0x070]),
        bar: 0,
        range: 0x1800..0x1900,
        meaning: Meaning::Config,
    },
    Row {
        name: "nvidia-pcfg",
        applies: |device| device.is_nvidia(&[0x040..0x180, 0x190..0x1a0]),
        bar: 0,
        range: 0x8_8000..0x8_9000,
        meaning: Meaning::Config,
    },
    Row {
        name: "nvidia-pcfg-audio",
        applies: |device| device.is_nvidia(&[0x0a3..0x180, 0x190..0x1a0]),
        bar: 0,
        range: 0x8_a000..0x8_b000,
        meaning: Meaning::Neighbour,
    },
    Row {
        name: "nvidia-ep-pcfgm",
        applies: |device| device.is_nvidia(&[0x180..0x190, 0x1a0..0x1c0]),
        bar: 0,
        range: 0x9_2000..0x9_3000,
        meaning: Meaning::Config,
    },
    // Where the registers are in BAR 5, nobody has said that this is there.
    Row {
        name: "amd-bar2-config",
        applies: |device| device.is_gpu_of(AMD) && device.has_memory(2) && !device.has_memory(5),
        bar: 2,
        range: 0x4000..0x5000,
        meaning: Meaning::Config,
    },
    Row {
        name: "realtek-8168-msix",
        applies: |device| device.identity.vendor == REALTEK && device.identity.device == 0x8168,
        bar: 2,
        range: 0x74..0x78,
        meaning: Meaning::MsixPort { mask: 0x7fff_0000, value: 0x0001_0000 },
    },
];

#[cfg(test)]
mod tests {
    use super::*;
    use outboard_host_pci::PciAddress;

    const MEMORY: Option<HostBar> =
        Some(HostBar { kind: HostBarKind::Memory32 { prefetchable: false }, len: 16 << 20 });

    /// Names of the rows for a device with memory BARs 0 and 2, and with `registers` for a further one.
    fn rows(
        vendor: u16,
        device: u16,
        class: u32,
        boot: Option<u32>,
        registers: Option<usize>,
    ) -> Vec<&'static str> {
        let address = PciAddress { segment: 0, bus: 1, device: 0, function: 0 };
        let identity = FunctionIdentity { address, vendor, device, class, revision: 0 };
        let mut bars = [MEMORY, None, MEMORY, None, None, None];
        if let Some(bar) = registers {
            bars[bar] = MEMORY;
        }
        let device = Device { identity, bars: &bars, boot };
        let rows: Vec<&Row> = ROWS.iter().filter(|row| (row.applies)(&device)).collect();
        assert_eq!(device.registers().len(), rows.len());
        rows.into_iter().map(|row| row.name).collect()
    }

    fn nvidia(boot: u32) -> Vec<&'static str> {
        rows(NVIDIA, 0x2b85, 0x03_0000, Some(boot), None)
    }

    const OLD: &str = "nvidia-pbus-pci";
    const PCFG: &str = "nvidia-pcfg";
    const AUDIO: &str = "nvidia-pcfg-audio";
    const EP: &str = "nvidia-ep-pcfgm";

    #[test]
    fn b12_each_nvidia_generation_has_its_mirrors() {
        for (boot, expected) in [
            (0x2000_4000, &[OLD][..]),
            (0x0350_00a1, &[OLD]),
            (0x0490_00a1, &[OLD, PCFG]),
            (0x0670_00a2, &[OLD, PCFG]),
            (0x0500_00a1, &[PCFG]),
            (0x0a30_00a2, &[PCFG, AUDIO]),
            (0x0e40_00a2, &[PCFG, AUDIO]),
            (0x1340_00a1, &[PCFG, AUDIO]),
            (0x1620_00a1, &[PCFG, AUDIO]),
            (0x1720_00a1, &[PCFG, AUDIO]),
            (0x1920_00a1, &[PCFG, AUDIO]),
            (0x1800_00a1, &[EP]),
            (0x1a00_00a1, &[EP]),
            (0x1b20_00a1, &[EP]),
        ] {
            assert_eq!(nvidia(boot), expected, "{boot:#x}");
        }
    }

    #[test]
    fn b12_a_generation_that_nobody_knows_gets_every_row() {
        let all = [OLD, PCFG, AUDIO, EP];
        assert_eq!(nvidia(0x1c20_00a1), all);
        assert_eq!(nvidia(u32::MAX), all);
        assert_eq!(rows(NVIDIA, 0x2b85, 0x03_0200, None, None), all);
    }

    #[test]
    fn b12_other_functions_of_the_vendors_have_none() {
        assert!(rows(NVIDIA, 0x22e8, 0x04_0300, Some(0x1b20_00a1), None).is_empty());
        assert!(rows(0x8086, 0x100e, 0x02_0000, None, None).is_empty());
    }

    #[test]
    fn b12_amd_has_its_mirror_where_registers_are_in_bar_2() {
        assert_eq!(rows(AMD, 0x68f9, 0x03_0000, None, None), ["amd-bar2-config"]);
        assert!(rows(AMD, 0x744c, 0x03_0000, None, Some(5)).is_empty());
        assert!(rows(AMD, 0xab30, 0x04_0300, None, None).is_empty());
    }

    #[test]
    fn b12_realteks_port_to_its_msix_table() {
        assert_eq!(rows(REALTEK, 0x8168, 0x02_0000, None, None), ["realtek-8168-msix"]);
        assert!(rows(REALTEK, 0x8125, 0x02_0000, None, None).is_empty());
    }
}
