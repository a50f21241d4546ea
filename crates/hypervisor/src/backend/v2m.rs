use crate::{GicConfig, MSI_DOORBELL, MSI_FRAME_SIZE};
use std::ops::Range;

/// Offset of MSI_TYPER: first SPI in bits 25:16, number of SPIs in bits 9:0.
const TYPER: u64 = 0x008;
/// Offset of MSI_IIDR.
const IIDR: u64 = 0xfcc;
/// Implementer Arm (JEP106 code 0x43b), product and revision 0. Linux looks it up in a list of broken frames, where
/// this is not.
const IIDR_VALUE: u32 = 0x43b;

/// The GICv2m frame of a guest: registers of Arm DEN 0029 (Server Base System Architecture), appendix "GICv2m
/// Architecture", and Linux `drivers/irqchip/irq-gic-v2m.c`. Has no state, so any thread may use it without a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MsiFrame {
    base: u64,
    intids: Range<u32>,
}

impl MsiFrame {
    /// The frame that `config` describes.
    pub fn new(config: &GicConfig) -> Self {
        Self { base: config.msi_frame, intids: config.msi_intids.clone() }
    }

    /// Offset of `ipa` in the frame; `None` outside.
    pub fn offset(&self, ipa: u64) -> Option<u64> {
        ipa.checked_sub(self.base).filter(|offset| *offset < MSI_FRAME_SIZE)
    }

    /// A guest's load of `width` bytes (1, 2, 4 or 8); what is not a register reads zero, as the document says.
    pub fn read(&self, offset: u64, width: u8) -> u64 {
        let word = |offset| u64::from(self.register(offset));
        let aligned = offset & !3;
        let pair = word(aligned) | word(aligned.wrapping_add(4)) << 32;
        let value = pair >> (8 * (offset & 3));
        value & (u64::MAX >> (64 - 8 * u32::from(width.clamp(1, 8))))
    }

    /// A guest's store. Returns the INTID to make pending, if it was a message: the doorbell takes 2 or 4 bytes.
    pub fn write(&self, offset: u64, width: u8, value: u64) -> Option<u32> {
        if offset != MSI_DOORBELL || !matches!(width, 2 | 4) {
            return None;
        }
        u32::try_from(value).ok().filter(|intid| self.intids.contains(intid))
    }

    fn register(&self, offset: u64) -> u32 {
        match offset {
            TYPER => self.intids.start << 16 | (self.intids.end - self.intids.start),
            IIDR => IIDR_VALUE,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame() -> MsiFrame {
        MsiFrame { base: 0x802_0000, intids: 128..192 }
    }

    #[test]
    fn registers_read_as_linux_expects() {
        let f = frame();
        let typer = f.read(TYPER, 4);
        assert_eq!((typer >> 16 & 0x3ff, typer & 0x3ff), (128, 64));
        assert_eq!(f.read(IIDR, 4), 0x43b);
        assert_eq!(f.read(MSI_DOORBELL, 4), 0, "write-only");
    }

    #[test]
    fn narrow_and_wide_reads_take_the_right_bytes() {
        let f = frame();
        assert_eq!(f.read(TYPER, 1), 64);
        assert_eq!(f.read(TYPER + 2, 2), 128);
        assert_eq!(f.read(TYPER - 4, 8), f.read(TYPER, 4) << 32);
        assert_eq!(f.read(TYPER + 3, 8), 0);
    }

    #[test]
    fn only_the_doorbell_raises_and_only_its_own_interrupts() {
        let f = frame();
        assert_eq!(f.write(MSI_DOORBELL, 4, 128), Some(128));
        assert_eq!(f.write(MSI_DOORBELL, 2, 191), Some(191));
        for (offset, width, value) in [
            (0x40, 4, 127),
            (0x40, 4, 192),
            (0x40, 1, 128),
            (0x40, 8, 128),
            (0x44, 4, 128),
            (0x40, 4, 1 << 32 | 128),
        ] {
            assert_eq!(f.write(offset, width, value), None, "{offset:#x} {width} {value:#x}");
        }
    }

    #[test]
    fn offsets_end_with_the_frame() {
        let f = frame();
        assert_eq!(f.offset(0x802_0000), Some(0));
        assert_eq!(f.offset(0x802_ffff), Some(0xffff));
        assert_eq!(f.offset(0x803_0000), None);
        assert_eq!(f.offset(0x801_ffff), None);
    }

    proptest! {
        #[test]
        fn no_access_panics_or_leaves_its_width(offset in 0u64..0x1_0000, width in prop::sample::select(vec![1u8, 2, 4, 8]), value: u64) {
            let f = frame();
            let read = f.read(offset, width);
            prop_assert!(width == 8 || read >> (8 * width) == 0);
            if let Some(intid) = f.write(offset, width, value) {
                prop_assert!((128..192).contains(&intid));
            }
        }
    }
}
