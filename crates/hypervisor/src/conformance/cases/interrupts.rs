//! Timer, wired interrupts and messages.

use crate::conformance::asm::{Asm, Extend, SysReg};
use crate::conformance::events::EventFd;
use crate::conformance::guest::{
    self, Trigger, enable_cpu_interface, enable_distributor, enable_spi, idle, report, start,
};
use crate::conformance::rig::{
    Bench, Context, Cpu, FIRST_MSI, MMIO, Outcome, Stop, expect, expect_refusal, fail, gic_config,
};
use crate::conformance::{Case, case};
use crate::{Error, Exit, MSI_DOORBELL, VIRTUAL_TIMER_INTID};
use std::time::Duration;

pub const CASES: &[Case] = &[
    case("timer-wakes-wfi", timer),
    case("spi-edge", edge),
    case("spi-edge-merges-while-pending", edge_merges),
    case("spi-level", level),
    case("spi-wakes-wfi-from-another-thread", wakes),
    case("spi-out-of-range-refused", spi_range),
    case("msi-by-guest-write", msi_by_guest),
    case("msi-by-host", msi_by_host),
    case("msi-by-event", msi_by_event),
    case("msi-wrong-address-or-number-refused", msi_range),
    case("msi-frame-registers", frame_registers),
    case("doorbell", doorbell),
];

/// Wired interrupts of the programs here.
const EDGE: u32 = 40;
const LEVEL: u32 = 41;
/// Comes after the others at equal priority, so when it is taken, none of them was pending.
const SENTINEL: u32 = 80;

/// X19 is the index of vCPU 0 for [`enable_cpu_interface`].
fn start_with_gic() -> Asm {
    let mut a = start();
    a.mov(19, 0);
    enable_distributor(&mut a);
    enable_spi(&mut a, EDGE, Trigger::Edge);
    enable_spi(&mut a, LEVEL, Trigger::Level);
    enable_spi(&mut a, SENTINEL, Trigger::Edge);
    for intid in FIRST_MSI..FIRST_MSI + 4 {
        enable_spi(&mut a, intid, Trigger::Edge);
    }
    enable_cpu_interface(&mut a, 19);
    a
}

/// A guest that says when it is ready (0) and then sleeps; its handler reports interrupts.
fn sleeper<'a>(bench: &Bench<'a>) -> Outcome<Cpu<'a>> {
    let mut a = start_with_gic();
    a.mov(1, 0);
    report(&mut a, 1);
    idle(&mut a);
    bench.load(guest::vectors());
    bench.load(a);
    let mut cpu = bench.boot_cpu()?;
    cpu.expect_report("ready", 0)?;
    Ok(cpu)
}

/// Nothing but the sentinel is pending.
fn expect_quiet(bench: &Bench<'_>, cpu: &mut Cpu<'_>) -> Outcome {
    bench.gic.set_spi(SENTINEL, true)?;
    cpu.expect_irq("nothing else is pending", SENTINEL)
}

/// WFI sleeps until the virtual timer's interrupt, which is taken; twenty times.
fn timer(context: &Context) -> Outcome {
    const ROUNDS: u64 = 20;
    // 1 to 10 ms with the usual counters of 1 GHz to 24 MHz.
    const TICKS: u64 = 250_000;
    let bench = Bench::new(context, 1)?;
    let mut a = start();
    a.mov(19, 0);
    enable_distributor(&mut a);
    enable_cpu_interface(&mut a, 19);
    a.mov(27, 0);
    let round = a.here();
    a.irqs_off().mov(1, TICKS).msr(SysReg::CNTV_TVAL_EL0, 1).mov(1, 1).msr(SysReg::CNTV_CTL_EL0, 1).isb();
    let (wait, got) = (a.here(), a.label());
    a.irqs_off().sub_reg(1, 25, 27).cbnz(1, got);
    a.wfi().irqs_on().isb().b(wait);
    a.place(got);
    a.irqs_on().add(27, 27, 1);
    report(&mut a, 27);
    a.b(round);
    bench.load(guest::vectors());
    bench.load(a);
    let mut cpu = bench.boot_cpu()?;
    for round in 1..=ROUNDS {
        cpu.expect_irq(format!("round {round}"), VIRTUAL_TIMER_INTID)?;
        cpu.expect_report("interrupts so far", round)?;
    }
    Ok(())
}

