use crate::hotplug::{HotPlug, Slot, link, slot};
use crate::regs::{self, COMMAND_IO, COMMAND_MEMORY};
use crate::{BarRange, ConfigAccess, ConfigSpace, Decoded, Identity, PciFunction, Space};
use outboard_bus::{AccessError, Width};
use std::sync::{Mutex, MutexGuard};

/// Primary, secondary and subordinate bus number (PCIe 7.5.1.3).
const BUS_NUMBERS: u16 = 0x18;
/// I/O base (first byte) and limit (second), in units of 4 KiB; the low bits say that the upper halves follow. Secondary status is above.
const IO_WINDOW: u16 = 0x1c;
const IO_32_BIT: u32 = 0x0101;
/// Upper 16 bits of I/O base (lower half) and limit (upper half).
const IO_UPPER: u16 = 0x30;
/// Memory base (lower half) and limit (upper half), in MiB.
const MEMORY_WINDOW: u16 = 0x20;
/// The same for the prefetchable window, whose upper 32 bits follow.
const PREFETCH_WINDOW: u16 = 0x24;
const PREFETCH_BASE_UPPER: u16 = 0x28;
const PREFETCH_LIMIT_UPPER: u16 = 0x2c;
/// Bridge control, in the upper half of the interrupt dword: parity and SERR# forwarding, secondary bus reset.
const BRIDGE_CONTROL_BITS: u32 = 0x43 << 16;
const SECONDARY_BUS_RESET: u32 = 1 << (16 + 6);

/// QEMU's identity for a generic PCIe root port (its docs/specs/pci-ids), which drivers bind by class.
const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x000c,
    class: 0x06_0400,
    revision: 0,
    subsystem_vendor: 0,
    subsystem: 0,
};

/// A PCIe root port: a bridge from bus 0 to one slot (type-1 header, PCIe 7.5.1.3; port type 4, 7.5.3).
///
/// It forwards what lies in its two memory windows and its I/O window, and the config accesses of its secondary bus, whose only device
/// is number 0. A port with [`HotPlug`] sends an MSI when its slot changes.
pub struct RootPort {
    name: String,
    state: Mutex<State>,
    pcie: u16,
}

struct State {
    config: ConfigSpace,
    /// The slot holds a device. Reset does not change it.
    present: bool,
    slot: Option<Slot>,
}

impl RootPort {
    /// A port with an empty slot whose device never changes while the guest runs; `number` (1 to 255) is both its port number and its
    /// physical slot number.
    pub fn new(number: u8) -> Self {
        Self::build(number, None)
    }

    /// A port with an empty slot for native hot plug (PCIe 6.7): attention button, power controller, indicators, presence and link
    /// events by MSI. The guest turns the slot's power on and off.
    pub fn with_hot_plug(number: u8, hot_plug: HotPlug) -> Self {
        Self::build(number, Some(hot_plug))
    }

    fn build(number: u8, hot_plug: Option<HotPlug>) -> Self {
        let mut config = ConfigSpace::bridge(IDENTITY);
        config.define(BUS_NUMBERS, 0, 0x00ff_ffff);
        config.define(IO_WINDOW, IO_32_BIT, 0xf0f0);
        config.define(IO_UPPER, 0, u32::MAX);
        config.define(MEMORY_WINDOW, 0, 0xfff0_fff0);
        // 64-bit capable.
        config.define(PREFETCH_WINDOW, 0x0001_0001, 0xfff0_fff0);
        config.define(PREFETCH_BASE_UPPER, 0, u32::MAX);
        config.define(PREFETCH_LIMIT_UPPER, 0, u32::MAX);
        config.define(regs::INTERRUPT_LINE, 0, 0xff | BRIDGE_CONTROL_BITS);
        let pcie = add_pcie_capability(&mut config, number, hot_plug.is_some());
        let slot = hot_plug.map(|hot_plug| Slot::new(hot_plug, &mut config));
        let state = Mutex::new(State { config, present: false, slot });
        Self { name: format!("root port {number}"), state, pcie }
    }

