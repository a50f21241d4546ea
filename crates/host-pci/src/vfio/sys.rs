//! The calls of `linux/vfio.h`. Every call keeps the kernel's own reason for a failure.

#![allow(unsafe_code)] // UNSAFETY: ioctl(2), pread(2) and pwrite(2) on VFIO's files have no safe wrapper that keeps errno.

use crate::{Error, Result};
use std::ffi::CStr;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use vfio_bindings::bindings::vfio as raw;

/// An ioctl with the type of its argument; `()` where that is a number.
pub(super) struct Call<T> {
    number: u32,
    name: &'static str,
    argument: PhantomData<fn(T)>,
}

/// VFIO's ioctls have no direction or size in them: `_IO(';', 100 + index)`.
const fn call<T>(index: u32, name: &'static str) -> Call<T> {
    Call { number: (raw::VFIO_TYPE as u32) << 8 | (raw::VFIO_BASE + index), name, argument: PhantomData }
}

pub(super) const GET_API_VERSION: Call<()> = call(0, "VFIO_GET_API_VERSION");
pub(super) const CHECK_EXTENSION: Call<()> = call(1, "VFIO_CHECK_EXTENSION");
pub(super) const SET_IOMMU: Call<()> = call(2, "VFIO_SET_IOMMU");
pub(super) const GROUP_GET_STATUS: Call<raw::vfio_group_status> = call(3, "VFIO_GROUP_GET_STATUS");
pub(super) const GROUP_SET_CONTAINER: Call<i32> = call(4, "VFIO_GROUP_SET_CONTAINER");
const GROUP_GET_DEVICE_FD: Call<&CStr> = call(6, "VFIO_GROUP_GET_DEVICE_FD");
pub(super) const DEVICE_GET_INFO: Call<raw::vfio_device_info> = call(7, "VFIO_DEVICE_GET_INFO");
const DEVICE_GET_REGION_INFO: Call<Words> = call(8, "VFIO_DEVICE_GET_REGION_INFO");
pub(super) const DEVICE_GET_IRQ_INFO: Call<raw::vfio_irq_info> = call(9, "VFIO_DEVICE_GET_IRQ_INFO");
const DEVICE_SET_IRQS: Call<Words> = call(10, "VFIO_DEVICE_SET_IRQS");
pub(super) const DEVICE_RESET: Call<()> = call(11, "VFIO_DEVICE_RESET");
const DEVICE_PCI_HOT_RESET: Call<Words> = call(13, "VFIO_DEVICE_PCI_HOT_RESET");
const IOMMU_GET_INFO: Call<Words> = call(12, "VFIO_IOMMU_GET_INFO");
pub(super) const IOMMU_MAP_DMA: Call<raw::vfio_iommu_type1_dma_map> = call(13, "VFIO_IOMMU_MAP_DMA");
pub(super) const IOMMU_UNMAP_DMA: Call<raw::vfio_iommu_type1_dma_unmap> = call(14, "VFIO_IOMMU_UNMAP_DMA");

/// An argument of variable length, in 32-bit words.
type Words = Vec<u32>;

impl Call<()> {
    /// Makes a call whose argument is a number.
    pub(super) fn number(&self, fd: BorrowedFd<'_>, argument: u32) -> io::Result<i32> {
        // SAFETY: the calls of this type take a number or nothing.
        check(unsafe {
            libc::ioctl(fd.as_raw_fd(), self.number as libc::Ioctl, libc::c_ulong::from(argument))
        })
    }
}

impl<T> Call<T> {
    /// Its name in `linux/vfio.h`.
    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    /// Makes the call; the kernel may change `argument`.
    ///
    /// A structure that begins with `argsz` must have it set to its size at most.
    pub(super) fn with(&self, fd: BorrowedFd<'_>, argument: &mut T) -> io::Result<i32> {
        // SAFETY: the constant pairs the number with the type it takes, and `argsz` bounds what the kernel writes.
        check(unsafe {
            libc::ioctl(fd.as_raw_fd(), self.number as libc::Ioctl, std::ptr::from_mut(argument))
        })
    }

    /// Makes the call with `words`, whose first is `argsz`, as the argument.
    fn with_words(&self, fd: BorrowedFd<'_>, words: &mut Words) -> io::Result<i32> {
        assert!(!words.is_empty());
        words[0] = (words.len() * 4) as u32;
        // SAFETY: `argsz`, just set, bounds what the kernel reads and writes to the length of `words`.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), self.number as libc::Ioctl, words.as_mut_ptr()) })
    }
}

