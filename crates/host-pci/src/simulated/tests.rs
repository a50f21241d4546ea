use super::*;
use crate::conformance::{self, Subject, Verdict};
use crate::{BusAddress, DmaDomain, Error, GRANULE, HostFunction, PciAddress, Release};
use outboard_bus::{Width, poll_readable};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const ADDRESS: PciAddress = PciAddress { segment: 0, bus: 1, device: 0, function: 0 };

fn device(model: Model) -> Arc<SimulatedDevice> {
    SimulatedDevice::new(ADDRESS, model).unwrap()
}

/// Runs the whole suite; returns the names of the cases that were skipped.
fn conform(model: Model) -> Vec<&'static str> {
    conform_in(model, &SimulatedDomain::new)
}

fn conform_in(model: Model, domain: &dyn Fn() -> Arc<SimulatedDomain>) -> Vec<&'static str> {
    let device = device(model);
    let open = || {
        let domain = domain();
        let function = device.open(&domain).map_err(|e| e.to_string())?;
        Ok(Subject { function: Arc::new(function), domain, beside: vec![] })
    };
    let mut skipped = vec![];
    for case in conformance::cases() {
        match case.run(&open) {
            Verdict::Passed => {}
            Verdict::Skipped(_) => skipped.push(case.name),
            Verdict::Failed(why) => panic!("{}: {why}", case.name),
        }
    }
    skipped
}

#[test]
fn the_endpoint_conforms_in_everything() {
    assert_eq!(conform(endpoint()), Vec::<&str>::new());
}

#[test]
fn the_endpoint_conforms_behind_a_dart() {
    let domain = || SimulatedDomain::mac(outboard_dart::Config::MAC).unwrap();
    assert_eq!(conform_in(endpoint(), &domain), Vec::<&str>::new());
}

#[repr(align(16384))]
struct Page([u8; GRANULE as usize]);

#[test]
#[allow(unsafe_code)] // UNSAFETY: maps memory that the test owns.
fn a_dart_hands_out_its_own_addresses_and_notices_mistakes() {
    let device = device(endpoint());
    let domain = SimulatedDomain::mac(outboard_dart::Config::MAC).unwrap();
    let function = device.open(&domain).unwrap();
    let mut memory = Box::new(Page([0; GRANULE as usize]));
    let host = std::ptr::NonNull::from(&mut memory.0).cast();
    // SAFETY: the memory outlives the mapping, which is taken down below.
    let at = unsafe { domain.map(host, GRANULE, 0x4000_0000) }.unwrap();
    assert_eq!(at.0, 0x8000_0000);
    function.set_bus_master(true).unwrap();
    assert!(device.dma_write(at, &[1]) && !device.dma_write(crate::BusAddress(0x4000_0000), &[1]));
    let usage = domain.usage();
    assert_eq!((usage.bytes, usage.entries, usage.mistakes), (GRANULE, 1, 1), "{usage:?}");
    function.set_bus_master(false).unwrap();
    domain.unmap(at, GRANULE, Release::TearDown).unwrap();
    assert_eq!(domain.usage().mistakes, 1);
}

#[test]
fn both_functions_of_the_5090_conform() {
    let [graphics, audio] = rtx5090();
    for model in [graphics, audio] {
        let skipped = conform(model);
        assert!(skipped.contains(&"msix-is-raised-by-vector") && skipped.len() < 16, "{skipped:?}");
    }
}

