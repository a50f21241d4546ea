//! What the C half calls. `core.h` declares the same; `tests/header.rs` compares the two.
#![allow(unsafe_code, reason = "the C half hands over pointers")]

use crate::domain::{Domain, Lock, Misuse, Queue};
use crate::exchange::{Counts, Device, Raw};
use crate::memory::{Cutter, Queues, bytes};
use crate::served::{Event, Slot, State, admit, next};
use crate::tracker::{Place, Tracker, places};
use core::ffi::c_void;
use core::mem::size_of;
use outboard_windows::{Bounds, Call, Failure, Limits, List, MAX_RAM_RANGES, Range, Storage, UNRESOLVED};

/// `struct odma_range`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct RamRange {
    /// First byte, guest-physical.
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

/// `struct odma_core_config`.
#[repr(C)]
pub struct Config {
    /// Most bytes mapped at a time.
    pub limit_bytes: u64,
    /// Most mappings at a time.
    pub limit_entries: u32,
    /// Entries that a queue has room for.
    pub lines: u32,
    /// Guest RAM.
    pub ram: [RamRange; MAX_RAM_RANGES],
    /// Number of `ram`.
    pub ram_count: u32,
    /// Number of queues.
    pub queues: u32,
    /// Where each queue is: `lines` entries of 64 bytes.
    pub queue: *const *mut u8,
    /// Given to the functions.
    pub context: *mut c_void,
    /// Rings the doorbell of a queue for this many entries.
    pub ring: extern "C" fn(*mut c_void, u32, u32),
    /// A queue's status.
    pub status: extern "C" fn(*mut c_void, u32) -> u32,
    /// Takes the lock around what all calls share; interrupts are off.
    pub lock: extern "C" fn(*mut c_void),
    /// Lets it go.
    pub unlock: extern "C" fn(*mut c_void),
}

/// One queue and the C half's functions for it.
pub struct Host {
    queue: *mut Raw,
    lines: u32,
    number: u32,
    context: *mut c_void,
    ring: extern "C" fn(*mut c_void, u32, u32),
    status: extern "C" fn(*mut c_void, u32) -> u32,
}

// SAFETY: used by the queue's owner only, on whichever CPU; none of it belongs to a thread.
unsafe impl Send for Host {}

/// The C half's lock.
pub struct CLock {
    context: *mut c_void,
    lock: extern "C" fn(*mut c_void),
    unlock: extern "C" fn(*mut c_void),
}

// SAFETY: a lock is there to be shared.
unsafe impl Sync for CLock {}

impl Lock for CLock {
    fn acquire(&self) {
        (self.lock)(self.context);
    }

    fn release(&self) {
        (self.unlock)(self.context);
    }
}

impl Device for Host {
    fn put(&mut self, index: u32, entry: Raw) {
        if index < self.lines {
            // SAFETY: within the queue (`odma_core_create`). Volatile: the device reads it.
            unsafe { self.queue.wrapping_add(index as usize).write_volatile(entry) };
        }
    }

    fn get(&mut self, index: u32) -> Raw {
        if index < self.lines {
            // SAFETY: as above; the device has written it.
            unsafe { self.queue.wrapping_add(index as usize).read_volatile() }
        } else {
            [u8::MAX; size_of::<Raw>()]
        }
    }

    fn ring(&mut self, count: u32) {
        (self.ring)(self.context, self.number, count);
    }

    fn status(&mut self) -> u32 {
        (self.status)(self.context, self.number)
    }
}

/// `struct odma_core`.
pub type Core = Domain<'static, Host, CLock>;

/// `enum odma_failure`: why a map call failed.
fn code(failure: Failure) -> i32 {
    match failure {
        Failure::NotRam(_) => 1,
        Failure::Bytes => 2,
        Failure::Entries => 3,
        Failure::NoSpace => 4,
        Failure::Host => 5,
        Failure::Returning => 6,
    }
}

