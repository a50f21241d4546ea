//! The DMA device of a slot, driven from user space: no module, no manners.

use super::pci::{DmaPage, PAGE, Registers};
use super::published::Hardware;
use anyhow::{Context, Result, ensure};
use std::cell::RefCell;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Vendor and device of our own DMA device, and of the published one.
pub const OWN: (u16, u16) = (0x1234, 0x0bd0);
/// The same.
pub const PUBLISHED: (u16, u16) = (0x1b36, 0x0015);
/// Its registers, as far as they are used here (crates/abi).
pub mod register {
    /// R: root port that is served.
    pub const SERVED: usize = 0x0c;
    /// R, 64 bits.
    pub const LIMIT_BYTES: usize = 0x10;
    /// R.
    pub const QUEUES: usize = 0x24;
    /// W: [`super::ENABLE`], [`super::RESET`].
    pub const CONTROL: usize = 0x30;
    /// R.
    pub const STATE: usize = 0x34;
    /// R, 64 bits.
    pub const STAT_BYTES: usize = 0x80;
    /// R, 64 bits.
    pub const STAT_ENTRIES: usize = 0x88;
    /// R, 64 bits.
    pub const STAT_MAPS: usize = 0x90;
    /// R, 64 bits.
    pub const STAT_UNMAPS: usize = 0x98;
    /// First queue's base.
    pub const QUEUE_FIRST: usize = 0x400;
    /// Bytes to the next.
    pub const QUEUE_STRIDE: usize = 0x20;
    /// In a queue, W.
    pub const DOORBELL: usize = 0x08;
    /// In a queue, W.
    pub const DOORBELL_LATER: usize = 0x0c;
    /// In a queue, R.
    pub const STATUS: usize = 0x10;
}
/// Values of the control register.
pub const ENABLE: u32 = 1;
/// The same.
pub const RESET: u32 = 2;
/// Operations.
pub const MAP: u32 = 1;
/// The same.
pub const UNMAP: u32 = 2;
/// Unit of mappings.
pub const GRANULE: u64 = 16 << 10;
/// Status codes.
pub mod status {
    /// Done.
    pub const OK: u32 = 0;
    /// Not RAM.
    pub const BAD_RANGE: u32 = 2;
    /// Not whole granules.
    pub const MISALIGNED: u32 = 3;
    /// No mapping has this name.
    pub const NO_SUCH_HANDLE: u32 = 8;
    /// Not enabled.
    pub const OFF: u32 = 10;
    /// Not done yet.
    pub const BUSY: u32 = 11;
    /// Entries are not in RAM.
    pub const BAD_QUEUE: u32 = 12;
    /// 0 or too many.
    pub const BAD_COUNT: u32 = 13;
    /// Only unmappings can wait.
    pub const NOT_LATER: u32 = 15;
}

/// Folders in sysfs of the functions with these ids, in order, each with memory decoding and bus master on.
pub fn functions((vendor, device): (u16, u16)) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/bus/pci/devices")?.flatten() {
        let word = |name: &str| {
            let text = fs::read_to_string(entry.path().join(name)).unwrap_or_default();
            u16::from_str_radix(text.trim().trim_start_matches("0x"), 16).unwrap_or(0)
        };
        if (word("vendor"), word("device")) == (vendor, device) {
            found.push(entry.path());
        }
    }
    found.sort();
    found.iter().try_for_each(|folder| enable(folder))?;
    Ok(found)
}

/// Turns memory decoding and bus master on, and sees that the function says so.
pub fn enable(folder: &Path) -> Result<()> {
    let config = OpenOptions::new().read(true).write(true).open(folder.join("config"))?;
    let mut command = [0; 2];
    config.read_exact_at(&mut command, 4)?;
    command[0] |= 0b110;
    config.write_all_at(&command, 4)?;
    config.read_exact_at(&mut command, 4)?;
    ensure!(command[0] & 0b110 == 0b110, "COMMAND reads {command:x?}");
    Ok(())
}

/// Our own DMA device.
pub struct DmaDevice {
    registers: Registers,
    /// Entries of queue 0.
    pub queue: DmaPage,
}

impl DmaDevice {
    /// All of them.
    pub fn all() -> Result<Vec<Self>> {
        let open = |folder: &PathBuf| {
            Ok(Self { registers: Registers::of_bar(folder, 0, PAGE)?, queue: DmaPage::new()? })
        };
        functions(OWN)?.iter().map(open).collect()
    }

    /// A register of 32 bits.
    pub fn read(&self, register: usize) -> u32 {
        self.registers.read(register)
    }

