//! The kernel's `dma:*` trace events as text (`outboard record`, `trace_pipe`, `trace-cmd report`), Linux 6.12 and newer.
//!
//! The formats are those of `include/trace/events/dma.h`, 6.12 to 7.x. What it leaves out is filled in: scatterlists beyond 128
//! entries are cut when mapped, but not when unmapped, so tails come from there, one 4 KiB page an entry (unless
//! the list is so long that the kernel does not record its unmapping either; then it is said); `dma_alloc`
//! gives no physical address, so its bus address stands in (the same where no IOMMU translates).

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use crate::read::{ReadError, checked};
use crate::trace::{Segment, Trace};

const PAGE: u64 = 4096;
/// `DMA_MAPPING_ERROR`: the bus address of what could not be mapped.
const FAILED: u64 = u64::MAX;

/// Entries beyond which the kernel may not record the unmapping of a list: an event must fit into a page of its ring buffer (seen with
/// Linux 6.18: 479 were there, 512 were not, also with larger pages).
const UNSEEN: u64 = 479;

/// Events read so far, by device.
#[derive(Default)]
pub(crate) struct Events {
    devices: BTreeMap<String, Device>,
}

/// One device of several, made when first used.
struct Devices<'e> {
    all: &'e mut BTreeMap<String, Device>,
    name: &'e str,
}

impl Devices<'_> {
    fn get(&mut self) -> &mut Device {
        self.all.entry(self.name.to_owned()).or_default()
    }
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
}

impl Events {
    /// Takes one line; lines that are no `dma:*` event are passed over.
    pub(crate) fn line(&mut self, line: &str) -> Result<(), String> {
        let Some((head, rest)) = line.split_once(": dma_") else { return Ok(()) };
        let Some((event, rest)) = rest.split_once(':') else { return Ok(()) };
        let Some(at) = head.rsplit(' ').next().and_then(microseconds) else { return Ok(()) };
        let (name, fields) = rest.trim_start().split_once(' ').unwrap_or((rest, ""));
        let fields = Fields(fields);
        let bus_and_size = || Ok::<_, String>((fields.hex("dma_addr")?, fields.decimal("size")?));
        let mmio = fields.text("attrs").is_some_and(|attrs| attrs.contains("MMIO"));
        let mut device = Devices { all: &mut self.devices, name };
        match event {
            // Device memory cannot be mapped through the windows (the guest module refuses it); it shows as
            // `map_resource` or by its attribute.
            "map_page" | "map_phys" if !mmio => match bus_and_size()? {
                (FAILED, _) => Ok(()),
                (bus, size) => device.get().single(at, fields.hex("phys_addr")?, bus, size),
            },
            "alloc" | "alloc_pages" => match bus_and_size()? {
                // So a failed allocation shows: in newer kernels by its bus address, in 6.12 only by its pointer.
                (0 | FAILED, _) => Ok(()),
                _ if fields.hex("virt_addr") == Ok(0) => Ok(()),
                (bus, size) => device.get().single(at, bus, bus, whole_pages(size)),
            },
            "free" | "free_pages" => {
                let (bus, size) = bus_and_size()?;
                device.get().unmap_single(at, bus, whole_pages(size));
                Ok(())
            }
            "unmap_page" | "unmap_phys" => {
                let (bus, size) = bus_and_size()?;
                device.get().unmap_single(at, bus, size);
                Ok(())
            }
            "map_sg" => {
                let (starts, sizes) = (fields.array("phys_addrs")?, fields.array("sizes")?);
                let full = fields.text("nents").and_then(|nents| nents.split_once('/')?.1.parse().ok());
                device.get().list(at, &starts, &sizes, full)
            }
            // The size is the whole list's: entries share it.
            "alloc_sgt" => {
                device.get().list(at, &fields.array("phys_addrs")?, &[fields.decimal("size")?], None)
            }
            "free_sgt" | "unmap_sg" => device.get().unmap_list(at, &fields.array("phys_addrs")?),
            _ => Ok(()),
        }
    }

