//! The n-th map or unmap of the host fails, for every n: what the guest was told and what the host holds stay the same (A3, A5, A6).

use super::rig::*;
use outboard_abi as abi;
use outboard_abi::{Entry, Status};
use outboard_bus::Width;
use outboard_host_pci::Error;
use outboard_host_pci::simulated::{Fault, Operation};
use std::collections::BTreeMap;

/// More than the work below makes of either call.
const MOST_CALLS: u32 = 24;

fn refused(_: outboard_host_pci::PciAddress) -> Error {
    Error::Host { call: "a test".into(), source: std::io::Error::other("injected") }
}

/// What the guest was told: bus address and length, by handle.
#[derive(Default)]
struct Guest {
    live: BTreeMap<u64, (u64, u64)>,
    failed: u64,
}

impl Guest {
    fn map(&mut self, rig: &Rig, ranges: &[(u64, u64)]) {
        let entries: Vec<Entry> = ranges.iter().map(|(address, len)| map(*address, *len)).collect();
        for (done, (_, len)) in rig.run(&entries).1.iter().zip(ranges) {
            match Status::from_code(done.status) {
                Some(Status::Ok) => assert!(self.live.insert(done.handle, (done.bus, *len)).is_none()),
                status => self.note(status),
            }
        }
        self.check(rig);
    }

    fn unmap(&mut self, rig: &Rig, handles: &[u64]) {
        let entries: Vec<Entry> = handles.iter().map(|handle| unmap(*handle)).collect();
        for (done, handle) in rig.run(&entries).1.iter().zip(handles) {
            match Status::from_code(done.status) {
                Some(Status::Ok) => assert!(self.live.remove(handle).is_some()),
                status => self.note(status),
            }
        }
        self.check(rig);
    }

    fn note(&mut self, status: Option<Status>) {
        assert_eq!(status, Some(Status::Host), "the only thing that goes wrong");
        self.failed += 1;
    }

    /// The host holds what the guest was told, and nothing else; so do the statistics.
    fn check(&self, rig: &Rig) {
        let mut told: Vec<(u64, u64)> = self.live.values().copied().collect();
        told.sort_unstable();
        let held: Vec<(u64, u64)> = rig.domain.pieces().iter().map(|(bus, _, len)| (*bus, *len)).collect();
        assert_eq!(held, told);
        let bytes: u64 = told.iter().map(|(_, len)| len).sum();
        assert_eq!(rig.stats()[..2], [bytes, told.len() as u64]);
        assert!(told.iter().all(|(bus, _)| rig.dma(*bus)), "what is mapped works");
    }
}

/// A driver's life: lists of several lengths mapped, some given back, more mapped, all given back.
fn live(rig: &Rig) -> Guest {
    let mut guest = Guest::default();
    let range = |index: u64, pages: u64| (RAM.start + 0x10_0000 + index * 8 * PAGE, pages * PAGE);
    guest.map(rig, &[range(0, 1), range(1, 2), range(2, 1), range(3, 4), range(4, 1), range(5, 1)]);
    let some: Vec<u64> = guest.live.keys().copied().step_by(2).collect();
    guest.unmap(rig, &some);
    guest.map(rig, &[range(0, 1), range(6, 3)]);
    let all: Vec<u64> = guest.live.keys().copied().collect();
    guest.unmap(rig, &all);
    // What the host refused to take down: asked again.
    let left: Vec<u64> = guest.live.keys().copied().collect();
    if !left.is_empty() {
        guest.unmap(rig, &left);
    }
    guest
}

#[test]
fn a3_a5_a6_the_nth_map_or_unmap_that_fails_leaves_guest_and_host_agreeing() {
    let mut failed = 0;
    for operation in [Operation::DmaMap, Operation::DmaUnmap] {
        for n in 0..MOST_CALLS {
            let rig = Rig::new();
            rig.domain.inject(operation, Fault::nth(n, refused));
            let guest = live(&rig);
            assert!(guest.live.is_empty() && guest.failed <= 1, "{operation:?} {n}");
            failed += guest.failed;
            rig.no_mistakes();
        }
    }
    // Eight maps, eight unmaps, and the ones beyond that do not come.
    assert_eq!(failed, 16);
}

#[test]
fn a3_a5_every_map_or_unmap_that_fails_leaves_guest_and_host_agreeing() {
    for operation in [Operation::DmaMap, Operation::DmaUnmap] {
        for n in 0..MOST_CALLS {
            let rig = Rig::new();
            rig.domain.inject(operation, Fault { times: u32::MAX, ..Fault::nth(n, refused) });
            live(&rig);
            rig.no_mistakes();
        }
    }
}

