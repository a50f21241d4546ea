#![allow(unsafe_code)] // UNSAFETY: implements and calls `DmaDomain::map`.

use crate::{Allowed, Companion, Config, GuestMemory, ServedSlot};
use outboard_abi as abi;
use outboard_abi::{Entry, Op, Status};
use outboard_bus::Width;
use outboard_dart::Config as DartConfig;
use outboard_host_pci::simulated::{SimulatedDevice, SimulatedDomain, endpoint};
use outboard_host_pci::{
    BusAddress, DmaDomain, DmaLimits, DmaUsage, HostFunction, PciAddress, Release, Result,
};
use outboard_pci::PciFunction;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// Guest RAM of the tests: two pieces with a hole between them.
pub(super) const RAM: Range<u64> = 0x4000_0000..0x4100_0000;
pub(super) const HIGH: Range<u64> = 0x5000_0000..0x5040_0000;
/// Where a test keeps its queue.
pub(super) const QUEUE: u64 = RAM.start + 0x1_0000;
pub(super) const PAGE: u64 = 16 << 10;

/// A domain that checks what it is asked: nothing but whole granules of guest RAM, at the right host address, and nothing twice
/// taken down.
pub(super) struct Checked {
    pub(super) inner: Arc<SimulatedDomain>,
    /// Guest range and host address, both pieces.
    ram: Vec<(Range<u64>, u64)>,
    /// Blocks the next maps while it is set.
    pub(super) hold: AtomicBool,
    pub(super) holding: AtomicBool,
    pub(super) calls: AtomicU64,
}

impl DmaDomain for Checked {
    fn limits(&self) -> DmaLimits {
        self.inner.limits()
    }

    unsafe fn map(&self, host: NonNull<u8>, len: u64, guest: u64) -> Result<BusAddress> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let inside = self.ram.iter().find(|(range, _)| range.contains(&guest));
        let (range, start) = inside.expect("only guest RAM is mapped");
        assert!(len > 0 && guest.is_multiple_of(PAGE) && len.is_multiple_of(PAGE), "{guest:#x}+{len:#x}");
        assert!(guest.checked_add(len).is_some_and(|end| end <= range.end), "{guest:#x}+{len:#x}");
        assert_eq!(host.as_ptr() as u64, start + (guest - range.start), "host memory of another guest page");
        while self.hold.load(Ordering::SeqCst) {
            self.holding.store(true, Ordering::SeqCst);
            std::thread::yield_now();
        }
        // SAFETY: the caller's promise, passed on.
        unsafe { self.inner.map(host, len, guest) }
    }

    fn unmap(&self, address: BusAddress, len: u64, release: Release) -> Result<()> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        self.inner.unmap(address, len, release)
    }

    fn usage(&self) -> DmaUsage {
        self.inner.usage()
    }
}

/// A slot with one simulated function, as the machine's is: its own wish to be bus master, and whether it is let.
pub(super) struct OneFunction {
    pub(super) host: Arc<dyn HostFunction>,
    pub(super) log: Mutex<Vec<&'static str>>,
    /// Plays a device that does not stop.
    pub(super) stuck: AtomicBool,
    /// Its driver has turned DMA on.
    pub(super) wants: AtomicBool,
    domain: Arc<SimulatedDomain>,
}

impl ServedSlot for OneFunction {
    fn allow_dma(&self, allowed: Allowed) {
        self.log.lock().unwrap().push(match allowed {
            Allowed::Nobody => "held",
            Allowed::First => "first allowed",
            Allowed::All => "allowed",
        });
        let _ = self.host.set_bus_master(allowed != Allowed::Nobody);
    }

    fn silence(&self) -> bool {
        // Nothing may have been taken down before.
        let kept = self.domain.mapped().0;
        self.log.lock().unwrap().push(if kept > 0 { "silenced, still mapped" } else { "silenced" });
        let quiet = self.host.set_bus_master(false).and_then(|()| self.host.reset());
        quiet.is_ok() && !self.stuck.load(Ordering::SeqCst)
    }

    fn waiting(&self) -> Option<String> {
        self.wants.load(Ordering::SeqCst).then(|| "0000:01:00.0".to_owned())
    }
}

pub(super) struct Rig {
    pub(super) companion: Arc<Companion>,
    pub(super) ram: GuestMemory,
    pub(super) domain: Arc<SimulatedDomain>,
    pub(super) checked: Arc<Checked>,
    pub(super) device: Arc<SimulatedDevice>,
    pub(super) slot: Arc<OneFunction>,
}

/// A Mac whose freed addresses are free at once, so that tests need no clock.
pub(super) const DART: DartConfig = DartConfig { return_delay: 0, ..DartConfig::MAC };

impl Rig {
    /// On, with queue 0 at [`QUEUE`].
    pub(super) fn new() -> Self {
        let rig = Self::off(DART);
        rig.write(abi::CONTROL, Width::B4, abi::CONTROL_ENABLE.into());
        rig.write(abi::QUEUE_FIRST, Width::B8, QUEUE);
        rig
    }

