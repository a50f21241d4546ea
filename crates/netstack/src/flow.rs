use crate::guest::Guest;
use crate::tcp::Key;
use crate::window::{Filling, ReceiveWindow, Segment};
use mio::net::TcpStream;
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp::{RecvError, SendError, Socket, SocketBuffer, State};
use smoltcp::time::{Duration, Instant};
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;

/// How long the guest may take for its part of the handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);

/// A TCP connection between guest and host.
pub(crate) struct Flow {
    pub(crate) key: Key,
    pub(crate) host: TcpStream,
    pub(crate) phase: Phase,
    /// When the guest last sent a segment or data last moved.
    pub(crate) last_active: Instant,
    pub(crate) queued: bool,
    pub(crate) deadline: Option<Instant>,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    /// The host's end sends no more: a short read does not mean that there is nothing to come.
    pub(crate) host_closing: bool,
}

pub(crate) enum Phase {
    /// Waiting for the host's side.
    Connecting(Syn),
    Open(Open),
}

/// The segment with which the guest opens a connection.
#[derive(Default)]
pub(crate) struct Syn {
    /// The whole IP packet.
    pub(crate) packet: Vec<u8>,
    pub(crate) segment: Segment,
}

/// The guest's side of a connection.
pub(crate) struct Open {
    pub(crate) sockets: SocketSet<'static>,
    handle: SocketHandle,
    /// Bytes of its buffers.
    pub(crate) buffers: usize,
    window: ReceiveWindow,
    established: bool,
    /// The host's end of stream was passed on to the guest.
    pub(crate) guest_told: bool,
    /// The guest's end of stream was passed on to the host.
    pub(crate) host_told: bool,
}

/// What becomes of a flow after some work.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Nothing to do until something happens.
    Wait,
    /// More to send when the guest has taken frames.
    Blocked,
    /// Both directions ended in order.
    Finished,
    /// One side broke the connection; the other one has to learn that.
    Broken,
}

impl Flow {
    /// Whether one side has ended its stream.
    pub(crate) fn is_half_closed(&self) -> bool {
        matches!(&self.phase, Phase::Open(open) if open.guest_told || open.host_told)
    }

    /// Whether the guest has ended its stream, and the host's side knows.
    pub(crate) fn guest_has_ended(&self) -> bool {
        matches!(&self.phase, Phase::Open(open) if open.host_told)
    }

    /// Moves data in both directions until nothing more can move.
    pub(crate) fn pump(&mut self, guest: &mut Guest) -> Next {
        loop {
            let Ok(to_host) = self.move_to_host() else { return Next::Broken };
            let Ok(to_guest) = self.move_to_guest() else { return Next::Broken };
            let Phase::Open(open) = &mut self.phase else { return Next::Wait };
            if !guest.send(&mut open.sockets) {
                return Next::Blocked;
            }
            if !(to_host || to_guest) {
                return open.next();
            }
            self.last_active = guest.now;
        }
    }

    /// Guest to host, straight out of the receive buffer; `true` if anything moved.
    fn move_to_host(&mut self) -> io::Result<bool> {
        let Phase::Open(open) = &mut self.phase else { return Ok(false) };
        let socket = open.sockets.get_mut::<Socket>(open.handle);
        let mut moved = false;
        while self.writable && socket.can_recv() {
            let (writable, host) = (&mut self.writable, &mut self.host);
            let written = socket.recv(|data| match no_block(host.write(data)) {
                Ok(n) => {
                    // A short write filled the host's buffer; an event comes when there is room.
                    *writable = n == data.len();
                    (n, Ok(n))
                }
                Err(error) => (0, Err(error)),
            });
            match written {
                Ok(result) => {
                    let count = result?;
                    open.window.consume(count);
                    moved |= count > 0;
                }
                Err(RecvError::Finished | RecvError::InvalidState) => break,
            }
        }
        if has_ended(socket.state()) && !open.host_told && socket.recv_queue() == 0 {
            open.host_told = true;
            // Fails only if the peer broke the connection, which the next read or write tells.
            let _ = self.host.shutdown(Shutdown::Write);
            moved = true;
        }
        Ok(moved)
    }

