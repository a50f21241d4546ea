//! A tiny A64 assembler: just the instructions that the guest programs need.
//!
//! Encodings are those of Arm DDI 0487 (A-profile), C6.2. Registers are numbers 0 to 30; 31 is XZR, or SP as a base.

/// The zero register.
pub const XZR: u8 = 31;

/// A system register as `MRS` and `MSR` name it: op0, op1, CRn, CRm, op2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SysReg(u8, u8, u8, u8, u8);

#[allow(missing_docs)] // The architecture's own names.
impl SysReg {
    pub const MPIDR_EL1: Self = Self(3, 0, 0, 0, 5);
    pub const SCTLR_EL1: Self = Self(3, 0, 1, 0, 0);
    pub const CPACR_EL1: Self = Self(3, 0, 1, 0, 2);
    pub const TTBR0_EL1: Self = Self(3, 0, 2, 0, 0);
    pub const TTBR1_EL1: Self = Self(3, 0, 2, 0, 1);
    pub const TCR_EL1: Self = Self(3, 0, 2, 0, 2);
    pub const MAIR_EL1: Self = Self(3, 0, 10, 2, 0);
    pub const ELR_EL1: Self = Self(3, 0, 4, 0, 1);
    pub const CURRENT_EL: Self = Self(3, 0, 4, 2, 2);
    pub const ICC_PMR_EL1: Self = Self(3, 0, 4, 6, 0);
    pub const ESR_EL1: Self = Self(3, 0, 5, 2, 0);
    pub const FAR_EL1: Self = Self(3, 0, 6, 0, 0);
    pub const VBAR_EL1: Self = Self(3, 0, 12, 0, 0);
    pub const ICC_SGI1R_EL1: Self = Self(3, 0, 12, 11, 5);
    pub const ICC_IAR1_EL1: Self = Self(3, 0, 12, 12, 0);
    pub const ICC_EOIR1_EL1: Self = Self(3, 0, 12, 12, 1);
    pub const ICC_SRE_EL1: Self = Self(3, 0, 12, 12, 5);
    pub const ICC_IGRPEN1_EL1: Self = Self(3, 0, 12, 12, 7);
    pub const DAIF: Self = Self(3, 3, 4, 2, 1);
    pub const CNTV_TVAL_EL0: Self = Self(3, 3, 14, 3, 0);
    pub const CNTV_CTL_EL0: Self = Self(3, 3, 14, 3, 1);

    fn bits(self) -> u32 {
        let Self(op0, op1, crn, crm, op2) = self;
        u32::from(op0 & 1) << 19
            | u32::from(op1) << 16
            | u32::from(crn) << 12
            | u32::from(crm) << 8
            | u32::from(op2) << 5
    }
}

/// How a load fills its register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extend {
    /// With zeros.
    Zero,
    /// With the sign, to 32 bits; the upper 32 are zero.
    Sign32,
    /// With the sign, to 64 bits.
    Sign64,
}

/// A place in the program, known now or later.
#[derive(Clone, Copy, Debug)]
pub struct Label(usize);

enum Fixup {
    /// 26 bits of words at bit 0: B.
    Imm26,
    /// 19 bits of words at bit 5: CBZ, CBNZ, and ADR, whose two bits of bytes stay zero.
    Imm19,
}

/// A program under construction.
pub struct Asm {
    base: u64,
    words: Vec<u32>,
    /// Index of the word that each label names.
    labels: Vec<Option<usize>>,
    fixups: Vec<(usize, Label, Fixup)>,
}

fn r(register: u8) -> u32 {
    assert!(register <= 31, "no register {register}");
    register.into()
}

/// `n` as a field of `bits` bits.
fn field(n: u64, bits: u32) -> u32 {
    assert!(n < 1 << bits, "{n} does not fit in {bits} bits");
    n as u32
}

/// log2 of an access width in bytes.
fn size_of_access(width: u8) -> u32 {
    assert!(matches!(width, 1 | 2 | 4 | 8), "no access of {width} bytes");
    width.trailing_zeros()
}

impl Asm {
    /// A program that will stand at guest address `base`.
    pub fn at(base: u64) -> Self {
        Self { base, words: Vec::new(), labels: Vec::new(), fixups: Vec::new() }
    }

    /// Address of the next instruction.
    pub fn pc(&self) -> u64 {
        self.base + 4 * self.words.len() as u64
    }

    /// A label to be placed later.
    pub fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// Places `label` at the next instruction.
    pub fn place(&mut self, label: Label) {
        let old = self.labels[label.0].replace(self.words.len());
        assert!(old.is_none(), "label placed twice");
    }

    /// A label at the next instruction.
    pub fn here(&mut self) -> Label {
        let label = self.label();
        self.place(label);
        label
    }

