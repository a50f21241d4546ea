//! The locked side: makes windows for misses, evicts idle ones, and undoes what fails.

mod settle;

use core::sync::atomic::Ordering;

use crate::busmap::BusMap;
use crate::call::{Call, Failure, Outcome, Request, Step};
use crate::list::{List, UNRESOLVED};
use crate::lru::{AgeList, private};
use crate::rammap::RamMap;
use crate::slot::{Private, Stage};
use crate::storage::{Storage, StorageError, whole_granules};
use crate::table::Use;
use crate::{GRANULE, Limits, Policy, Range, Table};

/// Rounds in which the host may refuse something before a call fails: as planned, exact, exact with nothing idle left.
const ROUNDS: u32 = 3;

/// At least 1/8 of each budget is kept free of idle windows; see [`Planner::keep_reserve`].
const RESERVE_SHIFT: u32 = 3;

/// Windows made ahead of need are paid for with credit, in bytes: the most there is, what a byte that came to be used
/// earns, and what a call earns. So up to seven eighths may go unused for as long as the rest saves exits, and where
/// requests are scattered, little is tried in vain.
const AHEAD_CREDIT: u64 = 32 << 20;
const AHEAD_EARNS: u64 = 8;
const AHEAD_CALL_EARNS: u64 = 1 << 10;

/// Counts since creation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Calls of [`Planner::begin`].
    pub calls: u64,
    /// Exchanges with the host.
    pub exchanges: u64,
    /// Mappings the host made.
    pub maps: u64,
    /// Mappings the host took down.
    pub unmaps: u64,
    /// Of `maps`, those made ahead of need.
    pub ahead: u64,
    /// Windows evicted to make room, and idle windows given up because using them again would have cost too many bytes.
    pub evicted: u64,
    /// See `evicted`.
    pub replaced: u64,
    /// Calls that failed, but for those with [`Failure::Returning`], which may be made again.
    pub failures: u64,
    /// Mappings the host did not take down when asked; they stay counted against the budgets.
    pub lost: u64,
}

/// Makes and evicts windows. One lock around it; see the crate's documentation.
pub struct Planner<'a> {
    private: &'a mut [Private],
    ages: AgeList,
    free: u32,
    /// What is mapped, what was asked for included, and what is being unmapped until the host has confirmed it.
    bytes: u64,
    entries: u32,
    /// Bytes that may be mapped ahead of need, and bytes that are and have not been used.
    credit: u64,
    ahead: u64,
    /// The sums over all calls of what will be pinned, and of what is being unmapped.
    pending: Use,
    closing: Use,
    /// Calls that are with the host, and how many were.
    away: u32,
    settled: u64,
    stats: Stats,
}

/// How an attempt to find room ended.
enum Room {
    Made,
    BatchFull,
    /// Another call that is with the host has it, or will leave room for it.
    Busy,
    None(Failure),
}

impl<'a> Planner<'a> {
    /// Sets up a table and its planner over `storage`, for a guest whose RAM is `ram`.
    ///
    /// # Errors
    /// [`StorageError`] says which limit, range or slice does not do.
    pub fn create(
        storage: Storage<'a>,
        limits: Limits,
        policy: Policy,
        ram: &[Range],
    ) -> Result<(Table<'a>, Planner<'a>), StorageError> {
        let slots = storage.check(limits, ram)?;
        let ram = RamMap::new(storage.ram_map, whole_granules(ram)?);
        let bus = BusMap::new(storage.bus_keys, storage.bus_map);
        for (id, own) in (1u32..).zip(storage.private.iter_mut().take(slots)) {
            let last = u64::from(id) == slots as u64;
            *own = Private { next: if last { 0 } else { id.saturating_add(1) }, ..Private::default() };
        }
        let planner = Planner {
            private: storage.private,
            ages: AgeList::default(),
            free: 1,
            bytes: 0,
            entries: 0,
            credit: AHEAD_CREDIT,
            ahead: 0,
            pending: Use::default(),
            closing: Use::default(),
            away: 0,
            settled: 0,
            stats: Stats::default(),
        };
        Ok((Table::new(storage.slots, ram, bus, limits, policy), planner))
    }

