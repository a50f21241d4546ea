//! A container: IOMMU groups that share one set of mappings.

#![allow(unsafe_code)] // UNSAFETY: the trait's `map` is unsafe: the caller promises the memory's lifetime.

use super::sys::{self, failed};
use crate::{BusAddress, DmaDomain, DmaLimits, Error, GRANULE, Result};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};
use vfio_bindings::bindings::vfio as raw;

/// Who chooses where a device finds memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaPolicy {
    /// At the guest's own addresses, for as long as it runs. What VMMs on Linux usually do.
    Identity,
}

/// The DMA mappings of one slot: the IOMMU groups its functions are in, joined in one container.
///
/// Dropped, it unmaps everything. Functions hold on to it, so by then their bus masters are off.
#[derive(Debug)]
pub struct VfioDomain {
    policy: DmaPolicy,
    limits: DmaLimits,
    /// What the IOMMU can map, first and last address; holes are kept for interrupts and the like.
    ranges: Vec<(u64, u64)>,
    mapped: Mutex<Mapped>,
    groups: Vec<Group>,
    /// Last: the kernel lets go of it once no group refers to it.
    container: File,
}

#[derive(Debug)]
struct Group {
    id: u32,
    file: File,
}

#[derive(Debug, Default)]
struct Mapped {
    /// Length by bus address.
    pieces: BTreeMap<u64, u64>,
    bytes: u64,
}

impl VfioDomain {
    /// Opens the IOMMU groups numbered `groups`, for this process alone, and joins them in one domain.
    ///
    /// # Errors
    /// [`Error::Host`] with `EBUSY` when another process has one of them, `EPERM` or `EACCES` without the right, `ENOENT` when none of its devices
    /// is bound to vfio-pci, `EINVAL` when some are bound to another driver.
    pub fn new(groups: &[u32], policy: DmaPolicy) -> Result<Arc<Self>> {
        let container = open(Path::new("/dev/vfio/vfio"))?;
        check_version(container.as_fd())?;
        let groups: Vec<Group> = groups
            .iter()
            .map(|id| Ok(Group { id: *id, file: open_group(*id, container.as_fd())? }))
            .collect::<Result<_>>()?;
        // The type can be set once a group is in; further groups must suit it, which the kernel checks.
        sys::SET_IOMMU
            .number(container.as_fd(), raw::VFIO_TYPE1v2_IOMMU)
            .map_err(failed(sys::SET_IOMMU.name(), "the container"))?;
        let info =
            sys::iommu_info(container.as_fd()).map_err(failed("VFIO_IOMMU_GET_INFO", "the container"))?;
        let ranges = iova_ranges(&info);
        let limits = limits(&info, &ranges);
        let mapped = Mutex::default();
        Ok(Arc::new(Self { policy, limits, ranges, mapped, groups, container }))
    }

    /// The file of group `id`, if it is in this domain.
    pub(super) fn group(&self, id: u32) -> Option<BorrowedFd<'_>> {
        self.groups.iter().find(|g| g.id == id).map(|g| g.file.as_fd())
    }

    /// The files of all groups in this domain.
    pub(super) fn groups(&self) -> Vec<BorrowedFd<'_>> {
        self.groups.iter().map(|g| g.file.as_fd()).collect()
    }

    /// Where the device is to find what the guest knows as `guest`.
    fn place(&self, guest: u64, len: u64) -> Result<u64> {
        match self.policy {
            DmaPolicy::Identity => {
                let last = guest.checked_add(len - 1);
                let fits = |&(from, to): &(u64, u64)| guest >= from && last.is_some_and(|l| l <= to);
                if self.ranges.iter().any(fits) { Ok(guest) } else { Err(self.reserved(guest, len)) }
            }
        }
    }

    fn reserved(&self, address: u64, len: u64) -> Error {
        let usable: Vec<String> = self.ranges.iter().map(|(a, b)| format!("{a:#x}-{b:#x}")).collect();
        Error::Reserved { address, len, usable: usable.join(", ") }
    }

    /// What is full, where the kernel only says that something is.
    fn refused(&self, source: io::Error, at: u64, len: u64, mapped: u64) -> Error {
        let DmaLimits { bytes, entries, .. } = self.limits;
        match source.raw_os_error() {
            Some(libc::ENOSPC) => Error::OutOfEntries { limit: entries },
            Some(libc::ENOMEM) if mapped + len > bytes => Error::OutOfBytes { len, mapped, limit: bytes },
            _ => failed(sys::IOMMU_MAP_DMA.name(), format!("bus address {at:#x}+{len:#x}"))(source),
        }
    }
}

impl DmaDomain for VfioDomain {
    fn limits(&self) -> DmaLimits {
        self.limits
    }

    unsafe fn map(&self, host: NonNull<u8>, len: u64, guest: u64) -> Result<BusAddress> {
        let vaddr = host.as_ptr() as u64;
        crate::check_granule(&[("host address", vaddr), ("length", len), ("guest address", guest)])?;
        if len == 0 {
            return Err(Error::Unaligned { what: "a length of 0".into() });
        }
        let iova = self.place(guest, len)?;
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        let mut request = raw::vfio_iommu_type1_dma_map {
            argsz: size_of::<raw::vfio_iommu_type1_dma_map>() as u32,
            flags: raw::VFIO_DMA_MAP_FLAG_READ | raw::VFIO_DMA_MAP_FLAG_WRITE,
            vaddr,
            iova,
            size: len,
        };
        // The kernel pins the pages, so even a caller that breaks its promise cannot let the device reach other memory.
        sys::IOMMU_MAP_DMA
            .with(self.container.as_fd(), &mut request)
            .map_err(|e| self.refused(e, iova, len, mapped.bytes))?;
        mapped.pieces.insert(iova, len);
        mapped.bytes += len;
        Ok(BusAddress(iova))
    }

