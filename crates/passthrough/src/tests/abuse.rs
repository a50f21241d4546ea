//! A guest that does everything it can think of. The device, the mapper and the binder of the rig fail the test if what they get is
//! more than a machine may be asked for: unaligned or out of range accesses, mappings outside the windows or over each other.

use super::device::{ECAM, FakeBinder, FakeHost, Log, Rig};
use crate::VectorBinder;
use outboard_bus::Width;
use proptest::prelude::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const WIDTHS: [Width; 4] = [Width::B1, Width::B2, Width::B4, Width::B8];

fn rig() -> Rig {
    let binder = Arc::new(FakeBinder::default());
    Rig::with(FakeHost::endpoint(&Log::default()), Some(binder as Arc<dyn VectorBinder>))
}

/// The device answers still, as itself.
fn still_there(rig: &Rig) {
    rig.root.reset();
    rig.set_up_port();
    rig.place();
    assert_eq!(rig.function.loss(), None);
    assert_eq!(rig.dword(0), 0x2b85_10de);
    assert_eq!(rig.mapper.ranges().len(), 3);
    assert_eq!(rig.bus.read(0x2001_0010, Width::B4), 0x0100_0010);
}

#[test]
fn every_config_byte_read_and_all_ones_written_at_every_offset_and_width() {
    let rig = rig();
    rig.place();
    for width in WIDTHS {
        for offset in 0..4096 {
            rig.read(offset, width);
            // Waking up takes its time, once for each width.
            rig.write(offset, width, u64::MAX);
            rig.write(offset, width, 0);
        }
    }
    still_there(&rig);
}

#[test]
fn an_msix_table_full_of_rubbish() {
    let rig = rig();
    rig.place();
    rig.write(0xb2, Width::B2, 0x8000);
    for (round, width) in WIDTHS.iter().cycle().take(8).enumerate() {
        for at in (0x2000_4000u64..0x2000_6000).step_by(width.bytes() as usize) {
            let value = at.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(round as u32);
            rig.bus.write(at, *width, value);
            rig.bus.read(at + 1, *width);
        }
        (0..80).for_each(|vector| rig.host.raise(vector));
    }
    still_there(&rig);
}

#[test]
fn decode_toggled_and_resets_during_traffic() {
    let rig = rig();
    rig.place();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for vcpu in 0..2u64 {
            let (rig, done) = (&rig, &done);
            scope.spawn(move || {
                let mut at = vcpu;
                while !done.load(Ordering::Relaxed) {
                    at = at.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    let address = 0x2000_0000 + (at >> 40 & 0x1_1ffc);
                    rig.bus.read(address, Width::B4);
                    rig.bus.write(address, Width::B4, at);
                    rig.host.raise((at >> 33 & 63) as u16);
                }
            });
        }
        for round in 0..200u32 {
            rig.write(4, Width::B2, 0);
            rig.set(0x10, 0x2000_0000 + ((round % 3) << 16));
            rig.write(4, Width::B2, 6);
            rig.write(0xb2, Width::B2, if round % 2 == 0 { 0x8000 } else { 0xc000 });
            if round % 10 == 0 {
                rig.write(0x79, Width::B1, 0x80);
                rig.place();
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    still_there(&rig);
}

#[derive(Clone, Debug)]
enum Step {
    Config(u64, Width, u64),
    Bar(u64, Width, u64),
    Raise(u16),
    FunctionReset,
    RootReset,
    Place,
}

fn step() -> impl Strategy<Value = Step> {
    let width = || prop::sample::select(WIDTHS.to_vec());
    let address =
        prop::sample::select(vec![0u64, 0x2000_0000, 0x2000_4000, 0x3fff_0000, 0x4000_0000, 0x80, u64::MAX]);
    prop_oneof![
        // Sleeping is left to its own tests: waking takes ten milliseconds.
        (0u64..4096, width(), any::<u64>()).prop_map(|(at, width, value)| Step::Config(at, width, value)),
        (0x10u64..0x34, width(), address).prop_map(|(at, width, value)| Step::Config(at, width, value)),
        (prop::sample::select(vec![4u64, 0x52, 0xb2, 0x78, 0x79]), width(), any::<u64>())
            .prop_map(|(at, width, value)| Step::Config(at, width, value)),
        (0u64..0x2_0000, width(), any::<u64>()).prop_map(|(at, width, value)| Step::Bar(at, width, value)),
        (0x4000u64..0x5020, width(), any::<u64>()).prop_map(|(at, width, value)| Step::Bar(at, width, value)),
        (0u16..80).prop_map(Step::Raise),
        Just(Step::FunctionReset),
        Just(Step::RootReset),
        Just(Step::Place),
    ]
}

proptest! {
    #[test]
    fn any_sequence_of_accesses(steps in prop::collection::vec(step(), 0..200)) {
        let rig = rig();
        rig.place();
        for step in steps {
            match step {
                Step::Config(at, width, value) => {
                    rig.write(at, width, value & if (0x40..0x48).contains(&at) { !3 } else { u64::MAX });
                    rig.read(at, width);
                }
                Step::Bar(at, width, value) => {
                    rig.bus.write(0x2000_0000 + at, width, value);
                    rig.bus.read(0x2000_0000 + at, width);
                }
                Step::Raise(vector) => rig.host.raise(vector),
                Step::FunctionReset => rig.write(0x79, Width::B1, 0x80),
                Step::RootReset => {
                    rig.root.reset();
                    rig.set_up_port();
                }
                Step::Place => rig.place(),
            }
            prop_assert_eq!(rig.host.peek(4) & 0x147, 3 | rig.host.peek(4) & 4);
        }
        prop_assert_ne!(rig.bus.read(ECAM, Width::B4), 0xffff_ffff);
        still_there(&rig);
    }
}
