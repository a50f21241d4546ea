//! The mappings of one DMA device: all functions of one slot.

use crate::exchange::{Counts, Device, exchange, put, receive_all};
use crate::tracker::{Found, Tracker};
use core::cell::UnsafeCell;
use outboard_windows::{
    Call, Failure, Limits, List, Planner, Policy, Range, Segment, Stats, Step, Storage, StorageError, Table,
    Use, Window,
};

/// The lock around the planner, as the C half has it. Calls of [`Domain`] hold it shortly, and never while the host is asked.
pub trait Lock {
    /// Takes it. Interrupts are off on this CPU.
    fn acquire(&self);
    /// Lets it go.
    fn release(&self);
}

/// What a call needs to itself: its batch and the queue that takes it to the host.
pub struct Queue<'a, D>(UnsafeCell<(Call<'a>, D)>);

impl<'a, D> Queue<'a, D> {
    /// One of a domain's.
    pub fn new(call: Call<'a>, device: D) -> Self {
        Self(UnsafeCell::new((call, device)))
    }
}

/// A [`Table`] with its [`Planner`] and the queues by which they ask.
pub struct Domain<'a, D, L> {
    table: Table<'a>,
    tracker: Tracker<'a>,
    lock: L,
    slow: UnsafeCell<Slow<'a>>,
    queues: &'a [Queue<'a, D>],
}

/// What only the holder of the lock touches.
struct Slow<'a> {
    planner: Planner<'a>,
    counts: Counts,
}

/// A driver's mistake in taking a mapping down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Misuse {
    /// Nothing is mapped there. Nothing changes.
    NotMapped,
    /// What is mapped there has another length. It is taken down whole.
    OtherLength,
}

/// What [`Domain::stats`] tells.
#[derive(Clone, Copy, Debug, Default)]
pub struct Numbers {
    /// Bytes and number of windows mapped.
    pub mapped: (u64, u32),
    /// What windows with references use.
    pub pinned: Use,
    /// The planner's counts.
    pub planner: Stats,
    /// The exchanges' counts.
    pub exchanges: Counts,
}

// SAFETY: the table is made to be shared; `slow` is reached under the lock alone, a queue by its owner alone (`Domain::map_list`).
#[allow(unsafe_code, reason = "the lock is on the other side of the C interface")]
unsafe impl<D: Send, L: Sync> Sync for Domain<'_, D, L> {}

