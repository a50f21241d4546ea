use crate::address::{DNS, GATEWAY, GUEST};
use crate::frame::{IP_PAYLOAD, UDP_PAYLOAD};
use crate::guest::{Guest, Unreachable};
use crate::options::Forward;
use crate::resolver::Resolver;
use crate::stack::Source;
use mio::net::UdpSocket;
use mio::{Interest, Registry};
use outboard_bus::warn_limited;
use slab::Slab;
use socket2::{Domain, Socket, Type};
use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::{Duration, Instant};

/// Flows at a time; the one that was idle longest gives way.
pub(crate) const MAX_FLOWS: usize = 512;
/// How long an idle flow is kept: the least that RFC 4787 (REQ-5) allows.
const IDLE: Duration = Duration::from_secs(120);
/// The same for DNS queries, which are over when answered (RFC 4787, REQ-5a).
const IDLE_DNS: Duration = Duration::from_secs(20);
/// How often idle flows are looked for.
const SWEEP: Duration = Duration::from_secs(5);
/// The largest payload of a UDP datagram over IPv4, in bytes.
const MAX_PAYLOAD: usize = 65507;

/// ICMP echo messages (RFC 792).
const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST: u8 = 8;
const ICMP_HEADER: usize = 8;

/// Which flow: the guest's side, and the other side as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Key {
    /// The guest's port and the other side.
    Udp(u16, SocketAddrV4),
    /// The echo identifier and the address that is asked.
    Ping(u16, Ipv4Addr),
}

impl Key {
    fn remote(self) -> Ipv4Addr {
        match self {
            Self::Udp(_, remote) => *remote.ip(),
            Self::Ping(_, remote) => remote,
        }
    }

    fn is_dns(self) -> bool {
        matches!(self, Self::Udp(_, remote) if *remote.ip() == DNS)
    }
}

/// UDP and ping flows between guest and host, and the listening sockets of UDP forwards.
pub(crate) struct Datagrams {
    flows: Slab<Flow>,
    by_key: HashMap<Key, usize>,
    forwards: Vec<UdpForward>,
    /// Sockets with something to receive; each is in here at most once.
    readable: VecDeque<Inlet>,
    next_sweep: Option<Instant>,
}

struct Flow {
    key: Key,
    path: Path,
    last_used: Instant,
    /// Whether the other side ever answered.
    answered: bool,
    queued: bool,
}

enum Path {
    /// A socket of its own, connected to this address.
    Socket(UdpSocket, SocketAddr),
    /// A peer of the forward with this index.
    Forward(usize, SocketAddr),
}

struct UdpForward {
    socket: UdpSocket,
    guest_port: u16,
    queued: bool,
}

#[derive(Clone, Copy)]
enum Inlet {
    Flow(usize),
    Forward(usize),
}

impl Datagrams {
    pub(crate) fn new() -> Self {
        Self {
            flows: Slab::new(),
            by_key: HashMap::new(),
            forwards: Vec::new(),
            readable: VecDeque::new(),
            next_sweep: None,
        }
    }

    /// Forgets all flows; forwards go on listening.
    pub(crate) fn reset(&mut self) {
        let Self { flows, by_key, forwards: _, readable, next_sweep } = self;
        flows.clear();
        by_key.clear();
        readable.retain(|inlet| matches!(inlet, Inlet::Forward(_)));
        *next_sweep = None;
    }

    /// Listens for `forward`; gives the address that was bound.
    pub(crate) fn listen(&mut self, forward: &Forward, registry: &Registry) -> io::Result<SocketAddr> {
        let mut socket = UdpSocket::bind(forward.host)?;
        let token = Source::UdpForward(self.forwards.len()).token();
        registry.register(&mut socket, token, Interest::READABLE)?;
        let address = socket.local_addr()?;
        self.forwards.push(UdpForward { socket, guest_port: forward.guest_port, queued: false });
        Ok(address)
    }

    pub(crate) fn contains(&self, key: Key) -> bool {
        self.by_key.contains_key(&key)
    }

    pub(crate) fn has_runnable(&self) -> bool {
        !self.readable.is_empty()
    }

    pub(crate) fn next_sweep(&self) -> Option<Instant> {
        self.next_sweep
    }

    pub(crate) fn flow_ready(&mut self, id: usize) {
        if let Some(flow) = self.flows.get_mut(id)
            && !std::mem::replace(&mut flow.queued, true)
        {
            self.readable.push_back(Inlet::Flow(id));
        }
    }

    pub(crate) fn forward_ready(&mut self, index: usize) {
        if !std::mem::replace(&mut self.forwards[index].queued, true) {
            self.readable.push_back(Inlet::Forward(index));
        }
    }

