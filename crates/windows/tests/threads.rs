//! Hits and releases on several CPUs beside a planner under pressure: no window is lost, freed in use, or counted wrong.

mod common;

use std::sync::Mutex;

use common::{Host, create, map};
use outboard_windows::{Limits, List, Range, Segment, Step, Use};

const MIB: u64 = 1 << 20;

#[test]
fn hits_and_releases_run_beside_misses() {
    let ram = [Range { start: 0, len: 64 * MIB }];
    // A quarter of RAM: the planner evicts all the time.
    let limits = Limits { bytes: 16 * MIB, entries: 512 };
    let (table, planner) = create(limits, &ram, 64);
    let slow = Mutex::new((planner, Host::default()));
    let rounds = match () {
        () if cfg!(miri) => 300,
        () if cfg!(debug_assertions) => 20_000,
        () => 200_000,
    };
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (table, slow) = (&table, &slow);
            scope.spawn(move || {
                let mut state = thread.wrapping_mul(0x9e37_79b9) + 1;
                let mut held: Vec<Segment> = Vec::new();
                for _ in 0..rounds {
                    state =
                        state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let random = state >> 33;
                    if held.len() > 60 || random % 3 == 0 {
                        if let Some(segment) = held.pop() {
                            table.release(segment.bus, segment.range.len).expect("held");
                        }
                        continue;
                    }
                    let page = if random % 7 == 0 {
                        random % 16384
                    } else {
                        (random % 64) * 256 + (random / 64) % 4
                    };
                    let mut list = [Segment::new(page * 4096, 4096)];
                    let step = if table.hit_list(&mut list) {
                        Step::Done
                    } else {
                        let (planner, host) = &mut *slow.lock().unwrap();
                        map(table, planner, host, limits, &mut list)
                    };
                    if step == Step::Done {
                        held.push(Segment { bus: list.bus(0), ..list[0] });
                    }
                    if random % 64 == 0 {
                        let (planner, host) = &mut *slow.lock().unwrap();
                        assert_eq!(planner.mapped(), (host.bytes, host.maps.len() as u32));
                        for segment in &held {
                            assert_eq!(host.translate(segment.bus, 4096), Some(segment.range.start));
                        }
                    }
                }
                for segment in held {
                    table.release(segment.bus, segment.range.len).expect("held to the end");
                }
            });
        }
    });
    assert_eq!(table.pinned(), Use::default());
    let (mut planner, mut host) = slow.into_inner().unwrap();
    while planner.trim(&table, u32::MAX) == Step::Ask {
        host.exchange(planner.batch(), limits);
        planner.settle_trim(&table);
    }
    assert_eq!(host.maps.len(), 0, "every window was found idle");
}
