//! The domain, and that a device reaches what is mapped and nothing else.

#![allow(unsafe_code)] // UNSAFETY: calls `DmaDomain::map` by itself where it must fail.

use super::memory::{Mapped, Memory};
use super::{Case, Opener, Outcome, Step, Subject, case, ensure, ensure_eq, fail, opened, skip};
use crate::{BusAddress, DmaDomain, Error, GRANULE, Release};
use std::ptr::NonNull;

pub(super) const CASES: &[Case] = &[
    case("dma-limits-are-sane", limits),
    case("dma-map-rules", map_rules),
    case("dma-unmap-takes-whole-mappings-only", unmap_rules),
    case("dma-refused-map-changes-nothing", refused_map),
    case("dma-domain-drops-with-mappings", dropped),
    case("dma-copies-between-mappings", copies),
    case("dma-needs-bus-master", needs_bus_master),
    case("dma-does-not-reach-what-was-unmapped", unmapped),
];

/// Where guest RAM begins on Outboard's machine, far from what IOMMUs keep for themselves.
const GUEST: u64 = 0x4000_0000;

fn limits(open: Opener<'_>) -> Outcome {
    let limits = opened(open)?.domain.limits();
    ensure_eq("granule", limits.granule, GRANULE)?;
    ensure(limits.bytes >= GRANULE && limits.entries >= 1 && (32..=64).contains(&limits.address_bits), || {
        format!("{limits:?}")
    })
}

/// Maps what must be refused.
fn refused(domain: &dyn DmaDomain, host: NonNull<u8>, len: u64, guest: u64) -> Result<Error, super::Verdict> {
    // SAFETY: the call must fail, so the memory is not reached. Should it not fail, the case does, and nothing does DMA in it.
    match unsafe { domain.map(host, len, guest) } {
        Err(error) => Ok(error),
        Ok(at) => fail(format!("{len:#x} bytes of guest memory at {guest:#x} were mapped at {:#x}", at.0)),
    }
}

fn map_rules(open: Opener<'_>) -> Outcome {
    let subject = opened(open)?;
    let memory = Memory::new(2);
    let off = NonNull::new(memory.host().as_ptr().wrapping_add(0x1000)).expect("not null");
    let wrong = [
        (off, GRANULE, GUEST),
        (memory.host(), GRANULE + 0x1000, GUEST),
        (memory.host(), GRANULE, GUEST + 0x1000),
        (memory.host(), 0, GUEST),
    ];
    for (host, len, guest) in wrong {
        let error = refused(&*subject.domain, host, len, guest)?;
        ensure(matches!(error, Error::Unaligned { .. }), || format!("{len:#x} at {guest:#x}: {error}"))?;
    }
    let last = !(GRANULE - 1);
    for guest in [last, last - GRANULE] {
        refused(&*subject.domain, memory.host(), 2 * GRANULE, guest)?;
    }
    let mapped = Mapped::new(&subject, memory, GUEST)?;
    let bits = subject.domain.limits().address_bits;
    ensure(bits == 64 || (mapped.bus.0 + 2 * GRANULE - 1) >> bits == 0, || {
        format!("bus address {:#x} is wider than {bits} bits", mapped.bus.0)
    })?;
    ensure_eq("bus address modulo 16 KiB", mapped.bus.0 % GRANULE, 0)
}

fn unmap_rules(open: Opener<'_>) -> Outcome {
    let subject = opened(open)?;
    let mapped = Mapped::new(&subject, Memory::new(4), GUEST)?;
    let bus = mapped.bus.0;
    let wrong = [
        (bus, GRANULE),
        (bus + GRANULE, GRANULE),
        (bus, 8 * GRANULE),
        (bus, 0),
        (bus + 1, 4 * GRANULE),
        (0, 0),
        (0, u64::MAX),
    ];
    for (at, len) in wrong {
        match subject.domain.unmap(BusAddress(at), len, Release::Driver) {
            Err(Error::NotMapped { .. }) => {}
            answer => return fail(format!("unmapping {len:#x} at {at:#x} answered {answer:?}")),
        }
    }
    mapped.unmap()?;
    match subject.domain.unmap(BusAddress(bus), 4 * GRANULE, Release::Driver) {
        Err(Error::NotMapped { .. }) => Ok(()),
        answer => fail(format!("unmapping twice answered {answer:?}")),
    }
}