fn plan(config: &Config) -> Option<(Bounds, Limits, [Range; MAX_RAM_RANGES], Queues)> {
    let limits = Limits { bytes: config.limit_bytes, entries: config.limit_entries };
    let mut ram = [Range::default(); MAX_RAM_RANGES];
    for (to, from) in ram.iter_mut().zip(config.ram.iter().take(config.ram_count as usize)) {
        *to = Range { start: from.start, len: from.len };
    }
    let queues =
        Queues { count: usize::from(u16::try_from(config.queues).ok()?), lines: config.lines as usize };
    let bounds = Storage::bounds(limits, &ram, queues.lines.checked_mul(queues.count)?).ok()?;
    (queues.count > 0).then_some((bounds, limits, ram, queues))
}

/// Places of a tracker of mappings.
fn tracked(limits: Limits, ram: &[Range]) -> usize {
    places(limits.bytes, ram.iter().fold(0, |sum, range| sum.saturating_add(range.len)))
}

/// Bytes of memory that a domain of this configuration needs; 0 if it cannot be.
///
/// # Safety
/// `config` is valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn odma_core_bytes(config: *const Config) -> u64 {
    // SAFETY: the caller's promise.
    let config = unsafe { &*config };
    let need = || {
        let (bounds, limits, ram, queues) = plan(config)?;
        bytes(bounds, tracked(limits, &ram), queues, size_of::<Core>(), size_of::<Queue<'_, Host>>())
    };
    need().unwrap_or(0) as u64
}

/// Makes a domain in `memory`; null if the configuration or the memory does not do. There is no function to destroy one: it owns nothing.
///
/// # Safety
/// `config` is valid; `memory` has `len` bytes that nobody else uses while the domain is used, and so have its queues.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn odma_core_create(config: *const Config, memory: *mut u8, len: u64) -> *const Core {
    // SAFETY: the caller's promise.
    let config = unsafe { &*config };
    let make = || {
        let (bounds, limits, ram, queues) = plan(config)?;
        // SAFETY: the caller's promise.
        let mut cutter = unsafe { Cutter::new(memory, usize::try_from(len).ok()?) };
        let place = cutter.room::<Core>(1)?;
        let storage = cutter.storage(bounds)?;
        let tracker = Tracker::new(cutter.slice::<Place>(tracked(limits, &ram))?);
        let all = cutter.room::<Queue<'static, Host>>(queues.count)?;
        for number in 0..queues.count {
            let call = Call::new(u16::try_from(number).ok()?, cutter.slice(queues.lines)?).ok()?;
            let host = Host {
                // SAFETY: the caller's promise: there are as many of them.
                queue: unsafe { config.queue.wrapping_add(number).read() }.cast(),
                lines: config.lines,
                number: u32::try_from(number).ok()?,
                context: config.context,
                ring: config.ring,
                status: config.status,
            };
            // SAFETY: within the room just cut off.
            unsafe { all.wrapping_add(number).write(Queue::new(call, host)) };
        }
        // SAFETY: all of them were just written; the block outlives the domain.
        let all = unsafe { core::slice::from_raw_parts(all, queues.count) };
        let lock = CLock { context: config.context, lock: config.lock, unlock: config.unlock };
        let domain = Domain::new(storage, limits, &ram, tracker, all, lock).ok()?;
        // SAFETY: room for one, aligned, cut off for it alone.
        unsafe { place.write(domain) };
        Some(place.cast_const())
    };
    make().unwrap_or(core::ptr::null())
}

/// The bus address of `len` bytes at `start` if a window covers them, with a reference taken; all ones if none does. Any context, no lock.
///
/// # Safety
/// `core` came from [`odma_core_create`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn odma_core_hit(core: *const Core, start: u64, len: u64) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { &*core }.hit(Range { start, len }).unwrap_or(UNRESOLVED)
}