    /// Fills with NOPs up to `offset` bytes from the start.
    pub fn pad_to(&mut self, offset: u64) {
        let words = (offset / 4) as usize;
        assert!(words >= self.words.len(), "{offset:#x} is behind");
        self.words.resize(words, 0xd503_201f);
    }

    /// The machine code, with its address.
    pub fn finish(mut self) -> (u64, Vec<u32>) {
        for (at, label, fixup) in std::mem::take(&mut self.fixups) {
            let target = self.labels[label.0].expect("every label is placed");
            let words = target as i64 - at as i64;
            let (bits, shift) = match fixup {
                Fixup::Imm26 => (26, 0),
                Fixup::Imm19 => (19, 5),
            };
            assert!(words.unsigned_abs() < 1 << (bits - 1), "branch too far");
            self.words[at] |= (words as u32 & ((1 << bits) - 1)) << shift;
        }
        (self.base, self.words)
    }

    /// Emits an instruction by its encoding.
    pub fn word(&mut self, word: u32) -> &mut Self {
        self.words.push(word);
        self
    }

    /// `MOVZ`, `MOVK`: sets a 64-bit constant.
    pub fn mov(&mut self, rd: u8, value: u64) -> &mut Self {
        let half = |n: u32| (value >> (16 * n)) as u32 & 0xffff;
        self.word(0xd280_0000 | half(0) << 5 | r(rd));
        for n in (1..4).filter(|n| half(*n) != 0) {
            self.word(0xf280_0000 | n << 21 | half(n) << 5 | r(rd));
        }
        self
    }

    /// `MOV Xd, Xm`.
    pub fn mov_reg(&mut self, rd: u8, rm: u8) -> &mut Self {
        self.word(0xaa00_03e0 | r(rm) << 16 | r(rd))
    }

    /// `ADD Xd, Xn, #imm`.
    pub fn add(&mut self, rd: u8, rn: u8, imm: u64) -> &mut Self {
        self.word(0x9100_0000 | field(imm, 12) << 10 | r(rn) << 5 | r(rd))
    }

    /// `SUB Xd, Xn, #imm`.
    pub fn sub(&mut self, rd: u8, rn: u8, imm: u64) -> &mut Self {
        self.word(0xd100_0000 | field(imm, 12) << 10 | r(rn) << 5 | r(rd))
    }

    /// `ADD Xd, Xn, Xm, LSL #shift`.
    pub fn add_shifted(&mut self, rd: u8, rn: u8, rm: u8, shift: u64) -> &mut Self {
        self.word(0x8b00_0000 | r(rm) << 16 | field(shift, 6) << 10 | r(rn) << 5 | r(rd))
    }

    /// `SUB Xd, Xn, Xm`.
    pub fn sub_reg(&mut self, rd: u8, rn: u8, rm: u8) -> &mut Self {
        self.word(0xcb00_0000 | r(rm) << 16 | r(rn) << 5 | r(rd))
    }

    /// `ORR Xd, Xn, Xm`.
    pub fn orr(&mut self, rd: u8, rn: u8, rm: u8) -> &mut Self {
        self.word(0xaa00_0000 | r(rm) << 16 | r(rn) << 5 | r(rd))
    }

    /// `BIC Xd, Xn, Xm`.
    pub fn bic(&mut self, rd: u8, rn: u8, rm: u8) -> &mut Self {
        self.word(0x8a20_0000 | r(rm) << 16 | r(rn) << 5 | r(rd))
    }

    /// `LDR`, `LDRB`, `LDRH`, `LDRSB`, `LDRSH`, `LDRSW`: loads `width` bytes from `[Xn, #offset]`.
    pub fn load(&mut self, width: u8, extend: Extend, rt: u8, rn: u8, offset: u64) -> &mut Self {
        let opc = match extend {
            Extend::Zero => 1,
            Extend::Sign64 => 2,
            Extend::Sign32 => 3,
        };
        assert!(
            extend == Extend::Zero || width < if extend == Extend::Sign64 { 8 } else { 4 },
            "no such load"
        );
        self.unsigned_offset(width, opc, rt, rn, offset)
    }

    /// `LDR Xt, [Xn, #offset]`.
    pub fn ldr(&mut self, rt: u8, rn: u8, offset: u64) -> &mut Self {
        self.load(8, Extend::Zero, rt, rn, offset)
    }

    /// `STR`, `STRB`, `STRH`: stores `width` bytes at `[Xn, #offset]`.
    pub fn store(&mut self, width: u8, rt: u8, rn: u8, offset: u64) -> &mut Self {
        self.unsigned_offset(width, 0, rt, rn, offset)
    }

