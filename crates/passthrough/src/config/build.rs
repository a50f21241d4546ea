//! From what the hardware shows to what the guest sees.

use super::bars::Bars;
use super::image::{CONVENTIONAL_END, Capability, Image};
use super::registers::Registers;
use super::rules::{self, Field, Len, Rule};
use super::table::{Dword, HIDDEN, RAW, READ_ONLY};
use super::{COMMAND, COMMAND_INTX_DISABLE, Table};
use outboard_bus::warn_limited;
use outboard_host_pci::{HostBar, InterruptCounts};
use outboard_pci::{BAR_COUNT, Space, regs};
use std::ops::Range;

/// COMMAND bits that the guest writes, besides that for I/O ports where there are some: memory, bus master, parity, SERR#, INTx disable. None of them reaches the hardware as written.
const COMMAND_WRITABLE: u32 =
    regs::COMMAND_MEMORY as u32 | regs::COMMAND_BUS_MASTER as u32 | 1 << 6 | 1 << 8 | COMMAND_INTX_DISABLE;
/// STATUS: a capability list is there.
const STATUS_CAP_LIST: u32 = 1 << 20;
/// End of the header.
const HEADER_END: u16 = 0x40;
/// How much is hidden of a standard capability whose length nobody knows, at most.
const HIDDEN_STANDARD: u16 = 64;
/// PCI Express port types (PCIe 7.5.3.2).
const TYPE_ENDPOINT: u32 = 0;
const TYPE_INTEGRATED: u32 = 9;

/// What the machine and the host say about a function besides its config space.
#[derive(Clone, Debug, Default)]
pub(crate) struct Facts {
    pub(crate) bars: [Option<HostBar>; BAR_COUNT],
    pub(crate) rom: Option<usize>,
    pub(crate) interrupts: InterruptCounts,
    /// There is a line for the pin.
    pub(crate) line: bool,
    /// Registers in BARs that have to be trapped.
    pub(crate) registers: Vec<Registers>,
}

/// Power management.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Power {
    /// Offset of PMCSR.
    pub(crate) control: u16,
    /// D3hot does not lose the function's state.
    pub(crate) no_soft_reset: bool,
}

/// MSI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MsiShape {
    pub(crate) at: u16,
    pub(crate) wide: bool,
    pub(crate) maskable: bool,
    /// A power of two, 1 to 32.
    pub(crate) vectors: u16,
}

impl MsiShape {
    /// Offset of the message data; the mask bits, if any, follow.
    pub(crate) const fn data(self) -> u16 {
        self.at + if self.wide { 12 } else { 8 }
    }
    pub(crate) const fn mask(self) -> Option<u16> {
        if self.maskable { Some(self.data() + 4) } else { None }
    }
    pub(crate) const fn pending(self) -> Option<u16> {
        if self.maskable { Some(self.data() + 8) } else { None }
    }
}

/// MSI-X.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MsixShape {
    pub(crate) at: u16,
    pub(crate) vectors: u16,
    pub(crate) table: (usize, Range<u64>),
    pub(crate) pba: (usize, Range<u64>),
}

/// PCI Express.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Express {
    /// Offset of DEVCTL.
    pub(crate) control: u16,
    /// It has function level reset.
    pub(crate) flr: bool,
}

/// The capabilities that this crate acts for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Features {
    pub(crate) power: Option<Power>,
    pub(crate) msi: Option<MsiShape>,
    pub(crate) msix: Option<MsixShape>,
    pub(crate) express: Option<Express>,
    /// Offset of the advanced features' control byte, if it has FLR.
    pub(crate) af_control: Option<u16>,
    /// The function has a pin and a line for it.
    pub(crate) pin: bool,
}

/// What comes out.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    pub(crate) table: Table,
    pub(crate) bars: Bars,
    pub(crate) features: Features,
    /// Dwords that are the same after every reset: offset, mask, value.
    pub(crate) fingerprint: Vec<(u16, u32, u32)>,
    /// For each dword, whether it belongs to no capability and not to the header: the vendor's own.
    pub(crate) vendor: Vec<bool>,
}

impl Layout {
    /// Builds it.
    ///
    /// # Errors
    /// What makes the function unusable.
    pub(crate) fn build(image: &Image, facts: &Facts) -> Result<Self, String> {
        if image.u16(0) == 0xffff || image.u16(0) == 0 {
            return Err("its config space reads as if nothing were there".into());
        }
        let mut table = Table::hidden(image.len());
        let bars = Bars::declare(&facts.bars, facts.rom, &mut table)?;
        let fingerprint = vec![(0x00, u32::MAX, image.u32(0)), (0x08, u32::MAX, image.u32(8))];
        let mut layout = Self { table, bars, features: Features::default(), fingerprint, vendor: vec![] };
        for registers in &facts.registers {
            layout.bars.trap(registers.bar, registers.range.clone());
        }
        let mut builder =
            Builder { image, facts, layout, claimed: vec![false; usize::from(image.len() / 4)] };
        builder.header();
        builder.standard();
        builder.extended();
        builder.vendor();
        Ok(builder.layout)
    }
}

