#![no_main]
//! A hostile guest at the DMA device.

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use outboard_abi as abi;
use outboard_abi::published::Layout;
use outboard_abi::{Entry, Status};
use outboard_bus::Width;
use outboard_companion::{Allowed, Companion, Config, GuestMemory, Published, ServedSlot};
use outboard_dart::Config as Dart;
use outboard_host_pci::simulated::SimulatedDomain;
use outboard_host_pci::{BusAddress, DmaDomain, DmaLimits, DmaUsage, Release, Result};
use outboard_pci::{PciFunction, RootPort};
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestRegionMmap};

const RAM: u64 = 0x4000_0000;
const LEN: u64 = 1 << 20;
const GRANULE: u64 = 16 << 10;
/// Small enough to be met.
const DART: Dart = Dart { bytes: 40 * GRANULE, entries: 24, return_delay: 0, ..Dart::MAC };

#[derive(Arbitrary, Debug)]
struct Input {
    layout_b: bool,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Batch { queue: u8, entries: Vec<Small>, later: bool },
    Command { kind: u8, ranges: Vec<(Place, Place)> },
    Store { at: u16, value: u64 },
    Write { at: u16, width: u8, value: u64 },
    Read { at: u16, width: u8 },
    Published { at: u16, width: u8, value: u64 },
    Base { queue: u8, at: Place },
    Control(u8),
}

/// An entry, mostly near what makes sense.
#[derive(Arbitrary, Debug)]
struct Small {
    op: u8,
    flags: bool,
    address: Place,
    len: Place,
    handle: u8,
}

/// A number near an edge, or any.
#[derive(Arbitrary, Debug)]
enum Place {
    Granule(u8),
    End(i8),
    Any(u64),
}

impl Place {
    fn address(&self) -> u64 {
        match *self {
            Self::Granule(n) => RAM + u64::from(n % 64) * GRANULE,
            Self::End(n) => (RAM + LEN).wrapping_add_signed(i64::from(n) * 4096),
            Self::Any(value) => value,
        }
    }
    fn len(&self) -> u64 {
        match *self {
            Self::Granule(n) => u64::from(n % 8) * GRANULE,
            Self::End(n) => LEN.wrapping_add_signed(i64::from(n) * 4096),
            Self::Any(value) => value,
        }
    }
}

struct Checked {
    inner: Arc<SimulatedDomain>,
    host: u64,
}

impl DmaDomain for Checked {
    fn limits(&self) -> DmaLimits {
        self.inner.limits()
    }
    unsafe fn map(&self, host: NonNull<u8>, len: u64, guest: u64) -> Result<BusAddress> {
        assert!(len > 0 && len.is_multiple_of(GRANULE) && guest.is_multiple_of(GRANULE));
        assert!(guest >= RAM && guest.checked_add(len).is_some_and(|end| end <= RAM + LEN), "{guest:#x}+{len:#x}");
        assert_eq!(host.as_ptr() as u64, self.host + (guest - RAM));
        // SAFETY: the caller's promise, passed on.
        unsafe { self.inner.map(host, len, guest) }
    }
    fn unmap(&self, address: BusAddress, len: u64, release: Release) -> Result<()> {
        self.inner.unmap(address, len, release)
    }
    fn usage(&self) -> DmaUsage {
        self.inner.usage()
    }
}

struct Quiet;
impl ServedSlot for Quiet {
    fn waiting(&self) -> Option<String> {
        None
    }

    fn allow_dma(&self, _: Allowed) {}
    fn silence(&self) -> bool {
        true
    }
}

/// One piece of memory for all runs: its contents are what the runs before left, and any contents are to be borne.
fn ram() -> &'static GuestMemory {
    static MEMORY: OnceLock<GuestMemory> = OnceLock::new();
    MEMORY.get_or_init(|| {
        let layout = std::alloc::Layout::from_size_align(LEN as usize, GRANULE as usize).unwrap();
        // SAFETY: not empty; never freed.
        let memory = unsafe { std::alloc::alloc_zeroed(layout) };
        // SAFETY: `memory` has that many bytes for good.
        let builder = unsafe { MmapRegionBuilder::<()>::new(LEN as usize).with_raw_mmap_pointer(memory) };
        let region = GuestRegionMmap::new(builder.build().unwrap(), GuestAddress(RAM)).unwrap();
        GuestMemory::from_regions(vec![region]).unwrap()
    })
}

fn width(selector: u8) -> Width {
    [Width::B1, Width::B2, Width::B4, Width::B8][usize::from(selector % 4)]
}

