//! A virtio driver as rude as a hostile guest's: it can place anything in a queue.

use super::pci::{DmaPage, PAGE, Registers, VirtioPci};
use super::wait_for;
use anyhow::{Result, ensure};
use std::time::Duration;

/// Descriptor flags (virtio 1.2, 2.7.5).
pub const NEXT: u16 = 1;
/// The device writes to the buffer.
pub const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;
/// Status bits (virtio 1.2, 2.1): acknowledge, driver, features OK, driver OK.
const HELLO: [u8; 4] = [1, 1 | 2, 1 | 2 | 8, 1 | 2 | 8 | 4];
/// How long a device may take for something that it does at once.
const PROMPT: Duration = Duration::from_secs(10);
/// Bit 0 of the upper feature word: VIRTIO_F_VERSION_1 (bit 32).
const VERSION_1: u32 = 1;

// Offsets in the common configuration (virtio 1.2, 4.1.4.3).
const FEATURE_SELECT: usize = 8;
const FEATURE: usize = 12;
const STATUS: usize = 20;
const QUEUE_SELECT: usize = 22;
const QUEUE_SIZE: usize = 24;
const QUEUE_ENABLE: usize = 28;
const QUEUE_NOTIFY_OFFSET: usize = 30;
const QUEUE_DESCRIPTORS: usize = 32;
const QUEUE_AVAILABLE: usize = 40;
const QUEUE_USED: usize = 48;

/// Where a queue's parts are said to be.
#[derive(Clone, Copy, Debug)]
pub struct Rings {
    /// Table of descriptors.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
}

/// A device under this driver.
pub struct RawDevice {
    common: Registers,
    notify: Registers,
    multiplier: u32,
    /// Table of descriptors of queue 0.
    pub descriptors: DmaPage,
    /// Its available ring.
    pub available: DmaPage,
    /// Its used ring.
    pub used: DmaPage,
    /// A buffer.
    pub buffer: DmaPage,
    queue: u16,
}

impl RawDevice {
    /// Takes the device over; `queue` is the one that is used.
    pub fn new(device: &VirtioPci, queue: u16) -> Result<Self> {
        let (notify, multiplier) = device.block(2)?;
        let raw = Self {
            common: device.map(device.block(1)?.0)?,
            notify: device.map(notify)?,
            multiplier,
            descriptors: DmaPage::new()?,
            available: DmaPage::new()?,
            used: DmaPage::new()?,
            buffer: DmaPage::new()?,
            queue,
        };
        raw.reset()?;
        Ok(raw)
    }

    /// Resets the device and waits until it says so.
    pub fn reset(&self) -> Result<()> {
        self.common.write(STATUS, 0_u8);
        wait_for("status 0 after a reset", PROMPT, || (self.status() == 0).then_some(()))?;
        for page in [&self.descriptors, &self.available, &self.used, &self.buffer] {
            page.clear();
        }
        Ok(())
    }

    /// The device's status.
    pub fn status(&self) -> u8 {
        self.common.read(STATUS)
    }

    /// Where this driver's own pages are.
    pub fn rings(&self) -> Rings {
        Rings {
            descriptors: self.descriptors.address(),
            available: self.available.address(),
            used: self.used.address(),
        }
    }

    /// Says hello, sets the queue up with `size` and `rings`, and starts the device.
    pub fn start(&self, size: u16, rings: Rings) -> Result<()> {
        for (step, status) in HELLO.iter().enumerate() {
            if step == 2 {
                self.common.write(FEATURE_SELECT, 1_u32);
                self.common.write(FEATURE, VERSION_1);
            }
            if step == 3 {
                self.set_up_queue(size, rings);
            }
            self.common.write(STATUS, *status);
            if step == 2 {
                ensure!(self.status() & 8 != 0, "the device refuses VERSION_1");
            }
        }
        Ok(())
    }

    fn set_up_queue(&self, size: u16, rings: Rings) {
        self.common.write(QUEUE_SELECT, self.queue);
        self.common.write(QUEUE_SIZE, size);
        let places = [
            (QUEUE_DESCRIPTORS, rings.descriptors),
            (QUEUE_AVAILABLE, rings.available),
            (QUEUE_USED, rings.used),
        ];
        for (register, address) in places {
            self.common.write(register, address as u32);
            self.common.write(register + 4, (address >> 32) as u32);
        }
        self.common.write(QUEUE_ENABLE, 1_u16);
    }

    /// Writes descriptor `index`.
    pub fn descriptor(&self, index: usize, address: u64, len: u32, flags: u16, next: u16) {
        let at = index * 16 % PAGE;
        self.descriptors.write(at, address);
        self.descriptors.write(at + 8, len);
        self.descriptors.write(at + 12, flags);
        self.descriptors.write(at + 14, next);
    }

    /// Makes chain `head` available, as the first, says that `count` are available, and rings the bell.
    pub fn offer(&self, head: u16, count: u16) {
        self.available.write(4, head);
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.available.write(2, count);
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.ring();
    }

    /// Rings the queue's bell.
    pub fn ring(&self) {
        self.common.write(QUEUE_SELECT, self.queue);
        let offset: u16 = self.common.read(QUEUE_NOTIFY_OFFSET);
        self.notify.write(usize::from(offset) * self.multiplier as usize, self.queue);
    }

    /// Waits until the device has used `count` chains.
    pub fn wait_used(&self, count: u16) -> Result<()> {
        wait_for("used chain", PROMPT, || (self.used.read::<u16>(2) == count).then_some(()))
    }
}
