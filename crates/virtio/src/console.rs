//! Console device (virtio 1.2, section 5.3) with one port.

use crate::{
    Activation, ActiveQueue, GuestMemory, Health, QueueError, Request, Stop, VirtioDevice, VirtioInterrupt,
    WorkQueue, Worker,
};
use outboard_bus::{Event, poll_readable, warn_limited};
use outboard_jail::ThreadKind;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

const QUEUE_SIZE: u16 = 64;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Bytes moved at a time, each way.
const CHUNK: usize = 4096;

/// The host's end of a console.
pub trait ConsoleBackend: Send {
    /// A descriptor that is readable when [`ConsoleBackend::read`] has something; `None` when there is no input.
    fn input(&self) -> Option<BorrowedFd<'_>>;

    /// Reads what is there without blocking; called when the descriptor is readable. `Ok(0)` when there is nothing
    /// after all: [`ConsoleBackend::input`] must then not stay readable.
    ///
    /// # Errors
    /// The host's; logged, and the console goes on.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize>;

    /// Writes `data`, or as much as goes out before `stop` is readable. May wait for the host's reader, so that the
    /// guest is held back; must return soon once `stop` is.
    fn write(&mut self, data: &[u8], stop: &Event);
}

/// A virtio console.
pub struct Console {
    name: String,
    /// Here while no worker has it.
    backend: Option<Box<dyn ConsoleBackend>>,
    worker: Option<Worker<Box<dyn ConsoleBackend>>>,
    health: Health,
}

impl Console {
    /// A console called `name` (for logs and its thread) that talks to `backend`.
    pub fn new(name: &str, backend: Box<dyn ConsoleBackend>) -> Self {
        Self { name: name.to_owned(), backend: Some(backend), worker: None, health: Health::default() }
    }
}

impl VirtioDevice for Console {
    fn device_id(&self) -> u16 {
        3
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn health(&self) -> &Health {
        &self.health
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    /// Columns, rows, ports, emergency write: each belongs to a feature that is not offered.
    fn config(&self) -> Vec<u8> {
        vec![0; 12]
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let Activation { memory, mut queues, interrupt, .. } = activation;
        let (Some(transmit), Some(receive)) = (queues.remove(TRANSMIT), queues.remove(RECEIVE)) else {
            return Ok(());
        };
        // An event of its own, signalled for a stop only: the backend waits for it while it writes.
        let wake = Arc::new(Event::new()?);
        let Some(backend) = self.backend.take() else {
            return Err(io::Error::other("the console's thread was lost"));
        };
        let stopped = Arc::clone(&wake);
        let for_failure = Arc::clone(&interrupt);
        let body = move |stop: &Stop| run(backend, [receive, transmit], &memory, interrupt, stop, &stopped);
        let kind = ThreadKind::Console;
        self.worker = Some(Worker::spawn(kind, &self.name, wake, &self.health, for_failure, body)?);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            self.backend = worker.stop();
        }
    }
}

/// The worker: gives the backend back when it is stopped or the driver broke a queue.
fn run(
    mut backend: Box<dyn ConsoleBackend>,
    [receive, transmit]: [ActiveQueue; 2],
    memory: &GuestMemory,
    interrupt: Arc<dyn VirtioInterrupt>,
    stop: &Stop,
    wake: &Event,
) -> Box<dyn ConsoleBackend> {
    let mut port = Port {
        receive: WorkQueue::new(receive, memory, Arc::clone(&interrupt)),
        transmit: WorkQueue::new(transmit, memory, interrupt),
        request: Request::default(),
        typed: Vec::with_capacity(CHUNK),
    };
    if let Err((error, queue)) = port.serve(&mut *backend, stop, wake) {
        match queue {
            RECEIVE => port.receive.broken(&error),
            _ => port.transmit.broken(&error),
        }
    }
    backend
}

struct Port<'m> {
    receive: WorkQueue<'m>,
    transmit: WorkQueue<'m>,
    request: Request<'m>,
    /// Read from the host, but the driver had no buffer yet; nothing more is read meanwhile.
    typed: Vec<u8>,
}

