//! Which mappings are live, each with its length, so that a driver that takes one down twice, or with another length, takes no other's window. No
//! locks, any context, nothing allocated: a hash table of fixed size. What finds no room in it is counted and let through unchecked.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// A place of the table, 16 bytes.
#[derive(Debug, Default)]
pub struct Place {
    /// [`EMPTY`], [`CLAIMED`], or the bus address and [`FIRST`].
    key: AtomicU64,
    /// Bytes. Written by whoever has claimed the place.
    len: AtomicU64,
}

const EMPTY: u64 = 0;
/// Somebody is changing the place.
const CLAIMED: u64 = 1;
const FIRST: u64 = 2;
/// Places that a mapping may be in: eight cache lines.
const PROBES: usize = 32;
/// How often a place that is being changed is looked at again. The CPU that changes it may be this one, interrupted.
const LOOKS: usize = 64;
/// Least and most places, 1 and 64 MiB.
const LEAST: u64 = 1 << 16;
const MOST: u64 = 1 << 22;
/// Bytes of the host's limit for each place: two for a page.
const BYTES_PER_PLACE: u64 = 2048;

/// What was found at a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// The mapping.
    It,
    /// Only one at that address with this length. It is taken.
    Other(u64),
    /// Nothing.
    Nothing,
}

/// The table.
pub struct Tracker<'a> {
    places: &'a [Place],
    /// Mappings that found no room.
    untracked: AtomicU32,
}

/// Places for a domain that maps `limit` bytes of `ram` bytes: a power of two.
pub fn places(limit: u64, ram: u64) -> usize {
    let wanted = (limit.min(ram) / BYTES_PER_PLACE).clamp(LEAST, MOST);
    usize::try_from(wanted.next_power_of_two()).unwrap_or(0)
}

impl<'a> Tracker<'a> {
    /// An empty one. `places` are a power of two.
    pub fn new(places: &'a [Place]) -> Self {
        Self { places, untracked: AtomicU32::new(0) }
    }

    /// Where the mapping at `bus` may be, the likeliest first.
    fn probe(&self, bus: u64) -> impl Iterator<Item = &'a Place> {
        let places = self.places;
        let mask = places.len().wrapping_sub(1);
        // Fibonacci hashing; the upper bits are the good ones. Four places share a cache line.
        let hash = bus.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let start = usize::try_from(hash).unwrap_or(0) & !3;
        (0..PROBES).filter_map(move |step| places.get(start.wrapping_add(step) & mask))
    }

    /// Notes a mapping.
    pub fn insert(&self, bus: u64, len: u64) {
        for place in self.probe(bus) {
            let free = place.key.load(Ordering::Relaxed) == EMPTY;
            if free
                && place.key.compare_exchange(EMPTY, CLAIMED, Ordering::Acquire, Ordering::Relaxed).is_ok()
            {
                place.len.store(len, Ordering::Relaxed);
                place.key.store(bus.wrapping_add(FIRST), Ordering::Release);
                return;
            }
        }
        self.untracked.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes the mapping of `len` bytes at `bus` out; where there is none, another one at `bus`.
    pub fn remove(&self, bus: u64, len: u64) -> Found {
        for _ in 0..LOOKS {
            match self.take(bus, Some(len)) {
                (Some(_), _) => return Found::It,
                (None, true) => core::hint::spin_loop(),
                (None, false) => break,
            }
        }
        // Only as many as there are can be let through.
        let fewer = |count: u32| count.checked_sub(1);
        if self.untracked.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fewer).is_ok() {
            return Found::It;
        }
        match self.take(bus, None) {
            (Some(other), _) => Found::Other(other),
            (None, _) => Found::Nothing,
        }
    }

    /// One look: takes a mapping at `bus`, of `len` bytes if that is said; its length. And whether a place was being changed.
    fn take(&self, bus: u64, len: Option<u64>) -> (Option<u64>, bool) {
        let key = bus.wrapping_add(FIRST);
        let mut busy = false;
        for place in self.probe(bus) {
            let seen = place.key.load(Ordering::Acquire);
            busy |= seen == CLAIMED;
            let fits = |actual: u64| len.is_none_or(|len| len == actual);
            if seen != key || !fits(place.len.load(Ordering::Relaxed)) {
                continue;
            }
            if place.key.compare_exchange(key, CLAIMED, Ordering::Acquire, Ordering::Relaxed).is_err() {
                busy = true;
                continue;
            }
            // The place may have had another mapping at this address before it was claimed.
            let actual = place.len.load(Ordering::Relaxed);
            if fits(actual) {
                place.key.store(EMPTY, Ordering::Release);
                return (Some(actual), busy);
            }
            place.key.store(key, Ordering::Release);
            busy = true;
        }
        (None, busy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn room(count: usize) -> Vec<Place> {
        (0..count).map(|_| Place::default()).collect()
    }

    #[test]
    fn each_mapping_goes_once_and_with_its_length() {
        let places = room(64);
        let tracker = Tracker::new(&places);
        tracker.insert(0x1000, 0x1000);
        tracker.insert(0x1000, 0x1000);
        tracker.insert(0x1000, 0x800);
        assert_eq!(tracker.remove(0x1000, 0x800), Found::It);
        assert_eq!(tracker.remove(0x1000, 0x800), Found::Other(0x1000));
        assert_eq!(tracker.remove(0x1000, 0x1000), Found::It);
        assert_eq!(tracker.remove(0x1000, 0x1000), Found::Nothing);
        assert_eq!(tracker.remove(0x2000, 0x1000), Found::Nothing);
    }

    #[test]
    fn what_finds_no_room_is_let_through_as_often_as_there_is_such() {
        let places = room(32);
        let tracker = Tracker::new(&places);
        for index in 0..40 {
            tracker.insert(index << 12, 0x1000);
        }
        for index in 0..40 {
            assert_eq!(tracker.remove(index << 12, 0x1000), Found::It, "{index}");
        }
        assert_eq!(tracker.remove(0, 0x1000), Found::Nothing);
    }

    #[test]
    fn threads_take_each_mapping_once() {
        let places = room(1 << 12);
        let tracker = Tracker::new(&places);
        let rounds = if cfg!(miri) { 50 } else { 20_000 };
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let tracker = &tracker;
                // All at the same addresses, each with lengths of its own.
                scope.spawn(move || {
                    for round in 0..rounds {
                        let (bus, len) = ((round % 7) << 14, 1 + thread);
                        tracker.insert(bus, len);
                        assert_eq!(tracker.remove(bus, len), Found::It);
                    }
                });
            }
        });
        assert!(places.iter().all(|place| place.key.load(Ordering::Relaxed) == EMPTY));
    }
}
