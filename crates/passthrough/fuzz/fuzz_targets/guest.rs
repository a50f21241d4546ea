#![no_main]
//! A hostile device in the hands of a hostile guest.

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use outboard_bus::{Event, IrqLine, MmioBus, MsiMessage, MsiSink, Width};
use outboard_host_pci::simulated::{Model, SimulatedDevice, SimulatedDomain, endpoint, rtx5090};
use outboard_host_pci::{MappedBar, PciAddress};
use outboard_passthrough::{Function, GuestMapper, IntxWiring, VectorBinder, Wiring, WiringError};
use outboard_pci::{Ecam, RootComplex, RootPort, Windows};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

const ECAM: u64 = 0x40_0000_0000;
const WINDOWS: Windows = Windows {
    mmio32: 0x2000_0000..0x4000_0000,
    mmio64: 0x80_0000_0000..0x90_0000_0000,
    io: 0x0f00_0000..0x0f10_0000,
};
const DOORBELL: u64 = 0x0802_0040;
/// PMCSR of both models: waking takes ten milliseconds, so sleeping is left to the tests.
const POWER: std::ops::Range<u64> = 0x40..0x48;

#[derive(Arbitrary, Debug)]
enum Base {
    Endpoint,
    Gpu,
    Audio,
}

#[derive(Arbitrary, Debug)]
struct Input {
    base: Base,
    /// Changes to config space: offset and dword.
    device: Vec<(u16, u32)>,
    /// The kernel carries interrupts.
    kernel: bool,
    guest: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    ConfigRead { at: u16, width: u8 },
    ConfigWrite { at: u16, width: u8, value: u32 },
    PortWrite { at: u16, width: u8, value: u32 },
    Bar { index: u8, address: u32, high: u8 },
    Read { high: bool, at: u32, width: u8 },
    Write { high: bool, at: u32, width: u8, value: u64 },
    Fire(u16),
    Pin(bool),
    SetUp,
    Reset,
    /// Through the DMA device: the functions restart where they are, or are held back from DMA.
    Restart,
    Hold(bool),
    Pull,
}

#[derive(Default)]
struct Mapper(Mutex<BTreeMap<u64, u64>>);

impl GuestMapper for Mapper {
    fn map(&self, ipa: u64, bar: Arc<dyn MappedBar>) -> Result<(), WiringError> {
        let (len, mut mapped) = (bar.len(), self.0.lock().unwrap());
        assert!(ipa % 0x4000 == 0 && len % 0x4000 == 0 && len > 0);
        let inside = |w: &std::ops::Range<u64>| w.start <= ipa && ipa + len <= w.end;
        assert!(inside(&WINDOWS.mmio32) || inside(&WINDOWS.mmio64));
        assert!(mapped.iter().all(|(at, other)| ipa + len <= *at || at + other <= ipa));
        mapped.insert(ipa, len);
        Ok(())
    }
    fn unmap(&self, ipa: u64, len: u64) -> Result<(), WiringError> {
        assert_eq!(self.0.lock().unwrap().remove(&ipa), Some(len));
        Ok(())
    }
}

struct Sink;
impl MsiSink for Sink {
    fn send(&self, _: MsiMessage) {}
}
impl IrqLine for Sink {
    fn set(&self, _: bool) {}
}

#[derive(Default)]
struct Binder(Mutex<Vec<MsiMessage>>);
impl VectorBinder for Binder {
    fn bind(&self, message: MsiMessage, _: &Event) -> Result<(), WiringError> {
        if message.address != DOORBELL {
            return Err("no interrupt of the guest".into());
        }
        self.0.lock().unwrap().push(message);
        Ok(())
    }
    fn unbind(&self, message: MsiMessage, _: &Event) {
        let mut bound = self.0.lock().unwrap();
        let at = bound.iter().position(|m| *m == message).expect("only what is bound is unbound");
        bound.swap_remove(at);
    }
}

fn model(input: &Input) -> Model {
    let [gpu, audio] = rtx5090();
    let base = match input.base {
        Base::Endpoint => endpoint(),
        Base::Gpu => gpu,
        Base::Audio => audio,
    };
    // BARs stay: that they are sound is the host kernel's promise, and those that are not are refused.
    let outside_header = |at: u16| if at < 0x34 { 0x34 + at } else { at } & 0xffc;
    input
        .device
        .iter()
        .take(64)
        .fold(base, |model, (at, value)| model.raw(outside_header(at % 0xfc0).into(), &value.to_le_bytes()))
}

