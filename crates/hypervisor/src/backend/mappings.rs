use crate::{Error, GRANULE, Result};
use std::collections::BTreeMap;

/// Which guest-physical ranges are taken, so that every back end refuses the same requests in the same words.
///
/// `T` is what the back end remembers of each mapping. Ranges are also taken by the interrupt controller's frames
/// ([`Mappings::reserve`]), which cannot be unmapped.
#[derive(Debug)]
pub struct Mappings<T> {
    ipa_bits: u8,
    /// Keyed by first address.
    ranges: BTreeMap<u64, Range<T>>,
}

#[derive(Debug)]
struct Range<T> {
    len: u64,
    /// `None`: reserved.
    mapping: Option<T>,
}

impl<T> Mappings<T> {
    /// An empty address space `ipa_bits` wide (at most 52, so that no sum of two addresses in it wraps).
    pub fn new(ipa_bits: u8) -> Self {
        assert!(ipa_bits <= 52, "no arm64 CPU has {ipa_bits} bits of guest-physical address");
        Self { ipa_bits, ranges: BTreeMap::new() }
    }

    /// Checks a mapping that is about to be made; `host` is the host memory's address.
    ///
    /// # Errors
    /// [`Error::Unaligned`] also for an empty one, [`Error::BeyondAddressLimit`], [`Error::Overlap`].
    pub fn check(&self, ipa: u64, host: u64, len: u64) -> Result<()> {
        if len == 0 || [ipa, host, len].iter().any(|n| !n.is_multiple_of(GRANULE)) {
            return Err(Error::Unaligned { ipa, len });
        }
        self.check_free(ipa, len)
    }

    fn check_free(&self, ipa: u64, len: u64) -> Result<()> {
        let end = ipa
            .checked_add(len)
            .filter(|end| *end <= 1 << self.ipa_bits)
            .ok_or(Error::BeyondAddressLimit { ipa, len, ipa_bits: self.ipa_bits })?;
        // Ranges do not overlap each other, so the last one that starts below `end` is the last that ends above `ipa`.
        match self.ranges.range(..end).next_back() {
            Some((start, range)) if start + range.len > ipa => Err(Error::Overlap { ipa, len }),
            _ => Ok(()),
        }
    }

    /// Notes a mapping that [`Mappings::check`] let pass.
    pub fn insert(&mut self, ipa: u64, len: u64, mapping: T) {
        self.ranges.insert(ipa, Range { len, mapping: Some(mapping) });
    }

    /// Takes all of `frames`, first address and length each, for good; or none of them.
    ///
    /// # Errors
    /// [`Error::BeyondAddressLimit`], [`Error::Overlap`].
    pub fn reserve(&mut self, frames: &[(u64, u64)]) -> Result<()> {
        for (n, (ipa, len)) in frames.iter().enumerate() {
            if let Err(error) = self.check_free(*ipa, *len) {
                for (ipa, _) in &frames[..n] {
                    self.ranges.remove(ipa);
                }
                return Err(error);
            }
            self.ranges.insert(*ipa, Range { len: *len, mapping: None });
        }
        Ok(())
    }

    /// The mapping that is exactly this range.
    ///
    /// # Errors
    /// [`Error::NotMapped`] if there is none.
    pub fn exact(&self, ipa: u64, len: u64) -> Result<&T> {
        self.ranges
            .get(&ipa)
            .filter(|r| r.len == len)
            .and_then(|r| r.mapping.as_ref())
            .ok_or(Error::NotMapped { ipa, len })
    }

    /// The mapping that holds all of `ipa..ipa + len`, and how far into it `ipa` is.
    pub fn find(&self, ipa: u64, len: u64) -> Option<(&T, u64)> {
        let (start, range) = self.ranges.range(..=ipa).next_back()?;
        let offset = ipa - start;
        let whole = offset.checked_add(len).is_some_and(|end| end <= range.len);
        range.mapping.as_ref().filter(|_| whole).map(|mapping| (mapping, offset))
    }

