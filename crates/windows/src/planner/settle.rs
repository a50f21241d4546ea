//! What becomes of a batch: the host's outcomes taken over, or all of it undone.

use core::sync::atomic::Ordering;

use super::Planner;
use crate::call::{Call, Failure, Outcome, Request, Step};
use crate::list::List;
use crate::lru::private;
use crate::slot::{Private, Stage};
use crate::{Range, Table};

impl Planner<'_> {
    /// Takes over the outcomes of the batch; the worst one of mappings that somebody waits for.
    pub(super) fn settle(&mut self, table: &Table<'_>, call: &mut Call<'_>) -> Outcome {
        let mut worst = Outcome::Done;
        self.forget(call);
        for index in 0..call.lines() {
            let Some(request) = call.line(index) else { break };
            if request.unmap {
                self.settle_unmap(request);
                continue;
            }
            worst = worst.max(self.settle_map(table, request));
        }
        call.empty();
        worst
    }

    /// What `call` was to pin and to free is not to come any more: it has, or it will not.
    fn forget(&mut self, call: &mut Call<'_>) {
        self.pending = self.pending.minus(core::mem::take(&mut call.pending));
        self.closing = self.closing.minus(core::mem::take(&mut call.closing));
    }

    fn settle_unmap(&mut self, request: Request) {
        let id = request.window;
        let (free, Some(own)) = (self.free, private(self.private, id)) else { return };
        if request.outcome == Outcome::Done {
            *own = Private { next: free, ..Private::default() };
            self.free = id;
            self.bytes = self.bytes.saturating_sub(request.range.len);
            self.entries = self.entries.saturating_sub(1);
            self.stats.unmaps = self.stats.unmaps.wrapping_add(1);
        } else {
            // The device may still reach it: never count its bytes as free.
            own.stage = Stage::Lost;
            self.stats.lost = self.stats.lost.wrapping_add(1);
        }
    }

    fn settle_map(&mut self, table: &Table<'_>, request: Request) -> Outcome {
        let id = request.window;
        let (Some(slot), Some(own)) = (table.slot(id), private(self.private, id)) else {
            return Outcome::Refused;
        };
        let ahead = matches!(own.stage, Stage::Pending { ahead: true, .. });
        let mut outcome = request.outcome;
        if outcome == Outcome::Done {
            self.stats.maps = self.stats.maps.wrapping_add(1);
            own.handle = request.handle;
            if table.bus.insert(Range { start: request.bus, len: request.range.len }, id) {
                slot.describe(request.range, request.bus);
                slot.unused.store(ahead, Ordering::Relaxed);
                self.stats.ahead = self.stats.ahead.wrapping_add(u64::from(ahead));
                slot.stamp.store(table.epoch.load(Ordering::Relaxed), Ordering::Relaxed);
                // Listed before it is open for references, so that a release in between does not queue it twice.
                self.ages.adopt(table, self.private, id);
                slot.publish();
                return Outcome::Done;
            }
            // The host gave an address that overlaps another or is no granule's: it cannot be taken back safely either.
            own.stage = Stage::Lost;
            self.stats.lost = self.stats.lost.wrapping_add(1);
            outcome = Outcome::Refused;
        } else {
            *own = Private { next: self.free, ..Private::default() };
            self.free = id;
            self.bytes = self.bytes.saturating_sub(request.range.len);
            self.entries = self.entries.saturating_sub(1);
        }
        self.hide(table, id, request.range);
        if ahead {
            // Nobody waits for it.
            self.ahead = self.ahead.saturating_sub(request.range.len);
            return Outcome::Done;
        }
        outcome
    }

    /// Undoes the call: lines not sent are dropped, references given back.
    pub(super) fn fail(
        &mut self,
        table: &Table<'_>,
        call: &mut Call<'_>,
        list: &mut dyn List,
        failure: Failure,
    ) -> Step {
        if failure != Failure::Returning {
            self.stats.failures = self.stats.failures.wrapping_add(1);
        }
        self.drop_unsent(table, call);
        let count = list.count();
        table.release_list(list, count);
        Step::Failed(failure)
    }

    /// Drops the mappings of a batch that was never sent, and takes its evictions back: those windows are still mapped.
    fn drop_unsent(&mut self, table: &Table<'_>, call: &mut Call<'_>) {
        self.forget(call);
        while let Some(request) = call.take_last() {
            if request.unmap {
                self.reopen(table, request);
            } else {
                self.settle_map(table, Request { outcome: Outcome::Refused, ..request });
            }
        }
    }

    fn reopen(&mut self, table: &Table<'_>, request: Request) {
        let id = request.window;
        let (Some(slot), Some(own)) = (table.slot(id), private(self.private, id)) else { return };
        *own = Private { handle: request.handle, ..Private::default() };
        let inserted = table.bus.insert(Range { start: slot.bus(), len: request.range.len }, id);
        debug_assert!(inserted, "nobody else takes the bus range of a window that was never unmapped");
        table.ram.set(request.range, id);
        self.ages.adopt(table, self.private, id);
        slot.publish();
    }
}
