use super::device::{FakeHost, Rig};
use crate::{Error, Function, Loss, Slot, SlotListener, Vacated};
use outboard_bus::{Event, Width};
use outboard_host_pci::HostFunction;
use outboard_pci::{AddError, HotPlug, RootPort};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

struct Listener(Mutex<Sender<Vacated>>);
impl SlotListener for Listener {
    fn vacated(&self, why: Vacated) {
        self.0.lock().unwrap().send(why).unwrap();
    }
}

/// A hot-plug port 2 beside the rig's own, with bus 2 behind it.
struct Machine {
    rig: Rig,
    port: Arc<RootPort>,
    power: Arc<Event>,
    listener: Arc<Listener>,
    vacated: Receiver<Vacated>,
}

impl Machine {
    fn new() -> Self {
        let rig = Rig::new();
        let power = Arc::new(Event::new().unwrap());
        let hot_plug = HotPlug { msi: rig.sent.clone(), power: power.clone() };
        let port = Arc::new(RootPort::with_hot_plug(2, hot_plug));
        rig.root.add_port(2, port.clone()).unwrap();
        let (sender, vacated) = channel();
        let machine = Self { rig, port, power, listener: Arc::new(Listener(Mutex::new(sender))), vacated };
        machine.port_write(0x18, 0x0002_0200);
        machine.port_write(0x20, 0x3ff0_2000);
        machine.port_write(0x04, 6);
        machine
    }

    fn port_write(&self, offset: u64, value: u64) {
        self.rig.bus.write(super::device::ECAM + (2 << 15) + offset, Width::B4, value);
    }

    fn hosts(&self, numbers: &[u8]) -> Vec<Arc<FakeHost>> {
        let host = |number: &u8| {
            let mut host = FakeHost::endpoint(&self.rig.log);
            host.address.function = *number;
            Arc::new(host)
        };
        numbers.iter().map(host).collect()
    }

    fn plug(&self, hosts: &[Arc<FakeHost>]) -> Result<Slot, Error> {
        let function =
            |host: &Arc<FakeHost>| Arc::new(Function::new(host.clone(), self.rig.wiring()).unwrap());
        let functions = hosts.iter().map(function).collect();
        Slot::plug(
            &self.rig.root,
            2,
            (self.port.clone(), self.power.clone()),
            functions,
            self.listener.clone(),
        )
    }

    fn read(&self, function: u64, offset: u64) -> u64 {
        self.rig.bus.read(super::device::ECAM + (2 << 20) + (function << 12) + offset, Width::B4)
    }

    fn vacated(&self) -> Vacated {
        self.vacated.recv_timeout(Duration::from_secs(60)).unwrap()
    }
}

const NONE: u64 = 0xffff_ffff;

#[test]
fn functions_keep_their_numbers_behind_one_port() {
    let machine = Machine::new();
    let slot = machine.plug(&machine.hosts(&[0, 1, 5])).unwrap();
    for function in 0..8 {
        assert_eq!(machine.read(function, 0) != NONE, [0, 1, 5].contains(&function), "{function}");
    }
    assert_eq!((machine.read(0, 0x0c) >> 16, machine.read(1, 0x0c) >> 16), (0x80, 0));
    assert!(machine.port.link_up());
    drop(slot);
    assert_eq!((machine.read(0, 0), machine.port.link_up()), (NONE, false));
}

#[test]
fn a_slot_without_function_0_gets_one() {
    let machine = Machine::new();
    let _slot = machine.plug(&machine.hosts(&[3, 1])).unwrap();
    assert_eq!([0, 1, 3].map(|function| machine.read(function, 0) != NONE), [true, false, true]);
}

#[test]
fn c4_a_pulled_cable_is_a_link_down_and_the_vm_goes_on() {
    let machine = Machine::new();
    let hosts = machine.hosts(&[0, 1]);
    let slot = machine.plug(&hosts).unwrap();
    machine.rig.place();
    let mapped = machine.rig.mapper.ranges();
    hosts.iter().for_each(|host| host.pull());
    let addresses = hosts.iter().map(|host| (host.identity().address, Loss::Gone)).collect();
    assert_eq!(machine.vacated(), Vacated::Lost(addresses));
    assert_eq!((machine.read(0, 0), machine.port.link_up()), (NONE, false));
    // The other slot is as it was.
    assert_eq!(machine.rig.mapper.ranges(), mapped);
    assert_eq!(machine.rig.dword(0), 0x2b85_10de);
    drop(slot);
    // Another device in the same slot.
    let _slot = machine.plug(&machine.hosts(&[0])).unwrap();
    assert_ne!(machine.read(0, 0), NONE);
}

#[test]
fn c7_one_function_that_fails_its_reset_takes_the_slot() {
    let machine = Machine::new();
    let hosts = machine.hosts(&[0, 1]);
    let slot = machine.plug(&hosts).unwrap();
    hosts[1].reset_fails.store(true, Ordering::SeqCst);
    machine.rig.bus.write(super::device::ECAM + (2 << 20) + (1 << 12) + 0x79, Width::B1, 0x80);
    match machine.vacated() {
        Vacated::Lost(losses) => {
            assert!(matches!(losses[..], [(_, Loss::Gone), (_, Loss::Broken(_))]), "{losses:?}");
        }
        Vacated::Ejected => panic!("nobody asked for that"),
    }
    assert_eq!(slot.functions()[0].loss(), Some(Loss::Gone));
}

#[test]
fn an_orderly_eject_resets_before_it_gives_back() {
    let machine = Machine::new();
    let slot = machine.plug(&machine.hosts(&[0])).unwrap();
    slot.request_eject();
    assert_eq!(machine.rig.bus.read(super::device::ECAM + (2 << 15) + 0x5a, Width::B2) & 1, 1, "the button");
    machine.rig.log.take();
    // The guest turns the power off.
    machine.port_write(0x58, 1 << 10);
    assert_eq!(machine.vacated(), Vacated::Ejected);
    let log = machine.rig.log.take();
    assert_eq!(log[..2], ["bus master false", "reset"], "{log:?}");
    assert_eq!(slot.functions()[0].loss(), None, "it can be handed out again");
    assert!(!machine.port.link_up());
    drop(slot);
    // And back: seen once the guest gives it power.
    let _slot = machine.plug(&machine.hosts(&[0])).unwrap();
    assert_eq!(machine.read(0, 0), NONE);
    machine.port_write(0x58, 0);
    assert_ne!(machine.read(0, 0), NONE);
}

#[test]
fn a_device_that_does_not_come_back_after_an_eject_is_reported_as_such() {
    let machine = Machine::new();
    let hosts = machine.hosts(&[0, 1]);
    let _slot = machine.plug(&hosts).unwrap();
    hosts[0].reset_fails.store(true, Ordering::SeqCst);
    machine.port_write(0x58, 1 << 10);
    match machine.vacated() {
        Vacated::Lost(losses) => {
            assert!(matches!(losses[..], [(_, Loss::Broken(_)), (_, Loss::Gone)]), "{losses:?}");
        }
        Vacated::Ejected => panic!("it is broken"),
    }
    assert!(!machine.port.link_up());
}

#[test]
fn a_slot_that_is_not_empty_stays_as_it_is() {
    let machine = Machine::new();
    let _slot = machine.plug(&machine.hosts(&[0, 1])).unwrap();
    let error = machine.plug(&machine.hosts(&[0, 1])).err().unwrap();
    assert!(matches!(error, Error::Place { source: AddError::Taken { .. }, .. }), "{error}");
    assert_ne!((machine.read(0, 0), machine.read(1, 0)), (NONE, NONE));
}
