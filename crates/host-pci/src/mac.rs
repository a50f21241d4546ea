//! Bus addresses as a Mac gives them out, for domains that play one.

use crate::{BusAddress, DmaLimits, DmaUsage, Error, GRANULE, PciAddress, Release, Result};
use outboard_bus::error_limited;
use outboard_dart::{Config, ConfigError, Dart, MapError};
use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

/// A DART and the accounting that keeps it from ever being asked for more than it has.
#[derive(Debug)]
pub(crate) struct Mac {
    dart: Dart,
    limits: DmaLimits,
    /// Its clock starts here.
    began: Instant,
    /// Names in the DART, by bus address.
    handles: HashMap<u64, u64>,
    bytes: u64,
    /// Functions that may do DMA.
    masters: BTreeSet<PciAddress>,
    /// What has been reported of the DART's panics.
    reported: u64,
}

impl Mac {
    /// A DART with nothing mapped. `bytes` and `entries` are what the host can hold; the smaller of both limits binds.
    pub(crate) fn new(config: Config, bytes: u64, entries: u32) -> std::result::Result<Self, ConfigError> {
        let config =
            Config { bytes: config.bytes.min(bytes), entries: config.entries.min(entries), ..config };
        let address_bits = (u64::BITS - config.last.leading_zeros()) as u8;
        let limits =
            DmaLimits { bytes: config.bytes, entries: config.entries, granule: GRANULE, address_bits };
        Ok(Self {
            dart: Dart::new(config)?,
            limits,
            began: Instant::now(),
            handles: HashMap::new(),
            bytes: 0,
            masters: BTreeSet::new(),
            reported: 0,
        })
    }

    pub(crate) fn limits(&self) -> DmaLimits {
        self.limits
    }

    /// Finds a place for `len` bytes of host memory at `host`; both are whole granules.
    ///
    /// # Errors
    /// [`Error::OutOfEntries`], [`Error::OutOfBytes`], [`Error::Returning`], [`Error::Fragmented`], [`Error::Unaligned`].
    pub(crate) fn take(&mut self, host: u64, len: u64) -> Result<BusAddress> {
        let DmaLimits { bytes, entries, .. } = self.limits;
        if self.handles.len() >= entries as usize {
            return Err(Error::OutOfEntries { limit: entries });
        }
        if self.bytes.checked_add(len).is_none_or(|sum| sum > bytes) {
            return Err(Error::OutOfBytes { len, mapped: self.bytes, limit: bytes });
        }
        let now = self.now();
        let mapping = self.dart.map(now, host, len).map_err(|error| refused(&error, now));
        self.report();
        let mapping = mapping?;
        self.handles.insert(mapping.bus, mapping.handle);
        self.bytes += len;
        Ok(BusAddress(mapping.bus))
    }

    /// Gives the place back. It was taken with `len`.
    pub(crate) fn give(&mut self, address: BusAddress, len: u64, release: Release) {
        let Some(handle) = self.handles.remove(&address.0) else { return };
        self.bytes -= len;
        let now = self.now();
        if let Err(error) = self.dart.unmap(now, handle, release) {
            error_limited!("the model of the DART lost a mapping: {error}; this is a bug in Outboard");
        }
        self.report();
    }

    /// A function may do DMA from now on, or is silent: bus master off and drained, reset, or gone.
    pub(crate) fn set_master(&mut self, function: PciAddress, on: bool) {
        if on {
            self.masters.insert(function);
        } else {
            self.masters.remove(&function);
        }
        self.dart.set_device_active(!self.masters.is_empty());
    }

    pub(crate) fn usage(&self) -> DmaUsage {
        DmaUsage {
            bytes: self.bytes,
            entries: u32::try_from(self.handles.len()).unwrap_or(u32::MAX),
            mistakes: self.dart.panics(),
            first_mistake: self.dart.panicked().map(|panic| panic.to_string()),
        }
    }

    /// Notes an access of the device that nothing was mapped for.
    pub(crate) fn stray(&mut self, bus: u64, len: u64) {
        let _ = self.dart.access(bus, len);
        self.report();
    }

