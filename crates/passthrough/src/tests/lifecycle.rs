use super::device::{FakeHost, Log, Rig};
use crate::{Function, Loss};
use outboard_bus::Width;
use outboard_pci::PciFunction;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Offset of the first entry that starts with `what`.
fn at(log: &[String], what: &str) -> usize {
    log.iter().position(|entry| entry.starts_with(what)).unwrap_or_else(|| panic!("no {what} in {log:?}"))
}

/// A guest that uses its device: BARs mapped, MSI-X on.
fn busy(rig: &Rig) {
    rig.place();
    rig.write(0xb2, Width::B2, 0x8000);
    rig.log.take();
}

#[test]
fn c1_a_reset_goes_unmap_interrupts_off_bus_master_off_reset() {
    let flr = |rig: &Rig| rig.write(0x79, Width::B1, 0x80);
    let guest = |rig: &Rig| rig.root.reset();
    let secondary = |rig: &Rig| rig.bus.write(super::device::ECAM + (1 << 15) + 0x3e, Width::B2, 0x40);
    for reset in [flr as fn(&Rig), guest, secondary] {
        let rig = Rig::new();
        busy(&rig);
        reset(&rig);
        let log = rig.log.take();
        let order: Vec<usize> =
            ["unmap", "disable", "bus master false", "reset"].iter().map(|what| at(&log, what)).collect();
        assert!(order.is_sorted(), "{log:?}");
        assert!(at(&log, "write 0x4 2 0x3") > order[3], "decodes again, {log:?}");
        assert!(!log.iter().any(|e| e.starts_with("drop")), "the host's mappings stay");
        assert_eq!(rig.mapper.ranges(), []);
        rig.set_up_port();
        assert_eq!((rig.dword(4) & 0xffff, rig.dword(0x10), rig.read(0xb2, Width::B2)), (0, 0, 69));
        assert_eq!(rig.dword(0x78) & 0x8000, 0, "FLR reads as zero");
        rig.place();
        assert_eq!(rig.mapper.ranges().len(), 3);
    }
}

#[test]
fn a_restart_leaves_the_function_where_the_guest_has_put_it() {
    let rig = Rig::new();
    busy(&rig);
    let shown = rig.mapper.ranges();
    assert!(rig.function.restart());
    let log = rig.log.take();
    let order: Vec<usize> =
        ["unmap", "disable", "bus master false", "reset", "map"].iter().map(|what| at(&log, what)).collect();
    assert!(order.is_sorted(), "{log:?}");
    assert_eq!(rig.mapper.ranges(), shown);
    assert_eq!((rig.dword(4) & 0xffff, rig.dword(0x10), rig.read(0xb2, Width::B2)), (2, 0x2000_0000, 69));
    assert_eq!(rig.bus.read(0x2001_0000, Width::B4), 0x0100_0000, "it decodes");
    rig.write(4, Width::B2, 0);
    assert_eq!(rig.mapper.ranges(), []);
    assert!(rig.function.restart());
    assert_eq!(rig.mapper.ranges(), [], "what was not shown stays away");
    rig.write(4, Width::B2, 6);
    assert_eq!(rig.mapper.ranges(), shown);
}

#[test]
fn a_function_held_back_is_no_bus_master_whatever_the_guest_writes() {
    let rig = Rig::new();
    rig.function.hold_dma(true);
    rig.place();
    let masters = || rig.log.take().into_iter().filter(|e| e.starts_with("bus master")).collect::<Vec<_>>();
    assert_eq!((rig.dword(4) & 0xffff, masters()), (6, vec![]), "the guest reads what it wrote");
    assert!(rig.function.waits_for_dma());
    rig.root.reset();
    rig.set_up_port();
    rig.place();
    assert!(!masters().contains(&"bus master true".to_owned()), "a reset is no way around it");
    rig.function.hold_dma(false);
    rig.function.hold_dma(false);
    assert_eq!((masters(), rig.function.waits_for_dma()), (vec!["bus master true".to_owned()], false));
    rig.function.hold_dma(true);
    assert_eq!((rig.dword(4) & 0xffff, masters()), (6, vec!["bus master false".to_owned()]));
    rig.write(4, Width::B2, 2);
    rig.function.hold_dma(false);
    assert!(!masters().contains(&"bus master true".to_owned()), "the guest no longer wants it");
}

#[test]
fn flr_needs_the_capability() {
    let mut space = super::device::Space::endpoint();
    space.put(0x74, 0x0000_8fe1);
    let rig = Rig::with(FakeHost::new(space, &[], &Log::default()), None);
    rig.write(0x78, Width::B2, 0x8000);
    assert!(!rig.log.take().contains(&"reset".to_owned()));
}

