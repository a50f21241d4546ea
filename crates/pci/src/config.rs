use crate::regs::{self, COMMAND_BUS_MASTER, COMMAND_MEMORY};
use crate::{BAR_COUNT, BarRange, ConfigAccess, Decoded, Msix, MsixLayout};
use std::sync::Arc;

/// Who a function says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Class code: class, subclass and programming interface in the lower 24 bits.
    pub class: u32,
    /// Revision ID.
    pub revision: u8,
    /// Subsystem vendor ID; not present in a bridge's header.
    pub subsystem_vendor: u16,
    /// Subsystem ID; not present in a bridge's header.
    pub subsystem: u16,
}

/// Width of a memory BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// Anywhere below 4 GiB.
    Memory32,
    /// Anywhere; takes two registers.
    Memory64,
    /// Anywhere, without side effects of reading; takes two registers.
    Memory64Prefetchable,
}

/// Four bytes of config space: what they hold, what they held at power-on, and what a guest may do to them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Dword {
    value: u32,
    reset: u32,
    /// Bits the guest writes.
    writable: u32,
    /// Bits that a written 1 clears.
    write_1_clear: u32,
}

#[derive(Clone, Copy, Debug)]
struct Bar {
    len: u64,
    kind: BarKind,
}

/// Config space as a table of registers: every access goes through the masks of its dword, whatever its width.
///
/// Sizing of a BAR needs no code: its address bits below the size are simply not writable.
#[derive(Debug)]
pub struct ConfigSpace {
    /// The 64 dwords below 0x100. What is beyond reads as zero: no extended capability (PCIe 7.6.1).
    dwords: Vec<Dword>,
    bars: [Option<Bar>; BAR_COUNT],
    /// First free byte for a capability.
    next_cap: u16,
    /// Where the pointer to the next capability goes.
    last_cap_link: u16,
    msix: Option<(u16, Arc<Msix>)>,
}

const HEADER_END: u16 = 0x40;
const CONVENTIONAL_END: u16 = 0x100;

impl ConfigSpace {
    /// A type-0 header without BARs or capabilities, interrupt pin 0 (no INTx).
    pub fn endpoint(identity: Identity) -> Self {
        let mut space = Self::with_header(identity, 0);
        let subsystem = u32::from(identity.subsystem) << 16 | u32::from(identity.subsystem_vendor);
        space.define(regs::SUBSYSTEM, subsystem, 0);
        space
    }

    /// A type-1 header (bridge) whose registers beyond 0x10 are still to be [`ConfigSpace::define`]d.
    pub fn bridge(identity: Identity) -> Self {
        Self::with_header(identity, 1)
    }

    fn with_header(identity: Identity, header_type: u32) -> Self {
        let mut space = Self {
            dwords: vec![Dword::default(); usize::from(CONVENTIONAL_END / 4)],
            bars: [None; BAR_COUNT],
            next_cap: HEADER_END,
            last_cap_link: regs::CAP_POINTER,
            msix: None,
        };
        space.define(0x00, u32::from(identity.device) << 16 | u32::from(identity.vendor), 0);
        // Of the functions that are made of a table only bridges have to do with I/O ports.
        let io = if header_type == 1 { regs::COMMAND_IO } else { 0 };
        let command = io | COMMAND_MEMORY | COMMAND_BUS_MASTER | regs::COMMAND_OTHER;
        space.define(regs::COMMAND, 0, u32::from(command));
        space.dwords[usize::from(regs::COMMAND / 4)].write_1_clear = regs::STATUS_W1C;
        space.define(0x08, identity.class << 8 | u32::from(identity.revision), 0);
        // Cache line size is a scratch register on PCIe (7.5.1.1.7).
        space.define(0x0c, header_type << 16, 0xff);
        space.define(regs::INTERRUPT_LINE, 0, 0xff);
        space
    }

    /// Sets the dword at `offset`: its value after reset and the bits a guest may write.
    ///
    /// # Panics
    /// If `offset` is not a dword of the space.
    pub fn define(&mut self, offset: u16, value: u32, writable: u32) {
        assert!(offset.is_multiple_of(4), "config register {offset:#x} is not aligned");
        self.dwords[usize::from(offset / 4)] = Dword { value, reset: value, writable, write_1_clear: 0 };
    }

    /// Makes `bits` of the dword at `offset` ones that a guest clears by writing 1; the device sets them with [`ConfigSpace::update`].
    ///
    /// # Panics
    /// If `offset` is not within the space.
    pub fn clear_on_write(&mut self, offset: u16, bits: u32) {
        self.dwords[usize::from(offset / 4)].write_1_clear |= bits;
    }

    /// Adds memory BAR `index` of `len` bytes.
    ///
    /// # Panics
    /// If the BAR is taken, `len` is not a power of two of at least 16, or it does not fit its kind.
    pub fn add_bar(&mut self, index: usize, len: u64, kind: BarKind) {
        assert!(len.is_power_of_two() && len >= 16, "BAR of {len:#x} bytes");
        assert!(self.bars[index].is_none(), "BAR {index} is taken");
        let low = regs::BAR0 + 4 * u16::try_from(index).expect("at most six BARs");
        let mask = !(len - 1);
        let flags = match kind {
            BarKind::Memory32 => {
                assert!(len <= 1 << 31, "32-bit BAR of {len:#x} bytes");
                0b0000
            }
            BarKind::Memory64 => 0b0100,
            BarKind::Memory64Prefetchable => 0b1100,
        };
        self.define(low, flags, mask as u32);
        if kind != BarKind::Memory32 {
            assert!(index + 1 < BAR_COUNT && self.bars[index + 1].is_none(), "BAR {} is taken", index + 1);
            self.define(low + 4, 0, (mask >> 32) as u32);
        }
        self.bars[index] = Some(Bar { len, kind });
    }

