//! Interrupts of every kind.

use super::exercise::wait_until;
use super::{Case, Exerciser, Opener, Outcome, Step, Subject, case, ensure, ensure_eq, fail, opened, skip};
use crate::{Error, HostFunction, InterruptKind, InterruptSink};
use outboard_bus::Event;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub(super) const CASES: &[Case] = &[
    case("interrupt-counts-are-checked", counts),
    case("interrupts-turn-on-and-off-in-any-order", on_and_off),
    case("msi-is-raised", |open| arrives(open, InterruptKind::Msi)),
    case("msix-is-raised-by-vector", |open| arrives(open, InterruptKind::MsiX)),
    case("msi-signals-the-sinks-event", |open| signals(open, InterruptKind::Msi)),
    case("msix-signals-the-sinks-events", |open| signals(open, InterruptKind::MsiX)),
    case("intx-is-masked-until-unmasked", intx),
    case("nothing-is-raised-after-disable", none_after_disable),
];

/// How long an interrupt that must not come is waited for.
const QUIET: Duration = Duration::from_millis(50);

/// Counts by vector; odd vectors have an event of their own, if it is to have any.
struct Counter {
    raised: Vec<AtomicU64>,
    events: Vec<Option<Event>>,
}

impl Counter {
    fn new(count: u16, with_events: impl Fn(u16) -> bool) -> Arc<Self> {
        let event = |v| with_events(v).then(|| Event::new().expect("a descriptor"));
        Arc::new(Self {
            raised: (0..count).map(|_| AtomicU64::new(0)).collect(),
            events: (0..count).map(event).collect(),
        })
    }

    fn raised(&self, vector: u16) -> u64 {
        self.raised[usize::from(vector)].load(Ordering::Acquire)
    }

    fn total(&self) -> u64 {
        self.raised.iter().map(|n| n.load(Ordering::Acquire)).sum()
    }
}

impl InterruptSink for Counter {
    fn raise(&self, vector: u16) {
        self.raised[usize::from(vector)].fetch_add(1, Ordering::AcqRel);
    }

    fn event(&self, vector: u16) -> Option<BorrowedFd<'_>> {
        self.events[usize::from(vector)].as_ref().map(AsFd::as_fd)
    }
}

fn kinds(f: &dyn HostFunction) -> [(InterruptKind, u16); 3] {
    let has = f.interrupts();
    [(InterruptKind::Intx, has.intx), (InterruptKind::Msi, has.msi), (InterruptKind::MsiX, has.msix)]
}

/// How to fire, what counts, and how many vectors are on.
type Armed = (Box<dyn Exerciser>, Arc<Counter>, u16);

/// What the function has of `kind`, and how to fire it; bus master and all vectors on, into what `sink` makes.
fn armed(
    subject: &Subject,
    kind: InterruptKind,
    events: impl Fn(u16) -> bool,
) -> Result<Armed, super::Verdict> {
    let f = &*subject.function;
    let count = kinds(f).into_iter().find(|k| k.0 == kind).map_or(0, |k| k.1);
    if count == 0 {
        return skip(format!("the function has no {kind:?}"));
    }
    let exerciser = subject.exerciser()?;
    let sink = Counter::new(count, events);
    let its_sink: Arc<dyn InterruptSink> = Arc::clone(&sink) as _;
    f.enable_interrupts(kind, count, its_sink).step("enable")?;
    f.set_bus_master(true).step("bus master on")?;
    Ok((exerciser, sink, count))
}

fn counts(open: Opener<'_>) -> Outcome {
    let subject = opened(open)?;
    let f = &*subject.function;
    let has = f.interrupts();
    ensure(has.intx <= 1 && has.msi <= 32 && has.msix <= 2048, || format!("{has:?}"))?;
    for (kind, count) in kinds(f) {
        for wrong in [0, count + 1, u16::MAX] {
            match f.enable_interrupts(kind, wrong, Counter::new(0, |_| false)) {
                Err(Error::OutOfRange { .. }) => {}
                answer => return fail(format!("{wrong} of {count} vectors of {kind:?} answered {answer:?}")),
            }
        }
    }
    Ok(())
}

