//! The kernel's `dma:*` trace events, as calls of a device.
//!
//! What the events leave out is filled in: scatterlists beyond 128 entries are cut when mapped, but not when unmapped, so tails come
//! from there, one 4 KiB page an entry (unless the list is so long that the kernel does not record its unmapping either; then it is
//! said); `dma_alloc` gives no physical address, so its bus address stands in (the same where no IOMMU translates).

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use crate::event::{Event, Happened, List, PAGE};
use crate::read::ReadError;
use crate::trace::{Segment, Trace};

/// Entries beyond which the kernel may not record the unmapping of a list: an event must fit into a page of its ring buffer (seen with
/// Linux 6.18: 479 were there, 512 were not, also with larger pages).
const UNSEEN: u64 = 479;
/// Time may run back by so many microseconds between lines: clocks of several CPUs differ by less, recordings by more.
pub(crate) const BACK: u64 = 1_000_000;

/// Events read so far, by device.
#[derive(Default)]
pub(crate) struct Events {
    devices: BTreeMap<String, Vec<(u64, Event)>>,
    latest: u64,
}

#[derive(Default)]
struct Device {
    /// Time and segments of each map call; an unmap call has the index of its map call instead.
    calls: Vec<(u64, Result<Vec<Segment>, usize>)>,
    /// Live single mappings by bus address and size, live lists by physical address of their first entry.
    singles: HashMap<(u64, u64), Vec<usize>>,
    lists: HashMap<u64, Vec<usize>>,
    /// Entries that each list has beyond those known.
    missing: BTreeMap<usize, u64>,
    /// Known pages of lists whose unmapping may not be seen.
    unseen: HashMap<u64, usize>,
    estimated: u64,
    unmatched: u64,
    allocated: u64,
    /// A bus address was not the physical one.
    is_translated: bool,
}

impl Events {
    /// Takes an event.
    ///
    /// # Errors
    /// Time runs back as it does between two recordings.
    pub(crate) fn add(&mut self, happened: Happened<'_>) -> Result<(), String> {
        check_time(happened.at, self.latest)?;
        self.latest = self.latest.max(happened.at);
        let Some(event) = happened.event else { return Ok(()) };
        match self.devices.get_mut(happened.device) {
            Some(events) => events.push((happened.at, event)),
            None => drop(self.devices.insert(happened.device.to_owned(), vec![(happened.at, event)])),
        }
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.devices.is_empty()
    }

    /// The trace of `device`, or of the only one.
    pub(crate) fn finish(self, path: &Path, name: String, device: Option<&str>) -> Result<Trace, ReadError> {
        let mut devices: BTreeMap<String, Device> =
            self.devices.into_iter().map(|(name, events)| (name, Device::of(events))).collect();
        let chosen = match device {
            Some(device) => device.to_owned(),
            None if devices.len() > 1 => {
                return Err(ReadError::Devices { path: path.to_owned(), devices: names_of(&devices) });
            }
            None => devices.keys().next().cloned().unwrap_or_default(),
        };
        if devices.is_empty() {
            return Err(ReadError::Empty(path.to_owned()));
        }
        let Some(device) = devices.remove(&chosen) else {
            return Err(ReadError::NoDevice {
                path: path.to_owned(),
                device: chosen,
                devices: names_of(&devices),
            });
        };
        device.trace(path, name)
    }
}

/// Names and numbers of calls.
fn names_of(devices: &BTreeMap<String, Device>) -> String {
    let each = devices.iter().map(|(name, device)| format!("{name} ({})", device.calls.len()));
    each.collect::<Vec<_>>().join(", ")
}

/// Time moves on, but for what the clocks of CPUs differ by.
pub(crate) fn check_time(at: u64, latest: u64) -> Result<(), String> {
    match latest.checked_sub(at) {
        Some(back) if back > BACK => Err(format!(
            "time runs back by {:.1} s: are these two recordings in one file, or CPUs' files one behind the other? Replay each recording by \
             itself",
            back as f64 / 1e6
        )),
        _ => Ok(()),
    }
}

