//! The shared side: lookup, references, release. No locks.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::busmap::BusMap;
use crate::list::{List, UNRESOLVED};
use crate::rammap::RamMap;
use crate::slot::{Slot, State, UNQUEUED};
use crate::{Failure, Limits, Policy, Range};

/// A release named a bus range at which no such reference exists: a double unmap, or a wrong address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnknownMapping;

/// What windows use of the budgets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Use {
    /// Bytes mapped.
    pub bytes: u64,
    /// Mappings.
    pub entries: u32,
    /// Bytes mapped that no request asked for.
    pub slack: u64,
}

impl Use {
    pub(crate) fn plus(self, more: Use) -> Use {
        Use {
            bytes: self.bytes.saturating_add(more.bytes),
            entries: self.entries.saturating_add(more.entries),
            slack: self.slack.saturating_add(more.slack),
        }
    }

    pub(crate) fn minus(self, less: Use) -> Use {
        Use {
            bytes: self.bytes.saturating_sub(less.bytes),
            entries: self.entries.saturating_sub(less.entries),
            slack: self.slack.saturating_sub(less.slack),
        }
    }
}

/// A window, as a CPU that holds no lock sees it: each value was right at some moment, not all of them at the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Guest memory.
    pub range: Range,
    /// Bus address of its first byte.
    pub bus: u64,
    /// References: live mappings in it.
    pub references: u64,
    /// Bytes of those mappings.
    pub live: u64,
}

/// Windows as every CPU sees them. See the crate's documentation for what needs which lock.
pub struct Table<'a> {
    pub(crate) slots: &'a [Slot],
    pub(crate) ram: RamMap<'a>,
    pub(crate) bus: BusMap<'a>,
    pub(crate) limits: Limits,
    pub(crate) policy: Policy,
    /// Stack of windows that fell idle since the planner last looked (ids; 0 is the end).
    pub(crate) idle: AtomicU32,
    /// The planner's count of calls, the clock of ages.
    pub(crate) epoch: AtomicU32,
    /// Bytes of windows made ahead of need that came to be used since the planner last looked.
    pub(crate) ahead_used: AtomicU64,
    /// Windows with references: their bytes, their number, and their bytes that nobody asked for.
    pinned_bytes: AtomicU64,
    pinned: AtomicU32,
    slack: AtomicU64,
}

