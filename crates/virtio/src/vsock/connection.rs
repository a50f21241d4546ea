use super::packet::{Header, NO_BOTH, NO_RECEIVE, NO_SEND, op};
use mio::net::UnixStream;
use socket2::SockRef;
use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::time::Instant;

/// Receive buffer that the guest is told of, in bytes: what it may have under way to a program that does not read.
pub const BUFFER: u32 = 128 << 10;

/// Which connection: both ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    pub host: u32,
    pub guest: u32,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Phase {
    /// A program of the host connected and has not said yet where to.
    Greeting(Vec<u8>),
    /// The guest was asked, or is to be.
    Requested,
    Open,
    /// Over; waits only for its RST to be sent.
    Dead,
    /// The guest's side is over; the host's program has not taken all that came before.
    Draining,
}

/// A stream between a program of the host, at a Unix socket, and one of the guest.
pub struct Connection {
    pub key: Key,
    pub phase: Phase,
    pub stream: UnixStream,
    /// When it has to be over or further.
    pub deadline: Option<Instant>,
    /// In the list of those that may have something for the guest.
    pub queued: bool,
    pub readable: bool,
    pub writable: bool,
    /// A one-shot packet for the guest: REQUEST, RESPONSE or RST; 0 if none.
    pub announce: u16,
    /// The guest's receive buffer, what it took out of it, what was sent so far; the latter two wrap.
    guest_buffer: u32,
    guest_forwarded: u32,
    sent: u32,
    credit_requested: bool,
    credit_wanted: bool,
    /// What came from the guest and the host's program has not taken; at most [`BUFFER`] bytes.
    to_host: VecDeque<u8>,
    /// Bytes passed on to the host, and how many the guest knows of; both wrap.
    forwarded: u32,
    told: u32,
    /// What the guest has shut down, in its words.
    guest_ended: u32,
    /// What we have shut down, in our words, and how much of that was told.
    host_ended: u32,
    host_ended_told: u32,
    write_ended: bool,
    /// The host's program reads no more: its socket refused a write.
    host_deaf: bool,
}

/// A packet for the guest, as far as the connection knows it.
#[derive(Debug, PartialEq, Eq)]
pub struct Outgoing {
    pub op: u16,
    pub flags: u32,
    pub len: usize,
}

impl Outgoing {
    fn control(op: u16) -> Self {
        Self { op, flags: 0, len: 0 }
    }
}

impl Connection {
    pub fn new(key: Key, stream: UnixStream, phase: Phase) -> Self {
        Self {
            key,
            phase,
            stream,
            deadline: None,
            queued: false,
            readable: false,
            writable: false,
            announce: 0,
            guest_buffer: 0,
            guest_forwarded: 0,
            sent: 0,
            credit_requested: false,
            credit_wanted: false,
            to_host: VecDeque::new(),
            forwarded: 0,
            told: 0,
            guest_ended: 0,
            host_ended: 0,
            host_ended_told: 0,
            write_ended: false,
            host_deaf: false,
        }
    }

    /// Bytes passed on so far, for the header of each packet; the guest knows of them once it is sent.
    pub fn forwarded_now_told(&mut self) -> u32 {
        self.told = self.forwarded;
        self.forwarded
    }

    /// Ends the connection; the guest is told.
    pub fn kill(&mut self) {
        self.phase = Phase::Dead;
        self.announce = op::RST;
    }

    /// Notes what every packet of the guest says about its buffer.
    pub fn note_credit(&mut self, header: &Header) {
        self.guest_buffer = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
        self.credit_requested = false;
    }

    /// Takes data of the guest. More than it was allowed to send ends the connection.
    pub fn receive(&mut self, data: &[u8]) {
        let in_order = self.phase == Phase::Open && self.guest_ended & NO_SEND == 0;
        if !in_order || self.to_host.len() + data.len() > BUFFER as usize {
            return self.kill();
        }
        if self.host_deaf {
            return self.discard(data.len());
        }
        let direct = if self.to_host.is_empty() && self.writable { self.write_direct(data) } else { 0 };
        self.to_host.extend(&data[direct..]);
        self.flush();
    }

    /// Counts `len` bytes as passed on that nobody reads any more.
    fn discard(&mut self, len: usize) {
        self.forwarded = self.forwarded.wrapping_add(len as u32);
    }

    /// The host's program reads no more. What it has written before still goes to the guest.
    pub fn host_hung_up(&mut self) {
        self.host_deaf = true;
        self.host_gone();
        self.discard(self.to_host.len());
        self.to_host.clear();
    }

    /// Writes without a detour through the buffer, which is what happens while the host's program keeps up.
    fn write_direct(&mut self, data: &[u8]) -> usize {
        match self.stream.write(data) {
            Ok(n) => {
                self.forwarded = self.forwarded.wrapping_add(n as u32);
                self.writable = n == data.len();
                n
            }
            // The next write reports what is wrong.
            Err(_) => 0,
        }
    }

    pub fn wants_credit(&mut self) {
        self.credit_wanted = true;
    }

