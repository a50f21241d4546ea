//! Idle windows by age. Only the planner touches this list.

use core::sync::atomic::Ordering;

use crate::Table;
use crate::slot::{LISTED, Private, Stage, State, UNQUEUED};

/// Doubly linked list through [`Private`], oldest first. Windows taken into use again stay on it until they come up.
#[derive(Debug, Default)]
pub(crate) struct AgeList {
    head: u32,
    tail: u32,
    len: u32,
}

pub(crate) fn private(all: &mut [Private], id: u32) -> Option<&mut Private> {
    all.get_mut(usize::try_from(id).ok()?.checked_sub(1)?)
}

impl AgeList {
    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    /// Inserts `id` before `before`, or at the young end if that is 0.
    fn insert(&mut self, all: &mut [Private], id: u32, before: u32, stamp: u32) {
        let prev = if before == 0 { self.tail } else { private(all, before).map_or(0, |p| p.prev) };
        if let Some(own) = private(all, id) {
            own.prev = prev;
            own.next = before;
            own.stamp = stamp;
            own.stage = Stage::Mapped { listed: true };
        }
        match private(all, prev) {
            Some(neighbour) => neighbour.next = id,
            None => self.head = id,
        }
        match private(all, before) {
            Some(neighbour) => neighbour.prev = id,
            None => self.tail = id,
        }
        self.len = self.len.saturating_add(1);
    }

    fn unlink(&mut self, all: &mut [Private], id: u32) {
        let Some(own) = private(all, id) else { return };
        let (prev, next) = (own.prev, own.next);
        own.stage = Stage::Mapped { listed: false };
        match private(all, prev) {
            Some(neighbour) => neighbour.next = next,
            None => self.head = next,
        }
        match private(all, next) {
            Some(neighbour) => neighbour.prev = prev,
            None => self.tail = prev,
        }
        self.len = self.len.saturating_sub(1);
    }

    /// Moves what fell idle since the last time from the shared stack to the list.
    pub(crate) fn collect(&mut self, table: &Table<'_>, all: &mut [Private]) {
        let mut id = table.idle.swap(0, Ordering::Acquire);
        // The stack has the youngest on top; each next one goes before it.
        let mut before = 0;
        while let Some(slot) = table.slot(id) {
            let next = slot.link.load(Ordering::Relaxed);
            let idle = slot.state() == State::IDLE;
            match private(all, id).map(|own| own.stage) {
                Some(Stage::Mapped { listed: false }) if idle => {
                    self.append(table, all, id, before);
                    before = id;
                }
                // Dead, or in use again. If it falls idle at this moment, `unqueue` puts it on the stack once more.
                _ => unqueue(table, id),
            }
            id = next;
        }
    }

    /// Lists a window not yet open for references, as the youngest. One that is still on the stack from an earlier life
    /// stays there: `collect` lists it.
    pub(crate) fn adopt(&mut self, table: &Table<'_>, all: &mut [Private], id: u32) {
        let Some(slot) = table.slot(id) else { return };
        if slot.link.load(Ordering::SeqCst) == UNQUEUED {
            self.append(table, all, id, 0);
        } else if let Some(own) = private(all, id) {
            own.stage = Stage::Mapped { listed: false };
        }
    }

    fn append(&mut self, table: &Table<'_>, all: &mut [Private], id: u32, before: u32) {
        let Some(slot) = table.slot(id) else { return };
        slot.link.store(LISTED, Ordering::SeqCst);
        self.insert(all, id, before, slot.stamp.load(Ordering::Relaxed));
    }

    /// Kills and unlinks the window that has been idle longest; its id.
    ///
    /// Each step unlinks a window or gives one that was used meanwhile its place among the young, so the work is paid for
    /// by the releases that put it on the list.
    pub(crate) fn evict(&mut self, table: &Table<'_>, all: &mut [Private]) -> Option<u32> {
        for _ in 0..self.len {
            let id = self.head;
            let slot = table.slot(id)?;
            let listed_at = private(all, id)?.stamp;
            self.unlink(all, id);
            let stamp = slot.stamp.load(Ordering::Relaxed);
            if slot.state() == State::IDLE && stamp != listed_at {
                self.insert(all, id, 0, stamp);
            } else if slot.kill() {
                slot.link.store(UNQUEUED, Ordering::SeqCst);
                return Some(id);
            } else {
                unqueue(table, id);
            }
        }
        None
    }

    /// Kills the given window if it is idle; true if so.
    pub(crate) fn evict_this(&mut self, table: &Table<'_>, all: &mut [Private], id: u32) -> bool {
        let Some(slot) = table.slot(id) else { return false };
        if !slot.kill() {
            return false;
        }
        if private(all, id).is_some_and(|own| own.stage == Stage::Mapped { listed: true }) {
            self.unlink(all, id);
            slot.link.store(UNQUEUED, Ordering::SeqCst);
        }
        // Else it is on the shared stack, or about to be; `collect` takes it off there.
        true
    }
}

/// Lets a window that is in use again be queued when it next falls idle, or queues it if that happened meanwhile.
fn unqueue(table: &Table<'_>, id: u32) {
    let Some(slot) = table.slot(id) else { return };
    slot.link.store(UNQUEUED, Ordering::SeqCst);
    if slot.state() == State::IDLE {
        table.went_idle(id, slot);
    }
}
