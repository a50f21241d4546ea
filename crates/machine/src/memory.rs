//! Guest RAM: one anonymous mapping of this process.

#![allow(unsafe_code)] // UNSAFETY: mmap(2) with an alignment has no wrapper; the VM takes a raw pointer to it.

use crate::Error;
use outboard_host_pci::{BusAddress, DmaDomain, Release};
use outboard_hypervisor::{MemoryKind, Vm};
use outboard_platform::GuestMemory;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryRegion, GuestRegionMmap};

/// Guest RAM, mapped into the VM for as long as this lives.
///
/// vCPUs and devices are stopped before it is dropped; should one still hold on to the memory, it is leaked, not freed.
pub(crate) struct Ram {
    /// `None` only while being dropped.
    memory: Option<GuestMemory>,
    range: Range<u64>,
    host: NonNull<u8>,
    vm: Arc<dyn Vm>,
}

// SAFETY: `host` is only an address; what is there is reached through vm-memory, which may be shared between threads.
unsafe impl Send for Ram {}

impl Ram {
    /// Allocates RAM of the size of `range` and maps it into `vm` there.
    ///
    /// # Errors
    /// [`Error::Memory`] when the host has no room, [`Error::Hypervisor`].
    pub(crate) fn new(vm: &Arc<dyn Vm>, range: &Range<u64>) -> Result<Self, Error> {
        let size = range.end - range.start;
        let (memory, host) = allocate(range).map_err(|source| Error::Memory { mib: size >> 20, source })?;
        // SAFETY: the mapping is `size` bytes and stays until `Drop` has unmapped it from the VM; this process only ever
        // reaches it through vm-memory's volatile accesses.
        if let Err(error) = unsafe { vm.map(range.start, host, size, MemoryKind::Ram) } {
            free(memory, range);
            return Err(error.into());
        }
        Ok(Self { memory: Some(memory), range: range.clone(), host, vm: vm.clone() })
    }

    /// The RAM as devices and loaders see it.
    pub(crate) fn memory(&self) -> &GuestMemory {
        self.memory.as_ref().expect("taken only in drop")
    }
}

/// Memory as a guest would have it, without a VM: for a look at whether everything fits. Only what is written takes room on the host.
pub(crate) struct Scratch {
    /// `None` only while being dropped.
    memory: Option<GuestMemory>,
    range: Range<u64>,
}

impl Scratch {
    /// Memory at `range`.
    ///
    /// # Errors
    /// [`Error::Memory`] when the host has no room.
    pub(crate) fn new(range: &Range<u64>) -> Result<Self, Error> {
        let mib = (range.end - range.start) >> 20;
        let (memory, _) = allocate(range).map_err(|source| Error::Memory { mib, source })?;
        Ok(Self { memory: Some(memory), range: range.clone() })
    }

    pub(crate) fn memory(&self) -> &GuestMemory {
        self.memory.as_ref().expect("taken only in drop")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            free(memory, &self.range);
        }
    }
}

/// Guest RAM in a device's DMA domain, one to one. Dropping it takes it out again: the device's functions have given it up before.
pub(crate) struct DmaMapping {
    domain: Arc<dyn DmaDomain>,
    address: BusAddress,
    len: u64,
    /// The memory outlives its mapping.
    memory: Option<GuestMemory>,
}

impl Ram {
    /// Lets the devices of `domain` reach all of guest RAM.
    ///
    /// # Errors
    /// [`Error::HostPci`]: the memory cannot be pinned, or its addresses are reserved.
    pub(crate) fn map_for_dma(&self, domain: &Arc<dyn DmaDomain>) -> Result<DmaMapping, Error> {
        let len = self.range.end - self.range.start;
        // SAFETY: the mapping holds on to the memory until it is out of the domain.
        let address = unsafe { domain.map(self.host, len, self.range.start) }.map_err(Error::HostPci)?;
        Ok(DmaMapping { domain: domain.clone(), address, len, memory: self.memory.clone() })
    }
}

impl Drop for DmaMapping {
    fn drop(&mut self) {
        if let Err(error) = self.domain.unmap(self.address, self.len, Release::TearDown) {
            tracing::error!(
                "guest memory could not be taken out of the device's reach: {error}; it stays allocated"
            );
            std::mem::forget(self.memory.take());
        }
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        if let Err(error) = self.vm.unmap(self.range.start, self.range.end - self.range.start) {
            tracing::error!("guest memory could not be unmapped from the VM: {error}; it stays allocated");
            return;
        }
        if let Some(memory) = self.memory.take() {
            free(memory, &self.range);
        }
    }
}

