//! NVIDIA's UVM asks for system memory in 64 KiB and 2 MiB pages. Then the resource manager wants bus addresses aligned to that, which a Mac's
//! IOMMU does not give, and refuses with an error that UVM has no second try for. Page size 0 (the default) makes it look at
//! the addresses first. So such requests are turned to 0, if everything about them looks as known.

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// Page sizes that a request may have: the default, and those of the GPUs.
const KNOWN: [u64; 7] = [0, 4 * KIB, 64 * KIB, 128 * KIB, 2 * MIB, 512 * MIB, 256 << 30];
/// Those that need aligned addresses, and are turned to 0.
const LARGE: [u64; 2] = [64 * KIB, 2 * MIB];

/// What to do with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Verdict {
    /// As it should be.
    Leave = 0,
    /// Turn its page size to 0.
    Default = 1,
    /// Not what is known: the structure may have another layout. Leave it, and count.
    Strange = 2,
}

/// Judges a request for `length` bytes by the first three members of its `UvmGpuAllocInfo` (`nv_uvm_types.h`).
pub fn judge(length: u64, physical_offset: u64, page: u64, alignment: u64) -> Verdict {
    let known = KNOWN.contains(&page);
    let aligned = alignment == 0 || alignment.is_power_of_two();
    if physical_offset != 0 || !known || !aligned || length == 0 {
        return Verdict::Strange;
    }
    match LARGE.contains(&page) {
        // UVM asks for a large page only for as much memory.
        true if length < page => Verdict::Strange,
        true => Verdict::Default,
        false => Verdict::Leave,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_pages_become_the_default() {
        assert_eq!(judge(4 * MIB, 0, 2 * MIB, 0), Verdict::Default);
        assert_eq!(judge(2 * MIB, 0, 2 * MIB, 2 * MIB), Verdict::Default);
        assert_eq!(judge(64 * KIB, 0, 64 * KIB, 4096), Verdict::Default);
        for page in [0, 4 * KIB, 128 * KIB, 512 * MIB] {
            assert_eq!(judge(1 << 30, 0, page, 0), Verdict::Leave, "{page}");
        }
    }

    #[test]
    fn another_layout_is_seen() {
        for (length, offset, page, alignment) in [
            (4 * MIB, 2 * MIB, 0, 0),          // the page size comes first
            (4 * MIB, 0, 3, 0),                // flags
            (4 * MIB, 0, 2 * MIB, 3),          // no alignment
            (4 * MIB, 0, 0xFFFF_8000_0123, 0), // a pointer
            (4096, 0, 64 * KIB, 0),            // more page than memory
            (0, 0, 64 * KIB, 0),
        ] {
            assert_eq!(judge(length, offset, page, alignment), Verdict::Strange, "{length:x} {page:x}");
        }
        // One member in front: the page size is taken for the alignment, and nothing happens.
        assert_eq!(judge(4 * MIB, 0, 0, 2 * MIB), Verdict::Leave);
    }
}