    /// Shows in link and slot status whether the slot holds a device, and tells the guest if that is new. Reset does not change it.
    pub fn set_present(&self, present: bool) {
        let mut state = self.lock();
        if state.present != present {
            state.present = present;
            // Presence detect changed (7.5.3.11).
            state.config.update(self.pcie + slot::DWORD, slot::PRESENCE_CHANGED, slot::PRESENCE_CHANGED);
        }
        self.follow(&mut state);
    }

    /// Presses the slot's attention button: the guest takes five seconds in which a second press takes it back, then lets go of the device and
    /// turns the slot's power off (or, for an empty slot that was filled, on). Nothing happens without [`HotPlug`].
    pub fn press_attention_button(&self) {
        let mut state = self.lock();
        if state.slot.is_some() {
            state.config.update(self.pcie + slot::DWORD, slot::BUTTON_PRESSED, slot::BUTTON_PRESSED);
            self.follow(&mut state);
        }
    }

    /// Whether the slot has power: the guest's choice, on after reset.
    pub fn powered(&self) -> bool {
        self.lock().powered(self.pcie)
    }

    /// Whether the guest is through with turning the slot off: no power, and its indicator is off. Before that it takes no press of the button for a
    /// wish to turn it on (Linux's pciehp waits a second between the two).
    pub fn is_off(&self) -> bool {
        let state = self.lock();
        !state.powered(self.pcie)
            && state.config.dword(self.pcie + slot::DWORD) & slot::INDICATOR == slot::INDICATOR
    }

    /// Whether there is a device in the slot and power: nothing behind the port answers otherwise.
    pub fn link_up(&self) -> bool {
        let state = self.lock();
        state.present && state.powered(self.pcie)
    }

    /// Makes link and slot status follow presence and power, and tells the guest what is new.
    fn follow(&self, state: &mut State) {
        let up = state.present && state.powered(self.pcie);
        let was_up = state.config.dword(self.pcie + link::DWORD) & link::ACTIVE != 0;
        let bit = |bit: u32, on: bool| if on { bit } else { 0 };
        state.config.update(self.pcie + link::DWORD, link::ACTIVE, bit(link::ACTIVE, up));
        state.config.update(self.pcie + slot::DWORD, slot::PRESENT, bit(slot::PRESENT, state.present));
        if up != was_up {
            state.config.update(self.pcie + slot::DWORD, slot::LINK_CHANGED, slot::LINK_CHANGED);
        }
        let State { config, slot, .. } = state;
        if let Some(slot) = slot {
            slot.notify(config, self.pcie);
        }
    }

    /// The number of the bus behind the port; 0 while the guest has not given one.
    pub fn secondary_bus(&self) -> u8 {
        (self.lock().config.dword(BUS_NUMBERS) >> 8) as u8
    }

    /// Whether the port forwards all of `range` to its slot.
    pub fn forwards(&self, range: &BarRange) -> bool {
        let state = self.lock();
        let config = &state.config;
        let command = config.command();
        match range.space {
            Space::Io => command & COMMAND_IO != 0 && holds(io_window(config), range),
            Space::Memory => {
                let upper = (config.dword(PREFETCH_BASE_UPPER), config.dword(PREFETCH_LIMIT_UPPER));
                command & COMMAND_MEMORY != 0
                    && (holds(memory_window(config, MEMORY_WINDOW, (0, 0)), range)
                        || holds(memory_window(config, PREFETCH_WINDOW, upper), range))
            }
        }
    }

