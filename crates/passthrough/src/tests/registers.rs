//! Registers in BARs that lead around config space's rules, each row of the table with a device of its kind.

use super::device::{FakeHost, Log, Rig, Space};
use outboard_bus::Width;
use outboard_host_pci::HostBarKind;
use std::sync::atomic::Ordering;

const MEMORY: HostBarKind = HostBarKind::Memory32 { prefetchable: false };
const GPU: u32 = 0x03_0000;
/// COMMAND, a BAR, MSI's address and data, DEVCTL with a reset, PMCSR: what is the host's.
const HOSTS: [(u64, u64); 7] = [
    (0x04, 0x0547),
    (0x10, 0xffff_ffff),
    (0x54, 0xfee0_0000),
    (0x5c, 0xff),
    (0x78, 0x8000),
    (0x44, 3),
    (0x168, 1),
];

/// A device with these IDs, 2 MiB in BAR 0 at 0x2020_0000 and 128 KiB in BAR 2 at 0x2001_0000, decoded, without bus master.
fn device(vendor: u16, device: u16, class: u32, boot: Option<u32>) -> Rig {
    let mut space = Space::endpoint();
    // No MSI-X: only what is tested here is trapped.
    space.put(0x70, 0x0012_c010);
    let bars = [(0, MEMORY, 2 << 20), (2, MEMORY, 128 << 10), (4, HostBarKind::Io, 128)];
    let mut host = FakeHost::new(space, &bars, &Log::default());
    host.ids = (vendor, device, class);
    host.boot = boot;
    host.counts.msix = 0;
    let rig = Rig::with(host, None);
    rig.set(0x10, 0x2020_0000);
    rig.set(0x18, 0x2002_0000);
    rig.write(4, Width::B2, 2);
    rig.log.take();
    rig.host.bar_accesses.store(0, Ordering::Relaxed);
    rig
}

/// Nothing of the host's changes by writes of any width to a mirror of config space at `base`, of `len` bytes; what it reads is what config
/// space reads; what the vendor has for itself is written through it.
fn check_mirror(rig: &Rig, base: u64, len: u64) {
    rig.host.bar_accesses.store(0, Ordering::Relaxed);
    let before: Vec<u32> = (0..0x100).map(|dword| rig.host.peek(4 * dword)).collect();
    for (offset, value) in HOSTS.into_iter().filter(|(offset, _)| *offset < len) {
        for width in [Width::B4, Width::B2, Width::B1] {
            rig.bus.write(base + offset, width, value);
            rig.bus.write(base + offset, width, u64::MAX);
        }
        assert_eq!(rig.bus.read(base + offset, Width::B4), u64::from(rig.dword(offset)), "{offset:#x}");
    }
    let after: Vec<u32> = (0..0x100).map(|dword| rig.host.peek(4 * dword)).collect();
    // Device control's two passed bits and status bits are the guest's in config space too.
    let differs: Vec<usize> = (0..0x100).filter(|at| before[*at] != after[*at] && *at != 0x78 / 4).collect();
    assert_eq!(differs, Vec::<usize>::new(), "dwords of the real config space");
    assert_eq!(rig.host.peek(0x78) & !0x810 & 0xffff, before[0x78 / 4] & !0x810 & 0xffff);
    assert_eq!(rig.dword(4) & 0x7, 2, "COMMAND is as the guest left it in config space");
    assert_eq!(rig.bus.read(base, Width::B8), u64::MAX, "no access of eight bytes");
    assert_eq!(rig.host.bar_accesses.load(Ordering::Relaxed), 0, "the real mirror was not reached");
    // MSI's header byte acknowledges an interrupt; what belongs to no capability is the vendor's.
    let vendors = [(0x50, Width::B1), (0xf0, Width::B4), (0x704, Width::B1)];
    for (offset, width) in vendors.into_iter().filter(|(offset, _)| *offset < len) {
        rig.bus.write(base + offset, width, 0xff);
        let written = rig.host.written.lock().unwrap().pop();
        assert_eq!(
            written.map(|(_, at, width, value)| (at, width, value)),
            Some((base & 0xf_ffff, width, 0xff)).map(|(at, width, value)| (at + offset, width, value))
        );
    }
    rig.bus.write(base + 0x50, Width::B4, u64::from(u32::MAX));
    assert_eq!(rig.host.written.lock().unwrap().pop(), None, "MSI's control is not its header");
    assert_eq!(rig.mapper.ranges().iter().filter(|(at, size)| base >= *at && base < at + size).count(), 0);
}

/// Whether the page at `offset` of BAR 0 is the guest's without an exit.
fn is_mapped(rig: &Rig, offset: u64) -> bool {
    rig.mapper.ranges().iter().any(|(at, len)| (*at..at + len).contains(&(0x2020_0000 + offset)))
}

