use super::rig::*;
use outboard_abi as abi;
use outboard_abi::{Entry, Status};
use outboard_bus::{AccessError, Width};
use outboard_dart::Config as DartConfig;
use outboard_pci::{ConfigAccess, PciFunction};
use std::sync::atomic::Ordering;
use vm_memory::{Bytes, GuestAddress};

#[test]
fn registers_say_who_it_is_and_what_it_can() {
    let rig = Rig::off(DartConfig { bytes: 24 << 20, entries: 666, ..DART });
    let words = [
        (abi::MAGIC, 0x414d_444f),
        (abi::VERSION, 0x0001_0000),
        (abi::FEATURES, 3),
        (abi::SERVED, 5 << 3),
        (abi::LIMIT_BYTES, 24 << 20),
        (abi::LIMIT_ENTRIES, 666),
        (abi::GRANULE, 16384),
        (abi::ADDRESS_BITS, 32),
        (abi::QUEUES, 5),
        (abi::BATCH, 256),
        (abi::STATE, 0),
    ];
    for (at, value) in words {
        assert_eq!(rig.read(at), value, "{at:#x}");
    }
    let half = |at| rig.companion.bar_read(0, at, Width::B4);
    assert_eq!((half(0x10), half(0x14)), (Ok(24 << 20), Ok(0)));
    let id = ConfigAccess::new(0, Width::B4).unwrap();
    assert_eq!(rig.companion.config_read(id), 0x0bd0_1234);
    for (at, width) in [(0, Width::B1), (0, Width::B2), (2, Width::B4), (4, Width::B8), (0x10, Width::B1)] {
        assert_eq!(rig.companion.bar_read(0, at, width), Err(AccessError::BadWidth), "{at:#x} {width:?}");
        assert!(rig.companion.bar_write(0, at, width, 1).is_err());
    }
    for at in [0x2c, 0x38, 0x7c, 0x4a0, 0xffc, 0x408] {
        assert_eq!(half(at), Err(AccessError::NoRegister), "{at:#x}");
    }
    assert_eq!(rig.companion.bar_write(0, 0, Width::B4, 7), Err(AccessError::NoRegister));
}

#[test]
fn a_batch_maps_and_unmaps_where_the_dart_says() {
    let rig = Rig::new();
    let (status, done) = rig.run(&[map(RAM.start, PAGE), map(RAM.start + 4 * PAGE, 2 * PAGE)]);
    assert_eq!((status, done[0].status, done[1].status), (Status::Ok, 0, 0));
    assert_eq!((done[0].bus, done[1].bus), (0x8000_0000, 0x8000_0000 + PAGE));
    assert_ne!(done[0].handle, done[1].handle);
    assert_eq!(rig.stats(), [3 * PAGE, 2, 2, 0, 0, 1]);
    assert!(rig.dma(done[1].bus));
    assert_eq!(rig.ram.read_obj::<u64>(GuestAddress(RAM.start + 4 * PAGE)).unwrap(), 0x5a5a_5a5a_5a5a_5a5a);
    assert_eq!(rig.unmap(done[0].handle), Status::Ok);
    assert_eq!(rig.unmap(done[0].handle), Status::NoSuchHandle);
    let again = rig.map(RAM.start, PAGE);
    assert!(again.status == 0 && again.handle > done[1].handle, "handles are not used twice");
    assert_eq!(rig.read(abi::QUEUE_FIRST + abi::QUEUE_FAILED), 0);
    rig.no_mistakes();
}

#[test]
fn a_failed_entry_changes_and_stops_nothing() {
    let rig = Rig::new();
    let mut flags = map(RAM.start, PAGE);
    flags.flags = 1;
    let unknown = Entry { op: 7, ..map(RAM.start, PAGE) };
    let expected = [
        (flags, Status::Unknown),
        (unknown, Status::Unknown),
        (map(RAM.start, 0), Status::Misaligned),
        (map(RAM.start + 0x1000, PAGE), Status::Misaligned),
        (map(RAM.start, PAGE + 1), Status::Misaligned),
        (map(RAM.start - PAGE, PAGE), Status::BadRange),
        (map(RAM.end - PAGE, 2 * PAGE), Status::BadRange),
        (map(0x0800_0000, PAGE), Status::BadRange),
        (map(!(PAGE - 1), PAGE), Status::BadRange),
        (map(!(PAGE - 1), !(PAGE - 1)), Status::BadRange),
        (map(RAM.start, !(PAGE - 1)), Status::BadRange),
        (map(RAM.start, HIGH.end - RAM.start), Status::BadRange),
        (unmap(0), Status::NoSuchHandle),
        (unmap(u64::MAX), Status::NoSuchHandle),
        (map(HIGH.end - PAGE, PAGE), Status::Ok),
    ];
    let entries: Vec<Entry> = expected.iter().map(|(entry, _)| *entry).collect();
    let (status, done) = rig.run(&entries);
    assert_eq!(status, Status::Unknown, "the first that is not success");
    assert_eq!(rig.read(abi::QUEUE_FIRST + abi::QUEUE_FAILED), 14);
    for (done, (entry, status)) in done.iter().zip(&expected) {
        assert_eq!(Status::from_code(done.status), Some(*status), "{entry:x?}");
        if *status != Status::Ok {
            assert_eq!(Entry { status: u32::MAX, ..*done }, *entry, "nothing but the status is written");
        }
    }
    assert_eq!(rig.stats(), [PAGE, 1, 1, 0, 14, 1]);
    assert_eq!(rig.checked.calls.load(Ordering::SeqCst), 1, "the domain sees what is right only");
}

