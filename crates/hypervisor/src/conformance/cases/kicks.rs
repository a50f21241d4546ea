//! Kicks and pauses: none gets lost, none does harm.

use crate::conformance::asm::Asm;
use crate::conformance::crew::{Crew, Event};
use crate::conformance::guest::{self, idle, report, start};
use crate::conformance::rig::{Bench, Context, MMIO, Outcome, expect, fail};
use crate::conformance::{Case, case, slow_case};
use crate::{Exit, Register};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub const CASES: &[Case] = &[
    case("kick-before-run", before_run),
    case("kick-while-off", while_off),
    case("kick-after-the-vcpu-is-gone", after_drop),
    case("kick-leaves-an-access-whole", between_read_and_run),
    slow_case("kick-10000-while-spinning", |c| one_by_one(c, spin)),
    slow_case("kick-10000-while-asleep", |c| one_by_one(c, idle)),
    slow_case("kick-10000-while-doing-mmio", during_mmio),
    slow_case("pause-10000-while-spinning", |c| pauses(c, spin)),
    slow_case("pause-10000-while-asleep", |c| pauses(c, idle)),
    slow_case("kick-10000-from-four-threads", storm),
];

const KICKS: u64 = 10_000;

fn spin(a: &mut Asm) {
    let top = a.here();
    a.add(5, 5, 1).b(top);
}

/// A kick before the first run, and several of them, are one exit.
fn before_run(context: &Context) -> Outcome {
    let bench = Bench::new(context, 1)?;
    let mut a = start();
    a.mov(1, 9);
    report(&mut a, 1);
    bench.load(guest::vectors());
    bench.load(a);
    let mut cpu = bench.boot_cpu()?;
    let kicker = cpu.vcpu.kicker();
    let pc = cpu.vcpu.register(Register::Pc)?;
    (0..3).for_each(|_| kicker.kick());
    let exit = cpu.run()?;
    expect("exit", exit, Exit::Kicked)?;
    expect("PC", cpu.vcpu.register(Register::Pc)?, pc)?;
    cpu.expect_report("after the kick", 9)
}

/// A vCPU that waits for CPU_ON answers kicks.
fn while_off(context: &Context) -> Outcome {
    let bench = Bench::new(context, 2)?;
    let mut a = start();
    idle(&mut a);
    bench.load(guest::vectors());
    bench.load(a);
    std::thread::scope(|scope| {
        let crew = Crew::start(scope, &bench, 2)?;
        let kicker = crew.kicker(1)?;
        for _ in 0..100 {
            kicker.kick();
            let event = crew.next()?;
            expect("event", event, Event::Kicked(1))?;
        }
        crew.stop()
    })
}

/// A handle may outlive its vCPU, its VM and its thread.
fn after_drop(context: &Context) -> Outcome {
    let mut kickers = Vec::new();
    for _ in 0..5 {
        let bench = Bench::new(context, 1)?;
        let mut a = start();
        report(&mut a, 1);
        bench.load(a);
        let kicker = std::thread::scope(|scope| {
            let thread = scope.spawn(|| -> Outcome<_> {
                let mut cpu = bench.boot_cpu()?;
                cpu.report()?;
                Ok(cpu.vcpu.kicker())
            });
            thread.join().expect("does not panic")
        })?;
        kickers.push(kicker);
        kickers.iter().for_each(|k| k.kick());
        drop(bench);
        kickers.iter().for_each(|k| k.kick());
    }
    // Not even a new vCPU on this thread sees one of those.
    let bench = Bench::new(context, 1)?;
    let mut a = start();
    a.mov(1, 9);
    report(&mut a, 1);
    bench.load(a);
    let mut cpu = bench.boot_cpu()?;
    kickers.iter().for_each(|k| k.kick());
    cpu.expect_report("the new vCPU's", 9)
}

/// A kick between a read's exit and the next run: the answer is not lost, and registers are those after the access.
fn between_read_and_run(context: &Context) -> Outcome {
    let bench = Bench::new(context, 1)?;
    let mut a = start();
    a.mov(4, MMIO);
    let pc = a.pc();
    a.ldr(1, 4, 0).str(1, 4, 8);
    report(&mut a, 1);
    bench.load(guest::vectors());
    bench.load(a);
    let mut cpu = bench.boot_cpu()?;
    let kicker = cpu.vcpu.kicker();
    let exit = cpu.run()?;
    expect("exit", exit, Exit::MmioRead { ipa: MMIO, width: 8 })?;
    cpu.vcpu.complete_read(0x1234);
    kicker.kick();
    let exit = cpu.run()?;
    expect("exit", exit, Exit::Kicked)?;
    expect("X1 and PC", (cpu.x(1)?, cpu.vcpu.register(Register::Pc)?), (0x1234, pc + 4))?;
    let got = cpu.store_at(MMIO + 8, 8)?;
    expect("stored", got, 0x1234)?;
    kicker.kick();
    let exit = cpu.run()?;
    expect("exit", exit, Exit::Kicked)?;
    expect("PC", cpu.vcpu.register(Register::Pc)?, pc + 8)?;
    cpu.expect_report("goes on", 0x1234)
}

