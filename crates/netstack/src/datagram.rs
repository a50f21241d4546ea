use crate::address::Subnet;
use crate::frame::{IP_PAYLOAD, UDP_PAYLOAD};
use crate::guest::{Guest, Quote, Unreachable};
use crate::host_net;
use crate::options::Forward;
use crate::resolver::Resolver;
use crate::sockopt;
use crate::stack::Source;
use mio::net::UdpSocket;
use mio::{Interest, Registry};
use outboard_bus::warn_limited;
use slab::Slab;
use smoltcp::wire::Ipv4Packet;
use socket2::{Domain, Socket, Type};
use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::{Duration, Instant};

/// Flows at a time; the one that was idle longest gives way.
pub(crate) const MAX_FLOWS: usize = 512;
/// How long an idle flow is kept: the least that RFC 4787 (REQ-5) allows.
const IDLE: Duration = Duration::from_secs(120);
/// How often idle flows are looked for.
const SWEEP: Duration = Duration::from_secs(5);
/// The largest payload of a UDP datagram over IPv4, in bytes.
const MAX_PAYLOAD: usize = 65507;

/// MTU that the guest is told where the system does not tell that of the path: the least that IPv6 allows, which nearly every
/// link has.
const FALLBACK_MTU: u16 = 1280;

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
}

/// A datagram of the guest.
pub(crate) struct Datagram<'a> {
    pub(crate) key: Key,
    /// The payload of UDP, the whole message of a ping.
    pub(crate) payload: &'a [u8],
    /// The IP packet that it came in.
    pub(crate) packet: &'a [u8],
    /// It may not be sent in fragments.
    pub(crate) dont_fragment: bool,
}

impl<'a> Datagram<'a> {
    /// Of `packet`, which is all of `bytes`.
    pub(crate) fn new(key: Key, payload: &'a [u8], packet: &Ipv4Packet<&[u8]>, bytes: &'a [u8]) -> Self {
        Self { key, payload, packet: bytes, dont_fragment: packet.dont_frag() }
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
    /// The last packet of the guest.
    last_sent: Quote,
    /// What the socket was told last about fragments.
    dont_fragment: bool,
    queued: bool,
}

enum Path {
    /// A socket of its own, connected to the other side.
    Socket(UdpSocket),
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

    /// Sends the guest's datagram on. `host` says where a new flow leads.
    pub(crate) fn send(&mut self, datagram: &Datagram<'_>, host: SocketAddr, cx: &mut Cx<'_>) {
        let key = datagram.key;
        let quote = Quote::of(datagram.packet);
        let id = match self.by_key.get(&key) {
            Some(&id) => id,
            None => match self.open(key, host, quote.clone(), cx) {
                Ok(id) => id,
                Err(error) => {
                    report_failed_open(key, &error);
                    if let Some(reason) = Unreachable::from_error(&error) {
                        cx.tell(&quote, key, reason);
                    }
                    return;
                }
            },
        };
        let flow = &mut self.flows[id];
        flow.last_used = cx.now;
        flow.last_sent = quote;
        let socket = match &flow.path {
            Path::Socket(socket) => socket,
            Path::Forward(index, peer) => {
                // A full socket drops, as a network does.
                let _ = self.forwards[*index].socket.send_to(datagram.payload, *peer);
                return;
            }
        };
        if flow.dont_fragment != datagram.dont_fragment
            && sockopt::set_dont_fragment(socket, datagram.dont_fragment).is_ok()
        {
            flow.dont_fragment = datagram.dont_fragment;
        }
        let Err(error) = socket.send(datagram.payload) else { return };
        let Some(reason) = reason(&error, socket) else { return };
        sockopt::forget_errors(socket);
        cx.tell(&flow.last_sent, key, reason);
        // The error may be an earlier datagram's, and then this one was not sent.
        if !matches!(reason, Unreachable::FragmentationNeeded(_)) {
            let _ = socket.send(datagram.payload);
        }
    }

    fn open(&mut self, key: Key, host: SocketAddr, last_sent: Quote, cx: &mut Cx<'_>) -> io::Result<usize> {
        let mut socket = match key {
            Key::Udp(..) => UdpSocket::bind(host_net::any_port_for(host))?,
            Key::Ping(..) => ping_socket()?,
        };
        socket.connect(host)?;
        // A system that refuses either leaves the guest with less to know, no more.
        let _ = sockopt::report_all_errors(&socket).and_then(|()| sockopt::set_dont_fragment(&socket, false));
        self.make_room();
        let entry = self.flows.vacant_entry();
        let id = entry.key();
        cx.registry.register(&mut socket, Source::Datagram(id).token(), Interest::READABLE)?;
        entry.insert(Flow {
            key,
            path: Path::Socket(socket),
            last_used: cx.now,
            last_sent,
            dont_fragment: false,
            queued: false,
        });
        self.by_key.insert(key, id);
        self.next_sweep.get_or_insert(cx.now + SWEEP);
        Ok(id)
    }

