//! Faults of the list that have no better place: who else suffers (A12, C7, C8, C9, D8), and functions that hide (B12).

use super::device::{DOORBELL, FakeHost, Log, Rig, Space};
use crate::Function;
use outboard_bus::Width;
use outboard_host_pci::simulated::{Fault, Operation, SimulatedDevice, SimulatedDomain, endpoint};
use outboard_host_pci::{HostBarKind, PciAddress};
use outboard_pci::{ConfigAccess, PciFunction};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

const COMMAND: u64 = 4;
/// The rig's AER capability: uncorrectable status, mask and severity, correctable status and mask.
const AER: [u64; 5] = [0x124, 0x128, 0x12c, 0x130, 0x134];

/// 256 vectors raised from four threads while the guest masks and unmasks its own: none is lost, none comes twice.
#[test]
fn a12_256_vectors_from_four_threads_come_once_each() {
    const VECTORS: u16 = 256;
    const ROUNDS: usize = 40;
    let mut space = Space::endpoint();
    space.put(0xb0, (u32::from(VECTORS) - 1) << 16 | 0xbc11).put(0xb4, 0).put(0xb8, 0x2000);
    let bars = [(0, HostBarKind::Memory32 { prefetchable: false }, 0x1_0000)];
    let mut host = FakeHost::new(space, &bars, &Log::default());
    host.counts.msix = VECTORS;
    let rig = Rig::with(host, None);
    rig.set(0x10, 0x2000_0000);
    rig.write(COMMAND, Width::B2, 6);
    for vector in 0..u64::from(VECTORS) {
        let entry = 0x2000_0000 + 16 * vector;
        rig.bus.write(entry, Width::B8, DOORBELL);
        rig.bus.write(entry + 8, Width::B8, 0x100 + vector);
    }
    rig.write(0xb2, Width::B2, 0x8000);
    std::thread::scope(|scope| {
        for quarter in 0..4 {
            let (rig, own) = (&rig, quarter * 64..quarter * 64 + 64);
            scope.spawn(move || {
                for _ in 0..ROUNDS {
                    own.clone().for_each(|vector| rig.host.raise(vector));
                    // One that is masked meanwhile pends, and comes once.
                    let control = 0x2000_000c + 16 * u64::from(own.start);
                    rig.bus.write(control, Width::B4, 1);
                    rig.host.raise(own.start);
                    rig.bus.write(control, Width::B4, 0);
                }
            });
        }
    });
    let mut seen: HashMap<u32, usize> = HashMap::new();
    rig.sent.take().iter().for_each(|message| *seen.entry(message.data).or_default() += 1);
    assert_eq!(seen.len(), usize::from(VECTORS));
    for vector in 0..u32::from(VECTORS) {
        let expected = if vector.is_multiple_of(64) { 2 * ROUNDS } else { ROUNDS };
        assert_eq!(seen.get(&(0x100 + vector)), Some(&expected), "vector {vector}");
    }
}

/// Requests of a phantom function carry another function's identity, which the IOMMU may know.
#[test]
fn b12_phantom_functions_are_neither_shown_nor_turned_on() {
    let mut space = Space::endpoint();
    // DEVCAL: two bits of phantom functions, five-bit tags and more.
    space.put(0x74, 0x1000_8ff9);
    let bars = [(0, HostBarKind::Memory32 { prefetchable: false }, 0x1_0000)];
    let rig = Rig::with(FakeHost::new(space, &bars, &Log::default()), None);
    assert_eq!(rig.dword(0x74) >> 3 & 3, 0, "none to be had");
    let before = rig.host.peek(0x78);
    for width in [Width::B4, Width::B2] {
        rig.write(0x78, width, 0x0200);
        rig.write(0x78, width, u64::from(u32::MAX) & !0x8000);
    }
    rig.write(0x79, Width::B1, 0x02);
    assert_eq!(rig.host.peek(0x78) & 0x0200, before & 0x0200, "Phantom Functions Enable in the hardware");
}

/// A device that resets for long (an RTX 5090 has been seen to hang in an FLR) does so alone: memory of others answers meanwhile.
#[test]
fn c7_a_reset_that_takes_long_holds_up_no_other_devices_memory() {
    let domain = SimulatedDomain::new();
    let rig = Rig::new();
    let address = PciAddress { segment: 0, bus: 2, device: 0, function: 0 };
    let device = SimulatedDevice::new(address, endpoint()).unwrap();
    let slow = Function::new(Arc::new(device.open(&domain).unwrap()), rig.wiring()).unwrap();
    rig.place();
    let (resets, delay) = (device.resets(), Duration::from_secs(3));
    device.inject(Operation::Reset, Fault { times: 1, ..Fault::slow(delay) });
    let flr = ConfigAccess::new(0x79, Width::B1).unwrap();
    std::thread::scope(|scope| {
        let resetting = scope.spawn(|| slow.config_write(flr, 0x8000));
        // Its own memory is out of reach, and says so at once.
        while slow.bar_read(0, 0, Width::B4).is_ok() {
            std::thread::yield_now();
        }
        for _ in 0..100 {
            assert_eq!(rig.bus.read(0x2001_0010, Width::B2), 0x0010);
            assert!(slow.bar_read(0, 0, Width::B4).is_err());
        }
        assert!(!resetting.is_finished(), "the reset was to take longer than that");
    });
    assert_eq!(device.resets(), resets + 1);
    assert!(slow.bar_read(0, 0, Width::B4).is_ok());
}