    /// Forgets the mapping that starts at `ipa`, if there is one.
    pub fn remove(&mut self, ipa: u64) -> Option<T> {
        self.ranges.get(&ipa)?.mapping.as_ref()?;
        self.ranges.remove(&ipa).and_then(|r| r.mapping)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const G: u64 = GRANULE;

    fn with_one() -> Mappings<u32> {
        let mut m = Mappings::new(36);
        m.check(4 * G, G, 4 * G).unwrap();
        m.insert(4 * G, 4 * G, 7);
        m
    }

    #[test]
    fn refuses_what_is_not_in_granules() {
        let m = with_one();
        for (ipa, host, len) in [(0x1000, 0, G), (0, 0x1000, G), (0, 0, 0x1000), (0, 0, G + 1), (0, 0, 0)] {
            assert!(
                matches!(m.check(ipa, host, len), Err(Error::Unaligned { .. })),
                "{ipa:#x} {host:#x} {len:#x}"
            );
        }
    }

    #[test]
    fn refuses_overlap_and_lets_neighbours_pass() {
        let m = with_one();
        for (ipa, len) in
            [(4 * G, 4 * G), (3 * G, 2 * G), (7 * G, G), (7 * G, 9 * G), (0, 64 * G), (5 * G, G)]
        {
            assert!(matches!(m.check(ipa, 0, len), Err(Error::Overlap { .. })), "{ipa:#x}+{len:#x}");
        }
        m.check(3 * G, 0, G).unwrap();
        m.check(8 * G, 0, G).unwrap();
    }

    #[test]
    fn refuses_what_ends_beyond_the_limit() {
        let m = with_one();
        m.check((1 << 36) - G, 0, G).unwrap();
        for (ipa, len) in [((1 << 36) - G, 2 * G), (1 << 36, G), (u64::MAX - G + 1, G), (0, u64::MAX - G + 1)]
        {
            assert!(
                matches!(m.check(ipa, 0, len), Err(Error::BeyondAddressLimit { .. })),
                "{ipa:#x}+{len:#x}"
            );
        }
    }

    #[test]
    fn unmaps_only_whole_mappings() {
        let mut m = with_one();
        for (ipa, len) in [(4 * G, 3 * G), (4 * G, 5 * G), (5 * G, 3 * G), (0, G)] {
            assert!(matches!(m.exact(ipa, len), Err(Error::NotMapped { .. })), "{ipa:#x}+{len:#x}");
        }
        assert_eq!(*m.exact(4 * G, 4 * G).unwrap(), 7);
        assert_eq!(m.remove(4 * G), Some(7));
        assert_eq!(m.remove(4 * G), None);
        m.check(5 * G, 0, G).unwrap();
    }

    #[test]
    fn finds_what_lies_within_one_mapping() {
        let mut m = with_one();
        m.insert(8 * G, G, 8);
        m.reserve(&[(9 * G, G)]).unwrap();
        assert_eq!(m.find(4 * G, 8), Some((&7, 0)));
        assert_eq!(m.find(8 * G - 8, 8), Some((&7, 4 * G - 8)));
        assert_eq!(m.find(8 * G - 4, 8), None, "straddles two");
        assert_eq!(m.find(8 * G, G), Some((&8, 0)));
        for ipa in [0, 4 * G - 1, 9 * G, 10 * G, u64::MAX] {
            assert_eq!(m.find(ipa, 1), None, "{ipa:#x}");
        }
        assert_eq!(m.find(4 * G, u64::MAX), None);
    }

    #[test]
    fn reserved_ranges_are_taken_and_stay() {
        let mut m = with_one();
        m.reserve(&[(64 * G, 0x1_0000)]).unwrap();
        assert!(matches!(m.reserve(&[(64 * G + 0x8000, 0x1000)]), Err(Error::Overlap { .. })));
        assert!(matches!(m.reserve(&[(100 * G, G), (0, 5 * G)]), Err(Error::Overlap { .. })));
        m.check(100 * G, 0, G).expect("all frames or none");
        assert!(matches!(m.check(65 * G, 0, G), Err(Error::Overlap { .. })));
        assert!(matches!(m.exact(64 * G, 0x1_0000), Err(Error::NotMapped { .. })));
        assert_eq!(m.remove(64 * G), None);
    }

    proptest! {
        /// The map agrees with a plain array of pages.
        #[test]
        fn agrees_with_a_page_array(ops in prop::collection::vec((any::<bool>(), 0u64..32, 1u64..12), 1..100)) {
            let mut m = Mappings::new(32);
            let mut owner = [None; 64];
            for (n, (map, page, pages)) in ops.into_iter().enumerate() {
                let (span, ipa, len) = (page as usize..(page + pages) as usize, page * G, pages * G);
                if map {
                    let free = owner[span.clone()].iter().all(Option::is_none);
                    prop_assert_eq!(m.check(ipa, 0, len).is_ok(), free);
                    if free {
                        m.insert(ipa, len, n);
                        owner[span].fill(Some(n));
                    }
                } else {
                    let whole = owner[span.start].is_some_and(|o| {
                        let pages: Vec<_> = (0..64).filter(|p| owner[*p] == Some(o)).collect();
                        pages == span.clone().collect::<Vec<_>>()
                    });
                    prop_assert_eq!(m.exact(ipa, len).is_ok(), whole);
                    if whole {
                        prop_assert_eq!(m.remove(ipa), owner[span.start]);
                        owner[span].fill(None);
                    }
                }
            }
        }
    }
}
