//! The host side of a replay: the DART model, its clock, and the counts.

use outboard_dart::{Config, ConfigError, Dart, MapError, Mapping, Release};

/// What a replay is held to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes mapped at a time.
    pub bytes: u64,
    /// Mappings at a time.
    pub entries: u32,
}

impl Limits {
    /// A Mac's: 1.5 GiB, 65,536 entries (dart-and-dma 3.1).
    pub const MAC: Limits = Limits { bytes: Config::MAC.bytes, entries: Config::MAC.entries };
}

/// A DART and what was asked of it.
#[derive(Debug)]
pub struct Host {
    dart: Dart,
    now: u64,
    /// Mappings and unmappings asked for.
    pub calls: u64,
    /// Times the guest left for the host.
    pub round_trips: u64,
    /// Microseconds that the host waited for unmapped ranges to return.
    pub waited: u64,
}

impl Host {
    /// An empty DART. The byte limit is one on bytes; the window in which they must find places is a Mac's, or as large
    /// as a byte limit above that.
    ///
    /// # Errors
    /// [`ConfigError`] for limits of zero.
    pub fn new(limits: Limits) -> Result<Self, ConfigError> {
        let mac = Config::MAC;
        let whole = limits.bytes & !(outboard_dart::GRANULE - 1);
        let last = mac.last.max(mac.first.saturating_add(whole).saturating_sub(1));
        let config = Config { last, bytes: whole, entries: limits.entries, ..mac };
        Ok(Self { dart: Dart::new(config)?, now: 0, calls: 0, round_trips: 0, waited: 0 })
    }

    /// Moves the clock on to `at` microseconds.
    pub fn advance(&mut self, at: u64) {
        self.now = self.now.max(at);
    }

    /// Maps, waiting for unmapped ranges to return where they are what is missing.
    pub fn map(&mut self, start: u64, len: u64) -> Result<Mapping, MapError> {
        self.calls += 1;
        loop {
            match self.dart.map(self.now, start, len) {
                Err(MapError::Returning { until, .. }) if until > self.now => {
                    self.waited += until - self.now;
                    self.now = until;
                }
                other => return other,
            }
        }
    }

    /// Unmaps what [`Self::map`] gave.
    pub fn unmap(&mut self, handle: u64) {
        self.calls += 1;
        let unmapped = self.dart.unmap(self.now, handle, Release::Driver);
        assert!(unmapped.is_ok(), "a policy unmaps what it mapped");
    }

    /// The model.
    pub fn dart(&self) -> &Dart {
        &self.dart
    }

    /// What is in use and what is free now.
    pub fn usage(&mut self) -> outboard_dart::Usage {
        self.dart.usage(self.now)
    }
}
