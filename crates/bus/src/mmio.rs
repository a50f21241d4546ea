use crate::{Width, warn_limited};
use arc_swap::ArcSwap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Why a device did not serve an access. The bus turns each into all-ones or a dropped write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AccessError {
    /// No register at this offset.
    #[error("no register there")]
    NoRegister,
    /// The register does not take accesses of this width or alignment.
    #[error("width or alignment not supported by the register")]
    BadWidth,
    /// What is behind the device does not answer (a removed device, say).
    #[error("no response")]
    NoResponse,
}

/// A device with memory-mapped registers. Called from any vCPU thread, several at once: state needs its own lock.
pub trait MmioDevice: Send + Sync {
    /// Name for logs, such as `pl011` or `0000:00:01.0 bar0`.
    fn name(&self) -> &str;

    /// Reads `width` bytes at `offset` from the start of the device's range. The value's upper bits are ignored.
    ///
    /// # Errors
    /// [`AccessError`]; the guest then reads all-ones.
    fn read(&self, offset: u64, width: Width) -> Result<u64, AccessError>;

    /// Writes the low `width` bytes of `value` at `offset`; upper bits are zero.
    ///
    /// # Errors
    /// [`AccessError`]; the write is then dropped.
    fn write(&self, offset: u64, width: Width, value: u64) -> Result<(), AccessError>;
}

/// A range that cannot be added to the bus.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// It overlaps a device that is already there.
    #[error("MMIO range {start:#x}+{len:#x} overlaps {other}")]
    Overlap {
        /// First address of the refused range.
        start: u64,
        /// Its length in bytes.
        len: u64,
        /// The device that is there.
        other: String,
    },
    /// Empty, or it wraps around the end of the address space.
    #[error("MMIO range {start:#x}+{len:#x} is empty or wraps around")]
    BadRange {
        /// First address of the refused range.
        start: u64,
        /// Its length in bytes.
        len: u64,
    },
}

/// What the bus counted since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BusStats {
    /// Accesses to addresses where no device is.
    pub unmapped: u64,
    /// Accesses that a device refused.
    pub refused: u64,
}

struct Range {
    start: u64,
    /// Inclusive, so that a range may end at the top of the address space.
    last: u64,
    device: Arc<dyn MmioDevice>,
}

/// Finds the device behind a guest-physical address.
///
/// Readers take no lock: they work on an immutable snapshot that writers replace. A device removed while an access is
/// in flight is kept alive by the snapshot until that access returns; callers that need more than that (unmapping
/// hardware, say) must make the device itself refuse accesses first. Lock order: `update` is never held while a device is called.
pub struct MmioBus {
    ranges: ArcSwap<Vec<SharedRange>>,
    update: Mutex<()>,
    unmapped: AtomicU64,
    refused: AtomicU64,
}

type SharedRange = Arc<Range>;

impl Default for MmioBus {
    fn default() -> Self {
        Self::new()
    }
}

impl MmioBus {
    /// An empty bus.
    pub fn new() -> Self {
        Self {
            ranges: ArcSwap::from_pointee(Vec::new()),
            update: Mutex::new(()),
            unmapped: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        }
    }

    /// Puts `device` at guest-physical `start`, `len` bytes long.
    ///
    /// # Errors
    /// [`MapError`] if the range is empty, wraps or overlaps another device; the bus is unchanged then.
    pub fn insert(&self, start: u64, len: u64, device: Arc<dyn MmioDevice>) -> Result<(), MapError> {
        let last = match len.checked_sub(1).and_then(|l| start.checked_add(l)) {
            Some(last) => last,
            None => return Err(MapError::BadRange { start, len }),
        };
        let _guard = self.lock();
        let old = self.ranges.load();
        let at = old.partition_point(|r| r.last < start);
        if let Some(next) = old.get(at).filter(|r| r.start <= last) {
            return Err(MapError::Overlap { start, len, other: next.device.name().to_owned() });
        }
        let mut new = Vec::clone(&old);
        new.insert(at, Arc::new(Range { start, last, device }));
        self.ranges.store(Arc::new(new));
        Ok(())
    }

    /// Takes away the device whose range starts at `start`; `false` if there is none.
    pub fn remove(&self, start: u64) -> bool {
        let _guard = self.lock();
        let old = self.ranges.load();
        let Ok(at) = old.binary_search_by_key(&start, |r| r.start) else { return false };
        let mut new = Vec::clone(&old);
        new.remove(at);
        self.ranges.store(Arc::new(new));
        true
    }

    /// A vCPU's load of `width` bytes at guest-physical `address`: all-ones where nothing answers.
    pub fn read(&self, address: u64, width: Width) -> u64 {
        let ranges = self.ranges.load();
        let Some(range) = find(&ranges, address, width) else {
            self.unmapped.fetch_add(1, Ordering::Relaxed);
            warn_limited!("guest read {} bytes at {address:#x}, where no device is", width.bytes());
            return width.all_ones();
        };
        match range.device.read(address - range.start, width) {
            Ok(value) => width.truncate(value),
            Err(error) => {
                self.note_refusal("read", range, address, width, error);
                width.all_ones()
            }
        }
    }

