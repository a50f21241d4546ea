//! Mappings: what is refused, what a running guest sees of changes, where it may execute.

use crate::conformance::crew::{ANSWER, Crew, Event};
use crate::conformance::guest::{self, report, start};
use crate::conformance::rig::{
    Bench, Context, HostMemory, Outcome, RAM, RAM_SIZE, Stop, exception_class, expect, expect_refusal, fail,
    gic_config,
};
use crate::conformance::{Case, case};
use crate::{Error, Exit, GRANULE, MemoryKind};
use std::ptr::NonNull;
use std::sync::atomic::Ordering;

pub const CASES: &[Case] = &[
    case("map-refusals", refusals),
    case("map-over-the-interrupt-controller-refused", over_gic),
    case("unmap-refusals", unmap_refusals),
    case("map-and-unmap-while-running", while_running),
    case("map-many", many),
    case("device-memory-reads-and-writes", device_memory),
    case("fetch-from-unmapped", fetch_unmapped),
    case("fetch-from-device-memory", fetch_device),
];

/// A window that the cases map and unmap.
const WINDOW: u64 = 0x8000_0000;

/// Maps `len` bytes of `memory`, from its start.
#[allow(unsafe_code)] // UNSAFETY: `Vm::map`.
fn map(bench: &Bench<'_>, ipa: u64, memory: &HostMemory, len: u64, kind: MemoryKind) -> crate::Result<()> {
    // SAFETY: callers keep `memory` until the VM is gone or the range unmapped: they declare it before the bench.
    unsafe { bench.vm.map(ipa, memory.start(), len, kind) }
}

/// As [`map`], with the host address `shift` bytes further.
#[allow(unsafe_code)] // UNSAFETY: `Vm::map`.
fn map_shifted(
    bench: &Bench<'_>,
    ipa: u64,
    memory: &HostMemory,
    shift: usize,
    len: u64,
) -> crate::Result<()> {
    let host = NonNull::new(memory.start().as_ptr().wrapping_add(shift)).expect("not null");
    // SAFETY: as in `map`; callers leave room for the shift.
    unsafe { bench.vm.map(ipa, host, len, MemoryKind::Ram) }
}

fn unaligned(e: &Error) -> bool {
    matches!(e, Error::Unaligned { .. })
}

fn overlap(e: &Error) -> bool {
    matches!(e, Error::Overlap { .. })
}

fn not_mapped(e: &Error) -> bool {
    matches!(e, Error::NotMapped { .. })
}

/// What breaks the granule, overlaps or ends beyond the limit is refused, and nothing changes.
fn refusals(context: &Context) -> Outcome {
    let memory = HostMemory::new(8 * GRANULE)?;
    let bench = Bench::new(context, 1)?;
    // A page of 4 KiB is aligned for KVM itself, but not here.
    for (ipa, shift, len) in [
        (WINDOW + 0x1000, 0, GRANULE),
        (WINDOW, 0x1000, GRANULE),
        (WINDOW, 0, 0x1000),
        (WINDOW, 0, GRANULE + 0x1000),
        (WINDOW, 0, 0),
    ] {
        let result = map_shifted(&bench, ipa, &memory, shift, len);
        expect_refusal(format!("{len:#x} bytes at {ipa:#x} from host offset {shift:#x}"), result, unaligned)?;
    }
    map(&bench, WINDOW, &memory, 4 * GRANULE, MemoryKind::Ram)?;
    for (ipa, len) in [
        (WINDOW, 4 * GRANULE),
        (WINDOW - GRANULE, 2 * GRANULE),
        (WINDOW + 3 * GRANULE, 2 * GRANULE),
        (WINDOW + GRANULE, GRANULE),
        (WINDOW - GRANULE, 6 * GRANULE),
        (RAM + RAM_SIZE - GRANULE, GRANULE),
    ] {
        let result = map(&bench, ipa, &memory, len, MemoryKind::Ram);
        expect_refusal(format!("{len:#x} bytes at {ipa:#x} over others"), result, overlap)?;
    }
    let end = 1u64 << context.options(1).ipa_bits;
    for (ipa, len) in [(end, GRANULE), (end - GRANULE, 2 * GRANULE), (GRANULE.wrapping_neg(), GRANULE)] {
        let result = map(&bench, ipa, &memory, len, MemoryKind::Ram);
        let beyond = |e: &Error| matches!(e, Error::BeyondAddressLimit { .. });
        expect_refusal(format!("{len:#x} bytes at {ipa:#x}"), result, beyond)?;
    }
    // Nothing of the refused ones is left: the neighbours are free, and the mapping is whole.
    map(&bench, WINDOW - GRANULE, &memory, GRANULE, MemoryKind::Ram)?;
    map(&bench, WINDOW + 4 * GRANULE, &memory, GRANULE, MemoryKind::Ram)?;
    map(&bench, end - GRANULE, &memory, GRANULE, MemoryKind::Ram)?;
    for (ipa, len) in [
        (WINDOW - GRANULE, GRANULE),
        (WINDOW + 4 * GRANULE, GRANULE),
        (end - GRANULE, GRANULE),
        (WINDOW, 4 * GRANULE),
    ] {
        bench.vm.unmap(ipa, len)?;
    }
    Ok(())
}