#[test]
fn a5_a6_a_teardown_whose_nth_unmap_fails_is_finished_by_the_next() {
    for n in 0..6 {
        let rig = Rig::new();
        let mut guest = Guest::default();
        guest.map(&rig, &[0, 1, 2, 3, 4].map(|index| (RAM.start + 0x10_0000 + index * PAGE, PAGE)));
        rig.domain.inject(Operation::DmaUnmap, Fault::nth(n, refused));
        rig.write(abi::CONTROL, Width::B4, abi::CONTROL_RESET.into());
        let left = rig.domain.mapped().0;
        assert_eq!(left, usize::from(n < 5), "{n}");
        assert_eq!(rig.stats()[..2], [left as u64 * PAGE, left as u64]);
        rig.write(abi::CONTROL, Width::B4, abi::CONTROL_ENABLE.into());
        rig.write(abi::CONTROL, Width::B4, abi::CONTROL_RESET.into());
        assert_eq!((rig.domain.mapped().0, rig.stats()[0]), (0, 0), "{n}");
        rig.no_mistakes();
    }
}

/// A day's churn in short: what is held comes back to what it was, however mappings come and go.
#[test]
fn a6_churn_returns_to_where_it_began() {
    let rig = Rig::new();
    let mut guest = Guest::default();
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    for _ in 0..400 {
        let ranges: Vec<(u64, u64)> =
            (0..next(30)).map(|_| (RAM.start + 0x10_0000 + next(512) * PAGE, (1 + next(8)) * PAGE)).collect();
        if !ranges.is_empty() {
            guest.map(&rig, &ranges);
        }
        let gone: Vec<u64> = guest.live.keys().copied().filter(|_| next(2) == 0).collect();
        for some in gone.chunks(abi::MAX_BATCH as usize) {
            guest.unmap(&rig, some);
        }
    }
    assert!(rig.stats()[2] > 1_000);
    let all: Vec<u64> = guest.live.keys().copied().collect();
    for some in all.chunks(abi::MAX_BATCH as usize) {
        guest.unmap(&rig, some);
    }
    // The whole room is there again, in one piece.
    assert_eq!((rig.domain.mapped(), rig.stats()[0]), ((0, 0), 0));
    guest.map(&rig, &[(RAM.start, RAM.end - RAM.start)]);
    rig.no_mistakes();
}

/// A device reaches the granules that were asked for, the whole of each, and nothing beyond (C3): a buffer that shares a granule with other
/// data exposes that data.
#[test]
fn c3_a_device_reaches_whole_granules_and_nothing_beyond() {
    let rig = Rig::new();
    let entry = rig.map(RAM.start + 4 * PAGE, PAGE);
    assert_eq!(entry.status, 0);
    for at in [entry.bus, entry.bus + 0x1000, entry.bus + PAGE - 8] {
        assert!(rig.dma(at), "{at:#x} lies in the granule");
    }
    for at in [entry.bus - 8, entry.bus - 4, entry.bus + PAGE - 4, entry.bus + PAGE, 0, RAM.start] {
        assert!(!rig.dma(at), "{at:#x} was not asked for");
    }
    // Less than a granule cannot be asked for by our own protocol.
    for (address, len) in [(RAM.start + 0x1000, PAGE), (RAM.start, 0x1000)] {
        assert_eq!(Status::from_code(rig.map(address, len).status), Some(Status::Misaligned));
    }
}

/// The slot is emptied while a map is under way (D6): that ends first, and nothing is left of it.
#[test]
fn d6_a_map_that_is_under_way_ends_before_its_device_goes() {
    use std::sync::atomic::Ordering;
    let rig = Rig::new();
    rig.slot.host.set_bus_master(false).unwrap();
    rig.put(QUEUE, &[map(RAM.start, PAGE)]);
    rig.checked.hold.store(true, Ordering::SeqCst);
    let doorbell = abi::QUEUE_FIRST + abi::QUEUE_DOORBELL;
    std::thread::scope(|scope| {
        let ringing = scope.spawn(|| rig.write(doorbell, Width::B4, 1));
        while !rig.checked.holding.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        let detaching = scope.spawn(|| rig.companion.detach(false));
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!detaching.is_finished(), "the map still works in the domain");
        rig.checked.hold.store(false, Ordering::SeqCst);
        ringing.join().unwrap();
        detaching.join().unwrap();
    });
    assert_eq!((rig.domain.mapped().0, rig.stats()[1]), (0, 0));
    rig.no_mistakes();
}
