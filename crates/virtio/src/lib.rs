//! Virtio devices over PCI (modern, virtio 1.2), each working its queues on threads of its own.
//!
//! "virtio 1.2" is OASIS Virtual I/O Device (VIRTIO) Version 1.2.

pub mod block;
pub mod console;
mod device;
pub mod entropy;
mod health;
pub mod net;
mod pair;
mod queue;
mod transport;
pub mod vsock;
mod worker;

#[cfg(test)]
pub(crate) mod testing;

pub use device::{Activation, ActiveQueue, GuestMemory, VirtioDevice, VirtioInterrupt};
pub use health::{Health, is_panic_contained};
pub use queue::{Buffers, GuestSlice, QueueError, Request, WorkQueue};
pub use transport::{DoorbellBinder, VirtioPci};
pub use worker::{Stop, Worker};