/// Why `len` bytes at `start`, which were not hit, cannot be mapped now: an `enum odma_failure`; 0 if [`odma_core_map`] may do it. Any context, no
/// lock.
///
/// # Safety
/// As [`odma_core_hit`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn odma_core_hopeless(core: *const Core, start: u64, len: u64) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { &*core }.hopeless(Range { start, len }).map_or(0, code)
}

/// Drops the reference of `len` bytes at bus address `bus`: 0; 1 if nothing is mapped there; 2 if that has another length (it is dropped all the
/// same). Any context, no lock.
///
/// # Safety
/// As [`odma_core_hit`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn odma_core_release(core: *const Core, bus: u64, len: u64) -> i32 {
    // SAFETY: the caller's promise.
    match unsafe { &*core }.release(bus, len) {
        Ok(()) => 0,
        Err(Misuse::NotMapped) => 1,
        Err(Misuse::OtherLength) => 2,
    }
}

/// Maps `len` bytes at `start` by way of queue `queue` and writes their bus address to `bus`: 0, or an `enum odma_failure`.
///
/// # Safety
/// As [`odma_core_hit`]; interrupts are off, and nobody else uses that queue meanwhile; `bus` is valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn odma_core_map(
    core: *const Core,
    queue: u32,
    start: u64,
    len: u64,
    bus: *mut u64,
) -> i32 {
    // SAFETY: the caller's promise.
    match unsafe { (*core).map(queue as usize, Range { start, len }) } {
        Ok(address) => {
            // SAFETY: the caller's promise.
            unsafe { bus.write(address) };
            0
        }
        Err(failure) => code(failure),
    }
}

/// `struct odma_list`: a scatterlist, as the C half walks it.
#[repr(C)]
pub struct CList {
    /// Number of entries.
    pub count: u32,
    /// Not used.
    pub reserved: u32,
    /// Address and length of an entry.
    pub range: extern "C" fn(*mut CList, u32) -> RamRange,
    /// The bus address noted for an entry.
    pub bus: extern "C" fn(*mut CList, u32) -> u64,
    /// Notes one.
    pub set_bus: extern "C" fn(*mut CList, u32, u64),
}

struct Walk(*mut CList);

impl Walk {
    fn functions(&self) -> &CList {
        // SAFETY: `odma_core_map_list`'s caller keeps it valid; the functions in it do not change.
        unsafe { &*self.0 }
    }

    fn index(index: usize) -> u32 {
        u32::try_from(index).unwrap_or(u32::MAX)
    }
}

impl List for Walk {
    fn count(&self) -> usize {
        self.functions().count as usize
    }
    fn range(&self, index: usize) -> Range {
        let RamRange { start, len } = (self.functions().range)(self.0, Self::index(index));
        Range { start, len }
    }
    fn bus(&self, index: usize) -> u64 {
        (self.functions().bus)(self.0, Self::index(index))
    }
    fn set_bus(&mut self, index: usize, bus: u64) {
        (self.functions().set_bus)(self.0, Self::index(index), bus);
    }
}

/// Maps all entries of `list` or none: 0, or an `enum odma_failure`.
///
/// # Safety
/// As [`odma_core_map`]; `list` is valid, and its functions are for every index below its count.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn odma_core_map_list(core: *const Core, queue: u32, list: *mut CList) -> i32 {
    // SAFETY: the caller's promise.
    match unsafe { (*core).map_list(queue as usize, &mut Walk(list)) } {
        Ok(()) => 0,
        Err(failure) => code(failure),
    }
}

/// Puts a batch of idle windows into queue `queue` to be given back: how many entries, which the caller has the device work through. Then
/// [`odma_core_trimmed`]; 0 if nothing is idle.
///
/// # Safety
/// As [`odma_core_map`], until [`odma_core_trimmed`] has returned; interrupts may be on in between.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn odma_core_trim(core: *const Core, queue: u32) -> u32 {
    // SAFETY: the caller's promise.
    unsafe { (*core).trim(queue as usize) }
}

