//! Memory behind a simulated BAR.

#![allow(unsafe_code)] // UNSAFETY: mmap(2), and registers that guests change behind the compiler's back.

use crate::{GRANULE, MappedBar};
use outboard_bus::Width;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

/// Zeroed memory, aligned to 16 KiB; takes no room until it is used.
#[derive(Debug)]
pub(super) struct Memory {
    /// First byte of the mapping, and its length: more than is used.
    mapping: NonNull<u8>,
    mapped: usize,
    start: NonNull<u8>,
    len: u64,
}

// SAFETY: an address and a length; what is there is only accessed volatile, as registers that anybody may change.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    pub(super) fn new(len: u64) -> io::Result<Self> {
        let mapped = len.checked_add(GRANULE).and_then(|n| usize::try_from(n).ok());
        let mapped = mapped.ok_or(io::ErrorKind::OutOfMemory)?;
        // Shared, with nobody: a BAR of any size is no private memory of the process, which has a limit on that (crates/jail).
        let flags = libc::MAP_SHARED | libc::MAP_ANON | libc::MAP_NORESERVE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let mapping = unsafe { libc::mmap(std::ptr::null_mut(), mapped, access, flags, -1, 0) };
        if mapping == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mapping = mapping.cast::<u8>();
        let start = mapping.wrapping_add(mapping.align_offset(GRANULE as usize));
        let not_null = |p| NonNull::new(p).expect("mmap succeeded");
        Ok(Self { mapping: not_null(mapping), mapped, start: not_null(start), len })
    }

    /// Reads a register; `None` beyond the end or unaligned.
    pub(super) fn read(&self, offset: u64, width: Width) -> Option<u64> {
        let at = self.at(offset, width)?;
        // SAFETY: `at` is within the mapping and aligned to the width.
        Some(unsafe {
            match width {
                Width::B1 => u64::from(at.read_volatile()),
                Width::B2 => u64::from(at.cast::<u16>().read_volatile()),
                Width::B4 => u64::from(at.cast::<u32>().read_volatile()),
                Width::B8 => at.cast::<u64>().read_volatile(),
            }
        })
    }

    /// Writes a register; `None` beyond the end or unaligned.
    pub(super) fn write(&self, offset: u64, width: Width, value: u64) -> Option<()> {
        let at = self.at(offset, width)?;
        // SAFETY: `at` is within the mapping and aligned to the width.
        unsafe {
            match width {
                Width::B1 => at.write_volatile(value as u8),
                Width::B2 => at.cast::<u16>().write_volatile(value as u16),
                Width::B4 => at.cast::<u32>().write_volatile(value as u32),
                Width::B8 => at.cast::<u64>().write_volatile(value),
            }
        }
        Some(())
    }

    fn at(&self, offset: u64, width: Width) -> Option<NonNull<u8>> {
        let end = offset.checked_add(width.bytes())?;
        let fits = end <= self.len && offset.is_multiple_of(width.bytes());
        // SAFETY: the offset is within the mapping's `len` bytes, just checked.
        fits.then(|| unsafe { self.start.add(offset as usize) })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is this one's own; who maps a part of it holds on to it.
        unsafe { libc::munmap(self.mapping.as_ptr().cast(), self.mapped) };
    }
}

/// A part of a BAR.
pub(super) struct Part {
    pub(super) memory: Arc<Memory>,
    pub(super) offset: u64,
    pub(super) len: u64,
}

impl MappedBar for Part {
    fn host(&self) -> NonNull<u8> {
        assert!(self.offset + self.len <= self.memory.len);
        // SAFETY: within the mapping, just checked.
        unsafe { self.memory.start.add(self.offset as usize) }
    }

    fn len(&self) -> u64 {
        self.len
    }
}
