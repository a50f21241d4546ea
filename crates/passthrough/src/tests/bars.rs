use super::device::{FakeHost, Log, Rig, WINDOWS};
use outboard_bus::Width;
use outboard_host_pci::HostBarKind;
use std::sync::atomic::Ordering;

#[test]
fn bars_are_sized_by_the_guest() {
    let rig = Rig::new();
    for offset in (0x10..0x28).step_by(4) {
        rig.set(offset, u32::MAX);
    }
    let sizes: Vec<u32> = (0x10..0x28).step_by(4).map(|offset| rig.dword(offset)).collect();
    assert_eq!(sizes, [0xffff_0000, 0xffff_f000, 0xfff0_000c, u32::MAX, 0xffff_ff81, 0]);
    assert_eq!(rig.mapper.ranges(), [], "decoding is off");
}

#[test]
fn b3_b4_b10_everything_but_shared_pages_is_mapped() {
    let rig = Rig::new();
    rig.place();
    // BAR0 without the page of its MSI-X table and PBA; BAR1 is smaller than a page; BAR2 whole.
    let expected = [(0x2000_0000, 0x4000), (0x2000_8000, 0x8000), (0x80_0000_0000, 0x10_0000)];
    assert_eq!(rig.mapper.ranges(), expected);
    // The rest of the page still works, by traps of the right width.
    assert_eq!(rig.bus.read(0x2000_4460, Width::B4), 0x4460, "right behind the table");
    assert_eq!(rig.bus.read(0x2000_5010, Width::B8), 0xbabe_0000_5010, "right behind the PBA");
    assert_eq!(rig.bus.read(0x2001_0010, Width::B2), 0x0010);
    assert_eq!(rig.host.bar_accesses.load(Ordering::Relaxed), 3);
    // Table and PBA are ours, to the last byte; straddling and odd accesses go nowhere.
    rig.bus.write(0x2000_4000, Width::B8, 0x1234_5678_9abc_def0);
    assert_eq!(rig.bus.read(0x2000_4000, Width::B8), 0x1234_5678_9abc_def0);
    for (at, width) in [(0x4458, Width::B8), (0x445c, Width::B4)] {
        rig.bus.write(0x2000_0000 + at, width, 0);
        assert_eq!(rig.bus.read(0x2000_0000 + at, width), 0);
    }
    for (at, width) in [
        (0x4000, Width::B1),
        (0x4002, Width::B2),
        (0x4001, Width::B8),
        (0x3ffc, Width::B8),
        (0x500e, Width::B4),
    ] {
        rig.bus.write(0x2000_0000 + at, width, 0);
        assert_eq!(rig.bus.read(0x2000_0000 + at, width), width.all_ones(), "{at:#x}");
    }
    assert_eq!(rig.host.bar_accesses.load(Ordering::Relaxed), 3, "none of it reached the device");
}

#[test]
fn bars_move_while_enabled_and_go_with_decoding() {
    let rig = Rig::new();
    rig.place();
    rig.log.take();
    rig.set(0x10, 0x2100_0000);
    assert_eq!(
        rig.log.take(),
        [
            "unmap 0x20000000+0x4000",
            "unmap 0x20008000+0x8000",
            "map 0x21000000+0x4000",
            "map 0x21008000+0x8000"
        ]
    );
    rig.write(4, Width::B2, 4);
    assert_eq!(rig.mapper.ranges(), []);
    assert_eq!(rig.bus.read(0x2100_0000, Width::B4), 0xffff_ffff);
    rig.log.take();
    rig.write(4, Width::B2, 6);
    assert_eq!(
        rig.log.take(),
        ["map 0x21000000+0x4000", "map 0x21008000+0x8000", "map 0x8000000000+0x100000"]
    );
}

/// Over RAM, over the ECAM, over each other, to zero, to the top: the mapper of the rig fails the test if anything but the windows is touched.
#[test]
fn b9_bars_are_mapped_only_where_the_machine_has_room_for_them() {
    let rig = Rig::new();
    rig.place();
    for low in
        [0u32, 0x0802_0000, 0x2000_0000, 0x2001_0000, 0x3ff0_0000, 0x4000_0000, 0x8000_0000, 0xffff_0000]
    {
        for high in [0u32, 0x40, 0x80, 0x8f, 0x90, 0x100, u32::MAX] {
            rig.set(0x10, low);
            rig.set(0x14, low);
            rig.set(0x18, low);
            rig.set(0x1c, high);
            rig.set(0x30, low | 1);
        }
    }
    rig.set(0x30, 0);
    rig.place();
    assert_eq!(rig.mapper.ranges().len(), 3, "and it comes back");
}

#[test]
fn b9_resize_and_rom_writes_do_not_widen_a_bar() {
    let rig = Rig::new();
    rig.place();
    rig.set(0x1a8, 0x3f22);
    rig.set(0x18, u32::MAX);
    assert_eq!(rig.dword(0x18), 0xfff0_000c);
}

