//! The free part of the window: first fit over a sorted list, neighbours joined.

use std::collections::BTreeMap;

/// Free ranges by first address.
#[derive(Debug, Clone)]
pub(crate) struct Space {
    free: BTreeMap<u64, u64>,
}

impl Space {
    pub(crate) fn new(first: u64, len: u64) -> Self {
        Self { free: BTreeMap::from([(first, len)]) }
    }

    /// Takes `len` bytes from the first range that has them.
    pub(crate) fn take(&mut self, len: u64) -> Option<u64> {
        let (&first, &have) = self.free.iter().find(|(_, have)| **have >= len)?;
        self.free.remove(&first);
        if have > len {
            self.free.insert(first + len, have - len);
        }
        Some(first)
    }

    /// Gives back a range that is not free.
    pub(crate) fn give(&mut self, mut first: u64, mut len: u64) {
        if let Some((&before, &have)) = self.free.range(..first).next_back() {
            assert!(before + have <= first, "range given back twice");
            if before + have == first {
                self.free.remove(&before);
                (first, len) = (before, have + len);
            }
        }
        if let Some(have) = self.free.remove(&(first + len)) {
            len += have;
        }
        self.free.insert(first, len);
    }

    pub(crate) fn holes(&self) -> usize {
        self.free.len()
    }

    pub(crate) fn largest(&self) -> u64 {
        self.free.values().copied().max().unwrap_or(0)
    }
}