fn width(selector: u8) -> Width {
    [Width::B1, Width::B2, Width::B4, Width::B8][usize::from(selector % 4)]
}

struct Machine {
    bus: Arc<MmioBus>,
    root: Arc<RootComplex>,
    device: Arc<SimulatedDevice>,
    function: Arc<Function>,
}

impl Machine {
    fn config_write(&self, at: u64, width: Width, value: u64) {
        let value = if POWER.contains(&at) || POWER.contains(&(at + 3)) { 0 } else { value };
        self.bus.write(ECAM + (1 << 20) + at, width, value);
    }

    fn set_up(&self) {
        let port = ECAM + (1 << 15);
        for (at, value) in [
            (0x18, 0x0001_0100),
            (0x1c, 0xf010),
            (0x20, 0x3ff0_2000),
            (0x24, 0xfff1_0001),
            (0x28, 0x80),
            (0x2c, 0x8f),
            (4, 7),
        ] {
            self.bus.write(port + at, Width::B4, value);
        }
        self.config_write(4, Width::B2, 7);
    }

    fn step(&self, step: &Step) {
        // The highest addresses of either window stand for I/O ports.
        let place = |high: bool, at: u32| match (high, at >> 28) {
            (_, 0xf) => WINDOWS.io.start + u64::from(at & 0xf_ffff),
            (true, _) => WINDOWS.mmio64.start + u64::from(at),
            (false, _) => WINDOWS.mmio32.start + u64::from(at),
        };
        match *step {
            Step::ConfigRead { at, width: w } => {
                self.bus.read(ECAM + (1 << 20) + u64::from(at % 4096), width(w));
            }
            Step::ConfigWrite { at, width: w, value } => {
                self.config_write((at % 4096).into(), width(w), value.into());
            }
            Step::PortWrite { at, width: w, value } => {
                self.bus.write(ECAM + (1 << 15) + u64::from(at % 4096), width(w), value.into());
            }
            Step::Bar { index, address, high } => {
                let register = 0x10 + 4 * u64::from(index % 6);
                self.config_write(register, Width::B4, address.into());
                self.config_write(register + 4, Width::B4, 0x80 + u64::from(high % 16));
            }
            Step::Read { high, at, width: w } => {
                self.bus.read(place(high, at), width(w));
            }
            Step::Write { high, at, width: w, value } => {
                self.bus.write(place(high, at), width(w), value);
            }
            Step::Fire(vector) => {
                self.device.fire(vector);
            }
            Step::Pin(high) => self.device.set_pin(high),
            Step::SetUp => self.set_up(),
            Step::Reset => self.root.reset(),
            Step::Restart => {
                self.function.restart();
            }
            Step::Hold(held) => self.function.hold_dma(held),
            Step::Pull => self.device.remove(),
        }
    }
}

fuzz_target!(|input: Input| {
    let address = PciAddress { segment: 0, bus: 1, device: 0, function: 0 };
    let device = SimulatedDevice::new(address, model(&input)).unwrap();
    let Ok(host) = device.open(&SimulatedDomain::new()) else { return };
    let (mapper, binder) = (Arc::new(Mapper::default()), Arc::new(Binder::default()));
    let wiring = Wiring {
        mapper: mapper.clone(),
        msi: Arc::new(Sink),
        vectors: input.kernel.then(|| binder.clone() as Arc<dyn VectorBinder>),
        intx: Some(IntxWiring { line: Arc::new(Sink), kernel: None }),
    };
    let Ok(function) = Function::new(Arc::new(host), wiring) else { return };
    let function = Arc::new(function);
    let bus = Arc::new(MmioBus::new());
    let root = RootComplex::new(&bus, WINDOWS);
    bus.insert(ECAM, Ecam::len(4), Arc::new(Ecam::new(root.clone()))).unwrap();
    root.add_port(1, Arc::new(RootPort::new(1))).unwrap();
    root.add_behind(1, 0, function.clone()).unwrap();
    let machine = Machine { bus, root, device, function: function.clone() };
    machine.set_up();
    for step in input.guest.iter().take(256) {
        machine.step(step);
        if function.loss().is_some() {
            function.withdraw();
        }
    }
    drop((machine, function));
    assert!(mapper.0.lock().unwrap().is_empty());
    assert!(binder.0.lock().unwrap().is_empty());
});
