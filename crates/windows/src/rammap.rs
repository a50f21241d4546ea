//! From guest memory to the window that covers it: one word for each granule of RAM.

use core::sync::atomic::{AtomicU32, Ordering};

use crate::{GRANULE, Range, storage::MAX_RAM_RANGES};

/// Window id (slot index + 1) for each granule of guest RAM; 0 where no window is.
///
/// Where windows overlap, a granule names the younger one. Only the planner writes.
pub(crate) struct RamMap<'a> {
    map: &'a [AtomicU32],
    ranges: [Range; MAX_RAM_RANGES],
}

impl<'a> RamMap<'a> {
    /// `ranges` are whole granules, empty ones behind the last; `map` has a word for each of their granules.
    pub(crate) fn new(map: &'a [AtomicU32], ranges: [Range; MAX_RAM_RANGES]) -> Self {
        Self { map, ranges }
    }

    /// The RAM range that holds all of `range`.
    pub(crate) fn region(&self, range: Range) -> Option<Range> {
        self.ranges.iter().copied().find(|ram| ram.len != 0 && ram.covers(range))
    }

    fn word(&self, address: u64) -> Option<&AtomicU32> {
        self.map.get(self.index(address)?)
    }

    /// The words of `range`, which lies in one RAM range; empty if it does not.
    fn words(&self, range: Range) -> &[AtomicU32] {
        let whole = || {
            self.region(range)?;
            let start = self.index(range.start)?;
            let count = usize::try_from(range.len / GRANULE).ok()?;
            self.map.get(start..start.checked_add(count)?)
        };
        whole().unwrap_or(&[])
    }

    fn index(&self, address: u64) -> Option<usize> {
        let mut before = 0u64;
        for ram in &self.ranges {
            match address.checked_sub(ram.start) {
                Some(offset) if offset < ram.len => {
                    return usize::try_from(before.checked_add(offset)? / GRANULE).ok();
                }
                _ => before = before.checked_add(ram.len)?,
            }
        }
        None
    }

    /// The window at `address`; 0 if there is none or the address is not RAM.
    pub(crate) fn get(&self, address: u64) -> u32 {
        self.word(address).map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Makes `id` the window of every granule of `range`.
    pub(crate) fn set(&self, range: Range, id: u32) {
        for word in self.words(range) {
            word.store(id, Ordering::Release);
        }
    }

    /// Takes every granule of `range` that names `id` away from it, in favour of `left` before `left_end` and of `right`
    /// from `right_start` on (the windows that it overlapped; 0 for none).
    pub(crate) fn clear(&self, range: Range, id: u32, left: (u32, u64), right: (u32, u64)) {
        let mut address = range.start;
        for word in self.words(range) {
            if word.load(Ordering::Relaxed) == id {
                let heir = match address {
                    _ if left.0 != 0 && address < left.1 => left.0,
                    _ if right.0 != 0 && address >= right.1 => right.0,
                    _ => 0,
                };
                word.store(heir, Ordering::Release);
            }
            address = address.saturating_add(GRANULE);
        }
    }

    /// The part of `range`, from its start on, that is RAM and that no window covers.
    pub(crate) fn free_prefix(&self, range: Range) -> Range {
        let granules = (0..range.len / GRANULE)
            .take_while(|n| {
                let address = range.start.saturating_add(n.saturating_mul(GRANULE));
                self.word(address).is_some_and(|word| word.load(Ordering::Relaxed) == 0)
            })
            .count() as u64;
        Range { start: range.start, len: granules.saturating_mul(GRANULE) }
    }

    /// The granules around `core` that no window covers, within `bounds`: how far a new window may reach without
    /// mapping anything twice.
    pub(crate) fn free_around(&self, core: Range, bounds: Range) -> Range {
        let (Some(core_end), Some(bounds_end)) = (core.end(), bounds.end()) else { return core };
        let before = Range { start: bounds.start, len: core.start.saturating_sub(bounds.start) };
        let after = Range { start: core_end, len: bounds_end.saturating_sub(core_end) };
        let free = |word: &&AtomicU32| word.load(Ordering::Relaxed) == 0;
        let left = self.words(before).iter().rev().take_while(free).count() as u64;
        let right = self.words(after).iter().take_while(free).count() as u64;
        let left = left.saturating_mul(GRANULE);
        let len = core.len.saturating_add(left).saturating_add(right.saturating_mul(GRANULE));
        Range { start: core.start.saturating_sub(left), len }
    }
}
