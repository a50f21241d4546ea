//! Pieces of guest programs: exception vectors, interrupt controller set-up, reports.

use super::asm::{Asm, Extend, SysReg};
use super::rig::{CODE, FAULT, IRQ, REPORT, VECTORS, gic_config};
use crate::GICR_STRIDE;

/// The register that holds [`REPORT`] in every program of [`start`].
pub const REPORT_BASE: u8 = 28;

/// The register in which the IRQ handler counts the interrupts it took.
pub const IRQS_TAKEN: u8 = 25;

/// The register in which a program counts those of them that it has waited for.
pub const IRQS_USED: u8 = 27;

/// How a program's SPI is triggered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// Pending from each pulse.
    Edge,
    /// Pending while the line is high.
    Level,
}

/// The vectors (Arm DDI 0487, D1.4.1.5). The handlers use X20 to X26:
/// - synchronous: stores ESR, ELR and FAR at [`FAULT`], then goes on behind the instruction;
/// - IRQ: turns the virtual timer off, acknowledges, stores the INTID at [`IRQ`], ends the interrupt, counts it in X25 ([`IRQS_TAKEN`]).
pub fn vectors() -> Asm {
    let mut a = Asm::at(VECTORS);
    a.pad_to(0x200);
    a.mrs(20, SysReg::ESR_EL1).mrs(21, SysReg::ELR_EL1).mrs(22, SysReg::FAR_EL1).mov(23, FAULT);
    a.str(20, 23, 0).str(21, 23, 8).str(22, 23, 16);
    a.add(21, 21, 4).msr(SysReg::ELR_EL1, 21).isb().eret();
    a.pad_to(0x280);
    a.mov(26, 0).msr(SysReg::CNTV_CTL_EL0, 26).isb();
    a.mrs(24, SysReg::ICC_IAR1_EL1).mov(26, IRQ).dsb().str(24, 26, 0);
    a.msr(SysReg::ICC_EOIR1_EL1, 24).isb().add(25, 25, 1).eret();
    a
}

/// Start of a program at [`CODE`]: vectors, FP and SIMD allowed, [`REPORT_BASE`] set.
pub fn start() -> Asm {
    let mut a = Asm::at(CODE);
    prologue(&mut a);
    a
}

/// The same as [`start`] does, for a program elsewhere (a secondary vCPU's entry).
pub fn prologue(a: &mut Asm) {
    a.mov(9, VECTORS).msr(SysReg::VBAR_EL1, 9);
    // CPACR_EL1.FPEN, bits 21:20: no traps.
    a.mov(9, 3 << 20).msr(SysReg::CPACR_EL1, 9).isb();
    a.mov(25, 0).mov(REPORT_BASE, REPORT);
}

/// Reports register `rt`.
pub fn report(a: &mut Asm, rt: u8) {
    a.str(rt, REPORT_BASE, 0);
}

/// Ends a program: it waits for interrupts for ever.
pub fn idle(a: &mut Asm) {
    let top = a.here();
    a.wfi().b(top);
}

/// Turns the distributor on: affinity routing and group 1 (GICD_CTLR of one security state, Arm IHI 0069, 12.9.4).
pub fn enable_distributor(a: &mut Asm) {
    a.mov(9, gic_config().distributor).mov(10, 1 << 4 | 1 << 1).store(4, 10, 9, 0);
}

/// Turns on this vCPU's redistributor and CPU interface, with all SGIs and PPI 27, and takes IRQs. X`index` holds the
/// vCPU's index. Uses X9 to X11.
pub fn enable_cpu_interface(a: &mut Asm, index: u8) {
    a.mov(9, gic_config().redistributors).add_shifted(9, 9, index, GICR_STRIDE.trailing_zeros().into());
    // GICR_WAKER (0x14): clear ProcessorSleep, then wait until ChildrenAsleep (bit 2) is clear. The others are 0.
    a.mov(10, 0).store(4, 10, 9, 0x14);
    let awake = a.here();
    a.load(4, Extend::Zero, 10, 9, 0x14).cbnz(10, awake);
    // The SGI frame: GICR_IGROUPR0 (0x80), GICR_IPRIORITYR (0x400), GICR_ISENABLER0 (0x100).
    a.mov(11, 0x1_0000).add_shifted(9, 9, 11, 0);
    a.mov(10, 0xffff_ffff).store(4, 10, 9, 0x80);
    a.mov(10, 0x8080_8080);
    (0..8).for_each(|n| {
        a.store(4, 10, 9, 0x400 + 4 * n);
    });
    a.mov(10, 1 << 27 | 0xffff).store(4, 10, 9, 0x100).dsb();
    a.mov(10, 7).msr(SysReg::ICC_SRE_EL1, 10).isb();
    a.mov(10, 0xff).msr(SysReg::ICC_PMR_EL1, 10);
    a.mov(10, 1).msr(SysReg::ICC_IGRPEN1_EL1, 10).isb().irqs_on();
}

/// Routes SPI `intid` to vCPU 0 with `trigger` and enables it. Uses X9 to X11.
pub fn enable_spi(a: &mut Asm, intid: u32, trigger: Trigger) {
    let intid = u64::from(intid);
    let (word, bit) = (4 * (intid / 32), intid % 32);
    a.mov(9, gic_config().distributor);
    // GICD_IGROUPR: group 1.
    a.load(4, Extend::Zero, 10, 9, 0x80 + word).mov(11, 1 << bit).orr(10, 10, 11);
    a.store(4, 10, 9, 0x80 + word);
    // GICD_IPRIORITYR.
    a.mov(10, 0x80).store(1, 10, 9, 0x400 + intid);
    // GICD_ICFGR: the trigger after reset is unknown (Arm IHI 0069, 12.9.9), so it is always written.
    let (config, shift) = (0xc00 + 4 * (intid / 16), 2 * (intid % 16) + 1);
    a.load(4, Extend::Zero, 10, 9, config).mov(11, 1 << shift);
    match trigger {
        Trigger::Edge => a.orr(10, 10, 11),
        Trigger::Level => a.bic(10, 10, 11),
    };
    a.store(4, 10, 9, config);
    // GICD_IROUTER: unknown, too.
    a.mov(10, 0x6000 + 8 * intid).add_shifted(10, 10, 9, 0).str(super::asm::XZR, 10, 0);
    // GICD_ISENABLER.
    a.mov(10, 1 << bit).store(4, 10, 9, 0x100 + word).dsb();
}

/// A PSCI call: function and arguments to X0 to X3, result in X0.
pub fn psci(a: &mut Asm, function: u64, arguments: &[u64]) {
    a.mov(0, function);
    for (n, argument) in arguments.iter().enumerate() {
        a.mov(n as u8 + 1, *argument);
    }
    a.hvc();
}