/// Each pulse is one interrupt, if the one before was taken; lowering the line is none.
fn edge(context: &Context) -> Outcome {
    let bench = Bench::new(context, 1)?;
    let mut cpu = sleeper(&bench)?;
    for n in 0..50 {
        bench.gic.set_spi(EDGE, true)?;
        if n % 2 == 0 {
            bench.gic.set_spi(EDGE, false)?;
        }
        cpu.expect_irq(format!("pulse {n}"), EDGE)?;
        bench.gic.set_spi(EDGE, false)?;
    }
    expect_quiet(&bench, &mut cpu)
}

/// Pulses while one is pending are one interrupt; a pulse while one is active is another.
fn edge_merges(context: &Context) -> Outcome {
    let bench = Bench::new(context, 1)?;
    let mut cpu = sleeper(&bench)?;
    for _ in 0..3 {
        bench.gic.set_spi(EDGE, true)?;
    }
    cpu.expect_irq("three pulses", EDGE)?;
    // The guest's handler is between acknowledge and end.
    bench.gic.set_spi(EDGE, true)?;
    cpu.expect_irq("a pulse while active", EDGE)?;
    expect_quiet(&bench, &mut cpu)
}

/// A line that stays high interrupts again and again until it is lowered; one that is lowered in time, never.
fn level(context: &Context) -> Outcome {
    let bench = Bench::new(context, 1)?;
    let mut cpu = sleeper(&bench)?;
    for round in 0..10 {
        bench.gic.set_spi(LEVEL, true)?;
        for n in 0..3 {
            cpu.expect_irq(format!("round {round}, line high, interrupt {n}"), LEVEL)?;
        }
        bench.gic.set_spi(LEVEL, false)?;
        expect_quiet(&bench, &mut cpu)?;
        bench.gic.set_spi(LEVEL, true)?;
        bench.gic.set_spi(LEVEL, false)?;
        expect_quiet(&bench, &mut cpu)?;
    }
    Ok(())
}

/// An interrupt raised by another thread ends a guest's sleep.
fn wakes(context: &Context) -> Outcome {
    let bench = Bench::new(context, 1)?;
    let mut cpu = sleeper(&bench)?;
    for n in 0..20 {
        std::thread::scope(|scope| {
            let raiser = scope.spawn(|| {
                // Long enough for the guest to fall asleep, mostly; right in both cases.
                std::thread::sleep(Duration::from_millis(5));
                bench.gic.set_spi(EDGE, true)
            });
            cpu.expect_irq(format!("pulse {n}"), EDGE)?;
            raiser.join().expect("does not panic").map_err(Stop::from)
        })?;
    }
    Ok(())
}

fn no_such(error: &Error) -> bool {
    matches!(error, Error::NoSuchInterrupt { .. })
}

/// The frame's interrupts, private ones and those beyond the limit cannot be driven as lines.
fn spi_range(context: &Context) -> Outcome {
    let bench = Bench::new(context, 1)?;
    let mut cpu = sleeper(&bench)?;
    let config = gic_config();
    let wrong = [
        config.msi_intids.start,
        config.msi_intids.end - 1,
        0,
        16,
        27,
        31,
        config.intid_limit,
        1020,
        u32::MAX,
    ];
    for intid in wrong {
        for level in [true, false] {
            let result = bench.gic.set_spi(intid, level);
            expect_refusal(format!("set_spi({intid}, {level})"), result, no_such)?;
        }
    }
    expect_quiet(&bench, &mut cpu)
}