/// Errors that the device reports as fast as it can: the guest sees and clears them; masks, severities and reporting stay the host's.
#[test]
fn c8_an_aer_storm_is_the_guests_to_see_and_nothing_of_it_reaches_the_hosts_masks() {
    let rig = Rig::new();
    let masks: Vec<u32> = [AER[1], AER[2], AER[4]].iter().map(|at| rig.host.peek(*at as u16)).collect();
    let reporting = rig.host.peek(0x78) & 0xf;
    for round in 0..2_000_u32 {
        rig.host.poke(AER[3] as u16, 1 << (round % 13));
        rig.host.poke(AER[0] as u16, 1 << (round % 22));
        assert_eq!(rig.dword(AER[3]), 1 << (round % 13));
        assert_eq!(rig.dword(AER[0]), 1 << (round % 22));
        rig.log.take();
        rig.set(AER[3], u32::MAX);
        rig.set(AER[0], u32::MAX);
        let cleared = ["write 0x130 4 0xffffffff", "write 0x124 4 0xffffffff"];
        assert_eq!(rig.log.take(), cleared, "the guest's clearing reaches the device");
        // A guest that has all errors masked and unmasked, and reporting turned on and off.
        for at in [AER[1], AER[2], AER[4]] {
            rig.set(at, if round % 2 == 0 { u32::MAX } else { 0 });
        }
        rig.write(0x78, Width::B2, if round % 2 == 0 { 0xf } else { 0 });
    }
    let after: Vec<u32> = [AER[1], AER[2], AER[4]].iter().map(|at| rig.host.peek(*at as u16)).collect();
    assert_eq!((after, rig.host.peek(0x78) & 0xf), (masks, reporting));
    assert_eq!(rig.function.loss(), None);
}

/// The next owner gets the device as from power-on, however the last one (a process that was killed, another driver) left it.
#[test]
fn c9_a_device_left_dirty_is_stopped_and_reset_before_the_guest_gets_it() {
    let rig = Rig::new();
    for _ in 0..20 {
        let host = Arc::new(FakeHost::endpoint(&Log::default()));
        host.poke(4, 0x0010_0006);
        host.poke(0x10, 0xdead_0000);
        host.poke(0x52, 0x0001_018a);
        let function = Function::new(host.clone(), rig.wiring()).unwrap();
        let log = host.log.take();
        let at = |what: &str| {
            log.iter().position(|entry| entry == what).unwrap_or_else(|| panic!("{what}: {log:?}"))
        };
        assert!(at("bus master false") < at("reset"));
        assert!(!log.contains(&"bus master true".to_owned()), "no DMA before the guest asks");
        assert_eq!(function.config_read(ConfigAccess::new(0x10, Width::B4).unwrap()), 0);
        assert_eq!(function.loss(), None);
    }
}

#[test]
fn c9_a_device_has_one_owner_at_a_time() {
    let (domain, rig) = (SimulatedDomain::new(), Rig::new());
    let device = SimulatedDevice::new(super::device::ADDRESS, endpoint()).unwrap();
    for _ in 0..20 {
        let function = Function::new(Arc::new(device.open(&domain).unwrap()), rig.wiring()).unwrap();
        assert!(device.open(&domain).is_err(), "it is open already");
        drop(function);
    }
}

/// A guest that does nothing but toggle what makes work for the host: each thing taken is given back before it is taken again.
#[test]
fn d8_toggling_interrupts_decoding_and_resets_for_ever_takes_nothing_for_good() {
    let rig = Rig::new();
    for _ in 0..300 {
        rig.place();
        rig.write(0xb2, Width::B2, 0x8000);
        rig.write(0xb2, Width::B2, 0);
        rig.write(0x52, Width::B2, 1);
        rig.write(0x52, Width::B2, 0);
        rig.write(COMMAND, Width::B2, 0);
        rig.write(0x79, Width::B1, 0x80);
    }
    rig.function.withdraw();
    let log = rig.log.take();
    let count = |what: &str| log.iter().filter(|entry| entry.starts_with(what)).count();
    assert!(count("enable") >= 900 && count("enable") <= count("disable"), "{}", count("enable"));
    assert_eq!(count("map "), count("unmap "));
    assert_eq!(rig.mapper.ranges(), []);
    // What the host maps of the BARs is mapped once, and goes with the function.
    assert_eq!(count("drop"), 3);
}
