//! The slot as Linux's pciehp drives it (drivers/pci/hotplug/pciehp_hpc.c, pciehp_ctrl.c), and its odd moments.

use super::{HotPlug, slot};
use crate::{ConfigAccess, ConfigSpace, Decoded, Identity, PciFunction, RootComplex, RootPort, Windows};
use outboard_bus::{AccessError, Event, MmioBus, MsiMessage, MsiSink, Width};
use std::sync::{Arc, Mutex};

#[derive(Default)]
struct Sent(Mutex<Vec<MsiMessage>>);
impl MsiSink for Sent {
    fn send(&self, message: MsiMessage) {
        self.0.lock().unwrap().push(message);
    }
}

struct Endpoint(Mutex<ConfigSpace>);
impl Endpoint {
    fn new() -> Arc<Self> {
        let identity =
            Identity { vendor: 0x1234, device: 1, class: 0, revision: 0, subsystem_vendor: 0, subsystem: 0 };
        let mut config = ConfigSpace::endpoint(identity);
        config.add_bar(0, 0x10000, crate::BarKind::Memory32);
        Arc::new(Self(Mutex::new(config)))
    }
}
impl PciFunction for Endpoint {
    fn name(&self) -> &str {
        "endpoint"
    }
    fn config_read(&self, access: ConfigAccess) -> u32 {
        self.0.lock().unwrap().read(access)
    }
    fn config_write(&self, access: ConfigAccess, value: u32) {
        self.0.lock().unwrap().write(access, value);
    }
    fn decoded(&self) -> Decoded {
        self.0.lock().unwrap().decoded()
    }
    fn bar_read(&self, _: usize, _: u64, _: Width) -> Result<u64, AccessError> {
        Ok(7)
    }
    fn bar_write(&self, _: usize, _: u64, _: Width, _: u64) -> Result<(), AccessError> {
        Ok(())
    }
    fn reset(&self) {}
}

const PCIE: u16 = 0x40;
const CONTROL: u16 = PCIE + 0x18;
const STATUS: u16 = PCIE + 0x1a;
const BUTTON: u32 = 1;
const PRESENCE: u32 = 1 << 3;
const COMPLETED: u32 = 1 << 4;
const PRESENT: u32 = 1 << 6;
const LINK: u32 = 1 << 8;

struct Rig {
    sent: Arc<Sent>,
    power: Arc<Event>,
    bus: Arc<MmioBus>,
    root: Arc<RootComplex>,
    port: Arc<RootPort>,
}

impl Rig {
    fn new() -> Self {
        let (sent, power) = (Arc::new(Sent::default()), Arc::new(Event::new().unwrap()));
        let bus = Arc::new(MmioBus::new());
        let windows = Windows {
            mmio32: 0x1000_0000..0x3000_0000,
            mmio64: 0x80_0000_0000..0x90_0000_0000,
            io: 0x0f00_0000..0x0f10_0000,
        };
        let root = RootComplex::new(&bus, windows);
        let hot_plug = HotPlug { msi: sent.clone(), power: power.clone() };
        let port = Arc::new(RootPort::with_hot_plug(1, hot_plug));
        root.add_port(1, port.clone()).unwrap();
        let rig = Self { sent, power, bus, root, port };
        rig.write(0x18, Width::B4, 0x0001_0100);
        rig.write(0x20, Width::B4, 0x2ff0_1000);
        rig
    }
    fn read(&self, offset: u16, width: Width) -> u32 {
        let access = ConfigAccess::new(offset, width).unwrap();
        (self.root.config_read(0, 1 << 3, access) & access.mask()) >> access.shift()
    }
    fn write(&self, offset: u16, width: Width, value: u32) {
        let access = ConfigAccess::new(offset, width).unwrap();
        self.root.config_write(0, 1 << 3, access, value << access.shift());
    }
    fn status(&self) -> u32 {
        self.read(STATUS, Width::B2)
    }
    fn child(&self, offset: u16) -> u32 {
        self.root.config_read(1, 0, ConfigAccess::new(offset, Width::B4).unwrap())
    }
    fn link_active(&self) -> bool {
        self.read(PCIE + 0x12, Width::B2) & 1 << 13 != 0
    }
    fn messages(&self) -> usize {
        self.sent.0.lock().unwrap().drain(..).count()
    }
    /// pcie_write_cmd: changes bits of slot control, then waits for the command and clears its completion.
    fn command(&self, value: u32, mask: u32) {
        let control = self.read(CONTROL, Width::B2);
        self.write(CONTROL, Width::B2, control & !mask | value & mask);
        assert_eq!(self.status() & COMPLETED, COMPLETED);
        self.write(STATUS, Width::B2, COMPLETED);
    }
    /// pciehp's interrupt handler: reads and clears events until there are none.
    fn events(&self) -> u32 {
        let mut all = 0;
        loop {
            let events = self.status() & (BUTTON | PRESENCE | COMPLETED | LINK);
            if events == 0 {
                return all;
            }
            all |= events;
            self.write(STATUS, Width::B2, events);
        }
    }
    /// pcie_enable_notification, after MSI and bus master as the port driver sets them up.
    fn drive(&self) {
        let msi = self.read(0x34, Width::B1) as u16;
        let msi = if self.read(msi, Width::B1) == 5 { msi } else { self.read(msi + 1, Width::B1) as u16 };
        self.write(msi + 4, Width::B4, 0x0802_0040);
        self.write(msi + 12, Width::B2, 77);
        self.write(msi + 2, Width::B2, 1);
        self.write(4, Width::B2, 6);
        self.events();
        self.command(1 << 12 | 1 << 5 | 1 << 4 | 1 << 3 | 1, 0x1039);
        assert!(self.read(PCIE + 0x14, Width::B4) & 0x7b == 0x7b, "pciehp takes the slot");
    }
}

