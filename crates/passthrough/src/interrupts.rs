//! Which kind of interrupt is in use: follows what the guest programs into config space.

use crate::config::{COMMAND, COMMAND_INTX_DISABLE, MsiShape, Table};
use crate::function::{Function, State};
use crate::intx::Intx;
use crate::vectors::Vectors;
use outboard_bus::{MsiMessage, warn_limited};
use outboard_host_pci::{InterruptKind, InterruptSink};
use outboard_pci::regs::{COMMAND_BUS_MASTER, COMMAND_IO, COMMAND_MEMORY};
use std::sync::Arc;

/// What the host's function is told to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Mode {
    #[default]
    Off,
    Intx,
    Msi(u16),
    MsiX(u16),
}

/// MSI-X enable and function mask in its capability's first dword.
const MSIX_ENABLE: u32 = 1 << 31;
const MSIX_MASK: u32 = 1 << 30;
/// MSI enable in its capability's first dword.
const MSI_ENABLE: u32 = 1 << 16;

impl Function {
    /// Makes vectors and the host's function follow config space.
    ///
    /// Order: what is in use is turned off at the device first, so that nothing fires into a table that is being taken down; what comes
    /// is open here before the device may fire, so that nothing is dropped.
    pub(crate) fn sync_interrupts(&self, state: &mut State) {
        let wanted = self.wanted(&state.table);
        let changed = wanted != state.mode;
        if changed {
            self.interrupts_off(state);
        }
        let held = state.table.value(COMMAND) & u32::from(COMMAND_BUS_MASTER) == 0;
        if let (Some(shape), Some(msi)) = (self.features.msi, &self.msi) {
            program_msi(shape, msi, &state.table);
            msi.state.set_control(matches!(wanted, Mode::Msi(_)), held);
        }
        if let (Some(shape), Some(msix)) = (&self.features.msix, &self.msix) {
            let masked = state.table.value(shape.at) & MSIX_MASK != 0;
            msix.state.set_control(matches!(wanted, Mode::MsiX(_)), held || masked);
        }
        if changed {
            self.interrupts_on(state, wanted);
        }
    }

    /// Nothing fires any more when this returns.
    pub(crate) fn interrupts_off(&self, state: &mut State) {
        if std::mem::take(&mut state.mode) != Mode::Off
            && let Err(error) = self.host.disable_interrupts()
        {
            self.report("its interrupts cannot be turned off", &error);
        }
        // The line is released after the device can no longer assert it.
        state.intx = None;
    }

    fn interrupts_on(&self, state: &mut State, wanted: Mode) {
        let (kind, count, sink): (_, _, Arc<dyn InterruptSink>) = match (wanted, &self.msi, &self.msix) {
            (Mode::Intx, _, _) => match self.take_line(state) {
                Some(sink) => (InterruptKind::Intx, 1, sink),
                None => return,
            },
            (Mode::Msi(count), Some(msi), _) => (InterruptKind::Msi, count, Arc::clone(msi) as _),
            (Mode::MsiX(count), _, Some(msix)) => (InterruptKind::MsiX, count, Arc::clone(msix) as _),
            _ => return,
        };
        // Also after a failure, so that it is tried again only when the guest changes its mind.
        state.mode = wanted;
        if let Err(error) = self.host.enable_interrupts(kind, count, sink) {
            self.report(&format!("its {count} {kind:?} interrupts cannot be turned on"), &error);
        }
    }

    fn take_line(&self, state: &mut State) -> Option<Arc<dyn InterruptSink>> {
        let wiring = self.wiring.intx.clone()?;
        let intx = Intx::new(&self.name, Arc::clone(&self.host), wiring)
            .inspect_err(|error| warn_limited!("{}: no interrupts by pin: {error}", self.name))
            .ok()?;
        Some(state.intx.insert(intx).sink())
    }

    fn wanted(&self, table: &Table) -> Mode {
        if !self.health.usable() {
            return Mode::Off;
        }
        if let Some(shape) = self.features.msix.as_ref().filter(|s| table.value(s.at) & MSIX_ENABLE != 0) {
            return Mode::MsiX(shape.vectors.min(self.counts.msix));
        }
        if let Some(shape) = self.features.msi.filter(|s| table.value(s.at) & MSI_ENABLE != 0) {
            return Mode::Msi(allocated(shape, table));
        }
        // A function that neither decodes nor masters has not been set up by anybody who could handle its pin.
        let command = table.value(COMMAND);
        let set_up = command & u32::from(COMMAND_IO | COMMAND_MEMORY | COMMAND_BUS_MASTER) != 0;
        if self.features.pin && set_up && command & COMMAND_INTX_DISABLE == 0 {
            Mode::Intx
        } else {
            Mode::Off
        }
    }
}

/// Vectors that the guest gave the function (PCIe 7.7.1.2, Multiple Message Enable).
fn allocated(shape: MsiShape, table: &Table) -> u16 {
    1 << (table.value(shape.at) >> 20 & 7).min(shape.vectors.trailing_zeros())
}

/// MSI's registers into the vectors: the function puts the vector's number into the low bits of the data (PCIe 7.7.1.5).
fn program_msi(shape: MsiShape, msi: &Vectors, table: &Table) {
    let count = allocated(shape, table);
    let high = if shape.wide { table.value(shape.at + 8) } else { 0 };
    let address = u64::from(high) << 32 | u64::from(table.value(shape.at + 4));
    let data = table.value(shape.data()) & 0xffff & !u32::from(count - 1);
    let mask = shape.mask().map_or(0, |at| table.value(at));
    for vector in 0..shape.vectors {
        let message = MsiMessage { address, data: data | u32::from(vector.min(count - 1)) };
        msi.state.set_vector(vector, message, vector >= count || mask & 1 << vector != 0);
    }
}