fn check(result: libc::c_int) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Names the call that failed, and on what.
pub(super) fn failed(call: &str, on: impl std::fmt::Display) -> impl FnOnce(io::Error) -> Error {
    let call = format!("{call} on {on}");
    move |source| Error::Host { call, source }
}

/// Opens the device called `name` out of its group.
pub(super) fn device_fd(group: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd> {
    // SAFETY: the call takes a string that ends in NUL.
    let fd =
        unsafe { libc::ioctl(group.as_raw_fd(), GROUP_GET_DEVICE_FD.number as libc::Ioctl, name.as_ptr()) };
    let fd = check(fd).map_err(failed(GROUP_GET_DEVICE_FD.name, name.to_string_lossy()))?;
    // SAFETY: the call succeeded, so the descriptor is open and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What SET_IRQS does with the vectors it names.
pub(super) enum Irqs<'a> {
    /// Signal these descriptors, one for each vector from 0.
    Trigger(&'a [BorrowedFd<'a>]),
    /// Nothing fires any more.
    Off,
    /// Vector 0 may fire again.
    Unmask,
}

/// Sets up, or turns off, the interrupts of one index. [`Irqs::Trigger`] may find fewer vectors than it names: then nothing is set up,
/// and the number of those that there are comes back.
pub(super) fn set_irqs(device: BorrowedFd<'_>, index: u32, irqs: &Irqs<'_>) -> io::Result<Option<usize>> {
    let (flags, count, fds): (u32, usize, &[BorrowedFd<'_>]) = match irqs {
        Irqs::Trigger(fds) => {
            (raw::VFIO_IRQ_SET_DATA_EVENTFD | raw::VFIO_IRQ_SET_ACTION_TRIGGER, fds.len(), fds)
        }
        Irqs::Off => (raw::VFIO_IRQ_SET_DATA_NONE | raw::VFIO_IRQ_SET_ACTION_TRIGGER, 0, &[]),
        Irqs::Unmask => (raw::VFIO_IRQ_SET_DATA_NONE | raw::VFIO_IRQ_SET_ACTION_UNMASK, 1, &[]),
    };
    let mut words = vec![0, flags, index, 0, count as u32];
    words.extend(fds.iter().map(|fd| fd.as_raw_fd().cast_unsigned()));
    // Success is 0; what is above is how many vectors pci_alloc_irq_vectors got (vfio_msi_enable in vfio_pci_intrs.c, and QEMU's retry).
    DEVICE_SET_IRQS.with_words(device, &mut words).map(|got| usize::try_from(got).ok().filter(|got| *got > 0))
}

/// Resets every function that shares a reset line with `device`; fails unless `groups` own them all.
pub(super) fn hot_reset(device: BorrowedFd<'_>, groups: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut words = vec![0, 0, groups.len() as u32];
    words.extend(groups.iter().map(|fd| fd.as_raw_fd().cast_unsigned()));
    DEVICE_PCI_HOT_RESET.with_words(device, &mut words).map(drop)
}

/// What the kernel says about a container, with all its capabilities.
pub(super) fn iommu_info(container: BorrowedFd<'_>) -> io::Result<Answer> {
    const CAP_OFFSET: usize = std::mem::offset_of!(raw::vfio_iommu_type1_info, cap_offset) / 4;
    let words = vec![0; size_of::<raw::vfio_iommu_type1_info>() / 4];
    ask(&IOMMU_GET_INFO, container, words, raw::VFIO_IOMMU_INFO_CAPS, CAP_OFFSET)
}

/// What the kernel says about region `index` of a device, with all its capabilities; `None` if there is no such region.
pub(super) fn region_info(device: BorrowedFd<'_>, index: u32) -> io::Result<Option<Answer>> {
    const CAP_OFFSET: usize = std::mem::offset_of!(raw::vfio_region_info, cap_offset) / 4;
    let mut words = vec![0; size_of::<raw::vfio_region_info>() / 4];
    words[2] = index;
    match ask(&DEVICE_GET_REGION_INFO, device, words, raw::VFIO_REGION_INFO_FLAG_CAPS, CAP_OFFSET) {
        Ok(answer) if answer.long(4) == 0 => Ok(None),
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(None),
        answer => answer.map(Some),
    }
}

/// Asks with `words`, again with more room if the kernel says that it needs more.
fn ask(
    call: &Call<Words>,
    fd: BorrowedFd<'_>,
    mut words: Words,
    caps_flag: u32,
    cap_offset: usize,
) -> io::Result<Answer> {
    const MOST_WORDS: usize = 1 << 16;
    loop {
        let had = words.len();
        call.with_words(fd, &mut words)?;
        let needs = (words[0] as usize).div_ceil(4).min(MOST_WORDS);
        if needs <= had {
            let first = if words[1] & caps_flag == 0 { 0 } else { words[cap_offset] };
            return Ok(Answer { words, first });
        }
        words.resize(needs, 0);
    }
}

/// An answer of the kernel that ends in a chain of capabilities.
pub(super) struct Answer {
    words: Words,
    first: u32,
}

impl Answer {
    /// Word `index`.
    pub(super) fn word(&self, index: usize) -> u32 {
        self.words[index]
    }

    /// The u64 at words `index` and the next.
    pub(super) fn long(&self, index: usize) -> u64 {
        join(self.words[index], self.words[index + 1])
    }

    /// The words of the first capability `id` behind its header, up to the answer's end.
    pub(super) fn capability(&self, id: u32) -> Option<&[u32]> {
        let mut offset = self.first as usize;
        // A chain cannot be longer than the answer has words; a loop ends here.
        for _ in 0..self.words.len() {
            if offset == 0 || !offset.is_multiple_of(4) {
                return None;
            }
            let [id_version, next, rest @ ..] = self.words.get(offset / 4..)? else { return None };
            // struct vfio_info_cap_header: u16 id, u16 version, u32 next.
            let [low, high, ..] = id_version.to_ne_bytes();
            if u32::from(u16::from_ne_bytes([low, high])) == id {
                return Some(rest);
            }
            offset = *next as usize;
        }
        None
    }
}

/// A u64 out of the two words it was stored as.
pub(super) fn join(first: u32, second: u32) -> u64 {
    let [a, b, c, d] = first.to_ne_bytes();
    let [e, f, g, h] = second.to_ne_bytes();
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

/// Reads exactly `buffer` at `offset`.
pub(super) fn read_at(fd: BorrowedFd<'_>, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: `buffer` is writable for its length.
    let n = unsafe { libc::pread(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), offset) };
    whole(n, buffer.len())
}

/// Writes exactly `buffer` at `offset`.
pub(super) fn write_at(fd: BorrowedFd<'_>, offset: u64, buffer: &[u8]) -> io::Result<()> {
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: `buffer` is readable for its length.
    let n = unsafe { libc::pwrite(fd.as_raw_fd(), buffer.as_ptr().cast(), buffer.len(), offset) };
    whole(n, buffer.len())
}

fn whole(n: isize, len: usize) -> io::Result<()> {
    match usize::try_from(n) {
        Err(_) => Err(io::Error::last_os_error()),
        Ok(n) if n == len => Ok(()),
        Ok(n) => Err(io::Error::other(format!("{n} of {len} bytes"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_those_of_the_header() {
        assert_eq!(GET_API_VERSION.number, 0x3b64);
        assert_eq!(DEVICE_SET_IRQS.number, 0x3b6e);
        assert_eq!(DEVICE_PCI_HOT_RESET.number, 0x3b71);
        assert_eq!(IOMMU_UNMAP_DMA.number, 0x3b72);
    }

    #[test]
    fn capabilities_are_found_and_loops_end() {
        let header = |id: u32, next: u32| [id | 1 << 16, next];
        let chain = [&[20, 2, 8][..], &header(3, 28), &[77, 78], &header(1, 12), &[5]].concat();
        let answer = |first: u32, words: &[u32]| Answer { words: words.to_vec(), first };
        assert_eq!(answer(12, &chain).capability(3).map(|c| c[0]), Some(77));
        assert_eq!(answer(12, &chain).capability(1), Some(&[5][..]));
        assert_eq!(answer(12, &chain).capability(9), None);
        for first in [0, 13, 4000, u32::MAX, 36] {
            assert_eq!(answer(first, &chain).capability(3), None, "{first}");
        }
    }
}
