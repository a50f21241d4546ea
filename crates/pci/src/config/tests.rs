use super::*;
use outboard_bus::{MsiMessage, MsiSink, Width};
use proptest::prelude::*;

struct NoSink;
impl MsiSink for NoSink {
    fn send(&self, _: MsiMessage) {}
}

const IDENTITY: Identity = Identity {
    vendor: 0x1af4,
    device: 0x1042,
    class: 0x01_0000,
    revision: 1,
    subsystem_vendor: 0x1af4,
    subsystem: 2,
};

fn space() -> ConfigSpace {
    let mut space = ConfigSpace::endpoint(IDENTITY);
    space.add_bar(0, 0x8000, BarKind::Memory32);
    space.add_bar(2, 8 << 30, BarKind::Memory64Prefetchable);
    space.add_capability(regs::CAP_ID_VENDOR, &[4, 0xaa], &[0, 0x0f]);
    space.add_msix(
        Arc::new(Msix::new(3, Arc::new(NoSink))),
        MsixLayout { bar: 0, table: 0x4000, pba: 0x6000 },
    );
    space
}

fn read(space: &ConfigSpace, offset: u16, width: Width) -> u32 {
    let access = ConfigAccess::new(offset, width).unwrap();
    width.truncate(u64::from(space.read(access) >> access.shift())) as u32
}

fn write(space: &mut ConfigSpace, offset: u16, width: Width, value: u32) {
    let access = ConfigAccess::new(offset, width).unwrap();
    space.write(access, value << access.shift());
}

#[test]
fn header_and_capability_chain() {
    let space = space();
    assert_eq!(read(&space, 0x00, Width::B4), 0x1042_1af4);
    assert_eq!(read(&space, 0x08, Width::B4), 0x0100_0001);
    assert_eq!(read(&space, 0x2c, Width::B4), 0x0002_1af4);
    assert_eq!(read(&space, 0x06, Width::B2), 0x0010);
    assert_eq!(read(&space, 0x34, Width::B1), 0x40);
    assert_eq!(read(&space, 0x40, Width::B4), 0xaa04_4409);
    assert_eq!(read(&space, 0x44, Width::B4), 0x0002_0011);
    assert_eq!(read(&space, 0x48, Width::B4), 0x4000);
    assert_eq!(read(&space, 0x4c, Width::B4), 0x6000);
    assert_eq!(read(&space, 0x100, Width::B4), 0, "no extended capability");
}

#[test]
fn bars_are_sized_and_decode_with_the_command_bit() {
    let mut space = space();
    for bar in [0x10, 0x18, 0x1c] {
        write(&mut space, bar, Width::B4, u32::MAX);
    }
    assert_eq!(read(&space, 0x10, Width::B4), 0xffff_8000);
    assert_eq!(read(&space, 0x14, Width::B4), 0, "no BAR 1");
    assert_eq!(read(&space, 0x18, Width::B4), 0x0000_000c);
    assert_eq!(read(&space, 0x1c, Width::B4), 0xffff_fffe);
    write(&mut space, 0x10, Width::B4, 0x1234_5678);
    write(&mut space, 0x18, Width::B4, 0);
    write(&mut space, 0x1c, Width::B4, 0x42);
    assert_eq!(space.decoded(), Decoded::default());
    write(&mut space, 0x04, Width::B1, 2);
    let decoded = space.decoded();
    assert_eq!(decoded[0], Some(BarRange::memory(0x1234_0000, 0x8000)));
    assert_eq!(decoded[2], Some(BarRange::memory(0x42_0000_0000, 8 << 30)));
    assert_eq!([decoded[1], decoded[3], decoded[4], decoded[5]], [None; 4]);
    space.reset();
    assert_eq!(space.decoded(), Decoded::default());
    assert_eq!(read(&space, 0x10, Width::B4), 0);
    assert_eq!(read(&space, 0x06, Width::B2), 0x0010, "the capability list survives a reset");
}

#[test]
fn msix_control_is_followed_at_any_width() {
    for (offset, width, value) in
        [(0x47, Width::B1, 0xc0), (0x46, Width::B2, 0xc000), (0x44, Width::B4, 0xc000_0000)]
    {
        let mut space = space();
        write(&mut space, offset, width, value);
        assert_eq!(read(&space, 0x44, Width::B4), 0xc002_0011, "{width:?}");
    }
}

proptest! {
    /// Whatever is written, at whatever width: what is read only stays, and bits outside the access stay.
    #[test]
    fn only_writable_bits_change(writes in prop::collection::vec((0u16..0x120, 0usize..3, any::<u32>()), 0..200)) {
        let mut space = space();
        for (offset, width, value) in writes {
            let width = [Width::B1, Width::B2, Width::B4][width];
            let Some(access) = ConfigAccess::new(offset, width) else { continue };
            let before = space.dwords.clone();
            space.write(access, value << access.shift());
            for (i, (old, new)) in before.iter().zip(&space.dwords).enumerate() {
                let allowed = if i == usize::from(access.offset() / 4) { access.mask() } else { 0 };
                prop_assert_eq!((old.value ^ new.value) & !(old.writable & allowed), 0, "dword {:#x}", 4 * i);
            }
        }
        space.reset();
        prop_assert!(space.dwords.iter().all(|d| d.value == d.reset));
    }
}