#[test]
fn c6_d3hot_takes_the_bars_away_before_the_device_sleeps_and_back_after() {
    let rig = Rig::new();
    busy(&rig);
    rig.write(0x44, Width::B2, 3);
    let log = rig.log.take();
    assert_eq!(log[log.len() - 1], "write 0x44 1 0xb");
    assert!(log[..3].iter().all(|entry| entry.starts_with("unmap")));
    assert_eq!(rig.bus.read(0x2001_0000, Width::B4), 0xffff_ffff);
    assert_eq!(rig.host.bar_accesses.load(Ordering::Relaxed), 0);
    assert_eq!(rig.dword(0x44) & 3, 3);
    rig.write(0x44, Width::B2, 0);
    let log = rig.log.take();
    assert!(at(&log, "write 0x44 1 0x8") < at(&log, "map"), "{log:?}");
    assert_eq!(rig.mapper.ranges().len(), 3, "NoSoftRst: everything is as before");
    assert_eq!(rig.bus.read(0x2001_0000, Width::B4), 0x0100_0000);
}

#[test]
fn without_no_soft_reset_d0_comes_with_a_reset() {
    let mut space = super::device::Space::endpoint();
    space.put(0x44, 0);
    let rig = Rig::with(FakeHost::new(space, &[], &Log::default()), None);
    rig.write(4, Width::B2, 4);
    rig.write(0x44, Width::B1, 3);
    rig.log.take();
    rig.write(0x44, Width::B1, 0);
    let log = rig.log.take();
    assert!(at(&log, "write 0x44") < at(&log, "reset"));
    assert_eq!(rig.dword(4) & 0xffff, 0);
}

#[test]
fn a_sleeping_function_is_woken_for_a_reset() {
    let rig = Rig::new();
    rig.write(0x44, Width::B1, 3);
    rig.log.take();
    rig.root.reset();
    let log = rig.log.take();
    assert!(at(&log, "write 0x44 1 0x8") < at(&log, "reset"), "{log:?}");
    rig.set_up_port();
    assert_eq!(rig.dword(0x44) & 3, 0);
}

#[test]
fn c7_a_device_that_does_not_come_back_is_not_used_again() {
    let rig = Rig::new();
    busy(&rig);
    rig.host.reset_fails.store(true, Ordering::SeqCst);
    rig.write(0x79, Width::B1, 0x80);
    assert!(matches!(rig.function.loss(), Some(Loss::Broken(_))));
    assert!(rig.function.lost().take());
    assert_eq!((rig.mapper.ranges(), rig.dword(0)), (vec![], u32::MAX));
    rig.host.reset_fails.store(false, Ordering::SeqCst);
    rig.log.take();
    rig.root.reset();
    rig.place();
    assert_eq!(rig.dword(0), u32::MAX);
    assert!(rig.log.take().iter().all(|e| !e.starts_with("write") && !e.starts_with("bus master true")));
    let error = Function::new(
        {
            let host = FakeHost::endpoint(&Log::default());
            host.reset_fails.store(true, Ordering::SeqCst);
            Arc::new(host)
        },
        rig.function.wiring.clone(),
    );
    assert!(error.is_err());
}

#[test]
fn c7_a_device_that_comes_back_as_another_is_not_used_again() {
    for (offset, value) in [(0x02, 0x86), (0x08, 0xa2), (0x40, 0x02), (0x122, 0x02)] {
        let rig = Rig::new();
        rig.host.change_pristine(offset, value);
        rig.root.reset();
        assert!(matches!(rig.function.loss(), Some(Loss::Broken(_))), "{offset:#x}");
    }
}

#[test]
fn c4_c5_surprise_removal_is_seen_by_whatever_access_comes_first() {
    type Access = fn(&Rig);
    let accesses: [Access; 5] = [
        |rig| assert_eq!(rig.dword(0x80), u32::MAX),
        |rig| rig.write(0x80, Width::B2, 0),
        |rig| assert_eq!(rig.bus.read(0x2001_0000, Width::B4), 0xffff_ffff),
        |rig| rig.write(0x79, Width::B1, 0x80),
        |rig| rig.root.reset(),
    ];
    for access in accesses {
        let rig = Rig::new();
        busy(&rig);
        rig.host.pull();
        access(&rig);
        assert_eq!(rig.function.loss(), Some(Loss::Gone));
        assert!(rig.function.lost().take());
        rig.function.withdraw();
        rig.function.withdraw();
        assert_eq!(rig.mapper.ranges(), [], "what was mapped is trapped");
        assert_eq!((rig.dword(0), rig.bus.read(0x2000_0000, Width::B4)), (u32::MAX, 0xffff_ffff));
        rig.set_up_port();
        rig.place();
        rig.root.reset();
        assert_eq!(rig.mapper.ranges(), []);
    }
}

#[test]
fn dropping_a_function_leaves_a_quiet_device_and_nothing_in_the_guest() {
    let rig = Rig::new();
    busy(&rig);
    let Rig { log, mapper, function, root, bus, .. } = rig;
    drop((root, bus, function));
    let log = log.take();
    assert!(at(&log, "unmap") < at(&log, "disable") && at(&log, "disable") < at(&log, "bus master false"));
    assert!(mapper.ranges().is_empty());
}

#[test]
fn reset_by_the_trait_is_the_same_as_by_the_root_complex() {
    let rig = Rig::new();
    busy(&rig);
    rig.function.reset();
    assert_eq!(rig.mapper.ranges(), []);
}
