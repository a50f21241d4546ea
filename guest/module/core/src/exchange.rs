//! A batch of the planner as the DMA device takes it, and its answers.

use outboard_abi::{ENTRY_BYTES, Entry, Op, Status};
use outboard_windows::{Outcome, Request};

/// An entry as it stands in the queue.
pub type Raw = [u8; ENTRY_BYTES as usize];

/// Times that a mapping is asked for again while addresses are on their way back, and microseconds between two of them. Together 24 ms: a
/// Mac's IOMMU keeps freed addresses for a while, how long is not known (dart-and-dma 3.1). It is waited for with interrupts off, so the planner
/// keeps a reserve to make this rare.
const RETURN_TRIES: u32 = 48;
const RETURN_PAUSE_US: u32 = 500;
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
    /// Waits, without sleeping.
    fn pause(&mut self, microseconds: u32);
}

/// What was asked and answered since the beginning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Counts {
    /// Times the device was rung: exits to the host.
    pub rings: u64,
    /// Of those, because addresses were on their way back.
    pub waits: u64,
    /// Entries sent.
    pub entries: u64,
    /// Entries refused for want of bytes, of entries, of one piece, or because addresses did not come back in time.
    pub no_space: u64,
    /// Entries refused for other reasons.
    pub refused: u64,
    /// Code of the last refusal ([`Status`], or all ones for no answer).
    pub last_refusal: u64,
}

/// Sends `batch` to the device and notes the outcomes in it.
pub fn exchange(device: &mut impl Device, batch: &mut [Request], counts: &mut Counts) {
    for line in batch.iter_mut() {
        line.outcome = Outcome::Open;
    }
    for attempt in 0..=RETURN_TRIES {
        let last = attempt == RETURN_TRIES;
        if attempt != 0 {
            device.pause(RETURN_PAUSE_US);
            counts.waits = counts.waits.wrapping_add(1);
        }
        let sent = send(device, batch);
        if sent == 0 {
            return;
        }
        counts.entries = counts.entries.wrapping_add(u64::from(sent));
        counts.rings = counts.rings.wrapping_add(1);
        device.ring(sent);
        if !receive(device, batch, last, counts) {
            return;
        }
    }
}

/// Puts the lines without an outcome into the queue; how many.
fn send(device: &mut impl Device, batch: &[Request]) -> u32 {
    let mut sent = 0u32;
    for line in batch.iter().filter(|line| line.outcome == Outcome::Open) {
        device.put(sent, encode(line).bytes());
        sent = sent.saturating_add(1);
    }
    sent
}

fn encode(line: &Request) -> Entry {
    if line.unmap {
        Entry { op: Op::Unmap.code(), handle: line.handle, status: NO_ANSWER, ..Entry::default() }
    } else {
        let (address, len) = (line.range.start, line.range.len);
        Entry { op: Op::Map.code(), address, len, status: NO_ANSWER, ..Entry::default() }
    }
}

/// Takes the answers to what [`send`] sent. Whether some of it is to be asked again.
fn receive(device: &mut impl Device, batch: &mut [Request], last: bool, counts: &mut Counts) -> bool {
    let (mut index, mut again) = (0u32, false);
    for line in batch.iter_mut().filter(|line| line.outcome == Outcome::Open) {
        let entry = Entry::read(&device.get(index));
        index = index.saturating_add(1);
        let code = if entry.status == NO_ANSWER { whole_batch(device) } else { entry.status };
        line.outcome = outcome(code);
        match line.outcome {
            Outcome::Done if !line.unmap => (line.bus, line.handle) = (entry.bus, entry.handle),
            Outcome::Done => {}
            // Not for what nobody waits for.
            _ if code == Status::Returning.code() && !last && !line.ahead => {
                line.outcome = Outcome::Open;
                again = true;
            }
            Outcome::NoSpace => counts.no_space = counts.no_space.wrapping_add(1),
            Outcome::Open | Outcome::Refused => counts.refused = counts.refused.wrapping_add(1),
        }
        if line.outcome != Outcome::Done {
            counts.last_refusal = u64::from(code);
        }
    }
    again
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
        Some(Status::OutOfBytes | Status::OutOfEntries | Status::Fragmented | Status::Returning) => {
            Outcome::NoSpace
        }
        _ => Outcome::Refused,
    }
}
