//! Finding a guest's instruction: its own page tables (Arm DDI 0487, D8) and the few loads that matter.

/// The registers that rule the EL1&0 translation regime.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stage1 {
    /// SCTLR_EL1.
    pub sctlr: u64,
    /// TCR_EL1.
    pub tcr: u64,
    /// TTBR0_EL1.
    pub ttbr0: u64,
    /// TTBR1_EL1.
    pub ttbr1: u64,
}

impl Stage1 {
    /// The guest-physical address behind `va`; `None` if the tables have none or are of a kind that is not known here.
    /// `read` gives the 8 bytes at a guest-physical address. Takes at most five reads, whatever the guest wrote.
    pub fn translate(&self, va: u64, mut read: impl FnMut(u64) -> Option<u64>) -> Option<u64> {
        if self.sctlr & 1 == 0 {
            return Some(va);
        }
        // Bit 55 chooses the half (D8.2.1). TG0 and TG1 are coded differently (D19.2.139).
        let (base, size, granule) = if va >> 55 & 1 == 0 {
            (self.ttbr0, self.tcr & 0x3f, [12, 16, 14].get(field(self.tcr, 14)))
        } else {
            (self.ttbr1, self.tcr >> 16 & 0x3f, [0, 14, 12, 16].get(field(self.tcr, 30)))
        };
        let (va_bits, page) = (64 - size as u32, *granule?);
        if page == 0 || !(page + 1..=52).contains(&va_bits) {
            return None;
        }
        let stride = page - 3;
        let mut shift = page + (va_bits - page - 1) / stride * stride;
        let mut table = base & address_mask(4);
        let mut top = va_bits;
        loop {
            let index = va >> shift & ((1 << (top - shift)) - 1);
            let descriptor = read(table + 8 * index)?;
            match (descriptor & 3, shift == page) {
                // A page, or a block of a level that may have one.
                (3, true) | (1, false) => {
                    return Some(descriptor & address_mask(shift) | va & ((1 << shift) - 1));
                }
                (3, false) => table = descriptor & address_mask(page),
                _ => return None,
            }
            top = shift;
            shift -= stride;
        }
    }
}

fn field(register: u64, shift: u32) -> usize {
    (register >> shift & 3) as usize
}

/// Bits 47 to `low` of a descriptor. Guests have less than 48 bits of guest-physical address.
fn address_mask(low: u32) -> u64 {
    (1 << 48) - (1 << low)
}

/// A load that extends its value's sign.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SignedLoad {
    /// Width of the access in bytes: 1, 2 or 4.
    pub width: u8,
    /// Whether the sign goes to bit 63, or only to bit 31.
    pub to_64: bool,
    /// Its register; 31 is XZR.
    pub rt: u8,
}

impl SignedLoad {
    /// Decodes LDRSB, LDRSH, LDRSW (immediate and register), LDURS*, LDTRS*, LDAPURS* (Arm DDI 0487, C4.1.94): those
    /// whose data abort has a valid syndrome.
    pub fn decode(word: u32) -> Option<Self> {
        let unsigned_offset = word & 0x3f00_0000 == 0x3900_0000;
        let (other, bits_11_10) = (word & 0x3f00_0000 == 0x3800_0000, word >> 10 & 3);
        let register_offset = other && bits_11_10 == 2 && word & 1 << 21 != 0;
        // Unscaled (00) and unprivileged (10).
        let unscaled = other && matches!(bits_11_10, 0 | 2) && word & 1 << 21 == 0;
        let acquire = word & 0x3f20_0c00 == 0x1900_0000;
        if !(unsigned_offset || register_offset || unscaled || acquire) {
            return None;
        }
        let to_64 = match (word >> 22 & 3, word >> 30) {
            (2, 0..=2) => true,
            (3, 0..=1) => false,
            _ => return None,
        };
        Some(Self { width: 1 << (word >> 30), to_64, rt: (word & 31) as u8 })
    }

