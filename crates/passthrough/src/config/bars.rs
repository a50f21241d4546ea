//! BARs and expansion ROM: what they are, where the guest has put them, and which parts of them can be mapped.

use super::Table;
use super::table::{Dword, HIDDEN};
use outboard_host_pci::{GRANULE, HostBar, HostBarKind};
use outboard_pci::{BAR_COUNT, BarRange, Decoded, ROM_BAR, Space, regs};
use std::ops::Range;

/// Expansion ROM base address register of a type-0 header (PCIe 7.5.1.2.4).
const ROM_REGISTER: u16 = 0x30;
/// Smallest ROM register there is.
const MIN_ROM: u64 = 2048;
/// No ROM register decodes more (PCI 6.2.5.2).
const MAX_ROM: u64 = 16 << 20;

/// Most ports that a BAR may have; the PCI specification allows 256 (PCI 6.2.5.1), which not every card keeps to.
const MOST_PORTS: u64 = 64 << 10;

/// A BAR.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bar {
    pub(crate) space: Space,
    /// Bytes, a power of two.
    pub(crate) len: u64,
    wide: bool,
    /// What must stay trapped, with the pages around it.
    holes: Vec<Range<u64>>,
    /// Parts that are mapped; everything else is trapped. Offsets are multiples of [`GRANULE`]. None of I/O ports.
    pub(crate) pieces: Vec<Range<u64>>,
}

/// The function's BARs by index.
#[derive(Clone, Debug, Default)]
pub(crate) struct Bars {
    bars: [Option<Bar>; BAR_COUNT],
    /// Length of the ROM register.
    rom: Option<u64>,
}

impl Bars {
    /// The BARs `host`, with a ROM of `rom` bytes, declared in `table`.
    ///
    /// # Errors
    /// What is wrong with them.
    pub(crate) fn declare(
        host: &[Option<HostBar>; BAR_COUNT],
        rom: Option<usize>,
        table: &mut Table,
    ) -> Result<Self, String> {
        let mut bars = Self::default();
        for (index, bar) in host.iter().enumerate() {
            let Some(bar) = bar else { continue };
            let space = if bar.kind == HostBarKind::Io { Space::Io } else { Space::Memory };
            let (wide, flags) = match bar.kind {
                HostBarKind::Io => (false, 0b1),
                HostBarKind::Memory32 { prefetchable } => (false, u32::from(prefetchable) << 3),
                HostBarKind::Memory64 { prefetchable } => (true, 0b100 | u32::from(prefetchable) << 3),
            };
            check(host, index, bar, wide)?;
            let register = regs::BAR0 + 4 * index as u16;
            *table.at(register) = register_dword(flags, !(bar.len - 1) as u32);
            if wide {
                *table.at(register + 4) = register_dword(0, (!(bar.len - 1) >> 32) as u32);
            }
            let pieces = if space == Space::Io { vec![] } else { mappable(bar.len, &[]) };
            bars.bars[index] = Some(Bar { space, len: bar.len, wide, holes: vec![], pieces });
        }
        if let Some(len) = rom.filter(|len| *len > 0 && *len as u64 <= MAX_ROM) {
            let len = (len as u64).next_power_of_two().max(MIN_ROM);
            *table.at(ROM_REGISTER) = register_dword(0, !(len - 1) as u32 | 1);
            bars.rom = Some(len);
        }
        Ok(bars)
    }

    /// Whether there are I/O ports among them.
    pub(crate) fn has_ports(&self) -> bool {
        self.bars.iter().flatten().any(|bar| bar.space == Space::Io)
    }

    /// BAR `index`, if there is one.
    pub(crate) fn get(&self, index: usize) -> Option<&Bar> {
        self.bars.get(index)?.as_ref()
    }

    /// Keeps the pages of `hole` in BAR `index` trapped.
    pub(crate) fn trap(&mut self, index: usize, hole: Range<u64>) {
        if let Some(bar) = self.bars.get_mut(index).and_then(Option::as_mut)
            && bar.space == Space::Memory
        {
            bar.holes.push(hole);
            bar.pieces = mappable(bar.len, &bar.holes);
        }
    }

    /// The registers that say where the guest has put them, and what they hold.
    pub(crate) fn registers(&self, table: &Table) -> Vec<(u16, u32)> {
        let bars = (0..BAR_COUNT as u16).map(|index| regs::BAR0 + 4 * index);
        bars.chain([ROM_REGISTER]).map(|register| (register, table.value(register))).collect()
    }

    /// Where the guest has put them, as if decoding were on.
    pub(crate) fn placed(&self, table: &Table) -> Decoded {
        let mut placed = Decoded::default();
        for (index, bar) in self.bars.iter().enumerate() {
            let Some(bar) = bar else { continue };
            let register = regs::BAR0 + 4 * index as u16;
            let (low, high) = (table.value(register), if bar.wide { table.value(register + 4) } else { 0 });
            placed[index] = Some(match bar.space {
                Space::Io => BarRange::io(u64::from(low & !0b11), bar.len),
                Space::Memory => BarRange::memory(u64::from(high) << 32 | u64::from(low & !0xf), bar.len),
            });
        }
        let rom = table.value(ROM_REGISTER);
        placed[ROM_BAR] =
            self.rom.filter(|_| rom & 1 != 0).map(|len| BarRange::memory(u64::from(rom & !0x7ff), len));
        placed
    }
}

