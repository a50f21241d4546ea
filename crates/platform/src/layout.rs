//! Where things stand in the guest's physical address space, and which interrupt is whose.
//!
//! Fixed below RAM, so that a guest sees the same machine everywhere. The redistributors get the 32 MiB that Apple's
//! framework reserves for them (`hv_gic_get_redistributor_region_size`), though a VM of 32 vCPUs needs 4 MiB.

use std::ops::Range;

/// GICv3 distributor, 64 KiB.
pub const GIC_DISTRIBUTOR: u64 = 0x0800_0000;
/// GICv2m MSI frame, 64 KiB.
pub const MSI_FRAME: u64 = 0x0801_0000;
/// PL011 UART, 4 KiB.
pub const PL011: u64 = 0x0900_0000;
/// PL031 real-time clock, 4 KiB.
pub const PL031: u64 = 0x0901_0000;
/// PL061 GPIO controller with the power key, 4 KiB.
pub const PL061: u64 = 0x0902_0000;
/// Bytes of each PrimeCell above.
pub const PRIMECELL_SIZE: u64 = 0x1000;
/// GICv3 redistributors, in vCPU order.
pub const GIC_REDISTRIBUTORS: u64 = 0x0a00_0000;
/// PCI I/O ports from 0 on: for each root port the 4 KiB that a bridge forwards at least, and much more.
pub const PCI_IO_WINDOW: Range<u64> = 0x0f00_0000..0x0f10_0000;
/// PCIe configuration space (ECAM) of buses 0 to 255.
pub const ECAM: u64 = 0x1000_0000;
/// Bytes of the ECAM: 1 MiB a bus.
pub const ECAM_SIZE: u64 = 0x1000_0000;
/// 32-bit PCIe memory window.
pub const PCI_WINDOW_32: Range<u64> = 0x2000_0000..0x4000_0000;
/// Start of RAM. A kernel `Image` wants it 2 MiB aligned.
pub const RAM_BASE: u64 = 0x4000_0000;
/// Widest guest-physical address used, even where the hypervisor offers more: all a Mac has.
pub const MAX_ADDRESS_BITS: u8 = 40;
/// Smallest 64-bit PCIe window that a machine is built with: room for a GPU's 32 GiB BAR and its alignment.
pub const MIN_PCI_WINDOW_64: u64 = 64 << 30;
/// Most vCPUs of a VM.
pub const MAX_VCPUS: u32 = 32;
/// Least RAM, in bytes.
pub const MIN_RAM: u64 = 64 << 20;

/// INTID of the PL011's interrupt (level).
pub const PL011_INTID: u32 = 33;
/// INTID of the PL061's interrupt (level).
pub const PL061_INTID: u32 = 34;
/// INTIDs of PCI INTA to INTD on bus 0 (level), swizzled by device number.
pub const PCI_INTX_INTIDS: Range<u32> = 36..40;
/// First INTID behind the MSI frame. Linux's gicv2m driver wants first + number ≤ 1019.
pub const MSI_START: u32 = 64;
/// One past the last INTID of a machine with as many as can be: the most that KVM takes (a multiple of 32 below 1024).
pub const MAX_INTID_LIMIT: u32 = 992;

/// One past the last INTID of a machine whose devices have `vectors` message-signalled interrupts: a multiple of 32, as GICs have them.
///
/// Not more than that, because a guest sets up each interrupt by itself while it starts: 992 cost it 1,400 exits, 96 some 220.
pub fn intid_limit(vectors: u32) -> u32 {
    MSI_START.saturating_add(vectors.max(1)).min(MAX_INTID_LIMIT).next_multiple_of(32)
}

/// What depends on how much RAM there is and how wide an address may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressSpace {
    /// Guest RAM.
    pub ram: Range<u64>,
    /// 64-bit prefetchable PCIe window: the upper half of the address space.
    pub pci_window_64: Range<u64>,
    /// Width of the addresses, for the hypervisor.
    pub ipa_bits: u8,
}