    /// Appends a capability: `body` follows the ID and next pointer, `writable` says which of its bits a guest may write.
    /// Returns its offset.
    ///
    /// # Panics
    /// If the lengths differ or it does not fit below 0x100.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        assert_eq!(body.len(), writable.len());
        let at = self.next_cap;
        let end = usize::from(at) + 2 + body.len();
        assert!(end <= usize::from(CONVENTIONAL_END), "no room for capability {id:#x}");
        self.set_byte(self.last_cap_link, at as u8, 0);
        self.set_byte(at, id, 0);
        for (offset, (value, mask)) in (at + 2..).zip(body.iter().zip(writable)) {
            self.set_byte(offset, *value, *mask);
        }
        self.last_cap_link = at + 1;
        self.next_cap = (end as u16).next_multiple_of(4);
        let command = &mut self.dwords[usize::from(regs::COMMAND / 4)];
        command.value |= regs::STATUS_CAP_LIST;
        command.reset |= regs::STATUS_CAP_LIST;
        at
    }

    /// Adds the MSI-X capability for `msix`, whose table and PBA stand in a BAR as `layout` says. Writes to it and to
    /// COMMAND's bus master bit are from then on followed by `msix`.
    pub fn add_msix(&mut self, msix: Arc<Msix>, layout: MsixLayout) -> u16 {
        let mut body = Vec::with_capacity(10);
        body.extend_from_slice(&(msix.vectors() - 1).to_le_bytes());
        body.extend_from_slice(&(layout.table | u32::from(layout.bar)).to_le_bytes());
        body.extend_from_slice(&(layout.pba | u32::from(layout.bar)).to_le_bytes());
        let mut writable = [0; 10];
        writable[1] = 0xc0;
        let at = self.add_capability(regs::CAP_ID_MSIX, &body, &writable);
        self.msix = Some((at, msix));
        at
    }

    /// Sets a byte at build time, after reset too.
    fn set_byte(&mut self, offset: u16, value: u8, writable: u8) {
        let dword = &mut self.dwords[usize::from(offset / 4)];
        let shift = 8 * (offset % 4);
        let keep = !(0xffu32 << shift);
        dword.reset = dword.reset & keep | u32::from(value) << shift;
        dword.value = dword.reset;
        dword.writable = dword.writable & keep | u32::from(writable) << shift;
    }

    /// The dword of `access`.
    pub fn read(&self, access: ConfigAccess) -> u32 {
        self.dword(access.offset())
    }

    /// The dword at `offset`; zero beyond the space.
    pub fn dword(&self, offset: u16) -> u32 {
        self.dwords.get(usize::from(offset / 4)).map_or(0, |d| d.value)
    }

    /// Sets bits of the dword at `offset` from the device's side (a status), whatever the guest may write.
    pub fn update(&mut self, offset: u16, mask: u32, value: u32) {
        if let Some(dword) = self.dwords.get_mut(usize::from(offset / 4)) {
            dword.value = dword.value & !mask | value & mask;
        }
    }

    /// A guest's write.
    pub fn write(&mut self, access: ConfigAccess, value: u32) {
        let Some(dword) = self.dwords.get_mut(usize::from(access.offset() / 4)) else { return };
        let writable = dword.writable & access.mask();
        dword.value = dword.value & !writable | value & writable;
        dword.value &= !(value & dword.write_1_clear & access.mask());
        self.follow_msix();
    }

    /// Every register back to its value after reset.
    pub fn reset(&mut self) {
        for dword in &mut self.dwords {
            dword.value = dword.reset;
        }
        if let Some((_, msix)) = &self.msix {
            msix.reset();
        }
    }

    fn follow_msix(&self) {
        let Some((at, msix)) = &self.msix else { return };
        let control = self.dword(*at) >> 16;
        let bus_master = self.command() & COMMAND_BUS_MASTER != 0;
        msix.set_control(control & 1 << 15 != 0, control & 1 << 14 != 0 || !bus_master);
    }

    /// The COMMAND register.
    pub fn command(&self) -> u16 {
        self.dword(regs::COMMAND) as u16
    }

    /// Which BARs answer now.
    pub fn decoded(&self) -> Decoded {
        let mut decoded = Decoded::default();
        if self.command() & COMMAND_MEMORY == 0 {
            return decoded;
        }
        for (index, bar) in self.bars.iter().enumerate() {
            decoded[index] = bar.map(|bar| BarRange::memory(self.bar_address(index, bar.kind), bar.len));
        }
        decoded
    }

    fn bar_address(&self, index: usize, kind: BarKind) -> u64 {
        let low = regs::BAR0 + 4 * index as u16;
        let high = if kind == BarKind::Memory32 { 0 } else { self.dword(low + 4) };
        u64::from(high) << 32 | u64::from(self.dword(low) & !0xf)
    }
}

#[cfg(test)]
mod tests;