/// Each kick is answered, whatever the guest does: the next comes when the vCPU said it saw the last.
fn one_by_one(context: &Context, program: fn(&mut Asm)) -> Outcome {
    let bench = Bench::new(context, 1)?;
    let mut a = start();
    program(&mut a);
    bench.load(guest::vectors());
    bench.load(a);
    std::thread::scope(|scope| {
        let crew = Crew::start(scope, &bench, 1)?;
        let kicker = crew.kicker(0)?;
        for _ in 0..KICKS {
            kicker.kick();
            let event = crew.next()?;
            expect("event", event, Event::Kicked(0))?;
        }
        crew.stop()
    })
}

/// A paused guest stands still, and goes on where it was.
fn pauses(context: &Context, program: fn(&mut Asm)) -> Outcome {
    let bench = Bench::new(context, 2)?;
    let mut a = start();
    program(&mut a);
    bench.load(guest::vectors());
    bench.load(a);
    std::thread::scope(|scope| {
        let crew = Crew::start(scope, &bench, 2)?;
        let kickers = [crew.kicker(0)?, crew.kicker(1)?];
        for _ in 0..KICKS {
            let pause = crew.pause();
            kickers.iter().for_each(|k| k.kick());
            let mut seen = [crew.next()?, crew.next()?];
            seen.sort_by_key(|e| matches!(e, Event::Kicked(1)));
            expect("both vCPUs stopped", seen, [Event::Kicked(0), Event::Kicked(1)])?;
            drop(pause);
        }
        crew.stop()
    })
}

/// Kicks at any moment of a stream of exits: every load gets its answer, every store comes once and in order.
fn during_mmio(context: &Context) -> Outcome {
    let bench = Bench::new(context, 1)?;
    let mut a = start();
    a.mov(4, MMIO).mov(1, 0);
    let top = a.here();
    // Sum of what was read, stored each time.
    a.ldr(2, 4, 0).add_shifted(1, 1, 2, 0).str(1, 4, 8).b(top);
    bench.load(guest::vectors());
    bench.load(a);
    let mut cpu = bench.boot_cpu()?;
    let kicker = cpu.vcpu.kicker();
    let (sent, seen) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while sent.load(Ordering::SeqCst) < KICKS && !context.hung() {
                sent.fetch_add(1, Ordering::SeqCst);
                kicker.kick();
                // Kicks merge, so each waits until the last was seen.
                while seen.load(Ordering::SeqCst) < sent.load(Ordering::SeqCst) && !context.hung() {
                    std::hint::spin_loop();
                }
            }
        });
        let result = mmio_stream(&mut cpu, &seen);
        // Lets the other thread end, if this failed.
        seen.store(u64::MAX, Ordering::SeqCst);
        result
    })
}

fn mmio_stream(cpu: &mut crate::conformance::rig::Cpu<'_>, seen: &AtomicU64) -> Outcome {
    let (mut answers, mut sum, mut awaiting_store) = (0u64, 0u64, false);
    while seen.load(Ordering::SeqCst) < KICKS {
        match cpu.run()? {
            Exit::Kicked => _ = seen.fetch_add(1, Ordering::SeqCst),
            Exit::MmioRead { .. } if !awaiting_store => {
                answers += 1;
                sum += answers;
                cpu.vcpu.complete_read(answers);
                awaiting_store = true;
            }
            Exit::MmioWrite { value, .. } if awaiting_store => {
                expect(format!("store {answers}"), value, sum)?;
                awaiting_store = false;
            }
            other => return fail(format!("exit {other:x?} out of order, after {answers} reads")),
        }
    }
    Ok(())
}

/// Kicks from four threads that wait for nobody merge, but the vCPU answers after the last of them.
fn storm(context: &Context) -> Outcome {
    const ROUNDS: u64 = 50;
    let bench = Bench::new(context, 1)?;
    let mut a = start();
    spin(&mut a);
    bench.load(guest::vectors());
    bench.load(a);
    std::thread::scope(|scope| {
        let crew = Crew::start(scope, &bench, 1)?;
        let kicker = crew.kicker(0)?;
        for _ in 0..ROUNDS {
            std::thread::scope(|kickers| {
                for _ in 0..4 {
                    kickers.spawn(|| (0..KICKS / ROUNDS / 4).for_each(|_| kicker.kick()));
                }
            });
            // At least one came; all that were answered are taken away, so that the next one is a new one.
            let event = crew.next()?;
            expect("event", event, Event::Kicked(0))?;
            while let Some(event) = crew.next_within(Duration::from_millis(20)) {
                expect("event", event, Event::Kicked(0))?;
            }
            kicker.kick();
            let event = crew.next()?;
            expect("event after the storm", event, Event::Kicked(0))?;
        }
        crew.stop()
    })
}