/// Alignment of RAM in this process: that of RAM in the guest (2 MiB), so that the hypervisor can map it in blocks. A VM whose RAM is only
/// page-aligned faults for each 4 KiB page: counted in the lab, a guest then boots with 20,000 exits more.
const ALIGN: usize = 2 << 20;

/// A mapping with that alignment: reserves more and gives the ends back.
fn allocate(range: &Range<u64>) -> io::Result<(GuestMemory, NonNull<u8>)> {
    let size = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
    let padded = size.checked_add(ALIGN).ok_or(io::ErrorKind::OutOfMemory)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANON | libc::MAP_NORESERVE;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a fresh anonymous mapping at an address of the kernel's choice.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), padded, prot, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let head = (start as usize).next_multiple_of(ALIGN) - start as usize;
    // SAFETY: head < ALIGN, so `size` bytes from the aligned address lie within the mapping just made, with ALIGN - head
    // bytes after them; nobody refers to the two ends given back.
    let aligned = unsafe {
        let aligned = start.cast::<u8>().add(head);
        if head > 0 {
            libc::munmap(start, head);
        }
        libc::munmap(aligned.add(size).cast(), ALIGN - head);
        aligned
    };
    prefer_huge_pages(aligned, size);
    // SAFETY: `aligned` is a mapping of `size` bytes with these flags; `free` unmaps it once no region refers to it.
    let builder = unsafe { MmapRegionBuilder::<()>::new(size).with_raw_mmap_pointer(aligned) };
    let region = builder.with_mmap_prot(prot).with_mmap_flags(flags).build().map_err(io::Error::other)?;
    let region =
        GuestRegionMmap::new(region, GuestAddress(range.start)).ok_or(io::ErrorKind::InvalidInput)?;
    let memory = GuestMemory::from_regions(vec![region]).map_err(io::Error::other)?;
    Ok((memory, NonNull::new(aligned).expect("mmap succeeded")))
}

/// Frees the host memory if nobody else can reach it any more.
fn free(memory: GuestMemory, range: &Range<u64>) {
    let Ok((rest, region)) = memory.remove_region(GuestAddress(range.start), range.end - range.start) else {
        return;
    };
    drop((rest, memory));
    match Arc::into_inner(region) {
        Some(region) => {
            // SAFETY: this was the last reference to the region that `allocate` built over its own mapping.
            unsafe { libc::munmap(region.as_ptr().cast(), region.len() as usize) };
        }
        None => tracing::error!("guest memory is still in use after the devices stopped; it stays allocated"),
    }
}

/// Fewer faults while the guest starts, where the host's policy leaves huge pages to the program.
fn prefer_huge_pages(start: *mut u8, size: usize) {
    #[cfg(target_os = "linux")]
    // SAFETY: advice on the mapping just made; a refusal changes nothing.
    unsafe {
        libc::madvise(start.cast(), size, libc::MADV_HUGEPAGE);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (start, size);
}

/// Bytes of physical memory of this host; `None` if it does not say.
pub(crate) fn host_memory() -> Option<u64> {
    // SAFETY: sysconf has no preconditions.
    let (pages, page) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    u64::try_from(pages).ok()?.checked_mul(u64::try_from(page).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn memory_is_aligned_usable_to_its_ends_and_freed() {
        let range = 0x4000_0000..0x4000_0000 + (8 << 20);
        for _ in 0..3 {
            let (memory, host) = allocate(&range).unwrap();
            assert_eq!(host.as_ptr() as usize % ALIGN, 0);
            for at in [range.start, range.end - 8] {
                memory.write_obj(at, GuestAddress(at)).unwrap();
                assert_eq!(memory.read_obj::<u64>(GuestAddress(at)).unwrap(), at);
            }
            assert!(memory.write_obj(0u64, GuestAddress(range.end - 4)).is_err());
            free(memory, &range);
        }
    }

    #[test]
    fn memory_still_in_use_is_not_freed() {
        let range = 0x4000_0000..0x4000_0000 + (1 << 20);
        let (memory, _) = allocate(&range).unwrap();
        let held = memory.clone();
        free(memory, &range);
        held.write_obj(7u64, GuestAddress(range.start)).unwrap();
    }

    #[test]
    fn the_host_says_how_much_memory_it_has() {
        assert!(host_memory().unwrap() > 1 << 28);
    }
}
