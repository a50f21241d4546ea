//! How a slot's functions reach guest memory: all of it from the start, or what the guest asks for through a companion.

use crate::memory::{DmaMapping, Ram};
use crate::passthrough::{HostSlot, Place};
use crate::{DeviceSpec, Error, MachineSpec};
use outboard_abi::published::Layout;
use outboard_companion::{Allowed, Companion, Config, ServedSlot};
use outboard_dart::Config as DartConfig;
use outboard_host_pci::{DmaLimits, DmaPolicy, GRANULE, Selection};
use outboard_passthrough::{Function, Loss};
use outboard_pci::{RootComplex, RootPort};
use std::sync::{Arc, Weak};

/// A slot's way to guest memory. Dropped after its functions were reset and given up, it takes away what is mapped.
pub(crate) enum SlotDma {
    /// Mapped one to one; held until dropped.
    All(#[allow(dead_code)] DmaMapping),
    /// The guest asks.
    Asked(Asked),
}

/// Memory that a device may still write, kept mapped.
pub(crate) struct Retained(#[allow(dead_code)] SlotDma);

/// A companion while it serves a slot.
pub(crate) struct Asked {
    selection: Selection,
    companion: Arc<Companion>,
}

/// Puts a companion at device number `device` of bus 0, beside `port`, with nothing to serve yet. `expected` is what will be in the slot first.
///
/// # Errors
/// [`Error::Slot`], [`Error::Thread`].
pub(crate) fn companion(
    (device, port): (u8, &Arc<RootPort>),
    (spec, expected): (&MachineSpec, Option<&DeviceSpec>),
    place: Place,
    root: &RootComplex,
    ram: &Ram,
) -> Result<Arc<Companion>, Error> {
    let dart = match expected.map(|device| device.dma) {
        Some(DmaPolicy::Mac(config)) => config,
        _ => DartConfig::MAC,
    };
    let limits = DmaLimits { bytes: dart.bytes, entries: dart.entries, granule: GRANULE, address_bits: 32 };
    let config = Config { port: place.port, vcpus: spec.cpus, ram: ram.memory().clone(), limits };
    let companion = Companion::new(config).map_err(Error::Thread)?;
    root.add(device, 0, companion.clone())?;
    let layout = expected.map_or(Some(Layout::A), |device| device.published);
    if let Some(layout) = layout {
        root.add(device, 1, companion.published(layout, port.clone()))?;
    }
    Ok(companion)
}

impl SlotDma {
    /// Prepares it for the functions of `slot`, which are not in the guest yet; `companion` is beside its port.
    ///
    /// # Errors
    /// [`Error::HostPci`] when guest memory cannot be mapped, [`Error::NoDmaDevice`].
    pub(crate) fn new(
        slot: &HostSlot,
        companion: Option<&Arc<Companion>>,
        functions: &[Arc<Function>],
        ram: &Ram,
    ) -> Result<Self, Error> {
        if !slot.asks() {
            return Ok(Self::All(ram.map_for_dma(slot.domain())?));
        }
        let companion = companion.ok_or(Error::NoDmaDevice)?;
        let served = Arc::new(Served(functions.iter().map(Arc::downgrade).collect()));
        if !companion.attach(slot.domain().clone(), served) {
            return Err(Error::NoDmaDevice);
        }
        Ok(Self::Asked(Asked { selection: slot.selection(), companion: companion.clone() }))
    }

    /// The slot is empty, its functions are given up. Where the device may still write, what is mapped stays, and is given back.
    pub(crate) fn detach(self, writing: bool) -> Option<Retained> {
        match self {
            Self::Asked(asked) => {
                asked.companion.detach(writing);
                None
            }
            all if writing => Some(Retained(all)),
            Self::All(_) => None,
        }
    }
}

impl Drop for Asked {
    /// Says what has become of the mappings: a mistake here is one that would have cost a Mac its uptime.
    fn drop(&mut self) {
        self.companion.detach(false);
        let (maps, unmaps) = self.companion.counts();
        let usage = self.companion.usage();
        let Self { selection, .. } = self;
        tracing::info!(
            "DMA of {selection}: {maps} mappings made, {unmaps} taken down, {} left, {} mistakes that would have panicked a Mac",
            usage.entries,
            usage.mistakes
        );
    }
}

/// A slot's functions as its companion sees them. Weak: whoever empties the slot closes them.
struct Served(Vec<Weak<Function>>);

impl Served {
    fn functions(&self) -> impl Iterator<Item = Arc<Function>> {
        self.0.iter().filter_map(Weak::upgrade)
    }
}

impl ServedSlot for Served {
    fn allow_dma(&self, allowed: Allowed) {
        // In the order of their numbers in the guest.
        for (number, function) in self.0.iter().enumerate() {
            let Some(function) = function.upgrade() else { continue };
            let held = match allowed {
                Allowed::Nobody => true,
                Allowed::First => number != 0,
                Allowed::All => false,
            };
            function.hold_dma(held);
        }
    }

    fn silence(&self) -> bool {
        // Each of them, also after one that cannot be stopped.
        let silent: Vec<bool> = self.functions().map(|function| function.restart()).collect();
        silent.into_iter().all(|silent| silent)
    }

    fn waiting(&self) -> Option<String> {
        let waiting = self.functions().find(|function| function.waits_for_dma())?;
        Some(waiting.host().identity().address.to_string())
    }
}

/// Whether a function of the slot may still write to memory.
pub(crate) fn may_write(functions: &[Arc<Function>]) -> bool {
    functions.iter().any(|function| matches!(function.loss(), Some(Loss::Broken(_))))
}