#[test]
fn a_device_is_added_to_an_empty_slot() {
    let rig = Rig::new();
    // pcie_init turns the power of an empty slot off.
    rig.command(1 << 10, 1 << 10);
    rig.drive();
    rig.messages();
    assert!(rig.power.take());
    rig.root.add_behind(1, 0, Endpoint::new()).unwrap();
    assert_eq!((rig.messages(), rig.link_active()), (1, false));
    assert_eq!(rig.sent.0.lock().unwrap().len(), 0);
    assert_eq!((rig.status() & PRESENT, rig.events() & (PRESENCE | LINK)), (PRESENT, PRESENCE));
    assert_eq!(rig.child(0), u32::MAX, "no power, no link");
    // board_added: power on, wait for the link, read.
    rig.command(0, 1 << 10);
    assert!(rig.link_active() && rig.power.take() && rig.port.powered());
    assert_eq!(rig.events() & LINK, LINK);
    assert_eq!(rig.child(0), 0x0001_1234);
}

#[test]
fn the_attention_button_ends_with_the_slot_off() {
    let rig = Rig::new();
    rig.root.add_behind(1, 0, Endpoint::new()).unwrap();
    rig.drive();
    rig.messages();
    rig.port.press_attention_button();
    assert_eq!((rig.messages(), rig.events()), (1, BUTTON));
    assert_eq!(*rig.sent.0.lock().unwrap(), []);
    // Blinks, unbinds its driver, and takes the power.
    rig.command(0b10 << 8, 0b11 << 8);
    assert!(rig.port.link_up());
    rig.command(1 << 10 | 0b11 << 8, 1 << 10 | 0b11 << 8);
    assert!(rig.power.take() && !rig.port.powered() && !rig.link_active());
    assert_eq!(rig.child(0), u32::MAX);
    assert_eq!(rig.root.remove_behind(1).unwrap().len(), 1);
    assert_eq!(rig.status() & PRESENT, 0);
}

#[test]
fn a_pulled_device_takes_its_bars_with_it_and_the_guest_is_told_once() {
    let rig = Rig::new();
    rig.root.add_behind(1, 0, Endpoint::new()).unwrap();
    rig.drive();
    for (offset, value) in [(0x10, 0x1000_0000), (4, 6)] {
        rig.root.config_write(1, 0, ConfigAccess::new(offset, Width::B4).unwrap(), value);
    }
    assert_eq!(rig.bus.read(0x1000_0000, Width::B4), 7);
    rig.messages();
    assert_eq!(rig.root.remove_behind(1).unwrap().len(), 1);
    assert_eq!(rig.messages(), 1, "one message for presence and link, until they are cleared");
    assert_eq!((rig.bus.read(0x1000_0000, Width::B4), rig.child(0)), (0xffff_ffff, u32::MAX));
    assert_eq!(rig.events(), PRESENCE | LINK);
    assert!(!rig.link_active());
    assert_eq!(rig.root.remove_behind(1).unwrap().len(), 0);
    assert_eq!((rig.messages(), rig.events()), (0, 0));
    assert!(rig.root.remove_behind(2).is_err());
    // Another in the same slot.
    rig.root.add_behind(1, 0, Endpoint::new()).unwrap();
    assert_eq!((rig.messages(), rig.events(), rig.child(0)), (1, PRESENCE | LINK, 0x0001_1234));
}

#[test]
fn events_from_before_anybody_listened_interrupt_when_enabled() {
    let rig = Rig::new();
    rig.root.add_behind(1, 0, Endpoint::new()).unwrap();
    rig.port.press_attention_button();
    assert_eq!(rig.messages(), 0);
    let msi = PCIE + 0x3c;
    assert_eq!(rig.read(msi, Width::B1), 5);
    rig.write(msi + 4, Width::B4, 0x0802_0040);
    rig.write(msi + 12, Width::B2, 99);
    rig.write(4, Width::B2, 4);
    rig.write(CONTROL, Width::B2, 1 << 5 | 1);
    assert_eq!(rig.messages(), 0, "MSI is off");
    rig.write(msi + 2, Width::B2, 1);
    assert_eq!(rig.sent.0.lock().unwrap()[0], MsiMessage { address: 0x0802_0040, data: 99 });
    assert_eq!(rig.messages(), 1);
    rig.write(CONTROL, Width::B2, 1 << 5 | 1);
    assert_eq!(rig.messages(), 0, "command completed is not enabled, the button was told");
    // Half of the register at a time, and a write of the status that clears nothing.
    rig.write(STATUS, Width::B1, 0);
    assert_eq!(rig.status() & BUTTON, BUTTON);
    rig.write(STATUS, Width::B1, BUTTON);
    rig.port.press_attention_button();
    assert_eq!(rig.messages(), 1);
}

#[test]
fn reset_keeps_the_device_and_forgets_events() {
    let rig = Rig::new();
    rig.root.add_behind(1, 0, Endpoint::new()).unwrap();
    rig.drive();
    rig.command(1 << 10, 1 << 10);
    rig.root.reset();
    assert_eq!((rig.status(), rig.port.link_up()), (PRESENT, true), "power is on after reset");
}

#[test]
fn a_port_without_hot_plug_has_no_button() {
    let port = RootPort::new(1);
    port.press_attention_button();
    let status = port.config_read(ConfigAccess::new(PCIE + slot::DWORD, Width::B4).unwrap());
    assert_eq!(status & slot::EVENTS, 0);
    assert!(port.powered() && !port.link_up());
}
