//! Random operations against a model that remembers every live mapping and nothing else.
//!
//! `OUTBOARD_WINDOWS_OPS` sets the number of operations (default 200,000; the lab runs millions).

mod common;

use common::{Host, create, map};
use outboard_windows::{Failure, GRANULE, Limits, List, Outcome, Range, Segment, Step};

const MIB: u64 = 1 << 20;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

fn operations() -> u64 {
    std::env::var("OUTBOARD_WINDOWS_OPS").ok().and_then(|n| n.parse().ok()).unwrap_or(200_000)
}

fn ram() -> [Range; 2] {
    // Edges off the 256 KiB grid, and a hole.
    [Range { start: 0x4000_4000, len: 24 * MIB }, Range { start: 0x8000_c000, len: 40 * MIB + 16 * 1024 }]
}

/// A request near a few hot spots, so that requests repeat, overlap and straddle.
fn request(random: &mut Random) -> Segment {
    let ram = ram()[random.below(2) as usize];
    let spot = if random.one_in(3) { random.below(ram.len) } else { random.below(12) * (ram.len / 12) };
    let start = ram.start + (spot + random.below(96) * 4096).min(ram.len - 1);
    let len = match random.below(12) {
        0 => 1 + random.below(5000),
        1 => 65536,
        2 => 4096 * (1 + random.below(300)),
        _ => 4096 * (1 + random.below(3)),
    };
    let end = ram.start + ram.len;
    Segment::new(start, len.min(end - start))
}

struct World {
    live: Vec<Vec<Segment>>,
    live_bytes: u64,
}

impl World {
    /// Every live mapping still translates to what was asked for.
    fn check(&self, host: &Host) {
        for segment in self.live.iter().flatten() {
            let there = host.translate(segment.bus, segment.range.len);
            assert_eq!(there, Some(segment.range.start), "live {segment:?}");
        }
    }
}

fn run(seed: u64, limits: Limits, operations: u64, refusals: bool) -> (u64, u64) {
    let mut random = Random(seed);
    let (table, mut planner, mut call) = create(limits, &ram(), 8);
    let mut host = Host::default();
    let mut world = World { live: Vec::new(), live_bytes: 0 };
    let (mut failures, mut hits) = (0, 0);
    // Swings between few and many live calls, so that budgets run out and recover.
    let mut crowd = 40;
    for operation in 0..operations {
        if random.one_in(500) {
            crowd = [4, 40, 400, 2000][random.below(4) as usize];
        }
        if refusals && random.one_in(20) {
            let outcomes = [Outcome::NoSpace, Outcome::Refused, Outcome::Returning];
            host.script = vec![outcomes[random.below(3) as usize]; 1 + random.below(2) as usize];
        }
        let grow = (world.live.len() as u64) < crowd;
        if random.below(100) < if grow { 60 } else { 40 } {
            let count = if random.one_in(6) { 1 + random.below(24) } else { 1 };
            let mut list: Vec<Segment> = (0..count).map(|_| request(&mut random)).collect();
            let before = host.exchanges;
            match map(&table, &mut planner, &mut call, &mut host, limits, &mut list) {
                Step::Done => {
                    hits += u64::from(host.exchanges == before);
                    world.live_bytes += list.iter().map(|s| s.range.len).sum::<u64>();
                    for segment in &list {
                        let there = host.translate(segment.bus, segment.range.len);
                        assert_eq!(there, Some(segment.range.start));
                    }
                    world.live.push(list);
                }
                Step::Failed(failure) => {
                    failures += 1;
                    assert!(!matches!(failure, Failure::NotRam(_)), "all requests are in RAM");
                    assert!(list.iter().all(|s| s.bus == outboard_windows::UNRESOLVED));
                }
                Step::Ask | Step::Wait => unreachable!("a call alone"),
            }
        } else if !world.live.is_empty() {
            let call = world.live.swap_remove(random.below(world.live.len() as u64) as usize);
            for segment in call {
                table.release(segment.bus, segment.range.len).expect("release of what is live");
                world.live_bytes -= segment.range.len;
            }
        }
        assert_eq!(planner.mapped(), (host.bytes, host.maps.len() as u32), "accounts differ");
        if operation % 1000 == 0 {
            world.check(&host);
        }
    }
    world.check(&host);
    for segment in world.live.drain(..).flatten() {
        table.release(segment.bus, segment.range.len).expect("release at the end");
    }
    assert_eq!(table.pinned(), outboard_windows::Use::default());
    while planner.trim(&table, &mut call, u32::MAX) == Step::Ask {
        host.exchange(call.batch(), limits);
        planner.settle_trim(&table, &mut call);
    }
    assert_eq!((host.bytes, host.maps.len()), (0, 0), "nothing stays mapped");
    assert_eq!(planner.stats().lost, 0);
    (failures, hits)
}

