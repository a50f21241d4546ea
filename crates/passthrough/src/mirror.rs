//! A guest's accesses to registers in BARs that lead to config space past its rules ([`crate::config::Registers`]).

use crate::config::{Meaning, Registers};
use crate::function::Function;
use outboard_bus::{AccessError, Width};
use outboard_pci::{ConfigAccess, PciFunction};

/// Bytes at the start of the MSI capability that the specification makes read-only (PCIe 7.7.1.1): a write to them through the mirror tells
/// NVIDIA's GPUs that an interrupt was taken.
const MSI_HEADER: u16 = 2;

impl Function {
    /// A read: of the function's own config space it says what config space says.
    pub(crate) fn registers_read(
        &self,
        registers: &Registers,
        offset: u64,
        width: Width,
    ) -> Result<u64, AccessError> {
        if registers.meaning != Meaning::Config {
            return self.with_device(|| self.host.bar_read(registers.bar, offset, width));
        }
        let access = config_access(registers, offset, width)?;
        Ok(u64::from(self.config_read(access) >> access.shift()))
    }

    /// A write: what config space's rules let through to the hardware reaches it, and what is the vendor's own; nothing else happens.
    ///
    /// Bits that this process holds (COMMAND, BARs, power state, resets, interrupts) do not change, since nobody would follow: drivers
    /// change those by config space.
    pub(crate) fn registers_write(
        &self,
        registers: &Registers,
        offset: u64,
        width: Width,
        value: u64,
    ) -> Result<(), AccessError> {
        let passes = match registers.meaning {
            Meaning::Neighbour => false,
            Meaning::MsixPort { mask, value: port } => {
                let whole = offset == registers.range.start && width == Width::B4;
                whole && value as u32 & mask != port
            }
            Meaning::Config => {
                let access = config_access(registers, offset, width)?;
                if !self.is_vendors(access) {
                    return self.write_through(access, (value as u32) << access.shift());
                }
                true
            }
        };
        if passes {
            self.with_device(|| self.host.bar_write(registers.bar, offset, width, value))
        } else {
            Ok(())
        }
    }

    fn is_vendors(&self, access: ConfigAccess) -> bool {
        let in_msi_header = |at: u16| (at..at + MSI_HEADER).any(|byte| access.covers(byte));
        let beyond_msi_header = |at: u16| (at + MSI_HEADER..at + 4).any(|byte| access.covers(byte));
        let acknowledges =
            self.features.msi.is_some_and(|msi| in_msi_header(msi.at) && !beyond_msi_header(msi.at));
        acknowledges || self.vendor.get(usize::from(access.offset() / 4)) == Some(&true)
    }

    fn write_through(&self, access: ConfigAccess, value: u32) -> Result<(), AccessError> {
        let state = self.lock();
        if !self.health.usable() {
            return Err(AccessError::NoResponse);
        }
        if let Err(error) = state.table.write_through(&*self.host, access, value) {
            self.report("a write to its mirror of config space failed", &error);
        }
        Ok(())
    }
}

/// The access to config space that `width` bytes at `offset` of the BAR stand for.
fn config_access(registers: &Registers, offset: u64, width: Width) -> Result<ConfigAccess, AccessError> {
    let inside = offset.checked_sub(registers.range.start).ok_or(AccessError::BadWidth)?;
    let inside = u16::try_from(inside).map_err(|_| AccessError::BadWidth)?;
    ConfigAccess::new(inside, width).ok_or(AccessError::BadWidth)
}