fn on_and_off(open: Opener<'_>) -> Outcome {
    let subject = opened(open)?;
    let f = &*subject.function;
    f.disable_interrupts().step("disable before any")?;
    let most = kinds(f).map(|k| k.1).into_iter().max().unwrap_or(0);
    let sink = Counter::new(most, |v| v % 2 == 1);
    for round in 0..3 {
        for (kind, count) in kinds(f).into_iter().filter(|k| k.1 > 0) {
            for count in [count, 1, count.div_ceil(2)] {
                let sink: Arc<dyn InterruptSink> = Arc::clone(&sink) as _;
                f.enable_interrupts(kind, count, sink)
                    .step(&format!("{count} of {kind:?}, round {round}"))?;
            }
        }
        f.disable_interrupts().step("disable")?;
        f.disable_interrupts().step("disable again")?;
    }
    ensure(Arc::strong_count(&sink) == 1, || "the sink is still held after disabling".into())
}

/// The first, a middle and the last vector that the device can fire.
fn each_fired(
    subject: &Subject,
    exerciser: &dyn Exerciser,
    kind: InterruptKind,
    count: u16,
    mut check: impl FnMut(u16) -> Outcome,
) -> Outcome {
    let mut vectors = vec![0, 1, 4, count / 2, count - 1];
    vectors.retain(|v| *v < count);
    vectors.sort_unstable();
    vectors.dedup();
    let mut fired = 0;
    for vector in vectors {
        if exerciser.fire(&*subject.function, kind, vector).step("fire")? {
            check(vector)?;
            exerciser.acknowledge(&*subject.function).step("acknowledge")?;
            fired += 1;
        }
    }
    if fired == 0 { skip(format!("the device cannot be made to fire {kind:?}")) } else { Ok(()) }
}

fn arrives(open: Opener<'_>, kind: InterruptKind) -> Outcome {
    let subject = opened(open)?;
    let (exerciser, sink, count) = armed(&subject, kind, |_| false)?;
    each_fired(&subject, &*exerciser, kind, count, |vector| {
        let came = wait_until(|| Ok(sink.raised(vector) > 0)).step("wait")?;
        ensure(came, || format!("vector {vector} of {kind:?} did not come"))?;
        let others = (0..count).filter(|v| *v > vector).map(|v| sink.raised(v)).sum();
        ensure_eq(format!("vectors above {vector} raised"), others, 0)
    })
}

fn signals(open: Opener<'_>, kind: InterruptKind) -> Outcome {
    let subject = opened(open)?;
    let (exerciser, sink, count) = armed(&subject, kind, |_| true)?;
    each_fired(&subject, &*exerciser, kind, count, |vector| {
        let event = sink.events[usize::from(vector)].as_ref().expect("every vector has one");
        let came = wait_until(|| Ok(event.take())).step("wait")?;
        ensure(came, || format!("the event of vector {vector} of {kind:?} was not signalled"))
    })?;
    ensure_eq("vectors raised beside the events", sink.total(), 0)
}

fn intx(open: Opener<'_>) -> Outcome {
    let subject = opened(open)?;
    let f = &*subject.function;
    let (exerciser, sink, _) = armed(&subject, InterruptKind::Intx, |_| false)?;
    if !exerciser.fire(f, InterruptKind::Intx, 0).step("fire")? {
        return skip("the device cannot be made to fire its pin");
    }
    ensure(wait_until(|| Ok(sink.total() == 1)).step("wait")?, || "the pin's interrupt did not come".into())?;
    std::thread::sleep(QUIET);
    ensure_eq("interrupts while the pin stays high and masked", sink.total(), 1)?;
    f.unmask_intx().step("unmask")?;
    ensure(wait_until(|| Ok(sink.total() == 2)).step("wait")?, || {
        "unmasked with the pin still high, it did not fire again".into()
    })?;
    exerciser.acknowledge(f).step("acknowledge")?;
    f.unmask_intx().step("unmask")?;
    std::thread::sleep(QUIET);
    ensure_eq("interrupts after the pin was lowered", sink.total(), 2)
}

fn none_after_disable(open: Opener<'_>) -> Outcome {
    let subject = opened(open)?;
    let f = &*subject.function;
    let mut tried = 0;
    for (kind, _) in kinds(f).into_iter().filter(|k| k.1 > 0) {
        let (exerciser, sink, _) = armed(&subject, kind, |_| false)?;
        f.disable_interrupts().step("disable")?;
        tried += u32::from(exerciser.fire(f, kind, 0).step("fire")?);
        std::thread::sleep(QUIET);
        ensure_eq(format!("{kind:?} raised after disable"), sink.total(), 0)?;
        exerciser.acknowledge(f).step("acknowledge")?;
    }
    if tried == 0 { skip("the device cannot be made to interrupt") } else { Ok(()) }
}