    /// A vCPU's store of `width` bytes at guest-physical `address`: dropped where nothing answers.
    pub fn write(&self, address: u64, width: Width, value: u64) {
        let ranges = self.ranges.load();
        let Some(range) = find(&ranges, address, width) else {
            self.unmapped.fetch_add(1, Ordering::Relaxed);
            warn_limited!("guest wrote {} bytes at {address:#x}, where no device is", width.bytes());
            return;
        };
        if let Err(error) = range.device.write(address - range.start, width, width.truncate(value)) {
            self.note_refusal("write", range, address, width, error);
        }
    }

    /// What was counted since the bus was made.
    pub fn stats(&self) -> BusStats {
        BusStats {
            unmapped: self.unmapped.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
        }
    }

    fn note_refusal(&self, what: &str, range: &Range, address: u64, width: Width, error: AccessError) {
        self.refused.fetch_add(1, Ordering::Relaxed);
        let (name, offset) = (range.device.name(), address - range.start);
        warn_limited!("{name}: guest {what} of {} bytes at offset {offset:#x}: {error}", width.bytes());
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, ()> {
        // The lock guards no data of its own, so a panicked holder leaves nothing half done.
        self.update.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// The range that holds the whole access; one that straddles an end of a range belongs to no device.
fn find(ranges: &[SharedRange], address: u64, width: Width) -> Option<&Range> {
    let last = address.checked_add(width.bytes() - 1)?;
    let at = ranges.partition_point(|r| r.last < address);
    ranges.get(at).filter(|r| r.start <= address && last <= r.last).map(|r| &**r)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[derive(Default)]
    struct Cell(AtomicU64);

    impl MmioDevice for Cell {
        fn name(&self) -> &str {
            "cell"
        }
        fn read(&self, offset: u64, _: Width) -> Result<u64, AccessError> {
            if offset == 0 { Ok(self.0.load(Ordering::Relaxed)) } else { Err(AccessError::NoRegister) }
        }
        fn write(&self, offset: u64, _: Width, value: u64) -> Result<(), AccessError> {
            if offset != 0 {
                return Err(AccessError::NoRegister);
            }
            self.0.store(value, Ordering::Relaxed);
            Ok(())
        }
    }

    fn bus_with_cell() -> MmioBus {
        let bus = MmioBus::new();
        bus.insert(0x1000, 0x10, Arc::new(Cell::default())).unwrap();
        bus
    }

    #[test]
    fn reaches_the_device_with_truncated_values() {
        let bus = bus_with_cell();
        bus.write(0x1000, Width::B2, 0xabcd_1234);
        assert_eq!(bus.read(0x1000, Width::B4), 0x1234);
        assert_eq!(bus.read(0x1000, Width::B1), 0x34);
        assert_eq!(bus.stats(), BusStats::default());
    }

    #[test]
    fn unmapped_and_refused_accesses_read_all_ones_and_are_counted() {
        let bus = bus_with_cell();
        assert_eq!(bus.read(0x0fff, Width::B1), 0xff);
        assert_eq!(bus.read(0x100c, Width::B8), u64::MAX, "straddles the end of the device");
        assert_eq!(bus.read(u64::MAX, Width::B8), u64::MAX, "wraps around");
        bus.write(0x2000, Width::B4, 1);
        assert_eq!(bus.read(0x1004, Width::B4), 0xffff_ffff);
        bus.write(0x1004, Width::B4, 1);
        assert_eq!(bus.stats(), BusStats { unmapped: 4, refused: 2 });
    }

    #[test]
    fn refuses_overlaps_and_bad_ranges() {
        let bus = bus_with_cell();
        for (start, len) in [(0x1000, 0x10), (0x0fff, 2), (0x100f, 1), (0x0, 0x2000)] {
            let result = bus.insert(start, len, Arc::new(Cell::default()));
            assert!(matches!(result, Err(MapError::Overlap { .. })), "{start:#x}+{len:#x}");
        }
        for (start, len) in [(0x5000, 0), (u64::MAX, 2)] {
            let result = bus.insert(start, len, Arc::new(Cell::default()));
            assert_eq!(result, Err(MapError::BadRange { start, len }));
        }
        bus.insert(u64::MAX, 1, Arc::new(Cell::default())).unwrap();
        bus.insert(0x1010, 8, Arc::new(Cell::default())).unwrap();
        bus.insert(0x0ff8, 8, Arc::new(Cell::default())).unwrap();
        assert_eq!(bus.read(0x1010, Width::B8), 0);
    }

    #[test]
    fn removed_devices_no_longer_answer() {
        let bus = bus_with_cell();
        assert!(!bus.remove(0x1001));
        assert!(bus.remove(0x1000));
        assert!(!bus.remove(0x1000));
        assert_eq!(bus.read(0x1000, Width::B4), 0xffff_ffff);
    }
}
