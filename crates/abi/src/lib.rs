//! The DMA device as guest and host see it.
//!
//! The device is a PCI function on the root bus beside the root port of the slot it serves, with one 32-bit memory BAR. Through it the
//! guest asks for every mapping that the devices in that slot need, because the host's IOMMU picks the addresses. All values are little endian.
//!
//! # A batch
//!
//! A queue is a piece of guest RAM with room for [`MAX_BATCH`] entries of [`ENTRY_BYTES`]. The guest fills the first `n` entries and writes
//! `n` to the queue's doorbell. The device copies them, works through them from the first to the last, and writes each one's
//! handle, bus address and status back. When the store to [`QUEUE_DOORBELL`] retires, all of it is done, and [`QUEUE_STATUS`] says whether every
//! entry succeeded. A failed entry changes nothing and stops nothing. [`QUEUE_DOORBELL_LATER`] takes a batch of which the guest does not
//! wait for the end: unmappings only; the queue answers [`Status::Busy`] until it is done.
//!
//! An entry's status is written after its other results, so that a guest that finds it in memory finds them, too. A guest that has set it to
//! [`Status::Busy`] before it rang therefore needs no register to see which entries are done. A doorbell of a busy queue does nothing, nor does
//! one whose batch is refused whole ([`Status::Off`], [`Status::BadQueue`], [`Status::BadCount`]): the entries stay as they are.
//!
//! # Which devices it serves
//!
//! [`SERVED`] names the root port by device and function number. Both stand on bus 0, which no guest renumbers, so this holds
//! whatever bus numbers the guest gives out behind it. All functions of the slot share one set of mappings.
#![no_std]

mod entry;
pub mod published;
mod registers;

pub use entry::*;
pub use registers::*;
