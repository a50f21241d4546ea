//! The engine: every access goes through the masks of its dword, whatever its width.

use outboard_bus::Width;
use outboard_host_pci::{HostFunction, Result};
use outboard_pci::ConfigAccess;

/// Four bytes of config space: which bits this process holds, which the guest may change here, and which it may change in hardware.
///
/// Bits that are not `emulated` are read from the hardware at each access.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Dword {
    /// What the guest sees in the emulated bits.
    pub(crate) value: u32,
    /// The same after reset.
    pub(crate) reset: u32,
    /// Bits that never come from the hardware.
    pub(crate) emulated: u32,
    /// Bits of `value` that the guest writes.
    pub(crate) writable: u32,
    /// Bits that the guest writes in the hardware.
    pub(crate) passed: u32,
    /// Bits of the hardware's register in which a 1 does something (clears a status, starts a write): only ever written when
    /// the guest writes them, never as a neighbour's read-back.
    pub(crate) no_write_back: u32,
}

/// Reads as zero, takes nothing.
pub(crate) const HIDDEN: Dword =
    Dword { value: 0, reset: 0, emulated: u32::MAX, writable: 0, passed: 0, no_write_back: 0 };
/// The hardware's own, read-only.
pub(crate) const READ_ONLY: Dword = Dword { emulated: 0, ..HIDDEN };
/// The hardware's own.
pub(crate) const RAW: Dword = Dword { emulated: 0, passed: u32::MAX, ..HIDDEN };

/// Config space as the guest sees it.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    dwords: Vec<Dword>,
}

impl Table {
    /// `len` bytes that read as zero.
    pub(crate) fn hidden(len: u16) -> Self {
        Self { dwords: vec![HIDDEN; usize::from(len / 4)] }
    }

    /// The dword that holds byte `offset`, which must lie within the table.
    pub(crate) fn at(&mut self, offset: u16) -> &mut Dword {
        &mut self.dwords[usize::from(offset / 4)]
    }

    /// The emulated bits of the dword that holds byte `offset`; zero beyond the table.
    pub(crate) fn value(&self, offset: u16) -> u32 {
        self.dwords.get(usize::from(offset / 4)).map_or(0, |d| d.value)
    }

    /// Sets emulated bits from this process's side.
    pub(crate) fn set(&mut self, offset: u16, mask: u32, value: u32) {
        let dword = self.at(offset);
        dword.value = dword.value & !mask | value & mask;
    }

    /// Every emulated bit back to its value after reset.
    pub(crate) fn reset(&mut self) {
        for dword in &mut self.dwords {
            dword.value = dword.reset;
        }
    }

    /// A guest's read: the enabled bytes in their place; hardware is only asked for what it has to say.
    ///
    /// # Errors
    /// The hardware's.
    pub(crate) fn read(&self, host: &dyn HostFunction, access: ConfigAccess) -> Result<u32> {
        let Some(dword) = self.dwords.get(usize::from(access.offset() / 4)) else { return Ok(0) };
        let real = !dword.emulated & access.mask();
        let mut value = dword.value & dword.emulated;
        for (offset, width) in runs(real) {
            let read = host.config_read(access.offset() + offset, width)?;
            value |= read << (8 * offset) & real;
        }
        Ok(value)
    }

    /// A guest's write that reaches the hardware another way than by config space: emulated bits stay as they are, passed ones change.
    ///
    /// # Errors
    /// The hardware's.
    pub(crate) fn write_through(
        &self,
        host: &dyn HostFunction,
        access: ConfigAccess,
        value: u32,
    ) -> Result<()> {
        match self.dwords.get(usize::from(access.offset() / 4)) {
            Some(dword) => dword.pass(host, access, value),
            None => Ok(()),
        }
    }

    /// A guest's write: emulated bits here, passed ones to the hardware.
    ///
    /// # Errors
    /// The hardware's; the emulated bits are written then.
    pub(crate) fn write(&mut self, host: &dyn HostFunction, access: ConfigAccess, value: u32) -> Result<()> {
        let Some(dword) = self.dwords.get_mut(usize::from(access.offset() / 4)) else { return Ok(()) };
        let writable = dword.writable & access.mask();
        dword.value = dword.value & !writable | value & writable;
        dword.pass(host, access, value)
    }
}

impl Dword {
    /// Writes the passed bits to the hardware.
    fn pass(&self, host: &dyn HostFunction, access: ConfigAccess, value: u32) -> Result<()> {
        for (offset, width) in runs(self.passed & access.mask()) {
            let mask = (width.all_ones() as u32) << (8 * offset);
            let passed = self.passed & mask;
            let mut merged = value & passed;
            if passed != mask {
                // A neighbour within the byte keeps what the hardware has.
                let real = host.config_read(access.offset() + offset, width)? << (8 * offset);
                merged |= real & mask & !passed & !self.no_write_back;
            }
            host.config_write(access.offset() + offset, width, merged >> (8 * offset))?;
        }
        Ok(())
    }
}

/// The bytes of a dword that hold bits of `mask`, as the fewest aligned accesses: a register is not written in halves where
/// the guest wrote it whole, and bytes without any of the bits are not touched.
fn runs(mask: u32) -> impl Iterator<Item = (u16, Width)> {
    let bytes = mask.to_le_bytes().map(|b| b != 0);
    let half = |at: usize| match (bytes[at], bytes[at + 1]) {
        (true, true) => [Some((at as u16, Width::B2)), None],
        (low, high) => [low.then_some((at as u16, Width::B1)), high.then_some((at as u16 + 1, Width::B1))],
    };
    let parts = if bytes == [true; 4] {
        [Some((0, Width::B4)), None, None, None]
    } else {
        let ([a, b], [c, d]) = (half(0), half(2));
        [a, b, c, d]
    };
    parts.into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_aligned_and_touch_only_what_is_asked_for() {
        let list = |mask| runs(mask).collect::<Vec<_>>();
        assert_eq!(list(0), []);
        assert_eq!(list(u32::MAX), [(0, Width::B4)]);
        assert_eq!(list(0x8000_0100), [(1, Width::B1), (3, Width::B1)]);
        assert_eq!(list(0x0101_0000), [(2, Width::B2)]);
        assert_eq!(list(0x0001_0101), [(0, Width::B2), (2, Width::B1)]);
    }
}
