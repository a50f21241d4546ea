//! A model of a Mac's IOMMU.
//!
//! A Mac maps for one device what fits a window of bus addresses (seen: 0x8000_0000 to 0xDFFF_FFFF), in at most about 64k
//! pieces, in units of 16 KiB, each as one contiguous segment at the first address where it fits. Nobody can ask for an
//! address or an alignment. What is unmapped is not free at once. Exhaustion may fail or may panic the whole machine, as
//! may several mistakes; the model notes these as [`Panic`] and tests treat any as failure. Every number and rule is from
//! `dart-and-dma.md`, sections 2.4 and 3.1 to 3.3.
//!
//! Time is the caller's, in microseconds, and must not run backwards.

mod space;

use std::collections::{BTreeMap, HashMap, VecDeque};

use space::Space;

/// Unit of mapping, bytes: a Mac's page.
pub const GRANULE: u64 = 16 << 10;

/// What one device's DART gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// First bus address of the window; a multiple of [`GRANULE`].
    pub first: u64,
    /// Last bus address of the window (inclusive); one less than a multiple of [`GRANULE`].
    pub last: u64,
    /// Most bytes mapped at a time; the window's size unless something else binds before (in the lab,
    /// RLIMIT_MEMLOCK).
    pub bytes: u64,
    /// Most mappings at a time.
    pub entries: u32,
    /// How long after its unmapping a range of addresses is free again, microseconds. macOS keeps freed ranges in a
    /// cache with a time to live (3.1); its length is not known, so this is an assumption.
    pub return_delay: u64,
}

impl Config {
    /// A Mac as far as it is known: 1.5 GiB, 65,536 entries; freed ranges return after 10 ms.
    pub const MAC: Config = Config {
        first: 0x8000_0000,
        last: 0xDFFF_FFFF,
        bytes: 0x6000_0000,
        entries: 65_536,
        return_delay: 10_000,
    };
}

/// A mapping that was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// Names it in [`Dart::unmap`]; never used twice.
    pub handle: u64,
    /// Bus address of its first byte. One segment of full length.
    pub bus: u64,
    /// Memory behind it, as given to [`Dart::map`].
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

/// Why [`Config`] cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "DART window {first:#x} to {last:#x} with {bytes} bytes in {entries} entries: needs whole granules of 16 KiB, \
         and limits above zero"
)]
pub struct ConfigError {
    first: u64,
    last: u64,
    bytes: u64,
    entries: u32,
}

/// Why a mapping was not made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// Memory address or length is not in whole granules, or the length is zero, or the end leaves the 64-bit space.
    #[error("memory {start:#x} + {len:#x} is not whole 16 KiB granules")]
    Misaligned {
        /// Memory address.
        start: u64,
        /// Bytes.
        len: u64,
    },
    /// All entries are in use.
    #[error("all {limit} entries are in use")]
    Entries {
        /// The limit.
        limit: u32,
    },
    /// The bytes in use and these exceed the limit.
    #[error("{len} bytes more than the {used} in use exceed the limit of {limit}")]
    Bytes {
        /// Asked for.
        len: u64,
        /// Mapped.
        used: u64,
        /// The limit.
        limit: u64,
    },
    /// It will fit once ranges already unmapped return; try again at `until`.
    #[error("no {len} bytes in one piece until unmapped ranges return")]
    Returning {
        /// Asked for.
        len: u64,
        /// When the next range returns, microseconds.
        until: u64,
    },
    /// Enough is free, but not in one piece.
    #[error("no {len} bytes in one piece: the largest of {holes} holes has {largest}")]
    Fragmented {
        /// Asked for.
        len: u64,
        /// Largest free piece, bytes.
        largest: u64,
        /// Number of free pieces.
        holes: usize,
    },
}

/// Why an unmapping was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no mapping has handle {0}")]
pub struct UnknownHandle(pub u64);

/// On whose word a mapping goes away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// The guest's driver released it: by the rules of its DMA interface the device no longer uses it.
    Driver,
    /// The host tears down: the device must be silent before (bus master off, transactions drained, function reset).
    TearDown,
}