    /// Sends the guest's datagram on: `payload` for UDP, the whole message for a ping. `packet` is the IP packet, for
    /// errors. `host` says where a new flow leads.
    pub(crate) fn send(
        &mut self,
        key: Key,
        payload: &[u8],
        packet: &[u8],
        host: SocketAddr,
        cx: &mut Cx<'_>,
    ) {
        let id = match self.by_key.get(&key) {
            Some(&id) => id,
            None => match self.open(key, host, cx) {
                Ok(id) => id,
                Err(error) => {
                    // Without the right to send pings the guest's stay unanswered; the first message says so.
                    warn_limited!("no datagrams to {} for the guest: {error}", key.remote());
                    return;
                }
            },
        };
        let flow = &mut self.flows[id];
        flow.last_used = cx.now;
        let sent = match &flow.path {
            Path::Socket(socket, _) => socket.send(payload),
            Path::Forward(index, peer) => self.forwards[*index].socket.send_to(payload, *peer),
        };
        if let Err(error) = sent {
            let code = match error.kind() {
                // Reported for an earlier datagram of this flow, too.
                ErrorKind::ConnectionRefused => Unreachable::Port,
                ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => Unreachable::Host,
                // A full socket drops, as a network does.
                _ => return,
            };
            cx.guest.send_unreachable(packet, key.remote(), code);
        }
    }

    fn open(&mut self, key: Key, host: SocketAddr, cx: &mut Cx<'_>) -> io::Result<usize> {
        let mut socket = match key {
            Key::Udp(..) => {
                let any: SocketAddr = if host.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
                UdpSocket::bind(any)?
            }
            Key::Ping(..) => ping_socket()?,
        };
        socket.connect(host)?;
        self.make_room(cx);
        let entry = self.flows.vacant_entry();
        let id = entry.key();
        cx.registry.register(&mut socket, Source::Datagram(id).token(), Interest::READABLE)?;
        entry.insert(Flow {
            key,
            path: Path::Socket(socket, host),
            last_used: cx.now,
            answered: false,
            queued: false,
        });
        self.by_key.insert(key, id);
        self.next_sweep.get_or_insert(cx.now + SWEEP);
        Ok(id)
    }

    fn make_room(&mut self, cx: &mut Cx<'_>) {
        if self.flows.len() < MAX_FLOWS {
            return;
        }
        if let Some((id, _)) = self.flows.iter().min_by_key(|(_, flow)| flow.last_used) {
            warn_limited!("{MAX_FLOWS} datagram flows are open: the oldest one gives way");
            self.remove(id, cx);
        }
    }

    /// Passes on what came in from the host's side while the guest takes frames, and closes what is idle.
    pub(crate) fn run(&mut self, cx: &mut Cx<'_>) {
        if self.next_sweep.is_some_and(|t| t <= cx.now) {
            self.sweep(cx);
        }
        while cx.guest.outbox.has_room() {
            let Some(inlet) = self.readable.pop_front() else { return };
            let more = match inlet {
                Inlet::Flow(id) => self.receive(id, cx),
                Inlet::Forward(index) => self.receive_forward(index, cx),
            };
            match inlet {
                Inlet::Flow(id) => self.flows[id].queued = more,
                Inlet::Forward(index) => self.forwards[index].queued = more,
            }
            if more {
                self.readable.push_back(inlet);
            }
        }
    }

    /// Takes one datagram from a flow's socket; `false` when there was none.
    fn receive(&mut self, id: usize, cx: &mut Cx<'_>) -> bool {
        let flow = &mut self.flows[id];
        let Path::Socket(socket, _) = &flow.path else { return false };
        let mut buffer = cx.guest.outbox.buffer();
        let start = if matches!(flow.key, Key::Udp(..)) { UDP_PAYLOAD } else { IP_PAYLOAD };
        let len = match socket.recv(&mut buffer[start..start + MAX_PAYLOAD]) {
            Ok(len) => len,
            Err(error) => {
                cx.guest.outbox.recycle(buffer);
                // An ICMP error for an earlier datagram; there may be more behind it.
                return error.kind() != ErrorKind::WouldBlock
                    && socket.take_error().is_ok_and(|e| e.is_some());
            }
        };
        flow.last_used = cx.now;
        flow.answered = true;
        match flow.key {
            Key::Udp(port, remote) => {
                cx.guest.outbox.push_udp(buffer, len, (*remote.ip(), remote.port()), (GUEST, port));
            }
            Key::Ping(ident, remote) => send_echo_reply(buffer, len, ident, remote, cx.guest),
        }
        true
    }

