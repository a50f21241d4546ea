use super::device::{FakeHost, Log, Rig, Space};
use crate::config::{Facts, Image, Layout};
use crate::{Error, Function};
use outboard_bus::Width;
use outboard_host_pci::{HostBar, HostBarKind, HostFunction, InterruptCounts};
use proptest::prelude::*;
use std::sync::Arc;

/// The capabilities that a guest finds, as (id, offset).
fn standard_chain(rig: &Rig) -> Vec<(u8, u8)> {
    let mut chain = Vec::new();
    let mut at = rig.read(0x34, Width::B1);
    while at != 0 && chain.len() < 64 {
        chain.push((rig.read(at, Width::B1) as u8, at as u8));
        at = rig.read(at + 1, Width::B1);
    }
    chain
}

fn extended_chain(rig: &Rig) -> Vec<(u16, u16)> {
    let mut chain = Vec::new();
    let mut at = 0x100;
    while at != 0 && chain.len() < 300 {
        let header = rig.dword(at);
        chain.push((header as u16, at as u16));
        at = u64::from(header >> 20);
    }
    chain
}

#[test]
fn the_chains_show_what_has_a_rule_and_nothing_else() {
    let rig = Rig::new();
    // AGP (0e at bc) is gone.
    let standard = [(0x01, 0x40), (0x03, 0x48), (0x05, 0x50), (0x10, 0x70), (0x11, 0xb0), (0x09, 0xc0)];
    assert_eq!(standard_chain(&rig), standard);
    // ARI, first in the chain, has become a null capability; SR-IOV and ATS are gone.
    assert_eq!(
        extended_chain(&rig),
        [(0, 0x100), (0x01, 0x120), (0x15, 0x1a0), (0x0b, 0x200), (0x03, 0x240)]
    );
    for hidden in [0x104, 0x160, 0x168, 0x220, 0x224] {
        rig.set(hidden, u32::MAX);
        assert_eq!(rig.dword(hidden), 0, "{hidden:#x}");
    }
    assert_eq!(rig.log.take(), Vec::<String>::new(), "no write to what is hidden reaches the device");
}

#[test]
fn header_identity_is_the_devices_and_cannot_be_written() {
    let rig = Rig::new();
    for offset in [0x00, 0x08, 0x2c, 0x34] {
        let before = rig.dword(offset);
        rig.set(offset, !before);
        assert_eq!(rig.dword(offset), before, "{offset:#x}");
    }
    assert_eq!(rig.dword(0), 0x2b85_10de);
    assert_eq!(rig.dword(0x0c) >> 16, 0, "one function, no self test");
    assert_eq!(rig.dword(0x3c) >> 8 & 0xff, 1);
    assert_eq!(rig.log.take(), Vec::<String>::new());
}

#[test]
fn b1_decoding_is_never_turned_off_in_the_hardware() {
    let rig = Rig::new();
    assert_eq!(rig.host.peek(4) & 3, 3);
    rig.place();
    for command in [0u32, 7, 6, 4, 2, 1, 0x547, 0] {
        rig.write(4, Width::B2, command.into());
        assert_eq!(rig.dword(4) & 0xffff, command & 0x547);
        assert_eq!(rig.host.peek(4) & 0x147, 3, "{command:#x}");
    }
    let log = rig.log.take();
    assert!(log.iter().all(|entry| !entry.starts_with("write 0x4 ")), "{log:?}");
}

#[test]
fn bus_master_follows_the_guest_and_only_its_changes() {
    let rig = Rig::new();
    rig.write(4, Width::B2, 4 | 0x400);
    rig.write(4, Width::B2, 4 | 0x402);
    rig.write(5, Width::B1, 4);
    rig.write(4, Width::B1, 0);
    assert_eq!(rig.log.take(), ["bus master true", "bus master false"]);
}

#[test]
fn device_control_keeps_what_belongs_to_the_host() {
    let rig = Rig::new();
    let (devctl, real) = (0x78, 0x2830);
    assert_eq!(rig.dword(devctl) & 0xffff, real, "starts as the host has it");
    // MPS 4096, MRRS 128, extended tags, error reporting.
    rig.write(devctl, Width::B2, 0x01af);
    assert_eq!(rig.read(devctl, Width::B2), 0x01af & !0x10);
    // The hardware keeps its payload size (1: 256 bytes) and gets the smallest request size that is not below.
    assert_eq!(rig.host.peek(devctl as u16) & 0x70ef, 1 << 12 | 0x20);
    assert_eq!(rig.host.peek(devctl as u16) & 0x810, 0, "relaxed ordering and no-snoop are the guest's");
    rig.write(devctl + 1, Width::B1, 0x58);
    assert_eq!(rig.host.peek(devctl as u16) & 0x7800, 0x5800);
    // Status bits are cleared by the guest, and not by a neighbour's write.
    rig.host.poke(devctl as u16, 0x000f_2830);
    rig.log.take();
    rig.write(devctl, Width::B2, 0x2830);
    assert!(rig.log.take().iter().all(|e| e.starts_with("write 0x78 2 ")));
    rig.write(devctl + 2, Width::B1, 0x05);
    assert_eq!(rig.log.take(), ["write 0x7a 1 0x5"]);
}