#[test]
fn msix_structures_in_different_bars_leave_a_page_free_each() {
    let mut space = super::device::Space::endpoint();
    space.put(0xb4, 0x0000).put(0xb8, 0xf_fff0 | 2);
    let memory32 = HostBarKind::Memory32 { prefetchable: false };
    let memory64 = HostBarKind::Memory64 { prefetchable: true };
    let host = FakeHost::new(
        space,
        &[(0, memory32, 0x1_0000), (1, memory32, 0x1000), (2, memory64, 0x10_0000)],
        &Log::default(),
    );
    let rig = Rig::with(host, None);
    rig.place();
    assert_eq!(rig.mapper.ranges(), [(0x2000_4000, 0xc000), (0x80_0000_0000, 0xf_c000)]);
    assert_eq!(rig.bus.read(0x80_000f_fff0, Width::B8), 0, "the PBA");
}

#[test]
fn a_machine_that_cannot_map_leaves_the_bar_trapped() {
    let rig = Rig::new();
    rig.mapper.full.store(true, Ordering::SeqCst);
    rig.place();
    assert_eq!(rig.mapper.ranges(), []);
    assert_eq!(rig.bus.read(0x2000_0010, Width::B4), 0x10);
    assert_eq!(rig.bus.read(0x80_0000_0010, Width::B4), 0x0200_0010);
    rig.mapper.full.store(false, Ordering::SeqCst);
    rig.write(4, Width::B2, 0);
    rig.write(4, Width::B2, 6);
    assert_eq!(rig.mapper.ranges().len(), 3, "tried again when the guest turns decoding on");
}

/// BAR4 of the rig's device: 128 I/O ports.
const PORTS: u64 = WINDOWS.io.start + 0x2080;

fn place_ports(rig: &Rig) {
    rig.place();
    rig.set(0x20, 0x2080);
    rig.write(4, Width::B2, 7);
}

#[test]
fn io_ports_are_reached_by_accesses_of_1_2_and_4_bytes() {
    let rig = Rig::new();
    place_ports(&rig);
    assert_eq!(rig.dword(0x20), 0x2081);
    assert_eq!(rig.mapper.ranges().len(), 3, "only memory is mapped");
    for (offset, width) in [(0, Width::B1), (3, Width::B1), (2, Width::B2), (0x7c, Width::B4)] {
        assert_eq!(rig.bus.read(PORTS + offset, width), width.truncate(0x0400_0000 + offset), "{offset}");
        rig.bus.write(PORTS + offset, width, 0x1122_3344);
        let written = rig.host.written.lock().unwrap().pop();
        assert_eq!(written, Some((4, offset, width, width.truncate(0x1122_3344))));
    }
    let accesses = rig.host.bar_accesses.load(Ordering::Relaxed);
    for (offset, width) in
        [(0, Width::B8), (1, Width::B2), (2, Width::B4), (0x7e, Width::B4), (0x80, Width::B1)]
    {
        assert_eq!(rig.bus.read(PORTS + offset, width), width.all_ones(), "{offset} {width:?}");
        rig.bus.write(PORTS + offset, width, 0);
    }
    assert_eq!(rig.host.bar_accesses.load(Ordering::Relaxed), accesses, "none of these reached the device");
}

#[test]
fn io_ports_go_with_their_own_decode_bit_sleep_and_reset() {
    let rig = Rig::new();
    place_ports(&rig);
    let there = |rig: &Rig| rig.bus.read(PORTS, Width::B4) != 0xffff_ffff;
    assert!(there(&rig));
    rig.write(4, Width::B2, 6);
    assert!(!there(&rig), "I/O decoding is off");
    rig.write(4, Width::B2, 1);
    assert!(there(&rig), "without memory decoding");
    rig.set(0x20, 0x2000);
    assert!(!there(&rig), "moved");
    rig.set(0x20, 0x2080);
    // D3hot and back: the device keeps its state.
    rig.write(0x44, Width::B1, 3);
    assert!(!there(&rig));
    rig.write(0x44, Width::B1, 0);
    assert!(there(&rig));
    assert!(rig.function.restart());
    assert!(there(&rig), "a restart leaves it where it was");
    rig.root.reset();
    assert!(!there(&rig));
    rig.set_up_port();
    assert_eq!((rig.dword(0x20), rig.dword(4) & 1), (1, 0));
    place_ports(&rig);
    assert!(there(&rig));
    rig.host.pull();
    rig.function.withdraw();
    assert!(!there(&rig));
}

#[test]
fn a_function_without_io_ports_decodes_none() {
    let memory32 = HostBarKind::Memory32 { prefetchable: false };
    let host = FakeHost::new(super::device::Space::endpoint(), &[(0, memory32, 0x1_0000)], &Log::default());
    let rig = Rig::with(host, None);
    rig.write(4, Width::B2, 7);
    assert_eq!((rig.dword(4) & 7, rig.host.peek(4) & 3), (6, 2));
    rig.set(0x20, u32::MAX);
    assert_eq!(rig.dword(0x20), 0);
}
