//! The memory the crate works in, handed in once.

use core::sync::atomic::{AtomicU32, AtomicU64};

use crate::{CHUNK_GRANULES, GRANULE, Limits, Private, Range, Slot};

/// Most pieces of guest RAM; an Outboard guest has one or two.
pub const MAX_RAM_RANGES: usize = 8;

/// All memory that a [`crate::Table`] and its [`crate::Planner`] use. [`Storage::bounds`] says how much of each.
pub struct Storage<'a> {
    /// One for each mapping that may exist, and one for each line of each call's batch.
    pub slots: &'a [Slot],
    /// As many as `slots`.
    pub private: &'a mut [Private],
    /// One for each granule of guest RAM, zeroed.
    pub ram_map: &'a [AtomicU32],
    /// One for each 64 MiB of bus address space that may be in use.
    pub bus_keys: &'a [AtomicU64],
    /// [`CHUNK_GRANULES`] for each of `bus_keys`, zeroed.
    pub bus_map: &'a [AtomicU32],
}

/// Lengths that [`Storage`] needs for given limits and RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Of `slots` and `private`.
    pub slots: usize,
    /// Of `ram_map`.
    pub ram_map: usize,
    /// Of `bus_keys`: four times what `limits.bytes` fill without a hole, since nobody promises that there is none.
    pub bus_keys: usize,
    /// Of `bus_map`.
    pub bus_map: usize,
}

/// Why [`Storage`] cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StorageError {
    /// A slice is shorter than [`Storage::bounds`] asks for; its name.
    TooSmall(&'static str),
    /// More than [`MAX_RAM_RANGES`], or a range that leaves the 64-bit space.
    BadRam,
    /// Limits of zero, or more than 2^30 entries or lines.
    BadLimits,
}

impl Storage<'_> {
    /// The lengths needed under `limits`, in a guest with the RAM `ram`, with `lines` in the batches of all calls together.
    pub fn bounds(limits: Limits, ram: &[Range], lines: usize) -> Result<Bounds, StorageError> {
        if limits.bytes < GRANULE || limits.entries == 0 || limits.entries > 1 << 30 || lines > 1 << 30 {
            return Err(StorageError::BadLimits);
        }
        let granules = whole_granules(ram)?
            .iter()
            .try_fold(0u64, |sum, range| sum.checked_add(range.len / GRANULE))
            .ok_or(StorageError::BadRam)?;
        let chunks = limits.bytes.div_ceil(crate::CHUNK_BYTES).saturating_mul(4);
        let bus_keys = usize::try_from(chunks).map_err(|_| StorageError::BadLimits)?;
        Ok(Bounds {
            slots: (limits.entries as usize).saturating_add(lines),
            ram_map: usize::try_from(granules).map_err(|_| StorageError::BadRam)?,
            bus_keys,
            bus_map: bus_keys.checked_mul(CHUNK_GRANULES).ok_or(StorageError::BadLimits)?,
        })
    }

    /// Whether all that is needed is there; how many slots are used.
    pub(crate) fn check(&self, limits: Limits, ram: &[Range]) -> Result<usize, StorageError> {
        let bounds = Self::bounds(limits, ram, 0)?;
        for (name, have, need) in [
            ("slots", self.slots.len(), bounds.slots),
            ("private", self.private.len(), bounds.slots),
            ("ram_map", self.ram_map.len(), bounds.ram_map),
            ("bus_keys", self.bus_keys.len(), bounds.bus_keys),
            ("bus_map", self.bus_map.len(), self.bus_keys.len().saturating_mul(CHUNK_GRANULES)),
        ] {
            if have < need {
                return Err(StorageError::TooSmall(name));
            }
        }
        Ok(self.slots.len().min(self.private.len()))
    }
}

/// `ram` without the parts of granules at its edges, which cannot be mapped without mapping what lies beside them.
pub(crate) fn whole_granules(ram: &[Range]) -> Result<[Range; MAX_RAM_RANGES], StorageError> {
    let mut whole = [Range::default(); MAX_RAM_RANGES];
    if ram.len() > MAX_RAM_RANGES {
        return Err(StorageError::BadRam);
    }
    for (out, range) in whole.iter_mut().zip(ram) {
        let end = range.end().ok_or(StorageError::BadRam)? & !GRANULE.wrapping_sub(1);
        let start = range.start.checked_next_multiple_of(GRANULE).ok_or(StorageError::BadRam)?;
        *out = Range { start, len: end.saturating_sub(start) };
    }
    Ok(whole)
}