fn over_gic(context: &Context) -> Outcome {
    let memory = HostMemory::new(8 * GRANULE)?;
    let bench = Bench::new(context, 1)?;
    let config = gic_config();
    for ipa in [config.distributor, config.redistributors, config.msi_frame, config.msi_frame + 0xc000] {
        let result = map(&bench, ipa, &memory, GRANULE, MemoryKind::Ram);
        expect_refusal(format!("memory over the frame at {ipa:#x}"), result, overlap)?;
        let result = bench.vm.unmap(ipa, GRANULE);
        expect_refusal(format!("unmapping the frame at {ipa:#x}"), result, not_mapped)?;
    }
    Ok(())
}

/// Only whole mappings can be taken away; the refused attempts change nothing for a guest.
fn unmap_refusals(context: &Context) -> Outcome {
    let memory = HostMemory::new(4 * GRANULE)?;
    let bench = Bench::new(context, 1)?;
    memory.cell(0).store(11, Ordering::SeqCst);
    memory.cell(3 * GRANULE).store(22, Ordering::SeqCst);
    map(&bench, WINDOW, &memory, 4 * GRANULE, MemoryKind::Ram)?;
    for (ipa, len) in [
        (WINDOW, GRANULE),
        (WINDOW, 3 * GRANULE),
        (WINDOW, 5 * GRANULE),
        (WINDOW + GRANULE, 3 * GRANULE),
        (WINDOW + GRANULE, GRANULE),
        (WINDOW + 4 * GRANULE, GRANULE),
        (WINDOW, 0),
    ] {
        expect_refusal(
            format!("unmapping {len:#x} bytes at {ipa:#x}"),
            bench.vm.unmap(ipa, len),
            not_mapped,
        )?;
    }
    let mut a = start();
    a.mov(4, WINDOW).ldr(1, 4, 0);
    report(&mut a, 1);
    a.mov(4, WINDOW + 3 * GRANULE).ldr(1, 4, 0);
    report(&mut a, 1);
    bench.load(guest::vectors());
    bench.load(a);
    let mut cpu = bench.boot_cpu()?;
    cpu.expect_report("first page", 11)?;
    cpu.expect_report("last page", 22)?;
    bench.vm.unmap(WINDOW, 4 * GRANULE)?;
    expect_refusal("unmapping twice", bench.vm.unmap(WINDOW, 4 * GRANULE), not_mapped)
}