#[test]
fn link_control_passes_and_ari_stays_off() {
    let rig = Rig::new();
    rig.write(0x80, Width::B2, 0xffff);
    assert_eq!(rig.host.peek(0x80) & 0xffff, 0x0fcb);
    rig.write(0x98, Width::B2, 0xffff);
    assert_eq!((rig.host.peek(0x98) & 0x20, rig.dword(0x98) & 0x20), (0, 0));
    assert_eq!(rig.dword(0x94) & 0x20, 0, "not even offered");
}

#[test]
fn vpd_is_read_and_never_written() {
    let rig = Rig::new();
    rig.log.take();
    // The flag bit with a 1 would write the EEPROM; the hardware's own 1 is not written back either.
    rig.write(0x4a, Width::B2, 0x8010);
    assert_eq!(rig.log.take(), ["write 0x4a 2 0x10"]);
    rig.set(0x4c, 0x0bad_0bad);
    rig.set(0x48, 0xffff_0000);
    assert_eq!(rig.log.take(), ["write 0x4a 2 0x7fff"]);
    assert_eq!(rig.dword(0x4c), 0x1122_3344);
}

#[test]
fn vendor_capabilities_pass_but_for_their_links() {
    let rig = Rig::new();
    rig.set(0xc4, 0x1357_9bdf);
    rig.set(0xc0, u32::MAX);
    assert_eq!(rig.host.peek(0xc4), 0x1357_9bdf);
    assert_eq!(rig.host.peek(0xc0) & 0xffff, 0x0009, "id and link");
    rig.set(0x208, 7);
    assert_eq!(rig.host.peek(0x208), 7);
}

#[test]
fn resizable_bar_offers_the_size_it_has() {
    let rig = Rig::new();
    assert_eq!(rig.dword(0x1a4), 1 << 4, "1 MiB");
    assert_eq!(rig.dword(0x1a8), 0x22, "one BAR, number 2, size 1 MiB");
    rig.set(0x1a8, 0xf22);
    assert_eq!((rig.dword(0x1a8), rig.host.peek(0x1a8)), (0x22, 0x22));
}

#[test]
fn power_management_offers_d0_and_d3hot_without_pme() {
    let rig = Rig::new();
    assert_eq!(rig.dword(0x40) >> 16 & 0xfe00, 0);
    for state in [1, 2] {
        rig.write(0x44, Width::B1, state);
        assert_eq!(rig.dword(0x44) & 3, 0);
    }
    rig.write(0x44, Width::B2, 0x8100);
    assert_eq!(rig.log.take(), Vec::<String>::new());
}

/// CVE-2015-4103 and its siblings: whatever width and offset, the hardware's own interrupt registers, BARs and the rest of what is the host's
/// stay as they were.
#[test]
fn b2_no_write_reaches_what_belongs_to_the_host() {
    let rig = Rig::new();
    let host =
        [0x04..0x08, 0x10..0x28, 0x30..0x34, 0x3c..0x40, 0x50..0x68, 0xb0..0xbc, 0x160..0x200, 0x220..0x240];
    let before: Vec<u32> = (0..4096).step_by(4).map(|at| rig.host.peek(at)).collect();
    for width in [Width::B1, Width::B2, Width::B4, Width::B8] {
        for offset in 0..4096 {
            for value in [u64::MAX, 0, 0x5a5a_a5a5_1234_5678] {
                // Not the bits that reset it or put it to sleep, which have their own tests.
                let value =
                    if (0x78..0x7c).contains(&offset) { value & 0x7fff_7fff_7fff_7f7f } else { value };
                if !(0x43..0x48).contains(&offset) {
                    rig.write(offset, width, value);
                }
            }
        }
    }
    for range in host {
        for at in range.step_by(4) {
            assert_eq!(rig.host.peek(at), before[usize::from(at / 4)], "{at:#x}");
        }
    }
}