impl<'a, D: Device, L: Lock> Domain<'a, D, L> {
    /// An empty domain.
    ///
    /// # Errors
    /// [`StorageError`] says which limit, range or slice does not do.
    pub fn new(
        storage: Storage<'a>,
        limits: Limits,
        ram: &[Range],
        tracker: Tracker<'a>,
        queues: &'a [Queue<'a, D>],
        lock: L,
    ) -> Result<Self, StorageError> {
        let (table, planner) = Planner::create(storage, limits, Policy::default(), ram)?;
        let slow = UnsafeCell::new(Slow { planner, counts: Counts::default() });
        Ok(Self { table, tracker, lock, slow, queues })
    }

    /// Maps without a lock and without asking anybody, where a window covers the range: its bus address. See [`Table::hit`].
    pub fn hit(&self, range: Range) -> Option<u64> {
        let bus = self.table.hit(range)?;
        self.tracker.insert(bus, range.len);
        Some(bus)
    }

    /// Gives back what a mapping took; any context, no lock.
    ///
    /// # Errors
    /// [`Misuse`].
    pub fn release(&self, bus: u64, len: u64) -> Result<(), Misuse> {
        let (len, mistake) = match self.tracker.remove(bus, len) {
            Found::It => (len, Ok(())),
            Found::Other(actual) => (actual, Err(Misuse::OtherLength)),
            Found::Nothing => return Err(Misuse::NotMapped),
        };
        self.table.release(bus, len).map_err(|_| Misuse::NotMapped)?;
        mistake
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

    fn locked<R>(&self, act: impl FnOnce(&mut Slow<'a>) -> R) -> R {
        self.lock.acquire();
        // SAFETY: the lock is held until `act` has returned, and nothing of it leaves with the result.
        #[allow(unsafe_code, reason = "the lock is on the other side of the C interface")]
        let result = act(unsafe { &mut *self.slow.get() });
        self.lock.release();
        result
    }

    /// The queue of that number.
    ///
    /// # Safety
    /// Nobody else uses it before the caller has done with what this returns.
    #[allow(unsafe_code, reason = "the C half gives each queue to one call at a time")]
    #[allow(clippy::mut_from_ref, reason = "the caller has it to itself")]
    unsafe fn queue(&self, number: usize) -> Option<&mut (Call<'a>, D)> {
        // SAFETY: the caller's promise.
        self.queues.get(number).map(|queue| unsafe { &mut *queue.0.get() })
    }

    /// Maps all entries of `list`, or none.
    ///
    /// # Errors
    /// [`Failure`]: all that was mapped before still is.
    ///
    /// # Safety
    /// The caller has queue `number` to itself, and interrupts are off.
    #[allow(unsafe_code, reason = "the C half gives each queue to one call at a time")]
    pub unsafe fn map_list(&self, number: usize, list: &mut dyn List) -> Result<(), Failure> {
        // SAFETY: the caller's promise.
        unsafe { self.map_entries(number, list)? };
        for index in 0..list.count() {
            self.tracker.insert(list.bus(index), list.range(index).len);
        }
        Ok(())
    }

    /// [`Self::map_list`], but nothing is noted.
    ///
    /// # Safety
    /// As there.
    #[allow(unsafe_code, reason = "the C half gives each queue to one call at a time")]
    unsafe fn map_entries(&self, number: usize, list: &mut dyn List) -> Result<(), Failure> {
        // SAFETY: the caller's promise.
        let (call, device) = unsafe { self.queue(number) }.ok_or(Failure::Host)?;
        let mut step = self.locked(|slow| slow.planner.begin(&self.table, call, list));
        loop {
            match step {
                Step::Done => return Ok(()),
                Step::Failed(failure) => return Err(failure),
                Step::Ask => {
                    let counts = exchange(device, call.batch());
                    step = self.locked(|slow| {
                        slow.counts.add(counts);
                        slow.planner.resume(&self.table, call, list)
                    });
                }
                Step::Wait => {
                    core::hint::spin_loop();
                    step = self.locked(|slow| slow.planner.again(&self.table, call, list));
                }
            }
        }
    }

    /// Maps one range: its bus address.
    ///
    /// # Errors
    /// As [`Self::map_list`].
    ///
    /// # Safety
    /// As [`Self::map_list`].
    #[allow(unsafe_code, reason = "the C half gives each queue to one call at a time")]
    pub unsafe fn map(&self, number: usize, range: Range) -> Result<u64, Failure> {
        let mut list = [Segment::new(range.start, range.len)];
        // SAFETY: the caller's promise.
        unsafe { self.map_list(number, &mut list)? };
        Ok(list[0].bus)
    }

    /// Puts a batch of idle windows, oldest first, into queue `number` to be given back: how many. The caller has the device take them down and
    /// then calls [`Self::trimmed`]; other calls go on meanwhile.
    ///
    /// # Safety
    /// The caller has queue `number` to itself until then; interrupts are off.
    #[allow(unsafe_code, reason = "the C half gives each queue to one call at a time")]
    pub unsafe fn trim(&self, number: usize) -> u32 {
        // SAFETY: the caller's promise.
        let Some((call, device)) = (unsafe { self.queue(number) }) else { return 0 };
        match self.locked(|slow| slow.planner.trim(&self.table, call, u32::MAX)) {
            Step::Ask => put(device, call.batch()),
            Step::Done | Step::Wait | Step::Failed(_) => 0,
        }
    }

    /// Takes over what became of a batch that [`Self::trim`] made.
    ///
    /// # Safety
    /// As there.
    #[allow(unsafe_code, reason = "the C half gives each queue to one call at a time")]
    pub unsafe fn trimmed(&self, number: usize) {
        // SAFETY: the caller's promise.
        let Some((call, device)) = (unsafe { self.queue(number) }) else { return };
        let counts = receive_all(device, call.batch());
        self.locked(|slow| {
            slow.counts.add(counts);
            slow.planner.settle_trim(&self.table, call);
        });
    }

    /// What there is and was. Interrupts are off.
    pub fn stats(&self) -> Numbers {
        self.locked(|slow| Numbers {
            mapped: slow.planner.mapped(),
            pinned: self.table.pinned(),
            planner: slow.planner.stats(),
            exchanges: slow.counts,
        })
    }
}
