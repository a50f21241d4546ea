//! The functions that the C half calls, from several threads at once, against a stand-in of the DMA device with the model of a Mac's IOMMU.
#![allow(unsafe_code, reason = "plays the C half")]

use outboard_abi::{Entry, Op, Status};
use outboard_dart::{Config as DartConfig, Dart, MapError, Release};
use outboard_dma_core::ffi::*;
use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

const MIB: u64 = 1 << 20;
const LINES: u32 = 256;
const QUEUES: usize = 3;
const RAM: u64 = 64 * MIB;
/// `ODMA_RETURNING`.
const RETURNING: i32 = 6;

/// How the stand-in misbehaves.
#[derive(Clone, Copy, PartialEq)]
enum Mood {
    Honest,
    /// Looks at no batch; this is the queue's status.
    Batch(Status),
    /// Refuses each entry so.
    Entries(Status),
    /// Writes nothing and says that all is well.
    Silent,
    /// Success with addresses that cannot be.
    Nonsense,
}

struct Device {
    dart: Dart,
    now: u64,
    mood: Mood,
    status: u32,
    rings: u64,
    /// What the DART says beyond its limits would have panicked a Mac.
    probed: bool,
}

impl Device {
    fn work(&mut self, queue: &mut [[u8; 64]], count: u32) {
        self.rings += 1;
        // An exchange takes a while.
        self.now += 20;
        self.status = match self.mood {
            Mood::Batch(status) => status.code(),
            _ => Status::Ok.code(),
        };
        if matches!(self.mood, Mood::Batch(_) | Mood::Silent) {
            return;
        }
        for raw in queue.iter_mut().take(count as usize) {
            let mut entry = Entry::read(raw);
            self.one(&mut entry);
            *raw = entry.bytes();
        }
    }

    fn one(&mut self, entry: &mut Entry) {
        let status = match (self.mood, Op::from_code(entry.op)) {
            (Mood::Entries(status), Some(Op::Map)) => status,
            (Mood::Nonsense, Some(Op::Map)) => {
                (entry.bus, entry.handle) = (0x1234, 1);
                Status::Ok
            }
            (_, Some(Op::Map)) => match self.dart.map(self.now, entry.address, entry.len) {
                Ok(mapping) => {
                    (entry.bus, entry.handle) = (mapping.bus, mapping.handle);
                    Status::Ok
                }
                Err(MapError::Misaligned { .. }) => Status::Misaligned,
                Err(MapError::Bytes { .. }) => {
                    self.probed = true;
                    Status::OutOfBytes
                }
                Err(MapError::Entries { .. }) => {
                    self.probed = true;
                    Status::OutOfEntries
                }
                Err(MapError::Returning { .. }) => Status::Returning,
                Err(MapError::Fragmented { .. }) => Status::Fragmented,
            },
            (_, Some(Op::Unmap)) => match self.dart.unmap(self.now, entry.handle, Release::Driver) {
                Ok(_) => Status::Ok,
                Err(_) => Status::NoSuchHandle,
            },
            (_, None) => Status::Unknown,
        };
        entry.status = status.code();
    }
}

/// What the functions of the C half find behind their context.
struct Shared {
    device: Mutex<Device>,
    /// The planner's lock.
    held: AtomicBool,
    queues: Box<[UnsafeCell<[[u8; 64]; LINES as usize]>]>,
}

// SAFETY: a queue is touched by its owner only.
unsafe impl Sync for Shared {}

/// The C half: a domain, and whose turn it is at each queue.
struct Module {
    core: *const Core,
    shared: Box<Shared>,
    turns: [Mutex<()>; QUEUES],
    memory: Vec<u64>,
    hopeless: AtomicU64,
    /// Calls that waited in vain.
    gave_up: AtomicU64,
}

// SAFETY: the domain is made to be shared.
unsafe impl Sync for Module {}

fn shared(context: *mut c_void) -> &'static Shared {
    // SAFETY: `Module::new` gave its address, and the module outlives its calls.
    unsafe { &*context.cast::<Shared>() }
}

extern "C" fn ring(context: *mut c_void, queue: u32, count: u32) {
    let shared = shared(context);
    // SAFETY: the caller owns the queue.
    let entries = unsafe { &mut *shared.queues[queue as usize].get() };
    shared.device.lock().expect("no thread panics").work(entries, count);
    // Others get between this exchange and what is made of it.
    std::thread::yield_now();
}

