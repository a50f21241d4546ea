//! One block of memory cut into the slices that [`Storage`] asks for.
#![allow(unsafe_code, reason = "makes slices out of memory that the C half hands over")]

use crate::tracker::Place;
use core::mem::{align_of, size_of};
use core::sync::atomic::{AtomicU32, AtomicU64};
use outboard_windows::{Bounds, Private, Request, Slot, Storage};

/// The queues of a domain.
#[derive(Clone, Copy)]
pub(crate) struct Queues {
    pub(crate) count: usize,
    /// Entries of each.
    pub(crate) lines: usize,
}

/// Cuts pieces off a block of memory.
pub(crate) struct Cutter {
    at: *mut u8,
    left: usize,
}

impl Cutter {
    /// # Safety
    /// `block` must be valid for reads and writes of `bytes` bytes for as long as anything cut from it is used, and nobody else may use it.
    pub(crate) unsafe fn new(block: *mut u8, bytes: usize) -> Self {
        Self { at: block, left: bytes }
    }

    /// Room for one `T`, aligned, not initialised. `None` if the block is too small.
    pub(crate) fn room<T>(&mut self, count: usize) -> Option<*mut T> {
        let padding = self.at.align_offset(align_of::<T>());
        let bytes = size_of::<T>().checked_mul(count)?;
        self.left = self.left.checked_sub(padding)?.checked_sub(bytes)?;
        let start = self.at.wrapping_add(padding);
        self.at = start.wrapping_add(bytes);
        Some(start.cast())
    }

    /// A slice of `count` default values.
    pub(crate) fn slice<'a, T: Default>(&mut self, count: usize) -> Option<&'a mut [T]> {
        let first = self.room::<T>(count)?;
        for index in 0..count {
            // SAFETY: within the room just cut off, which is aligned and which nobody else uses.
            unsafe { first.wrapping_add(index).write(T::default()) };
        }
        // SAFETY: `count` initialised values, not handed out before; the block outlives them (`new`).
        Some(unsafe { core::slice::from_raw_parts_mut(first, count) })
    }

    /// All slices of a [`Storage`].
    pub(crate) fn storage<'a>(&mut self, bounds: Bounds) -> Option<Storage<'a>> {
        Some(Storage {
            slots: self.slice::<Slot>(bounds.slots)?,
            private: self.slice::<Private>(bounds.slots)?,
            ram_map: self.slice::<AtomicU32>(bounds.ram_map)?,
            bus_keys: self.slice::<AtomicU64>(bounds.bus_keys)?,
            bus_map: self.slice::<AtomicU32>(bounds.bus_map)?,
        })
    }
}

/// Bytes that [`Cutter::storage`] needs, `places` of a tracker, a batch and `queue` bytes for each queue, and `head` more, with room to align each
/// piece.
pub(crate) fn bytes(
    bounds: Bounds,
    places: usize,
    queues: Queues,
    head: usize,
    queue: usize,
) -> Option<usize> {
    let batch = size_of::<Request>().checked_mul(queues.lines)?.checked_add(ALIGN)?;
    let pieces = [
        size_of::<Slot>().checked_mul(bounds.slots)?,
        size_of::<Private>().checked_mul(bounds.slots)?,
        size_of::<AtomicU32>().checked_mul(bounds.ram_map)?,
        size_of::<AtomicU64>().checked_mul(bounds.bus_keys)?,
        size_of::<AtomicU32>().checked_mul(bounds.bus_map)?,
        size_of::<Place>().checked_mul(places)?,
        batch.checked_add(queue)?.checked_mul(queues.count)?,
        head,
    ];
    pieces.iter().try_fold(0usize, |sum, piece| sum.checked_add(*piece)?.checked_add(ALIGN))
}

/// No piece needs a larger alignment.
const ALIGN: usize = 64;
const _: () =
    assert!(align_of::<Slot>() <= ALIGN && align_of::<Private>() <= ALIGN && align_of::<Request>() <= ALIGN);
