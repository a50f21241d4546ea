//! A small virtio driver for tests: drives a device through its PCI function as a guest's driver would.

use crate::transport::{feature, status};
use crate::{GuestMemory, VirtioDevice, VirtioPci};
use outboard_bus::{MsiMessage, MsiSink, Width};
use outboard_pci::{ConfigAccess, PciFunction};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};

pub const RAM: u64 = 16 << 20;
/// Where RAM starts; nothing is below it.
pub const RAM_BASE: u64 = 0x4000_0000;
/// How long a test waits for a device before it fails: far beyond what any of them takes.
const PATIENCE: Duration = Duration::from_secs(20);

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Collects the messages that the function sends; the data is the vector's number.
#[derive(Default)]
pub struct Msis {
    sent: Mutex<Vec<u32>>,
    arrived: Condvar,
}

impl MsiSink for Msis {
    fn send(&self, message: MsiMessage) {
        self.sent.lock().unwrap().push(message.data);
        self.arrived.notify_all();
    }
}

impl Msis {
    pub fn take(&self) -> Vec<u32> {
        std::mem::take(&mut self.sent.lock().unwrap())
    }
}

/// One queue's rings, and where the driver is in them.
pub struct TestQueue {
    pub size: u16,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    pub next_avail: u16,
    pub last_used: u16,
    next_desc: u16,
}

/// A descriptor as a test writes it.
#[derive(Clone, Copy, Debug)]
pub struct Desc {
    pub address: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

pub struct Driver {
    pub function: Arc<VirtioPci>,
    pub memory: GuestMemory,
    pub msis: Arc<Msis>,
    pub queues: Vec<TestQueue>,
    next_free: u64,
}

impl Driver {
    /// A driver that has found the function and switched on MSI-X and bus master, but not touched the device.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(RAM_BASE), RAM as usize)]).unwrap();
        let msis = Arc::new(Msis::default());
        let function =
            VirtioPci::new(device, memory.clone(), Arc::clone(&msis) as Arc<dyn MsiSink>, None).unwrap();
        let driver = Self { function, memory, msis, queues: vec![], next_free: RAM_BASE };
        driver.enable_interrupts();
        driver
    }

    /// Every vector unmasked, with its number as data.
    pub fn enable_interrupts(&self) {
        self.config_write(0x04, Width::B2, 0x6);
        let vectors = self.common(0x12, Width::B2) + 1;
        for vector in 0..vectors {
            self.write(0x4000 + 16 * vector, Width::B4, 0x0802_0040);
            self.write(0x4008 + 16 * vector, Width::B4, vector);
            self.write(0x400c + 16 * vector, Width::B4, 0);
        }
        self.config_write(0x42, Width::B2, 0x8000);
    }

    pub fn config_write(&self, offset: u16, width: Width, value: u32) {
        let access = ConfigAccess::new(offset, width).unwrap();
        self.function.config_write(access, value << access.shift());
    }

    pub fn config_read(&self, offset: u16, width: Width) -> u32 {
        let access = ConfigAccess::new(offset, width).unwrap();
        width.truncate(u64::from(self.function.config_read(access) >> access.shift())) as u32
    }

    pub fn read(&self, offset: u64, width: Width) -> u64 {
        self.function.bar_read(0, offset, width).unwrap()
    }

    pub fn write(&self, offset: u64, width: Width, value: u64) {
        self.function.bar_write(0, offset, width, value).unwrap();
    }

    pub fn common(&self, offset: u64, width: Width) -> u64 {
        self.read(offset, width)
    }

    pub fn status(&self) -> u8 {
        self.read(0x14, Width::B1) as u8
    }

    pub fn set_status(&self, value: u8) {
        self.write(0x14, Width::B1, value.into());
    }

    pub fn is_broken(&self) -> bool {
        self.status() & status::NEEDS_RESET != 0
    }

    pub fn reset(&mut self) {
        self.set_status(0);
        assert_eq!(self.status(), 0);
        self.queues.clear();
        self.next_free = RAM_BASE;
    }

    pub fn offered(&self) -> u64 {
        self.write(0x00, Width::B4, 0);
        let low = self.read(0x04, Width::B4);
        self.write(0x00, Width::B4, 1);
        low | self.read(0x04, Width::B4) << 32
    }

