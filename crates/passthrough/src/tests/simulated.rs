//! The same with the simulated hardware, which acts by itself: DMA, interrupts, removal, failures on command.

use super::device::{DOORBELL, ECAM, FakeBinder, FakeMapper, Line, Sent, WINDOWS};
use crate::{Function, IntxWiring, Loss, Slot, SlotListener, Vacated, VectorBinder, Wiring};
use outboard_bus::{Event, MmioBus, MsiMessage, Width};
use outboard_host_pci::simulated::{
    Fault, Model, Operation, SimulatedDevice, SimulatedDomain, endpoint, registers, rtx5090,
};
use outboard_host_pci::{DmaDomain, Error, IoPorts, PciAddress};
use outboard_pci::{Ecam, HotPlug, PciFunction, RootComplex, RootPort};
use std::io;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

struct Listener(Mutex<Sender<Vacated>>);
impl SlotListener for Listener {
    fn vacated(&self, why: Vacated) {
        // Nobody waits for it where a test is over.
        let _ = self.0.lock().unwrap().send(why);
    }
}

struct Machine {
    // First: its functions go before what they stand on.
    slot: Slot,
    devices: Vec<Arc<SimulatedDevice>>,
    domain: Arc<SimulatedDomain>,
    mapper: Arc<FakeMapper>,
    sent: Arc<Sent>,
    line: Arc<Line>,
    binder: Arc<FakeBinder>,
    bus: Arc<MmioBus>,
    root: Arc<RootComplex>,
    vacated: Receiver<Vacated>,
}

impl Machine {
    fn new(models: Vec<Model>, kernel: bool) -> Self {
        let domain = SimulatedDomain::new();
        let (mapper, sent, line) =
            (Arc::new(FakeMapper::default()), Arc::<Sent>::default(), Arc::<Line>::default());
        let binder = Arc::new(FakeBinder::default());
        let (mut devices, mut functions) = (Vec::new(), Vec::new());
        for (number, model) in (0..).zip(models) {
            let address = PciAddress { segment: 0, bus: 1, device: 0, function: number };
            let device = SimulatedDevice::new(address, model).unwrap();
            let wiring = Wiring {
                mapper: mapper.clone(),
                msi: sent.clone(),
                vectors: kernel.then(|| binder.clone() as Arc<dyn VectorBinder>),
                intx: Some(IntxWiring { line: line.clone(), kernel: None }),
            };
            functions.push(Arc::new(Function::new(Arc::new(device.open(&domain).unwrap()), wiring).unwrap()));
            devices.push(device);
        }
        let bus = Arc::new(MmioBus::new());
        let root = RootComplex::new(&bus, WINDOWS);
        bus.insert(ECAM, Ecam::len(4), Arc::new(Ecam::new(root.clone()))).unwrap();
        let power = Arc::new(Event::new().unwrap());
        let port = Arc::new(RootPort::with_hot_plug(1, HotPlug { msi: sent.clone(), power: power.clone() }));
        root.add_port(1, port.clone()).unwrap();
        let (sender, vacated) = channel();
        let listener = Arc::new(Listener(Mutex::new(sender)));
        let slot = Slot::plug(&root, 1, (port, power), functions, listener).unwrap();
        let machine = Self { slot, devices, domain, mapper, sent, line, binder, bus, root, vacated };
        machine.set_up_port();
        machine
    }

    fn set_up_port(&self) {
        let port = ECAM + (1 << 15);
        for (offset, value) in [
            (0x18, 0x0001_0100),
            (0x1c, 0xf010),
            (0x20, 0x3ff0_2000),
            (0x24, 0xfff1_0001),
            (0x28, 0x80),
            (0x2c, 0x8f),
            (4, 7),
        ] {
            self.bus.write(port + offset, Width::B4, value);
        }
    }

