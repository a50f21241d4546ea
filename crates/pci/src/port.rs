use crate::regs::{self, COMMAND_MEMORY};
use crate::{BarRange, ConfigAccess, ConfigSpace, Decoded, Identity, PciFunction};
use outboard_bus::{AccessError, Width};
use std::sync::{Mutex, MutexGuard};

/// Primary, secondary and subordinate bus number (PCIe 7.5.1.3).
const BUS_NUMBERS: u16 = 0x18;
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
/// It forwards what lies in its two memory windows and the config accesses of its secondary bus, whose only device is
/// number 0. No I/O window, no interrupt of its own yet (hot plug comes with it).
pub struct RootPort {
    name: String,
    config: Mutex<ConfigSpace>,
    pcie: u16,
}

impl RootPort {
    /// A port with an empty slot; `number` (1 to 255) is both its port number and its physical slot number.
    pub fn new(number: u8) -> Self {
        let mut config = ConfigSpace::bridge(IDENTITY);
        config.define(BUS_NUMBERS, 0, 0x00ff_ffff);
        config.define(MEMORY_WINDOW, 0, 0xfff0_fff0);
        // 64-bit capable.
        config.define(PREFETCH_WINDOW, 0x0001_0001, 0xfff0_fff0);
        config.define(PREFETCH_BASE_UPPER, 0, u32::MAX);
        config.define(PREFETCH_LIMIT_UPPER, 0, u32::MAX);
        config.define(regs::INTERRUPT_LINE, 0, 0xff | BRIDGE_CONTROL_BITS);
        let pcie = add_pcie_capability(&mut config, number);
        Self { name: format!("root port {number}"), config: Mutex::new(config), pcie }
    }

    /// Shows in link and slot status whether the slot holds a device. Reset does not change it.
    pub fn set_present(&self, present: bool) {
        let mut config = self.lock();
        // Data link layer link active, and presence detect state (7.5.3.8, 7.5.3.11).
        config.update(self.pcie + 0x10, 1 << (16 + 13), u32::from(present) << (16 + 13));
        config.update(self.pcie + 0x18, 1 << (16 + 6), u32::from(present) << (16 + 6));
    }

    /// The number of the bus behind the port; 0 while the guest has not given one.
    pub fn secondary_bus(&self) -> u8 {
        (self.lock().dword(BUS_NUMBERS) >> 8) as u8
    }

    /// Whether the port forwards all of `range` to its slot.
    pub fn forwards(&self, range: &BarRange) -> bool {
        let config = self.lock();
        if config.command() & COMMAND_MEMORY == 0 {
            return false;
        }
        let window = |register: u16, base_upper: u32, limit_upper: u32| {
            let value = config.dword(register);
            let base = u64::from(base_upper) << 32 | u64::from(value & 0xfff0) << 16;
            let last = u64::from(limit_upper) << 32 | u64::from(value >> 16 & 0xfff0) << 16 | 0xf_ffff;
            range.address >= base && range.address.checked_add(range.len - 1).is_some_and(|end| end <= last)
        };
        window(MEMORY_WINDOW, 0, 0)
            || window(PREFETCH_WINDOW, config.dword(PREFETCH_BASE_UPPER), config.dword(PREFETCH_LIMIT_UPPER))
    }

    /// Whether the guest holds the slot in reset.
    pub fn holds_slot_in_reset(&self) -> bool {
        self.lock().dword(regs::INTERRUPT_LINE) & SECONDARY_BUS_RESET != 0
    }

    fn lock(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// The PCI Express capability of a root port with a slot (PCIe 7.5.3): 8 GT/s, four lanes, 128-byte payloads.
fn add_pcie_capability(config: &mut ConfigSpace, number: u8) -> u16 {
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
    writable[7] = 0x000f;
    // Supported link speeds 2.5, 5 and 8 GT/s; target speed.
    value[11] = 0b1110;
    value[12] = 3;
    writable[12] = 0x000f;
    let bytes = |dwords: [u32; 15]| dwords.iter().flat_map(|d| d.to_le_bytes()).skip(2).collect::<Vec<_>>();
    config.add_capability(regs::CAP_ID_PCIE, &bytes(value), &bytes(writable))
}

impl PciFunction for RootPort {
    fn name(&self) -> &str {
        &self.name
    }

    fn config_read(&self, access: ConfigAccess) -> u32 {
        self.lock().read(access)
    }

    fn config_write(&self, access: ConfigAccess, value: u32) {
        self.lock().write(access, value);
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
        let present = {
            let mut config = self.lock();
            let present = config.dword(self.pcie + 0x18) & 1 << (16 + 6) != 0;
            config.reset();
            present
        };
        self.set_present(present);
    }
}
