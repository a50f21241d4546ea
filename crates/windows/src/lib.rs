//! DMA mappings under an IOMMU with two budgets, bytes and entries.
//!
//! A Mac maps about 1.5 GB in about 64k pieces for a device, in 16 KiB units, at addresses it picks itself. This crate
//! decides which *windows* of guest memory to map there so that a driver's many small requests share few of them, and
//! which idle windows to give back when room is needed. It performs no mapping: it hands a batch of [`Request`]s to its
//! caller, who asks the host and writes each [`Outcome`] back.
//!
//! # Parts and locking
//!
//! - [`Table`] is shared, all methods take `&self` and none waits for a lock: [`Table::hit`] finds a window that already
//!   covers a request and takes a reference, [`Table::release`] drops one. Both are O(1), safe in any context
//!   (interrupts off included) and from any number of CPUs.
//! - [`Planner`] makes and evicts windows. Its methods take `&mut self`: **one lock around it** (a spin lock with
//!   interrupts off in a kernel), held for each of its methods and not while the host is asked. What a miss has under way stands in a
//!   [`Call`] of its own, so several may be with the host at a time; hits and releases go on beside them.
//!
//! ```text
//! fast path, no lock:  Table::hit_list() ── all entries hit ──► done, no exit
//!                          │ a miss
//! slow path, locked:   Planner::begin() ──► Step::Ask ──► without the lock: Call::batch() goes to the host, outcomes come back
//!                          ▲                                   │
//!                          └──────── Planner::resume() ◄───────┘     until Step::Done or Step::Failed
//! ```
//!
//! All memory comes from the caller ([`Storage`]); the cost of a miss grows with the size of the window it makes, never
//! with the number of live mappings. Nothing here panics: the caller may be a kernel.
#![no_std]
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::unreachable,
        clippy::arithmetic_side_effects
    )
)]

mod busmap;
mod call;
mod list;
mod lru;
mod planner;
mod policy;
mod rammap;
mod slot;
mod storage;
mod table;

pub use busmap::{CHUNK_BYTES, CHUNK_GRANULES};
pub use call::{Call, Failure, Outcome, Request, Step};
pub use list::{List, Merge, MergeRule, Segment, Split, UNRESOLVED};
pub use planner::{Planner, Stats};
pub use policy::{Limits, Policy};
pub use slot::{Private, Slot};
pub use storage::{Bounds, MAX_RAM_RANGES, Storage, StorageError};
pub use table::{Table, UnknownMapping, Use, Window};

/// Unit of every mapping: a Mac's page, 16 KiB (dart-and-dma 3.1).
pub const GRANULE: u64 = 16 << 10;

/// A piece of guest-physical memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Range {
    /// First byte.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

impl Range {
    /// First byte behind the range; `None` where it leaves the 64-bit space.
    pub fn end(&self) -> Option<u64> {
        self.start.checked_add(self.len)
    }

    /// The range widened to whole granules; `None` where it is empty or leaves the 64-bit space.
    pub fn rounded(&self) -> Option<Range> {
        if self.len == 0 {
            return None;
        }
        let start = self.start & !GRANULE.wrapping_sub(1);
        let end = self.end()?.checked_next_multiple_of(GRANULE)?;
        Some(Range { start, len: end.checked_sub(start)? })
    }

    /// Whether `other` lies within this range.
    pub fn covers(&self, other: Range) -> bool {
        match (self.end(), other.end()) {
            (Some(end), Some(other_end)) => self.start <= other.start && other_end <= end,
            _ => false,
        }
    }
}
