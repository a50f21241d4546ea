//! A part of a BAR in this process's address space.

#![allow(unsafe_code)] // UNSAFETY: mmap(2) at an alignment has no wrapper; a mapping is shared between threads by its address.

use crate::{GRANULE, MappedBar};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

/// Read and write, never execute. The device stays open in the kernel until this is dropped.
pub(super) struct Mapping {
    host: NonNull<u8>,
    len: u64,
}

// SAFETY: it is an address and a length; what is there is the device's, and only ever accessed volatile.
unsafe impl Send for Mapping {}
// SAFETY: as above; nothing in it changes.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes at `at` of the device's file, which are at `offset` of a BAR of `bar_len` bytes.
    ///
    /// The address is as well aligned as the BAR allows, so that the hypervisor and the CPU can map it in large pieces.
    pub(super) fn new(
        device: BorrowedFd<'_>,
        at: u64,
        len: u64,
        offset: u64,
        bar_len: u64,
    ) -> io::Result<Self> {
        const MOST_ALIGNED: u64 = 1 << 30;
        let align = bar_len.clamp(GRANULE, MOST_ALIGNED);
        let reserved = len.checked_add(align).and_then(|n| usize::try_from(n).ok());
        let reserved = reserved.ok_or(io::ErrorKind::OutOfMemory)?;
        let file_offset = libc::off_t::try_from(at).map_err(io::Error::other)?;
        let (fresh, nothing) = (libc::MAP_PRIVATE | libc::MAP_ANON | libc::MAP_NORESERVE, libc::PROT_NONE);
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), reserved, nothing, fresh, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let first = start as u64;
        let head = (offset % align + align - first % align) % align;
        let (head_len, tail) = (head as usize, (head + len) as usize);
        let (access, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED);
        // SAFETY: head < align, so the `len` bytes behind it lie within what was just reserved and nobody else uses.
        let mapped = unsafe {
            let target = start.cast::<u8>().add(head_len).cast();
            libc::mmap(target, len as usize, access, shared, device.as_raw_fd(), file_offset)
        };
        let failed = (mapped == libc::MAP_FAILED).then(io::Error::last_os_error);
        // SAFETY: what is given back was reserved above: the two ends, or all of it where the mapping failed.
        unsafe {
            match failed {
                Some(_) => drop_range(start, reserved),
                None => {
                    drop_range(start, head_len);
                    drop_range(start.cast::<u8>().add(tail).cast(), reserved - tail);
                }
            }
        }
        match failed {
            Some(error) => Err(error),
            None => Ok(Self { host: NonNull::new(mapped.cast()).expect("mmap succeeded"), len }),
        }
    }
}

/// # Safety
/// As munmap(2): the range is the caller's, and nobody refers to it.
unsafe fn drop_range(start: *mut libc::c_void, len: usize) {
    if len > 0 {
        // SAFETY: the caller's promise.
        unsafe { libc::munmap(start, len) };
    }
}

impl MappedBar for Mapping {
    fn host(&self) -> NonNull<u8> {
        self.host
    }

    fn len(&self) -> u64 {
        self.len
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is this mapping's own; whoever holds it has taken it out of the guest.
        unsafe { drop_range(self.host.as_ptr().cast(), self.len as usize) };
    }
}
