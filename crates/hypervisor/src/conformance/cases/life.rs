//! A VM's phases: boot state, registers, order of calls, and VMs one after another.

use crate::conformance::asm::SysReg;
use crate::conformance::guest::{self, report, start};
use crate::conformance::rig::{
    Bench, CODE, Context, MMIO, Outcome, REPORT, Stop, expect, expect_refusal, fail, gic_config,
};
use crate::conformance::{Case, case};
use crate::{Error, Register, ThreadPriority, VcpuOptions, VmOptions};

pub const CASES: &[Case] = &[
    case("boot-state", boot_state),
    case("registers", registers),
    case("vcpu-before-controller-refused", vcpu_before_controller),
    case("vcpu-bound-twice-refused", bound_twice),
    case("vcpu-one-per-thread", one_per_thread),
    case("vcpu-beyond-the-number-refused", beyond_number),
    case("controller-twice-refused", controller_twice),
    case("vm-one-at-a-time", one_vm),
    case("vm-20-times", twenty_times),
    case("thread-priority-high", priority),
];

fn wrong_phase(e: &Error) -> bool {
    matches!(e, Error::WrongPhase(_))
}

/// What Linux Documentation/arch/arm64/booting.rst asks for.
fn boot_state(context: &Context) -> Outcome {
    let bench = Bench::new(context, 1)?;
    let mut a = crate::conformance::asm::Asm::at(CODE + 0x40);
    a.mov(28, REPORT);
    (0..4).for_each(|n| report(&mut a, n));
    for register in [SysReg::CURRENT_EL, SysReg::DAIF, SysReg::SCTLR_EL1] {
        a.mrs(1, register);
        report(&mut a, 1);
    }
    bench.load(a);
    let mut cpu = bench.cpu(0)?;
    cpu.vcpu.set_boot_state(CODE + 0x40, 0x1234_5678_9abc_def0)?;
    for (what, want) in
        [("X0", 0x1234_5678_9abc_def0), ("X1", 0), ("X2", 0), ("X3", 0), ("CurrentEL", 1 << 2)]
    {
        cpu.expect_report(what, want)?;
    }
    cpu.expect_report("DAIF", 0xf << 6)?;
    // M, bit 0, and C, bit 2.
    let sctlr = cpu.report()?;
    expect("MMU and data cache", sctlr & 0b101, 0)
}

fn registers(context: &Context) -> Outcome {
    let bench = Bench::new(context, 1)?;
    let mut a = start();
    a.mov(1, 0);
    report(&mut a, 1);
    a.mov(29, MMIO);
    (0..=28).for_each(|n| _ = a.str(n, 29, 0));
    bench.load(a);
    let mut cpu = bench.boot_cpu()?;
    cpu.expect_report("ready", 0)?;
    let value = |n: u8| 0x0101_0101_0101_0101 * u64::from(n + 1);
    for n in (0..=30).filter(|n| *n != 28) {
        cpu.vcpu.set_register(Register::X(n), value(n))?;
    }
    for n in (0..=30).filter(|n| *n != 28) {
        expect(format!("X{n}"), cpu.x(n)?, value(n))?;
    }
    for n in 0..28 {
        let got = cpu.store_at(MMIO, 8)?;
        expect(format!("X{n} as the guest sees it"), got, value(n))?;
    }
    let got = cpu.store_at(MMIO, 8)?;
    expect("X28", got, REPORT)?;
    let cpsr = cpu.vcpu.register(Register::Cpsr)?;
    // Mode in bits 3:0: EL1h.
    expect("mode", cpsr & 0xf, 5)?;
    // From the start again.
    cpu.vcpu.set_register(Register::Pc, CODE)?;
    cpu.expect_report("ready, a second time", 0)?;
    for wrong in [31, 32, 255] {
        let result = cpu.vcpu.register(Register::X(wrong));
        expect_refusal(format!("X{wrong}"), result, |e| matches!(e, Error::Unsupported { .. }))?;
    }
    Ok(())
}

