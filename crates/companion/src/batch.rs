//! A batch, from the doorbell to the results.

use crate::core::{Asker, Core};
use crate::ram;
use outboard_abi::{ENTRY_BUS, ENTRY_BYTES, ENTRY_HANDLE, ENTRY_STATUS, Entry, MAX_BATCH, Op, Status};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use vm_memory::{Bytes, VolatileSlice};

/// Registers of a queue.
#[derive(Debug)]
pub(crate) struct Queue {
    base: AtomicU64,
    busy: AtomicBool,
    status: AtomicU32,
    failed: AtomicU32,
}

/// Entries of a batch, copied out of guest memory, and where they came from.
pub(crate) struct Batch {
    base: u64,
    entries: Vec<Entry>,
}

impl Default for Queue {
    fn default() -> Self {
        Self {
            base: AtomicU64::new(0),
            busy: AtomicBool::new(false),
            status: AtomicU32::new(Status::Ok.code()),
            failed: AtomicU32::new(0),
        }
    }
}

impl Queue {
    pub(crate) fn base(&self) -> u64 {
        self.base.load(Ordering::Acquire)
    }

    /// Sets the bits of `mask`.
    pub(crate) fn set_base(&self, mask: u64, value: u64) {
        let set = |base: u64| Some(base & !mask | value & mask);
        let _ = self.base.fetch_update(Ordering::AcqRel, Ordering::Acquire, set);
    }

    pub(crate) fn status(&self) -> u32 {
        if self.busy.load(Ordering::Acquire) {
            Status::Busy.code()
        } else {
            self.status.load(Ordering::Acquire)
        }
    }

    pub(crate) fn failed(&self) -> u32 {
        self.failed.load(Ordering::Acquire)
    }

    /// Takes the queue for a batch; `false` if one is under way.
    pub(crate) fn begin(&self) -> bool {
        self.busy.compare_exchange(false, true, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// The batch is done: gives the queue back.
    pub(crate) fn end(&self, (status, failed): (Status, u32)) {
        self.status.store(status.code(), Ordering::Release);
        self.failed.store(failed, Ordering::Release);
        self.busy.store(false, Ordering::Release);
    }

    /// As after power-on, but for a batch under way, which ends as it would.
    pub(crate) fn reset(&self) {
        self.base.store(0, Ordering::Release);
        self.status.store(Status::Ok.code(), Ordering::Release);
        self.failed.store(0, Ordering::Release);
    }
}

impl Batch {
    /// Copies `count` entries at `base` out of guest memory.
    ///
    /// # Errors
    /// [`Status::BadCount`], [`Status::Off`], [`Status::BadQueue`]: no entry is touched.
    pub(crate) fn take(core: &Core, base: u64, count: u32) -> Result<Self, Status> {
        if count == 0 || count > MAX_BATCH {
            return Err(Status::BadCount);
        }
        if core.register() == outboard_abi::STATE_OFF {
            return Err(Status::Off);
        }
        if !base.is_multiple_of(u64::from(ENTRY_BYTES)) {
            return Err(Status::BadQueue);
        }
        let bytes = ram::copy(core.ram(), base, u64::from(count) * u64::from(ENTRY_BYTES));
        let bytes = bytes.ok_or(Status::BadQueue)?;
        let (entries, _) = bytes.as_chunks();
        Ok(Self { base, entries: entries.iter().map(Entry::read).collect() })
    }

    /// Works through it and writes the results back; the first status that is not success, and how many are not.
    pub(crate) fn run(&self, core: &Core, later: bool) -> (Status, u32) {
        let len = self.entries.len() as u64 * u64::from(ENTRY_BYTES);
        // Taken from the same place before, and RAM does not go away.
        let Some(results) = ram::slice(core.ram(), self.base, len) else { return (Status::BadQueue, 0) };
        let (mut first, mut failed) = (Status::Ok, 0);
        for (index, entry) in self.entries.iter().enumerate() {
            let status = run_entry(core, entry, later, &results, index * ENTRY_BYTES as usize);
            if status != Status::Ok {
                failed += 1;
                first = if first == Status::Ok { status } else { first };
            }
        }
        (first, failed)
    }
}

/// Does what `entry` asks for and writes its result at `at` of the batch: the status last, so that a guest that sees it sees the rest.
fn run_entry(core: &Core, entry: &Entry, later: bool, results: &VolatileSlice<'_>, at: usize) -> Status {
    let mapped = match Op::from_code(entry.op) {
        _ if entry.flags != 0 => Err(Status::Unknown),
        None => Err(Status::Unknown),
        Some(Op::Map) if later => Err(Status::NotLater),
        Some(Op::Map) => core.map(entry.address, entry.len, Asker::Own).map(Some),
        Some(Op::Unmap) => core.unmap(entry.handle, Asker::Own).map(|()| None),
    };
    let put = |value: u64, offset: u32| {
        // Within the batch, which is aligned; the guest's own memory takes whatever is written.
        let _ = results.store(value.to_le(), at + offset as usize, Ordering::Relaxed);
    };
    if let Ok(Some(mapped)) = mapped {
        put(mapped.handle, ENTRY_HANDLE);
        put(mapped.bus, ENTRY_BUS);
    }
    let status = mapped.err().unwrap_or(Status::Ok);
    if status != Status::Ok {
        core.stats.refused.fetch_add(1, Ordering::Relaxed);
    }
    let _ = results.store(status.code().to_le(), at + ENTRY_STATUS as usize, Ordering::Release);
    status
}
