//! Disks in the guest.
#![allow(unsafe_code)] // UNSAFETY: two ioctls of block devices that no safe wrapper has.

use super::function::GuestFunction;
use super::{Guest, wait_for};
use crate::data::{Aligned, BLOCK, Pattern, hex};
use anyhow::{Context, Result, bail};
use nix::libc;
use sha2::{Digest, Sha256};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::Duration;

/// Bytes of one request of the sequential helpers here.
const CHUNK: usize = 1 << 20;

/// A disk, opened past the guest's page cache.
pub struct GuestDisk {
    file: File,
    name: String,
}

impl GuestDisk {
    /// Opens `/dev/NAME` (`vda`, `vdb`, …) as soon as it is there.
    pub fn open(guest: &mut Guest, name: &str, write: bool) -> Result<Self> {
        guest.need("virtio_blk")?;
        Self::wait_open(name, write)
    }

    /// Opens `/dev/NAME`, whose driver is loaded, for writing.
    pub fn direct(name: &str) -> Result<Self> {
        Self::wait_open(name, true)
    }

    /// Opens `/dev/NAME`, whose driver is loaded, for reading.
    pub fn read_only(name: &str) -> Result<Self> {
        Self::wait_open(name, false)
    }

    /// The disk whose controller `function` is, as [`GuestDisk::direct`], once it can be read: where a driver was bound anew, the node of before may
    /// still be there for a moment, with nothing behind it.
    pub fn of(function: &GuestFunction) -> Result<Self> {
        wait_for(&format!("disk of {} that can be read", function.address), Duration::from_secs(60), || {
            let disk = Self::direct(&function.disk().ok()?).ok()?;
            disk.read_block(0).is_ok().then_some(disk)
        })
    }

    /// As [`GuestDisk::direct`], but through the guest's page cache.
    pub fn cached(name: &str) -> Result<Self> {
        Self::wait_open_with(name, true, 0)
    }

    fn wait_open(name: &str, write: bool) -> Result<Self> {
        Self::wait_open_with(name, write, libc::O_DIRECT)
    }