    fn config(&self, function: u64, offset: u64) -> u64 {
        ECAM + (1 << 20) + (function << 12) + offset
    }
    fn read(&self, function: u64, offset: u64) -> u32 {
        self.bus.read(self.config(function, offset), Width::B4) as u32
    }
    fn write(&self, function: u64, offset: u64, value: u64) {
        self.bus.write(self.config(function, offset), Width::B4, value);
    }
    /// The endpoint's BARs: 0 at 0x2000_0000, 1 at 0x2002_0000, 2 at 0x80_0000_0000.
    fn place(&self) {
        for (offset, value) in [(0x10, 0x2000_0000), (0x14, 0x2002_0000), (0x18, 0), (0x1c, 0x80), (4, 6)] {
            self.write(0, offset, value);
        }
    }
    fn register(&self, offset: u64, value: u64) {
        self.bus.write(0x2000_0000 + offset, Width::B4, value);
    }
    /// Starts a command of the endpoint and waits for it; whether it failed.
    fn command(&self, command: u32) -> bool {
        self.register(registers::COMMAND, command.into());
        eventually(|| self.bus.read(0x2000_0000 + registers::COMMAND, Width::B4) == 0);
        self.bus.read(0x2000_0000 + registers::FAILED, Width::B4) != 0
    }
    fn use_msix(&self, vector: u64) {
        let entry = 0x2002_8000 + 16 * vector;
        self.bus.write(entry, Width::B8, DOORBELL);
        self.bus.write(entry + 8, Width::B4, 64 + vector);
        self.bus.write(entry + 12, Width::B4, 0);
        self.bus.write(self.config(0, 0xb2), Width::B2, 0x8000);
    }
}

