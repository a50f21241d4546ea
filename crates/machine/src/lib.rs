//! Describe → check → build → run one virtual machine.

mod build;
mod console;
mod control;
mod devices;
mod dma;
mod error;
mod intx;
mod memory;
mod passthrough;
mod plan;
mod room;
mod run;
mod signals;
mod slots;
mod spec;
mod status;
mod terminal;
mod vcpus;

pub use console::ConsoleTarget;
pub use error::Error;
pub use run::{Outcome, check, run};
pub use spec::{DeviceSpec, DiskSpec, MachineSpec, VsockSpec};
pub use terminal::restore_terminal;

/// Exit status of a process whose machine was stopped hard.
pub const EXIT_KILLED: i32 = 4;