#[test]
fn the_5090_is_what_is_known_of_it() {
    let [graphics, audio] = rtx5090().map(device);
    let domain = SimulatedDomain::new();
    let (gpu, sound) = (graphics.open(&domain).unwrap(), audio.open(&domain).unwrap());
    let id = gpu.identity();
    assert_eq!((id.vendor, id.device, id.class, id.revision), (0x10de, 0x2b85, 0x03_0000, 0xa1));
    let id = sound.identity();
    assert_eq!((id.vendor, id.device, id.class), (0x10de, 0x22e8, 0x04_0300));
    let lens: Vec<_> = gpu.bars().iter().map(|b| b.map_or(0, |b| b.len)).collect();
    assert_eq!(lens, [64 << 20, 256 << 20, 0, 32 << 20, 0, 128]);
    assert_eq!(gpu.bar_read(0, 0, Width::B4).unwrap(), 0x1b20_00a1);
    let read = |at| gpu.config_read(at, Width::B4);
    let capabilities = crate::capabilities::list(&read).unwrap();
    assert_eq!(capabilities, [(0x01, 0x40), (0x05, 0x48), (0x10, 0x60)]);
    let extended = crate::capabilities::list_extended(&read, 4096).unwrap();
    assert_eq!(
        extended.iter().map(|e| (e.0 as u16, e.1)).collect::<Vec<_>>(),
        [(2, 0x100), (0x15, 0x134), (1, 0x1b8)]
    );
    // Legacy Endpoint, and one resizable BAR, BAR 1, at 256 MiB.
    assert_eq!(read(0x60).unwrap() >> 20 & 0xf, 1);
    assert_eq!(read(0x13c).unwrap(), 0x821);
    assert_eq!(gpu.interrupts().msi, 16);
}

#[test]
fn a_mapped_bar_is_the_trapped_one() {
    let device = device(endpoint());
    let function = device.open(&SimulatedDomain::new()).unwrap();
    let mapped = function.map_bar(2, 0x4000, 0x8000).unwrap();
    assert_eq!(mapped.len(), 0x8000);
    function.bar_write(2, 0x4010, Width::B4, 0xfeed_f00d).unwrap();
    assert_eq!(conformance::peek(&*mapped, 0x10), 0xfeed_f00d);
    assert_eq!(device.register(2, 0x4010), Some(0xfeed_f00d));
}

#[test]
fn it_is_one_owners_at_a_time() {
    let device = device(endpoint());
    let function = device.open(&SimulatedDomain::new()).unwrap();
    assert!(matches!(device.open(&SimulatedDomain::new()), Err(Error::Host { .. })));
    drop(function);
    device.open(&SimulatedDomain::new()).unwrap();
}

#[test]
fn a_removed_device_is_gone_for_every_call() {
    let device = device(endpoint());
    let function = device.open(&SimulatedDomain::new()).unwrap();
    device.remove();
    assert!(poll_readable(&[function.removal()], Some(Duration::ZERO)).unwrap()[0]);
    assert!(matches!(function.config_read(0, Width::B4), Err(Error::Gone(ADDRESS))));
    assert!(matches!(function.bar_read(0, 0, Width::B4), Err(Error::Gone(ADDRESS))));
    assert!(matches!(function.reset(), Err(Error::Gone(ADDRESS))));
    assert!(function.disable_interrupts().is_ok(), "turning off what cannot fire works");
    assert!(!device.fire(0));
    drop(function);
    assert!(matches!(device.open(&SimulatedDomain::new()), Err(Error::Gone(_))));
}

#[test]
fn one_that_comes_back_different_is_not_handed_out_until_released() {
    let device = device(endpoint());
    let function = device.open(&SimulatedDomain::new()).unwrap();
    // BAR 1 lost its address.
    device.change_at_reset(&[(0x17, 0)]);
    let error = function.reset().unwrap_err();
    assert!(matches!(&error, Error::ResetFailed { why, .. } if why.contains("0x14")), "{error}");
    assert!(matches!(function.config_read(0, Width::B4), Err(Error::ResetFailed { .. })));
    drop(function);
    assert!(matches!(device.open(&SimulatedDomain::new()), Err(Error::ResetFailed { .. })));
    device.release();
    device.open(&SimulatedDomain::new()).unwrap();
}

#[test]
fn a_lost_capability_is_noticed_after_a_reset() {
    let device = device(endpoint());
    let function = device.open(&SimulatedDomain::new()).unwrap();
    device.change_at_reset(&[(0x41, 0)]);
    assert!(matches!(function.reset(), Err(Error::ResetFailed { .. })));
}

