//! The board that every guest sees, whatever hypervisor runs it.

pub mod boot;
pub mod fdt;
pub mod layout;
mod pl011;
mod pl031;
mod pl061;
mod primecell;

pub use pl011::{Output, Pl011};
pub use pl031::Pl031;
pub use pl061::{POWER_KEY_PIN, Pl061};

/// Guest RAM.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
