//! Bus master, reset, removal, opening and giving back.

#![allow(unsafe_code)] // UNSAFETY: a mapped register is read by its address.

use super::{Case, Opener, Outcome, Step, case, ensure, ensure_eq, opened};
use crate::{HostFunction, InterruptKind, InterruptSink, MappedBar};
use outboard_bus::{Width, poll_readable};
use std::sync::Arc;
use std::time::Duration;

pub(super) const CASES: &[Case] = &[
    case("it-opens-again-after-it-was-dropped", reopen),
    case("bus-master-is-off-when-opened-and-follows", bus_master),
    case("reset-puts-config-space-back", reset),
    case("reset-turns-interrupts-and-bus-master-off", reset_quiets),
    case("reset-again-and-again-with-readers", reset_races),
    case("nothing-is-removed", removal),
];

/// Reads a dword of a mapping.
pub(crate) fn peek(mapped: &dyn MappedBar, offset: u64) -> u32 {
    assert!(offset.is_multiple_of(4) && offset + 4 <= mapped.len());
    // SAFETY: in bounds and aligned, just checked; the mapping lives; volatile, as it is a register.
    unsafe { mapped.host().as_ptr().add(offset as usize).cast::<u32>().read_volatile() }
}

/// Command register's bus master bit.
fn master(f: &dyn HostFunction) -> Result<u32, super::Verdict> {
    Ok(f.config_read(4, Width::B2).step("read of the command register")? & 4)
}

fn reopen(open: Opener<'_>) -> Outcome {
    let first = opened(open)?;
    let id = first.function.identity();
    drop(first);
    for _ in 0..3 {
        let again = opened(open)?;
        ensure(again.function.identity() == id, || "it is another function".into())?;
    }
    Ok(())
}

fn bus_master(open: Opener<'_>) -> Outcome {
    let subject = opened(open)?;
    let f = &*subject.function;
    ensure_eq("bus master after opening", master(f)?, 0)?;
    for _ in 0..3 {
        f.set_bus_master(true).step("bus master on")?;
        ensure_eq("bus master", master(f)?, 4)?;
        f.set_bus_master(false).step("bus master off")?;
        ensure_eq("bus master", master(f)?, 0)?;
    }
    Ok(())
}

/// Resets, or says why that cannot be tried.
fn try_reset(f: &dyn HostFunction) -> Outcome {
    match f.reset() {
        Err(e @ crate::Error::NoReset(_)) => super::skip(e),
        result => result.step("reset"),
    }
}

fn reset(open: Opener<'_>) -> Outcome {
    let subject = opened(open)?;
    let f = &*subject.function;
    let config = || {
        (0..0x10).map(|i| f.config_read(i * 4, Width::B4).step("config read")).collect::<Result<Vec<_>, _>>()
    };
    let before = config()?;
    f.config_write(0x0c, Width::B1, 0x08).step("write of the cache line size")?;
    f.config_write(0x3c, Width::B1, 0x77).step("write of the interrupt line")?;
    f.set_bus_master(true).step("bus master on")?;
    try_reset(f)?;
    for (index, (is, was)) in config()?.into_iter().zip(before).enumerate() {
        // The upper half of the second dword is status.
        let mask = if index == 1 { 0xffff } else { u32::MAX };
        ensure_eq(format!("config space at {:#x} after a reset", index * 4), is & mask, was & mask)?;
    }
    Ok(())
}

fn reset_quiets(open: Opener<'_>) -> Outcome {
    struct Deaf;
    impl InterruptSink for Deaf {
        fn raise(&self, _vector: u16) {}
    }
    let subject = opened(open)?;
    let f = &*subject.function;
    f.set_bus_master(true).step("bus master on")?;
    if f.interrupts().msix > 0 {
        f.enable_interrupts(InterruptKind::MsiX, 1, Arc::new(Deaf)).step("enable")?;
    }
    try_reset(f)?;
    ensure_eq("bus master after a reset", master(f)?, 0)?;
    let read = |at| f.config_read(at, Width::B4);
    if let Some(at) = crate::capabilities::find(&read, crate::capabilities::MSIX).step("capabilities")? {
        ensure_eq("MSI-X enable after a reset", read(at).step("config read")? >> 31, 0)?;
    }
    Ok(())
}

fn reset_races(open: Opener<'_>) -> Outcome {
    let subject = opened(open)?;
    let f = &*subject.function;
    try_reset(f)?;
    let vendor = u32::from(f.identity().vendor);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    for _ in 0..50 {
                        ensure_eq("vendor", f.config_read(0, Width::B2).step("read during resets")?, vendor)?;
                    }
                    Ok(())
                })
            })
            .collect();
        for _ in 0..3 {
            f.reset().step("reset")?;
        }
        readers.into_iter().try_for_each(|r| r.join().unwrap_or_else(|_| super::fail("a reader panicked")))
    })
}

fn removal(open: Opener<'_>) -> Outcome {
    let subject = opened(open)?;
    let readable = poll_readable(&[subject.function.removal()], Some(Duration::ZERO));
    ensure(readable.is_ok_and(|r| !r[0]), || "the removal descriptor is readable".into())
}
