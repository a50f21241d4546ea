//! PSCI (Arm DEN 0022): calls by HVC.

use crate::conformance::asm::{Asm, SysReg};
use crate::conformance::crew::{Crew, Event};
use crate::conformance::guest::{
    self, enable_cpu_interface, enable_distributor, idle, prologue, psci, report, start,
};
use crate::conformance::rig::{Bench, Context, IRQ, Outcome, RAM, REPORT, expect, fail};
use crate::conformance::{Case, case};
use crate::{Exit, mpidr};

pub const CASES: &[Case] = &[
    case("psci-version", version),
    case("psci-unknown-function", unknown),
    case("psci-cpu-on", cpu_on),
    case("psci-cpu-off-and-on-again", off_and_on),
    case("psci-cpu-on-bad-target", bad_target),
    case("psci-system-off", |c| system(c, 0x8400_0008, &[], Exit::SystemOff)),
    case("psci-system-reset", |c| system(c, 0x8400_0009, &[], Exit::SystemReset)),
    case("psci-system-reset2", |c| system(c, 0xc400_0012, &[0, 0], Exit::SystemReset)),
    case("psci-system-off-from-a-secondary", off_from_secondary),
    case("vcpus-32", all_of_32),
    case("sgi-between-vcpus", sgi),
];

const VERSION: u64 = 0x8400_0000;
const CPU_OFF: u64 = 0x8400_0002;
const CPU_ON: u64 = 0xc400_0003;
const AFFINITY_INFO: u64 = 0xc400_0004;

const SUCCESS: u64 = 0;
const INVALID_PARAMETERS: u64 = -2i64 as u64;
const ALREADY_ON: u64 = -4i64 as u64;

/// Entry of secondary vCPUs.
const SECONDARY: u64 = RAM + 0x4000;

fn secondary() -> Asm {
    let mut a = Asm::at(SECONDARY);
    // The context id is all that is in a register, so it is kept before anything else.
    a.mov_reg(19, 0);
    prologue(&mut a);
    a
}

fn version(context: &Context) -> Outcome {
    let bench = Bench::new(context, 1)?;
    let mut a = start();
    psci(&mut a, VERSION, &[]);
    report(&mut a, 0);
    bench.load(guest::vectors());
    bench.load(a);
    let version = bench.boot_cpu()?.report()?;
    if (0x1_0000..0x2_0000).contains(&version) {
        return Ok(());
    }
    fail(format!("version {version:#x}, expected 1.x"))
}

fn unknown(context: &Context) -> Outcome {
    let bench = Bench::new(context, 1)?;
    let mut a = start();
    // Not assigned by PSCI, and of an owner that does not exist.
    for function in [0x8400_001e, 0xc400_ff00, 0xbf00_0000] {
        psci(&mut a, function, &[]);
        report(&mut a, 0);
    }
    bench.load(guest::vectors());
    bench.load(a);
    let mut cpu = bench.boot_cpu()?;
    for _ in 0..3 {
        // NOT_SUPPORTED; a 32-bit function's result is in W0.
        let got = cpu.report()? & 0xffff_ffff;
        expect("result of an unknown function", got, 0xffff_ffff)?;
    }
    Ok(())
}

fn cpu_on(context: &Context) -> Outcome {
    let bench = Bench::new(context, 2)?;
    let mut a = start();
    psci(&mut a, AFFINITY_INFO, &[mpidr(1), 0]);
    report(&mut a, 0);
    psci(&mut a, CPU_ON, &[mpidr(1), SECONDARY, 0x1122_3344_5566_7788]);
    report(&mut a, 0);
    psci(&mut a, AFFINITY_INFO, &[mpidr(1), 0]);
    report(&mut a, 0);
    psci(&mut a, CPU_ON, &[mpidr(1), SECONDARY, 0]);
    report(&mut a, 0);
    idle(&mut a);
    let mut b = secondary();
    report(&mut b, 19);
    b.mrs(1, SysReg::MPIDR_EL1);
    report(&mut b, 1);
    b.mrs(1, SysReg::CURRENT_EL);
    report(&mut b, 1);
    b.mrs(1, SysReg::DAIF);
    report(&mut b, 1);
    idle(&mut b);
    bench.load(guest::vectors());
    bench.load(a);
    bench.load(b);
    std::thread::scope(|scope| {
        let crew = Crew::start(scope, &bench, 2)?;
        let reports = by_cpu(&crew, [4, 4])?;
        // 1: off, 0: on.
        expect("the boot CPU's results", &reports[0][..], &[1, SUCCESS, 0, ALREADY_ON])?;
        let [context_id, affinity, level, masks] = reports[1][..] else {
            unreachable!("four were asked for")
        };
        expect("context id", context_id, 0x1122_3344_5566_7788)?;
        expect("affinity", affinity & 0xff_00ff_ffff, mpidr(1))?;
        expect("exception level", level >> 2, 1)?;
        expect("masked exceptions", masks >> 6, 0xf)?;
        crew.stop()
    })
}

