//! A virtqueue as a device's worker sees it: requests with checked buffers in, completions and interrupts out.

use crate::{ActiveQueue, GuestMemory, Stop, VirtioInterrupt};
use outboard_bus::Event;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory as _, Permissions, VolatileSlice};

/// The driver wants no interrupts (virtio 1.2, section 2.7.6); without `VIRTIO_F_EVENT_IDX` only.
const VRING_AVAIL_F_NO_INTERRUPT: u16 = 1;

/// Completions without an interrupt at most, so that a driver with a long queue is not idle until the end of it.
const MAX_BATCH: u32 = 16;

/// A piece of guest memory that lies wholly in RAM.
pub type GuestSlice<'m> = VolatileSlice<'m, ()>;

/// The driver broke the rules of the virtqueue; the device cannot go on until it is reset.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The rings are not usable, or the available index ran ahead of the queue.
    #[error("virtqueue: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// The chain loops, leaves its table, nests indirect tables, is longer than the queue or than 4 GiB.
    #[error("descriptor chain {0} is malformed")]
    Malformed(u16),
    /// A device-readable buffer comes after a device-writable one (virtio 1.2, section 2.7.4.2).
    #[error("descriptor chain {0} has a readable buffer after a writable one")]
    Order(u16),
    /// A buffer is not in RAM.
    #[error("descriptor chain {head}: buffer {address:#x}+{len:#x} is not in RAM")]
    OutsideRam {
        /// Head of the chain.
        head: u16,
        /// Guest-physical address of the buffer.
        address: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// The buffers are too small for the device's header or answer.
    #[error("descriptor chain {0} is too short for the request")]
    TooShort(u16),
}

/// Buffers of one direction, consumed from the front.
#[derive(Debug, Default)]
pub struct Buffers<'m> {
    slices: Vec<GuestSlice<'m>>,
    /// Slices before this one are used up.
    first: usize,
    len: u64,
}

impl<'m> Buffers<'m> {
    fn clear(&mut self) {
        self.slices.clear();
        self.first = 0;
        self.len = 0;
    }

    fn push(&mut self, slice: GuestSlice<'m>) {
        self.len += slice.len() as u64;
        self.slices.push(slice);
    }

    /// Bytes left.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What is left, in order; no slice is empty.
    pub fn slices(&self) -> &[GuestSlice<'m>] {
        &self.slices[self.first..]
    }

    /// Copies from the front into `out` and consumes that; the number of bytes, less than asked for only at the end.
    pub fn read(&mut self, out: &mut [u8]) -> usize {
        self.consume(out.len(), |done, slice| slice.copy_to(&mut out[done..done + slice.len()]))
    }

    /// Copies `data` to the front and consumes that; the number of bytes, less than given only at the end.
    pub fn write(&mut self, data: &[u8]) -> usize {
        self.consume(data.len(), |done, slice| {
            slice.copy_from(&data[done..done + slice.len()]);
            slice.len()
        })
    }

    /// Moves up to `count` bytes from the front to the end of `piece`; the number of bytes, less than asked for only at the end.
    pub fn take(&mut self, count: u64, piece: &mut Vec<GuestSlice<'m>>) -> u64 {
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        let taken = self.consume(count, |_, slice| {
            piece.push(slice);
            slice.len()
        });
        taken as u64
    }

    fn consume(&mut self, count: usize, mut each: impl FnMut(usize, GuestSlice<'m>) -> usize) -> usize {
        let mut done = 0;
        while done < count && self.first < self.slices.len() {
            let slice = self.slices[self.first];
            let part = slice.len().min(count - done);
            let (now, rest) = (slice.subslice(0, part), slice.offset(part));
            let (Ok(now), Ok(rest)) = (now, rest) else { unreachable!("part is within the slice") };
            each(done, now);
            done += part;
            if rest.is_empty() {
                self.first += 1;
            } else {
                self.slices[self.first] = rest;
            }
        }
        self.len -= done as u64;
        done
    }

    /// Takes the last byte away, where devices put their status.
    pub fn pop_last_byte(&mut self) -> Option<GuestSlice<'m>> {
        if self.is_empty() {
            return None;
        }
        let last = self.slices.last_mut()?;
        let (Ok(rest), Ok(byte)) = (last.subslice(0, last.len() - 1), last.offset(last.len() - 1)) else {
            unreachable!("no slice is empty")
        };
        if rest.is_empty() {
            self.slices.pop();
        } else {
            *last = rest;
        }
        self.len -= 1;
        Some(byte)
    }
}

