//! Block device (virtio 1.2, section 5.2): an image of crates/disk-image, one worker for each queue.

mod request;

#[cfg(test)]
mod tests;

pub use outboard_disk_image::{Disk, DiskError, DiskFormat, DiskHealth, DiskOptions, MAX_BACKING_FILES};

use crate::{Activation, ActiveQueue, GuestMemory, Health, VirtioDevice, VirtioInterrupt, WorkQueue, Worker};
use outboard_disk_image::{SECTOR, Scratch};
use outboard_jail::ThreadKind;
use request::{ID_LEN, Server};
use std::io;
use std::sync::Arc;

/// Most sectors of one discard or write-zeroes range (64 MiB): bounds how long a reset waits for one.
const MAX_RANGE_SECTORS: u32 = (64 << 20) / SECTOR as u32;
/// Most ranges of one discard or write-zeroes request.
const MAX_RANGES: u32 = 16;
const QUEUE_SIZE: u16 = 256;
/// Most queues: more do not help one image, and each has a thread.
const MAX_QUEUES: u16 = 4;

/// Feature bits (virtio 1.2, section 5.2.3).
mod feature {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// A virtio block device.
pub struct Block {
    name: String,
    id: [u8; ID_LEN],
    disk: Arc<Disk>,
    queues: u16,
    workers: Vec<Worker<()>>,
    health: Health,
}

impl Block {
    /// A device called `name` (for logs and threads) for `disk`, whose serial number the guest sees cut to 20 bytes,
    /// with a queue for each of `vcpus` vCPUs, at most four.
    pub fn new(name: &str, serial: &str, disk: Disk, vcpus: u32) -> Self {
        let mut id = [0; ID_LEN];
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        let queues = vcpus.clamp(1, MAX_QUEUES.into()) as u16;
        Self {
            name: name.to_owned(),
            id,
            disk: Arc::new(disk),
            queues,
            workers: vec![],
            health: Health::default(),
        }
    }

    fn spawn(
        &self,
        queue: ActiveQueue,
        memory: GuestMemory,
        interrupt: Arc<dyn VirtioInterrupt>,
        write_through: bool,
    ) -> io::Result<Worker<()>> {
        let (name, id, disk) = (self.name.clone(), self.id, Arc::clone(&self.disk));
        let thread = format!("{name}-q{}", queue.index);
        let wake = Arc::clone(&queue.doorbell);
        let (health, for_failure) = (self.health.clone(), Arc::clone(&interrupt));
        Worker::spawn(ThreadKind::Block, &thread, wake, &self.health, for_failure, move |stop| {
            let scratch = Scratch::default();
            let mut server =
                Server { name: &name, disk: &disk, id, write_through, stop, scratch, health: &health };
            WorkQueue::new(queue, &memory, interrupt).serve(stop, |request| server.serve(request));
        })
    }
}

impl VirtioDevice for Block {
    fn device_id(&self) -> u16 {
        2
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn health(&self) -> &Health {
        &self.health
    }

    fn features(&self) -> u64 {
        use feature::*;
        let write = if self.disk.is_read_only() { RO } else { DISCARD | WRITE_ZEROES };
        SEG_MAX | BLK_SIZE | FLUSH | TOPOLOGY | MQ | write
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(self.queues)]
    }

    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.disk.len() / SECTOR).to_le_bytes());
        // seg_max: a chain of a queue's length less header and status.
        put(12, &u32::from(QUEUE_SIZE - 2).to_le_bytes());
        // blk_size; physical blocks of 2^3 of them: page-sized writes spare a read in most host file systems.
        put(20, &(SECTOR as u32).to_le_bytes());
        put(24, &[3, 0]);
        put(34, &self.queues.to_le_bytes());
        // Discard: sectors and ranges at most, alignment; write-zeroes: the same, may unmap.
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        put(44, &8u32.to_le_bytes());
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &MAX_RANGES.to_le_bytes());
        put(56, &[1]);
        config
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let Activation { memory, features, queues, interrupt } = activation;
        let write_through = features & feature::FLUSH == 0;
        for queue in queues.into_iter().flatten() {
            let worker = self.spawn(queue, memory.clone(), Arc::clone(&interrupt), write_through)?;
            self.workers.push(worker);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.workers.clear();
    }
}
