use super::connection::{BUFFER, Connection, Key, Phase};
use super::packet::{HOST_CID, Header, STREAM, op};
use crate::pair::Backend;
use mio::net::{UnixListener, UnixStream};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use outboard_bus::{Event, warn_limited};
use slab::Slab;
use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Connections at a time; with full buffers they take 32 MiB.
pub const MAX_CONNECTIONS: usize = 256;
/// Refusals that wait for the guest to take them; further ones are left out.
const MAX_REFUSALS: usize = 256;
/// First port of the host's side for connections that the host starts, as Firecracker's users know it.
const FIRST_PORT: u32 = 1 << 30;
/// How long a program may take to say where it wants to go, the guest to answer, and the guest to confirm an end.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long to leave programs waiting after the system could not take one.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

const WAKER: Token = Token(usize::MAX - 1);
const LISTENER: Token = Token(usize::MAX - 2);

/// Why the host's side of a socket device cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// A guest cannot have this context identifier.
    #[error("context identifier {0} is reserved; use one from 3 to 4294967294")]
    Cid(u64),
    /// Another process listens there.
    #[error("{0} is in use by another process; choose another path for the guest's sockets")]
    InUse(PathBuf),
    /// Something that is no socket is there.
    #[error("{0} exists and is no socket; it is left alone, choose another path for the guest's sockets")]
    NotASocket(PathBuf),
    /// The system refused.
    #[error(
        "cannot listen on {path} for the guest's sockets: {source}; the directory must exist and be writable, and the path short (about 100 bytes)"
    )]
    Listen {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The host's side: the Unix sockets and the table of connections.
pub struct Mux {
    guest_cid: u64,
    path: PathBuf,
    poll: Poll,
    events: Events,
    wakers: Vec<Arc<Event>>,
    listener: UnixListener,
    accepting: bool,
    connections: Slab<Connection>,
    by_key: HashMap<Key, usize>,
    /// Connections that may have something for the guest.
    queued: VecDeque<usize>,
    /// RST for packets that belong to no connection.
    refusals: VecDeque<Header>,
    next_port: u32,
    next_check: Option<Instant>,
    /// When to look for waiting programs again, after the system could not take one.
    accept_again: Option<Instant>,
    /// Connections that the guest has ended and the host's programs have not read to the end, oldest first.
    draining: VecDeque<usize>,
}

impl Backend for Mux {
    fn add_waker(&mut self, event: Arc<Event>) -> io::Result<()> {
        let fd = event.as_fd().as_raw_fd();
        self.poll.registry().register(&mut SourceFd(&fd), WAKER, Interest::READABLE)?;
        self.wakers.push(event);
        Ok(())
    }

    /// Ends every connection, as far as the guest is concerned; goes on listening.
    fn reset(&mut self) {
        for event in self.wakers.drain(..) {
            // Fails only for a descriptor that is not registered.
            let _ = self.poll.registry().deregister(&mut SourceFd(&event.as_fd().as_raw_fd()));
        }
        let ids: Vec<usize> = self.connections.iter().map(|(id, _)| id).collect();
        for id in ids {
            self.remove(id);
        }
        self.refusals.clear();
        self.next_check = None;
    }
}

impl Mux {
    /// Listens at `path` for programs that want to reach the guest.
    pub fn new(guest_cid: u64, path: &Path) -> Result<Self, VsockError> {
        if !(3..u64::from(u32::MAX)).contains(&guest_cid) {
            return Err(VsockError::Cid(guest_cid));
        }
        remove_stale(path)?;
        let failed = |source| VsockError::Listen { path: path.to_owned(), source };
        let poll = Poll::new().map_err(failed)?;
        let mut listener = UnixListener::bind(path).map_err(failed)?;
        poll.registry().register(&mut listener, LISTENER, Interest::READABLE).map_err(failed)?;
        Ok(Self {
            guest_cid,
            path: path.to_owned(),
            poll,
            events: Events::with_capacity(256),
            wakers: Vec::new(),
            listener,
            accepting: false,
            connections: Slab::new(),
            by_key: HashMap::new(),
            queued: VecDeque::new(),
            refusals: VecDeque::new(),
            next_port: FIRST_PORT,
            next_check: None,
            accept_again: None,
            draining: VecDeque::new(),
        })
    }

    /// Waits for something to do, and does what concerns the host's side only.
    pub fn wait(&mut self) -> io::Result<()> {
        let timeout = self.timeout();
        match self.poll.poll(&mut self.events, timeout) {
            Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(()),
            other => other?,
        }
        self.work()
    }

    /// Until the next thing to do by itself.
    fn timeout(&self) -> Option<Duration> {
        // A program that waits since before there was room makes no event of its own.
        if self.accepting && self.has_room() && self.accept_again.is_none() {
            return Some(Duration::ZERO);
        }
        let next = self.next_check.into_iter().chain(self.accept_again).min();
        next.map(|t| t.saturating_duration_since(Instant::now()))
    }

    /// Does what the last poll found.
    fn work(&mut self) -> io::Result<()> {
        let mut ready = Vec::new();
        for event in &self.events {
            match event.token() {
                WAKER => {}
                LISTENER => self.accepting = true,
                Token(id) => {
                    let Some(connection) = self.connections.get_mut(id) else { continue };
                    connection.readable |= event.is_readable() || event.is_read_closed() || event.is_error();
                    connection.writable |= event.is_writable() || event.is_error();
                    if event.is_write_closed() {
                        connection.host_gone();
                    }
                    // Some systems report one descriptor in several events: kqueue has one for reading and one for writing.
                    if !ready.contains(&id) {
                        ready.push(id);
                    }
                }
            }
        }
        for id in ready {
            self.host_ready(id);
        }
        if self.next_check.is_some_and(|t| t <= Instant::now()) {
            self.check_deadlines();
        }
        self.accept();
        Ok(())
    }

    /// The guest has to be given something. Connections in the list may turn out to have nothing.
    pub fn has_packets(&self) -> bool {
        !self.refusals.is_empty() || !self.queued.is_empty()
    }

    /// The next packet for the guest: its data, at most `room` bytes, is put into `data`.
    pub fn next_packet(&mut self, room: usize, data: &mut [u8]) -> Option<Header> {
        if let Some(refusal) = self.refusals.pop_front() {
            return Some(refusal);
        }
        while let Some(id) = self.queued.pop_front() {
            let connection = &mut self.connections[id];
            connection.queued = false;
            let packet = connection.next_packet(room, data);
            let header = packet.map(|packet| Header {
                src_cid: HOST_CID,
                dst_cid: self.guest_cid,
                src_port: connection.key.host,
                dst_port: connection.key.guest,
                len: packet.len as u32,
                kind: STREAM,
                op: packet.op,
                flags: packet.flags,
                buf_alloc: BUFFER,
                fwd_cnt: connection.forwarded_now_told(),
            });
            if connection.phase == Phase::Dead && connection.announce == 0 {
                self.remove(id);
            } else if header.is_some() {
                let connection = &self.connections[id];
                if connection.is_ending() && connection.deadline.is_none() {
                    self.set_deadline(id);
                }
                self.enqueue(id);
            }
            if header.is_some() {
                return header;
            }
        }
        None
    }

    /// Takes a packet of the guest.
    pub fn receive(&mut self, header: &Header, data: &[u8]) {
        if header.src_cid != self.guest_cid {
            warn_limited!("vsock: guest {} sent a packet as {}", self.guest_cid, header.src_cid);
            return;
        }
        let key = Key { host: header.dst_port, guest: header.src_port };
        let known =
            if header.dst_cid == HOST_CID && header.kind == STREAM { self.by_key.get(&key) } else { None };
        let Some(&id) = known else {
            match header.op {
                op::REQUEST if header.dst_cid == HOST_CID && header.kind == STREAM => {
                    self.connect(key, header)
                }
                op::RST => {}
                _ => self.refuse(header),
            }
            return;
        };
        let connection = &mut self.connections[id];
        connection.note_credit(header);
        match header.op {
            // What came before it was taken, so it still goes to the host's program.
            op::RST => return self.remove(id),
            op::RW => connection.receive(data),
            op::RESPONSE => self.accepted(id),
            op::SHUTDOWN => connection.guest_shutdown(header.flags),
            op::CREDIT_UPDATE => {}
            op::CREDIT_REQUEST => connection.wants_credit(),
            // REQUEST for a connection that is there, or an unknown operation.
            _ => connection.kill(),
        }
        self.enqueue(id);
    }

    /// The guest wants to reach the program at `PATH_port`.
    fn connect(&mut self, key: Key, header: &Header) {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{}", key.host));
        let connected = if self.make_room() {
            UnixStream::connect(&path)
        } else {
            Err(io::Error::other("too many connections"))
        };
        match connected.and_then(|stream| self.insert(Connection::new(key, stream, Phase::Open))) {
            Ok(id) => {
                let connection = &mut self.connections[id];
                connection.note_credit(header);
                connection.announce = op::RESPONSE;
                self.enqueue(id);
            }
            Err(error) => {
                warn_limited!("vsock: the guest's connection to {} is refused: {error}", path.display());
                self.refuse(header);
            }
        }
    }

    /// The guest's program took the connection: tells the host's program.
    fn accepted(&mut self, id: usize) {
        let connection = &mut self.connections[id];
        if connection.phase != Phase::Requested {
            return connection.kill();
        }
        // Nothing was written before, so there is room for one line; if not, the program is gone.
        let line = format!("OK {}\n", connection.key.host);
        match connection.stream.write(line.as_bytes()) {
            Ok(n) if n == line.len() => {}
            Err(error) if error.kind() == ErrorKind::BrokenPipe => connection.host_hung_up(),
            _ => return connection.kill(),
        }
        // Also without a reader: what a program has sent before it went is the guest's.
        connection.phase = Phase::Open;
        connection.deadline = None;
    }

    /// Takes programs that want to reach the guest.
    fn accept(&mut self) {
        if self.accept_again.is_some_and(|t| t > Instant::now()) {
            return;
        }
        self.accept_again = None;
        while self.accepting && self.make_room() {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.accepting = false;
                    return;
                }
                Err(error) => {
                    // Out of descriptors, most likely: the program waits until there are some.
                    warn_limited!("vsock: cannot take a connection yet: {error}");
                    self.accept_again = Some(Instant::now() + ACCEPT_AGAIN);
                    return;
                }
            };
            // The guest's port is not known yet: until then no packet can be meant for it.
            let key = Key { host: self.free_port(), guest: 0 };
            match self.insert(Connection::new(key, stream, Phase::Greeting(Vec::new()))) {
                Ok(id) => self.set_deadline(id),
                Err(error) => warn_limited!("vsock: cannot take a connection: {error}"),
            }
        }
    }

    fn host_ready(&mut self, id: usize) {
        let Some(connection) = self.connections.get_mut(id) else { return };
        match connection.phase {
            Phase::Greeting(_) => match connection.read_greeting() {
                Ok(None) => return,
                Ok(Some(port)) => self.request(id, port),
                Err(error) => {
                    warn_limited!("vsock: a program did not say CONNECT PORT: {error}");
                    return self.remove(id);
                }
            },
            Phase::Draining => {
                connection.flush();
                if !connection.is_draining() {
                    self.forget(id);
                }
                return;
            }
            Phase::Requested | Phase::Open | Phase::Dead => connection.flush(),
        }
        self.enqueue(id);
    }

    /// A program has said that it wants to reach `port` of the guest.
    fn request(&mut self, id: usize, port: u32) {
        let connection = &mut self.connections[id];
        let old = std::mem::replace(&mut connection.key.guest, port);
        let (key, old) = (connection.key, Key { guest: old, ..connection.key });
        self.by_key.remove(&old);
        if self.by_key.contains_key(&key) {
            // The guest has a connection of its own between these two ports.
            return connection.kill();
        }
        connection.phase = Phase::Requested;
        connection.announce = op::REQUEST;
        self.by_key.insert(key, id);
        self.set_deadline(id);
    }

    fn check_deadlines(&mut self) {
        let now = Instant::now();
        let late = |c: &Connection| c.deadline.is_some_and(|t| t <= now);
        let ids: Vec<usize> = self.connections.iter().filter(|(_, c)| late(c)).map(|(id, _)| id).collect();
        for id in ids {
            let connection = &mut self.connections[id];
            if let Phase::Greeting(_) = connection.phase {
                self.remove(id);
                continue;
            }
            connection.deadline = None;
            connection.kill();
            self.enqueue(id);
        }
        self.next_check = self.connections.iter().filter_map(|(_, c)| c.deadline).min();
    }

    fn set_deadline(&mut self, id: usize) {
        let deadline = Instant::now() + PATIENCE;
        self.connections[id].deadline = Some(deadline);
        self.next_check.get_or_insert(deadline);
    }

    fn refuse(&mut self, header: &Header) {
        if self.refusals.len() < MAX_REFUSALS {
            self.refusals.push_back(header.reset_reply());
        } else {
            warn_limited!("vsock: the guest does not take refusals");
        }
    }

    fn free_port(&mut self) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = port.checked_add(1).unwrap_or(FIRST_PORT);
            if self.connections.iter().all(|(_, c)| c.key.host != port) {
                return port;
            }
        }
    }

    fn insert(&mut self, mut connection: Connection) -> io::Result<usize> {
        let entry = self.connections.vacant_entry();
        let id = entry.key();
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.poll.registry().register(&mut connection.stream, Token(id), interest)?;
        self.by_key.insert(connection.key, id);
        entry.insert(connection);
        Ok(id)
    }

    fn has_room(&self) -> bool {
        self.connections.len() < MAX_CONNECTIONS || !self.draining.is_empty()
    }

    /// Makes room for one more connection, if need be by giving up the oldest that the guest has ended. False if there is none.
    fn make_room(&mut self) -> bool {
        if self.connections.len() < MAX_CONNECTIONS {
            return true;
        }
        let Some(&oldest) = self.draining.front() else { return false };
        warn_limited!(
            "vsock: a program that has not read what the guest sent it makes room for another connection"
        );
        self.forget(oldest);
        true
    }

    /// The guest's side of a connection is over; the host's program still gets what the guest was told is taken.
    fn remove(&mut self, id: usize) {
        let connection = &mut self.connections[id];
        if connection.phase == Phase::Draining {
            return;
        }
        let is_left = connection.drain();
        if self.by_key.get(&connection.key) == Some(&id) {
            self.by_key.remove(&connection.key);
        }
        if std::mem::take(&mut connection.queued) {
            self.queued.retain(|q| *q != id);
        }
        if is_left {
            self.draining.push_back(id);
        } else {
            self.connections.remove(id);
        }
    }

    /// Drops a connection that the guest has ended, with what the host's program has not taken.
    fn forget(&mut self, id: usize) {
        self.draining.retain(|d| *d != id);
        self.connections.remove(id);
    }

    fn enqueue(&mut self, id: usize) {
        if !std::mem::replace(&mut self.connections[id].queued, true) {
            self.queued.push_back(id);
        }
    }
}

impl Drop for Mux {
    fn drop(&mut self) {
        // Somebody else may have removed it already.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(any(test, fuzzing))]
#[path = "script.rs"]
pub mod script;

/// Removes the socket file that a killed process left behind; leaves everything else alone.
fn remove_stale(path: &Path) -> Result<(), VsockError> {
    let Ok(metadata) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !metadata.file_type().is_socket() {
        return Err(VsockError::NotASocket(path.to_owned()));
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|source| VsockError::Listen { path: path.to_owned(), source })
        }
        _ => Err(VsockError::InUse(path.to_owned())),
    }
}