extern "C" fn status(context: *mut c_void, _: u32) -> u32 {
    shared(context).device.lock().expect("no thread panics").status
}

extern "C" fn lock(context: *mut c_void) {
    while shared(context).held.swap(true, Ordering::Acquire) {
        std::thread::yield_now();
    }
}

extern "C" fn unlock(context: *mut c_void) {
    shared(context).held.store(false, Ordering::Release);
}

impl Module {
    fn new(bytes: u64, entries: u32) -> Self {
        let dart = DartConfig { last: DartConfig::MAC.first + bytes - 1, bytes, entries, ..DartConfig::MAC };
        let device = Device {
            dart: Dart::new(dart).expect("a DART"),
            now: 0,
            mood: Mood::Honest,
            status: 0,
            rings: 0,
            probed: false,
        };
        let queues = (0..QUEUES).map(|_| UnsafeCell::new([[0; 64]; LINES as usize])).collect();
        let shared = Box::new(Shared { device: Mutex::new(device), held: AtomicBool::new(false), queues });
        let mut config = config(bytes, entries);
        let places: Vec<*mut u8> = shared.queues.iter().map(|queue| queue.get().cast()).collect();
        config.queue = places.as_ptr();
        config.context = (&raw const *shared).cast_mut().cast();
        // SAFETY: a valid configuration.
        let len = unsafe { odma_core_bytes(&config) };
        assert!(len > 0);
        let mut memory = vec![0u64; len as usize / 8 + 1];
        // SAFETY: `memory` and the queues live as long as the module.
        let core = unsafe { odma_core_create(&config, memory.as_mut_ptr().cast(), len) };
        assert!(!core.is_null());
        let zero = || AtomicU64::new(0);
        let turns = [const { Mutex::new(()) }; QUEUES];
        Self { core, shared, turns, memory, hopeless: zero(), gave_up: zero() }
    }

    fn device(&self) -> MutexGuard<'_, Device> {
        self.shared.device.lock().expect("no thread panics")
    }

    /// A queue that nobody uses, until the guard goes.
    fn turn(&self) -> (u32, MutexGuard<'_, ()>) {
        loop {
            let free = (0u32..).zip(&self.turns).find_map(|(n, turn)| Some((n, turn.try_lock().ok()?)));
            match free {
                Some(free) => return free,
                None => std::thread::yield_now(),
            }
        }
    }

    /// As in a context that may wait for addresses to return.
    fn map(&self, start: u64, len: u64) -> Result<u64, i32> {
        let mut mapped = self.map_at_once(start, len);
        for _ in 0..24 {
            if mapped != Err(RETURNING) {
                break;
            }
            self.device().now += 500;
            mapped = self.map_at_once(start, len);
        }
        self.gave_up.fetch_add(u64::from(mapped == Err(RETURNING)), Ordering::Relaxed);
        mapped
    }

    /// As with interrupts off.
    fn map_at_once(&self, start: u64, len: u64) -> Result<u64, i32> {
        // SAFETY: the domain is valid.
        let hit = unsafe { odma_core_hit(self.core, start, len) };
        if hit != u64::MAX {
            return Ok(hit);
        }
        // SAFETY: the domain is valid.
        let hopeless = unsafe { odma_core_hopeless(self.core, start, len) };
        if hopeless != 0 {
            self.hopeless.fetch_add(1, Ordering::Relaxed);
            return Err(hopeless);
        }
        let mut bus = 0;
        let (queue, _turn) = self.turn();
        // SAFETY: the queue is ours.
        match unsafe { odma_core_map(self.core, queue, start, len, &mut bus) } {
            0 => Ok(bus),
            code => Err(code),
        }
    }

    fn unmap(&self, bus: u64, len: u64) -> bool {
        // SAFETY: the domain is valid.
        unsafe { odma_core_release(self.core, bus, len) == 0 }
    }

    fn trim(&self) {
        let (queue, _turn) = self.turn();
        while self.start_trim(queue) {
            self.end_trim(queue);
        }
    }

    /// The first half of giving back what is idle: the device has it. False if nothing is.
    fn start_trim(&self, queue: u32) -> bool {
        // SAFETY: the caller has the queue.
        let count = unsafe { odma_core_trim(self.core, queue) };
        if count > 0 {
            ring((&raw const *self.shared).cast_mut().cast(), queue, count);
        }
        count > 0
    }

    fn end_trim(&self, queue: u32) {
        // SAFETY: as above.
        unsafe { odma_core_trimmed(self.core, queue) };
    }

    fn stats(&self) -> CoreStats {
        let mut stats = CoreStats::default();
        // SAFETY: the domain is valid.
        unsafe { odma_core_stats(self.core, &mut stats) };
        stats
    }

    fn windows(&self) -> Vec<CWindow> {
        let (mut at, mut all) = (0, Vec::new());
        loop {
            let mut window = CWindow::default();
            // SAFETY: the domain is valid.
            at = unsafe { odma_core_next_window(self.core, at, &mut window) };
            if at == 0 {
                return all;
            }
            all.push(window);
        }
    }

    /// Nothing is mapped, on either side, and nothing counts as mapped.
    fn is_empty(&self) -> bool {
        self.trim();
        let stats = self.stats();
        let mut device = self.device();
        let now = device.now;
        let usage = device.dart.usage(now);
        stats.mapped == 0
            && stats.mapped_bytes == 0
            && stats.used == 0
            && usage.entries == 0
            && usage.bytes == 0
    }
}

