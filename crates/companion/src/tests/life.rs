use super::rig::*;
use outboard_abi as abi;
use outboard_abi::Status;
use outboard_bus::Width;
use outboard_host_pci::simulated::{Fault, Operation};
use outboard_host_pci::{DmaDomain, Error};
use outboard_pci::PciFunction;
use std::sync::atomic::Ordering;

fn control(rig: &Rig, value: u32) {
    rig.write(abi::CONTROL, Width::B4, value.into());
}

#[test]
fn nothing_is_mapped_and_no_dma_allowed_before_the_guest_asks() {
    let rig = Rig::off(DART);
    assert_eq!(*rig.slot.log.lock().unwrap(), ["held"]);
    rig.write(abi::QUEUE_FIRST, Width::B8, QUEUE);
    assert_eq!(rig.run(&[map(RAM.start, PAGE)]).0, Status::Off);
    for value in [0, 4, u32::MAX] {
        control(&rig, value);
    }
    assert_eq!((rig.read(abi::STATE), rig.domain.mapped().0), (0, 0));
    control(&rig, abi::CONTROL_ENABLE);
    control(&rig, abi::CONTROL_ENABLE);
    assert_eq!(*rig.slot.log.lock().unwrap(), ["held", "allowed"]);
    assert_eq!(rig.run(&[map(RAM.start, PAGE)]).0, Status::Ok);
}

#[test]
fn a_reset_silences_the_device_before_anything_is_taken_down() {
    let rig = Rig::new();
    let entry = rig.map(RAM.start, PAGE);
    assert!(rig.dma(entry.bus));
    control(&rig, abi::CONTROL_RESET);
    assert_eq!(
        *rig.slot.log.lock().unwrap(),
        ["held", "allowed", "held", "silenced, still mapped"],
        "stopped, then reset, then unmapped"
    );
    assert_eq!((rig.read(abi::STATE), rig.read(abi::QUEUE_FIRST), rig.domain.mapped().0), (0, 0, 0));
    assert!(!rig.dma(entry.bus));
    rig.no_mistakes();
    control(&rig, abi::CONTROL_ENABLE);
    rig.write(abi::QUEUE_FIRST, Width::B8, QUEUE);
    assert_eq!(rig.unmap(entry.handle), Status::NoSuchHandle);
    let next = rig.map(RAM.start, PAGE);
    assert!(next.status == 0 && next.handle > entry.handle);
}

#[test]
fn a_device_that_cannot_be_stopped_keeps_its_mappings_for_good() {
    let rig = Rig::new();
    let entry = rig.map(RAM.start, PAGE);
    rig.slot.stuck.store(true, Ordering::SeqCst);
    control(&rig, abi::CONTROL_RESET);
    assert_eq!((rig.read(abi::STATE), rig.domain.mapped().0), (2, 1));
    rig.write(abi::QUEUE_FIRST, Width::B8, QUEUE);
    assert_eq!(rig.run(&[map(RAM.start, PAGE)]).0, Status::Gone);
    rig.companion.detach(false);
    assert_eq!(rig.domain.mapped().0, 1);
    assert!(!rig.companion.attach(rig.checked.clone(), rig.slot.clone()), "its memory is still mapped");
    // The guest's driver says that its device does not use it any more.
    assert_eq!(rig.unmap(entry.handle), Status::Ok);
    rig.no_mistakes();
}

#[test]
fn a_slot_that_was_emptied_maps_no_more() {
    let rig = Rig::new();
    let entry = rig.map(RAM.start, PAGE);
    rig.device.remove();
    assert!(rig.slot.host.set_bus_master(false).is_err());
    rig.companion.detach(false);
    assert_eq!((rig.read(abi::STATE), rig.domain.mapped().0, rig.stats()[1]), (2, 0, 0));
    assert_eq!(rig.unmap(entry.handle), Status::NoSuchHandle);
    assert_eq!(rig.run(&[map(RAM.start, PAGE)]).0, Status::Gone);
    control(&rig, abi::CONTROL_ENABLE);
    control(&rig, abi::CONTROL_RESET);
    assert_eq!(rig.read(abi::STATE), 2);
    rig.no_mistakes();
    // Another device comes: handles of the first stay names of nothing.
    assert!(rig.companion.attach(rig.checked.clone(), rig.slot.clone()));
    assert!(!rig.companion.attach(rig.checked.clone(), rig.slot.clone()), "not over one that is there");
    assert_eq!(rig.read(abi::STATE), 0);
    control(&rig, abi::CONTROL_ENABLE);
    rig.write(abi::QUEUE_FIRST, Width::B8, QUEUE);
    let next = rig.map(RAM.start, PAGE);
    assert!(next.status == 0 && next.handle > entry.handle);
    assert_eq!(rig.unmap(entry.handle), Status::NoSuchHandle);
}

