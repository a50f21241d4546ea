//! SIGTERM and its like, on a thread of their own.

use crate::Error;
use crate::run::{EventSender, MachineEvent};
use crate::terminal::restore_terminal;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals as Iterator};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// How long the machine may take to stop hard before the process just ends.
const LAST_RESORT: Duration = Duration::from_secs(10);

/// Turns termination signals into events while it lives.
pub(crate) struct Signals {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
    count: Arc<AtomicU32>,
}

impl Signals {
    /// Catches SIGTERM, SIGINT and SIGHUP.
    ///
    /// # Errors
    /// [`Error::Thread`].
    pub(crate) fn install(events: EventSender) -> Result<Self, Error> {
        let mut signals = Iterator::new([SIGTERM, SIGINT, SIGHUP]).map_err(Error::Thread)?;
        let handle = signals.handle();
        let count = Arc::new(AtomicU32::new(0));
        let counter = count.clone();
        let body = move || {
            for _ in signals.forever() {
                events.send(MachineEvent::Terminate);
                if counter.fetch_add(1, Ordering::Relaxed) + 1 == 2 {
                    end_if_stuck();
                }
            }
        };
        let thread = std::thread::Builder::new().name("signals".into()).spawn(body).map_err(Error::Thread)?;
        Ok(Self { handle, thread: Some(thread), count })
    }

    /// The user has asked for an end.
    pub(crate) fn terminated(&self) -> bool {
        self.count.load(Ordering::Relaxed) > 0
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        self.handle.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A host that does not answer (a dead network file system under a disk) must not keep the process from ending.
fn end_if_stuck() {
    std::thread::spawn(|| {
        std::thread::sleep(LAST_RESORT);
        restore_terminal();
        outboard_cli::say!(
            "outboard: still not stopped {} s after the second request; ending the process",
            LAST_RESORT.as_secs()
        );
        outboard_cli::flush(Duration::from_secs(1));
        std::process::exit(crate::EXIT_KILLED);
    });
}