/// One request of the driver: a descriptor chain whose buffers were all found in RAM. Reused from request to request,
/// so that the usual one allocates nothing.
#[derive(Debug, Default)]
pub struct Request<'m> {
    /// Head of the chain, for [`WorkQueue::complete`].
    pub head: u16,
    /// What the driver gives.
    pub readable: Buffers<'m>,
    /// Where the driver wants the answer.
    pub writable: Buffers<'m>,
}

/// A virtqueue in a worker's hands.
pub struct WorkQueue<'m> {
    queue: Queue,
    memory: &'m GuestMemory,
    index: u16,
    doorbell: Arc<Event>,
    interrupt: Arc<dyn VirtioInterrupt>,
    /// The used index up to which the driver was told of completions, or did not want to be.
    told: u16,
}

impl<'m> WorkQueue<'m> {
    /// Takes over `active`, whose rings and buffers are in `memory`.
    pub fn new(active: ActiveQueue, memory: &'m GuestMemory, interrupt: Arc<dyn VirtioInterrupt>) -> Self {
        let ActiveQueue { index, queue, doorbell } = active;
        let told = queue.next_used();
        Self { queue, memory, index, doorbell, interrupt, told }
    }

    /// Number of descriptors, which is the most chains there can be.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The queue's doorbell.
    pub fn doorbell(&self) -> &Arc<Event> {
        &self.doorbell
    }

    /// Takes the next available request into `request`; `false` if there is none.
    ///
    /// # Errors
    /// [`QueueError`]: the device is broken.
    pub fn pop(&mut self, request: &mut Request<'m>) -> Result<bool, QueueError> {
        request.readable.clear();
        request.writable.clear();
        let size = self.queue.size();
        let Some(chain) = self.queue.iter(self.memory)?.next() else { return Ok(false) };
        let head = chain.head_index();
        request.head = head;
        let mut descriptors = 0;
        let mut ended = false;
        for descriptor in chain {
            descriptors += 1;
            // A chain is not longer than the queue, with indirect descriptors too (virtio 1.2, section 2.7.5.3.1).
            if descriptors > size {
                return Err(QueueError::Malformed(head));
            }
            ended = !descriptor.has_next();
            let (buffers, access) = match descriptor.is_write_only() {
                true => (&mut request.writable, Permissions::Write),
                false if request.writable.is_empty() => (&mut request.readable, Permissions::Read),
                false => return Err(QueueError::Order(head)),
            };
            let (address, len) = (descriptor.addr(), descriptor.len());
            let outside = || QueueError::OutsideRam { head, address: address.0, len };
            for slice in self.memory.get_slices(address, len as usize, access).map_err(|_| outside())? {
                let slice = slice.map_err(|_| outside())?;
                if !slice.is_empty() {
                    buffers.push(slice);
                }
            }
        }
        // The iterator stops silently at whatever it does not like: then its last descriptor promised another.
        if ended { Ok(true) } else { Err(QueueError::Malformed(head)) }
    }

