//! What is mapped for a slot, and the order in which it may be taken down.

#![allow(unsafe_code)] // UNSAFETY: `DmaDomain::map` wants the memory's lifetime promised.

use crate::{Allowed, GuestMemory, ServedSlot, ram};
use outboard_abi::{STATE_GONE, STATE_OFF, STATE_ON, Status};
use outboard_bus::{error_limited, warn_limited};
use outboard_host_pci::{BusAddress, DmaDomain, DmaUsage, Error, GRANULE, Release};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A mapping as a guest gets to know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// Its name, given once and never again.
    pub handle: u64,
    /// Bus address of the first byte.
    pub bus: u64,
}

/// Counted since the machine started, readable without a lock.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    pub(crate) bytes: AtomicU64,
    pub(crate) entries: AtomicU64,
    pub(crate) maps: AtomicU64,
    pub(crate) unmaps: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) batches: AtomicU64,
}

/// Shared by the functions of a companion.
pub(crate) struct Core {
    pub(crate) name: String,
    ram: GuestMemory,
    /// Upper bits of every handle, different for each device of a machine: another's handles name nothing here.
    tag: u64,
    state: Mutex<State>,
    /// One change of the device's state at a time; taken before `state`, and not held by maps and unmaps.
    control: Mutex<()>,
    /// What the state register reads.
    register: AtomicU32,
    pub(crate) stats: Stats,
}

struct State {
    phase: Phase,
    /// `None` once the slot is empty.
    served: Option<Served>,
    /// Whose DMA was let through.
    open: Allowed,
    mappings: HashMap<u64, Mapping>,
    /// Handles by guest address, of mappings made through the published protocol.
    published: HashMap<u64, u64>,
    made: u64,
    /// The device may write for good: what is mapped stays.
    keep: bool,
    /// What the domain held when it was given up.
    last: DmaUsage,
    patience: Patience,
}

/// With a driver that waits for DMA while its guest asks for none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Patience {
    /// None was seen waiting.
    Fresh,
    /// One was, when last looked.
    Waiting,
    /// It was said, once for what is in the slot.
    Told,
}

#[derive(Clone)]
struct Served {
    domain: Arc<dyn DmaDomain>,
    slot: Arc<dyn ServedSlot>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nothing has been asked for.
    Off,
    On,
    /// Being reset: nothing is mapped or unmapped.
    Resetting,
    /// The slot is empty, or its device failed.
    Gone,
}

#[derive(Clone, Copy, Debug)]
struct Mapping {
    bus: BusAddress,
    len: u64,
    /// Its key in the published protocol, if it was made through it.
    key: Option<u64>,
}

/// Which protocol asks: each has its own way of starting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asker {
    /// Only after ENABLE.
    Own,
    /// At once; the first success lets DMA through.
    Published,
}

impl Core {
    pub(crate) fn new(name: String, tag: u8, ram: GuestMemory) -> Self {
        let state = State {
            phase: Phase::Gone,
            served: None,
            open: Allowed::Nobody,
            mappings: HashMap::new(),
            published: HashMap::new(),
            made: 0,
            keep: false,
            last: DmaUsage::default(),
            patience: Patience::Fresh,
        };
        Self {
            name,
            ram,
            tag: u64::from(tag) << 48,
            state: Mutex::new(state),
            control: Mutex::new(()),
            register: AtomicU32::new(STATE_GONE),
            stats: Stats::default(),
        }
    }

    pub(crate) fn ram(&self) -> &GuestMemory {
        &self.ram
    }

    /// What the state register reads.
    pub(crate) fn register(&self) -> u32 {
        self.register.load(Ordering::Acquire)
    }

    /// Maps guest RAM, whole granules of it.
    ///
    /// # Errors
    /// Any [`Status`] but `Ok`; nothing is mapped then.
    pub(crate) fn map(&self, address: u64, len: u64, asker: Asker) -> Result<Mapped, Status> {
        self.map_in(&mut self.lock(), address, len, asker)
    }

    fn map_in(&self, state: &mut State, address: u64, len: u64, asker: Asker) -> Result<Mapped, Status> {
        state.admits(asker)?;
        if state.phase == Phase::Gone {
            return Err(Status::Gone);
        }
        if len == 0 || !address.is_multiple_of(GRANULE) || !len.is_multiple_of(GRANULE) {
            return Err(Status::Misaligned);
        }
        let host = ram::host(&self.ram, address, len).ok_or(Status::BadRange)?;
        let served = state.served.clone().ok_or(Status::Gone)?;
        // SAFETY: the range lies within `ram`, which lives as long as this core; a mapping leaves `mappings` only when the domain has taken it
        // down, and `Drop` leaks the memory should any be left.
        let bus = unsafe { served.domain.map(host, len, address) }.map_err(|e| self.status(&e))?;
        state.made += 1;
        let handle = self.tag | state.made;
        state.mappings.insert(handle, Mapping { bus, len, key: None });
        self.stats.maps.fetch_add(1, Ordering::Relaxed);
        self.stats.entries.fetch_add(1, Ordering::Relaxed);
        self.stats.bytes.fetch_add(len, Ordering::Relaxed);
        if asker == Asker::Published && state.open == Allowed::Nobody {
            state.open = Allowed::First;
            served.slot.allow_dma(Allowed::First);
        }
        Ok(Mapped { handle, bus: bus.0 })
    }

