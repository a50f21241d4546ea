//! The windows policy of the guest module, replayed.

use std::sync::atomic::{AtomicU32, AtomicU64};

use outboard_dart::MapError;
use outboard_windows::{
    Call, Failure, List, Outcome, Planner, Policy, Private, Range, Request, Segment as Entry, Slot, Step,
    Storage, StorageError, Table,
};

use crate::host::{Host, Limits};
use crate::replay::{Cause, Scheme};
use crate::trace::Segment;

/// Lines of a batch, as in the guest module: what one page of 64-byte entries and a few more hold.
const BATCH: usize = 256;

/// The memory a planner works in.
#[derive(Default)]
pub struct Memory {
    slots: Vec<Slot>,
    private: Vec<Private>,
    ram_map: Vec<AtomicU32>,
    bus_keys: Vec<AtomicU64>,
    bus_map: Vec<AtomicU32>,
    batch: Vec<Request>,
}

/// The policy between a trace and the DART.
pub struct Adaptive<'m> {
    table: Table<'m>,
    planner: Planner<'m>,
    /// One at a time: a trace is one after the other.
    call: Call<'m>,
    list: Vec<Entry>,
    refusal: Option<MapError>,
}

impl<'m> Adaptive<'m> {
    /// An empty table in `memory`, for guest RAM at `ram`.
    pub fn new(
        memory: &'m mut Memory,
        limits: Limits,
        policy: Policy,
        ram: &[Range],
    ) -> Result<Self, StorageError> {
        let limits = outboard_windows::Limits { bytes: limits.bytes, entries: limits.entries };
        let bounds = Storage::bounds(limits, ram, BATCH)?;
        fn fill<T: Default>(vec: &mut Vec<T>, count: usize) -> &mut [T] {
            vec.clear();
            vec.resize_with(count, T::default);
            vec
        }
        let storage = Storage {
            slots: fill(&mut memory.slots, bounds.slots),
            private: fill(&mut memory.private, bounds.slots),
            ram_map: fill(&mut memory.ram_map, bounds.ram_map),
            bus_keys: fill(&mut memory.bus_keys, bounds.bus_keys),
            bus_map: fill(&mut memory.bus_map, bounds.bus_map),
        };
        let (table, planner) = Planner::create(storage, limits, policy, ram)?;
        let call = Call::new(0, fill(&mut memory.batch, BATCH))?;
        Ok(Self { table, planner, call, list: Vec::new(), refusal: None })
    }

    fn exchange(&mut self, host: &mut Host) {
        host.round_trips += 1;
        for line in self.call.batch() {
            if line.unmap {
                host.unmap(line.handle);
                line.outcome = Outcome::Done;
                continue;
            }
            match host.map(line.range.start, line.range.len) {
                Ok(mapping) => {
                    (line.bus, line.handle, line.outcome) = (mapping.bus, mapping.handle, Outcome::Done);
                }
                Err(error) => {
                    line.outcome = Outcome::NoSpace;
                    self.refusal = Some(error);
                }
            }
        }
    }
}

impl Scheme for Adaptive<'_> {
    fn map(&mut self, host: &mut Host, segments: &[Segment], buses: &mut Vec<u64>) -> Result<(), Cause> {
        self.list.clear();
        self.list.extend(segments.iter().map(|segment| Entry::new(segment.start, segment.len)));
        let mut list = std::mem::take(&mut self.list);
        let mut step = Step::Done;
        if !self.table.hit_list(&mut list) {
            step = self.planner.begin(&self.table, &mut self.call, &mut list);
            while step == Step::Ask {
                self.exchange(host);
                step = self.planner.resume(&self.table, &mut self.call, &mut list);
            }
        }
        buses.extend((0..list.count()).map(|index| list.bus(index)));
        self.list = list;
        match step {
            Step::Failed(Failure::NoSpace) => {
                Err(self.refusal.take().map_or(Cause::Windows(Failure::NoSpace), Cause::Dart))
            }
            Step::Failed(failure) => Err(Cause::Windows(failure)),
            Step::Done | Step::Ask | Step::Wait => Ok(()),
        }
    }

    fn unmap(&mut self, _host: &mut Host, segments: &[Segment], buses: &[u64]) {
        for (segment, bus) in segments.iter().zip(buses) {
            let released = self.table.release(*bus, segment.len);
            assert!(released.is_ok(), "a replay releases what it mapped");
        }
    }

    fn mapped(&self) -> (u64, u32) {
        self.planner.mapped()
    }
}