/// RAM or a window that does not fit into the address space.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// RAM would reach into the PCIe window.
    #[error(
        "{ram_mib} MiB of memory do not fit: with {bits}-bit guest addresses this machine takes at most {max_mib} MiB; \
         give a smaller --memory"
    )]
    TooMuchRam {
        /// Asked for, in MiB.
        ram_mib: u64,
        /// Possible, in MiB.
        max_mib: u64,
        /// Width of a guest-physical address.
        bits: u8,
    },
    /// Less than a kernel needs, or not whole 16 KiB pages.
    #[error("{bytes} bytes of memory: give at least {} MiB, in whole MiB", MIN_RAM >> 20)]
    BadRam {
        /// Asked for.
        bytes: u64,
    },
    /// The hypervisor's addresses are too narrow for the 64-bit PCIe window.
    #[error(
        "this host's hypervisor has {bits}-bit guest addresses; at least 37 bits are needed for a PCIe window of 64 GiB"
    )]
    NarrowAddresses {
        /// What it has.
        bits: u8,
    },
}

impl AddressSpace {
    /// The address space for `ram_bytes` of RAM on a hypervisor with at most `max_ipa_bits`.
    ///
    /// # Errors
    /// [`LayoutError`] when it does not fit.
    pub fn new(ram_bytes: u64, max_ipa_bits: u8) -> Result<Self, LayoutError> {
        let bits = max_ipa_bits.min(MAX_ADDRESS_BITS);
        if bits < 37 {
            return Err(LayoutError::NarrowAddresses { bits: max_ipa_bits });
        }
        if ram_bytes < MIN_RAM || !ram_bytes.is_multiple_of(1 << 20) {
            return Err(LayoutError::BadRam { bytes: ram_bytes });
        }
        let window = (1 << (bits - 1))..(1 << bits);
        let max_ram = window.start - RAM_BASE;
        if ram_bytes > max_ram {
            let (ram_mib, max_mib) = (ram_bytes >> 20, max_ram >> 20);
            return Err(LayoutError::TooMuchRam { ram_mib, max_mib, bits });
        }
        Ok(Self { ram: RAM_BASE..RAM_BASE + ram_bytes, pci_window_64: window, ipa_bits: bits })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_64_bit_window_is_at_least_64_gib_and_above_ram() {
        for bits in 37..=52 {
            let space = AddressSpace::new(2 << 30, bits).unwrap();
            assert!(space.pci_window_64.end - space.pci_window_64.start >= MIN_PCI_WINDOW_64);
            assert!(space.ram.end <= space.pci_window_64.start);
            assert!(space.pci_window_64.end <= 1 << bits.min(40));
        }
    }

    #[test]
    fn refuses_what_does_not_fit() {
        assert_eq!(AddressSpace::new(1 << 30, 36), Err(LayoutError::NarrowAddresses { bits: 36 }));
        assert!(matches!(AddressSpace::new(0, 40), Err(LayoutError::BadRam { .. })));
        assert!(matches!(AddressSpace::new((1 << 30) + 1, 40), Err(LayoutError::BadRam { .. })));
        let most = (1u64 << 39) - RAM_BASE;
        assert!(AddressSpace::new(most, 40).is_ok());
        assert!(matches!(AddressSpace::new(most + (1 << 20), 40), Err(LayoutError::TooMuchRam { .. })));
        assert!(matches!(AddressSpace::new(u64::MAX - 0xf_ffff, 40), Err(LayoutError::TooMuchRam { .. })));
    }

    #[test]
    fn there_are_interrupts_for_all_vectors_and_no_more_than_a_gic_has() {
        for (vectors, limit) in
            [(0, 96), (1, 96), (32, 96), (33, 128), (928, 992), (929, 992), (u32::MAX, 992)]
        {
            assert_eq!(intid_limit(vectors), limit, "{vectors} vectors");
        }
    }

    #[test]
    fn fixed_ranges_do_not_overlap() {
        let mut ranges = [
            GIC_DISTRIBUTOR..GIC_DISTRIBUTOR + 0x1_0000,
            MSI_FRAME..MSI_FRAME + 0x1_0000,
            PL011..PL011 + PRIMECELL_SIZE,
            PL031..PL031 + PRIMECELL_SIZE,
            PL061..PL061 + PRIMECELL_SIZE,
            GIC_REDISTRIBUTORS..GIC_REDISTRIBUTORS + 0x200_0000,
            PCI_IO_WINDOW,
            ECAM..ECAM + ECAM_SIZE,
            PCI_WINDOW_32,
            RAM_BASE..RAM_BASE + 1,
        ];
        ranges.sort_by_key(|r| r.start);
        for pair in ranges.windows(2) {
            assert!(pair[0].end <= pair[1].start, "{pair:x?}");
        }
    }
}