    pub fn accept(&self, features: u64) {
        for (select, word) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.write(0x08, Width::B4, select);
            self.write(0x0c, Width::B4, word);
        }
    }

    /// Everything up to DRIVER_OK: offered features cut to `mask` (version 1 always), every queue at most `size` long.
    pub fn start(&mut self, mask: u64, size: u16) {
        self.set_status(1);
        self.set_status(3);
        self.accept(self.offered() & mask | feature::VERSION_1);
        self.set_status(3 | status::FEATURES_OK);
        assert_eq!(self.status(), 3 | status::FEATURES_OK);
        self.write(0x10, Width::B2, 0);
        for index in 0..self.read(0x12, Width::B2) as u16 {
            self.set_up_queue(index, size);
        }
        self.set_status(3 | status::FEATURES_OK | status::DRIVER_OK);
    }

    /// Allocates rings for queue `index` and enables it; its vector is its index plus one.
    pub fn set_up_queue(&mut self, index: u16, size: u16) {
        self.write(0x16, Width::B2, index.into());
        let size = size.min(self.read(0x18, Width::B2) as u16);
        let queue = TestQueue {
            size,
            desc: self.alloc(16 * u64::from(size)),
            avail: self.alloc(6 + 2 * u64::from(size)),
            used: self.alloc(6 + 8 * u64::from(size)),
            next_avail: 0,
            last_used: 0,
            next_desc: 0,
        };
        for (address, len) in
            [(queue.avail, 6 + 2 * usize::from(size)), (queue.used, 6 + 8 * usize::from(size))]
        {
            self.memory.write_slice(&vec![0; len], GuestAddress(address)).unwrap();
        }
        self.write(0x18, Width::B2, size.into());
        self.write(0x1a, Width::B2, u64::from(index) + 1);
        for (offset, address) in [(0x20, queue.desc), (0x28, queue.avail), (0x30, queue.used)] {
            self.write(offset, Width::B4, address & 0xffff_ffff);
            self.write(offset + 4, Width::B4, address >> 32);
        }
        self.write(0x1c, Width::B2, 1);
        assert_eq!(self.read(0x1c, Width::B2), 1);
        self.queues.push(queue);
    }

    /// `len` bytes of RAM, 64-byte aligned, never given back before a reset.
    pub fn alloc(&mut self, len: u64) -> u64 {
        let at = self.next_free;
        self.next_free = (at + len).next_multiple_of(64);
        assert!(self.next_free <= RAM_BASE + RAM, "test uses more RAM than there is");
        at
    }

    pub fn put(&mut self, data: &[u8]) -> u64 {
        let at = self.alloc(data.len() as u64);
        self.memory.write_slice(data, GuestAddress(at)).unwrap();
        at
    }

    pub fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }

    pub fn write_desc(&self, table: u64, index: u16, desc: Desc) {
        let at = GuestAddress(table + 16 * u64::from(index));
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&desc.address.to_le_bytes());
        raw[8..12].copy_from_slice(&desc.len.to_le_bytes());
        raw[12..14].copy_from_slice(&desc.flags.to_le_bytes());
        raw[14..].copy_from_slice(&desc.next.to_le_bytes());
        self.memory.write_slice(&raw, at).unwrap();
    }

    /// Makes a chain of `buffers` (address, length, device-writable) available, without ringing; its head.
    pub fn add(&mut self, queue: usize, buffers: &[(u64, u32, bool)]) -> u16 {
        let (table, size, first) = {
            let q = &self.queues[queue];
            (q.desc, q.size, q.next_desc)
        };
        for (i, (address, len, writable)) in buffers.iter().enumerate() {
            let index = (first + i as u16) % size;
            let more = i + 1 < buffers.len();
            let flags = if *writable { WRITE } else { 0 } | if more { NEXT } else { 0 };
            self.write_desc(
                table,
                index,
                Desc { address: *address, len: *len, flags, next: (index + 1) % size },
            );
        }
        self.queues[queue].next_desc = (first + buffers.len() as u16) % size;
        self.publish(queue, first);
        first
    }

    /// Puts chain `head` into the available ring.
    pub fn publish(&mut self, queue: usize, head: u16) {
        let q = &mut self.queues[queue];
        let slot = q.avail + 4 + 2 * u64::from(q.next_avail % q.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        q.next_avail = q.next_avail.wrapping_add(1);
        let index = q.next_avail;
        self.set_avail_index(queue, index);
    }

    pub fn set_avail_index(&self, queue: usize, index: u16) {
        let q = &self.queues[queue];
        self.memory.store(index, GuestAddress(q.avail + 2), std::sync::atomic::Ordering::SeqCst).unwrap();
    }

    pub fn kick(&self, queue: usize) {
        self.write(0x3000 + 4 * queue as u64, Width::B2, queue as u64);
    }

    /// The next completion of `queue`, if there is one: head and written length.
    pub fn poll_used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let q = &mut self.queues[queue];
        let index: u16 =
            self.memory.load(GuestAddress(q.used + 2), std::sync::atomic::Ordering::SeqCst).unwrap();
        if index == q.last_used {
            return None;
        }
        let slot = q.used + 4 + 8 * u64::from(q.last_used % q.size);
        let element: u64 = self.memory.read_obj(GuestAddress(slot)).unwrap();
        q.last_used = q.last_used.wrapping_add(1);
        // used_event: interrupt for the next one too.
        self.memory.write_obj(q.last_used, GuestAddress(q.avail + 4 + 2 * u64::from(q.size))).unwrap();
        Some((element as u16, (element >> 32) as u32))
    }

    /// The next completion of `queue`, waited for by its interrupt.
    pub fn wait_used(&mut self, queue: usize) -> (u16, u32) {
        let deadline = std::time::Instant::now() + PATIENCE;
        loop {
            if let Some(used) = self.poll_used(queue) {
                return used;
            }
            assert!(!self.is_broken(), "device broke");
            assert!(std::time::Instant::now() < deadline, "no completion on queue {queue}");
            self.pause();
        }
    }

    /// Waits until the device says that it needs a reset.
    pub fn wait_broken(&self) {
        let deadline = std::time::Instant::now() + PATIENCE;
        while !self.is_broken() {
            assert!(std::time::Instant::now() < deadline, "device took a broken queue without complaint");
            self.pause();
        }
    }

    /// Until an interrupt, or a short while.
    fn pause(&self) {
        let sent = self.msis.sent.lock().unwrap();
        let _ = self.msis.arrived.wait_timeout(sent, Duration::from_millis(2)).unwrap();
    }

    /// One whole request: `out` given, `answer` bytes wanted; what the device wrote, cut to the length it claims.
    pub fn request(&mut self, queue: usize, out: &[u8], answer: u32) -> Vec<u8> {
        let keep = self.next_free;
        let given = self.put(out);
        let wanted = self.alloc(answer.into());
        let mut buffers = vec![];
        if !out.is_empty() {
            buffers.push((given, out.len() as u32, false));
        }
        if answer > 0 {
            buffers.push((wanted, answer, true));
        }
        let head = self.add(queue, &buffers);
        self.kick(queue);
        let (done, len) = self.wait_used(queue);
        assert_eq!(done, head);
        self.next_free = keep;
        self.get(wanted, len as usize)
    }
}
