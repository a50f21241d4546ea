//! The regions of a device: BARs, ROM, config space.

use super::mapping::Mapping;
use super::sys::{self, failed};
use crate::{Error, HostBar, HostBarKind, PciAddress, Result, check_mappable};
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use vfio_bindings::bindings::vfio as raw;

/// A region of the device's file.
pub(super) struct Region {
    /// Where it begins in the device's file.
    offset: u64,
    /// Bytes.
    pub(super) len: u64,
    /// What the kernel maps of it.
    mappable: Vec<Range<u64>>,
}

impl Region {
    /// Asks for region `index`; `None` if the device has none.
    pub(super) fn open(device: BorrowedFd<'_>, address: PciAddress, index: u32) -> Result<Option<Self>> {
        let answer = sys::region_info(device, index)
            .map_err(failed("VFIO_DEVICE_GET_REGION_INFO", format!("{address}: region {index}")))?;
        // struct vfio_region_info: argsz, flags, index, cap_offset, u64 size, u64 offset.
        Ok(answer.map(|info| {
            let len = info.long(4);
            let mappable = match info.capability(raw::VFIO_REGION_INFO_CAP_SPARSE_MMAP) {
                _ if info.word(1) & raw::VFIO_REGION_INFO_FLAG_MMAP == 0 => vec![],
                Some(areas) => sparse(areas),
                None => std::iter::once(0..len).collect(),
            };
            Self { offset: info.long(6), len, mappable }
        }))
    }

    /// Reads `buffer` at `offset`.
    pub(super) fn read(&self, device: BorrowedFd<'_>, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        sys::read_at(device, self.offset + offset, buffer)
    }

    /// Writes `buffer` at `offset`.
    pub(super) fn write(&self, device: BorrowedFd<'_>, offset: u64, buffer: &[u8]) -> io::Result<()> {
        sys::write_at(device, self.offset + offset, buffer)
    }

    /// Whether `len` bytes at `offset` lie within it.
    pub(super) fn holds(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.len)
    }
}

/// The areas in a sparse-mmap capability: u32 count, u32 reserved, then pairs of u64 offset and size.
fn sparse(words: &[u32]) -> Vec<Range<u64>> {
    let [count, _reserved, areas @ ..] = words else { return vec![] };
    let (areas, _) = areas.as_chunks::<4>();
    let area = |[a, b, c, d]: &[u32; 4]| {
        let start = sys::join(*a, *b);
        start..start.saturating_add(sys::join(*c, *d))
    };
    areas.iter().take(*count as usize).map(area).collect()
}

/// A base address register with its region.
pub(super) struct Bar {
    pub(super) info: HostBar,
    pub(super) region: Region,
}

impl Bar {
    /// Opens BAR `index`, whose register in the hardware reads `register`.
    pub(super) fn open(
        device: BorrowedFd<'_>,
        address: PciAddress,
        index: u32,
        register: u32,
    ) -> Result<Option<Self>> {
        // VFIO's region indices are the BARs' own.
        let region = Region::open(device, address, raw::VFIO_PCI_BAR0_REGION_INDEX + index)?;
        let prefetchable = register & 8 != 0;
        // Type bits (PCIe 7.5.1.2.1).
        let kind = match register & 7 {
            1 | 3 | 5 | 7 => HostBarKind::Io,
            4 => HostBarKind::Memory64 { prefetchable },
            _ => HostBarKind::Memory32 { prefetchable },
        };
        Ok(region.map(|region| Self { info: HostBar { kind, len: region.len }, region }))
    }

    /// Maps a part of it; `msix` are the pages that are kept back.
    pub(super) fn map(
        &self,
        device: BorrowedFd<'_>,
        index: usize,
        offset: u64,
        len: u64,
        msix: &[Range<u64>],
    ) -> Result<Mapping> {
        let memory = self.info.kind != HostBarKind::Io;
        check_mappable(index, memory.then_some(self.info.len), offset, len, msix)?;
        let Region { offset: start, ref mappable, .. } = self.region;
        if !mappable.iter().any(|area| area.start <= offset && offset + len <= area.end) {
            let why = "the kernel maps no such part of it";
            return Err(Error::NotMappable { bar: index, offset, len, why });
        }
        Mapping::new(device, start + offset, len, offset, self.info.len)
            .map_err(failed("mmap", format!("BAR {index} at {offset:#x}+{len:#x}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sparse_areas_are_read_as_far_as_they_are_there() {
        let areas = [2, 0, 0, 0, 0x1000, 0, 0x3000, 0, 0x5000, 0];
        assert_eq!(sparse(&areas), [0..0x1000, 0x3000..0x8000]);
        assert_eq!(sparse(&areas[..7]), std::iter::once(0..0x1000).collect::<Vec<_>>());
        assert_eq!(sparse(&[]), Vec::<Range<u64>>::new());
    }
}