    /// Takes a mapping down, on the guest's word that its device no longer uses it.
    ///
    /// # Errors
    /// Any [`Status`] but `Ok`; the mapping, if there is one, stays.
    pub(crate) fn unmap(&self, handle: u64, asker: Asker) -> Result<(), Status> {
        self.unmap_in(&mut self.lock(), handle, asker)
    }

    fn unmap_in(&self, state: &mut State, handle: u64, asker: Asker) -> Result<(), Status> {
        state.admits(asker)?;
        let mapping = *state.mappings.get(&handle).ok_or(Status::NoSuchHandle)?;
        let served = state.served.clone().ok_or(Status::Gone)?;
        served.domain.unmap(mapping.bus, mapping.len, Release::Driver).map_err(|e| self.status(&e))?;
        self.forget(state, handle, mapping);
        Ok(())
    }

    /// Maps for the published protocol, which names a mapping by its guest address and refuses a second one there. The range need not
    /// be whole granules: what surrounds it is mapped with it, as a Mac does.
    ///
    /// # Errors
    /// [`Status`], which that protocol cannot tell.
    pub(crate) fn map_published(&self, address: u64, len: u64) -> Result<u64, Status> {
        let mut state = self.lock();
        if state.published.contains_key(&address) || len == 0 {
            return Err(Status::BadRange);
        }
        let first = address / GRANULE * GRANULE;
        let end = address.checked_add(len).and_then(|end| end.checked_next_multiple_of(GRANULE));
        let end = end.ok_or(Status::BadRange)?;
        let mapped = self.map_in(&mut state, first, end - first, Asker::Published)?;
        state.published.insert(address, mapped.handle);
        if let Some(mapping) = state.mappings.get_mut(&mapped.handle) {
            mapping.key = Some(address);
        }
        Ok(mapped.bus + (address - first))
    }