impl<'a> Table<'a> {
    pub(crate) fn new(
        slots: &'a [Slot],
        ram: RamMap<'a>,
        bus: BusMap<'a>,
        limits: Limits,
        policy: Policy,
    ) -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            slots,
            ram,
            bus,
            limits,
            policy,
            idle: AtomicU32::new(0),
            epoch: AtomicU32::new(0),
            ahead_used: zero(),
            pinned_bytes: zero(),
            pinned: AtomicU32::new(0),
            slack: zero(),
        }
    }

    /// Takes a reference on a window that covers `range`, and gives the bus address of `range`. `None` is a miss: ask
    /// the planner.
    pub fn hit(&self, range: Range) -> Option<u64> {
        self.lookup(range, false)
    }

    /// [`Self::hit`]; with `any`, also on an idle window that is not [`Self::worth_reviving`].
    pub(crate) fn lookup(&self, range: Range, any: bool) -> Option<u64> {
        let last = range.start.checked_add(range.len.checked_sub(1)?)?;
        let id = self.ram.get(range.start);
        self.try_window(id, range, any).or_else(|| {
            // A request that straddles two windows may be covered by a younger one that owns its end.
            let other = self.ram.get(last);
            if other == id { None } else { self.try_window(other, range, any) }
        })
    }

    /// [`Self::hit`] for every entry of a list, all or nothing; true if all are mapped.
    pub fn hit_list(&self, list: &mut dyn List) -> bool {
        for index in 0..list.count() {
            match self.hit(list.range(index)) {
                Some(bus) => list.set_bus(index, bus),
                None => {
                    self.release_list(list, index);
                    return false;
                }
            }
        }
        true
    }

    /// Drops the reference that a request of `len` bytes at bus address `bus` took.
    ///
    /// # Errors
    /// [`UnknownMapping`] if no such reference exists; nothing changes then.
    pub fn release(&self, bus: u64, len: u64) -> Result<(), UnknownMapping> {
        let id = self.bus.get(bus);
        let slot = self.slot(id).ok_or(UnknownMapping)?;
        let window = Range { start: slot.bus(), len: slot.range().len };
        if !window.covers(Range { start: bus, len }) {
            return Err(UnknownMapping);
        }
        self.unref(id, slot, len).ok_or(UnknownMapping)
    }

    /// Releases the first `count` entries of `list` that have a bus address, and marks them as having none.
    pub(crate) fn release_list(&self, list: &mut dyn List, count: usize) {
        for index in 0..count {
            let bus = list.bus(index);
            if bus != UNRESOLVED {
                let released = self.release(bus, list.range(index).len);
                debug_assert!(released.is_ok(), "a reference taken in this call is there");
                list.set_bus(index, UNRESOLVED);
            }
        }
    }

    /// What windows with references use.
    pub fn pinned(&self) -> Use {
        // Counters are changed one after the other; a reader in between may see a slack below zero.
        let slack = self.slack.load(Ordering::Relaxed);
        Use {
            bytes: self.pinned_bytes.load(Ordering::Relaxed),
            entries: self.pinned.load(Ordering::Relaxed),
            slack: if slack > u64::MAX / 2 { 0 } else { slack },
        }
    }

    /// Why `range`, which was not hit, cannot be mapped now whatever is evicted; `None` if the planner may find a way. Spares a hopeless call the
    /// planner's lock: while a budget is used up, every call of every CPU is one.
    pub fn hopeless(&self, range: Range) -> Option<Failure> {
        let Some(need) = range.rounded().filter(|need| self.ram.region(*need).is_some()) else {
            return Some(Failure::NotRam(range));
        };
        let used = self.pinned();
        if used.bytes.checked_add(need.len).is_none_or(|sum| sum > self.limits.bytes) {
            Some(Failure::Bytes)
        } else if used.entries >= self.limits.entries {
            Some(Failure::Entries)
        } else {
            None
        }
    }

    /// The window in slot `index`, for lists of all of them; `None` where no window is. Slots end at [`Self::slots`].
    pub fn window(&self, index: usize) -> Option<Window> {
        let slot = self.slots.get(index)?;
        let state = slot.state();
        let (references, live) = (state.refs(), state.live());
        (!state.dead()).then(|| Window { range: slot.range(), bus: slot.bus(), references, live })
    }

    /// Number of slots.
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    pub(crate) fn slot(&self, id: u32) -> Option<&'a Slot> {
        self.slots.get(usize::try_from(id).ok()?.checked_sub(1)?)
    }

    /// What a new window may measure now, where `pending` will be pinned besides.
    pub(crate) fn window_size(&self, pending: Use) -> u64 {
        let used = self.pinned();
        self.policy.window_size(
            self.limits,
            used.bytes.saturating_add(pending.bytes),
            used.entries.saturating_add(pending.entries),
            used.slack.saturating_add(pending.slack),
        )
    }

    /// Whether to use an idle window of `len` bytes again for a request of `need` whole-granule bytes. It would pin all of
    /// the window, so the rule for new windows holds, but for the share that one window may take.
    pub(crate) fn worth_reviving(&self, len: u64, need: u64) -> bool {
        if len <= need {
            return true;
        }
        let slack = self.pinned().slack.saturating_add(len.saturating_sub(need));
        slack <= self.policy.slack_allowed(self.limits) || len <= self.window_size(Use::default())
    }

    fn try_window(&self, id: u32, range: Range, any: bool) -> Option<u64> {
        let slot = self.slot(id)?;
        // Hints until the reference is held: the slot may be taken for another window meanwhile.
        if !slot.range().covers(range) {
            return None;
        }
        if !any && slot.state() == State::IDLE && !self.worth_reviving(slot.range().len, range.rounded()?.len)
        {
            return None;
        }
        let (old, new) = slot.acquire(range.len)?;
        let window = slot.range();
        self.account(window.len, old, new);
        if old == State::IDLE
            && slot.unused.load(Ordering::Relaxed)
            && slot.unused.swap(false, Ordering::Relaxed)
        {
            self.ahead_used.fetch_add(window.len, Ordering::Relaxed);
        }
        if window.covers(range) {
            slot.bus().checked_add(range.start.checked_sub(window.start)?)
        } else {
            let undone = self.unref(id, slot, range.len);
            debug_assert!(undone.is_some(), "the reference just taken is there");
            None
        }
    }

    fn unref(&self, id: u32, slot: &Slot, len: u64) -> Option<()> {
        // Read before the reference goes, as the slot may be reused right after.
        let window_len = slot.range().len;
        let (old, new) = slot.drop_ref(len)?;
        self.account(window_len, old, new);
        if new == State::IDLE {
            self.went_idle(id, slot);
        }
        Some(())
    }

    fn account(&self, len: u64, old: State, new: State) {
        match (old.refs(), new.refs()) {
            (0, _) => {
                self.pinned_bytes.fetch_add(len, Ordering::Relaxed);
                self.pinned.fetch_add(1, Ordering::Relaxed);
            }
            (_, 0) => {
                self.pinned_bytes.fetch_sub(len, Ordering::Relaxed);
                self.pinned.fetch_sub(1, Ordering::Relaxed);
            }
            _ => {}
        }
        let change = new.slack(len).wrapping_sub(old.slack(len));
        if change != 0 {
            self.slack.fetch_add(change, Ordering::Relaxed);
        }
    }

    /// Tells the planner, through the stack, that a window fell idle; once until the planner unqueues it.
    ///
    /// The planner stores `UNQUEUED` and then looks at the state; here the state changed before the link is tried. With
    /// both SeqCst at least one side sees the other's step, so no idle window is forgotten.
    pub(crate) fn went_idle(&self, id: u32, slot: &Slot) {
        slot.stamp.store(self.epoch.load(Ordering::Relaxed), Ordering::Relaxed);
        if slot.link.compare_exchange(UNQUEUED, 0, Ordering::SeqCst, Ordering::SeqCst).is_err() {
            return;
        }
        let mut head = self.idle.load(Ordering::Relaxed);
        loop {
            slot.link.store(head, Ordering::Relaxed);
            match self.idle.compare_exchange_weak(head, id, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return,
                Err(seen) => head = seen,
            }
        }
    }
}