    /// Host to guest, straight into the send buffer; `true` if anything moved.
    fn move_to_guest(&mut self) -> io::Result<bool> {
        let Phase::Open(open) = &mut self.phase else { return Ok(false) };
        let socket = open.sockets.get_mut::<Socket>(open.handle);
        let mut moved = false;
        while self.readable && !open.guest_told && socket.can_send() {
            let (readable, closing, host) = (&mut self.readable, self.host_closing, &mut self.host);
            let mut ended = false;
            let read = socket.send(|room| {
                let full = room.len();
                match no_block_eof(host.read(room)) {
                    Ok(Some(0)) => {
                        ended = true;
                        (0, Ok(0))
                    }
                    // A short read emptied the host's buffer; an event comes when there is more.
                    Ok(n) => {
                        let n = n.unwrap_or(0);
                        *readable = n == full || (closing && n > 0);
                        (n, Ok(n))
                    }
                    Err(error) => (0, Err(error)),
                }
            });
            match read {
                Ok(result) => moved |= result? > 0,
                Err(SendError::InvalidState) => break,
            }
            if ended {
                socket.close();
                // Nothing follows that an acknowledgement could ride on.
                socket.set_ack_delay(None);
                open.guest_told = true;
                moved = true;
            }
        }
        Ok(moved)
    }
}

impl Open {
    /// The guest's side with two buffers of `size` bytes each. Their pages take memory only once used.
    pub(crate) fn new(size: usize) -> Self {
        let buffer = || SocketBuffer::new(vec![0; size]);
        let mut socket = Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        socket.set_timeout(Some(HANDSHAKE_TIMEOUT));
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let handle = sockets.add(socket);
        Self {
            sockets,
            handle,
            buffers: 2 * size,
            window: ReceiveWindow::new(size),
            established: false,
            guest_told: false,
            host_told: false,
        }
    }

    pub(crate) fn socket(&mut self) -> &mut Socket<'static> {
        self.sockets.get_mut(self.handle)
    }

    /// Takes the IP packet `packet` of the guest, which holds `segment`.
    pub(crate) fn receive(&mut self, packet: &[u8], segment: Segment, guest: &mut Guest) {
        let socket = self.sockets.get_mut::<Socket>(self.handle);
        match socket.state() {
            State::Listen | State::SynSent if segment.syn => self.window.synchronize(segment),
            // Neither takes data.
            State::Listen | State::SynSent | State::Closed => {}
            state => {
                let filling = Filling { queued: socket.recv_queue(), ended: has_ended(state) };
                if !self.window.admits(segment, filling) {
                    return;
                }
            }
        }
        guest.receive(packet, &mut self.sockets);
    }

    /// What the state of the guest's connection means for the flow, once all that could be sent is sent.
    fn next(&mut self) -> Next {
        let socket = self.sockets.get_mut::<Socket>(self.handle);
        let handshake = matches!(socket.state(), State::SynSent | State::SynReceived);
        if !self.established && !handshake {
            self.established = true;
            // From now on a guest may be silent for as long as it likes: it may be paused.
            socket.set_timeout(None);
        }
        match socket.state() {
            // The link loses nothing, so nobody has to linger for a repeated FIN.
            State::TimeWait if self.host_told => Next::Finished,
            State::Closed if self.host_told && self.guest_told => Next::Finished,
            // LISTEN: the guest took its SYN back.
            State::Closed | State::Listen => Next::Broken,
            _ => Next::Wait,
        }
    }
}

/// Whether the guest has ended its stream.
fn has_ended(state: State) -> bool {
    matches!(state, State::CloseWait | State::LastAck | State::Closing | State::TimeWait)
}

/// A write that would block wrote nothing.
fn no_block(result: io::Result<usize>) -> io::Result<usize> {
    match result {
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(0),
        other => other,
    }
}

/// `None` for a read that would block, which is not the same as the 0 of an end of stream.
fn no_block_eof(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock) => Ok(None),
        other => other.map(Some),
    }
}