    fn make_room(&mut self) {
        if self.flows.len() < MAX_FLOWS {
            return;
        }
        if let Some((id, _)) = self.flows.iter().min_by_key(|(_, flow)| flow.last_used) {
            warn_limited!("{MAX_FLOWS} datagram flows are open: the oldest one gives way");
            self.remove(id);
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
        let Path::Socket(socket) = &flow.path else { return false };
        let mut buffer = cx.guest.outbox.buffer();
        let start = if matches!(flow.key, Key::Udp(..)) { UDP_PAYLOAD } else { IP_PAYLOAD };
        let len = match socket.recv(&mut buffer[start..start + MAX_PAYLOAD]) {
            Ok(len) => len,
            Err(error) => {
                cx.guest.outbox.recycle(buffer);
                sockopt::forget_errors(socket);
                let Some(reason) = reason(&error, socket) else { return false };
                cx.tell(&flow.last_sent, flow.key, reason);
                return true;
            }
        };
        flow.last_used = cx.now;
        match flow.key {
            Key::Udp(port, remote) => {
                let guest = (cx.guest.subnet().guest(), port);
                cx.guest.outbox.push_udp(buffer, len, (*remote.ip(), remote.port()), guest);
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
        let remote = as_guest_sees(peer, cx.guest.subnet());
        let key = Key::Udp(guest_port, remote);
        let id = match self.by_key.get(&key) {
            Some(&id) => id,
            None => {
                self.make_room();
                let path = Path::Forward(index, peer);
                let last_sent = Quote::of(&[]);
                let flow =
                    Flow { key, path, last_used: cx.now, last_sent, dont_fragment: false, queued: false };
                let id = self.flows.insert(flow);
                self.by_key.insert(key, id);
                self.next_sweep.get_or_insert(cx.now + SWEEP);
                id
            }
        };
        self.flows[id].last_used = cx.now;
        let guest = (cx.guest.subnet().guest(), guest_port);
        cx.guest.outbox.push_udp(buffer, len, (*remote.ip(), remote.port()), guest);
        true
    }

    fn sweep(&mut self, cx: &mut Cx<'_>) {
        let over: Vec<usize> = self
            .flows
            .iter()
            .filter(|(_, flow)| cx.now.duration_since(flow.last_used) >= IDLE)
            .map(|(id, _)| id)
            .collect();
        for id in over {
            self.remove(id);
        }
        self.next_sweep = (!self.flows.is_empty()).then_some(cx.now + SWEEP);
    }

    fn remove(&mut self, id: usize) {
        let flow = self.flows.remove(id);
        self.by_key.remove(&flow.key);
        if flow.queued {
            self.readable.retain(|inlet| !matches!(inlet, Inlet::Flow(i) if *i == id));
        }
    }
}

/// What the flows need from the rest of the stack.
pub(crate) struct Cx<'a> {
    pub(crate) guest: &'a mut Guest,
    pub(crate) registry: &'a Registry,
    /// The time of this round of work.
    pub(crate) now: Instant,
    pub(crate) resolver: &'a mut Resolver,
}

impl Cx<'_> {
    /// Tells the guest that its packet `quote` of flow `key` was not delivered. A closed port is the other side's word, the
    /// rest the router's.
    fn tell(&mut self, quote: &Quote, key: Key, reason: Unreachable) {
        let from = match reason {
            Unreachable::Port => key.remote(),
            _ => self.guest.subnet().gateway(),
        };
        self.guest.send_unreachable(quote, from, reason);
    }
}

/// What a socket's error means for the guest.
fn reason(error: &io::Error, socket: &UdpSocket) -> Option<Unreachable> {
    if error.raw_os_error() == Some(libc::EMSGSIZE) {
        return Some(Unreachable::FragmentationNeeded(sockopt::path_mtu(socket).unwrap_or(FALLBACK_MTU)));
    }
    Unreachable::from_error(error)
}

fn report_failed_open(key: Key, error: &io::Error) {
    if matches!(key, Key::Ping(..)) && error.kind() == ErrorKind::PermissionDenied {
        warn_limited!(
            "the host does not let this process send pings for the guest; Linux: widen the sysctl net.ipv4.ping_group_range"
        );
    } else if Unreachable::from_error(error).is_none() {
        warn_limited!("no datagrams to {} for the guest: {error}", key.remote());
    }
}

/// The host appears as the gateway of `subnet`, and so does who has no address that the guest could answer.
pub(crate) fn as_guest_sees(peer: SocketAddr, subnet: Subnet) -> SocketAddrV4 {
    match peer {
        SocketAddr::V4(v4) if !v4.ip().is_loopback() && !subnet.contains(*v4.ip()) => v4,
        // There are no IPv6 addresses on the guest's network.
        other => SocketAddrV4::new(subnet.gateway(), other.port()),
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
    let to = guest.subnet().guest();
    guest.outbox.push_icmp(buffer, len, from, to);
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
    let to = guest.subnet().guest();
    guest.outbox.push_icmp(buffer, message.len(), address, to);
}
