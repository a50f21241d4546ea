//! Generated traces: shapes that recordings on one machine do not have.
//!
//! `scattered`, `clusters` and `games` are the three of the DMA issue's must-shows; each takes `:SEED` behind its name.

use crate::trace::{Segment, Trace};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const PAGE: u64 = 4 * KIB;
/// The clusters in which real drivers' pages were seen (dart-and-dma 3.1).
const CLUSTER: u64 = 256 * KIB;
/// Where generated guests have their RAM.
const RAM: u64 = 4 * GIB;

/// SplitMix64: the same trace for the same seed, on every host.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// A sequence for `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below `bound`, which is not zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }

    /// A number from `low` to `high`, both included.
    pub fn within(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// Puts `items` in random order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }
}

/// Names that [`by_name`] knows.
pub fn names() -> &'static str {
    "scattered, clusters, games (each also with a seed: `games:7`)"
}

/// The generated trace of that name, `NAME` or `NAME:SEED`.
pub fn by_name(name: &str) -> Option<Trace> {
    let (kind, seed) = name.split_once(':').unwrap_or((name, "1"));
    let seed = seed.parse().ok()?;
    let mut trace = match kind {
        "scattered" => scattered(seed, 60_000),
        "clusters" => clusters(seed, 200_000),
        "games" => games(seed, 1000),
        _ => return None,
    };
    trace.name = format!("generated:{name}");
    Some(trace)
}

/// `count` live mappings of 4 KiB, one to each 256 KiB, made and released in random order: the worst for fixed windows.
pub fn scattered(seed: u64, count: u64) -> Trace {
    let mut random = Random::new(seed);
    let mut trace = Trace::new("scattered");
    let mut blocks: Vec<u64> = (0..count).collect();
    random.shuffle(&mut blocks);
    let mut calls = Vec::new();
    for (at, block) in blocks.into_iter().enumerate() {
        let start = RAM + block * CLUSTER + random.below(CLUSTER / PAGE) * PAGE;
        calls.push(trace.map(at as u64, [Segment { start, len: PAGE }]));
    }
    release_all(&mut trace, &mut random, calls, count);
    trace
}

/// `count` live mappings of 4 KiB in clusters of 16 to 64 within every second 256 KiB, about 0.8 GB, made and released
/// in random order: more entries than a Mac has, and no hint which pages belong together.
pub fn clusters(seed: u64, count: u64) -> Trace {
    let mut random = Random::new(seed);
    let mut trace = Trace::new("clusters");
    let mut pages = Vec::new();
    let mut block = 0;
    while (pages.len() as u64) < count {
        let mut within: Vec<u64> = (0..CLUSTER / PAGE).collect();
        random.shuffle(&mut within);
        let size = random.within(16, 64).min(count - pages.len() as u64) as usize;
        pages.extend(within.iter().take(size).map(|page| RAM + block * 2 * CLUSTER + page * PAGE));
        block += 1;
    }
    random.shuffle(&mut pages);
    let mut calls = Vec::new();
    for (at, start) in pages.into_iter().enumerate() {
        calls.push(trace.map(at as u64, [Segment { start, len: PAGE }]));
    }
    release_all(&mut trace, &mut random, calls, count);
    trace
}

fn release_all(trace: &mut Trace, random: &mut Random, mut calls: Vec<usize>, at: u64) {
    trace.mark(at, "all mapped");
    random.shuffle(&mut calls);
    for (after, call) in calls.into_iter().enumerate() {
        trace.unmap(at + after as u64, call);
    }
}

/// What a game maps: how many pieces of which size.
struct Mix {
    name: &'static str,
    /// Pieces of 1 to 4 pages, so many to each cluster.
    small: u64,
    per_cluster: u64,
    /// Pieces of 64 to 512 KiB.
    medium: u64,
    /// Pieces of 1 to 8 MiB.
    large: u64,
    /// Pieces of 64 MiB.
    huge: u64,
}

