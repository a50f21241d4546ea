//! Entropy device (virtio 1.2, section 5.4): the host kernel's random bytes.

use crate::{Activation, Health, VirtioDevice, WorkQueue, Worker};
use outboard_jail::ThreadKind;
use std::io;
use std::sync::Arc;

const QUEUE_SIZE: u16 = 8;
/// Most bytes for one request; the driver asks again for more (Linux asks for 64 at a time).
const MAX_ANSWER: u64 = 4096;

/// A virtio entropy device.
pub struct Entropy {
    worker: Option<Worker<()>>,
    health: Health,
}

impl Entropy {
    /// A device that has nothing to set up.
    pub fn new() -> Self {
        Self { worker: None, health: Health::default() }
    }
}

impl Default for Entropy {
    fn default() -> Self {
        Self::new()
    }
}

impl VirtioDevice for Entropy {
    fn device_id(&self) -> u16 {
        4
    }

    fn name(&self) -> &str {
        "rng"
    }

    fn health(&self) -> &Health {
        &self.health
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let Activation { memory, queues, interrupt, .. } = activation;
        let Some(queue) = queues.into_iter().flatten().next() else { return Ok(()) };
        let wake = Arc::clone(&queue.doorbell);
        let (kind, for_failure) = (ThreadKind::Entropy, Arc::clone(&interrupt));
        self.worker = Some(Worker::spawn(kind, "rng", wake, &self.health, for_failure, move |stop| {
            WorkQueue::new(queue, &memory, interrupt).serve(stop, |request| {
                let mut bytes = [0; MAX_ANSWER as usize];
                let wanted = &mut bytes[..request.writable.len().min(MAX_ANSWER) as usize];
                match getrandom::fill(wanted) {
                    Ok(()) => Ok(request.writable.write(wanted) as u32),
                    Err(error) => {
                        outboard_bus::warn_limited!("rng: the host has no random bytes: {error}");
                        Ok(0)
                    }
                }
            });
        })?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Driver, RAM_BASE};

    #[test]
    fn gives_different_bytes_each_time() {
        let mut driver = Driver::new(Box::new(Entropy::new()));
        driver.start(u64::MAX, 8);
        let (one, two) = (driver.request(0, &[], 64), driver.request(0, &[], 64));
        assert_eq!((one.len(), two.len()), (64, 64));
        assert_ne!(one, two);
        assert!(one.iter().any(|b| *b != 0));
    }

    #[test]
    fn answers_are_bounded_and_buffers_may_be_odd() {
        let mut driver = Driver::new(Box::new(Entropy::new()));
        driver.start(u64::MAX, 8);
        assert_eq!(driver.request(0, &[], 1 << 20).len(), 4096);
        assert_eq!(driver.request(0, b"nothing to write to", 0).len(), 0);
        for buffers in [
            vec![(RAM_BASE + 0x1000, 0, true)],
            vec![(RAM_BASE + 0x1001, 3, true), (RAM_BASE + 0x2000, 5, true)],
        ] {
            driver.add(0, &buffers);
            driver.kick(0);
            assert_eq!(u64::from(driver.wait_used(0).1), buffers.iter().map(|b| u64::from(b.1)).sum::<u64>());
        }
    }

    #[test]
    fn resets_with_requests_in_flight() {
        let mut driver = Driver::new(Box::new(Entropy::new()));
        for _ in 0..50 {
            driver.start(u64::MAX, 8);
            let at = driver.alloc(4096);
            for _ in 0..8 {
                driver.add(0, &[(at, 4096, true)]);
                driver.kick(0);
            }
            driver.reset();
        }
        driver.start(u64::MAX, 8);
        assert_eq!(driver.request(0, &[], 16).len(), 16);
    }
}