/// Collects `counts[i]` reports of each vCPU `i`.
fn by_cpu<const N: usize>(crew: &Crew<'_, '_>, counts: [usize; N]) -> Outcome<[Vec<u64>; N]> {
    let mut reports = [const { Vec::new() }; N];
    for _ in 0..counts.iter().sum() {
        let (index, ipa, value) = crew.next_store()?;
        expect("address of a report", ipa, REPORT)?;
        reports[index as usize].push(value);
    }
    let got = reports.each_ref().map(Vec::len);
    expect("reports by vCPU", got, counts)?;
    Ok(reports)
}

fn off_and_on(context: &Context) -> Outcome {
    const ROUNDS: u64 = 20;
    let bench = Bench::new(context, 2)?;
    let mut a = start();
    a.mov(19, ROUNDS);
    let round = a.here();
    a.mov(0, CPU_ON).mov(1, mpidr(1)).mov(2, SECONDARY).mov_reg(3, 19).hvc();
    report(&mut a, 0);
    // Until it is off again.
    let wait = a.here();
    psci(&mut a, AFFINITY_INFO, &[mpidr(1), 0]);
    a.sub(0, 0, 1).cbnz(0, wait);
    a.sub(19, 19, 1).cbnz(19, round);
    a.mov(0, 77);
    report(&mut a, 0);
    idle(&mut a);
    let mut b = secondary();
    report(&mut b, 19);
    psci(&mut b, CPU_OFF, &[]);
    // CPU_OFF does not return.
    report(&mut b, 0);
    bench.load(guest::vectors());
    bench.load(a);
    bench.load(b);
    std::thread::scope(|scope| {
        let crew = Crew::start(scope, &bench, 2)?;
        let mut reports = [Vec::new(), Vec::new()];
        while reports[0].last() != Some(&77) {
            let (index, _, value) = crew.next_store()?;
            reports[index as usize].push(value);
        }
        let rounds = ROUNDS as usize;
        expect("results of CPU_ON", &reports[0][..rounds], &vec![SUCCESS; rounds][..])?;
        expect("context ids", &reports[1], &(1..=ROUNDS).rev().collect())?;
        crew.stop()
    })
}

fn bad_target(context: &Context) -> Outcome {
    let bench = Bench::new(context, 2)?;
    let mut a = start();
    // No such vCPU, by Aff0, Aff1, Aff2 and Aff3; CPU 0 itself, which is on.
    let targets = [mpidr(2), 1 << 8, 1 << 16, 1 << 32, mpidr(0)];
    for target in targets {
        psci(&mut a, CPU_ON, &[target, SECONDARY, 0]);
        report(&mut a, 0);
    }
    bench.load(guest::vectors());
    bench.load(a);
    let mut cpu = bench.boot_cpu()?;
    for target in targets {
        let want = if target == mpidr(0) { ALREADY_ON } else { INVALID_PARAMETERS };
        cpu.expect_report(format!("CPU_ON of {target:#x}"), want)?;
    }
    Ok(())
}

fn system(context: &Context, function: u64, arguments: &[u64], want: Exit) -> Outcome {
    let bench = Bench::new(context, 1)?;
    let mut a = start();
    a.mov(1, 7);
    report(&mut a, 1);
    psci(&mut a, function, arguments);
    report(&mut a, 0);
    bench.load(guest::vectors());
    bench.load(a);
    let mut cpu = bench.boot_cpu()?;
    cpu.expect_report("before the call", 7)?;
    let exit = cpu.run()?;
    expect("exit", exit, want)
}

fn off_from_secondary(context: &Context) -> Outcome {
    let bench = Bench::new(context, 2)?;
    let mut a = start();
    psci(&mut a, CPU_ON, &[mpidr(1), SECONDARY, 0]);
    idle(&mut a);
    let mut b = secondary();
    psci(&mut b, 0x8400_0008, &[]);
    bench.load(guest::vectors());
    bench.load(a);
    bench.load(b);
    std::thread::scope(|scope| {
        let crew = Crew::start(scope, &bench, 2)?;
        let event = crew.next()?;
        expect("event", event, Event::Exit(1, Exit::SystemOff))?;
        crew.stop()
    })
}

/// SGI 5 to vCPU `index` (ICC_SGI1R_EL1, Arm IHI 0069, 12.2.21: Aff1 in 23:16, INTID in 27:24, target list in 15:0).
fn send_sgi(a: &mut Asm, index: u32) {
    let (aff1, aff0) = (mpidr(index) >> 8, mpidr(index) & 0xf);
    a.mov(9, aff1 << 16 | 5 << 24 | 1 << aff0).msr(SysReg::ICC_SGI1R_EL1, 9).isb();
}