    /// Starts mapping `list`; every bus address in it is overwritten. `call` belongs to it until it is over.
    pub fn begin(&mut self, table: &Table<'_>, call: &mut Call<'_>, list: &mut dyn List) -> Step {
        self.stats.calls = self.stats.calls.wrapping_add(1);
        table.epoch.fetch_add(1, Ordering::Relaxed);
        // What is there is held first, so that nothing of it is evicted to make room for the rest.
        for index in 0..list.count() {
            let bus = table.hit(list.range(index)).unwrap_or(UNRESOLVED);
            list.set_bus(index, bus);
        }
        call.begin();
        let used = table.ahead_used.swap(0, Ordering::Relaxed);
        let earned = used.saturating_mul(AHEAD_EARNS).saturating_add(AHEAD_CALL_EARNS);
        self.ahead = self.ahead.saturating_sub(used);
        self.credit = self.credit.saturating_add(earned).min(AHEAD_CREDIT);
        self.again(table, call, list)
    }

    /// Goes on with a call after [`Step::Wait`].
    pub fn again(&mut self, table: &Table<'_>, call: &mut Call<'_>, list: &mut dyn List) -> Step {
        self.ages.collect(table, self.private);
        self.advance(table, call, list)
    }

    /// Takes the outcomes noted in [`Call::batch`] and goes on with the call.
    pub fn resume(&mut self, table: &Table<'_>, call: &mut Call<'_>, list: &mut dyn List) -> Step {
        self.away = self.away.saturating_sub(1);
        self.settled = self.settled.saturating_add(1);
        match self.settle(table, call) {
            Outcome::Done => {}
            Outcome::NoSpace if call.refused.saturating_add(1) < ROUNDS => {
                call.refused = call.refused.saturating_add(1);
                call.clear = call.refused.saturating_add(1) == ROUNDS;
            }
            Outcome::NoSpace => return self.fail(table, call, list, Failure::NoSpace),
            // To give back what is idle would bring no space now.
            Outcome::Returning if call.refused == 0 => call.refused = 1,
            Outcome::Returning => return self.fail(table, call, list, Failure::Returning),
            Outcome::Refused | Outcome::Open => return self.fail(table, call, list, Failure::Host),
        }
        self.again(table, call, list)
    }

    /// Puts up to `count` idle windows, oldest first, into a batch to unmap. [`Step::Ask`] needs [`Self::settle_trim`]
    /// after the exchange; [`Step::Done`] says that nothing is idle. With `u32::MAX`, repeated until done, nothing idle
    /// stays mapped: for unbinding a driver.
    pub fn trim(&mut self, table: &Table<'_>, call: &mut Call<'_>, count: u32) -> Step {
        self.ages.collect(table, self.private);
        for _ in 0..count {
            if !self.evict_one(table, call) {
                break;
            }
        }
        if call.lines() == 0 {
            return Step::Done;
        }
        self.stats.exchanges = self.stats.exchanges.wrapping_add(1);
        Step::Ask
    }

    /// Takes the outcomes of a batch that [`Self::trim`] made.
    pub fn settle_trim(&mut self, table: &Table<'_>, call: &mut Call<'_>) {
        self.settle(table, call);
    }

    /// Bytes and number of windows mapped, idle ones included.
    pub fn mapped(&self) -> (u64, u32) {
        (self.bytes, self.entries)
    }