#[test]
fn b11_malformed_capabilities_are_hidden() {
    let mut space = Space::endpoint();
    // MSI-X whose table lies beyond its BAR; a vendor capability that runs over the end; an extended one that reaches into another.
    space.put(0xb4, 0xffff_0000).put(0xc0, 0x0041_0009).put(0x200, 0x2401_000b).put(0x204, 0x0440_0000);
    let log = Log::default();
    let rig = Rig::with(
        FakeHost::new(space, &[(0, HostBarKind::Memory32 { prefetchable: false }, 0x1_0000)], &log),
        None,
    );
    assert_eq!(standard_chain(&rig).iter().map(|c| c.0).collect::<Vec<_>>(), [1, 3, 5, 0x10]);
    assert_eq!(extended_chain(&rig).iter().map(|c| c.0).collect::<Vec<_>>(), [0, 1, 0x15, 0x03]);
    assert_eq!(rig.dword(0x1a4), 0, "a resizable BAR that does not exist has no sizes");
}

/// By a vendor capability that claims to be long, a guest would reach the real MSI address.
#[test]
fn b2_b11_a_raw_capability_does_not_open_another_one() {
    let mut space = Space::endpoint();
    space.put(0x40, 0x00ff_5009).put(0x34, 0x40);
    let rig = Rig::with(FakeHost::new(space, &[], &Log::default()), None);
    rig.set(0x54, 0xfee0_0000);
    assert_eq!((rig.host.peek(0x54), rig.dword(0x54)), (0, 0xfee0_0000));
}

#[test]
fn what_belongs_to_no_capability_is_the_vendors_own_below_0x100_and_read_only_above() {
    let rig = Rig::new();
    for gap in [0x6c, 0xd0, 0xfc] {
        rig.set(gap, 0x1234_5678);
        assert_eq!((rig.dword(gap), rig.host.peek(gap as u16)), (0x1234_5678, 0x1234_5678));
    }
    rig.host.poke(0x300, 0x77);
    rig.set(0x300, 0x1234_5678);
    assert_eq!((rig.dword(0x300), rig.host.peek(0x300)), (0x77, 0x77));
}

#[test]
fn b11_an_interrupt_pin_that_does_not_exist_is_none() {
    let mut space = Space::endpoint();
    space.put(0x3c, 0xff00);
    let rig = Rig::with(FakeHost::new(space, &[], &Log::default()), None);
    assert_eq!(rig.dword(0x3c), 0);
}

#[test]
fn b11_a_device_that_reads_all_ones_is_refused_in_words() {
    let log = Log::default();
    let rig = Rig::new();
    let host = Arc::new(FakeHost::new(Space(vec![0xff; 4096]), &[], &log));
    let error = Function::new(host, rig.function.wiring.clone()).err().unwrap();
    assert!(matches!(error, Error::Malformed { .. }), "{error}");
    let mut space = Space::endpoint();
    space.put(0x0c, 0x0001_0000);
    let host = Arc::new(FakeHost::new(space, &[], &log));
    let error = Function::new(host, rig.function.wiring.clone()).err().unwrap();
    assert!(matches!(error, Error::NotAnEndpoint { header_type: 1, .. }), "{error}");
}

#[test]
fn a_function_of_the_hosts_root_complex_becomes_an_endpoint_with_a_link() {
    let mut space = Space::endpoint();
    space.put(0x70, 0x0092_b010);
    let rig = Rig::with(FakeHost::new(space, &[], &Log::default()), None);
    assert_eq!(rig.dword(0x70) >> 20 & 0xf, 0);
    assert_eq!((rig.dword(0x7c), rig.dword(0x80) >> 16), (0x11, 0x11));
}

#[test]
fn the_expansion_rom_is_sized_enabled_and_read() {
    let rig = Rig::new();
    rig.place();
    rig.set(0x30, u32::MAX);
    assert_eq!(rig.dword(0x30), 0xffff_f001, "4 KiB for 3,000 bytes");
    rig.set(0x30, 0x2080_0001);
    assert_eq!(rig.bus.read(0x2080_0004, Width::B4), 0x0706_0504);
    assert_eq!(rig.bus.read(0x2080_0bb7, Width::B1), 2999 % 256);
    assert_eq!(rig.bus.read(0x2080_0bb8, Width::B8), u64::MAX);
    rig.bus.write(0x2080_0004, Width::B4, 0);
    assert_eq!(rig.bus.read(0x2080_0004, Width::B1), 4);
    rig.set(0x30, 0x2080_0000);
    assert_eq!(rig.bus.read(0x2080_0004, Width::B4), 0xffff_ffff);
}