/// A guest that polls an address sees memory while it is mapped and makes exits while it is not. Once `unmap` has
/// returned, nothing of the memory reaches it any more.
fn while_running(context: &Context) -> Outcome {
    const STALE: u64 = 0xbad;
    let pages = [HostMemory::new(GRANULE)?, HostMemory::new(GRANULE)?];
    let bench = Bench::new(context, 1)?;
    let mut a = start();
    a.mov(4, WINDOW);
    let top = a.here();
    a.ldr(1, 4, 0x10);
    report(&mut a, 1);
    a.b(top);
    bench.load(guest::vectors());
    bench.load(a);
    std::thread::scope(|scope| {
        let crew = Crew::start(scope, &bench, 1)?;
        let next = || -> Outcome<u64> {
            match crew.next()? {
                Event::Exit(0, Exit::MmioWrite { value: STALE, .. }) => {
                    fail("the guest read memory after unmap() returned")
                }
                Event::Exit(0, Exit::MmioWrite { value, .. }) => Ok(value),
                other => fail(format!("{other:x?}, expected a report")),
            }
        };
        let wait_for = |what: &str, want: u64, before: u64| -> Outcome {
            loop {
                match next()? {
                    value if value == want => return Ok(()),
                    value if value == before => {}
                    other => return fail(format!("{what}: the guest read {other:#x}")),
                }
            }
        };
        wait_for("nothing mapped", ANSWER, ANSWER)?;
        for round in 0..50u64 {
            let (page, value) = (&pages[round as usize % 2], 0x1000 + round);
            page.cell(0x10).store(value, Ordering::SeqCst);
            map(&bench, WINDOW, page, GRANULE, MemoryKind::Ram)?;
            wait_for("mapped", value, ANSWER)?;
            bench.vm.unmap(WINDOW, GRANULE)?;
            page.cell(0x10).store(STALE, Ordering::SeqCst);
            wait_for("unmapped", ANSWER, value)?;
        }
        crew.stop()
    })
}

/// Many mappings at a time, several times over.
fn many(context: &Context) -> Outcome {
    const AT_ONCE: u64 = 256;
    let memory = HostMemory::new(AT_ONCE * GRANULE)?;
    let bench = Bench::new(context, 1)?;
    for _ in 0..4 {
        for n in 0..AT_ONCE {
            let shift = (n * GRANULE) as usize;
            map_shifted(&bench, WINDOW + 2 * n * GRANULE, &memory, shift, GRANULE)?;
        }
        for n in (0..AT_ONCE).rev() {
            bench.vm.unmap(WINDOW + 2 * n * GRANULE, GRANULE)?;
        }
    }
    Ok(())
}

fn device_memory(context: &Context) -> Outcome {
    let memory = HostMemory::new(GRANULE)?;
    let bench = Bench::new(context, 1)?;
    memory.cell(0).store(33, Ordering::SeqCst);
    map(&bench, WINDOW, &memory, GRANULE, MemoryKind::Device)?;
    let mut a = start();
    a.mov(4, WINDOW).ldr(1, 4, 0);
    report(&mut a, 1);
    a.add(1, 1, 1).str(1, 4, 8).dsb().ldr(2, 4, 8);
    report(&mut a, 2);
    bench.load(guest::vectors());
    bench.load(a);
    let mut cpu = bench.boot_cpu()?;
    cpu.expect_report("what the host wrote", 33)?;
    cpu.expect_report("what the guest wrote", 34)?;
    drop(cpu);
    bench.vm.unmap(WINDOW, GRANULE)?;
    expect("what the host reads", memory.cell(8).load(Ordering::SeqCst), 34)
}

/// An instruction abort taken from EL1 to EL1 has exception class 0x21 (Arm DDI 0487, D19.2.37).
const INSTRUCTION_ABORT: u64 = 0x21;

fn expect_fetch_fault(bench: &Bench<'_>, target: u64) -> Outcome {
    let mut a = start();
    a.mov(4, target).br(4);
    bench.load(guest::vectors());
    bench.load(a);
    let mut cpu = bench.boot_cpu()?;
    let (esr, elr, far) = cpu.exception()?;
    expect("exception class", exception_class(esr), INSTRUCTION_ABORT)?;
    expect("ELR and FAR", (elr, far), (target, target))
}

fn fetch_unmapped(context: &Context) -> Outcome {
    let bench = Bench::new(context, 1)?;
    expect_fetch_fault(&bench, WINDOW)
}

fn fetch_device(context: &Context) -> Outcome {
    if !context.capabilities.enforces_device_no_execute {
        let why = "the back end cannot take execute permission from memory of this process";
        return Err(Stop::Skipped(why.into()));
    }
    let memory = HostMemory::new(GRANULE)?;
    let bench = Bench::new(context, 1)?;
    // `B .`, should it be executed after all.
    memory.write(0, &[0x1400_0000]);
    map(&bench, WINDOW, &memory, GRANULE, MemoryKind::Device)?;
    expect_fetch_fault(&bench, WINDOW)
}
