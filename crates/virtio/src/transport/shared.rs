//! What the transport shares with the device's workers.

use super::common::status;
use crate::VirtioInterrupt;
use outboard_bus::warn_limited;
use outboard_pci::Msix;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, Ordering};

/// VIRTIO_MSI_NO_VECTOR (virtio 1.2, section 4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;
/// ISR status bits (virtio 1.2, section 4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Status, interrupt vectors and configuration generation. All atomics: a worker that interrupts the driver waits for
/// no vCPU that is in the middle of a register access.
pub struct Shared {
    pub name: String,
    pub msix: Arc<Msix>,
    pub status: AtomicU8,
    isr: AtomicU8,
    /// Counts configuration changes; the driver sees its low eight bits.
    generation: AtomicU32,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
}

impl Shared {
    pub fn new(name: String, msix: Arc<Msix>, queues: usize) -> Self {
        Self {
            name,
            msix,
            status: AtomicU8::new(0),
            isr: AtomicU8::new(0),
            generation: AtomicU32::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
        }
    }

    /// ISR status as the driver reads it: reading clears it.
    pub fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::SeqCst)
    }

    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    pub fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::SeqCst)
    }

    /// A vector that the function does not have reads back as none, which tells the driver that it was refused.
    pub fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.existing(vector), Ordering::SeqCst);
    }

    pub fn queue_vector(&self, queue: u16) -> u16 {
        self.queue_vectors.get(usize::from(queue)).map_or(NO_VECTOR, |v| v.load(Ordering::SeqCst))
    }

    pub fn set_queue_vector(&self, queue: u16, vector: u16) {
        if let Some(cell) = self.queue_vectors.get(usize::from(queue)) {
            cell.store(self.existing(vector), Ordering::SeqCst);
        }
    }

    fn existing(&self, vector: u16) -> u16 {
        if vector < self.msix.vectors() { vector } else { NO_VECTOR }
    }

    /// After the device stopped: the generation goes on, so that a driver cannot mistake old configuration for new.
    pub fn reset(&self) {
        self.isr.store(0, Ordering::SeqCst);
        self.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
        self.status.store(0, Ordering::SeqCst);
    }

    fn interrupt_config(&self) {
        self.isr.fetch_or(ISR_CONFIG, Ordering::SeqCst);
        self.msix.trigger(self.config_vector());
    }
}

impl VirtioInterrupt for Shared {
    fn queue_used(&self, index: u16) {
        self.isr.fetch_or(ISR_QUEUE, Ordering::SeqCst);
        self.msix.trigger(self.queue_vector(index));
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.interrupt_config();
    }

    fn device_broken(&self, reason: &str) {
        warn_limited!("{}: needs a reset by its driver: {reason}", self.name);
        let before = self.status.fetch_or(status::NEEDS_RESET, Ordering::SeqCst);
        // The configuration may say so too: a failed network card has no link.
        self.generation.fetch_add(1, Ordering::SeqCst);
        if before & status::DRIVER_OK != 0 {
            self.interrupt_config();
        }
    }
}
