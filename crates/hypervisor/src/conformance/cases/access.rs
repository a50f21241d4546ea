//! Loads and stores where nothing is mapped.

use crate::conformance::asm::{Asm, Extend, SysReg, XZR};
use crate::conformance::guest::{self, report, start};
use crate::conformance::rig::{Bench, Context, Cpu, MMIO, Outcome, RAM, exception_class, expect, fail};
use crate::conformance::{Case, case};
use crate::{Exit, Register};
use std::sync::atomic::Ordering;

pub const CASES: &[Case] = &[
    case("load-zero-extended", |c| loads(c, Extend::Zero, &[1, 2, 4, 8])),
    case("load-sign-extended-to-32", |c| loads(c, Extend::Sign32, &[1, 2])),
    case("load-sign-extended-to-64", |c| loads(c, Extend::Sign64, &[1, 2, 4])),
    case("load-sign-extended-with-mmu", signed_with_mmu),
    case("load-to-xzr", load_to_xzr),
    case("store", stores),
    case("store-from-xzr", store_from_xzr),
    case("access-addresses", addresses),
    case("undecoded-load-pair", |c| undecoded(c, |a| _ = a.ldp(1, 2, TARGET))),
    case("undecoded-store-pair", |c| undecoded(c, |a| _ = a.stp(1, 2, TARGET))),
    case("undecoded-load-writeback", |c| undecoded(c, |a| _ = a.ldr_post(1, TARGET))),
    case("undecoded-store-writeback", |c| undecoded(c, |a| _ = a.str_post(1, TARGET))),
    case("undecoded-simd-load", |c| undecoded(c, |a| _ = a.ldr_q(1, TARGET))),
    case("undecoded-simd-store", |c| undecoded(c, |a| _ = a.str_q(1, TARGET))),
    case("undecoded-exclusive", |c| undecoded(c, |a| _ = a.ldxr(1, TARGET))),
    case("undecoded-atomic", |c| undecoded(c, |a| _ = a.ldadd(1, 2, TARGET))),
    case("data-abort-for-a-read", abort_instead_of_answer),
];

/// The register that holds the address under test.
const TARGET: u8 = 4;

/// Values whose every byte, half and word has its sign bit set, or clear.
const VALUES: [u64; 2] = [0x8192_a3b4_c5d6_e7f8, 0x0112_2334_4556_6778];

/// `value` cut to `width` bytes and extended as the instruction says (Arm DDI 0487, C6.2 LDRSB and others).
fn extended(value: u64, width: u8, extend: Extend) -> u64 {
    let unused = 64 - 8 * u32::from(width);
    let signed = ((value << unused) as i64 >> unused) as u64;
    match extend {
        Extend::Zero => value << unused >> unused,
        Extend::Sign32 => signed & 0xffff_ffff,
        Extend::Sign64 => signed,
    }
}

fn expect_read(cpu: &mut Cpu<'_>, ipa: u64, width: u8) -> Outcome {
    let got = cpu.run()?;
    expect("exit", got, Exit::MmioRead { ipa, width })
}

fn loads(context: &Context, extend: Extend, widths: &[u8]) -> Outcome {
    let bench = Bench::new(context, 1)?;
    let mut a = start();
    a.mov(TARGET, MMIO);
    for width in widths {
        for _ in VALUES {
            a.mov(1, u64::MAX).load(*width, extend, 1, TARGET, 8);
            report(&mut a, 1);
        }
    }
    bench.load(guest::vectors());
    bench.load(a);
    let mut cpu = bench.boot_cpu()?;
    for width in widths {
        for value in VALUES {
            expect_read(&mut cpu, MMIO + 8, *width)?;
            // The whole value is given: cutting it is the back end's part.
            cpu.vcpu.complete_read(value);
            let want = extended(value, *width, extend);
            cpu.expect_report(format!("{width} bytes of {value:#x} as the guest sees them"), want)?;
            expect("the same from outside", cpu.x(1)?, want)?;
        }
    }
    Ok(())
}