#[test]
fn random_operations_match_the_model() {
    let each = operations() / 5;
    // Large requests that cross one another are mapped several times over, so this is many times the RAM.
    let roomy = Limits { bytes: 2048 * MIB, entries: 16384 };
    let (failures, hits) = run(1, roomy, each, false);
    assert_eq!(failures, 0, "there is room for all that is live");
    assert!(hits > each / 8, "{hits} hits of {each}");
    for (seed, limits, refusals) in [
        (2, Limits { bytes: 8 * MIB, entries: 4096 }, false),
        (3, Limits { bytes: 256 * MIB, entries: 24 }, false),
        (4, Limits { bytes: 8 * MIB, entries: 100 }, true),
        (5, roomy, true),
    ] {
        let (failures, hits) = run(seed, limits, each, refusals);
        assert!(failures > 0 && hits > 0, "{limits:?}: {failures} failures, {hits} hits");
    }
}

#[test]
fn a_failed_call_changes_nothing() {
    let limits = Limits { bytes: 4 * MIB, entries: 64 };
    let (table, mut planner, mut call) = create(limits, &ram(), 8);
    let mut host = Host::default();
    let mut held = [Segment::new(0x4000_4000, 4096), Segment::new(0x4100_0000, 4096)];
    assert_eq!(map(&table, &mut planner, &mut call, &mut host, limits, &mut held), Step::Done);
    let mut idle = [Segment::new(0x4080_0000, 4096)];
    assert_eq!(map(&table, &mut planner, &mut call, &mut host, limits, &mut idle), Step::Done);
    table.release(idle.bus(0), 4096).unwrap();
    let (mapped, pinned, exchanges) = (planner.mapped(), table.pinned(), host.exchanges);

    // The second entry can never fit; the first shares a window, the third is not RAM.
    let ram = ram();
    for bad in [Segment::new(0x4040_0000, 5 * MIB), Segment::new(0x1000, 4096), Segment::new(0x4100_0000, 0)]
    {
        let mut list = [held[0], bad, Segment::new(ram[0].start + ram[0].len - 4096, 8192)];
        let step = map(&table, &mut planner, &mut call, &mut host, limits, &mut list);
        assert!(matches!(step, Step::Failed(Failure::Bytes | Failure::NotRam(_))), "{step:?}");
        assert_eq!((planner.mapped(), table.pinned(), host.exchanges), (mapped, pinned, exchanges));
    }
    // The idle window is still there: no exchange.
    assert_eq!(map(&table, &mut planner, &mut call, &mut host, limits, &mut idle), Step::Done);
    assert_eq!(host.exchanges, exchanges);
}

/// What is idle stays where giving it back would bring no space at once, and the next call may succeed.
#[test]
fn space_that_returns_fails_the_call_and_nothing_else() {
    let limits = Limits { bytes: 256 * MIB, entries: 4096 };
    let (table, mut planner, mut call) = create(limits, &ram(), 8);
    let mut host = Host::default();
    let mut idle = [Segment::new(0x4080_0000, 4096)];
    assert_eq!(map(&table, &mut planner, &mut call, &mut host, limits, &mut idle), Step::Done);
    table.release(idle.bus(0), 4096).unwrap();
    let (mapped, exchanges) = (planner.mapped(), host.exchanges);
    host.script = vec![Outcome::Returning; 2];
    let mut list = [Segment::new(0x4000_4000, 4096)];
    let step = map(&table, &mut planner, &mut call, &mut host, limits, &mut list);
    assert_eq!(step, Step::Failed(Failure::Returning));
    assert_eq!((host.exchanges - exchanges, planner.mapped(), planner.stats().failures), (2, mapped, 0));
    assert_eq!(map(&table, &mut planner, &mut call, &mut host, limits, &mut idle), Step::Done);
    assert_eq!(host.exchanges - exchanges, 2, "it was still there");
    // Refused once as too large: a smaller window.
    host.script = vec![Outcome::Returning];
    assert_eq!(map(&table, &mut planner, &mut call, &mut host, limits, &mut list), Step::Done);
    let range = Range { start: 0x4000_4000, len: GRANULE };
    assert!(host.maps.values().any(|(mapped, _)| *mapped == range), "{:?}", host.maps);
}

