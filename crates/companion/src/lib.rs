//! The DMA device: through it a guest asks for every mapping that the devices of one slot need.
//!
//! [`Companion`] is a PCI function beside the root port it serves, with the registers of [`outboard_abi`]; [`Published`] is another one, over
//! the same mappings, that speaks the published version-2 protocol. The machine says through [`ServedSlot`] how the slot's functions are
//! stopped and what guest RAM there is.

mod batch;
mod core;
mod device;
mod published;
mod ram;
mod worker;

pub use crate::core::Mapped;
pub use device::{Companion, Config, PanicListener};
pub use published::Published;
pub use ram::GuestMemory;

/// Which functions of a slot may be bus masters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Allowed {
    /// None.
    Nobody,
    /// Function 0: the published protocol's guest module serves that one, and drivers of its neighbours give their devices raw addresses.
    First,
    /// All of them.
    All,
}

/// The functions that a companion serves, as far as DMA goes. Called from vCPU threads and the machine's own; never under the root complex's
/// lock, but a call may take the functions' own locks.
pub trait ServedSlot: Send + Sync {
    /// Lets these functions be bus masters where their drivers want that, and holds the others back, whatever the guest writes.
    fn allow_dma(&self, allowed: Allowed);

    /// Bus master off, drained, reset. Whether nothing of the slot can write to memory any more; `false` means that every mapping must stay.
    fn silence(&self) -> bool;

    /// A function whose driver wants to do DMA while it is held back.
    fn waiting(&self) -> Option<String>;
}

#[cfg(test)]
mod tests;
