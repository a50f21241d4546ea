//! From a bus address to the window mapped there: a two-level table, as the host picks addresses as it likes.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::{GRANULE, Range};

/// Granules in one chunk of the table.
pub const CHUNK_GRANULES: usize = 4096;
/// Bytes of bus address space that one chunk describes.
pub const CHUNK_BYTES: u64 = CHUNK_GRANULES as u64 * GRANULE;
/// Top-level entry that no chunk uses.
const EMPTY: u64 = u64::MAX;

/// Window id for each granule of bus address space in use. Chunks are taken from a fixed stock at the first mapping in
/// their 64 MiB and stay; readers need no lock. Only the planner writes.
pub(crate) struct BusMap<'a> {
    /// Number of the 64 MiB that chunk `i` describes; linear search from a hashed start.
    keys: &'a [AtomicU64],
    words: &'a [AtomicU32],
}

impl<'a> BusMap<'a> {
    /// `words` holds [`CHUNK_GRANULES`] words for each key.
    pub(crate) fn new(keys: &'a [AtomicU64], words: &'a [AtomicU32]) -> Self {
        for key in keys {
            key.store(EMPTY, Ordering::Relaxed);
        }
        Self { keys, words }
    }

    /// The chunk that describes `number`, or else the free one that may come to do so.
    fn probe(&self, number: u64) -> Option<(usize, bool)> {
        let count = self.keys.len();
        // Neighbouring chunks are neighbours here: with a Mac's 24 the first probe hits.
        let start = usize::try_from(number.checked_rem(count as u64)?).ok()?;
        for index in (start..count).chain(0..start) {
            match self.keys.get(index)?.load(Ordering::Acquire) {
                EMPTY => return Some((index, false)),
                key if key == number => return Some((index, true)),
                _ => {}
            }
        }
        None
    }

    fn word(&self, bus: u64) -> Option<&AtomicU32> {
        let (index, true) = self.probe(bus / CHUNK_BYTES)? else { return None };
        let granule = usize::try_from(bus % CHUNK_BYTES / GRANULE).ok()?;
        self.words.get(index.checked_mul(CHUNK_GRANULES)?.checked_add(granule)?)
    }

    /// The window at bus address `bus`; 0 if there is none.
    pub(crate) fn get(&self, bus: u64) -> u32 {
        self.word(bus).map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Makes `id` the window of the bus range. False, with nothing changed but chunks taken, where the stock of chunks is
    /// used up, or the range is not whole granules or is taken by another window.
    pub(crate) fn insert(&self, range: Range, id: u32) -> bool {
        let Some(last) = range.end().and_then(|end| end.checked_sub(1)) else { return false };
        if !range.start.is_multiple_of(GRANULE) || !range.len.is_multiple_of(GRANULE) || range.len == 0 {
            return false;
        }
        for number in range.start / CHUNK_BYTES..=last / CHUNK_BYTES {
            match self.probe(number) {
                Some((_, true)) => {}
                Some((index, false)) => {
                    if let Some(key) = self.keys.get(index) {
                        key.store(number, Ordering::Release);
                    }
                }
                None => return false,
            }
        }
        if self.granules(range).any(|address| self.get(address) != 0) {
            return false;
        }
        self.fill(range, id);
        true
    }

    /// Empties the bus range.
    pub(crate) fn remove(&self, range: Range) {
        self.fill(range, 0);
    }

    fn fill(&self, range: Range, id: u32) {
        for address in self.granules(range) {
            if let Some(word) = self.word(address) {
                word.store(id, Ordering::Release);
            }
        }
    }

    fn granules(&self, range: Range) -> impl Iterator<Item = u64> + use<> {
        (0..range.len / GRANULE).map(move |n| range.start.saturating_add(n.saturating_mul(GRANULE)))
    }
}