    /// `STR Xt, [Xn, #offset]`.
    pub fn str(&mut self, rt: u8, rn: u8, offset: u64) -> &mut Self {
        self.store(8, rt, rn, offset)
    }

    fn unsigned_offset(&mut self, width: u8, opc: u32, rt: u8, rn: u8, offset: u64) -> &mut Self {
        assert!(offset.is_multiple_of(width.into()), "offsets are in units of the width");
        let (size, imm12) = (size_of_access(width), field(offset / u64::from(width), 12));
        self.word(0x3900_0000 | size << 30 | opc << 22 | imm12 << 10 | r(rn) << 5 | r(rt))
    }

    /// `LDP Xt1, Xt2, [Xn]`.
    pub fn ldp(&mut self, rt1: u8, rt2: u8, rn: u8) -> &mut Self {
        self.word(0xa940_0000 | r(rt2) << 10 | r(rn) << 5 | r(rt1))
    }

    /// `STP Xt1, Xt2, [Xn]`.
    pub fn stp(&mut self, rt1: u8, rt2: u8, rn: u8) -> &mut Self {
        self.word(0xa900_0000 | r(rt2) << 10 | r(rn) << 5 | r(rt1))
    }

    /// `LDR Xt, [Xn], #8`.
    pub fn ldr_post(&mut self, rt: u8, rn: u8) -> &mut Self {
        self.word(0xf840_8400 | r(rn) << 5 | r(rt))
    }

    /// `STR Xt, [Xn], #8`.
    pub fn str_post(&mut self, rt: u8, rn: u8) -> &mut Self {
        self.word(0xf800_8400 | r(rn) << 5 | r(rt))
    }

    /// `LDR Qt, [Xn]`.
    pub fn ldr_q(&mut self, qt: u8, rn: u8) -> &mut Self {
        self.word(0x3dc0_0000 | r(rn) << 5 | r(qt))
    }

    /// `STR Qt, [Xn]`.
    pub fn str_q(&mut self, qt: u8, rn: u8) -> &mut Self {
        self.word(0x3d80_0000 | r(rn) << 5 | r(qt))
    }

    /// `LDXR Xt, [Xn]`.
    pub fn ldxr(&mut self, rt: u8, rn: u8) -> &mut Self {
        self.word(0xc85f_7c00 | r(rn) << 5 | r(rt))
    }

    /// `LDADD Xs, Xt, [Xn]` (FEAT_LSE).
    pub fn ldadd(&mut self, rs: u8, rt: u8, rn: u8) -> &mut Self {
        self.word(0xf820_0000 | r(rs) << 16 | r(rn) << 5 | r(rt))
    }

    /// `MRS Xt, reg`.
    pub fn mrs(&mut self, rt: u8, reg: SysReg) -> &mut Self {
        self.word(0xd530_0000 | reg.bits() | r(rt))
    }

    /// `MSR reg, Xt`.
    pub fn msr(&mut self, reg: SysReg, rt: u8) -> &mut Self {
        self.word(0xd510_0000 | reg.bits() | r(rt))
    }

    /// `MSR DAIFClr, #2`: takes IRQs.
    pub fn irqs_on(&mut self) -> &mut Self {
        self.word(0xd503_42ff)
    }

    /// `MSR DAIFSet, #2`: takes no IRQs.
    pub fn irqs_off(&mut self) -> &mut Self {
        self.word(0xd503_42df)
    }

    /// `ISB`.
    pub fn isb(&mut self) -> &mut Self {
        self.word(0xd503_3fdf)
    }

    /// `DSB SY`.
    pub fn dsb(&mut self) -> &mut Self {
        self.word(0xd503_3f9f)
    }

    /// `WFI`.
    pub fn wfi(&mut self) -> &mut Self {
        self.word(0xd503_207f)
    }

    /// `HVC #0`.
    pub fn hvc(&mut self) -> &mut Self {
        self.word(0xd400_0002)
    }

    /// `ERET`.
    pub fn eret(&mut self) -> &mut Self {
        self.word(0xd69f_03e0)
    }

    /// `BR Xn`.
    pub fn br(&mut self, rn: u8) -> &mut Self {
        self.word(0xd61f_0000 | r(rn) << 5)
    }

    /// `ADR Xd, label`.
    pub fn adr(&mut self, rd: u8, label: Label) -> &mut Self {
        self.fixups.push((self.words.len(), label, Fixup::Imm19));
        self.word(0x1000_0000 | r(rd))
    }

    /// `B label`.
    pub fn b(&mut self, label: Label) -> &mut Self {
        self.fixups.push((self.words.len(), label, Fixup::Imm26));
        self.word(0x1400_0000)
    }