fn config(limit_bytes: u64, limit_entries: u32) -> Config {
    let mut ram = [RamRange::default(); 8];
    ram[0] = RamRange { start: 1 << 30, len: RAM };
    Config {
        limit_bytes,
        limit_entries,
        lines: LINES,
        ram,
        ram_count: 1,
        queues: QUEUES as u32,
        queue: std::ptr::null(),
        context: std::ptr::null_mut(),
        ring,
        status,
        lock,
        unlock,
    }
}

fn page(number: u64) -> u64 {
    (1 << 30) + number * 4096
}

#[test]
fn what_is_mapped_is_where_the_device_finds_it() {
    let module = Module::new(16 * MIB, 1024);
    let bus = module.map(page(5) + 12, 100).expect("maps");
    assert_eq!(bus % 4096, 12);
    let again = module.map(page(5), 4096).expect("maps");
    assert_eq!(again, bus - 12);
    {
        assert_eq!(module.device().dart.access(bus, 100), Some(page(5) + 12));
        assert_eq!(module.device().rings, 1, "the second one hit");
    }
    assert_eq!(module.windows().iter().map(|w| (w.references, w.live)).max(), Some((2, 4196)));
    assert!(module.unmap(bus, 100));
    assert!(!module.unmap(bus, 100), "was unmapped before");
    assert!(!module.unmap(0x42, 100), "was never mapped");
    assert!(module.unmap(again, 4096));
    assert!(module.is_empty());
}

#[test]
fn a_drivers_mistakes_take_nobody_elses_window() {
    let module = Module::new(16 * MIB, 1024);
    // SAFETY: the domain is valid.
    let release = |bus, len| unsafe { odma_core_release(module.core, bus, len) };
    let (first, second) =
        (module.map(page(5), 4096).expect("maps"), module.map(page(6), 4096).expect("maps"));
    assert_eq!(second - first, 4096, "both are in one window");
    assert_eq!((release(first, 4096), release(first, 4096)), (0, 1), "the second time nothing is there");
    assert_eq!(release(second + 16, 4080), 1, "nothing begins there");
    assert_eq!(module.windows().iter().map(|w| w.references).max(), Some(1), "the other one is still held");
    assert_eq!(release(second, 100), 2, "another length takes it down whole");
    assert_eq!(release(second, 4096), 1);
    assert!(module.is_empty());
}