#[test]
fn windows_end_where_ram_ends() {
    let limits = Limits { bytes: 256 * MIB, entries: 4096 };
    let (table, mut planner, mut call) = create(limits, &ram(), 8);
    let mut host = Host::default();
    for ram in ram() {
        for start in [ram.start, ram.start + ram.len - 4096] {
            let mut list = [Segment::new(start, 4096)];
            assert_eq!(map(&table, &mut planner, &mut call, &mut host, limits, &mut list), Step::Done);
        }
    }
    for (range, _) in host.maps.values() {
        assert!(ram().iter().any(|ram| ram.covers(*range)), "{range:?} leaves RAM");
    }
    // Budgets are free, so windows are generous; one edge is the only granule of its block.
    let mut sizes: Vec<u64> = host.maps.values().map(|(range, _)| range.len / GRANULE).collect();
    sizes.sort_unstable();
    assert_eq!((sizes[0], sizes.last()), (1, Some(&15)));
}

/// Where the allowance for slack is used up, windows are single granules, and what lies around them is mapped ahead in the
/// same exchange: the next requests nearby make none.
#[test]
fn neighbours_come_along_and_go_again() {
    let ram = [Range { start: 0, len: 2048 * MIB }];
    let limits = Limits { bytes: 64 * MIB, entries: 4096 };
    let (table, mut planner, mut call) = create(limits, &ram, 64);
    let mut host = Host::default();
    let mut block = 0;
    while planner.stats().ahead == 0 {
        let mut list = [Segment::new(block * 256 * 1024, 4096)];
        assert_eq!(map(&table, &mut planner, &mut call, &mut host, limits, &mut list), Step::Done);
        block += 1;
        assert!(block < 2000, "slack is not bounded: {:?}", table.pinned());
    }
    assert!(table.pinned().slack <= limits.bytes / 9, "{:?}", table.pinned());
    let before = host.exchanges;
    for granule in 0..16 {
        let mut list = [Segment::new((block - 1) * 256 * 1024 + granule * GRANULE, 4096)];
        assert_eq!(map(&table, &mut planner, &mut call, &mut host, limits, &mut list), Step::Done);
    }
    assert_eq!(host.exchanges, before);
    // Scattered requests of whole granules fill all bytes: nothing made ahead is in the way.
    let (mut failed, mut next) = (None, block);
    while failed.is_none() {
        let mut list = [Segment::new(next * 256 * 1024, GRANULE)];
        match map(&table, &mut planner, &mut call, &mut host, limits, &mut list) {
            Step::Failed(failure) => failed = Some(failure),
            _ => next += 1,
        }
    }
    assert_eq!(failed, Some(Failure::Bytes));
    assert_eq!(table.pinned().bytes, limits.bytes);
}

#[test]
fn releases_of_nothing_are_refused() {
    let limits = Limits { bytes: 256 * MIB, entries: 4096 };
    let (table, mut planner, mut call) = create(limits, &ram(), 8);
    let mut host = Host::default();
    let mut list = [Segment::new(0x4000_4000, 4096)];
    assert_eq!(map(&table, &mut planner, &mut call, &mut host, limits, &mut list), Step::Done);
    for (bus, len) in
        [(0, 4096), (u64::MAX, 4096), (list.bus(0), 0), (list.bus(0), u64::MAX), (list.bus(0), 64 * MIB)]
    {
        assert!(table.release(bus, len).is_err(), "{bus:#x} {len:#x}");
    }
    table.release(list.bus(0), 4096).unwrap();
    assert!(table.release(list.bus(0), 4096).is_err(), "double release");
    assert_eq!(table.pinned(), outboard_windows::Use::default());
}
