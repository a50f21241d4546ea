//! Virtio devices over PCI (modern, virtio 1.2), each working its queues on threads of its own.

mod device;

pub use device::{Activation, ActiveQueue, GuestMemory, VirtioDevice, VirtioInterrupt};