#[test]
fn several_threads_under_pressure_leave_nothing_behind() {
    // An eighth of RAM.
    let module = Module::new(8 * MIB, 256);
    let rounds = if cfg!(debug_assertions) { 10_000 } else { 100_000 };
    let failed: u64 = std::thread::scope(|scope| {
        let module = &module;
        let work = |seed: u64| {
            let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1;
            let mut random = move |below: u64| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 33) % below
            };
            let (mut live, mut failed) = (Vec::new(), 0u64);
            for _ in 0..rounds {
                if !live.is_empty() && (live.len() > 80 || random(2) == 0) {
                    let (bus, start, len): (u64, u64, u64) =
                        live.swap_remove(random(live.len() as u64) as usize);
                    if random(16) == 0 {
                        assert_eq!(module.device().dart.access(bus, len), Some(start));
                    }
                    assert!(module.unmap(bus, len));
                } else {
                    let len = 1 + random(3 * 16384);
                    let start = (1 << 30) + random(RAM - len);
                    match module.map(start, len) {
                        Ok(bus) => live.push((bus, start, len)),
                        Err(_) => failed += 1,
                    }
                }
            }
            for (bus, _, len) in live {
                assert!(module.unmap(bus, len));
            }
            failed
        };
        let threads: Vec<_> = (0..4).map(|seed| scope.spawn(move || work(seed))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).sum()
    });
    let stats = module.stats();
    let hopeless = module.hopeless.load(Ordering::Relaxed);
    let gave_up = module.gave_up.load(Ordering::Relaxed);
    assert_eq!(stats.failures + hopeless + gave_up, failed, "each failure is counted");
    assert_eq!((stats.lost, stats.exchange.refused), (0, 0));
    assert!(stats.evicted > 0, "there was pressure");
    assert!(module.is_empty());
    let device = module.device();
    assert!(!device.probed, "the DART's limits were never asked beyond");
    assert_eq!(device.dart.panics(), 0);
}

#[test]
fn what_is_called_hopeless_is() {
    let module = Module::new(2 * MIB, 64);
    let mut state = 7u64;
    let mut random = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let (mut live, mut hopeless) = (Vec::new(), 0);
    for _ in 0..if cfg!(debug_assertions) { 20_000 } else { 200_000 } {
        if !live.is_empty() && random(2) == 0 {
            let (bus, len) = live.swap_remove(random(live.len() as u64) as usize);
            assert!(module.unmap(bus, len));
            continue;
        }
        let most = if random(4) == 0 { MIB } else { 8192 };
        let len = 1 + random(most);
        let start = (1 << 30) + random(RAM - len / 2);
        // SAFETY: the domain is valid, and one thread holds what lock there is.
        let (hit, said) =
            unsafe { (odma_core_hit(module.core, start, len), odma_core_hopeless(module.core, start, len)) };
        if hit != u64::MAX {
            live.push((hit, len));
            continue;
        }
        if said != 0 {
            hopeless += 1;
            let mut bus = 0;
            // SAFETY: as above.
            let code = unsafe { odma_core_map(module.core, 0, start, len, &mut bus) };
            assert_eq!(code, said, "{start:#x} {len:#x}");
        } else if let Ok(bus) = module.map(start, len) {
            live.push((bus, len));
        }
    }
    assert!(hopeless > 100, "it never came to that");
    for (bus, len) in live {
        assert!(module.unmap(bus, len));
    }
    assert!(module.is_empty());
}

#[test]
fn addresses_on_their_way_back_are_not_waited_for() {
    let module = Module::new(MIB, 64);
    let first = module.map(page(0), MIB).expect("fills everything");
    assert!(module.unmap(first, MIB));
    module.trim();
    let before = module.device().now;
    assert_eq!(module.map_at_once(page(1024), MIB), Err(RETURNING));
    assert!(module.device().now - before < 100, "a few exchanges, and no more");
    let stats = module.stats();
    assert_eq!((stats.exchange.returning, stats.exchange.no_space, stats.failures), (2, 0, 0));
    assert_eq!((stats.mapped, stats.used), (0, 0), "nothing is left of it");
    // Who may wait does, and asks again.
    module.device().now += DartConfig::MAC.return_delay;
    let second = module.map(page(1024), MIB).expect("fits once the first has returned");
    assert!(module.unmap(second, MIB));
    assert!(module.is_empty());
}

#[test]
fn what_is_being_given_back_is_no_room_yet_and_holds_nobody_up() {
    let module = Module::new(MIB, 64);
    let first = module.map(page(0), MIB - 65536).expect("nearly everything");
    assert!(module.unmap(first, MIB - 65536));
    let (queue, _turn) = module.turn();
    assert!(module.start_trim(queue));
    // Without having heard of its end: what fits beside it does, the rest may come later.
    let small = module.map_at_once(page(4096), 4096).expect("there is room for that");
    assert_eq!(module.map_at_once(page(1024), MIB / 2), Err(RETURNING));
    module.end_trim(queue);
    drop(_turn);
    module.device().now += DartConfig::MAC.return_delay;
    let large = module.map_at_once(page(1024), MIB / 2).expect("now there is room");
    assert!(module.unmap(large, MIB / 2) && module.unmap(small, 4096));
    assert!(module.is_empty());
}

