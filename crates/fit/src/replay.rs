//! One trace through one policy.

use std::collections::BTreeMap;
use std::fmt;

use outboard_dart::MapError;
use outboard_windows::{Failure, MAX_RAM_RANGES, Policy as Constants, Range};

use crate::adaptive::{Adaptive, Memory};
use crate::host::{Host, Limits};
use crate::published::Published;
use crate::trace::{Op, Segment, Trace};

/// Policies that are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// The guest module's windows.
    Adaptive(Constants),
    /// The published scheme's fixed windows.
    Fixed256k,
    /// Each request by itself.
    None,
}

impl Policy {
    /// All, with the constants that ship.
    pub fn all() -> [Policy; 3] {
        [Policy::Adaptive(Constants::default()), Policy::Fixed256k, Policy::None]
    }

    /// Name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Policy::Adaptive(_) => "adaptive",
            Policy::Fixed256k => "fixed-256k",
            Policy::None => "none",
        }
    }
}

/// What a policy does with the calls of a trace.
pub trait Scheme {
    /// Maps all segments or none; one bus address each goes to `buses`.
    fn map(&mut self, host: &mut Host, segments: &[Segment], buses: &mut Vec<u64>) -> Result<(), Cause>;
    /// Releases what a call mapped.
    fn unmap(&mut self, host: &mut Host, segments: &[Segment], buses: &[u64]);
    /// Bytes and entries mapped, idle ones included.
    fn mapped(&self) -> (u64, u32);
}

/// Why a map call failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// The DART refused.
    Dart(MapError),
    /// The windows policy refused, staying below the limits.
    Windows(Failure),
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::Dart(error) => error.fmt(f),
            Cause::Windows(Failure::Bytes) => f.write_str("the byte budget is used up by live mappings"),
            Cause::Windows(Failure::Entries) => f.write_str("the entry budget is used up by live mappings"),
            Cause::Windows(Failure::NotRam(range)) => {
                write!(f, "{:#x} + {:#x} is not RAM", range.start, range.len)
            }
            Cause::Windows(Failure::NoSpace | Failure::Returning | Failure::Host) => {
                f.write_str("the host refused")
            }
        }
    }
}

/// The first failure of a replay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirstFailure {
    /// Microseconds since the trace began.
    pub at: u64,
    /// Index of the call in the trace.
    pub call: usize,
    /// The last marker before it.
    pub marker: Option<String>,
    /// Why.
    pub cause: Cause,
}

/// What is mapped after a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// Microseconds since the trace began.
    pub at: u64,
    /// Bytes mapped.
    pub bytes: u64,
    /// Entries.
    pub entries: u32,
}

/// Result of a replay.
#[derive(Debug, Clone, Default)]
pub struct Replay {
    /// Most entries at a time, idle windows included.
    pub peak_entries: u32,
    /// Most bytes mapped at a time, idle windows included.
    pub peak_mapped_bytes: u64,
    /// Most bytes asked for at a time.
    pub peak_live_bytes: u64,
    /// Mappings and unmappings that the host was asked for.
    pub host_calls: u64,
    /// Times the guest left for the host.
    pub host_round_trips: u64,
    /// Microseconds that the host waited for unmapped ranges to return.
    pub waited: u64,
    /// Free pieces of the DART's window: at the end, and the most after any call.
    pub holes: usize,
    /// Map calls that failed.
    pub failures: u64,
    /// The first of them.
    pub first_failure: Option<FirstFailure>,
    /// One for each call, where asked for.
    pub samples: Vec<Sample>,
    /// Free pieces and the largest of them at each marker, where samples were asked for.
    pub holes_at_markers: Vec<(usize, u64)>,
}

/// How much a replay does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detail {
    /// Only whether it fits: ends at the first failure.
    Fits,
    /// Peaks and counts.
    Counts,
    /// And what is mapped after each call.
    Samples,
}

/// RAM for which tables are made at most: they take a word for each 16 KiB.
const MOST_RAM: u64 = 4 << 40;

/// Limits with which nothing can be replayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("limits of {bytes} bytes and {entries} entries, {ram_gib} GiB of RAM: cannot be replayed ({why})")]
pub struct LimitsError {
    bytes: u64,
    entries: u32,
    ram_gib: u64,
    why: &'static str,
}

/// Replays `trace` under `limits`.
///
/// # Errors
/// [`LimitsError`] if the limits are less than one granule or entry, or the trace's addresses need more than 4 TiB of RAM around them.
pub fn replay(trace: &Trace, policy: Policy, limits: Limits, detail: Detail) -> Result<Replay, LimitsError> {
    let ram = ram(trace);
    let ram_bytes: u64 = ram.iter().map(|range| range.len).sum();
    let error =
        |why| LimitsError { bytes: limits.bytes, entries: limits.entries, ram_gib: ram_bytes >> 30, why };
    if ram_bytes > MOST_RAM {
        return Err(error("the trace's addresses lie too far apart: no more than 4 TiB around them"));
    }
    let host = Host::new(limits).map_err(|_| error("the DART model needs at least 16 KiB and one entry"))?;
    Ok(match policy {
        Policy::Adaptive(constants) => {
            let mut memory = Memory::default();
            let mut scheme = Adaptive::new(&mut memory, limits, constants, &ram)
                .map_err(|_| error("the windows need tables of that size"))?;
            run(trace, &mut scheme, host, detail)
        }
        Policy::Fixed256k => run(trace, &mut Published::fixed_256k(), host, detail),
        Policy::None => run(trace, &mut Published::none(), host, detail),
    })
}

