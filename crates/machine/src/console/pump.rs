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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ConsoleTarget;
    use outboard_bus::{IrqLine, MmioDevice, Width};
    use outboard_cli::FileTarget;
    use std::fs::File;
    use std::os::unix::fs::OpenOptionsExt;
    use std::time::Instant;

    /// Data and flag register, and the flag that the transmit FIFO is full (Arm DDI 0183, 3.3).
    const DR: u64 = 0x00;
    const FR: u64 = 0x18;
    const FR_TXFF: u64 = 1 << 5;
    /// Only a guest that is stopped for good takes as long.
    const LIMIT: Duration = Duration::from_secs(60);

    struct NoLine;

    impl IrqLine for NoLine {
        fn set(&self, _: bool) {}
    }

    /// A kernel that prints waits for its UART with interrupts off: what holds that up for ever stops a vCPU.
    #[test]
    fn a_console_that_nobody_reads_stops_neither_the_guest_nor_the_machine() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        let mut options = File::options();
        let _reader = options.read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        let target = ConsoleTarget::File(FileTarget { path, limit: None });
        let host = ConsoleHost::open(&target).unwrap();
        host.outlet().unwrap().begin().unwrap();
        let host = Arc::new(Mutex::new(host));
        let uart = Arc::new(Pl011::new(Arc::new(NoLine)).unwrap());
        let events = EventSender::nowhere();
        let pump = ConsolePump::start(uart.clone(), host.clone(), Arc::default(), events).unwrap();
        let start = Instant::now();
        for _ in 0..1 << 20 {
            while uart.read(FR, Width::B4).unwrap() & FR_TXFF != 0 {
                assert!(start.elapsed() < LIMIT, "the guest waits for its console");
                std::thread::yield_now();
            }
            uart.write(DR, Width::B4, b'x'.into()).unwrap();
        }
        drop(pump);
        drop(host);
        assert!(start.elapsed() < LIMIT);
    }
}
