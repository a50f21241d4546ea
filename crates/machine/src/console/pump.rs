use super::host::{ConsoleHost, Input};
use super::panic_watch::{Line, PanicWatch};
use crate::Error;
use crate::run::{EventSender, MachineEvent};
use outboard_bus::{Event, poll_readable, warn_limited};
use outboard_platform::Pl011;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// Time between two looks at a console that cannot be waited for.
const LOOK: Duration = Duration::from_millis(100);

/// The thread that carries bytes between a UART and the host. Dropping it lets out what the guest has printed, then ends it.
pub(crate) struct ConsolePump {
    stop: Arc<Event>,
    thread: Option<JoinHandle<()>>,
}

impl ConsolePump {
    /// Starts it.
    ///
    /// # Errors
    /// [`Error::Thread`].
    pub(crate) fn start(
        uart: Arc<Pl011>,
        host: Arc<Mutex<ConsoleHost>>,
        watch: Arc<PanicWatch>,
        events: EventSender,
    ) -> Result<Self, Error> {
        let stop = Arc::new(Event::new().map_err(Error::Thread)?);
        let stopped = stop.clone();
        let body = move || {
            let mut host = host.lock().unwrap_or_else(|e| e.into_inner());
            Pump { uart, watch, events, line: Line::default(), for_guest: Vec::new() }
                .run(&mut host, &stopped);
        };
        let thread = std::thread::Builder::new().name("console".into()).spawn(body).map_err(Error::Thread)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for ConsolePump {
    fn drop(&mut self) {
        self.stop.signal();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the console thread panicked; this is a bug in Outboard, please report it");
        }
    }
}

struct Pump {
    uart: Arc<Pl011>,
    watch: Arc<PanicWatch>,
    events: EventSender,
    line: Line,
    /// Typed, but the guest's FIFO had no room yet; nothing more is read meanwhile.
    for_guest: Vec<u8>,
}

impl Pump {
    fn run(&mut self, host: &mut ConsoleHost, stop: &Event) {
        loop {
            let mut fds = vec![stop.as_fd(), self.uart.wake().as_fd()];
            fds.extend(host.input().filter(|_| self.for_guest.is_empty()));
            let ready = match poll_readable(&fds, None) {
                Ok(ready) => ready,
                Err(error) => {
                    // A host without memory, say. A guest whose console nobody empties any more would stand still.
                    warn_limited!("waiting for the console: {error}; looking every {} ms", LOOK.as_millis());
                    std::thread::sleep(LOOK);
                    vec![stop.take()]
                }
            };
            self.uart.wake().take();
            self.print(host, stop);
            if ready[0] {
                return;
            }
            if ready.get(2) == Some(&true) && matches!(host.read(&mut self.for_guest), Input::Leave) {
                self.events.send(MachineEvent::Leave);
            }
            let taken = self.uart.receive(&self.for_guest);
            self.for_guest.drain(..taken);
        }
    }

    fn print(&mut self, host: &mut ConsoleHost, stop: &Event) {
        let mut output = Vec::new();
        self.uart.take_output(&mut output);
        let panicked = self.watch.scan(&mut self.line, &output);
        host.write(&output, stop);
        if panicked {
            self.events.send(MachineEvent::GuestPanic);
        }
    }
}
