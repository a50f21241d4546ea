//! What a virtio device model must implement, and what the transport gives it.

use crate::Health;
use outboard_bus::Event;
use std::sync::Arc;
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;

/// Guest RAM as device workers see it.
pub type GuestMemory = GuestMemoryMmap<()>;

/// A device model behind the virtio-pci transport (virtio 1.2, section 4.1). The transport owns config space, feature
/// negotiation, the queue registers and MSI-X; the device owns its configuration and works the queues on threads of its own.
pub trait VirtioDevice: Send {
    /// Virtio device number (virtio 1.2, section 5): 1 network, 2 block, 3 console, 4 entropy, 19 socket.
    fn device_id(&self) -> u16;

    /// Name for logs and thread names, such as `blk0`.
    fn name(&self) -> &str;

    /// The device's health, as its threads report it.
    fn health(&self) -> &Health;

    /// Feature bits 0 to 23 and 50 up that the device offers. The transport adds `VIRTIO_F_VERSION_1`,
    /// `VIRTIO_F_INDIRECT_DESC` and `VIRTIO_F_EVENT_IDX`.
    fn features(&self) -> u64;

    /// Largest size of each queue, a power of two; the length is the number of queues.
    fn queue_sizes(&self) -> Vec<u16>;

    /// The device-specific configuration as it is now (virtio 1.2, section 5.x.4). The transport serves reads of any
    /// width from it and bumps the generation when [`Activation::interrupt`]'s `config_changed` is called.
    fn config(&self) -> Vec<u8>;

    /// The driver wrote `data` at `offset` of the device-specific configuration. Ignored by default: most are read-only.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The driver set DRIVER_OK: start working the queues, on threads of the device's own.
    ///
    /// # Errors
    /// A host failure; the transport then sets DEVICE_NEEDS_RESET and logs it.
    fn activate(&mut self, activation: Activation) -> std::io::Result<()>;

    /// Stop all work: when this returns no thread of the device touches guest memory any more and every request in
    /// flight is finished or dropped. The device can be activated again. Must return in bounded time whatever the guest
    /// or the host's side of the device does.
    fn reset(&mut self);
}

/// What a device gets at DRIVER_OK.
pub struct Activation {
    /// Guest RAM.
    pub memory: GuestMemory,
    /// Features that the driver accepted.
    pub features: u64,
    /// One for each queue of [`VirtioDevice::queue_sizes`], in order; `None` where the driver left it disabled.
    pub queues: Vec<Option<ActiveQueue>>,
    /// How to interrupt the driver.
    pub interrupt: Arc<dyn VirtioInterrupt>,
}

/// A queue that the driver set up.
pub struct ActiveQueue {
    /// Index among the device's queues.
    pub index: u16,
    /// The split virtqueue, addresses set and checked (`Queue::is_valid`).
    pub queue: Queue,
    /// Signalled when the driver notifies the queue.
    pub doorbell: Arc<Event>,
}

/// Interrupts of one device, from any thread.
pub trait VirtioInterrupt: Send + Sync {
    /// Tells the driver that queue `index` has used buffers. The caller has already asked `Queue::needs_notification`.
    fn queue_used(&self, index: u16);

    /// Tells the driver that the device's configuration changed.
    fn config_changed(&self);

    /// The device cannot go on with what the driver gave it (a broken queue): sets DEVICE_NEEDS_RESET and tells the driver.
    fn device_broken(&self, reason: &str);
}