#[test]
fn a_host_that_refuses_is_told_apart_and_leaves_everything_as_it_was() {
    let rig = Rig::new();
    let refused = |_| Error::Host { call: "test".into(), source: std::io::Error::other("injected") };
    rig.domain.inject(Operation::DmaMap, Fault::once(refused));
    assert_eq!(Status::from_code(rig.map(RAM.start, PAGE).status), Some(Status::Host));
    let entry = rig.map(RAM.start, PAGE);
    rig.domain.inject(Operation::DmaUnmap, Fault::once(refused));
    assert_eq!(rig.unmap(entry.handle), Status::Host);
    assert!(rig.dma(entry.bus), "it is still mapped");
    assert_eq!(rig.unmap(entry.handle), Status::Ok);
    assert_eq!(rig.stats()[..2], [0, 0]);
}

#[test]
fn power_on_reset_forgets_registers_and_leaves_the_order_to_the_machine() {
    let rig = Rig::new();
    rig.map(RAM.start, PAGE);
    rig.companion.reset();
    assert_eq!((rig.read(abi::QUEUE_FIRST), rig.domain.mapped().0), (0, 1));
    rig.slot.host.set_bus_master(false).unwrap();
    rig.companion.detach(false);
    assert_eq!(rig.domain.mapped().0, 0);
    rig.no_mistakes();
}

#[test]
fn a_teardown_that_does_not_silence_the_device_is_noticed() {
    // What the other tests rely on: the DART of the tests does see it.
    let rig = Rig::new();
    rig.map(RAM.start, PAGE);
    rig.companion.detach(false);
    assert_eq!(rig.companion.usage().mistakes, 1);
}

#[test]
fn a_companion_dropped_with_mappings_leaves_memory_and_domain_behind() {
    let rig = Rig::new();
    rig.map(RAM.start, PAGE);
    let Rig { companion, domain, checked, .. } = rig;
    drop(companion);
    assert_eq!((domain.mapped().0, checked.limits().entries), (1, 65_536));
}

#[test]
fn a_driver_that_waits_for_dma_in_vain_is_told_of_once() {
    let rig = Rig::off(DART);
    let wants = |wants| rig.slot.wants.store(wants, Ordering::SeqCst);
    let looks = |rig: &Rig| [(); 4].map(|()| rig.companion.look());
    assert_eq!(looks(&rig), [false; 4], "no driver");
    wants(true);
    assert_eq!(looks(&rig), [false, true, false, false], "not at once, and not again");
    let rig = Rig::off(DART);
    let wants = |wants| rig.slot.wants.store(wants, Ordering::SeqCst);
    for _ in 0..3 {
        wants(true);
        assert!(!rig.companion.look());
        wants(false);
        assert!(!rig.companion.look(), "it went meanwhile");
    }
    wants(true);
    assert!(!rig.companion.look());
    control(&rig, abi::CONTROL_ENABLE);
    assert!(!rig.companion.look(), "the guest has asked");
    control(&rig, abi::CONTROL_RESET);
    assert_eq!(looks(&rig), [false, true, false, false], "held back again");
}

#[test]
fn a_guest_that_panics_is_heard_once() {
    let rig = Rig::new();
    control(&rig, abi::CONTROL_PANICKED);
    let (sender, heard) = std::sync::mpsc::channel();
    rig.companion.on_guest_panic(Box::new(move || sender.send(()).unwrap()));
    for _ in 0..3 {
        control(&rig, abi::CONTROL_PANICKED);
    }
    assert_eq!(heard.try_iter().count(), 1);
}
