//! A guest's PCI function made out of a function of the host.
//!
//! [`Function`] implements [`outboard_pci::PciFunction`] over an [`outboard_host_pci::HostFunction`]: config space by table (`config`), BARs mapped
//! straight into the guest where that is safe and trapped where not (`mapping`), interrupts with a kernel's help where there is one
//! (`vectors`, `intx`), resets and loss (`control`). What it needs of the machine is [`Wiring`]. References are to the PCI Express
//! Base Specification 5.0 ("PCIe") and the PCI Local Bus Specification 3.0 ("PCI").
//!
//! Trust: the guest and the device are both hostile. A guest reaches only this device; of its config space only what `config::rules` lists.

mod config;
mod control;
mod error;
mod function;
mod health;
mod interrupts;
mod intx;
mod mapping;
mod mirror;
mod slot;
mod vectors;
mod wiring;

pub use error::Error;
pub use function::Function;
pub use health::Loss;
pub use slot::{Slot, SlotListener, Vacated};
pub use wiring::{GuestMapper, IntxWiring, LevelBinder, VectorBinder, Wiring, WiringError};

#[cfg(test)]
mod tests;