    /// Returns chain `head` to the driver with `written` bytes of its writable buffers filled.
    ///
    /// # Errors
    /// [`QueueError::Ring`].
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        Ok(self.queue.add_used(self.memory, head, written)?)
    }

    /// Returns several chains (head, bytes written) so that the driver sees all of them or none yet, as buffers that
    /// hold one network frame between them need.
    ///
    /// # Errors
    /// [`QueueError::Ring`].
    pub fn complete_together(&mut self, chains: &[(u16, u32)]) -> Result<(), QueueError> {
        let Some(((head, written), others)) = chains.split_last() else { return Ok(()) };
        let first = self.queue.next_used();
        for (i, (head, written)) in (0u16..).zip(others) {
            let slot = u64::from(first.wrapping_add(i) % self.queue.size());
            // Flags and index, then eight bytes for each element (virtio 1.2, section 2.7.8).
            let address = GuestAddress(self.queue.used_ring()).checked_add(4 + 8 * slot);
            let address = address.ok_or(virtio_queue::Error::AddressOverflow)?;
            let element = u64::from(*head) | u64::from(*written) << 32;
            self.memory.write_obj(element.to_le(), address).map_err(virtio_queue::Error::GuestMemory)?;
        }
        self.queue.set_next_used(first.wrapping_add(others.len() as u16));
        // Publishes the index, and with it the elements before.
        self.complete(*head, *written)
    }

    /// Interrupts the driver if it wants to hear about what was completed since the last time (virtio 1.2, section
    /// 2.7.7.2). Not `Queue::needs_notification`, which knows nothing of completions that became visible together.
    ///
    /// # Errors
    /// [`QueueError::Ring`].
    pub fn notify_driver(&mut self) -> Result<(), QueueError> {
        let (old, new) = (self.told, self.queue.next_used());
        if old == new {
            return Ok(());
        }
        self.told = new;
        // The used index must be visible before the driver's wish is read: it writes the wish and then reads the index.
        fence(Ordering::SeqCst);
        let wanted = if self.queue.event_idx_enabled() {
            let event = self.avail_field(4 + 2 * u64::from(self.queue.size()))?;
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.avail_field(0)? & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        if wanted {
            self.interrupt.queue_used(self.index);
        }
        Ok(())
    }

    /// The 16-bit field at `offset` of the available ring.
    fn avail_field(&self, offset: u64) -> Result<u16, QueueError> {
        let address = GuestAddress(self.queue.avail_ring()).checked_add(offset);
        let address = address.ok_or(virtio_queue::Error::AddressOverflow)?;
        let field = self.memory.load(address, Ordering::Relaxed).map_err(virtio_queue::Error::GuestMemory)?;
        Ok(u16::from_le(field))
    }

    /// Asks the driver to ring the doorbell for the next request; `true` if one came meanwhile without it.
    ///
    /// # Errors
    /// [`QueueError::Ring`].
    pub fn enable_doorbell(&mut self) -> Result<bool, QueueError> {
        Ok(self.queue.enable_notification(self.memory)?)
    }

    /// Tells the driver that it need not ring while requests are being worked.
    ///
    /// # Errors
    /// [`QueueError::Ring`].
    pub fn disable_doorbell(&mut self) -> Result<(), QueueError> {
        Ok(self.queue.disable_notification(self.memory)?)
    }

    /// Gives up on the queue: the driver is told that the device needs a reset.
    pub fn broken(&self, error: &QueueError) {
        self.interrupt.device_broken(&format!("queue {}: {error}", self.index));
    }

    /// Works the queue until `stop`, one request at a time: `handle` returns the bytes it wrote. Each batch of requests
    /// that are there together gets one interrupt, as far as the driver wants any. Ends early if the queue breaks.
    pub fn serve(
        &mut self,
        stop: &Stop,
        mut handle: impl FnMut(&mut Request<'m>) -> Result<u32, QueueError>,
    ) {
        let mut request = Request::default();
        let doorbell = Arc::clone(&self.doorbell);
        loop {
            if let Err(error) = self.drain(stop, &mut request, &mut handle) {
                self.broken(&error);
                return;
            }
            if !stop.wait(&doorbell) {
                return;
            }
        }
    }

    fn drain(
        &mut self,
        stop: &Stop,
        request: &mut Request<'m>,
        handle: &mut impl FnMut(&mut Request<'m>) -> Result<u32, QueueError>,
    ) -> Result<(), QueueError> {
        loop {
            self.disable_doorbell()?;
            let mut batch = 0;
            while !stop.requested() && self.pop(request)? {
                let written = handle(request)?;
                self.complete(request.head, written)?;
                batch += 1;
                if batch % MAX_BATCH == 0 {
                    self.notify_driver()?;
                }
            }
            self.notify_driver()?;
            if stop.requested() || !self.enable_doorbell()? {
                return Ok(());
            }
        }
    }
}
