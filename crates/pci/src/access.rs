use outboard_bus::Width;

/// One access to config space: an aligned dword and the bytes of it that take part.
///
/// Accesses of 1, 2 and 4 bytes all take this one shape, so no register can be reached around its write mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigAccess {
    offset: u16,
    enables: u8,
}

impl ConfigAccess {
    /// The access of `width` at byte `offset` (below 4096); `None` for one that leaves its dword or config space.
    pub const fn new(offset: u16, width: Width) -> Option<Self> {
        let bytes = width.bytes() as u16;
        let first = offset % 4;
        if offset >= 4096 || first + bytes > 4 {
            return None;
        }
        Some(Self { offset: offset - first, enables: ((1 << bytes) - 1) << first })
    }

    /// Byte offset of the dword: a multiple of 4 below 4096.
    pub const fn offset(self) -> u16 {
        self.offset
    }

    /// Whether byte `offset` of config space takes part.
    pub const fn covers(self, offset: u16) -> bool {
        offset / 4 == self.offset / 4 && self.enables & (1 << (offset % 4)) != 0
    }

    /// The bits of the dword that take part.
    pub const fn mask(self) -> u32 {
        let mut mask = 0;
        let mut byte = 0;
        while byte < 4 {
            if self.enables & (1 << byte) != 0 {
                mask |= 0xff << (8 * byte);
            }
            byte += 1;
        }
        mask
    }

    /// Position of the first enabled byte's lowest bit within the dword.
    pub const fn shift(self) -> u32 {
        8 * self.enables.trailing_zeros()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_enables_follow_offset_and_width() {
        let access = ConfigAccess::new(0x06, Width::B2).unwrap();
        assert_eq!((access.offset(), access.mask(), access.shift()), (0x04, 0xffff_0000, 16));
        assert!(access.covers(6) && access.covers(7) && !access.covers(5) && !access.covers(10));
        let access = ConfigAccess::new(0xffc, Width::B4).unwrap();
        assert_eq!((access.offset(), access.mask(), access.shift()), (0xffc, u32::MAX, 0));
    }

    #[test]
    fn accesses_that_leave_the_dword_are_refused() {
        for (offset, width) in [(3, Width::B2), (1, Width::B4), (0, Width::B8), (4096, Width::B1)] {
            assert_eq!(ConfigAccess::new(offset, width), None, "{offset} {width:?}");
        }
    }
}
