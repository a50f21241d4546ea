//! A container: IOMMU groups that share one set of mappings.

#![allow(unsafe_code)] // UNSAFETY: the trait's `map` is unsafe: the caller promises the memory's lifetime.

use super::sys::{self, failed};
use crate::mac::{self, Mac};
use crate::{
    BusAddress, DmaDomain, DmaLimits, DmaPolicy, DmaUsage, Error, GRANULE, PciAddress, Release, Result,
};
use outboard_bus::warn_limited;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vfio_bindings::bindings::vfio as raw;

/// The DMA mappings of one slot: the IOMMU groups its functions are in, joined in one container.
///
/// Dropped, it unmaps everything. Functions hold on to it, so by then their bus masters are off.
#[derive(Debug)]
pub struct VfioDomain {
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
    /// Chooses the addresses; without it they are the guest's.
    mac: Option<Mac>,
}

impl VfioDomain {
    /// Opens the IOMMU groups numbered `groups`, for this process alone, and joins them in one domain.
    ///
    /// # Errors
    /// [`Error::Host`] with `EBUSY` when another process has one of them, `EPERM` or `EACCES` without the right, `ENOENT` when none of its devices
    /// is bound to vfio-pci, `EINVAL` when some are bound to another driver. [`Error::Reserved`] when the IOMMU cannot map a Mac's window,
    /// [`Error::OutOfRange`] for a window or limits that no DART has.
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
        let mut domain = Self { limits, ranges, mapped: Mutex::default(), groups, container };
        if let DmaPolicy::Mac(config) = policy {
            domain.play_mac(config)?;
        }
        Ok(Arc::new(domain))
    }

    /// Addresses are a DART's from here on, and limits the smaller of both.
    fn play_mac(&mut self, config: outboard_dart::Config) -> Result<()> {
        let mac = Mac::new(config, self.limits.bytes, self.limits.entries)
            .map_err(|error| Error::OutOfRange { what: error.to_string() })?;
        self.check_range(config.first, config.last - config.first + 1)?;
        self.limits = mac.limits();
        self.mapped.get_mut().unwrap_or_else(PoisonError::into_inner).mac = Some(mac);
        Ok(())
    }

    /// A function of this domain may do DMA from now on, or is silent.
    pub(super) fn note_master(&self, function: PciAddress, on: bool) {
        if let Some(mac) = &mut self.lock().mac {
            mac.set_master(function, on);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Mapped> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file of group `id`, if it is in this domain.
    pub(super) fn group(&self, id: u32) -> Option<BorrowedFd<'_>> {
        self.groups.iter().find(|g| g.id == id).map(|g| g.file.as_fd())
    }

    /// Whether every group has left the container because its last device is gone, which ends all of the container's mappings (Linux,
    /// vfio_device_remove_group, vfio_iommu_type1_detach_group).
    fn orphaned(&self) -> bool {
        self.groups.iter().all(|group| match group_status(group.file.as_fd()) {
            Ok(status) => status.flags & raw::VFIO_GROUP_FLAGS_CONTAINER_SET == 0,
            Err(error) => error.raw_os_error() == Some(libc::ENODEV),
        })
    }

    /// The files of all groups in this domain.
    pub(super) fn groups(&self) -> Vec<BorrowedFd<'_>> {
        self.groups.iter().map(|g| g.file.as_fd()).collect()
    }

    /// Whether the IOMMU can map this.
    fn check_range(&self, address: u64, len: u64) -> Result<()> {
        let last = address.checked_add(len - 1);
        let fits = |&(from, to): &(u64, u64)| address >= from && last.is_some_and(|l| l <= to);
        if self.ranges.iter().any(fits) { Ok(()) } else { Err(self.reserved(address, len)) }
    }

    /// Has the IOMMU map `len` bytes at `vaddr`.
    fn program(&self, vaddr: u64, len: u64, iova: u64, mapped: (u64, bool)) -> Result<()> {
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
            .map(drop)
            .map_err(|e| self.refused(e, iova, len, mapped))
    }

    fn reserved(&self, address: u64, len: u64) -> Error {
        let usable: Vec<String> = self.ranges.iter().map(|(a, b)| format!("{a:#x}-{b:#x}")).collect();
        Error::Reserved { address, len, usable: usable.join(", ") }
    }

    /// What is full, where the kernel only says that something is.
    fn refused(&self, source: io::Error, at: u64, len: u64, (mapped, mac): (u64, bool)) -> Error {
        let DmaLimits { bytes, entries, .. } = self.limits;
        match source.raw_os_error() {
            Some(libc::ENOSPC) => Error::OutOfEntries { limit: entries },
            // For a Mac's guest too when another slot of this process has pinned what it may: it can let go of something.
            Some(libc::ENOMEM) if mac || mapped + len > bytes => {
                Error::OutOfBytes { len, mapped, limit: bytes }
            }
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
        if guest.checked_add(len).is_none() {
            return Err(self.reserved(guest, len));
        }
        let mut mapped = self.lock();
        let iova = match &mut mapped.mac {
            None => self.check_range(guest, len).map(|()| guest)?,
            Some(mac) => mac.take(vaddr, len)?.0,
        };
        if let Err(error) = self.program(vaddr, len, iova, (mapped.bytes, mapped.mac.is_some())) {
            if let Some(mac) = &mut mapped.mac {
                mac.give(BusAddress(iova), len, Release::Driver);
            }
            return Err(error);
        }
        mapped.pieces.insert(iova, len);
        mapped.bytes += len;
        Ok(BusAddress(iova))
    }

    fn unmap(&self, address: BusAddress, len: u64, release: Release) -> Result<()> {
        let mut mapped = self.lock();
        if len == 0 || mapped.pieces.get(&address.0) != Some(&len) {
            return Err(Error::NotMapped { address: address.0, len });
        }
        match unmap(self.container.as_fd(), 0, address.0, len) {
            // The kernel unmapped and unpinned everything itself.
            Err(_) if self.orphaned() => {}
            done => done?,
        }
        mapped.pieces.remove(&address.0);
        mapped.bytes -= len;
        if let Some(mac) = &mut mapped.mac {
            mac.give(address, len, release);
        }
        Ok(())
    }

    fn usage(&self) -> DmaUsage {
        let mapped = self.lock();
        mac::usage(mapped.mac.as_ref(), mapped.bytes, mapped.pieces.len())
    }
}

impl Drop for VfioDomain {
    fn drop(&mut self) {
        if let Err(error) = unmap(self.container.as_fd(), raw::VFIO_DMA_UNMAP_FLAG_ALL, 0, 0)
            && !self.orphaned()
        {
            warn_limited!("{error}; closing the container unmaps what is left");
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
    let status = group_status(file.as_fd()).map_err(failed(sys::GROUP_GET_STATUS.name(), &path))?;
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

fn group_status(group: BorrowedFd<'_>) -> io::Result<raw::vfio_group_status> {
    let argsz = size_of::<raw::vfio_group_status>() as u32;
    let mut status = raw::vfio_group_status { argsz, ..Default::default() };
    sys::GROUP_GET_STATUS.with(group, &mut status)?;
    Ok(status)
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
