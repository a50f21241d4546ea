//! The mappings of one DMA device: all functions of one slot.

use crate::exchange::{Counts, Device, exchange};
use core::cell::UnsafeCell;
use outboard_windows::{
    Failure, Limits, List, Planner, Policy, Range, Segment, Stats, Step, Storage, StorageError, Table,
    UnknownMapping, Use, Window,
};

/// A [`Table`] with its [`Planner`] and the device they ask.
pub struct Domain<'a, D> {
    table: Table<'a>,
    slow: UnsafeCell<Slow<'a, D>>,
}

/// What only the holder of the lock touches.
struct Slow<'a, D> {
    planner: Planner<'a>,
    device: D,
    counts: Counts,
}

/// The lock around the slow half. The caller holds it; this only says so.
pub struct Held<'d, 'a, D> {
    table: &'d Table<'a>,
    slow: &'d mut Slow<'a, D>,
}

// SAFETY: the table is made to be shared; `slow` is reached through `Domain::held` alone, whose caller holds the lock.
#[allow(unsafe_code, reason = "the lock is on the other side of the C interface")]
unsafe impl<D: Send> Sync for Domain<'_, D> {}

impl<'a, D: Device> Domain<'a, D> {
    /// An empty domain.
    ///
    /// # Errors
    /// [`StorageError`] says which limit, range or slice does not do.
    pub fn new(storage: Storage<'a>, limits: Limits, ram: &[Range], device: D) -> Result<Self, StorageError> {
        let (table, planner) = Planner::create(storage, limits, Policy::default(), ram)?;
        let slow = Slow { planner, device, counts: Counts::default() };
        Ok(Self { table, slow: UnsafeCell::new(slow) })
    }

    /// Maps without a lock and without asking anybody, where a window covers the range: its bus address. See [`Table::hit`].
    pub fn hit(&self, range: Range) -> Option<u64> {
        self.table.hit(range)
    }

    /// Gives back what a mapping took; any context, no lock.
    ///
    /// # Errors
    /// [`UnknownMapping`]: nothing was mapped so; nothing changes.
    pub fn release(&self, bus: u64, len: u64) -> Result<(), UnknownMapping> {
        self.table.release(bus, len)
    }

    /// See [`Table::hopeless`].
    pub fn hopeless(&self, range: Range) -> Option<Failure> {
        self.table.hopeless(range)
    }

    /// The window in slot `index`; see [`Table::window`].
    pub fn window(&self, index: usize) -> Option<Window> {
        self.table.window(index)
    }

    /// Number of slots of windows.
    pub fn slots(&self) -> usize {
        self.table.slots()
    }

    /// The slow half.
    ///
    /// # Safety
    /// The caller holds the domain's lock, and holds it for as long as it keeps what this returns.
    #[allow(unsafe_code, reason = "the lock is on the other side of the C interface")]
    pub unsafe fn held(&self) -> Held<'_, 'a, D> {
        // SAFETY: the caller's promise: nobody else has a reference to what is inside.
        Held { table: &self.table, slow: unsafe { &mut *self.slow.get() } }
    }
}

impl<D: Device> Held<'_, '_, D> {
    /// Maps all entries of `list`, or none.
    ///
    /// # Errors
    /// [`Failure`]: all that was mapped before still is.
    pub fn map_list(&mut self, list: &mut dyn List) -> Result<(), Failure> {
        let slow = &mut *self.slow;
        let mut step = slow.planner.begin(self.table, list);
        loop {
            match step {
                Step::Done => return Ok(()),
                Step::Failed(failure) => return Err(failure),
                Step::Ask => {
                    exchange(&mut slow.device, slow.planner.batch(), &mut slow.counts);
                    step = slow.planner.resume(self.table, list);
                }
            }
        }
    }

    /// Maps one range: its bus address.
    ///
    /// # Errors
    /// As [`Self::map_list`].
    pub fn map(&mut self, range: Range) -> Result<u64, Failure> {
        let mut list = [Segment::new(range.start, range.len)];
        self.map_list(&mut list)?;
        Ok(list[0].bus)
    }

    /// Gives up to a batch of idle windows back to the host, oldest first. Whether there may be more.
    pub fn trim(&mut self) -> bool {
        let slow = &mut *self.slow;
        match slow.planner.trim(self.table, u32::MAX) {
            Step::Ask => {
                exchange(&mut slow.device, slow.planner.batch(), &mut slow.counts);
                slow.planner.settle_trim(self.table);
                true
            }
            Step::Done | Step::Failed(_) => false,
        }
    }

    /// Bytes and number of windows mapped.
    pub fn mapped(&self) -> (u64, u32) {
        self.slow.planner.mapped()
    }

    /// What windows with references use.
    pub fn pinned(&self) -> Use {
        self.table.pinned()
    }

    /// The planner's counts.
    pub fn stats(&self) -> Stats {
        self.slow.planner.stats()
    }

    /// The exchanges' counts.
    pub fn counts(&self) -> Counts {
        self.slow.counts
    }
}
