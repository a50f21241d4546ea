//! What a guest or a device can repeat is logged at a bounded rate (B8).

use super::device::{FakeHost, Log, Rig, Space};
use crate::{Function, GuestMapper, Wiring, WiringError};
use outboard_bus::Width;
use outboard_host_pci::{Error, MappedBar, PciAddress};
use outboard_pci::PciFunction;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Counts what is logged.
struct Counter(Arc<AtomicUsize>);

impl Subscriber for Counter {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::WARN
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, _: &Event<'_>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// Warnings and errors that this thread logs during `work`.
fn logged(work: impl FnOnce()) -> usize {
    let count = Arc::new(AtomicUsize::new(0));
    tracing::subscriber::with_default(Counter(count.clone()), || {
        // Seen in any case: the limits are the process's, and other tests may have used them up.
        tracing::warn!("a test begins");
        work();
    });
    count.load(Ordering::Relaxed)
}

/// How often each test does what it does; a message each time, or more, without a limit.
const TIMES: usize = 2_000;
/// Ten in five seconds at each place: enough for three places and a slow machine, and far below [`TIMES`].
const MOST: usize = 300;

/// A machine that maps nothing, and takes nothing out either.
struct Unwilling;
impl GuestMapper for Unwilling {
    fn map(&self, _: u64, _: Arc<dyn MappedBar>) -> Result<(), WiringError> {
        Err("no".into())
    }
    fn unmap(&self, _: u64, _: u64) -> Result<(), WiringError> {
        Err("no".into())
    }
}

#[test]
fn b8_a_guest_that_moves_bars_which_cannot_be_mapped_does_not_fill_the_log() {
    let rig = Rig::new();
    let wiring = Wiring { mapper: Arc::new(Unwilling), ..rig.wiring() };
    let function = Function::new(Arc::new(FakeHost::endpoint(&Log::default())), wiring).unwrap();
    let count = logged(|| (0..TIMES as u64).for_each(|i| function.bar_mapped(2, Some(i << 20))));
    assert!((1..=MOST).contains(&count), "{count} messages");
}

#[test]
fn b8_a_device_that_fails_every_access_does_not_fill_the_log() {
    let rig = Rig::new();
    rig.place();
    let address = PciAddress { segment: 0, bus: 1, device: 0, function: 0 };
    let failing = Error::Host { call: format!("read {address}"), source: std::io::Error::other("no") };
    let count = logged(|| {
        for _ in 0..TIMES {
            rig.function.report("a test", &failing);
            rig.bus.read(0x2000_4458, Width::B1);
        }
    });
    assert!((1..=MOST).contains(&count), "{count} messages");
}

#[test]
fn b8_a_guest_that_reboots_with_a_malformed_device_does_not_fill_the_log() {
    let rig = Rig::new();
    let mut space = Space::endpoint();
    // A vendor capability that reaches beyond the end.
    space.put(0xc0, 0x00ff_0009);
    let host = Arc::new(FakeHost::new(space, &[], &Log::default()));
    let count = logged(|| (0..TIMES).for_each(|_| drop(Function::new(host.clone(), rig.wiring()).unwrap())));
    assert!((1..=MOST).contains(&count), "{count} messages");
}

#[test]
fn io_ports_that_the_guest_does_not_get_are_warned_of_at_the_start() {
    use outboard_host_pci::IoPorts;
    use outboard_host_pci::simulated::{SimulatedDevice, SimulatedDomain, endpoint};
    let rig = Rig::new();
    let start = |ports| {
        let device = SimulatedDevice::new(super::device::ADDRESS, endpoint().io_ports(ports)).unwrap();
        let host = Arc::new(device.open(&SimulatedDomain::new()).unwrap());
        logged(|| drop(Function::new(host, rig.wiring()).unwrap()))
    };
    assert_eq!(start(IoPorts::Reachable), 1, "nothing but the test's own");
    assert_eq!((start(IoPorts::Absent), start(IoPorts::Unassigned)), (2, 2));
}