    /// What its register gets for `value`.
    pub fn extend(self, value: u64) -> u64 {
        let unused = 64 - 8 * u32::from(self.width);
        let extended = ((value << unused) as i64 >> unused) as u64;
        if self.to_64 { extended } else { extended & 0xffff_ffff }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    const TABLE: u64 = 3;
    const BLOCK: u64 = 1;

    fn translate(regs: &Stage1, tables: &[(u64, u64)], va: u64) -> Option<u64> {
        let memory: HashMap<u64, u64> = tables.iter().copied().collect();
        regs.translate(va, |ipa| memory.get(&ipa).copied())
    }

    #[test]
    fn without_mmu_addresses_are_the_same() {
        assert_eq!(translate(&Stage1::default(), &[], 0x4000_0123), Some(0x4000_0123));
    }

    /// Linux's kernel half: 4 KiB pages (TG1 = 2), 48 bits (T1SZ = 16), four levels, then a block of 2 MiB.
    #[test]
    fn walks_four_levels_of_4k_tables() {
        let regs = Stage1 {
            sctlr: 1,
            tcr: 16 << 16 | 2 << 30 | 16,
            ttbr1: 0x1000_0000_0000_0000 | 0x4000_1000,
            ttbr0: 0,
        };
        let va = 0xffff_8000_8012_3458;
        let (l0, l1, l2, l3) = (va >> 39 & 511, va >> 30 & 511, va >> 21 & 511, va >> 12 & 511);
        let path = [
            (0x4000_1000 + 8 * l0, 0x4000_2000 | TABLE),
            (0x4000_2000 + 8 * l1, 0x4000_3000 | TABLE),
            (0x4000_3000 + 8 * l2, 0x4000_4000 | TABLE),
            (0x4000_4000 + 8 * l3, 0x0060_0000_5000_6f03 | TABLE),
        ];
        assert_eq!(translate(&regs, &path, va), Some(0x5000_6458));
        let block = [path[0], path[1], (0x4000_3000 + 8 * l2, 0x0040_0000_4420_0701)];
        assert_eq!(translate(&regs, &block, va), Some(0x4420_0000 | va & 0x1f_ffff));
        let hole = [path[0], path[1], (0x4000_3000 + 8 * l2, 0)];
        assert_eq!(translate(&regs, &hole, va), None);
        let block_as_page = [path[0], path[1], path[2], (0x4000_4000 + 8 * l3, BLOCK)];
        assert_eq!(translate(&regs, &block_as_page, va), None, "there are no blocks at the last level");
        assert_eq!(translate(&regs, &path, va & !(1 << 55)), None, "the other half has other tables");
    }

    /// A process half: 16 KiB pages (TG0 = 2), 47 bits (T0SZ = 17), three levels; and 64 KiB pages (TG0 = 1), 42 bits.
    #[test]
    fn walks_other_granules() {
        let va = 0x7f12_3456_789c;
        let regs = Stage1 { sctlr: 1, tcr: 17 | 2 << 14, ttbr0: 0x4000_4000, ttbr1: 0 };
        let path = [
            (0x4000_4000 + 8 * (va >> 36), 0x4000_8000 | TABLE),
            (0x4000_8000 + 8 * (va >> 25 & 2047), 0x4000_c000 | TABLE),
            (0x4000_c000 + 8 * (va >> 14 & 2047), 0x5000_0000 | TABLE),
        ];
        assert_eq!(translate(&regs, &path, va), Some(0x5000_0000 | va & 0x3fff));
        let va = 0x123_4567_89a0;
        let regs = Stage1 { sctlr: 1, tcr: 22 | 1 << 14, ttbr0: 0x4001_0000, ttbr1: 0 };
        let path = [
            (0x4001_0000 + 8 * (va >> 29), 0x4002_0000 | TABLE),
            (0x4002_0000 + 8 * (va >> 16 & 8191), 0x5003_0000 | TABLE),
        ];
        assert_eq!(translate(&regs, &path, va), Some(0x5003_0000 | va & 0xffff));
    }

    /// Words by GNU as, all with register 1.
    #[test]
    fn knows_signed_loads() {
        let load = |width, to_64| Some(SignedLoad { width, to_64, rt: 1 });
        for (word, want) in [
            (0x39c0_0041, load(1, false)), // ldrsb w1,[x2]
            (0x3980_0041, load(1, true)),  // ldrsb x1,[x2]
            (0x79c0_0041, load(2, false)), // ldrsh w1,[x2]
            (0x7980_0041, load(2, true)),  // ldrsh x1,[x2]
            (0xb980_0041, load(4, true)),  // ldrsw x1,[x2]
            (0xb8a3_6841, load(4, true)),  // ldrsw x1,[x2,x3]
            (0x389f_f041, load(1, true)),  // ldursb x1,[x2,#-1]
            (0x7880_0841, load(2, true)),  // ldtrsh x1,[x2]
            (0x9980_0041, load(4, true)),  // ldapursw x1,[x2]
            (0xb940_0041, None),           // ldr w1,[x2]
            (0x3940_0041, None),           // ldrb w1,[x2]
            (0xf980_0041, None),           // prfm pldl1strm,[x2]
            (0xb880_4441, None),           // ldrsw x1,[x2],#4: no valid syndrome
            (0x3dc0_0041, None),           // ldr q1,[x2]
            (0x38a3_0041, None),           // ldaddab w3,w1,[x2]
            (0x1400_0000, None),           // b .
        ] {
            assert_eq!(SignedLoad::decode(word), want, "{word:#x}");
        }
    }

    #[test]
    fn extends_the_sign() {
        let load = |width, to_64| SignedLoad { width, to_64, rt: 1 };
        assert_eq!(load(1, false).extend(0x1234_0080), 0xffff_ff80);
        assert_eq!(load(1, true).extend(0x80), 0xffff_ffff_ffff_ff80);
        assert_eq!(load(2, true).extend(0x7fff), 0x7fff);
        assert_eq!(load(4, true).extend(0x8000_0000), 0xffff_ffff_8000_0000);
    }

    proptest! {
        /// Guests write what they like into registers and tables.
        #[test]
        fn hostile_tables_end(sctlr: u64, tcr: u64, ttbr0: u64, ttbr1: u64, va: u64, word: u64, instruction: u32) {
            let mut reads = 0;
            let regs = Stage1 { sctlr: sctlr | 1, tcr, ttbr0, ttbr1 };
            regs.translate(va, |_| { reads += 1; Some(word | 3) });
            prop_assert!(reads <= 5, "{reads} reads");
            if let Some(load) = SignedLoad::decode(instruction) {
                load.extend(word);
            }
        }
    }
}
