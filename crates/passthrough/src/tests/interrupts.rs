use super::device::{DOORBELL, FakeBinder, FakeHost, Log, Rig, Space};
use crate::{Function, IntxWiring, LevelBinder, VectorBinder, Wiring, WiringError};
use outboard_bus::{Event, MsiMessage, Width};
use outboard_host_pci::{HostBarKind, InterruptKind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

fn message(data: u32) -> MsiMessage {
    MsiMessage { address: DOORBELL, data }
}

/// MSI-X on, `vector` programmed and unmasked.
fn use_msix(rig: &Rig, vector: u64) {
    let entry = 0x2000_4000 + 16 * vector;
    rig.bus.write(entry, Width::B8, DOORBELL);
    rig.bus.write(entry + 8, Width::B4, 100 + vector);
    rig.write(0xb2, Width::B2, 0x8000);
    rig.bus.write(entry + 12, Width::B4, 0);
}

fn kernel_rig() -> (Rig, Arc<FakeBinder>) {
    let binder = Arc::new(FakeBinder::default());
    let rig = Rig::with(FakeHost::endpoint(&Log::default()), Some(binder.clone() as Arc<dyn VectorBinder>));
    rig.place();
    rig.log.take();
    (rig, binder)
}

#[test]
fn msix_goes_through_this_process_where_there_is_no_other_way() {
    let rig = Rig::new();
    rig.place();
    rig.log.take();
    use_msix(&rig, 69);
    assert_eq!(rig.log.take(), ["disable", "enable 70 MsiX"]);
    rig.host.raise(69);
    assert_eq!(rig.sent.take(), [message(169)]);
    rig.host.raise(3);
    assert_eq!(rig.sent.take(), []);
    assert_eq!(rig.bus.read(0x2000_5000, Width::B8), 1 << 3, "masked: pending");
    rig.bus.write(0x2000_4000 + 48 + 12, Width::B4, 0);
    assert_eq!(rig.sent.take().len(), 1);
    rig.write(0xb2, Width::B2, 0);
    assert_eq!(rig.log.take(), ["disable", "enable 1 Intx"]);
}

#[test]
fn the_largest_msix_table_there_is_works_to_its_last_vector() {
    let mut space = Space::endpoint();
    space.put(0xb0, 2047 << 16 | 0xbc11).put(0xb8, 0xc000);
    let bar = (0, HostBarKind::Memory32 { prefetchable: false }, 0x1_0000);
    let mut host = FakeHost::new(space, &[bar], &Log::default());
    host.counts.msix = 2048;
    let rig = Rig::with(host, None);
    rig.place();
    rig.log.take();
    use_msix(&rig, 2047);
    assert_eq!(rig.log.take(), ["disable", "enable 2048 MsiX"]);
    rig.host.raise(2047);
    assert_eq!(rig.sent.take(), [message(2147)]);
    rig.host.raise(2046);
    assert_eq!(rig.bus.read(0x2000_c0f8, Width::B8), 1 << 62, "masked: pending in the last word");
    assert_eq!(rig.bus.read(0x2000_c100, Width::B8), 0xbabe_0000_c100, "behind it the device itself");
}

#[test]
fn b6_a_masked_vector_pends_and_unmasking_delivers_exactly_once() {
    let (rig, binder) = kernel_rig();
    use_msix(&rig, 1);
    assert_eq!(binder.bound(), [message(101)]);
    rig.host.raise(1);
    assert_eq!((binder.deliver(), rig.sent.take()), (vec![message(101)], vec![]), "past this process");
    let control = 0x2000_4000 + 16 + 12;
    rig.bus.write(control, Width::B4, 1);
    assert_eq!(binder.bound(), []);
    rig.host.raise(1);
    rig.host.raise(1);
    assert_eq!(rig.bus.read(0x2000_5000, Width::B8), 2);
    assert_eq!(rig.bus.read(0x2000_5000, Width::B8), 2, "looking does not lose it");
    rig.bus.write(control, Width::B4, 0);
    assert_eq!((rig.sent.take(), binder.deliver()), (vec![message(101)], vec![]));
    assert_eq!(rig.bus.read(0x2000_5000, Width::B8), 0);
    rig.host.raise(1);
    assert_eq!((rig.sent.take(), binder.deliver()), (vec![], vec![message(101)]));
}

#[test]
fn b6_an_interrupt_while_a_vector_is_being_bound_comes_once() {
    let (rig, binder) = kernel_rig();
    binder.signal_at_bind.store(true, Ordering::SeqCst);
    use_msix(&rig, 1);
    assert_eq!((binder.deliver(), rig.sent.take()), (vec![message(101)], vec![]));
    rig.bus.write(0x2000_4000 + 16 + 12, Width::B4, 1);
    assert_eq!(rig.bus.read(0x2000_5000, Width::B8), 0);
}

#[test]
fn a_late_interrupt_does_not_assert_a_pin_that_was_given_up() {
    let rig = Rig::new();
    rig.place();
    let sink = rig.host.sink.lock().unwrap().as_ref().unwrap().2.clone();
    rig.write(4, Width::B2, 0x406);
    sink.raise(0);
    assert!(!rig.line.0.load(Ordering::SeqCst));
}

#[test]
fn b6_function_mask_disable_and_reset_in_all_orders_lose_and_invent_nothing() {
    type Step = fn(&Rig);
    let steps: [Step; 4] = [
        |rig| rig.bus.write(0x2000_4000 + 16 + 12, Width::B4, 1),
        |rig| rig.write(0xb2, Width::B2, 0xc000),
        |rig| rig.write(0xb2, Width::B2, 0),
        |rig| rig.root.reset(),
    ];
    for first in steps {
        for second in steps {
            for third in steps {
                let (rig, binder) = kernel_rig();
                use_msix(&rig, 1);
                for step in [first, second, third] {
                    step(&rig);
                    rig.host.raise(1);
                }
                assert_eq!((binder.deliver(), rig.sent.take()), (vec![], vec![]));
                rig.set_up_port();
                rig.place();
                use_msix(&rig, 1);
                // At most what is still pending from before, once.
                assert!(rig.sent.take().len() + binder.deliver().len() <= 1);
                rig.host.raise(1);
                assert_eq!((binder.deliver(), rig.sent.take()), (vec![message(101)], vec![]));
                drop(rig);
                assert_eq!(binder.bound(), []);
            }
        }
    }
}

#[test]
fn b5_messages_that_name_no_interrupt_of_the_guest_go_nowhere() {
    let (rig, binder) = kernel_rig();
    use_msix(&rig, 0);
    for address in [0, 0x4000_0000, 0xfee0_0000, u64::MAX] {
        rig.bus.write(0x2000_4000, Width::B8, address);
        rig.host.raise(0);
        assert_eq!(binder.bound(), []);
    }
    rig.bus.write(0x2000_4000, Width::B8, DOORBELL);
    assert_eq!((rig.sent.take(), binder.deliver()), (vec![], vec![]));
    rig.host.raise(0);
    assert_eq!(binder.deliver(), [message(100)]);
}

#[test]
fn msi_with_several_messages_numbers_them_in_the_data() {
    let rig = Rig::new();
    rig.place();
    rig.set(0x54, DOORBELL as u32);
    rig.set(0x58, 0);
    rig.set(0x5c, 0x64 + 3);
    rig.log.take();
    // Eight messages.
    rig.write(0x52, Width::B2, 3 << 4 | 1);
    assert_eq!(rig.log.take(), ["disable", "enable 8 Msi"]);
    for vector in [0, 5, 7, 8] {
        rig.host.raise(vector);
    }
    assert_eq!(rig.sent.take(), [message(0x60), message(0x65), message(0x67)]);
    // One vector masked: pending until it is not.
    rig.set(0x60, 1 << 5);
    rig.host.raise(5);
    assert_eq!((rig.sent.take(), rig.dword(0x64)), (vec![], 1 << 5));
    rig.set(0x60, 0);
    assert_eq!((rig.sent.take(), rig.dword(0x64)), (vec![message(0x65)], 0));
    // More than it has is what it has.
    rig.write(0x52, Width::B2, 7 << 4 | 1);
    assert_eq!(rig.log.take(), ["disable", "enable 32 Msi"]);
    rig.write(0x52, Width::B2, 0);
    rig.host.raise(0);
    assert_eq!(rig.sent.take(), []);
}

#[test]
fn bus_master_off_holds_messages() {
    let (rig, binder) = kernel_rig();
    use_msix(&rig, 0);
    rig.write(4, Width::B2, 2);
    assert_eq!(binder.bound(), []);
    rig.write(4, Width::B2, 6);
    assert_eq!(binder.bound(), [message(100)]);
}

fn eventually(what: impl Fn() -> bool) {
    // Gives up after a minute: a thread has to run for it.
    for _ in 0..60_000 {
        if what() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("did not happen");
}

#[test]
fn the_pin_is_a_level_that_ends_when_the_device_says_so() {
    let rig = Rig::new();
    rig.place();
    assert_eq!(rig.host.sink.lock().unwrap().as_ref().unwrap().0, InterruptKind::Intx);
    rig.log.take();
    rig.host.poke(4, 0x0018_0002);
    rig.host.raise(0);
    assert!(rig.line.0.load(Ordering::SeqCst));
    rig.host.poke(4, 0x0010_0002);
    eventually(|| !rig.line.0.load(Ordering::SeqCst));
    eventually(|| rig.log.take().contains(&"unmask".to_owned()));
    // Disabled by the guest: the line is released, and nothing fires.
    rig.host.poke(4, 0x0018_0002);
    rig.host.raise(0);
    assert!(rig.line.0.load(Ordering::SeqCst));
    rig.write(4, Width::B2, 0x406);
    assert!(!rig.line.0.load(Ordering::SeqCst));
    assert!(rig.host.sink.lock().unwrap().is_none());
}

#[test]
fn b7_counts_are_what_the_host_has() {
    let mut host = FakeHost::endpoint(&Log::default());
    (host.counts.msi, host.counts.msix) = (5, 16);
    let rig = Rig::with(host, None);
    rig.place();
    assert_eq!(rig.dword(0x50) >> 17 & 7, 2, "four of the five");
    rig.log.take();
    rig.write(0xb2, Width::B2, 0x8000);
    assert_eq!(rig.log.take(), ["disable", "enable 16 MsiX"]);
    let mut host = FakeHost::endpoint(&Log::default());
    (host.counts.msi, host.counts.msix, host.counts.intx) = (0, 0, 0);
    let rig = Rig::with(host, None);
    rig.place();
    assert_eq!(rig.dword(0x50), 0, "no MSI without vectors");
    assert_eq!(rig.dword(0x3c) >> 8, 0);
    assert_eq!(rig.log.take().iter().filter(|e| e.starts_with("enable")).count(), 0);
}

/// A kernel that asserts the line at `trigger`: the test plays the guest's end of interrupt.
#[derive(Default)]
struct FakeLevel(std::sync::Mutex<Option<std::os::fd::OwnedFd>>);

impl LevelBinder for FakeLevel {
    fn bind(&self, _: &Event, resample: &Event) -> Result<(), WiringError> {
        use std::os::fd::AsFd;
        let old = self.0.lock().unwrap().replace(resample.as_fd().try_clone_to_owned().unwrap());
        assert!(old.is_none());
        Ok(())
    }
    fn unbind(&self, _: &Event, _: &Event) {
        assert!(self.0.lock().unwrap().take().is_some());
    }
}

#[test]
fn the_pin_past_this_process_is_unmasked_by_the_guests_end_of_interrupt() {
    use std::io::Write;
    let rig = Rig::new();
    let level = Arc::new(FakeLevel::default());
    let kernel = Some(level.clone() as Arc<dyn LevelBinder>);
    let wiring = Wiring { intx: Some(IntxWiring { line: rig.line.clone(), kernel }), ..rig.wiring() };
    let host = Arc::new(FakeHost::endpoint(&Log::default()));
    let function = Function::new(host.clone(), wiring).unwrap();
    let command = outboard_pci::ConfigAccess::new(4, Width::B2).unwrap();
    outboard_pci::PciFunction::config_write(&function, command, 2);
    host.log.take();
    host.raise(0);
    assert!(!rig.line.0.load(Ordering::SeqCst), "not by this process");
    assert_eq!(host.log.take(), Vec::<String>::new());
    let resample = level.0.lock().unwrap().as_ref().unwrap().try_clone().unwrap();
    std::fs::File::from(resample).write_all(&1u64.to_ne_bytes()).unwrap();
    eventually(|| host.log.take() == ["unmask"]);
    outboard_pci::PciFunction::config_write(&function, command, 0x402);
    assert!(level.0.lock().unwrap().is_none());
}
