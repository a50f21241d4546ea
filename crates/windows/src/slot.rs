//! One window: what the lock-free side may read of it, and what only the planner may.

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::Range;

/// Link value of a window that is on no idle list.
pub(crate) const UNQUEUED: u32 = u32::MAX;
/// Link value of a window on the planner's age list (as opposed to the stack of windows that just fell idle).
pub(crate) const LISTED: u32 = u32::MAX - 1;

/// The shared half of a window.
///
/// `state` is the only word two CPUs compete for. The other fields are written while `state` says *dead* and read
/// only by holders of a reference, or as hints that a reference taken later confirms.
#[derive(Debug)]
pub struct Slot {
    state: AtomicU64,
    start: AtomicU64,
    len: AtomicU64,
    bus: AtomicU64,
    /// Made ahead of need and not used since.
    pub(crate) unused: AtomicBool,
    /// When the window last fell idle, in planner epochs.
    pub(crate) stamp: AtomicU32,
    /// [`UNQUEUED`], [`LISTED`], or the id of the next window on the idle stack (0 ends it).
    pub(crate) link: AtomicU32,
}

impl Default for Slot {
    fn default() -> Self {
        Self {
            state: AtomicU64::new(State::DEAD.0),
            start: AtomicU64::new(0),
            len: AtomicU64::new(0),
            bus: AtomicU64::new(0),
            unused: AtomicBool::new(false),
            stamp: AtomicU32::new(0),
            link: AtomicU32::new(UNQUEUED),
        }
    }
}

/// References and live bytes of a window in one word, so that both change together: bit 63 dead, bits 62..40
/// references, bits 39..0 bytes of live requests (a page requested twice counts twice).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct State(u64);

impl State {
    pub(crate) const DEAD: State = State(1 << 63);
    pub(crate) const IDLE: State = State(0);
    const LIVE_BITS: u32 = 40;
    const LIVE_MASK: u64 = (1 << Self::LIVE_BITS) - 1;
    const REFS_MAX: u64 = (1 << 23) - 1;

    pub(crate) fn dead(self) -> bool {
        self.0 & Self::DEAD.0 != 0
    }

    pub(crate) fn refs(self) -> u64 {
        (self.0 & !Self::DEAD.0) >> Self::LIVE_BITS
    }

    pub(crate) fn live(self) -> u64 {
        self.0 & Self::LIVE_MASK
    }

    fn build(refs: u64, live: u64) -> Option<State> {
        (refs <= Self::REFS_MAX && live <= Self::LIVE_MASK).then_some(State((refs << Self::LIVE_BITS) | live))
    }

    /// One more reference to `bytes` bytes; `None` if dead or if a field would overflow.
    fn plus(self, bytes: u64) -> Option<State> {
        if self.dead() {
            return None;
        }
        Self::build(self.refs().checked_add(1)?, self.live().checked_add(bytes)?)
    }

    /// One reference less; `None` if there is none, or if it leaves bytes without references or the reverse.
    fn minus(self, bytes: u64) -> Option<State> {
        if self.dead() {
            return None;
        }
        let (refs, live) = (self.refs().checked_sub(1)?, self.live().checked_sub(bytes)?);
        if (refs == 0) != (live == 0) { None } else { Self::build(refs, live) }
    }

    /// Bytes mapped but not asked for by anyone, of a window of `len` bytes in use; 0 for an idle one, which can be
    /// given back at any time.
    pub(crate) fn slack(self, len: u64) -> u64 {
        if self.dead() || self.refs() == 0 { 0 } else { len.saturating_sub(self.live()) }
    }
}

impl Slot {
    pub(crate) fn state(&self) -> State {
        // SeqCst: pairs with `link` in `Table::went_idle` and `Planner`'s unqueueing; see there.
        State(self.state.load(Ordering::SeqCst))
    }

    /// Takes a reference; the states before and after, or `None` if the window is dead or full of references.
    pub(crate) fn acquire(&self, bytes: u64) -> Option<(State, State)> {
        self.exchange(|state| state.plus(bytes))
    }

    /// Drops a reference; the states before and after, or `None` if there was no such reference.
    pub(crate) fn drop_ref(&self, bytes: u64) -> Option<(State, State)> {
        self.exchange(|state| state.minus(bytes))
    }

    /// Idle to dead, so that no new reference can be taken. False if it is in use or already dead.
    pub(crate) fn kill(&self) -> bool {
        self.exchange(|state| (state == State::IDLE).then_some(State::DEAD)).is_some()
    }

    fn exchange(&self, next: impl Fn(State) -> Option<State>) -> Option<(State, State)> {
        let mut old = State(self.state.load(Ordering::Relaxed));
        loop {
            let new = next(old)?;
            match self.state.compare_exchange_weak(old.0, new.0, Ordering::SeqCst, Ordering::Relaxed) {
                Ok(_) => return Some((old, new)),
                Err(seen) => old = State(seen),
            }
        }
    }

    /// Describes a dead slot anew; only the planner does that.
    pub(crate) fn describe(&self, range: Range, bus: u64) {
        self.start.store(range.start, Ordering::Relaxed);
        self.len.store(range.len, Ordering::Relaxed);
        self.bus.store(bus, Ordering::Relaxed);
    }

    /// Opens a described slot for references.
    pub(crate) fn publish(&self) {
        self.state.store(State::IDLE.0, Ordering::SeqCst);
    }

    /// The guest memory of this window. Exact for the planner and for holders of a reference, else a hint.
    pub(crate) fn range(&self) -> Range {
        Range { start: self.start.load(Ordering::Relaxed), len: self.len.load(Ordering::Relaxed) }
    }

    /// Bus address of the window's first byte; as exact as [`Self::range`].
    pub(crate) fn bus(&self) -> u64 {
        self.bus.load(Ordering::Relaxed)
    }
}

/// The planner's half of a window.
#[derive(Debug, Clone, Copy, Default)]
pub struct Private {
    /// The host's name for the mapping.
    pub(crate) handle: u64,
    /// Neighbours on the age list, or on the list of free slots (`next` only); 0 is the end.
    pub(crate) prev: u32,
    pub(crate) next: u32,
    /// The window's `stamp` when it was put on the age list.
    pub(crate) stamp: u32,
    pub(crate) stage: Stage,
}

/// Where a slot is in its life, as the planner sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Stage {
    #[default]
    Free,
    /// Asked for in the batch of `call` now under way; by nobody yet if `ahead`.
    Pending { ahead: bool, call: u16 },
    /// Mapped, and on the age list if `listed`.
    Mapped { listed: bool },
    /// Asked to be unmapped in a batch now under way.
    Closing,
    /// The host did not confirm the unmapping: counted as mapped, never used again.
    Lost,
}