fn refused_map(open: Opener<'_>) -> Outcome {
    let subject = opened(open)?;
    let mapped = Mapped::new(&subject, Memory::new(2), GUEST)?;
    if mapped.bus.0 == GUEST {
        // An identity domain cannot map a second piece over the first.
        let other = Memory::new(2);
        refused(&*subject.domain, other.host(), 2 * GRANULE, GUEST + GRANULE)?;
    }
    let beyond = refused(&*subject.domain, mapped.memory().host(), 2 * GRANULE, !(GRANULE - 1))?;
    ensure(!matches!(beyond, Error::Gone(_)), || beyond.to_string())?;
    mapped.unmap().map(drop)
}

fn dropped(open: Opener<'_>) -> Outcome {
    let memory = Memory::new(1);
    for _ in 0..2 {
        let subject = opened(open)?;
        // SAFETY: the subject is dropped, and with it the mapping, before the memory.
        unsafe { subject.domain.map(memory.host(), memory.len(), GUEST) }.step("map")?;
    }
    Ok(())
}

const LEN: u32 = 0x400;

/// Two mappings, the first filled, and the device told to copy the one to the other.
fn copy(subject: &Subject, bus_master: bool) -> Result<(Mapped, Mapped), super::Verdict> {
    let exerciser = subject.exerciser()?;
    let from = Mapped::new(subject, Memory::new(1), GUEST)?;
    let to = Mapped::new(subject, Memory::new(1), GUEST + (1 << 20))?;
    fill(from.memory());
    subject.function.set_bus_master(bus_master).step("bus master")?;
    let copied = exerciser.copy(&*subject.function, from.bus, to.bus, LEN);
    subject.function.set_bus_master(false).step("bus master off")?;
    match copied.step("copy")? {
        Some(()) => Ok((from, to)),
        None => skip("the device cannot be made to do DMA"),
    }
}

fn fill(memory: &Memory) {
    for at in (0..LEN as usize).step_by(4) {
        memory.write(at, 0xc0de_0000 | at as u32);
    }
}

fn words(memory: &Memory) -> Vec<u32> {
    (0..LEN as usize + 64).step_by(4).map(|at| memory.read(at)).collect()
}

fn copies(open: Opener<'_>) -> Outcome {
    let subject = opened(open)?;
    let (from, to) = copy(&subject, true)?;
    ensure(words(from.memory()) == words(to.memory()), || "the copy differs from its source".into())
}

fn needs_bus_master(open: Opener<'_>) -> Outcome {
    let subject = opened(open)?;
    let (_from, to) = copy(&subject, false)?;
    ensure(words(to.memory()).iter().all(|w| *w == 0), || "it wrote to memory with its bus master off".into())
}

fn unmapped(open: Opener<'_>) -> Outcome {
    let subject = opened(open)?;
    let exerciser = subject.exerciser()?;
    let from = Mapped::new(&subject, Memory::new(1), GUEST)?;
    let to = Mapped::new(&subject, Memory::new(1), GUEST + (1 << 20))?;
    fill(from.memory());
    let was = to.bus;
    let memory = to.unmap()?;
    subject.function.set_bus_master(true).step("bus master on")?;
    let copied = exerciser.copy(&*subject.function, from.bus, was, LEN);
    subject.function.set_bus_master(false).step("bus master off")?;
    if copied.step("copy")?.is_none() {
        return skip("the device cannot be made to do DMA");
    }
    ensure(words(&memory).iter().all(|w| *w == 0), || "it wrote to memory that was unmapped".into())
}