#[test]
fn transactions_that_do_not_end_are_an_error() {
    let device = device(endpoint());
    let function = device.open(&SimulatedDomain::new()).unwrap();
    device.set_pending(true);
    function.set_bus_master(true).unwrap();
    assert!(matches!(function.set_bus_master(false), Err(Error::Busy(_))));
    assert_eq!(device.config()[4] & 4, 0, "it is off all the same");
}

#[test]
fn faults_happen_as_often_as_asked_for() {
    let device = device(endpoint());
    let function = device.open(&SimulatedDomain::new()).unwrap();
    device.inject(Operation::ConfigRead, Fault { times: 2, ..Fault::once(Error::Gone) });
    assert!(function.config_read(0, Width::B4).is_err());
    assert!(function.config_read(0, Width::B4).is_err());
    assert!(function.config_read(0, Width::B4).is_ok());
    device.inject(Operation::BarRead, Fault::slow(Duration::from_millis(20)));
    let started = Instant::now();
    function.bar_read(0, 0, Width::B4).unwrap();
    assert!(started.elapsed() >= Duration::from_millis(20));
    let domain = SimulatedDomain::new();
    domain.inject(Operation::DmaUnmap, Fault::once(Error::Busy));
    assert!(matches!(domain.unmap(crate::BusAddress(0), 0x4000, Release::Driver), Err(Error::Busy(_))));
}

#[test]
fn stray_dma_is_counted() {
    let device = device(endpoint());
    let domain = SimulatedDomain::new();
    let function = device.open(&domain).unwrap();
    assert!(!device.dma_write(crate::BusAddress(0x4000), &[1]), "no bus master");
    assert_eq!(domain.stray_accesses(), 0);
    function.set_bus_master(true).unwrap();
    assert!(!device.dma_write(crate::BusAddress(0x4000), &[1]));
    assert_eq!(domain.stray_accesses(), 1);
}

#[test]
fn broken_capability_chains_open_and_reset() {
    let broken = [
        // A loop, one to itself, one into the header, one to all-ones, an extended loop.
        endpoint().raw(0x41, &[0x40]),
        endpoint().raw(0x34, &[0x41]),
        endpoint().raw(0x41, &[0x10]),
        endpoint().raw(0x40, &[0xff; 192]),
        endpoint().raw(0x102, &[0x01, 0x10]),
        // MSI-X in a BAR that is not there, beyond its end, and of 2,048 vectors.
        endpoint().raw(0xb4, &[7]),
        endpoint().raw(0xb4, &[1, 0xff, 0xff, 0xff]),
        endpoint().raw(0xb2, &[0xff, 0x07]),
        endpoint().raw(0x3d, &[0xff]),
        Model::new(0xffff, 0xffff, 0xff_ffff, 0xff),
        Model::new(0, 0, 0, 0).conventional(),
    ];
    for model in broken {
        let device = device(model);
        let function = device.open(&SimulatedDomain::new()).unwrap();
        function.reset().unwrap();
        assert!(function.interrupts().msix <= 2048 && function.interrupts().intx <= 1);
    }
}

/// Counts what is logged.
struct Counter(Arc<AtomicUsize>);

impl tracing::Subscriber for Counter {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::WARN
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, _: &tracing::Event<'_>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn b8_a_device_that_strays_does_not_fill_the_log() {
    let domain = SimulatedDomain::new();
    let device = SimulatedDevice::new(ADDRESS, endpoint()).unwrap();
    let function = device.open(&domain).unwrap();
    function.set_bus_master(true).unwrap();
    let count = Arc::new(AtomicUsize::new(0));
    tracing::subscriber::with_default(Counter(count.clone()), || {
        for _ in 0..2_000 {
            assert!(!device.dma_write(BusAddress(0x1234_0000), &[1]));
        }
    });
    // Ten in five seconds, on a machine that may be slow.
    assert!((1..=100).contains(&count.load(Ordering::Relaxed)), "{count:?} messages");
    assert_eq!(domain.stray_accesses(), 2_000, "all are counted");
}