    /// Says it once for each new one, up to a few: whoever finds this in a log has found a bug.
    fn report(&mut self) {
        const MOST: u64 = 10;
        let panics = self.dart.panics();
        if panics > self.reported && self.reported < MOST {
            let first = self.dart.panicked().map(|panic| panic.to_string()).unwrap_or_default();
            tracing::error!(
                "would have panicked a Mac (number {panics}; the first: {first}); this is a bug in Outboard, please report it"
            );
        }
        self.reported = panics;
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

/// What a domain holds: `mac` says it if it plays one, otherwise `bytes` in `entries` mappings.
pub(crate) fn usage(mac: Option<&Mac>, bytes: u64, entries: usize) -> DmaUsage {
    let entries = u32::try_from(entries).unwrap_or(u32::MAX);
    mac.map_or(DmaUsage { bytes, entries, ..DmaUsage::default() }, Mac::usage)
}

fn refused(error: &MapError, now: u64) -> Error {
    match *error {
        MapError::Misaligned { start, len } => Error::Unaligned { what: format!("{start:#x}+{len:#x}") },
        MapError::Entries { limit } => Error::OutOfEntries { limit },
        MapError::Bytes { len, used, limit } => Error::OutOfBytes { len, mapped: used, limit },
        MapError::Returning { len, until } => {
            Error::Returning { len, until: Duration::from_micros(until.saturating_sub(now)) }
        }
        MapError::Fragmented { len, .. } => Error::Fragmented { len },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: Config = Config { bytes: 8 * GRANULE, entries: 3, return_delay: 0, ..Config::MAC };
    const NOBODY: PciAddress = PciAddress { segment: 0, bus: 0, device: 0, function: 0 };

    #[test]
    fn limits_are_kept_without_asking_for_more() {
        let mut mac = Mac::new(SMALL, u64::MAX, u32::MAX).unwrap();
        let whole = mac.take(0, 8 * GRANULE).unwrap();
        assert_eq!(whole.0, 0x8000_0000);
        assert!(matches!(mac.take(0, GRANULE), Err(Error::OutOfBytes { .. })));
        assert!(matches!(mac.take(0, !(GRANULE - 1)), Err(Error::OutOfBytes { .. })));
        mac.give(whole, 8 * GRANULE, Release::Driver);
        for _ in 0..3 {
            mac.take(0, GRANULE).unwrap();
        }
        assert!(matches!(mac.take(0, GRANULE), Err(Error::OutOfEntries { limit: 3 })));
        assert_eq!(mac.usage(), DmaUsage { bytes: 3 * GRANULE, entries: 3, ..DmaUsage::default() });
    }

    #[test]
    fn the_hosts_limits_bind_where_they_are_smaller() {
        let mac = Mac::new(Config::MAC, 24 << 20, 666).unwrap();
        assert_eq!(
            (mac.limits().bytes, mac.limits().entries, mac.limits().address_bits),
            (24 << 20, 666, 32)
        );
        assert!(Mac::new(Config { first: 1, ..Config::MAC }, u64::MAX, u32::MAX).is_err());
    }

    #[test]
    fn what_returns_and_what_is_in_pieces_are_told_apart() {
        let window = Config { last: 0x8000_0000 + 4 * GRANULE - 1, return_delay: u64::MAX, ..Config::MAC };
        let mut mac = Mac::new(Config { bytes: 16 * GRANULE, ..window }, u64::MAX, u32::MAX).unwrap();
        let all: Vec<_> = (0..4).map(|_| mac.take(0, GRANULE).unwrap()).collect();
        mac.give(all[0], GRANULE, Release::Driver);
        assert!(matches!(mac.take(0, GRANULE), Err(Error::Returning { .. })));
        mac.give(all[2], GRANULE, Release::Driver);
        assert!(matches!(mac.take(0, 2 * GRANULE), Err(Error::Fragmented { .. })));
        assert_eq!(mac.usage().mistakes, 0);
    }

    #[test]
    fn a_teardown_under_a_bus_master_is_a_mistake() {
        let mut mac = Mac::new(Config::MAC, u64::MAX, u32::MAX).unwrap();
        let at = mac.take(0, GRANULE).unwrap();
        mac.set_master(NOBODY, true);
        mac.give(at, GRANULE, Release::Driver);
        assert_eq!(mac.usage().mistakes, 0, "the driver's word counts");
        let at = mac.take(0, GRANULE).unwrap();
        mac.give(at, GRANULE, Release::TearDown);
        let usage = mac.usage();
        assert_eq!(usage.mistakes, 1);
        assert!(usage.first_mistake.unwrap().contains("torn down"));
        let at = mac.take(0, GRANULE).unwrap();
        mac.set_master(NOBODY, false);
        mac.give(at, GRANULE, Release::TearDown);
        assert_eq!(mac.usage().mistakes, 1);
    }
}