    /// Counts since creation.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    fn ask(&mut self) -> Step {
        self.stats.exchanges = self.stats.exchanges.wrapping_add(1);
        self.away = self.away.saturating_add(1);
        Step::Ask
    }

    fn advance(&mut self, table: &Table<'_>, call: &mut Call<'_>, list: &mut dyn List) -> Step {
        self.hold(table, call, list);
        if call.clear && !self.evict_all(table, call) {
            return self.ask();
        }
        call.clear = false;
        for index in call.cursor..list.count() {
            if list.bus(index) == UNRESOLVED {
                let range = list.range(index);
                if let Some(bus) = table.hit(range) {
                    list.set_bus(index, bus);
                } else {
                    match self.plan(table, call, range) {
                        Room::Made => {}
                        // Nothing may be kept waiting for this call while it waits itself.
                        Room::Busy if call.lines() == 0 => return Step::Wait,
                        Room::Busy | Room::BatchFull => return self.ask(),
                        Room::None(failure) => return self.fail(table, call, list, failure),
                    }
                }
            }
            call.seen = call.seen.max(index.saturating_add(1));
        }
        if call.lines() == 0 {
            return Step::Done;
        }
        if call.refused == 0 {
            self.look_ahead(table, call);
        }
        self.keep_reserve(table, call);
        self.ask()
    }

    /// Takes references for the entries planned so far, before anything else is evicted. A window made for an entry is
    /// used even if by now one of its size would not be made.
    fn hold(&mut self, table: &Table<'_>, call: &mut Call<'_>, list: &mut dyn List) {
        for index in call.cursor..call.seen {
            if list.bus(index) == UNRESOLVED
                && let Some(bus) = table.lookup(list.range(index), true)
            {
                list.set_bus(index, bus);
            }
            if call.cursor == index && list.bus(index) != UNRESOLVED {
                call.cursor = index.saturating_add(1);
            }
        }
    }

    /// Adds to a batch that goes to the host anyway what lies around its windows, as windows of their own that nobody uses
    /// yet: they save the next exits, and unlike larger windows can be given back as long as nobody does.
    fn look_ahead(&mut self, table: &Table<'_>, call: &mut Call<'_>) {
        let block = table.policy.generous_max.max(GRANULE);
        let size = table.window_size(self.pending).min(block);
        for index in 0..call.lines() {
            let Some(line) = call.line(index) else { return };
            if line.unmap || line.range.len >= block {
                continue;
            }
            let mut at = line.range.start & !block.wrapping_sub(1);
            for _ in 0..block / GRANULE {
                let rest = Range { start: at, len: size.wrapping_sub(at & size.wrapping_sub(1)) };
                let piece = table.ram.free_prefix(rest);
                if piece.len != 0 {
                    if !self.room_ahead(table, call, piece.len) {
                        return;
                    }
                    self.credit = self.credit.saturating_sub(piece.len);
                    self.ahead = self.ahead.saturating_add(piece.len);
                    self.make(table, call, piece, true);
                }
                at = at.saturating_add(piece.len.max(GRANULE));
            }
        }
    }

    /// Evicts, in a batch that goes to the host anyway, the oldest idle windows beyond half of the bytes that are not in
    /// use. The next misses then find room, without waiting for space that the host returns late, and in few pieces,
    /// as large requests need it (dart-and-dma 3.1).
    fn keep_reserve(&mut self, table: &Table<'_>, call: &mut Call<'_>) {
        let limits = table.limits;
        let used = table.pinned().bytes.saturating_add(self.pending.bytes);
        let bytes = (limits.bytes.saturating_sub(used) / 2).max(limits.bytes >> RESERVE_SHIFT);
        let entries = limits.entries >> RESERVE_SHIFT;
        while self.lacks(limits, self.closing, bytes, entries).is_some() && self.evict_one(table, call) {}
    }

    /// Whether a window asked for will cover `range`: one of this call's, or one of another's.
    fn planned(&mut self, table: &Table<'_>, call: &mut Call<'_>, range: Range) -> Option<Room> {
        let last = range.start.saturating_add(range.len.saturating_sub(1));
        let owner = [range.start, last].into_iter().find_map(|address| {
            let id = table.ram.get(address);
            let covers = table.slot(id).is_some_and(|slot| slot.range().covers(range));
            match private(self.private, id)?.stage {
                Stage::Pending { call, .. } if covers => Some(call),
                _ => None,
            }
        })?;
        if owner != call.id {
            return Some(Room::Busy);
        }
        call.pending.slack = call.pending.slack.saturating_sub(range.len);
        self.pending.slack = self.pending.slack.saturating_sub(range.len);
        Some(Room::Made)
    }

    fn plan(&mut self, table: &Table<'_>, call: &mut Call<'_>, range: Range) -> Room {
        if let Some(planned) = self.planned(table, call, range) {
            return planned;
        }
        let Some((need, ram)) = range.rounded().and_then(|need| Some((need, table.ram.region(need)?))) else {
            return Room::None(Failure::NotRam(range));
        };
        if !self.give_up_idle(table, call, range) {
            return Room::BatchFull;
        }
        let size = table.window_size(self.pending);
        let window = if call.refused == 0 { extent(table, need, ram, size) } else { need };
        match self.make_room(table, call, window.len) {
            Room::Made => self.add(table, call, window, range.len),
            // Not even with nothing idle: what was asked for, and nothing around it.
            Room::None(_) | Room::Busy if window != need => match self.make_room(table, call, need.len) {
                Room::Made => self.add(table, call, need, range.len),
                other => other,
            },
            other => other,
        }
    }

    /// Evicts the idle windows that cover `range`: `Table::hit` just refused to use them again. False if the batch has no
    /// room left.
    fn give_up_idle(&mut self, table: &Table<'_>, call: &mut Call<'_>, range: Range) -> bool {
        let last = range.start.saturating_add(range.len.saturating_sub(1));
        for address in [range.start, last] {
            let id = table.ram.get(address);
            let covers = table.slot(id).is_some_and(|slot| slot.range().covers(range));
            let mapped = matches!(private(self.private, id).map(|own| own.stage), Some(Stage::Mapped { .. }));
            if covers && mapped {
                if call.room() == 0 {
                    return false;
                }
                if self.ages.evict_this(table, self.private, id) {
                    self.stats.replaced = self.stats.replaced.wrapping_add(1);
                    self.close(table, call, id);
                }
            }
        }
        true
    }

    /// Evicts idle windows by age until `len` bytes and one entry are free.
    fn make_room(&mut self, table: &Table<'_>, call: &mut Call<'_>, len: u64) -> Room {
        let limits = table.limits;
        let used = table.pinned();
        // What no eviction brings back. Refusing before anything is evicted keeps a hopeless request cheap.
        let fixed = used.bytes.saturating_add(self.pending.bytes);
        if fixed.checked_add(len).is_none_or(|sum| sum > limits.bytes) {
            return Room::None(Failure::Bytes);
        }
        if used.entries.saturating_add(self.pending.entries) >= limits.entries {
            return Room::None(Failure::Entries);
        }
        while let Some(failure) = self.lacks(limits, call.closing, len, 1) {
            // A line for the mapping itself must be left.
            if call.room() <= 1 {
                return Room::BatchFull;
            }
            if !self.evict_one(table, call) {
                // What is being given back in other batches will be free, but not at once.
                let soon = self.closing.entries > call.closing.entries;
                let failure = if soon { Failure::Returning } else { failure };
                return if self.may_wait(call) { Room::Busy } else { Room::None(failure) };
            }
        }
        if call.room() == 0 { Room::BatchFull } else { Room::Made }
    }

    /// Whether what is with the host may leave room. A call waits for those that are there when it first comes to that, not for ever.
    fn may_wait(&self, call: &mut Call<'_>) -> bool {
        let all = self.settled.saturating_add(self.away.into());
        self.away > 0 && self.settled < *call.patience.get_or_insert(all)
    }

    /// Which budget does not have room for `bytes` and `entries` more once `closing` is free.
    fn lacks(&self, limits: Limits, closing: Use, bytes: u64, entries: u32) -> Option<Failure> {
        let mapped = self.bytes.saturating_sub(closing.bytes);
        let windows = self.entries.saturating_sub(closing.entries);
        if mapped.checked_add(bytes).is_none_or(|sum| sum > limits.bytes) {
            Some(Failure::Bytes)
        } else if windows.checked_add(entries).is_none_or(|sum| sum > limits.entries) {
            Some(Failure::Entries)
        } else {
            None
        }
    }

    fn evict_all(&mut self, table: &Table<'_>, call: &mut Call<'_>) -> bool {
        while self.ages.len() != 0 {
            if call.room() == 0 {
                return false;
            }
            if !self.evict_one(table, call) {
                break;
            }
        }
        true
    }

    fn evict_one(&mut self, table: &Table<'_>, call: &mut Call<'_>) -> bool {
        if call.room() == 0 {
            return false;
        }
        let Some(id) = self.ages.evict(table, self.private) else { return false };
        self.stats.evicted = self.stats.evicted.wrapping_add(1);
        self.close(table, call, id);
        true
    }

    /// Takes a dead window out of the maps and asks for its unmapping. Its bytes and its entry count as free for the
    /// mappings behind it in the batch.
    fn close(&mut self, table: &Table<'_>, call: &mut Call<'_>, id: u32) {
        let (Some(slot), Some(own)) = (table.slot(id), private(self.private, id)) else { return };
        own.stage = Stage::Closing;
        let (range, handle) = (slot.range(), own.handle);
        if slot.unused.swap(false, Ordering::Relaxed) {
            self.ahead = self.ahead.saturating_sub(range.len);
        }
        self.hide(table, id, range);
        table.bus.remove(Range { start: slot.bus(), len: range.len });
        let gone = Use { bytes: range.len, entries: 1, slack: 0 };
        call.closing = call.closing.plus(gone);
        self.closing = self.closing.plus(gone);
        call.add(Request { range, handle, unmap: true, window: id, ..Request::default() });
    }

    /// Takes a window out of the RAM map; windows that it overlapped at its edges get their granules back.
    fn hide(&self, table: &Table<'_>, id: u32, range: Range) {
        let Some(end) = range.end() else { return };
        let left = table.ram.get(range.start.wrapping_sub(GRANULE));
        let left_end = self.reach(table, left, id).and_then(|r| r.end()).unwrap_or(0);
        let right = table.ram.get(end);
        let right_start = self.reach(table, right, id).map_or(u64::MAX, |r| r.start);
        table.ram.clear(range, id, (left, left_end), (right, right_start));
    }

    fn reach(&self, table: &Table<'_>, id: u32, not: u32) -> Option<Range> {
        if id == not { None } else { table.slot(id).map(|slot| slot.range()) }
    }

    fn room_ahead(&self, table: &Table<'_>, call: &Call<'_>, len: u64) -> bool {
        let (limits, used) = (table.limits, table.pinned());
        let bytes = used.bytes.saturating_add(self.pending.bytes);
        let entries = used.entries.saturating_add(self.pending.entries);
        call.room() > 0
            && len <= self.credit
            && self.ahead.saturating_add(len) <= table.policy.ahead_allowed(limits)
            && bytes <= limits.bytes / 2
            && entries <= limits.entries / 2
            && self.lacks(limits, call.closing, len, 1).is_none()
    }

    /// Adds the mapping of `range` to the batch, for a request of `live` bytes.
    fn add(&mut self, table: &Table<'_>, call: &mut Call<'_>, range: Range, live: u64) -> Room {
        if !self.make(table, call, range, false) {
            // There is a slot for each entry and each line of a batch.
            return Room::None(Failure::Entries);
        }
        let pinned = Use { bytes: range.len, entries: 1, slack: range.len.saturating_sub(live) };
        call.pending = call.pending.plus(pinned);
        self.pending = self.pending.plus(pinned);
        Room::Made
    }

    fn make(&mut self, table: &Table<'_>, call: &mut Call<'_>, range: Range, ahead: bool) -> bool {
        let id = self.free;
        let (Some(slot), Some(own)) = (table.slot(id), private(self.private, id)) else { return false };
        self.free = own.next;
        *own = Private { stage: Stage::Pending { ahead, call: call.id }, ..Private::default() };
        slot.describe(range, UNRESOLVED);
        table.ram.set(range, id);
        self.bytes = self.bytes.saturating_add(range.len);
        self.entries = self.entries.saturating_add(1);
        call.add(Request { range, window: id, ..Request::default() });
        true
    }
}

/// The guest memory to map for a request that needs `need`: the aligned block around it, as large as the policy allows,
/// clipped to its RAM range and to what is not mapped yet.
fn extent(table: &Table<'_>, need: Range, ram: Range, size: u64) -> Range {
    if need.len >= size {
        return need;
    }
    let mask = size.wrapping_sub(1);
    let (Some(need_end), Some(ram_end)) = (need.end(), ram.end()) else { return need };
    let start = (need.start & !mask).max(ram.start);
    let end = need_end.checked_next_multiple_of(size).unwrap_or(ram_end).min(ram_end);
    table.ram.free_around(need, Range { start, len: end.saturating_sub(start) })
}