/// The same with the guest's MMU on, since a back end may have to look at the instruction: in the lower and the upper
/// half of the address space, each load three times.
fn signed_with_mmu(context: &Context) -> Outcome {
    /// Start of the upper half with 39 address bits.
    const UPPER: u64 = 0xffff_ff80_0000_0000;
    const TABLE: u64 = RAM + 0xc000;
    let bench = Bench::new(context, 1)?;
    // One level-1 table for both halves, with blocks of 1 GiB (Arm DDI 0487, D8.3): devices, not executable, then
    // memory. Attributes 0 and 1 of MAIR; access flag, bit 10.
    bench.ram.cell(TABLE - RAM).store(3 << 53 | 1 << 10 | 1, Ordering::SeqCst);
    bench.ram.cell(TABLE - RAM + 8).store(RAM | 1 << 10 | 1 << 2 | 1, Ordering::SeqCst);
    let mut a = start();
    a.mov(1, 0x44 << 8).msr(SysReg::MAIR_EL1, 1);
    // 36-bit IPAs, 4 KiB granules (TG1 = 2), 39 bits of address in each half.
    a.mov(1, 1 << 32 | 2 << 30 | 25 << 16 | 25).msr(SysReg::TCR_EL1, 1);
    a.mov(1, TABLE).msr(SysReg::TTBR0_EL1, 1).msr(SysReg::TTBR1_EL1, 1).dsb().isb();
    a.mrs(1, SysReg::SCTLR_EL1).mov(2, 1).orr(1, 1, 2).msr(SysReg::SCTLR_EL1, 1).isb();
    a.mov(TARGET, MMIO);
    let top = a.here();
    let loads = [(1, Extend::Sign32), (2, Extend::Sign64), (4, Extend::Sign64), (4, Extend::Zero)];
    for (width, extend) in loads {
        a.mov(6, 3);
        let again = a.here();
        a.mov(1, u64::MAX).load(width, extend, 1, TARGET, 8);
        report(&mut a, 1);
        a.sub(6, 6, 1).cbnz(6, again);
    }
    // Then everything once more at the other half's address of the same code.
    a.mov(TARGET, UPPER | MMIO).mov(1, UPPER);
    // `B` keeps to its half, so the upper one's copy of it is where the jump goes.
    let after = a.label();
    a.adr(2, after).orr(1, 1, 2).br(1);
    a.place(after);
    a.b(top);
    bench.load(guest::vectors());
    bench.load(a);
    let mut cpu = bench.boot_cpu()?;
    for half in ["lower", "upper"] {
        for (width, extend) in loads {
            for time in 1..=3 {
                expect_read(&mut cpu, MMIO + 8, width)?;
                cpu.vcpu.complete_read(VALUES[0]);
                let want = extended(VALUES[0], width, extend);
                cpu.expect_report(format!("{half} half, {width} bytes, {extend:?}, time {time}"), want)?;
            }
        }
    }
    Ok(())
}

fn load_to_xzr(context: &Context) -> Outcome {
    let bench = Bench::new(context, 1)?;
    let mut a = start();
    a.mov(TARGET, MMIO);
    for width in [1, 2, 4, 8] {
        a.load(width, Extend::Zero, XZR, TARGET, 0);
        // If the load had hit SP or register 31 of some table, this would not be zero.
        a.mov_reg(1, XZR);
        report(&mut a, 1);
    }
    bench.load(guest::vectors());
    bench.load(a);
    let mut cpu = bench.boot_cpu()?;
    for width in [1, 2, 4, 8] {
        expect_read(&mut cpu, MMIO, width)?;
        let pc = cpu.vcpu.register(Register::Pc)?;
        cpu.vcpu.complete_read(u64::MAX);
        cpu.expect_report("XZR after a load", 0)?;
        expect("PC two instructions on", cpu.vcpu.register(Register::Pc)?, pc + 8)?;
    }
    Ok(())
}

