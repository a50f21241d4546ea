//! An IOMMU that checks every access.

#![allow(unsafe_code)] // UNSAFETY: copies to and from memory that the caller of `map` promised to keep.

use super::faults::{Fault, Faults, Operation};
use crate::mac::{self, Mac};
use crate::{
    BusAddress, DmaDomain, DmaLimits, DmaUsage, Error, GRANULE, PciAddress, Release, Result, check_granule,
};
use outboard_dart::{Config, ConfigError};
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A domain for simulated devices: at the guest's own addresses, or at a DART's.
#[derive(Debug)]
pub struct SimulatedDomain {
    limits: DmaLimits,
    mapped: Mutex<Mapped>,
    stray: AtomicU64,
    faults: Faults,
}

#[derive(Debug, Default)]
struct Mapped {
    /// Host address and length by bus address.
    pieces: BTreeMap<u64, (NonNull<u8>, u64)>,
    bytes: u64,
    /// Chooses the addresses; without it they are the guest's.
    mac: Option<Mac>,
}

// SAFETY: the addresses stand for memory that whoever mapped it lets the device, on whatever thread, reach.
unsafe impl Send for Mapped {}

/// An access that nothing was mapped for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stray DMA at {0:#x}")]
pub(super) struct Stray(pub(super) u64);

impl SimulatedDomain {
    /// A domain with nothing mapped, of 64 GiB in 65,535 pieces at most.
    pub fn new() -> Arc<Self> {
        Self::with_limits(DmaLimits { bytes: 64 << 30, entries: 65_535, granule: GRANULE, address_bits: 48 })
    }

    /// A domain that holds what `limits` say.
    pub fn with_limits(limits: DmaLimits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            mapped: Mutex::default(),
            stray: AtomicU64::new(0),
            faults: Faults::default(),
        })
    }

    /// A domain with a Mac's rules.
    ///
    /// # Errors
    /// [`ConfigError`] for a window or limits that no DART has.
    pub fn mac(config: Config) -> std::result::Result<Arc<Self>, ConfigError> {
        let mac = Mac::new(config, u64::MAX, u32::MAX)?;
        let limits = mac.limits();
        let mapped = Mutex::new(Mapped { mac: Some(mac), ..Mapped::default() });
        Ok(Arc::new(Self { limits, mapped, stray: AtomicU64::new(0), faults: Faults::default() }))
    }

    /// A function may do DMA from now on, or is silent.
    pub(super) fn note_master(&self, function: PciAddress, on: bool) {
        if let Some(mac) = &mut self.lock().mac {
            mac.set_master(function, on);
        }
    }

    /// All mappings: bus address, host address, bytes.
    pub fn pieces(&self) -> Vec<(u64, u64, u64)> {
        let piece = |(bus, (host, len)): (&u64, &(NonNull<u8>, u64))| (*bus, host.as_ptr() as u64, *len);
        self.lock().pieces.iter().map(piece).collect()
    }

    /// Lets `fault` happen to the next calls of [`Operation::DmaMap`] or [`Operation::DmaUnmap`].
    pub fn inject(&self, operation: Operation, fault: Fault) {
        self.faults.inject(operation, fault);
    }

    /// How often a device accessed what was not mapped.
    pub fn stray_accesses(&self) -> u64 {
        self.stray.load(Ordering::Acquire)
    }

    /// Number of mappings, and their bytes.
    pub fn mapped(&self) -> (usize, u64) {
        let mapped = self.lock();
        (mapped.pieces.len(), mapped.bytes)
    }

    /// What a device reads at `at`. Holds up unmapping for so long.
    pub(super) fn read(&self, at: BusAddress, buffer: &mut [u8]) -> std::result::Result<(), Stray> {
        let mut mapped = self.lock();
        for (index, byte) in buffer.iter_mut().enumerate() {
            let host = self.translate(&mut mapped, at, index)?;
            // SAFETY: within a mapping, whose memory stays while the lock is held; volatile, as the guest may write it.
            *byte = unsafe { host.read_volatile() };
        }
        Ok(())
    }

    /// What a device writes at `at`.
    pub(super) fn write(&self, at: BusAddress, bytes: &[u8]) -> std::result::Result<(), Stray> {
        let mut mapped = self.lock();
        for (index, byte) in bytes.iter().enumerate() {
            let host = self.translate(&mut mapped, at, index)?;
            // SAFETY: as above.
            unsafe { host.write_volatile(*byte) };
        }
        Ok(())
    }

    fn translate(
        &self,
        mapped: &mut Mapped,
        at: BusAddress,
        index: usize,
    ) -> std::result::Result<NonNull<u8>, Stray> {
        let bus = at.0.wrapping_add(index as u64);
        let found = mapped.pieces.range(..=bus).next_back().filter(|(start, (_, len))| bus - **start < *len);
        let Some((start, (host, _))) = found else {
            self.stray.fetch_add(1, Ordering::AcqRel);
            if let Some(mac) = &mut mapped.mac {
                mac.stray(bus, 1);
            }
            return Err(Stray(bus));
        };
        // SAFETY: the offset is below the mapping's length, just checked.
        Ok(unsafe { host.add((bus - start) as usize) })
    }

    fn lock(&self) -> MutexGuard<'_, Mapped> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this can be mapped beside what is.
    fn check(&self, mapped: &Mapped, len: u64, guest: u64) -> Result<()> {
        let DmaLimits { bytes, entries, address_bits, .. } = self.limits;
        if mapped.mac.is_some() {
            let whole = guest.checked_add(len).is_some();
            return if whole {
                Ok(())
            } else {
                Err(Error::OutOfRange { what: format!("{guest:#x}+{len:#x}") })
            };
        }
        let most = u64::MAX >> (64 - u32::from(address_bits));
        let Some(last) = guest.checked_add(len - 1).filter(|last| *last <= most) else {
            return Err(Error::Reserved { address: guest, len, usable: format!("0x0-{most:#x}") });
        };
        if mapped.pieces.len() >= entries as usize {
            return Err(Error::OutOfEntries { limit: entries });
        }
        if mapped.bytes.saturating_add(len) > bytes {
            return Err(Error::OutOfBytes { len, mapped: mapped.bytes, limit: bytes });
        }
        let overlaps = |(start, (_, had)): (&u64, &(_, u64))| guest < start + had;
        if mapped.pieces.range(..=last).next_back().is_some_and(overlaps) {
            let source = std::io::Error::from(std::io::ErrorKind::AlreadyExists);
            return Err(Error::Host { call: format!("map bus address {guest:#x}+{len:#x}"), source });
        }
        Ok(())
    }
}

