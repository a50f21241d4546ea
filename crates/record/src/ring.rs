//! Pages of the kernel's trace ring buffer, as `per_cpu/cpuN/trace_pipe_raw` gives them (Linux,
//! `include/linux/ring_buffer.h`, `kernel/trace/ring_buffer.c`). Little-endian hosts only, which is all Outboard runs on.

use crate::format::Format;

/// `enum ring_buffer_type`.
const PADDING: u32 = 29;
const TIME_EXTEND: u32 = 30;
const TIME_STAMP: u32 = 31;
/// Bits of an event's header that hold the time since the event before it.
const DELTA_BITS: u32 = 27;
/// Bits of a time that an absolute time stamp does not hold (`TS_MSB`).
const HIGH_TIME: u64 = 0xf8 << 56;
/// The page's length shares its word with flags (`RB_MISSED_EVENTS` and above).
const LENGTH_MASK: u64 = (1 << 30) - 1;

/// Where a page's parts lie, from `events/header_page`.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Layout {
    commit: (usize, usize),
    data: usize,
    /// Bytes of a whole page: one read.
    pub(crate) page: usize,
}

impl Layout {
    /// `None` if the description lacks what is needed.
    pub(crate) fn new(header: &Format) -> Option<Self> {
        let (time, commit, data) =
            (header.field("timestamp")?, header.field("commit")?, header.field("data")?);
        let fits = time.offset == 0 && time.size == 8 && matches!(commit.size, 4 | 8);
        fits.then_some(Self {
            commit: (commit.offset, commit.size),
            data: data.offset,
            page: data.offset + data.size,
        })
    }
}

/// A page, or its rest, is not as the kernel lays pages out: the events in it cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Damaged;

/// Calls `record` with the time (ns) and the bytes of every event of `page`.
///
/// # Errors
/// [`Damaged`] where the page ends early: what is behind that place is not known.
pub(crate) fn records(
    layout: &Layout,
    page: &[u8],
    mut record: impl FnMut(u64, &[u8]),
) -> Result<(), Damaged> {
    let mut time = number(page, 0, 8).ok_or(Damaged)?;
    let length = number(page, layout.commit.0, layout.commit.1).ok_or(Damaged)?;
    let length = (length & LENGTH_MASK) as usize;
    let data = page.get(layout.data..).and_then(|data| data.get(..length)).ok_or(Damaged)?;
    let mut at = 0;
    while let Some(header) = word(data, at) {
        let (kind, delta) = (header & 0x1f, u64::from(header >> 5));
        let first = word(data, at + 4).map(u64::from);
        let (begin, end) = match kind {
            PADDING if delta == 0 => return Ok(()),
            PADDING => {
                // Discarded: its time still counts.
                time = time.wrapping_add(delta);
                at += 4 + first.ok_or(Damaged)? as usize;
                continue;
            }
            TIME_EXTEND | TIME_STAMP => {
                let value = (first.ok_or(Damaged)? << DELTA_BITS) | delta;
                let absolute = kind == TIME_STAMP;
                time = if absolute { value | (time & HIGH_TIME) } else { time.wrapping_add(value) };
                at += 8;
                continue;
            }
            0 => (at + 8, at + 4 + first.ok_or(Damaged)? as usize),
            words => (at + 4, at + 4 + 4 * words as usize),
        };
        time = time.wrapping_add(delta);
        record(time, data.get(begin..end).ok_or(Damaged)?);
        at = end.next_multiple_of(4);
    }
    Ok(())
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    number(bytes, at, 4).and_then(|value| value.try_into().ok())
}

/// A little-endian number of `size` bytes (at most 8).
pub(crate) fn number(bytes: &[u8], at: usize, size: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(size)?)?;
    (size <= 8).then(|| bytes.iter().rev().fold(0, |value, byte| (value << 8) | u64::from(*byte)))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn layout(page: usize) -> Layout {
        Layout { commit: (8, 8), data: 16, page }
    }

    /// A page with `words`, starting at time `time`.
    pub(crate) fn page(time: u64, words: &[u32]) -> Vec<u8> {
        let mut page = time.to_le_bytes().to_vec();
        page.extend(((4 * words.len() as u64) | (1 << 31)).to_le_bytes());
        page.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        page.resize(4096, 0xee);
        page
    }

    fn read(page: &[u8]) -> Vec<(u64, Vec<u8>)> {
        let mut all = Vec::new();
        let whole = records(&layout(4096), page, |time, bytes| all.push((time, bytes.to_vec())));
        assert_eq!(whole, Ok(()));
        all
    }

    #[test]
    fn every_kind_of_event() {
        let words = [
            2 | 5 << 5, // two words, 5 ns later
            0x11,
            0x12,
            TIME_EXTEND | 3 << 5,
            1, // (1 << 27) + 3 ns more
            0, // long: the length counts itself
            8,
            0x21,
            PADDING | 7 << 5, // discarded, 8 bytes
            4,
            TIME_STAMP | 9 << 5,
            2, // absolute
            1,
            0x31,
            PADDING, // end
            0x999,
        ];
        let high = 0x0800_0000_0000_0000_u64;
        let found = read(&page(high + 100, &words));
        let expected = vec![
            (high + 105, [0x11u32.to_le_bytes(), 0x12u32.to_le_bytes()].concat()),
            (high + 108 + (1 << 27), 0x21u32.to_le_bytes().to_vec()),
            (high + (2 << 27) + 9, 0x31u32.to_le_bytes().to_vec()),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn damage_is_noticed() {
        let count = |page: &[u8]| {
            let mut count = 0;
            records(&layout(4096), page, |_, _| count += 1).map(|()| count)
        };
        for words in [&[0, 4000][..], &[28], &[0], &[PADDING | 1 << 5], &[TIME_EXTEND], &[0, 0], &[1, 7, 28]]
        {
            assert_eq!(count(&page(0, words)), Err(Damaged), "{words:?}");
        }
        assert_eq!(count(&[]), Err(Damaged));
        assert_eq!(count(&[0; 12]), Err(Damaged));
        let whole = page(0, &[1, 7, 1, 8]);
        assert_eq!(count(&whole), Ok(2));
        assert_eq!(count(&whole[..28]), Err(Damaged), "less was read than the page says");
        // Padding up to the end of the page.
        assert_eq!(count(&page(0, &[1, 7, PADDING | 1 << 5, 8, 0])), Ok(1));
        assert_eq!(count(&page(0, &[PADDING | 1 << 5, u32::MAX])), Ok(0));
    }
}