    /// A register of 64 bits.
    pub fn read_long(&self, register: usize) -> u64 {
        self.registers.read(register)
    }

    /// Writes a register, of any width.
    pub fn write<T: Copy>(&self, register: usize, value: T) {
        self.registers.write(register, value);
    }

    /// Enables it, with queue 0 in its own page.
    pub fn start(&self) {
        self.write(register::CONTROL, ENABLE);
        self.write(register::QUEUE_FIRST, self.queue.address());
    }

    /// Resets it, and with it the device that it serves.
    pub fn reset(&self) {
        self.write(register::CONTROL, RESET);
    }

    /// Writes entry `index` of the queue's page.
    pub fn put(&self, index: usize, op: u32, address: u64, len: u64, handle: u64) {
        let at = index * 64;
        for (offset, word) in [(0, u64::from(op)), (8, address), (16, len), (24, handle), (32, 0)] {
            self.queue.write(at + offset, word);
        }
        self.queue.write(at + 40, u64::from(status::BUSY));
    }

    /// Rings queue 0's bell; the queue's status.
    pub fn ring(&self, count: u32) -> u32 {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.write(register::QUEUE_FIRST + register::DOORBELL, count);
        self.read(register::QUEUE_FIRST + register::STATUS)
    }

    /// Handle, bus address and status of entry `index`.
    pub fn result(&self, index: usize) -> (u64, u64, u32) {
        let at = index * 64;
        (self.queue.read(at + 24), self.queue.read(at + 32), self.queue.read(at + 40))
    }

    /// Does one thing; handle, bus address and status.
    pub fn one(&self, op: u32, address: u64, len: u64, handle: u64) -> (u64, u64, u32) {
        self.put(0, op, address, len, handle);
        self.ring(1);
        self.result(0)
    }

    /// Maps the granule around a page; handle, and the page's bus address.
    pub fn map_page(&self, page: &DmaPage) -> Result<(u64, u64)> {
        let first = page.address() / GRANULE * GRANULE;
        let (handle, bus, code) = self.one(MAP, first, GRANULE, 0);
        ensure!(code == status::OK, "mapping {:#x} ended with status {code}", page.address());
        Ok((handle, bus + (page.address() - first)))
    }
}

/// The published function of a slot's DMA device, and pages of this process by their physical addresses.
pub struct PublishedFunction {
    registers: Registers,
    pages: Vec<DmaPage>,
    /// What is written to somewhere else than to the pages: a test would be wrong.
    astray: RefCell<Option<u64>>,
}

impl PublishedFunction {
    /// The only one, with `pages` pages for whatever the driver wants.
    pub fn open(pages: usize) -> Result<Self> {
        let found = functions(PUBLISHED)?;
        let folder = found.first().context("there is no function with the published ids")?;
        ensure!(found.len() == 1, "{} published functions", found.len());
        let pages = (0..pages).map(|_| DmaPage::new()).collect::<Result<_>>()?;
        Ok(Self { registers: Registers::of_bar(folder, 0, PAGE)?, pages, astray: RefCell::default() })
    }

    /// The pages.
    pub fn pages(&self) -> &[DmaPage] {
        &self.pages
    }

    /// Fails if the driver touched memory that is none of the pages.
    pub fn check(&self) -> Result<()> {
        match *self.astray.borrow() {
            None => Ok(()),
            Some(address) => anyhow::bail!("the test's driver used {address:#x}, which is none of its pages"),
        }
    }

    fn page(&self, at: u64) -> Option<(&DmaPage, usize)> {
        let page = self.pages.iter().find(|page| at / PAGE as u64 * PAGE as u64 == page.address());
        if page.is_none() {
            *self.astray.borrow_mut() = Some(at);
        }
        Some((page?, (at % PAGE as u64) as usize))
    }
}

impl Hardware for PublishedFunction {
    fn read(&self, register: u32) -> u32 {
        self.registers.read(register as usize)
    }

    fn write(&self, register: u32, value: u32) {
        self.registers.write(register as usize, value);
    }

    fn store(&self, at: u64, bytes: &[u8]) {
        if let Some((page, offset)) = self.page(at) {
            bytes.iter().enumerate().for_each(|(index, byte)| page.write(offset + index, *byte));
        }
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }

    fn load(&self, at: u64, len: usize) -> Vec<u8> {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let Some((page, offset)) = self.page(at) else { return vec![0; len] };
        (0..len).map(|index| page.read(offset + index)).collect()
    }
}