    /// `CBZ Xt, label`.
    pub fn cbz(&mut self, rt: u8, label: Label) -> &mut Self {
        self.fixups.push((self.words.len(), label, Fixup::Imm19));
        self.word(0xb400_0000 | r(rt))
    }

    /// `CBNZ Xt, label`.
    pub fn cbnz(&mut self, rt: u8, label: Label) -> &mut Self {
        self.fixups.push((self.words.len(), label, Fixup::Imm19));
        self.word(0xb500_0000 | r(rt))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every instruction once, against the words that GNU as makes of the same text.
    #[test]
    fn encodings_match_gnu_as() {
        let mut a = Asm::at(0);
        a.mov(1, 0xabcd_0000_0000_1234).mov_reg(3, 4).add(1, 2, 0x123).sub(1, 2, 1);
        a.add_shifted(5, 6, 7, 17).sub_reg(5, 6, 7).orr(10, 10, 11).bic(10, 10, 11);
        a.load(1, Extend::Zero, 1, 2, 3)
            .load(2, Extend::Zero, 1, 2, 6)
            .load(4, Extend::Zero, 1, 2, 8)
            .ldr(1, 2, 16);
        a.load(1, Extend::Sign32, 1, 2, 0).load(1, Extend::Sign64, 1, 2, 0).load(2, Extend::Sign32, 1, 2, 0);
        a.load(2, Extend::Sign64, 1, 2, 0).load(4, Extend::Sign64, 1, 2, 0).ldr(XZR, 2, 0);
        a.store(1, 1, 2, 1).store(2, 1, 2, 2).store(4, 1, 2, 4).str(XZR, 2, 8);
        a.ldp(1, 2, 3)
            .stp(1, 2, 3)
            .ldr_post(1, 3)
            .str_post(1, 3)
            .ldr_q(1, 3)
            .str_q(1, 3)
            .ldxr(1, 3)
            .ldadd(1, 2, 3);
        a.mrs(1, SysReg::MPIDR_EL1).msr(SysReg::VBAR_EL1, 2).mrs(1, SysReg::CNTV_CTL_EL0);
        a.msr(SysReg::ICC_SGI1R_EL1, 3)
            .mrs(1, SysReg::ICC_IAR1_EL1)
            .mrs(1, SysReg::CURRENT_EL)
            .mrs(1, SysReg::DAIF);
        a.msr(SysReg::ICC_PMR_EL1, 9).msr(SysReg::CNTV_TVAL_EL0, 1);
        a.irqs_on().irqs_off().isb().dsb().wfi().hvc().eret().br(7);
        let expected = [
            0xd282_4681,
            0xf2f5_79a1,
            0xaa04_03e3,
            0x9104_8c41,
            0xd100_0441,
            0x8b07_44c5,
            0xcb07_00c5,
            0xaa0b_014a,
            0x8a2b_014a,
            0x3940_0c41,
            0x7940_0c41,
            0xb940_0841,
            0xf940_0841,
            0x39c0_0041,
            0x3980_0041,
            0x79c0_0041,
            0x7980_0041,
            0xb980_0041,
            0xf940_005f,
            0x3900_0441,
            0x7900_0441,
            0xb900_0441,
            0xf900_045f,
            0xa940_0861,
            0xa900_0861,
            0xf840_8461,
            0xf800_8461,
            0x3dc0_0061,
            0x3d80_0061,
            0xc85f_7c61,
            0xf821_0062,
            0xd538_00a1,
            0xd518_c002,
            0xd53b_e321,
            0xd518_cba3,
            0xd538_cc01,
            0xd538_4241,
            0xd53b_4221,
            0xd518_4609,
            0xd51b_e301,
            0xd503_42ff,
            0xd503_42df,
            0xd503_3fdf,
            0xd503_3f9f,
            0xd503_207f,
            0xd400_0002,
            0xd69f_03e0,
            0xd61f_00e0,
        ];
        let (_, words) = a.finish();
        for (n, (got, want)) in words.iter().zip(&expected).enumerate() {
            assert_eq!(got, want, "instruction {n}: {got:#x}, not {want:#x}");
        }
        assert_eq!(words.len(), expected.len());
    }

    #[test]
    fn branches_reach_both_ways() {
        let mut a = Asm::at(0x4000_0000);
        let start = a.here();
        let end = a.label();
        a.b(start).cbz(1, start).cbnz(1, end).word(0xd503_201f);
        a.place(end);
        a.b(start).adr(3, end);
        assert_eq!(a.pc(), 0x4000_0018);
        let (base, words) = a.finish();
        assert_eq!(base, 0x4000_0000);
        assert_eq!(words, [0x1400_0000, 0xb4ff_ffe1, 0xb500_0041, 0xd503_201f, 0x17ff_fffc, 0x10ff_ffe3]);
    }
}