    fn wait_open_with(name: &str, write: bool, flags: i32) -> Result<Self> {
        let path = PathBuf::from("/dev").join(name);
        let open = || OpenOptions::new().read(true).write(write).custom_flags(flags).open(&path);
        // The node comes a moment before there is something behind it.
        let is_early = |error: &io::Error| matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENXIO));
        let opened = wait_for(&format!("disk {name}"), Duration::from_secs(30), || match open() {
            Err(error) if is_early(&error) => None,
            opened => Some(opened),
        })?;
        let file = opened.with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Self { file, name: name.to_owned() })
    }

    /// Size in bytes.
    pub fn len(&self) -> Result<u64> {
        let sectors: u64 = self.attribute("size")?.parse()?;
        Ok(sectors * 512)
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// A file of the disk's folder in sysfs.
    pub fn attribute(&self, name: &str) -> Result<String> {
        let path = format!("/sys/class/block/{}/{name}", self.name);
        Ok(std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?.trim().to_owned())
    }

    /// The open device.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Writes `count` blocks of `pattern` from block `first` on, in requests of up to 1 MiB, without a flush.
    pub fn write_pattern(&self, pattern: Pattern, first: u64, count: u64) -> Result<()> {
        let mut buffer = Aligned::new(CHUNK);
        self.in_chunks(first, count, |at, blocks| {
            let bytes = blocks * BLOCK;
            pattern.blocks(at, &mut buffer.get_mut()[..bytes]);
            self.file
                .write_all_at(&buffer.get()[..bytes], at * BLOCK as u64)
                .with_context(|| format!("writing {} block {at}", self.name))
        })
    }

    /// Checks that `count` blocks of `pattern` stand from block `first` on.
    pub fn check_pattern(&self, pattern: Pattern, first: u64, count: u64) -> Result<()> {
        let mut buffer = Aligned::new(CHUNK);
        self.in_chunks(first, count, |at, blocks| {
            let bytes = blocks * BLOCK;
            self.file
                .read_exact_at(&mut buffer.get_mut()[..bytes], at * BLOCK as u64)
                .with_context(|| format!("reading {} block {at}", self.name))?;
            match pattern.first_difference(at, &buffer.get()[..bytes]) {
                None => Ok(()),
                Some(block) => bail!("{} block {block} does not hold what was written", self.name),
            }
        })
    }

    /// SHA-256 of `count` blocks from block `first` on.
    pub fn sha256(&self, first: u64, count: u64) -> Result<String> {
        let (mut buffer, mut sum) = (Aligned::new(CHUNK), Sha256::new());
        self.in_chunks(first, count, |at, blocks| {
            let bytes = &mut buffer.get_mut()[..blocks * BLOCK];
            self.file
                .read_exact_at(bytes, at * BLOCK as u64)
                .with_context(|| format!("reading {} block {at}", self.name))?;
            sum.update(bytes);
            Ok(())
        })?;
        Ok(hex(&sum.finalize()))
    }

    /// Reads one block.
    pub fn read_block(&self, index: u64) -> Result<Aligned> {
        let mut buffer = Aligned::new(BLOCK);
        self.file
            .read_exact_at(buffer.get_mut(), index * BLOCK as u64)
            .with_context(|| format!("reading {} block {index}", self.name))?;
        Ok(buffer)
    }

    /// Writes one block.
    pub fn write_block(&self, index: u64, block: &Aligned) -> Result<()> {
        let at = index * BLOCK as u64;
        self.file
            .write_all_at(block.get(), at)
            .with_context(|| format!("writing {} block {index}", self.name))
    }

    /// Flushes: afterwards everything written is durable.
    pub fn flush(&self) -> Result<()> {
        self.file.sync_all().with_context(|| format!("flushing {}", self.name))
    }

    /// Discards `count` blocks from `first` on.
    pub fn discard(&self, first: u64, count: u64) -> Result<()> {
        // SAFETY: BLKDISCARD reads two u64 (start and length in bytes) from the array, which outlives the call.
        unsafe { blkdiscard(self.file.as_raw_fd(), &byte_range(first, count)) }
            .with_context(|| format!("discarding {count} blocks of {} from {first}", self.name))?;
        Ok(())
    }

    /// Has `count` blocks from `first` on filled with zeros by the device.
    pub fn write_zeroes(&self, first: u64, count: u64) -> Result<()> {
        // SAFETY: BLKZEROOUT reads two u64 (start and length in bytes) from the array, which outlives the call.
        unsafe { blkzeroout(self.file.as_raw_fd(), &byte_range(first, count)) }
            .with_context(|| format!("zeroing {count} blocks of {} from {first}", self.name))?;
        Ok(())
    }

    fn in_chunks(
        &self,
        first: u64,
        count: u64,
        mut each: impl FnMut(u64, usize) -> Result<()>,
    ) -> Result<()> {
        let most = (CHUNK / BLOCK) as u64;
        let mut at = first;
        while at < first + count {
            let blocks = most.min(first + count - at);
            each(at, usize::try_from(blocks)?)?;
            at += blocks;
        }
        Ok(())
    }
}

/// Makes the guest forget what it has read of any disk, and what has been written back.
pub fn drop_caches() -> Result<()> {
    std::fs::write("/proc/sys/vm/drop_caches", "3").context("cannot drop the page cache")
}

// Linux, include/uapi/linux/fs.h.
nix::ioctl_write_ptr_bad!(
    /// BLKDISCARD.
    blkdiscard,
    nix::request_code_none!(0x12, 119),
    [u64; 2]
);
nix::ioctl_write_ptr_bad!(
    /// BLKZEROOUT.
    blkzeroout,
    nix::request_code_none!(0x12, 127),
    [u64; 2]
);

fn byte_range(first: u64, count: u64) -> [u64; 2] {
    [first * BLOCK as u64, count * BLOCK as u64]
}