    pub(super) fn off(dart: DartConfig) -> Self {
        let pieces = [&RAM, &HIGH].map(|r| (GuestAddress(r.start), (r.end - r.start) as usize));
        // Heap memory would do for everything but the alignment of 16 KiB that a Mac wants.
        let ram = aligned(&pieces);
        let domain = SimulatedDomain::mac(dart).unwrap();
        let host = |r: &Range<u64>| ram.get_host_address(GuestAddress(r.start)).unwrap() as u64;
        let checked = Arc::new(Checked {
            inner: domain.clone(),
            ram: [&RAM, &HIGH].map(|r| (r.clone(), host(r))).to_vec(),
            hold: AtomicBool::new(false),
            holding: AtomicBool::new(false),
            calls: AtomicU64::new(0),
        });
        let address = PciAddress { segment: 0, bus: 1, device: 0, function: 0 };
        let device = SimulatedDevice::new(address, endpoint()).unwrap();
        let slot = Arc::new(OneFunction {
            host: Arc::new(device.open(&domain).unwrap()),
            log: Mutex::default(),
            stuck: AtomicBool::new(false),
            wants: AtomicBool::new(false),
            domain: domain.clone(),
        });
        let limits = DmaLimits { bytes: 1, entries: 1, granule: PAGE, address_bits: 32 };
        let companion = Companion::new(Config { port: 5, vcpus: 4, ram: ram.clone(), limits }).unwrap();
        assert!(companion.attach(checked.clone(), slot.clone()));
        Self { companion, ram, domain, checked, device, slot }
    }

    pub(super) fn write(&self, at: u32, width: Width, value: u64) {
        self.companion.bar_write(0, at.into(), width, value).unwrap();
    }

    pub(super) fn read(&self, at: u32) -> u64 {
        let wide = self.companion.bar_read(0, at.into(), Width::B8);
        wide.or_else(|_| self.companion.bar_read(0, at.into(), Width::B4)).unwrap()
    }

    pub(super) fn put(&self, at: u64, entries: &[Entry]) {
        for (at, entry) in (at..).step_by(64).zip(entries) {
            self.ram.write_slice(&entry.bytes(), GuestAddress(at)).unwrap();
        }
    }

    pub(super) fn get(&self, at: u64, count: usize) -> Vec<Entry> {
        let entry = |at| {
            let mut bytes = [0; 64];
            self.ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
            Entry::read(&bytes)
        };
        (at..).step_by(64).take(count).map(entry).collect()
    }

    /// Has queue 0 work through `entries`; the queue's status and the entries afterwards.
    pub(super) fn run(&self, entries: &[Entry]) -> (Status, Vec<Entry>) {
        self.put(QUEUE, entries);
        self.write(abi::QUEUE_FIRST + abi::QUEUE_DOORBELL, Width::B4, entries.len() as u64);
        (self.status(), self.get(QUEUE, entries.len()))
    }

    pub(super) fn status(&self) -> Status {
        Status::from_code(self.read(abi::QUEUE_FIRST + abi::QUEUE_STATUS) as u32).unwrap()
    }

    /// Maps; the entry afterwards.
    pub(super) fn map(&self, address: u64, len: u64) -> Entry {
        self.run(&[map(address, len)]).1[0]
    }

    pub(super) fn unmap(&self, handle: u64) -> Status {
        Status::from_code(self.run(&[unmap(handle)]).1[0].status).unwrap()
    }

    pub(super) fn stats(&self) -> [u64; 6] {
        [
            abi::STAT_BYTES,
            abi::STAT_ENTRIES,
            abi::STAT_MAPS,
            abi::STAT_UNMAPS,
            abi::STAT_REFUSED,
            abi::STAT_BATCHES,
        ]
        .map(|at| self.read(at))
    }

    /// The device writes to `bus`; whether it got through.
    pub(super) fn dma(&self, bus: u64) -> bool {
        self.device.dma_write(BusAddress(bus), &[0x5a; 8])
    }

    pub(super) fn no_mistakes(&self) {
        let usage = self.companion.usage();
        assert_eq!((usage.mistakes, usage.first_mistake), (0, None));
    }
}

pub(super) fn map(address: u64, len: u64) -> Entry {
    Entry { op: Op::Map.code(), address, len, status: u32::MAX, ..Entry::default() }
}

pub(super) fn unmap(handle: u64) -> Entry {
    Entry { op: Op::Unmap.code(), handle, status: u32::MAX, ..Entry::default() }
}

/// Guest memory whose pieces are aligned to 16 KiB in this process.
fn aligned(pieces: &[(GuestAddress, usize)]) -> GuestMemory {
    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{GuestRegionMmap, MmapRegion};
    let region = |(at, len): &(GuestAddress, usize)| {
        let layout = std::alloc::Layout::from_size_align(*len, PAGE as usize).unwrap();
        // SAFETY: the layout is not empty. The memory is never freed: a test's few megabytes.
        let memory = unsafe { std::alloc::alloc_zeroed(layout) };
        assert!(!memory.is_null());
        // SAFETY: `memory` has that many bytes, for good.
        let builder = unsafe { MmapRegionBuilder::<()>::new(*len).with_raw_mmap_pointer(memory) };
        let region: MmapRegion<()> = builder.build().unwrap();
        GuestRegionMmap::new(region, *at).unwrap()
    };
    GuestMemory::from_regions(pieces.iter().map(region).collect()).unwrap()
}