fn stores(context: &Context) -> Outcome {
    let bench = Bench::new(context, 1)?;
    let mut a = start();
    a.mov(TARGET, MMIO);
    for width in [1, 2, 4, 8] {
        for value in VALUES {
            a.mov(1, value).store(width, 1, TARGET, 16);
        }
    }
    bench.load(guest::vectors());
    bench.load(a);
    let mut cpu = bench.boot_cpu()?;
    for width in [1, 2, 4, 8] {
        for value in VALUES {
            let got = cpu.store_at(MMIO + 16, width)?;
            expect(format!("{width} bytes of {value:#x}"), got, extended(value, width, Extend::Zero))?;
        }
    }
    Ok(())
}

fn store_from_xzr(context: &Context) -> Outcome {
    let bench = Bench::new(context, 1)?;
    let mut a = start();
    a.mov(TARGET, MMIO);
    for width in [1, 2, 4, 8] {
        a.store(width, XZR, TARGET, 0);
    }
    bench.load(guest::vectors());
    bench.load(a);
    let mut cpu = bench.boot_cpu()?;
    for width in [1, 2, 4, 8] {
        let got = cpu.store_at(MMIO, width)?;
        expect(format!("{width} bytes of XZR"), got, 0)?;
    }
    Ok(())
}

/// Exits carry the whole guest-physical address, at both ends of a page and high up.
fn addresses(context: &Context) -> Outcome {
    let top = 1 << context.options(1).ipa_bits;
    let targets = [MMIO, MMIO + 0xff8, MMIO + 0x3ff8, 0x8, top - 8];
    let bench = Bench::new(context, 1)?;
    let mut a = start();
    for target in targets {
        a.mov(TARGET, target).ldr(1, TARGET, 0).str(1, TARGET, 0);
    }
    bench.load(guest::vectors());
    bench.load(a);
    let mut cpu = bench.boot_cpu()?;
    for target in targets {
        expect_read(&mut cpu, target, 8)?;
        cpu.vcpu.complete_read(!target);
        let got = cpu.store_at(target, 8)?;
        expect(format!("value read at {target:#x}"), got, !target)?;
    }
    Ok(())
}

/// ESR_EL1 of a data abort taken from EL1 to EL1 (EC 0x25) that is a synchronous external abort (DFSC 0x10).
/// (Arm DDI 0487, D19.2.37.)
fn expect_external_abort(exception: (u64, u64, u64), pc: u64, far: u64) -> Outcome {
    let (esr, elr, fault_address) = exception;
    expect("exception class", exception_class(esr), 0x25)?;
    expect("fault status", esr & 0x3f, 0x10)?;
    expect("ELR", elr, pc)?;
    expect("FAR", fault_address, far)
}

/// An access without a valid syndrome makes its own exit, and can be answered with an abort that the guest survives.
fn undecoded(context: &Context, access: fn(&mut Asm)) -> Outcome {
    let bench = Bench::new(context, 1)?;
    let mut a = start();
    a.mov(TARGET, MMIO + 0x40);
    let pc = a.pc();
    access(&mut a);
    a.mov(1, 42);
    report(&mut a, 1);
    bench.load(guest::vectors());
    bench.load(a);
    let mut cpu = bench.boot_cpu()?;
    match cpu.run()? {
        Exit::Undecoded { ipa, pc: at, .. } => expect("address and PC", (ipa, at), (MMIO + 0x40, pc))?,
        other => return fail(format!("exit {other:x?}, expected an undecoded access")),
    }
    cpu.vcpu.inject_data_abort()?;
    let exception = cpu.exception()?;
    expect_external_abort(exception, pc, MMIO + 0x40)?;
    cpu.expect_report("the guest goes on", 42)
}

/// A plain load can be answered with an abort, too; its register stays as it was.
fn abort_instead_of_answer(context: &Context) -> Outcome {
    let bench = Bench::new(context, 1)?;
    let mut a = start();
    a.mov(TARGET, MMIO).mov(1, 42);
    let pc = a.pc();
    a.ldr(1, TARGET, 0);
    report(&mut a, 1);
    bench.load(guest::vectors());
    bench.load(a);
    let mut cpu = bench.boot_cpu()?;
    expect_read(&mut cpu, MMIO, 8)?;
    cpu.vcpu.inject_data_abort()?;
    let exception = cpu.exception()?;
    expect_external_abort(exception, pc, MMIO)?;
    cpu.expect_report("the load's register", 42)
}
