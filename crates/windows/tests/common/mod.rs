//! A host that maps what it is asked to, checks it, and can be told to refuse; and storage on the heap.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU32, AtomicU64};

use outboard_windows::{
    Call, GRANULE, Limits, List, Outcome, Planner, Policy, Private, Range, Request, Slot, Step, Storage,
    Table,
};

/// Leaked storage: the table and planner of a test live as long as the test. Few `lines` make calls take several
/// exchanges.
pub fn create(
    limits: Limits,
    ram: &[Range],
    lines: usize,
) -> (Table<'static>, Planner<'static>, Call<'static>) {
    let (table, planner, mut calls) = create_for(limits, ram, lines, 1);
    (table, planner, calls.remove(0))
}

/// With several calls at a time.
pub fn create_for(
    limits: Limits,
    ram: &[Range],
    lines: usize,
    calls: u16,
) -> (Table<'static>, Planner<'static>, Vec<Call<'static>>) {
    fn leak<T: Default>(count: usize) -> &'static mut [T] {
        Box::leak((0..count).map(|_| T::default()).collect::<Vec<_>>().into_boxed_slice())
    }
    let bounds = Storage::bounds(limits, ram, lines * usize::from(calls)).expect("bounds");
    let storage = Storage {
        slots: leak::<Slot>(bounds.slots),
        private: leak::<Private>(bounds.slots),
        ram_map: leak::<AtomicU32>(bounds.ram_map),
        bus_keys: leak::<AtomicU64>(bounds.bus_keys),
        bus_map: leak::<AtomicU32>(bounds.bus_map),
    };
    let (table, planner) = Planner::create(storage, limits, Policy::default(), ram).expect("create");
    let calls = (0..calls).map(|id| Call::new(id, leak::<Request>(lines)).expect("enough lines"));
    (table, planner, calls.collect())
}

/// The host: hands out bus addresses in a shuffled manner, never overlapping.
#[derive(Default)]
pub struct Host {
    /// By handle: guest range and bus address.
    pub maps: HashMap<u64, (Range, u64)>,
    /// Bus address to handle.
    pub by_bus: BTreeMap<u64, u64>,
    pub next: u64,
    pub bytes: u64,
    /// What to answer to the n-th mapping from now; `Done` behind its end.
    pub script: Vec<Outcome>,
    pub exchanges: u64,
}

impl Host {
    pub fn exchange(&mut self, batch: &mut [Request], limits: Limits) {
        assert!(!batch.is_empty(), "an empty batch costs an exit for nothing");
        self.exchanges += 1;
        for line in batch {
            if line.unmap {
                let (range, bus) = self.maps.remove(&line.handle).expect("unmap of an unknown handle");
                assert_eq!(range, line.range);
                self.by_bus.remove(&bus);
                self.bytes -= range.len;
                line.outcome = Outcome::Done;
                continue;
            }
            assert_eq!((line.range.start % GRANULE, line.range.len % GRANULE), (0, 0));
            assert!(line.range.len > 0);
            line.outcome = self.script.pop().unwrap_or(Outcome::Done);
            if line.outcome == Outcome::Done {
                self.next += 1;
                line.handle = self.next;
                line.bus = self.place(line.range.len);
                self.maps.insert(line.handle, (line.range, line.bus));
                self.by_bus.insert(line.bus, line.handle);
                self.bytes += line.range.len;
                assert!(self.bytes <= limits.bytes, "the byte limit was probed");
                assert!(self.maps.len() <= limits.entries as usize, "the entry limit was probed");
            }
        }
    }

    /// First fit from 2 GiB up.
    fn place(&self, len: u64) -> u64 {
        let mut at = 0x8000_0000;
        for (bus, handle) in &self.by_bus {
            if at + len <= *bus {
                break;
            }
            at = bus + self.maps[handle].0.len;
        }
        at
    }

    /// Guest address behind a bus range, which must lie in one mapping.
    pub fn translate(&self, bus: u64, len: u64) -> Option<u64> {
        let (start, handle) = self.by_bus.range(..=bus).next_back()?;
        let (range, _) = self.maps[handle];
        (bus + len <= start + range.len).then(|| range.start + (bus - start))
    }
}

/// One whole call, as the glue makes it.
pub fn map(
    table: &Table<'_>,
    planner: &mut Planner<'_>,
    call: &mut Call<'_>,
    host: &mut Host,
    limits: Limits,
    list: &mut dyn List,
) -> Step {
    if table.hit_list(list) {
        return Step::Done;
    }
    let mut step = planner.begin(table, call, list);
    let mut exchanges = 0;
    while step == Step::Ask {
        exchanges += 1;
        assert!(exchanges < 10_000, "a call must come to an end");
        host.exchange(call.batch(), limits);
        step = planner.resume(table, call, list);
    }
    step
}