    /// Whether the guest holds the slot in reset.
    pub fn holds_slot_in_reset(&self) -> bool {
        self.lock().config.dword(regs::INTERRUPT_LINE) & SECONDARY_BUS_RESET != 0
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl State {
    fn powered(&self, pcie: u16) -> bool {
        self.config.dword(pcie + slot::DWORD) & slot::POWER_OFF == 0
    }
}

/// First and last port that a bridge forwards (PCIe 7.5.1.3.6); none if the last is below the first.
fn io_window(config: &ConfigSpace) -> (u64, u64) {
    let (window, upper) = (config.dword(IO_WINDOW), config.dword(IO_UPPER));
    let base = (upper & 0xffff) << 16 | (window & 0xf0) << 8;
    let last = (upper & 0xffff_0000) | (window & 0xf000) | 0xfff;
    (base.into(), last.into())
}

/// First and last address that a bridge forwards by the window at `register`, whose upper halves are `upper` (PCIe 7.5.1.3.8, 7.5.1.3.9).
fn memory_window(config: &ConfigSpace, register: u16, upper: (u32, u32)) -> (u64, u64) {
    let value = config.dword(register);
    let base = u64::from(upper.0) << 32 | u64::from(value & 0xfff0) << 16;
    let last = u64::from(upper.1) << 32 | u64::from(value >> 16 & 0xfff0) << 16 | 0xf_ffff;
    (base, last)
}

/// Whether all of `range` lies between `base` and `last`.
fn holds((base, last): (u64, u64), range: &BarRange) -> bool {
    range.address >= base && range.address.checked_add(range.len - 1).is_some_and(|end| end <= last)
}

/// The PCI Express capability of a root port with a slot (PCIe 7.5.3): 8 GT/s, four lanes, 128-byte payloads.
fn add_pcie_capability(config: &mut ConfigSpace, number: u8, hot_plug: bool) -> u16 {
    let mut value = [0u32; 15];
    let mut writable = [0u32; 15];
    // Version 2, root port, slot implemented.
    value[0] = (2 | 4 << 4 | 1 << 8) << 16;
    // Role-based error reporting.
    value[1] = 1 << 15;
    writable[2] = 0x70ff;
    let link = 3 | 4 << 4;
    // Link active reporting, port number.
    value[3] = link | 1 << 20 | u32::from(number) << 24;
    value[4] = link << 16;
    writable[4] = 0x00cb;
    value[5] = u32::from(number) << 19;
    if hot_plug {
        value[5] |= slot::CAPABILITIES;
        value[6] = slot::AFTER_RESET;
        writable[6] = slot::WRITABLE;
    }
    writable[7] = 0x000f;
    // Supported link speeds 2.5, 5 and 8 GT/s; target speed.
    value[11] = 0b1110;
    value[12] = 3;
    writable[12] = 0x000f;
    let bytes = |dwords: [u32; 15]| dwords.iter().flat_map(|d| d.to_le_bytes()).skip(2).collect::<Vec<_>>();
    let at = config.add_capability(regs::CAP_ID_PCIE, &bytes(value), &bytes(writable));
    config.clear_on_write(at + slot::DWORD, slot::EVENTS);
    at
}

impl PciFunction for RootPort {
    fn name(&self) -> &str {
        &self.name
    }

    fn config_read(&self, access: ConfigAccess) -> u32 {
        self.lock().config.read(access)
    }

    fn config_write(&self, access: ConfigAccess, value: u32) {
        let mut state = self.lock();
        let had_power = state.powered(self.pcie);
        state.config.write(access, value);
        let State { config, slot, .. } = &mut *state;
        let control = self.pcie + slot::DWORD;
        if let Some(slot) = slot.as_ref().filter(|_| access.covers(control) || access.covers(control + 1)) {
            // Every write of slot control is a command (7.5.3.10); these take no time.
            config.update(control, slot::COMMAND_COMPLETED, slot::COMMAND_COMPLETED);
            if had_power != (config.dword(control) & slot::POWER_OFF == 0) {
                slot.power_changed();
            }
        }
        self.follow(&mut state);
    }

    fn decoded(&self) -> Decoded {
        Decoded::default()
    }

    fn bar_read(&self, _: usize, _: u64, _: Width) -> Result<u64, AccessError> {
        Err(AccessError::NoRegister)
    }

    fn bar_write(&self, _: usize, _: u64, _: Width, _: u64) -> Result<(), AccessError> {
        Err(AccessError::NoRegister)
    }

    fn reset(&self) {
        let mut state = self.lock();
        state.config.reset();
        self.follow(&mut state);
        // Nothing has changed for a guest that starts now.
        state.config.update(self.pcie + slot::DWORD, slot::EVENTS, 0);
    }
}
