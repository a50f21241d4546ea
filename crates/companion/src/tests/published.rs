#[allow(dead_code)]
#[path = "../../../../lab/cases/src/guest/published.rs"]
mod driver;

use super::rig::*;
use driver::{Driver, Hardware, INVAL, IOERR, Layout, OK, Pages, exercise};
use outboard_abi as abi;
use outboard_abi::Status;
use outboard_abi::published::Layout as Published;
use outboard_bus::Width;
use outboard_pci::{ConfigAccess, PciFunction, RootPort};
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress};

const PAGES: Pages =
    Pages { command: RAM.start + 0x2_0040, requests: RAM.start + 0x2_1000, responses: RAM.start + 0x2_2000 };
const NOT_RAM: u64 = 0x0800_0000;

struct Function<'a> {
    rig: &'a Rig,
    port: Arc<RootPort>,
    published: Arc<crate::Published>,
}

impl<'a> Function<'a> {
    fn new(rig: &'a Rig, layout: Published) -> Self {
        let port = Arc::new(RootPort::new(5));
        let published = rig.companion.published(layout, port.clone());
        Self { rig, port, published }
    }

    fn driver(&self, layout: Layout) -> Driver<'_> {
        Driver::new(self, layout, PAGES).unwrap()
    }
}

impl Hardware for Function<'_> {
    fn read(&self, register: u32) -> u32 {
        self.published.bar_read(0, register.into(), Width::B4).unwrap() as u32
    }
    fn write(&self, register: u32, value: u32) {
        self.published.bar_write(0, register.into(), Width::B4, value.into()).unwrap();
    }
    fn store(&self, at: u64, bytes: &[u8]) {
        self.rig.ram.write_slice(bytes, GuestAddress(at)).unwrap();
    }
    fn load(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.rig.ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }
}

#[test]
fn a_driver_written_from_the_facts_finds_what_they_say() {
    for (host, guest) in [(Published::A, Layout::A), (Published::B, Layout::B)] {
        let rig = Rig::off(DART);
        let function = Function::new(&rig, host);
        let id = |at| function.published.config_read(ConfigAccess::new(at, Width::B4).unwrap());
        assert_eq!(
            (id(0), id(8) >> 8, id(0x34) & 0xff, id(0x3d & !3) >> 8 & 0xff),
            (0x0015_1b36, 0x08_8000, 0, 0)
        );
        let driver = function.driver(guest);
        let ram: Vec<u64> = (0..64).map(|page| RAM.start + 0x10_0000 + page * 0x5000).collect();
        exercise(&driver, &ram, NOT_RAM).unwrap();
        assert_eq!(rig.domain.mapped(), (0, 0));
        rig.no_mistakes();
    }
}

#[test]
fn the_served_function_is_where_the_guest_has_put_its_bus() {
    let rig = Rig::off(DART);
    let function = Function::new(&rig, Published::A);
    let driver = function.driver(Layout::A);
    assert_eq!(driver.managed(), 0);
    for bus in [1u32, 0x42] {
        let numbers = ConfigAccess::new(0x18, Width::B4).unwrap();
        function.port.config_write(numbers, bus << 16 | bus << 8);
        assert_eq!(driver.managed(), bus << 8);
    }
}

#[test]
fn the_device_reaches_what_was_mapped_and_only_from_the_first_success_on() {
    let rig = Rig::off(DART);
    let function = Function::new(&rig, Published::A);
    let driver = function.driver(Layout::A);
    assert_eq!(driver.map(&[(NOT_RAM, 4096)]).0, IOERR);
    assert_eq!(*rig.slot.log.lock().unwrap(), ["held"], "a failure lets nothing through");
    // Not on a boundary of 16 KiB, across one.
    let address = RAM.start + 3 * PAGE - 0x1000;
    let (status, responses) = driver.map(&[(address, 0x3000)]);
    assert_eq!((status, responses[0].len, responses[0].bus % PAGE), (OK, 0x3000, PAGE - 0x1000));
    assert_eq!(
        *rig.slot.log.lock().unwrap(),
        ["held", "first allowed"],
        "no neighbour of the managed function"
    );
    assert!(rig.dma(responses[0].bus + 0x2ff8));
    assert_eq!(rig.ram.read_obj::<u8>(GuestAddress(address + 0x2fff)).unwrap(), 0x5a);
    assert_eq!(rig.domain.mapped(), (1, 2 * PAGE));
    assert_eq!(driver.unmap(&[address]).0, OK);
    assert_eq!(rig.stats()[..4], [0, 0, 1, 1]);
}

#[test]
fn both_protocols_share_one_domain_and_one_reset() {
    let rig = Rig::new();
    let function = Function::new(&rig, Published::A);
    let driver = function.driver(Layout::A);
    assert_eq!(driver.map(&[(RAM.start, 16384)]).0, OK);
    let own = rig.map(RAM.start, PAGE);
    assert_eq!(own.status, 0);
    // Handles are counted up: the one before is the published mapping's. Taken down by its handle, its key is free.
    assert_eq!(rig.unmap(own.handle - 1), Status::Ok);
    assert_eq!(driver.unmap(&[RAM.start]).0, IOERR);
    assert_eq!(driver.map(&[(RAM.start, 16384)]).0, OK);
    rig.write(abi::CONTROL, Width::B4, abi::CONTROL_RESET.into());
    assert_eq!((rig.domain.mapped().0, driver.unmap(&[RAM.start]).0), (0, IOERR));
    assert_eq!(driver.map(&[(RAM.start, 16384)]).0, OK, "it starts again by itself");
    rig.companion.reset();
    function.published.reset();
    rig.slot.host.set_bus_master(false).unwrap();
    rig.companion.detach(false);
    assert_eq!(rig.domain.mapped().0, 0);
    assert_eq!(driver.map(&[(RAM.start, 16384)]).0, IOERR, "the slot is empty");
    assert_eq!(driver.ring(0), INVAL);
    rig.no_mistakes();
}

#[test]
fn registers_take_32_bits_only() {
    let rig = Rig::off(DART);
    let function = Function::new(&rig, Published::A);
    for (at, width) in [(0, Width::B1), (0, Width::B2), (0, Width::B8), (2, Width::B4), (0x10, Width::B8)] {
        assert!(function.published.bar_read(0, at, width).is_err());
        assert!(function.published.bar_write(0, at, width, 1).is_err());
    }
    assert!(function.published.bar_read(0, 0x18, Width::B4).is_err(), "the doorbell is written");
    assert!(function.published.bar_write(0, 0x0c, Width::B4, 0).is_err(), "the status is read");
}