#[test]
fn exhaustion_says_of_what() {
    let rig = Rig::off(DartConfig { bytes: 4 * PAGE, entries: 3, ..DART });
    rig.write(abi::CONTROL, Width::B4, 1);
    rig.write(abi::QUEUE_FIRST, Width::B8, QUEUE);
    let of = |entry: Entry| Status::from_code(entry.status).unwrap();
    let big = rig.map(RAM.start, 4 * PAGE);
    assert_eq!(of(rig.map(RAM.start, PAGE)), Status::OutOfBytes);
    rig.unmap(big.handle);
    for _ in 0..3 {
        assert_eq!(of(rig.map(RAM.start, PAGE)), Status::Ok);
    }
    assert_eq!(of(rig.map(RAM.start, PAGE)), Status::OutOfEntries);
    let last = DART.first + 4 * PAGE - 1;
    let rig = Rig::off(DartConfig { last, return_delay: u64::MAX, ..DART });
    rig.write(abi::CONTROL, Width::B4, 1);
    rig.write(abi::QUEUE_FIRST, Width::B8, QUEUE);
    let four: Vec<Entry> = (0..4).map(|_| rig.map(RAM.start, PAGE)).collect();
    rig.unmap(four[0].handle);
    assert_eq!(of(rig.map(RAM.start, PAGE)), Status::Returning);
    rig.unmap(four[2].handle);
    assert_eq!(of(rig.map(RAM.start, 2 * PAGE)), Status::Fragmented);
    rig.no_mistakes();
}

#[test]
fn a_queue_is_checked_before_its_entries_are() {
    let rig = Rig::new();
    let doorbell = abi::QUEUE_FIRST + abi::QUEUE_DOORBELL;
    let ring = |base: u64, count: u64| {
        rig.write(abi::QUEUE_FIRST, Width::B4, base & 0xffff_ffff);
        rig.write(abi::QUEUE_FIRST + 4, Width::B4, base >> 32);
        assert_eq!(rig.read(abi::QUEUE_FIRST), base);
        rig.write(doorbell, Width::B4, count);
        rig.status()
    };
    for count in [0, 257, 0xffff_ffff] {
        assert_eq!(ring(QUEUE, count), Status::BadCount);
    }
    let bad = [0, QUEUE + 8, 0x2000_0000, RAM.end - 64, RAM.end, !63, u64::MAX, HIGH.start - 64];
    for base in bad {
        assert_eq!(ring(base, 2), Status::BadQueue, "{base:#x}");
    }
    assert_eq!(ring(HIGH.end - 128, 2), Status::Unknown, "entries of zeroes");
    rig.write(abi::CONTROL, Width::B4, abi::CONTROL_RESET.into());
    assert_eq!(ring(QUEUE, 1), Status::Off);
}

#[test]
fn a_batch_for_later_unmaps_and_nothing_else() {
    let rig = Rig::new();
    let first = rig.map(RAM.start, PAGE);
    let second = rig.map(RAM.start, PAGE);
    let entries = [unmap(first.handle), map(RAM.start, PAGE), unmap(second.handle)];
    rig.put(QUEUE, &entries);
    rig.write(abi::QUEUE_FIRST + abi::QUEUE_DOORBELL_LATER, Width::B4, 3);
    while rig.status() == Status::Busy {
        std::thread::yield_now();
    }
    assert_eq!(rig.status(), Status::NotLater);
    let codes: Vec<u32> = rig.get(QUEUE, 3).iter().map(|entry| entry.status).collect();
    assert_eq!(codes, [0, Status::NotLater.code(), 0]);
    assert_eq!(rig.stats()[..4], [0, 0, 2, 2]);
}

#[test]
fn a_queue_takes_one_batch_at_a_time_and_others_go_on() {
    let rig = Rig::new();
    let other = abi::QUEUE_FIRST + abi::QUEUE_STRIDE;
    rig.write(other, Width::B8, QUEUE + 0x8000);
    rig.put(QUEUE, &[map(RAM.start, PAGE)]);
    rig.checked.hold.store(true, Ordering::SeqCst);
    std::thread::scope(|scope| {
        scope.spawn(|| rig.write(abi::QUEUE_FIRST + abi::QUEUE_DOORBELL, Width::B4, 1));
        while !rig.checked.holding.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        // The map call is held up in the host: registers of everybody answer, and a second batch there is refused.
        assert_eq!(rig.status(), Status::Busy);
        rig.write(abi::QUEUE_FIRST + abi::QUEUE_DOORBELL, Width::B4, 1);
        assert_eq!((rig.status(), rig.read(abi::STATE)), (Status::Busy, 1));
        assert_eq!(rig.stats()[5], 1);
        rig.write(other + abi::QUEUE_DOORBELL, Width::B4, 0);
        assert_eq!(rig.read(other + abi::QUEUE_STATUS), u64::from(Status::BadCount.code()));
        rig.checked.hold.store(false, Ordering::SeqCst);
    });
    assert_eq!((rig.status(), rig.stats()[2]), (Status::Ok, 1));
}
