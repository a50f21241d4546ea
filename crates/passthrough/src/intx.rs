//! The pin: a level-triggered line, released when the guest has handled the interrupt.
//!
//! The back end masks the pin when it fires. Somebody must notice that the guest is done, release the line and unmask. With a
//! [`crate::LevelBinder`] the kernel tells by the resample event. Without one (a Mac has nothing like it) the device is asked: the
//! interrupt status bit of STATUS (PCIe 7.5.1.1.4) says whether it still asserts its pin, and is asked for at growing intervals
//! until it does not. Unmasking at the next access to the device instead would need its BARs unmapped while an interrupt is pending,
//! which costs more than the interrupt.

use crate::IntxWiring;
use outboard_bus::{Event, Width, poll_readable, warn_limited};
use outboard_host_pci::{HostFunction, InterruptSink};
use outboard_jail::ThreadKind;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// First wait before the device is asked: about as long as a short interrupt handler in a guest.
const FIRST_WAIT: Duration = Duration::from_micros(50);
/// Longest: a handler that never comes costs a thousand config reads each five seconds.
const LONGEST_WAIT: Duration = Duration::from_millis(5);
/// STATUS, second half of COMMAND's dword.
const STATUS: u16 = 0x06;
/// STATUS: the function asserts its pin, or would if INTx were not disabled or masked.
const INTERRUPT_STATUS: u32 = 1 << 3;

/// The pin while it is in use. Dropping it releases the line; the back end's interrupts must be off by then.
pub(crate) struct Intx {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    host: Arc<dyn HostFunction>,
    wiring: IntxWiring,
    /// Signalled by the host's kernel, if the guest's takes it.
    trigger: Event,
    /// Signalled by the guest's end of interrupt.
    resample: Event,
    /// The pin has fired by a call.
    raised: Event,
    stop: Event,
    in_kernel: bool,
    /// Orders `raise` against the end: the line stays released afterwards.
    live: Mutex<bool>,
    running: AtomicBool,
}

impl Intx {
    /// Takes the line, and starts the thread that releases it.
    ///
    /// # Errors
    /// No file descriptors or threads are left.
    pub(crate) fn new(name: &str, host: Arc<dyn HostFunction>, wiring: IntxWiring) -> io::Result<Self> {
        let (trigger, resample) = (Event::new()?, Event::new()?);
        let (raised, stop) = (Event::new()?, Event::new()?);
        let in_kernel = match &wiring.kernel {
            Some(kernel) => {
                kernel.bind(&trigger, &resample).inspect_err(|error| warn_limited!("{name}: {error}")).is_ok()
            }
            None => false,
        };
        let (live, running) = (Mutex::new(true), AtomicBool::new(true));
        let shared =
            Arc::new(Shared { host, wiring, trigger, resample, raised, stop, in_kernel, live, running });
        let watcher = Arc::clone(&shared);
        // Owns the binding already, should there be no thread for it.
        let mut intx = Self { shared, thread: None };
        let name = format!("{name} intx");
        intx.thread = Some(outboard_jail::spawn(ThreadKind::Pci, &name, move || watcher.watch())?);
        Ok(intx)
    }

    pub(crate) fn sink(&self) -> Arc<dyn InterruptSink> {
        Arc::clone(&self.shared) as Arc<dyn InterruptSink>
    }
}

impl Drop for Intx {
    fn drop(&mut self) {
        self.shared.running.store(false, Ordering::SeqCst);
        self.shared.stop.signal();
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported by the panic hook; the line is released below all the same.
            let _ = thread.join();
        }
        *self.shared.live.lock().unwrap_or_else(|e| e.into_inner()) = false;
        if let Some(kernel) = self.shared.wiring.kernel.as_ref().filter(|_| self.shared.in_kernel) {
            kernel.unbind(&self.shared.trigger, &self.shared.resample);
        }
        self.shared.wiring.line.set(false);
    }
}

impl Shared {
    fn watch(&self) {
        while self.running.load(Ordering::SeqCst) {
            let fds = [self.stop.as_fd(), self.resample.as_fd(), self.raised.as_fd()];
            match poll_readable(&fds, None).as_deref() {
                Ok([false, resampled, raised]) => {
                    if *resampled && self.resample.take() {
                        self.unmask();
                    }
                    if *raised && self.raised.take() {
                        self.wait_for_the_guest();
                    }
                }
                _ => return,
            }
        }
    }

    /// Until the device no longer asserts its pin.
    fn wait_for_the_guest(&self) {
        let mut wait = FIRST_WAIT;
        while poll_readable(&[self.stop.as_fd()], Some(wait)).is_ok_and(|ready| !ready[0]) {
            match self.host.config_read(STATUS, Width::B2) {
                Ok(status) if status & INTERRUPT_STATUS != 0 => {
                    // Said again, since a kernel that drives the same line for another device may have released it.
                    self.assert_line();
                    wait = (2 * wait).min(LONGEST_WAIT);
                }
                // Handled, or gone.
                _ => {
                    self.wiring.line.set(false);
                    return self.unmask();
                }
            }
        }
    }

    /// Asserts the line, unless it was given up.
    fn assert_line(&self) -> bool {
        let live = self.live.lock().unwrap_or_else(|e| e.into_inner());
        if *live {
            self.wiring.line.set(true);
        }
        *live
    }

    fn unmask(&self) {
        if let Err(error) = self.host.unmask_intx() {
            warn_limited!("{}: its interrupt pin stays masked: {error}", self.host.identity().address);
        }
    }
}

impl InterruptSink for Shared {
    fn raise(&self, _: u16) {
        if self.assert_line() {
            self.raised.signal();
        }
    }

    fn event(&self, _: u16) -> Option<BorrowedFd<'_>> {
        self.in_kernel.then(|| self.trigger.as_fd())
    }
}