impl Port<'_> {
    fn serve(
        &mut self,
        backend: &mut dyn ConsoleBackend,
        stop: &Stop,
        wake: &Event,
    ) -> Result<(), (QueueError, usize)> {
        let (receive_bell, transmit_bell) =
            (Arc::clone(self.receive.doorbell()), Arc::clone(self.transmit.doorbell()));
        while !stop.requested() {
            receive_bell.take();
            transmit_bell.take();
            self.print(backend, stop, wake).map_err(|e| (e, TRANSMIT))?;
            self.give_typed().map_err(|e| (e, RECEIVE))?;
            let mut fds = vec![wake.as_fd(), receive_bell.as_fd(), transmit_bell.as_fd()];
            fds.extend(backend.input().filter(|_| self.typed.is_empty()));
            let ready = match poll_readable(&fds, None) {
                Ok(ready) => ready,
                Err(error) => {
                    warn_limited!("console: waiting for input failed: {error}");
                    return Ok(());
                }
            };
            if ready.get(3) == Some(&true) {
                self.read(backend);
            }
        }
        Ok(())
    }

    fn read(&mut self, backend: &mut dyn ConsoleBackend) {
        self.typed.resize(CHUNK, 0);
        let got = backend.read(&mut self.typed).unwrap_or_else(|error| {
            warn_limited!("console: reading input failed: {error}");
            0
        });
        self.typed.truncate(got);
    }

    /// What the driver transmits goes out.
    fn print(
        &mut self,
        backend: &mut dyn ConsoleBackend,
        stop: &Stop,
        wake: &Event,
    ) -> Result<(), QueueError> {
        let mut chunk = [0; CHUNK];
        loop {
            self.transmit.disable_doorbell()?;
            while !stop.requested() && self.transmit.pop(&mut self.request)? {
                loop {
                    let n = self.request.readable.read(&mut chunk);
                    if n == 0 || stop.requested() {
                        break;
                    }
                    backend.write(&chunk[..n], wake);
                }
                self.transmit.complete(self.request.head, 0)?;
            }
            self.transmit.notify_driver()?;
            if stop.requested() || !self.transmit.enable_doorbell()? {
                return Ok(());
            }
        }
    }

    /// What was typed goes into the driver's buffers, as far as it has any.
    fn give_typed(&mut self) -> Result<(), QueueError> {
        while !self.typed.is_empty() {
            if !self.receive.pop(&mut self.request)? {
                if self.receive.enable_doorbell()? {
                    continue;
                }
                break;
            }
            let given = self.request.writable.write(&self.typed);
            self.typed.drain(..given);
            self.receive.complete(self.request.head, given as u32)?;
        }
        self.receive.notify_driver()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Driver, RAM_BASE};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    /// A socket whose other end the test holds.
    struct Socket(UnixStream);

    impl ConsoleBackend for Socket {
        fn input(&self) -> Option<BorrowedFd<'_>> {
            Some(self.0.as_fd())
        }
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0.read(buffer)
        }
        fn write(&mut self, mut data: &[u8], stop: &Event) {
            while !data.is_empty() && outboard_bus::poll_writable(self.0.as_fd(), stop, None).unwrap() {
                match self.0.write(data) {
                    Ok(n) => data = &data[n..],
                    Err(e) => assert_eq!(e.kind(), io::ErrorKind::WouldBlock),
                }
            }
        }
    }

    fn console() -> (Driver, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut driver = Driver::new(Box::new(Console::new("con0", Box::new(Socket(ours)))));
        driver.start(u64::MAX, 64);
        (driver, theirs)
    }

    #[test]
    fn prints_and_types() {
        let (mut driver, mut host) = console();
        driver.request(TRANSMIT, b"hello host", 0);
        let mut got = [0; 10];
        host.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hello host");
        // Input before there is a buffer, into a buffer too small for it.
        host.write_all(b"hello guest").unwrap();
        assert_eq!(driver.request(RECEIVE, &[], 5), b"hello");
        assert_eq!(driver.request(RECEIVE, &[], 100), b" guest");
        // A buffer before there is input.
        let at = driver.alloc(64);
        driver.add(RECEIVE, &[(at, 64, true)]);
        driver.kick(RECEIVE);
        host.write_all(b"later").unwrap();
        assert_eq!(driver.wait_used(RECEIVE).1, 5);
        assert_eq!(driver.get(at, 5), b"later");
    }

    #[test]
    fn a_long_line_goes_out_whole() {
        let (mut driver, mut host) = console();
        let text: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
        let reader = std::thread::spawn(move || {
            let mut got = vec![0; 100_000];
            host.read_exact(&mut got).unwrap();
            got
        });
        driver.request(TRANSMIT, &text, 0);
        assert!(reader.join().unwrap() == text);
    }

    /// Nobody reads on the host's side: a reset still returns, and the console works afterwards.
    #[test]
    fn a_blocked_host_does_not_hang_a_reset() {
        let (mut driver, mut host) = console();
        let flood = driver.alloc(1 << 20);
        for _ in 0..8 {
            driver.add(TRANSMIT, &[(flood, 1 << 20, false)]);
        }
        driver.kick(TRANSMIT);
        driver.reset();
        driver.start(u64::MAX, 64);
        host.set_nonblocking(true).unwrap();
        let mut sink = vec![0; 1 << 20];
        while host.read(&mut sink).is_ok() {}
        host.set_nonblocking(false).unwrap();
        driver.request(TRANSMIT, b"back", 0);
        let mut got = [0; 4];
        host.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"back");
    }

    #[test]
    fn broken_queues_break_the_device_and_a_reset_mends_it() {
        let (mut driver, mut host) = console();
        for queue in [RECEIVE, TRANSMIT] {
            driver.add(queue, &[(1, 10, queue == RECEIVE)]);
            driver.kick(queue);
            host.write_all(b"x").unwrap();
            driver.wait_broken();
            driver.reset();
            driver.start(u64::MAX, 64);
        }
        driver.add(RECEIVE, &[(RAM_BASE, 0, true)]);
        driver.add(TRANSMIT, &[(RAM_BASE, 0, false)]);
        driver.kick(TRANSMIT);
        assert_eq!(driver.wait_used(TRANSMIT).1, 0);
    }
}
