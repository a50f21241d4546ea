//! Just enough of the capability chains to find what a back end needs. A device may lie: walks are bounded, offsets checked.

use crate::{GRANULE, Result};
use std::ops::Range;

/// Reads an aligned dword of config space.
pub(crate) type ReadDword<'a> = &'a dyn Fn(u16) -> Result<u32>;

/// PCI Express capability (PCIe 7.5.3).
pub(crate) const PCIE: u8 = 0x10;
/// MSI capability (PCIe 7.7.1).
pub(crate) const MSI: u8 = 0x05;
/// MSI-X capability (PCIe 7.7.2).
pub(crate) const MSIX: u8 = 0x11;

/// Capabilities that fit in the 192 bytes behind the header: each takes 4 at least.
const MOST_CAPABILITIES: usize = 48;
/// Extended capabilities that fit in the 3,840 bytes behind them, at 4 each.
const MOST_EXTENDED: usize = 960;

/// ID and offset of each capability, in the chain's order. A broken chain ends where it breaks.
pub(crate) fn list(read: ReadDword<'_>) -> Result<Vec<(u8, u16)>> {
    // Status bit 4: there is a chain; its pointer is at 0x34 (PCIe 7.5.1.1).
    if read(0x04)? >> 20 & 1 == 0 {
        return Ok(vec![]);
    }
    let mut found: Vec<(u8, u16)> = vec![];
    let mut offset = read(0x34)? as u16 & 0xfc;
    while (0x40..0x100).contains(&offset) && found.len() < MOST_CAPABILITIES {
        if found.iter().any(|(_, seen)| *seen == offset) {
            break;
        }
        let header = read(offset)?;
        found.push((header as u8, offset));
        offset = (header >> 8) as u16 & 0xfc;
    }
    Ok(found)
}

/// Header and offset of each extended capability, in the chain's order.
pub(crate) fn list_extended(read: ReadDword<'_>, config_len: u16) -> Result<Vec<(u32, u16)>> {
    let mut found: Vec<(u32, u16)> = vec![];
    let mut offset = 0x100;
    while (0x100..config_len).contains(&offset) && found.len() < MOST_EXTENDED {
        let header = read(offset)?;
        // All-ones: no extended space behind a conventional bridge; zero: nothing in it.
        if header == 0 || header == u32::MAX || found.iter().any(|(_, seen)| *seen == offset) {
            break;
        }
        found.push((header, offset));
        offset = (header >> 20) as u16 & 0xffc;
    }
    Ok(found)
}

/// Offset of capability `id`.
pub(crate) fn find(read: ReadDword<'_>, id: u8) -> Result<Option<u16>> {
    Ok(list(read)?.into_iter().find(|c| c.0 == id).map(|c| c.1))
}

/// The pages of 16 KiB of each BAR that hold the MSI-X table or its pending bits.
pub(crate) fn msix_pages(read: ReadDword<'_>) -> Result<[Vec<Range<u64>>; 6]> {
    let mut pages: [Vec<Range<u64>>; 6] = Default::default();
    let Some(at) = find(read, MSIX)? else { return Ok(pages) };
    if at > 0x100 - 12 {
        return Ok(pages);
    }
    let vectors = u64::from(read(at)? >> 16 & 0x7ff) + 1;
    // Entries are of 16 bytes; pending bits come in units of 64.
    for (register, len) in [(at + 4, vectors * 16), (at + 8, vectors.div_ceil(64) * 8)] {
        let value = read(register)?;
        let (bar, offset) = ((value & 7) as usize, u64::from(value & !7));
        if let Some(pages) = pages.get_mut(bar) {
            pages.push(offset / GRANULE * GRANULE..(offset + len).next_multiple_of(GRANULE));
        }
    }
    Ok(pages)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reader(config: &[u8]) -> impl Fn(u16) -> Result<u32> + '_ {
        |offset| {
            let at = usize::from(offset);
            Ok(u32::from_le_bytes(config[at..at + 4].try_into().unwrap()))
        }
    }

    fn vec_of(page: Range<u64>) -> Vec<Range<u64>> {
        std::iter::once(page).collect()
    }

    #[test]
    fn the_pages_of_table_and_pending_bits_are_found() {
        let mut config = [0u8; 256];
        config[6] = 0x10;
        config[0x34] = 0x50;
        config[0x50..0x52].copy_from_slice(&[1, 0x60]);
        // 1,025 vectors: the table at 0x7ff8 of BAR 3 ends in the fourth page, the pending bits are in BAR 0.
        config[0x60..0x6c].copy_from_slice(&[0x11, 0, 0, 4, 0xfb, 0x7f, 0, 0, 0, 0x40, 0, 0]);
        let pages = msix_pages(&reader(&config)).unwrap();
        assert_eq!(pages[3], vec_of(0x4000..0x10000));
        assert_eq!(pages[0], vec_of(0x4000..0x8000));
        assert!([1, 2, 4, 5].iter().all(|b| pages[*b].is_empty()));
    }

    #[test]
    fn loops_end() {
        let mut config = [0u8; 4096];
        config[6] = 0x10;
        config[0x34] = 0x40;
        config[0x40..0x42].copy_from_slice(&[9, 0x50]);
        config[0x50..0x52].copy_from_slice(&[5, 0x40]);
        config[0x100..0x104].copy_from_slice(&0x1000_0001u32.to_le_bytes());
        assert_eq!(list(&reader(&config)).unwrap(), [(9, 0x40), (5, 0x50)]);
        assert_eq!(list_extended(&reader(&config), 4096).unwrap(), [(0x1000_0001, 0x100)]);
    }

    proptest! {
        #[test]
        fn any_config_space_is_walked_to_an_end(config in prop::collection::vec(any::<u8>(), 4096)) {
            let read = reader(&config);
            prop_assert!(list(&read).unwrap().len() <= MOST_CAPABILITIES);
            prop_assert!(list_extended(&read, 4096).unwrap().len() <= MOST_EXTENDED);
            for page in msix_pages(&read).unwrap().iter().flatten() {
                prop_assert!(page.start < page.end);
            }
        }
    }
}