fn queue(index: u8) -> u64 {
    u64::from(abi::QUEUE_FIRST) + u64::from(index % 2) * u64::from(abi::QUEUE_STRIDE)
}

fn step(companion: &Companion, published: &Published, step: &Step) {
    let (batch, page) = (RAM + 0x1_0000, RAM + 0x2_0000);
    match step {
        Step::Batch { queue: index, entries, later } => {
            for (at, small) in (batch..).step_by(64).zip(entries.iter().take(256)) {
                let handle = 3 << 48 | u64::from(small.handle);
                let (address, len) = (small.address.address(), small.len.len());
                let (op, flags) = ((small.op % 4).into(), small.flags.into());
                let entry = Entry { op, flags, address, len, handle, ..Entry::default() };
                ram().write_slice(&entry.bytes(), GuestAddress(at)).unwrap();
            }
            let _ = companion.bar_write(0, queue(*index), Width::B8, batch);
            let bell = if *later { abi::QUEUE_DOORBELL_LATER } else { abi::QUEUE_DOORBELL };
            let _ = companion.bar_write(0, queue(*index) + u64::from(bell), Width::B4, entries.len() as u64);
        }
        Step::Command { kind, ranges } => {
            let count = ranges.len().min(128) as u64;
            let words = [u64::from(kind % 4) | count << 32, 0, page + 0x1000, page + 0x2000];
            words.iter().zip((page..).step_by(8)).for_each(|(word, at)| ram().write_obj(*word, GuestAddress(at)).unwrap());
            for (at, (address, len)) in (page + 0x1000..page + 0x1f00).step_by(20).zip(ranges) {
                ram().write_obj([address.address(), len.len()], GuestAddress(at)).unwrap();
            }
            let _ = published.bar_write(0, 0x10, Width::B4, page);
            let _ = published.bar_write(0, 0x14, Width::B4, 0);
            let _ = published.bar_write(0, 0x18, Width::B4, 1);
        }
        Step::Store { at, value } => ram().write_obj(*value, GuestAddress(batch + u64::from(*at) * 2)).unwrap(),
        Step::Write { at, width: w, value } => {
            let _ = companion.bar_write(0, u64::from(at % 4096), width(*w), *value);
        }
        Step::Read { at, width: w } => {
            let _ = companion.bar_read(0, u64::from(at % 4096), width(*w));
            let _ = published.bar_read(0, u64::from(at % 4096), width(*w));
        }
        Step::Published { at, width: w, value } => {
            let _ = published.bar_write(0, u64::from(at % 32), width(*w), *value);
        }
        Step::Base { queue: index, at } => {
            let _ = companion.bar_write(0, queue(*index), Width::B8, at.address());
        }
        Step::Control(value) => {
            let _ = companion.bar_write(0, abi::CONTROL.into(), Width::B4, u64::from(value % 4));
        }
    }
}

fuzz_target!(|input: Input| {
    let inner = SimulatedDomain::mac(DART).unwrap();
    let host = ram().get_host_address(GuestAddress(RAM)).unwrap() as u64;
    let domain = Arc::new(Checked { inner: inner.clone(), host });
    let config = Config { port: 3, vcpus: 2, ram: ram().clone(), limits: domain.limits() };
    let companion = Companion::new(config).unwrap();
    assert!(companion.attach(domain, Arc::new(Quiet)));
    let layout = if input.layout_b { Layout::B } else { Layout::A };
    let published = companion.published(layout, Arc::new(RootPort::new(3)));
    companion.bar_write(0, abi::CONTROL.into(), Width::B4, 1).unwrap();
    input.steps.iter().take(64).for_each(|one| step(&companion, &published, one));
    let read = |at: u64| companion.bar_read(0, at, Width::B4).unwrap();
    while (0..2).any(|q| read(queue(q) + u64::from(abi::QUEUE_STATUS)) == u64::from(Status::Busy.code())) {
        std::thread::yield_now();
    }
    let (entries, bytes) = inner.mapped();
    let long = |at: u32| companion.bar_read(0, at.into(), Width::B8).unwrap();
    assert_eq!((long(abi::STAT_ENTRIES), long(abi::STAT_BYTES)), (entries as u64, bytes));
    companion.bar_write(0, abi::CONTROL.into(), Width::B4, 2).unwrap();
    assert_eq!(inner.mapped().0, 0);
    assert_eq!(inner.usage().mistakes, 0);
    companion.detach(false);
});