fn vcpu_before_controller(context: &Context) -> Outcome {
    let vm = context.hypervisor.create_vm(&context.options(2))?;
    expect_refusal("vCPU 0", vm.bind_vcpu(0), wrong_phase)?;
    // And it is no obstacle to doing it right.
    vm.create_interrupt_controller(&gic_config())?;
    drop(vm.bind_vcpu(0)?);
    Ok(())
}

fn bound_twice(context: &Context) -> Outcome {
    let bench = Bench::new(context, 2)?;
    let cpu = bench.boot_cpu()?;
    let elsewhere =
        || std::thread::scope(|s| s.spawn(|| bench.vm.bind_vcpu(0).map(drop)).join().expect("no panic"));
    expect_refusal("vCPU 0 a second time", elsewhere(), wrong_phase)?;
    drop(cpu);
    expect_refusal("vCPU 0 after it was dropped", elsewhere(), wrong_phase)
}

fn one_per_thread(context: &Context) -> Outcome {
    let bench = Bench::new(context, 2)?;
    let cpu = bench.boot_cpu()?;
    expect_refusal("a second vCPU on a thread", bench.vm.bind_vcpu(1), wrong_phase)?;
    drop(cpu);
    // The refusal did not use vCPU 1 up.
    drop(bench.vm.bind_vcpu(1)?);
    Ok(())
}

fn beyond_number(context: &Context) -> Outcome {
    let bench = Bench::new(context, 2)?;
    for index in [2, u32::MAX] {
        let result = bench.vm.bind_vcpu(index);
        expect_refusal(format!("vCPU {index} of 2"), result, |e| matches!(e, Error::Unsupported { .. }))?;
    }
    Ok(())
}

fn controller_twice(context: &Context) -> Outcome {
    let bench = Bench::new(context, 1)?;
    expect_refusal("a second controller", bench.vm.create_interrupt_controller(&gic_config()), wrong_phase)
}

fn one_vm(context: &Context) -> Outcome {
    let bench = Bench::new(context, 1)?;
    let second = context.hypervisor.create_vm(&context.options(1));
    expect_refusal("a second VM", second.map(drop), wrong_phase)?;
    // Each part keeps the VM alive.
    let Bench { gic, vm, .. } = bench;
    drop(vm);
    let second = context.hypervisor.create_vm(&context.options(1));
    expect_refusal("a VM beside another's controller", second.map(drop), wrong_phase)?;
    drop(gic);
    drop(context.hypervisor.create_vm(&context.options(1))?);
    Ok(())
}

/// Number of open descriptors; `None` where /proc does not say.
fn descriptors() -> Option<usize> {
    std::fs::read_dir("/proc/self/fd").ok().map(Iterator::count)
}

/// A reboot makes a new VM in the same process: each runs, and nothing of the old ones stays open.
fn twenty_times(context: &Context) -> Outcome {
    let round = |n: u64| -> Outcome {
        let bench = Bench::new(context, 4)?;
        let mut a = start();
        a.mov(1, n);
        report(&mut a, 1);
        bench.load(guest::vectors());
        bench.load(a);
        bench.boot_cpu()?.expect_report("round", n)
    };
    round(0)?;
    let before = descriptors();
    (1..=20).try_for_each(round)?;
    expect("open descriptors", descriptors(), before)
}

/// High priority works or is refused in words that help, and then nothing else is wrong with the VM.
fn priority(context: &Context) -> Outcome {
    let vcpu = VcpuOptions { priority: ThreadPriority::High, ..VcpuOptions::default() };
    let bench = Bench::with(context, &VmOptions { vcpu, ..context.options(1) })?;
    let mut a = start();
    a.mov(1, 5);
    report(&mut a, 1);
    bench.load(a);
    // On a thread of its own, which takes its priority with it.
    let outcome = std::thread::scope(|scope| {
        scope.spawn(|| bench.boot_cpu()?.expect_report("at high priority", 5)).join().expect("does not panic")
    });
    match outcome {
        Err(Stop::Failed(why)) if why.contains("priority") && why.contains("os error") => {
            Err(Stop::Skipped(format!("this process may not: {why}")))
        }
        Err(Stop::Failed(why)) => fail(why),
        other => other,
    }
}
