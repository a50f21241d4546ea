//! A disk that verifies data all the time, and so notices what is done to it by way of another device.

use crate::data::Pattern;
use crate::guest::disk::GuestDisk;
use anyhow::{Context, Result, bail};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Blocks of a round.
const BLOCKS: u64 = 64;
/// Most time for a round. A reset of another device holds up a vCPU for seconds.
const ROUND: Duration = Duration::from_secs(60);

#[derive(Default)]
struct Shared {
    rounds: AtomicU64,
    fault: Mutex<Option<String>>,
    stop: AtomicBool,
}

/// A thread that writes and verifies.
pub(super) struct Witness {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

impl Witness {
    /// On the disk called `name`.
    pub(super) fn start(name: &str) -> Result<Self> {
        let disk = GuestDisk::direct(name)?;
        let shared = Arc::new(Shared::default());
        let own = shared.clone();
        let thread = thread::Builder::new().name("witness".into()).spawn(move || {
            while !own.stop.load(Ordering::SeqCst) {
                let round = own.rounds.load(Ordering::SeqCst);
                let pattern = Pattern(round);
                let work = disk
                    .write_pattern(pattern, 0, BLOCKS)
                    .and_then(|()| disk.check_pattern(pattern, 0, BLOCKS));
                if let Err(error) = work {
                    let text = format!("round {round}: {error:#}");
                    *own.fault.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
                    return;
                }
                own.rounds.fetch_add(1, Ordering::SeqCst);
                // The attacks need the CPU, too.
                thread::sleep(Duration::from_millis(20));
            }
        })?;
        Ok(Self { shared, thread })
    }

    /// Rounds so far.
    pub(super) fn rounds(&self) -> u64 {
        self.shared.rounds.load(Ordering::SeqCst)
    }

    /// Waits until a round that began after `before` was verified.
    pub(super) fn wait_round(&self, before: u64) -> Result<()> {
        let deadline = Instant::now() + ROUND;
        while self.rounds() < before + 2 {
            if let Some(fault) = &*self.shared.fault.lock().unwrap_or_else(PoisonError::into_inner) {
                bail!("the device beside it failed: {fault}");
            }
            if Instant::now() > deadline {
                bail!("the device beside it stands still");
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Ends it; fails if it has failed.
    pub(super) fn end(self) -> Result<()> {
        self.wait_round(self.rounds())?;
        self.shared.stop.store(true, Ordering::SeqCst);
        self.thread.join().ok().context("the witness panicked")
    }
}