impl Device {
    fn of(mut events: Vec<(u64, Event)>) -> Self {
        // Stable: what has the same time stays in order.
        events.sort_by_key(|(at, _)| *at);
        let mut device = Self::default();
        for (at, event) in events {
            match event {
                Event::Map { segment, bus, size } => {
                    device.is_translated |= segment.start != bus;
                    device.map(at, segment, bus, size);
                }
                Event::Alloc { segment } => {
                    device.allocated += 1;
                    device.map(at, segment, segment.start, segment.len);
                }
                Event::Unmap { bus, size } => device.unmap(at, bus, size),
                Event::MapList(list) => device.map_list(at, list),
                Event::UnmapList(starts) => device.unmap_list(at, &starts),
            }
        }
        device
    }

    fn trace(self, path: &Path, name: String) -> Result<Trace, ReadError> {
        if self.calls.is_empty() && self.unmatched != 0 {
            return Err(ReadError::NothingMapped { path: path.to_owned(), unmapped: self.unmatched });
        }
        let mut trace = Trace::new(name);
        trace.gaps.missing = self.missing.values().fold(0, |sum, missing| sum.saturating_add(*missing));
        trace.gaps.estimated = self.estimated;
        trace.gaps.unmatched = self.unmatched;
        trace.gaps.misplaced = if self.is_translated { self.allocated } else { 0 };
        for (at, call) in self.calls {
            // Calls keep their indices: nothing else is put into the trace.
            match call {
                Ok(segments) => {
                    trace.map(at, segments);
                }
                Err(index) => trace.unmap(at, index),
            }
        }
        Ok(trace)
    }

    fn map(&mut self, at: u64, segment: Segment, bus: u64, size: u64) {
        self.must_be_gone(at, segment.start);
        self.singles.entry((bus, size)).or_default().push(self.calls.len());
        self.calls.push((at, Ok(vec![segment])));
    }

    /// An unmapping of something mapped before the recording began is counted, and no more.
    fn unmap(&mut self, at: u64, bus: u64, size: u64) {
        match self.singles.get_mut(&(bus, size)).and_then(Vec::pop) {
            Some(index) => self.calls.push((at, Err(index))),
            None => self.unmatched += 1,
        }
    }

    /// Whoever maps a page of a list again has unmapped the list, if the kernel could not say so.
    fn must_be_gone(&mut self, at: u64, start: u64) {
        if let Some(index) = self.unseen.remove(&start) {
            self.unseen.retain(|_, other| *other != index);
            self.lists.values_mut().for_each(|live| live.retain(|other| *other != index));
            self.calls.push((at, Err(index)));
        }
    }

    fn map_list(&mut self, at: u64, list: List) {
        let Some(first) = list.segments.first().map(|first| first.start) else { return };
        if !self.unseen.is_empty() {
            list.segments.iter().for_each(|segment| self.must_be_gone(at, segment.start));
        }
        let known = list.segments.len() as u64;
        if list.full > known {
            self.missing.insert(self.calls.len(), list.full - known);
            if list.full > UNSEEN {
                let starts = list.segments.iter().map(|segment| segment.start);
                self.unseen.extend(starts.map(|start| (start, self.calls.len())));
            }
        }
        if list.estimated {
            self.estimated = self.estimated.saturating_add(known);
        }
        self.lists.entry(first).or_default().push(self.calls.len());
        self.calls.push((at, Ok(list.segments)));
    }

    fn unmap_list(&mut self, at: u64, starts: &[u64]) {
        let Some(index) = self.live_list(starts) else {
            self.unmatched += 1;
            return;
        };
        self.missing.remove(&index);
        self.unseen.retain(|_, other| *other != index);
        if let Some((_, Ok(segments))) = self.calls.get_mut(index) {
            let tail = starts.iter().skip(segments.len());
            segments.extend(tail.map(|start| Segment { start: *start, len: PAGE }));
        }
        self.calls.push((at, Err(index)));
    }

    /// Takes the list that begins with `starts` out of the live ones: its map call.
    fn live_list(&mut self, starts: &[u64]) -> Option<usize> {
        let live = self.lists.get_mut(starts.first()?)?;
        // Several live lists may begin with the same page: the youngest whose known entries agree.
        let agrees = |index: &usize| match self.calls.get(*index) {
            Some((_, Ok(segments))) => {
                segments.len() <= starts.len()
                    && segments.iter().zip(starts).all(|(s, start)| s.start == *start)
            }
            _ => false,
        };
        let place = live.iter().rposition(agrees)?;
        Some(live.remove(place))
    }
}