#[test]
fn while_addresses_return_a_smaller_window_does() {
    const GRANULE: u64 = 16 << 10;
    let module = Module::new(MIB, 64);
    let most = module.map(page(0), MIB - GRANULE).expect("all but one granule");
    assert!(module.unmap(most, MIB - GRANULE));
    module.trim();
    // A window of more than a granule would be made with so much free; only one is free at once.
    let bus = module.map_at_once(page(4096), 4096).expect("finds the last granule");
    let stats = module.stats();
    assert!(stats.exchange.returning > 0);
    assert_eq!((stats.used, stats.used_bytes), (1, GRANULE));
    assert!(module.unmap(bus, 4096));
    assert!(module.is_empty());
}

#[test]
fn refusals_fail_the_call_and_leave_nothing() {
    use Mood::*;
    let moods = [
        (Batch(Status::Busy), 5, Status::Busy.code()),
        (Batch(Status::BadQueue), 5, Status::BadQueue.code()),
        (Batch(Status::Off), 5, Status::Off.code()),
        (Entries(Status::Gone), 5, Status::Gone.code()),
        (Entries(Status::Fragmented), 4, Status::Fragmented.code()),
        (Entries(Status::Returning), RETURNING, Status::Returning.code()),
        (Entries(Status::BadRange), 5, Status::BadRange.code()),
        (Silent, 5, u32::MAX),
    ];
    for (mood, failure, code) in moods {
        let module = Module::new(4 * MIB, 64);
        let keep = module.map(page(0), 4096).expect("while it is honest");
        module.device().mood = mood;
        assert_eq!(module.map_at_once(page(9000), 4096), Err(failure));
        let stats = module.stats();
        assert_eq!(
            stats.failures,
            u64::from(failure != RETURNING),
            "what may be tried again is no failure yet"
        );
        assert_eq!(stats.exchange.last_refusal, u64::from(code));
        module.device().mood = Honest;
        assert_eq!(module.device().dart.access(keep, 4096), Some(page(0)), "what was mapped stays");
        let bus = module.map(page(9000), 4096).expect("works again");
        assert!(module.unmap(bus, 4096) && module.unmap(keep, 4096));
        assert!(module.is_empty());
    }
}

#[test]
fn an_impossible_address_is_not_handed_out() {
    let module = Module::new(4 * MIB, 64);
    module.device().mood = Mood::Nonsense;
    assert_eq!(module.map(page(1), 4096), Err(5));
    assert!(module.stats().lost > 0, "what the host says is mapped stays counted");
}

#[test]
fn what_is_not_ram_is_refused_without_asking() {
    let module = Module::new(4 * MIB, 64);
    for (start, len) in
        [(0, 4096), ((1 << 30) + RAM, 4096), ((1 << 30) + RAM - 4096, 8192), (page(1), 0), (u64::MAX, 2)]
    {
        assert_eq!(module.map(start, len), Err(1), "{start:#x} {len:#x}");
    }
    assert_eq!(module.device().rings, 0);
    assert!(module.is_empty());
}

#[test]
fn limits_fail_the_call_that_exceeds_them_and_pass() {
    let module = Module::new(MIB, 8);
    let live: Vec<u64> = (0..8).map(|n| module.map(page(n * 512), 4096).expect("within the limit")).collect();
    assert_eq!(module.map(page(8 * 512), 4096), Err(3));
    assert!(module.unmap(live[3], 4096));
    let bus = module.map(page(8 * 512), 4096).expect("one is free again");
    assert_eq!(module.map(page(0), 2 * MIB), Err(2));
    for bus in live.iter().enumerate().filter(|(n, _)| *n != 3).map(|(_, bus)| *bus).chain([bus]) {
        assert!(module.unmap(bus, 4096));
    }
    assert!(module.is_empty());
}

#[test]
fn memory_that_is_too_small_or_limits_of_zero_make_no_domain() {
    let mut config = config(4 * MIB, 64);
    // SAFETY: valid configurations; no memory is used where it is too small.
    unsafe {
        let len = odma_core_bytes(&config);
        let mut memory = vec![0u64; len as usize / 8];
        assert!(odma_core_create(&config, memory.as_mut_ptr().cast(), len / 2).is_null());
        config.limit_entries = 0;
        assert_eq!(odma_core_bytes(&config), 0);
        assert!(odma_core_create(&config, memory.as_mut_ptr().cast(), len).is_null());
    }
    drop(Module::new(MIB, 4).memory);
}