    /// Takes down what [`Core::map_published`] mapped at `address`.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn unmap_published(&self, address: u64) -> Result<(), Status> {
        let mut state = self.lock();
        let handle = state.published.get(&address).copied().ok_or(Status::NoSuchHandle)?;
        self.unmap_in(&mut state, handle, Asker::Published)
    }

    /// The slot is filled: nothing is mapped in `domain`, and the functions of `slot` are held back. `false` if it still has what was in it.
    pub(crate) fn attach(&self, domain: Arc<dyn DmaDomain>, slot: Arc<dyn ServedSlot>) -> bool {
        let _control = self.control();
        slot.allow_dma(Allowed::Nobody);
        let mut state = self.lock();
        if state.served.is_some() {
            return false;
        }
        state.served = Some(Served { domain, slot });
        state.open = Allowed::Nobody;
        state.patience = Patience::Fresh;
        self.enter(&mut state, Phase::Off);
        true
    }

    /// The guest asks for mappings from now on: its drivers may start DMA.
    pub(crate) fn enable(&self) {
        let _control = self.control();
        let mut state = self.lock();
        if state.phase == Phase::Off {
            self.enter(&mut state, Phase::On);
            state.patience = Patience::Fresh;
            if std::mem::replace(&mut state.open, Allowed::All) < Allowed::All
                && let Some(served) = &state.served
            {
                served.slot.allow_dma(Allowed::All);
            }
        }
    }

    /// Whether DMA is held back, so that it is worth while to look again.
    pub(crate) fn holds(&self) -> bool {
        let state = self.lock();
        state.phase == Phase::Off && state.open == Allowed::Nobody && state.patience != Patience::Told
    }

    /// Says once what a guest lacks whose driver still waits for DMA when this is called again. Whether it was said now.
    pub(crate) fn look(&self) -> bool {
        // Under `control`, as everything that calls the functions: whoever empties the slot waits. Whoever resets it waits for the caller's
        // thread: that does not wait for them.
        let Ok(_control) = self.control.try_lock() else { return false };
        if !self.holds() {
            return false;
        }
        let Some(served) = self.lock().served.clone() else { return false };
        let waiting = served.slot.waiting();
        let mut state = self.lock();
        let next = match (&waiting, state.patience) {
            (None, _) => Patience::Fresh,
            (Some(_), Patience::Fresh) => Patience::Waiting,
            (Some(_), Patience::Waiting | Patience::Told) => Patience::Told,
        };
        state.patience = next;
        drop(state);
        let Some(function) = waiting.filter(|_| next == Patience::Told) else { return false };
        warn_limited!(
            "{function} cannot do DMA: a driver in the guest has turned it on, but with dma=mac the guest has to ask for each mapping, and nothing \
             in it does. Install the kernel module outboard_dma in the guest (docs/guest-module.md), load it, and bind the driver again"
        );
        true
    }

    /// Stops and resets the served functions, and takes down every mapping; those of a device that cannot be stopped stay. `settle` waits
    /// for batches that are under way elsewhere.
    pub(crate) fn reset(&self, settle: impl FnOnce()) {
        let _control = self.control();
        let served = {
            let mut state = self.lock();
            if state.phase == Phase::Gone {
                return;
            }
            self.enter(&mut state, Phase::Resetting);
            state.open = Allowed::Nobody;
            state.served.clone()
        };
        settle();
        let silent = served.is_none_or(|served| {
            served.slot.allow_dma(Allowed::Nobody);
            served.slot.silence()
        });
        let mut state = self.lock();
        if silent {
            self.release(&mut state);
        } else {
            state.keep = true;
            error_limited!("{}: what its device could reach stays mapped: it cannot be stopped", self.name);
        }
        self.enter(&mut state, if silent { Phase::Off } else { Phase::Gone });
    }

    /// The slot is empty. Its functions have been stopped and reset, or the device is gone; not so if `writing`: then what is mapped
    /// stays. Guests that still have mappings find that they are gone.
    pub(crate) fn detach(&self, writing: bool, settle: impl FnOnce()) {
        let _control = self.control();
        self.enter(&mut self.lock(), Phase::Gone);
        settle();
        let mut state = self.lock();
        state.keep |= writing;
        if !state.keep {
            self.release(&mut state);
            // The domain, and with it the device's file, may be closed only now.
            if state.mappings.is_empty()
                && let Some(served) = state.served.take()
            {
                state.last = served.domain.usage();
            }
        }
    }

    /// What the domain holds, or held when it was given up.
    pub(crate) fn usage(&self) -> DmaUsage {
        let state = self.lock();
        state.served.as_ref().map_or_else(|| state.last.clone(), |served| served.domain.usage())
    }

    /// Takes down every mapping, by the machine's decision: the device is silent.
    fn release(&self, state: &mut State) {
        let Some(served) = state.served.clone() else { return };
        let all: Vec<(u64, Mapping)> = state.mappings.iter().map(|(handle, m)| (*handle, *m)).collect();
        for (handle, mapping) in all {
            match served.domain.unmap(mapping.bus, mapping.len, Release::TearDown) {
                Ok(()) => self.forget(state, handle, mapping),
                Err(error) => {
                    warn_limited!("{}: a mapping cannot be taken down: {error}; it stays", self.name)
                }
            }
        }
    }

    fn forget(&self, state: &mut State, handle: u64, mapping: Mapping) {
        state.mappings.remove(&handle);
        if let Some(key) = mapping.key {
            state.published.remove(&key);
        }
        self.stats.unmaps.fetch_add(1, Ordering::Relaxed);
        self.stats.entries.fetch_sub(1, Ordering::Relaxed);
        self.stats.bytes.fetch_sub(mapping.len, Ordering::Relaxed);
    }

    fn enter(&self, state: &mut State, phase: Phase) {
        state.phase = phase;
        let register = match phase {
            Phase::Off | Phase::Resetting => STATE_OFF,
            Phase::On => STATE_ON,
            Phase::Gone => STATE_GONE,
        };
        self.register.store(register, Ordering::Release);
    }

    /// The code for what a domain says.
    fn status(&self, error: &Error) -> Status {
        match error {
            Error::Unaligned { .. } => Status::Misaligned,
            Error::OutOfBytes { .. } => Status::OutOfBytes,
            Error::OutOfEntries { .. } => Status::OutOfEntries,
            Error::Fragmented { .. } => Status::Fragmented,
            Error::Returning { .. } => Status::Returning,
            Error::Gone(_) => Status::Gone,
            error => {
                warn_limited!("{}: {error}", self.name);
                Status::Host
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in between leaves the tables out of step with the domain; a panic elsewhere ends the process anyway.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn control(&self) -> MutexGuard<'_, ()> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Whether `asker` may ask for anything now.
    fn admits(&self, asker: Asker) -> Result<(), Status> {
        match (self.phase, asker) {
            (Phase::Resetting, _) | (Phase::Off, Asker::Own) => Err(Status::Off),
            _ => Ok(()),
        }
    }
}

impl Drop for Core {
    /// The machine detaches a companion before it goes; what is still mapped then may be written, so that its memory stays.
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if !state.mappings.is_empty() {
            error_limited!("{}: guest memory stays allocated, since a device may still write it", self.name);
            std::mem::forget((self.ram.clone(), state.served.take()));
        }
    }
}