/// A mistake that may take a whole Mac down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Panic {
    /// Torn down while the device was able to write (3.3).
    #[error("handle {handle} was torn down while the device may write")]
    UnmappedWhileActive {
        /// The mapping.
        handle: u64,
    },
    /// A device access hit an address without an entry (3.3: a panic on newer machines).
    #[error("the device accessed {bus:#x} + {len:#x}, which is not mapped")]
    StrayAccess {
        /// Bus address.
        bus: u64,
        /// Bytes.
        len: u64,
    },
    /// More was asked for than the limits allow, instead of staying below by own accounting (2.3, 3.1).
    #[error("a limit was probed: {0}")]
    LimitProbed(MapError),
    /// Device memory was mapped into a guest with execute permission (2.4).
    #[error("device memory was mapped executable")]
    ExecutableDevice,
}

/// What is in use and what is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Mapped bytes.
    pub bytes: u64,
    /// Mappings.
    pub entries: u32,
    /// Bytes unmapped but not returned yet.
    pub returning: u64,
    /// Free pieces of the window.
    pub holes: usize,
    /// Largest free piece, bytes.
    pub largest_hole: u64,
}

/// The model.
#[derive(Debug)]
pub struct Dart {
    config: Config,
    space: Space,
    mappings: HashMap<u64, Mapping>,
    by_bus: BTreeMap<u64, u64>,
    bytes: u64,
    /// Ranges (first, length) that return, by the time they do.
    returning: VecDeque<(u64, u64, u64)>,
    next_handle: u64,
    device_active: bool,
    panic: Option<Panic>,
    panics: u64,
}