    /// The trace of `device`, or of the only one.
    pub(crate) fn finish(
        mut self,
        path: &Path,
        name: String,
        device: Option<&str>,
    ) -> Result<Trace, ReadError> {
        let names = || {
            let each = self.devices.iter().map(|(name, device)| format!("{name} ({})", device.calls.len()));
            each.collect::<Vec<_>>().join(", ")
        };
        let chosen = match device {
            Some(device) if !self.devices.contains_key(device) => {
                return Err(ReadError::NoDevice {
                    path: path.to_owned(),
                    device: device.to_owned(),
                    devices: names(),
                });
            }
            Some(device) => device.to_owned(),
            None if self.devices.len() > 1 => {
                return Err(ReadError::Devices { path: path.to_owned(), devices: names() });
            }
            None => match self.devices.keys().next() {
                Some(only) => only.clone(),
                None => return Err(ReadError::Empty(path.to_owned())),
            },
        };
        let mut trace = Trace::new(name);
        let chosen = self.devices.remove(&chosen).unwrap_or_default();
        trace.missing = chosen.missing.values().fold(0, |sum, missing| sum.saturating_add(*missing));
        for (at, call) in chosen.calls {
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
}

impl Device {
    fn single(&mut self, at: u64, start: u64, bus: u64, size: u64) -> Result<(), String> {
        let segment = checked(start, size)?;
        self.must_be_gone(at, start);
        self.singles.entry((bus, size)).or_default().push(self.calls.len());
        self.calls.push((at, Ok(vec![segment])));
        Ok(())
    }

    /// An unmapping of something mapped before the recording began is passed over.
    fn unmap_single(&mut self, at: u64, bus: u64, size: u64) {
        if let Some(index) = self.singles.get_mut(&(bus, size)).and_then(Vec::pop) {
            self.calls.push((at, Err(index)));
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

    /// `full` is how many entries the list really has.
    fn list(&mut self, at: u64, starts: &[u64], sizes: &[u64], full: Option<u64>) -> Result<(), String> {
        let Some(&first) = starts.first() else { return Ok(()) };
        if !self.unseen.is_empty() {
            starts.iter().for_each(|start| self.must_be_gone(at, *start));
        }
        if let Some(full) = full.filter(|full| *full > starts.len() as u64) {
            self.missing.insert(self.calls.len(), full - starts.len() as u64);
            if full > UNSEEN {
                self.unseen.extend(starts.iter().map(|start| (*start, self.calls.len())));
            }
        }
        // An IOMMU merges entries on the bus; then sizes are those of its segments, and entries share them evenly.
        let total: u64 = sizes.iter().fold(0, |sum, size| sum.saturating_add(*size));
        let even = whole_pages(total / starts.len() as u64).max(PAGE);
        let size = |index: usize| match sizes.get(index) {
            Some(size) if sizes.len() == starts.len() => *size,
            _ => even,
        };
        let segments = starts.iter().enumerate().map(|(i, start)| checked(*start, size(i)));
        let segments = segments.collect::<Result<Vec<_>, _>>()?;
        self.lists.entry(first).or_default().push(self.calls.len());
        self.calls.push((at, Ok(segments)));
        Ok(())
    }

    fn unmap_list(&mut self, at: u64, starts: &[u64]) -> Result<(), String> {
        let Some(&first) = starts.first() else { return Ok(()) };
        let Some(live) = self.lists.get_mut(&first) else { return Ok(()) };
        // Several live lists may begin with the same page: the youngest whose known entries agree.
        let agrees = |index: &usize| match self.calls.get(*index) {
            Some((_, Ok(segments))) => {
                segments.len() <= starts.len()
                    && segments.iter().zip(starts).all(|(s, start)| s.start == *start)
            }
            _ => false,
        };
        let Some(place) = live.iter().rposition(agrees) else { return Ok(()) };
        let index = live.remove(place);
        self.missing.remove(&index);
        self.unseen.retain(|_, other| *other != index);
        if let Some((_, Ok(segments))) = self.calls.get_mut(index) {
            for start in starts.iter().skip(segments.len()) {
                segments.push(checked(*start, PAGE)?);
            }
        }
        self.calls.push((at, Err(index)));
        Ok(())
    }
}

/// `size` in whole pages; what is beyond every address stays so, and is refused as such.
fn whole_pages(size: u64) -> u64 {
    size.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX)
}

/// `seconds.fraction` of a trace line as microseconds.
fn microseconds(word: &str) -> Option<u64> {
    let (seconds, fraction) = word.split_once('.')?;
    let micros: u64 = format!("{fraction:0<6}").get(..6)?.parse().ok()?;
    seconds.parse::<u64>().ok()?.checked_mul(1_000_000)?.checked_add(micros)
}

/// `name=value` pairs.
struct Fields<'l>(&'l str);

impl<'l> Fields<'l> {
    fn text(&self, name: &str) -> Option<&'l str> {
        self.0.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    }

    fn need(&self, name: &str) -> Result<&'l str, String> {
        self.text(name).ok_or_else(|| format!("the event has no {name}"))
    }

    fn hex(&self, name: &str) -> Result<u64, String> {
        parse_hex(self.need(name)?).ok_or_else(|| format!("{name} is not a hexadecimal number"))
    }

    fn decimal(&self, name: &str) -> Result<u64, String> {
        self.need(name)?.parse().map_err(|_| format!("{name} is not a number"))
    }

    /// `{0x1,0x2}`, as the kernel prints arrays.
    fn array(&self, name: &str) -> Result<Vec<u64>, String> {
        let text = self.need(name)?;
        let inner = text.strip_prefix('{').and_then(|t| t.strip_suffix('}'));
        let inner = inner.ok_or_else(|| format!("{name} is not an array in braces"))?;
        if inner.is_empty() {
            return Ok(Vec::new());
        }
        inner.split(',').map(|word| parse_hex(word).ok_or_else(|| format!("{name}: {word:?}"))).collect()
    }
}

fn parse_hex(word: &str) -> Option<u64> {
    u64::from_str_radix(word.strip_prefix("0x").unwrap_or(word), 16).ok()
}
