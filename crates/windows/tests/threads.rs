//! Hits and releases on several CPUs beside a planner under pressure: no window is lost, freed in use, or counted wrong.

#[allow(dead_code, reason = "calls are made here, several at a time")]
mod common;

use std::sync::Mutex;

use common::{Host, create_for};
use outboard_windows::{Call, Limits, List, Outcome, Planner, Range, Segment, Step, Table, Use};

const MIB: u64 = 1 << 20;
const THREADS: u16 = 4;

/// Up to 300 KiB near one of a few places.
fn rough_segment(random: u64) -> Segment {
    let start = (random % 24) * (64 * MIB / 24) + (random / 24 % 100) * 4096;
    let most = if random.is_multiple_of(5) { 300 << 10 } else { 20 << 10 };
    Segment::new(start, (1 + random / 2400 % most).min(64 * MIB - start))
}

/// A whole call beside others, as the glue makes it: the planner's lock is not held while the host is asked.
fn miss(
    table: &Table<'_>,
    planner: &Mutex<Planner<'_>>,
    call: &mut Call<'_>,
    host: &Mutex<Host>,
    limits: Limits,
    list: &mut dyn List,
) -> Step {
    let mut step = planner.lock().unwrap().begin(table, call, list);
    loop {
        match step {
            Step::Ask => {
                // Others come in between, before and after.
                std::thread::yield_now();
                host.lock().unwrap().exchange(call.batch(), limits);
                std::thread::yield_now();
                step = planner.lock().unwrap().resume(table, call, list);
            }
            Step::Wait => {
                std::thread::yield_now();
                step = planner.lock().unwrap().again(table, call, list);
            }
            done => return done,
        }
    }
}

#[test]
fn hits_and_releases_run_beside_misses() {
    assert_eq!(beside_one_another(false), 0, "what others have under way is waited for");
}

/// Lists whose entries straddle windows and overlap those of others, more than fits, and a host that refuses now and then.
#[test]
fn calls_that_fail_leave_those_of_others_alone() {
    assert!(beside_one_another(true) > 0);
}

/// Failed calls of several threads, each with a call of its own.
fn beside_one_another(rough: bool) -> u64 {
    let ram = [Range { start: 0, len: 64 * MIB }];
    // A quarter of RAM: the planner evicts all the time.
    let limits = Limits { bytes: 16 * MIB, entries: 512 };
    let (table, planner, calls) = create_for(limits, &ram, 64, THREADS);
    let slow = Mutex::new(planner);
    let host = Mutex::new(Host::default());
    let rounds = match () {
        () if cfg!(miri) => 20,
        () if cfg!(debug_assertions) => 20_000,
        () => 200_000,
    };
    std::thread::scope(|scope| {
        for mut call in calls {
            let (table, slow, host) = (&table, &slow, &host);
            scope.spawn(move || {
                let mut state = u64::from(call.number()).wrapping_mul(0x9e37_79b9) + 1;
                let mut held: Vec<Segment> = Vec::new();
                for _ in 0..rounds {
                    state =
                        state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let random = state >> 33;
                    if held.len() > 60 || random.is_multiple_of(3) {
                        if let Some(segment) = held.pop() {
                            table.release(segment.bus, segment.range.len).expect("held");
                        }
                        continue;
                    }
                    let page = if random.is_multiple_of(7) {
                        random % 16384
                    } else {
                        (random % 64) * 256 + (random / 64) % 4
                    };
                    let mut list = vec![Segment::new(page * 4096, 4096)];
                    if rough {
                        list = (0..1 + random % 4)
                            .map(|n| rough_segment(random.rotate_left(n as u32 * 9)))
                            .collect();
                        if random.is_multiple_of(50) {
                            let outcomes = [Outcome::NoSpace, Outcome::Returning, Outcome::Refused];
                            host.lock().unwrap().script.push(outcomes[(random / 50 % 3) as usize]);
                        }
                    }
                    let step = if table.hit_list(&mut list) {
                        Step::Done
                    } else {
                        miss(table, slow, &mut call, host, limits, &mut list)
                    };
                    if step == Step::Done {
                        held.extend(list);
                    }
                    if random.is_multiple_of(64) {
                        let host = host.lock().unwrap();
                        for segment in &held {
                            let there = host.translate(segment.bus, segment.range.len);
                            assert_eq!(there, Some(segment.range.start));
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
    let (mut planner, mut host) = (slow.into_inner().unwrap(), host.into_inner().unwrap());
    assert_eq!(planner.mapped(), (host.bytes, host.maps.len() as u32));
    let failures = planner.stats().failures;
    let (.., mut call) = common::create(limits, &ram, 64);
    while planner.trim(&table, &mut call, u32::MAX) == Step::Ask {
        host.exchange(call.batch(), limits);
        planner.settle_trim(&table, &mut call);
    }
    assert_eq!((host.maps.len(), planner.stats().lost), (0, 0), "every window was found idle");
    failures
}
