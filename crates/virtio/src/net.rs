//! Network device (virtio 1.2, section 5.1) on the user-mode network stack.
//!
//! One thread works both queues and the stack, so that a packet changes threads nowhere between the driver and the
//! host's socket. Frames go up to 64 KiB and carry no checksums where the driver agrees.

use crate::pair::{Backend, Pair, PairWorker};
use crate::{Activation, Health, QueueError, Request, Stop, VirtioDevice, WorkQueue};
use outboard_bus::{Event, warn_limited};
use outboard_jail::ThreadKind;
use outboard_netstack::{Checksum, Frame, MAX_FRAME, NetError, NetOptions, PartialChecksum, Stack, address};
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

/// Feature bits (virtio 1.2, section 5.1.3).
mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
}

/// Queue indices (virtio 1.2, section 5.1.2).
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// A frame of 64 KiB takes 16 receive buffers of a page each: room for 32 of those.
const RECEIVE_SIZE: u16 = 512;
const TRANSMIT_SIZE: u16 = 256;

/// `VIRTIO_NET_S_LINK_UP` (virtio 1.2, section 5.1.4).
const LINK_UP: u16 = 1;
/// The status of a card whose network has failed.
const LINK_DOWN: u16 = 0;
/// `struct virtio_net_hdr` with `num_buffers`, which version 1 devices always have (virtio 1.2, section 5.1.6).
const HEADER: usize = 12;
/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`.
const NEEDS_CSUM: u8 = 1;

/// Frames taken from the driver before the stack and the other direction have their turn.
const BURST: usize = 64;

/// A network card whose cable leads into a [`Stack`].
pub struct Net {
    name: String,
    mac: [u8; 6],
    worker: PairWorker<Stack>,
}

impl Net {
    /// A card called `name` on a user-mode network of its own. Listens on forwarded ports from now on; connections that
    /// come before the driver is there wait.
    ///
    /// # Errors
    /// [`NetError`], such as a port in use.
    pub fn new(name: &str, options: &NetOptions) -> Result<Self, NetError> {
        let stack = Stack::new(options)?;
        for forward in stack.forwards() {
            tracing::info!(
                "{name}: {} {} leads to guest port {}",
                forward.protocol,
                forward.host,
                forward.guest_port
            );
        }
        let (mac, subnet) = (stack.mac(), stack.subnet());
        tracing::info!("{name}: the guest is {} on {subnet}, the host {}", subnet.guest(), subnet.gateway());
        Ok(Self { name: name.to_owned(), mac, worker: PairWorker::new(stack) })
    }
}

impl VirtioDevice for Net {
    fn device_id(&self) -> u16 {
        1
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn health(&self) -> &Health {
        self.worker.health()
    }

    fn features(&self) -> u64 {
        use feature::*;
        CSUM | GUEST_CSUM | MTU | MAC | MRG_RXBUF | STATUS
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![RECEIVE_SIZE, TRANSMIT_SIZE]
    }

    fn config(&self) -> Vec<u8> {
        let mut config = self.mac.to_vec();
        let link = if self.worker.health().failure().is_some() { LINK_DOWN } else { LINK_UP };
        config.extend(link.to_le_bytes());
        config.extend(1u16.to_le_bytes()); // max_virtqueue_pairs
        config.extend(address::MTU.to_le_bytes());
        config
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let features = activation.features;
        self.worker.start(&self.name, activation, move |stack, Pair { receive, transmit }, stop| {
            stack.offer_partial_checksums(features & feature::GUEST_CSUM != 0);
            let merge = features & feature::MRG_RXBUF != 0;
            let most = if merge { usize::from(receive.size()) } else { 1 };
            let mut card = Card {
                stack,
                receive,
                transmit,
                features,
                frame: vec![0; HEADER + MAX_FRAME],
                sent: Request::default(),
                buffers: ReceiveBuffers { most, ..Default::default() },
            };
            card.run(stop);
        })
    }

    fn reset(&mut self) {
        self.worker.stop();
    }
}

impl Backend for Stack {
    const KIND: ThreadKind = ThreadKind::Net;

    fn add_waker(&mut self, event: Arc<Event>) -> io::Result<()> {
        Self::add_waker(self, event)
    }

    fn reset(&mut self) {
        Self::reset(self);
    }
}

/// The card at work: the queues and the stack, on the worker's thread.
struct Card<'a, 'm> {
    stack: &'a mut Stack,
    receive: WorkQueue<'m>,
    transmit: WorkQueue<'m>,
    /// What the driver accepted.
    features: u64,
    /// Room for header and frame of what the driver sends.
    frame: Vec<u8>,
    sent: Request<'m>,
    buffers: ReceiveBuffers<'m>,
}

impl Card<'_, '_> {
    /// Works until told to stop or until the driver breaks a queue.
    fn run(&mut self, stop: &Stop) {
        while !stop.requested() {
            match self.round() {
                Ok(true) => continue,
                Ok(false) => {}
                Err((queue, error)) => {
                    match queue {
                        RECEIVE => self.receive.broken(&error),
                        _ => self.transmit.broken(&error),
                    }
                    return;
                }
            }
            if let Err(error) = self.stack.wait(None) {
                tracing::error!(
                    "network: waiting for sockets failed: {error}; the guest's network has stopped"
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
        self.stack.run();
        let receiving = self.deliver().map_err(|e| (RECEIVE, e))?;
        Ok(sending || receiving || self.stack.has_work())
    }

    /// Gives frames of the driver to the stack; whether there are more.
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

    /// Frames that are too short or too long for the link are dropped, as a real card does.
    fn transmit_one(&mut self) {
        if self.sent.readable.len() > self.frame.len() as u64 {
            return;
        }
        let len = self.sent.readable.read(&mut self.frame);
        let Some((header, frame)) = self.frame[..len].split_at_checked(HEADER) else { return };
        let left_out = header[0] & NEEDS_CSUM != 0 && self.features & feature::CSUM != 0;
        self.stack.push(frame, if left_out { Checksum::Ignore } else { Checksum::Complete });
    }

    /// Gives the stack's frames to the driver; whether more buffers came just when there seemed to be none.
    fn deliver(&mut self) -> Result<bool, QueueError> {
        self.receive.disable_doorbell()?;
        while let Some(frame) = self.stack.front() {
            let len = HEADER + frame.bytes().len();
            match self.buffers.take(&mut self.receive, len)? {
                Taken::Enough => self.buffers.fill(&mut self.receive, frame)?,
                Taken::TooSmall => {
                    warn_limited!("the guest's receive buffers are too small for a frame of {len} bytes")
                }
                Taken::NotYet => {
                    self.receive.notify_driver()?;
                    return self.receive.enable_doorbell();
                }
            }
            self.stack.pop();
        }
        self.receive.notify_driver()?;
        Ok(false)
    }
}

/// Receive buffers that were taken off the queue for the next frame.
#[derive(Default)]
struct ReceiveBuffers<'m> {
    /// In the driver's order.
    taken: VecDeque<Request<'m>>,
    /// How many may hold one frame together: one, or as many as the queue has if the driver merges them.
    most: usize,
    /// Bytes in all that were taken.
    room: u64,
    /// Requests to use again.
    spare: Vec<Request<'m>>,
    /// Head and bytes written, while a frame is delivered.
    used: Vec<(u16, u32)>,
}

enum Taken {
    Enough,
    /// The driver has to give more. What was taken stays taken: only so will the driver's next buffer ring the doorbell.
    NotYet,
    /// No number of buffers that the driver can give is enough.
    TooSmall,
}

impl<'m> ReceiveBuffers<'m> {
    /// Takes buffers off `queue` until there is room for `len` bytes.
    fn take(&mut self, queue: &mut WorkQueue<'m>, len: usize) -> Result<Taken, QueueError> {
        while self.room < len as u64 {
            if self.taken.len() >= self.most {
                return Ok(Taken::TooSmall);
            }
            let mut request = self.spare.pop().unwrap_or_default();
            if !queue.pop(&mut request)? {
                self.spare.push(request);
                return Ok(Taken::NotYet);
            }
            self.room += request.writable.len();
            self.taken.push_back(request);
        }
        Ok(Taken::Enough)
    }

    /// Writes header and frame into buffers that have room for them, and gives those to the driver.
    fn fill(&mut self, queue: &mut WorkQueue<'m>, frame: &Frame) -> Result<(), QueueError> {
        let len = (HEADER + frame.bytes().len()) as u64;
        let mut room = 0;
        let count = self.taken.iter().take_while(|request| {
            let needed = room < len;
            room += request.writable.len();
            needed
        });
        let mut header = header(frame.partial_checksum());
        // No more buffers than the queue's size, which is 16 bits wide.
        header[10..].copy_from_slice(&(count.count() as u16).to_le_bytes());
        let (mut header, mut data) = (&header[..], frame.bytes());
        while !(header.is_empty() && data.is_empty()) {
            let Some(mut request) = self.taken.pop_front() else {
                unreachable!("there is room for {len} bytes")
            };
            self.room -= request.writable.len();
            let in_header = request.writable.write(header);
            header = &header[in_header..];
            let in_data = request.writable.write(data);
            data = &data[in_data..];
            self.used.push((request.head, (in_header + in_data) as u32));
            self.spare.push(request);
        }
        queue.complete_together(&self.used)?;
        self.used.clear();
        Ok(())
    }
}

/// `struct virtio_net_hdr`, without `num_buffers`.
fn header(checksum: Option<PartialChecksum>) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    if let Some(PartialChecksum { start, offset }) = checksum {
        header[0] = NEEDS_CSUM;
        header[6..8].copy_from_slice(&start.to_le_bytes());
        header[8..10].copy_from_slice(&offset.to_le_bytes());
    }
    header
}

#[cfg(test)]
mod tests;