/// The guest writes messages itself, 4 and 2 bytes wide; that makes no exit, nor does a wrong message.
fn msi_by_guest(context: &Context) -> Outcome {
    let bench = Bench::new(context, 1)?;
    let mut a = start_with_gic();
    a.mov(4, gic_config().msi_frame).irqs_off();
    a.mov(1, FIRST_MSI.into()).store(4, 1, 4, MSI_DOORBELL);
    a.mov(1, u64::from(FIRST_MSI) + 1).store(2, 1, 4, MSI_DOORBELL);
    // A wired SPI, a private interrupt, one beyond the limit, a register that is no doorbell.
    for wrong in [u64::from(EDGE), 27, 0xffff_ffff] {
        a.mov(1, wrong).store(4, 1, 4, MSI_DOORBELL);
    }
    a.mov(1, u64::from(FIRST_MSI) + 2).store(4, 1, 4, MSI_DOORBELL + 4).store(4, 1, 4, 0x3ffc);
    a.mov(1, 7);
    report(&mut a, 1);
    a.irqs_on();
    idle(&mut a);
    bench.load(guest::vectors());
    bench.load(a);
    let mut cpu = bench.boot_cpu()?;
    cpu.expect_report("no exit before this", 7)?;
    cpu.expect_irq("message of 4 bytes", FIRST_MSI)?;
    cpu.expect_irq("message of 2 bytes", FIRST_MSI + 1)?;
    bench.gic.send_msi(gic_config().msi_frame + MSI_DOORBELL, FIRST_MSI + 3)?;
    cpu.expect_irq("nothing else is pending", FIRST_MSI + 3)
}

fn msi_by_host(context: &Context) -> Outcome {
    let bench = Bench::new(context, 1)?;
    let mut cpu = sleeper(&bench)?;
    let address = gic_config().msi_frame + MSI_DOORBELL;
    for n in 0..50 {
        let intid = FIRST_MSI + n % 4;
        bench.gic.send_msi(address, intid)?;
        cpu.expect_irq(format!("message {n}"), intid)?;
    }
    // From another thread, into a sleeping guest.
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(5));
            bench.gic.send_msi(address, FIRST_MSI)
        });
        cpu.expect_irq("message from another thread", FIRST_MSI)?;
        sender.join().expect("does not panic").map_err(Stop::from)
    })
}

fn skip_without_events(context: &Context) -> Outcome {
    if context.capabilities.kernel_events {
        return Ok(());
    }
    Err(Stop::Skipped("the back end has no kernel events".into()))
}

/// The kernel raises interrupts for an eventfd, messages and wired ones.
fn msi_by_event(context: &Context) -> Outcome {
    skip_without_events(context)?;
    let bench = Bench::new(context, 1)?;
    let mut cpu = sleeper(&bench)?;
    for intid in [FIRST_MSI + 1, EDGE] {
        let event = EventFd::new()?;
        bench.gic.bind_interrupt(intid, event.fd())?;
        for n in 0..20 {
            event.signal()?;
            cpu.expect_irq(format!("signal {n}"), intid)?;
        }
        bench.gic.unbind_interrupt(intid, event.fd())?;
        event.signal()?;
        let (sentinel, address) = (FIRST_MSI + 3, gic_config().msi_frame + MSI_DOORBELL);
        bench.gic.send_msi(address, sentinel)?;
        cpu.expect_irq("nothing after unbinding", sentinel)?;
    }
    let event = EventFd::new()?;
    for intid in [0, 27, gic_config().intid_limit, u32::MAX] {
        let result = bench.gic.bind_interrupt(intid, event.fd());
        expect_refusal(format!("bind_interrupt({intid})"), result, no_such)?;
    }
    Ok(())
}