fn eventually(what: impl Fn() -> bool) {
    for _ in 0..60_000 {
        if what() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("did not happen within a minute");
}

#[test]
fn the_5090_enumerates_with_its_audio_function() {
    let machine = Machine::new(rtx5090().into(), false);
    assert_eq!((machine.read(0, 0), machine.read(0, 8)), (0x2b85_10de, 0x0300_00a1));
    assert_eq!((machine.read(1, 0), machine.read(1, 8)), (0x22e8_10de, 0x0403_00a1));
    assert_eq!(machine.read(0, 0x0c) >> 16, 0x80);
    // PM, MSI, PCIe (a legacy endpoint, as it is), and in extended space what a guest may see of VC, resizable BAR and AER.
    assert_eq!(machine.read(0, 0x34) & 0xff, 0x40);
    assert_eq!([0x40, 0x48, 0x60].map(|at| machine.read(0, at) as u16), [0x4801, 0x6005, 0x0010]);
    assert_eq!(machine.read(0, 0x60) >> 20 & 0xf, 1);
    assert_eq!([0x100, 0x134, 0x1b8].map(|at| machine.read(0, at)), [0x1340_0000, 0x1b81_0015, 0x0002_0001]);
    assert_eq!(
        (machine.read(0, 0x138), machine.read(0, 0x13c)),
        (1 << 12, 0x821),
        "256 MiB and nothing else"
    );
    for (offset, value) in
        [(0x10, 0x2000_0000), (0x14, 0), (0x18, 0x80), (0x1c, 0x1000_0000), (0x20, 0x80), (4, 6)]
    {
        machine.write(0, offset, value);
    }
    // Without the page that mirrors config space (registers.rs, "nvidia-ep-pcfgm").
    let rest = (64 << 20) - 0x9_4000;
    let expected = [
        (0x2000_0000, 0x9_0000),
        (0x2009_4000, rest),
        (0x80_0000_0000, 256 << 20),
        (0x80_1000_0000, 32 << 20),
    ];
    assert_eq!(machine.mapper.ranges(), expected);
    assert_eq!(machine.bus.read(0x2000_0000, Width::B4), 0x1b20_00a1, "BOOT_0");
    assert_eq!(machine.read(0, 0x24), 0, "its I/O ports lead around the rules");
}

#[test]
fn io_ports_work_where_the_host_has_them_and_are_not_shown_where_not() {
    let machine = Machine::new(vec![endpoint()], false);
    machine.write(0, 0x20, 0x2020);
    machine.write(0, 4, 1);
    machine.bus.write(WINDOWS.io.start + 0x2024, Width::B2, 0x1234);
    assert_eq!(machine.bus.read(WINDOWS.io.start + 0x2024, Width::B4), 0x1234);
    assert_eq!(machine.devices[0].register(4, 4), Some(0x1234));
    for ports in [IoPorts::Absent, IoPorts::Unassigned] {
        let machine = Machine::new(vec![endpoint().io_ports(ports)], false);
        machine.write(0, 0x20, u64::from(u32::MAX));
        machine.write(0, 4, 3);
        assert_eq!((machine.read(0, 0x20), machine.read(0, 4) & 3), (0, 2), "{ports:?}");
    }
}

#[test]
fn a_devices_dma_and_messages_reach_the_guest() {
    for kernel in [false, true] {
        let machine = Machine::new(vec![endpoint()], kernel);
        machine.place();
        assert_eq!(machine.bus.read(0x2000_0000, Width::B4), registers::MAGIC.into());
        machine.use_msix(3);
        machine.register(registers::VECTOR, 3);
        assert!(!machine.command(registers::FIRE));
        let message = MsiMessage { address: DOORBELL, data: 67 };
        let by_kernel = machine.binder.deliver();
        assert_eq!((by_kernel.len(), machine.sent.take().len()), if kernel { (1, 0) } else { (0, 1) });
        assert!(by_kernel.iter().all(|m| *m == message));
        // Bus master off: neither messages nor DMA leave the device.
        machine.write(0, 4, 2);
        assert!(machine.command(registers::FIRE));
        assert!(!machine.devices[0].dma_write(outboard_host_pci::BusAddress(0), &[1]));
    }
}

#[test]
fn the_pin_is_served_each_time_it_rises() {
    let machine = Machine::new(vec![endpoint()], false);
    machine.place();
    for _ in 0..20 {
        assert!(!machine.command(registers::RAISE));
        assert!(machine.line.0.load(Ordering::SeqCst));
        // The guest's handler.
        assert!(!machine.command(registers::LOWER));
        eventually(|| !machine.line.0.load(Ordering::SeqCst));
    }
}

#[test]
fn c1_nothing_leaves_a_device_that_was_reset_or_dropped() {
    let machine = Machine::new(vec![endpoint()], true);
    machine.place();
    machine.use_msix(0);
    let resets = machine.devices[0].resets();
    machine.root.reset();
    assert_eq!(machine.devices[0].resets(), resets + 1);
    assert!(
        !machine.devices[0].fire(0) && !machine.devices[0].dma_write(outboard_host_pci::BusAddress(0), &[1])
    );
    let Machine { slot, devices, domain, root, bus, .. } = machine;
    drop((slot, root, bus));
    assert!(!devices[0].fire(0));
    assert_eq!((domain.stray_accesses(), domain.mapped().0), (0, 0));
    assert!(domain.limits().entries > 0);
}

/// What a guest does with a device from boot to shutdown.
fn life(machine: &Machine) {
    machine.set_up_port();
    for offset in (0..256).step_by(4) {
        machine.read(0, offset);
    }
    machine.place();
    machine.use_msix(1);
    machine.devices[0].fire(1);
    machine.bus.read(0x2000_0000, Width::B4);
    machine.bus.write(0x2000_0100, Width::B4, 1);
    machine.bus.write(machine.config(0, 0x44), Width::B1, 3);
    machine.bus.write(machine.config(0, 0x44), Width::B1, 0);
    machine.bus.write(machine.config(0, 0xb2), Width::B2, 0);
    machine.devices[0].set_pin(true);
    machine.devices[0].set_pin(false);
    machine.bus.write(machine.config(0, 0x79), Width::B1, 0x80);
    machine.root.reset();
}

const OPERATIONS: [Operation; 9] = [
    Operation::ConfigRead,
    Operation::ConfigWrite,
    Operation::MapBar,
    Operation::BarRead,
    Operation::BarWrite,
    Operation::EnableInterrupts,
    Operation::DisableInterrupts,
    Operation::UnmaskIntx,
    Operation::SetBusMaster,
];

#[test]
fn c4_a_cable_pulled_inside_any_operation_is_a_link_down() {
    for operation in OPERATIONS {
        let machine = Machine::new(vec![endpoint()], true);
        machine.devices[0].inject(operation, Fault { times: u32::MAX, ..Fault::once(Error::Gone) });
        life(&machine);
        let function = &machine.slot.functions()[0];
        if function.loss().is_none() {
            // The one that this life does not reach while it is looked at.
            machine.devices[0].remove();
        }
        assert!(
            matches!(machine.vacated.recv_timeout(Duration::from_secs(60)), Ok(Vacated::Lost(_))),
            "{operation:?}"
        );
        assert_eq!(machine.read(0, 0), u32::MAX);
        assert_eq!((machine.mapper.ranges(), machine.binder.bound()), (vec![], vec![]));
    }
}

#[test]
fn a_failing_operation_is_survived() {
    for operation in OPERATIONS {
        let machine = Machine::new(vec![endpoint()], true);
        let host = |_| Error::Host { call: "test".into(), source: io::Error::other("injected") };
        machine.devices[0].inject(operation, Fault { times: 5, ..Fault::once(host) });
        life(&machine);
        let lost = machine.slot.functions()[0].loss();
        if lost.is_none() {
            life(&machine);
            machine.set_up_port();
            assert_eq!(machine.read(0, 0), 0x0b0d_1234, "{operation:?}");
        } else {
            assert!(matches!(lost, Some(Loss::Broken(_))), "{operation:?}");
        }
    }
}

#[test]
fn c7_a_reset_that_fails_ends_the_slot_and_not_the_machine() {
    let faults: [fn(PciAddress) -> Error; 2] =
        [|address| Error::ResetFailed { address, why: "test".into() }, Error::Gone];
    for fault in faults {
        let machine = Machine::new(rtx5090().into(), true);
        machine.devices[1].inject(Operation::Reset, Fault::once(fault));
        machine.bus.write(machine.config(1, 0x69), Width::B1, 0x80);
        assert!(matches!(machine.vacated.recv_timeout(Duration::from_secs(60)), Ok(Vacated::Lost(_))));
        assert_eq!((machine.read(0, 0), machine.read(1, 0)), (u32::MAX, u32::MAX));
    }
}

/// What a host makes of an uncorrectable error (VFIO's error event) and of downstream port containment (the link is down): the device is
/// taken from the guest, which goes on; another one can be opened in its place.
#[test]
fn c8_an_uncorrectable_error_or_a_contained_link_takes_the_slot_and_not_the_machine() {
    let events: [fn(&SimulatedDevice); 2] = [SimulatedDevice::request_removal, SimulatedDevice::remove];
    for event in events {
        let machine = Machine::new(vec![endpoint()], true);
        machine.place();
        machine.use_msix(2);
        event(&machine.devices[0]);
        let vacated = machine.vacated.recv_timeout(Duration::from_secs(60));
        assert!(matches!(vacated, Ok(Vacated::Lost(_))), "{vacated:?}");
        assert_eq!((machine.read(0, 0), machine.bus.read(0x2000_0000, Width::B4)), (u32::MAX, 0xffff_ffff));
        assert_eq!(machine.mapper.ranges(), []);
        assert!(!machine.devices[0].fire(2) && machine.binder.bound().is_empty());
        assert_eq!(machine.domain.stray_accesses(), 0);
        let port = machine.bus.read(ECAM + (1 << 15) + 0x40 + 0x12, Width::B2);
        assert_eq!(port & 1 << 13, 0, "the guest sees the link down");
    }
}

#[test]
fn a_device_that_cannot_be_reset_is_used_all_the_same() {
    let machine = Machine::new(vec![endpoint()], false);
    machine.devices[0].inject(Operation::Reset, Fault { times: u32::MAX, ..Fault::once(Error::NoReset) });
    life(&machine);
    assert_eq!(machine.slot.functions()[0].loss(), None);
}

#[test]
fn a_bar_that_the_host_does_not_map_is_trapped() {
    let machine = Machine::new(vec![endpoint()], false);
    let refused = |_| Error::NotMappable { bar: 2, offset: 0, len: 0, why: "test" };
    machine.devices[0].inject(Operation::MapBar, Fault { times: u32::MAX, ..Fault::once(refused) });
    machine.place();
    assert_eq!(machine.mapper.ranges(), []);
    assert_eq!(machine.bus.read(0x80_0000_0000, Width::B4), 0x2222_2222);
    assert_eq!(machine.bus.read(0x2002_0000, Width::B4), 0x1111_1111);
}

#[test]
fn abuse_of_the_5090() {
    let machine = Machine::new(rtx5090().into(), true);
    for value in [u64::MAX, 0x5a5a_5a5a_5a5a_5a5a, 0] {
        for width in [Width::B1, Width::B2, Width::B4, Width::B8] {
            for function in 0..8 {
                for offset in 0..4096 {
                    machine.bus.read(machine.config(function, offset), width);
                    machine.bus.write(machine.config(function, offset), width, value);
                }
            }
        }
    }
    assert_eq!(machine.slot.functions().iter().find_map(|f| f.loss()), None);
    machine.root.reset();
    machine.set_up_port();
    assert_eq!((machine.read(0, 0), machine.read(1, 0)), (0x2b85_10de, 0x22e8_10de));
    assert_eq!(machine.slot.functions()[0].bar_read(0, 0, Width::B4), Ok(0x1b20_00a1));
}
