//! Lists of requests, and their merging into fewer bus segments.

use crate::Range;

/// Bus address of an entry that has none yet.
pub const UNRESOLVED: u64 = u64::MAX;

/// The entries of one map call: a scatterlist, or one range. Kept by the caller, so that a kernel's own scatterlist
/// serves without a copy.
pub trait List {
    /// Number of entries.
    fn count(&self) -> usize;
    /// Entry `index`; an empty range where there is none, which fails the call.
    fn range(&self, index: usize) -> Range;
    /// The bus address noted for entry `index`.
    fn bus(&self, index: usize) -> u64;
    /// Notes the bus address of entry `index`, [`UNRESOLVED`] included.
    fn set_bus(&mut self, index: usize, bus: u64);
}

/// One entry with room for its bus address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Guest memory asked for.
    pub range: Range,
    /// Its bus address, or [`UNRESOLVED`].
    pub bus: u64,
}

impl Segment {
    /// An entry without a bus address.
    pub fn new(start: u64, len: u64) -> Self {
        Self { range: Range { start, len }, bus: UNRESOLVED }
    }
}

impl<T: AsRef<[Segment]> + AsMut<[Segment]>> List for T {
    fn count(&self) -> usize {
        self.as_ref().len()
    }
    fn range(&self, index: usize) -> Range {
        self.as_ref().get(index).map(|segment| segment.range).unwrap_or_default()
    }
    fn bus(&self, index: usize) -> u64 {
        self.as_ref().get(index).map_or(UNRESOLVED, |segment| segment.bus)
    }
    fn set_bus(&mut self, index: usize, bus: u64) {
        if let Some(segment) = self.as_mut().get_mut(index) {
            segment.bus = bus;
        }
    }
}

/// What a device's segments must keep to (`dma_get_max_seg_size`, `dma_get_seg_boundary`).
#[derive(Debug, Clone, Copy)]
pub struct MergeRule {
    /// Longest segment, bytes.
    pub max_len: u64,
    /// A segment must not cross a multiple of `boundary_mask + 1`; `u64::MAX` for no such rule.
    pub boundary_mask: u64,
}

/// Iterator over the bus segments `(bus address, bytes)` of a mapped list: neighbours that are contiguous on the bus
/// become one. There are never more segments than entries.
pub struct Merge<'l> {
    list: &'l dyn List,
    rule: MergeRule,
    index: usize,
}

impl<'l> Merge<'l> {
    /// Merges the entries of `list`, which must all have their bus address.
    pub fn new(list: &'l dyn List, rule: MergeRule) -> Self {
        Self { list, rule, index: 0 }
    }

    fn joins(&self, bus: u64, len: u64, next_bus: u64, next_len: u64) -> bool {
        let (Some(end), Some(total)) = (bus.checked_add(len), len.checked_add(next_len)) else {
            return false;
        };
        let Some(last) = bus.checked_add(total.saturating_sub(1)) else { return false };
        end == next_bus
            && total <= self.rule.max_len
            && bus & !self.rule.boundary_mask == last & !self.rule.boundary_mask
    }
}

impl Iterator for Merge<'_> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        if self.index >= self.list.count() {
            return None;
        }
        let (bus, mut len) = (self.list.bus(self.index), self.list.range(self.index).len);
        self.index = self.index.saturating_add(1);
        while self.index < self.list.count() {
            let next_len = self.list.range(self.index).len;
            if !self.joins(bus, len, self.list.bus(self.index), next_len) {
                break;
            }
            len = len.saturating_add(next_len);
            self.index = self.index.saturating_add(1);
        }
        Some((bus, len))
    }
}

/// The reverse of [`Merge`]: the bus address and length of each original entry, from the original lengths and the merged
/// segments. Releasing a list needs this, as each entry holds a reference of its own.
///
/// Ends early where the two do not fit together.
pub struct Split<L, M> {
    lengths: L,
    merged: M,
    bus: u64,
    left: u64,
}

impl<L: Iterator<Item = u64>, M: Iterator<Item = (u64, u64)>> Split<L, M> {
    /// Splits `merged` (bus address, bytes) at the boundaries that `lengths` (bytes of each original entry) gives.
    pub fn new(lengths: L, merged: M) -> Self {
        Self { lengths, merged, bus: 0, left: 0 }
    }
}

impl<L: Iterator<Item = u64>, M: Iterator<Item = (u64, u64)>> Iterator for Split<L, M> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        let len = self.lengths.next()?;
        if self.left == 0 {
            (self.bus, self.left) = self.merged.next()?;
        }
        let bus = self.bus;
        self.left = self.left.checked_sub(len)?;
        self.bus = bus.checked_add(len)?;
        Some((bus, len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapped(entries: &[(u64, u64)]) -> [Segment; 4] {
        let mut list = [Segment::new(0, 0); 4];
        for (segment, (bus, len)) in list.iter_mut().zip(entries) {
            *segment = Segment { range: Range { start: 0, len: *len }, bus: *bus };
        }
        list
    }

    #[test]
    fn merges_up_to_the_device_limits_and_splits_back() {
        let entries = [(0x1000, 0x1000), (0x2000, 0x1000), (0x3000, 0x800), (0x9000, 0x1000)];
        let list = mapped(&entries);
        for (rule, expected) in [
            (MergeRule { max_len: u64::MAX, boundary_mask: u64::MAX }, 2),
            (MergeRule { max_len: 0x2000, boundary_mask: u64::MAX }, 3),
            (MergeRule { max_len: u64::MAX, boundary_mask: 0x1fff }, 3),
            (MergeRule { max_len: 0x1000, boundary_mask: u64::MAX }, 4),
        ] {
            assert_eq!(Merge::new(&list, rule).count(), expected, "{rule:?}");
            let back = Split::new(entries.iter().map(|e| e.1), Merge::new(&list, rule));
            assert!(back.eq(entries.iter().copied()), "{rule:?}");
        }
    }

    #[test]
    fn split_ends_where_the_lists_do_not_fit() {
        let mut split = Split::new([0x1000, 0x1000].into_iter(), [(0x1000, 0x1800)].into_iter());
        assert_eq!(split.next(), Some((0x1000, 0x1000)));
        assert_eq!(split.next(), None);
    }
}
