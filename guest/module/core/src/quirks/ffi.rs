//! What the C half of the quirks calls; `quirks/core.h` declares the same.
#![allow(unsafe_code, reason = "the C half hands over pointers")]

use super::uvm::{self, Verdict};
use super::zva::{self, Seen, Site};

// `core.h` asserts the same of its own.
const _: () = assert!(size_of::<Site>() == 48 && size_of::<Seen>() == 24);

/// Scans the `count` instructions at `text`; the first `room` sites go to `sites`.
///
/// # Safety
/// `text` can be read for `count` words, `sites` written for `room` entries, and both stay there during the call. The text may change
/// meanwhile: every word is read by itself.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn odma_core_zva_scan(
    text: *const u32,
    count: usize,
    stores: bool,
    sites: *mut Site,
    room: usize,
    seen: &mut Seen,
) {
    // SAFETY: `scan` asks for less than `count`.
    let word = |index: usize| unsafe { text.wrapping_add(index).read_volatile() };
    let mut used = 0;
    *seen = zva::scan(count, word, stores, |site| {
        let fits = used < room;
        if fits {
            // SAFETY: less than `room`.
            unsafe { sites.wrapping_add(used).write(site) };
            used = used.saturating_add(1);
        }
        fits
    });
}

/// See [`uvm::judge`].
#[unsafe(no_mangle)]
pub extern "C" fn odma_core_uvm_judge(
    length: u64,
    physical_offset: u64,
    page: u64,
    alignment: u64,
) -> Verdict {
    uvm::judge(length, physical_offset, page, alignment)
}