const MIXES: [Mix; 6] = [
    Mix { name: "pages in tight clusters", small: 2400, per_cluster: 40, medium: 100, large: 20, huge: 0 },
    Mix { name: "pages all over", small: 1500, per_cluster: 1, medium: 50, large: 40, huge: 1 },
    Mix { name: "textures", small: 300, per_cluster: 8, medium: 800, large: 120, huge: 2 },
    Mix { name: "streaming", small: 600, per_cluster: 20, medium: 1500, large: 30, huge: 0 },
    Mix { name: "few and huge", small: 100, per_cluster: 4, medium: 60, large: 60, huge: 10 },
    Mix { name: "a bit of everything", small: 1000, per_cluster: 12, medium: 400, large: 100, huge: 3 },
];

/// Six games of different mixes, loaded and quit in turn `loads` times: fragmentation that grows would show.
pub fn games(seed: u64, loads: u64) -> Trace {
    let mut random = Random::new(seed);
    let mut trace = Trace::new("games");
    let mut place = Places::default();
    let mut at = 0;
    for load in 0..loads {
        let mix = &MIXES[(load % 6) as usize];
        trace.mark(at, format!("load {load}: {}", mix.name));
        let mut pieces = place.pieces(&mut random, mix);
        random.shuffle(&mut pieces);
        let mut live = Vec::new();
        let mut rest = pieces.as_slice();
        while !rest.is_empty() {
            at += random.within(20, 400);
            let count = if random.below(4) == 0 { random.within(2, 40) } else { 1 };
            let (now, later) = rest.split_at((count as usize).min(rest.len()));
            live.push((trace.map(at, now.iter().copied()), now));
            rest = later;
        }
        // Play: a third goes and comes back, in another order.
        random.shuffle(&mut live);
        let away = live.split_off(live.len() * 2 / 3);
        for (call, _) in &away {
            at += random.within(5, 100);
            trace.unmap(at, *call);
        }
        for (_, list) in away {
            at += random.within(20, 400);
            live.push((trace.map(at, list.iter().copied()), list));
        }
        trace.mark(at, format!("quit {load}"));
        random.shuffle(&mut live);
        for (call, _) in live {
            at += random.within(1, 5);
            trace.unmap(at, call);
        }
        at += 2_000_000;
    }
    trace.mark(at, "end");
    trace
}

/// Where pieces lie: pages in 256 KiB blocks, the rest behind one another, all moving through 16 GiB as allocators do.
#[derive(Default)]
struct Places {
    block: u64,
    run: u64,
}

impl Places {
    const BLOCKS: u64 = 8 * GIB / CLUSTER;

    fn pieces(&mut self, random: &mut Random, mix: &Mix) -> Vec<Segment> {
        let mut pieces = Vec::new();
        let mut left = 0;
        for _ in 0..mix.small {
            if left == 0 {
                // An odd multiplier visits every block before it comes back to one.
                self.block = (self.block + 1) % Self::BLOCKS;
                left = mix.per_cluster;
            }
            left -= 1;
            let block = RAM + self.block * 10_007 % Self::BLOCKS * CLUSTER;
            // Each piece has a share of the block, so that none overlap.
            let share = CLUSTER / PAGE / mix.per_cluster;
            let pages = random.within(1, share.min(4));
            let offset = left * share + random.below(share - pages + 1);
            pieces.push(Segment { start: block + offset * PAGE, len: pages * PAGE });
        }
        for (count, low, high, unit) in
            [(mix.medium, 16, 128, PAGE), (mix.large, 256, 2048, PAGE), (mix.huge, 1, 1, 64 * MIB)]
        {
            for _ in 0..count {
                pieces.push(self.run(random.within(low, high) * unit, random.below(16) * PAGE));
            }
        }
        pieces
    }

    fn run(&mut self, len: u64, gap: u64) -> Segment {
        if self.run + gap + len > 8 * GIB {
            self.run = 0;
        }
        let start = RAM + 8 * GIB + self.run + gap;
        self.run += gap + len;
        Segment { start, len }
    }
}
