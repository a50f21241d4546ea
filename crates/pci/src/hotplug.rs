//! Native hot plug of a root port's slot (PCIe 6.7): what the guest's `pciehp` works with.

use crate::ConfigSpace;
use crate::regs::{self, COMMAND_BUS_MASTER};
use outboard_bus::{Event, MsiMessage, MsiSink};
use std::sync::Arc;

/// What a slot that changes while the guest runs needs of the machine.
pub struct HotPlug {
    /// Takes the port's interrupt.
    pub msi: Arc<dyn MsiSink>,
    /// Signalled after the guest has turned the slot's power on or off; [`crate::RootPort::powered`] says which.
    pub power: Arc<Event>,
}

/// Link control and status, within the PCI Express capability (PCIe 7.5.3.7, 7.5.3.8).
pub(crate) mod link {
    pub(crate) const DWORD: u16 = 0x10;
    /// Data link layer link active.
    pub(crate) const ACTIVE: u32 = 1 << (16 + 13);
}

/// Slot control and status, within the PCI Express capability (PCIe 7.5.3.9 to 7.5.3.11).
pub(crate) mod slot {
    pub(crate) const DWORD: u16 = 0x18;
    /// Of slot capabilities: attention button, power controller, attention and power indicators, surprise removal, hot plug.
    pub(crate) const CAPABILITIES: u32 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6;
    /// Both indicators off; power on.
    pub(crate) const AFTER_RESET: u32 = 0b11 << 6 | 0b11 << 8;
    /// Event enables, indicators, power; no interlock.
    pub(crate) const WRITABLE: u32 = 0x17ff;
    pub(crate) const INTERRUPT_ENABLE: u32 = 1 << 5;
    /// Power indicator; all bits set is off.
    pub(crate) const INDICATOR: u32 = 0b11 << 8;
    pub(crate) const POWER_OFF: u32 = 1 << 10;
    pub(crate) const BUTTON_PRESSED: u32 = 1 << 16;
    pub(crate) const PRESENCE_CHANGED: u32 = 1 << (16 + 3);
    pub(crate) const COMMAND_COMPLETED: u32 = 1 << (16 + 4);
    pub(crate) const PRESENT: u32 = 1 << (16 + 6);
    pub(crate) const LINK_CHANGED: u32 = 1 << (16 + 8);
    /// What a written 1 clears.
    pub(crate) const EVENTS: u32 = BUTTON_PRESSED | PRESENCE_CHANGED | COMMAND_COMPLETED | LINK_CHANGED;

    /// The events that are there and may interrupt.
    pub(crate) const fn due(register: u32) -> bool {
        // Bits 4:0 of control enable bits 4:0 of status; bit 12 enables link changes.
        let enabled = (register & 0x1f) << 16 | (register >> 12 & 1) << (16 + 8);
        register & enabled & EVENTS != 0
    }
}

/// MSI, at the capability's own offsets: control in the first dword, a 64-bit address, data (PCIe 7.7.1).
const MSI_ENABLE: u32 = 1 << 16;

/// A slot's way to tell the guest.
pub(crate) struct Slot {
    hot_plug: HotPlug,
    msi: u16,
    /// The guest has been told of what is there: the message goes out when something is due that was not (PCIe 6.7.3.4).
    told: bool,
}

impl Slot {
    /// Adds the port's MSI capability to `config`.
    pub(crate) fn new(hot_plug: HotPlug, config: &mut ConfigSpace) -> Self {
        let mut body = [0; 12];
        body[0] = 1 << 7;
        let mut writable = [0xff; 12];
        (writable[0], writable[1], writable[2]) = (1, 0, 0xfc);
        let msi = config.add_capability(regs::CAP_ID_MSI, &body, &writable);
        Self { hot_plug, msi, told: false }
    }

    pub(crate) fn power_changed(&self) {
        self.hot_plug.power.signal();
    }

    /// Interrupts the guest if there is something it has enabled and was not told of.
    pub(crate) fn notify(&mut self, config: &ConfigSpace, pcie: u16) {
        let register = config.dword(pcie + slot::DWORD);
        let able = config.dword(self.msi) & MSI_ENABLE != 0 && config.command() & COMMAND_BUS_MASTER != 0;
        let due = able && register & slot::INTERRUPT_ENABLE != 0 && slot::due(register);
        if due && !self.told {
            let address = u64::from(config.dword(self.msi + 8)) << 32 | u64::from(config.dword(self.msi + 4));
            self.hot_plug.msi.send(MsiMessage { address, data: config.dword(self.msi + 12) & 0xffff });
        }
        self.told = due;
    }
}

#[cfg(test)]
mod tests;