#[test]
fn b12_nvidia_pbus_pci_up_to_nv4x() {
    let rig = device(0x10de, 0x0140, GPU, Some(0x0430_00a1));
    check_mirror(&rig, 0x2020_1800, 0x100);
    // The rest of the page is trapped and works.
    assert_eq!(rig.bus.read(0x2020_0100, Width::B4), 0x100);
    assert!(!is_mapped(&rig, 0) && is_mapped(&rig, 0x4000));
}

#[test]
fn b12_nvidia_pcfg_to_ada() {
    for boot in [0x0430_00a1, 0x0500_00a1, 0x1340_00a1, 0x1620_00a1, 0x1920_00a1] {
        let rig = device(0x10de, 0x1b80, GPU, Some(boot));
        check_mirror(&rig, 0x2028_8000, 0x1000);
        assert!(!is_mapped(&rig, 0x8_8000) && !is_mapped(&rig, 0x8_b000));
        assert!(is_mapped(&rig, 0x8_7000) && is_mapped(&rig, 0x8_c000));
    }
}

#[test]
fn b12_nvidia_pcfg_audio_takes_no_write() {
    let rig = device(0x10de, 0x1b80, GPU, Some(0x1340_00a1));
    assert_eq!(rig.bus.read(0x2028_a004, Width::B4), 0x8_a004, "read from the device");
    for width in [Width::B1, Width::B2, Width::B4, Width::B8] {
        rig.bus.write(0x2028_a000 + 8, width, u64::MAX);
    }
    assert_eq!(*rig.host.written.lock().unwrap(), []);
    rig.bus.write(0x2028_b000, Width::B4, 5);
    assert_eq!(
        *rig.host.written.lock().unwrap(),
        [(0, 0x8_b000, Width::B4, 5)],
        "its neighbour in the page does"
    );
}

#[test]
fn b12_nvidia_ep_pcfgm_of_hopper_and_blackwell() {
    for boot in [0x1800_00a1, 0x1a00_00a1, 0x1b20_00a1] {
        let rig = device(0x10de, 0x2b85, GPU, Some(boot));
        check_mirror(&rig, 0x2029_2000, 0x1000);
        assert!(is_mapped(&rig, 0x8_8000) && !is_mapped(&rig, 0x9_0000) && is_mapped(&rig, 0x9_4000));
    }
}

#[test]
fn b12_an_unknown_nvidia_gpu_has_every_mirror_trapped() {
    let rig = device(0x10de, 0x3000, 0x03_0200, Some(0x1c00_00a1));
    for base in [0x2028_8000, 0x2029_2000] {
        check_mirror(&rig, base, 0x1000);
    }
    assert!(!is_mapped(&rig, 0x1800));
}

#[test]
fn b12_amd_bar2_config() {
    let rig = device(0x1002, 0x68f9, GPU, None);
    rig.bus.write(0x2002_4000 + 4, Width::B2, 0x547);
    rig.bus.write(0x2002_4000 + 0x10, Width::B4, 0x1000_0000);
    assert_eq!((rig.host.peek(4) & 0x147, rig.host.bar_accesses.load(Ordering::Relaxed)), (2, 0));
    assert_eq!(rig.bus.read(0x2002_4000, Width::B4), u64::from(rig.dword(0)));
    assert_eq!(rig.bus.read(0x2002_5000, Width::B4), 0x0200_5000);
}

#[test]
fn b12_ports_that_lead_to_all_registers_are_kept_from_the_guest() {
    for (vendor, boot) in [(0x10de, Some(0x1b20_00a1)), (0x1002, None)] {
        let rig = device(vendor, 1, GPU, boot);
        rig.set(0x20, u32::MAX);
        rig.write(4, Width::B2, 3);
        assert_eq!((rig.dword(0x20), rig.dword(4) & 3), (0, 2), "{vendor:#x}");
    }
    let rig = device(0x8086, 0x100e, 0x02_0000, None);
    rig.set(0x20, u32::MAX);
    assert_eq!(rig.dword(0x20), 0xffff_ff81);
}

#[test]
fn b12_realteks_port_to_its_msix_table_takes_no_such_write() {
    let rig = device(0x10ec, 0x8168, 0x02_0000, None);
    let port = 0x2002_0074;
    // Table, with and without the bit that starts a write; then narrower writes, which could put one together.
    for (width, value) in
        [(Width::B4, 0x8001_0000), (Width::B4, 0x0001_0ffc), (Width::B2, 1), (Width::B1, 0x80)]
    {
        rig.bus.write(port, width, value);
    }
    rig.bus.write(port + 2, Width::B2, 0x8001);
    rig.bus.write(port - 4, Width::B8, 0x8001_0000 << 32);
    assert_eq!(*rig.host.written.lock().unwrap(), []);
    rig.bus.write(port, Width::B4, 0x8000_0008);
    assert_eq!(*rig.host.written.lock().unwrap(), [(2, 0x74, Width::B4, 0x8000_0008)], "other registers");
}