    fn unmap(&self, address: BusAddress, len: u64) -> Result<()> {
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        if len == 0 || mapped.pieces.get(&address.0) != Some(&len) {
            return Err(Error::NotMapped { address: address.0, len });
        }
        unmap(self.container.as_fd(), 0, address.0, len)?;
        mapped.pieces.remove(&address.0);
        mapped.bytes -= len;
        Ok(())
    }
}

impl Drop for VfioDomain {
    fn drop(&mut self) {
        if let Err(error) = unmap(self.container.as_fd(), raw::VFIO_DMA_UNMAP_FLAG_ALL, 0, 0) {
            tracing::warn!("{error}; closing the container unmaps what is left");
        }
    }
}

fn unmap(container: BorrowedFd<'_>, flags: u32, iova: u64, len: u64) -> Result<()> {
    let mut request = raw::vfio_iommu_type1_dma_unmap {
        argsz: size_of::<raw::vfio_iommu_type1_dma_unmap>() as u32,
        flags,
        iova,
        size: len,
        ..Default::default()
    };
    let on = format!("bus address {iova:#x}+{len:#x}");
    sys::IOMMU_UNMAP_DMA.with(container, &mut request).map_err(failed(sys::IOMMU_UNMAP_DMA.name(), &on))?;
    if flags == 0 && request.size != len {
        let source = io::Error::other(format!("{:#x} bytes were unmapped", request.size));
        return Err(failed(sys::IOMMU_UNMAP_DMA.name(), on)(source));
    }
    Ok(())
}

fn open(path: &Path) -> Result<File> {
    OpenOptions::new().read(true).write(true).open(path).map_err(failed("open", path.display()))
}

fn check_version(container: BorrowedFd<'_>) -> Result<()> {
    let answer = |call: &sys::Call<()>, argument| {
        call.number(container, argument).map_err(failed(call.name(), "/dev/vfio/vfio"))
    };
    let version = answer(&sys::GET_API_VERSION, 0)?;
    let type1 = answer(&sys::CHECK_EXTENSION, raw::VFIO_TYPE1v2_IOMMU)?;
    if version.cast_unsigned() != raw::VFIO_API_VERSION || type1 == 0 {
        let source = io::Error::other(format!("version {version}, type 1 IOMMU {type1}"));
        return Err(failed("no usable VFIO: load vfio_iommu_type1; checking", "/dev/vfio/vfio")(source));
    }
    Ok(())
}

fn open_group(id: u32, container: BorrowedFd<'_>) -> Result<File> {
    let path = format!("/dev/vfio/{id}");
    let file = open(Path::new(&path))?;
    let mut status =
        raw::vfio_group_status { argsz: size_of::<raw::vfio_group_status>() as u32, ..Default::default() };
    sys::GROUP_GET_STATUS
        .with(file.as_fd(), &mut status)
        .map_err(failed(sys::GROUP_GET_STATUS.name(), &path))?;
    if status.flags & raw::VFIO_GROUP_FLAGS_VIABLE == 0 {
        let source = io::Error::from_raw_os_error(libc::EINVAL);
        return Err(failed("a device in the group belongs to another driver; opening", path)(source));
    }
    let mut fd = container.as_raw_fd();
    sys::GROUP_SET_CONTAINER
        .with(file.as_fd(), &mut fd)
        .map_err(failed(sys::GROUP_SET_CONTAINER.name(), &path))?;
    Ok(file)
}

/// What the IOMMU can map; everything below 2^48 where the kernel does not say (before Linux 5.4).
fn iova_ranges(info: &sys::Answer) -> Vec<(u64, u64)> {
    const UNTOLD: (u64, u64) = (0, (1 << 48) - 1);
    let Some([count, _reserved, ranges @ ..]) = info.capability(raw::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE)
    else {
        return vec![UNTOLD];
    };
    let (ranges, _) = ranges.as_chunks::<4>();
    ranges
        .iter()
        .take(*count as usize)
        .map(|&[start, start_high, end, end_high]| (sys::join(start, start_high), sys::join(end, end_high)))
        .collect()
}

fn limits(info: &sys::Answer, ranges: &[(u64, u64)]) -> DmaLimits {
    let available = info.capability(raw::VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL).and_then(|c| c.first().copied());
    let space = ranges.iter().fold(0u64, |sum, (from, to)| sum.saturating_add((to - from).saturating_add(1)));
    let last = ranges.iter().map(|r| r.1).max().unwrap_or(0);
    DmaLimits {
        bytes: locked_memory_limit().map_or(space, |l| l.min(space)),
        // The default of vfio_iommu_type1's dma_entry_limit, where the kernel does not say (before Linux 5.10).
        entries: available.unwrap_or(65_535),
        granule: GRANULE,
        address_bits: (u64::BITS - last.leading_zeros()) as u8,
    }
}

/// Bytes that this process may pin; `None` if nothing stops it.
fn locked_memory_limit() -> Option<u64> {
    // Bit 14 of the effective capabilities is CAP_IPC_LOCK, which lifts RLIMIT_MEMLOCK.
    const CAP_IPC_LOCK: u32 = 14;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is writable.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) } == 0;
    let free = effective >> CAP_IPC_LOCK & 1 == 1 || !known || limit.rlim_cur == libc::RLIM_INFINITY;
    (!free).then_some(limit.rlim_cur)
}
