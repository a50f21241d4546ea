//! A device that is made of software, in this process, for tests: any identity, BARs and capabilities (broken ones, too), DMA,
//! interrupts, removal, failures and delays, all on command.
//!
//! [`Model`] describes it, [`SimulatedDevice`] is the hardware with its knobs, and [`SimulatedDevice::open`] hands it over as VFIO would.

mod device;
mod domain;
mod endpoint;
mod faults;
mod function;
mod kind;
mod memory;
mod model;
mod rtx5090;
#[cfg(test)]
mod tests;

pub use device::SimulatedDevice;
pub use domain::SimulatedDomain;
pub use endpoint::{endpoint, registers};
pub use faults::{Fault, Operation};
pub use function::SimulatedFunction;
pub use kind::SimulatedKind;
pub use model::Model;
pub use rtx5090::rtx5090;
