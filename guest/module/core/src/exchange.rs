//! A batch of the planner as the DMA device takes it, and its answers.

use outboard_abi::{ENTRY_BYTES, Entry, Op, Status};
use outboard_windows::{Outcome, Request};

/// An entry as it stands in the queue.
pub type Raw = [u8; ENTRY_BYTES as usize];

/// Written into each entry's status before the device sees it: no answer.
const NO_ANSWER: u32 = u32::MAX;

/// The DMA device as this code needs it: one queue.
pub trait Device {
    /// Puts an entry into the queue.
    fn put(&mut self, index: u32, entry: Raw);
    /// Reads an entry of the queue.
    fn get(&mut self, index: u32) -> Raw;
    /// Has the device work through the first `count` entries. When this returns, it has.
    fn ring(&mut self, count: u32);
    /// The status of the last batch as a whole. An exit of its own, so it is asked only where the entries do not say.
    fn status(&mut self) -> u32;
}

/// What was asked and answered since the beginning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Counts {
    /// Times the device was rung: exits to the host.
    pub rings: u64,
    /// Entries sent.
    pub entries: u64,
    /// Entries refused for want of bytes, of entries or of one piece.
    pub no_space: u64,
    /// Entries refused because addresses that were given back are not free again yet: a Mac's IOMMU keeps them for a while (dart-and-dma 3.1).
    pub returning: u64,
    /// Entries refused for other reasons.
    pub refused: u64,
    /// Code of the last refusal ([`Status`], or all ones for no answer).
    pub last_refusal: u64,
}

impl Counts {
    /// Adds what an exchange counted.
    pub fn add(&mut self, more: Counts) {
        self.rings = self.rings.wrapping_add(more.rings);
        self.entries = self.entries.wrapping_add(more.entries);
        self.no_space = self.no_space.wrapping_add(more.no_space);
        self.returning = self.returning.wrapping_add(more.returning);
        self.refused = self.refused.wrapping_add(more.refused);
        if more.last_refusal != 0 {
            self.last_refusal = more.last_refusal;
        }
    }
}

/// Sends `batch` to the device and notes the outcomes in it.
pub fn exchange(device: &mut impl Device, batch: &mut [Request]) -> Counts {
    let count = put(device, batch);
    if count != 0 {
        device.ring(count);
    }
    receive_all(device, batch)
}

/// Puts `batch` into the queue; the number of entries.
pub fn put(device: &mut impl Device, batch: &[Request]) -> u32 {
    let mut count = 0u32;
    for line in batch.iter() {
        device.put(count, encode(line).bytes());
        count = count.saturating_add(1);
    }
    count
}

/// Notes the device's answers to `batch`, which it has worked through.
pub fn receive_all(device: &mut impl Device, batch: &mut [Request]) -> Counts {
    let entries = batch.len() as u64;
    let mut counts = Counts { rings: u64::from(entries != 0), entries, ..Counts::default() };
    for (index, line) in (0u32..).zip(batch.iter_mut()) {
        let entry = Entry::read(&device.get(index));
        receive(device, line, entry, &mut counts);
    }
    counts
}

fn encode(line: &Request) -> Entry {
    if line.unmap {
        Entry { op: Op::Unmap.code(), handle: line.handle, status: NO_ANSWER, ..Entry::default() }
    } else {
        let (address, len) = (line.range.start, line.range.len);
        Entry { op: Op::Map.code(), address, len, status: NO_ANSWER, ..Entry::default() }
    }
}

/// Notes the device's answer to `line`.
fn receive(device: &mut impl Device, line: &mut Request, entry: Entry, counts: &mut Counts) {
    let code = if entry.status == NO_ANSWER { whole_batch(device) } else { entry.status };
    line.outcome = outcome(code);
    let count = match line.outcome {
        Outcome::Done if line.unmap => return,
        Outcome::Done => {
            (line.bus, line.handle) = (entry.bus, entry.handle);
            return;
        }
        Outcome::Returning => &mut counts.returning,
        Outcome::NoSpace => &mut counts.no_space,
        Outcome::Open | Outcome::Refused => &mut counts.refused,
    };
    *count = count.wrapping_add(1);
    counts.last_refusal = u64::from(code);
}

/// Why the batch as a whole was not looked at; never success.
fn whole_batch(device: &mut impl Device) -> u32 {
    match device.status() {
        code if code == Status::Ok.code() => NO_ANSWER,
        code => code,
    }
}

fn outcome(code: u32) -> Outcome {
    match Status::from_code(code) {
        Some(Status::Ok) => Outcome::Done,
        Some(Status::Returning) => Outcome::Returning,
        Some(Status::OutOfBytes | Status::OutOfEntries | Status::Fragmented) => Outcome::NoSpace,
        _ => Outcome::Refused,
    }
}
