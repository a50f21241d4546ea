//! Socket device (virtio 1.2, section 5.10): streams between programs of the guest and Unix sockets of the host.
//!
//! As Firecracker's users know it: a program of the host connects to PATH and writes `CONNECT PORT\n`; when a program of
//! the guest takes the connection it reads `OK HOSTPORT\n`, and data from there on. A connection of the guest to port N
//! of the host (context identifier 2) goes to the Unix socket `PATH_N`.

mod connection;
mod mux;
mod packet;

#[cfg(fuzzing)]
pub use mux::script;
pub use mux::{MAX_CONNECTIONS, VsockError};

use crate::pair::{Pair, PairWorker};
use crate::{Activation, QueueError, Request, Stop, VirtioDevice, WorkQueue};
use mux::Mux;
use outboard_bus::warn_limited;
use packet::{HEADER, Header};
use std::io;
use std::path::Path;

/// `VIRTIO_VSOCK_F_STREAM`.
const F_STREAM: u64 = 1 << 0;

/// Queue indices (virtio 1.2, section 5.10.2). The event queue carries word of a lost transport after migration only;
/// a reset of the device says the same, so no event is ever sent.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// Largest payload of a packet, in bytes: what Linux sends at most (`VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`).
const MAX_PAYLOAD: usize = 64 << 10;
/// Packets in one direction before the other one has its turn.
const BURST: usize = 64;

/// A socket device with Unix sockets on the host's side.
pub struct Vsock {
    name: String,
    guest_cid: u64,
    worker: PairWorker<Mux>,
}

impl Vsock {
    /// A device called `name` for a guest with the context identifier `guest_cid` (3 to 2^32 - 2). Listens at `path` from
    /// now on and removes that socket when dropped; a socket that a killed process left there is replaced.
    ///
    /// # Errors
    /// [`VsockError`]: a path in use, say.
    pub fn new(name: &str, guest_cid: u64, path: &Path) -> Result<Self, VsockError> {
        let mux = Mux::new(guest_cid, path)?;
        Ok(Self { name: name.to_owned(), guest_cid, worker: PairWorker::new(mux) })
    }
}

impl VirtioDevice for Vsock {
    fn device_id(&self) -> u16 {
        19
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn config(&self) -> Vec<u8> {
        self.guest_cid.to_le_bytes().to_vec()
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.worker.start(&self.name, activation, |mux, Pair { receive, transmit }, stop| {
            let mut port = Port {
                mux,
                receive,
                transmit,
                data: vec![0; MAX_PAYLOAD],
                sent: Request::default(),
                buffer: Request::default(),
                has_buffer: false,
            };
            port.run(stop);
        })
    }

    fn reset(&mut self) {
        self.worker.stop();
    }
}

/// The device at work: the queues and the host's side, on the worker's thread.
struct Port<'a, 'm> {
    mux: &'a mut Mux,
    receive: WorkQueue<'m>,
    transmit: WorkQueue<'m>,
    data: Vec<u8>,
    sent: Request<'m>,
    /// A receive buffer that was taken for a packet that did not come about.
    buffer: Request<'m>,
    has_buffer: bool,
}

impl Port<'_, '_> {
    /// Works until told to stop or until the driver breaks a queue.
    fn run(&mut self, stop: &Stop) {
        while !stop.requested() {
            match self.round() {
                Ok(true) => continue,
                Ok(false) => {}
                Err((RECEIVE, error)) => return self.receive.broken(&error),
                Err((_, error)) => return self.transmit.broken(&error),
            }
            if let Err(error) = self.mux.wait() {
                tracing::error!(
                    "vsock: waiting for sockets failed: {error}; the guest's sockets have stopped"
                );
                return;
            }
            self.receive.doorbell().take();
            self.transmit.doorbell().take();
        }
    }

    /// A bounded piece of work in each direction; whether there is more. An error names the queue that is broken.
    fn round(&mut self) -> Result<bool, (usize, QueueError)> {
        let sending = self.transmit_burst().map_err(|e| (TRANSMIT, e))?;
        let receiving = self.receive_burst().map_err(|e| (RECEIVE, e))?;
        Ok(sending || receiving)
    }

    fn transmit_burst(&mut self) -> Result<bool, QueueError> {
        self.transmit.disable_doorbell()?;
        for _ in 0..BURST {
            if !self.transmit.pop(&mut self.sent)? {
                self.transmit.notify_driver()?;
                return self.transmit.enable_doorbell();
            }
            self.transmit_one();
            self.transmit.complete(self.sent.head, 0)?;
        }
        self.transmit.notify_driver()?;
        Ok(true)
    }

    /// A packet whose length contradicts its buffers is dropped.
    fn transmit_one(&mut self) {
        let mut header = [0; HEADER];
        let readable = &mut self.sent.readable;
        if readable.read(&mut header) < HEADER {
            return warn_limited!("vsock: guest sent a packet without a whole header");
        }
        let header = Header::from_bytes(&header);
        let len = header.len as usize;
        if len > MAX_PAYLOAD || len as u64 > readable.len() {
            return warn_limited!(
                "vsock: guest sent a packet of {len} bytes in a buffer of {}",
                readable.len()
            );
        }
        let data = &mut self.data[..len];
        readable.read(data);
        self.mux.receive(&header, data);
    }

    fn receive_burst(&mut self) -> Result<bool, QueueError> {
        self.receive.disable_doorbell()?;
        for _ in 0..BURST {
            if !self.mux.has_packets() {
                self.receive.notify_driver()?;
                return Ok(false);
            }
            if !self.has_buffer && !self.receive.pop(&mut self.buffer)? {
                self.receive.notify_driver()?;
                return self.receive.enable_doorbell();
            }
            self.has_buffer = true;
            let Some(room) = self.buffer.writable.len().checked_sub(HEADER as u64) else {
                return Err(QueueError::TooShort(self.buffer.head));
            };
            let Some(header) = self.mux.next_packet(room as usize, &mut self.data) else { continue };
            let len = header.len as usize;
            self.buffer.writable.write(&header.to_bytes());
            self.buffer.writable.write(&self.data[..len]);
            self.has_buffer = false;
            self.receive.complete(self.buffer.head, (HEADER + len) as u32)?;
        }
        self.receive.notify_driver()?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests;
