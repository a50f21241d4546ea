//! In the lane with tight limits: drivers at work while there is no room for their mappings, and then again. They may fail, not lie and not hang.

use super::disk::GuestDisk;
use super::dma::{Stats, domains};
use super::function::GuestFunction;
use super::{Guest, load_module};
use crate::data::{Aligned, BLOCK, Pattern};
use crate::host::Dma;
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// The module `guest/module/tests/hog.c`, and where it takes commands.
const HOG: &str = "outboard_hog";
const RUN: &str = "/sys/kernel/debug/outboard_hog/run";
/// How long there is no room, and then room, for who asks again at once, and for who waits twice as long after each time that it was refused, as TCP
/// does: that gives up where there is room only half of the time.
const NO_ROOM: Duration = Duration::from_millis(300);
/// See [`NO_ROOM`].
pub const ROOM: Duration = NO_ROOM;
/// See [`NO_ROOM`].
pub const ROOM_FOR_TCP: Duration = Duration::from_millis(1500);
/// How long disks work without knowing when there is room.
const SPAN: Duration = Duration::from_secs(10);
/// Threads on a disk, and bytes of a request.
const THREADS: u64 = 6;
const PIECE: usize = 1 << 20;
/// Blocks of a request.
const BLOCKS: u64 = (PIECE / BLOCK) as u64;

/// Whether this case runs with tight limits.
pub fn wanted(guest: &Guest) -> Result<bool> {
    Ok(Dma::of(guest.arg("case")?) == Dma::Tight)
}

/// Takes all the room for a function's mappings away, and gives it back, over and over.
pub struct Hog {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<u64>>,
    address: String,
    failed_before: i64,
    refused_before: i64,
}

impl Hog {
    /// For `function`, whose driver is bound and stays so; there is room for `room` at a time.
    pub fn start(function: &GuestFunction, room: Duration) -> Result<Self> {
        ensure!(load_module(HOG)?, "there is no module {HOG}");
        let (stop, address) = (Arc::new(AtomicBool::new(false)), function.address.clone());
        let (failed_before, refused_before) = (failed(&address)?, own_refusals()?);
        let (stopped, of) = (stop.clone(), address.clone());
        let thread = thread::spawn(move || {
            let mut turns = 0;
            while !stopped.load(Ordering::Relaxed) {
                fs::write(RUN, format!("take {of}")).context("the hog does not take")?;
                thread::sleep(NO_ROOM);
                fs::write(RUN, "give").context("the hog does not give")?;
                thread::sleep(room);
                turns += 1;
            }
            Ok(turns)
        });
        Ok(Self { stop, thread, address, failed_before, refused_before })
    }

    /// Gives all back for good. Notes, as `pressure`, how often the driver was refused a mapping, and what else happened.
    pub fn end(self, guest: &Guest, errors: u64) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let turns = self.thread.join().expect("no panic")?;
        let own = own_refusals()? - self.refused_before;
        let refused = failed(&self.address)? - self.failed_before - own;
        guest.note("pressure", json!({ "turns": turns, "refused": refused, "errors": errors }));
        // It ends with the refusal of its smallest piece: there was no room at all.
        ensure!(turns > 0 && own >= turns as i64, "there was no pressure: {own} refusals in {turns} turns");
        Ok(())
    }
}

/// Calls that failed for the function.
fn failed(address: &str) -> Result<i64> {
    let start = format!("device {address} ");
    for folder in domains()? {
        let stats = Stats::read(&folder)?;
        let Some(line) = stats.text.lines().find(|line| line.starts_with(&start)) else { continue };
        let mut words = line.split(' ').skip_while(|word| *word != "failed");
        return words.nth(1).and_then(|word| word.parse().ok()).context("no count of failed calls");
    }
    Ok(0)
}

/// Calls of the hog that failed.
fn own_refusals() -> Result<i64> {
    let text = fs::read_to_string(RUN).context("cannot read what the hog has")?;
    let value = text.lines().find_map(|line| line.strip_prefix("refused ")?.parse().ok());
    value.context("the hog does not say how often it was refused")
}

/// In the tight lane: works the disk of `function`, driven by `driver`, with and without room, then binds the driver anew, since some give up. What
/// was read after it was written must be right.
pub fn on_disk(guest: &Guest, function: &GuestFunction, driver: &str) -> Result<()> {
    if !wanted(guest)? {
        return Ok(());
    }
    let disk = GuestDisk::direct(&function.disk()?)?;
    let hog = Hog::start(function, ROOM)?;
    let end = Instant::now() + SPAN;
    let errors = thread::scope(|scope| {
        let disk = &disk;
        let work = |index| scope.spawn(move || worker(disk, index, |_| Instant::now() < end));
        let threads: Vec<_> = (0..THREADS).map(work).collect();
        threads.into_iter().map(|thread| thread.join().expect("no thread panics")).sum::<Result<u64>>()
    });
    // First of all: the hog must be gone before the driver goes.
    hog.end(guest, errors.as_ref().copied().unwrap_or(0))?;
    errors?;
    drop(disk);
    rebind(function, driver)?;
    GuestDisk::of(function).map(drop)
}

/// Takes the driver away and gives it back.
pub fn rebind(function: &GuestFunction, driver: &str) -> Result<()> {
    function.unbind()?;
    function.bind(driver)
}

/// Writes and reads its part of the disk, [`BLOCKS`] long, while `more` of the round holds; the number of I/O errors. What was read must be right.
pub fn worker(disk: &GuestDisk, index: u64, more: impl Fn(u64) -> bool) -> Result<u64> {
    let (mut buffer, mut errors) = (Aligned::new(PIECE), 0);
    let first = index * BLOCKS;
    let at = first * BLOCK as u64;
    for round in (0..).take_while(|round| more(*round)) {
        let pattern = Pattern(round << 32 | index);
        pattern.blocks(first, buffer.get_mut());
        if disk.file().write_all_at(buffer.get(), at).is_err() {
            errors += 1;
            continue;
        }
        buffer.get_mut().fill(0);
        if disk.file().read_exact_at(buffer.get_mut(), at).is_err() {
            errors += 1;
            continue;
        }
        let wrong = pattern.first_difference(first, buffer.get());
        ensure!(wrong.is_none(), "block {wrong:?} holds wrong data in round {round}");
    }
    Ok(errors)
}