/// Takes over what the device has made of the entries of [`odma_core_trim`].
///
/// # Safety
/// As there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn odma_core_trimmed(core: *const Core, queue: u32) {
    // SAFETY: the caller's promise.
    unsafe { (*core).trimmed(queue as usize) }
}

/// `struct odma_core_stats`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct CoreStats {
    /// Bytes mapped, idle windows included.
    pub mapped_bytes: u64,
    /// Windows mapped, idle ones included.
    pub mapped: u64,
    /// Bytes of windows with references.
    pub used_bytes: u64,
    /// Windows with references.
    pub used: u64,
    /// Bytes of those that nobody asked for.
    pub slack: u64,
    /// Calls that needed the lock.
    pub misses: u64,
    /// Mappings made.
    pub maps: u64,
    /// Mappings taken down.
    pub unmaps: u64,
    /// Mappings made ahead of need.
    pub ahead: u64,
    /// Idle windows given back for room.
    pub evicted: u64,
    /// Idle windows given back because they were too large to use again.
    pub replaced: u64,
    /// Calls that failed, but for those that may be made again.
    pub failures: u64,
    /// Mappings that the host did not take down when asked.
    pub lost: u64,
    /// The exchanges.
    pub exchange: Counts,
}

/// Fills `stats`.
///
/// # Safety
/// As [`odma_core_hit`]; interrupts are off; `stats` is valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn odma_core_stats(core: *const Core, stats: *mut CoreStats) {
    // SAFETY: the caller's promise.
    let numbers = unsafe { &*core }.stats();
    let (used, own, (mapped_bytes, mapped)) = (numbers.pinned, numbers.planner, numbers.mapped);
    let filled = CoreStats {
        mapped_bytes,
        mapped: u64::from(mapped),
        used_bytes: used.bytes,
        used: u64::from(used.entries),
        slack: used.slack,
        misses: own.calls,
        maps: own.maps,
        unmaps: own.unmaps,
        ahead: own.ahead,
        evicted: own.evicted,
        replaced: own.replaced,
        failures: own.failures,
        lost: own.lost,
        exchange: numbers.exchanges,
    };
    // SAFETY: the caller's promise.
    unsafe { stats.write(filled) };
}

/// `struct odma_window`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct CWindow {
    /// Guest-physical address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Bus address.
    pub bus: u64,
    /// Mappings in it.
    pub references: u64,
    /// Bytes of those.
    pub live: u64,
}

/// Fills `window` with the first window in slot `from` or behind it: the slot behind that one, or 0 if there is none. Any context, no lock.
///
/// # Safety
/// As [`odma_core_hit`]; `window` is valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn odma_core_next_window(core: *const Core, from: u64, window: *mut CWindow) -> u64 {
    // SAFETY: the caller's promise.
    let domain = unsafe { &*core };
    let slots = domain.slots() as u64;
    let found = (from..slots).find_map(|at| Some((at, domain.window(usize::try_from(at).ok()?)?)));
    let Some((at, found)) = found else { return 0 };
    let (references, live) = (found.references, found.live);
    let filled = CWindow { start: found.range.start, len: found.range.len, bus: found.bus, references, live };
    // SAFETY: the caller's promise.
    unsafe { window.write(filled) };
    at.saturating_add(1)
}

/// What becomes of a function in `state` when `event` happens: its next state; what is to be done goes to `acts`. The numbers are those of
/// `served.rs`.
///
/// # Safety
/// `acts` is valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn odma_core_function_next(state: u32, event: u32, acts: *mut u32) -> u32 {
    let (state, what) = next(State::from_code(state), Event::from_code(event));
    // SAFETY: the caller's promise.
    unsafe { acts.write(what) };
    state as u32
}

/// Whether a driver of a function can be served; see [`Slot`] for the arguments and [`crate::served::Admission`] for the answer.
///
/// # Safety
/// None is needed: nothing is read through a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn odma_core_admit(closing: bool, running: bool, foreign: u32, using: u32) -> u32 {
    admit(Slot { closing, running, foreign, using }) as u32
}