/// A device may say anything; what is used here is checked first.
fn check(host: &[Option<HostBar>; BAR_COUNT], index: usize, bar: &HostBar, wide: bool) -> Result<(), String> {
    let len = bar.len;
    if bar.kind == HostBarKind::Io && !(len.is_power_of_two() && (4..=MOST_PORTS).contains(&len)) {
        return Err(format!("its BAR {index} says that it has {len:#x} I/O ports"));
    }
    let least = if bar.kind == HostBarKind::Io { 4 } else { 16 };
    if !len.is_power_of_two() || len < least || (!wide && len > 1 << 31) || len > 1 << 62 {
        return Err(format!("its BAR {index} says that it has {len:#x} bytes"));
    }
    match host.get(index + 1) {
        _ if !wide => Ok(()),
        Some(None) => Ok(()),
        _ => Err(format!("its 64-bit BAR {index} leaves no room for its upper half")),
    }
}

/// A register whose bits below the size are simply not writable, which is all that sizing needs.
fn register_dword(flags: u32, writable: u32) -> Dword {
    Dword { value: flags, reset: flags, writable, ..HIDDEN }
}

/// The parts of a BAR of `len` bytes that can be mapped: whole granules that touch none of `holes`. A BAR that is smaller than a
/// granule shares its page with somebody else's registers and is not mapped at all (XSA-461).
fn mappable(len: u64, holes: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut holes: Vec<Range<u64>> = holes
        .iter()
        .map(|h| h.start / GRANULE * GRANULE..h.end.div_ceil(GRANULE).saturating_mul(GRANULE))
        .collect();
    holes.sort_by_key(|hole| hole.start);
    let mut pieces = Vec::new();
    let mut from = 0;
    for hole in holes.iter().chain([&(len / GRANULE * GRANULE..u64::MAX)]) {
        if from < hole.start {
            pieces.push(from..hole.start);
        }
        from = from.max(hole.end);
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn b4_and_b10_pages_with_something_else_in_them_are_not_mapped() {
        let pieces = |len, holes: &[(u64, u64)]| {
            let holes: Vec<_> = holes.iter().map(|(start, end)| *start..*end).collect();
            mappable(len, &holes).into_iter().map(|piece| (piece.start, piece.end)).collect::<Vec<_>>()
        };
        assert_eq!(pieces(0x2000, &[]), []);
        assert_eq!(pieces(0x4000, &[]), [(0, 0x4000)]);
        assert_eq!(pieces(0x4000, &[(0x2000, 0x2010)]), []);
        assert_eq!(pieces(0x10000, &[(0x2000, 0x2010), (0x3000, 0x3008)]), [(0x4000, 0x10000)]);
        assert_eq!(pieces(0x10000, &[(0xc000, 0xc008), (0x4000, 0x4008)]), [(0, 0x4000), (0x8000, 0xc000)]);
        assert_eq!(pieces(0x10000, &[(0x7ff8, 0x8010)]), [(0, 0x4000), (0xc000, 0x10000)]);
        assert_eq!(pieces(0x10000, &[(0, 0x8000), (0x4000, 0x4008)]), [(0x8000, 0x10000)]);
    }

    #[test]
    fn b11_bars_that_cannot_be_are_refused() {
        let memory64 = HostBarKind::Memory64 { prefetchable: true };
        let memory32 = HostBarKind::Memory32 { prefetchable: false };
        let refused = |bars: &[(usize, HostBarKind, u64)]| {
            let mut host = [None; BAR_COUNT];
            for (index, kind, len) in bars {
                host[*index] = Some(HostBar { kind: *kind, len: *len });
            }
            Bars::declare(&host, None, &mut Table::hidden(256)).is_err()
        };
        assert!(refused(&[(0, memory32, 0)]));
        assert!(refused(&[(0, memory32, 0x3000)]));
        assert!(refused(&[(0, memory32, 1 << 32)]));
        assert!(refused(&[(5, memory64, 0x4000)]));
        assert!(refused(&[(0, memory64, 0x4000), (1, memory32, 0x1000)]));
        for ports in [0, 2, 24, 1 << 17, 1 << 63] {
            assert!(refused(&[(1, HostBarKind::Io, ports)]), "{ports}");
        }
        assert!(!refused(&[(1, HostBarKind::Io, 4), (5, HostBarKind::Io, 1 << 16)]));
        assert!(!refused(&[(0, memory32, 1 << 31), (2, memory64, 1 << 36), (4, HostBarKind::Io, 128)]));
    }
}