/// A chain of capabilities, and what holds for it.
struct Chain {
    found: Vec<Capability>,
    rules: &'static [Rule],
    /// End of its part of config space.
    end: u16,
}

impl Chain {
    /// Where the next capability above `cap` starts.
    fn after(&self, cap: &Capability) -> u16 {
        self.found.iter().map(|c| c.at).filter(|at| *at > cap.at).min().unwrap_or(self.end)
    }
}

struct Builder<'a> {
    image: &'a Image,
    facts: &'a Facts,
    layout: Layout,
    /// Dwords that belong to a shown capability.
    claimed: Vec<bool>,
}

impl Builder<'_> {
    fn header(&mut self) {
        let image = self.image;
        self.fixed(0x00, image.u32(0x00), 0);
        let io = if self.layout.bars.has_ports() { u32::from(regs::COMMAND_IO) } else { 0 };
        let command = Dword { emulated: 0xffff | STATUS_CAP_LIST, writable: COMMAND_WRITABLE | io, ..HIDDEN };
        *self.layout.table.at(COMMAND) = command;
        self.fixed(0x08, image.u32(0x08), 0);
        // Cache line size and latency timer mean nothing on PCIe; no self test; the root complex knows about siblings.
        self.fixed(0x0c, 0, 0xffff);
        self.fixed(0x2c, image.u32(0x2c), 0);
        let pin = image.u8(0x3d);
        self.layout.features.pin =
            (1..=4).contains(&pin) && self.facts.line && self.facts.interrupts.intx > 0;
        let pin = if self.layout.features.pin { u32::from(pin) << 8 } else { 0 };
        self.fixed(0x3c, pin | image.u32(0x3c) & 0xffff_0000, 0xff);
    }

    fn fixed(&mut self, offset: u16, value: u32, writable: u32) {
        *self.layout.table.at(offset) = Dword { value, reset: value, writable, ..HIDDEN };
    }

    fn standard(&mut self) {
        // What belongs to no capability is the vendor's own, which drivers know; Linux's vfio passes it as well.
        for offset in (0x40..CONVENTIONAL_END).step_by(4) {
            *self.layout.table.at(offset) = RAW;
        }
        let chain = Chain { found: self.image.standard(), rules: rules::STANDARD, end: CONVENTIONAL_END };
        let shown = self.sort(&chain, HIDDEN_STANDARD);
        let mut link = 0x34;
        for cap in &shown {
            self.fingerprint(cap.at, 0xffff);
            self.set_byte(cap.at, cap.id as u8);
            self.set_byte(cap.at + 1, 0);
            self.set_byte(link, cap.at as u8);
            link = cap.at + 1;
        }
        if !shown.is_empty() {
            let command = self.layout.table.at(COMMAND);
            command.value |= STATUS_CAP_LIST;
            command.reset |= STATUS_CAP_LIST;
        }
    }

    fn extended(&mut self) {
        let end = self.image.len();
        if end == CONVENTIONAL_END || self.layout.features.express.is_none() {
            return;
        }
        for offset in (CONVENTIONAL_END..end).step_by(4) {
            *self.layout.table.at(offset) = READ_ONLY;
        }
        let chain = Chain { found: self.image.extended(), rules: rules::EXTENDED, end };
        // The chain starts here whatever is shown (PCIe 7.6.3): a null capability, unless the first one stays.
        *self.layout.table.at(CONVENTIONAL_END) = HIDDEN;
        let shown = self.sort(&chain, u16::MAX);
        let mut previous = CONVENTIONAL_END;
        for cap in &shown {
            self.fingerprint(cap.at, u32::MAX);
            let header = u32::from(cap.id) | u32::from(cap.version) << 16;
            self.fixed(cap.at, header, 0);
            if cap.at != CONVENTIONAL_END {
                let dword = self.layout.table.at(previous);
                dword.value |= u32::from(cap.at) << 20;
                dword.reset = dword.value;
            }
            previous = cap.at;
        }
    }

    /// Notes what no capability claims and nothing hides.
    fn vendor(&mut self) {
        let claimed = std::mem::take(&mut self.claimed);
        let own = |(index, claimed): (usize, bool)| {
            let offset = 4 * index as u16;
            !claimed && offset >= HEADER_END && matches!(*self.layout.table.at(offset), RAW | READ_ONLY)
        };
        self.layout.vendor = claimed.into_iter().enumerate().map(own).collect();
    }

    /// Puts the sound ones of a chain into the table and hides the others, each up to the next one, or `most` bytes.
    fn sort(&mut self, chain: &Chain, most: u16) -> Vec<Capability> {
        let mut shown = Vec::new();
        for cap in &chain.found {
            if self.show(cap, chain) {
                shown.push(*cap);
                continue;
            }
            let end = chain.after(cap).min(cap.at.saturating_add(most));
            for offset in (cap.at..end).step_by(4).filter(|at| !self.claimed[usize::from(at / 4)]) {
                *self.layout.table.at(offset) = HIDDEN;
            }
        }
        shown
    }

    /// Puts `cap` into the table if there is a rule for it and it is sound.
    fn show(&mut self, cap: &Capability, chain: &Chain) -> bool {
        let Some(rule) = rules::find(chain.rules, cap.id) else { return false };
        // A capability that reaches over the next one's start would open that one's registers by its own rule.
        let range = match self.len(cap, rule.len).and_then(|len| cap.at.checked_add(len)) {
            Some(end) if end > cap.at && end <= chain.after(cap) => cap.at..end.next_multiple_of(4),
            _ => {
                warn_limited!("capability {:#x} at {:#x} does not fit; it is hidden", cap.id, cap.at);
                return false;
            }
        };
        let dwords = usize::from(range.start / 4)..usize::from(range.end / 4);
        if self.claimed[dwords.clone()].contains(&true) || !self.accept(cap) {
            warn_limited!("capability {:#x} at {:#x} is malformed; it is hidden", cap.id, cap.at);
            return false;
        }
        self.claimed[dwords].fill(true);
        for offset in range.clone().step_by(4) {
            *self.layout.table.at(offset) = if rule.raw { RAW } else { READ_ONLY };
        }
        for field in rule.fields.iter().filter(|field| cap.at + field.at < range.end) {
            self.apply(cap.at, field);
        }
        self.specialise(cap, &range);
        true
    }

    fn apply(&mut self, at: u16, field: &Field) {
        let real = self.image.u32(at + field.at);
        let dword = self.layout.table.at(at + field.at);
        dword.emulated |= field.emulated;
        dword.writable |= field.writable;
        dword.passed = dword.passed & !field.emulated | field.passed;
        dword.no_write_back |= field.no_write_back;
        dword.value = real & field.emulated & !field.clear;
        dword.reset = dword.value;
    }

    fn len(&self, cap: &Capability, len: Len) -> Option<u16> {
        let image = self.image;
        Some(match len {
            Len::Fixed(len) => len,
            Len::Byte(at) => Some(image.u8(cap.at + at).into()).filter(|len| *len >= 3)?,
            Len::Vendor => Some((image.u32(cap.at + 4) >> 20) as u16).filter(|len| *len >= 8)?,
            Len::Msi => match (image.u16(cap.at + 2) & 1 << 7 != 0, image.u16(cap.at + 2) & 1 << 8 != 0) {
                (false, false) => 0x0a,
                (true, false) => 0x0e,
                (false, true) => 0x14,
                (true, true) => 0x18,
            },
            Len::Express if image.u16(cap.at + 2) & 0xf >= 2 => 0x3c,
            Len::Express => 0x14,
            Len::ResizableBar => 4 + 8 * (image.u32(cap.at + 8) >> 5 & 7) as u16,
        })
    }

    /// Whether what the capability says can be true; notes what this crate needs of it.
    fn accept(&mut self, cap: &Capability) -> bool {
        let image = self.image;
        let features = &mut self.layout.features;
        match cap.id {
            rules::PM if cap.at < CONVENTIONAL_END && features.power.is_none() => {
                let no_soft_reset = image.u16(cap.at + 4) & 1 << 3 != 0;
                features.power = Some(Power { control: cap.at + 4, no_soft_reset });
                true
            }
            rules::MSI if cap.at < CONVENTIONAL_END && features.msi.is_none() => {
                features.msi = msi(image, cap.at, self.facts.interrupts.msi);
                features.msi.is_some()
            }
            rules::MSIX if self.facts.interrupts.msix > 0 && features.msix.is_none() => {
                features.msix = msix(image, cap.at, &self.layout.bars);
                features.msix.iter().for_each(|shape| trap_structures(&mut self.layout.bars, shape));
                features.msix.is_some()
            }
            rules::EXPRESS if features.express.is_none() => {
                let flr = image.u32(cap.at + 4) & 1 << 28 != 0;
                features.express = Some(Express { control: cap.at + 8, flr });
                true
            }
            rules::PM | rules::MSI if cap.at < CONVENTIONAL_END => false,
            rules::MSIX | rules::EXPRESS => false,
            rules::ADVANCED_FEATURES => {
                features.af_control = (image.u8(cap.at + 3) & 2 != 0).then_some(cap.at + 4);
                true
            }
            _ => true,
        }
    }

    /// What the tables cannot say.
    fn specialise(&mut self, cap: &Capability, range: &Range<u16>) {
        match cap.id {
            rules::MSI if cap.at < CONVENTIONAL_END => self.msi(range),
            rules::EXPRESS => self.express(cap.at),
            rules::RESIZABLE_BAR if cap.at >= CONVENTIONAL_END => self.resizable_bar(range),
            _ => {}
        }
    }

    /// All of it is emulated: the hardware's address and data are the host's.
    fn msi(&mut self, range: &Range<u16>) {
        let Some(shape) = self.layout.features.msi else { return };
        for offset in range.clone().step_by(4) {
            self.fixed(offset, 0, 0);
        }
        let control = shape.vectors.trailing_zeros() << 1 | u32::from(shape.wide) << 7;
        self.fixed(shape.at, (control | u32::from(shape.maskable) << 8) << 16, 0x71 << 16);
        self.fixed(shape.at + 4, 0, !3);
        if shape.wide {
            self.fixed(shape.at + 8, 0, u32::MAX);
        }
        self.fixed(shape.data(), 0, 0xffff);
        if let Some(mask) = shape.mask() {
            self.fixed(mask, 0, u32::MAX >> (32 - shape.vectors));
        }
    }

    /// A function that is part of the host's root complex has no link; behind the guest's root port it gets one.
    fn express(&mut self, at: u16) {
        if u32::from(self.image.u16(at + 2)) >> 4 & 0xf != TYPE_INTEGRATED {
            return;
        }
        let dword = self.layout.table.at(at);
        dword.value = dword.value & !(0xf << 20) | TYPE_ENDPOINT << 20;
        dword.reset = dword.value;
        // 2.5 GT/s, one lane.
        self.fixed(at + 0x0c, 1 | 1 << 4, 0);
        self.fixed(at + 0x10, (1 | 1 << 4) << 16, 0x0fcb);
    }

    /// Only the size that a BAR has: the host's windows are cut for it.
    fn resizable_bar(&mut self, range: &Range<u16>) {
        let count = (range.end - range.start - 4) / 8;
        for entry in (0..count).map(|i| range.start + 4 + 8 * i) {
            let control = self.image.u32(entry + 4);
            let len = self.layout.bars.get((control & 7) as usize).map_or(0, |bar| bar.len);
            // Sizes are powers of two from 1 MiB; the capability register holds the first 28 of them (PCIe 7.8.6.2).
            let size = len.checked_ilog2().and_then(|log| log.checked_sub(20));
            let capability = size.filter(|size| *size < 28).map_or(0, |size| 1 << (size + 4));
            self.fixed(entry, capability, 0);
            self.fixed(entry + 4, control & 0xe7 | size.unwrap_or(0) << 8, 0);
        }
    }

    fn fingerprint(&mut self, at: u16, mask: u32) {
        self.layout.fingerprint.push((at, mask, self.image.u32(at) & mask));
    }

    fn set_byte(&mut self, offset: u16, value: u8) {
        let dword = self.layout.table.at(offset);
        let (shift, mask) = (8 * (offset % 4), 0xffu32 << (8 * (offset % 4)));
        dword.emulated |= mask;
        dword.passed &= !mask;
        dword.value = dword.value & !mask | u32::from(value) << shift;
        dword.reset = dword.value;
    }
}