/// A real GPU's config space, which another VMM had already been at.
#[test]
fn a_real_gpus_config_space() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data/pci/nvidia-h200-guest-config.bin");
    let Ok(bytes) = std::fs::read(path) else {
        println!("skipped: {path} is not on this machine");
        return;
    };
    let space = Space(bytes);
    let prefetchable = HostBarKind::Memory64 { prefetchable: true };
    let bars = [(0, prefetchable, 16 << 20), (4, prefetchable, 32 << 20)];
    let rig = Rig::with(FakeHost::new(space, &bars, &Log::default()), None);
    assert_eq!(rig.dword(0), 0x2335_10de);
    assert_eq!(standard_chain(&rig), [(0x01, 0x40), (0x05, 0x48), (0x10, 0x60), (0x11, 0xb0)]);
    // The null capabilities of the other VMM are gone, but for the one that every chain starts with.
    let chain = [(0, 0x100), (0x18, 0x12c), (0x01, 0x1b8), (0x0b, 0x2a4), (0x04, 0x2b8), (0x03, 0x2f0)];
    assert_eq!(extended_chain(&rig), chain);
    let real = rig.host.peek(0x10);
    rig.set(0x10, u32::MAX);
    rig.set(0x14, u32::MAX);
    assert_eq!((rig.dword(0x10), rig.dword(0x14)), (0xff00_000c, u32::MAX));
    assert_eq!(rig.host.peek(0x10), real, "the hardware's BARs are not touched");
}

proptest! {
    /// Whatever a device shows, its chains end, and what the guest sees of them is sound.
    #[test]
    fn b11_any_config_space_gives_a_sound_view(
        bytes in prop::collection::vec(any::<u8>(), 4096),
        links in prop::collection::vec((0u16..0x1000, prop::sample::select(vec![1u16, 3, 4, 5, 9, 0x0b, 0x10, 0x11, 0x13, 0x15, 0x23])), 0..40),
    ) {
        let mut bytes = bytes;
        bytes[0x0e] = 0;
        bytes[0..2].copy_from_slice(&0x10deu16.to_le_bytes());
        bytes[6] |= 0x10;
        let mut next = [0x34u16, 0x100];
        for (at, id) in links {
            let at = at & 0xffc;
            if at >= 0x100 {
                let header = u32::from(id) | 1 << 16 | u32::from(next[1]) << 20;
                bytes[usize::from(at)..usize::from(at) + 4].copy_from_slice(&header.to_le_bytes());
                next[1] = at;
            } else if at >= 0x40 {
                bytes[usize::from(at)] = id as u8;
                bytes[usize::from(at) + 1] = next[0] as u8;
                next[0] = at;
                bytes[0x34] = at as u8;
            }
        }
        let bar = |kind, len| Some(HostBar { kind, len });
        let bars = [
            bar(HostBarKind::Memory32 { prefetchable: false }, 0x10000),
            bar(HostBarKind::Io, 32),
            bar(HostBarKind::Memory64 { prefetchable: true }, 1 << 36),
            None,
            bar(HostBarKind::Memory32 { prefetchable: true }, 0x1000),
            None,
        ];
        let facts = Facts { bars, rom: Some(1 << 16), interrupts: InterruptCounts { intx: 1, msi: 7, msix: 9 }, line: true, registers: vec![] };
        let layout = Layout::build(&Image::from_bytes(bytes), &facts).unwrap();
        let mut at = layout.table.value(0x34) as u16 & 0xff;
        let mut seen = Vec::new();
        while at != 0 {
            prop_assert!((0x40..0x100).contains(&at) && at.is_multiple_of(4) && !seen.contains(&at));
            seen.push(at);
            at = (layout.table.value(at) >> 8) as u16 & 0xff;
        }
        let mut at = 0x100;
        while at != 0 {
            prop_assert!((0x100..0x1000).contains(&at) && !seen.contains(&at));
            seen.push(at);
            at = (layout.table.value(at) >> 20) as u16;
        }
    }
}

#[test]
fn a_conventional_function_has_no_extended_space() {
    let mut space = Space::endpoint();
    space.0.truncate(256);
    let host = FakeHost::new(space, &[], &Log::default());
    assert_eq!(host.config_len(), 256);
    let rig = Rig::with(host, None);
    rig.set(0x100, u32::MAX);
    assert_eq!(rig.dword(0x100), 0);
}