/// The domain's own faults are those of no function.
const NOBODY: PciAddress = PciAddress { segment: 0, bus: 0, device: 0, function: 0 };

impl DmaDomain for SimulatedDomain {
    fn limits(&self) -> DmaLimits {
        self.limits
    }

    unsafe fn map(&self, host: NonNull<u8>, len: u64, guest: u64) -> Result<BusAddress> {
        self.faults.meet(Operation::DmaMap, NOBODY)?;
        check_granule(&[("host address", host.as_ptr() as u64), ("length", len), ("guest address", guest)])?;
        if len == 0 {
            return Err(Error::Unaligned { what: "a length of 0".into() });
        }
        let mut mapped = self.lock();
        self.check(&mapped, len, guest)?;
        let at = match &mut mapped.mac {
            Some(mac) => mac.take(host.as_ptr() as u64, len)?.0,
            None => guest,
        };
        mapped.pieces.insert(at, (host, len));
        mapped.bytes += len;
        Ok(BusAddress(at))
    }

    fn unmap(&self, address: BusAddress, len: u64, release: Release) -> Result<()> {
        self.faults.meet(Operation::DmaUnmap, NOBODY)?;
        let mut mapped = self.lock();
        if mapped.pieces.get(&address.0).is_none_or(|(_, had)| *had != len) {
            return Err(Error::NotMapped { address: address.0, len });
        }
        mapped.pieces.remove(&address.0);
        mapped.bytes -= len;
        if let Some(mac) = &mut mapped.mac {
            mac.give(address, len, release);
        }
        Ok(())
    }

    fn usage(&self) -> DmaUsage {
        let mapped = self.lock();
        mac::usage(mapped.mac.as_ref(), mapped.bytes, mapped.pieces.len())
    }
}