fn msi(image: &Image, at: u16, host: u16) -> Option<MsiShape> {
    let control = image.u16(at + 2);
    let capable = control >> 1 & 7;
    let vectors = (1 << capable).min(host.min(32).checked_ilog2().map_or(0, |log| 1 << log));
    let sound = capable <= 5 && vectors > 0;
    sound.then_some(MsiShape { at, wide: control & 1 << 7 != 0, maskable: control & 1 << 8 != 0, vectors })
}

fn msix(image: &Image, at: u16, bars: &Bars) -> Option<MsixShape> {
    let vectors = (image.u16(at + 2) & 0x7ff) + 1;
    let place = |register: u16, len: u64| {
        let value = image.u32(register);
        let (bar, start) = ((value & 7) as usize, u64::from(value & !7));
        let range = start..start + len;
        let fits = bars.get(bar).is_some_and(|bar| bar.space == Space::Memory && range.end <= bar.len);
        fits.then_some((bar, range))
    };
    let table = place(at + 4, 16 * u64::from(vectors))?;
    let pba = place(at + 8, 8 * u64::from(vectors.div_ceil(64)))?;
    let apart = table.0 != pba.0 || table.1.end <= pba.1.start || pba.1.end <= table.1.start;
    apart.then_some(MsixShape { at, vectors, table, pba })
}

fn trap_structures(bars: &mut Bars, shape: &MsixShape) {
    for (bar, range) in [&shape.table, &shape.pba] {
        bars.trap(*bar, range.clone());
    }
}
