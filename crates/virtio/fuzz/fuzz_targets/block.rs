#![no_main]
//! A hostile guest at the block device, and a hostile image behind it.

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use outboard_bus::Event;
use outboard_virtio::block::{Block, Disk, DiskOptions};
use outboard_virtio::{Activation, ActiveQueue, GuestMemory, VirtioDevice, VirtioInterrupt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

const RAM: u64 = 0x4000_0000;
const LEN: usize = 1 << 20;
const SIZE: u16 = 16;
/// Rings, headers, and where most buffers are.
const DESC: u64 = RAM;
const AVAIL: u64 = RAM + 0x1000;
const USED: u64 = RAM + 0x2000;
const HEADERS: u64 = RAM + 0x3000;
const DATA: u64 = RAM + 0x1_0000;

const IMAGES: [&[u8]; 5] = [
    include_bytes!("../../../disk-image/tests/images/cluster-512.qcow2"),
    include_bytes!("../../../disk-image/tests/images/compressed-zlib.qcow2"),
    include_bytes!("../../../disk-image/tests/images/compressed-zstd.qcow2"),
    include_bytes!("../../../disk-image/tests/images/snapshots.qcow2"),
    include_bytes!("../../../disk-image/tests/images/odd-size.qcow2"),
];

#[derive(Arbitrary, Debug)]
struct Input {
    image: u8,
    read_only: bool,
    write_through: bool,
    patches: Vec<(u16, u8)>,
    requests: Vec<Request>,
    raw: Vec<(u16, u64)>,
}

#[derive(Arbitrary, Debug)]
struct Request {
    kind: u8,
    sector: Place,
    buffers: Vec<Buffer>,
    range: (Place, u16, u8),
}

#[derive(Arbitrary, Debug)]
struct Buffer {
    at: u16,
    len: u16,
    writable: bool,
    flags: u8,
}

#[derive(Arbitrary, Debug)]
enum Place {
    Near(u8),
    Any(u64),
}

impl Place {
    fn sector(&self) -> u64 {
        match *self {
            Self::Near(n) => n.into(),
            Self::Any(n) => n,
        }
    }
}

#[derive(Default)]
struct Interrupt {
    broken: AtomicBool,
}

impl VirtioInterrupt for Interrupt {
    fn queue_used(&self, _: u16) {}

    fn config_changed(&self) {}

    fn device_broken(&self, _: &str) {
        self.broken.store(true, Ordering::SeqCst);
    }
}

fn open(path: &Path, read_only: bool) -> Option<Disk> {
    Disk::open(path, &DiskOptions { read_only, ..DiskOptions::default() }).ok()
}

/// Puts the requests into the ring; the number of them.
fn put(memory: &GuestMemory, requests: &[Request]) -> u16 {
    let mut next = 0;
    let mut count = 0;
    for request in requests.iter().take(usize::from(SIZE)) {
        let descriptors = 2 + request.buffers.len().min(6) as u16;
        if next + descriptors > SIZE {
            break;
        }
        let header = HEADERS + u64::from(count) * 64;
        let kind = [0, 1, 4, 8, 11, 13, u32::from(request.kind)][usize::from(request.kind % 7)];
        memory.write_obj([kind, 0], GuestAddress(header)).unwrap();
        memory.write_obj(request.sector.sector(), GuestAddress(header + 8)).unwrap();
        let (sector, sectors, flags) = &request.range;
        memory.write_obj(sector.sector(), GuestAddress(header + 16)).unwrap();
        memory.write_obj([u32::from(*sectors), u32::from(*flags)], GuestAddress(header + 24)).unwrap();
        let header_len = if kind == 11 || kind == 13 { 32 } else { 16 };
        let mut chain = vec![(header, header_len, 0)];
        for buffer in request.buffers.iter().take(6) {
            let flags = if buffer.writable { 2 } else { 0 };
            // Sectors, mostly.
            let len = if buffer.flags & 1 == 0 { u32::from(buffer.len) & !511 } else { u32::from(buffer.len) };
            chain.push((DATA + u64::from(buffer.at) * 8, len, flags | u16::from(buffer.flags & 4)));
        }
        chain.push((header + 48, 1, 2));
        let last = chain.len() - 1;
        memory.write_obj(next, GuestAddress(AVAIL + 4 + 2 * u64::from(count))).unwrap();
        for (index, (address, len, flags)) in chain.into_iter().enumerate() {
            let at = DESC + 16 * u64::from(next);
            next += 1;
            memory.write_obj(address, GuestAddress(at)).unwrap();
            memory.write_obj(len, GuestAddress(at + 8)).unwrap();
            let chained = u16::from(index != last);
            memory.write_obj([flags | chained, next], GuestAddress(at + 12)).unwrap();
        }
        count += 1;
    }
    memory.write_obj([0, count], GuestAddress(AVAIL)).unwrap();
    count
}

fn serve(disk: Disk, input: &Input) {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(RAM), LEN)]).unwrap();
    let count = put(&memory, &input.requests);
    for (at, value) in input.raw.iter().take(8) {
        memory.write_obj(*value, GuestAddress(RAM + u64::from(*at % 0x400) * 8)).unwrap();
    }
    let mut queue = Queue::new(SIZE).unwrap();
    queue.set_size(SIZE);
    queue.set_desc_table_address(Some(DESC as u32), Some(0));
    queue.set_avail_ring_address(Some(AVAIL as u32), Some(0));
    queue.set_used_ring_address(Some(USED as u32), Some(0));
    queue.set_ready(true);
    let doorbell = Arc::new(Event::new().unwrap());
    let interrupt = Arc::new(Interrupt::default());
    let mut block = Block::new("blk0", "serial", disk, 1);
    let features = if input.write_through { 0 } else { block.features() };
    let queues = vec![Some(ActiveQueue { index: 0, queue, doorbell: doorbell.clone() })];
    block.activate(Activation { memory: memory.clone(), features, queues, interrupt: interrupt.clone() }).unwrap();
    doorbell.signal();
    // The guest may have overwritten the ring: then there is nothing to wait for.
    let start = Instant::now();
    let is_done = || {
        let used: u16 = memory.read_obj(GuestAddress(USED + 2)).unwrap();
        used >= count || interrupt.broken.load(Ordering::SeqCst)
    };
    while !is_done() && start.elapsed() < Duration::from_millis(50) {
        std::thread::yield_now();
    }
    block.reset();
}

fuzz_target!(|input: Input| {
    let dir = tempfile::Builder::new().tempdir_in("/dev/shm").unwrap();
    let index = usize::from(input.image) % (IMAGES.len() + 1);
    let (name, mut bytes) = match IMAGES.get(index) {
        Some(image) => ("disk.qcow2", image.to_vec()),
        None => ("disk.img", vec![0; 128 << 10]),
    };
    for (at, value) in input.patches.iter().take(6) {
        let len = bytes.len();
        bytes[usize::from(*at) % len] = *value;
    }
    let path = dir.path().join(name);
    std::fs::write(&path, &bytes).unwrap();
    let Some(disk) = open(&path, input.read_only) else {
        assert!(std::fs::read(&path).unwrap() == bytes, "a refused image was written to");
        return;
    };
    serve(disk, &input);
    assert!(open(&path, input.read_only).is_some(), "the image is refused afterwards");
    assert!(!input.read_only || std::fs::read(&path).unwrap() == bytes);
});