    /// The guest shut down what `flags` say.
    pub fn guest_shutdown(&mut self, flags: u32) {
        self.guest_ended |= flags & NO_BOTH;
        if self.guest_ended & NO_RECEIVE != 0 {
            // Fails only if the program is gone already.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        self.flush();
    }

    /// Passes on to the host what waits for it, as far as its program takes it.
    pub fn flush(&mut self) {
        while self.writable && !self.to_host.is_empty() {
            let (front, _) = self.to_host.as_slices();
            let len = front.len();
            match self.stream.write(front) {
                Ok(n) => {
                    self.to_host.drain(..n);
                    self.forwarded = self.forwarded.wrapping_add(n as u32);
                    self.writable = n == len;
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.writable = false,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                // The program is gone.
                Err(_) => self.host_hung_up(),
            }
        }
        if self.to_host.is_empty() && self.guest_ended & NO_SEND != 0 && self.phase == Phase::Open {
            if !std::mem::replace(&mut self.write_ended, true) {
                let _ = self.stream.shutdown(Shutdown::Write);
            }
            if self.guest_ended == NO_BOTH {
                // Answering with RST is how an orderly end is confirmed (virtio 1.2, section 5.10.6.5).
                self.kill();
            }
        }
    }

    /// The guest's side is over. Passes on what the guest was told is taken. True if the host's program has still to take some of it.
    pub fn drain(&mut self) -> bool {
        self.phase = Phase::Draining;
        self.announce = 0;
        self.deadline = None;
        if self.to_host.is_empty() {
            return false;
        }
        // Mostly the kernel then takes all at once, and nothing depends on how long this process lives. A host that allows no larger buffer leaves
        // it to the program's pace.
        let socket = SockRef::from(&self.stream);
        if let Ok(now) = socket.send_buffer_size() {
            let _ = socket.set_send_buffer_size(now.saturating_add(2 * BUFFER as usize));
        }
        self.writable = true;
        self.flush();
        self.is_draining()
    }

    /// Bytes that the host's program has still to take.
    #[cfg(any(test, fuzzing))]
    pub fn waiting(&self) -> usize {
        self.to_host.len()
    }

    /// The guest's side is over, and something is left for the host's program.
    pub fn is_draining(&self) -> bool {
        self.phase == Phase::Draining && !self.to_host.is_empty()
    }

    /// The host's program closed its socket altogether: it will not read either.
    pub fn host_gone(&mut self) {
        self.host_ended |= NO_RECEIVE;
    }

    /// Both sides have nothing to say any more as far as we are concerned, so that only the guest's RST is missing.
    pub fn is_ending(&self) -> bool {
        self.host_ended_told == NO_BOTH
    }

    /// The next packet for the guest, its data (at most `room` bytes) in `data`.
    pub fn next_packet(&mut self, room: usize, data: &mut [u8]) -> Option<Outgoing> {
        match std::mem::take(&mut self.announce) {
            0 => {}
            op => return Some(Outgoing::control(op)),
        }
        if self.phase != Phase::Open {
            return None;
        }
        if self.readable
            && self.host_ended & NO_SEND == 0
            && self.guest_ended & NO_RECEIVE == 0
            && let Some(packet) = self.read_host(room, data)
        {
            return Some(packet);
        }
        // That nobody reads is only worth telling once all that was written is passed on.
        let all_passed_on = self.host_ended & NO_SEND != 0 || (self.host_deaf && !self.readable);
        let ended = if all_passed_on { self.host_ended } else { 0 };
        if ended != self.host_ended_told {
            self.host_ended_told = ended;
            return Some(Outgoing { op: op::SHUTDOWN, flags: ended, len: 0 });
        }
        // Told before the guest runs out: it thinks that half of the buffer is full, and that is no longer so.
        let stale = self.forwarded.wrapping_sub(self.told);
        let full_in_its_eyes = stale as usize + self.to_host.len();
        if self.credit_wanted || (stale > 0 && full_in_its_eyes > BUFFER as usize / 2) {
            self.credit_wanted = false;
            return Some(Outgoing::control(op::CREDIT_UPDATE));
        }
        None
    }

    fn read_host(&mut self, room: usize, data: &mut [u8]) -> Option<Outgoing> {
        let under_way = self.sent.wrapping_sub(self.guest_forwarded);
        let credit = self.guest_buffer.saturating_sub(under_way) as usize;
        let len = credit.min(room).min(data.len());
        if credit == 0 {
            let first = !std::mem::replace(&mut self.credit_requested, true);
            return first.then(|| Outgoing::control(op::CREDIT_REQUEST));
        }
        if len == 0 {
            return None;
        }
        match self.stream.read(&mut data[..len]) {
            Ok(0) => self.host_ended |= NO_SEND,
            Ok(n) => {
                self.sent = self.sent.wrapping_add(n as u32);
                return Some(Outgoing { op: op::RW, flags: 0, len: n });
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => self.readable = false,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(_) => {
                self.kill();
                self.announce = 0;
                return Some(Outgoing::control(op::RST));
            }
        }
        None
    }

    /// Reads the program's `CONNECT PORT\n`: the port once it is there. Not a byte more is read: what follows is data.
    ///
    /// # Errors
    /// Anything else, and the end of the stream.
    pub fn read_greeting(&mut self) -> io::Result<Option<u32>> {
        /// Longer than `CONNECT 4294967295`.
        const LONGEST: usize = 32;
        let Phase::Greeting(line) = &mut self.phase else { return Ok(None) };
        loop {
            let mut byte = [0];
            match self.stream.read(&mut byte) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(_) if byte[0] == b'\n' => break,
                Ok(_) if line.len() < LONGEST => line.push(byte[0]),
                Ok(_) => return Err(ErrorKind::InvalidData.into()),
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    self.readable = false;
                    return Ok(None);
                }
                Err(e) => return Err(e),
            }
        }
        let port =
            std::str::from_utf8(line).ok().and_then(|l| l.strip_prefix("CONNECT ")?.trim().parse().ok());
        port.map(Some).ok_or(ErrorKind::InvalidData.into())
    }
}