/// 32 vCPUs: each comes up by CPU_ON with the affinity of the scheme, and takes an SGI sent to that affinity.
fn all_of_32(context: &Context) -> Outcome {
    const VCPUS: u32 = 32;
    if context.capabilities.max_vcpus < VCPUS {
        return Err(crate::conformance::Stop::Skipped(format!(
            "the back end has at most {} vCPUs",
            context.capabilities.max_vcpus
        )));
    }
    let bench = Bench::new(context, VCPUS)?;
    let mut a = start();
    a.mov(19, 0);
    enable_distributor(&mut a);
    enable_cpu_interface(&mut a, 19);
    a.mov(27, 0);
    for index in 1..VCPUS {
        psci(&mut a, CPU_ON, &[mpidr(index), SECONDARY, index.into()]);
        report(&mut a, 0);
        await_irq(&mut a);
        send_sgi(&mut a, index);
    }
    idle(&mut a);
    let mut b = secondary();
    report(&mut b, 19);
    b.mrs(1, SysReg::MPIDR_EL1);
    report(&mut b, 1);
    enable_cpu_interface(&mut b, 19);
    send_sgi(&mut b, 0);
    idle(&mut b);
    bench.load(guest::vectors());
    bench.load(a);
    bench.load(b);
    std::thread::scope(|scope| {
        let crew = Crew::start(scope, &bench, VCPUS)?;
        let others = VCPUS as usize - 1;
        let mut seen = vec![Vec::new(); VCPUS as usize];
        for _ in 0..5 * others {
            let (index, ipa, value) = crew.next_store()?;
            if ipa != REPORT && ipa != IRQ {
                return fail(format!("vCPU {index} made an exit with a store of {value:#x} at {ipa:#x}"));
            }
            seen[index as usize].push((ipa, value & 0xff_00ff_ffff));
        }
        // The secondary's SGI may come before the result of its CPU_ON is reported.
        seen[0].sort_unstable();
        let want = [vec![(REPORT, SUCCESS); others], vec![(IRQ, 5); others]].concat();
        expect("what vCPU 0 saw", &seen[0], &want)?;
        for index in 1..VCPUS {
            let want = vec![(REPORT, index.into()), (REPORT, mpidr(index)), (IRQ, 5)];
            expect(format!("what vCPU {index} saw"), &seen[index as usize], &want)?;
        }
        crew.stop()
    })
}

/// Two vCPUs send each other SGI 5, a hundred times; both sleep in WFI in between.
fn sgi(context: &Context) -> Outcome {
    const ROUNDS: u64 = 100;
    let bench = Bench::new(context, 2)?;
    let mut a = start();
    a.mov(19, 0);
    enable_distributor(&mut a);
    enable_cpu_interface(&mut a, 19);
    psci(&mut a, CPU_ON, &[mpidr(1), SECONDARY, 1]);
    ping(&mut a, 1, ROUNDS, false);
    let mut b = secondary();
    enable_cpu_interface(&mut b, 19);
    ping(&mut b, 0, ROUNDS, true);
    bench.load(guest::vectors());
    bench.load(a);
    bench.load(b);
    std::thread::scope(|scope| {
        let crew = Crew::start(scope, &bench, 2)?;
        let mut counts = [0; 2];
        for _ in 0..2 * ROUNDS {
            let (index, ipa, value) = crew.next_store()?;
            expect("interrupt", (ipa, value), (IRQ, 5))?;
            counts[index as usize] += 1;
        }
        expect("interrupts of each vCPU", counts, [ROUNDS; 2])?;
        crew.stop()
    })
}

/// Sends an SGI to `other` and waits for one back, or the other way round, `rounds` times.
fn ping(a: &mut Asm, other: u32, rounds: u64, first: bool) {
    a.mov(27, 0);
    if first {
        send_sgi(a, other);
    }
    let (top, done) = (a.here(), a.label());
    await_irq(a);
    a.mov(2, rounds).sub_reg(2, 2, 27);
    if first {
        // Its last interrupt is answered by nobody.
        a.cbz(2, done);
    }
    send_sgi(a, other);
    a.cbnz(2, top);
    a.place(done);
    idle(a);
}

/// Sleeps until the IRQ handler, which counts in X25, has run once more than this has (X27).
fn await_irq(a: &mut Asm) {
    // With IRQs masked WFI still wakes, so none can come between the look and the sleep.
    let (wait, got) = (a.here(), a.label());
    a.irqs_off().sub_reg(1, 25, 27).cbnz(1, got);
    a.wfi().irqs_on().isb().b(wait);
    a.place(got);
    a.irqs_on().add(27, 27, 1);
}
