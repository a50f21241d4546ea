//! Memory that a device may reach.

#![allow(unsafe_code)] // UNSAFETY: a device changes the memory behind the compiler's back, so it is reached by address.

use super::{Step, Subject, Verdict};
use crate::{BusAddress, DmaDomain, GRANULE, Release};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::Arc;

/// Whole granules of zeroed memory.
pub(super) struct Memory {
    start: NonNull<u8>,
    layout: Layout,
}

impl Memory {
    pub(super) fn new(granules: u64) -> Self {
        let size = (granules * GRANULE) as usize;
        let layout = Layout::from_size_align(size, GRANULE as usize).expect("a small size");
        assert!(size > 0);
        // SAFETY: the layout is not empty.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).expect("memory for a test");
        Self { start, layout }
    }

    pub(super) fn host(&self) -> NonNull<u8> {
        self.start
    }

    pub(super) fn len(&self) -> u64 {
        self.layout.size() as u64
    }

    pub(super) fn write(&self, offset: usize, value: u32) {
        assert!(offset + 4 <= self.layout.size() && offset.is_multiple_of(4));
        // SAFETY: in bounds and aligned, just checked; volatile, as a device may read it.
        unsafe { self.start.as_ptr().add(offset).cast::<u32>().write_volatile(value) };
    }

    pub(super) fn read(&self, offset: usize) -> u32 {
        assert!(offset + 4 <= self.layout.size() && offset.is_multiple_of(4));
        // SAFETY: in bounds and aligned, just checked; volatile, as a device may write it.
        unsafe { self.start.as_ptr().add(offset).cast::<u32>().read_volatile() }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout; `Mapped` has unmapped it.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

/// Memory mapped for the device, until dropped.
pub(super) struct Mapped {
    /// `None` once it was taken out.
    memory: Option<Memory>,
    pub(super) bus: BusAddress,
    domain: Arc<dyn DmaDomain>,
}

impl Mapped {
    pub(super) fn new(subject: &Subject, memory: Memory, guest: u64) -> Result<Self, Verdict> {
        // SAFETY: the memory is freed only once it was unmapped.
        let bus = unsafe { subject.domain.map(memory.host(), memory.len(), guest) }.step("map")?;
        Ok(Self { memory: Some(memory), bus, domain: Arc::clone(&subject.domain) })
    }

    pub(super) fn memory(&self) -> &Memory {
        self.memory.as_ref().expect("taken out only by value")
    }

    /// Takes the mapping away; the memory stays.
    pub(super) fn unmap(mut self) -> Result<Memory, Verdict> {
        self.domain.unmap(self.bus, self.memory().len(), Release::Driver).step("unmap")?;
        Ok(self.memory.take().expect("taken out only by value"))
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let Some(memory) = self.memory.take() else { return };
        if self.domain.unmap(self.bus, memory.len(), Release::Driver).is_err() {
            // The device may still write to it.
            std::mem::forget(memory);
        }
    }
}