impl Dart {
    /// An empty DART; the device is silent until [`Self::set_device_active`].
    ///
    /// # Errors
    /// [`ConfigError`] if the window is not whole granules or a limit is zero.
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        let Config { first, last, bytes, entries, .. } = config;
        let len = last.checked_sub(first).and_then(|len| len.checked_add(1));
        match len {
            Some(len)
                if first.is_multiple_of(GRANULE)
                    && len.is_multiple_of(GRANULE)
                    && bytes >= GRANULE
                    && entries > 0 =>
            {
                Ok(Self {
                    config,
                    space: Space::new(first, len),
                    mappings: HashMap::new(),
                    by_bus: BTreeMap::new(),
                    bytes: 0,
                    returning: VecDeque::new(),
                    next_handle: 1,
                    device_active: false,
                    panic: None,
                    panics: 0,
                })
            }
            _ => Err(ConfigError { first, last, bytes, entries }),
        }
    }

    /// Maps `len` bytes of memory at `start`, at the lowest bus address where they fit.
    ///
    /// # Errors
    /// See [`MapError`]. [`MapError::Entries`] and [`MapError::Bytes`] also note [`Panic::LimitProbed`].
    pub fn map(&mut self, now: u64, start: u64, len: u64) -> Result<Mapping, MapError> {
        self.return_ranges(now);
        let whole = start.is_multiple_of(GRANULE) && len.is_multiple_of(GRANULE);
        if len == 0 || !whole || start.checked_add(len).is_none() {
            return Err(MapError::Misaligned { start, len });
        }
        if self.mappings.len() >= self.config.entries as usize {
            return Err(self.probed(MapError::Entries { limit: self.config.entries }));
        }
        if self.bytes.checked_add(len).is_none_or(|sum| sum > self.config.bytes) {
            return Err(self.probed(MapError::Bytes { len, used: self.bytes, limit: self.config.bytes }));
        }
        let bus = self.space.take(len).ok_or_else(|| self.no_space(len))?;
        let mapping = Mapping { handle: self.next_handle, bus, start, len };
        self.next_handle += 1;
        self.bytes += len;
        self.by_bus.insert(bus, mapping.handle);
        self.mappings.insert(mapping.handle, mapping);
        Ok(mapping)
    }

    /// Takes a mapping down. Its addresses return after [`Config::return_delay`].
    ///
    /// # Errors
    /// [`UnknownHandle`] if there is no such mapping.
    pub fn unmap(&mut self, now: u64, handle: u64, release: Release) -> Result<Mapping, UnknownHandle> {
        self.return_ranges(now);
        let mapping = self.mappings.remove(&handle).ok_or(UnknownHandle(handle))?;
        if release == Release::TearDown && self.device_active {
            self.note(Panic::UnmappedWhileActive { handle });
        }
        self.by_bus.remove(&mapping.bus);
        self.bytes -= mapping.len;
        self.returning.push_back((now.saturating_add(self.config.return_delay), mapping.bus, mapping.len));
        self.return_ranges(now);
        Ok(mapping)
    }

    /// The memory address behind a device's access to `len` bytes at `bus`. The access may run over several mappings
    /// that are neighbours on the bus; the address of its first byte is given. `None` also notes
    /// [`Panic::StrayAccess`].
    pub fn access(&mut self, bus: u64, len: u64) -> Option<u64> {
        let found = self.translate(bus, len);
        if found.is_none() {
            self.note(Panic::StrayAccess { bus, len });
        }
        found
    }

    /// As [`Self::access`], without an access.
    pub fn translate(&self, bus: u64, len: u64) -> Option<u64> {
        let end = bus.checked_add(len)?;
        let first = self.mapping_at(bus)?;
        let mut reach = first.bus + first.len;
        while reach < end {
            let next = self.mapping_at(reach)?;
            reach = next.bus + next.len;
        }
        Some(first.start + (bus - first.bus))
    }

    fn mapping_at(&self, bus: u64) -> Option<&Mapping> {
        let (_, handle) = self.by_bus.range(..=bus).next_back()?;
        self.mappings.get(handle).filter(|mapping| bus - mapping.bus < mapping.len)
    }

    /// Whether the device may write: bus master is on, or transactions are pending.
    pub fn set_device_active(&mut self, active: bool) {
        self.device_active = active;
    }

    /// Notes that a BAR was mapped into a guest.
    pub fn note_device_mapping(&mut self, executable: bool) {
        if executable {
            self.note(Panic::ExecutableDevice);
        }
    }

    /// The first thing that would have panicked a Mac, if any did.
    pub fn panicked(&self) -> Option<Panic> {
        self.panic
    }

    /// How many times something would have panicked a Mac.
    pub fn panics(&self) -> u64 {
        self.panics
    }

    /// The configuration.
    pub fn config(&self) -> Config {
        self.config
    }

    /// What is in use and what is free at `now`.
    pub fn usage(&mut self, now: u64) -> Usage {
        self.return_ranges(now);
        Usage {
            bytes: self.bytes,
            entries: u32::try_from(self.mappings.len()).unwrap_or(u32::MAX),
            returning: self.returning.iter().map(|(_, _, len)| len).sum(),
            holes: self.space.holes(),
            largest_hole: self.space.largest(),
        }
    }

    /// All mappings, in no order.
    pub fn mappings(&self) -> impl Iterator<Item = &Mapping> {
        self.mappings.values()
    }

    fn return_ranges(&mut self, now: u64) {
        while let Some(&(due, first, len)) = self.returning.front() {
            if due > now {
                break;
            }
            self.returning.pop_front();
            self.space.give(first, len);
        }
    }

    fn no_space(&self, len: u64) -> MapError {
        if let Some(&(until, _, _)) = self.returning.front() {
            let mut later = self.space.clone();
            for &(_, first, len) in &self.returning {
                later.give(first, len);
            }
            if later.largest() >= len {
                return MapError::Returning { len, until };
            }
        }
        MapError::Fragmented { len, largest: self.space.largest(), holes: self.space.holes() }
    }

    fn probed(&mut self, error: MapError) -> MapError {
        self.note(Panic::LimitProbed(error));
        error
    }

    fn note(&mut self, panic: Panic) {
        self.panics += 1;
        self.panic.get_or_insert(panic);
    }
}

#[cfg(test)]
mod tests;
