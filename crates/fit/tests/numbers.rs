//! The numbers that the windows policy promises, on the recorded traces, their variants, and the generated ones.
//!
//! Recorded traces lie beside the repository, in `../shared/data/dma-traces`; where they are absent the tests say so and
//! check nothing. `OUTBOARD_FIT_SWEEP=1` (with --release) also tries variants of the traces and of the constants.

#![allow(clippy::print_stdout)] // Figures, for whoever runs it with --nocapture.

use std::path::PathBuf;

use outboard_fit::generate::Random;
use outboard_fit::trace::{Op, Segment, Trace};
use outboard_fit::{Detail, Limits, Policy, generate, read, replay, tightest};
use outboard_windows::Policy as Constants;

/// What the data README says of the published policy and of no windows.
const PUBLISHED: [(&str, u64, [u64; 2], [u64; 2]); 4] = [
    ("cuda-init-pinned-register", 5515, [1740, 2882], [1186, 1847]),
    ("cuda-many-small", 954, [4218, 9072], [874, 1644]),
    ("llm", 1187, [1333, 2204], [953, 1535]),
    ("vkgame-seed1-1024mb", 10415, [4360, 69086], [1960, 20605]),
];

fn recorded() -> Vec<Trace> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/dma-traces");
    if !folder.is_dir() {
        println!("skipped: no recorded traces in {}", folder.display());
        return Vec::new();
    }
    let load = |name: &str| read(&folder.join(format!("{name}.trace.xz")), None).expect("recorded trace");
    PUBLISHED.iter().map(|(name, ..)| load(name)).collect()
}

fn sweep() -> bool {
    std::env::var_os("OUTBOARD_FIT_SWEEP").is_some()
}

#[test]
fn the_published_figures_come_out() {
    for (trace, (name, live_tenths, none, fixed)) in recorded().iter().zip(PUBLISHED) {
        assert_eq!(trace.name, name);
        for (policy, [entries, calls]) in [(Policy::None, none), (Policy::Fixed256k, fixed)] {
            let replayed = replay(trace, policy, Limits::MAC, Detail::Counts).unwrap();
            assert_eq!(u64::from(replayed.peak_entries), entries, "{name} {policy:?}");
            assert_eq!(replayed.host_calls, calls, "{name} {policy:?}");
            assert_eq!((replayed.peak_live_bytes * 10 + (1 << 19)) >> 20, live_tenths, "{name}");
            assert_eq!(replayed.failures, 0);
        }
    }
}

/// Ratios of the DMA issue: bytes to no windows' peak (at most 1.15), entries to the published peak (0.80), round trips to
/// the published host calls (0.30).
struct Ratios {
    bytes: f64,
    entries: f64,
    trips: f64,
}

impl Ratios {
    fn of(trace: &Trace, constants: Constants) -> Ratios {
        let adaptive = Policy::Adaptive(constants);
        let run = |policy| replay(trace, policy, Limits::MAC, Detail::Counts).unwrap();
        let (own, fixed, none) = (run(adaptive), run(Policy::Fixed256k), run(Policy::None));
        assert_eq!(own.failures, 0, "{}: {:?}", trace.name, own.first_failure);
        let (bytes, entries) = tightest(trace, adaptive, Limits::MAC).unwrap();
        Ratios {
            bytes: bytes.expect("fits") as f64 / none.peak_mapped_bytes as f64,
            entries: f64::from(entries.expect("fits")) / f64::from(fixed.peak_entries),
            trips: own.host_round_trips as f64 / fixed.host_calls as f64,
        }
    }

    /// The fullest of the three, 1.0 being the limit.
    fn worst(&self) -> f64 {
        (self.bytes / 1.15).max(self.entries / 0.80).max(self.trips / 0.30)
    }

    fn print(&self, what: &str) {
        println!(
            "{what:<50} bytes {:.3} entries {:.3} trips {:.3} worst {:.3}",
            self.bytes,
            self.entries,
            self.trips,
            self.worst()
        );
    }
}

#[test]
fn recorded_traces_meet_all_three_numbers() {
    for trace in recorded() {
        let ratios = Ratios::of(&trace, Constants::default());
        ratios.print(&trace.name);
        assert!(ratios.worst() <= 1.0, "{}", trace.name);
    }
}

/// `trace` with each call's segments put through `change`, and calls that it leaves empty dropped.
fn rebuilt(trace: &Trace, name: &str, mut change: impl FnMut(usize, &[Segment]) -> Vec<Segment>) -> Trace {
    let mut new = Trace::new(format!("{} {name}", trace.name));
    let mut indices = vec![None; trace.calls.len()];
    for (index, call) in trace.calls.iter().enumerate() {
        match &call.op {
            Op::Map(span) => {
                let segments = change(index, &trace.segments[span.clone()]);
                if !segments.is_empty() {
                    indices[index] = Some(new.map(call.at, segments));
                }
            }
            Op::Unmap(mapped) => {
                if let Some(mapped) = indices[*mapped] {
                    new.unmap(call.at, mapped);
                }
            }
            Op::Marker(_) => {}
        }
    }
    new
}

