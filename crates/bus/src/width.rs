/// Width of one CPU access to a device, in bytes: 1, 2, 4 or 8.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Width {
    /// One byte.
    B1 = 1,
    /// Two bytes.
    B2 = 2,
    /// Four bytes.
    B4 = 4,
    /// Eight bytes.
    B8 = 8,
}

impl Width {
    /// The width of `bytes` bytes; `None` unless it is 1, 2, 4 or 8.
    pub const fn from_bytes(bytes: usize) -> Option<Self> {
        match bytes {
            1 => Some(Self::B1),
            2 => Some(Self::B2),
            4 => Some(Self::B4),
            8 => Some(Self::B8),
            _ => None,
        }
    }

    /// Number of bytes.
    pub const fn bytes(self) -> u64 {
        self as u64
    }

    /// A value of this width with every bit set: what a read of nothing returns.
    pub const fn all_ones(self) -> u64 {
        u64::MAX >> (64 - 8 * self.bytes())
    }

    /// `value` cut to this width.
    pub const fn truncate(self, value: u64) -> u64 {
        value & self.all_ones()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_match_widths() {
        assert_eq!(Width::B1.all_ones(), 0xff);
        assert_eq!(Width::B2.all_ones(), 0xffff);
        assert_eq!(Width::B4.all_ones(), 0xffff_ffff);
        assert_eq!(Width::B8.all_ones(), u64::MAX);
        assert_eq!(Width::B2.truncate(0x1_2345), 0x2345);
    }

    #[test]
    fn only_powers_of_two_up_to_eight() {
        let valid: Vec<usize> = (0..=16).filter(|n| Width::from_bytes(*n).is_some()).collect();
        assert_eq!(valid, [1, 2, 4, 8]);
    }
}