/// Guest RAM as far as a trace tells: around each address that it names, in whole 256 MiB. Hosts have their RAM in pieces, some of them
/// terabytes apart; where there are more pieces than a guest may have, the smallest holes count as RAM.
fn ram(trace: &Trace) -> Vec<Range> {
    const UNIT: u64 = 256 << 20;
    // End by start, disjoint.
    let mut pieces: BTreeMap<u64, u64> = BTreeMap::new();
    for segment in &trace.segments {
        let (mut start, mut end) = (segment.start & !(UNIT - 1), segment.start + segment.len);
        if pieces.range(..=start).next_back().is_some_and(|(_, had)| *had >= end) {
            continue;
        }
        end = end.next_multiple_of(UNIT);
        while let Some((from, to)) = pieces.range(..=end).next_back().filter(|(_, to)| **to >= start) {
            (start, end) = (start.min(*from), end.max(*to));
            let from = *from;
            pieces.remove(&from);
        }
        pieces.insert(start, end);
    }
    let mut pieces: Vec<Range> =
        pieces.iter().map(|(start, end)| Range { start: *start, len: end - start }).collect();
    while pieces.len() > MAX_RAM_RANGES {
        let hole = |at: &usize| pieces[at + 1].start - (pieces[*at].start + pieces[*at].len);
        let Some(at) = (0..pieces.len() - 1).min_by_key(hole) else { break };
        let next = pieces.remove(at + 1);
        pieces[at].len = next.start + next.len - pieces[at].start;
    }
    pieces
}

fn run(trace: &Trace, scheme: &mut dyn Scheme, mut host: Host, detail: Detail) -> Replay {
    let mut replay = Replay::default();
    let begins = trace.begins();
    // Bus addresses of each live call; none where the map call failed.
    let mut live: Vec<Option<Vec<u64>>> = vec![None; trace.calls.len()];
    let mut spare: Vec<Vec<u64>> = Vec::new();
    let (mut live_bytes, mut marker) = (0, None);
    for (index, call) in trace.calls.iter().enumerate() {
        host.advance(call.at);
        match &call.op {
            Op::Map(span) => {
                let segments = &trace.segments[span.clone()];
                let mut buses = spare.pop().unwrap_or_default();
                buses.clear();
                match scheme.map(&mut host, segments, &mut buses) {
                    Ok(()) => {
                        live_bytes += segments.iter().map(|s| s.len).sum::<u64>();
                        live[index] = Some(buses);
                    }
                    Err(cause) => {
                        replay.failures += 1;
                        let marker = marker.map(|m: usize| trace.markers[m].clone());
                        let at = call.at - begins;
                        replay.first_failure.get_or_insert(FirstFailure { at, call: index, marker, cause });
                        if detail == Detail::Fits {
                            return replay;
                        }
                    }
                }
            }
            Op::Unmap(mapped) => {
                if let (Some(buses), Op::Map(span)) = (live[*mapped].take(), &trace.calls[*mapped].op) {
                    let segments = &trace.segments[span.clone()];
                    scheme.unmap(&mut host, segments, &buses);
                    live_bytes -= segments.iter().map(|s| s.len).sum::<u64>();
                    spare.push(buses);
                }
            }
            Op::Marker(text) => {
                marker = Some(*text);
                if detail == Detail::Samples {
                    let usage = host.usage();
                    replay.holes_at_markers.push((usage.holes, usage.largest_hole));
                }
            }
        }
        let (bytes, entries) = scheme.mapped();
        replay.peak_mapped_bytes = replay.peak_mapped_bytes.max(bytes);
        replay.peak_entries = replay.peak_entries.max(entries);
        replay.peak_live_bytes = replay.peak_live_bytes.max(live_bytes);
        if detail == Detail::Samples {
            replay.samples.push(Sample { at: call.at - begins, bytes, entries });
        }
    }
    (replay.host_calls, replay.host_round_trips) = (host.calls, host.round_trips);
    replay.waited = host.waited;
    replay.holes = host.usage().holes;
    replay
}

/// The smallest byte limit and the smallest entry limit, the other as in `limits`, under which `trace` runs without a
/// failed mapping; none where it fails under `limits`.
///
/// # Errors
/// As [`replay`].
pub fn tightest(
    trace: &Trace,
    policy: Policy,
    limits: Limits,
) -> Result<(Option<u64>, Option<u32>), LimitsError> {
    const UNIT: u64 = outboard_dart::GRANULE;
    let fits = |bytes, entries| {
        let replayed = replay(trace, policy, Limits { bytes, entries }, Detail::Fits)?;
        Ok::<_, LimitsError>(replayed.failures == 0)
    };
    let bytes = smallest(limits.bytes / UNIT, |units| fits(units * UNIT, limits.entries))?;
    let entries = smallest(u64::from(limits.entries), |entries| {
        fits(limits.bytes, u32::try_from(entries).unwrap_or(u32::MAX))
    })?;
    Ok((bytes.map(|units| units * UNIT), entries.and_then(|entries| u32::try_from(entries).ok())))
}

/// The smallest number from 1 to `most` that will do, by bisection; none if `most` will not.
fn smallest<E>(most: u64, will_do: impl Fn(u64) -> Result<bool, E>) -> Result<Option<u64>, E> {
    if most == 0 || !will_do(most)? {
        return Ok(None);
    }
    let (mut too_few, mut enough) = (0, most);
    while enough - too_few > 1 {
        let middle = too_few + (enough - too_few) / 2;
        if will_do(middle)? { enough = middle } else { too_few = middle }
    }
    Ok(Some(enough))
}