/// Other traces of the same kind.
fn variants(trace: &Trace) -> Vec<Trace> {
    let mut all = Vec::new();
    let shifted = |by: u64| move |s: &Segment| Segment { start: s.start + by, ..*s };
    for pages in [3, 7, 32] {
        let by = pages * 4096;
        all.push(rebuilt(trace, &format!("moved {pages} pages"), |_, list| {
            list.iter().map(shifted(by)).collect()
        }));
    }
    for (seed, keep) in [(1, 50), (2, 75)] {
        let mut random = Random::new(seed);
        all.push(rebuilt(trace, &format!("{keep} % of calls"), |_, list| {
            if random.below(100) < keep { list.to_vec() } else { Vec::new() }
        }));
    }
    // The memory is elsewhere: 64 MiB blocks change places (what crosses their edges moves with its first byte).
    let mut places: Vec<u64> = (0..512).collect();
    Random::new(3).shuffle(&mut places);
    all.push(rebuilt(trace, "64 MiB blocks shuffled", |_, list| {
        let moved = |s: &Segment| {
            let block = s.start >> 26;
            Segment {
                start: places.get(block as usize).map_or(s.start, |p| (p << 26) + s.start % (1 << 26)),
                ..*s
            }
        };
        list.iter().map(moved).collect()
    }));
    if trace.segments.iter().map(|s| s.len).sum::<u64>() < 300 << 20 {
        all.push(rebuilt(trace, "twice", |_, list| {
            list.iter().flat_map(|s| [*s, Segment { start: s.start + (20 << 30), ..*s }]).collect()
        }));
    }
    all
}

#[test]
fn variants_and_other_constants_meet_them_too() {
    if !sweep() {
        println!("skipped: set OUTBOARD_FIT_SWEEP=1, and use --release");
        return;
    }
    let mut over = Vec::new();
    let traces = recorded();
    for variant in traces.iter().flat_map(variants) {
        let ratios = Ratios::of(&variant, Constants::default());
        ratios.print(&variant.name);
        if ratios.worst() > 1.0 {
            over.push(variant.name);
        }
    }
    let base = Constants::default();
    for constants in [
        Constants { slack_per_mille: 80, ..base },
        Constants { slack_per_mille: 110, ..base },
        Constants { ahead_per_mille: 60, ..base },
        Constants { ahead_per_mille: 120, ..base },
        Constants { slack_parts: 32, ..base },
        Constants { slack_parts: 96, ..base },
        Constants { balance_percent: 50, ..base },
        Constants { balance_percent: 80, ..base },
        Constants { largest: 2 << 20, ..base },
        Constants { largest: 8 << 20, ..base },
    ] {
        for trace in &traces {
            let ratios = Ratios::of(trace, constants);
            let c = constants;
            let name = format!(
                "{} {}/{}/{}/{}/{}M",
                trace.name,
                c.slack_per_mille,
                c.ahead_per_mille,
                c.slack_parts,
                c.balance_percent,
                c.largest >> 20
            );
            ratios.print(&name);
            if ratios.worst() > 1.0 {
                over.push(name);
            }
        }
    }
    assert!(over.is_empty(), "beyond the limits: {over:#?}");
}

#[test]
fn generated_extremes_fit() {
    let adaptive = Policy::Adaptive(Constants::default());
    for seed in [1, 2] {
        let scattered = generate::scattered(seed, 60_000);
        let own = replay(&scattered, adaptive, Limits::MAC, Detail::Counts).unwrap();
        assert!(own.failures <= 5_000, "at least 55,000 of 60,000 fit; {} failed", own.failures);
        let fixed = replay(&scattered, Policy::Fixed256k, Limits::MAC, Detail::Fits).unwrap();
        assert_eq!(fixed.first_failure.map(|f| f.call), Some(6144), "as the issue says");

        let clusters = generate::clusters(seed, 200_000);
        let own = replay(&clusters, adaptive, Limits::MAC, Detail::Counts).unwrap();
        assert_eq!(own.failures, 0, "{:?}", own.first_failure);
        let none = replay(&clusters, Policy::None, Limits::MAC, Detail::Fits).unwrap();
        assert!(none.failures > 0, "no windows run out of entries");
    }
}

#[test]
fn a_thousand_games_do_not_fragment() {
    let loads = if cfg!(debug_assertions) && !sweep() { 120 } else { 1000 };
    let trace = generate::games(1, loads);
    let adaptive = Policy::Adaptive(Constants::default());
    let own = replay(&trace, adaptive, Limits::MAC, Detail::Samples).unwrap();
    assert_eq!(own.failures, 0, "{:?}", own.first_failure);
    // Marks come in pairs, load and quit. Holes while all is loaded, whole rounds of six games.
    let holes: Vec<f64> = own.holes_at_markers.iter().skip(1).step_by(2).map(|(n, _)| *n as f64).collect();
    let round = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    // The first rounds find an empty window.
    let half = holes.len() / 12 * 6;
    let (early, late) = (round(&holes[12..half]), round(&holes[half..]));
    println!(
        "holes while loaded: {early:.1} in the first half, {late:.1} in the second; waited {} us",
        own.waited
    );
    assert!(late <= 1.1 * early, "fragmentation grows: {early} to {late}");
}