fn msi_range(context: &Context) -> Outcome {
    let bench = Bench::new(context, 1)?;
    let mut cpu = sleeper(&bench)?;
    let config = gic_config();
    let address = config.msi_frame + MSI_DOORBELL;
    for (at, data) in [
        (address, EDGE),
        (address, config.msi_intids.end),
        (address, 0),
        (address, u32::MAX),
        (address + 4, FIRST_MSI),
        (0, FIRST_MSI),
        (u64::MAX, FIRST_MSI),
    ] {
        expect_refusal(format!("send_msi({at:#x}, {data})"), bench.gic.send_msi(at, data), no_such)?;
    }
    expect_quiet(&bench, &mut cpu)
}

/// The guest reads the frame's registers without an exit: MSI_TYPER, then what Linux reads, MSI_IIDR, then nothing.
fn frame_registers(context: &Context) -> Outcome {
    let bench = Bench::new(context, 1)?;
    let mut a = start();
    a.mov(4, gic_config().msi_frame);
    for offset in [0x8, 0xfcc, 0x100] {
        a.mov(1, u64::MAX).load(4, Extend::Zero, 1, 4, offset);
        report(&mut a, 1);
    }
    bench.load(guest::vectors());
    bench.load(a);
    let mut cpu = bench.boot_cpu()?;
    let msis = gic_config().msi_intids;
    cpu.expect_report("MSI_TYPER", u64::from(msis.start) << 16 | u64::from(msis.end - msis.start))?;
    // Implementations that Linux works around: X-Gene and NS2 (drivers/irqchip/irq-gic-v2m.c).
    let iidr = cpu.report()?;
    if [0x0600_0170, 0x0000_013f].contains(&iidr) {
        return fail(format!("MSI_IIDR {iidr:#x} is that of a broken frame"));
    }
    cpu.expect_report("no register", 0)
}

/// Stores that match a doorbell signal its event and make no exit; all others do.
fn doorbell(context: &Context) -> Outcome {
    skip_without_events(context)?;
    let bench = Bench::new(context, 1)?;
    let mut a = start();
    a.mov(4, MMIO).mov(1, 3).mov(2, 5);
    let top = a.here();
    // Matches the first; wrong value; wrong width.
    a.store(4, 1, 4, 0).store(4, 2, 4, 0).store(2, 1, 4, 0);
    // Match the second, twice; wrong width.
    a.store(2, 1, 4, 8).store(2, 2, 4, 8).store(4, 1, 4, 8);
    a.b(top);
    bench.load(guest::vectors());
    bench.load(a);
    let (exact, any) = (EventFd::new()?, EventFd::new()?);
    bench.vm.bind_doorbell(MMIO, 4, Some(3), exact.fd())?;
    bench.vm.bind_doorbell(MMIO + 8, 2, None, any.fd())?;
    let mut cpu = bench.boot_cpu()?;
    let store = |ipa, width, value| Exit::MmioWrite { ipa, width, value };
    for round in 0..3 {
        for want in [store(MMIO, 4, 5), store(MMIO, 2, 3), store(MMIO + 8, 4, 3)] {
            let got = cpu.run()?;
            expect(format!("round {round}"), got, want)?;
        }
        expect("signals", (exact.take()?, any.take()?), (1, 2))?;
    }
    bench.vm.unbind_doorbell(MMIO, 4, Some(3), exact.fd())?;
    bench.vm.unbind_doorbell(MMIO + 8, 2, None, any.fd())?;
    for want in [store(MMIO, 4, 3), store(MMIO, 4, 5), store(MMIO, 2, 3), store(MMIO + 8, 2, 3)] {
        let got = cpu.run()?;
        expect("unbound", got, want)?;
    }
    expect("signals after unbinding", (exact.take()?, any.take()?), (0, 0))?;
    let again = bench.vm.unbind_doorbell(MMIO, 4, Some(3), exact.fd());
    expect_refusal("unbinding twice", again, |e| matches!(e, Error::NotMapped { .. }))?;
    let narrow = bench.vm.bind_doorbell(MMIO, 1, None, exact.fd());
    expect_refusal("a doorbell of one byte", narrow, |e| matches!(e, Error::Unsupported { .. }))
}