    /// Takes one datagram from a forward's socket; `false` when there was none.
    fn receive_forward(&mut self, index: usize, cx: &mut Cx<'_>) -> bool {
        let forward = &self.forwards[index];
        let guest_port = forward.guest_port;
        let mut buffer = cx.guest.outbox.buffer();
        let (len, peer) = match forward.socket.recv_from(&mut buffer[UDP_PAYLOAD..UDP_PAYLOAD + MAX_PAYLOAD])
        {
            Ok(received) => received,
            Err(error) => {
                cx.guest.outbox.recycle(buffer);
                return error.kind() != ErrorKind::WouldBlock;
            }
        };
        let remote = as_guest_sees(peer);
        let key = Key::Udp(guest_port, remote);
        let id = match self.by_key.get(&key) {
            Some(&id) => id,
            None => {
                self.make_room(cx);
                let path = Path::Forward(index, peer);
                let flow = Flow { key, path, last_used: cx.now, answered: true, queued: false };
                let id = self.flows.insert(flow);
                self.by_key.insert(key, id);
                self.next_sweep.get_or_insert(cx.now + SWEEP);
                id
            }
        };
        self.flows[id].last_used = cx.now;
        cx.guest.outbox.push_udp(buffer, len, (*remote.ip(), remote.port()), (GUEST, guest_port));
        true
    }

    fn sweep(&mut self, cx: &mut Cx<'_>) {
        let idle = |flow: &Flow| if flow.key.is_dns() { IDLE_DNS } else { IDLE };
        let over: Vec<usize> = self
            .flows
            .iter()
            .filter(|(_, flow)| cx.now.duration_since(flow.last_used) >= idle(flow))
            .map(|(id, _)| id)
            .collect();
        for id in over {
            self.remove(id, cx);
        }
        self.next_sweep = (!self.flows.is_empty()).then_some(cx.now + SWEEP);
    }

    fn remove(&mut self, id: usize, cx: &mut Cx<'_>) {
        let flow = self.flows.remove(id);
        self.by_key.remove(&flow.key);
        if flow.queued {
            self.readable.retain(|inlet| !matches!(inlet, Inlet::Flow(i) if *i == id));
        }
        if let Path::Socket(_, host) = flow.path
            && flow.key.is_dns()
            && !flow.answered
        {
            cx.resolver.failed(host);
        }
    }
}

/// What the flows need from the rest of the stack.
pub(crate) struct Cx<'a> {
    pub(crate) guest: &'a mut Guest,
    pub(crate) registry: &'a Registry,
    /// The time of this round of work.
    pub(crate) now: Instant,
    /// Told of a server that left a query unanswered.
    pub(crate) resolver: &'a mut Resolver,
}

/// The host appears as the gateway.
pub(crate) fn as_guest_sees(peer: SocketAddr) -> SocketAddrV4 {
    match peer {
        SocketAddr::V4(v4) if !v4.ip().is_loopback() => v4,
        // There are no IPv6 addresses on the guest's network.
        other => SocketAddrV4::new(GATEWAY, other.port()),
    }
}

/// A socket for echo requests, which Linux and macOS allow without privileges (Linux: for the groups in the
/// `net.ipv4.ping_group_range` sysctl).
fn ping_socket() -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(socket2::Protocol::ICMPV4))?;
    socket.set_nonblocking(true)?;
    Ok(UdpSocket::from_std(socket.into()))
}

/// Sends the ICMP message at [`IP_PAYLOAD`] on if it is an echo reply, under the identifier that the guest chose.
fn send_echo_reply(mut buffer: Vec<u8>, mut len: usize, ident: u16, from: Ipv4Addr, guest: &mut Guest) {
    let message = &mut buffer[IP_PAYLOAD..IP_PAYLOAD + len];
    // macOS puts the IP header in front.
    if let Some(first) = message.first().filter(|first| **first >> 4 == 4) {
        let header = usize::from(first & 0xf) * 4;
        message.copy_within(header.min(len).., 0);
        len = len.saturating_sub(header);
    }
    if len < ICMP_HEADER || buffer[IP_PAYLOAD] != ECHO_REPLY {
        return guest.outbox.recycle(buffer);
    }
    buffer[IP_PAYLOAD + 4..IP_PAYLOAD + 6].copy_from_slice(&ident.to_be_bytes());
    guest.outbox.push_icmp(buffer, len, from, GUEST);
}

/// The identifier of an ICMP echo request; `None` for any other message.
pub(crate) fn echo_request_ident(message: &[u8]) -> Option<u16> {
    (message.len() >= ICMP_HEADER && message[0] == ECHO_REQUEST && message[1] == 0)
        .then(|| u16::from_be_bytes([message[4], message[5]]))
}

/// Answers the guest's echo request in the name of `address`.
pub(crate) fn answer_echo(message: &[u8], address: Ipv4Addr, guest: &mut Guest) {
    let mut buffer = guest.outbox.buffer();
    buffer[IP_PAYLOAD..IP_PAYLOAD + message.len()].copy_from_slice(message);
    buffer[IP_PAYLOAD] = ECHO_REPLY;
    guest.outbox.push_icmp(buffer, message.len(), address, GUEST);
}
